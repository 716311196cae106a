"""A process that tries candidates: `--compile 3/16` its share of them, untimed, else all of them, timed.

Run by `python -m tools.tune`. Each trial is a line of the journal before it begins and after it has ended; those
that the journal names already are not begun again.
"""

from __future__ import annotations

import argparse
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from tools.gpu.child import GPU_LOST, JOURNAL, append, lost_gpu, read
from tools.tune.problems import Task, tasks
from tools.tune.trials import Notes, Timing, Trial, compile_all, timed, try_all

# Seconds: compilation, float64's truth and timing take a few; a candidate that takes so many hangs.
MOST_SECONDS = 90


class Journal(Notes):
    """The notes of the task of this place; the process ends where a trial takes too long, or loses the GPU."""

    def __init__(self, path: Path, task: int) -> None:
        self.path, self.task = path, task
        self.known = {tuple(line["begun"]) for line in read(path) if "begun" in line}

    def is_known(self, place: int) -> bool:
        return (self.task, place) in self.known

    def begin(self, place: int, trial: Trial) -> None:
        append(self.path, {"begun": [self.task, place], "trial": asdict(trial)})
        # The timer's signal ends the process wherever it waits.
        signal.alarm(MOST_SECONDS)

    def end(self, place: int, trial: Trial) -> None:
        signal.alarm(0)
        append(self.path, {"ended": [self.task, place], "trial": asdict(trial)})
        if trial.reason and lost_gpu():
            os._exit(GPU_LOST)


def try_tasks(
    chosen: Sequence[Task], journal: Path, until: float, clock: Callable[[], float], timing: Timing = timed
) -> None:
    """Tries every task in its order, each within its share of the time that is left until `until`."""
    lines = read(journal)
    # It is done, or its process ended while it was built.
    closed = {line["done"] for line in lines if "done" in line}
    closed |= {
        line["ended"][0] for line in lines if "ended" in line and line["ended"][1] == 0 and line["trial"]["reason"]
    }
    left = [number for number in range(len(chosen)) if number not in closed]
    for k, number in enumerate(left):
        now, task = clock(), chosen[number]
        if now >= until:
            return
        share = now + (until - now) / (len(left) - k)
        try_all(task.sweep, task.size, task.dtype, share, clock, Journal(journal, number), timing)
        append(journal, {"done": number})


def compile_tasks(chosen: Sequence[Task], journal: Path, part: str, until: float, clock: Callable[[], float]) -> None:
    """Compiles the tasks of `part`: "3/16" is every sixteenth from the fourth on."""
    first, step = map(int, part.split("/"))
    for number in range(first, len(chosen), step):
        task = chosen[number]
        if clock() >= until:
            return
        try:
            compile_all(task.sweep, task.size, task.dtype, until, clock, Journal(journal, number))
        except Exception:  # what it is, its trial will say
            if lost_gpu():
                os._exit(GPU_LOST)


def main(clock: Callable[[], float] = time.monotonic) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("family")
    parser.add_argument("--size", default="")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument(
        "--until", type=float, required=True, help="when to end, by time.monotonic, the same in all processes"
    )
    parser.add_argument("--compile", default="", metavar="K/N")
    arguments = parser.parse_args()
    chosen = tasks(arguments.family, arguments.size, arguments.dtype, arguments.rehearse)
    journal = Path(os.environ[JOURNAL])
    if arguments.compile:
        compile_tasks(chosen, journal, arguments.compile, arguments.until, clock)
    else:
        try_tasks(chosen, journal, arguments.until, clock)


if __name__ == "__main__":
    main()
