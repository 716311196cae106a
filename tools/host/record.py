"""The findings of a run, as JSON keeps them, and the differences between two runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from tools.host import batches
from tools.host.batches import Compilations
from tools.host.launches import Launches
from tools.host.rows import Piece
from tools.host.timing import Timed

PARTS = ("triton", "products", "others", "syncs")
# Times of two runs on one machine differ by this share.
NOISE = 0.15
Row = dict[str, Any]


def row(piece: Piece, launches: Launches) -> Row:
    """Makes a row. Times come later: `add_time`."""
    counts = {part: dict(sorted(found.items())) for part, found in vars(launches).items()}
    return {"name": piece.name, "direction": piece.direction, **counts, "budget": asdict(piece.budget)}


def add_time(row: Row, found: Timed) -> None:
    row["host"], row["microseconds"] = round(found.ratio, 1), round(found.call * 1e6, 2)


def launches_of(row: Row) -> int:
    return sum(sum(row[part].values()) for part in PARTS[:3])


def key_of(row: Row) -> str:
    return f"{row['name']}, {row['direction']}"


def over_budget(row: Row) -> list[str]:
    """Lists which counts of a row exceed their budget: "launches", "host"."""
    spent = {"launches": launches_of(row), "host": row.get("host")}
    return [
        name
        for name, most in row["budget"].items()
        if most is not None and spent[name] is not None and spent[name] > most
    ]


def exact_changes(before: Row, after: Row, ran: int = batches.BATCHES) -> list[str]:
    """Returns a line for each launch, sync or compilation that differs; `ran`: the batches that `after` ran."""
    lines = []
    for key, old, new in _pairs(before["rows"], after["rows"]):
        if old is None or new is None:
            lines.append(f"{key}: {'a new row' if old is None else 'no row any more'}")
            continue
        for part in PARTS:
            changes = ", ".join(_counts(old[part], new[part]))
            if changes:
                sums = f"{sum(old[part].values())} -> {sum(new[part].values())}"
                lines.append(f"{key}: {part} {sums} ({changes})")
    asked: dict[str, Compilations] = before["compilations"]
    for kind in dict.fromkeys([*asked, *after["compilations"]]):
        old, new = (batches.first(found.get(kind, {}), ran) for found in (asked, after["compilations"]))
        changes = ", ".join(_counts(sizes(old), sizes(new)))
        if changes:
            lines.append(f"compilations, {kind}: {total(old)} -> {total(new)} ({changes})")
    return lines


def changed_times(before: Row, after: Row) -> list[str]:
    """Returns a line for each row whose time has changed by more than such a measurement's noise."""
    lines = []
    for key, old, new in _pairs(before["rows"], after["rows"]):
        if old and new and "host" in old and "host" in new and abs(new["host"] / old["host"] - 1) > NOISE:
            lines.append(f"{key}: {old['host']:,.0f} -> {new['host']:,.0f} times torch.add")
    return lines


def sizes(found: Compilations) -> dict[str, int]:
    return {name: len(asked) for name, asked in found.items()}


def total(found: Compilations) -> int:
    return sum(map(len, found.values()))


def _pairs(before: list[Row], after: list[Row]) -> Iterator[tuple[str, Row | None, Row | None]]:
    old, new = ({key_of(row): row for row in rows} for rows in (before, after))
    for key in dict.fromkeys([*old, *new]):
        yield key, old.get(key), new.get(key)


def _counts(before: dict[str, int], after: dict[str, int]) -> Iterator[str]:
    old, new = Counter(before), Counter(after)
    for name in sorted(old | new):
        if old[name] != new[name]:
            yield f"{name} {old[name]} -> {new[name]}"
