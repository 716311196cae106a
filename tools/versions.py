"""Runs the tests and check-kernels under each torch and triton that tfm supports: `make versions`.

    python -m tools.versions [--only torch-2.12,triton-3.9] [--parts tests,kernels] [--again] [--out FILE]

Each pair has a virtual environment of its own, several gigabytes where torch's wheels bring CUDA, in TFM_VERSIONS or
else ~/.cache/tfm/versions; it is made once, and made again where what it was asked to hold has changed. What a part
found is written to the record as soon as the part ends, and a part whose record is of these sources is not run again:
a run that was interrupted goes on, and the pairs can be run one at a time. README's table is written from the record by
python -m tools.report.

Exit status 1 where a part failed, in this run or in the record.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.progress import say
from tfm.native import recipe
from tools.report.__main__ import main as write_pages
from tools.report.versions import table

ROOT = Path(__file__).parent.parent
RECORD = ROOT / "benchmarks" / "results" / "versions.json"
# torch asks for exactly one triton, or for nearly so: its pins and those of what it asks for are torch's to make.
UNPINNED = ("torch", "triton", "setuptools")
BUILDS = "setuptools>=77"
EXTRAS = ".[translate,build,test]"
# What the parts rest upon, records and documents aside.
SOURCES = (
    "benchmarks", "csrc", "kernels", "tests", "tfm", "tools", "Makefile", "constraints.txt", "pyproject.toml",
    "setup.py", ":!benchmarks/results",
)  # fmt: skip
SUMMARY = re.compile(r"^=+ (?P<counts>\d+ \w+.*) in [\d.]+s\b.*=+$", re.MULTILINE)
COMPILED = re.compile(r"^(?P<compiled>\d+) compilations in .*?^(?P<faults>\d+) failures$(?P<lines>.*)", re.M | re.S)


@dataclass(frozen=True)
class Pair:
    """Two versions that are installed together.

    `forced`: this torch asks for another triton. `beside` stands in place of constraints.txt, where the pair
    cannot do with what is there.
    """

    torch: str
    triton: str
    forced: bool = False
    beside: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"torch-{self.torch}-triton-{self.triton}"

    @property
    def pinned(self) -> list[str]:
        return [f"torch=={self.torch}", *[f"triton=={self.triton}"] * (not self.forced), *self.beside]


# For each torch the triton that its wheels ask for on Linux; the newest triton is ahead of every torch.
PAIRS = (
    # Its interpreter uses an array of one number as that number, which NumPy 2.4 refuses.
    Pair("2.11.0", "3.6.0", beside=("numpy==2.3.5",)),
    Pair("2.12.0", "3.7.0"),
    Pair("2.13.0", "3.7.1"),
    Pair("2.14.1", "3.8.0"),
    Pair("2.14.1", "3.9.0", forced=True),
)


@dataclass(frozen=True)
class Part:
    """A target of the Makefile that is run of a pair, and how its last lines are read; None where they are missing."""

    target: str
    read: Callable[[str], dict[str, Any] | None]


def read_tests(output: str) -> dict[str, Any] | None:
    """Returns pytest's summary: how many passed, failed and were skipped, and which failed."""
    summaries = SUMMARY.findall(output)
    if not summaries:
        return None
    counts = {name: int(number) for number, name in re.findall(r"(\d+) (\w+)", summaries[-1])}
    failed = sum(counts.get(name, 0) for name in ("failed", "error", "errors"))
    failures = re.findall(r"^(?:FAILED|ERROR) (.*)$", output, re.MULTILINE)
    return {name: counts.get(name, 0) for name in ("passed", "skipped")} | {"failed": failed, "failures": failures}


def read_kernels(output: str) -> dict[str, Any] | None:
    """Returns check-kernels' summary: how many compilations, how many faults, and which."""
    found = COMPILED.search(output)
    if found is None:
        return None
    faults = int(found["faults"])
    return {
        "compiled": int(found["compiled"]),
        "faults": faults,
        "failures": found["lines"].split("\n")[1 : faults + 1],
    }


PARTS = {"tests": Part("test", read_tests), "kernels": Part("check-kernels", read_kernels)}


def main(command_line: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=_names, default=(), help="only pairs whose name contains one of these")
    parser.add_argument("--parts", type=_names, default=tuple(PARTS), help="only these parts: tests, kernels")
    parser.add_argument("--again", action="store_true", help="run also what the record already has for these sources")
    parser.add_argument("--out", type=Path, default=RECORD)
    arguments = parser.parse_args(command_line)
    pairs = [pair for pair in PAIRS if not arguments.only or any(part in pair.name for part in arguments.only)]
    if not pairs:
        parser.error(f"--only: expected parts of {', '.join(pair.name for pair in PAIRS)}")
    if not set(arguments.parts) <= set(PARTS):
        parser.error(f"--parts: expected some of {', '.join(PARTS)}, got {', '.join(arguments.parts)}")

    rows = read_rows(arguments.out)
    failures = []
    for pair in pairs:
        row = rows.setdefault(pair.name, {})
        waiting = [name for name in arguments.parts if arguments.again or not is_current(row.get(name))]
        try:
            environment = make_environment(pair) if waiting else None
        except (subprocess.CalledProcessError, ValueError) as error:
            failures.append(f"{pair.name}: no environment: {error}")
            continue
        for name in waiting:
            assert environment is not None
            row |= {"torch": pair.torch, "triton": pair.triton, name: run_part(PARTS[name], environment)}
            write_rows(arguments.out, rows)
            if arguments.out == RECORD:
                # The next tests compare the pages with it.
                write_pages([])
        failures += [f"{pair.name}, {name}: {failure}" for name in arguments.parts for failure in faults(row.get(name))]
    print(table(list(in_order(rows).values())))
    print("\n".join(failures))
    return 1 if failures else 0


