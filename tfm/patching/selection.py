"""What of a model accelerate() is to change, as a caller names it: kinds of work, and modules by their paths."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch.nn import Module

# What fusing serves: torch.nn's layers and stacks as wholes, and parts of any model.
KINDS = (
    "layer", "attention", "norm", "residual", "feed_forward", "experts", "recurrence", "embedding", "cross_entropy",
)  # fmt: skip


NOT_ASKED_FOR = "not asked for"


class Selection:
    """The modules of `model` that `only` and `exclude` leave.

    Raises:
        ValueError: a name is no kind of work, and no pattern that a module's path matches.
    """

    def __init__(self, model: Module, only: str | Sequence[str] | None, exclude: str | Sequence[str] | None) -> None:
        self.only = None if only is None else _listed(only)
        self.exclude = () if exclude is None else _listed(exclude)
        paths = [name for name, _ in model.named_modules()]
        for argument, names in (("only", self.only or ()), ("exclude", self.exclude)):
            for name in names:
                if name not in KINDS and not any(_matches(path, name) for path in paths):
                    raise ValueError(
                        f"{argument}: expected {', '.join(KINDS)}, or the path of a module as named_modules() gives it,"
                        f" * for any part; got {name!r}, which no module's path matches"
                    )

    def why_left(self, what: str, path: str) -> str:
        """Says why a module is not to be changed; empty where it is."""
        if self.only is not None and not any(_names(name, what, path) for name in self.only):
            return NOT_ASKED_FOR
        found = next((name for name in self.exclude if _names(name, what, path)), None)
        return "" if found is None else f"excluded by {found!r}"


def _listed(names: str | Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _names(name: str, what: str, path: str) -> bool:
    return name == what if name in KINDS else _matches(path, name)


def _matches(path: str, pattern: str) -> bool:
    """Tells whether a module, or one that it lies in, has this path."""
    parts = path.split(".")
    return any(fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))
