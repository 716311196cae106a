"""What goes wrong by the caller's doing."""


class UserError(Exception):
    """A mistake in what the user gave. The CLI prints its message as one line and exits with status 2."""


class BadArgument(ValueError, RuntimeError, AssertionError):
    """An argument that does not fit a call.

    A ValueError, and also what torch raises for the same mistake, so that code that was written for torch catches it:
    its functions raise RuntimeError, its Transformer modules AssertionError or RuntimeError, depending on the path.
    """
