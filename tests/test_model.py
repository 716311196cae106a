"""The bundled model is the paper's: equal to torch.nn.Transformer, weight for weight and gradient for gradient."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import batch_of, run_model, small_model
from torch import Tensor, nn
from torch.func import functional_call
from torch.testing import assert_close

from tfm import ops
from tfm.config import PRESETS
from tfm.data import Batch
from tfm.model import Transformer
from tfm.sequences import Ragged
from tfm.tokenizer import PAD

EXACT = {"rtol": 1e-10, "atol": 1e-10}
RAGGED = [(5, 3), (1, 7), (9, 1), (4, 4), (2, 6)]

lengths = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=6)


def torch_transformer(model: Transformer) -> nn.Transformer:
    """torch's own modules of the same shape, in train mode; a post-norm stack has no norm of its own at the end."""
    config = model.config
    shape = (config.dim, config.heads, config.ffn_dim, 0.0, config.activation, config.norm_eps, True, config.norm_first)
    encoder_layer = nn.TransformerEncoderLayer(*shape, dtype=torch.float64)
    decoder_layer = nn.TransformerDecoderLayer(*shape, dtype=torch.float64)
    norms = [nn.LayerNorm(config.dim, dtype=torch.float64) if config.norm_first else None for _ in range(2)]
    return nn.Transformer(
        config.dim,
        config.heads,
        batch_first=True,
        custom_encoder=nn.TransformerEncoder(
            encoder_layer, config.encoder_layers, norms[0], enable_nested_tensor=False
        ),
        custom_decoder=nn.TransformerDecoder(decoder_layer, config.decoder_layers, norms[1]),
    )


def torch_weights(model: Transformer) -> dict[str, Tensor]:
    """Our parameters under torch's names: concatenations and slices, so that gradients reach ours."""
    ours = dict(model.named_parameters())
    weights = {}

    def copy(theirs: str, name: str) -> None:
        weights[f"{theirs}.weight"], weights[f"{theirs}.bias"] = ours[f"{name}.weight"], ours[f"{name}.bias"]

    for stack in ("encoder", "decoder"):
        norms = [f"{stack}.first_norm"] if model.config.norm_first else []
        layers = len(getattr(model, stack).layers)
        for k in range(layers):
            layer = f"{stack}.layers.{k}"
            copy(f"{layer}.self_attn.out_proj", f"{layer}.self_attention.output")
            copy(f"{layer}.linear1", f"{layer}.feed_forward.inner")
            copy(f"{layer}.linear2", f"{layer}.feed_forward.outer")
            for part in ("weight", "bias"):
                weights[f"{layer}.self_attn.in_proj_{part}"] = ours[f"{layer}.self_attention.projection.{part}"]
            norms.append(f"{layer}.self_attention_norm")
            if stack == "decoder":
                copy(f"{layer}.multihead_attn.out_proj", f"{layer}.cross_attention.output")
                for part in ("weight", "bias"):
                    # The stack's one projection of the memory holds keys and values of layer 0, then of layer 1, ...
                    key_value = ours[f"decoder.memory_projection.{part}"].chunk(layers)[k]
                    query = ours[f"{layer}.cross_attention.projection.{part}"]
                    weights[f"{layer}.multihead_attn.in_proj_{part}"] = torch.cat((query, key_value))
                norms.append(f"{layer}.cross_attention_norm")
            norms.append(f"{layer}.feed_forward_norm")
        # In their order of use both have the same norms; pre-norm shifts them by one sublayer, the last is the stack's.
        per_layer = 2 if stack == "encoder" else 3
        for place, name in enumerate(norms):
            k, norm = divmod(place, per_layer)
            copy(f"{stack}.layers.{k}.norm{norm + 1}" if k < layers else f"{stack}.norm", name)
    return weights


def paper_positions(length: int, dim: int) -> Tensor:
    """Section 3.5, element by element."""
    rows = [
        [math.cos(p / 10000 ** ((c - 1) / dim)) if c % 2 else math.sin(p / 10000 ** (c / dim)) for c in range(dim)]
        for p in range(length)
    ]
    return torch.tensor(rows, dtype=torch.float64)


