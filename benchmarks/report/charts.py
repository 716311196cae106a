"""Pictures of a record: each kernel's share of its ceiling, and how much faster it is than each peer."""

from __future__ import annotations

import io

from matplotlib.figure import Figure

from benchmarks.report.records import Record, Row

OURS = "tab:blue"


def roofline(record: Record) -> bytes | None:
    """Bars: our share of the ceiling that bounds each case, as PNG; None where no ceiling was measured."""
    rows = [row for row in record.rows if row.is_ours and row.share is not None]
    if not rows:
        return None
    figure = Figure(figsize=(8, 1 + 0.22 * len(rows)), layout="constrained")
    figure.suptitle(f"{record.device}: share of the measured ceiling")
    axes = figure.add_subplot(xlim=(0, 1))
    labels = [f"{_label(row)} ({row.ceiling})" for row in rows]
    axes.barh(labels, [row.share for row in rows], color=OURS)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.tick_params(axis="y", labelsize=7)
    axes.grid(axis="x", alpha=0.3)
    return _png(figure)


def speed_up(record: Record) -> bytes | None:
    """Points: for each case, every peer's time over ours, as PNG; None where there is no pair to compare."""
    # Where there are several ways of ours, the one that a call takes by itself.
    ours = {row.case: row for row in record.rows if row.peer == "ours"}
    pairs = [(row, row.times(ours[row.case])) for row in record.rows if not row.is_ours and row.case in ours]
    points = [(row.peer, row.case, ratio) for row, ratio in pairs if ratio is not None]
    if not points:
        return None
    cases = list(dict.fromkeys(case for _, case, _ in points))
    figure = Figure(figsize=(8, 1 + 0.22 * len(cases)), layout="constrained")
    figure.suptitle(f"{record.device}: time of each peer over ours")
    axes = figure.add_subplot(xscale="log")
    for peer in dict.fromkeys(peer for peer, _, _ in points):
        ratios = [ratio for name, _, ratio in points if name == peer]
        axes.scatter(ratios, [cases.index(case) for name, case, _ in points if name == peer], s=14, label=peer)
    axes.axvline(1.0, color=OURS, linewidth=1)
    axes.set_yticks(range(len(cases)), [_label(ours[case]) for case in cases], fontsize=7)
    axes.invert_yaxis()
    axes.grid(axis="x", which="both", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4, fontsize=7)
    return _png(figure)


def _label(row: Row) -> str:
    return " ".join(
        filter(None, (row.suite, row.size, row.direction, row.peer.removeprefix("ours").strip(", "), row.mode))
    )


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
