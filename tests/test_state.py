"""Where training stands is taken up whole or refused in one line, and what it would overwrite stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from training_runs import TOKENIZER, resumed_in, training_in

from tfm import state
from tfm.checkpoint import Run, load_tensors, save_tensors
from tfm.errors import UserError

Tensors = dict[str, torch.Tensor]
WEIGHT = "encoder.layers.0.feed_forward.inner.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    training_in(folder).train(max_steps=2)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def put(folder: Path, files: dict[str, bytes]) -> Run:
    for name, data in files.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(data)
    return Run(folder)


def change(name: str, by: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: by(tensors[name])}


def drop(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {other: tensor for other, tensor in tensors.items() if other != name}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change(f"optimizer.{WEIGHT}.exp_avg", lambda t: t[:1]), r"exp_avg: expected shape \(24, 16\), got \(1, 16\)"),
        (change(f"optimizer.{WEIGHT}.exp_avg_sq", lambda t: t.flatten()), r"exp_avg_sq: expected shape \(24, 16\)"),
        (change(f"optimizer.{WEIGHT}.exp_avg", lambda t: t.half()), r"expected dtype torch.float32, got torch.float16"),
        (change(f"optimizer.{WEIGHT}.step", lambda t: t.repeat(2)), r"step: expected shape \(\), got \(2,\)"),
        (change(f"optimizer.{WEIGHT}.step", lambda t: t + 1), "step: expected 2, where the run stands"),
        (change(f"optimizer.{WEIGHT}.step", lambda t: t * torch.nan), "step: expected 2, where the run stands"),
        (change(f"model.{WEIGHT}", lambda t: t.double()), r"expected dtype torch.float32, got torch.float64"),
        (change("loss_sum", lambda t: t.float()), r"loss_sum: expected dtype torch.float64"),
        (change("random.cpu", lambda t: t[:-1]), r"random.cpu: expected shape \(5056,\), got \(5055,\)"),
        (change("random.cpu", torch.zeros_like), "random.cpu: not a state of torch's generator"),
        (drop(f"optimizer.{WEIGHT}.exp_avg"), "exp_avg is missing: another model's weights"),
        (drop(f"model.{WEIGHT}"), "weight is missing: another model's weights"),
        (drop("random.cpu"), "random.cpu is missing"),
        (lambda tensors: tensors | {"random.cuda": torch.zeros(7)}, r"random.cuda: expected shape \(16,\), got \(7,\)"),
        (lambda tensors: tensors | {"optimizer.more": torch.zeros(7)}, "optimizer.more is unknown"),
        (lambda tensors: {}, "is missing"),
    ],
)
def test_tensors_that_are_not_this_models_are_refused(saved, tmp_path, damage, message):
    """Adam's fused kernel would read beyond a moment that is too small."""
    run = put(tmp_path, contents(saved))
    tensors, place = load_tensors(run.state)
    save_tensors(run.state, damage(tensors), place)
    training = training_in(tmp_path)
    before, files = training.model.state_dict(), contents(tmp_path)
    before = {name: tensor.clone() for name, tensor in before.items()}
    with pytest.raises(UserError, match=rf"state\.safetensors: .*{message}"):
        training.resume()
    assert training.step == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in training.model.state_dict().items())
    assert contents(tmp_path) == files


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ({"epoch": 0, "batch": 2, "loss_steps": 0}, "step: missing"),
        ({}, "step: missing"),
        ({"step": 0, "epoch": 0, "batch": 0, "loss_steps": 0}, "step: expected greater than or equal to 1, got 0"),
        ({"step": 2.0, "epoch": 0, "batch": 2, "loss_steps": 0}, "step: expected a valid integer, got 2.0"),
        ({"step": 2, "epoch": 3, "batch": 2, "loss_steps": 0}, "epoch: expected at most the 2 updates, got 3"),
        ({"step": 2, "epoch": 0, "batch": -1, "loss_steps": 0}, "batch: expected greater than or equal to 0, got -1"),
        ({"step": 2, "epoch": 0, "batch": 2, "loss_steps": 0, "more": 1}, "more: unknown"),
    ],
)
def test_a_place_that_is_none_is_refused(saved, tmp_path, place, message):
    run = put(tmp_path, contents(saved))
    save_tensors(run.state, load_tensors(run.state)[0], place)
    with pytest.raises(UserError, match=rf"state\.safetensors: {message}"):
        resumed_in(tmp_path)


