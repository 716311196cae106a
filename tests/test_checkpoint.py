"""Files that are whole or refused: whatever happens to them on the way is one UserError, never another model."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from samples import parallel_lines, small_config, small_model
from torch.testing import assert_close

from tfm import checkpoint
from tfm.checkpoint import (
    Run,
    average,
    load_model,
    load_tensors,
    load_weights,
    save_tensors,
)
from tfm.config import PRESETS, to_dict
from tfm.errors import UserError
from tfm.files import LEFT_BEHIND, write_atomically
from tfm.tokenizer import Tokenizer

RECIPE = PRESETS["tiny"].recipe


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return {
        "a": torch.randn(5, 3),
        "b.scalar": torch.tensor(2.5, dtype=torch.float64),
        "c.bytes": torch.randint(256, (7,), dtype=torch.uint8),
        "d.half": torch.randn(4).bfloat16(),
        "e.empty": torch.empty(0, 3),
        "f.view": torch.randn(4, 6).t(),
    }


def write_run(folder: Path) -> Run:
    """A run whose training has just been saved."""
    run, tokenizer = Run(folder), Tokenizer.train(parallel_lines(30)[0], 280)
    model = small_model(torch.float32, vocab_size=tokenizer.vocab_size)
    run.folder.mkdir(exist_ok=True)
    tokenizer.save(run.tokenizer)
    run.write_config(model.config, RECIPE, {"tokenizer_sha256": run.tokenizer_sha256()})
    save_tensors(run.model, model.state_dict(), {"step": 12})
    return run


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict[str, torch.Tensor]]:
    run = write_run(tmp_path_factory.mktemp("run"))
    return run, load_tensors(run.model)[0]


# Tensors


def test_tensors_and_metadata_come_back(tmp_path, tensors):
    metadata = {"step": 12, "names": ["ü", "☃"], "rate": 1e-9, "none": None}
    save_tensors(tmp_path / "deep" / "er" / "x.safetensors", tensors, metadata)
    loaded, described = load_tensors(tmp_path / "deep" / "er" / "x.safetensors")
    assert described == metadata
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert_close(loaded[name], tensor, rtol=0, atol=0)
    assert [path.name for path in (tmp_path / "deep" / "er").iterdir()] == ["x.safetensors"]


def test_every_truncation_is_noticed(tmp_path, tensors):
    path = tmp_path / "x.safetensors"
    save_tensors(path, tensors, {"step": 1})
    data = path.read_bytes()
    for length in {*range(20), *range(20, len(data), 13), len(data) - 1}:
        path.write_bytes(data[:length])
        with pytest.raises(UserError, match=r"x\.safetensors: truncated or damaged"):
            load_tensors(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(UserError, match="truncated or damaged"):
        load_tensors(path)


@pytest.mark.parametrize("flip", [0x01, 0x20, 0x80, 0xFF])
def test_every_changed_byte_is_noticed(tmp_path, tensors, flip):
    """In the length of the header, the header, its metadata and the data."""
    path = tmp_path / "x.safetensors"
    save_tensors(path, tensors, {"step": 1})
    data = path.read_bytes()
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ flip]) + data[place + 1 :])
        with pytest.raises(UserError, match=r"x\.safetensors: "):
            load_tensors(path)


def test_files_of_others_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(UserError, match="no such file"):
        load_tensors(path)
    with pytest.raises(UserError, match="truncated or damaged"):
        load_tensors(tmp_path)
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="not written by tfm"):
        load_tensors(path)
    torch.save({"a": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="truncated or damaged"):
        load_tensors(path)


def test_average_is_the_mean(tmp_path):
    sets = [{"a": torch.randn(3, 4) * 1000, "b": torch.randn(2)} for _ in range(5)]
    paths = [tmp_path / str(k) for k in range(5)]
    for path, tensors in zip(paths, sets, strict=True):
        save_tensors(path, tensors, {})
    mean = average(iter(paths), sets[0])
    for name in ("a", "b"):
        exact = torch.stack([tensors[name].double() for tensors in sets]).mean(0).float()
        assert_close(mean[name], exact, rtol=0, atol=0)
    assert_close(average(paths[:1], sets[0]), sets[0], rtol=0, atol=0)


def test_only_checkpoints_of_one_model_are_averaged(tmp_path):
    """A shape of (1,) would be added to every element."""
    for name, weights in (("one", torch.ones(3)), ("other", torch.ones(1))):
        save_tensors(tmp_path / name, {"a": weights}, {})
    with pytest.raises(UserError, match=r"other: a: expected shape \(3,\), got \(1,\)"):
        average([tmp_path / "one", tmp_path / "other"], {"a": torch.zeros(3)})


# A run's folder


def test_config_comes_back(tmp_path):
    run = Run(tmp_path / "new" / "run")
    config = small_config(norm_first=True, activation="gelu", dropout=0.1)
    run.write_config(config, RECIPE, {"seed": 7, "source": "größe.de"})
    assert run.read_config() == (config, RECIPE, {"seed": 7, "source": "größe.de"})


def test_checkpoints_are_listed_oldest_first(tmp_path):
    run = Run(tmp_path)
    assert run.checkpoints() == []
    for step in (900, 20, 200_000_000, 12_000_000, 1000):
        write_atomically(run.checkpoint(step), b"")
    (tmp_path / "checkpoints" / LEFT_BEHIND.replace("*", "0")).touch()
    for name in ("step-best.safetensors", "step-00000001.safetensors.old", "best.safetensors"):
        (tmp_path / "checkpoints" / name).touch()
    assert run.checkpoints() == [run.checkpoint(step) for step in (20, 900, 1000, 12_000_000, 200_000_000)]
    assert run.checkpoints(after=1000) == [run.checkpoint(12_000_000), run.checkpoint(200_000_000)]


def test_load_model_gives_what_was_saved(tmp_path):
    run = write_run(tmp_path)
    model, tokenizer = load_model(tmp_path)
    assert not model.training
    assert tokenizer.decode(tokenizer.encode(["un deux"])) == ["un deux"]
    saved, _ = load_tensors(run.model)
    for name, tensor in model.state_dict().items():
        assert_close(tensor, saved[name], rtol=0, atol=0)
    load_model(str(tmp_path))


def smaller_tokenizer(run: Run) -> None:
    Tokenizer.train(parallel_lines(30)[0], 270).save(run.tokenizer)


def other_tokenizer(run: Run) -> None:
    Tokenizer.train(parallel_lines(30)[1], 280).save(run.tokenizer)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: run.config.unlink(), "not a run folder, config.json is missing"),
        (lambda run: run.tokenizer.unlink(), r"tokenizer\.json: cannot read the tokenizer"),
        (lambda run: run.tokenizer.write_text("{"), r"tokenizer\.json: not a tokenizer file"),
        (other_tokenizer, r"tokenizer\.json: not the tokenizer that the model beside it was trained with"),
        (
            smaller_tokenizer,
            r"tokenizer\.json: does not belong to the model beside it: it has 270 tokens, the model 280",
        ),
        (lambda run: run.model.unlink(), r"no checkpoint yet, model\.safetensors is missing"),
        (lambda run: run.model.write_bytes(run.model.read_bytes()[:-1]), "truncated or damaged"),
        (lambda run: run.write_config(small_config(vocab_size=280, dim=32), RECIPE, {}), "expected shape"),
        (
            lambda run: run.write_config(small_config(vocab_size=280, encoder_layers=3), RECIPE, {}),
            r"encoder\.layers\.2\..* is missing: another model's weights",
        ),
        (
            lambda run: run.write_config(small_config(vocab_size=280, encoder_layers=1), RECIPE, {}),
            r"encoder\.layers\.1\..* is unknown: another model's weights",
        ),
    ],
)
def test_a_run_that_lacks_something_is_refused(tmp_path, damage, message):
    damage(write_run(tmp_path))
    with pytest.raises(UserError, match=message) as raised:
        load_model(tmp_path)
    assert "\n" not in str(raised.value)


def test_weights_of_another_dtype_are_refused(tmp_path):
    run = write_run(tmp_path)
    weights, _ = load_tensors(run.model)
    save_tensors(run.model, weights | {"embedding": weights["embedding"].half()}, {})
    with pytest.raises(UserError, match=r"embedding: expected dtype torch\.float32, got torch\.float16"):
        load_model(tmp_path)


def test_a_model_beyond_memory_is_refused_before_it_is_built(tmp_path):
    run = write_run(tmp_path)
    run.write_config(small_config(vocab_size=280, dim=2**16, ffn_dim=2**20, max_length=2**31 - 1), RECIPE, {})
    with pytest.raises(UserError, match=r"decoder\.layers\.0\..*: expected shape \(65536,\), got \(16,\)"):
        load_model(tmp_path)


@given(
    field=st.sampled_from([*to_dict(small_config())]),
    value=st.integers() | st.sampled_from([1, 2, 16, 17, 280, 1000, 2**16, 0.5, True, None, "relu", "gelu", [], {}]),
)
@settings(deadline=None, max_examples=40)
def test_any_model_config_loads_or_is_refused(loaded, field, value):
    """What the weights do not contradict loads: other dropouts, heads that divide, a longer sentence."""
    run, weights = loaded
    values = to_dict(small_config(vocab_size=280)) | {field: value}
    described = {"model": values, "recipe": to_dict(RECIPE), "training": {}}
    run.config.write_text(json.dumps(described))
    try:
        model, _ = load_model(run.folder)
    except UserError as refusal:
        assert "\n" not in str(refusal)  # noqa: PT017
        return
    assert to_dict(model.config) == values
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_a_pipe_is_no_checkpoint(tmp_path):
    run = write_run(tmp_path)
    run.model.unlink()
    os.mkfifo(run.model)
    with pytest.raises(UserError, match=r"model\.safetensors: truncated or damaged \(not a file\)"):
        load_tensors(run.model)


def test_a_folder_whose_name_is_not_utf8(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    write_run(folder)
    model, _ = load_model(folder)
    assert model.config == small_config(vocab_size=280)


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such run folder"):
        load_model(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="no such run folder"):
        load_model(tmp_path / "file")


def test_another_models_weights_leave_the_model_as_it_was():
    model, other = small_model(), small_model(norm_first=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=r"x: decoder\.first_norm\.bias is unknown"):
        load_weights(model, other.state_dict(), Path("x"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_nothing_is_ever_pickled():
    sources = list(Path(checkpoint.__file__).parent.rglob("*.py"))
    assert len(sources) > 10
    for path in sources:
        text = path.read_text("utf-8")
        assert not re.search(r"\bimport (pickle|shelve|marshal|dill)\b|torch\.(load|save)\(", text), path
