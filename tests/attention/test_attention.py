"""Attention against one query at a time, against torch's own, and the rules of masks, padding and dropout."""

from __future__ import annotations

import oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tfm import ops

BATCH, HEADS, QUERIES, KEYS = 2, 4, 5, 7

# Padding on the left, and a hole.
LEFT = torch.tensor([[False, False, True, True, False, True, True], [True] * 7])
# Options of the operation; "mask" is (kind, shape), lists become tensors.
CASES = {
    "plain": {},
    "scale": {"scale": 0.3},
    "causal": {"is_causal": True},
    "causal, bottom-right": {"is_causal": True, "query_start": KEYS - QUERIES},
    "causal, a start for each sequence": {"is_causal": True, "query_start": [0, 3]},
    "causal, first rows empty": {"is_causal": True, "query_start": -2},
    "window": {"window_size": (1, 2)},
    "window, left only": {"window_size": (2, -1), "query_start": [1, 4]},
    "window, right only": {"window_size": (-1, 0)},
    "window of one key": {"window_size": (0, 0), "query_start": 2},
    "window, last rows empty": {"window_size": (0, -1), "query_start": 4},
    "lengths": {"key_lengths": [7, 3]},
    "lengths, one is zero": {"key_lengths": [0, 5]},
    "bool mask [Sq, Sk]": {"mask": ("bool", (QUERIES, KEYS))},
    "bool mask [B, 1, 1, Sk]": {"mask": ("bool", (BATCH, 1, 1, KEYS))},
    "bool mask [B, Hq, Sq, Sk]": {"mask": ("bool", (BATCH, HEADS, QUERIES, KEYS))},
    "bool mask [Hq, 1, Sk]": {"mask": ("bool", (HEADS, 1, KEYS))},
    "bool mask [B, 1, Sq, 1]": {"mask": ("bool", (BATCH, 1, QUERIES, 1))},
    "float mask [Sq, Sk]": {"mask": ("float", (QUERIES, KEYS))},
    "float mask [1, Hq, Sq, Sk]": {"mask": ("float", (1, HEADS, QUERIES, KEYS))},
    "float mask [B, Hq, Sq, Sk]": {"mask": ("float", (BATCH, HEADS, QUERIES, KEYS))},
    "float mask [B, 1, 1, Sk]": {"mask": ("float", (BATCH, 1, 1, KEYS))},
    "key mask": {"key_mask": LEFT},
    "key mask and bool mask": {"key_mask": LEFT, "mask": ("bool", (QUERIES, KEYS))},
    "key mask and float mask": {"key_mask": LEFT, "mask": ("float", (1, HEADS, QUERIES, KEYS)), "is_causal": True},
    "softcap": {"softcap": 0.7},
    "sinks": {"sinks": True},
    "sinks, nothing else to attend to": {"sinks": True, "key_lengths": [0, 7]},
    "causal and lengths and float mask": {
        "is_causal": True, "query_start": 1, "key_lengths": [4, 7], "mask": ("float", (1, HEADS, QUERIES, KEYS)),
    },
    "everything": {
        "is_causal": True, "query_start": [1, 2], "window_size": (3, 1), "key_lengths": [6, 4], "softcap": 1.5,
        "key_mask": LEFT, "sinks": True, "scale": 0.9, "mask": ("float", (BATCH, 1, QUERIES, KEYS)),
    },
}  # fmt: skip
# What torch's CPU kernel serves: no learned mask, softcap or sinks.
FAST_CASES = [name for name, case in CASES.items() if not ({"softcap", "sinks"} & set(case)) and "float" not in name]


def qkv(heads=HEADS, key_heads=2, dim=3, value_dim=6, dtype=torch.float64, queries=QUERIES, keys=KEYS, batch=BATCH):
    shapes = (batch, heads, queries, dim), (batch, key_heads, keys, dim), (batch, key_heads, keys, value_dim)
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def make_mask(kind: str, shape: tuple[int, ...], dtype=torch.float64) -> Tensor:
    allowed = torch.rand(shape) < 0.6
    if kind == "bool":
        return allowed
    return torch.randn(shape, dtype=dtype).masked_fill(~allowed, float("-inf")).requires_grad_()


def arguments(case: dict, dtype=torch.float64):
    """(options of ops.attention, allowed keys, learnable tensors besides query, key and value) of one case."""
    options = {name: value for name, value in case.items() if name not in ("mask", "sinks")}
    mask = make_mask(*case["mask"], dtype) if "mask" in case else None
    rules = ("is_causal", "query_start", "window_size", "key_lengths", "key_mask")
    allowed = oracle.allowed_keys(
        (BATCH, HEADS, QUERIES, KEYS), mask=mask, **{rule: case[rule] for rule in rules if rule in case}
    )
    for name in ("query_start", "key_lengths"):
        if isinstance(options.get(name), list):
            options[name] = torch.tensor(options[name], dtype=torch.int32)
    options["attn_mask"] = mask
    if "sinks" in case:
        options["sinks"] = torch.randn(HEADS, dtype=dtype, requires_grad=True)
    learnable = [t for t in (options["attn_mask"], options.get("sinks")) if t is not None and t.requires_grad]
    return options, allowed, learnable


