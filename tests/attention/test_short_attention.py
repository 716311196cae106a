"""Attention over few keys: the Triton kernels against the oracle, padded and packed, dropout included."""

from __future__ import annotations

from itertools import combinations

import launches
import oracle
import pytest
import torch
import torch.nn.functional as F
from attention_cases import SEED, SITE, Packing, Problem, assert_matches, make, results

from tfm import ops
from tfm.kernels.launch.attention import short as launch

FORWARD, BACKWARD = ["short_attention_forward_kernel"], ["short_attention_backward_kernel"]
BITS, BIAS = ["mask_bits_kernel"], ["bias_gradient_kernel", "sum_splits_kernel"]

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")

# Lengths at and beside the edges of tiles, queries beside keys; what fits on chip in fp32 is shorter.
WIDE = {
    "one of each": Problem((2, 2, 2, 1, 1, 16, 16), {"dropout_p": 0.5}),
    "3 queries, 17 keys": Problem((2, 4, 1, 3, 17, 16, 16), {"dropout_p": 0.3}),
    "17 queries, 3 keys, causal": Problem((2, 2, 1, 17, 3, 16, 32), {"is_causal": True, "dropout_p": 0.2}),
    "lengths, dropout": Problem((3, 2, 2, 33, 17, 16, 16), {"key_lengths": [0, 11, 17], "dropout_p": 0.3}),
    "causal, starts, sinks": Problem(
        (1, 3, 1, 17, 33, 24, 16), {"is_causal": True, "query_start": [-3], "sinks": True, "dropout_p": 0.1}
    ),
    "window, softcap": Problem((2, 2, 2, 33, 33, 16, 16), {"window_size": (4, 2), "softcap": 1.5, "dropout_p": 0.2}),
    "key padding": Problem((2, 2, 1, 17, 15, 16, 16), {"dropout_p": 0.2}, ("bool", (2, 1, 1, 15))),
    "bool mask, dropout": Problem((2, 2, 1, 33, 12, 16, 16), {"dropout_p": 0.2}, ("bool", (2, 2, 33, 12))),
    "bias of each head": Problem((3, 2, 1, 17, 33, 16, 16), {"dropout_p": 0.2}, ("float", (1, 2, 17, 33))),
    "key mask, causal": Problem((2, 2, 1, 17, 30, 16, 16), {"key_mask": "left", "is_causal": True, "dropout_p": 0.2}),
    "key mask, bias of each head, 2 to 1": Problem(
        (3, 2, 1, 17, 30, 16, 16), {"key_mask": "holes", "sinks": True, "dropout_p": 0.2}, ("float", (1, 2, 17, 30))
    ),
    "key mask, bool mask of each head, 2 to 1": Problem(
        (2, 2, 1, 17, 30, 16, 16), {"key_mask": "left", "dropout_p": 0.2}, ("bool", (1, 2, 17, 30))
    ),
    "everything": Problem(
        (2, 4, 2, 17, 30, 80, 40),
        {
            "is_causal": True, "query_start": [5, -2], "window_size": (13, 1), "key_lengths": [30, 21],
            "softcap": 1.5, "sinks": True, "scale": -0.4, "dropout_p": 0.3,
        },
        ("bool", (1, 1, 17, 30)),
    ),
}  # fmt: skip
NARROW = {
    "65 causal": Problem((1, 2, 1, 65, 65, 64, 64), {"is_causal": True, "dropout_p": 0.3}),
    "33 queries, 130 keys": Problem((2, 2, 2, 33, 130, 16, 16), {"key_lengths": [130, 65], "dropout_p": 0.1}),
    "130 queries, 33 keys": Problem((1, 2, 2, 130, 33, 16, 16), {"window_size": (-1, 20), "dropout_p": 0.1}),
    "256": Problem((1, 1, 1, 40, 256, 64, 64), {"is_causal": True, "query_start": 216, "dropout_p": 0.2}),
    "bias over 100": Problem((2, 1, 1, 17, 100, 16, 16), {"dropout_p": 0.2}, ("float", (17, 100))),
    "96 wide": Problem((2, 2, 2, 17, 20, 96, 96), {"key_lengths": [20, 3], "dropout_p": 0.3}),
}
CASES = [(name, WIDE[name], torch.float32) for name in WIDE]
CASES += [(name, problem, torch.float16) for name, problem in (NARROW | {"everything": WIDE["everything"]}).items()]
CASES += [(name, problem, torch.bfloat16) for name, problem in (NARROW | WIDE).items()]


