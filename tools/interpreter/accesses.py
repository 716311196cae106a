"""One launch as its accesses see it: which bytes each argument may reach, and which programs touched which.

A pointer carries the number of its argument in the 16 bits that addresses leave free, through all arithmetic, so that
an access is held against the elements of the very tensor it was derived from: not against what else lies in that
tensor's storage, or in the storage of another argument.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from tools.interpreter.findings import Finding, Findings, Place, Program
from tools.interpreter.fresh import Allocation, all_written

TAG_SHIFT = np.uint64(48)
ADDRESS = np.uint64((1 << 48) - 1)

READ, WRITE, ATOMIC = "reads", "writes", "updates atomically"
# What another program may not have done to an element before; two atomics may meet.
CLASHES = {READ: (WRITE, ATOMIC), WRITE: (READ, WRITE, ATOMIC), ATOMIC: (READ, WRITE)}
NOBODY = -1

# The state of a storage: its bytes, and which of them are written where that is known.
State = tuple[np.ndarray, np.ndarray | None]


class Touched:
    """The programs that accessed each cell of a storage in one way: the first, another one if any, and where."""

    def __init__(self, cells: int) -> None:
        self.programs = np.full((2, cells), NOBODY, np.int32)
        self.places = np.zeros((2, cells), np.int32)

    def add(self, cells: np.ndarray, program: int, place: int) -> None:
        first, second = self.programs
        known = first[cells]
        for row, chosen in ((0, known == NOBODY), (1, (known != program) & (known != NOBODY) & (second[cells] < 0))):
            self.programs[row, cells[chosen]], self.places[row, cells[chosen]] = program, place

    def others(self, cells: np.ndarray, program: int) -> np.ndarray:
        """Returns [2, cells]: by whom other than `program`."""
        programs = self.programs[:, cells]
        return (programs != NOBODY) & (programs != program)


class Memory:
    """The storage of one or more arguments; cells are as wide as the narrowest argument's elements."""

    def __init__(self, storage: torch.UntypedStorage, allocation: Allocation | None) -> None:
        self.address, size = storage.data_ptr(), storage.nbytes()
        buffer = (ctypes.c_uint8 * size).from_address(self.address) if size else (ctypes.c_uint8 * 0)()
        self.bytes = np.ctypeslib.as_array(buffer)
        self.written = allocation.written if allocation else None
        self.cell = 16
        self.touched: dict[str, Touched] = {}

    def state(self) -> State:
        return self.bytes.copy(), None if self.written is None else self.written.copy()

    def restore(self, state: State) -> None:
        self.bytes[:], written = state
        if self.written is not None:
            self.written[:] = written

    def cells(self, offsets: np.ndarray, width: int) -> np.ndarray:
        first = offsets // self.cell
        count = max(1, width // self.cell)
        return first if count == 1 else (first[:, None] + np.arange(count)).ravel()

    def of(self, kind: str) -> Touched:
        if kind not in self.touched:
            self.touched[kind] = Touched(len(self.bytes) // self.cell + 1)
        return self.touched[kind]


class Argument:
    """A tensor that a launch is given under a name; `inside` marks the elements of its storage that are its own."""

    def __init__(self, name: str, tensor: Tensor, memory: Memory) -> None:
        self.name, self.memory = name, memory
        self.shape, self.width = list(tensor.shape), tensor.element_size()
        self.first = int(tensor.storage_offset())
        self.inside = np.zeros(len(memory.bytes) // self.width, bool)
        np.lib.stride_tricks.as_strided(self.inside[self.first :], tensor.shape, tensor.stride())[...] = True
        memory.cell = min(memory.cell, self.width)

    def covers(self, offsets: np.ndarray, width: int) -> np.ndarray:
        """Tells which of these accesses, `width` bytes each, lie on elements of this tensor alone."""
        first, count = offsets // self.width, max(1, width // self.width)
        inside = (offsets >= 0) & (first + count <= len(self.inside))
        for step in range(count if inside.any() else 0):
            inside &= self.inside[np.where(inside, first, self.first) + step]
        return inside

    def element(self, offset: int) -> str:
        """Names an element as a reader of the kernel counts: from where the tensor's pointer points."""
        return f"element {offset // self.width - self.first}"

    def __str__(self) -> str:
        return f"{self.name} {self.shape}"


@dataclass
class Launch:
    """The arguments by the numbers that their pointers carry, and the program that runs at this moment."""

    kernel: str
    findings: Findings
    arguments: dict[int, Argument] = field(default_factory=dict)
    programs: list[Program] = field(default_factory=list)
    program: int = 0
    _memories: dict[int, Memory] = field(default_factory=dict)
    _places: dict[Place, int] = field(default_factory=dict)
    _known: set[object] = field(default_factory=set)

    def add(self, name: str, tensor: Tensor, allocation: Allocation | None) -> None:
        """Adds an argument; `allocation` where its storage came unwritten."""
        storage = tensor.untyped_storage()
        memory = self._memories.setdefault(storage.data_ptr(), Memory(storage, allocation))
        self.arguments[len(self.arguments) + 1] = Argument(name, tensor, memory)

    def tagged(self, pointer: np.ndarray, number: int) -> np.ndarray:
        """Returns `pointer` marked, with all that is derived from it, as belonging to the argument of this number."""
        return pointer | np.uint64(number) << TAG_SHIFT

    def begin(self) -> None:
        """Starts the programs anew, in whatever order; what an earlier order has shown is not counted again."""
        self._known = {finding.key for finding in self.findings}
        for memory in self._memories.values():
            memory.touched.clear()

    def states(self) -> list[State]:
        return [memory.state() for memory in self._memories.values()]

    def restore(self, states: list[State]) -> None:
        for memory, state in zip(self._memories.values(), states, strict=True):
            memory.restore(state)

    def compare(self, states: list[State], order: str) -> None:
        """Reports elements that are not as they were in `states`, after the programs ran in another order."""
        for memory, (before, _) in zip(self._memories.values(), states, strict=True):
            if not np.array_equal(memory.bytes, before):
                for argument in self.arguments.values():
                    if argument.memory is memory:
                        self._compare(argument, before, order)

    def admit(
        self, pointers: np.ndarray, mask: np.ndarray, width: int, kind: str, place: Place
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the addresses of `pointers`, and `mask` without what must not be touched, which is reported."""
        admitted = mask.copy()
        lanes = np.flatnonzero(mask)
        addresses = pointers.ravel()[lanes]
        numbers = addresses >> TAG_SHIFT
        offsets = (addresses & ADDRESS).astype(np.int64)
        for number in np.unique(numbers):
            chosen = np.flatnonzero(numbers == number)
            argument = self.arguments.get(int(number))
            if argument is None:
                good = np.zeros(len(chosen), bool)
                self._report("out of bounds", "no argument", f"{kind} where none begins", place, len(chosen))
            else:
                good = self._access(argument, offsets[chosen] - argument.memory.address, width, kind, place)
            admitted.reshape(-1)[lanes[chosen[~good]]] = False
        return pointers & ADDRESS, admitted

    def _access(self, argument: Argument, offsets: np.ndarray, width: int, kind: str, place: Place) -> np.ndarray:
        """Tells which of the accesses to `argument` may go on; all that is wrong with them is reported."""
        inside, aligned = argument.covers(offsets, width), offsets % width == 0
        for name, wrong in (("out of bounds", ~inside), ("misaligned", inside & ~aligned)):
            if wrong.any():
                what = f"{kind} {argument.element(int(offsets[wrong][0]))}"
                self._report(name, str(argument), what, place, int(wrong.sum()))
        good = inside & aligned
        offsets = offsets[good]
        if len(offsets):
            self._meet(argument, argument.memory.cells(offsets, width), kind, place)
            self._hold_against_writes(argument, offsets, width, kind, place)
        return good

    def _meet(self, argument: Argument, cells: np.ndarray, kind: str, place: Place) -> None:
        """Reports where another program was, and remembers that this one is there."""
        memory = argument.memory
        for before in CLASHES[kind]:
            if before not in memory.touched:
                continue
            others = memory.touched[before].others(cells, self.program)
            if others.any():
                row, column = (int(found[0]) for found in others.nonzero())
                other, where = (x[row, cells[column]] for x in (memory.of(before).programs, memory.of(before).places))
                element = argument.element(int(cells[column]) * memory.cell)
                self._add(
                    Finding(
                        "race", self.kernel, str(argument), f"{kind} {element}, which another program {before}",
                        (self.programs[self.program], self.programs[other]), (place, list(self._places)[where]),
                        int(others.any(0).sum()),
                    )
                )  # fmt: skip
        memory.of(kind).add(cells, self.program, self._places.setdefault(place, len(self._places)))

    def _hold_against_writes(
        self, argument: Argument, offsets: np.ndarray, width: int, kind: str, place: Place
    ) -> None:
        """Reports what is read before it was written, where the storage came unwritten; remembers what is written."""
        if argument.memory.written is None:
            return
        marks, elements = argument.memory.written.view(f"u{width}"), offsets // width
        unwritten = marks[elements] != all_written(width)
        if kind != WRITE and unwritten.any():
            what = f"{kind} {argument.element(int(offsets[unwritten][0]))}, which nobody has written"
            self._report("unwritten", str(argument), what, place, int(unwritten.sum()))
        if kind != READ:
            marks[elements] = all_written(width)

    def _add(self, finding: Finding) -> None:
        if finding.key not in self._known:
            self.findings.add(finding)

    def _report(self, kind: str, tensor: str, what: str, place: Place, elements: int) -> None:
        programs = (self.programs[self.program],)
        self._add(Finding(kind, self.kernel, tensor, what, programs, (place,), elements))

    def _compare(self, argument: Argument, before: np.ndarray, order: str) -> None:
        memory, width = argument.memory, argument.width
        differ = (memory.bytes != before)[: len(argument.inside) * width].reshape(-1, width).any(1)
        elements = np.flatnonzero(differ & argument.inside)
        if len(elements):
            cells = memory.cells(elements[:1] * width, width)
            touched = [
                memory.touched[kind].programs[:, cells].ravel() for kind in (ATOMIC, WRITE) if kind in memory.touched
            ]
            programs = {int(program) for found in touched for program in found if program != NOBODY}
            what = f"{argument.element(int(elements[0]) * width)} is another in {order}"
            writers = tuple(self.programs[program] for program in sorted(programs))
            self._add(Finding("order", self.kernel, str(argument), what, writers, (), len(elements)))
