"""tfm.nn.TransformerXLDecoderLayer against the paper's equations, term by term."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor

import tfm
from tfm.nn import TransformerXLDecoderLayer, relative_positions

DIM, HEADS, COLUMNS, HIDDEN, BATCH = 12, 3, 6, 20, 2


def layer_of(**options: object) -> TransformerXLDecoderLayer:
    torch.manual_seed(0)
    layer = TransformerXLDecoderLayer(
        DIM, HEADS, HIDDEN, 0.0, d_head=COLUMNS, dtype=torch.float64, **({"memory_length": 5} | options)
    )
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return layer


def norm(x: Tensor, of: torch.nn.LayerNorm) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + of.eps).sqrt() * of.weight + of.bias


def textbook(layer: TransformerXLDecoderLayer, x: Tensor, memory: Tensor, seen: int | None = None) -> Tensor:
    """Computes section 3.3 for [S, B, E], a query and a key at a time."""
    attention, network = layer.dec_attn, layer.pos_ff
    both = torch.cat((memory.detach(), x))
    start = len(memory)
    source = norm(both, attention.layer_norm) if layer.norm_first else both
    w_q, w_k, w_v = attention.qkv_net.weight.view(3, HEADS, COLUMNS, DIM)
    w_r, rows = attention.r_net.weight.view(HEADS, COLUMNS, DIM), []
    for i in range(len(x)):
        first = 0 if seen is None else max(0, start + i - seen + 1)
        scores = []
        for j in range(first, start + i + 1):
            distance = start + i - j
            angles = distance / 10000 ** (torch.arange(0, DIM, 2, dtype=torch.float64) / DIM)
            position = torch.einsum("hde,e->hd", w_r, torch.cat((angles.sin(), angles.cos())))
            q = torch.einsum("hde,be->bhd", w_q, source[start + i])
            k = torch.einsum("hde,be->bhd", w_k, source[j])
            a, b = (q * k).sum(-1), (q * position).sum(-1)
            c, d = (attention.r_w_bias * k).sum(-1), (attention.r_r_bias * position).sum(-1)
            scores.append((a + b + c + d) / math.sqrt(COLUMNS))
        weights = torch.stack(scores).softmax(0)
        values = torch.einsum("hde,jbe->jbhd", w_v, source[first : start + i + 1])
        rows.append((weights[..., None] * values).sum(0).flatten(1))
    y = x + torch.stack(rows) @ attention.o_net.weight.T
    y = y if layer.norm_first else norm(y, attention.layer_norm)
    inner, outer = network.CoreNet[0], network.CoreNet[3]
    z = norm(y, network.layer_norm) if layer.norm_first else y
    z = y + (z @ inner.weight.T + inner.bias).clamp_min(0) @ outer.weight.T + outer.bias
    return z if layer.norm_first else norm(z, network.layer_norm)


def segments(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, BATCH, DIM, dtype=torch.float64, generator=generator) for n in lengths]


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize(("same_length", "seen"), [(False, None), (True, 5)])
@pytest.mark.parametrize("batch_first", [False, True])
def test_segments_with_a_memory_are_the_equations(norm_first, same_length, seen, batch_first):
    layer = layer_of(norm_first=norm_first, same_length=same_length, batch_first=batch_first)
    kept, memory = torch.empty(0, BATCH, DIM, dtype=torch.float64), None
    for x in segments(3, 4, 1, 7):
        given = x.transpose(0, 1) if batch_first else x
        y, memory = layer(given, memory)
        y = y.transpose(0, 1) if batch_first else y
        torch.testing.assert_close(y, textbook(layer, x, kept, seen))
        kept = torch.cat((kept, x))[-5:]
        assert torch.equal(memory.transpose(0, 1) if batch_first else memory, kept)
        assert not memory.requires_grad
        assert memory.data_ptr() != given.data_ptr()


def test_gradients_are_those_of_the_equations_and_the_memory_gets_none():
    layer, (memory, x) = layer_of(), segments(4, 3)
    memory.requires_grad_()
    found, expected = [], []
    for gradients, run in ((found, lambda: layer(x, memory)[0]), (expected, lambda: textbook(layer, x, memory))):
        x.grad = None
        layer.zero_grad()
        x.requires_grad_()
        run().square().sum().backward()
        gradients += [x.grad.clone(), *(parameter.grad.clone() for parameter in layer.parameters())]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert memory.grad is None


def test_a_segment_in_parts_is_the_whole():
    layer, (x,) = layer_of(memory_length=64), segments(9)
    whole, _ = layer(x)
    memory, parts = None, []
    for part in x.split((4, 1, 4)):
        y, memory = layer(part, memory)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts), whole)


def test_names_and_shapes_of_parameters_are_those_of_transformers():
    assert {name: tuple(x.shape) for name, x in layer_of().state_dict().items()} == {
        "dec_attn.r_w_bias": (HEADS, COLUMNS),
        "dec_attn.r_r_bias": (HEADS, COLUMNS),
        "dec_attn.qkv_net.weight": (3 * HEADS * COLUMNS, DIM),
        "dec_attn.o_net.weight": (DIM, HEADS * COLUMNS),
        "dec_attn.r_net.weight": (HEADS * COLUMNS, DIM),
        "dec_attn.layer_norm.weight": (DIM,),
        "dec_attn.layer_norm.bias": (DIM,),
        "pos_ff.CoreNet.0.weight": (HIDDEN, DIM),
        "pos_ff.CoreNet.0.bias": (HIDDEN,),
        "pos_ff.CoreNet.3.weight": (DIM, HIDDEN),
        "pos_ff.CoreNet.3.bias": (DIM,),
        "pos_ff.layer_norm.weight": (DIM,),
        "pos_ff.layer_norm.bias": (DIM,),
    }


@pytest.mark.parametrize("part", ["dec_attn.dropatt", "dec_attn.drop", "pos_ff.CoreNet.2", "pos_ff.CoreNet.4"])
def test_each_dropout_drops_while_training_alone(part):
    layer, (memory, x) = layer_of(), segments(4, 3)
    still, _ = layer(x, memory)
    layer.get_submodule(part).p = 0.5
    assert not torch.allclose(layer(x, memory)[0], still)
    torch.manual_seed(3)
    again, _ = layer(x, memory)
    torch.manual_seed(3)
    assert torch.equal(layer(x, memory)[0], again)
    assert torch.equal(layer.eval()(x, memory)[0], still)


def test_hooks_of_the_projections_run():
    layer, (memory, x) = layer_of(), segments(4, 3)
    expected, _ = layer(x, memory)
    called = []
    for name in ("qkv_net", "r_net", "o_net"):
        layer.dec_attn.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    layer.pos_ff.CoreNet[0].register_forward_hook(lambda *_: called.append("CoreNet"))
    torch.testing.assert_close(layer(x, memory)[0], expected)
    assert sorted(called) == ["CoreNet", "o_net", "qkv_net", "r_net"]


def test_copies_pickles_and_compiled_layers_give_the_same():
    layer, (memory, x) = layer_of(), segments(4, 3)
    expected, _ = layer(x, memory)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), compiled):
        torch.testing.assert_close(other(x, memory)[0], expected)


def test_sixteen_bits_and_autocast():
    layer, (memory, x) = layer_of(), segments(4, 3)
    expected, _ = layer(x, memory)
    narrow = copy.deepcopy(layer).bfloat16()(x.bfloat16(), memory.bfloat16())[0]
    assert narrow.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        mixed = copy.deepcopy(layer).float()(x.float(), memory.float())[0]
    for found in (narrow, mixed):
        assert (found.double() - expected).abs().max() <= 0.1


def test_bad_arguments_say_what_was_expected():
    layer, (memory, x) = layer_of(), segments(4, 3)
    with pytest.raises(ValueError, match="nhead: expected a divisor of d_model 12 where d_head is None, got 5"):
        TransformerXLDecoderLayer(12, 5)
    with pytest.raises(ValueError, match="x: expected three dimensions, the last of 12"):
        layer(x[..., 1:])
    with pytest.raises(ValueError, match="memory: expected x's"):
        layer(x, memory[:, :1])
    with pytest.raises(ValueError, match=r"positions: expected \[7, 12\]"):
        layer(x, memory, relative_positions(6, 12))
    with pytest.raises(ValueError, match="dim: expected an even number"):
        relative_positions(6, 11)


def test_empty_segments_and_far_positions():
    layer, (memory, x) = layer_of(), segments(4, 3)
    y, kept = layer(x[:0], memory)
    assert y.shape == (0, BATCH, DIM)
    assert torch.equal(kept, memory)
    assert torch.equal(relative_positions(6, 4, 2)[:4], relative_positions(3, 4)[:1].expand(4, -1))
    with tfm.use("reference"):
        torch.testing.assert_close(layer(x, memory)[0], textbook(layer, x, memory))