@pytest.fixture
def launched(monkeypatch):
    return launches.watch(monkeypatch)


def equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def run(inputs, call=ops.attention, **options):
    """Output and gradients of query, key and value, the output weighed by fixed random numbers."""
    inputs = [x.detach().requires_grad_() if i < 3 and x is not None else x for i, x in enumerate(inputs)]
    output = call(*inputs, impl="triton", **options)
    generator = torch.Generator(output.device).manual_seed(7)
    cotangent = torch.randn(output.shape, generator=generator, device=output.device).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, inputs[:3], cotangent)]


def qkv(device, shape=(2, 2, 1, 17, 33, 16, 16), dtype=torch.float32):
    inputs = make(Problem(shape), device, dtype).inputs
    return [inputs[name] for name in ("query", "key", "value")]


@pytest.mark.parametrize(
    ("problem", "dtype"), [case[1:] for case in CASES], ids=[f"{name} {dtype}" for name, _, dtype in CASES]
)
def test_kernels_match(problem, dtype, kernel_device, launched):
    assert_matches(make(problem, kernel_device, dtype), dtype)
    kind = problem.mask[0] if problem.mask else ""
    backward = BACKWARD * (2 if problem.shape[4] > 128 else 1)
    assert launched == BITS * bool(kind) + FORWARD + backward + BIAS * (kind == "float")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rules", [{}, {"is_causal": True}, {"window_size": (5, 0), "softcap": 0.9}], ids=str)
def test_packed_equals_padded_and_the_reference(rules, dtype, kernel_device, launched):
    packing = Packing([17, 0, 5, 1], [20, 3, 33, 0], kernel_device)
    options = {"dropout_p": 0.3, "seed": SEED, "site": SITE} | rules
    queries, keys = sum(packing.query_lengths), sum(packing.key_lengths)
    packed = [
        torch.randn(rows, heads, 16, device=kernel_device).to(dtype)
        for rows, heads in ((queries, 2), (keys, 1), (keys, 1))
    ]
    actual = run([*packed, *packing.arguments], ops.varlen_attention, **options)
    assert launched == FORWARD + BACKWARD
    cotangent = torch.randn(
        actual[0].shape, generator=torch.Generator(kernel_device).manual_seed(7), device=kernel_device
    ).to(dtype)

    def padded(impl, kind):
        inputs = [x.to(kind).requires_grad_() for x in packed]
        lengths = torch.tensor(packing.key_lengths, device=kernel_device)
        output = ops.attention(*packing.padded(*inputs), key_lengths=lengths, impl=impl, **options)
        output = packing.queries.pack(output.transpose(1, 2))
        return [output.detach(), *torch.autograd.grad(output, inputs, cotangent.to(kind))]

    equal(actual, padded("triton", dtype))
    truth, plain = padded("reference", torch.float64), padded("reference", dtype)
    oracle.assert_all_match(actual, truth, plain, ("output", "dquery", "dkey", "dvalue"))


def test_more_padding_and_more_sequences_change_no_bit(kernel_device, launched):
    query, key, value = qkv(kernel_device)
    options = {"dropout_p": 0.3, "seed": SEED, "is_causal": True, "query_start": 9}
    lengths = torch.tensor([33, 20], device=kernel_device)
    expected = run([query, key, value], key_lengths=lengths, **options)
    more = [
        F.pad(x, (0, 0, 0, extra, 0, 0, 0, 1), value=float("nan")) for x, extra in ((query, 0), (key, 31), (value, 31))
    ]
    more[0][2], longer = 1.0, torch.cat((lengths, lengths.new_zeros(1)))
    actual = run(more, key_lengths=longer, **options)
    for got, wanted in zip(actual, expected, strict=True):
        equal(got[:2, :, : wanted.shape[2]], wanted)
        assert not got[2].any()
        assert not got[:2, :, wanted.shape[2] :].any()


def test_same_inputs_same_bits(kernel_device):
    tensors = make(WIDE["bias of each head"], kernel_device, torch.float32)
    equal(*(results(tensors, "triton", torch.float32) for _ in range(2)))