def torch_loss(model: Transformer, batch: Batch, label_smoothing: float) -> Tensor:
    """The loss by torch.nn.Transformer on the padded batch, with our parameters."""
    source, target_input = batch.source.padded(), batch.target_input.padded()
    target_output = batch.target_input.layout.unpack(batch.target_output)
    positions = paper_positions(max(source.shape[1], target_input.shape[1]), model.config.dim)

    def embed(tokens: Tensor) -> Tensor:
        return model.embedding[tokens] * model.config.dim**0.5 + positions[: tokens.shape[1]]

    padding = source == PAD
    hidden = functional_call(
        torch_transformer(model),
        torch_weights(model),
        (embed(source), embed(target_input)),
        {
            "tgt_mask": torch.ones(target_input.shape[1], target_input.shape[1], dtype=torch.bool).triu(1),
            "src_key_padding_mask": padding,
            "memory_key_padding_mask": padding,
        },
        strict=True,
    )
    logits = F.linear(hidden, model.embedding).flatten(0, 1)
    return F.cross_entropy(logits, target_output.flatten(), ignore_index=PAD, label_smoothing=label_smoothing)


@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_equals_torch_nn_transformer(norm_first, activation, label_smoothing):
    model = small_model(norm_first=norm_first, activation=activation, encoder_layers=3, decoder_layers=2)
    batch = batch_of(RAGGED)
    loss = model.loss(run_model(model, batch), batch.target_output, label_smoothing)
    expected = torch_loss(model, batch, label_smoothing)
    assert_close(loss, expected, **EXACT)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters)
    for name, ours, theirs in zip(names, gradients, torch.autograd.grad(expected, parameters), strict=True):
        assert_close(ours, theirs, **EXACT, msg=lambda text, name=name: f"{name}: {text}")
        assert ours.abs().max() > 1e-6, f"{name}: the test says nothing about it"


@given(lengths=lengths, norm_first=st.booleans())
@settings(deadline=None, max_examples=25)
def test_a_packed_batch_is_its_sentences_one_by_one(lengths, norm_first):
    model = small_model(norm_first=norm_first).eval()
    batch = batch_of(lengths)
    packed = run_model(model, batch).split(batch.target_input.layout.lengths.tolist())
    sides = (side.values.split(side.layout.lengths.tolist()) for side in (batch.source, batch.target_input))
    for source, target, expected in zip(*sides, packed, strict=True):
        assert_close(model(Ragged.of([source.tolist()]), Ragged.of([target.tolist()])), expected, **EXACT)


@given(data=st.data(), length=st.integers(2, 12))
@settings(deadline=None, max_examples=25)
def test_no_token_sees_a_later_one(data, length):
    model = small_model().eval()
    batch = batch_of([(4, length), (3, 5)])
    before = run_model(model, batch)
    place = data.draw(st.integers(0, length - 1))
    batch.target_input.values[place] = 3 + (batch.target_input.values[place] - 2) % 20
    after = run_model(model, batch)
    changed = (before != after).any(dim=1)
    # What follows in the same sentence changes, the next sentence does not.
    assert changed.tolist() == [place <= position < length for position in range(length + 5)]


def test_embeddings_are_tied_scaled_and_placed():
    model = small_model().eval()
    names = [name for name, p in model.named_parameters() if model.config.vocab_size in p.shape]
    assert names == ["embedding"]
    tokens, positions = torch.tensor([3, 3, 7, 22]), torch.tensor([0, 1, 2, 31])
    embedded = model.embed(tokens, positions, None, site=0)
    assert_close(embedded, model.embedding[tokens] * 4 + paper_positions(32, 16)[positions], **EXACT)
    hidden = torch.randn(2, 3, 16, dtype=torch.float64)
    assert_close(model.logits(hidden), hidden @ model.embedding.T, **EXACT)


def test_initial_loss_is_that_of_no_knowledge():
    """Xavier weights, N(0, 1 / dim) embeddings: the first predictions are about uniform."""
    config = PRESETS["tiny"].config(1000, dropout=0.0)
    model, batch = Transformer(config), batch_of([(20, 20)] * 20, 1000)
    assert model.loss(run_model(model, batch), batch.target_output).item() == pytest.approx(math.log(1000), rel=0.15)


