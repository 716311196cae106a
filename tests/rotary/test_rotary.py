"""Rotary position embedding: the reference against the paper and the families' code, the kernel against the oracle."""

from __future__ import annotations

import launches
import pytest
import rotary_cases as cases
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import DTYPES
from torch.utils.checkpoint import checkpoint

from tfm import ops

LAUNCH = ["rotary_kernel"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def launched(monkeypatch):
    return launches.watch(monkeypatch)


def paper(x, positions, turned, interleaved=True, theta=10000.0):
    """Equation 34, one pair of one token's head at a time: [N, H, D] in float64."""
    result = x.clone()
    for token, position in enumerate(positions.tolist()):
        for i in range(turned // 2):
            first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + turned // 2)
            angle = torch.tensor(position * theta ** (-2 * i / turned), dtype=torch.float64)
            a, b = x[token, :, first], x[token, :, second]
            result[token, :, first] = a * angle.cos() - b * angle.sin()
            result[token, :, second] = a * angle.sin() + b * angle.cos()
    return result


def llama(x, cos, sin):
    """As transformers' Llama: tables [B, S, D] of two equal halves, x [B, H, S, D]."""
    half = x.shape[-1] // 2
    rotated = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos.unsqueeze(1) + rotated * sin.unsqueeze(1)


def gptj(x, cos, sin):
    """As transformers' GPT-J: tables [B, S, R] whose columns come twice, x [B, S, H, D], R of D columns turned."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    rotated = torch.stack((-turned[..., 1::2], turned[..., ::2]), dim=-1).flatten(-2)
    return torch.cat((turned * cos.unsqueeze(2) + rotated * sin.unsqueeze(2), rest), dim=-1)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dim", "turned"), [(2, 2), (6, 6), (8, 4), (5, 2), (64, 16), (3, 0)])
def test_is_the_papers(dim, turned, interleaved, impl, kernel_device):
    x, positions = torch.randn(4, 3, dim, dtype=torch.float64), torch.tensor([0, 1, 9, 3])
    cos, sin = ops.rotary_table(10, turned, dtype=torch.float64)
    dtype = torch.float64 if impl == "reference" else torch.float32
    given = [t.to(kernel_device, dtype) for t in (x, cos, sin)]
    options = {"interleaved": interleaved, "impl": impl}
    found, key = ops.rotary(given[0], None, *given[1:], positions.to(kernel_device), **options)
    assert key is None
    torch.testing.assert_close(found.cpu().double(), paper(x, positions, turned, interleaved), rtol=0, atol=1e-6)


def test_is_the_families():
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    cos, sin = ops.rotary_table(5, 8, theta=500.0, dtype=torch.float64)
    twice = [torch.cat((t, t), dim=-1)[None].expand(2, 5, 8) for t in (cos, sin)]
    found, _ = ops.rotary(x, None, *(t[..., :4] for t in twice))
    torch.testing.assert_close(found, llama(x, *twice))
    cos, sin = ops.rotary_table(5, 4, dtype=torch.float64)
    repeated = [t.repeat_interleave(2, dim=-1)[None].expand(2, 5, 4) for t in (cos, sin)]
    found, _ = ops.rotary(x, None, *(t[..., ::2] for t in repeated), interleaved=True)
    torch.testing.assert_close(found.transpose(1, 2), gptj(x.transpose(1, 2), *repeated))


def test_scores_depend_on_distance_only():
    query, key = torch.randn(2, 1, 1, 16, dtype=torch.float64).expand(2, 9, 1, 16)
    query, key = ops.rotary(query, key, *ops.rotary_table(9, 16, dtype=torch.float64))
    scores = query[:, 0] @ key[:, 0].t()
    for distance in range(-8, 9):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


@pytest.mark.parametrize("interleaved", [False, True])
def test_reference_gradcheck(interleaved):
    query, key = (torch.randn(2, heads, 3, 6, dtype=torch.float64, requires_grad=True) for heads in (4, 2))
    cos, sin = torch.randn(2, 5, 2, dtype=torch.float64)
    positions = torch.tensor([[0, 4, 2], [1, 1, 3]])
    assert torch.autograd.gradcheck(
        lambda q, k: ops.rotary(q, k, cos, sin, positions, interleaved=interleaved), (query, key)
    )
    assert torch.autograd.gradcheck(
        lambda q: ops.rotary_(q.clone(), 3, cos, sin, positions, interleaved=interleaved), (query,)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dim", "columns"), cases.SIZES)
def test_kernel_matches(dim, columns, interleaved, dtype, kernel_device, launched):
    cases.assert_matches_at("triton", dim, columns, interleaved, dtype, kernel_device)
    assert launched == LAUNCH * 2


@settings(deadline=None, max_examples=15)
@given(
    tokens=st.integers(0, 70),
    heads=st.tuples(st.integers(1, 10), st.integers(1, 10)),
    half=st.integers(0, 9),
    rest=st.integers(0, 9),
    interleaved=st.booleans(),
)
def test_kernel_matches_packed(tokens, heads, half, rest, interleaved):
    cases.assert_matches_packed("triton", tokens, heads, half, rest, interleaved, DEVICE)


@pytest.mark.parametrize("shape", cases.BROADCAST, ids=str)
def test_angles_broadcast(shape, kernel_device, launched):
    cases.assert_angles_broadcast("triton", shape, kernel_device)
    assert launched == LAUNCH * 2


@pytest.mark.parametrize("view", cases.VIEWS)
def test_strides_change_nothing(view, kernel_device, launched):
    cases.assert_strides_change_nothing("triton", view, kernel_device)
    assert launched == LAUNCH * 4


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("view", [None, *cases.OWN_ADDRESSES])
@pytest.mark.parametrize("interleaved", [False, True])
def test_in_place_turns_the_first_heads(view, interleaved, impl, kernel_device):
    cases.assert_in_place_turns_the_first_heads(impl, view, interleaved, kernel_device)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_autograd_knows_what_is_overwritten(impl, kernel_device):
    cases.assert_autograd_knows_what_is_overwritten(impl, kernel_device)


def test_forward_mode_is_refused(kernel_device):
    cases.assert_forward_mode_is_refused("triton", kernel_device)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_heads_that_are_not_turned_pass_infinities(kernel_device):
    cases.assert_heads_that_are_not_turned_pass_infinities("triton", kernel_device)


@pytest.mark.parametrize("wanted", ["query", "key"])
def test_only_wanted_gradients_are_computed(wanted, kernel_device, launched):
    cases.assert_only_wanted_gradients_are_computed("triton", wanted, kernel_device)
    assert launched == LAUNCH * 2


def test_kernel_reads_nothing_outside_the_tables(kernel_device, launched):
    cos, sin = torch.randn(2, 5, 2, device=kernel_device)
    positions = torch.tensor([0, 5, -1, 4], device=kernel_device)
    found, _ = ops.rotary(torch.randn(4, 3, 6, device=kernel_device), None, cos, sin, positions, impl="triton")
    assert found[..., :4].isnan().all(-1).all(-1).tolist() == [False, True, True, False]
    assert not found[..., 4:].isnan().any()


def test_operators_obey_torch(kernel_device):
    cases.assert_operators_obey_torch("tfm", kernel_device)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole(backend, kernel_device, launched):
    cases.assert_compiles_whole("triton", backend, kernel_device)
    assert launched


def test_checkpoint_repeats(kernel_device):
    query, key = (torch.randn(5, h, 8, device=kernel_device, requires_grad=True) for h in (4, 2))
    cos, sin = torch.randn(2, 5, 4, device=kernel_device)
    function = lambda query, key: ops.rotary(query, key, cos, sin, impl="triton")  # noqa: E731
    results = []
    for outputs in (function(query, key), checkpoint(function, query, key, use_reentrant=False)):
        grads = torch.autograd.grad(outputs, (query, key), [torch.ones_like(y) for y in outputs])
        results.append([*(y.detach() for y in outputs), *grads])
    torch.testing.assert_close(*results, rtol=0, atol=0)


X, TABLE = torch.zeros(2, 3, 5, 8), torch.zeros(5, 4)
BAD_CALLS = {
    r"^query: expected \[B, H, S, D\] or packed \[N, H, D\]": (X[0, 0], None, TABLE, TABLE),
    r"^query: expected a floating-point tensor": (X.long(), None, TABLE, TABLE),
    r"^key: expected torch.float32 of query's shape \(2, 3, 5, 8\), heads apart, got torch.float32 of \(2, 3, 4, 8\)": (
        X, X[:, :, :4], TABLE[:1], TABLE[:1],
    ),
    r"^sin: expected torch.float32 of shape \(5, 4\) like cos": (X, None, TABLE, TABLE[:4]),
    r"^cos: expected at most 4 columns for dim 8, got \(5, 5\)": (X, None, torch.zeros(5, 5), torch.zeros(5, 5)),
    r"^cos: expected \[\*tokens, 4\] that broadcasts to the tokens \(2, 5\), got \(3,\)": (
        X, None, TABLE[:3], TABLE[:3],
    ),
    r"^positions: expected a shape that broadcasts to the tokens \(2, 5\), got \(3,\)": (
        X, None, TABLE, TABLE, torch.zeros(3, dtype=torch.int64),
    ),
    r"^positions: expected int32 or int64": (X, None, TABLE, TABLE, torch.zeros(5)),
    r"^cos: expected a table \[positions, columns\]": (
        X, None, TABLE[None], TABLE[None], torch.zeros(5, dtype=torch.int64),
    ),
    r"^cos, sin: expected tables without gradient": (X, None, TABLE.clone().requires_grad_(), TABLE),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_calls_say_what_was_expected(message):
    with pytest.raises(ValueError, match=message):
        ops.rotary(*BAD_CALLS[message])


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_in_place_refuses_what_autograd_keeps(impl, kernel_device):
    leaf, tables = torch.zeros(5, 3, 8, device=kernel_device, requires_grad=True), [TABLE.to(kernel_device)] * 2
    for x in (leaf, leaf[:, :2]):
        with pytest.raises(ValueError, match=r"^x: expected the result of an operation, got a leaf that needs"):
            ops.rotary_(x, 2, *tables, impl=impl)
    with pytest.raises(
        ValueError, match=r"^x: expected elements with addresses of their own, got strides \(24, 0, 1\)"
    ):
        ops.rotary_(leaf.detach()[:, :1].expand(5, 3, 8), 2, *tables, impl=impl)


def test_reference_refuses_positions_outside_the_tables():
    for position in (-1, 5):
        with pytest.raises(IndexError):
            ops.rotary(X[0], None, TABLE, TABLE, torch.tensor([0, 1, position]), impl="reference")


def test_bad_heads_and_dims():
    with pytest.raises(ValueError, match=r"^heads: expected at most the 3 of x, got 4$"):
        ops.rotary_(X.clone(), 4, TABLE, TABLE)
    with pytest.raises(ValueError, match=r"^dim: expected an even number of columns, got 5$"):
        ops.rotary_table(3, 5)
    with pytest.raises(ValueError, match=r"^rotary cannot run with impl='triton': .*got float64$"):
        ops.rotary(X.double(), None, TABLE, TABLE, impl="triton")


def test_tables_of_two_equal_halves_turn_neighbouring_columns_as_glm_does():
    angles = torch.randn(5, 2, dtype=torch.float64)
    cos, sin = (torch.cat((table, table), -1) for table in (angles.cos(), angles.sin()))  # as Hugging Face passes them
    query = torch.randn(1, 3, 5, 6, dtype=torch.float64)
    turned, kept = query[..., :4], query[..., 4:]
    half_turn = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).flatten(-2)
    wide_cos, wide_sin = (table[:, :2].repeat_interleave(2, -1) for table in (cos, sin))
    expected = torch.cat((turned * wide_cos + half_turn * wide_sin, kept), -1)
    found, _ = ops.rotary(query, None, cos[..., :2], sin[..., :2], interleaved=True)
    torch.testing.assert_close(found, expected)
    wrong, _ = ops.rotary(query, None, cos[..., ::2], sin[..., ::2], interleaved=True)
    assert (wrong - expected).abs().max() > 0.1
