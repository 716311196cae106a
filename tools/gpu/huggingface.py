"""Hugging Face's models, accelerated, beside stock and Liger, as many as the part's time allows."""

from __future__ import annotations

import json
import statistics
from typing import Any

from benchmarks.huggingface import FUSED_LOSS, LIGER, OURS, SHAPES, TRAINING, ratios
from tools.gpu import child
from tools.gpu.run import Options, Run, ended

WEIGHT = 45
# torch.compile takes a minute for a model; benchmarks.huggingface has it, where there is time.
PEERS = (OURS, FUSED_LOSS, LIGER)
ROUNDS, REHEARSED_ROUNDS = 7, 1
SENTENCES, REHEARSED_SENTENCES = 48, 2
# An encoder, an encoder-decoder and one that Liger knows, where time is short.
FEW = ("BERT-base, 4 layers", "T5-small", "Llama-160M, 4 layers")


def models(options: Options) -> tuple[str, ...]:
    """Returns the models that are measured, what a run that is cut short should have first."""
    return FEW if options.quick or options.rehearse else (*FEW, *(name for name in SHAPES if name not in FEW))


def huggingface(run: Run, seconds: float) -> tuple[str, str]:
    """Measures the models one after the other; what is finished when the time is over counts."""
    result = run.folder / "huggingface.json"
    few = run.options.rehearse
    words = ["--models", *models(run.options), "--peers", *PEERS, "--out", str(result)]
    words += ["--rounds", str(REHEARSED_ROUNDS if few else ROUNDS)]
    words += ["--sentences", str(REHEARSED_SENTENCES if few else SENTENCES)]
    end = child.run_one(run.command("huggingface", "-m", "benchmarks.huggingface", *words), seconds)
    if not result.exists():
        return ended(end, "no result")
    measured = run.record["huggingface"] = json.loads(result.read_text())
    return ended(end, ", ".join(_said(name, entries) for name, entries in measured["models"].items()))


def _said(name: str, entries: list[dict[str, Any]]) -> str:
    found = ratios(entries, TRAINING, OURS)
    return f"{name} {statistics.median(found):.2f} x stock" if found else f"{name} failed"
