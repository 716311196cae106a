"""What an operator is to torch, whoever computes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Operator:
    """`schema` as torch.library reads it; `fake` makes the empty outputs, which are all that torch.compile needs."""

    schema: str
    fake: Callable[..., Any]

    @property
    def name(self) -> str:
        return self.schema.partition("(")[0]


def distinct(arguments: Sequence[Any]) -> Sequence[Any]:
    """Dynamo does not trace an autograd.Function that gets one tensor twice, as self-attention or x + x does."""
    if not torch.compiler.is_compiling():
        return arguments
    found: list[Any] = []
    for x in arguments:
        again = isinstance(x, Tensor) and any(x is other for other in found)
        found.append(x.view_as(x) if again else x)
    return found
