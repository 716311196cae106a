"""Routes: the way from a public function to its operators, kept for one call and taken again by others of its kind.

What a function of tfm.ops does before its operators run follows from what is known of its arguments without their
values: checks, the choice of a backend, which argument becomes which field of an operator's call. So a tape takes down
one call, and what it holds serves every other with the same numbers and tensors of the same shapes, strides and dtypes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from tfm.operators.autograd import Differentiable, apply, bare_apply
from tfm.operators.calling import Steps
from tfm.operators.watching import Spy, unseen
from tfm.taping import here
from tfm.transforms import is_differentiated

# Of a field: its place in the call, the value that stands there, and of a view its size, stride and offset.
Place = tuple[int, int]
View = tuple[int, int, Sequence[int], Sequence[int], int]


class Pattern:
    """How a call is made of the values of a route: the function's arguments, and what was made of them since."""

    __slots__ = ("fields", "make", "places", "views")

    def __init__(self, make: Callable, fields: list[Any], places: list[Place], views: list[View]) -> None:
        self.make, self.fields, self.places, self.views = make, fields, places, views

    def call(self, values: Sequence[Any]) -> Any:
        """Returns the call."""
        fields = self.fields.copy()
        for place, slot in self.places:
            fields[place] = values[slot]
        for place, slot, size, stride, offset in self.views:
            x = values[slot]
            fields[place] = x.as_strided(size, stride, x.storage_offset() + offset)
        return self.make(fields)


class Operation:
    """An operation of a route, with gradients where one of its fields needs one."""

    __slots__ = ("is_differentiated", "pattern", "stated", "steps", "unwanted")

    def __init__(self, stated: type[Differentiable], steps: Steps, pattern: Pattern, is_differentiated: bool) -> None:
        self.stated, self.steps, self.pattern, self.is_differentiated = stated, steps, pattern, is_differentiated
        self.unwanted = (False,) * len(stated.places)

    def __call__(self, values: Sequence[Any]) -> Any:
        """Returns the outputs."""
        call, stated = self.pattern.call(values), self.stated
        if self.is_differentiated:
            return bare_apply(stated, self.steps, call, *[call[place] for place in stated.places])
        return stated.forward(self.steps, call, self.unwanted).outputs


class Computed:
    """An operator that a function runs itself."""

    __slots__ = ("pattern", "steps")

    def __init__(self, steps: Steps, pattern: Pattern) -> None:
        self.steps, self.pattern = steps, pattern

    def __call__(self, values: Sequence[Any]) -> Any:
        """Returns the results."""
        return self.steps.run(self.pattern.call(values))


class Recomputed:
    """What torch computes for a function, or a check of values."""

    __slots__ = ("arguments", "function", "places")

    def __init__(self, function: Callable, arguments: list[Any], places: list[Place]) -> None:
        self.function, self.arguments, self.places = function, arguments, places

    def __call__(self, values: Sequence[Any]) -> Any:
        """Returns the result."""
        arguments = self.arguments.copy()
        for place, slot in self.places:
            arguments[place] = values[slot]
        return self.function(*arguments)


class Route:
    """What a tape took down: each part gives values to those behind it, and `results` says which are returned."""

    __slots__ = ("parts", "results")

    def __init__(self, parts: list[Callable], results: int | tuple[int | None, ...]) -> None:
        self.parts, self.results = tuple(parts), results

    def __call__(self, values: list[Any]) -> Any:
        """Returns the function's results for arguments of the same kind, in a list that is used up."""
        for part in self.parts:
            made = part(values)
            if made.__class__ is tuple:
                values += made
            else:
                values.append(made)
        if self.results.__class__ is int:
            return values[self.results]
        return tuple([None if slot is None else values[slot] for slot in self.results])  # type: ignore[union-attr]


