"""The questions that the first run on a GPU answers, with what is expected."""

from __future__ import annotations

from tools.tune.candidates import FAMILIES


def table() -> str:
    """Returns a row for each open question of tools.tune."""
    lines = ["| asked by | question | expected |", "|---|---|---|"]
    for family, sweeps in FAMILIES.items():
        lines += [f"| `{family}` | {sweep.question} | {sweep.prediction} |" for sweep in sweeps]
    return "\n".join(lines)
