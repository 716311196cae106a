"""What goes wrong by the caller's doing, or for want of a package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A mistake in what the user gave. The CLI prints its message as one line and exits with status 2."""


class BadArgument(ValueError, RuntimeError, AssertionError):
    """An argument that does not fit a call.

    A ValueError, and also what torch raises for the same mistake, so that code that was written for torch catches it:
    its functions raise RuntimeError, its Transformer modules AssertionError or RuntimeError, depending on the path.
    """


class MissingExtra(ModuleNotFoundError):
    """A package that only a part of tfm needs is not installed; the message says what brings it."""


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Around the imports that tfm's extra of this `name` brings: MissingExtra where one fails."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "tfm":
            raise
        message = f"{error.name} is not installed: pip install 'tfm[{name}]' brings it ('.[{name}]' in a checkout)"
        raise MissingExtra(message, name=error.name) from None
