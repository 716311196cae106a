"""config.json, paths.json and a state's metadata: what is valid loads as it is, all else is one line."""

from __future__ import annotations

import copy
import json
import math
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from altered_json import altered, check_line
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic_core import from_json
from samples import small_config

from tfm.checkpoint import Run
from tfm.cli.runs import read_started
from tfm.cli.texts import Texts
from tfm.config import PRESETS, Recipe, TransformerConfig, to_dict
from tfm.errors import UserError
from tfm.records import Place, check
from tfm.train import Options

RECIPE = PRESETS["tiny"].recipe
CONFIG = {
    "model": to_dict(small_config()),
    "recipe": to_dict(RECIPE),
    "training": {
        "command": "train",
        "preset": "tiny",
        "device": "cpu",
        "threads": 2,
        "options": asdict(Options()),
        "text_sha256": "0" * 64,
        "tokenizer_sha256": "1" * 64,
    },
}
PATHS = {"source": "file:///a%20b/caf%E9.fr", "target": "file:///a.en", "valid_source": None, "valid_target": None}
PLACE = {"step": 20, "epoch": 1, "batch": 3, "loss_steps": 0}


def read(folder: Path) -> tuple[TransformerConfig, Recipe, Options, Texts]:
    run = Run(folder)
    config, recipe, described = run.read_config()
    _, options, texts = read_started(run, described)
    return config, recipe, options, texts


def written(folder: Path, config: bytes | None = None, paths: bytes | None = None) -> Path:
    (folder / "config.json").write_bytes(json.dumps(CONFIG).encode() if config is None else config)
    (folder / "paths.json").write_bytes(json.dumps(PATHS).encode() if paths is None else paths)
    return folder


# What is valid


def test_config_and_paths_come_back(tmp_path):
    texts = Texts(Path(os.fsdecode(b"/a b/caf\xe9.fr")), Path("/a.en"))
    assert read(written(tmp_path)) == (small_config(), RECIPE, Options(), texts)
    assert json.loads((tmp_path / "paths.json").read_text()) == PATHS
    texts.write(Run(tmp_path))
    assert json.loads((tmp_path / "paths.json").read_text()) == PATHS


def test_a_run_older_than_paths_json_loads(tmp_path):
    config = copy.deepcopy(CONFIG)
    config["training"] |= {"source": "/größe.de", "target": "/x", "valid_source": None, "valid_target": None}
    written(tmp_path, json.dumps(config, ensure_ascii=False).encode())
    (tmp_path / "paths.json").unlink()
    assert read(tmp_path)[3] == Texts(Path("/größe.de"), Path("/x"))


def test_whole_numbers_serve_as_floats(tmp_path):
    config = copy.deepcopy(CONFIG)
    config["model"]["dropout"], config["recipe"]["betas"] = 0, [0, 0.98]
    assert read(written(tmp_path, json.dumps(config).encode()))[:2] == (
        small_config(),
        replace(RECIPE, betas=(0.0, 0.98)),
    )


sizes = st.integers(1, 2**16)


@given(
    config=st.builds(
        lambda heads, width, **fields: TransformerConfig(dim=heads * width, heads=heads, **fields),
        heads=st.integers(1, 2**8),
        width=st.integers(1, 2**8),
        vocab_size=sizes,
        ffn_dim=sizes,
        encoder_layers=st.integers(1, 1000),
        dropout=st.floats(0, 1),
        norm_first=st.booleans(),
        norm_eps=st.floats(0, 1),
        max_length=sizes,
    ),
    recipe=st.builds(
        Recipe,
        vocab_size=sizes,
        batch_tokens=sizes,
        learning_rate=st.floats(0, 1e9),
        warmup=sizes,
        max_steps=st.integers(1, 2**31 - 1),
        betas=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
        schedule=st.sampled_from(["inverse_sqrt", "linear"]),
    ),
    options=st.builds(Options, seed=st.integers(0, 2**63 - 1), interval=st.none() | sizes, keep=sizes),
)
@settings(deadline=None, max_examples=40)
def test_every_valid_config_loads(tmp_path_factory, config, recipe, options):
    run = Run(tmp_path_factory.mktemp("run"))
    run.write_config(config, recipe, CONFIG["training"] | {"options": asdict(options)})
    assert read(run.folder)[:3] == (config, recipe, options)


# What is not


