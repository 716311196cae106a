"""CUDA's attention over few keys, on a GPU or else emulated, against the oracle, dropout included."""

from __future__ import annotations

from functools import partial

import emulated
import oracle
import pytest
import rounded_scores
import torch
import torch.nn.functional as F
from attention_cases import SEED, SITE, Packing, Problem, assert_matches, make, results

from tfm import native, ops
from tfm.operators.attention import Attended, Attention
from tfm.operators.autograd import apply

HALF, BFLOAT16 = torch.float16, torch.bfloat16

# Pairwise: lengths at and beside the edges of tiles, of 32 and of 128 keys; every rule meets another; odd head dims.
CASES = {
    "one of each": (HALF, Problem((2, 2, 2, 1, 1, 16, 16), {"dropout_p": 0.5})),
    "causal, dropout": (BFLOAT16, Problem((2, 2, 1, 17, 17, 64, 64), {"is_causal": True, "dropout_p": 0.3})),
    "3 queries, 17 keys": (HALF, Problem((2, 4, 1, 3, 17, 24, 40), {"dropout_p": 0.3})),
    "33 queries, 3 keys, causal": (HALF, Problem((2, 2, 1, 33, 3, 16, 32), {"is_causal": True, "dropout_p": 0.2})),
    "lengths, dropout": (BFLOAT16, Problem((3, 2, 2, 20, 33, 40, 24), {"key_lengths": [0, 11, 33], "dropout_p": 0.3})),
    "starts, sinks": (
        HALF, Problem((2, 3, 1, 17, 33, 24, 16), {"is_causal": True, "query_start": [-3, 9], "sinks": True}),
    ),
    "window, softcap": (
        BFLOAT16, Problem((2, 2, 2, 33, 40, 16, 16), {"window_size": (4, 2), "softcap": 1.5, "dropout_p": 0.2}),
    ),
    "key padding": (HALF, Problem((2, 4, 2, 17, 15, 16, 16), {"dropout_p": 0.2}, ("bool", (2, 1, 1, 15)))),
    "key mask, causal": (
        HALF, Problem((2, 2, 1, 33, 47, 32, 32), {"key_mask": "left", "is_causal": True, "dropout_p": 0.2}),
    ),
    "bool mask of each head": (BFLOAT16, Problem((2, 2, 1, 33, 47, 32, 32), {"sinks": True}, ("bool", (2, 2, 33, 47)))),
    "bool mask, bottom-right": (
        HALF, Problem((1, 2, 1, 20, 70, 64, 64), {"is_causal": True, "query_start": 50}, ("bool", (20, 70))),
    ),
    "window, 130 keys": (HALF, Problem((1, 2, 1, 20, 130, 48, 56), {"window_size": (60, 3), "query_start": 100})),
    "256 keys, dropout": (
        BFLOAT16, Problem((1, 1, 1, 33, 256, 64, 64), {"is_causal": True, "query_start": 216, "dropout_p": 0.2}),
    ),
    "negative scale, lengths, sinks, 4 to 1": (
        BFLOAT16, Problem((2, 4, 1, 17, 65, 32, 16), {"scale": -0.4, "key_lengths": [65, 9], "sinks": True}),
    ),
}  # fmt: skip
BIASES = {
    "bias of each head, dropout": (
        HALF, HALF, Problem((2, 2, 1, 17, 33, 16, 16), {"dropout_p": 0.2}, ("float", (1, 2, 17, 33))),
    ),
    "fp32 bias, one row, softcap": (
        BFLOAT16, torch.float32,
        Problem((2, 2, 2, 20, 40, 16, 16), {"softcap": 1.5, "key_lengths": [40, 21]}, ("float", (40,))),
    ),
    "bias, everything": (
        BFLOAT16, BFLOAT16,
        Problem(
            (2, 4, 2, 17, 150, 24, 40),
            {
                "is_causal": True, "query_start": [125, -2], "window_size": (37, 1), "key_lengths": [150, 31],
                "softcap": 1.5, "sinks": True, "scale": 0.4, "dropout_p": 0.3,
            },
            ("float", (2, 4, 17, 150)),
        ),
    ),
}  # fmt: skip


