"""Mamba's mixers, of Mamba, FalconMamba, Zamba and Jamba: the functions that their forwards call are ours.

Each modelling file has its own copies of a few functions: the selective scan, one step of it, the short convolution and
one step of that. A mixer runs a copy of its own forward that finds ours under their names; what it does around them,
projections, norms, heads and caches, stays its own.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from transformers.models.mamba import modeling_mamba as theirs

from tfm import ops
from tfm.ops.backends import use
from tfm.ops.causal_conv1d import WIDTHS
from tfm.patching.fusion import Change, Fused, fusing, global_names, plain_kind, rebound, why_no_kernel

# The package whose kernels transformers takes where it is installed.
PACKAGE = "mamba_ssm"


def scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **others: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scans [B, D, S] with `dt` and `z` of that shape, `B` and `C` [B, N, S]; returns it, and the state [B, D, N]."""
    if not delta_softplus:
        return theirs.mamba_selective_scan(
            hidden_states, dt, A, B, C, D, z, delta_bias, return_last_state=return_last_state, **others
        )  # fmt: skip
    x, dt, B, C, z = _alike(hidden_states, dt, B, C, z)
    y, state = ops.selective_scan(
        x.transpose(1, 2), dt.transpose(1, 2), A, B.transpose(1, 2), C.transpose(1, 2), D=D,
        z=None if z is None else z.transpose(1, 2), delta_bias=delta_bias, return_final_state=True,
    )  # fmt: skip
    return (y.transpose(1, 2), state) if return_last_state else y.transpose(1, 2)


def scan_step(
    state: Tensor,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    z: Tensor | None = None,
    **others: Any,
) -> Tensor:
    """Scans one step [B, D], with `dt` and `z` of that shape, `B` and `C` [B, N]; changes the state in place."""
    if not dt_softplus:
        return theirs.mamba_selective_state_update(state, hidden_states, dt, A, B, C, D, dt_bias, False, z, **others)
    x, dt, B, C, z = _alike(hidden_states, dt, B, C, z)
    y, after = ops.selective_scan(
        x[:, None], dt[:, None], A, B[:, None], C[:, None], D=D, z=None if z is None else z[:, None],
        delta_bias=dt_bias, initial_state=state, return_final_state=True,
    )  # fmt: skip
    state.copy_(after)
    return y[:, 0].to(hidden_states.dtype)


def convolve(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **others: Any
) -> Tensor:
    """Convolves each channel of [B, D, S] with its `weight` [D, W], over this step and those before."""
    if not _has_kernel(weight, activation):
        return theirs.causal_conv1d_fn(hidden_states, weight, bias, activation, **others)
    return ops.causal_conv1d(hidden_states, weight, bias, activation=activation)


def convolve_step(
    hidden_states: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """Convolves the next steps, upon the last ones [B, D, W - 1 or more], which it changes in place."""
    if not _has_kernel(weight, activation):
        return theirs.causal_conv1d_update(hidden_states, conv_state, weight, bias, activation)
    before = conv_state[..., conv_state.shape[-1] - weight.shape[1] + 1 :]
    y = ops.causal_conv1d(hidden_states, weight, bias, initial_state=before, activation=activation)
    conv_state.copy_(torch.cat((conv_state, hidden_states), -1)[..., -conv_state.shape[-1] :])
    return y


def _alike(*given: Any) -> list[Any]:
    """Returns tensors in the widest of their dtypes: under autocast norms give fp32, products a narrower one."""
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in given if x is not None))
    return [None if x is None else x.to(dtype) for x in given]


def no_inner_function(*args: Any, **kwargs: Any) -> None:
    """Says, as transformers' own does without a package, that no function does all of a mixer at once."""


def _has_kernel(weight: Tensor, activation: str | None) -> bool:
    return weight.shape[1] in WIDTHS and activation in (None, "silu")


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "mamba_selective_scan": scan,
    "mamba_selective_state_update": scan_step,
    "causal_conv1d_fn": convolve,
    "causal_conv1d_update": convolve_step,
    "mamba_inner_fn": no_inner_function,
}


class FusedMixer(Fused):
    """A mixer whose scan and whose convolution are one operation each."""

    @classmethod
    def attributes(cls, kind: type[Module], **options: Any) -> dict[str, Any]:
        """Returns the copy of the class's forward that finds our functions."""
        return {"_forward": staticmethod(rebound(kind.forward, FUNCTIONS))}

    _forward: Callable[..., Any]

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Returns the shape of `hidden_states` [B, S, C]."""
        reason = why_no_kernel("selective_scan", hidden_states) or why_no_kernel("causal_conv1d", hidden_states)
        if reason:
            return self.plainly(reason, hidden_states, *args, **kwargs)
        self.fusedly()
        return self._forward(self, hidden_states, *args, **kwargs)


def change_of(module: Module) -> Change | None:
    """Returns what a mixer around a selective scan would become; None for any other module."""
    kind: Any = plain_kind(module)
    if "mamba_selective_scan" not in global_names(kind.forward) or not _are_ours(kind):
        return None
    change = fusing("recurrence", FusedMixer)
    installed = importlib.util.find_spec(PACKAGE) is not None
    return change._replace(why_left=f"{PACKAGE} is installed, whose kernels serve it") if installed else change


@functools.cache
def _are_ours(kind: type[Module]) -> bool:
    """Tells whether the functions of a class's modelling file give what ours give, states included."""
    scope = vars(sys.modules[kind.__module__])
    # Without the wrappers, which choose packages and warn where there is none.
    plain = {name: inspect.unwrap(scope[name]) for name in FUNCTIONS if name in scope}
    found, expected = _tried(FUNCTIONS), _tried(plain)
    return (
        found is not None
        and expected is not None
        and all(torch.allclose(x, y, rtol=1e-4, atol=1e-5) for x, y in zip(found, expected, strict=True))
    )


def _tried(functions: Any) -> list[Tensor] | None:
    """Returns what comes of each function; None where one cannot be called so."""
    generator = torch.Generator().manual_seed(0)

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    A, D, bias, weight = -new(4, 3).exp(), new(4), new(4), new(4, 3)
    state, taps = new(2, 4, 3), new(2, 4, 3)
    try:
        with torch.no_grad(), use("reference"):
            scanned = functions["mamba_selective_scan"](
                new(2, 4, 5), new(2, 4, 5), A, new(2, 3, 5), new(2, 3, 5), D=D, z=new(2, 4, 5), delta_bias=bias,
                delta_softplus=True, return_last_state=True,
            )  # fmt: skip
            stepped = functions["mamba_selective_state_update"](
                state, new(2, 4), new(2, 4), A, new(2, 3), new(2, 3), D, z=new(2, 4), dt_bias=bias, dt_softplus=True
            )
            convolved = functions["causal_conv1d_fn"](new(2, 4, 5), weight, bias, activation="silu")
            followed = functions["causal_conv1d_update"](new(2, 4, 1), taps, weight, bias, activation="silu")
    except Exception:
        return None
    return [*scanned, stepped, state, convolved, followed, taps]
