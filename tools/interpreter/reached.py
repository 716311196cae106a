"""The accesses in the source of kernels that a run has reached: those it never reached, it has not checked.

An access is a call of tl.load, tl.store or an atomic, of a descriptor's load or store, or of a device function that
does one of these, wherever it stands in a function of triton.jit.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tools.interpreter.findings import Place, from_root


@dataclass(frozen=True)
class Access:
    """A call in `function` that stands on these lines of `file`."""

    file: str
    function: str
    lines: range
    source: str

    def __str__(self) -> str:
        return f"{from_root(self.file)}:{self.lines.start} in {self.function}: {self.source}"


def launched(files: Iterable[Path]) -> set[str]:
    """Returns the kernels, by the ends of their names, that Python in these files refers to: so it launches them."""
    trees = [_tree(file) for file in files]
    jit = [function for tree in trees for function in _jit_functions(tree)]
    within = {node for function in jit for node in ast.walk(function)}
    named = {node.id for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Name) and node not in within}
    return named & {function.name for function in jit if function.name.endswith("_kernel")}


def unreached(files: Iterable[Path], places: Iterable[Place]) -> list[Access]:
    """Lists the accesses in these files that none of `places` leads through."""
    reached = {line for place in places for line in place}
    return [
        access
        for access in accesses(files)
        if not any((access.file, line, access.function) in reached for line in access.lines)
    ]


def accesses(files: Iterable[Path]) -> list[Access]:
    """Lists all accesses of these files."""
    functions = [(str(file.resolve()), function) for file in files for function in _jit_functions(_tree(file))]
    # A device function accesses memory where one that it calls does.
    accessing: set[str] = set()
    while True:
        found = {function.name for _, function in functions if any(_accesses(function, accessing))}
        if found == accessing:
            break
        accessing = found
    return [
        Access(file, function.name, range(call.lineno, (call.end_lineno or call.lineno) + 1), ast.unparse(call))
        for file, function in functions
        for call in _accesses(function, accessing)
    ]


def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def _jit_functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
            yield node


def _accesses(function: ast.FunctionDef, accessing: set[str]) -> Iterator[ast.Call]:
    for node in ast.walk(function):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            is_own = isinstance(node.func, ast.Name) and name in accessing
            is_operation = isinstance(node.func, ast.Attribute) and name.startswith(("load", "store", "atomic_"))
            if is_own or is_operation:
                yield node