# More sequences than a GPU holds at once.
MANY = {
    "many sequences": (BFLOAT16, Problem((300, 8, 8, 33, 40, 64, 64), {"is_causal": True, "dropout_p": 0.1})),
    "many sequences, 256 keys": (HALF, Problem((40, 8, 4, 256, 256, 64, 64), {"dropout_p": 0.1, "softcap": 30.0})),
}


@pytest.fixture(autouse=True)
def _operators(cuda_device, monkeypatch):
    for name in ("attention/mask_bits", "attention/short"):
        emulated.operators(name, cuda_device, monkeypatch)


def equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def run(inputs, call=ops.attention, impl="native", **options):
    """Output and gradients of query, key and value, the output weighed by fixed random numbers."""
    inputs = [x.detach().requires_grad_() if i < 3 else x for i, x in enumerate(inputs)]
    output = call(*inputs, impl=impl, **options)
    return [output.detach(), *torch.autograd.grad(output, inputs[:3], weights_like(output))]


def weights_like(output):
    """The same random numbers each time."""
    return torch.randn(output.shape, generator=torch.Generator().manual_seed(7)).to(output)


def qkv(device, shape=(2, 2, 1, 17, 33, 16, 16), dtype=HALF):
    inputs = make(Problem(shape), device, dtype).inputs
    return [inputs[name] for name in ("query", "key", "value")]


@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=pytest.mark.gpu) for name in MANY)])
def test_kernels_match(cuda_device, name):
    dtype, problem = (CASES | MANY)[name]
    assert_matches(make(problem, cuda_device, dtype), dtype, impl="native")


@pytest.mark.parametrize("name", BIASES)
def test_a_bias_that_does_not_learn_is_added(cuda_device, name):
    dtype, bias_dtype, problem = BIASES[name]
    tensors = make(problem, cuda_device, dtype)
    bias, tensors.inputs["bias"] = tensors.inputs["bias"], None
    tensors.bool_mask = bias.to(bias_dtype)
    assert_matches(tensors, dtype, impl="native")


def test_a_mask_beside_that_of_the_keys_is_refused(cuda_device):
    key_mask, mask = torch.ones(2, 33, dtype=torch.bool), torch.ones(17, 33, dtype=torch.bool)
    options = {"key_mask": key_mask.to(cuda_device), "attn_mask": mask.to(cuda_device)}
    with pytest.raises(RuntimeError, match="mask beside that of the keys"):
        ops.attention(*qkv(cuda_device), impl="native", **options)


PACKED_RULES = [{}, {"is_causal": True}, {"window_size": (5, 0), "softcap": 0.9}, {"attn_mask": (5, 1, 33, 70)}]


@pytest.mark.parametrize("rules", PACKED_RULES, ids=str)
def test_packed_equals_padded_and_the_reference(cuda_device, rules):
    packing = Packing([17, 0, 5, 1, 33], [20, 3, 33, 0, 70], cuda_device)
    options = {"dropout_p": 0.3, "seed": SEED, "site": SITE} | rules
    if "attn_mask" in rules:
        options["attn_mask"] = torch.rand(rules["attn_mask"], device=cuda_device) < 0.7
    rows = sum(packing.query_lengths), sum(packing.key_lengths)
    shapes = (rows[0], 2, 16), (rows[1], 1, 16), (rows[1], 1, 16)
    packed = [torch.randn(shape, device=cuda_device).to(HALF) for shape in shapes]
    actual = run([*packed, *packing.arguments], ops.varlen_attention, **options)
    cotangent = weights_like(actual[0])

    def padded(impl, dtype):
        inputs = [x.to(dtype).requires_grad_() for x in packed]
        lengths = torch.tensor(packing.key_lengths, device=cuda_device)
        output = ops.attention(*packing.padded(*inputs), key_lengths=lengths, impl=impl, **options)
        output = packing.queries.pack(output.transpose(1, 2))
        return [output.detach(), *torch.autograd.grad(output, inputs, cotangent.to(dtype))]

    equal(actual, padded("native", HALF))
    truth, plain = padded("reference", torch.float64), padded("reference", HALF)
    oracle.assert_all_match(actual, truth, plain, ("output", "dquery", "dkey", "dvalue"))


