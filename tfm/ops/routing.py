"""Doors: public functions that take the route of an earlier call where one of the same kind has gone before."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from tfm.autocast import without_autocast
from tfm.operators.kinds import Kinds, are_plain, precision_of
from tfm.operators.routes import taken_down
from tfm.operators.watching import is_watched
from tfm.ops import backends
from tfm.taping import here

P = ParamSpec("P")
R = TypeVar("R")
# Arguments that are no tensors: what is equal among them is the same to every function.
NUMBERS = frozenset((int, float, bool, str, type(None), torch.dtype))
# Kinds of calls that a function remembers; where it has more, it begins anew.
MOST_KINDS = 1024


class Door:
    """The routes of one function.

    A call that is the second of its kind is taken down: of ragged batches few kinds come again.
    """

    every: list[Door] = []  # noqa: RUF012 - all there are, to be emptied together

    def __init__(self, function: Callable) -> None:
        self.function, self.kinds = function, Kinds(MOST_KINDS)
        Door.every.append(self)

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Returns the function's results."""
        key: list[Any] = [backends.forced(), torch.is_grad_enabled(), len(args)]
        values, site, tensors = [*args], None, []
        for name, x in kwargs.items():
            # Layers differ in it, and share their routes.
            if name == "site" and x.__class__ is int:
                site = x
            else:
                key.append(name)
                values.append(x)
        key.append(site is None)
        for x in values:
            kind = x.__class__
            if kind is Tensor or kind is Parameter:
                tensors.append(x)
                key.append(x.shape)
            elif kind in NUMBERS or (kind is tuple and all(field.__class__ is int for field in x)):
                key.append(x)
            else:
                return self.function(*args, **kwargs)
        if not tensors:
            return self.function(*args, **kwargs)
        key.append(precision_of(tensors[0]))
        context = None
        if torch._C._is_any_autocast_enabled():
            key += map(torch.get_autocast_dtype, ("cuda", "cpu"))
            context = without_autocast(tensors[0].device)
        known = tuple(key)
        found = self.kinds.find(known, tensors)
        if found is None:
            ran = here.operators
            results = self.function(*args, **kwargs)
            # The reference has no route: it is torch's own operations, in whatever they come to where nobody looks on.
            self.kinds.add(known, tensors).kept = False if here.operators == ran else None
            return results
        route = found.kept
        if route:
            values.append(site)
            if context is None:
                return route(values)
            with context:
                return route(values)
        if route is None and are_plain(tensors):
            named = [name for name in kwargs if name != "site" or site is None]
            route, results = taken_down(self.function, values, named, site)
            found.kept = route or False
            return results
        return self.function(*args, **kwargs)


def door(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates a function that knows of its arguments nothing but numbers, and of tensors no values."""
    one = Door(function)

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        if is_watched():
            return function(*args, **kwargs)
        return one.call(args, kwargs)

    return called


def forget() -> None:
    """Drops all routes."""
    for one in Door.every:
        one.kinds.clear()


@contextmanager
def unused() -> Iterator[None]:
    """Within the block there are no routes of before, and after it none of its own: its launch settings are others."""
    forget()
    try:
        yield
    finally:
        forget()
