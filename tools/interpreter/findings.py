"""The findings of the memory checker: what went wrong, in which kernel, on which line, by which programs, on what."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

import numpy
import torch
import triton

Program = tuple[int, int, int]
# The lines that led somewhere, innermost first: file, line, function.
Place = tuple[tuple[str, int, str], ...]

ROOT = Path(__file__).parents[2]
# The folders whose frames say nothing about who asked.
FOLDERS = [os.path.dirname(file) for file in (torch.__file__, triton.__file__, numpy.__file__, __file__) if file]
MACHINERY = tuple(folder + os.sep for folder in FOLDERS)


def here(kernel: str = "") -> Place:
    """Returns where the program now is, no further out than the function `kernel`; one line deep if none is given."""
    lines: list[tuple[str, int, str]] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if not code.co_filename.startswith(MACHINERY):
            lines.append((code.co_filename, frame.f_lineno, code.co_name))
            if not kernel or code.co_name == kernel:
                break
        frame = frame.f_back
    return tuple(lines)


def text_of(place: Place) -> str:
    """Formats a place with the kernel last: "kernels/rows.py:38 in load, from kernels/norm.py:66"."""
    lines = [f"{from_root(file)}:{line} in {function}" for file, line, function in place]
    return ", from ".join(lines).rpartition(" in ")[0]


def from_root(file: str) -> str:
    return os.path.relpath(file, ROOT)


@dataclass(frozen=True)
class Finding:
    """One fault, however many elements and programs it hits; the programs and the element in `what` are the first.

    `kind`: "out of bounds", "misaligned", "unwritten", "race" or "order". `kernel` may be an operator of torch.
    """

    kind: str
    kernel: str
    tensor: str
    what: str
    programs: tuple[Program, ...] = ()
    places: tuple[Place, ...] = ()
    elements: int = 1

    @property
    def key(self) -> tuple[object, ...]:
        """The facts that tell it from other faults; a race is the same whoever comes first."""
        return self.kind, self.kernel, self.tensor, frozenset(self.places)

    def __str__(self) -> str:
        lines = [f"{self.kind}: {self.kernel}, {self.tensor}: {self.what} ({self.elements} in all)"]
        if self.programs:
            lines.append(f"program{'s' * (len(self.programs) > 1)} {' and '.join(map(str, self.programs))}")
        return "; ".join([*lines, *map(text_of, self.places)])


class Findings:
    """Faults, one for each kind, kernel, tensor and place, in the order in which they were seen."""

    def __init__(self) -> None:
        self._found: dict[object, Finding] = {}

    def add(self, finding: Finding) -> None:
        known = self._found.get(finding.key)
        total = finding.elements + (known.elements if known else 0)
        self._found[finding.key] = replace(known or finding, elements=total)

    def __iter__(self) -> Iterator[Finding]:
        return iter(self._found.values())

    def __len__(self) -> int:
        return len(self._found)
