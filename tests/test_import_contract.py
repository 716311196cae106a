"""Who imports whom: the contract as data, held against the source of every module."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent


class May(NamedTuple):
    """What a module, or a folder as one, may import: from the house, from outside, and inside functions only."""

    house: str = ""
    outside: str = ""
    lazily: str = ""


# Each row may name rows above it only: nothing imports upward.
CONTRACT = {
    "errors": May(),
    "files": May("errors"),
    "taping": May(outside="torch"),
    "autocast": May("taping", "torch"),
    "tracing": May(outside="torch"),
    "transforms": May("autocast taping", "torch"),
    "graphs": May(outside="torch"),
    "sequences": May("transforms", "torch"),
    "reference": May("autocast sequences tracing transforms", "torch"),
    "operators": May("autocast reference taping tracing transforms", "torch"),
    "kernels": May("operators", "torch triton"),
    "native": May("errors files operators", "torch tfm", lazily="ninja rich"),
    "ops": May(
        "autocast errors reference operators native sequences taping tracing transforms", "torch", lazily="kernels"
    ),
    "nn": May("errors graphs ops sequences", "torch"),
    "patching": May("autocast graphs nn operators ops tracing transforms", "torch", lazily="patching/huggingface"),
    "patching/huggingface": May("nn ops patching reference sequences transforms", "torch transformers numpy"),
    "tfm": May("ops nn patching"),
    "config": May("errors ops"),
    "memory": May(),
    "records": May("config errors", "pydantic pydantic_core"),
    "tokenizer": May("errors files", "tokenizers"),
    "data": May("errors memory sequences tokenizer", "torch"),
    "model": May("config nn ops sequences", "torch"),
    "checkpoint": May("config errors files model records tokenizer", "torch safetensors"),
    "state": May("checkpoint config errors model records", "torch"),
    "attend": May("errors model sequences tokenizer", "torch"),
    "generate": May("checkpoint config data errors memory model ops sequences tokenizer", "torch"),
    "evaluate": May("errors", "sacrebleu"),
    "precision": May("model transforms", "torch"),
    "train": May(
        "checkpoint config data errors evaluate files generate graphs model ops precision records sequences state "
        "tokenizer",
        "torch",
    ),
    "fonts": May("errors", "matplotlib"),
    "plots": May("attend errors fonts model ops", "torch matplotlib"),
    "demo": May(),
}
# On top of all, by any names from the house.
TOP = {"cli": May(" ".join(CONTRACT), "torch rich typer"), "__main__": May("errors cli")}
ROWS = CONTRACT | TOP


class Import(NamedTuple):
    """`name` is a row of the contract, or a package from outside."""

    file: str
    line: int
    name: str
    is_lazy: bool

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.name}" + " (inside a function)" * self.is_lazy


def modules() -> dict[str, list[Path]]:
    """The files of each row, from the tree."""
    found = {"kernels": sorted((ROOT / "kernels").rglob("*.py"))}
    for path in sorted((ROOT / "tfm").rglob("*.py")):
        parts = path.relative_to(ROOT / "tfm").parts
        inner = "/".join(parts[:2])
        row = inner if inner in CONTRACT else parts[0].removesuffix(".py")
        found.setdefault("tfm" if row == "__init__" else row, []).append(path)
    return found


MODULES = modules()


def imports(path: Path) -> Iterator[Import]:
    """What the file imports, standard library apart."""
    for node, is_lazy in _statements(ast.parse(path.read_text()), False):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: expected an absolute import, got a relative one"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            names = [alias.name for alias in node.names]
        for row in sorted({_row(name) for name in names}):
            if row not in sys.stdlib_module_names:
                yield Import(str(path.relative_to(ROOT)), node.lineno, row, is_lazy)


def _statements(node: ast.AST, is_lazy: bool) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, is_lazy
        deferred = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing_only = isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")
        yield from _statements(child, is_lazy or deferred or typing_only)


def _row(name: str) -> str:
    package, *rest = name.split(".")
    if package != "tfm":
        # The checkout's own folder is not a package from outside.
        return "kernels, not as tfm.kernels" if package == "kernels" else package
    inner = "/".join(rest[:2])
    if inner in MODULES:
        return inner
    return rest[0] if rest and rest[0] in MODULES else "tfm"


def breaches(row: str) -> list[Import]:
    """The imports that the contract does not allow to `row`."""
    may = ROWS[row]
    always = {row, *may.house.split(), *may.outside.split()}
    return [
        found
        for path in MODULES[row]
        for found in imports(path)
        if found.name not in (always | set(may.lazily.split()) if found.is_lazy else always)
    ]


def test_the_contract_lists_the_modules_that_exist():
    assert set(MODULES) == set(ROWS)


@pytest.mark.parametrize("row", MODULES)
def test_imports_only_what_the_contract_allows(row):
    assert row in ROWS, f"expected a row of the contract for {row}, got none"
    assert not breaches(row), "\n".join(map(str, breaches(row)))


@pytest.mark.parametrize("row", ROWS)
def test_rows_name_only_rows_above(row):
    above = list(ROWS)[: list(ROWS).index(row)]
    assert not set(ROWS[row].house.split()) - set(above)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import kernels", ["kernels, not as tfm.kernels"]),
        ("from kernels.layer_norm import layer_norm", ["kernels, not as tfm.kernels"]),
        ("import os, torch.nn as tnn", ["torch"]),
        ("from tfm import ops, use", ["ops", "tfm"]),
        ("import tfm.ops.backends", ["ops"]),
        ("class A:\n    from tfm.model import Transformer", ["model"]),
        ("def f():\n    from tfm.kernels import norm", ["kernels lazily"]),
        ("if True:\n    import triton\nelse:\n    import typer", ["triton", "typer"]),
        ("if typing.TYPE_CHECKING:\n    import triton", ["triton lazily"]),
    ],
)
def test_the_reader_sees_every_form_of_import(source, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "module.py"
    path.write_text(source)
    assert [found.name + " lazily" * found.is_lazy for found in imports(path)] == expected


def test_the_package_starts_light():
    heavy = "triton", "transformers", "matplotlib", "typer", "rich", "tokenizers", "sacrebleu", "kernels", "tfm.kernels"
    program = f"import tfm, tfm.model\nimport sys\nprint(*(name for name in {heavy} if name in sys.modules))"
    finished = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert finished.stdout.split() == []
