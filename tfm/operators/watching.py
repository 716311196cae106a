"""Tells whether somebody looks at what is called, and looks itself at what torch computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from tfm.transforms import transforming

aten = torch.ops.aten
# They compute nothing that a later call would need again.
IDLE = {
    aten.promote_types.default, aten.empty.memory_format, aten.empty_strided.default, aten.empty_like.default,
    aten.empty_permuted.default, aten.new_empty.default,
}  # fmt: skip


def is_intercepted() -> bool:
    """Tells whether operations are met one by one, as they are written: by a trace, a transform or a mode."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or transforming()
    )


def is_watched() -> bool:
    """Tells whether somebody looks at operations: one of those, or a profiler."""
    return is_intercepted() or torch.autograd._profiler_enabled()


class Spy(TorchDispatchMode):
    """Notes whether torch computes anything: views and allocations aside."""

    def __init__(self) -> None:
        super().__init__()
        self.has_seen = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.has_seen |= not function.is_view and function not in IDLE
        return function(*args, **(kwargs or {}))


@contextmanager
def unseen() -> Iterator[None]:
    """Within the block no mode looks on, a Spy neither."""
    with _disable_current_modes():
        yield
