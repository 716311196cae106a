"""Where native operators are tested: this machine's instruction sets, one thread against two, and what is called."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tfm import native

WHY_UNAVAILABLE = native.why_unavailable(torch.device("cpu"))
# What this machine's processor runs: the widest, and what that includes.
INCLUDED = {"avx512": ["avx512", "avx2"], "avx2": ["avx2"], "neon": ["neon"]}
INSTRUCTION_SETS = [] if WHY_UNAVAILABLE else INCLUDED[torch.ops.tfm_native.instruction_set()]

# Of every test of a native operator: skipped where there is none, and no element may go unwritten.
MARKS = [pytest.mark.skipif(bool(WHY_UNAVAILABLE), reason=WHY_UNAVAILABLE), pytest.mark.usefixtures("filled_with_nan")]


class Called(TorchDispatchMode):
    """Within the block, the names of the operators that are called, and each call with its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.calls: list[tuple[str, tuple[object, ...]]] = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.names.add(function._schema.name)
        self.calls.append((function._schema.name, arguments))
        return function(*arguments, **(options or {}))


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Within the block the kernels use this one."""
    before = torch.ops.tfm_native.instruction_set()
    torch.ops.tfm_native.use_instruction_set(name)
    try:
        yield
    finally:
        torch.ops.tfm_native.use_instruction_set(before)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Within the block torch has so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_same_bits(compute: Callable[[], list[torch.Tensor]]) -> None:
    """`compute` gives the same bits again, and on two threads."""
    results = []
    for count in (1, 1, 2):
        with threads(count):
            results.append(compute())
    for again in results[1:]:
        torch.testing.assert_close(again, results[0], rtol=0, atol=0)
