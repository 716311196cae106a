"""Encoders of transformers on packed tokens: the same numbers, of fewer rows, and only where nothing can notice."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from padded_models import ENCODERS, MODELS, TOKENS, TRANSLATORS, VALID, apart, encoder_of, inputs, pair, step, stock
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.bert.modeling_bert import BertLayer

import tfm
from tfm import native
from tfm.patching.fusion import fusion_of
from tfm.patching.huggingface.packing import ValidRows, _layout_of

pytestmark = pytest.mark.skipif(
    bool(native.why_unavailable(torch.device("cpu"))), reason="without native kernels a CPU runs everything as before"
)


def rows_seen(model: nn.Module, run: Any) -> set[int]:
    """Returns how many rows the products of matrices inside the encoder's layers have, by what linear() is given."""
    seen: set[int] = set()
    linear = torch.nn.functional.linear
    weights = {x.weight.data_ptr() for x in encoder_of(model).modules() if isinstance(x, nn.Linear)}

    def counting(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight.data_ptr() in weights:
            seen.add(x.shape[:-1].numel())
        return linear(x, weight, bias)

    torch.nn.functional.linear = counting
    try:
        run()
    finally:
        torch.nn.functional.linear = linear
    return seen


def calls(model: Any) -> dict[str, int]:
    """Returns how the calls of the encoder's stack went, by the reason."""
    return dict(fusion_of(encoder_of(model)).calls)


@pytest.mark.parametrize("name", MODELS)
def test_states_loss_and_gradients_are_stocks_and_rows_are_fewer(name: str) -> None:
    model, ours, _ = pair(name)
    assert apart(step(ours, name), step(model, name)) < 1e-5
    assert calls(ours) == {"": 1}
    assert rows_seen(ours, lambda: ours(**inputs(name))) == {TOKENS}
    assert rows_seen(model, lambda: model(**inputs(name))) == {VALID.numel()}


@pytest.mark.parametrize("name", MODELS)
def test_padding_rows_are_zero_and_their_numbers_do_not_matter(name: str) -> None:
    _, ours, _ = pair(name)
    given = {key: x for key, x in inputs(name).items() if key != "labels"}
    encoder = ours.get_encoder() if name in TRANSLATORS else ours
    first = encoder(**given)[0]
    assert torch.equal(first[VALID == 0], torch.zeros_like(first[VALID == 0]))
    given["input_ids"] = torch.where(VALID.bool(), given["input_ids"], 7)
    assert torch.equal(encoder(**given)[0], first)


@pytest.mark.parametrize("name", ["bert", "t5", "bart", "mbart"])
def test_restore_leaves_nothing_behind(name: str) -> None:
    model, ours, _ = pair(name)
    tfm.restore(ours)
    for (path, theirs), (_, mine) in zip(model.named_modules(), ours.named_modules(), strict=True):
        assert type(mine) is type(theirs), path
        assert vars(mine).keys() == vars(theirs).keys(), path
    expected = model(**inputs(name))
    assert torch.equal(ours(**inputs(name))[0], expected[0])


@pytest.mark.parametrize("name", ["bert", "t5", "bart"])
def test_copies_and_pickles_pack_too(name: str) -> None:
    _, ours, _ = pair(name)
    expected = ours(**inputs(name))[0]
    buffer = io.BytesIO()
    pickle.dump(ours, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(ours), pickle.load(buffer)):
        before = calls(other)[""]
        assert torch.equal(other(**inputs(name))[0], expected)
        assert calls(other)[""] == before + 1
    # A copy computes with its own weights.
    other = copy.deepcopy(ours)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    assert not torch.allclose(other(**inputs(name))[0], expected)


@pytest.mark.parametrize("name", ["bert", "t5", "bart"])
def test_classes_are_called_as_before(name: str) -> None:
    model, ours, _ = pair(name)
    theirs, mine = encoder_of(model), encoder_of(ours)
    assert str(mine.__class__) == str(theirs.__class__)
    assert isinstance(mine, type(theirs))
    assert isinstance(mine, PreTrainedModel) == isinstance(theirs, PreTrainedModel)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_inside_can_be_asked_for(name: str) -> None:
    model, ours, _ = pair(name)
    given = inputs(name)
    ours(**given)
    wanted = {"output_hidden_states": True, "output_attentions": True}
    model.set_attn_implementation("eager")
    expected, found = model(**given, **wanted), ours(**given, **wanted)
    prefix = "encoder_" if name in TRANSLATORS else ""
    for x, y in zip(found[f"{prefix}attentions"], expected[f"{prefix}attentions"], strict=True):
        assert x.shape == y.shape
    for x, y in zip(found[f"{prefix}hidden_states"], expected[f"{prefix}hidden_states"], strict=True):
        assert torch.allclose(x[VALID.bool()], y[VALID.bool()], atol=2e-5)
    # What transformers leaves behind for next time does not keep it from packing.
    ours(**given)
    assert calls(ours) == {"": 2, "what is inside is asked for": 1}


def test_hooks_inside_see_padded_rows() -> None:
    _, ours, _ = pair("bert")
    shapes = []
    handle = ours.encoder.layer[1].register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    ours(**inputs("bert"))
    handle.remove()
    ours(**inputs("bert"))
    assert shapes == [(*VALID.shape, 32)]
    assert calls(ours) == {"a BertLayer inside has hooks": 1, "": 1}


def test_hooks_of_the_stack_see_padded_rows() -> None:
    _, ours, _ = pair("bart")
    shapes = []
    ours.get_encoder().register_forward_hook(lambda module, args, output: shapes.append(output[0].shape))
    ours(**inputs("bart"))
    assert shapes == [(*VALID.shape, 32)]
    assert calls(ours) == {"": 1}


def alter_a_layer(model: Any) -> None:
    model.encoder.layer[0] = MyLayer(model.config)


class MyLayer(BertLayer):
    """A user's layer."""


def bind_a_forward(model: Any) -> None:
    linear = model.encoder.layer[0].intermediate.dense
    linear.forward = lambda x: nn.functional.linear(x, linear.weight, linear.bias)


def change_the_attention(model: Any) -> None:
    model.set_attn_implementation("eager")


def run_in_chunks(model: Any) -> None:
    for layer in model.encoder.layer:
        layer.chunk_size_feed_forward = 3


def checkpoint(model: Any) -> None:
    model.gradient_checkpointing_enable()
    model.train()


@pytest.mark.parametrize("alter", [alter_a_layer, bind_a_forward, change_the_attention, run_in_chunks, checkpoint])
def test_what_could_notice_keeps_its_padding(alter: Any) -> None:
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model, ours, _ = pair("bert", **none)
    torch.manual_seed(3)
    alter(model)
    torch.manual_seed(3)
    alter(ours)
    assert apart(step(ours, "bert"), step(model, "bert")) < 1e-5
    assert "" not in calls(ours)


@pytest.mark.parametrize("name", ["bert", "t5", "bart"])
def test_little_padding_and_tokens_apart_stay_padded(name: str) -> None:
    model, ours, _ = pair(name)
    full, apart_ = torch.ones_like(VALID), VALID.clone()
    apart_[0, 1] = 0
    for valid in (full, apart_):
        assert apart(step(ours, name, valid), step(model, name, valid)) < 1e-5
    assert "" not in calls(ours)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_embeddings_may_be_given_instead_of_tokens(name: str) -> None:
    model, ours, _ = pair(name)
    encoders = encoder_of(model), encoder_of(ours)
    x = torch.randn(*VALID.shape, 32)
    theirs, mine = (one(inputs_embeds=x, attention_mask=VALID)[0][VALID.bool()] for one in encoders)
    assert torch.allclose(theirs, mine, atol=1e-5)
    assert calls(ours) == {"": 1}


@pytest.mark.parametrize("name", ["bart", "marian"])
def test_layers_may_be_dropped(name: str) -> None:
    model, ours, _ = pair(name, encoder_layerdrop=0.5, dropout=0.0)
    for seed in range(6):
        results = []
        for one in (model.train(), ours.train()):
            torch.manual_seed(seed)
            results.append(step(one, name)[:2])
        assert all(torch.allclose(x, y, atol=2e-5) for x, y in zip(*results, strict=True))
    assert calls(ours) == {"": 6}


def test_a_layer_that_is_left_as_it_was_does_not_stop_the_others() -> None:
    model = stock("bart")
    ours = copy.deepcopy(model)
    tfm.accelerate(ours, exclude="model.encoder.layers.0")
    assert apart(step(ours, "bart"), step(model, "bart")) < 1e-5


def test_stacks_can_be_excluded() -> None:
    ours = stock("bert")
    report = tfm.accelerate(ours, exclude="layer")
    assert fusion_of(ours.encoder) is None
    assert any(one.name == "encoder" for one in report.left)


@pytest.mark.parametrize("name", ENCODERS)
def test_dropout_has_its_rate(name: str) -> None:
    # With all of a sublayer dropped, what is left is the embedding, normalised again and again.
    rates = {"dropout": 0.5, "attention_dropout": 0.5} if name == "distilbert" else {
        "hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5
    }  # fmt: skip
    model, ours, _ = pair(name, **rates)
    given = inputs(name)
    samples = []
    for one in (model.train(), ours.train()):
        torch.manual_seed(0)
        samples.append(torch.stack([one(**given)[0][VALID.bool()] for _ in range(400)]).detach())
    spread = samples[0].std(0).mean()
    assert (samples[0].mean(0) - samples[1].mean(0)).abs().mean() < 0.1 * spread
    assert abs(samples[1].std(0).mean() / spread - 1) < 0.03


@pytest.mark.parametrize("name", ["bert", "t5", "bart"])
def test_compiled_models_run_whole_and_padded(name: str) -> None:
    model, ours, _ = pair(name)
    given = inputs(name)
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    expected = model(**given)
    found = compiled(**given)
    key, where = ("logits", ...) if name in TRANSLATORS else ("last_hidden_state", VALID.bool())
    assert torch.allclose(found[key][where], expected[key][where], atol=2e-5)


def test_layouts_follow_the_mask() -> None:
    layout, _ = _layout_of(VALID)
    assert isinstance(layout, ValidRows)
    x = torch.randn(*VALID.shape, 3)
    packed = layout.pack(x)
    assert torch.equal(packed, x[VALID.bool()])
    assert torch.equal(layout.unpack(packed), x * VALID[..., None])
    moved = layout.to("cpu")
    assert torch.equal(moved.unpack(packed), x * VALID[..., None])
