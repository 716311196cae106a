"""What the tests of attention's kernels for sequences of any length share: those kernels, at few keys too, and runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest
import torch
from attention_cases import Problem, make

from tfm import ops
from tfm.kernels.launch.attention import any_length, short, splits
from tfm.kernels.launch.attention.any_length import AttentionTiles
from tfm.kernels.launch.attention.splits import SplitTiles

FORWARD, COMBINE, BITS = ["attention_forward_kernel"], ["attention_combine_kernel"], ["mask_bits_kernel"]
BIAS = ["bias_gradient_kernel", "sum_splits_kernel"]
BY_DISTANCE = ["relative_bias_gradient_kernel", "sum_distances_kernel"]
QUERIES, KEYS = ["attention_backward_queries_kernel"], ["attention_backward_keys_kernel"]
# Edges of tiles within the lengths of the tests; queries and keys differ, so that none stands for the other.
SMALL = {
    "attention_forward": AttentionTiles(32, 64, 4, 2),
    "attention_backward_queries": AttentionTiles(32, 64, 4, 2),
    "attention_backward_keys": AttentionTiles(64, 32, 4, 2),
}
# The forward's tiles: in the interpreter a product's last bits are those of its shape, and a backward forms it again.
SHARED = SplitTiles(32, 64, 4, 2, split_keys=64)


@contextmanager
def kernels_of_any_length(tiles: Mapping[str, AttentionTiles] = SMALL) -> Iterator[None]:
    """Within the block these kernels serve every length, at these tiles, of which there are several at few keys."""
    with pytest.MonkeyPatch.context() as patch:
        for name, chosen in tiles.items():
            patch.setattr(any_length, name, lambda *_, chosen=chosen: chosen)
        for name in ("short_attention_forward", "short_attention_backward"):
            patch.setattr(short, name, lambda **_: None)
        yield


@contextmanager
def shared_keys(tiles: SplitTiles = SHARED) -> Iterator[None]:
    """Within the block programs of the forward share keys at these tiles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splits, "split_forward", lambda *_: tiles)
        yield


def qkv(device, shape=(2, 2, 1, 40, 70, 16, 24), dtype=torch.float32):
    inputs = make(Problem(shape), device, dtype).inputs
    return [inputs[name].requires_grad_() for name in ("query", "key", "value")]


def run(inputs, options, call=ops.attention):
    """Output and gradients of `inputs`, the output weighed by fixed random numbers."""
    output = call(*inputs, impl="triton", **options)
    generator = torch.Generator(output.device).manual_seed(7)
    cotangent = torch.randn(output.shape, generator=generator, device=output.device).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, inputs[:3], cotangent)]


def equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
