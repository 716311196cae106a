"""A run: its clock, its record, and the parts that each get a share of the time that is left."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import record
from tools.gpu.child import Command, End

FORMAT = 1
# Seconds at the end for the last record and the table.
CLOSING_SECONDS = 3.0
# The characters kept of what the programs of a failed part have printed.
OUTPUT_CHARACTERS = 4000
MOST_WORKERS = 16
# GPU memory of one process that tests: its context, and the largest tensors.
WORKER_MEMORY = 8 << 30


@dataclass(frozen=True)
class Options:
    """The command line: `suites` are to be measured, all there are or those of --only; of `parts` none means all.

    `call` is "proof" or "speed" where the run is one of two; "" where it is whole.
    """

    out: Path
    suites: Sequence[str]
    minutes: float
    everything: bool = True
    quick: bool = False
    rehearse: bool = False
    data: Path | None = None
    parts: Sequence[str] = ()
    call: str = ""

    def covers(self, name: str) -> bool:
        """Tells whether something of this name belongs to a measured suite: test_varlen_attention to attention."""
        return self.everything or any(suite in name or name in suite for suite in self.suites)


@dataclass(frozen=True)
class Part:
    """A piece of the run. `work` is given the run and its seconds; what it gives back is how it ended, and why so."""

    name: str
    weight: float
    work: Callable[[Run, float], tuple[str, str]]


@dataclass
class Run:
    """The state that the parts share. `folder` is for journals and what programs print, which goes with the run.

    `cases` counts those of each suite; `commands` are those of the part that runs; `native` is the library of csrc.
    """

    options: Options
    folder: Path
    started: float
    record: dict[str, Any] = field(default_factory=dict)
    cases: dict[str, int] = field(default_factory=dict)
    commands: list[Command] = field(default_factory=list)
    native: Path | None = None

    def __post_init__(self) -> None:
        self.record |= {"format": FORMAT, "rehearsal": self.options.rehearse, "sources": record.sources(), "parts": []}

    @property
    def ceilings(self) -> Path:
        """The file where benchmarks read what their shares are shares of, once it is measured."""
        return self.folder / "ceilings.json"

    @property
    def inductor(self) -> Path:
        """The folder where Inductor keeps what it compiled."""
        return self.folder / "inductor"

    def elapsed(self) -> float:
        """Returns the seconds since the command was called."""
        return time.perf_counter() - self.started

    def left(self) -> float:
        """Returns the seconds until the run must close."""
        return 60 * self.options.minutes - CLOSING_SECONDS - self.elapsed()

    def do_all(self, parts: Sequence[Part]) -> None:
        """Runs each part within its share of the time left: what one does not use, those after it get."""
        for place, part in enumerate(parts):
            behind = sum(map(self.weight, parts[place:]))
            self.do(part, self.left() * self.weight(part) / behind)

    def weight(self, part: Part) -> float:
        """Returns the weight of a part; a suite's is that of an average suite until its cases are known."""
        if part.name not in self.cases:
            return part.weight
        return part.weight * len(self.cases) * self.cases[part.name] / sum(self.cases.values())

    def do(self, part: Part, seconds: float) -> None:
        """Runs one part, notes how it ended, and writes the record."""
        started = time.perf_counter()
        self.commands.clear()
        if seconds <= 0:
            state, reason = "out of time", "not begun"
        else:
            try:
                state, reason = part.work(self, seconds)
            # Whatever it is, it is this part's result, and the next part's turn.
            except Exception as error:
                state, reason = "failed", f"{type(error).__name__}: {error}"
        row = {"name": part.name, "seconds": time.perf_counter() - started, "state": state, "reason": reason}
        if state == "failed":
            row["output"] = [command.text()[-OUTPUT_CHARACTERS:] for command in self.commands]
        self.record["parts"].append(row)
        record.write(self.options.out, self.record)
        print(f"{row['seconds']:6.1f} s  {part.name}: {state}{f' ({reason})' if reason else ''}", flush=True)

    def command(self, name: str, *words: str, **environment: str) -> Command:
        """Returns `python3` with these words; `name` names its journal."""
        shared = {
            # For this run alone: what an earlier one tuned beside other work is not taken over.
            "TORCHINDUCTOR_CACHE_DIR": str(self.inductor),
        }
        if self.ceilings.exists():
            shared["TFM_CEILINGS"] = str(self.ceilings)
        if self.native is not None:
            shared["TFM_NATIVE"] = str(self.native)
        if self.options.quick:
            shared["TFM_QUICK"] = "1"
        if self.options.rehearse:
            shared |= {"TFM_REHEARSAL": "1", "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = Command((sys.executable, *words), self.folder / f"{name}.jsonl", shared | environment)
        self.commands.append(command)
        return command

    def pytest(self, name: str, *words: str, **environment: str) -> Command:
        """Returns pytest with these words, its results in the journal of that name."""
        plugin = ("-p", "tools.gpu.pytest_journal")
        return self.command(name, "-m", "pytest", *plugin, "--continue-on-collection-errors", *words, **environment)

    def workers(self) -> int:
        """Returns how many processes run at a time: a core and memory of the GPU for each."""
        memory = self.record.get("environment", {}).get("memory", MOST_WORKERS * WORKER_MEMORY)
        return max(1, min(MOST_WORKERS, cores(), memory // WORKER_MEMORY))


def cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def subject(path: Path) -> str:
    """Returns what a file of tests or benchmarks is about, by its name."""
    return path.stem.removeprefix("test_").removeprefix("bench_").removeprefix("cuda_")


def ended(end: End, finding: str = "") -> tuple[str, str]:
    """Returns state and reason of a part that was one command; `finding` is what it found out."""
    return end.state, "; ".join(filter(None, (end.reason, finding)))
