"""The records of benchmarks/results/: which is the newest of each device, and which of its rows are stale."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tools.report.sources import sources_of

ROOT = Path(__file__).parent.parent.parent
FORMAT = 1
# Benchmarks of whole models, and what is no benchmark of an operation: their records say so.
NAMED = ("training", "learning", "huggingface", "host", "versions")


@dataclass(frozen=True)
class Row:
    """The result of one peer in one case: an entry of pytest-benchmark."""

    entry: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        return self.entry["extra_info"].get(name)

    @property
    def seconds(self) -> float | None:
        """The median of a call; None where it failed."""
        return None if self.failed else self.entry["stats"]["median"]

    def times(self, other: Row) -> float | None:
        """Returns how many times as long as `other` this took; None where one of them failed."""
        return None if self.seconds is None or other.seconds is None else self.seconds / other.seconds

    @property
    def is_ours(self) -> bool:
        return self.peer.startswith("ours")

    @property
    def case(self) -> tuple[str, ...]:
        """The names that rows which differ only in their peer have in common."""
        return self.suite, self.direction, self.size, self.mode


@dataclass(frozen=True)
class Record:
    """One file of results."""

    path: Path
    data: dict[str, Any]

    @property
    def environment(self) -> dict[str, Any]:
        return self.data["environment"]

    @property
    def device(self) -> str:
        return self.environment["gpu"] or self.environment["cpu"]

    @cached_property
    def rows(self) -> list[Row]:
        return [Row(entry) for entry in self.data.get("benchmarks", [])]

    @property
    def suites(self) -> list[str]:
        """The operations measured, in their order."""
        return list(dict.fromkeys(row.suite for row in self.rows))

    def changed_sources(self, operation: str, root: Path = ROOT) -> list[str]:
        """Lists the source files that the operation's numbers rest upon and that differ from those measured."""
        measured, folders = self.data["sources"], ["kernels"] if self.environment["gpu"] else ["csrc/cpu"]
        if any((row.suite, row.peer, row.failed) == (operation, "ours, native", None) for row in self.rows):
            folders.append("csrc/cuda")
        names = [name for folder in folders for name in sources_of(operation, root, folder)]
        return [name for name in names if measured.get(name) != sha256(root / name)]


def load(folder: Path) -> list[Record]:
    """Returns every record of `folder`, oldest first.

    Raises:
        ValueError: a file that is no record, or of a format this program does not know.
    """
    records = []
    for path in sorted(folder.glob("*.json")):
        try:
            data = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: expected a record in JSON, got {error}") from None
        known = isinstance(data, dict) and (data.get("benchmark") in NAMED or data.get("format") == FORMAT)
        if not known or "environment" not in data:
            raise ValueError(f"{path}: expected a record of format {FORMAT} or of {' or '.join(NAMED)}")
        records.append(Record(path, data))
    return sorted(records, key=lambda record: record.environment["date"])


def newest(records: Iterable[Record]) -> list[Record]:
    """Returns the newest record of operations of each device."""
    of_operations = [record for record in records if record.data.get("format") == FORMAT]
    return list({record.device: record for record in of_operations}.values())


def rows_of_versions(records: Iterable[Record]) -> list[dict[str, Any]]:
    """Returns what the tests and check-kernels said under each torch and triton in the newest such record."""
    rows: list[dict[str, Any]] = []
    for record in records:
        if record.data.get("benchmark") == "versions":
            rows = record.data["rows"]
    return rows


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
