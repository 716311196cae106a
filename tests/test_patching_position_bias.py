"""T5's position bias by distance: the same numbers and gradients, in whole passes, from a cache and in generation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from padded_models import VALID, apart, inputs, pair, step
from torch import Tensor
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

import tfm
from tfm import native, ops
from tfm.patching.fusion import fusions

pytestmark = pytest.mark.skipif(
    bool(native.why_unavailable(torch.device("cpu"))), reason="without native kernels a CPU runs everything as before"
)
NAMES = ["t5", "flan-t5", "umt5"]


def biases_given(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    """Has every attention note its mask and its bias by distance."""
    seen: list[tuple[Any, Any]] = []

    def noting(function: Any) -> Any:
        def noted(*args: Any, **kwargs: Any) -> Any:
            mask = args[3] if len(args) > 3 and function is attention else None
            seen.append((mask, kwargs.get("relative_bias")))
            return function(*args, **kwargs)

        return noted

    attention, varlen_attention = ops.attention, ops.varlen_attention
    monkeypatch.setattr(ops, "attention", noting(attention))
    monkeypatch.setattr(ops, "varlen_attention", noting(varlen_attention))
    return seen


@pytest.mark.parametrize("name", NAMES)
def test_biases_are_by_distance_and_crossing_has_none(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours, _ = pair(name)
    seen = biases_given(monkeypatch)
    ours(**inputs(name))
    # Two layers of the encoder, and in each of two of the decoder, its own sequence and the encoder's.
    assert len(seen) == 6
    assert sum(bias is not None for _, bias in seen) == 4
    assert all(bias is None or bias.shape == (4, 11) for _, bias in seen)
    if name != "umt5":
        assert all(mask is None or not mask.is_floating_point() for mask, _ in seen)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("valid", [VALID, torch.ones_like(VALID)], ids=["padded", "full"])
def test_gradients_of_the_table_are_stocks_and_the_same_each_time(name: str, valid: Tensor) -> None:
    model, ours, _ = pair(name)
    first, again = step(ours, name, valid), step(ours, name, valid)
    assert apart(first, step(model, name, valid)) < 1e-5
    tables = [path for path in first[2] if "relative_attention_bias" in path]
    assert tables
    for path in tables:
        assert torch.equal(first[2][path], again[2][path])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_says_the_same(name: str, cache: str) -> None:
    model, ours, _ = pair(name)
    given = {key: x for key, x in inputs(name).items() if key != "labels"}
    options: dict[str, Any] = {
        "max_new_tokens": 9,
        "min_new_tokens": 9,
        "do_sample": False,
        "cache_implementation": cache,
    }
    assert torch.equal(ours.generate(**given, **options), model.generate(**given, **options))
    beams = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    assert torch.equal(ours.generate(**given, **beams), model.generate(**given, **beams))


@pytest.mark.parametrize("name", NAMES)
def test_several_tokens_follow_a_filled_cache(name: str) -> None:
    model, ours, _ = pair(name)
    given = {key: x for key, x in inputs(name).items() if key != "labels"}
    tokens = torch.randint(4, 99, (len(VALID), 9), generator=torch.Generator().manual_seed(2))
    results = []
    for one in (model, ours):
        head = one(**given, decoder_input_ids=tokens[:, :4], use_cache=True)
        encoded = (head.encoder_last_hidden_state,)
        more = one(
            attention_mask=VALID, encoder_outputs=encoded, decoder_input_ids=tokens[:, 4:],
            past_key_values=head.past_key_values, use_cache=True,
        )  # fmt: skip
        results.append(more.logits)
    assert torch.allclose(*results, atol=2e-5)


def test_a_table_with_a_hook_is_called() -> None:
    model, ours, _ = pair("t5")
    fired = []
    for stack in (ours.encoder, ours.decoder):
        table = stack.block[0].layer[0].SelfAttention.relative_attention_bias
        table.register_forward_hook(lambda *given: fired.append(1))
    assert apart(step(ours, "t5"), step(model, "t5")) < 1e-5
    assert len(fired) == 2


def test_switch_transformers_have_it_too() -> None:
    torch.manual_seed(0)
    config = SwitchTransformersConfig(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4, vocab_size=99, num_experts=2,
        expert_capacity=64, decoder_start_token_id=0, relative_attention_num_buckets=8,
        relative_attention_max_distance=5,
    )  # fmt: skip
    model = SwitchTransformersForConditionalGeneration(config).eval()
    ours = copy.deepcopy(model)
    tfm.accelerate(ours)
    assert apart(step(ours, "t5"), step(model, "t5")) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_calls_that_run_as_before_have_a_dense_bias(name: str) -> None:
    model, ours, _ = pair(name)
    for _, _, fusion in fusions(ours):
        fusion.always_plain = "for this test"
    assert apart(step(ours, name), step(model, name)) < 1e-5
    given = {key: x for key, x in inputs(name).items() if key != "labels"}
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(ours.generate(**given, **options), model.generate(**given, **options))
