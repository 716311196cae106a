"""The command line."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tools.tune import __doc__ as description

SECONDS = 120.0
# Seconds at the end for the last record and the summary.
CLOSING_SECONDS = 3.0


def main(command_line: list[str] | None = None, clock: Callable[[], float] = time.monotonic) -> int:
    started = clock()
    given = parse(command_line)
    if given.rehearse:
        # Both are read when benchmarks.device and triton are imported: below, and in the processes that try.
        os.environ |= {"TFM_REHEARSAL": "1", "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}

    import torch

    from tfm.errors import UserError
    from tools.tune.problems import listed, sweeps, tasks
    from tools.tune.run import Run

    try:
        if given.list:
            print("\n".join(listed(sweeps(given.family))))
            return 0
        chosen = tasks(given.family, given.size, given.dtype, given.rehearse)
        if not given.rehearse and not torch.cuda.is_available():
            raise UserError("expected an NVIDIA GPU; --rehearse and --list do without")
        out = destination(given, "rehearsal" if given.rehearse else torch.cuda.get_device_name())
        # A run that is ended by a signal still ends its processes.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        words = [given.family, "--size", given.size, "--dtype", given.dtype, *["--rehearse"] * given.rehearse]
        with tempfile.TemporaryDirectory() as folder:
            run = Run(chosen, words, out, Path(folder), started, started + given.seconds - CLOSING_SECONDS, clock)
            failures = run.all()
    except UserError as error:
        print(f"tools.tune: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("tools.tune: interrupted; the record has what was timed", file=sys.stderr)
        return 128 + signal.SIGINT
    print("\n".join([f"\n{out}, after {clock() - started:.0f} s", *failures]))
    return 1 if failures else 0


def parse(command_line: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.tune", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("family", help="a family of kernels: a file of tools/tune/candidates, or all")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help=f"limit of the whole run; default: {SECONDS:.0f}"
    )
    parser.add_argument("--size", default="", help="only sizes that contain this: 8192x1024")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16")
    parser.add_argument("--rehearse", action="store_true", help="run in Triton's interpreter, at tiny sizes")
    parser.add_argument("--list", action="store_true", help="print questions, predictions and candidates, and exit")
    parser.add_argument(
        "--out", type=Path, default=os.environ.get("OUT") or None, help="default: $OUT, or benchmarks/results/tuning/"
    )
    given = parser.parse_args(command_line)
    if not 0 < given.seconds < float("inf"):
        parser.error(f"--seconds: expected a positive number, got {given.seconds:g}")
    return given


def destination(given: argparse.Namespace, gpu: str) -> Path:
    """Returns the file of the record: --out, or a file named after the GPU in that folder or beside the results."""
    name = f"{re.sub('[^a-z0-9]+', '_', f'{gpu} {given.family}'.lower())}.json"
    if given.out is None:
        root = Path(__file__).parent.parent.parent
        return root / ("runs/tuning" if given.rehearse else "benchmarks/results/tuning") / name
    out = Path(given.out)
    return out / name if out.is_dir() else out


if __name__ == "__main__":
    sys.exit(main())
