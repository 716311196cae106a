"""Tries launch settings for one family of kernels on this GPU, and prints those to paste into kernels/launch/.

    python -m benchmarks.tune layer_norm --seconds 120 [--size 8192x1024] [--dtype fp16]
    python -m benchmarks.tune layer_norm --seconds 20 --rehearse

What is tried lies in benchmarks/candidates/, beside the question and the prediction. Each candidate must match float64
as closely as today's settings do before it is timed. --rehearse takes Triton's interpreter and tiny sizes.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.candidates.sweep import Sweep
    from benchmarks.trials import Trial

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def main(clock: Callable[[], float] = time.monotonic) -> int:
    start = clock()
    parser = argparse.ArgumentParser(description="Try launch settings; print those to paste into kernels/launch/.")
    parser.add_argument("family", help="of kernels: a file of benchmarks/candidates")
    parser.add_argument("--seconds", type=float, default=120.0, help="after which nothing more is tried")
    parser.add_argument("--size", default="", help="only sizes that are written so, in part or whole: 8192x1024")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--rehearse", action="store_true", help="in Triton's interpreter, in fp16, at tiny sizes")
    arguments = parser.parse_args()
    if arguments.rehearse:
        # Both are read when benchmarks.device and triton are imported: below.
        os.environ |= {"TFM_REHEARSAL": "1", "TRITON_INTERPRET": "1"}

    import torch

    from benchmarks.candidates import FAMILIES

    if arguments.family not in FAMILIES:
        parser.error(f"family: expected one of {', '.join(FAMILIES)}, got {arguments.family!r}")
    if not arguments.rehearse and not torch.cuda.is_available():
        parser.error("expected an NVIDIA GPU; --rehearse does without")
    problems = [
        (sweep, size)
        for sweep in FAMILIES[arguments.family]
        for size in ([sweep.rehearsal] if arguments.rehearse else sweep.sizes)
        if arguments.size in str(size)
    ]
    if not problems:
        sizes = {str(size) for sweep in FAMILIES[arguments.family] for size in sweep.sizes}
        parser.error(f"--size: expected a part of one of {', '.join(sorted(sizes))}, got {arguments.size!r}")
    # The interpreter's products of bf16 matrices are wrong, and fp32 takes cuBLAS in place of many a kernel.
    dtype = getattr(torch, "float16" if arguments.rehearse else DTYPES[arguments.dtype])
    where = "Triton's interpreter" if arguments.rehearse else torch.cuda.get_device_name()
    print(f"{arguments.family} in {dtype} on {where}")
    return 0 if tune(problems, dtype, start + arguments.seconds, clock) else 1


def tune(problems: Sequence[tuple[Sweep, Any]], dtype: Any, deadline: float, clock: Callable[[], float]) -> int:
    """Tries every sweep at its size, each within its share of the time that is left, and prints what came of it.

    Returns:
        How many settings were timed.
    """
    from benchmarks.trials import best_of, try_all

    better: list[Trial] = []
    timed, asked = 0, None
    for k, (sweep, size) in enumerate(problems):
        now = clock()
        if now >= deadline:
            print(f"\nout of time before {sweep.function} at {size}")
            continue
        until = now + (deadline - now) / (len(problems) - k)
        if sweep is not asked:
            print(f"\n{sweep.function}\n  Open: {sweep.question}\n  Expected: {sweep.prediction}")
            asked = sweep
        print(f"\n  {sweep.direction} of {sweep.suite.operation} at {size}, as shares of today's time")
        print("  expected  measured        µs")
        for _, trials in groupby(try_all(sweep, size, dtype, until, clock), key=lambda trial: trial.arguments):
            tried: list[Trial] = []
            for trial in trials:
                tried.append(trial)
                timed += bool(trial.samples)
                print(f"  {_row(trial, tried[0])}", flush=True)
            better += filter(None, [best_of(tried)])
    print("\nFaster than today's:" if better else "\nNothing that was measured is faster than today's settings.")
    for trial in better:
        call = ", ".join(f"{name}={value}" for name, value in trial.arguments.items())
        print(f"# {trial.function}({call}): {1e6 * trial.seconds:.1f} µs at {trial.size}\n{trial.settings}")
    return timed


def _row(trial: Trial, current: Trial) -> str:
    if not trial.samples:
        return f"{trial.expected:8.2f}  {trial.reason}: {trial.settings}"
    share = f"{trial.seconds / current.seconds:8.3f}" if current.samples else f"{'':8}"
    today = "  (today's)" if trial.is_current else ""
    return f"{trial.expected:8.2f}  {share}  {1e6 * trial.seconds:8.1f}  {trial.settings}{today}"


if __name__ == "__main__":
    sys.exit(main())
