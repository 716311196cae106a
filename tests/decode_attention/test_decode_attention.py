"""Attention over a cache: the reference against the paper, the kernel against the oracle, and what both promise."""

from __future__ import annotations

import launches
import pytest
import torch
import torch.nn.functional as F
from decode_attention_cases import (
    PROBLEMS,
    Problem,
    as_views,
    assert_matches,
    assert_more_capacity_gives_the_same_bits,
    assert_reordering_the_table_is_reordering_the_cache,
    make,
    to,
    walked,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import DTYPES, HALVES

from benchmarks import bench_decode_attention
from benchmarks.shapes import Decoding
from benchmarks.suite import OURS
from tfm import ops
from tfm.kernels.launch import decode_attention as decode_settings

ONE_LAUNCH, TWO_LAUNCHES = ["decode_attention_kernel"], ["decode_attention_kernel", "combine_splits_kernel"]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def launched(monkeypatch):
    return launches.watch(monkeypatch)


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS.keys())
def test_reference_walks_the_ancestry(problem):
    arguments = make(problem)
    expected = walked(arguments)
    found = ops.decode_attention(**arguments, impl="reference")
    torch.testing.assert_close(found, expected)
    assert (found[arguments["lengths"] == 0] == 0).all()


def test_reference_is_torchs_attention():
    query, cache = torch.randn(3, 4, 8, dtype=torch.float64), torch.randn(2, 3, 5, 4, 8, dtype=torch.float64)
    found = ops.decode_attention(query, *cache, torch.full((3,), 5, dtype=torch.int32))
    expected = F.scaled_dot_product_attention(query[:, :, None], *cache.transpose(2, 3))
    torch.testing.assert_close(found, expected[:, :, 0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS.keys())
def test_kernel_matches(problem, dtype, kernel_device, launched):
    output = assert_matches(make(problem, kernel_device, dtype), "triton")
    assert launched == (ONE_LAUNCH if problem.shape[0] <= 256 else TWO_LAUNCHES)
    assert (output[torch.tensor(problem.lengths) == 0] == 0).all()


@settings(deadline=None, max_examples=15)
@given(
    lengths=st.lists(st.integers(0, 40), max_size=4),
    heads=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dims=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    has=st.tuples(st.booleans(), st.booleans()),
    dtype=st.sampled_from(DTYPES),
)
def test_kernel_matches_whatever_the_shape(lengths, heads, dims, has, dtype):
    shape = (40, heads[0] * heads[1], heads[1], *dims)
    # A cache of one row more, so that there always is an ancestor that nobody writes to.
    assert_matches(make(Problem(lengths, shape, len(lengths) + 1, *has), DEVICE, dtype), "triton")


@pytest.mark.parametrize("problem", ["beam", "grouped", "pieces"])
def test_strides_change_nothing(problem, kernel_device):
    arguments = make(PROBLEMS[problem], kernel_device, torch.float32)
    views = as_views(to(arguments, kernel_device, torch.float32))
    outputs = [assert_matches(given, "triton") for given in (arguments, views)]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("has_latest", [False, True])
def test_neither_batch_nor_capacity_changes_a_rows_bits(has_latest, kernel_device):
    """One piece and several, one launch and two."""
    problem = Problem([40, 256, 0, 7], (256, 2, 1, 16, 24), cache_rows=5, has_latest=has_latest)
    arguments = make(problem, kernel_device, torch.float32)
    assert_more_capacity_gives_the_same_bits(arguments, "triton", (256, 257, 1000))
    whole = ops.decode_attention(**to(arguments, kernel_device, torch.float32), impl="triton")
    first = {name: x if x is None or "cache" in name else x[:1] for name, x in arguments.items()}
    assert torch.equal(ops.decode_attention(**first, impl="triton"), whole[:1])


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_reordering_the_table_is_reordering_the_cache(impl, kernel_device):
    assert_reordering_the_table_is_reordering_the_cache(impl, kernel_device, torch.float32)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_lengths_are_taken_as_within_the_cache(impl, kernel_device):
    arguments = make(Problem([0, 5], (5, 1, 1, 4, 4)), kernel_device, torch.float32)
    beyond = to(arguments, kernel_device, torch.float32) | {"lengths": arguments["lengths"].new_tensor([-3, 2**31 - 1])}
    assert torch.equal(ops.decode_attention(**beyond, impl=impl), ops.decode_attention(**arguments, impl=impl))


@pytest.mark.parametrize("shape", [(0, 3, 2, 2, 4, 4), (2, 0, 2, 2, 4, 4), (2, 3, 2, 2, 4, 0)], ids=str)
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_empty_inputs_give_empty_outputs_or_zeros(impl, shape, kernel_device):
    rows, *rest = shape
    arguments = make(Problem([0] * rows, tuple(rest), 2), kernel_device, torch.float32)
    found = ops.decode_attention(**arguments, impl=impl)
    assert torch.equal(found, torch.zeros(rows, 2, shape[5], device=kernel_device))


@pytest.mark.parametrize("parent", [-1, 3])
def test_a_parent_outside_the_cache(parent, kernel_device):
    arguments = make(Problem([4, 4, 4], (4, 2, 1, 4, 4)), kernel_device, torch.float32)
    arguments["parents"][1, 2] = parent
    found = ops.decode_attention(**arguments, impl="triton")
    assert found.isnan().all(-1).all(-1).tolist() == [False, True, False]
    with pytest.raises(IndexError):
        ops.decode_attention(**to(arguments, torch.device("cpu"), torch.float32), impl="reference")


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_autocast_is_obeyed(half, kernel_device):
    arguments = make(PROBLEMS["beam"], kernel_device, half)
    expected = ops.decode_attention(**to(arguments, kernel_device, half), impl="triton")
    for name in ("query", "key", "value"):
        arguments[name] = arguments[name].float()
    with torch.autocast(kernel_device.type, half):
        assert torch.equal(ops.decode_attention(**arguments, impl="triton"), expected)


def test_operators_obey_torch(kernel_device):
    names = "query", "key_cache", "value_cache", "lengths", "parents", "key", "value"
    for problem in (
        Problem([2, 1], (2, 2, 1, 4, 4)),
        Problem([2], (2, 2, 1, 4, 4), has_parents=False, has_latest=False),
    ):
        arguments = make(problem, kernel_device, torch.float32)
        # opcheck compares the caches, in which NaN would differ from itself.
        given = [x if x is None or not x.is_floating_point() else x.nan_to_num() for x in map(arguments.get, names)]
        torch.library.opcheck(torch.ops.tfm.decode_attention.default, (*given, 0.25))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole(backend, kernel_device):
    arguments = make(Problem([3, 2], (4, 2, 2, 4, 4)), kernel_device, torch.float32)

    def step(**given):
        return ops.decode_attention(**given, impl="triton")

    torch._dynamo.reset()
    results = []
    for wrapped in (step, torch.compile(step, backend=backend, fullgraph=True)):
        given = to(arguments, kernel_device, torch.float32)
        results.append([wrapped(**given), given["key_cache"], given["value_cache"]])
    torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
def test_a_graph_replays_steps():
    """Lengths and ancestry change on the device between replays."""
    shape = (300, 4, 2, 64, 64)
    given = make(Problem([1, 1, 1], shape), DEVICE, torch.bfloat16)
    eager = to(given, DEVICE, torch.bfloat16)
    ops.decode_attention(**to(given, DEVICE, torch.bfloat16))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = ops.decode_attention(**given)
    own = torch.arange(3, dtype=torch.int32, device=DEVICE)
    for step in range(300):
        graph.replay()
        assert torch.equal(output, ops.decode_attention(**eager))
        parent = torch.randint(3, (3,), device=DEVICE)
        key = torch.randn_like(given["key"])
        for arguments in (given, eager):
            arguments["parents"][:, step] = own
            arguments["parents"].copy_(arguments["parents"][parent])
            arguments["key"].copy_(key)
            arguments["lengths"] += 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group", [1, 2, 40])
@pytest.mark.parametrize("dim", [1, 64, 65, 128, 129, 256, 257, 512])
def test_settings_are_tiles(dim, group, dtype):
    tiles = decode_settings.tiles(dim, group, dtype)
    assert tiles.split_keys % tiles.block_keys == 0
    assert (tiles.block_heads == 1) == (group == 1)
    assert all(number & (number - 1) == 0 for number in (tiles.block_heads, tiles.block_keys, tiles.num_warps))
    assert [tiles.splits(capacity) for capacity in (0, 1, 256, 257, 1000)] == [1, 1, 1, 2, 4]


BAD_CALLS = [
    (r"^query: expected \[rows, heads, dim\], got shape \(2, 4\)$", {"query": torch.zeros(2, 4)}),
    (r"^query: expected a floating-point tensor, got torch.int64$", {"query": torch.zeros(2, 4, 3).long()}),
    (r"^key_cache: expected torch.float32 like query, got torch.float16", {"key_cache": torch.ones(2, 5, 2, 3).half()}),
    (r"^key_cache: expected \[rows, capacity, heads, dim\], got shape \(2, 5\)$", {"key_cache": torch.zeros(2, 5)}),
    (r"^key_cache: expected shape \(2, 5, 2, 3\), got \(2, 5, 2, 4\)$", {"key_cache": torch.zeros(2, 5, 2, 4)}),
    (r"^value_cache: expected columns side by side, got strides", {"value_cache": torch.zeros(2, 5, 6, 2).mT}),
    (r"^value_cache: expected at least the 2 rows of query, got 1$", {"value_cache": torch.zeros(1, 5, 2, 6)}),
    (r"^query: expected a multiple of value_cache's 2 heads, got 3$", {"query": torch.zeros(2, 3, 3)}),
    (r"^lengths: expected int32, got torch.int64$", {"lengths": torch.zeros(2, dtype=torch.int64)}),
    (r"^lengths: expected shape \(2,\), got \(3,\)$", {"lengths": torch.zeros(3, dtype=torch.int32)}),
    (r"^lengths: expected a tensor on cpu like query", {"lengths": torch.zeros(2, dtype=torch.int32, device="meta")}),
    (r"^parents: expected shape \(2, 5\), got \(2, 4\)$", {"parents": torch.zeros(2, 4, dtype=torch.int32)}),
    (r"^parents: expected int32, got torch.float32$", {"parents": torch.zeros(2, 5)}),
    (r"^key: expected shape \(2, 2, 3\), got \(2, 4, 3\)$", {"key": torch.zeros(2, 4, 3)}),
    (r"^value: expected one, as key is given, got none$", {"value": None}),
    (r"^value: expected none, as key is None, got shape \(2, 2, 6\)$", {"key": None}),
    (r"^value: expected a tensor on cpu like query, got one on meta$", {"value": torch.zeros(2, 2, 6, device="meta")}),
    (r"^key: expected a tensor without gradient, or torch.no_grad\(\), got one that needs it$", {
        "key": torch.ones(2, 2, 3, requires_grad=True),
    }),
    (r"^decode_attention cannot run with impl='triton': expected at most 512 columns, got 513$", {
        "value_cache": torch.zeros(2, 5, 2, 513), "value": torch.zeros(2, 2, 513), "impl": "triton",
    }),
]  # fmt: skip


@pytest.mark.parametrize(("message", "change"), BAD_CALLS, ids=[message for message, _ in BAD_CALLS])
def test_bad_calls_say_what_was_expected(message, change):
    good = {
        "query": torch.zeros(2, 4, 3), "key_cache": torch.zeros(2, 5, 2, 3), "value_cache": torch.zeros(2, 5, 2, 6),
        "lengths": torch.zeros(2, dtype=torch.int32), "parents": torch.zeros(2, 5, dtype=torch.int32),
        "key": torch.zeros(2, 2, 3), "value": torch.zeros(2, 2, 6),
    }  # fmt: skip
    ops.decode_attention(**good)
    with pytest.raises(ValueError, match=message):
        ops.decode_attention(**(good | change))


@pytest.mark.parametrize("size", [Decoding(6, 7, 4, 8, beam=3), Decoding(3, 5, 4, 8, key_heads=2)], ids=str)
def test_its_benchmarks_peers_compute_the_same(size):
    suite, outputs = bench_decode_attention.SUITE, []
    for name in (OURS, "eager"):
        torch.manual_seed(7)
        peer = suite.peers[name]
        outputs.append(peer.function(*(peer.inputs or suite.inputs)(size)))
    torch.testing.assert_close(*outputs)
