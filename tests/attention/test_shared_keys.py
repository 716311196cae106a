"""Attention of few queries whose keys programs share: the pieces, what they add up to, and where there are any."""

from __future__ import annotations

import launches
import oracle
import pytest
import torch
from attention_cases import (
    NOTHING_ALLOWED,
    PACKED,
    PACKED_RULES,
    PROBLEMS,
    Problem,
    assert_matches,
    attend,
    make,
    packed_problem,
    results,
    unreached,
)
from hypothesis import given
from hypothesis import strategies as st
from long_attention import (
    BIAS,
    BITS,
    BY_DISTANCE,
    COMBINE,
    FORWARD,
    KEYS,
    QUERIES,
    SMALL,
    equal,
    kernels_of_any_length,
    qkv,
    run,
    shared_keys,
)
from oracle import DTYPES, HALVES

from tfm import ops
from tfm.kernels.attention.forward import most_seen
from tfm.kernels.launch.attention.any_length import WHOLE, AttentionTiles
from tfm.kernels.launch.attention.splits import LEAST_KEYS, MOST_QUERIES, SplitTiles, split_forward
from tfm.operators.attention import Attention

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")


@pytest.fixture
def _shared():
    with kernels_of_any_length(), shared_keys():
        yield


@pytest.fixture
def launched(monkeypatch):
    return launches.watch(monkeypatch)


# What the pieces meet: shares without keys, of edges alone, of whole tiles; each way that a score is made.
EXACT = (
    "causal, bottom-right, 3 to 1", "causal, starts, rows empty", "lengths, dropout", "window",
    "softcap, negative scale, dropout", "scale below 0", "key padding, dropout", "bool mask [B, H, Sq, Sk]",
    "everything", "one query", "bias by distance, bias, window, sinks", "bias by distance, key padding, dropout",
    "key mask with holes, starts, dropout, sinks", "key mask, bias, bias by distance, starts",
    "key mask, bool mask [Sq, Sk], softcap", "wide heads", "heads that are slices", "the narrowest heads",
)  # fmt: skip
# The packed ones that are not among the long tests.
SOON = ("dropout", torch.bfloat16), ("bias, bias by distance", torch.float32)
CASES = [(name, torch.float32) for name in EXACT] + [("everything", dtype) for dtype in HALVES]
PACKED_CASES = [
    pytest.param(name, dtype, marks=() if (name, dtype) in SOON else pytest.mark.long)
    for name in PACKED_RULES
    for dtype in DTYPES
]


@pytest.mark.usefixtures("_shared")
@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_kernels_match(name, dtype, kernel_device, launched):
    problem = PROBLEMS[name]
    assert_matches(make(problem, kernel_device, dtype), dtype)
    kind, shape = problem.mask or ("", ())
    bias = BIAS[:1] if shape[:2] == problem.shape[:2] else BIAS
    keys = KEYS * (2 if max(problem.shape[5:]) > WHOLE else 1)
    biases = bias * (kind == "float") + BY_DISTANCE * ("relative_bias" in problem.rules)
    assert launched == BITS * bool(kind) + FORWARD + COMBINE + QUERIES + keys + biases


@pytest.mark.usefixtures("_shared")
@pytest.mark.parametrize(("name", "dtype"), PACKED_CASES, ids=str)
def test_packed_equals_padded_and_the_reference(name, dtype, kernel_device, launched):
    attended = packed_problem(PACKED_RULES[name], kernel_device, dtype)
    actual, padded = attended("triton", dtype, "packed"), attended("triton", dtype, "padded")
    passes = FORWARD + COMBINE + QUERIES + KEYS
    assert [kernel for kernel in launched if kernel in passes] == 2 * passes
    equal([actual[name] for name in PACKED], [padded[name] for name in PACKED])
    truth, plain = (attended("reference", kind, "packed") for kind in (torch.float64, dtype))
    oracle.assert_all_match(*(list(found.values()) for found in (actual, truth, plain)), list(actual))


@pytest.mark.usefixtures("_shared")
def test_same_inputs_same_bits(kernel_device):
    tensors = make(PROBLEMS["lengths, causal, sinks"], kernel_device, torch.float32)
    equal(*(results(tensors, "triton", torch.float32) for _ in range(2)))


@pytest.mark.usefixtures("_shared")
@pytest.mark.parametrize("how", ["lengths", "mask and causal"])
def test_what_no_query_reaches_stays_there(how, kernel_device):
    query, key, value = qkv(kernel_device, (2, 2, 1, 40, 70, 16, 16))
    options, hidden = unreached(how, kernel_device)
    expected = run([query, key, value], options)
    poisoned = [t.detach().masked_fill(hidden, float("nan")).requires_grad_() for t in (key, value)]
    equal(run([query, *poisoned], options), expected)


