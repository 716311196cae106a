"""A bias by distance: the reference against one query at a time, its gradient's kernels, and the biases of papers."""

from __future__ import annotations

import math

import launches
import oracle
import pytest
import torch
from attention_cases import PROBLEMS, SEED, Problem, assert_matches, make, results
from hypothesis import given
from hypothesis import strategies as st
from oracle import HALVES

from tfm import ops
from tfm.errors import BadArgument
from tfm.kernels.launch.attention import scores as launch
from tfm.sequences import offsets

CASES = {
    "clipped": ({}, 2, False),
    "every distance its own": ({}, 8, False),
    "one for all": ({}, 0, False),
    "starts, causal": ({"is_causal": True, "query_start": [3, -2]}, 3, False),
    "lengths, bool mask, sinks": ({"key_lengths": [7, 2], "sinks": True}, 3, True),
}


def by_element(relative_bias, shape, starts):
    """The bias of every score, one at a time."""
    farthest = relative_bias.shape[1] // 2
    rows = [
        [
            relative_bias[h, max(-farthest, min(farthest, key - query - starts[b])) + farthest]
            for query in range(shape[2])
            for key in range(shape[3])
        ]
        for b in range(shape[0])
        for h in range(shape[1])
    ]
    return torch.stack([torch.stack(row) for row in rows]).view(shape)


@pytest.mark.parametrize(("rules", "farthest", "has_mask"), CASES.values(), ids=CASES.keys())
def test_reference_equals_one_query_at_a_time(rules, farthest, has_mask):
    shape = (2, 4, 5, 7)
    inputs = [torch.randn(2, heads, rows, 3, dtype=torch.float64, requires_grad=True) for heads, rows in
              ((4, 5), (2, 7), (2, 7))]  # fmt: skip
    relative = torch.randn(4, 2 * farthest + 1, dtype=torch.float64, requires_grad=True)
    options = {name: torch.tensor(rule) if isinstance(rule, list) else rule for name, rule in rules.items()}
    if "sinks" in rules:
        options["sinks"] = torch.randn(4, dtype=torch.float64)
    mask = torch.rand(2, 1, 5, 7) < 0.7 if has_mask else None
    allowed = oracle.allowed_keys(shape, mask=mask, **{name: rule for name, rule in rules.items() if name != "sinks"})
    output = ops.attention(*inputs, mask, relative_bias=relative, **options)
    bias = by_element(relative, shape, rules.get("query_start", [0, 0]))
    expected, _ = oracle.attention(*inputs, allowed, bias, sinks=options.get("sinks"))
    torch.testing.assert_close(output, expected)
    cotangent = torch.randn_like(output)
    found, truth = (torch.autograd.grad(x, [*inputs, relative], cotangent) for x in (output, expected))
    torch.testing.assert_close(found, truth)


def test_packed_sequences_count_distances_each_from_its_own_first_key():
    query, key, value = (torch.randn(9, 2, 4, dtype=torch.float64) for _ in range(3))
    relative, mask = torch.randn(2, 5, dtype=torch.float64), torch.randn(2, 1, 6, 6, dtype=torch.float64)
    cu_seq = offsets(torch.tensor([3, 6]))
    output = ops.varlen_attention(query, key, value, cu_seq, cu_seq, 6, 6, attn_mask=mask, relative_bias=relative)
    for place, (first, last) in enumerate(((0, 3), (3, 9))):
        alone = [x[first:last].transpose(0, 1)[None] for x in (query, key, value)]
        own = mask[place, :, : last - first, : last - first]
        expected = ops.attention(*alone, own, relative_bias=relative)
        torch.testing.assert_close(output[first:last], expected[0].transpose(0, 1))


BY_DISTANCE = [name for name in PROBLEMS if name.startswith("bias by distance")]
SHORT = {
    "several splits": Problem((5, 2, 1, 17, 20, 16, 16), {"relative_bias": 9, "dropout_p": 0.2}),
    "longer than its tiles": Problem((2, 1, 1, 70, 90, 16, 16), {"relative_bias": 3, "query_start": 20}),
}


@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("name", BY_DISTANCE)
def test_kernels_for_few_keys_match_in_half_precision(name, half, kernel_device):
    assert_matches(make(PROBLEMS[name], kernel_device, half), half)


@pytest.mark.parametrize("problem", SHORT.values(), ids=SHORT.keys())
def test_gradient_takes_two_launches_and_the_same_bits(problem, kernel_device, monkeypatch):
    launched = launches.watch(monkeypatch)
    tensors = make(problem, kernel_device, torch.float32)
    found = assert_matches(tensors, torch.float32)
    assert launched[-2:] == ["relative_bias_gradient_kernel", "sum_distances_kernel"]
    again = results(tensors, "triton", torch.float32)
    assert torch.equal(found["drelative_bias"], again["drelative_bias"])


def test_shared_sequences_give_the_same_sum(kernel_device, monkeypatch):
    tensors = make(SHORT["several splits"], kernel_device, torch.float32)
    found = []
    for splits in (1, 2, 5):
        monkeypatch.setattr(launch, "bias_splits", lambda places, members, splits=splits: splits)
        found.append(results(tensors, "triton", torch.float32)["drelative_bias"])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-6)


