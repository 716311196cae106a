"""Native attention for CPUs where scores are huge but finite: rules, tiles and dtypes that meet such masks."""

from __future__ import annotations

import math

import native
import oracle
import pytest
import rounded_scores
import torch
from rounded_scores import LOWEST, halves

from tfm import ops
from tfm.operators.attention import Attended, Attention
from tfm.operators.autograd import apply

pytestmark = native.MARKS
# Of the native kernels two tiles of queries and four of keys, the last of each cut.
QUERIES, KEYS = 70, 441


def mask_of(**parts: tuple[slice | int, slice, float]) -> torch.Tensor:
    mask = torch.zeros(QUERIES, KEYS)
    for rows, keys, fill in parts.values():
        mask[rows, keys] = fill
    return mask


EVERY = slice(None)
MASKS = {
    "rows": mask_of(
        lowest=(1, EVERY, LOWEST), billion=(2, EVERY, -1e9), nothing=(3, EVERY, -math.inf), million=(4, EVERY, 1e6)
    ),
    "the first tile": mask_of(tile=(EVERY, slice(128), LOWEST), mixed=(65, slice(128, KEYS), -math.inf)),
    "all but the last keys": mask_of(pads=(EVERY, slice(431), LOWEST), some=(slice(3, 9), slice(431, KEYS), -1e9)),
    "three keys": mask_of(keys=(EVERY, slice(126, 129), 1e30)),
}
RULES = {
    "plain": {},
    "causal": {"is_causal": True},
    "softcap": {"softcap": 3.0},
    "dropout": {"dropout_p": 0.3, "seed": 5},
    "sinks": {"sinks": torch.tensor([LOWEST, -1e9, 0.5, 1e9])},
}


def results(call, inputs, dout, **options):
    """Output and gradients of `inputs`, and of the sinks where there are some."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    if "sinks" in options:
        options["sinks"] = options["sinks"].detach().requires_grad_()
        inputs.append(options["sinks"])
    output = call(*inputs[:4], **options)
    return [output.detach(), *torch.autograd.grad(output, inputs, dout.to(output.dtype))]


@pytest.mark.parametrize("instruction_set", native.INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("mask", MASKS)
def test_gives_what_fp32_gives(mask, rules, dtype, instruction_set):
    options = RULES[rules]
    query, key, value = halves(1, 4, QUERIES, 16), halves(1, 2, KEYS, 16), torch.randn(1, 2, KEYS, 8)
    inputs = [*(x.to(dtype) for x in (query, key, value)), MASKS[mask].expand(4, -1, -1)]
    dout = torch.randn(1, 4, QUERIES, 8).to(dtype)

    def plain(*inputs, **options):
        return rounded_scores.attention(*inputs, dtype=torch.float32, **options).to(dtype)

    with native.instruction_set(instruction_set):
        actual = results(ops.attention, inputs, dout, scale=0.25, impl="native", **options)
    truth = results(rounded_scores.attention, [x.double() for x in inputs], dout, **options)
    same = results(plain, inputs, dout, **options)
    # The logarithm of a sum of 441 terms is rounded to 2^-20, bf16 outputs are before gradients are formed from them.
    inherent = 8 * torch.finfo(dtype).eps if dtype == torch.float32 else torch.finfo(dtype).eps
    names = ("output", "dquery", "dkey", "dvalue", "dbias", "dsinks")
    for name, result, true, other in zip(names, actual, truth, same, strict=False):
        oracle.assert_matches(result, true, other, name, 0.0 if name == "output" else inherent)


def test_a_row_of_the_lowest_number_is_the_mean():
    query, key, value = (torch.randn(1, 1, 4, 8, requires_grad=True) for _ in range(3))
    mask = torch.zeros(4, 4)
    mask[1] = LOWEST
    output = ops.attention(query, key, value, mask, impl="native")
    torch.testing.assert_close(output[0, 0, 1], value[0, 0].mean(0))
    # A uniform row's gradient by q is the covariance of k and dout · v.
    dout = torch.randn(8)
    (gradient,) = torch.autograd.grad(output[0, 0, 1] @ dout, query)
    deviation = (value @ dout)[0, 0] - (value @ dout)[0, 0].mean()
    torch.testing.assert_close(gradient[0, 0, 1], deviation @ key[0, 0] / 4 / math.sqrt(8))


@pytest.mark.parametrize("softcap", [None, 5e4])
@pytest.mark.parametrize("size", [1.0, 100.0, 300.0])
def test_rows_of_weights_formed_again_sum_to_one(size, softcap):
    query, key, value = torch.randn(1, 2, 9, 16) * size, torch.randn(1, 2, 300, 16) * size, torch.randn(1, 2, 300, 3)
    value.requires_grad_()
    output, weights = ops.attention(query, key, value, softcap=softcap, return_weights=True, impl="native")
    for row in range(9):
        (gradient,) = torch.autograd.grad(output[:, :, row].sum(), value, retain_graph=True)
        torch.testing.assert_close(gradient[..., 0].sum(-1), torch.ones(1, 2), rtol=0, atol=2e-6)
        # To the last bit the weights that were applied.
        torch.testing.assert_close(gradient[..., 0], weights[:, :, row], rtol=0, atol=0)


def test_nan_behind_a_mask_of_the_lowest_number_stays_there():
    inputs = [halves(2, 1, QUERIES, 16), halves(2, 1, KEYS, 16), torch.randn(2, 1, KEYS, 8)]
    mask = MASKS["the first tile"].clone()
    mask[:, 7], mask[66, :] = -math.inf, -math.inf
    dout = torch.randn(2, 1, QUERIES, 8)
    options = {"scale": 0.25, "key_lengths": torch.tensor([KEYS, 300]), "impl": "native"}
    expected = results(ops.attention, [*inputs, mask], dout, **options)
    hidden = torch.zeros(2, 1, KEYS, 1, dtype=torch.bool)
    hidden[:, :, 7] = hidden[1, :, 300:] = True
    poisoned = [x.masked_fill(hidden, math.nan) for x in inputs[1:]]
    actual = results(ops.attention, [inputs[0], *poisoned, mask], dout, **options)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("rows", [QUERIES, 1])
def test_a_bias_and_the_bits_of_a_mask_together(rows):
    query, key, value = halves(2, 2, QUERIES, 16), halves(2, 1, KEYS, 16), torch.randn(2, 1, KEYS, 8)
    allowed, bias = torch.rand(2, 1, rows, KEYS) < 0.7, torch.randn(1, 2, QUERIES, KEYS)
    words, reach = torch.ops.tfm_native.attention_mask_bits(allowed, None, 0, None, None)
    rules = (*[None] * 6, QUERIES, KEYS, 0, None, None, 0.25, None, 0.0, 0)
    dout = torch.randn(2, 2, QUERIES, 8)

    def together(*inputs):
        bits = (words if rows > 1 else None), reach
        return apply(Attended, "tfm_native", Attention(*inputs, *bits, None, None, *rules))[0]

    def as_one(query, key, value, bias):
        return ops.attention(query, key, value, bias.masked_fill(~allowed, -math.inf), scale=0.25, impl="native")

    inputs = query, key, value, bias
    expected = results(as_one, inputs, dout)
    actual = results(together, inputs, dout)
    torch.testing.assert_close(actual[:4], expected[:4], rtol=0, atol=0)
    torch.testing.assert_close(actual[4], expected[4])
