"""What goes wrong by the caller's doing.

An argument that does not fit is a ValueError, and also what torch raises for the same mistake, so that code which was
written for torch catches it.
"""


class UserError(Exception):
    """A mistake in what the user gave. The CLI prints its message as one line and exits with status 2."""


class BadArgument(ValueError, RuntimeError):
    """An argument that does not fit, where torch's functions would raise RuntimeError."""


class AssertedArgument(ValueError, AssertionError):
    """An argument that does not fit, where torch asserts that it does, as its Transformer modules mostly do."""
