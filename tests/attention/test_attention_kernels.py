"""Attention of any length: the Triton kernels against the oracle, padded and packed, dropout included."""

from __future__ import annotations

import launches
import oracle
import pytest
import torch
import torch.nn.functional as F
from attention_cases import (
    NOTHING_ALLOWED,
    PACKED,
    PACKED_RULES,
    PROBLEMS,
    SEED,
    UNREACHED,
    VIEWS,
    Problem,
    assert_matches,
    attend,
    every_problem,
    make,
    packed_problem,
    packing,
    results,
    unreached,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from long_attention import BIAS, BITS, BY_DISTANCE, FORWARD, KEYS, QUERIES, equal, kernels_of_any_length, qkv, run
from oracle import DTYPES, HALVES

from tfm import ops
from tfm.kernels.launch.attention import any_length, short
from tfm.kernels.launch.attention.any_length import AttentionTiles
from tfm.kernels.launch.attention.short import short_attention_backward, short_attention_forward
from tfm.kernels.matmul import precision
from tfm.operators.attention import Attended, Attention
from tfm.operators.attention.mask_bits import KEYS_OF_A_ROW, aligned
from tfm.operators.autograd import apply
from tfm.ops.registry import NAMESPACE

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")


@pytest.fixture(autouse=True)
def _kernels_of_any_length():
    with kernels_of_any_length():
        yield


@pytest.fixture
def launched(monkeypatch):
    return launches.watch(monkeypatch)


# In fp32 what is exact shows; the narrow types round p and ds once more, which the rules hardly touch. bf16, in which
# people train, has every problem among the long tests.
NARROW = [
    "causal, dropout", "bool mask [Sq, Sk], starts, dropout", "bias [1, H, Sq, Sk], causal", "everything",
    "heads that are slices",
]  # fmt: skip
CASES = [
    pytest.param(
        PROBLEMS[name],
        dtype,
        marks=() if name in NARROW or dtype == torch.float32 else pytest.mark.long,
        id=str((name, dtype)),
    )
    for dtype in DTYPES
    for name in (NARROW if dtype == torch.float16 else PROBLEMS)
]


@pytest.mark.parametrize(("problem", "dtype"), CASES)
def test_kernels_match(problem, dtype, kernel_device, launched):
    check_kernels(problem, dtype, kernel_device, launched)


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("problem", every_problem().values(), ids=every_problem().keys())
def test_kernels_match_in_every_product_of_rules(problem, dtype, kernel_device, launched):
    check_kernels(problem, dtype, kernel_device, launched)


def check_kernels(problem, dtype, device, launched):
    assert_matches(make(problem, device, dtype), dtype)
    kind, shape = problem.mask or ("", ())
    # Where each (sequence, head) has a bias of its own, there is nothing to sum.
    bias = BIAS[:1] if shape[:2] == problem.shape[:2] else BIAS
    biases = bias * (kind == "float") + BY_DISTANCE * ("relative_bias" in problem.rules)
    # Of heads that are slices dk and dv are made apart.
    keys = KEYS * (2 if max(problem.shape[5:]) > any_length.WHOLE else 1)
    assert launched == BITS * bool(kind) + FORWARD + QUERIES + keys + biases


@settings(deadline=None, max_examples=12)
@given(
    batch=st.integers(0, 2),
    queries=st.integers(0, 70),
    keys=st.integers(0, 70),
    dim=st.integers(1, 40),
    group=st.integers(1, 3),
    half=st.sampled_from(HALVES),
    rules=st.fixed_dictionaries(
        {},
        optional={
            "is_causal": st.just(True),
            "window_size": st.tuples(st.sampled_from([-1, 8, 33]), st.sampled_from([-1, 0, 20])),
            "query_start": st.integers(0, 40),
            "dropout_p": st.sampled_from([0.1, 1.0]),
        },
    ),
)
def test_kernels_match_at_any_shape(batch, queries, keys, dim, group, half, rules):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    problem = Problem((batch, group, 1, queries, keys, dim, dim + 3), rules)
    tensors = make(problem, device, half)
    if min(queries, keys) >= 8:
        assert_matches(tensors, half)
        return
    # Of a softmax over few keys the gradient is a difference of nearly equal numbers, one formed from the output as
    # it was rounded: no tolerance of plain torch's, which does not round it, holds there.
    found = []
    for impl, dtype in (("triton", half), ("reference", torch.float64), ("reference", half)):
        inputs = {name: None if x is None else x.to(dtype) for name, x in tensors.inputs.items()}
        output, lse = attend(tensors, inputs, impl)
        found.append([output, lse.masked_fill(lse == float("-inf"), 0.0)])
    oracle.assert_all_match(*found, ("output", "lse"))


@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("passes", [1, 2])
def test_narrow_inputs_under_a_wide_bias_and_sinks(passes, half, kernel_device, launched, monkeypatch):
    two = AttentionTiles(64, 32, 4, 2, passes=passes)
    monkeypatch.setattr(any_length, "attention_backward_keys", lambda *_: two)
    problem = Problem((2, 2, 2, 33, 40, 16, 16), {"sinks": True, "dropout_p": 0.2}, ("float", (1, 2, 33, 40)))
    tensors = make(problem, kernel_device, half)
    learnt = {name: tensors.inputs[name].float() for name in ("bias", "sinks")}
    found = []
    for impl, dtype in (("triton", half), ("reference", torch.float64), ("reference", half)):
        wide = torch.promote_types(dtype, torch.float32)
        inputs = {name: x.to(wide if name in learnt else dtype).requires_grad_() for name, x in tensors.inputs.items()}
        output, _ = attend(tensors, inputs, impl)
        loss = (output * tensors.cotangents[0].to(dtype)).sum()
        found.append([output.detach(), *torch.autograd.grad(loss, list(inputs.values()))])
    oracle.assert_all_match(*found, ("output", "query", "key", "value", "bias", "sinks"))
    assert [gradient.dtype for gradient in found[0][4:]] == [torch.float32] * 2
    assert launched == BITS + FORWARD + QUERIES + KEYS * passes + BIAS


# Masks and biases are the same code as of padded sequences, in every dtype.
PACKED_CASES = [
    pytest.param(
        name,
        dtype,
        marks=pytest.mark.long if dtype != torch.float32 and ("mask" in name or "bias" in name) else (),
    )
    for name in PACKED_RULES
    for dtype in DTYPES
]


@pytest.mark.parametrize(("name", "dtype"), PACKED_CASES, ids=str)
def test_packed_equals_padded_and_the_reference(name, dtype, kernel_device, launched):
    attended = packed_problem(PACKED_RULES[name], kernel_device, dtype)
    actual, padded = attended("triton", dtype, "packed"), attended("triton", dtype, "padded")
    passes = FORWARD + QUERIES + KEYS
    assert [kernel for kernel in launched if kernel in passes] == 2 * passes
    # The same tiles of the same numbers; sums over queries alone run over other tiles.
    equal([actual[name] for name in PACKED], [padded[name] for name in PACKED])
    truth, plain = (attended("reference", kind, "packed") for kind in (torch.float64, dtype))
    oracle.assert_all_match(*(list(found.values()) for found in (actual, truth, plain)), list(actual))


@pytest.mark.parametrize("extra", [1, 64])
def test_more_padding_changes_no_bit(extra, kernel_device):
    query, key, value = qkv(kernel_device)
    lengths = torch.tensor([70, 33], device=kernel_device)
    options = {"key_lengths": lengths, "dropout_p": 0.2, "seed": SEED, "is_causal": True, "query_start": 5}
    output, *gradients = run([query, key, value], options)
    wide = [F.pad(t.detach(), (0, 0, 0, extra), value=float("nan")).requires_grad_() for t in (key, value)]
    actual, dquery, *wide_gradients = run([query, *wide], options)
    equal([actual, dquery], [output, gradients[0]])
    for wide_gradient, gradient in zip(wide_gradients, gradients[1:], strict=True):
        equal(wide_gradient[:, :, :70], gradient)
        assert not wide_gradient[:, :, 70:].any()
    # The same as a mask, which is padded with the keys.
    mask = torch.rand(2, 1, 40, 70, device=kernel_device) < 0.7
    output, dquery, *_ = run([query, key, value], {"attn_mask": mask})
    actual, wide_dquery, *_ = run([query, *wide], {"attn_mask": F.pad(mask, (0, extra))})
    equal([actual, wide_dquery], [output, dquery])


def test_packed_rows_do_not_see_the_maxima(kernel_device):
    lengths = packing(kernel_device)
    inputs = [torch.randn(sum(lengths.query_lengths), 2, 16, device=kernel_device).requires_grad_() for _ in range(3)]
    cu_seq, _, longest, _ = lengths.arguments
    expected = run([*inputs, cu_seq, cu_seq, longest, longest], {"is_causal": True}, ops.varlen_attention)
    actual = run([*inputs, cu_seq, cu_seq, longest + 70, longest + 99], {"is_causal": True}, ops.varlen_attention)
    equal(actual, expected)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(2, 1, 33, 40), (1, 2, 1, 40)], ids=str)
