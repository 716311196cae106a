"""The short table that a run ends with."""

from __future__ import annotations

from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table


def show(record: dict[str, Any], console: Console) -> None:
    """Parts and their states, then each suite: our share of the ceiling, and the best peer's time over ours."""
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
        shares = [info["share"] for info in infos if "share" in info and "speed_up" in info]
        # Of a case: the best peer is the one that took the least time.
        ratios = [min(info["speed_up"].values()) for info in infos if info.get("speed_up")]
        share = f"{median(shares):.0%}" if shares else ""
        cells = [f"{ratio:.2f}" for ratio in (min(ratios), median(ratios), max(ratios))] if ratios else []
        suites.add_row(name, str(len(infos)), str(sum("failed" in info for info in infos)), share, *cells)
    console.print(suites)
