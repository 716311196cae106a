"""What serves a class that computes its attention itself, and how it is tried before it is used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Dropout, Module

from tfm.ops import backends
from tfm.patching.fusion import Fused, fuse, fusion_of, why_no_kernel


class Trial(NamedTuple):
    """A small module of a class, in evaluation, and a function that runs it and returns what is to be compared."""

    module: Module
    run: Callable[[Any], Tensor]


def no_reason(module: Module) -> str:
    """Finds nothing against a module."""
    return ""


class Adapter(NamedTuple):
    """What a class becomes.

    Attributes:
        forward: its fused forward.
        trials: yields small modules of the class.
        reads_masks: whether it reads masks of keys, of the class's model: see masks.py.
        why_left: says why a module is left as it is, whatever its class does; empty where it is not.
    """

    forward: type[Fused]
    trials: Callable[[Any], Iterator[Trial]]
    reads_masks: bool = False
    why_left: Callable[[Any], str] = no_reason


def why_left(module: Module, adapter: Adapter) -> str:
    """Says why a module may not become what its adapter makes of it; empty where it may."""
    if "forward" in vars(module):
        return "its forward was replaced on the object itself"
    kind: Any = type(module)
    return adapter.why_left(module) or _why_different(kind, adapter)


@cache
def _why_different(kind: Any, adapter: Adapter) -> str:
    """Says how a class differs from what its adapter was written for, by trials; empty where it does not."""
    with _in_fp32(), torch.random.fork_rng(devices=()), torch.no_grad(), backends.use("reference"):
        torch.manual_seed(0)
        try:
            for module, run in adapter.trials(kind):
                for parameter in module.eval().parameters():
                    parameter.normal_(std=0.5)
                theirs = run(module)
                fuse(module, "attention", adapter.forward)
                ours = run(module)
                if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5):
                    return "its attention computes something else than what is known of its class"
        except Exception as error:
            return f"its attention could not be tried: {type(error).__name__}"
    return ""


@contextmanager
def _in_fp32() -> Iterator[None]:
    """Has tensors made and computed on a CPU in fp32 within the block, whatever holds outside."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"), torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.set_default_dtype(before)


def runs_fused(module: Module) -> bool:
    """Tells whether a call of a module runs a fused forward, or asks it for the reason not to."""
    return fusion_of(module) is not None and "forward" not in vars(module)


def rate(dropout: Module) -> float:
    """Returns the rate at which a dropout layer drops now."""
    return dropout.p if isinstance(dropout, Dropout) and dropout.training else 0.0


def why_plain(mask: Tensor | None, x: Tensor) -> str:
    """Says why a call runs as before; never where its mask is one that the class's own forward cannot read."""
    return "" if mask is not None and not mask.is_floating_point() else why_no_kernel("attention", x)
