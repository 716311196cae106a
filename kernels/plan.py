"""Launch plans: the work of a launch function, kept for one call and done again for others of the same kind.

Around its launches a launch function looks up settings, gathers arguments and has Triton bind them, which takes ten
times as long as the launches. All of it follows from the numbers of a call and from the shapes, strides and dtypes of
its tensors. So a plan keeps which tensors are made, which compiled kernels are launched with which numbers, and where
addresses stand; to play it is to make those tensors, take the addresses and launch.

What torch computes in a launch function beside that, say a copy of a strided input, no plan would repeat: a call of
which that is so has none. Whose calls a plan is for, tfm.operators.routes knows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._dynamo.guards import _empty_strided_cpu, _empty_strided_cuda  # type: ignore[attr-defined]
from triton.knobs import runtime
from triton.runtime import driver

from tfm.kernels.tape import UNPLANNED, Tape
from tfm.operators.kinds import ALIGNMENT
from tfm.operators.watching import Spy, unseen

TAPE = Tape()


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


class Launch(NamedTuple):
    """A launch: values by place, of which `pointers` are addresses and `tuples` hold some; `sites` are the call's."""

    kernel: Any
    compiled: Any
    grid: tuple[int, int, int]
    options: dict[str, Any]
    values: list[Any]
    pointers: list[tuple[int, Pointer]]
    tuples: list[tuple[int, list[tuple[int, Pointer]]]]
    sites: list[int]

    def prepared(self) -> tuple[Any, ...]:
        """Returns what is needed of it where it is launched by its compiled kernel, offsets in bytes."""
        compiled = self.compiled
        pointers = [(place, pointer.slot, pointer.offset * pointer.itemsize) for place, pointer in self.pointers]
        tuples = [
            (place, [(i, pointer.slot, pointer.offset * pointer.itemsize) for i, pointer in inner])
            for place, inner in self.tuples
        ]
        # What a launcher is told of the kernel, and for profilers, of which there are none.
        told = (compiled.function, compiled.packed_metadata, None, None, None)
        return compiled.run, self.grid, told, self.values, pointers, tuples, self.sites


class Recording(Tape):
    """A tape that does what it is asked and takes it down."""

    def __init__(self, call: Any) -> None:
        # The given ones, then those that are made.
        self.tensors: list[Tensor] = [x for x in call if isinstance(x, Tensor)]
        self.site = getattr(call, "site", None)
        self.made: list[tuple[Any, ...]] = []
        self.zeroed: list[int] = []
        self.launches: list[Launch] = []
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
        self.is_whole &= not self.launches
        self.zeroed.append(len(self.tensors))
        with unseen():
            return self._make(super().zeros(shape, dtype, device))

    def scratch(self, x: Tensor) -> Tensor:
        """Returns scratch memory that was just made."""
        return self._make(x)

    def launch(self, kernel: Any, grid: tuple[int, ...], options: dict[str, Any], **arguments: Any) -> None:
        """Launches `kernel` with all of its arguments."""
        names = kernel.arg_names
        order = [arguments[name] for name in names]
        with unseen():
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
        self.launches.append(Launch(kernel, compiled, (x, y, z), options, values, pointers, tuples, sites))

    def _make(self, made: Any) -> Any:
        for x in made if isinstance(made, tuple) else (made,):
            if x is not None:
                self.tensors.append(x)
                self.made.append((tuple(x.shape), x.stride(), x.dtype))
                self.is_whole &= x.device == self.tensors[0].device
                self.is_whole &= x.storage_offset() == 0
        return made

    def _pointer(self, x: Tensor) -> Pointer:
        for slot, other in enumerate(self.tensors):
            if other is x:
                return Pointer(slot, 0, x.itemsize, None, None)
        storage = x.untyped_storage().data_ptr()
        found = [
            slot for slot, other in enumerate(self.tensors)
            if other.untyped_storage().data_ptr() == storage and other.dtype == x.dtype
        ]  # fmt: skip
        # Of two tensors in one memory a view may be of either, and the next call's lie elsewhere.
        if len(found) != 1 or x.numel() == 0:
            self.is_whole = False
            return Pointer(0, 0, x.itemsize, None, None)
        offset = int(x.storage_offset()) - int(self.tensors[found[0]].storage_offset())
        return Pointer(found[0], offset, x.itemsize, tuple(x.shape), x.stride())


