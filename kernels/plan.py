"""Launch plans: the work of a launch function, kept for one call and done again for others of the same kind.

Around its launches a launch function looks up settings, gathers arguments and has Triton bind them, which takes ten
times as long as the launches. All of it follows from the numbers of a call and from the shapes, strides and dtypes of
its tensors. So a plan keeps which tensors are made, which compiled kernels are launched with which numbers, and where
addresses stand; to play it is to make those tensors, take the addresses and launch.

What torch computes in a launch function beside that, say a copy of a strided input, no plan would repeat: a call of
which that is so has none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import driver

from tfm.kernels.tape import Tape

aten = torch.ops.aten
# They compute nothing that a later call would need again.
IDLE = {
    aten.promote_types.default, aten.empty.memory_format, aten.empty_strided.default, aten.empty_like.default,
    aten.empty_permuted.default, aten.new_empty.default,
}  # fmt: skip


class Pointer(NamedTuple):
    """An argument that is a tensor: `slot` says of which, the given ones first; `offset` in elements of it.

    `size` and `stride` are those of a view, None where it is that tensor itself.
    """

    slot: int
    offset: int
    itemsize: int
    size: tuple[int, ...] | None
    stride: tuple[int, ...] | None

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        """Returns the tensor."""
        x = tensors[self.slot]
        if self.size is None or self.stride is None:
            return x
        return x.as_strided(self.size, self.stride, x.storage_offset() + self.offset)


class Step(NamedTuple):
    """A launch: values by place, of which `pointers` are addresses and `tuples` hold some; `sites` are the call's."""

    kernel: Any
    compiled: Any
    grid: tuple[int, int, int]
    options: dict[str, Any]
    values: list[Any]
    pointers: list[tuple[int, Pointer]]
    tuples: list[tuple[int, list[tuple[int, Pointer]]]]
    sites: list[int]


class Spy(TorchDispatchMode):
    """Notes whether torch computes anything: views and allocations aside."""

    def __init__(self) -> None:
        super().__init__()
        self.has_seen = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.has_seen |= not function.is_view and function not in IDLE
        return function(*args, **(kwargs or {}))


class Recording(Tape):
    """A tape that does what it is asked and takes it down."""

    def __init__(self, call: Any) -> None:
        self.tensors: list[Any] = list(call)
        self.site = getattr(call, "site", None)
        self.made: list[tuple[Any, ...]] = []
        self.zeroed: list[int] = []
        self.steps: list[Step] = []
        self.is_whole = True

    def outputs(self, call: Any) -> Any:
        """Returns the results of an operator's call, still empty."""
        return self._make(call.outputs())

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Returns scratch memory."""
        return self._make(super().empty(shape, dtype, device))

    def zeros(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Returns scratch memory that sums are added to."""
        # Memory that a launch adds to is 0 before the first launch.
        self.is_whole &= not self.steps
        self.zeroed.append(len(self.tensors))
        with _unseen():
            return self._make(super().zeros(shape, dtype, device))

    def scratch(self, x: Tensor) -> Tensor:
        """Returns scratch memory that was just made."""
        return self._make(x)

    def launch(self, kernel: Any, grid: tuple[int, ...], options: dict[str, Any], **arguments: Any) -> None:
        """Launches `kernel` with all of its arguments."""
        names = kernel.arg_names
        order = [arguments[name] for name in names]
        with _unseen():
            compiled = kernel[grid](*order, **options)
        pointers, tuples, values = [], [], list(order)
        for place, value in enumerate(order):
            if isinstance(value, Tensor):
                pointers.append((place, self._pointer(value)))
                values[place] = None
            elif isinstance(value, tuple):
                inner = [(i, self._pointer(field)) for i, field in enumerate(value) if isinstance(field, Tensor)]
                if inner:
                    tuples.append((place, inner))
                    fields: list[Any] = [None if isinstance(field, Tensor) else field for field in value]
                    values[place] = type(value)(*fields)
            elif not isinstance(value, (int, float, type(None))):
                self.is_whole &= isinstance(value, str)
        sites = [place for place, name in enumerate(names) if name == "site"]
        self.is_whole &= all(order[place] == self.site for place in sites)
        x, y, z = (*grid, 1, 1)[:3]
        self.steps.append(Step(kernel, compiled, (x, y, z), options, values, pointers, tuples, sites))

    def _make(self, made: Any) -> Any:
        for x in made if isinstance(made, tuple) else (made,):
            if x is not None:
                self.tensors.append(x)
                self.made.append((x.shape, x.stride(), x.dtype, x.device))
                self.is_whole &= x.storage_offset() == 0 and x.numel() > 0
        return made

    def _pointer(self, x: Tensor) -> Pointer:
        for slot, other in enumerate(self.tensors):
            if other is x:
                return Pointer(slot, 0, x.itemsize, None, None)
        storage = x.untyped_storage().data_ptr()
        found = [
            slot for slot, other in enumerate(self.tensors)
            if isinstance(other, Tensor) and other.untyped_storage().data_ptr() == storage and other.dtype == x.dtype
        ]  # fmt: skip
        # Of two tensors in one memory a view may be of either, and the next call's lie elsewhere.
        if len(found) != 1 or x.numel() == 0:
            self.is_whole = False
            return Pointer(0, 0, x.itemsize, None, None)
        offset = x.storage_offset() - self.tensors[found[0]].storage_offset()
        return Pointer(found[0], offset, x.itemsize, tuple(x.shape), x.stride())


