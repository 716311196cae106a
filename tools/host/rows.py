"""The directions of each case: what is counted and timed, a row of the table each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tools.host.call import NONE, Budget, Call
from tools.host.launches import Launches, count
from tools.host.timing import Timed, timed

WITHOUT_GRAD, FORWARD, BACKWARD = "without grad", "forward", "forward + backward"


@dataclass(frozen=True)
class Piece:
    """A piece of work: `work()` does it once, with autograd on or off as `has_gradient` says."""

    name: str
    direction: str
    work: Callable[[], Any]
    budget: Budget = NONE

    def count(self, found: Launches) -> Launches:
        """Counts the launches, where `found` counts."""
        with torch.set_grad_enabled(self.has_gradient):
            return count(found, self.work)

    def time(self) -> Timed:
        """Measures the host's time, where Triton's kernels are launched."""
        with torch.set_grad_enabled(self.has_gradient):
            return timed(self.work)

    @property
    def has_gradient(self) -> bool:
        return self.direction != WITHOUT_GRAD


def pieces(cases: Iterable[Call]) -> Iterator[Piece]:
    """Yields each case in its directions."""
    for case in cases:
        yield Piece(case.name, WITHOUT_GRAD, case.call)
        if case.leaves:
            yield Piece(case.name, FORWARD, case.call, case.forward)
            yield Piece(case.name, BACKWARD, _both(case), _sum(case.forward, case.backward))


def _both(case: Call) -> Callable[[], Any]:
    """Returns the call and the gradients of all its results, as one function."""

    def work() -> None:
        results = case.call()
        outputs = [x for x in (results if isinstance(results, tuple) else (results,)) if x.requires_grad]
        torch.autograd.grad(outputs, case.leaves, [_cotangent(x) for x in outputs], allow_unused=True)

    return work


_cotangents: dict[tuple[torch.Size, tuple[int, ...], torch.dtype], Tensor] = {}


def _cotangent(output: Tensor) -> Tensor:
    """Returns the same cotangent at every call: what it takes to make one is not the operation's."""
    key = (output.shape, output.stride(), output.dtype)
    if key not in _cotangents:
        _cotangents[key] = torch.ones_like(output)
    return _cotangents[key]


def _sum(forward: Budget, backward: Budget) -> Budget:
    if forward.launches is None or backward.launches is None:
        return NONE
    return Budget(launches=forward.launches + backward.launches)
