"""Pictures of a record: each kernel's share of what bounds it, and how much faster it is than each peer."""

from __future__ import annotations

import io
from collections.abc import Iterable

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from tools.report.records import Record, Row
from tools.report.words import in_words

OURS = "tab:blue"
BOUNDS = {"matmul": ("tab:orange", "of the rate of matmuls"), "copy": (OURS, "of memory's rate")}
FROM_CACHE = "tab:cyan", "faster than memory: its data lies in caches"
CACHES = {"cache": ("tab:cyan", "of the rate of caches")}
RATIOS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)
LINE_INCHES = 0.2


def roofline(record: Record) -> bytes | None:
    """Draws bars: our share of the rate that bounds each case, as PNG; None where no rate was measured."""
    rows = [row for row in record.rows if row.is_ours and row.share is not None]
    if not rows:
        return None
    figure, axes, places = _chart(record, rows, "share of the measured rate that bounds a case")
    axes.set_xlim(0, 1.08 * max(1.0, *(row.share for row in rows)))
    for row, place in zip(_by_suite(record, rows), places, strict=True):
        is_cached = row.ceiling == "copy" and row.share > 1
        color, label = FROM_CACHE if is_cached else (BOUNDS | CACHES)[row.ceiling]
        known = axes.get_legend_handles_labels()[1]
        axes.barh(place, row.share, color=color, label=label if label not in known else None)
        axes.annotate(
            f"{row.share:.0%}", (row.share, place), (2, 0), textcoords="offset points", fontsize=6, va="center"
        )
    axes.axvline(1.0, color="black", linewidth=1)
    axes.xaxis.set_major_formatter("{x:.0%}")
    figure.legend(loc="outside lower center", ncols=3, fontsize=7)
    return _png(figure)


def speed_up(record: Record) -> bytes | None:
    """Draws points: for each case, every peer's time over ours, as PNG; None where there is no pair to compare."""
    # Where there are several ways of ours, the one that a call takes by itself.
    ours = {row.case: row for row in record.rows if row.peer == "ours"}
    pairs = [(row, row.times(ours[row.case])) for row in record.rows if not row.is_ours and row.case in ours]
    points = [(row.peer, row.case, ratio) for row, ratio in pairs if ratio is not None]
    if not points:
        return None
    rows = [ours[case] for case in dict.fromkeys(case for _, case, _ in points)]
    figure, axes, places = _chart(record, rows, "time of each peer / ours: right of 1 ours is faster")
    place_of = {row.case: place for row, place in zip(_by_suite(record, rows), places, strict=True)}
    for peer in dict.fromkeys(peer for peer, _, _ in points):
        own = [(ratio, place_of[case]) for name, case, ratio in points if name == peer]
        axes.scatter([ratio for ratio, _ in own], [place for _, place in own], s=14, label=peer)
    axes.axvline(1.0, color=OURS, linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(RATIOS))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")
    ratios = [1.0, *(ratio for _, _, ratio in points)]
    axes.set_xlim(min(ratios) / 1.2, max(ratios) * 1.2)
    figure.legend(loc="outside lower center", ncols=4, fontsize=7)
    return _png(figure)


def _chart(record: Record, rows: list[Row], meaning: str) -> tuple[Figure, Axes, list[int]]:
    """Returns an empty chart with a line a case, a heading above each suite, and each case's place in that order."""
    lines: list[str] = []
    places: list[int] = []
    headings: list[tuple[int, str]] = []
    for row in _by_suite(record, rows):
        if not headings or headings[-1][1] != row.suite:
            headings.append((len(lines), row.suite))
            lines.append(row.suite)
        places.append(len(lines))
        lines.append(label(row))
    figure = Figure(figsize=(9, 1.2 + LINE_INCHES * len(lines)), layout="constrained")
    figure.suptitle(record.device)
    axes = figure.add_subplot(xlabel=meaning, ylim=(len(lines) - 0.4, -0.6))
    axes.set_yticks(range(len(lines)), lines, fontsize=7)
    axes.tick_params(axis="x", top=True, labeltop=True)
    for place, _ in headings:
        axes.get_yticklabels()[place].set_fontweight("bold")
        axes.axhline(place, color="0.9", linewidth=0.8, zorder=0)
    axes.grid(axis="x", alpha=0.3)
    return figure, axes, places


def _by_suite(record: Record, rows: Iterable[Row]) -> list[Row]:
    """Puts a suite's cases one after the other: records hold them in the order they were measured in."""
    return sorted(rows, key=lambda row: record.suites.index(row.suite))


def label(row: Row) -> str:
    """Names a case of ours, without its suite."""
    ways = [row.peer.removeprefix("ours").strip(", "), "one graph" * (row.mode == "graph")]
    return ", ".join(filter(None, (in_words(row.suite, row.size), row.direction, *ways)))


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
