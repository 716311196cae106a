"""Files that are replaced whole or not at all."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from tfm.errors import UserError


def write_atomically(path: Path, data: bytes) -> None:
    """`path` holds its old contents or all of `data`, whenever the machine stops.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    part = path.parent / f"{path.name}.part"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
