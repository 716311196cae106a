"""benchmarks.huggingface: every contender runs, and the record makes a table."""

from __future__ import annotations

import importlib.machinery
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from benchmarks import huggingface
from benchmarks.huggingface import FORWARD, FUSED_LOSS, LIGER, OURS, STOCK, TRAINING, Shape
from tools.report.huggingface import table
from tools.report.records import load

pytest.importorskip("transformers")
BERT: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 99,
}  # fmt: skip
T5: dict[str, Any] = {
    "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "vocab_size": 99,
    "decoder_start_token_id": 0,
}  # fmt: skip


def test_a_record_of_small_models_makes_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {
        "small BERT": Shape("BertForMaskedLM", "BertConfig", False, BERT),
        "small T5": Shape("T5ForConditionalGeneration", "T5Config", True, T5),
    }
    monkeypatch.setattr(huggingface, "SHAPES", shapes)
    out = tmp_path / "record.json"
    options = ["--sentences", "4", "--rounds", "2", "--threads", "1", "--peers", OURS, FUSED_LOSS]
    huggingface.main([*options, "--models", *shapes, "--out", str(out)])
    record = json.loads(out.read_text())
    for entries in record["models"].values():
        ran = [(one["work"], one["contender"], len(one["seconds"])) for one in entries]
        assert ran == [
            (FORWARD, STOCK, 2), (FORWARD, OURS, 2),
            (TRAINING, STOCK, 2), (TRAINING, OURS, 2), (TRAINING, FUSED_LOSS, 2),
        ]  # fmt: skip
        assert all(0 < one["padding"] < 1 for one in entries)
    written = table(load(tmp_path))
    assert written.count("small BERT") == written.count("small T5") == 2
    assert "Batches of 4 sentences" in written
    assert "liger" not in written
    assert table([]).startswith("Hugging Face's models have no record yet")


def test_liger_has_what_it_knows_and_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in of Liger, which changes the process: stock is timed before."""
    order = []

    def change(model: Any) -> None:
        order.append(LIGER)
        model.register_forward_pre_hook(lambda *_: order.append("its forward"))

    package = types.ModuleType("liger_kernel.transformers")
    package._apply_liger_kernel_to_instance = change  # type: ignore[attr-defined]
    patches = types.ModuleType("liger_kernel.transformers.monkey_patch")
    patches.MODEL_TYPE_TO_APPLY_LIGER_FN = {"bert": change}  # type: ignore[attr-defined]
    for module in (types.ModuleType("liger_kernel"), package, patches):
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(huggingface, "CUDA", True)
    forward = huggingface.WORK[FORWARD]
    monkeypatch.setitem(huggingface.WORK, FORWARD, lambda *given, **named: order.append(0) or forward(*given, **named))
    shapes = {
        "small BERT": Shape("BertForMaskedLM", "BertConfig", False, BERT),
        "small T5": Shape("T5ForConditionalGeneration", "T5Config", True, T5),
    }
    monkeypatch.setattr(huggingface, "SHAPES", shapes)
    out = tmp_path / "record.json"
    options = ["--sentences", "2", "--rounds", "1", "--threads", "1", "--peers", LIGER]
    huggingface.main([*options, "--models", *shapes, "--out", str(out)])
    of_bert, of_t5 = (
        [one for one in entries if one["contender"] == LIGER]
        for entries in json.loads(out.read_text())["models"].values()
    )
    assert order[:7] == [0, 0, LIGER, 0, "its forward", 0, "its forward"]
    assert all(len(one["seconds"]) == 1 for one in of_bert)
    assert {one["failed"] for one in of_t5} == {"it knows no t5"}
    assert "| it knows no t5 |" in table(load(tmp_path))


def test_a_rehearsal_has_tiny_models_of_all_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface, "REHEARSAL", True)
    for shape in huggingface.SHAPES.values():
        model = huggingface.made(shape)
        assert sum(x.numel() for x in model.parameters()) < 200_000
        given = huggingface.batch(model, shape, 2)
        for run in huggingface.WORK.values():
            run(model, given, shape.is_translator)
