"""The processes that compile and time candidates, and the record that outlives them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import device, record
from tools.gpu import child
from tools.gpu.child import Command
from tools.gpu.run import cores
from tools.tune.findings import Finding, findings, rows, summary
from tools.tune.problems import Task
from tools.tune.trials import OUT_OF_TIME

FORMAT = 1
WORKER = ("-m", "tools.tune.worker")
# The share of the time that compilation may take at most.
COMPILE_SHARE = 0.3
MOST_WORKERS = 16
POLL_SECONDS = 0.5
# Seconds beyond its time for a worker that has begun a candidate.
GRACE_SECONDS = 1.0


class Run:
    """Tries `chosen`, which `words` describe to the processes that do it, between `started` and `until` by `clock`."""

    def __init__(
        self, chosen: Sequence[Task], words: Sequence[str], out: Path, folder: Path, started: float, until: float,
        clock: Callable[[], float],
    ) -> None:  # fmt: skip
        self.chosen, self.words, self.out, self.folder = chosen, words, out, folder
        self.started, self.until, self.clock = started, until, clock
        self.printed = 0
        self.failures: list[str] = []
        self.record: dict[str, Any] = {
            "format": FORMAT,
            "benchmark": "tuning",
            "rehearsal": device.REHEARSAL,
            "environment": record.environment(device.DEVICE),
            "sources": record.sources(),
            "sweeps": [],
        }

    def all(self) -> list[str]:
        """Compiles, times, records and prints; returns what went wrong with the run itself, in words."""
        record.write(self.out, self.record)
        self.compile()
        command = self.command("timed")
        with self.watched(command.journal):
            self.time(command)
        found = self.note(command.journal)
        print("\n".join(summary(found)), flush=True)
        return self.failures

    def compile(self) -> None:
        """Runs every candidate once, side by side: what Triton compiles is on the disk afterwards."""
        begun = self.clock()
        seconds = COMPILE_SHARE * (self.until - begun)
        workers = min(MOST_WORKERS, cores(), len(self.chosen))
        parts = [f"{k}/{workers}" for k in range(workers)]
        ends = child.run(
            {part: self.command(f"compile{k}", "--compile", part) for k, part in enumerate(parts)}, seconds
        )
        journals = [self.folder / f"compile{k}.jsonl" for k in range(workers)]
        lines = [line for journal in journals for line in child.read(journal)]
        self.record["compiled"] = {
            "seconds": self.clock() - begun,
            "candidates": sum("ended" in line for line in lines),
            "processes": {part: end.reason for part, end in ends.items() if end.reason},
        }
        print("compiled {candidates} candidates in {seconds:.0f} s".format(**self.record["compiled"]))
        for part, end in ends.items():
            if end.reason:
                print(f"  process {part}: {end.reason}", flush=True)

    def time(self, command: Command) -> None:
        """Times one candidate after the other, in one process; where it dies, another goes on after what it died of."""
        lines: list[Any] = []
        while True:
            end = child.run_one(command, self.until + GRACE_SECONDS - self.clock())
            begun, lines = len(lines), child.read(command.journal)
            if end.status is None or end.died:
                close(command.journal, lines, f"its process {end.reason}" if end.died else OUT_OF_TIME)
            if not end.died or len(lines) == begun:
                break
        if end.status not in (0, None):
            self.failures.append(f"the process that times ended: {end.reason}")

    def command(self, name: str, *words: str) -> Command:
        """Returns the worker, with its journal of this name."""
        words = (*WORKER, *self.words, "--until", str(self.until), *words)
        return Command((sys.executable, *words), self.folder / f"{name}.jsonl", {})

    @contextmanager
    def watched(self, journal: Path) -> Iterator[None]:
        """Prints and records what is done within the block, task by task."""
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(POLL_SECONDS):
                if sum("done" in line for line in child.read(journal)) > self.printed:
                    self.note(journal)

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def note(self, journal: Path) -> list[Finding]:
        """Prints the tasks done since the last time, and writes the record anew."""
        lines = child.read(journal)
        found = findings(self.chosen, lines)
        done = [line["done"] for line in lines if "done" in line]
        for number in done[self.printed :]:
            print("\n".join(rows(found[number])), flush=True)
        self.printed = len(done)
        self.record["seconds"] = self.clock() - self.started
        self.record["sweeps"] = [finding.record() for finding in found]
        record.write(self.out, self.record)
        return found


def close(journal: Path, lines: Sequence[dict[str, Any]], reason: str) -> None:
    """Notes, for the trial that a process was in when it ended, why it has no result."""
    ended = {tuple(line["ended"]) for line in lines if "ended" in line}
    for line in lines:
        if "begun" in line and tuple(line["begun"]) not in ended:
            child.append(journal, {"ended": line["begun"], "trial": line["trial"] | {"reason": reason}})
