"""Which of torch's tests use what tfm has in torch's place: read from their names and source."""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path

# The classes of torch.nn that are exchanged.
NAMES = frozenset(
    ("Transformer", "TransformerEncoder", "TransformerDecoder", "TransformerEncoderLayer", "TransformerDecoderLayer",
     "MultiheadAttention", "LayerNorm", "RMSNorm")
)  # fmt: skip


def named(test: str, names: frozenset[str]) -> bool:
    """Whether a test's name has one of `names`, as of those made from a list of modules or operators."""
    return any(f"_{name}_" in f"_{test}_" for name in names)


@cache
def reaching(path: Path, names: frozenset[str]) -> frozenset[str]:
    """Names of the methods of a file's tests that use one of `names`, directly or through the file's own helpers.

    Helpers are functions and classes at the top of the file, those it imports from torch.testing, and what a test calls
    on `self`.
    """
    tree = ast.parse(path.read_text())
    top = _definitions(tree)
    cases = [node for node in top.values() if isinstance(node, ast.ClassDef) and any(map(_is_test, node.body))]
    helpers = {name: node for name, node in top.items() if node not in cases}
    found = names | _imported(tree, names)
    found |= _users(helpers, found)
    methods = [{node.name: node for node in case.body if isinstance(node, ast.FunctionDef)} for case in cases]
    return frozenset().union(*(_users(case, found) for case in methods))


def _definitions(tree: ast.Module) -> dict[str, ast.AST]:
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def _imported(tree: ast.Module, names: frozenset[str]) -> frozenset[str]:
    """Which of torch.testing's functions and classes that a file imports use one of `names`."""
    found: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch.testing._internal."):
            spec = importlib.util.find_spec(str(node.module))
            if spec is not None and spec.origin is not None:
                helpers = _definitions(ast.parse(Path(spec.origin).read_text()))
                found |= _users(helpers, names) & {alias.name for alias in node.names}
    return frozenset(found)


def _is_test(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef) and node.name.startswith("test")


def _users(definitions: dict[str, ast.AST], names: frozenset[str]) -> frozenset[str]:
    """Which of the definitions use one of `names`, directly or through each other."""
    used = {name: _identifiers(node) - {name} for name, node in definitions.items()}
    users: set[str] = set()
    while more := {name for name, words in used.items() if words & (names | users)} - users:
        users |= more
    return frozenset(users)


def _identifiers(definition: ast.AST) -> set[str]:
    nodes = list(ast.walk(definition))
    words = {node.id for node in nodes if isinstance(node, ast.Name)}
    return words | {node.attr for node in nodes if isinstance(node, ast.Attribute)}