@pytest.mark.usefixtures("_shared")
@pytest.mark.parametrize("options", [NOTHING_ALLOWED[name] for name in ("mask", "causal")], ids=["mask", "causal"])
def test_queries_without_keys_give_zero_and_zero_gradients(options, kernel_device):
    inputs = qkv(kernel_device)
    options = {name: x.to(kernel_device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    for result in run(inputs, options):
        assert torch.equal(result, torch.zeros_like(result))
    sinks = torch.randn(2, device=kernel_device)
    for sink in (None, sinks):
        output, lse = ops.attention(*inputs, **options, sinks=sink, return_lse=True, impl="triton")
        assert not output.any()
        expected = torch.full_like(lse, float("-inf")) if sink is None else sinks[:, None].expand_as(lse)
        assert torch.equal(lse, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_biased", [False, True])
def test_huge_scores_in_one_share_leave_the_others_nothing(is_biased, dtype, kernel_device):
    """Tops of pieces that are far apart: nothing overflows, and what counts is exact."""
    tensors = make(Problem((1, 1, 1, 3, 130, 16, 16), {"scale": 1.0}), kernel_device, dtype)
    tensors.inputs["key"][:, :, 64:96] *= 300.0
    if is_biased:
        tensors.inputs["bias"] = torch.zeros(3, 130, device=kernel_device).to(dtype)
        tensors.inputs["bias"][:, :100] = torch.finfo(dtype).min
    found = []
    with kernels_of_any_length(), shared_keys():
        for impl, kind in (("triton", dtype), ("reference", torch.float64), ("reference", dtype)):
            inputs = {name: None if x is None else x.to(kind) for name, x in tensors.inputs.items()}
            found.append(attend(tensors, inputs, impl))
    oracle.assert_all_match(*found, ("output", "lse"))


def test_many_pieces_and_a_last_one_of_few_keys(kernel_device):
    """More pieces than are added up at once, of two tiles each."""
    small = dict.fromkeys(SMALL, AttentionTiles(16, 16, 4, 2))
    with kernels_of_any_length(small), shared_keys(SplitTiles(16, 16, 4, 2, split_keys=32)):
        tensors = make(Problem((1, 1, 1, 2, 529, 16, 16), {"sinks": True}), kernel_device, torch.float32)
        assert_matches(tensors, torch.float32)


def test_the_rule_is_obeyed(kernel_device, launched):
    """Few queries share many keys, however many sequences there are."""
    for sequences, keys, kernels in (
        (1, LEAST_KEYS, FORWARD + COMBINE),
        (3, LEAST_KEYS, FORWARD + COMBINE),
        (1, LEAST_KEYS - 1, FORWARD),
    ):
        launched.clear()
        inputs = qkv(kernel_device, (sequences, 1, 1, 3, keys, 16, 16))
        ops.attention(*inputs, is_causal=True, query_start=keys - 3, impl="triton")
        assert launched == kernels


def chosen(max_q, keys, dtype=torch.bfloat16, dim=64):
    return split_forward(max_q, keys, dim, dim, dtype)


def test_few_queries_share_many_keys():
    assert chosen(1, 8192).splits(8192, 8192) * 8 == 256
    assert chosen(MOST_QUERIES, LEAST_KEYS) is not None
    assert chosen(MOST_QUERIES, LEAST_KEYS - 1) is None
    assert chosen(MOST_QUERIES + 1, 1 << 20) is None


@pytest.mark.parametrize(("window", "keys"), [((-1, 0), 5000), ((100, 0), 103), ((4000, 4000), 5000)])
def test_a_window_leaves_fewer_keys_to_share(window, keys):
    left, right = (None if side < 0 else side for side in window)
    query, key = torch.empty(1, 1, 3, 16, device="meta"), torch.empty(1, 1, 5000, 16, device="meta")
    rest = 3, 5000, 0, left, right, 1.0, None, 0.0, 0
    assert most_seen(Attention(query, key, key, *[None] * 11, *rest)) == keys


@given(
    keys=st.integers(1, 5000), share=st.floats(0, 1), begin=st.floats(0, 1),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]), dim=st.sampled_from([64, 128, 192, 256, 512]),
)  # fmt: skip
def test_shares_cover_the_keys_wherever_they_begin(keys, share, begin, dtype, dim):
    tiles = chosen(1, LEAST_KEYS, dtype, dim)
    assert tiles.split_keys == tiles.tiles * tiles.block_keys
    seen = max(1, int(keys * share))
    begin = int((keys - seen) * begin)
    first, last = begin // tiles.block_keys, -(-(begin + seen) // tiles.block_keys)
    splits = tiles.splits(seen, keys)
    assert first + (splits - 1) * tiles.tiles < max(last, first + 1) + tiles.tiles
    assert first + splits * tiles.tiles >= last