class Plan:
    """What a recording took down, to be played with other tensors."""

    __slots__ = ("device", "is_interpreted", "is_tuple", "made", "results", "steps", "zeroed")

    def __init__(self, tape: Recording, results: Any) -> None:
        given = len(tape.tensors) - len(tape.made)
        self.made, self.steps = tuple(tape.made), tuple(tape.steps)
        self.zeroed = tuple(slot - given for slot in tape.zeroed)
        slots = {id(x): slot - given for slot, x in enumerate(tape.tensors) if slot >= given}
        self.results = tuple(
            None if x is None else slots[id(x)] for x in (results if isinstance(results, tuple) else (results,))
        )
        self.is_tuple = isinstance(results, tuple)
        self.device = next(x.get_device() for x in tape.tensors if isinstance(x, Tensor))
        self.is_interpreted = any(step.compiled is None for step in tape.steps)

    def play(self, given: Sequence[Any], addresses: list[int], site: int) -> Any:
        """Does it for these arguments, whose tensors have these addresses; others have 0."""
        made = [
            torch.empty_strided(size, stride, dtype=dtype, device=device) for size, stride, dtype, device in self.made
        ]
        for place in self.zeroed:
            made[place].zero_()
        if self.is_interpreted:
            self._interpret([*given, *made], site)
        else:
            self._launch([*addresses, *[x.data_ptr() for x in made]], site)
        results = [None if place is None else made[place] for place in self.results]
        return tuple(results) if self.is_tuple else results[0]

    def _launch(self, addresses: list[int], site: int) -> None:
        stream = driver.active.get_current_stream(self.device)
        for step in self.steps:
            arguments = step.values.copy()
            for place, pointer in step.pointers:
                arguments[place] = addresses[pointer.slot] + pointer.offset * pointer.itemsize
            for place, inner in step.tuples:
                fields = list(arguments[place])
                for index, pointer in inner:
                    fields[index] = addresses[pointer.slot] + pointer.offset * pointer.itemsize
                arguments[place] = tuple(fields)
            for place in step.sites:
                arguments[place] = site
            compiled = step.compiled
            compiled.run(
                *step.grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments
            )  # fmt: skip

    def _interpret(self, tensors: list[Any], site: int) -> None:
        for step in self.steps:
            arguments = step.values.copy()
            for place, pointer in step.pointers:
                arguments[place] = pointer.of(tensors)
            for place, inner in step.tuples:
                fields = list(arguments[place])
                for index, pointer in inner:
                    fields[index] = pointer.of(tensors)
                arguments[place] = type(arguments[place])(*fields)
            for place in step.sites:
                arguments[place] = site
            step.kernel[step.grid](*arguments, **step.options)


@contextmanager
def _unseen() -> Iterator[None]:
    """Within the block no Spy looks on."""
    with torch.utils._python_dispatch._disable_current_modes():
        yield


def record(launch: Callable[..., Any], call: Any) -> tuple[Plan | None, Any]:
    """Runs a launch function for a call; returns its plan, None where there can be none, and its results."""
    tape = Recording(call)
    with Spy() as spy:
        results = launch(tape, call)
    made = results if isinstance(results, tuple) else (results,)
    is_whole = tape.is_whole and not spy.has_seen and bool(tape.steps)
    known = {id(x) for x in tape.tensors[len(call) :]}
    if not is_whole or any(x is not None and id(x) not in known for x in made):
        return None, results
    return Plan(tape, results), results
