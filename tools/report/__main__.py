"""The command line."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tfm.files import write_atomically
from tools.report import __doc__ as description
from tools.report import charts, presets, tables, versions
from tools.report.records import ROOT, load, newest, rows_of_versions

BEGIN = "<!-- written by python -m tools.report, from benchmarks/results/ -->"
END = "<!-- end of what is written -->"
BEGIN_PRESETS = "<!-- written by python -m tools.report, from tfm/config.py -->"
END_PRESETS = "<!-- end of the presets -->"
BEGIN_VERSIONS = "<!-- written by python -m tools.report, from benchmarks/results/versions.json -->"
END_VERSIONS = "<!-- end of the versions -->"


def main(command_line: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where README differs")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    arguments = parser.parse_args(command_line)
    try:
        records = load(arguments.results)
        if not arguments.check:
            for record in newest(records):
                for kind, draw in (("roofline", charts.roofline), ("speed_up", charts.speed_up)):
                    if picture := draw(record):
                        write_atomically(record.path.with_name(f"{record.path.stem}_{kind}.png"), picture)
        before = arguments.readme.read_text()
        after = replaced(before, tables.markdown(records), BEGIN, END)
        after = replaced(after, presets.table(), BEGIN_PRESETS, END_PRESETS)
        after = replaced(after, versions.table(rows_of_versions(records)), BEGIN_VERSIONS, END_VERSIONS)
    except (OSError, ValueError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    print(tables.missing(records) or "Every operation with a kernel has a record of a GPU.")
    if before == after:
        print("README.md says what the records say.")
        return 0
    if arguments.check:
        print("README.md differs from the records: run python -m tools.report", file=sys.stderr)
        return 1
    write_atomically(arguments.readme, after.encode())
    print(f"Wrote {arguments.readme.name}.")
    return 0


def replaced(readme: str, text: str, begin_marker: str, end_marker: str) -> str:
    """`readme` with `text` between the markers.

    Raises:
        ValueError: a marker is missing.
    """
    head, begin, rest = readme.partition(begin_marker)
    _, end, tail = rest.partition(end_marker)
    if not begin or not end:
        raise ValueError(f"README.md: expected the lines {begin_marker!r} and {end_marker!r}")
    return f"{head}{begin}\n\n{text}\n\n{end}{tail}"


if __name__ == "__main__":
    sys.exit(main())
