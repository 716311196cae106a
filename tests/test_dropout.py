"""Dropout by coordinates: published and frozen vectors, an independent Philox, statistics, and the seeds' rules."""

from __future__ import annotations

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tfm import ops
from tfm.reference import dropout as reference

# (seed, p, group, site) and the elements kept of 3 rows of 20 columns.
FROZEN = [
    (0, 0.5, 0, 0, ["10000000011110110011", "01111011010111010101", "10000111101001000000"]),
    (-1, 0.1, 3, 2, ["01111111111011111111", "11111111111110111111", "10111111111101011111"]),
    (0x0123456789ABCDEF, 0.9, 2**31, 7, ["00000000000000001001", "00001001000001010000", "00000110000000000000"]),
]
SEEDS = st.integers(-(2**63), 2**63 - 1)


@pytest.mark.parametrize(("counter", "key", "words"), oracle.PHILOX_VECTORS, ids=["zeros", "ones", "pi"])
def test_published_vectors(counter, key, words):
    assert oracle.philox(counter, key) == words
    seed = key[1] << 32 | key[0]
    seed -= 1 << 64 if seed >= 1 << 63 else 0
    drawn = reference.philox(*map(torch.tensor, counter), torch.tensor(seed))
    assert tuple(map(int, drawn)) == words


@settings(deadline=None)
@given(counter=st.tuples(*[st.integers(0, 0xFFFFFFFF)] * 4), seed=SEEDS)
def test_philox_equals_plain_integers(counter, seed):
    drawn = reference.philox(*map(torch.tensor, counter), torch.tensor(seed))
    assert tuple(map(int, drawn)) == oracle.philox(counter, (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))


@pytest.mark.parametrize(("seed", "p", "group", "site", "kept"), FROZEN)
def test_frozen_masks(seed, p, group, site, kept):
    mask = reference.keep_mask(torch.arange(3), 20, torch.tensor(group), p, torch.tensor(seed), site)
    assert ["".join("01"[bit] for bit in row) for row in mask.tolist()] == kept


@settings(deadline=None, max_examples=50)
@given(seed=SEEDS, p=st.floats(0, 1), rows=st.integers(1, 3), columns=st.integers(1, 19), site=st.integers(0, 9))
def test_tokenwise_mask_equals_the_naive_one(seed, p, rows, columns, site):
    kept = oracle.kept_elements(seed, p, rows, columns, site=site)
    dropped = ops.dropout(torch.ones(rows, columns, dtype=torch.float64), p, seed=seed, site=site)
    threshold = round(65536 * p)
    scale = 65536 / (65536 - threshold) if threshold < 65536 else 0.0
    assert torch.equal(dropped, kept.double() * scale)


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_keeps_the_share_it_should(p):
    count = 1 << 19
    dropped = ops.dropout(torch.ones(512, 1024, dtype=torch.float64), p, seed=42)
    kept = (dropped != 0).double()
    deviation = (p * (1 - p) / count) ** 0.5
    assert abs(kept.mean().item() - (1 - p)) < 5 * deviation
    assert abs(dropped.mean().item() - 1) < 5 * deviation / (1 - p)
    # Neighbours in both directions are independent, and so are sites and seeds.
    others = [ops.dropout(torch.ones(512, 1024), p, seed=43), ops.dropout(torch.ones(512, 1024), p, seed=42, site=1)]
    pairs = [(kept[:, 1:], kept[:, :-1]), (kept[1:], kept[:-1]), *((kept, (other != 0).double()) for other in others)]
    for one, other in pairs:
        assert abs((one * other).mean().item() - (1 - p) ** 2) < 10 * deviation


def test_masks_of_steps_sites_and_neighbours_are_independent():
    """Correlations of n elements, times √n, are standard normal: as large as those of coins, and no larger."""
    steps, sites, size, p = 4, 12, 128, 0.3
    seeds = [ops.draw_seed("cpu") for _ in range(steps)]
    rows, group = torch.arange(size), torch.tensor(0)
    masks = [reference.keep_mask(rows, size, group, p, seed, site) for seed in seeds for site in range(sites)]
    groups = torch.arange(16)[:, None]
    heads = reference.keep_mask(torch.arange(32).expand(16, 32), 32, groups, p, seeds[0], sites).flatten(1)
    share = 1 - round(65536 * p) / 65536
    coins, heads = ((x.double() - share) / (share * (1 - share)) ** 0.5 for x in (torch.stack(masks), heads))
    whole = coins.flatten(1)
    found = {
        "rate": whole.mean(1) * size,
        "pairs of masks": (whole @ whole.t())[tuple(torch.triu_indices(len(whole), len(whole), 1))] / size,
        "pairs of heads": (heads @ heads.t())[tuple(torch.triu_indices(len(heads), len(heads), 1))] / 32,
        "columns": coins.mean((0, 1)) * (len(coins) * size) ** 0.5,
        "rows": coins.mean((0, 2)) * (len(coins) * size) ** 0.5,
        "one element over all masks": coins.mean(0).flatten() * len(coins) ** 0.5,
    }
    for lag in (1, 2, 4, 7, 8, 9, 16):
        found[f"columns {lag} apart"] = (coins[:, :, lag:] * coins[:, :, :-lag]).mean((1, 2)) * size
        found[f"rows {lag} apart"] = (coins[:, lag:] * coins[:, :-lag]).mean((1, 2)) * size
    for name, normal in found.items():
        size_of_all = normal.square().mean().sqrt().item()
        assert abs(size_of_all - 1) < 5 / (2 * len(normal)) ** 0.5, f"{name}: {size_of_all:.3f}"
        assert normal.abs().max() < 5.5, f"{name}: {normal.abs().max():.2f}"


