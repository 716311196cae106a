"""Fields are checked where they are given, and survive JSON."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import small_config

from tfm.config import PRESETS, Recipe, to_dict
from tfm.errors import UserError
from tfm.records import check


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 15}, "dim: expected a multiple of the 2 heads, got 15"),
        ({"dim": 0}, "dim: expected at least 1, got 0"),
        ({"heads": 0}, "heads: expected at least 1, got 0"),
        ({"vocab_size": 0}, "vocab_size: expected at least 1, got 0"),
        ({"encoder_layers": 0}, "encoder_layers: expected at least 1, got 0"),
        ({"decoder_layers": -1}, "decoder_layers: expected at least 1, got -1"),
        ({"max_length": 0}, "max_length: expected at least 1, got 0"),
        ({"dropout": 1.5}, r"dropout: expected a probability in \[0, 1\], got 1.5"),
        ({"attention_dropout": -0.1}, r"attention_dropout: expected a probability in \[0, 1\], got -0.1"),
        ({"activation_dropout": math.nan}, r"activation_dropout: expected a probability in \[0, 1\], got nan"),
        ({"norm_eps": -1.0}, "norm_eps: expected a finite number from 0, got -1.0"),
        ({"dim": 10**30}, "dim: expected at most 65,536, got 1000000000000000000000000000000"),
        ({"decoder_layers": 10**9}, "decoder_layers: expected at most 1,000, got 1000000000"),
        ({"activation": "relo"}, "activation: expected one of .*relu.*, got 'relo'"),
    ],
    ids=str,
)
def test_model_fields_are_checked(changes, message):
    with pytest.raises(UserError, match=message):
        small_config(**changes)


@pytest.mark.parametrize("field", ["vocab_size", "batch_tokens", "warmup", "max_steps"])
def test_recipe_fields_are_checked(field):
    recipe = PRESETS["tiny"].recipe
    with pytest.raises(UserError, match=f"{field}: expected at least 1, got 0"):
        replace(recipe, **{field: 0})
    with pytest.raises(UserError, match=f"{field}: expected at most [0-9,]*, got 1000"):
        replace(recipe, **{field: 10**400})


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("label_smoothing", math.nan, r"a number in \[0, 1\]"),
        ("label_smoothing", 1.5, r"a number in \[0, 1\]"),
        ("learning_rate", math.inf, "a finite number from 0"),
        ("clip_norm", math.nan, "a finite number from 0"),
        ("clip_norm", -1.0, "a finite number from 0"),
        ("adam_eps", -1.0, "a finite number from 0"),
        ("betas", (0.9, 2.0), r"two numbers in \[0, 1\)"),
        ("betas", (math.nan, 0.9), r"two numbers in \[0, 1\)"),
    ],
)
def test_recipe_numbers_are_checked(field, value, expected):
    with pytest.raises(UserError, match=f"{field}: expected {expected}, got {re.escape(str(value))}"):
        replace(PRESETS["tiny"].recipe, **{field: value})


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_json(name):
    preset = PRESETS[name]
    config = preset.config(1000, norm_first=True)
    for value in (config, preset.recipe):
        assert check(type(value), json.loads(json.dumps(to_dict(value))), "") == value


def test_a_preset_may_be_changed():
    config = PRESETS["tiny"].config(9712, dropout=0.5)
    assert (config.vocab_size, config.dim, config.dropout) == (9712, 128, 0.5)
    assert PRESETS["tiny"].config(9712).dropout == 0.3


@given(warmup=st.integers(1, 5000), step=st.integers(1, 10**6), peak=st.floats(1e-6, 1.0))
@settings(deadline=None)
def test_learning_rate_is_equation_3(warmup, step, peak):
    """The paper's min(step^-0.5, step · warmup^-1.5), scaled so that the peak is `learning_rate`."""
    recipe = Recipe(vocab_size=300, batch_tokens=100, learning_rate=peak, warmup=warmup, max_steps=10)
    paper = min(step**-0.5, step * warmup**-1.5)
    assert recipe.learning_rate_at(step) == pytest.approx(peak * warmup**0.5 * paper, rel=1e-12)
    assert recipe.learning_rate_at(step) <= recipe.learning_rate_at(warmup) == peak


def test_linear_schedule_falls_to_zero_behind_the_last_update():
    recipe = replace(PRESETS["demo"].recipe, warmup=10, max_steps=100, learning_rate=1.0, schedule="linear")
    assert recipe.learning_rate_at(5) == pytest.approx(0.5)
    assert recipe.learning_rate_at(10) == pytest.approx(1.0)
    assert recipe.learning_rate_at(100) == pytest.approx(1 / 91)
    assert recipe.learning_rate_at(101) == recipe.learning_rate_at(500) == 0.0
    with pytest.raises(UserError, match=r"schedule: expected one of inverse_sqrt, linear, got 'cosine'"):
        replace(recipe, schedule="cosine")
