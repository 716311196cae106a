"""The source files that an operation's numbers rest upon.

A subject has one name everywhere. Its files in kernels/, csrc/cpu/ or csrc/cuda/ are those whose paths there hold that
name: kernels/norm.py, kernels/launch/norm.py, csrc/cuda/norm_forward.cuh, all of csrc/cpu/attention/.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def subjects(root: Path = ROOT) -> list[str]:
    """Lists the subjects that kernels serve, what a record should cover: tfm/ops/ and kernels/ both have the name."""
    names = sorted(path.stem for path in (root / "tfm" / "ops").glob("*.py"))
    return [name for name in names if _module_path(f"tfm.kernels.{name}", root)]


def subject_of(operation: str, root: Path = ROOT) -> str:
    """Returns the subject of that name, or else the one whose file in tfm/ops/ defines it; "" where none does."""
    found = subjects(root)
    defining = (name for name in found if f"\ndef {operation}(" in (root / "tfm" / "ops" / f"{name}.py").read_text())
    return operation if operation in found else next(defining, "")


def sources_of(operation: str, root: Path = ROOT, folder: str = "kernels") -> list[str]:
    """Lists the files of the operation's subject in `folder`, and what they import or include, relative to `root`.

    `folder` is kernels, csrc/cpu or csrc/cuda. A suite of no one operation, such as a training step, rests upon all of
    its files.
    """
    subject, names = subject_of(operation, root), subjects(root)
    files = [path for path in (root / folder).rglob("*.*") if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh")]
    waiting = [path for path in files if not subject or _owner(path.relative_to(root / folder), names) == subject]
    found: set[Path] = set()
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += _imports(path, root) if path.suffix == ".py" else _includes(path, root)
    return sorted(str(path.relative_to(root)) for path in found)


def _owner(path: Path, names: list[str]) -> str:
    """Returns the subject whose name the path holds, the longest of several: decode_attention, not attention."""
    held = (name for name in names if re.search(rf"(?<![a-z]){name}(?![a-z])", str(path)))
    return max(held, key=len, default="")


def _imports(path: Path, root: Path) -> Iterator[Path]:
    """Yields the files of kernels/ that a Python file imports modules or names from."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tfm.kernels"):
            for alias in node.names:
                module = _module_path(f"{node.module}.{alias.name}", root) or _module_path(str(node.module), root)
                if module is not None and module.is_file():
                    yield module


def _module_path(module: str, root: Path) -> Path | None:
    """Returns the file of a module of tfm.kernels; None where there is none."""
    place = root.joinpath(*module.split(".")[1:])
    return next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()), None)


def _includes(path: Path, root: Path) -> Iterator[Path]:
    """Yields the files of csrc/ that a file includes; "operators/norm.h" is made when it is compiled."""
    for name in re.findall(r'#include "([^"]+)"', path.read_text()):
        if (root / "csrc" / name).is_file():
            yield root / "csrc" / name
