"""What a model gives and what it runs, and what it is made of: to be compared before and after accelerate()."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import CAUSAL, MASKED, Species, batch

NEW_TOKENS = 5
# Nothing is computed by these: they look at what is there, or make what is then filled.
VIEWS = {
    "view", "reshape", "_unsafe_view", "unsqueeze", "squeeze", "expand", "transpose", "permute", "t", "slice",
    "select", "detach", "alias", "as_strided", "split", "chunk", "unbind", "empty", "empty_like", "new_empty",
    "zeros", "ones", "arange", "lift_fresh", "_to_copy", "clone", "unfold", "narrow", "split_with_sizes",
    "empty_strided", "zeros_like", "ones_like", "full", "scalar_tensor",
}  # fmt: skip


class Outcome(NamedTuple):
    """The loss, logits [N, V] where they mean something, and the gradients by name."""

    loss: Tensor
    logits: Tensor
    gradients: dict[str, Tensor]


def step(model: nn.Module, species: Species, padding: str) -> Outcome:
    """Runs forward and backward on a batch."""
    given = batch(species.kind, padding)
    model.zero_grad()
    torch.manual_seed(3)
    output = model(**given)
    output.loss.backward()
    logits = output.logits.detach()
    valid = given.get("attention_mask")
    if species.kind in (MASKED, CAUSAL) and valid is not None and logits.shape[:2] == valid.shape:
        logits = logits[valid.bool()]
    gradients = {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}
    return Outcome(output.loss.detach(), logits, gradients)


def far(found: Tensor, expected: Tensor, scale: float) -> float:
    """Returns the greatest difference as a share of `scale`; infinite where one is not a number."""
    if found.shape != expected.shape:
        return math.inf
    difference = (found - expected).abs().max().item() / scale if found.numel() else 0.0
    return difference if math.isfinite(difference) else math.inf


def differences(found: Outcome, expected: Outcome) -> dict[str, float]:
    """Returns how far loss, logits and gradients are apart, of the logits' and of the greatest gradient's scale."""
    largest = max(x.abs().max().item() for x in expected.gradients.values())
    apart = {"loss": far(found.loss, expected.loss, expected.loss.abs().item())}
    apart["logits"] = far(found.logits, expected.logits, expected.logits.abs().max().item())
    # An expert that no token came to has no gradient in some models, and one of 0 in ours.
    nothing = torch.zeros(())
    for name in found.gradients.keys() | expected.gradients.keys():
        gradients = (one.gradients.get(name, nothing) for one in (found, expected))
        apart[f"gradient of {name}"] = far(*torch.broadcast_tensors(*gradients), largest)
    return apart


def generated(model: nn.Module, kind: str, **options: Any) -> Tensor:
    """Returns what a model says, greedily unless told otherwise, behind sentences that are padded at the left."""
    given = {name: x for name, x in batch(kind, "left").items() if name != "labels"}
    return model.generate(**given, max_new_tokens=NEW_TOKENS, do_sample=False, **options)  # type: ignore[operator]


def continued(model: nn.Module, cut: int = 6, extra: int = 4) -> Tensor:
    """Returns the logits of `extra` tokens given at once on top of `cut` that are in the cache."""
    given = batch(CAUSAL, "left")
    tokens, valid = given["input_ids"], given["attention_mask"]
    first = model(input_ids=tokens[:, :-extra], attention_mask=valid[:, :-extra], use_cache=True)
    name = "past_key_values" if getattr(first, "past_key_values", None) is not None else "mems"
    cache = {name: getattr(first, name)}
    return model(input_ids=tokens[:, -extra:], attention_mask=valid, use_cache=True, **cache).logits


class Ran(TorchDispatchMode):
    """Counts operators by kind: tfm's, torch's attention, softmaxes of 4-D scores, and what else computes."""

    def __init__(self) -> None:
        super().__init__()
        self.ours: Counter[str] = Counter()
        self.attention = 0
        self.softmaxes = 0
        self.others = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func.name().partition("::")
        name = name.partition(".")[0]
        if namespace.startswith("tfm"):
            self.ours[name] += 1
        elif "scaled_dot_product" in name:
            self.attention += 1
        elif name in ("_softmax", "_safe_softmax") and args[0].dim() >= 4:
            self.softmaxes += 1
        elif name not in VIEWS:
            self.others += 1
        return func(*args, **(kwargs or {}))


def ran(model: nn.Module, species: Species, padding: str = "right") -> Ran:
    """Returns what a forward runs."""
    with Ran() as counts, torch.no_grad():
        model(**batch(species.kind, padding))
    return counts


def anatomy(model: nn.Module) -> dict[str, Any]:
    """Returns what a model consists of: classes, attributes, hooks and the values of all configs, by module."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        attributes = vars(module)
        found[name] = (
            type(module),
            {key: x for key, x in attributes.items() if isinstance(x, (bool, int, float, str, type(None)))},
            sorted(attributes),
            {key: len(x) for key, x in attributes.items() if key.endswith("_hooks")},
        )
        config = attributes.get("config")
        if config is not None:
            found[f"{name} config"] = _values(vars(config))
    return found


def _values(given: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _values(vars(x)) if hasattr(x, "to_dict") else repr(x) for key, x in given.items()}


def set_dropout(model: nn.Module, probability: float) -> None:
    """Sets every probability of a dropout that a model holds, in modules or as numbers."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
        for name, x in vars(module).items():
            if "dropout" in name and isinstance(x, float):
                setattr(module, name, probability)


@contextmanager
def changed_weights(model: nn.Module) -> Iterator[None]:
    """Within the block all parameters are others."""
    generator = torch.Generator().manual_seed(7)
    before = [x.detach().clone() for x in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    yield
    with torch.no_grad():
        for parameter, old in zip(model.parameters(), before, strict=True):
            parameter.copy_(old)
