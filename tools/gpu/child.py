"""Processes that do the work of a part, with all they start, within a time limit, and what they leave behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent.parent
JOURNAL = "TFM_JOURNAL"
POLL_SECONDS = 0.05
# The exit status of a process that has lost its GPU: another one can go on.
GPU_LOST = 70


@dataclass(frozen=True)
class Command:
    """A program, run at the checkout's root; what it writes to the file `journal`, a JSON value a line, outlives it."""

    words: Sequence[str]
    journal: Path
    environment: Mapping[str, str]

    def start(self) -> subprocess.Popen[bytes]:
        # Under pytest-xdist, as in the tests of this program, pytest-benchmark would measure nothing.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
        shared = {
            # The package is found uninstalled; a test or a bench has one thread, whatever the number of cores.
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
            "OMP_NUM_THREADS": "1",
            JOURNAL: str(self.journal),
        }
        environment = inherited | shared | dict(self.environment)
        with self.output.open("ab") as output:
            # A session of its own: what it starts can be ended with it.
            return subprocess.Popen(
                self.words, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )

    def under(self, *words: str) -> Command:
        """Returns the same program, run by another."""
        return replace(self, words=(*words, *self.words))

    @property
    def output(self) -> Path:
        return self.journal.with_suffix(".txt")

    def text(self) -> str:
        """Returns what it has printed so far."""
        return self.output.read_text(errors="replace") if self.output.exists() else ""


@dataclass(frozen=True)
class End:
    """The end of a command: `status` as in subprocess, None where its time was up; `reason` in its own last words."""

    status: int | None
    seconds: float
    reason: str

    @property
    def died(self) -> bool:
        """True where it was taken down, by a signal or with its GPU, rather than ended or stopped."""
        return self.status is not None and (self.status < 0 or self.status == GPU_LOST)

    @property
    def state(self) -> str:
        return "out of time" if self.status is None else "failed" if self.status else "done"


def lost_gpu() -> str:
    """Says why this process's GPU answers nothing but errors, as after an illegal access; empty where it answers."""
    if not torch.cuda.is_initialized():
        return ""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return f"the GPU was lost: {str(error).splitlines()[0]}"
    return ""


def run(commands: Mapping[str, Command], seconds: float) -> dict[str, End]:
    """Runs the commands side by side; those that have not ended after so long are killed, with all they started."""
    started = time.perf_counter()
    running: dict[str, subprocess.Popen[bytes]] = {}
    ends: dict[str, End] = {}
    try:
        for name, command in commands.items():
            running[name] = command.start()
        while len(ends) < len(commands):
            elapsed = time.perf_counter() - started
            for name in running.keys() - ends.keys():
                status = running[name].poll()
                if status is not None:
                    ends[name] = End(status, elapsed, _last_words(status, commands[name].text()) if status else "")
                elif elapsed >= seconds:
                    ends[name] = End(None, elapsed, f"stopped after {elapsed:.0f} s")
            time.sleep(POLL_SECONDS)
    finally:
        for process in running.values():
            _end(process)
    return ends


def run_one(command: Command, seconds: float) -> End:
    """Runs a single command as `run` does."""
    return run({"": command}, seconds)[""]


def append(journal: Path, value: Any) -> None:
    """Adds a line at once: the process may be killed after it."""
    with journal.open("a") as file:
        file.write(json.dumps(value, default=str) + "\n")


def read(journal: Path) -> list[Any]:
    """Returns the lines of a journal, without one that a killed process left unfinished."""
    if not journal.exists():
        return []
    whole, _, _ = journal.read_text().rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


def _end(process: subprocess.Popen[bytes]) -> None:
    # Also after it ended by itself: what it started may have stayed.
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_words(status: int, text: str) -> str:
    """Returns the exception of pytest's report where there is one, else the last line."""
    if status < 0:
        return f"ended by signal {-status}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line.removeprefix("E ").strip() for line in lines if line.startswith("E ")]
    return ": ".join([f"exit status {status}", *(errors or lines)[-1:]])