@given(
    st.integers(0, 90), st.integers(0, 90), st.integers(0, 40), st.integers(-200, 200), st.sampled_from([16, 32, 64]),
    st.booleans(),
)  # fmt: skip
@pytest.mark.triton
def test_offsets_hold_every_pair_of_tiles(queries, keys, farthest, start, block, is_tensor):
    from tfm.kernels.attention.relative_bias_gradient import offsets_between

    starts = torch.tensor([start]) if is_tensor else None
    first, count = offsets_between(queries, keys, farthest, starts, start, block)
    position = max(-queries - farthest, min(start, keys + farthest))
    tiles = {(position + row) // block for row in range(queries)}
    needed = {key // block - tile for key in range(keys) for tile in tiles}
    assert needed <= set(range(first, first + count))


def test_nothing_of_the_size_of_all_scores_is_allocated(kernel_device, monkeypatch):
    sizes, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **kw: sizes.append(empty(*size, **kw)) or sizes[-1])
    query, key, value = (torch.randn(1, 1, 300, 16, device=kernel_device) for _ in range(3))
    relative = torch.randn(1, 17, device=kernel_device, requires_grad=True)
    ops.attention(query, key, value, dropout_p=0.1, seed=SEED, relative_bias=relative, impl="triton").sum().backward()
    assert 0 < max(tensor.numel() for tensor in sizes) < 300 * 300 / 8


def t5_bucket(distance, buckets, max_distance, is_bidirectional):
    """The bucket of key - query, as Raffel et al.'s released code has it."""
    bucket = 0
    if is_bidirectional:
        buckets //= 2
        bucket = buckets if distance > 0 else 0
        distance = abs(distance)
    else:
        distance = max(-distance, 0)
    exact = buckets // 2
    if distance < exact:
        return bucket + distance
    share = math.log(distance / exact) / math.log(max_distance / exact)
    return bucket + min(exact + int(share * (buckets - exact) + 1e-6), buckets - 1)


@pytest.mark.parametrize("is_bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 20), (32, 64)])
def test_t5_bias_equals_the_published_buckets(buckets, max_distance, is_bidirectional):
    weight = torch.randn(buckets, 3, requires_grad=True)
    queries, keys = 5, 2 * max_distance
    positions = [0, 1, max_distance // 2, max_distance, max_distance + 7]
    bias = ops.t5_bias(weight, max_distance, is_bidirectional)
    assert bias.shape == (3, 2 * max_distance + 1)
    dense = torch.stack(
        [
            weight[[t5_bucket(key - position, buckets, max_distance, is_bidirectional) for key in range(keys)]]
            for position in positions
        ]
    ).permute(2, 0, 1)
    query, key, value = (
        torch.randn(queries, 3, 1, 4),
        torch.randn(queries, 3, keys, 4),
        torch.randn(queries, 3, keys, 4),
    )
    found = ops.attention(query, key, value, relative_bias=bias, query_start=torch.tensor(positions))
    expected = ops.attention(query, key, value, dense.transpose(0, 1)[:, :, None])
    torch.testing.assert_close(found, expected)
    gradients = (torch.autograd.grad(x.square().sum(), weight)[0] for x in (found, expected))
    torch.testing.assert_close(*gradients)


def test_alibi_has_the_slopes_of_the_paper():
    assert ops.alibi_slopes(8).tolist() == [2.0**-n for n in range(1, 9)]
    torch.testing.assert_close(ops.alibi_slopes(12)[8:], torch.tensor([2.0**-0.5, 2.0**-1.5, 2.0**-2.5, 2.0**-3.5]))
    bias = ops.alibi_bias(ops.alibi_slopes(2), 3)
    assert bias.tolist() == [[-s * abs(d) for d in range(-3, 4)] for s in (2.0**-4, 2.0**-8)]
    learnt = torch.ones(2, requires_grad=True)
    ops.alibi_bias(learnt, 2).sum().backward()
    assert learnt.grad.tolist() == [-6.0, -6.0]


def test_what_does_not_fit_is_said():
    query = torch.randn(2, 4, 3, 8)
    for relative, said in (
        (torch.randn(4, 4), r"relative_bias: expected \[4, 2 R \+ 1\]"),
        (torch.randn(2, 5), r"relative_bias: expected \[4, 2 R \+ 1\]"),
        (torch.randn(5), r"relative_bias: expected \[4, 2 R \+ 1\]"),
        (torch.ones(4, 5, dtype=torch.long), "relative_bias: expected a floating-point tensor"),
        (torch.randn(4, 5, device="meta"), "relative_bias"),
    ):
        with pytest.raises(BadArgument, match=said):
            ops.attention(query, query, query, relative_bias=relative)
    packed, cu_seq = torch.randn(3, 4, 8), torch.tensor([0, 3])
    with pytest.raises(BadArgument, match="attn_mask: expected a shape broadcastable"):
        ops.varlen_attention(packed, packed, packed, cu_seq, cu_seq, 3, 3, attn_mask=torch.ones(2, 4, 3, 3) > 0)
    for bad in (torch.randn(2, 4), torch.randn(8)):
        with pytest.raises(BadArgument, match="weight: expected"):
            ops.t5_bias(bad)
    with pytest.raises(BadArgument, match="weight: expected"):
        ops.t5_bias(torch.randn(32, 4), max_distance=8)
    with pytest.raises(BadArgument, match="slopes: expected"):
        ops.alibi_bias(torch.ones(4), -1)
    with pytest.raises(BadArgument, match="heads: expected"):
        ops.alibi_slopes(0)
