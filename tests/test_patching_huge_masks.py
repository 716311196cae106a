"""accelerate() on a torch.nn.Transformer whose masks forbid by huge finite numbers, as many write them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import tfm

LOWEST = torch.finfo(torch.float32).min
DIM, HEADS, BATCH, LENGTH = 16, 2, 3, 7


def left_padding_and_causality(fill: float) -> torch.Tensor:
    """One additive mask [B * H, L, L]: the second sample begins with 5 pads, whose rows see nothing but pads."""
    forbidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1).expand(BATCH, -1, -1).clone()
    forbidden[1, :, :5] = True
    return torch.zeros(BATCH, LENGTH, LENGTH).masked_fill(forbidden, fill).repeat_interleave(HEADS, dim=0)


def padding(fill: float) -> torch.Tensor:
    """An additive padding mask [B, L]: the second sample is padding alone."""
    mask = torch.zeros(BATCH, LENGTH)
    mask[1], mask[2, 4:] = fill, fill
    return mask


MASKS = {
    "left padding and causality": {"tgt_mask": left_padding_and_causality(LOWEST)},
    "left padding and causality by -1e9": {"tgt_mask": left_padding_and_causality(-1e9)},
    "a sample of padding alone": {name: padding(-1e9) for name in ("src_key_padding_mask", "memory_key_padding_mask")},
    "a sample of padding alone, finfo.min": {
        name: padding(LOWEST) for name in ("src_key_padding_mask", "memory_key_padding_mask")
    },
}


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS.keys())
def test_output_and_gradients_are_plain_torchs(masks):
    torch.manual_seed(3)
    theirs = nn.Transformer(DIM, HEADS, 2, 2, 24, dropout=0.0, batch_first=True)
    ours = copy.deepcopy(theirs)
    tfm.accelerate(ours)
    source, target = torch.randn(BATCH, LENGTH, DIM), torch.randn(BATCH, LENGTH, DIM)
    dout = torch.randn(BATCH, LENGTH, DIM)
    found = []
    for model in (theirs, ours):
        parameters = dict(sorted(model.named_parameters()))
        # torch's fused kernel for CPUs forms weights again from a rounded logsumexp, and errs in the gradients.
        with sdpa_kernel(SDPBackend.MATH):
            output = model(source, target, **masks)
        gradients = torch.autograd.grad(output, list(parameters.values()), dout)
        found.append({"output": output.detach()} | dict(zip(parameters, gradients, strict=True)))
    for name, expected in found[0].items():
        error = (found[1][name] - expected).abs().max() / expected.abs().max().clamp(min=1e-3)
        assert error < 1e-4, f"{name}: {error:.3g} of {expected.abs().max():.3g}"
