"""A small model on a few lines, and runs that train it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from samples import parallel_lines, small_config

from tfm.checkpoint import Run
from tfm.config import Recipe
from tfm.data import ParallelText, batches, encode_parallel
from tfm.model import Transformer
from tfm.tokenizer import Tokenizer
from tfm.train import Options, Training

TEXT = ParallelText(*parallel_lines(60))
VALIDATION = ParallelText(*parallel_lines(5, seed=8))
TOKENIZER = Tokenizer.train([*TEXT.source, *TEXT.target], 280)
PAIRS = encode_parallel(TEXT, TOKENIZER, 32)
RECIPE = Recipe(TOKENIZER.vocab_size, batch_tokens=100, learning_rate=3e-3, warmup=4, max_steps=12)
BATCHES = len(batches(PAIRS, RECIPE.batch_tokens))
DROPS = {"dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.1}


def training_in(folder: Path, seed: int = 1, device: str = "cpu", **options: Any) -> Training:
    """A run of the small model with all its dropouts, ready to start or to resume."""
    torch.manual_seed(seed)
    model = Transformer(small_config(vocab_size=TOKENIZER.vocab_size, **DROPS)).to(device)
    run, options = Run(folder), Options(**({"log_every": 1, "seed": seed} | options))
    run.write_config(model.config, RECIPE, {})
    TOKENIZER.save(run.tokenizer)
    return Training(run, model, TOKENIZER, RECIPE, PAIRS, VALIDATION, options)


def resumed_in(folder: Path, **options: Any) -> Training:
    """The same in a new process, whose random numbers are others'."""
    training = training_in(folder, **options)
    torch.manual_seed(99)
    training.resume()
    return training


def log_of(folder: Path, *events: str) -> list[dict[str, Any]]:
    """The records of these events, or all, without what a clock says."""
    records = [json.loads(line) for line in Run(folder).log.read_text("utf-8").splitlines()]
    for record in records:
        for name in ("tokens_per_second", "seconds", "path"):
            record.pop(name, None)
    return [record for record in records if not events or record["event"] in events]


def assert_same_weights(one: Training, other: Training) -> None:
    assert one.step == other.step
    weights = other.model.state_dict()
    for name, tensor in one.model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
