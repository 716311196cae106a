"""Compares the entries of one run: how much faster ours is than each peer, and a table for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.table import Table

from benchmarks.suite import BOTH, OURS

Entry = dict[str, Any]


def case_of(entry: Entry) -> tuple[str, ...]:
    """Returns what entries that differ only in the peer have in common."""
    return tuple(entry["extra_info"][name] for name in ("suite", "size", "direction", "mode"))


def of_cases(entries: Sequence[Entry]) -> list[Entry]:
    """Returns the entries that name their case; a process that died, or another kind of benchmark, leaves others."""
    return [entry for entry in entries if "peer" in entry["extra_info"]]


def add_speed_ups(entries: Sequence[Entry]) -> None:
    """Gives our rows extra_info["speed_up"]: for each peer of the case its median time over ours."""
    entries = of_cases(entries)
    for entry in entries:
        if entry["extra_info"]["peer"].startswith(OURS) and "failed" not in entry["extra_info"]:
            ours = entry["stats"]["median"]
            entry["extra_info"]["speed_up"] = {
                peer["extra_info"]["peer"]: peer["stats"]["median"] / ours
                for peer in entries
                if peer is not entry and case_of(peer) == case_of(entry) and "failed" not in peer["extra_info"]
            }


def tables(entries: Sequence[Entry]) -> Iterator[Table]:
    """Makes a table for each suite: a row a case, a column a peer, with its time and how many times ours that is."""
    entries = of_cases(entries)
    for suite in dict.fromkeys(entry["extra_info"]["suite"] for entry in entries):
        rows: dict[tuple[str, ...], dict[str, Entry]] = {}
        for entry in entries:
            if entry["extra_info"]["suite"] == suite:
                rows.setdefault(case_of(entry), {})[entry["extra_info"]["peer"]] = entry
        peers = dict.fromkeys(peer for row in rows.values() for peer in row if peer != OURS)
        table = Table("", OURS, "rate", *peers, title=suite, title_justify="left")
        table.columns[0].no_wrap = True
        for (_, size, direction, mode), row in rows.items():
            case = f"{size}{' +backward' * (direction == BOTH)}{' graph' * (mode == 'graph')}"
            table.add_row(case, *_ours(row.get(OURS)), *(_peer(row.get(peer), row.get(OURS)) for peer in peers))
        yield table


def failures(entries: Sequence[Entry]) -> Iterator[str]:
    """Says who failed and why, one line for each reason."""
    cases: dict[str, list[str]] = {}
    for entry in of_cases(entries):
        info = entry["extra_info"]
        if "failed" in info:
            cases.setdefault(f"{info['suite']}, {info['peer']} failed: {info['failed']}", []).append(info["size"])
    for reason, sizes in cases.items():
        yield f"{reason} ({len(sizes)} cases)"


def _ours(entry: Entry | None) -> tuple[str, str]:
    if entry is None or "failed" in entry["extra_info"]:
        return _peer(entry, None), ""
    info = entry["extra_info"]
    share = f" {info['share']:.0%}" if "share" in info else ""
    return _time(entry["stats"]["median"]), _rate(info) + share


def _rate(info: dict[str, Any]) -> str:
    """Returns the rate that bounds the case."""
    if info.get("ceiling") in ("copy", "cache"):
        return f"{info['GB/s']:,.1f} GB/s"
    rate = info.get("TFLOP/s")
    return "" if rate is None else f"{rate:,.0f} TFLOP/s" if rate > 10 else f"{1e3 * rate:,.0f} GFLOP/s"


def _peer(entry: Entry | None, ours: Entry | None) -> str:
    if entry is None:
        return ""
    if "failed" in entry["extra_info"]:
        return "failed"
    seconds = entry["stats"]["median"]
    if ours is None or "failed" in ours["extra_info"]:
        return _time(seconds)
    return f"{_time(seconds)} {seconds / ours['stats']['median']:.2f}x"


def _time(seconds: float) -> str:
    return f"{1e6 * seconds:.1f} µs" if seconds < 1e-3 else f"{1e3 * seconds:.2f} ms"
