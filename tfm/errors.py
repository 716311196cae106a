"""The errors that callers cause, and the one of a missing package.

An argument that does not fit is a ValueError, and also what torch raises for the same mistake, so that code which was
written for torch catches it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A mistake in what the user gave. The CLI prints its message as one line and exits with status 2."""


class BadArgument(ValueError, RuntimeError):
    """An argument that does not fit, where torch's functions would raise RuntimeError."""


class AssertedArgument(ValueError, AssertionError):
    """An argument that does not fit, where torch asserts that it does, as its Transformer modules mostly do."""


class MissingExtra(ModuleNotFoundError):
    """A package that only a part of tfm needs is not installed; the message says what brings it."""


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Raises MissingExtra where one of the imports inside fails, which tfm's extra of this `name` brings."""
    try:
        yield
    except ModuleNotFoundError as error:
        # A missing module of tfm itself is our fault; a MissingExtra from another extra says enough already.
        if isinstance(error, MissingExtra) or error.name is None or error.name.partition(".")[0] == "tfm":
            raise
        message = f"{error.name} is not installed: pip install 'tfm[{name}]' brings it ('.[{name}]' in a checkout)"
        raise MissingExtra(message, name=error.name) from None
