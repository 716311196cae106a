"""The records of benchmarks/results/: which is the newest of each device, and which of its rows are stale."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
FORMAT = 1


@dataclass(frozen=True)
class Row:
    """What one peer did in one case: an entry of pytest-benchmark."""

    entry: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        return self.entry["extra_info"].get(name)

    @property
    def seconds(self) -> float | None:
        """The median of a call; None where it failed."""
        return None if self.failed else self.entry["stats"]["median"]

    def times(self, other: Row) -> float | None:
        """How many times as long as `other` this took; None where one of them failed."""
        return None if self.seconds is None or other.seconds is None else self.seconds / other.seconds

    @property
    def is_ours(self) -> bool:
        return self.peer.startswith("ours")

    @property
    def case(self) -> tuple[str, ...]:
        """What rows that differ in their peer alone have in common."""
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
        """The source files that the operation's numbers rest upon and that differ from those measured."""
        measured = self.data["sources"]
        return [name for name in sources_of(operation, root) if measured.get(name) != sha256(root / name)]


def load(folder: Path) -> list[Record]:
    """Every record of `folder`, oldest first.

    Raises:
        ValueError: a file that is no record, or of a format this program does not know.
    """
    records = []
    for path in sorted(folder.glob("*.json")):
        try:
            data = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: expected a record in JSON, got {error}") from None
        known = isinstance(data, dict) and (data.get("benchmark") == "training" or data.get("format") == FORMAT)
        if not known or "environment" not in data:
            raise ValueError(f"{path}: expected a record of format {FORMAT} or of the training benchmark")
        records.append(Record(path, data))
    return sorted(records, key=lambda record: record.environment["date"])


def newest(records: Iterable[Record]) -> list[Record]:
    """The newest record of operations of each device."""
    of_operations = [record for record in records if record.data.get("format") == FORMAT]
    return list({record.device: record for record in of_operations}.values())


def operations(root: Path = ROOT) -> list[str]:
    """The files of operations that kernels serve, by name: what a record should cover."""
    return [path.stem for path in sorted((root / "tfm" / "ops").glob("*.py")) if sources_of(path.stem, root)]


def sources_of(operation: str, root: Path = ROOT) -> list[str]:
    """The files of kernels/ that the operation's file in tfm/ops/ reaches through its imports, relative to `root`.

    A suite of no one operation, such as a training step, rests upon all of them.
    """
    start = _operation_file(operation, root)
    if start is None:
        return sorted(str(path.relative_to(root)) for path in (root / "kernels").rglob("*.py"))
    found: set[Path] = set()
    waiting = list(_kernel_files(start, root))
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += _kernel_files(path, root)
    return sorted(str(path.relative_to(root)) for path in found)


def _operation_file(operation: str, root: Path) -> Path | None:
    """The file of that name, or else the one that defines it: attention.py holds varlen_attention."""
    files = sorted((root / "tfm" / "ops").glob("*.py"))
    named = [path for path in files if path.stem == operation]
    defining = [path for path in files if f"\ndef {operation}(" in path.read_text()]
    return next(iter(named + defining), None)


def _kernel_files(path: Path, root: Path) -> Iterator[Path]:
    """The kernel files that `path` imports; of a package, those whose names `path` uses."""
    tree = ast.parse(path.read_text())
    for module, name, alias in _imports(tree):
        target = _module_path(f"{module}.{name}", root)
        if target is None:
            # A name from inside a module; from inside a package, the module that the package has it from.
            yield from _definition(module, name, root)
        elif target.name == "__init__.py":
            used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and _is_name(node, alias)}
            for attribute in used:
                yield from _definition(f"{module}.{name}", attribute, root)
        else:
            yield target


def _imports(tree: ast.AST) -> Iterator[tuple[str, str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[:2] == ["tfm", "kernels"]:
            for alias in node.names:
                yield node.module or "", alias.name, alias.asname or alias.name


def _definition(module: str, name: str, root: Path) -> Iterator[Path]:
    path = _module_path(module, root)
    if path is None:
        return
    if path.name != "__init__.py":
        yield path
        return
    tree = ast.parse(path.read_text())
    sources = [where for where, imported, alias in _imports(tree) if name in (imported, alias)]
    if not sources:
        inner = _module_path(f"{module}.{name}", root)
        yield path if inner is None else inner
    for where in sources:
        yield from _definition(where, name, root)


def _module_path(module: str, root: Path) -> Path | None:
    place = root.joinpath(*module.split(".")[1:])
    for path in (place.with_suffix(".py"), place / "__init__.py"):
        if path.is_file():
            return path
    return None


def _is_name(node: ast.Attribute, name: str) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id == name


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
