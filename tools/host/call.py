"""A call that a GPU would be given, and what it may cost the host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Budget:
    """The most that a row may take: launches, and the host's time as a multiple of torch.add; None for no limit."""

    launches: int | None = None
    host: float | None = None


NONE = Budget()


@dataclass(frozen=True)
class Call:
    """A forward, `call()`, and its backward, which gives gradients of `leaves`; there is none where those are empty.

    `forward` is the budget with gradients to come, `backward` that of the backward alone.
    """

    name: str
    call: Callable[[], Any]
    leaves: tuple[Tensor, ...] = ()
    forward: Budget = NONE
    backward: Budget = NONE
