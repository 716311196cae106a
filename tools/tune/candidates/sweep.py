"""The form of a candidates file: an open question, what might answer it, and what we expect, in numbers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any
from unittest.mock import patch

import tfm
from benchmarks.suite import Suite
from tfm.ops import backends, routing

GRAPH, EAGER = "graph", "eager"
Arguments = dict[str, Any]


@dataclass(frozen=True)
class Candidate:
    """A choice to try: `settings` in place of today's, and the share of today's time that they are expected to take."""

    settings: Any
    expected: float


@dataclass(frozen=True)
class Sweep:
    """Candidates for one choice. How today's choice is found and another put in its place, its two kinds say.

    Attributes:
        subject: what is chosen.
        suite: the benchmark whose own function makes the choice.
        direction: FORWARD or BOTH, of benchmarks.suite: what of the suite's function is run.
        question: what the author of today's choice could not know without a GPU.
        prediction: the answer that the author expects, in numbers.
        sizes: of the suite, at which the answer matters.
        rehearsal: a size for Triton's interpreter.
        table: rows of what is varied; the last number of each is the expected share of today's time. (None, share)
            stands for None: no settings, where the choice is left to another kernel.
        settings: those of a row, or none where it does not apply: of today's settings, the call's arguments by name,
            and the row's values.
        mode: GRAPH times replays of a graph, the kernels alone; EAGER times calls, with what the host does for each.
    """

    subject: str
    suite: Suite
    direction: str
    question: str
    prediction: str
    sizes: Sequence[Any]
    rehearsal: Any
    table: Sequence[tuple[Any, ...]]
    settings: Callable[..., Iterable[Any]]
    mode: str = GRAPH

    @property
    def gain(self) -> float:
        """The share of today's time that the best candidate is expected to save."""
        return max(0.0, 1.0 - min(row[-1] for row in self.table))

    def candidates(self, current: Any, arguments: Arguments) -> Iterator[Candidate]:
        """Yields the candidates of one call; what promises most comes first."""
        for *values, expected in sorted(self.table, key=lambda row: row[-1]):
            for settings in [None] if values == [None] else self.settings(current, arguments, *values):
                yield Candidate(settings, expected)

    def rows(self) -> Iterator[str]:
        """Yields the table in words."""
        names = list(inspect.signature(self.settings).parameters)[2:]
        for *values, expected in self.table:
            row = "None" if values == [None] else ", ".join(f"{n}={v}" for n, v in zip(names, values, strict=True))
            yield f"{row}: {expected:.2f}"

    def recorded(self) -> AbstractContextManager[list[tuple[Arguments, Any]]]:
        """Collects the choices made in the block with today's choice in place, each once: (arguments, choice)."""
        raise NotImplementedError

    def substituted(self, arguments: Arguments, settings: Any) -> AbstractContextManager[None]:
        """Makes `settings` the choice for these arguments within the block."""
        raise NotImplementedError


class LaunchSweep(Sweep):
    """`subject` is a function of tfm.kernels.launch with its module, "norm.forward"; its result is what is chosen."""

    @property
    def place(self) -> tuple[ModuleType, str]:
        """The module of that function, where kernels look it up, and its name there."""
        module, _, name = f"tfm.kernels.launch.{self.subject}".rpartition(".")
        return import_module(module), name

    @contextmanager
    def recorded(self) -> Iterator[list[tuple[Arguments, Any]]]:
        calls: list[tuple[Arguments, Any]] = []
        function = getattr(*self.place)

        def recorded(*args: Any, **kwargs: Any) -> Any:
            call = _bound(function, args, kwargs), function(*args, **kwargs)
            if call not in calls:
                calls.append(call)
            return call[1]

        with tfm.use("triton"), patch.object(*self.place, recorded), routing.unused():
            yield calls

    @contextmanager
    def substituted(self, arguments: Arguments, settings: Any) -> Iterator[None]:
        function = getattr(*self.place)

        def substituted(*args: Any, **kwargs: Any) -> Any:
            return settings if _bound(function, args, kwargs) == arguments else function(*args, **kwargs)

        with tfm.use("triton"), patch.object(*self.place, substituted), routing.unused():
            yield


class BackendSweep(Sweep):
    """`subject` is an operation of tfm.ops.backends.TABLE, and its backend on a GPU what is chosen."""

    @contextmanager
    def recorded(self) -> Iterator[list[tuple[Arguments, Any]]]:
        rows = (row for row in backends.TABLE if self.subject in row.operations and row.device in ("", "cuda"))
        today = next(rows).backend
        with tfm.use(today):
            yield [({}, today)]

    def substituted(self, arguments: Arguments, settings: Any) -> AbstractContextManager[None]:
        return tfm.use(settings)


def _bound(function: Callable[..., Any], args: Sequence[Any], kwargs: Arguments) -> Arguments:
    return dict(inspect.signature(function).bind(*args, **kwargs).arguments)
