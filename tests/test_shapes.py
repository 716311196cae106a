"""What a GPU will be asked: the shapes of the speed tables, every one beside its peers, within the time there is."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import cpu
from benchmarks.shapes import MULTI30K_LENGTHS, draw_lengths
from benchmarks.suite import Work
from tools.report import tables
from tools.report.records import load
from tools.report.words import in_words

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
            more = {"seconds": seconds, "compiled": compiled}
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
        lambda case: (case.sentences, case.heads, case.head_dim, case.longest) == (256, 8, 64, None),
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
    sentences = [case for case in cases if hasattr(case, "sentences")]
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
    bound = {(case.suite, case.size, case.direction, case.peer, case.mode) for case in cases if case.launch_bound}
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


def test_every_size_is_put_into_words(cases):
    sizes = {(case.suite, case.size) for case in cases}
    sizes |= {(row.suite, row.size) for record in load(ROOT / "benchmarks" / "results") for row in record.rows}
    words = {in_words(*size) for size in sizes}
    assert len(words) >= len({size for _, size in sizes})
    assert not [text for text in words if re.search(r"\dx\d|\d{4}", text)]


@pytest.mark.parametrize(
    ("suite", "size", "words"),
    [
        ("attention", "8x128 heads 8x64 mask lengths", "8 sentences of 128 tokens, 8 heads of 64, padding masked"),
        (
            "attention",
            "78 sentences of 8-30 heads 4x32 cross",
            "78 sentences of 8 to 30 tokens, 4 heads of 32, cross-attention",
        ),
        (
            "decode_attention",
            "500x15 heads 8x32 of 2 beam 5",
            "500 hypotheses at token 15, 8 heads of 32 over 2, beam 5",
        ),
        ("embedding", "1920x128 of 9712 dropout 0.3", "1,920 tokens of 128, from 9,712 rows, dropout 0.3"),
        ("feed_forward", "512x512x1408 gated dropout 0.1", "512 tokens, 512 to 1,408 and back, gated, dropout 0.1"),
        ("linear_cross_entropy", "512x128x9712 smoothing 0.1", "512 tokens of 128, 9,712 classes, label smoothing 0.1"),
        ("layer_norm", "8192x1024", "8,192 tokens of 1,024"),
        ("training", "tiny", "tiny"),
    ],
)
def test_sizes_in_words(suite, size, words):
    assert in_words(suite, size) == words


def test_a_case_is_held_against_the_copy_that_moves_as_many_bytes():
    ceilings = {"copy": 10.0, "caches": [(1000, 80.0), (4000, 40.0)], "matmul": 1.0}
    for size, name, rate in ((0, "cache", 80.0), (1000, "cache", 80.0), (1001, "cache", 40.0), (4001, "copy", 10.0)):
        assert Work(bytes=size).seconds(ceilings) == {name: size / (1e9 * rate), "matmul": 0.0}
    assert Work(bytes=1000).seconds({"copy": 10.0, "matmul": 1.0}) == {"copy": 1e-7, "matmul": 0.0}
    assert Work(bytes=1000, flops=1).ceiling(ceilings) == "cache"


def test_a_processors_ceilings_name_its_caches(monkeypatch):
    monkeypatch.setattr(cpu, "CACHED", (1 << 12, 1 << 14, 1 << 18))
    found = cpu.ceilings(cpu.Work(copied=1 << 16, side=8, samples=2, steps=1))
    assert [level["bytes"] for level in found["caches"]] == [1 << 12, 1 << 14]
    assert all(len(level["samples"]) == 2 and level["GB/s"] > 0 for level in found["caches"])
    given = cpu.known(found)
    assert Work(bytes=1 << 13).ceiling(given) == "cache"
    assert Work(bytes=1 << 15).ceiling(given) == "copy"
    (line,) = [text for text in tables._ceilings(found) if "16 KiB" in text]
    assert line.startswith("caches ")
