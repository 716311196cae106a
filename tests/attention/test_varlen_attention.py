"""Packed attention against each sequence alone, and against the same batch padded, dropout included."""

from __future__ import annotations

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tfm import ops
from tfm.sequences import Layout, offsets

LENGTHS = [5, 1, 0, 3], [2, 7, 4, 0]
HEADS, KEY_HEADS, DIM, VALUE_DIM = 4, 2, 3, 5

CASES = {
    "plain": {},
    "causal": {"is_causal": True},
    "causal, a start for each sequence": {"is_causal": True, "query_start": [-3, 6, 0, 1]},
    "window, scale": {"window_size": (2, 0), "scale": 0.7},
    "softcap, sinks": {"softcap": 0.9, "sinks": True},
}


def packed(lengths=LENGTHS, dtype=torch.float64):
    queries, keys = map(sum, lengths)
    shapes = (queries, HEADS, DIM), (keys, KEY_HEADS, DIM), (keys, KEY_HEADS, VALUE_DIM)
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def packing(lengths=LENGTHS, extra=0):
    cu_seq_q, cu_seq_k = (offsets(torch.tensor(part, dtype=torch.int64)) for part in lengths)
    return cu_seq_q, cu_seq_k, max(lengths[0], default=0) + extra, max(lengths[1], default=0) + extra


def arguments(case: dict):
    options = dict(case)
    if "query_start" in case:
        options["query_start"] = torch.tensor(case["query_start"], dtype=torch.int32)
    if "sinks" in case:
        options["sinks"] = torch.randn(HEADS, dtype=torch.float64, requires_grad=True)
    return options


def one_by_one(query, key, value, lengths, case, options):
    """Each sequence alone, by the oracle: output and logsumexp, packed."""
    parts = []
    split = (t.split(part) for t, part in zip((query, key, value), (lengths[0], lengths[1], lengths[1]), strict=True))
    for index, sequence in enumerate(zip(*split, strict=True)):
        if len(sequence[0]) == 0:
            continue
        q, k, v = (t.transpose(0, 1)[None] for t in sequence)
        start = case.get("query_start", [0] * len(lengths[0]))[index]
        shape = (1, HEADS, q.shape[2], k.shape[2])
        rules = {rule: case[rule] for rule in ("is_causal", "window_size") if rule in case}
        allowed = oracle.allowed_keys(shape, query_start=start, **rules)
        others = {name: options.get(name) for name in ("scale", "softcap", "sinks")}
        output, lse = oracle.attention(q, k, v, allowed, **others)
        parts.append((output[0].transpose(0, 1), lse[0].transpose(0, 1)))
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


@pytest.mark.parametrize("extra", [0, 4], ids=["exact maxima", "larger maxima"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_each_sequence_alone(case, extra):
    inputs, options = packed(), arguments(case)
    output, lse = ops.varlen_attention(*inputs, *packing(extra=extra), **options, return_lse=True)
    expected, expected_lse = one_by_one(*inputs, LENGTHS, case, options)
    torch.testing.assert_close((output, lse), (expected, expected_lse))
    torch.testing.assert_close(ops.varlen_attention(*inputs, *packing(extra=extra), **options), expected)
    wanted = inputs + ([options["sinks"]] if "sinks" in options else [])
    cotangent, lse_cotangent = torch.randn_like(output), torch.randn_like(lse)
    grads, expected_grads = (
        torch.autograd.grad((o * cotangent).sum() + (d.masked_fill(d.isinf(), 0) * lse_cotangent).sum(), wanted)
        for o, d in ((output, lse), (expected, expected_lse))
    )
    torch.testing.assert_close(grads, expected_grads)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("is_causal", [False, True])
def test_packed_equals_padded(p, is_causal, dtype):
    inputs = packed(dtype=dtype)
    cu_seq_q, cu_seq_k, max_q, max_k = packing()
    options = {"dropout_p": p, "is_causal": is_causal, "seed": 2**62 + 11, "site": 3}
    output = ops.varlen_attention(*inputs, cu_seq_q, cu_seq_k, max_q, max_k, **options)
    rows, keys = Layout.of(cu_seq_q, max_q, len(inputs[0])), Layout.of(cu_seq_k, max_k, len(inputs[1]))
    padded = [
        layout.unpack(t).transpose(1, 2).detach().requires_grad_()
        for layout, t in zip((rows, keys, keys), inputs, strict=True)
    ]
    expected = ops.attention(*padded, key_lengths=cu_seq_k.diff(), **options)
    assert torch.equal(output, rows.pack(expected.transpose(1, 2)))
    cotangent = torch.randn_like(output)
    grads = torch.autograd.grad(output, inputs, cotangent)
    padded_grads = torch.autograd.grad(expected, padded, rows.unpack(cotangent).transpose(1, 2))
    for layout, grad, padded_grad in zip((rows, keys, keys), grads, padded_grads, strict=True):
        assert torch.equal(grad, layout.pack(padded_grad.transpose(1, 2)))


def test_sequences_of_one_length_need_no_padding_and_draw_the_same_mask():
    lengths = [4, 4, 4], [6, 6, 6]
    inputs = packed(lengths)
    options = {"dropout_p": 0.4, "seed": 5}
    output = ops.varlen_attention(*inputs, *packing(lengths), **options)
    padded = (t.unflatten(0, (3, -1)).transpose(1, 2) for t in inputs)
    torch.testing.assert_close(output, ops.attention(*padded, **options).transpose(1, 2).flatten(0, 1))


def test_bfloat16_errs_no_more_than_the_same_padded():
    inputs = packed(dtype=torch.bfloat16)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    outputs, truths = (ops.varlen_attention(*some, *packing(), is_causal=True) for some in (inputs, wide))
    plain = one_by_one(*inputs, LENGTHS, CASES["causal"], {})[0]
    cotangent = torch.randn_like(outputs)
    results = [
        [output, *torch.autograd.grad(output, some, cotangent.to(output.dtype))]
        for output, some in ((outputs, inputs), (truths, wide), (plain, inputs))
    ]
    oracle.assert_all_match(*results, ("output", "query", "key", "value"))


@settings(deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=4),
    is_causal=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_any_lengths(lengths, is_causal, dtype):
    queries, keys = [q for q, _ in lengths], [k for _, k in lengths]
    inputs = packed((queries, keys), dtype)
    output = ops.varlen_attention(*inputs, *packing((queries, keys)), is_causal=is_causal)
    assert output.shape == (sum(queries), HEADS, VALUE_DIM)
    if sum(queries):
        expected = one_by_one(*inputs, (queries, keys), {"is_causal": is_causal}, {})[0]
        torch.testing.assert_close(output, expected)
    for grad in torch.autograd.grad(output.sum(), inputs):
        assert grad.isfinite().all()
