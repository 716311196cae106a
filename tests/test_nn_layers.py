"""Encoder and decoder layers against torch's: masks, constructors, dropout, copies."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from layer_cases import (
    BATCH,
    CONSTRUCTORS,
    DIM,
    HEADS,
    HIDDEN,
    MASKS,
    SOURCES,
    TARGETS,
    decoder_call,
    encoder_call,
    make,
    tokens,
    valid,
)
from oracle import assert_matches
from torch import Tensor
from torch_pairs import assert_equal_results, results

import tfm.nn
from tfm import ops
from tfm.reference.dropout import dropout, keep_mask, keep_scale


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("constructor", CONSTRUCTORS)
def test_encoder_layer_equals_torch(constructor: str, mask: str) -> None:
    options = CONSTRUCTORS[constructor]
    theirs, ours = make("Encoder", **options)
    batch_first = options.get("batch_first", False)
    call = encoder_call(mask)
    keep = valid(call, "src_key_padding_mask", SOURCES, batch_first)
    inputs = {"src": tokens(SOURCES, batch_first)}
    found = results(ours, inputs, call, keep)
    assert_equal_results(found, results(theirs, inputs, call, keep))
    output = ours(**inputs, **call)
    assert output.is_contiguous()
    assert (output[~keep] == 0).all()
    torch.testing.assert_close(ours.eval()(**inputs, **call), output, rtol=0, atol=0)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("constructor", CONSTRUCTORS)
def test_decoder_layer_equals_torch(constructor: str, mask: str) -> None:
    options = CONSTRUCTORS[constructor]
    theirs, ours = make("Decoder", **options)
    batch_first = options.get("batch_first", False)
    call = decoder_call(mask)
    keep = valid(call, "tgt_key_padding_mask", TARGETS, batch_first)
    inputs = {"tgt": tokens(TARGETS, batch_first), "memory": tokens(SOURCES, batch_first)}
    found = results(ours, inputs, call, keep)
    expected = results(theirs, inputs, call, keep)
    assert_equal_results(found, expected)
    output = ours(**inputs, **call)
    assert output.is_contiguous()
    assert (output[~keep] == 0).all()
    torch.testing.assert_close(ours.eval()(**inputs, **call), output, rtol=0, atol=0)


def test_unbatched() -> None:
    for batch_first in (False, True):
        theirs, ours = make("Encoder", batch_first=batch_first)
        inputs = {"src": torch.randn(SOURCES, DIM, dtype=torch.float64)}
        call = {"src_key_padding_mask": torch.arange(SOURCES) > 4}
        keep = ~call["src_key_padding_mask"]
        assert_equal_results(results(ours, inputs, call, keep), results(theirs, inputs, call, keep))
        theirs, ours = make("Decoder", batch_first=batch_first)
        inputs = {"tgt": torch.randn(TARGETS, DIM).double(), "memory": inputs["src"]}
        call = {"memory_key_padding_mask": call["src_key_padding_mask"]}
        assert_equal_results(results(ours, inputs, call), results(theirs, inputs, call))


@pytest.mark.parametrize("norm_first", [False, True])
def test_nan_in_padding_reaches_nothing(norm_first: bool) -> None:
    for kind, name, length in (("Encoder", "src", SOURCES), ("Decoder", "tgt", TARGETS)):
        _, ours = make(kind, norm_first=norm_first, batch_first=True)
        call = encoder_call("padding") if kind == "Encoder" else decoder_call("padding")
        inputs = {name: tokens(length, True)}
        poisoned = {name: inputs[name].masked_fill(call[f"{name}_key_padding_mask"][..., None], float("nan"))}
        if kind == "Decoder":
            memory = tokens(SOURCES, True)
            inputs["memory"] = memory
            poisoned["memory"] = memory.masked_fill(call["memory_key_padding_mask"][..., None], float("nan"))
        assert_equal_results(results(ours, poisoned, call), results(ours, inputs, call))


def explicit_attention(
    module: torch.nn.MultiheadAttention, x: Tensor, memory: Tensor, p: float, seed: Tensor, site: int
) -> Tensor:
    """Batch-first attention with the dropout of tfm.reference, in torch's plain operations."""
    heads = (module.num_heads, module.head_dim)
    weights, biases = module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3)
    q, k, v = (
        F.linear(given, weight, bias).unflatten(-1, heads).transpose(1, 2)
        for given, weight, bias in zip((x, memory, memory), weights, biases, strict=True)
    )
    probabilities = (q @ k.transpose(-1, -2) / module.head_dim**0.5).softmax(-1)
    batch, _, queries, keys = probabilities.shape
    rows = torch.arange(queries).expand(batch, module.num_heads, -1)
    groups = torch.arange(batch * module.num_heads).view(batch, module.num_heads, 1)
    dropped = probabilities * keep_mask(rows, keys, groups, p, seed, site) * keep_scale(p)
    return module.out_proj((dropped @ v).transpose(1, 2).flatten(-2))


