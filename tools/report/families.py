"""The families of Hugging Face's models that accelerate() serves: whole for the docs, by name for README."""

from __future__ import annotations

from tfm.patching.families import FAMILIES, TRIED, Family
from tools.report.markdown import table_lines


def table() -> str:
    """Returns a row a family."""
    lines = [[one.name, f"`{one.model}`" if one.model else "", _kinds(one), one.note] for one in FAMILIES]
    return "\n".join(table_lines(["family", "class", "runs fused", "note"], lines))


def summary() -> str:
    """Returns the families of which more than a norm runs fused, as one line."""
    names = [one.name for one in FAMILIES if len(one.served) > 1]
    return f"{', '.join(names)}; tried with transformers {' and '.join(TRIED)}."


def _kinds(one: Family) -> str:
    return ", ".join(one.served).replace("_", "-")
