"""torch.compile makes one graph of a Transformer, with and without masks and dropout."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformer_cases import (
    BATCH,
    CASES,
    DIM,
    HEADS,
    SOURCE_LENGTHS,
    SOURCES,
    TARGET_LENGTHS,
    TARGETS,
    batch,
    padding,
)

import tfm.nn
from tfm.native import toolchain


def test_compiles_to_one_graph() -> None:
    torch._dynamo.reset()
    ours = tfm.nn.Transformer(DIM, HEADS, 1, 1, 12, dropout=0.0, batch_first=True, dtype=torch.float64)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    source, target = batch(SOURCES), batch(TARGETS)
    keep = ~padding(TARGET_LENGTHS, TARGETS)
    masks = CASES["causal and padding"]
    lengths = {"src_lengths": torch.tensor(SOURCE_LENGTHS), "tgt_lengths": torch.tensor(TARGET_LENGTHS)}
    for call in (masks, lengths, {}):
        found, expected = compiled(source, target, **call), ours(source, target, **call)
        torch.testing.assert_close(found[keep], expected[keep], rtol=0, atol=1e-10)
        assert not call or (found[~keep] == 0).all()
    gradients = []
    for module in (compiled, ours):
        ours.zero_grad()
        (module(source, target, **masks) ** 2).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in ours.parameters()])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.skipif(bool(toolchain.missing()), reason="Inductor needs a C++ compiler")
def test_inductor_runs_it() -> None:
    torch._dynamo.reset()
    layer = tfm.nn.TransformerEncoderLayer(DIM, HEADS, 12, 0.0, batch_first=True, dtype=torch.float64)
    ours = tfm.nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    source, padded = batch(SOURCES), padding(SOURCE_LENGTHS, SOURCES)
    with torch.no_grad():
        found = torch.compile(ours, fullgraph=True)(source, src_key_padding_mask=padded)
        expected = ours(source, src_key_padding_mask=padded)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


class Owned(tfm.nn.LayerNorm):
    """A class of a user's, whose attributes are guarded as ever."""


@pytest.mark.parametrize(("kind", "compiled_anew"), [(tfm.nn.LayerNorm, 0), (tfm.nn.RMSNorm, 0), (Owned, 1)])
def test_what_skips_the_guards_of_torchs_modules_skips_those_of_ours(kind: type, compiled_anew: int) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    norm = kind(DIM)
    skip = torch.compiler.skip_guard_on_inbuilt_nn_modules_unsafe
    compiled = torch.compile(lambda x: norm(x), backend=counter, options={"guard_filter_fn": skip})
    x = torch.randn(3, DIM)
    compiled(x)
    norm.eps = 1.0
    compiled(x)
    assert counter.frame_count == 1 + compiled_anew


def test_compiles_with_dropout() -> None:
    torch._dynamo.reset()
    layer = tfm.nn.TransformerEncoderLayer(DIM, HEADS, 12, 0.5, dtype=torch.float64)
    ours = tfm.nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    source = torch.randn(SOURCES, BATCH, DIM, dtype=torch.float64)
    outputs = []
    for module in (compiled, ours):
        torch.manual_seed(4)
        outputs.append(module(source))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-10)
    assert not torch.allclose(compiled(source), outputs[0])