def make_environment(pair: Pair) -> Path:
    """Makes a virtual environment that holds the pair and whatever the tests need, with this tree in it.

    Raises:
        CalledProcessError: what was to be installed could not be.
        ValueError: the environment holds other versions than the pair's.
    """
    folder = cache() / f"{pair.name}-python-{sys.version_info.major}.{sys.version_info.minor}"
    python, made = folder / "bin" / "python", folder / ".installed"
    asked = pins((ROOT / "constraints.txt").read_text(), pair) + (ROOT / "pyproject.toml").read_text()
    # The tree is not part of what is kept: several may use the environment in turn.
    if made.exists() and made.read_text() == asked:
        _call(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--editable", ".")
    else:
        say(f"{pair.name}: into {folder}")
        made.unlink(missing_ok=True)
        _call(sys.executable, "-m", "venv", folder)
        constraints = folder / "constraints.txt"
        constraints.write_text(pins((ROOT / "constraints.txt").read_text(), pair))
        install = (python, "-m", "pip", "install", "--constraint", constraints)
        _call(*install, *pair.pinned, BUILDS)
        _call(*install, "--no-build-isolation", "--editable", EXTRAS)
        if pair.forced:
            _call(python, "-m", "pip", "install", "--no-deps", f"triton=={pair.triton}")
    versions = "import torch, triton; print(torch.__version__.split('+')[0], triton.__version__)"
    found = subprocess.run([python, "-c", versions], capture_output=True, text=True, check=True).stdout.split()
    if found != [pair.torch, pair.triton]:
        raise ValueError(f"expected torch {pair.torch} and triton {pair.triton}, got {' and '.join(found)}")
    made.write_text(asked)
    return folder


def pins(constraints: str, pair: Pair) -> str:
    """Returns constraints.txt with the pair in place of its torch and triton, and without what torch itself pins."""
    replaced = {*UNPINNED, *map(_package, pair.beside)}
    lines = [line for line in constraints.splitlines() if _package(line) not in replaced]
    return "\n".join([*lines, *pair.pinned]) + "\n"


def run_part(part: Part, environment: Path) -> dict[str, Any]:
    """Runs the Makefile's target in that environment, its output shown as it comes, and says what came of it."""
    # The environment counts as made: its pins are not those that the Makefile would install.
    command = ["make", f"--old-file={environment / '.installed'}", part.target, f"VENV={environment}"]
    say(f"{environment.name}: {part.target}")
    machine, changed = record.environment(torch.device("cpu")), has_changed("HEAD")
    start, lines = time.perf_counter(), []
    with subprocess.Popen(
        command, cwd=ROOT, env=_without_make(os.environ), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            sys.stderr.write(line)
            lines.append(line)
    found = part.read("".join(lines))
    if found is None or (process.returncode and not found["failures"]):
        last = next((line.strip() for line in reversed(lines) if line.strip() and not line.startswith("make")), "")
        found = {"ended": f"exit status {process.returncode}: {last}"}
    where = {name: machine[name] for name in ("date", "commit", "cpu", "cores", "python")}
    minutes = round((time.perf_counter() - start) / 60, 1)
    return {**where, "uncommitted_changes": changed, "minutes": minutes, **found}


def is_current(done: Mapping[str, Any] | None) -> bool:
    """Tells whether a part's record is of the sources that are here."""
    return done is not None and not done["uncommitted_changes"] and not has_changed(done["commit"])


def has_changed(commit: str | None) -> bool:
    """Tells whether what the parts rest upon differs here from what it was in that commit, or may."""
    command = ["git", "diff", "--quiet", str(commit), "--", *SOURCES]
    return subprocess.run(command, cwd=ROOT, stderr=subprocess.DEVNULL, check=False).returncode != 0


def faults(done: Mapping[str, Any] | None) -> Sequence[str]:
    """Lists what a part found, a line each."""
    if done is None:
        return ["not run"]
    return [done["ended"]] if "ended" in done else done["failures"]


def read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """Returns the record's rows, by the names of their pairs."""
    stored = json.loads(path.read_text())["rows"] if path.exists() else []
    return {Pair(row["torch"], row["triton"]).name: row for row in stored}


def write_rows(path: Path, rows: Mapping[str, dict[str, Any]]) -> None:
    """Writes the whole record anew, dated by what was run last."""
    stored = list(in_order(rows).values())
    dates = [row[name]["date"] for row in stored for name in PARTS if name in row]
    record.write(path, {"benchmark": "versions", "environment": {"date": max(dates)}, "rows": stored})


def in_order(rows: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns those of PAIRS that have something to tell, in their order."""
    return {pair.name: rows[pair.name] for pair in PAIRS if rows.get(pair.name)}


def cache() -> Path:
    """Returns the folder where the environments are kept."""
    return Path(os.environ.get("TFM_VERSIONS") or recipe.cache().parent / "versions")


def _package(requirement: str) -> str:
    return re.split(r"[=<>~! ]", requirement)[0]


def _without_make(environment: Mapping[str, str]) -> dict[str, str]:
    """Removes what a make hands to those it calls: this one is called anew."""
    return {name: value for name, value in environment.items() if not re.fullmatch(r"M(AKE)?FLAGS|MAKE\w+", name)}


def _call(*command: str | Path) -> None:
    subprocess.run(list(map(str, command)), cwd=ROOT, stdout=sys.stderr, check=True)


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


if __name__ == "__main__":
    sys.exit(main())
