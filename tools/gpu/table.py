"""The short table that a run ends with."""

from __future__ import annotations

from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.suite import OURS
from tools.gpu.profile import said


def show(record: dict[str, Any], console: Console) -> None:
    """Prints parts and their states, then each suite: our share of the ceiling, and the best peer's time over ours."""
    parts = Table("part", "seconds", "state", "", title=record.get("environment", {}).get("gpu"))
    parts.columns[0].no_wrap = True
    for row in record["parts"]:
        parts.add_row(row["name"], f"{row['seconds']:.1f}", row["state"], row["reason"])
    console.print(parts)
    known = [entry["extra_info"] for entry in record.get("benchmarks", [])]
    if not known:
        return
    suites = Table("suite", "cases", "failed", "share of ceiling, median", "best peer / ours, least", "median", "most")
    for name in dict.fromkeys(info["suite"] for info in known):
        infos = [info for info in known if info["suite"] == name]
        ways = [OURS, *dict.fromkeys(peer for info in infos if (peer := info.get("peer", "")).startswith(f"{OURS}, "))]
        for way in ways:
            ours = [info for info in infos if info.get("peer") == way]
            # The first row counts everybody, those below it another way of ours.
            rows = infos if way == OURS else ours
            shares = [info["share"] for info in ours if "share" in info]
            ratios = [min(others) for info in ours if (others := _of_others(info))]
            share = f"{median(shares):.0%}" if shares else ""
            cells = [f"{ratio:.2f}" for ratio in (min(ratios), median(ratios), max(ratios))] if ratios else []
            failed = sum("failed" in info for info in rows)
            suites.add_row(f"{name}{way.removeprefix(OURS)}", str(len(rows)), str(failed), share, *cells)
    console.print(suites)
    for row in record.get("profile", []):
        console.print(f"{row['suite']} {row['size']} {row['direction']} {row['peer']}, {said(row)}", markup=False)


def _of_others(info: dict[str, Any]) -> list[float]:
    """Returns how many times our time each peer of the case took; another way of ours is no peer."""
    return [ratio for peer, ratio in info.get("speed_up", {}).items() if not peer.startswith(OURS)]
