"""Compares how well tfm and plain torch learn, update for update: the bundled corpus, dropout, several seeds of each.

    python -m benchmarks.learning --seeds 1,2,3,4,5 --updates 500 --processes 2

Under one seed both sides start from the same weights and take the same batches by the same recipe; what differs is
which elements dropout drops, and rounding. With dropout one run says little: a model leaves its first plateau, where it
has learnt how frequent words are and nothing of the source, when it happens to. So the record holds every run's curve,
the means over the seeds, and the mean of the paired differences beside its standard error. The sign test beside that
assumes nothing of their distribution: of all ways to swap the two sides of some seeds, the share of those in which the
mean is at least as far from 0.
"""

from __future__ import annotations

import argparse
import math
import statistics
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import ROOT, environment, write
from benchmarks.timed_training import UPDATES_PER_POINT, TimedTraining, load
from tfm.config import PRESETS

OURS, PEER = "tfm", "eager"
CPU = torch.device("cpu")


def curve(arguments: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    """Trains one contender under one seed; returns its losses by the update, of training and of validation."""
    torch.set_num_threads(1)
    task = load(arguments)
    task = replace(task, config=replace(task.config, dropout=arguments.dropout))
    training = TimedTraining(name, task, CPU, seed)
    start_loss = training.start_loss()
    # Seeded again, so that dropout's numbers do not depend on how many the initial weights took.
    torch.manual_seed(seed)
    seconds = 0.0
    for _ in range(arguments.updates // UPDATES_PER_POINT):
        seconds += training.run_for(math.inf, UPDATES_PER_POINT)["seconds"]
        training.points[-1]["validation_loss"] = training.validation_loss()
    losses = {key: [point[key] for point in training.points] for key in ("train_loss", "validation_loss")}
    return {"contender": name, "seed": seed, "start_loss": start_loss, "seconds": seconds} | losses


def summary(runs: list[dict[str, Any]], seeds: list[int]) -> dict[str, Any]:
    """Returns means and deviations over the seeds that both sides have finished, point by point, and what differs."""
    by_name = {(run["contender"], run["seed"]): run for run in runs}
    paired = [seed for seed in seeds if all((name, seed) in by_name for name in (OURS, PEER))]
    result: dict[str, Any] = {"seeds": paired}
    for key in ("train_loss", "validation_loss") if paired else ():
        ours, theirs = ([by_name[name, seed][key] for seed in paired] for name in (OURS, PEER))
        result[key] = {
            OURS: [moments(values) for values in zip(*ours, strict=True)],
            PEER: [moments(values) for values in zip(*theirs, strict=True)],
            "difference": [
                paired_difference([a - b for a, b in zip(*values, strict=True)])
                for values in zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True)
            ],
        }
    return result


def moments(values: Any) -> dict[str, float]:
    """Returns mean and standard deviation."""
    values = list(values)
    return {"mean": statistics.fmean(values), "deviation": statistics.stdev(values) if len(values) > 1 else 0.0}


def paired_difference(differences: list[float]) -> dict[str, float | None]:
    """Returns the differences' mean, its standard error, and the share of sign patterns whose mean is as far from 0."""
    mean, count = statistics.fmean(differences), len(differences)
    error = statistics.stdev(differences) / math.sqrt(count) if count > 1 else None
    signed = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True))) for signs in product((1, -1), repeat=count)
    ]
    # A pattern's sum may round otherwise than the same sum found by another order of signs.
    beyond = sum(total >= abs(sum(differences)) * (1 - 1e-9) for total in signed)
    return {"mean": mean, "standard_error": error, "p": beyond / len(signed)}


def parse(command_line: list[str] | None = None) -> argparse.Namespace:
    def seeds(text: str) -> list[int]:
        return [int(seed) for seed in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=seeds, default=[1, 2, 3, 4, 5])
    parser.add_argument(
        "--updates", type=int, default=500, help=f"updates of each run, a multiple of {UPDATES_PER_POINT}"
    )
    parser.add_argument("--dropout", type=float, default=0.3)
    parser.add_argument("--preset", choices=PRESETS, default="demo")
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--learning-rate", type=float, default=0.004)
    parser.add_argument("--warmup", type=int, default=300)
    parser.add_argument("--processes", type=int, default=2, help="number of runs at a time, one thread each")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "learning.json")
    arguments = parser.parse_args(command_line)
    if arguments.updates < UPDATES_PER_POINT or arguments.updates % UPDATES_PER_POINT:
        parser.error(f"--updates: expected a multiple of {UPDATES_PER_POINT}, got {arguments.updates}")
    # `load` reads these: the bundled corpus, and a training that is to learn from it.
    arguments.data, arguments.minutes = None, math.inf
    return arguments


def main() -> None:
    arguments = parse()
    shown = {name: value for name, value in vars(arguments).items() if name not in ("data", "minutes", "out")}
    runs: list[dict[str, Any]] = []
    record: dict[str, Any] = {
        "benchmark": "learning",
        "environment": environment(CPU),
        "corpus": "bundled",
        "arguments": shown,
        "points": list(range(UPDATES_PER_POINT, arguments.updates + 1, UPDATES_PER_POINT)),
        "runs": runs,
    }
    with ProcessPoolExecutor(arguments.processes, mp_context=get_context("spawn")) as processes:
        # Both sides of a seed before the next one's, so that an interrupted record holds pairs.
        waiting = [processes.submit(curve, arguments, name, seed) for seed in arguments.seeds for name in (OURS, PEER)]
        for done in as_completed(waiting):
            runs.append(done.result())
            record["summary"] = summary(runs, arguments.seeds)
            write(arguments.out, record)
            print(
                f"{runs[-1]['contender']}, seed {runs[-1]['seed']}: {runs[-1]['validation_loss'][-1]:.3f}", flush=True
            )


if __name__ == "__main__":
    main()