def oracle_options(options: dict) -> dict:
    mask = options["attn_mask"]
    bias = mask if mask is not None and mask.is_floating_point() else None
    return {"bias": bias} | {name: options.get(name) for name in ("scale", "softcap", "sinks")}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_one_query_at_a_time(case):
    inputs = qkv()
    options, allowed, learnable = arguments(case)
    output, lse = ops.attention(*inputs, **options, return_lse=True)
    expected, expected_lse = oracle.attention(*inputs, allowed, **oracle_options(options))
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(lse, expected_lse)
    torch.testing.assert_close(ops.attention(*inputs, **options), expected)
    cotangent, lse_cotangent = torch.randn_like(output), torch.randn_like(lse)
    wanted = [*inputs, *learnable]
    grads, expected_grads = (
        torch.autograd.grad((o * cotangent).sum() + (d.masked_fill(d.isinf(), 0) * lse_cotangent).sum(), wanted)
        for o, d in ((output, lse), (expected, expected_lse))
    )
    for grad, truth in zip(grads, expected_grads, strict=True):
        assert grad.isfinite().all()
        torch.testing.assert_close(grad, truth)


@pytest.mark.parametrize("name", FAST_CASES)
def test_torchs_cpu_kernel_equals_the_general_path(name):
    double = qkv()
    options, _, _ = arguments(CASES[name])
    cotangent = torch.randn(BATCH, HEADS, QUERIES, 6, dtype=torch.float64).float()
    results = []
    single = [t.detach().float().requires_grad_() for t in double]
    rounded = [t.detach().double().requires_grad_() for t in single]
    for inputs, with_lse in ((single, False), (rounded, True), (single, True)):
        output = ops.attention(*inputs, **options, return_lse=with_lse)
        output = output[0] if with_lse else output
        results.append([output, *torch.autograd.grad((output * cotangent.to(output.dtype)).sum(), inputs)])
    oracle.assert_all_match(*results, ("output", "query", "key", "value"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("learned", [False, True], ids=["bool", "float"])
def test_errs_no_more_than_torch(dtype, learned):
    inputs = qkv(dim=17, value_dim=9, dtype=dtype, queries=33, keys=65)
    mask = torch.rand(BATCH, 1, 33, 65) < 0.7
    if learned:
        mask = torch.randn(BATCH, HEADS, 33, 65).masked_fill(~mask, float("-inf")).to(dtype)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    cotangent = torch.randn(BATCH, HEADS, 33, 9).to(dtype)
    results = []
    for function, given_inputs in ((ops.attention, inputs), (F.scaled_dot_product_attention, wide),
                                   (F.scaled_dot_product_attention, inputs)):  # fmt: skip
        fitting = mask.to(given_inputs[0].dtype) if learned else mask
        output = function(*given_inputs, fitting, enable_gqa=True)
        results.append([output, *torch.autograd.grad(output, given_inputs, cotangent.to(output.dtype))])
    oracle.assert_all_match(*results, ("output", "query", "key", "value"))


@pytest.mark.parametrize(("heads", "key_heads"), [(1, 1), (3, 3), (6, 2), (5, 1), (6, 3)])
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "mask by head"])
def test_equals_torch_for_any_ratio_of_heads(heads, key_heads, masked):
    inputs = qkv(heads, key_heads, dim=8, value_dim=8)
    mask = torch.rand(BATCH, heads, QUERIES, KEYS) < 0.7 if masked else None
    if mask is not None:
        mask[..., 0] = True
    expected = F.scaled_dot_product_attention(*inputs, mask, is_causal=not masked, enable_gqa=True)
    torch.testing.assert_close(ops.attention(*inputs, mask, is_causal=not masked), expected)


def test_takes_any_strides():
    query = torch.randn(BATCH, 2 * QUERIES, HEADS, 3, dtype=torch.float64).transpose(1, 2)[:, :, ::2]
    key = torch.randn(3, KEYS, 2, BATCH, dtype=torch.float64).permute(3, 2, 1, 0)
    value = torch.randn(1, 2, KEYS, 1, dtype=torch.float64).expand(BATCH, -1, -1, 4)
    mask = torch.rand(KEYS, QUERIES).t() < 0.8
    strided = [t.requires_grad_() for t in (query, key)]
    dense = [t.detach().contiguous().requires_grad_() for t in (query, key)]
    output = ops.attention(*strided, value, mask, key_lengths=torch.tensor([3, 7]))
    expected = ops.attention(*dense, value.contiguous(), mask.contiguous(), key_lengths=torch.tensor([3, 7]))
    torch.testing.assert_close(output, expected)
    grads = torch.autograd.grad(output.sum(), strided)  # a cotangent of strides 0
    torch.testing.assert_close(grads, torch.autograd.grad(expected, dense, torch.ones_like(expected)))


