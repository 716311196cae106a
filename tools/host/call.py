"""A call that a GPU would be given, and what it may cost the host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Budget:
    """What a row may take at most: launches, and the host's time as a multiple of torch.add; None for no limit."""

    launches: int | None = None
    host: float | None = None


NONE = Budget()


@dataclass(frozen=True)
class Call:
    """`call()` is the forward; `leaves` are what its backward gives gradients of, none where there is no backward.

    `forward` is the budget with gradients to come, `backward` that of the backward alone.
    """

    name: str
    call: Callable[[], Any]
    leaves: tuple[Tensor, ...] = ()
    forward: Budget = NONE
    backward: Budget = NONE
