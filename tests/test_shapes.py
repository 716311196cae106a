"""What a GPU will be asked: the shapes of the speed tables, every one beside its peers, within the time there is."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.shapes import MULTI30K_LENGTHS, draw_lengths

ROOT = Path(__file__).parent.parent
# Suites are chosen when they are imported, so another process believes in a GPU; nothing is put on it.
LIST = """
import json
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

import torch

torch.cuda.is_available = lambda: True
from benchmarks.suite import NOMINAL, Suite

for path in sorted(Path("benchmarks").glob("bench_*.py")):
    for suite in vars(import_module(f"benchmarks.{path.stem}")).values():
        for case in suite.cases() if isinstance(suite, Suite) else ():
            seconds = max(case.work.seconds(NOMINAL).values())
            compiled = case.peer.compiled
            more = {"file": path.stem, "seconds": seconds, "compiled": compiled}
            print(json.dumps(asdict(case.size) | case.info() | more))
"""
# Of one case on a GPU: inputs, warm-up and rounds; of its compilation, found on the disk.
CASE_SECONDS, COMPILED_SECONDS = 0.15, 2.0
GPU_SECONDS = 200.0


@pytest.fixture(scope="module")
def cases() -> list[SimpleNamespace]:
    run = subprocess.run([sys.executable, "-c", LIST], cwd=ROOT, capture_output=True, text=True, check=True)
    return [SimpleNamespace(**json.loads(line)) for line in run.stdout.splitlines()]


Where = Callable[[SimpleNamespace], bool]
# Each row of the speed tables: the suite, the case, and the peers it is compared with.
ROWS: dict[str, tuple[str, Where, set[str]]] = {
    "translation batch, packed": (
        "attention",
        lambda case: (
            case.file == "bench_varlen_attention"
            and (case.sentences, case.heads, case.head_dim, case.longest) == (256, 8, 64, None)
        ),
        {"eager", "sdpa flash", "sdpa efficient", "sdpa cudnn", "torch varlen"},
    ),
    **{
        f"{length} tokens, padded": (
            "attention",
            lambda case, length=length: case.length == length and case.mask == "lengths" and case.head_dim == 64,
            {"eager", "sdpa flash", "sdpa efficient", "sdpa cudnn"},
        )
        for length in (128, 256, 512)
    },
    **{
        f"{length} tokens, {head_dim} columns, {mask}": (
            "attention",
            lambda case, row=(length, head_dim, mask): (case.length, case.head_dim, case.mask) == row,
            {"sdpa flash", "sdpa efficient", "sdpa cudnn"},
        )
        for length in (4096, 16384)
        for head_dim in (64, 128)
        for mask in ("none", "causal")
    },
    "T5's bias": (
        "attention",
        lambda case: case.length == 512 and case.mask == "bias",
        {"flex", "sdpa efficient", "sdpa math"},
    ),
    "norm at bandwidth": (
        "layer_norm",
        lambda case: case.rows >= 8192 and case.columns >= 1024 and not case.dropout_p,
        {"eager", "compile", "liger"},
    ),
    **{
        f"norm, launch-bound, {columns}, {mode}": (
            "layer_norm",
            lambda case, row=(4096, columns, mode): (case.rows, case.columns, case.mode) == row,
            {"eager", "compile", "liger"},
        )
        for columns in (512, 1024)
        for mode in ("eager", "graph")
    },
    **{
        f"feed-forward, {columns}": (
            "feed_forward",
            lambda case, row=(8192, columns, 4 * columns): (case.rows, case.columns, case.inner) == row,
            {"eager", "compile"},
        )
        for columns in (512, 1024)
    },
    **{
        f"loss, {columns}": (
            "linear_cross_entropy",
            lambda case, row=(8192, columns, 32768): (
                (case.rows, case.columns, case.classes) == row and case.label_smoothing
            ),
            {"eager", "compile", "torch's fused", "liger"},
        )
        for columns in (512, 1024)
    },
}


@pytest.mark.parametrize("name", ROWS)
def test_every_row_of_the_speed_tables_is_measured(cases: list[SimpleNamespace], name: str) -> None:
    suite, where, peers = ROWS[name]
    rows = [case for case in cases if case.suite == suite and where(_with_defaults(case))]
    for direction in ("forward", "forward and backward"):
        found = {case.peer for case in rows if case.direction == direction}
        assert found >= {"ours"} | peers, direction


def _with_defaults(case: SimpleNamespace) -> SimpleNamespace:
    """Sizes of two kinds may share a suite."""
    fields = ("length", "mask", "head_dim", "rows", "columns", "inner", "sentences", "heads", "longest")
    return SimpleNamespace(**(dict.fromkeys(fields) | vars(case)))


def test_translation_sizes(cases: list[SimpleNamespace]) -> None:
    sentences = [case for case in cases if case.file == "bench_varlen_attention"]
    assert {case.heads * case.head_dim for case in sentences} == {512, 1024}
    assert {case.mask for case in sentences} == {"self", "causal", "cross"}
    assert all(64 <= case.sentences <= 512 for case in sentences)
    losses = {case.classes for case in cases if case.suite == "linear_cross_entropy"}
    tables = {case.vocabulary for case in cases if case.suite == "embedding"}
    assert losses == tables == {10_000, 32_768}


def test_launch_bound_cases_are_measured_in_graphs_too(cases: list[SimpleNamespace]) -> None:
    for case in cases:
        assert case.launch_bound == (case.seconds < 100e-6)
        assert case.launch_bound or case.mode == "eager"
    bound = {(case.file, case.size, case.direction, case.peer, case.mode) for case in cases if case.launch_bound}
    assert all((*case, mode) in bound for *case, _ in bound for mode in ("eager", "graph"))


def test_cases_fit_the_time_of_a_run(cases: list[SimpleNamespace]) -> None:
    compiled = sum(case.compiled is not None and case.mode == "eager" for case in cases)
    long = sum(20 * case.seconds for case in cases)
    assert CASE_SECONDS * len(cases) + COMPILED_SECONDS * compiled + long < GPU_SECONDS


def test_lengths_are_multi30ks() -> None:
    drawn = draw_lengths(20_000, torch.Generator().manual_seed(3))
    total = sum(MULTI30K_LENGTHS.values())
    for length, share in MULTI30K_LENGTHS.items():
        assert drawn.count(length) / len(drawn) == pytest.approx(share / total, abs=0.01)
    assert drawn[:100] == draw_lengths(20_000, torch.Generator().manual_seed(3))[:100]
