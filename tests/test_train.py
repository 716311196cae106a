"""Training stops anywhere and goes on to the last bit; what it says and saves is what it did."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import batch_of, parallel_lines, run_model, small_config, small_model
from torch.testing import assert_close
from training_runs import (
    BATCHES,
    RECIPE,
    TOKENIZER,
    VALIDATION,
    assert_same_weights,
    log_of,
    resumed_in,
    training_in,
)

from tfm import checkpoint, state, train
from tfm.checkpoint import Run, load_model, load_tensors
from tfm.config import Recipe
from tfm.data import ParallelText, batches, encode_parallel
from tfm.errors import UserError
from tfm.evaluate import TOKENIZERS, score
from tfm.generate import Search, translate
from tfm.model import Transformer
from tfm.tokenizer import PAD
from tfm.train import Options, Training, batch_loss

# Resuming


def test_the_corpus_has_epochs_that_the_tests_cross():
    assert 6 <= BATCHES <= 9


@pytest.mark.parametrize("stop", [5, BATCHES, BATCHES + 2], ids=["mid-epoch", "between epochs", "second epoch"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, stop):
    whole = training_in(tmp_path / "whole")
    whole.train()
    training_in(tmp_path / "parts").train(max_steps=stop)
    parts = resumed_in(tmp_path / "parts")
    assert (parts.step, parts.saved_step) == (stop, stop)
    parts.train()
    assert_same_weights(parts, whole)
    assert log_of(tmp_path / "parts", "train") == log_of(tmp_path / "whole", "train")
    assert len(log_of(tmp_path / "whole", "train")) == RECIPE.max_steps
    states = [load_tensors(Run(tmp_path / name).state) for name in ("whole", "parts")]
    assert states[0][1] == states[1][1]
    assert states[0][0].keys() == states[1][0].keys()
    assert all(torch.equal(states[0][0][name], states[1][0][name]) for name in states[0][0])


@pytest.mark.parametrize("log_every", [1, 4])
def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path, log_every):
    """Killed at step 8 after a checkpoint at 5, its last log line torn: the log ends as if nothing had happened."""

    def die(record):
        if record["step"] == 8:
            raise KeyboardInterrupt

    options = {"interval": 5, "log_every": log_every}
    whole = training_in(tmp_path / "whole", **options)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        training_in(tmp_path / "killed", **options).train(die)
    with Run(tmp_path / "killed").log.open("a") as log:
        log.write('{"event": "train", "st')
    killed = resumed_in(tmp_path / "killed", **options)
    assert killed.step == 5
    assert {record["step"] for record in log_of(tmp_path / "killed")} <= set(range(6))
    killed.train()
    assert_same_weights(killed, whole)
    assert log_of(tmp_path / "killed") == log_of(tmp_path / "whole")


def test_a_run_killed_while_it_validates_makes_up_for_it(tmp_path, monkeypatch):
    whole = training_in(tmp_path / "whole", interval=5)
    whole.train()

    def die():
        raise KeyboardInterrupt

    killed = training_in(tmp_path / "killed", interval=5)
    monkeypatch.setattr(killed, "validate", die)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    assert not log_of(tmp_path / "killed", "validation")
    resumed_in(tmp_path / "killed", interval=5).train()
    assert log_of(tmp_path / "killed") == log_of(tmp_path / "whole")


def test_training_goes_on_after_its_time(tmp_path):
    training = training_in(tmp_path)
    assert [training.train(seconds=0), training.train(seconds=0)] == ["time", "time"]
    assert training.step == 2


@pytest.mark.parametrize("unwritten", ["model.safetensors", "state.safetensors"])
def test_a_run_killed_while_it_saves_goes_on(tmp_path, monkeypatch, unwritten):
    whole = training_in(tmp_path / "whole", interval=5, keep=2)
    whole.train()
    save = checkpoint.save_tensors

    def die(path, tensors, metadata):
        if path.name == unwritten and metadata["step"] == 10:
            raise KeyboardInterrupt
        save(path, tensors, metadata)

    for writer in (train, state):
        monkeypatch.setattr(writer, "save_tensors", die)
    with pytest.raises(KeyboardInterrupt):
        training_in(tmp_path / "killed", interval=5, keep=2).train()
    monkeypatch.undo()
    load_model(tmp_path / "killed")
    killed = resumed_in(tmp_path / "killed", interval=5, keep=2)
    assert killed.step == 5
    killed.train()
    assert_same_weights(killed, whole)
    models = [load_tensors(Run(tmp_path / name).model)[0] for name in ("whole", "killed")]
    assert all(torch.equal(tensor, models[1][name]) for name, tensor in models[0].items())


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    training_in(tmp_path).train()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert resumed_in(tmp_path).train() == "steps"
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_what_cannot_be_resumed_is_refused(tmp_path):
    training = training_in(tmp_path)
    with pytest.raises(UserError, match="nothing to resume, no checkpoint was written yet"):
        training.resume()
    training.train(max_steps=1)
    training.model = Transformer(replace(training.model.config, encoder_layers=3))
    with pytest.raises(UserError, match="another model's weights"):
        training.resume()
    state = training.run.state
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(UserError, match="truncated or damaged"):
        training_in(tmp_path).resume()


def test_runs_of_one_seed_are_equal_and_of_two_differ(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        training_in(tmp_path / name, seed).train(max_steps=6)
    losses = [[record["loss"] for record in log_of(tmp_path / name, "train")] for name in "abc"]
    assert losses[0] == losses[1] != losses[2]


# One update


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6), st.floats(0, 1))
@settings(deadline=None, max_examples=25)
def test_the_loss_is_torchs_on_the_padded_batch(lengths, label_smoothing):
    model, batch = small_model().eval(), batch_of(lengths)
    layout = batch.target_input.layout
    logits, target = layout.unpack(model.logits(run_model(model, batch))), layout.unpack(batch.target_output)
    expected = F.cross_entropy(
        logits.flatten(0, 1), target.flatten(), ignore_index=PAD, label_smoothing=label_smoothing
    )
    assert_close(batch_loss(model, batch, label_smoothing), expected, rtol=1e-10, atol=1e-10)


def test_learning_rates_are_the_recipes(tmp_path):
    training = training_in(tmp_path)
    before = {name: p.detach().clone() for name, p in training.model.named_parameters()}
    used = []
    training.optimizer.register_step_pre_hook(
        lambda optimizer, *_: used.append(optimizer.param_groups[0]["lr"].clone())
    )
    training.train(max_steps=1)
    # Adam's first update moves every weight by the learning rate, whatever its gradient.
    moved = max((p.detach() - before[name]).abs().max().item() for name, p in training.model.named_parameters())
    assert moved == pytest.approx(RECIPE.learning_rate_at(1), rel=1e-3)
    training.train()
    logged = [record["learning_rate"] for record in log_of(tmp_path, "train")]
    assert logged == [RECIPE.learning_rate_at(step) for step in range(1, 13)]
    assert torch.equal(torch.stack(used), torch.tensor(logged))
    assert max(logged) == logged[3] == RECIPE.learning_rate
    assert (training.optimizer.defaults["betas"], training.optimizer.defaults["eps"]) == ((0.9, 0.98), 1e-9)


@pytest.mark.parametrize("clip_norm", [1e-3, 1e6])
def test_gradients_are_clipped(tmp_path, clip_norm):
    training, seen = training_in(tmp_path), []
    training.recipe = replace(RECIPE, clip_norm=clip_norm)

    def look(*_):
        seen.append(torch.stack([p.grad.norm() for p in training.model.parameters()]).norm().item())

    training.optimizer.register_step_pre_hook(look)
    training.train(max_steps=3)
    logged = [record["gradient_norm"] for record in log_of(tmp_path, "train")]
    assert min(logged) > 0.01
    assert seen == pytest.approx([min(norm, clip_norm) for norm in logged], rel=1e-3)


def test_logged_losses_are_means_since_the_last_line(tmp_path):
    for name, log_every in (("each", 1), ("fourth", 4)):
        training_in(tmp_path / name, log_every=log_every).train()
    each = [record["loss"] for record in log_of(tmp_path / "each", "train")]
    fourth = [record["loss"] for record in log_of(tmp_path / "fourth", "train")]
    assert fourth == pytest.approx([sum(each[k : k + 4]) / 4 for k in (0, 4, 8)], rel=1e-12)


def test_bfloat16_trains_fp32_weights(tmp_path):
    for dtype in ("float32", "bfloat16"):
        training = training_in(tmp_path / dtype, dtype=dtype)
        training.train(max_steps=4)
        assert all(p.dtype == torch.float32 for p in training.model.parameters())
    expected, losses = ([r["loss"] for r in log_of(tmp_path / d, "train")] for d in ("float32", "bfloat16"))
    assert losses == pytest.approx(expected, rel=0.01)
    assert losses != expected


# Stopping


def test_a_time_limit_ends_with_a_checkpoint(tmp_path):
    training = training_in(tmp_path)
    assert training.train(seconds=0.0) == "time"
    assert training.step == training.saved_step == load_tensors(training.run.state)[1]["step"] == 1
    load_model(tmp_path)


def test_stop_ends_with_a_checkpoint(tmp_path):
    training = training_in(tmp_path)

    def report(record):
        if record["step"] == 4:
            training.stop("SIGTERM")

    assert training.train(report) == "SIGTERM"
    assert training.step == training.saved_step == load_tensors(training.run.state)[1]["step"] == 4
    assert resumed_in(tmp_path).train() == "steps"


def test_no_steps_write_nothing(tmp_path):
    training = training_in(tmp_path)
    assert training.train(max_steps=0) == "steps"
    assert not training.run.log.exists()
    assert not training.run.state.exists()


def nan_loss(model, batch, *rest):
    return batch_loss(model, batch, *rest) * math.nan


def infinite_gradient(model, batch, *rest):
    return batch_loss(model, batch, *rest) + (model.embedding.sum() * 0).sqrt()


@pytest.mark.parametrize("broken", [nan_loss, infinite_gradient])
@pytest.mark.parametrize(("interval", "log_every"), [(5, 1), (5, 100), (100, 1), (100, 100)])
def test_what_is_not_finite_stops_training(tmp_path, monkeypatch, broken, interval, log_every):
    """At step 7, noticed at the next log line or checkpoint: no file has seen it."""
    training, told = training_in(tmp_path, interval=interval, log_every=log_every), []

    def loss(*args):
        return (broken if training.step == 7 else batch_loss)(*args)

    monkeypatch.setattr(train, "batch_loss", loss)
    kept = "the checkpoint of step 5 is kept" if interval == 5 else "no checkpoint yet"
    with pytest.raises(UserError, match=f"not finite at step 7: training stopped, {kept}"):
        training.train(told.append)
    assert [record["step"] for record in told if record["event"] == "train"] == [*range(1, 7)][: 6 // log_every]
    if interval == 5:
        model, _ = load_model(tmp_path)
        assert all(parameter.isfinite().all() for parameter in model.parameters())
        assert resumed_in(tmp_path).step == 5
    else:
        assert not training.run.state.exists()


# Checkpoints and validation


@pytest.mark.parametrize(("keep", "steps"), [(1, [12]), (2, [9, 12]), (9, [3, 6, 9, 12])])
def test_the_last_checkpoints_are_kept_and_averaged(tmp_path, keep, steps):
    training = training_in(tmp_path, keep=keep, interval=3)
    training.train()
    run = training.run
    assert run.checkpoints() == [run.checkpoint(step) for step in steps]
    kept = [load_tensors(path)[0] for path in run.checkpoints()]
    model, _ = load_model(tmp_path)
    for name, tensor in model.state_dict().items():
        mean = torch.stack([weights[name].double() for weights in kept]).mean(0).float()
        assert_close(tensor, mean, rtol=0, atol=0)
        assert torch.equal(kept[-1][name], training.model.state_dict()[name])
    assert [r["step"] for r in log_of(tmp_path, "checkpoint")] == [3, 6, 9, 12]
    assert [r["step"] for r in log_of(tmp_path, "validation")] == [3, 6, 9, 12]


def test_checkpoints_come_each_epoch_unless_told(tmp_path):
    training_in(tmp_path).train()
    assert [record["step"] for record in log_of(tmp_path, "checkpoint")] == [BATCHES, 12]


def test_validation_tells_loss_bleu_and_samples(tmp_path):
    training = training_in(tmp_path, tokenize="none")
    told = []
    training.train(told.append, max_steps=2)
    assert training.model.training
    assert [record["event"] for record in told] == ["train", "train", "checkpoint", "validation"]
    *_, record = log_of(tmp_path)
    model, _ = load_model(tmp_path)
    translations = translate(model, TOKENIZER, VALIDATION.source, Search())
    scores = score(translations, VALIDATION.target, "none")
    pairs = encode_parallel(VALIDATION, TOKENIZER, 32)
    (batch,) = batches(pairs, 10_000, shuffle=False)
    assert record.keys() == {"event", "step", "loss", "perplexity", "bleu", "signature", "samples"}
    assert record["loss"] == pytest.approx(batch_loss(model, batch, 0.0).item(), rel=1e-5)
    assert record["perplexity"] == pytest.approx(math.exp(record["loss"]))
    assert (record["bleu"], record["signature"]) == (scores.bleu, scores.bleu_signature)
    assert "tok:none" in record["signature"]
    rows = list(zip(VALIDATION.source, VALIDATION.target, translations, strict=True))[:3]
    assert [tuple(sample.values()) for sample in record["samples"]] == rows
    assert list(record["samples"][0]) == ["source", "reference", "translation"]


def test_a_run_without_validation(tmp_path):
    training = training_in(tmp_path)
    training.validation = None
    training.train(max_steps=2)
    assert [record["event"] for record in log_of(tmp_path)] == ["train", "train", "checkpoint"]


def test_twenty_pairs_are_learned_by_heart(tmp_path):
    text = ParallelText(*parallel_lines(20, seed=3))
    recipe = Recipe(TOKENIZER.vocab_size, 4000, learning_rate=5e-3, warmup=30, max_steps=200, label_smoothing=0.0)
    model = Transformer(small_config(vocab_size=TOKENIZER.vocab_size, dim=32, ffn_dim=64))
    pairs = encode_parallel(text, TOKENIZER, 32)
    training = Training(Run(tmp_path), model, TOKENIZER, recipe, pairs, text, Options(interval=1000))
    training.train()
    *_, record = log_of(tmp_path)
    assert record["loss"] < 0.05
    assert record["bleu"] == pytest.approx(100)
    for search in (Search(), Search(beam=4)):
        assert translate(model.eval(), TOKENIZER, text.source, search) == text.target


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interval": 0}, "interval: expected at least 1, got 0"),
        ({"log_every": 0}, "log_every: expected at least 1, got 0"),
        ({"keep": 0}, "keep: expected at least 1, got 0"),
        ({"seed": -1}, r"seed: expected a number from 0 to 2\*\*63 - 1, got -1"),
        ({"dtype": "float16"}, "dtype: expected one of float32, bfloat16, got 'float16'"),
        ({"tokenize": "moses"}, f"tokenize: expected one of {', '.join(TOKENIZERS)}, got 'moses'"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(UserError, match=message):
        Options(**options)


@pytest.mark.parametrize("rounding", [(64,), (32, 8, 16)], ids=["rows", "all that a graph asks for"])
def test_a_rounded_batch_teaches_the_same(rounding, tmp_path):
    training = training_in(tmp_path)
    batch, results = training._plan()[0], []
    for one in (batch, batch.rounded(*rounding)):
        torch.manual_seed(5)
        loss = batch_loss(training.model, one, 0.1)
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in training.model.parameters())])
        training.optimizer.zero_grad(set_to_none=True)
    assert_close(*results)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_batches_have_few_shapes_where_shapes_cost(dtype, tmp_path):
    training = training_in(tmp_path, dtype=dtype)
    batch = training._plan()[0]
    assert (training._prepared(batch) is batch) == (dtype == "float32")
    assert dtype == "float32" or training._prepared(batch).source.layout.rows % 64 == 0