@pytest.mark.parametrize(
    ("part", "field", "value", "message"),
    [
        ("recipe", "betas", [1], "recipe.betas.1: missing"),
        ("recipe", "betas", ["a", "b"], "recipe.betas.0: expected a valid number, got 'a'"),
        ("recipe", "betas", [0.9, 2.0], "betas: expected two numbers in [0, 1), got (0.9, 2.0)"),
        ("recipe", "adam_eps", -1, "adam_eps: expected a finite number from 0, got -1.0"),
        ("recipe", "batch_tokens", 10**400, "batch_tokens: expected at most 2,147,483,647, got 1000000"),
        ("model", "dim", 10**30, "dim: expected at most 65,536, got 1000000"),
        ("model", "dim", "16", "model.dim: expected a valid integer, got '16'"),
        ("model", "dim", 16.0, "model.dim: expected a valid integer, got 16.0"),
        ("model", "dim", 15, "dim: expected a multiple of the 2 heads, got 15"),
        ("model", "norm_first", 1, "model.norm_first: expected a valid boolean, got 1"),
        ("model", "norm_eps", None, "model.norm_eps: expected a valid number, got None"),
        ("model", "colour", 1, "model.colour: unknown"),
        ("training", "threads", 0, "training: threads: expected greater than or equal to 1, got 0"),
        ("training", "threads", -3, "training: threads: expected greater than or equal to 1, got -3"),
        ("training", "threads", "a", "training: threads: expected a valid integer, got 'a'"),
        ("training", "device", "tpu", "training: device: expected 'auto', 'cpu' or 'cuda', got 'tpu'"),
        ("options", "seed", "x", "training.options: seed: expected a valid integer, got 'x'"),
        ("options", "seed", 10**30, "training.options: seed: expected a number from 0 to 2**63 - 1, got 1000000"),
        ("options", "keep", 1.5, "training.options: keep: expected a valid integer, got 1.5"),
        ("options", "tokenize", "moses", "training.options: tokenize: expected one of 13a, "),
    ],
)
def test_config_by_hand(tmp_path, part, field, value, message):
    config = copy.deepcopy(CONFIG)
    (config["training"]["options"] if part == "options" else config[part])[field] = value
    with pytest.raises(UserError) as raised:
        read(written(tmp_path, json.dumps(config).encode()))
    assert str(raised.value).startswith(f"{tmp_path / 'config.json'}: {message}")
    check_line(raised.value, tmp_path)


@pytest.mark.parametrize(("part", "field"), [(part, field) for part in ("model", "recipe") for field in CONFIG[part]])
def test_no_field_has_a_default_in_a_file(tmp_path, part, field):
    """A gelu model whose config.json has lost its activation would translate as a relu one."""
    config = copy.deepcopy(CONFIG)
    del config[part][field]
    with pytest.raises(UserError, match=rf"config\.json: {part}\.{field}: missing$"):
        read(written(tmp_path, json.dumps(config).encode()))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "damaged (EOF while parsing"),
        (b"[" * 100_000, "damaged (recursion limit exceeded"),
        (b'{"model": ' + b"[" * 900 + b"]" * 900 + b"}", "damaged (recursion limit exceeded"),
        (b"\xff", "damaged (expected value"),
        (b"[]", "expected an object, got []"),
        (b"null", "expected an object, got None"),
        (b'{"model": {}}', "model.vocab_size: missing"),
        (json.dumps(CONFIG).replace('"dim"', '"dime"').encode(), "model.dime: unknown"),
    ],
)
def test_a_damaged_config(tmp_path, data, message):
    with pytest.raises(UserError) as raised:
        read(written(tmp_path, data))
    assert str(raised.value).startswith(f"{tmp_path / 'config.json'}: {message}")


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ({"source": "http://[a"}, "'http://[a': not a URI (Invalid IPv6 URL)"),
        ({"source": "file:///a%00b"}, "'/a\\x00b': not a path"),
        ({"source": 3}, "source: expected a valid string, got 3"),
        ([], "expected an object, got []"),
    ],
)
def test_paths_by_hand(tmp_path, paths, message):
    with pytest.raises(UserError) as raised:
        read(written(tmp_path, paths=json.dumps(paths).encode()))
    assert str(raised.value) == f"{tmp_path / 'paths.json'}: {message}"


@given(data=altered(CONFIG))
@settings(deadline=None, max_examples=200)
def test_any_config_loads_or_is_refused(tmp_path_factory, data):
    folder = written(tmp_path_factory.mktemp("run"), data)
    try:
        config, recipe, options, _ = read(folder)
    except UserError as refusal:
        check_line(refusal, folder)
        return
    # What was taken is what stands there, can be worked with, and written again.
    raw = from_json(data)
    assert to_dict(config) == raw["model"]
    assert to_dict(recipe) == raw["recipe"] | {"betas": tuple(raw["recipe"]["betas"])}
    assert config.dim % config.heads == 0
    assert all(math.isfinite(recipe.learning_rate_at(step)) for step in (1, recipe.warmup, recipe.max_steps))
    run = Run(folder)
    run.write_config(config, recipe, run.read_config()[2] | {"options": asdict(options)})
    assert read(folder)[:3] == (config, recipe, options)


@given(data=altered(PATHS))
@settings(deadline=None, max_examples=100)
def test_any_paths_load_or_are_refused(tmp_path_factory, data):
    folder = written(tmp_path_factory.mktemp("run"), paths=data)
    try:
        texts = read(folder)[3]
    except UserError as refusal:
        check_line(refusal, folder)
        return
    for path in filter(None, vars(texts).values()):
        path.exists()


@given(data=altered(PLACE))
@settings(deadline=None, max_examples=100)
def test_any_place_is_read_or_refused(data):
    try:
        metadata = json.loads(data)
    except ValueError:
        return
    try:
        place = check(Place, metadata, "state")
    except UserError as refusal:
        check_line(refusal, Path("state"))
        return
    assert all(type(number) is int for number in vars(place).values())
    assert max(place.epoch, place.batch, place.loss_steps) <= place.step