@pytest.mark.parametrize("is_short", [False, True], ids=["long", "short"])
def test_a_bias_and_a_mask_as_bits_together(is_short, shape, dropout_p, kernel_device, monkeypatch):
    """What the operator takes, whatever ops.attention makes of its one mask; a mask of one row has words, too."""
    if is_short:
        monkeypatch.setattr(short, "short_attention_forward", short_attention_forward)
        monkeypatch.setattr(short, "short_attention_backward", short_attention_backward)
    mask = torch.rand(shape, device=kernel_device) < 0.7
    bias = torch.randn(1, 2, 33, 40, device=kernel_device)
    bias[..., 7], mask[0, ..., 9] = float("-inf"), False
    inputs = [x.detach() for x in qkv(kernel_device, (2, 2, 1, 33, 40, 16, 16))]
    bits = torch.ops.tfm.attention_mask_bits
    words, reach = bits(mask.expand(-1, -1, 33, -1).contiguous(), None, 0, None, None)
    reach = reach & bits(bias, None, 0, None, None)[1]
    words = words[:, :, : shape[2]]
    cotangent = torch.randn(2, 2, 33, 16, device=kernel_device)
    rules = {"dropout_p": dropout_p, "seed": SEED} if dropout_p else {}
    found = []
    for impl, dtype in (("triton", torch.float32), ("reference", torch.float64), ("reference", torch.float32)):
        learnt = [x.to(dtype).requires_grad_() for x in (*inputs, aligned(bias, 40))]
        if impl == "triton":
            seed = torch.tensor(SEED, device=kernel_device) if dropout_p else None
            rest = 33, 40, 0, None, None, 0.25, None, dropout_p, 0
            call = Attention(*learnt, words, reach, *[None] * 7, seed, *rest)
            output, statistics = apply(Attended, NAMESPACE, call)
            weights = torch.ops.tfm.attention_weights(statistics, *(x.detach() for x in learnt), *call[4:])
        else:
            masked = learnt[3].masked_fill(~mask, float("-inf"))
            output, weights = ops.attention(
                *learnt[:3], masked, scale=0.25, return_weights=True, impl="reference", **rules
            )
        loss = (output * cotangent.to(dtype)).sum()
        found.append([output.detach(), weights.detach(), *torch.autograd.grad(loss, learnt)])
    oracle.assert_all_match(*found, ("output", "weights", "query", "key", "value", "bias"))


