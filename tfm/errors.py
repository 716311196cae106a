"""The exceptions that mean: the user can mend this."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A mistake in what the user gave. The CLI prints its message as one line and exits with status 2."""


class MissingExtra(ModuleNotFoundError):
    """A package that only a part of tfm needs is not installed; the message says what brings it."""


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Around the imports that tfm's extra of this `name` brings: MissingExtra where one fails."""
    try:
        yield
    except ModuleNotFoundError as error:
        # Of tfm itself it is a fault of ours, and another extra has spoken already.
        if isinstance(error, MissingExtra) or error.name is None or error.name.partition(".")[0] == "tfm":
            raise
        message = f"{error.name} is not installed: pip install 'tfm[{name}]' brings it ('.[{name}]' in a checkout)"
        raise MissingExtra(message, name=error.name) from None
