"""A memory checker for kernels in Triton's interpreter, as compute-sanitizer is one for those on a GPU.

    with memory.checked() as checker:
        kernel[grid](...)
    assert not list(checker.findings)

Every access of every program (loads, stores, atomics, block pointers and tensor descriptors) passes through it:

out of bounds    it is not on an element of the tensor that its pointer was derived from, as the launch was given it:
                 neither the gaps of a view nor its storage beyond count. Such an access does not take place.
misaligned       its address is no multiple of its width
unwritten        it reads what nobody has written since torch allocated it (tools/interpreter/fresh.py says how that is
                 known); so does an operator of torch, or an operator of ours returns such a tensor
race             two programs of one launch touch an element, one of them writing; atomics may meet each other
order            the programs run a second time backwards and a third time shuffled, from the same memory, and leave
                 other bits

triton-viz 3.0, whose sanitizer is for the same purpose, looks for accesses out of bounds alone: its loads are symbols
for a solver, so that it sees neither races nor what is unwritten, it stops at operations of half of our kernels (idiv,
shifts, mathematics), and to it a loop from a program's own number to the last row has no end.
"""

from __future__ import annotations

import inspect
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import product
from typing import Any
from unittest.mock import patch

import numpy as np
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor
from triton.runtime.jit import TensorWrapper
from triton.tools.tensor_descriptor import TensorDescriptor

from tools.interpreter.accesses import ATOMIC, READ, WRITE, Launch
from tools.interpreter.findings import Findings, Place, here
from tools.interpreter.fresh import FreshMemory

PROGRAM_ORDER, *OTHER_ORDERS = "program order", "reversed order", "shuffled order"
SHUFFLE_SEED = 20170612


@contextmanager
def checked() -> Iterator[Checker]:
    """Checks every launch inside, in three orders; what is wrong is among the checker's findings."""
    checker = Checker()
    builder, memory = interpreter.interpreter_builder, interpreter._interpreter
    with ExitStack() as stack:
        # All accesses come to these functions, whoever has changed the builder's methods above them.
        for name, wrapper in (
            ("load", checker.load), ("store", checker.store),
            ("atomic_rmw", checker.atomic_rmw), ("atomic_cas", checker.atomic_cas),
        ):  # fmt: skip
            stack.enter_context(patch.object(memory, name, _around(wrapper, getattr(memory, name))))
        convert, execute = interpreter._implicit_cvt, GridExecutor.__call__
        stack.enter_context(patch.object(interpreter, "_implicit_cvt", _around(checker.convert, convert)))
        stack.enter_context(patch.object(GridExecutor, "__call__", _around(checker.run, execute)))
        stack.enter_context(patch.object(builder, "set_grid_idx", _around(checker.next_program, builder.set_grid_idx)))
        stack.enter_context(checker.fresh)
        yield checker


@dataclass
class Checked:
    """The extent to which a kernel was checked: elements are those of accesses, in one order of the programs."""

    launches: int = 0
    programs: int = 0
    elements: int = 0
    places: set[Place] = field(default_factory=set)

    def __iadd__(self, other: Checked) -> Checked:
        self.launches += other.launches
        self.programs += other.programs
        self.elements += other.elements
        self.places |= other.places
        return self