@pytest.mark.parametrize("dtype", [HALF, BFLOAT16], ids=str)
@pytest.mark.parametrize("keys", [40, 70])
@pytest.mark.parametrize("rules", [{}, {"softcap": 3.0, "dropout_p": 0.3, "seed": 5}, {"is_causal": True}], ids=str)
def test_huge_scores_give_what_fp32_gives(cuda_device, rules, keys, dtype):
    query, key = rounded_scores.halves(1, 2, 20, 16), rounded_scores.halves(1, 1, keys, 16)
    inputs = [x.to(cuda_device, dtype) for x in (query, key, torch.randn(1, 1, keys, 16))]
    mask = torch.zeros(20, keys, device=cuda_device)
    mask[1], mask[2], mask[3] = rounded_scores.LOWEST, -1e9, float("-inf")
    mask[4:9, 3:6], mask[9:, :32] = 1e30, rounded_scores.LOWEST
    dout = torch.randn(1, 2, 20, 16, device=cuda_device).to(dtype)

    def expected(kind, *inputs):
        return rounded_scores.attention(*inputs, mask, scale=0.25, dtype=kind, **rules).to(inputs[0].dtype)

    found = []
    for call, kind in (
        (partial(ops.attention, attn_mask=mask, scale=0.25, impl="native", **rules), dtype),
        (partial(expected, torch.float64), torch.float64),
        (partial(expected, torch.float32), dtype),
    ):
        some = [x.to(kind).requires_grad_() for x in inputs]
        output = call(*some)
        found.append([output.detach(), *torch.autograd.grad(output, some, dout.to(kind))])
    for result, truth, plain in zip(*found, strict=True):
        oracle.assert_matches(result, truth, plain, inherent=torch.finfo(dtype).eps)


@pytest.mark.parametrize("softcap", [None, 5e4])
def test_rows_of_weights_formed_again_sum_to_one(cuda_device, softcap):
    query, key, value = qkv(cuda_device, (1, 2, 2, 16, 40, 16, 16))
    value.requires_grad_()
    output = ops.attention(query * 300, key * 300, value, softcap=softcap, impl="native")
    (gradient,) = torch.autograd.grad(output.sum(), value)
    torch.testing.assert_close(
        gradient[..., 0].float().sum(-1), torch.full((1, 2), 16.0).to(gradient.device), rtol=2e-4, atol=0
    )


@pytest.mark.parametrize("rows", [17, 1])
def test_a_bias_and_the_bits_of_a_mask_together(cuda_device, rows):
    inputs = qkv(cuda_device)
    allowed = torch.rand(2, 1, rows, 33, device=cuda_device) < 0.7
    bias = torch.randn(1, 2, 17, 33, device=cuda_device)
    words, reach = getattr(torch.ops, native.NAMESPACE).attention_mask_bits(allowed, None, 0, None, None)
    bits = (words if rows > 1 else None), reach
    rest = (*[None] * 8, 17, 33, 0, None, None, 0.25, None, 0.0, 0)

    def together(*inputs, impl):
        return apply(Attended, native.NAMESPACE, Attention(*inputs, bias, *bits, *rest))[0]

    as_one = {"attn_mask": bias.masked_fill(~allowed, float("-inf")), "scale": 0.25}
    equal(run(inputs, together), run(inputs, **as_one))


