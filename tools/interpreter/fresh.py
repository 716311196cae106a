"""The bytes of torch's own memory that nobody has written yet.

A tensor from torch.empty and its kin (empty_like, empty_strided, empty_permuted, new_empty, new_empty_strided) is
unwritten, byte by byte, until a kernel stores there or an operator of ATen writes there. Both are seen, not guessed
from values: every operator passes through a TorchDispatchMode, whose schema says which arguments it writes. Inside an
operator of our own the mode stays on, so that what a launch function allocates is seen too.

An operator of ATen counts as having written all elements of a tensor that it writes to, index_put_ and scatter_
included; what it reads must have been written. An operator of our own must have written all that it returns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tools.interpreter.findings import Finding, Findings, Place, here

ALLOCATES = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"}
# These ask a tensor only for its shape.
SHAPES_ONLY = {"zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like"}
SHAPES_ONLY |= {"new_zeros", "new_ones", "new_full", "set_", "resize_", "is_same_size"}
# These overwrite their first argument without reading it, as every `out` argument is written.
OVERWRITES = {"copy_", "fill_", "zero_", "normal_", "uniform_", "random_", "bernoulli_", "exponential_"}


@dataclass
class Allocation:
    """A storage that came unwritten; holding it keeps its address from being given to another."""

    storage: torch.UntypedStorage
    address: int
    place: Place
    written: np.ndarray  # a byte for each of the storage's, padded to whole elements of any width

    def elements(self, x: Tensor) -> np.ndarray:
        """Returns the bytes' marks of each element of `x`, as integers as wide as an element."""
        width = min(x.element_size(), 8)
        marks = self.written.view(f"u{width}")
        steps = [step * x.element_size() for step in x.stride()]
        first = marks[x.storage_offset() * x.element_size() // width :]
        return np.lib.stride_tricks.as_strided(first, x.shape, steps)


def all_written(width: int) -> int:
    """Returns the marks of an element that is written, read as one integer."""
    return int.from_bytes(b"\1" * width, "little")


class FreshMemory(TorchDispatchMode):
    """While on, knows of every tensor that came unwritten; `paused` while the interpreter itself uses torch."""

    def __init__(self, findings: Findings) -> None:
        super().__init__()
        self.findings = findings
        self.paused = False
        self._allocations: dict[int, Allocation] = {}

    def allocation(self, x: Tensor) -> Allocation | None:
        """Returns the allocation of `x`'s storage; None where it has none or it did not come unwritten."""
        if x.layout != torch.strided or x.device.type != "cpu":
            return None
        found = self._allocations.get(x.untyped_storage().data_ptr())
        return found if found and found.storage.data_ptr() == found.address else None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if func.namespace != "aten":
            if not func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CPU):
                return func(*args, **kwargs)
            with self:
                result = func._op_dk(torch._C.DispatchKey.CPU, *args, **kwargs)
            for place, output in enumerate(tree_leaves(result)):
                if isinstance(output, Tensor):
                    self._demand(output, f"{func.namespace}::{name}", f"output {place}", "is left unwritten")
            return result
        if name not in SHAPES_ONLY | ALLOCATES and not func.is_view:
            for argument, x in _tensors(func, args, kwargs):
                if not (_is_written(argument) and (argument.kwarg_only or name in OVERWRITES)):
                    self._demand(x, f"aten::{name}", argument.name, "is read unwritten")
        result = func(*args, **kwargs)
        if name in ALLOCATES:
            self._allocated(result)
        for argument, x in _tensors(func, args, kwargs):
            known = self.allocation(x) if _is_written(argument) else None
            if known:
                known.elements(x)[...] = all_written(min(x.element_size(), 8))
        return result

    def _allocated(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        if storage.nbytes():
            written = np.zeros(-(-storage.nbytes() // 16) * 16, np.uint8)
            self._allocations[storage.data_ptr()] = Allocation(storage, storage.data_ptr(), here(), written)

    def _demand(self, x: Tensor, operator: str, argument: str, what: str) -> None:
        """Reports `x` where some of it is unwritten."""
        known = self.allocation(x)
        if known is None:
            return
        unwritten = known.elements(x) != all_written(min(x.element_size(), 8))
        if unwritten.any():
            first = tuple(int(place[0]) for place in unwritten.nonzero())
            self.findings.add(
                Finding(
                    "unwritten", operator, f"{argument} {list(x.shape)}", f"{list(first)} {what}",
                    places=(here(), known.place), elements=int(unwritten.sum()),
                )
            )  # fmt: skip


def _tensors(func: Any, args: Any, kwargs: Any) -> Iterator[tuple[Any, Tensor]]:
    """Yields each tensor that `func` is given, with the argument of its schema that it is (part of)."""
    arguments = func._schema.arguments
    given = [*zip(arguments, args, strict=False), *((a, kwargs[a.name]) for a in arguments if a.name in kwargs)]
    for argument, value in given:
        for x in value if isinstance(value, list | tuple) else (value,):
            if isinstance(x, Tensor):
                yield argument, x


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write
