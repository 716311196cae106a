"""The command line."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tfm.files import write_atomically
from tools.report import __doc__ as description
from tools.report import charts, pages, tables
from tools.report.records import ROOT, load, newest


def main(command_line: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page differs")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--pages", type=Path, default=ROOT, help="the folder that holds README.md and the other pages")
    arguments = parser.parse_args(command_line)
    try:
        records = load(arguments.results)
        if not arguments.check:
            for record in newest(records):
                for kind, draw in (("roofline", charts.roofline), ("speed_up", charts.speed_up)):
                    if picture := draw(record):
                        write_atomically(record.path.with_name(f"{record.path.stem}_{kind}.png"), picture)
        before = {page: (arguments.pages / page).read_text(encoding="utf-8") for page in pages.PAGES}
        after = {page: pages.written(page, text, records, ROOT) for page, text in before.items()}
    except (OSError, ValueError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    print(tables.missing(records) or "Every operation with a kernel has a record of a GPU.")
    changed = [page for page in pages.PAGES if before[page] != after[page]]
    if not changed:
        print(f"{', '.join(pages.PAGES)} say what the records say.")
        return 0
    if arguments.check:
        print(f"{', '.join(changed)}: differs from the records: run python -m tools.report", file=sys.stderr)
        return 1
    for page in changed:
        write_atomically(arguments.pages / page, after[page].encode())
    print(f"Wrote {', '.join(changed)}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
