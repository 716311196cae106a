"""Parallel text: reading and checking it."""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tfm import memory
from tfm.data.compressed import opened
from tfm.errors import UserError

# More bytes than this without a line break are no sentence: tokenizing takes hundreds of times their memory.
LONGEST_LINE = 2**20
PIECE = 2**24
# A text is held as bytes, as characters and as lines at once.
COPIES = 4


@dataclass(frozen=True)
class ParallelText:
    """Line i of `target` translates line i of `source`. `dropped` counts pairs left out because a side was blank."""

    source: list[str]
    target: list[str]
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.source)


def read_lines(path: str | os.PathLike[str]) -> list[str]:
    """Returns the lines of a UTF-8 file, plain or compressed (tfm.data.compressed).

    Raises:
        UserError: the file is missing, empty, unreadable, damaged, or not UTF-8.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = _contents(opened(file, str(path)), str(path))
        lines = split_lines(data, str(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: a directory, expected a text file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except MemoryError:
        raise UserError(f"{path}: too large for the memory of this machine") from None
    if not lines:
        raise UserError(f"{path}: empty, expected at least one line")
    return lines


def _contents(stream: BinaryIO, name: str) -> bytes:
    """Reads all that a stream gives; raises UserError as soon as it is more than memory holds."""
    room, pieces, size = memory.available() // COPIES, [], 0
    while piece := stream.read(PIECE):
        pieces.append(piece)
        size += len(piece)
        if size > room:
            raise UserError(f"{name}: more than {memory.readable(room)} of text: too large for this machine's memory")
    return b"".join(pieces)


def lines_of(stream: BinaryIO, name: str) -> Iterator[bytes]:
    """Yields the lines of a stream, as soon as each is there.

    Raises:
        UserError: a line is so long that it is no text.
    """
    number = 1
    while line := stream.readline(LONGEST_LINE + 1):
        if len(line) > LONGEST_LINE:
            raise _too_long(name, number)
        yield line
        number += 1


def _too_long(name: str, line: int) -> UserError:
    return UserError(
        f"{name}:{line}: more than {LONGEST_LINE:,} bytes without a line break, expected one sentence a line"
    )


def split_lines(data: bytes, name: str, first_line: int = 1) -> list[str]:
    r"""Returns the lines of UTF-8 bytes, split at "\n" only; a "\r" before it and a byte order mark are dropped.

    Where a text has no "\n" at all, it is split at "\r", as the first Macintosh wrote lines. Other characters that
    Unicode calls line breaks are text: splitting at them would shift one side against the other.
    `first_line` is the number of the first, where `data` is a piece of a text.

    Raises:
        UserError: a byte that is not UTF-8, with `name`, its line and its column in characters, both from 1; or a line
            so long that it is no text.
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
    for number, text in enumerate(lines, first_line):
        # No character has more than four bytes.
        if len(text) > LONGEST_LINE // 4 and len(text.encode()) > LONGEST_LINE:
            raise _too_long(name, number)
    return [line.removesuffix("\r") for line in lines]


def read_parallel(source_path: str | os.PathLike[str], target_path: str | os.PathLike[str]) -> ParallelText:
    """Reads two files of parallel lines; pairs with a blank side are dropped and counted.

    Raises:
        UserError: as `read_lines`; the files differ in their number of lines; no pair is left.
    """
    source, target = read_lines(source_path), read_lines(target_path)
    if len(source) != len(target):
        raise UserError(
            f"{source_path} has {len(source)} lines but {target_path} has {len(target)}: "
            "expected equally many, line i of one translating line i of the other"
        )
    kept = [(s, t) for s, t in zip(source, target, strict=True) if s.strip() and t.strip()]
    if not kept:
        raise UserError(f"{source_path} and {target_path}: in every pair of lines a side is blank")
    return ParallelText([s for s, _ in kept], [t for _, t in kept], dropped=len(source) - len(kept))
