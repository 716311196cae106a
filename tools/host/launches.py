"""Launches and waits of a piece of work on a GPU: counted, neither run nor compiled.

A call of torch that computes counts as one launch, however many kernels cuBLAS or a sort make of it. Views and
allocations are none; a list that becomes a tensor is one, the copy to the GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.runtime import driver

from tfm.ops.registry import NAMESPACE
from tools.host.stand_in import DEVICE, Driver, as_on_gpu

PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "_addmm_activation"}
# Allocations, questions, numbers that stay with the host, and what the profiler is told.
NOT_LAUNCHED = {
    *("empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided"),
    *("_unsafe_view", "is_same_size", "promote_types", "result_type", "can_cast", "scalar_tensor"),
    *("_local_scalar_dense", "_record_function_enter_new", "_record_function_exit"),
}
# Their results' sizes or values are the host's.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal"}
INDEXING = {"index", "index_put", "index_put_", "_unsafe_index"}
# What reads a CPU tensor without torch's dispatcher, and a GPU's by a copy.
READING = {Tensor.tolist, Tensor.numpy, Tensor.cpu}


@dataclass
class Launches:
    """Counts of Triton's kernels, products of matrices, torch's other computations, and waits of the host."""

    triton: Counter[str] = field(default_factory=Counter)
    products: Counter[str] = field(default_factory=Counter)
    others: Counter[str] = field(default_factory=Counter)
    syncs: Counter[str] = field(default_factory=Counter)

    def __sub__(self, earlier: Launches) -> Launches:
        return Launches(
            *(now - before for now, before in zip(vars(self).values(), vars(earlier).values(), strict=True))
        )

    def copy(self) -> Launches:
        return self - Launches()

    @property
    def total(self) -> int:
        return self.triton.total() + self.products.total() + self.others.total()


Launched = Callable[[str, dict[str, Any]], None]


@contextmanager
def without_compiling(launched: Launched) -> Iterator[None]:
    """Has each launch of a Triton kernel within the block only tell `launched` its name and specialisation.

    The latter is what triton's own hook is told: "key" is the same where a compilation serves both.
    """
    told = []

    def hook(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        kernel = Unlaunched(partial(launched, fn.jit_function.__name__, compile))
        kernel.run()
        # The next launch finds it as it would find what was compiled.
        compiled = fn.jit_function.device_caches[DEVICE][0]
        compiled[compile["key"]] = kernel
        told.append((compiled, compile["key"]))
        return True

    before = knobs.runtime.jit_cache_hook
    driver.set_active(Driver())
    knobs.runtime.jit_cache_hook = hook
    try:
        with as_on_gpu():
            yield
    finally:
        knobs.runtime.jit_cache_hook = before
        for compiled, key in told:
            del compiled[key]


class Unlaunched:
    """A compiled kernel in triton's eyes, whose launch is told and no more."""

    function = packed_metadata = None

    def __init__(self, tell: Callable[[], None]) -> None:
        self.tell = tell

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, *_: Any) -> None:
        self.tell()


class Counting(TorchDispatchMode):
    """Counts torch's operators; tfm's own are looked into."""

    def __init__(self, found: Launches) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(
        self, operator: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if operator.namespace == NAMESPACE:
            with self:
                return operator.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        with self:
            parts = operator.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        name = operator._schema.name.partition("::")[2]
        if name == "lift_fresh":
            # A number is an argument of the next launch.
            self.found.others["copy from the host"] += args[0].dim() > 0
        elif name in WAITING or (name in INDEXING and any(_is_mask(x) for x in args[1])):
            self.found.syncs[name] += 1
        if name in PRODUCTS:
            self.found.products[name] += 1
        elif not operator.is_view and name not in NOT_LAUNCHED:
            self.found.others[name] += 1
        return operator(*args, **kwargs)


class Watching(TorchFunctionMode):
    """Counts the readings of values that no operator of torch's sees."""

    def __init__(self, found: Launches) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function in READING:
            self.found.syncs[function.__name__] += 1
        return function(*args, **(kwargs or {}))


@contextmanager
def counting() -> Iterator[Launches]:
    """Yields what has been launched in the block so far."""
    found = Launches()

    def launched(name: str, _: dict[str, Any]) -> None:
        found.triton[name] += 1

    with without_compiling(launched), Watching(found), Counting(found):
        yield found


def count(found: Launches, work: Callable[[], Any]) -> Launches:
    """Counts launches of `work`, where `found` counts: of its second call, as what is made once does not count."""
    work()
    once = found.copy()
    work()
    return found - once


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)
