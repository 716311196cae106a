"""The command line, and the order of the parts."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import record
from tfm.errors import UserError
from tools.gpu import STARTED, native, proof, speed, table
from tools.gpu import __doc__ as description
from tools.gpu.child import ROOT
from tools.gpu.huggingface import WEIGHT as HUGGINGFACE_WEIGHT
from tools.gpu.huggingface import huggingface
from tools.gpu.profile import profile
from tools.gpu.quality import quality
from tools.gpu.run import Options, Part, Run, subject

MINUTES, QUICK_MINUTES, CALL_MINUTES = 9.0, 2.0, 5.0
# What a GPU that is lent for minutes is called for, twice: each call leaves a record of its own.
CALLS = {
    "proof": ("native", "kernels", "tests", "sanitizer"),
    "speed": ("native", "ceilings", "warm-up", "suites", "profile", "huggingface", "training", "quality"),
}
TRAINING = "training"
# The width of the table where no terminal says its own.
LINE = 120


def main(command_line: list[str] | None = None) -> int:
    try:
        options = parse(command_line)
        # A run that is ended by a signal still ends its processes.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        with tempfile.TemporaryDirectory() as folder:
            run = Run(options, Path(folder), STARTED)
            record.write(options.out, run.record)
            run.do_all(parts(options))
    except UserError as error:
        print(f"tools.gpu: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("tools.gpu: interrupted; the record has what was measured", file=sys.stderr)
        return 128 + signal.SIGINT
    table.show(run.record, Console(width=None if sys.stdout.isatty() else LINE))
    print(f"{options.out}, after {run.elapsed():.0f} s")
    tests = run.record.get("tests", {"failed": 0})
    return int(tests["failed"] > 0 or any(row["state"] == "failed" for row in run.record["parts"]))


def parts(options: Options) -> list[Part]:
    """Returns the parts of the plan that were asked for, and the environment.

    Raises:
        UserError: one of --parts is none of them.
    """
    all_parts = plan(options)
    known = dict.fromkeys(part.name.partition(" ")[0] for part in all_parts)
    for name in options.parts:
        if name not in known:
            raise UserError(f"--parts: expected some of {', '.join(known)}, got {name!r}")
    wanted = {"environment", *(options.parts or known)}
    if options.call:
        # The suites are parts by their own names.
        of_calls = {name for names in CALLS.values() for name in names}
        wanted = {"environment", *CALLS[options.call]}
        wanted |= {name for name in known if name not in of_calls} if "suites" in wanted else set()
    return [part for part in all_parts if part.name.partition(" ")[0] in wanted]


def plan(options: Options) -> list[Part]:
    """Returns the parts in their order. Weights are about the seconds that an H200 with 16 cores takes, out of 540."""
    suites = [name for name in options.suites if name != TRAINING]
    presets = speed.presets(options) if TRAINING in options.suites else ()
    return [
        Part("environment", 5, record_environment),
        Part("native", native.WEIGHT, native.part),
        Part("kernels", 60, proof.kernels),
        Part("ceilings", 20, speed.ceilings),
        Part("tests", 110, proof.tests),
        Part("sanitizer", 60, proof.sanitizer),
        Part("warm-up", 90, speed.warm_up),
        *(Part(name, 140 / len(suites), partial(speed.suite, name=name)) for name in suites),
        *([Part("profile", 35, profile)] if suites else []),
        *([Part("huggingface", HUGGINGFACE_WEIGHT, huggingface)] if options.everything else []),
        *(Part(f"{TRAINING} {name}", 70 / len(presets), partial(speed.training, preset=name)) for name in presets),
        # Last, since it takes whatever time is left. Without text it says so, and leaves its time to the others.
        *([Part("quality", 80 if options.data else 1, quality)] if presets else []),
    ]


def record_environment(run: Run, seconds: float) -> tuple[str, str]:
    """Records the machine, its software, and the GPU's clocks as they are."""
    machine = run.record["environment"] = record.environment(torch.device("cpu" if run.options.rehearse else "cuda"))
    absent = [name for name in record.PACKAGES if machine[name] is None]
    return "done", f"not installed: {', '.join(absent)}" if absent else ""


