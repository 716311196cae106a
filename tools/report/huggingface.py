"""Hugging Face's models, accelerated beside stock: a table of the newest record."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.huggingface import STOCK, WORK, peers_of, ratios, seconds_of
from tools.report.markdown import table_lines
from tools.report.records import Record

HEAD = ("model", "padding", "work", "stock, ms")


def table(records: Sequence[Record]) -> str:
    """Returns in Markdown, for the newest record of each device, where it was measured and a table of its medians."""
    newest = {record.device: record for record in records if _models_of(record)}
    if not newest:
        return "Hugging Face's models have no record yet: `python -m benchmarks.huggingface` makes one."
    return "\n\n".join(map(_table, newest.values()))


def _models_of(record: Record) -> dict[str, Any]:
    """Returns what was measured: a record of it alone, or a part of a GPU's; nothing where it was not."""
    return record.data if record.data.get("benchmark") == "huggingface" else record.data.get("huggingface", {})


def _table(record: Record) -> str:
    machine, data = record.environment, _models_of(record)
    threads = "" if machine["gpu"] else f", {data['threads']} threads"
    head = (
        f"Batches of {data['sentences']} sentences of Multi30k's lengths, padded, {data['dtype']}, on {record.device}"
        f"{threads}, torch {machine['torch']}, transformers {machine['transformers']} "
        f"(`{record.path.name}`, {machine['date'][:10]}, commit {str(machine['commit'])[:7]}):"
    )
    peers = peers_of(data)
    rows = [_cells(name, work, entries, peers) for name, entries in data["models"].items() for work in WORK]
    return "\n".join([head, "", *table_lines((*HEAD, *(f"{name}, times as fast" for name in peers)), rows)])


def _cells(model: str, work: str, entries: list[dict[str, Any]], peers: Sequence[str]) -> list[str]:
    stock = seconds_of(entries, work, STOCK)
    milliseconds = f"{1e3 * statistics.median(stock):,.1f}" if stock else "failed"
    cells = [_ratio(entries, work, name) for name in peers]
    return [model, f"{entries[0]['padding']:.0%}", work, milliseconds, *cells]


def _ratio(entries: list[dict[str, Any]], work: str, contender: str) -> str:
    """Returns the median and the range; the reason where there is none, and nothing where it was not to run."""
    found = [one for one in entries if (one["work"], one["contender"]) == (work, contender)]
    if not found:
        return ""
    each = ratios(entries, work, contender)
    if not each:
        return found[0].get("failed", "failed")
    return f"{statistics.median(each):.2f} ({min(each):.2f}-{max(each):.2f})"