@pytest.mark.parametrize("told", ["tf32", "ieee", "none"])
def test_products_of_fp32_are_what_torch_is_told(told, kernel_device):
    """Through the setting of which torch's older one, allow_tf32, cannot be read beside it."""
    inputs, matmul = qkv(kernel_device), torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = told
    try:
        assert precision(torch.float32) == ("tf32" if told == "tf32" else "ieee")
        assert {precision(half) for half in HALVES} == {"ieee"}
        for result in run(inputs, {}):
            assert result.isfinite().all()
    finally:
        matmul.fp32_precision = before


def test_same_inputs_same_bits(kernel_device):
    tensors = make(PROBLEMS["everything"], kernel_device, torch.float32)
    first, second = (results(tensors, "triton", torch.float32) for _ in range(2))
    equal(first, second)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("how", UNREACHED)
def test_what_no_query_reaches_stays_there(how, poison, kernel_device):
    query, key, value = qkv(kernel_device, (2, 2, 1, 40, 70, 16, 16))
    options, hidden = unreached(how, kernel_device)
    expected = run([query, key, value], options)
    poisoned = [t.detach().masked_fill(hidden, poison).requires_grad_() for t in (key, value)]
    lse = ops.attention(query, key, value, **options, return_lse=True, impl="triton")[1]
    empty = (lse == float("-inf"))[..., None]
    assert empty.any() == (("mask" in how or how == "bias") and how != "key mask")
    actual = run([query.detach().masked_fill(empty, poison).requires_grad_(), *poisoned], options)
    equal(actual, expected)


