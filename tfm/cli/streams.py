"""Standard input and output: closed, full, or with a reader who goes away."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import IO, BinaryIO, TextIO, cast

import typer
from rich.console import Console

from tfm.errors import UserError


def prepare() -> None:
    """Opens /dev/null for streams that a shell left closed, so that no file opened later takes their numbers."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            # It takes the lowest free number.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character must not end a training run.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def standard_input() -> BinaryIO:
    """Returns standard input; raises UserError where it is closed, as by `<&-`."""
    if sys.stdin is None:
        raise UserError("standard input is closed: expected text")
    return sys.stdin.buffer


def standard_output() -> BinaryIO:
    """Returns standard output; raises UserError where it is closed, as by `>&-`."""
    if sys.stdout is None:
        raise UserError("standard output is closed: what this command says would be lost")
    return sys.stdout.buffer


def discard(stream: IO[str] | None) -> None:
    """Sends to nowhere whatever is still printed there, even what Python flushes as it ends."""
    # Tests print to streams in memory, which have no descriptor.
    with suppress(OSError, AttributeError, ValueError):
        descriptor = cast(IO[str], stream).fileno()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, descriptor)
        os.close(null)


def complain(text: str) -> None:
    """Prints a line on stderr, which may be gone, too."""
    try:
        typer.echo(f"tfm: {text}", err=True)
    except OSError:
        discard(sys.stderr)


class Watched(io.TextIOBase):
    """A stream that may be lost: from then on it takes everything, and shows nothing.

    Attributes:
        stream: where it leads; None where the shell has closed it.
        lost: the error by which it was lost.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream
        self.lost: OSError | None = None

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self.stream, "encoding", "utf-8")

    def isatty(self) -> bool:
        return self.stream is not None and self.stream.isatty()

    def write(self, text: str) -> int:
        self._attempt("write", text)
        return len(text)

    def flush(self) -> None:
        self._attempt("flush")

    def _attempt(self, method: str, *arguments: str) -> None:
        if self.lost is not None or self.stream is None:
            return
        try:
            getattr(self.stream, method)(*arguments)
        except OSError as error:
            self.lost = error
            discard(self.stream)


class Lines(Console):
    """The lines by which a long command tells what it does; it goes on when its reader is gone.

    Attributes:
        watched: the stream they are printed to.
    """

    def __init__(self) -> None:
        self.watched = Watched(sys.stdout)
        super().__init__(file=cast(IO[str], self.watched))
