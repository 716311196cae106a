"""Layers with open residual connections: known by their text, the same numbers, and children that are still called."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from padded_models import VALID, apart, inputs, pair, step
from torch import Tensor, nn
from transformers.models.bart.modeling_bart import BartDecoderLayer, BartEncoderLayer
from transformers.models.blenderbot.modeling_blenderbot import BlenderbotDecoderLayer, BlenderbotEncoderLayer
from transformers.models.m2m_100.modeling_m2m_100 import M2M100DecoderLayer, M2M100EncoderLayer
from transformers.models.marian.modeling_marian import MarianDecoderLayer, MarianEncoderLayer
from transformers.models.mbart.modeling_mbart import MBartDecoderLayer, MBartEncoderLayer
from transformers.models.pegasus.modeling_pegasus import PegasusDecoderLayer, PegasusEncoderLayer
from transformers.models.whisper.modeling_whisper import WhisperDecoderLayer, WhisperEncoderLayer

import tfm
from tfm import native
from tfm.patching.fusion import fusion_of
from tfm.patching.huggingface.layers import POST_DECODER, POST_ENCODER, PRE_DECODER, PRE_ENCODER, template_of

needs_kernels = pytest.mark.skipif(
    bool(native.why_unavailable(torch.device("cpu"))), reason="without native kernels a CPU runs everything as before"
)
NAMES = ["bart", "marian", "mbart"]
NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}


@pytest.mark.parametrize(
    ("kinds", "template"),
    [
        ((BartEncoderLayer, MarianEncoderLayer), POST_ENCODER),
        ((BartDecoderLayer, MarianDecoderLayer), POST_DECODER),
        ((MBartEncoderLayer, PegasusEncoderLayer, M2M100EncoderLayer, BlenderbotEncoderLayer), PRE_ENCODER),
        ((MBartDecoderLayer, PegasusDecoderLayer, M2M100DecoderLayer, BlenderbotDecoderLayer), PRE_DECODER),
        ((WhisperEncoderLayer,), PRE_ENCODER),
        ((WhisperDecoderLayer,), PRE_DECODER),
    ],
)
def test_layers_are_known_by_their_text(kinds: tuple[type[nn.Module], ...], template: Any) -> None:
    for kind in kinds:
        assert template_of(kind) == template, kind


class Scaled(BartEncoderLayer):
    """A layer whose forward has another text."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor, **kwargs: Any) -> Tensor:
        return 2 * super().forward(hidden_states, attention_mask, **kwargs)


def test_a_forward_of_another_text_is_left() -> None:
    assert template_of(Scaled) is None


def layer_calls(model: Any) -> dict[str, int]:
    """Returns how the calls of the first layer of encoder and decoder went."""
    layers = model.model.encoder.layers[0], model.model.decoder.layers[0]
    return dict(sum((fusion_of(layer).calls for layer in layers), start=type(fusion_of(layers[0]).calls)()))


@needs_kernels
@pytest.mark.parametrize("name", NAMES)
def test_training_gives_stocks_loss_and_gradients(name: str) -> None:
    model, ours, _ = pair(name, **NO_DROPOUT)
    model.train(), ours.train()
    for valid in (VALID, torch.ones_like(VALID)):
        assert apart(step(ours, name, valid), step(model, name, valid)) < 1e-5
    assert layer_calls(ours) == {"": 4}


@needs_kernels
@pytest.mark.parametrize("name", NAMES)
def test_each_dropout_has_its_rate(name: str) -> None:
    for rates in ({"dropout": 0.5}, {"activation_dropout": 0.5}):
        model, ours, _ = pair(name, **{**NO_DROPOUT, **rates})
        given = inputs(name)
        samples = []
        for one in (model, ours):
            one.train()
            torch.manual_seed(0)
            samples.append(torch.stack([one(**given).logits.detach() for _ in range(200)]))
        spread = samples[0].std(0)
        assert (samples[0].mean(0) - samples[1].mean(0)).abs().mean() < 0.12 * spread.mean()
        assert abs(samples[1].std(0).mean() / spread.mean() - 1) < 0.05
        assert layer_calls(ours) == {"": 400}


class LowRank(nn.Module):
    """What adapters put in the place of a linear layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x.mean(-1, keepdim=True)


@needs_kernels
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", ["fc1", "fc2", "self_attn.out_proj"])
def test_adapters_inside_are_called(name: str, place: str) -> None:
    model, ours, _ = pair(name)
    for one in (model, ours):
        for layer in (*one.model.encoder.layers, *one.model.decoder.layers):
            parent, _, child = place.rpartition(".")
            owner = layer.get_submodule(parent)
            setattr(owner, child, LowRank(getattr(owner, child)))
    assert apart(step(ours, name), step(model, name)) < 1e-5
    assert layer_calls(ours) == {"": 2}


@needs_kernels
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("place", "reason"), [("fc1", ""), ("final_layer_norm", "final_layer_norm carries hooks"), ("self_attn", "")]
)
def test_hooks_inside_are_called(name: str, place: str, reason: str) -> None:
    model, ours, _ = pair(name)
    fired = []
    for one in (model, ours):
        child = one.model.decoder.layers[0].get_submodule(place)
        child.register_forward_hook(lambda module, args, output: fired.append(module))
    assert apart(step(ours, name), step(model, name)) < 1e-5
    assert len(fired) == 2
    assert set(layer_calls(ours)) == {"", reason}


@needs_kernels
@pytest.mark.parametrize("name", NAMES)
def test_checkpointed_layers_compute_the_same(name: str) -> None:
    model, ours, _ = pair(name, **NO_DROPOUT, use_cache=False)
    for one in (model, ours):
        one.train()
        one.gradient_checkpointing_enable()
    assert apart(step(ours, name), step(model, name)) < 1e-5
    # Forward, and again when the backward asks.
    assert layer_calls(ours) == {"": 4}


@needs_kernels
@pytest.mark.parametrize("name", NAMES)
def test_generation_says_the_same(name: str) -> None:
    model, ours, _ = pair(name)
    given = {key: x for key, x in inputs(name).items() if key != "labels"}
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "num_beams": 2, "do_sample": False}
    assert torch.equal(ours.generate(**given, **options), model.generate(**given, **options))


@needs_kernels
@pytest.mark.parametrize("name", NAMES)
def test_restored_and_copied_layers(name: str) -> None:
    model, ours, _ = pair(name)
    expected = ours(**inputs(name)).logits
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other(**inputs(name)).logits, expected)
    tfm.restore(ours)
    for (path, theirs), (_, mine) in zip(model.named_modules(), ours.named_modules(), strict=True):
        assert type(mine) is type(theirs), path
        assert vars(mine).keys() == vars(theirs).keys(), path
    assert torch.equal(ours(**inputs(name)).logits, model(**inputs(name)).logits)
