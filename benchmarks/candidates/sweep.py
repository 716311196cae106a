"""What a candidates file says: an open question about launch settings, what might answer it, and what we expect."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.suite import Suite


@dataclass(frozen=True)
class Candidate:
    """`settings` to return instead, and the time that they are expected to take as a share of today's."""

    settings: Any
    expected: float


@dataclass(frozen=True)
class Sweep:
    """Candidates for what one function of tfm.kernels.launch returns.

    Attributes:
        function: its name.
        suite: the benchmark whose own function calls it.
        direction: FORWARD or BOTH, of benchmarks.suite: what of the suite's function is run.
        question: what the settings' author could not know without a GPU.
        prediction: the answer that the author expects, in numbers.
        sizes: of the suite, at which the answer matters.
        rehearsal: a size for Triton's interpreter.
        candidates: of today's settings and of the function's arguments by name.
    """

    function: str
    suite: Suite
    direction: str
    question: str
    prediction: str
    sizes: Sequence[Any]
    rehearsal: Any
    candidates: Callable[[Any, dict[str, Any]], Iterable[Candidate]]