def test_gradcheck():
    inputs = qkv(heads=2, key_heads=1, dim=2, value_dim=1, queries=2, keys=3, batch=1)
    bias = make_mask("float", (1, 2, 2, 3))
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def function(query, key, value, bias, sinks):
        return ops.attention(
            query, key, value, bias, 0.4, softcap=2.0, sinks=sinks, return_lse=True, key_lengths=torch.tensor([2]),
            seed=7,
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, (*inputs, bias, sinks))


NOTHING_ALLOWED = {
    "bool mask": {"attn_mask": torch.zeros(QUERIES, KEYS, dtype=torch.bool)},
    "float mask": {"attn_mask": torch.full((1, HEADS, QUERIES, KEYS), float("-inf"))},
    "lengths": {"key_lengths": torch.zeros(BATCH, dtype=torch.int32)},
    "key mask": {"key_mask": torch.zeros(BATCH, KEYS, dtype=torch.bool)},
    "causal": {"is_causal": True, "query_start": -QUERIES},
    "mask and lengths that do not meet": {
        "attn_mask": (torch.arange(KEYS) >= 3).expand(QUERIES, KEYS), "key_lengths": torch.tensor([3, 2]),
    },
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", NOTHING_ALLOWED.values(), ids=NOTHING_ALLOWED.keys())
def test_rows_without_keys_give_zero_and_zero_gradients(options, dtype):
    inputs = qkv(dtype=dtype)
    output = ops.attention(*inputs, **options)
    assert (output == 0).all()
    for grad in torch.autograd.grad(output.sum(), inputs):
        assert (grad == 0).all()
    assert (ops.attention(*inputs, **options, return_lse=True)[1] == float("-inf")).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("how", ["lengths", "mask by head", "float mask", "window", "key mask"])
def test_what_no_query_reaches_stays_there(how, poison, dtype):
    inputs = qkv(dtype=dtype)
    hidden = torch.zeros(BATCH, 2, KEYS, 1, dtype=torch.bool)
    if how == "lengths":
        options = {"key_lengths": torch.tensor([2, 7])}
        hidden[0, :, 2:] = True
    elif how == "mask by head":  # the two query heads that share key head 1, not head 2 alone
        mask = torch.ones(BATCH, HEADS, QUERIES, KEYS, dtype=torch.bool)
        mask[0, 2:, :, 3] = mask[1, 2, :, 5] = False
        options, hidden[0, 1, 3] = {"attn_mask": mask}, True
    elif how == "float mask":
        mask = torch.randn(QUERIES, KEYS, dtype=dtype)
        mask[:, 4] = float("-inf")
        options, hidden[:, :, 4] = {"attn_mask": mask}, True
    elif how == "key mask":
        options, hidden[:] = {"key_mask": LEFT}, ~LEFT[:, None, :, None]
    else:
        options = {"window_size": (1, 0), "query_start": 1}
        hidden[:, :, 6] = True
    query, key, value = inputs
    poisoned = [t.detach().masked_fill(hidden, poison).requires_grad_() for t in (key, value)]
    cotangent = torch.randn(BATCH, HEADS, QUERIES, 6, dtype=dtype)
    clean = ops.attention(query, key, value, **options)
    output = ops.attention(query, *poisoned, **options)
    assert torch.equal(output, clean)
    grads = torch.autograd.grad(output, (query, *poisoned), cotangent)
    for grad, expected in zip(grads, torch.autograd.grad(clean, inputs, cotangent), strict=True):
        assert torch.equal(grad, expected)
    assert (grads[1].masked_select(hidden) == 0).all()
    assert (grads[2].masked_select(hidden) == 0).all()


WITHOUT_KEYS = {
    "mask": {"attn_mask": (torch.arange(QUERIES) < 3)[:, None].expand(QUERIES, KEYS)},
    "window": {"window_size": (1, -1), "key_lengths": torch.tensor([2, 2])},
    "causal": {"is_causal": True, "query_start": -2},
    "causal, a start for each sequence": {"is_causal": True, "query_start": torch.tensor([-1, 0])},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("options", WITHOUT_KEYS.values(), ids=WITHOUT_KEYS.keys())
def test_a_query_without_keys_leaves_the_others_clean(options, dtype):
    query, key, value = qkv(dtype=dtype)
    lse = ops.attention(query, key, value, **options, return_lse=True)[1]
    poisoned = query.detach().masked_fill(lse.isinf()[..., None], float("nan")).requires_grad_()
    assert poisoned.isnan().any()
    output, expected = ops.attention(poisoned, key, value, **options), ops.attention(query, key, value, **options)
    assert torch.equal(output, expected)
    grads = torch.autograd.grad(output.sum(), (poisoned, key, value))
    for grad, clean in zip(grads, torch.autograd.grad(expected.sum(), (query, key, value)), strict=True):
        assert torch.equal(grad, clean)


def test_more_padding_changes_nothing():
    query, key, value = (t.detach() for t in qkv(dtype=torch.float32))
    lengths = torch.tensor([7, 4])
    wide_key, wide_value = (F.pad(t, (0, 0, 0, 30), value=float("nan")) for t in (key, value))
    plain = ops.attention(query, key, value, key_lengths=lengths)
    truth = ops.attention(query.double(), key.double(), value.double(), key_lengths=lengths)
    oracle.assert_matches(ops.attention(query, wide_key, wide_value, key_lengths=lengths), truth, plain)
    general = ops.attention(query, wide_key, wide_value, key_lengths=lengths, return_lse=True)[0]
    oracle.assert_matches(general, truth, plain)


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_dropout_draws_the_mask_of_the_coordinates(p):
    seed, site = -(2**40) - 3, 5
    inputs = qkv()
    options, allowed, learnable = arguments(CASES["everything"])
    groups = range(BATCH * HEADS)
    kept = torch.stack([oracle.kept_elements(seed, p, QUERIES, KEYS, group, site) for group in groups])
    scale = 65536 / (65536 - round(65536 * p)) if p < 1 else 0.0
    multiplier = kept.view(BATCH, HEADS, QUERIES, KEYS) * scale
    output = ops.attention(*inputs, dropout_p=p, seed=seed, site=site, **options)
    expected, _ = oracle.attention(*inputs, allowed, multiplier=multiplier, **oracle_options(options))
    torch.testing.assert_close(output, expected)
    cotangent, wanted = torch.randn_like(output), [*inputs, *learnable]
    grads = torch.autograd.grad(output, wanted, cotangent)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, wanted, cotangent))