# From one warp a pair to several; from one launch of the backward to two.
@pytest.mark.parametrize("extra", [10, 31, 200])
def test_more_padding_and_more_sequences_change_no_bit(cuda_device, extra):
    query, key, value = qkv(cuda_device, (2, 2, 1, 17, 33, 64, 64))
    options = {"dropout_p": 0.3, "seed": SEED, "is_causal": True, "query_start": 9}
    lengths = torch.tensor([33, 20, 0], device=cuda_device)
    expected = run([query, key, value], key_lengths=lengths[:2], **options)
    more = [
        F.pad(x, (0, 0, 0, n, 0, 0, 0, 1), value=float("nan")) for x, n in ((query, 0), (key, extra), (value, extra))
    ]
    more[0][2] = 1.0
    actual = run(more, key_lengths=lengths, **options)
    for got, wanted in zip(actual, expected, strict=True):
        equal(got[:2, :, : wanted.shape[2]], wanted)
        assert not got[2].any()
        assert not got[:2, :, wanted.shape[2] :].any()


def test_same_inputs_same_bits(cuda_device):
    tensors = make(CASES["negative scale, lengths, sinks, 4 to 1"][1], cuda_device, BFLOAT16)
    equal(*(results(tensors, "native", BFLOAT16) for _ in range(2)))


@pytest.mark.parametrize("keys", [7, 60])
def test_dropout_keeps_what_the_reference_keeps(cuda_device, keys):
    query, key, _ = qkv(cuda_device, (2, 3, 1, 20, keys, 16, 64))
    value = torch.eye(keys, 64, device=cuda_device).expand(2, 1, -1, -1).to(HALF)
    weights = ops.attention(query, key, value, dropout_p=0.4, seed=SEED, site=SITE, impl="native")[..., :keys]
    kept = [oracle.kept_elements(SEED, 0.4, 20, keys, group, SITE) for group in range(6)]
    equal(weights != 0, torch.stack(kept).view(2, 3, 20, keys).to(cuda_device))


def test_queries_without_keys_give_zero_and_zero_gradients(cuda_device):
    inputs = qkv(cuda_device)
    mask = torch.zeros(17, 33, dtype=torch.bool, device=cuda_device)
    for options in ({"attn_mask": mask}, {"is_causal": True, "query_start": -17}):
        for result in run(inputs, **options):
            equal(result, torch.zeros_like(result))


@pytest.mark.parametrize("shape", [(0, 2, 1, 5, 5, 16, 16), (2, 2, 1, 0, 5, 16, 16), (2, 2, 1, 5, 0, 16, 16)], ids=str)
def test_empty_inputs(cuda_device, shape):
    for result in run(qkv(cuda_device, shape)):
        equal(result, torch.zeros_like(result))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_no_query_reaches_stays_there(cuda_device, poison):
    query, key, value = qkv(cuda_device)
    mask = torch.rand(2, 2, 17, 33, device=cuda_device) < 0.7
    mask[..., 5], mask[0, 1, 3], mask[1, :, 9:, 20] = False, False, False
    # The mask leaves key 5 to none; causality the last ones, and the padding.
    hidden = torch.zeros(33, dtype=torch.bool, device=cuda_device)
    hidden[5] = hidden[17:] = True
    padding = {"key_lengths": torch.tensor([30, 30], device=cuda_device), "is_causal": True}
    float_mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, float("-inf"))
    for options in ({"attn_mask": mask}, {"attn_mask": float_mask}):
        expected = run([query, key, value], **options, **padding)
        poisoned = [x.masked_fill(hidden[:, None], poison) for x in (key, value)]
        empty = query.clone()
        empty[0, 1, 3] = poison
        equal(run([empty, *poisoned], **options, **padding), expected)
    # Without a mask, what the window leaves to no query, and a query whose window is empty.
    window = {"window_size": (2, 0), "query_start": -4}
    expected = run([query, key, value], **window)
    poisoned = [x.clone() for x in (query, key, value)]
    poisoned[0][:, :, 3] = poisoned[1][:, :, 13:] = poisoned[2][:, :, 13:] = poison
    equal(run(poisoned, **window), expected)


