"""Hugging Face's models, accelerated beside stock: a table of the newest record."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.huggingface import CONTENDERS, STOCK, WORK, ratios
from tools.report.markdown import table_lines
from tools.report.records import Record

HEAD = ("model", "padding", "work", "stock, ms", *(f"{name}, times as fast" for name in CONTENDERS if name != STOCK))


def table(records: Sequence[Record]) -> str:
    """Returns in Markdown where it was measured, and a row for each model and kind of work; medians and ranges."""
    found = [record for record in records if record.data.get("benchmark") == "huggingface"]
    if not found:
        return "Hugging Face's models have no record yet: `python -m benchmarks.huggingface` makes one."
    record = found[-1]
    machine, sentences = record.environment, record.data["sentences"]
    head = (
        f"Batches of {sentences} sentences of Multi30k's lengths, padded, fp32, on {record.device}, "
        f"{record.data['threads']} threads, torch {machine['torch']}, transformers {machine['transformers']} "
        f"(`{record.path.name}`, {machine['date'][:10]}, commit {str(machine['commit'])[:7]}):"
    )
    rows = [_cells(name, work, entries) for name, entries in record.data["models"].items() for work in WORK]
    return "\n".join([head, "", *table_lines(HEAD, rows)])


def _cells(model: str, work: str, entries: list[dict[str, Any]]) -> list[str]:
    stock = next(one for one in entries if (one["work"], one["contender"]) == (work, STOCK))
    milliseconds = f"{1e3 * statistics.median(stock['seconds']):,.0f}"
    cells = [_ratio(entries, work, name) for name in CONTENDERS if name != STOCK]
    return [model, f"{stock['padding']:.0%}", work, milliseconds, *cells]


def _ratio(entries: list[dict[str, Any]], work: str, contender: str) -> str:
    found: Mapping[str, Any] = next(
        (one for one in entries if (one["work"], one["contender"]) == (work, contender)), {"failed": "not measured"}
    )
    if "failed" in found:
        return "" if found["failed"] == "not measured" else "failed"
    each = ratios(entries, work, contender)
    return f"{statistics.median(each):.2f} ({min(each):.2f}-{max(each):.2f})"