def test_probability_zero_returns_x_itself_and_draws_nothing():
    x, state = torch.randn(3, 5), torch.get_rng_state()
    assert ops.dropout(x, 0.0) is x
    assert torch.equal(torch.get_rng_state(), state)


def test_probability_one_gives_zeros():
    x = torch.randn(3, 5, requires_grad=True)
    dropped = ops.dropout(x, 1.0)
    assert (dropped == 0).all()
    assert (torch.autograd.grad(dropped.sum(), x)[0] == 0).all()


def test_gradient_follows_the_mask():
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.dropout(x, 0.4, seed=9), x)
    torch.testing.assert_close(
        torch.autograd.grad(ops.dropout(x, 0.4, seed=9).sum(), x)[0] * x, ops.dropout(x, 0.4, seed=9)
    )


@pytest.mark.parametrize("chunk", [1, 20, 64, 10**9])
def test_mask_does_not_depend_on_the_chunk(monkeypatch, chunk):
    x = torch.randn(2, 9, 13)
    expected = ops.dropout(x, 0.5, seed=1)
    monkeypatch.setattr(reference, "CHUNK", chunk)
    assert torch.equal(ops.dropout(x, 0.5, seed=1), expected)


def test_leading_dimensions_count_the_rows_whatever_the_strides():
    x = torch.randn(13, 9, 2).permute(2, 1, 0)
    assert torch.equal(ops.dropout(x, 0.5, seed=1), ops.dropout(x.reshape(18, 13), 0.5, seed=1).view(2, 9, 13))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_narrow_dtypes_keep_the_mask(dtype):
    x = torch.randn(9, 13).to(dtype)
    dropped, truth = ops.dropout(x, 0.1, seed=1), ops.dropout(x.double(), 0.1, seed=1)
    assert dropped.dtype == dtype
    keep = truth != 0
    oracle.assert_matches(dropped, truth, x / torch.tensor(0.9, dtype=dtype) * keep)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0,)])
def test_nothing_gives_nothing(shape):
    assert ops.dropout(torch.zeros(shape), 0.5).shape == shape


def test_manual_seed_rules_the_drawn_seeds():
    def draw():
        torch.manual_seed(3)
        return ops.draw_seed("cpu"), ops.draw_seed("cpu"), ops.dropout(torch.ones(5, 7), 0.5)

    first, second, dropped = draw()
    assert first != second
    assert first.dtype == torch.int64
    assert first.shape == ()
    again = draw()
    assert torch.equal(torch.stack(again[:2]), torch.stack((first, second)))
    assert torch.equal(again[2], dropped)
    torch.manual_seed(4)
    assert ops.draw_seed("cpu") != first


def test_seeds_use_both_words_and_both_signs():
    seeds = torch.stack([ops.draw_seed("cpu") for _ in range(64)])
    assert (seeds < 0).any()
    assert (seeds > 0).any()
    assert len({seed >> 32 for seed in seeds.tolist()}) == len({seed & 0xFFFFFFFF for seed in seeds.tolist()}) == 64


def test_seed_as_a_tensor_equals_seed_as_an_int():
    x = torch.randn(3, 9)
    assert torch.equal(ops.dropout(x, 0.5, seed=torch.tensor(-77)), ops.dropout(x, 0.5, seed=-77))


def test_draw_seed_is_a_well_formed_operator():
    torch.library.opcheck(torch.ops.tfm.draw_seed, (torch.device("cpu"),))
    assert torch.Tag.nondeterministic_seeded in torch.ops.tfm.draw_seed.default.tags


def test_compiled_draws_equal_eager_ones():
    def function(x):
        return ops.dropout(x, 0.5), ops.draw_seed(x.device)

    x = torch.randn(5, 9)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    compiled(x)
    results = []
    for run in (function, compiled, compiled):
        torch.manual_seed(11)
        results.append(run(x))
    for result in results[1:]:
        assert torch.equal(result[0], results[0][0])
        assert torch.equal(result[1], results[0][1])


def test_checkpoint_repeats_the_seed():
    x = torch.randn(5, 9, requires_grad=True)
    dropped = torch.utils.checkpoint.checkpoint(lambda x: ops.dropout(x.exp(), 0.5), x, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(dropped.sum(), x)[0], dropped.detach())


def test_nothing_is_kept_at_one():
    mask = reference.keep_mask(torch.arange(3), 20, torch.tensor(0), 1.0, torch.tensor(5), 0)
    assert mask.shape == (3, 20)
    assert not mask.any()