class Plan:
    """What a recording took down: to be called with calls of the same kind."""

    __slots__ = (
        "device", "empty", "is_tuple", "launches", "made", "ordinary", "places", "prepared", "results", "site",
        "zeroed",
    )  # fmt: skip

    def __init__(self, tape: Recording, call: Any, ordinary: Callable[[Any], Any], results: Any) -> None:
        given = len(tape.tensors) - len(tape.made)
        self.ordinary = ordinary
        self.places = tuple(place for place, x in enumerate(call) if isinstance(x, Tensor))
        self.site = call._fields.index("site") if hasattr(call, "site") else None
        self.made, self.launches = tuple(tape.made), tuple(tape.launches)
        is_interpreted = any(launch.compiled is None for launch in tape.launches)
        self.prepared = () if is_interpreted else tuple(launch.prepared() for launch in tape.launches)
        self.zeroed = tuple(slot - given for slot in tape.zeroed)
        slots = {id(x): slot - given for slot, x in enumerate(tape.tensors) if slot >= given}
        self.results = tuple(
            None if x is None else slots[id(x)] for x in (results if isinstance(results, tuple) else (results,))
        )
        self.is_tuple = isinstance(results, tuple)
        self.device = tape.tensors[0].get_device()
        # As Inductor's code allocates: half of what torch.empty_strided takes. On GPUs it is the current one's memory.
        self.empty = _empty_strided_cpu if self.device < 0 else _empty_strided_cuda

    def __call__(self, call: Any) -> Any:
        """Returns the results of the operator for this call."""
        together, addresses = 0, []
        for place in self.places:
            address = call[place].data_ptr()
            together |= address
            addresses.append(address)
        # It was compiled for such addresses.
        if together % ALIGNMENT or runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls:
            return self.ordinary(call)
        if self.device >= 0 and torch.cuda.current_device() != self.device:
            return self.ordinary(call)
        empty = self.empty
        made = [empty(size, stride, dtype) for size, stride, dtype in self.made]
        for place in self.zeroed:
            made[place].zero_()
        site = 0 if self.site is None else call[self.site]
        if self.prepared:
            for x in made:
                addresses.append(x.data_ptr())
            self._launch(addresses, site)
        else:
            self._interpret([*[call[place] for place in self.places], *made], site)
        results = [None if place is None else made[place] for place in self.results]
        return tuple(results) if self.is_tuple else results[0]

    def _launch(self, addresses: list[int], site: int) -> None:
        stream = driver.active.get_current_stream(self.device)
        for run, grid, told, values, pointers, tuples, sites in self.prepared:
            arguments = values.copy()
            for place, slot, offset in pointers:
                arguments[place] = addresses[slot] + offset
            for place, inner in tuples:
                fields = list(arguments[place])
                for index, slot, offset in inner:
                    fields[index] = addresses[slot] + offset
                arguments[place] = tuple(fields)
            for place in sites:
                arguments[place] = site
            run(*grid, stream, *told, *arguments)

    def _interpret(self, tensors: list[Tensor], site: int) -> None:
        for launch in self.launches:
            arguments = launch.values.copy()
            for place, pointer in launch.pointers:
                arguments[place] = pointer.of(tensors)
            for place, inner in launch.tuples:
                fields = list(arguments[place])
                for index, pointer in inner:
                    fields[index] = pointer.of(tensors)
                arguments[place] = type(arguments[place])(*fields)
            for place in launch.sites:
                arguments[place] = site
            launch.kernel[launch.grid](*arguments, **launch.options)


def recorded(launch: Callable[..., Any], call: Any) -> tuple[Callable[[Any], Any], Any]:
    """Runs a launch function for a call; returns what runs it for others of its kind, and the results of this one.

    That is a plan, or where there can be none the launch function itself.
    """

    def ordinary(call: Any) -> Any:
        with torch.cuda.device_of(call[0]):
            return launch(TAPE, call)

    if launch in UNPLANNED or call[0].device.type not in ("cpu", "cuda"):
        return ordinary, ordinary(call)
    call = _apart(call)
    tape = Recording(call)
    with torch.no_grad(), torch.cuda.device_of(call[0]), Spy() as spy:
        results = launch(tape, call)
    known = {id(x) for x in tape.tensors}
    made = results if isinstance(results, tuple) else (results,)
    is_whole = tape.is_whole and not spy.has_seen and bool(tape.launches)
    if not is_whole or any(x is not None and id(x) not in known for x in made):
        return ordinary, results
    return Plan(tape, call, ordinary, results), results


def _apart(call: Any) -> Any:
    """Returns the call with another tensor of the same memory for each that comes again: the places are told apart."""
    met: set[int] = set()
    fields = []
    for x in call:
        again = isinstance(x, Tensor) and id(x) in met
        met.add(id(x))
        fields.append(x.detach() if again else x)
    return call._make(fields)