@settings(deadline=None, max_examples=25)
@given(
    batch=st.integers(0, 3),
    queries=st.integers(0, 6),
    keys=st.integers(0, 6),
    dim=st.integers(1, 5),
    group=st.integers(1, 3),
    is_causal=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_any_shape(batch, queries, keys, dim, group, is_causal, dtype):
    inputs = qkv(2 * group, 2, dim, dim + 1, dtype, queries, keys, batch)
    output, lse = ops.attention(*inputs, is_causal=is_causal, return_lse=True)
    fast = ops.attention(*inputs, is_causal=is_causal)
    assert output.shape == fast.shape == (batch, 2 * group, queries, dim + 1)
    assert lse.shape == output.shape[:-1]
    torch.testing.assert_close(output, fast)
    if output.numel():
        allowed = oracle.allowed_keys((batch, 2 * group, queries, keys), is_causal)
        torch.testing.assert_close((output, lse), oracle.attention(*inputs, allowed))
    for grad in torch.autograd.grad(output.sum(), inputs):
        assert grad.isfinite().all()


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_autocast_rounds_the_inputs_alone(dropout_p):
    query, key, value = (torch.randn(2, 2, length, 8) for length in (5, 7, 7))
    with torch.autocast("cpu", torch.bfloat16):
        output, lse = ops.attention(query, key, value, dropout_p=dropout_p, return_lse=True, seed=3)
        alone = ops.attention(query, key, value, dropout_p=dropout_p, seed=3)
    expected = ops.attention(
        query.bfloat16(), key.bfloat16(), value.bfloat16(), dropout_p=dropout_p, return_lse=True, seed=3
    )
    assert output.dtype == alone.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    assert torch.equal(output, expected[0])
    assert torch.equal(lse, expected[1])


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_returned_weights_are_those_applied(dropout_p):
    query, key, value = (torch.randn(2, heads, length, 8).double() for heads, length in ((4, 5), (2, 7), (2, 7)))
    mask = torch.rand(2, 1, 5, 7) < 0.6
    mask[0, 0, 3] = False
    call = {"dropout_p": dropout_p, "seed": 3, "key_lengths": torch.tensor([7, 4])}
    output, lse, weights = ops.attention(query, key, value, mask, return_lse=True, return_weights=True, **call)
    torch.testing.assert_close(weights @ value.repeat_interleave(2, dim=1), output, rtol=0, atol=1e-12)
    assert torch.equal(output, ops.attention(query, key, value, mask, **call))
    assert not weights[0, :, 3].any()
    assert not weights[1, ..., 4:].any()
    if dropout_p == 0.0:
        reached = weights.sum(dim=-1)
        torch.testing.assert_close(reached, lse.isfinite().double(), rtol=0, atol=1e-12)