class Checker:
    """Stands between the interpreter and its memory; `kernels` says what came by."""

    def __init__(self) -> None:
        self.findings = Findings()
        self.kernels: defaultdict[str, Checked] = defaultdict(Checked)
        self.fresh = FreshMemory(self.findings)
        self.launch = Launch("", self.findings)
        self._order = PROGRAM_ORDER
        self._arguments, self._programs = iter(range(0)), iter(range(0))

    def run(self, execute: Callable, executor: GridExecutor, *args: Any, **kwargs: Any) -> None:
        """Runs a launch in its own order and, where it has several programs, in two others; the first results stay."""
        self.fresh.paused = True
        try:
            self.launch = launch = Launch(executor.fn.__name__, self.findings)
            for name, tensor in _tensors(executor, args, kwargs):
                launch.add(name, tensor, self.fresh.allocation(tensor))
            before = launch.states()
            self._run(PROGRAM_ORDER, execute, executor, args, kwargs)
            after = launch.states()
            for order in OTHER_ORDERS if len(launch.programs) > 1 else ():
                launch.restore(before)
                self._run(order, execute, executor, args, kwargs)
                launch.compare(after, order)
            launch.restore(after)
            self.kernels[launch.kernel] += Checked(1, len(launch.programs))
        finally:
            self.fresh.paused = False

    def _run(self, order: str, execute: Callable, executor: GridExecutor, args: Any, kwargs: Any) -> None:
        self._order, self._programs = order, iter(range(0))
        self._arguments = iter(range(1, len(self.launch.arguments) + 1))
        self.launch.begin()
        execute(executor, *args, **kwargs)

    def next_program(self, set_grid_idx: Callable, *first: int) -> None:
        """Gives the interpreter's loop, which asks for the programs in turn, those of the present order."""
        if not any(first):
            grid = interpreter.interpreter_builder.grid_dim
            self.launch.programs = [(x, y, z) for x, y, z in product(*map(range, grid))]
            numbers = list(range(len(self.launch.programs)))
            if self._order == "reversed order":
                numbers.reverse()
            elif self._order == "shuffled order":
                random.Random(SHUFFLE_SEED).shuffle(numbers)
            self._programs = iter(numbers)
        self.launch.program = next(self._programs)
        set_grid_idx(*self.launch.programs[self.launch.program])

    def convert(self, convert: Callable, argument: Any) -> Any:
        """Returns an argument as the interpreter has it; a pointer names the tensor that it came from."""
        converted = convert(argument)
        if hasattr(argument, "data_ptr"):
            converted.handle.data = self.launch.tagged(converted.handle.data, next(self._arguments))
        return converted

    def load(self, load: Callable, pointers: Any, mask: Any, other: Any, dtype: Any) -> Any:
        addresses, mask = self._admit(pointers, mask, np.dtype(dtype).itemsize, READ)
        return load(addresses, mask, other, dtype)

    def store(self, store: Callable, pointers: Any, values: Any, mask: Any) -> Any:
        addresses, mask = self._admit(pointers, mask, values.itemsize, WRITE)
        return store(addresses, values, mask)

    def atomic_rmw(self, update: Callable, operation: Any, pointers: Any, values: Any, mask: Any, order: Any) -> Any:
        addresses, mask = self._admit(pointers, mask, values.itemsize, ATOMIC)
        return update(operation, addresses, values, mask, order)

    def atomic_cas(self, swap: Callable, pointers: Any, expected: Any, values: Any, order: Any) -> Any:
        addresses, mask = self._admit(pointers, np.ones_like(pointers, bool), values.itemsize, ATOMIC)
        return swap(addresses, expected, values, order) if mask.all() else np.zeros_like(expected)

    def _admit(self, pointers: Any, mask: Any, width: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
        place = here(self.launch.kernel)
        if self._order == PROGRAM_ORDER:
            self.kernels[self.launch.kernel] += Checked(elements=int(np.count_nonzero(mask)), places={place})
        return self.launch.admit(np.asarray(pointers), np.asarray(mask), width, kind, place)


def _around(wrapper: Callable, original: Callable) -> Callable:
    """Returns `wrapper`, told what it stands around; a function, which becomes a method where it is a class's."""
    return lambda *args, **kwargs: wrapper(original, *args, **kwargs)


def _tensors(executor: GridExecutor, args: Any, kwargs: Any) -> Iterator[tuple[str, Tensor]]:
    """Yields a launch's tensors by their parameters' names, in the order in which the interpreter converts them."""
    parameters = inspect.getfullargspec(executor.fn).args
    given = {name: value for name, value in kwargs.items() if name in parameters}
    for name, value in inspect.getcallargs(executor.fn, *args, **given).items():
        if name not in executor.constexprs:
            yield from _tensors_of(name, value)


def _tensors_of(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, tuple):
        for place, part in enumerate(value):
            yield from _tensors_of(f"{name}[{place}]", part)
    elif isinstance(value, TensorDescriptor | TensorWrapper):
        yield from _tensors_of(name, value.base)
    elif isinstance(value, Tensor):
        yield name, value
