"""Operators called by their plans, past torch's dispatcher: which calls have one, and when it may be played."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from triton import knobs

from tfm.kernels.plan import record

PLAIN = (Tensor, torch.nn.Parameter)
# Addresses that are multiples of this are what Triton compiles for; a plan is of such addresses alone.
ALIGNMENT = 16
MOST_PLANS, MOST_SEEN = 1024, 4096
# All that there are, to be forgotten together.
EVERY: list[Planned] = []


class Planned:
    """An operator, called by its plans past torch's dispatcher where nobody looks on.

    A call that is the second of its kind is recorded: of ragged batches few kinds come again.
    """

    def __init__(self, operator: Callable[..., Any], launch: Callable[..., Any], arguments: Any) -> None:
        self.operator, self.launch, self.make = operator, launch, arguments._make
        fields = arguments._fields
        self.site = fields.index("site") if "site" in fields else None
        self.plans: dict[Any, Any] = {}
        self.seen: set[Any] = set()
        EVERY.append(self)

    def __call__(self, *arguments: Any) -> Any:
        """Returns the operator's results."""
        if is_watched():
            return self.operator(*arguments)
        together, site, addresses = 0, 0, []
        key: list[Any] = []
        given: Sequence[Any] = arguments
        if self.site is not None:
            # Layers differ in it, and share their plans.
            given = [*arguments]
            site, given[self.site] = given[self.site], None
        for x in given:
            if x.__class__ in PLAIN:
                if x.is_neg() or x._is_zerotensor():
                    return self.operator(*arguments)
                address = x.data_ptr()
                together |= address
                addresses.append(address)
                key += (x.shape, x.stride(), x.dtype)
            else:
                addresses.append(0)
                key.append(x if x.__class__ is not list else tuple(x))
        first = arguments[0]
        if together % ALIGNMENT or first.__class__ not in PLAIN:
            return self.operator(*arguments)
        # A recording does not tell apart the places of a tensor that is given twice.
        key += (first.device, tuple(map(addresses.index, addresses)))
        if first.dtype == torch.float32:
            key.append(torch.backends.cuda.matmul.fp32_precision)
        known = tuple(key)
        plan = self.plans.get(known, False)
        if plan is False:
            return self._first(known, arguments)
        if plan is None or (first.is_cuda and first.get_device() != torch.cuda.current_device()):
            return self.operator(*arguments)
        return plan.play(arguments, addresses, site)

    def _first(self, key: Any, arguments: Sequence[Any]) -> Any:
        """Computes a call whose kind has no plan yet."""
        if any(isinstance(x, Tensor) and x.__class__ not in PLAIN for x in arguments):
            return self.operator(*arguments)
        if key not in self.seen:
            if len(self.seen) >= MOST_SEEN:
                self.seen.clear()
            self.seen.add(key)
            return self.operator(*arguments)
        if arguments[0].device.type not in ("cpu", "cuda"):
            return self.operator(*arguments)
        if len(self.plans) >= MOST_PLANS:
            self.plans.clear()
        with torch.no_grad(), torch.cuda.device_of(arguments[0]):
            self.plans[key], results = record(self.launch, self.make(arguments))
        return results


def forget() -> None:
    """Drops all plans."""
    for planned in EVERY:
        planned.plans.clear()
        planned.seen.clear()


@contextmanager
def unused() -> Iterator[None]:
    """Within the block there are no plans of before, and after it none of its own: its launch settings are others."""
    forget()
    try:
        yield
    finally:
        forget()


def is_watched() -> bool:
    """Tells whether somebody looks at operators or launches: a trace, a transform, a mode, a profiler."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.autograd._profiler_enabled()
        or bool(knobs.runtime.launch_enter_hook.calls)
        or bool(knobs.runtime.launch_exit_hook.calls)
    )
