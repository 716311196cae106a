"""The report of accelerate() and restore(): what they did to a model, and what they left."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tfm.patching.fusion import Fusion


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
class Stats:
    """How the calls of fused modules went, by kind of work; print it.

    Attributes:
        fused: calls that ran fused.
        plain: calls that ran as before, by the reason.
    """

    fused: dict[str, int]
    plain: dict[str, Counter[str]]

    def __str__(self) -> str:
        lines = []
        for what in self.fused:
            plain = self.plain[what]
            lines.append(f"{what}: {self.fused[what]} calls fused, {plain.total()} as before")
            lines += [f"  {count} x {reason}" for reason, count in plain.most_common()]
        return "\n".join(lines) or "nothing is counted: no module of Hugging Face's was changed"


@dataclass(frozen=True)
class Report:
    """The changes to a model; print it.

    Attributes:
        verb: "replaced" or "restored".
        swapped: the modules whose class was changed.
        left: modules one might have expected to change.
        unchanged: how many were there already: a second accelerate() changes nothing.
        graphed: names of modules whose calls replay CUDA graphs now; after restore(), of those that did before.
        fusions: what was done to modules of Hugging Face's, and how their calls went, by name.
    """

    verb: str
    swapped: tuple[Swapped, ...]
    left: tuple[Left, ...]
    unchanged: int = 0
    graphed: tuple[str, ...] = ()
    fusions: Mapping[str, Fusion] = field(default_factory=dict, repr=False)

    def stats(self) -> Stats:
        """Returns how the calls of Hugging Face's modules went so far; compiled calls are not counted."""
        fused: dict[str, int] = {}
        plain: dict[str, Counter[str]] = {}
        for fusion in self.fusions.values():
            calls = Counter(fusion.calls)
            fused[fusion.what] = fused.get(fusion.what, 0) + calls.pop("", 0)
            plain.setdefault(fusion.what, Counter()).update(calls)
        return Stats(fused, plain)

    @property
    def counts(self) -> dict[str, int]:
        """The number of modules of each new class."""
        return dict(Counter(module.kind for module in self.swapped))

    def __str__(self) -> str:
        lines = [f"{self.verb} {_modules(len(self.swapped))}" if self.swapped else f"nothing {self.verb}"]
        if self.unchanged:
            lines[0] += f", {_modules(self.unchanged)} already done"
        for kind, count in self.counts.items():
            names = _names(module.name for module in self.swapped if module.kind == kind)
            lines.append(f"  {count} x {kind}: {names}")
        lines += [f"  {_name(module.name)} {module.note}" for module in self.swapped if module.note]
        if self.graphed:
            graphs = "CUDA graphs" if self.verb == "replaced" else "no CUDA graphs any more"
            lines.append(f"  {graphs}: {', '.join(map(_name, self.graphed))}")
        if self.left:
            lines.append(f"left {_modules(len(self.left))}")
        reasons: dict[tuple[str, str], list[str]] = {}
        for module in self.left:
            reasons.setdefault((module.kind, module.reason), []).append(module.name)
        lines += [f"  {_names(names)} ({kind}): {reason}" for (kind, reason), names in reasons.items()]
        return "\n".join(lines)


def _modules(count: int) -> str:
    return "1 module" if count == 1 else f"{count} modules"


def _names(names: Iterable[str]) -> str:
    """Returns names as one line; those that differ by the number of a layer as one, with * for it."""
    counts: dict[str, list[str]] = {}
    for name in names:
        counts.setdefault(re.sub(r"\b\d+\b", "*", name), []).append(name)
    return ", ".join(_name(alike[0] if len(alike) == 1 else pattern) for pattern, alike in counts.items())


def _name(name: str) -> str:
    return name or "the model itself"
