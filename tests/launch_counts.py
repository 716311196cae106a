"""How many kernels a GPU would launch for a piece of work, counted on any machine, without running Triton's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile
from triton.runtime.jit import KernelInterface

# torch's operators that launch one kernel each where their tensors lie on a GPU.
ONE_LAUNCH = {"add_", "addmm", "cat", "copy_", "fill_", "mm", "sum"}
# Those that launch nothing by themselves: views, allocations, questions, names for others.
NO_LAUNCH = {
    *("as_strided", "expand", "flatten", "permute", "reshape", "select", "t", "transpose", "unbind", "view"),
    *("unflatten", "_unsafe_view"),
    *("empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "ones_like"),
    *("promote_types", "resolve_conj", "resolve_neg"),
    *("linear", "matmul", "stack", "to"),
}


def count(work: Callable[[], Any]) -> Counter[str]:
    """The launches of `work` by name: Triton's kernels, which are not run and leave their outputs as they lay, and
    torch's operators.

    Raises:
        AssertionError: an operator that neither list above names.
    """
    launches: Counter[str] = Counter()

    def recorded(kernel: Any, grid: Any) -> Callable[..., None]:
        return lambda *_, **__: launches.update([kernel.fn.__name__])

    with patch.object(KernelInterface, "__getitem__", recorded), profile(activities=[ProfilerActivity.CPU]) as run:
        work()
    for event in run.events():
        name = operator(event)
        if name in ONE_LAUNCH and not any(operator(parent) in ONE_LAUNCH for parent in ancestors(event)):
            launches[name] += 1
        assert name is None or name in ONE_LAUNCH | NO_LAUNCH, f"does aten::{name} launch a kernel? say so in this file"
    return launches


def operator(event: FunctionEvent) -> str | None:
    """The name of torch's own operator that this event is; None where it is something else."""
    return event.name.removeprefix("aten::") if event.name.startswith("aten::") else None


def ancestors(event: FunctionEvent) -> list[FunctionEvent]:
    parents = []
    while (event := event.cpu_parent) is not None:
        parents.append(event)
    return parents