def parse(command_line: list[str] | None = None) -> Options:
    """Returns the options of a run.

    Raises:
        UserError: no GPU, or one that is too old; a suite, folder or number that is none.
    """
    known = [subject(path) for path in sorted((ROOT / "benchmarks").glob("bench_*.py"))]
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", metavar="NAMES", help=f"some of {', '.join(known)}, separated by commas; default: all"
    )
    parser.add_argument(
        "--parts", metavar="NAMES", default="", help="only these parts of the run: native,tests,sanitizer, say"
    )
    parser.add_argument(
        "--call", choices=CALLS, help=f"one of the two calls of {CALL_MINUTES:.0f} minutes that make up a run"
    )
    parser.add_argument(
        "--quick", action="store_true", help=f"take {QUICK_MINUTES:.0f} minutes: fewer sizes and rounds"
    )
    parser.add_argument(
        "--minutes", type=float, help=f"limit of the whole run; default: {MINUTES:.0f}, of a call {CALL_MINUTES:.0f}"
    )
    parser.add_argument("--data", type=Path, help="folder of Multi30k's tok files; default: random text of its lengths")
    parser.add_argument("--rehearse", action="store_true", help="run without a GPU: interpreted kernels, tiny shapes")
    parser.add_argument(
        "--out", type=Path, default=os.environ.get("OUT") or None, help="file or folder; default: $OUT, or results/"
    )
    given = parser.parse_args(command_line)
    named = known if given.only is None else [name for name in given.only.split(",") if name]
    for name in named:
        if name not in known:
            raise UserError(f"--only: expected some of {', '.join(known)}, got {name!r}")
    if not named:
        raise UserError(f"--only: expected some of {', '.join(known)}, got none")
    # attention stands for decode_attention, too.
    chosen = list(dict.fromkeys(suite for name in named for suite in known if f"_{suite}".endswith(f"_{name}")))
    if given.call and given.parts:
        raise UserError("--call: expected no --parts beside it, got both")
    usual = QUICK_MINUTES if given.quick else CALL_MINUTES if given.call else MINUTES
    minutes = usual if given.minutes is None else given.minutes
    if not 0 < minutes < float("inf"):
        raise UserError(f"--minutes: expected a positive number, got {minutes:g}")
    if given.data is not None and not given.data.is_dir():
        raise UserError(f"--data: expected a folder, got {given.data}")
    gpu = "rehearsal" if given.rehearse else gpu_name()
    suffix = "_".join(
        [
            gpu,
            *(["quick"] if given.quick else []),
            *(named if given.only else []),
            *filter(None, [given.parts, given.call]),
        ]
    )
    out = given.out or ROOT / ("runs" if given.rehearse else "benchmarks/results")
    if given.out is None or out.is_dir():
        out /= f"{re.sub('[^a-z0-9]+', '_', suffix.lower())}.json"
    return Options(
        out=out,
        suites=tuple(chosen),
        parts=tuple(filter(None, given.parts.split(","))),
        call=given.call or "",
        minutes=minutes,
        everything=given.only is None,
        quick=given.quick,
        rehearse=given.rehearse,
        data=given.data,
    )


def gpu_name() -> str:
    """Returns the name of the GPU that is measured.

    Raises:
        UserError: there is none that the kernels are for.
    """
    if not torch.cuda.is_available() or torch.version.cuda is None:
        raise UserError(f"expected an NVIDIA GPU, torch {torch.__version__} finds none; --rehearse runs without one")
    properties = torch.cuda.get_device_properties(0)
    if properties.major < 8:
        raise UserError(
            f"expected compute capability 8.0 or newer, {properties.name} has {properties.major}.{properties.minor}"
        )
    return properties.name


if __name__ == "__main__":
    sys.exit(main())