def test_queries_without_keys_give_zero_and_zero_gradients(kernel_device, launched):
    inputs = qkv(kernel_device)
    mask = torch.zeros(17, 33, dtype=torch.bool, device=kernel_device)
    for options in ({"attn_mask": mask}, {"is_causal": True, "query_start": -17}):
        for result in run(inputs, **options):
            equal(result, torch.zeros_like(result))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_no_query_reaches_stays_there(poison, kernel_device):
    query, key, value = qkv(kernel_device)
    mask = torch.rand(2, 2, 17, 33, device=kernel_device) < 0.7
    mask[..., 5], mask[0, 1, 3], mask[1, :, 9:, 20] = False, False, False
    hidden = torch.zeros(33, dtype=torch.bool, device=kernel_device)
    # The mask leaves key 5 to none; causality the last ones, and the padding.
    hidden[5] = hidden[17:] = True
    padding = {"key_lengths": torch.tensor([30, 30], device=kernel_device), "is_causal": True}
    float_mask = torch.zeros(mask.shape, device=kernel_device).masked_fill(~mask, float("-inf"))
    for options in ({"attn_mask": mask}, {"attn_mask": float_mask}):
        expected = run([query, key, value], **options, **padding)
        poisoned = [x.masked_fill(hidden[:, None], poison) for x in (key, value)]
        empty = query.clone()
        empty[0, 1, 3] = poison
        equal(run([empty, *poisoned], **options, **padding), expected)


SUBSETS = [subset for size in (1, 2) for subset in combinations(range(3), size)]


@pytest.mark.parametrize("keys", [33, 130])
def test_only_wanted_gradients_are_computed(keys, kernel_device, launched):
    inputs = qkv(kernel_device, (1, 2, 1, 17, keys, 16, 16), torch.float16)
    options = {"dropout_p": 0.3, "seed": SEED, "impl": "triton"}
    cotangent = torch.randn(1, 2, 17, 16, device=kernel_device).half()
    every = [x.detach().requires_grad_() for x in inputs]
    expected = torch.autograd.grad(ops.attention(*every, **options), every, cotangent)
    for subset in SUBSETS:
        launched.clear()
        some = [x.detach().requires_grad_(i in subset) for i, x in enumerate(inputs)]
        ops.attention(*some, **options).backward(cotangent)
        for i, x in enumerate(some):
            assert x.grad is None if i not in subset else torch.equal(x.grad, expected[i])
        passes = 1 if keys == 33 else (2 in subset) + (subset != (2,))
        assert launched == FORWARD + BACKWARD * passes


def test_heads_of_one_projection_and_expanded_gradients(kernel_device):
    projected = torch.randn(2, 17, 3, 2, 16, device=kernel_device)
    views = [projected[:, :, i].transpose(1, 2) for i in range(3)]
    copies = [x.contiguous() for x in views]
    equal(run(views, is_causal=True), run(copies, is_causal=True))
    columns = [x.repeat_interleave(2, dim=-1)[..., ::2] for x in copies]
    equal(run(columns, is_causal=True), run(copies, is_causal=True))
    gradients = []
    for cotangent in (torch.ones(16, device=kernel_device).expand(2, 2, 17, 16), torch.ones(2, 2, 17, 16)):
        inputs = [x.detach().requires_grad_() for x in copies]
        output = ops.attention(*inputs, impl="triton")
        gradients.append(torch.autograd.grad(output, inputs, cotangent.to(kernel_device)))
    equal(*gradients)


def test_rows_are_found_by_the_problem_alone():
    forward, backward = launch.short_attention_forward, launch.short_attention_backward
    common = {"dim": 64, "dtype": torch.bfloat16, "has_bias": False, "has_words": False, "major": 9}
    for find in (forward, backward):
        for keys, tile in ((1, 16), (16, 16), (17, 32), (64, 64), (65, 128), (256, 256)):
            assert find(keys, keys, **common).block_keys == tile
        assert find(1, 257, **common) is None
        assert find(257, 16, **common) is None
        assert find(33, 128, **common | {"dim": 80}).block_keys == 128
        assert find(33, 129, **common | {"dim": 80}) is None
        # Words of a mask are 32 bits.
        assert find(5, 5, **common | {"has_words": True}).block_keys == 32
    # Everything fits a translation batch in one launch each way; a tile of queries each once sentences are long.
    assert backward(64, 64, **common).passes == 1
    assert [forward(n, n, **common).splits(n) for n in (34, 64, 65, 256)] == [1, 1, 2, 4]
    # Shared memory would not do for a bias, nor would registers.
    assert backward(256, 256, **common | {"has_bias": True}) is None