def parameter_count(preset: str, vocab_size: int) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Transformer(PRESETS[preset].config(vocab_size)).parameters())


def test_tiny_has_as_many_parameters_as_published():
    assert parameter_count("tiny", 9712) == 2_568_192


@pytest.mark.parametrize(("preset", "published"), [("base", 65e6), ("big", 213e6)])
def test_presets_have_the_papers_parameters(preset, published):
    """Table 3, which counts by a vocabulary of about 37000."""
    shape = PRESETS[preset].model
    dim, ffn_dim, layers = shape["dim"], shape["ffn_dim"], shape["encoder_layers"]
    attention, feed_forward, norm = 4 * (dim * dim + dim), 2 * dim * ffn_dim + ffn_dim + dim, 2 * dim
    encoder, decoder = attention + feed_forward + 2 * norm, 2 * attention + feed_forward + 3 * norm
    count = parameter_count(preset, 37000)
    assert count == 37000 * dim + layers * (encoder + decoder)
    assert count == pytest.approx(published, rel=0.03)


# Dropout


DROPS = {"dropout": 0.2, "attention_dropout": 0.1, "activation_dropout": 0.3}


def test_every_dropout_draws_its_own_mask(monkeypatch):
    model, calls = small_model(**DROPS, encoder_layers=3), []

    def recording(operation):
        def call(*args, **kwargs):
            given = inspect.signature(operation).bind(*args, **kwargs).arguments
            calls.append((given["site"], given["dropout_p"], given["seed"].item()))
            return operation(*args, **kwargs)

        return call

    for name in ("embedding", "varlen_attention", "residual_layer_norm", "feed_forward"):
        monkeypatch.setattr(ops, name, recording(getattr(ops, name)))
    run_model(model, batch_of(RAGGED))
    sites, rates, seeds = zip(*calls, strict=True)
    # Two embeddings; in a layer attention, feed-forward and a residual behind each, and the decoder's second attention.
    assert len(sites) == len(set(sites)) == 2 + 3 * 4 + 2 * 6
    assert sorted(rates) == sorted([0.2] * (2 + 3 * 2 + 2 * 3) + [0.1] * (3 + 2 * 2) + [0.3] * (3 + 2))
    assert len(set(seeds)) == 1


@pytest.mark.parametrize("which", DROPS)
def test_dropout_is_repeatable_and_new_each_step(which):
    model, batch = small_model(**{which: 0.3}), batch_of(RAGGED)

    def steps():
        torch.manual_seed(3)
        return [run_model(model, batch) for _ in range(3)]

    first, second = steps(), steps()
    for a, b in zip(first, second, strict=True):
        assert_close(a, b, rtol=0, atol=0)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[1], first[2])


def test_nothing_is_drawn_where_nothing_is_dropped():
    batch = batch_of(RAGGED)
    for model in (small_model(**DROPS).eval(), small_model()):
        state = torch.get_rng_state()
        run_model(model, batch)
        assert torch.equal(torch.get_rng_state(), state)


def test_dropping_everything_leaves_the_norms():
    """With p = 1 the embeddings and every sublayer give 0: what remains is the decoder's norms, one after the other."""
    model = small_model(dropout=1.0)
    hidden = run_model(model, batch_of(RAGGED))
    x = torch.zeros(16, dtype=torch.float64)
    for layer in model.decoder.layers:
        for norm in (layer.self_attention_norm, layer.cross_attention_norm, layer.feed_forward_norm):
            x = F.layer_norm(x, (16,), norm.weight, norm.bias, norm.eps)
    assert_close(hidden, x.expand_as(hidden), **EXACT)


# Precision


@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
def test_autocast_is_near_fp32(norm_first):
    model, batch = small_model(torch.float32, spread=0.05, norm_first=norm_first), batch_of(RAGGED)
    expected = model.loss(run_model(model, batch), batch.target_output, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = run_model(model, batch)
        loss = model.loss(hidden, batch.target_output, 0.1)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=0.02)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
