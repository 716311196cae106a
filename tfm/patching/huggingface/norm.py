"""RMSNorm of the families: which of their roundings a module has, found by trying it."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module

from tfm import ops
from tfm.nn.fusible import PLAIN_PARAMETERS
from tfm.patching.fusion import Change, Fused, fusing, plain_kind, why_no_kernel
from tfm.patching.huggingface.trial import twin_of

NAMES = ("RMSNorm", "LayerNorm")
HALVES = (torch.float16, torch.bfloat16)


class Rounding(NamedTuple):
    """How a family's RMSNorm rounds: see the table of `tfm.ops.rms_norm`.

    Attributes:
        weight_offset: 1 for 1 + weight.
        round_first: before the weight: always, never, or only where the weight is of 16 bits ("halves").
        result: the dtype of the result: of x, of the weight, or the wider of the two.
    """

    weight_offset: float
    round_first: bool | str
    result: str

    def arguments(self, x: Tensor, weight: Tensor) -> dict[str, Any]:
        """Returns the arguments of `tfm.ops.rms_norm` for these dtypes."""
        wider = torch.promote_types(x.dtype, weight.dtype)
        out_dtype = {"x": None, "weight": weight.dtype, "wider": wider}[self.result]
        round_first = weight.dtype in HALVES if self.round_first == "halves" else bool(self.round_first)
        return {"weight_offset": self.weight_offset, "round_first": round_first, "out_dtype": out_dtype}


ROUNDINGS = (
    Rounding(0.0, True, "wider"),  # Llama and most others
    Rounding(1.0, False, "x"),  # Gemma
    Rounding(0.0, "halves", "weight"),  # T5
    Rounding(0.0, False, "x"),  # torch, gpt-oss
)


class FusedRMSNorm(Fused):
    """RMSNorm in one pass; `rounding` and `eps` are those of the module."""

    rounding: Rounding
    eps_name: str

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalises [..., C] over its last dimension."""
        weight: Any = self.weight
        reason = why_not_rms(self, hidden_states)
        if reason:
            return self.plainly(reason, hidden_states)
        self.fusedly()
        eps = getattr(self, self.eps_name)
        return ops.rms_norm(hidden_states, weight, eps, **self.rounding.arguments(hidden_states, weight))


def change_of(module: Module) -> Change | None:
    """Returns what an RMSNorm would become; None for any other module."""
    found = rounding_of(module)
    return found and fusing("norm", FusedRMSNorm, rounding=found[0], eps_name=found[1])


def why_not_rms(module: Module, x: Tensor) -> str:
    """Says why a call of an RMSNorm does not run fused; empty where it does."""
    weight: Any = module._parameters.get("weight")
    if type(weight) not in PLAIN_PARAMETERS or weight is None:
        return f"its weight is a {type(weight).__name__}"
    return why_no_kernel("rms_norm", x)


def rounding_of(module: Module) -> tuple[Rounding, str] | None:
    """Returns how an RMSNorm rounds, and which of its attributes is its epsilon; None where it is none of ours."""
    kind = plain_kind(module)
    if not kind.__name__.endswith(NAMES) or issubclass(kind, torch.nn.LayerNorm):
        return None
    parameters = dict(module.named_parameters())
    if list(parameters) != ["weight"] or parameters["weight"].dim() != 1 or module._buffers or module._modules:
        return None
    names = [name for name in ("variance_epsilon", "eps", "epsilon") if isinstance(vars(module).get(name), float)]
    return _tried(kind, names[0], vars(module)[names[0]], module) if names else None


# Modules of one class with one epsilon are alike; the module itself is only looked at.
_KNOWN: dict[tuple[type, str, float], tuple[Rounding, str] | None] = {}


def _tried(kind: type[Module], eps_name: str, eps: float, module: Module) -> tuple[Rounding, str] | None:
    key = kind, eps_name, eps
    if key not in _KNOWN:
        _KNOWN[key] = next(((x, eps_name) for x in ROUNDINGS if _is_as(x, kind, eps_name, eps, module)), None)
    return _KNOWN[key]


def _is_as(rounding: Rounding, kind: type[Module], eps_name: str, eps: float, module: Module) -> bool:
    """Tells whether a small twin of the module gives what `rounding` says, to the last bit or in fp32 nearly."""
    for x, weight in _trials():
        twin = twin_of(module, {"weight": weight}, {})
        try:
            with torch.no_grad():
                expected = kind.forward(twin, x)
        except Exception:
            return False
        found = ops.rms_norm(x, weight, eps, impl="reference", **rounding.arguments(x, weight))
        tolerance = 1e-6 if expected.dtype == torch.float32 else 0.0
        if found.dtype != expected.dtype or not torch.allclose(found, expected, rtol=tolerance, atol=0):
            return False
    return True


@lru_cache(maxsize=1)
def _trials() -> tuple[tuple[Tensor, Tensor], ...]:
    """Returns rows, some so small that epsilon shows, and weights, in the dtypes that models have."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 8, generator=generator) * torch.logspace(-4, 1, 64)[:, None]
    weight = torch.randn(8, generator=generator)
    full, half = torch.float32, torch.bfloat16
    return tuple((x.to(of_x), weight.to(of_weight)) for of_x, of_weight in ((full, full), (half, half), (half, full)))
