"""The tasks of a run: sweeps at their sizes, what promises most first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tfm.errors import UserError
from tools.tune.candidates import FAMILIES
from tools.tune.candidates.sweep import Sweep

ALL = "all"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Task:
    """A sweep at one size."""

    family: str
    sweep: Sweep
    size: Any
    dtype: torch.dtype

    def __str__(self) -> str:
        eagerly = "" if self.sweep.mode == "graph" else f", {self.sweep.mode}"
        return f"{self.sweep.subject} {self.sweep.direction} at {self.size}{eagerly}"


def tasks(family: str, size: str = "", dtype: str = "bf16", rehearse: bool = False) -> list[Task]:
    """Returns the tasks of a family, or of all, whose size contains `size`; in a rehearsal one tiny size a sweep.

    Raises:
        UserError: no such family or size.
    """
    found = [
        Task(name, sweep, each, DTYPES[dtype])
        for name, sweep in sweeps(family)
        for each in ([sweep.rehearsal] if rehearse else sweep.sizes)
        if size in str(each)
    ]
    if not found:
        sizes = sorted({str(each) for _, sweep in sweeps(family) for each in sweep.sizes})
        raise UserError(f"--size: expected a part of one of {', '.join(sizes)}, got {size!r}")
    return found


def sweeps(family: str) -> list[tuple[str, Sweep]]:
    """Returns (family, sweep), the largest predicted gain first.

    Raises:
        UserError: no such family.
    """
    if family not in (ALL, *FAMILIES):
        raise UserError(f"family: expected one of {', '.join((ALL, *FAMILIES))}, got {family!r}")
    found = [(name, sweep) for name in FAMILIES if family in (ALL, name) for sweep in FAMILIES[name]]
    return sorted(found, key=lambda pair: -pair[1].gain)


def listed(pairs: Sequence[tuple[str, Sweep]]) -> Iterator[str]:
    """Yields the questions in words."""
    for family, sweep in pairs:
        yield f"{sweep.subject}, {sweep.direction}, {sweep.mode} ({family}): {sweep.gain:.0%} to gain"
        yield f"  Open: {sweep.question}"
        yield f"  Expected: {sweep.prediction}"
        yield f"  At: {'; '.join(map(str, sweep.sizes))}"
        yield f"  Candidates and expected shares: {'; '.join(sweep.rows())}"
        yield ""
