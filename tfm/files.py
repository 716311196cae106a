"""Files that are replaced whole or not at all; devices, pipes and the like are written straight into."""

from __future__ import annotations

import os
import secrets
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tfm.errors import UserError

# The file that a killed writer leaves behind: nobody reads it.
LEFT_BEHIND = ".tfm-*.part"


def write_atomically(path: Path, data: bytes) -> None:
    """Writes `path`, which holds its old contents or all of `data` whenever the machine stops; its permissions stay.

    A link is followed. A device, a pipe, and whatever this process prints to are no files to replace: they take the
    bytes as they come.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    with _told(path):
        before = _status(path)
        printed_to = _printed_to(before)
        if printed_to is not None:
            if sys.stdout is not None:
                sys.stdout.flush()
            _write(printed_to, data)
        elif before is not None and not stat.S_ISREG(before.st_mode):
            descriptor = os.open(path, os.O_WRONLY)
            try:
                _write(descriptor, data)
            finally:
                os.close(descriptor)
        else:
            _replace(Path(os.path.realpath(path)), data, before)


def check_writable(path: Path) -> None:
    """Raises, before any work, what `write_atomically` would raise after it.

    Raises:
        UserError: `path` cannot be written.
    """
    with _told(path):
        before = _status(path)
        if before is not None and not os.access(path, os.W_OK):
            raise PermissionError(13, "Permission denied")
        if before is not None and not stat.S_ISREG(before.st_mode):
            return
        folder = Path(os.path.realpath(path)).parent
        while not folder.exists():
            folder = folder.parent
        descriptor, part = _create(folder)
        os.close(descriptor)
        part.unlink()


def is_printed_to(path: Path) -> bool:
    """Tells whether what is written to `path` appears in this process's own output: /dev/stdout, or its terminal."""
    try:
        return _printed_to(_status(path)) == 1
    except OSError:
        return False


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None


def _status(path: Path) -> os.stat_result | None:
    """Returns the status of what `path` leads to; None where there is nothing yet."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(21, "Is a directory")
    return status


def _printed_to(status: os.stat_result | None) -> int | None:
    """Returns the standard stream that is this very file, which opening it anew would overwrite; None where none is."""
    for descriptor in (1, 2):
        with suppress(OSError):
            if status is not None and os.path.samestat(os.fstat(descriptor), status):
                return descriptor
    return None


def _replace(path: Path, data: bytes, before: os.stat_result | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if before is not None and not os.access(path, os.W_OK):
        raise PermissionError(13, "Permission denied")
    mode = 0o666 if before is None else stat.S_IMODE(before.st_mode)
    descriptor, part = _create(path.parent, mode)
    try:
        try:
            if before is not None:
                with suppress(PermissionError):
                    os.fchown(descriptor, before.st_uid, before.st_gid)
                os.fchmod(descriptor, mode)
            _write(descriptor, data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        part.replace(path)
        _keep_name(path.parent)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise


def _keep_name(folder: Path) -> None:
    """Makes a file's new name survive a power cut, so that what is written after it is never older."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _create(folder: Path, mode: int = 0o666) -> tuple[int, Path]:
    """Creates a file under a name that nobody can foresee; the umask takes from its `mode`."""
    part = folder / LEFT_BEHIND.replace("*", secrets.token_hex(8))
    return os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), part


def _write(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