class Tape:
    """Takes down what a public function does for one call, as it does it."""

    def __init__(self, values: Sequence[Any], site: int | None) -> None:
        """Begins with the arguments, no tensor twice; the last of the values is `site`, which the calls may hold."""
        self.values, self.site, self.site_slot = list(values), site, len(values) - 1
        self.parts: list[Callable] = []
        self.is_whole = True

    def run(self, namespace: str, call: Any) -> Any:
        """Runs an operator that the function runs itself."""
        return self._taken(namespace, call, lambda steps: steps.run(call), Computed)

    def apply(self, operation: type[Differentiable], namespace: str, call: Any) -> Any:
        """Applies an operation."""
        learns = is_differentiated(*[call[place] for place in operation.places])
        return self._taken(
            namespace, call, lambda steps: apply(operation, steps, call),
            lambda steps, pattern: Operation(operation, steps, pattern, learns),
        )  # fmt: skip

    def compute(self, function: Callable[..., Tensor], arguments: Sequence[Any]) -> Tensor:
        """Computes something by torch; what gives one of its arguments back is no part of the route."""
        with unseen():
            result = function(*arguments)
        if any(x is result for x in arguments):
            return result
        self.parts.append(self._again(function, arguments))
        self.values.append(result)
        return result

    def check(self, check: Callable[..., bool], arguments: Sequence[Any]) -> None:
        """Runs a check, which is part of the route where it looks at values."""
        here.tape = None
        try:
            with unseen():
                has_looked = check(*arguments)
        finally:
            here.tape = self
        if has_looked:
            self.parts.append(self._again(check, arguments))
            self.values.append(has_looked)

    def draw(self, draw: Callable[[], Tensor]) -> Tensor:
        """Draws a seed, anew for each call."""
        with unseen():
            seed = draw()
        self.values.append(seed)
        self.parts.append(lambda values: draw())
        return seed

    def route(self, results: Any) -> Route | None:
        """Returns the route of the call that gave these results; None where it is not known how they came about."""
        if not self.is_whole or not self.parts:
            return None
        several = results if results.__class__ is tuple else (results,)
        slots = [None if x is None else self._slot(x) for x in several]
        if any(slot == -1 for slot in slots):
            return None
        return Route(self.parts, tuple(slots) if results.__class__ is tuple else slots[0])  # type: ignore[arg-type]

    def _taken(self, namespace: str, call: Any, compute: Callable, part: Callable) -> Any:
        steps, pattern = Steps(namespace), self._pattern(call)
        here.tape = None
        try:
            with unseen():
                made = compute(steps)
        finally:
            here.tape = self
        steps.close()
        self.parts.append(part(steps, pattern))
        self.values += made if isinstance(made, tuple) else (made,)
        return made

    def _again(self, function: Callable, arguments: Sequence[Any]) -> Recomputed:
        places = [(place, self._slot(x)) for place, x in enumerate(arguments) if isinstance(x, Tensor)]
        self.is_whole &= all(slot >= 0 for _, slot in places)
        return Recomputed(function, [None if isinstance(x, Tensor) else x for x in arguments], places)

    def _slot(self, x: Any) -> int:
        """Returns the latest place of this tensor among the values; -1 where it is none of them."""
        return next((slot for slot in reversed(range(len(self.values))) if self.values[slot] is x), -1)

    def _pattern(self, call: Any) -> Pattern:
        fields: list[Any] = list(call)
        places: list[Place] = []
        views: list[View] = []
        for place, (name, x) in enumerate(zip(call._fields, call, strict=True)):
            if isinstance(x, Tensor):
                fields[place] = None
                slot = self._slot(x)
                if slot >= 0:
                    places.append((place, slot))
                else:
                    self._add_view(views, place, x)
                # A number that came as a tensor is none of what a step launches with.
                self.is_whole &= x.dim() > 0 or name == "seed"
            elif name == "site" and self.site is not None:
                places.append((place, self.site_slot))
                self.is_whole &= x == self.site
        return Pattern(call._make, fields, places, views)

    def _add_view(self, views: list[View], place: int, x: Tensor) -> None:
        storage = x.untyped_storage().data_ptr()
        found = [
            slot for slot, base in enumerate(self.values)
            if isinstance(base, Tensor) and base.dtype == x.dtype and base.untyped_storage().data_ptr() == storage
        ]  # fmt: skip
        # Of two tensors in one memory it may be of either; one that learns would hang on another node of autograd's.
        if len(found) != 1 or x.numel() == 0 or is_differentiated(x):
            self.is_whole = False
            return
        offset = x.storage_offset() - self.values[found[0]].storage_offset()
        views.append((place, found[0], tuple(x.shape), x.stride(), offset))


def taken_down(function: Callable, values: Sequence[Any], named: Sequence[str], site: Any) -> tuple[Route | None, Any]:
    """Calls a public function; returns the route of the call, None where it has none, and the results.

    Args:
        function: a function of tfm.ops, without its door.
        values: its arguments; the last of them by name.
        named: those names.
        site: another argument by name, None where it was not given.
    """
    apart = _apart(values)
    unnamed = len(apart) - len(named)
    options = dict(zip(named, apart[unnamed:], strict=True))
    if site is not None:
        options["site"] = site
    tape = Tape([*apart, site], site)
    here.tape = tape
    try:
        with Spy() as spy:
            results = function(*apart[:unnamed], **options)
    finally:
        here.tape = None
    return None if spy.has_seen else tape.route(results), results


def _apart(values: Sequence[Any]) -> list[Any]:
    """Returns the values with another tensor of the same memory for each that comes again: they are told apart."""
    met: set[int] = set()
    found = []
    for x in values:
        again = isinstance(x, Tensor) and id(x) in met
        met.add(id(x))
        found.append(x.view_as(x) if again else x)
    return found
