"""Peers compute what ours computes, values and gradients: otherwise their times would compare nothing."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import (
    bench_attention,
    bench_cross_entropy,
    bench_embedding,
    bench_feed_forward,
    bench_norm,
    bench_rotary,
    peers,
)
from benchmarks.inputs import integers
from benchmarks.shapes import Embedding, FeedForward, Norm, Rotary, Sentences, Sequences, Vocabulary
from benchmarks.suite import OURS, Suite
from tfm.sequences import Layout, offsets

# Nothing is dropped: torch draws other masks.
CASES: list[tuple[ModuleType, str, Any]] = [
    (bench_norm, "LAYER", Norm(5, 32)),
    (bench_norm, "RMS", Norm(5, 32)),
    (bench_feed_forward, "PLAIN", FeedForward(5, 16, 24)),
    (bench_feed_forward, "GATED", FeedForward(5, 16, 24, is_gated=True)),
    (bench_cross_entropy, "SUITE", Vocabulary(9, 16, 30, 0.1)),
    (bench_cross_entropy, "SUITE", Vocabulary(90, 16, 30)),
    (bench_embedding, "SUITE", Embedding(70, 16, 30)),
    (bench_rotary, "SUITE", Rotary(2, 5, 3, 16)),
    *((bench_attention, "PADDED", Sequences(3, 16, 2, 8, mask)) for mask in ("none", "causal", "lengths", "bias")),
]
# They run the function of another peer, or run on a GPU alone: FlexAttention has no backward on a CPU.
LEFT_OUT = {"compile", "max-autotune", "liger", "flex", "sdpa flash", "sdpa efficient", "sdpa cudnn", "sdpa math"}
LEFT_OUT |= {"ours, native"}


def in_float64(inputs: tuple[Any, ...]) -> tuple[list[Any], list[Tensor]]:
    """The arguments, and those of them that need a gradient."""
    arguments = [
        given.detach().double().requires_grad_(given.requires_grad)
        if isinstance(given, Tensor) and given.is_floating_point()
        else given
        for given in inputs
    ]
    return arguments, [given for given in arguments if isinstance(given, Tensor) and given.requires_grad]


def results(suite: Suite, name: str, size: Any) -> list[Tensor]:
    """Outputs, and gradients of their sines' sum: of the same random numbers for every peer."""
    torch.manual_seed(7)
    peer = suite.peers[name]
    arguments, inputs = in_float64((peer.inputs or suite.inputs)(size))
    outputs = peer.function(*arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = torch.stack([output.sin().sum() for output in outputs]).sum()
    return [*outputs, *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize(
    ("suite", "size", "name"),
    [
        pytest.param(suite, size, name, id=f"{suite.operation} {size} {name}")
        for module, which, size in CASES
        for suite in [getattr(module, which)]
        for name in suite.peers
        if name not in {OURS, *LEFT_OUT}
    ],
)
def test_a_peer_computes_what_ours_computes(suite: Suite, size: Any, name: str) -> None:
    if reason := suite.peers[name].missing():
        pytest.skip(reason)
    # The peer's table of positions is rounded to fp32.
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if suite is bench_embedding.SUITE else {"rtol": 1e-9, "atol": 1e-11}
    for expected, came in zip(results(suite, OURS, size), results(suite, name, size), strict=True):
        torch.testing.assert_close(came, expected, **tolerance)


@pytest.mark.parametrize("mask", ["none", "causal", "lengths", "bias"])
def test_flex_attention_sees_the_same_keys(mask: str) -> None:
    size = Sequences(3, 16, 2, 8, mask)
    suite = bench_attention.PADDED
    outputs = []
    for name in (OURS, "flex"):
        torch.manual_seed(7)
        peer = suite.peers[name]
        assert peer.inputs is not None
        arguments, _ = in_float64(peer.inputs(size))
        outputs.append(peer.function(*(given.detach() if isinstance(given, Tensor) else given for given in arguments)))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("mask", ["self", "causal", "cross"])
def test_packed_and_padded_sentences_are_the_same(mask: str) -> None:
    """What each way gives for the real tokens, and the gradient it gives them."""
    size = Sentences(5, 2, 8, mask)
    lengths = [integers(side) for side in (size.queries, size.keys, size.keys)]
    layouts = [Layout.of(offsets(side), int(side.max()), int(side.sum())) for side in lengths]
    torch.manual_seed(7)
    qkv = [heads.transpose(1, 2) for heads in in_float64(bench_attention.padded_qkv(size))[0]]
    packed = [layout.pack(x).detach().requires_grad_() for x, layout in zip(qkv, layouts, strict=True)]
    padded = [x.detach().transpose(1, 2).requires_grad_() for x in qkv]

    def run(name: str, tensors: list[Tensor], own: Callable[[Any], tuple[Any, ...]]) -> list[Tensor]:
        arguments, _ = in_float64(own(size)[3:])
        output = bench_attention.PACKED.peers[name].function(*tensors, *arguments)
        if tensors is padded:
            output = layouts[0].pack(output.transpose(1, 2))
        gradients = torch.autograd.grad(output.sin().sum(), tensors)
        if tensors is padded:
            sides = zip(gradients, layouts, strict=True)
            gradients = tuple(layout.pack(gradient.transpose(1, 2)) for gradient, layout in sides)
        return [output, *gradients]

    expected = run(OURS, packed, bench_attention.packed_inputs)
    for name, own in (
        (f"{OURS}, padded", bench_attention.padded_inputs),
        ("eager", bench_attention.padded_sdpa_inputs),
    ):
        for one, other in zip(run(name, padded, own), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_every_way_to_run_sdpa_is_a_peer() -> None:
    assert set(peers.SDPA) == {"eager", "sdpa flash", "sdpa efficient", "sdpa cudnn", "sdpa math"}
    assert {"eager", "compile", "liger"} <= set(peers.LAYER_NORM) & set(peers.RMS_NORM)
    assert {"eager", "compile", "max-autotune"} <= set(peers.FEED_FORWARD)
    assert {"eager", "compile", "torch's fused", "liger"} <= set(peers.LINEAR_CROSS_ENTROPY)