@pytest.mark.parametrize("options", NOTHING_ALLOWED.values(), ids=NOTHING_ALLOWED.keys())
def test_queries_without_keys_give_zero_and_zero_gradients(options, kernel_device):
    inputs = qkv(kernel_device)
    options = {name: x.to(kernel_device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    for result in run(inputs, options):
        assert torch.equal(result, torch.zeros_like(result))
    sinks = torch.randn(2, device=kernel_device, requires_grad=True)
    for sink in (None, sinks):
        output, lse = ops.attention(*inputs, **options, sinks=sink, return_lse=True, impl="triton")
        assert not output.any()
        expected = torch.full_like(lse, float("-inf")) if sink is None else sinks[:, None].expand_as(lse)
        assert torch.equal(lse, expected)
    assert torch.equal(torch.autograd.grad(lse.sum(), sinks)[0], torch.full_like(sinks, 80))


def test_heads_of_one_projection_are_not_copied(kernel_device, monkeypatch):
    projected = torch.randn(2, 40, 3, 2, 16, device=kernel_device, requires_grad=True)
    fused = [x.transpose(1, 2) for x in projected.unbind(2)]
    options = {"is_causal": True, "dropout_p": 0.2, "seed": SEED}
    expected = run([x.detach().contiguous().requires_grad_() for x in fused], options)
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda *_: pytest.fail("a copy"))
    actual = run(fused, options)
    equal(actual, expected)
    output, *gradients = actual
    # Heads side by side, as the projection behind wants them, and gradients as the parts of the one before.
    assert output.transpose(1, 2).is_contiguous()
    assert len(gradients) == 3
    for gradient in gradients:
        assert gradient.transpose(1, 2).stride() == projected.select(2, 0).stride()


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_strides_change_nothing(view, kernel_device):
    inputs = qkv(kernel_device)
    bias = torch.randn(2, 1, 40, 70, device=kernel_device)
    options = {"dropout_p": 0.2, "seed": SEED}
    cotangent = torch.randn(2, 2, 40, 24, device=kernel_device)
    found = []
    for change in (lambda x: x, view):
        changed = [change(x.detach()).requires_grad_() for x in (*inputs, bias)]
        output = ops.attention(*changed, impl="triton", **options)
        found.append([output, *torch.autograd.grad(output, changed[:3], change(cotangent))])
    equal(*found)


def test_expanded_gradients_and_masks(kernel_device):
    inputs = qkv(kernel_device)
    row = torch.rand(70, device=kernel_device) < 0.7
    found = []
    for mask in (row.view(1, 1, 1, 70), row.expand(2, 2, 40, 70), row.expand(2, 2, 40, 70).contiguous()):
        output = ops.attention(*inputs, mask, impl="triton")
        found.append([output, *torch.autograd.grad(output.sum(), inputs)])
    equal(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


@pytest.mark.parametrize("subset", [(0,), (1,), (2,), (0, 2), (1, 2), (3,), (4,)], ids=str)
def test_only_wanted_gradients_are_computed(subset, kernel_device, launched):
    tensors = make(
        Problem((2, 2, 1, 33, 40, 16, 16), {"sinks": True}, ("float", (1, 2, 33, 40))), kernel_device, DTYPES[0]
    )
    expected = results(tensors, "triton", torch.float32, with_lse=False)
    launched.clear()
    some = {name: x.detach().requires_grad_(place in subset) for place, (name, x) in enumerate(tensors.inputs.items())}
    output, _ = attend(tensors, some, "triton")
    output.backward(tensors.cotangents[0])
    for name, x in some.items():
        assert (x.grad is None) == (not x.requires_grad)
        if x.requires_grad:
            equal(x.grad, expected[f"d{name}"])
    assert launched == BITS + FORWARD + QUERIES + KEYS * bool({1, 2} & set(subset)) + BIAS * (3 in subset)


def test_lse_alone_has_gradients(kernel_device):
    inputs, found = qkv(kernel_device), []
    for impl, dtype in (("triton", torch.float32), ("reference", torch.float64), ("reference", torch.float32)):
        some = [x.detach().to(dtype).requires_grad_() for x in inputs]
        lse = ops.attention(*some, is_causal=True, return_lse=True, impl=impl)[1]
        found.append([lse.detach(), *torch.autograd.grad(lse.square().sum(), some[:2])])
    oracle.assert_all_match(*found, ("lse", "query", "key"))


@pytest.mark.parametrize(("dropout_p", "dim"), [(0.0, 16), (0.4, 16), (0.4, 300)])
def test_returned_weights_are_those_applied(dropout_p, dim, kernel_device, launched):
    query, key, value = qkv(kernel_device, (2, 2, 1, 40, 70, dim, 24))
    mask = torch.rand(2, 1, 40, 70, device=kernel_device) < 0.6
    mask[0, 0, 3] = False
    options = {"dropout_p": dropout_p, "seed": SEED, "softcap": 2.0, "attn_mask": mask}
    output, weights = ops.attention(query, key, value, **options, return_weights=True, impl="triton")
    assert launched == BITS + FORWARD + ["attention_weights_kernel"]
    found = [[weights.detach(), *torch.autograd.grad(weights.square().sum(), (query, key), retain_graph=True)]]
    for dtype in (torch.float64, torch.float32):
        some = [x.detach().to(dtype).requires_grad_() for x in (query, key, value)]
        expected = ops.attention(*some, **options, return_weights=True, impl="reference")[1]
        found.append([expected.detach(), *torch.autograd.grad(expected.square().sum(), some[:2])])
    oracle.assert_all_match(*found, ("weights", "query", "key"))
    equal(output, ops.attention(query, key, value, **options, impl="triton"))


DTYPES_OF_TABLES = (torch.bfloat16, torch.float32)


@settings(max_examples=200)
@given(
    dims=st.tuples(st.integers(1, 512), st.integers(1, 512)),
    dtype=st.sampled_from(DTYPES_OF_TABLES),
    extras=st.integers(0, 3),
    major=st.sampled_from([8, 9, 10, 12]),
)
def test_every_head_dim_has_tiles(dims, dtype, extras, major):
    for dim in dims:
        first, rest = any_length.split_dim(dim, dtype)
        assert first >= 16
        if dim > any_length.WHOLE:
            assert (first & (first - 1), rest) == (0, 0)
            assert (any_length.slices(dim, dtype) - 1) * first < dim <= any_length.slices(dim, dtype) * first
            continue
        assert any_length.slices(dim, dtype) == 1
        assert rest == 0 or 16 <= rest <= first
        assert dim <= first + rest < max(2 * dim, 17)
        assert all(part & (part - 1) == 0 for part in (first, rest))
    for choose in (
        any_length.attention_forward,
        any_length.attention_backward_queries,
        any_length.attention_backward_keys,
    ):
        tiles = choose(*dims, dtype, extras, major)
        assert tiles.block_queries >= 16
        assert tiles.block_keys >= 16
        # Word rows of a mask are padded to so many keys.
        assert KEYS_OF_A_ROW % tiles.block_keys == 0
