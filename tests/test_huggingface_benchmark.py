"""benchmarks.huggingface: every contender runs, and the record makes a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import huggingface
from benchmarks.huggingface import FORWARD, FUSED_LOSS, OURS, STOCK, TRAINING, Shape
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
    assert table([]).startswith("Hugging Face's models have no record yet")
