"""Watching Triton kernels: which ran, and that they wrote every element they were given."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.trace_rules
from triton.runtime.jit import KernelInterface


def watch(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels launched from now on, in order: a fallback leaves the list empty.

    Allocations are filled with NaN from now on, so that an element that no kernel writes is seen.
    """
    # Dynamo lists torch's functions once, and would never trace those that stand there patched.
    torch._dynamo.trace_rules.get_torch_obj_rule_map()
    launched: list[str] = []
    subscript, empty, empty_like = KernelInterface.__getitem__, torch.empty, torch.empty_like

    def recorded(kernel, grid):
        launched.append(kernel.fn.__name__)
        return subscript(kernel, grid)

    @torch.no_grad()  # checkpoint allocates leaves that need gradients
    def poisoned(tensor):
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(KernelInterface, "__getitem__", recorded)
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poisoned(empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: poisoned(empty_like(*args, **kwargs)))
    return launched
