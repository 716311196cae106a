"""The BLEU of preset tiny on Multi30k, after the updates of its recipe that fit into the time left.

Predicted for an H200: an update is one graph of some 310 kernels, 64 for each of four pairs of layers
(tests/test_launch_budget.py) and about 55 around them, of about 3 us each at 13,000 tokens, and beside it the host
prepares a batch in as long: 8000 updates of 1 to 2 ms are 8 to 16 s.
"""

from __future__ import annotations

import json
from typing import Any

from tfm.config import PRESETS
from tools.gpu import child
from tools.gpu.run import Options, Run, ended

PRESET, CONTENDER = "tiny", "tfm-bf16"
# Seconds of the part's time. Before the training's clock: two processes that import torch, the tokenizer, kernels and
# graphs of every shape of batch. After it: the translations, in fp32, for which kernels are compiled anew.
LOADING, TRANSLATING = 25.0, 35.0
REHEARSED_UPDATES = 3


def updates(options: Options) -> int:
    """Returns how many updates the recipe has; a rehearsal's few say nothing of a model."""
    return REHEARSED_UPDATES if options.rehearse else PRESETS[PRESET].recipe.max_steps


def quality(run: Run, seconds: float) -> tuple[str, str]:
    """Measures BLEU of greedy translations after as many of the recipe's updates as fit."""
    if run.options.data is None:
        return "missing", "BLEU needs real text: --data names none"
    training = seconds - LOADING - TRANSLATING
    if training <= 0:
        return (
            "out of time",
            f"{seconds:.0f} s are left; loading and translating alone take {LOADING + TRANSLATING:.0f}",
        )
    recipe, wanted = PRESETS[PRESET].recipe, updates(run.options)
    result = run.folder / "quality.json"
    words = ["--data", str(run.options.data), "--preset", PRESET, "--train-peers", CONTENDER]
    words += ["--learning-rate", str(recipe.learning_rate), "--warmup", str(recipe.warmup)]
    words += ["--batch-tokens", str(recipe.batch_tokens), "--throughput-seconds", "0"]
    words += ["--minutes", str(training / 60), "--updates", str(wanted), "--out", str(result)]
    end = child.run_one(run.command("quality", "-m", "benchmarks.bench_training", *words), seconds)
    if not result.exists():
        return ended(end, "no result")
    measured = run.record["quality"] = json.loads(result.read_text())
    (learnt,) = measured["quality"]
    if "failed" in learnt:
        return ended(end, learnt["failed"])
    if learnt["updates"] < wanted:
        return "out of time", f"{learnt['updates']:,} of {wanted:,} updates fitted; {_said(learnt)}"
    return ended(end, f"{learnt['updates']:,} updates; {_said(learnt)}")


def _said(learnt: dict[str, Any]) -> str:
    scores = (
        f"BLEU {learnt['validation']['bleu']:.1f} on the validation set, {learnt['test']['bleu']:.1f} on the test set"
    )
    return f"{learnt['epochs']:.1f} epochs in {learnt['seconds']:.0f} s; {scores}"
