"""Compressed text, recognised by its first bytes, whatever its name: gzip, bzip2, xz, and zstd where Python has it."""

from __future__ import annotations

import io
import re
from contextlib import suppress
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any, BinaryIO, cast

from tfm.errors import UserError


@dataclass(frozen=True)
class Format:
    """`start` matches its first bytes. `module` reads it, and raises `error` on damage; "" where there is none."""

    name: str
    start: re.Pattern[bytes]
    module: str = ""
    error: str = ""


# No text begins like this: most of these are not UTF-8, and bzip2's start goes on with its magic number.
FORMATS = (
    Format("gzip", re.compile(rb"\x1f\x8b"), "gzip", "zlib:error"),
    Format("bzip2", re.compile(rb"BZh[1-9](1AY&SY|\x17\x72\x45\x38\x50\x90)"), "bz2", "builtins:OSError"),
    Format("xz", re.compile(rb"\xfd7zXZ\x00"), "lzma", "lzma:LZMAError"),
    Format("zstd", re.compile(rb"\x28\xb5\x2f\xfd"), "compression.zstd", "compression.zstd:ZstdError"),
    Format("zip", re.compile(rb"PK\x03\x04")),
)
LONGEST_START = 10


def opened(stream: BinaryIO, name: str) -> BinaryIO:
    """Returns the text of `stream` as bytes, decompressed where it is compressed. Waits for its first bytes.

    Raises:
        UserError: it is compressed as nothing here reads; or later, from a read: it is truncated or damaged.
    """
    start = stream.read(LONGEST_START)
    whole = cast(BinaryIO, io.BufferedReader(_Rejoined(start, stream)))
    kind = next((kind for kind in FORMATS if kind.start.match(start)), None)
    if kind is None:
        return whole
    try:
        if not kind.module:
            raise ImportError
        decompressed, error = resolve_name(f"{kind.module}:open")(whole), resolve_name(kind.error)
    except ImportError:
        raise UserError(
            f"{name}: {kind.name}, which this Python does not read: expected {', '.join(_readable())} or plain text"
        ) from None
    return cast(
        BinaryIO, io.BufferedReader(_Checked(decompressed, error, f"{name}: truncated or damaged {kind.name} file"))
    )


def _readable() -> list[str]:
    """Lists the formats that this Python reads: it may have been built without a library."""
    names = []
    for kind in FORMATS:
        with suppress(ImportError, ValueError):
            resolve_name(kind.module)
            names.append(kind.name)
    return names


class _Rejoined(io.RawIOBase):
    """`start`, then what is left of `stream`."""

    def __init__(self, start: bytes, stream: BinaryIO) -> None:
        self.start, self.stream = start, stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        data = self.start[: len(view)] or self.stream.read(len(view))
        self.start = self.start[len(data) :]
        view[: len(data)] = data
        return len(data)


class _Checked(io.RawIOBase):
    """The bytes that `stream` decompresses to; UserError where it is damaged, with `complaint` and why."""

    def __init__(self, stream: BinaryIO, error: type[Exception], complaint: str) -> None:
        self.stream, self.error, self.complaint = stream, error, complaint

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        try:
            data = self.stream.read(len(view))
        except (EOFError, OSError, self.error) as error:
            # An error with a number is the system's, such as a failing disk.
            if getattr(error, "errno", None) is not None:
                raise
            raise UserError(f"{self.complaint} ({error})") from None
        view[: len(data)] = data
        return len(data)
