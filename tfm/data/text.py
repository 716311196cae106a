"""Parallel text: reading and checking it."""

from __future__ import annotations

import codecs
import os
from dataclasses import dataclass
from pathlib import Path

from tfm.data.compressed import opened
from tfm.errors import UserError


@dataclass(frozen=True)
class ParallelText:
    """Line i of `target` translates line i of `source`. `dropped` counts pairs left out because a side was blank."""

    source: list[str]
    target: list[str]
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.source)


def read_lines(path: str | os.PathLike[str]) -> list[str]:
    """The lines of a UTF-8 file, plain or compressed (tfm.data.compressed).

    Raises:
        UserError: the file is missing, empty, unreadable, damaged, or not UTF-8.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = opened(file, str(path)).read()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: a directory, expected a text file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    lines = split_lines(data, str(path))
    if not lines:
        raise UserError(f"{path}: empty, expected at least one line")
    return lines


def split_lines(data: bytes, name: str, first_line: int = 1) -> list[str]:
    r"""The lines of UTF-8 bytes, split at "\n" only; a "\r" before it and a byte order mark are dropped.

    Where a text has no "\n" at all, it is split at "\r", as the first Macintosh wrote lines. Other characters that
    Unicode calls line breaks are text: splitting at them would shift one side against the other.
    `first_line` is the number of the first, where `data` is a piece of a text.

    Raises:
        UserError: a byte that is not UTF-8, with `name`, its line and its column in characters, both from 1.
    """
    if first_line == 1:
        data = data.removeprefix(codecs.BOM_UTF8)
        data = data if b"\n" in data else data.replace(b"\r", b"\n")
    try:
        lines = data.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        line = before.count(b"\n") + first_line
        column = len(before[before.rfind(b"\n") + 1 :].decode("utf-8")) + 1
        raise UserError(f"{name}:{line}: not valid UTF-8 (byte 0x{data[error.start]:02x} at column {column})") from None
    if lines[-1] == "":
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def read_parallel(source_path: str | os.PathLike[str], target_path: str | os.PathLike[str]) -> ParallelText:
    """Read two files of parallel lines; pairs with a blank side are dropped and counted.

    Raises:
        UserError: as `read_lines`; the files differ in their number of lines; no pair is left.
    """
    source, target = read_lines(source_path), read_lines(target_path)
    if len(source) != len(target):
        raise UserError(
            f"{source_path} has {len(source)} lines but {target_path} has {len(target)}: "
            "expected as many, line i of one translating line i of the other"
        )
    kept = [(s, t) for s, t in zip(source, target, strict=True) if s.strip() and t.strip()]
    if not kept:
        raise UserError(f"{source_path} and {target_path}: in every pair of lines a side is blank")
    return ParallelText([s for s, _ in kept], [t for _, t in kept], dropped=len(source) - len(kept))
