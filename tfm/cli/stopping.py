"""Ends a run before its time, on a signal or when an output is lost, and keeps two processes out of one folder."""

from __future__ import annotations

import errno
import fcntl
import os
import shlex
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import typer

from tfm.cli.streams import Lines, complain
from tfm.errors import UserError
from tfm.files import LEFT_BEHIND, check_writable
from tfm.train import Training

# The reason of a lost output, beside the names of signals.
OUTPUT = "output"
INTERRUPTS = ("SIGINT", "SIGTERM")


@contextmanager
def stopped_by_signals(training: Training) -> Iterator[None]:
    """Has SIGINT, SIGTERM and SIGHUP end training after the update under way, with a checkpoint.

    A second SIGINT or SIGTERM ends it at once. A terminal that goes may send SIGHUP several times. What the caller of
    the process has it ignore, as `nohup` does, stays ignored.
    """
    stops = [number for number in (*INTERRUPTS, "SIGHUP") if signal.getsignal(signal.Signals[number]) != signal.SIG_IGN]

    def stop(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if training.stop_reason in INTERRUPTS:
            if name in INTERRUPTS:
                raise KeyboardInterrupt
            return
        training.stop(name)

    before = {name: signal.signal(signal.Signals[name], stop) for name in stops}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(signal.Signals[name], handler)


def end(console: Lines, training: Training, reason: str) -> None:
    """Says what ended training early, and how to go on.

    Raises:
        typer.Exit: with the status that a shell gives to a process ended by a signal.
    """
    lost = console.watched.lost
    if reason == OUTPUT and lost is not None:
        what, status = f"its output ({lost.strerror})", 128 + signal.SIGPIPE if lost.errno == errno.EPIPE else 2
    else:
        what, status = reason, 128 + signal.Signals[reason]
    saved = f"step {training.step}, saved" if training.step else "step 0, nothing is lost"
    complain(f"stopped by {what} at {saved}; continue with: tfm train --resume --out {pasted(training.run.folder)}")
    raise typer.Exit(status)


def pasted(path: Path) -> str:
    """Quotes a path so that it can be pasted into a shell."""
    text = str(path)
    text = f"./{text}" if text.startswith("-") else text
    if text.isprintable():
        return shlex.quote(text)
    # Bytes that are not UTF-8, and control characters.
    parts = (
        chr(byte) if 32 <= byte < 127 and chr(byte) not in "\\'" else f"\\x{byte:02x}" for byte in os.fsencode(text)
    )
    return f"$'{''.join(parts)}'"


@contextmanager
def alone_in(folder: Path, new: bool) -> Iterator[None]:
    """Locks a run's folder for this process; the system unlocks it when the process ends, however it does.

    Args:
        folder: of the run.
        new: the folder is made where it is missing, and removed again where nothing was written into it.

    Raises:
        UserError: another process trains there, or the folder cannot be written.
    """
    made = []
    if new:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--out {folder}: a file, expected a folder")
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
    elif not folder.is_dir():
        raise UserError(f"{folder}: no such run folder")
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            _lock(descriptor, folder)
            check_writable(folder / "config.json")
            for part in (*folder.glob(LEFT_BEHIND), *(folder / "checkpoints").glob(LEFT_BEHIND)):
                part.unlink()
            yield
        finally:
            os.close(descriptor)
    finally:
        for path in made:
            with suppress(OSError):
                path.rmdir()


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"--out {folder}: another tfm is training in this folder") from None
    except OSError as error:
        # Some network file systems have no locks.
        complain(f"warning: {folder}: cannot be locked ({error.strerror}); train there one at a time")
