"""The source files that an operation's numbers rest upon."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
# Where an operator is declared in Python, or called by its name.
OPERATOR = re.compile(r"(?:Operator\(\s*f?\"|torch\.ops\.tfm_native\.)(\w+)")
# Where one is stated by its arguments, of a subject that kernels/ and csrc/ have a file or a folder of.
STATED = re.compile(r'^@operator\("(\w+)"', re.MULTILINE)


def subjects(root: Path = ROOT) -> list[str]:
    """The subjects that kernels serve, what a record should cover: tfm/ops/ and kernels/ both have the name."""
    names = sorted(path.stem for path in (root / "tfm" / "ops").glob("*.py"))
    return [name for name in names if _module_path(f"tfm.kernels.{name}", root)]


def subject_of(operation: str, root: Path = ROOT) -> str:
    """The subject whose file in tfm/ops/ defines the operation; "" where none does."""
    file = _operation_file(operation, root)
    return file.stem if file else ""


def sources_of(operation: str, root: Path = ROOT, folder: str = "kernels") -> list[str]:
    """The files that the operation's file in tfm/ops/ rests upon, relative to `root`.

    Those of kernels/ that it reaches through its imports, or those of `folder`, csrc/cpu or csrc/cuda, that implement
    its operators, and what they include. A suite of no one operation, such as a training step, rests upon all of them.
    """
    start, is_triton = _operation_file(operation, root), folder == "kernels"
    if start is None:
        return _relative((root / folder).glob("**/*.py" if is_triton else "**/*.*"), root)
    follow = _kernel_files if is_triton else _includes
    found: set[Path] = set()
    waiting = [file for subject in _stated(start, root) for file in _files_of(root / folder / subject)]
    waiting += _kernel_files(start, root) if is_triton else _implementations(start, root, folder)
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += follow(path, root)
    return _relative(found, root)


def _relative(paths: Iterable[Path], root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in paths)


def _stated(path: Path, root: Path) -> set[str]:
    """The subjects of the operators whose arguments `path` imports."""
    return {subject for file in _entries(path, root) for subject in STATED.findall(file.read_text())}


def _files_of(subject: Path) -> list[Path]:
    """Of a subject of kernels/ or csrc/: those in its folder, or those of its name."""
    if subject.is_dir():
        return [path for path in subject.iterdir() if path.is_file()]
    return list(subject.parent.glob(f"{subject.name}.*"))


def _implementations(path: Path, root: Path, folder: str) -> Iterator[Path]:
    """The files of `folder` that register the operators that `path` calls through tfm.operators and tfm.native."""
    names = {name for file in _entries(path, root) for name in OPERATOR.findall(file.read_text())}
    for source in (root / folder).rglob("*.c*"):
        text = source.read_text()
        if any(f'm.impl("{name}"' in text for name in names):
            yield source


def _entries(path: Path, root: Path) -> set[Path]:
    """`path`, and the files of tfm.operators and tfm.native that it imports, or what it imports does."""
    found, waiting = set[Path](), [path]
    while waiting:
        path = waiting.pop()
        if path.is_file() and path not in found:
            found.add(path)
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("tfm.operators", "tfm.native")):
                    module = root.joinpath(*str(node.module).split("."))
                    waiting += [module.with_suffix(".py"), *(module / f"{alias.name}.py" for alias in node.names)]
                    if module.parent.parent == root / "tfm":
                        waiting.append(module / "__init__.py")
    return found


def _includes(path: Path, root: Path) -> Iterator[Path]:
    """What a file of csrc/ includes from there, and its neighbours where it lies in a folder of its operation."""
    csrc = root / "csrc"
    for name in re.findall(r'#include "([^"]+)"', path.read_text()):
        if (csrc / name).is_file():
            yield csrc / name
    if path.parent.parent == csrc / "cpu":
        yield from path.parent.iterdir()


def _operation_file(operation: str, root: Path) -> Path | None:
    """The file of that name, or else the one that defines it: norm.py holds layer_norm."""
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
