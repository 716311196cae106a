"""The one exception that means: the user can mend this."""


class UserError(Exception):
    """A mistake in what the user gave. The CLI prints its message as one line and exits with status 2."""
