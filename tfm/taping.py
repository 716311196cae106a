"""Which tape takes down the call of a public function, where one does (tfm.operators.routes)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor


class Here(threading.local):
    """The tape of this thread, and how many operators it has run outside of routes."""

    tape: Any = None
    operators = 0


here = Here()


def computed(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Returns function(*arguments): what torch computes of a function's tensors, once a call whatever its route."""
    if torch.compiler.is_compiling() or here.tape is None:
        return function(*arguments)
    return here.tape.compute(function, arguments)


@overload
def dense(x: Tensor) -> Tensor: ...
@overload
def dense(x: None) -> None: ...
def dense(x: Tensor | None) -> Tensor | None:
    """Returns `x` with its numbers side by side, as kernels read them."""
    return x if x is None or x.is_contiguous() else computed(Tensor.contiguous, x)


def checked(check: Callable[..., bool], *arguments: Any) -> None:
    """Runs a check of values, which every call has to pass whatever its route; it tells whether it looked at any."""
    if torch.compiler.is_compiling() or here.tape is None:
        check(*arguments)
    else:
        here.tape.check(check, arguments)
