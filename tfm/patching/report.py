"""The report of accelerate() and restore(): what they did to a model, and what they left."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class Swapped:
    """A module whose class was changed: its name in the model ("" = the model itself) and its new class."""

    name: str
    kind: str
    note: str = ""


@dataclass(frozen=True)
class Left:
    """A module that was left as it is, and why."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Report:
    """The changes to a model; print it.

    Attributes:
        verb: "replaced" or "restored".
        swapped: the modules whose class was changed.
        left: modules one might have expected to change.
        unchanged: how many were there already: a second accelerate() changes nothing.
        graphed: names of modules whose calls replay CUDA graphs now; after restore(), of those that did before.
    """

    verb: str
    swapped: tuple[Swapped, ...]
    left: tuple[Left, ...]
    unchanged: int = 0
    graphed: tuple[str, ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        """The number of modules of each new class."""
        return dict(Counter(module.kind for module in self.swapped))

    def __str__(self) -> str:
        lines = [f"{self.verb} {_modules(len(self.swapped))}" if self.swapped else f"nothing {self.verb}"]
        if self.unchanged:
            lines[0] += f", {_modules(self.unchanged)} already done"
        for kind, count in self.counts.items():
            names = ", ".join(_name(module.name) for module in self.swapped if module.kind == kind)
            lines.append(f"  {count} x {kind}: {names}")
        lines += [f"  {_name(module.name)} {module.note}" for module in self.swapped if module.note]
        if self.graphed:
            graphs = "CUDA graphs" if self.verb == "replaced" else "no CUDA graphs any more"
            lines.append(f"  {graphs}: {', '.join(map(_name, self.graphed))}")
        if self.left:
            lines.append(f"left {_modules(len(self.left))}")
        lines += [f"  {_name(module.name)} ({module.kind}): {module.reason}" for module in self.left]
        return "\n".join(lines)


def _modules(count: int) -> str:
    return "1 module" if count == 1 else f"{count} modules"


def _name(name: str) -> str:
    return name or "the model itself"