def test_nan_that_one_head_may_see_stays_out_of_another(cuda_device):
    query, key, value = qkv(cuda_device)
    mask = torch.ones(1, 2, 17, 33, dtype=torch.bool, device=cuda_device)
    mask[:, 1, :, 20] = False
    expected = run([query, key, value], attn_mask=mask)
    value[:, :, 20] = float("nan")
    actual = run([query, key, value], attn_mask=mask)
    for got, wanted in zip(actual[:2], expected[:2], strict=True):
        assert got[:, 0].isnan().any()
        equal(got[:, 1], wanted[:, 1])


@pytest.mark.parametrize("keys", [33, 130])
def test_only_wanted_gradients_are_computed(cuda_device, keys):
    inputs = qkv(cuda_device, (1, 2, 1, 17, keys, 64, 64))
    options = {"dropout_p": 0.3, "seed": SEED, "impl": "native"}
    cotangent = torch.randn(1, 2, 17, 64, device=cuda_device).half()
    every = [x.detach().requires_grad_() for x in inputs]
    expected = torch.autograd.grad(ops.attention(*every, **options), every, cotangent)
    for subset in ((0,), (1,), (2,), (0, 2)):
        some = [x.detach().requires_grad_(i in subset) for i, x in enumerate(inputs)]
        ops.attention(*some, **options).backward(cotangent)
        for i, x in enumerate(some):
            assert x.grad is None if i not in subset else torch.equal(x.grad, expected[i])


def test_heads_of_one_projection_and_expanded_gradients(cuda_device):
    projected = torch.randn(2, 17, 3, 2, 16, device=cuda_device).half()
    views = [projected[:, :, i].transpose(1, 2) for i in range(3)]
    copies = [x.contiguous() for x in views]
    output, *gradients = run(views, is_causal=True)
    equal([output, *gradients], run(copies, is_causal=True))
    assert output.transpose(1, 2).is_contiguous()
    assert all(x.transpose(1, 2).is_contiguous() for x in gradients)
    columns = [x.repeat_interleave(2, dim=-1)[..., ::2] for x in copies]
    equal(run(columns, is_causal=True), run(copies, is_causal=True))
    found, expanded = [], torch.ones(16, device=cuda_device).half().expand(2, 2, 17, 16)
    for cotangent in (expanded, expanded.contiguous()):
        inputs = [x.detach().requires_grad_() for x in copies]
        found.append(torch.autograd.grad(ops.attention(*inputs, impl="native"), inputs, cotangent))
    equal(*found)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((1, 1, 1, 5, 5, 16, 16), torch.float32, "expected float16 or bfloat16"),
        ((1, 1, 1, 5, 5, 72, 16), HALF, "multiples of 8 up to 64.*, got 72"),
        ((1, 1, 1, 5, 5, 16, 12), HALF, "multiples of 8 up to 64.*, got .*12"),
        ((1, 1, 1, 5, 257, 16, 16), HALF, "at most 256 queries and 256 keys .*, got 5 and 257"),
        ((1, 1, 1, 257, 5, 16, 16), HALF, "at most 256 queries and 256 keys .*, got 257 and 5"),
    ],
    ids=str,
)
def test_what_it_does_not_serve_is_refused(cuda_device, shape, dtype, message):
    with pytest.raises(refusal(cuda_device), match=message):
        ops.attention(*qkv(cuda_device, shape, dtype), impl="native")


def test_a_bias_that_learns_is_refused(cuda_device):
    bias = torch.zeros(17, 33, dtype=HALF, device=cuda_device, requires_grad=True)
    with pytest.raises(refusal(cuda_device), match=r"expected a bias without a gradient|a bias that learns"):
        ops.attention(*qkv(cuda_device), bias, impl="native").sum().backward()


def refusal(device):
    """On a GPU tfm.ops refuses before the operator does."""
    return ValueError if device.type == "cuda" else RuntimeError