def test_a_batch_beyond_the_epoch_is_refused(saved, tmp_path):
    """Of a run that stands at update 50, so that the number could be one."""
    run = put(tmp_path, contents(saved))
    tensors, place = load_tensors(run.state)
    steps = {name: torch.full_like(t, 50) for name, t in tensors.items() if name.endswith(".step")}
    save_tensors(run.state, tensors | steps, place | {"step": 50, "batch": 40})
    with pytest.raises(UserError, match="batch 40: epoch 0 has fewer"):
        resumed_in(tmp_path)


def test_metadata_that_is_no_object_is_refused(saved, tmp_path):
    run = put(tmp_path, contents(saved))
    tensors, _ = load_tensors(run.state)
    for metadata in ([], 1, "x"):
        save_tensors(run.state, tensors, metadata)
        with pytest.raises(UserError, match=r"state\.safetensors: expected an object"):
            load_tensors(run.state)


@pytest.mark.parametrize(
    ("lost", "told"),
    [
        (["state.safetensors"], "the log records the checkpoint of step 2"),
        (["state.safetensors", "log.jsonl"], "model.safetensors is here"),
        (["state.safetensors", "log.jsonl", "model.safetensors"], "step-00000002.safetensors is here"),
        (["state.safetensors", "model.safetensors"], "the log records the checkpoint of step 2"),
    ],
)
def test_a_missing_state_is_told_and_nothing_is_lost(saved, tmp_path, lost, told):
    files = {name: data for name, data in contents(saved).items() if name not in lost}
    run = put(tmp_path, files)
    with pytest.raises(UserError, match=rf"state\.safetensors: missing, though {told}: without it"):
        run.is_begun()
    with pytest.raises(UserError, match=r"state\.safetensors: missing"):
        training_in(tmp_path).resume()
    assert contents(tmp_path) == files


def test_a_state_older_than_the_log_is_refused(saved, tmp_path):
    """Of a backup: going on would delete the newer checkpoint, and the model would become an older one."""
    training = training_in(tmp_path)
    training.train(max_steps=4)
    (tmp_path / "state.safetensors").write_bytes((saved / "state.safetensors").read_bytes())
    files = contents(tmp_path)
    with pytest.raises(UserError, match="stands at step 2, though the log records the checkpoint of step 4"):
        training_in(tmp_path).resume()
    assert contents(tmp_path) == files


def test_other_weights_beside_the_checkpoints_stay_as_they_are(saved, tmp_path):
    run = put(tmp_path, contents(saved) | {"checkpoints/step-best.safetensors": b"mine"})
    resumed_in(tmp_path).train()
    assert (tmp_path / "checkpoints" / "step-best.safetensors").read_bytes() == b"mine"
    assert run.checkpoints() == [run.checkpoint(12)]


def test_a_checkpoint_of_another_model_is_found_before_training(saved, tmp_path):
    run = put(tmp_path, contents(saved))
    save_tensors(run.checkpoint(1), {"embedding": torch.ones(1)}, {})
    files = contents(tmp_path)
    with pytest.raises(UserError, match=r"step-00000001\.safetensors: decoder\..* is missing: another model's weights"):
        resumed_in(tmp_path, keep=3)
    assert contents(tmp_path) == files


def test_a_run_without_a_log_goes_on(saved, tmp_path):
    files = {name: data for name, data in contents(saved).items() if name != "log.jsonl"}
    put(tmp_path, files)
    assert resumed_in(tmp_path).step == 2


def test_what_is_read_is_what_was_written(saved):
    run = Run(saved)
    config, _, _ = run.read_config()
    found = state.read(run.state, config)
    assert config.vocab_size == TOKENIZER.vocab_size
    assert vars(found.place) == load_tensors(run.state)[1] == {"step": 2, "epoch": 0, "batch": 2, "loss_steps": 0}
    assert all(torch.equal(tensor, found.tensors[name]) for name, tensor in load_tensors(run.state)[0].items())