@pytest.mark.parametrize("norm_first", [False, True])
def test_dropout_is_the_references_masks(norm_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    p, seed = 0.3, torch.tensor(123456789123)
    draws = []
    monkeypatch.setattr(ops, "draw_seed", lambda device: draws.append(device) or seed)
    options = {"norm_first": norm_first, "batch_first": True}
    encoder = tfm.nn.TransformerEncoderLayer(DIM, HEADS, HIDDEN, p, **options).double()
    decoder = tfm.nn.TransformerDecoderLayer(DIM, HEADS, HIDDEN, p, **options).double()
    source, target = tokens(SOURCES, True), tokens(TARGETS, True)

    def sublayers(layer: torch.nn.Module, x: Tensor, memory: Tensor | None) -> Tensor:
        steps = [(lambda y: explicit_attention(layer.self_attn, y, y, p, seed, 0), layer.norm1, 1)]
        last = layer.norm2
        if memory is not None:
            attention = layer.multihead_attn
            steps.append((lambda y: explicit_attention(attention, y, memory, p, seed, 2), layer.norm2, 3))
            last = layer.norm3
        network = lambda y: layer.linear2(dropout(F.relu(layer.linear1(y)), p, seed, 4))  # noqa: E731
        for sublayer, norm, site in [*steps, (network, last, 5)]:
            if norm_first:
                x = x + dropout(sublayer(norm(x)), p, seed, site)
            else:
                x = norm(x + dropout(sublayer(x), p, seed, site))
        return x

    torch.testing.assert_close(encoder(source), sublayers(encoder, source, None), rtol=0, atol=1e-12)
    assert len(draws) == 1
    torch.testing.assert_close(decoder(target, source), sublayers(decoder, target, source), rtol=0, atol=1e-12)
    assert len(draws) == 2
    encoder.eval()(source)
    assert len(draws) == 2


def test_each_dropout_obeys_its_own_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = ops.residual_layer_norm
    monkeypatch.setattr(
        ops, "residual_layer_norm", lambda *given, **named: seen.append(given[5]) or original(*given, **named)
    )
    layer = tfm.nn.TransformerEncoderLayer(DIM, HEADS, HIDDEN, 0.5).eval()
    layer.dropout1.train()
    layer.dropout1.p = 0.25
    layer(torch.randn(SOURCES, BATCH, DIM))
    assert seen == [0.25, 0.0]


@pytest.mark.parametrize("kind", ["Encoder", "Decoder"])
def test_signature_state_and_copies(kind: str) -> None:
    theirs, ours = make(kind)
    assert list(inspect.signature(type(ours)).parameters) == list(inspect.signature(type(theirs)).parameters)
    assert vars(ours).keys() == vars(theirs).keys()
    theirs.load_state_dict(ours.state_dict())
    inputs = {"src": tokens(SOURCES, False)}
    if kind == "Decoder":
        inputs = {"tgt": tokens(TARGETS, False), "memory": tokens(SOURCES, False)}
    theirs.__class__ = type(ours)
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), theirs):
        assert type(copied) is type(ours)
        assert_equal_results(results(copied, inputs, {}), results(ours, inputs, {}))


def test_autocast_and_half_precision() -> None:
    for options in ({}, {"norm_first": True}):
        theirs, ours = make("Encoder", **options)
        source = tokens(SOURCES, False).float()
        truth = theirs(source.double())
        theirs, ours = theirs.float(), ours.float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found, expected = ours(source), theirs(source)
        assert found.dtype == expected.dtype == torch.float32
        assert_matches(found, truth, expected)
        assert ours.bfloat16()(source.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["Encoder", "Decoder"])
@pytest.mark.parametrize(("batch", "length"), [(0, 3), (2, 0), (0, 0)])
def test_nothing_gives_nothing(kind: str, batch: int, length: int) -> None:
    theirs, ours = make(kind, batch_first=True)
    names = ("src",) if kind == "Encoder" else ("tgt", "memory")
    inputs = {name: torch.zeros(batch, length, DIM, dtype=torch.float64) for name in names}
    assert_equal_results(results(ours, inputs, {}), results(theirs, inputs, {}))
