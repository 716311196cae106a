"""The versions that were tried, the tests and check-kernels under each torch and triton: a table, and what failed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tools.report.markdown import table_lines

HEAD = ("torch", "triton", "tests passed", "failed", "skipped", "kernels compiled", "faults", "minutes", "made on")
# The parts of a row, and what each counts.
COUNTS = {"tests": ("passed", "failed", "skipped"), "kernels": ("compiled", "faults")}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns in Markdown when and where, and a row for each pair of versions."""
    parts = [row[name] for row in rows for name in COUNTS if name in row]
    if not parts:
        return "No version has a record yet."
    when = _each(part["date"][:10] for part in parts)
    where = _each(f"{part['cpu']}, Python {part['python']}" for part in parts)
    return "\n".join([f"Tried on {when}, on {where}:", "", *table_lines(HEAD, map(_cells, rows))])


def failures(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns in Markdown what failed, by name."""
    failed = [
        f"- torch {row['torch']}, triton {row['triton']}: `{failure}`"
        for row in rows
        for name in COUNTS
        for failure in row.get(name, {}).get("failures", ())
    ]
    if not failed:
        return "Under the versions of README's table nothing failed."
    return "\n".join(["Under the versions of README's table this failed:", "", *failed])


def _cells(row: Mapping[str, Any]) -> list[str]:
    parts = [row[name] for name in COUNTS if name in row]
    counts = [cell for name, wanted in COUNTS.items() for cell in _counts(row.get(name), wanted)]
    minutes = f"{sum(part['minutes'] for part in parts):.0f}"
    made = _each(f"{part['date'][:10]}, {_commit(part)}" for part in parts)
    return [row["torch"], row["triton"], *counts, minutes, made]


def _counts(part: Mapping[str, Any] | None, wanted: Sequence[str]) -> list[str]:
    """Returns a cell for each; where there are no counts the first says why."""
    if part is None or "ended" in part:
        return ["not run" if part is None else part["ended"], *[""] * (len(wanted) - 1)]
    return [f"{part[name]:,}" for name in wanted]


def _commit(part: Mapping[str, Any]) -> str:
    changed = " with changes" if part["uncommitted_changes"] else ""
    return f"{str(part['commit'])[:7]}{changed}"


def _each(words: Iterable[str]) -> str:
    """Joins the words that differ, in order."""
    return "; ".join(dict.fromkeys(words))
