"""torch.nn modules and tfm.nn's with one state_dict, run side by side in float64."""

from __future__ import annotations

import torch
from torch import Tensor

import tfm.nn

TOLERANCE = 1e-10


def pair(name: str, *arguments: object, **options: object) -> tuple[torch.nn.Module, torch.nn.Module]:
    """torch.nn.<name> and tfm.nn.<name>, with the same random weights (biases and norms too)."""
    theirs = getattr(torch.nn, name)(*arguments, **options).double()
    ours = getattr(tfm.nn, name)(*arguments, **options).double()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def stack_pair(
    kind: str, layers: int = 2, norm: bool = True, **options: object
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """torch.nn.Transformer<kind> of `layers` layers and tfm.nn's, with the same random weights."""
    options = {"d_model": 8, "nhead": 2, "dim_feedforward": 12, "dropout": 0.0} | options
    stacks = []
    for library in (torch.nn, tfm.nn):
        layer = getattr(library, f"Transformer{kind}Layer")(**options)
        last = library.LayerNorm(options["d_model"]) if norm else None
        plain = {"enable_nested_tensor": False} if kind == "Encoder" else {}
        stacks.append(getattr(library, f"Transformer{kind}")(layer, layers, last, **plain).double())
    theirs, ours = stacks
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def results(
    module: torch.nn.Module, inputs: dict[str, Tensor], others: dict[str, object], valid: Tensor | None = None
) -> dict[str, Tensor]:
    """Outputs of module(**inputs, **others) at `valid` positions, and the gradients of all it depends on."""
    module.zero_grad(set_to_none=True)
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
    output = module(**leaves, **others)
    outputs = [part for part in (output if isinstance(output, tuple) else (output,)) if part is not None]
    if valid is not None:
        outputs = [outputs[0][valid], *outputs[1:]]
    generator = torch.Generator().manual_seed(5)
    loss = sum((part * torch.randn(part.shape, generator=generator, dtype=part.dtype)).sum() for part in outputs)
    loss.backward()
    found = {f"output {index}": part.detach() for index, part in enumerate(outputs)}
    found |= {f"gradient of {name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return found | {
        f"gradient of {name}": parameter.grad.clone()
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }


def assert_equal_results(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        found = actual[name]
        assert found.shape == want.shape, f"{name}: expected shape {tuple(want.shape)}, got {tuple(found.shape)}"
        assert want.isfinite().all(), f"{name}: torch's own is not finite"
        error = (found - want).abs().max().item() if want.numel() else 0.0
        assert error <= TOLERANCE * max(1.0, want.abs().max().item() if want.numel() else 0.0), f"{name}: {error:.1e}"


def same_input_self_attention(module: torch.nn.Module) -> torch.nn.Module:
    """A module of one `x` that attends to itself, so that query is key is value."""

    class OfItself(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = module

        def forward(self, x: Tensor, **others: object) -> object:
            return self.attention(x, x, x, **others)

    return OfItself().train(module.training)
