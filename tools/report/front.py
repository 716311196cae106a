"""README's tables: the speed of training, and of each operation the range of its cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from tools.report import tables
from tools.report.markdown import table_lines
from tools.report.records import Record, Row, newest


def training_speed(records: Sequence[Record], root: Path) -> str:
    """Returns tokens a second of the newest record that measured training."""
    measured = [r for r in records if r.data.get("benchmark") == "training" and r.data.get("throughput")]
    if not measured:
        return "No training has a record yet."
    return tables.training(measured[-1], with_learnt=False)


def operations(records: Sequence[Record], root: Path) -> str:
    """Returns, for the newest record of each device, a row an operation, and what no record covers."""
    parts = [_of_device(record, root) for record in newest(records)]
    return "\n\n".join([*parts, tables.missing(records, root)])


def _of_device(record: Record, root: Path) -> str:
    """Returns how many times as long each peer takes: the median over an operation's cases, the least and the most."""
    title = (
        f"{record.device}, {tables.provenance(record, root)}. Time of each peer / ours, the median of an operation's "
        "cases and their range; above 1 ours is faster:"
    )
    peers = list(dict.fromkeys(row.peer for row in record.rows if not row.is_ours))
    lines = []
    for suite in record.suites:
        # Where there are several ways of ours, the one that a call takes by itself.
        ours = {row.case: row for row in record.rows if row.suite == suite and row.peer == "ours"}
        stale = f" ({tables.STALE})" if record.changed_sources(suite, root) else ""
        cells = [_range(record, ours, peer) for peer in peers]
        lines.append([f"`{suite}`{stale}", f"{len(ours)}", *cells])
    return "\n".join([title, "", *table_lines(["operation", "cases", *(f"{peer} / ours" for peer in peers)], lines)])


def _range(record: Record, ours: Mapping[tuple[str, ...], Row], peer: str) -> str:
    """Returns a cell: the ratios of one peer in the cases it shares with ours; empty where it has none."""
    pairs = [row.times(ours[row.case]) for row in record.rows if row.peer == peer and row.case in ours]
    ratios = [ratio for ratio in pairs if ratio is not None]
    return f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})" if ratios else ""
