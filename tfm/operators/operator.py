"""What an operator is to torch, whoever computes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Operator:
    """`schema` as torch.library reads it; `fake` makes the empty outputs, which are all that torch.compile needs."""

    schema: str
    fake: Callable[..., Any]

    @property
    def name(self) -> str:
        return self.schema.partition("(")[0]
