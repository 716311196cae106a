"""The command line."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

# Triton compiles here, and reads the variable when it is imported.
os.environ.pop("TRITON_INTERPRET", None)

import torch
from rich.console import Console
from rich.progress import track

from benchmarks.record import ROOT, environment, write
from tools.host import __doc__ as description
from tools.host import batches, record, table
from tools.host.launches import counting
from tools.host.models import everything
from tools.host.stand_in import as_on_gpu
from tools.host.timing import use_launcher, why_unavailable

RECORD = ROOT / "benchmarks" / "results" / "host.json"


def main(command_line: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", action="store_true", help="count only; compile and time nothing")
    parser.add_argument("--compare", action="store_true", help="write nothing; fail if counts changed")
    parser.add_argument(
        "--only", default="", help="only rows and kinds of batch whose names contain this; writes nothing"
    )
    parser.add_argument("--batches", type=int, default=batches.BATCHES, help="number of ragged batches of each kind")
    parser.add_argument("--record", type=Path, default=RECORD, help="record to compare with")
    parser.add_argument("--out", type=Path, help="file to write; default: the record")
    arguments = parser.parse_args(command_line)
    if not arguments.counts and (why_not := why_unavailable()):
        parser.error(f"{why_not}; --counts does without")
    console = Console(stderr=True)
    torch.set_num_threads(1)
    torch.manual_seed(0)

    found = run(arguments.only, arguments.batches, not arguments.counts, console)
    shown = Console(width=None if sys.stdout.isatty() else 120)
    if not found["rows"] and not found["compilations"]:
        parser.error(f"--only: expected a part of the name of a row, got {arguments.only!r}")
    if found["rows"]:
        shown.print(table.of_rows(found["rows"]))
    if found["compilations"]:
        shown.print(table.of_compilations(found["compilations"], arguments.batches))
    named = {name: found["environment"][name] for name in ("cpu", "torch", "triton")}
    shown.print(f"{named['cpu']}, torch {named['torch']}, triton {named['triton']}")

    changed: list[str] = []
    if arguments.record.exists():
        before = chosen_of(json.loads(arguments.record.read_text()), arguments.only)
        changed = record.exact_changes(before, found, arguments.batches)
        slower = record.changed_times(before, found)
        shown.print("\n".join(["", "Changed since the record:", *(changed + slower or ["nothing"])]), highlight=False)
    if arguments.out or not (arguments.compare or arguments.only or arguments.counts):
        write(arguments.out or RECORD, found)
    return int(arguments.compare and bool(changed))


def run(only: str, ran: int, with_times: bool, console: Console) -> dict[str, Any]:
    """Returns the record of a run."""
    chosen = [piece for piece in everything() if only in piece.name]
    with counting() as launches:
        rows = [record.row(piece, piece.count(launches)) for piece in track(chosen, "launches", console=console)]
    asked = [(name, work) for name, work in batches.kinds() if only in name]
    compilations = {
        name: batches.compilations(work, ran) for name, work in track(asked, "compilations", console=console)
    }
    found = {"benchmark": "host", "environment": environment(torch.device("cpu")), "batches": ran}
    if with_times:
        use_launcher()
        adds = []
        with as_on_gpu():
            for row, piece in zip(rows, track(chosen, "times", console=console), strict=True):
                time = piece.time()
                record.add_time(row, time)
                adds.append(time.add)
        found["add_microseconds"] = round(min(adds, default=0.0) * 1e6, 2)
    return found | {"rows": rows, "compilations": compilations}


def chosen_of(found: dict[str, Any], only: str) -> dict[str, Any]:
    """Returns the part of a record that a run of `only` gives."""
    return {
        "rows": [row for row in found["rows"] if only in row["name"]],
        "compilations": {kind: asked for kind, asked in found["compilations"].items() if only in kind},
    }


if __name__ == "__main__":
    sys.exit(main())
