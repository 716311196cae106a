"""MultiheadAttention against torch's: every constructor argument and mask form, outputs and all gradients."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings

import pytest
import torch
from oracle import assert_matches
from torch import Tensor
from torch_pairs import assert_equal_results, pair, results, same_input_self_attention

import tfm.nn
from tfm import ops
from tfm.reference.dropout import keep_mask, keep_scale

BATCH, QUERIES, KEYS, DIM, HEADS = 3, 5, 7, 12, 3

CONSTRUCTORS = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "no bias": {"bias": False, "batch_first": True},
    "kdim and vdim": {"kdim": 6, "vdim": 10},
    "kdim without bias": {"kdim": 6, "bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True, "batch_first": True},
    "both extra keys": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 6},
}
MASKS = {
    "none": (None, None),
    "bool": ("bool 2", None),
    "float": ("float 2", None),
    "bool a head": ("bool 3", None),
    "float a head": ("float 3", None),
    "bool padding": (None, "bool"),
    "float padding": (None, "float"),
    "bool and padding": ("bool 2", "bool"),
    "float a head and float padding": ("float 3", "float"),
    "float and bool padding": ("float 2", "bool"),
}


def masks(kinds: tuple[str | None, str | None], queries: int = QUERIES) -> dict[str, Tensor]:
    """Masks under which every query has a key in every sequence."""
    attn, padding = kinds
    given = {}
    if attn:
        shape = (queries, KEYS) if attn.endswith("2") else (BATCH * HEADS, queries, KEYS)
        masked = torch.rand(shape) < 0.4
        masked[..., 0] = False
        values = torch.randn(shape, dtype=torch.float64).masked_fill(masked, float("-inf"))
        given["attn_mask"] = masked if attn.startswith("bool") else values
    if padding:
        padded = torch.zeros(BATCH, KEYS, dtype=torch.bool)
        padded[0, 3:], padded[1, 2] = True, True
        values = torch.randn(BATCH, KEYS, dtype=torch.float64).masked_fill(padded, float("-inf"))
        given["key_padding_mask"] = padded if padding == "bool" else values
    return given


def inputs(options: dict, unbatched: bool = False) -> dict[str, Tensor]:
    sizes = {"query": DIM, "key": options.get("kdim", DIM), "value": options.get("vdim", DIM)}
    lengths = {"query": QUERIES, "key": KEYS, "value": KEYS}
    given = {}
    for name, size in sizes.items():
        shape = (BATCH, lengths[name], size) if options.get("batch_first") else (lengths[name], BATCH, size)
        given[name] = torch.randn((lengths[name], size) if unbatched else shape, dtype=torch.float64)
    return given


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("constructor", CONSTRUCTORS)
def test_equals_torch(constructor: str, mask: str) -> None:
    options = CONSTRUCTORS[constructor]
    theirs, ours = pair("MultiheadAttention", DIM, HEADS, **options)
    given = masks(MASKS[mask])
    # A float mask may learn: it is among the inputs whose gradient is compared.
    floats = {name: tensor for name, tensor in given.items() if tensor.is_floating_point()}
    others = {name: tensor for name, tensor in given.items() if name not in floats}
    for weights in ({"need_weights": False}, {}, {"average_attn_weights": False}):
        call = inputs(options) | floats
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Support for mismatched")
            expected = results(theirs, call, others | weights)
        assert_equal_results(results(ours, call, others | weights), expected)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("mask", ["none", "float"])
def test_unbatched(batch_first: bool, mask: str) -> None:
    theirs, ours = pair("MultiheadAttention", DIM, HEADS, batch_first=batch_first)
    call = inputs({}, unbatched=True)
    others = masks(MASKS[mask]) | {"key_padding_mask": torch.arange(KEYS) > 4}
    if mask == "float":
        others["key_padding_mask"] = torch.where(others["key_padding_mask"], float("-inf"), 0.0).double()
    for weights in (True, False):
        others["need_weights"] = weights
        assert_equal_results(results(ours, call, others), results(theirs, call, others))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_self_attention_and_shared_keys_are_fused_alike(batch_first: bool, bias: bool) -> None:
    theirs, ours = pair("MultiheadAttention", DIM, HEADS, batch_first=batch_first, bias=bias)
    x = inputs({"batch_first": batch_first})["key"]
    call = {"x": x}
    expected = results(same_input_self_attention(theirs), call, {})
    assert_equal_results(results(same_input_self_attention(ours), call, {}), expected)
    query = inputs({"batch_first": batch_first})["query"]
    memory = x.clone().requires_grad_()
    found = [module(query, memory, memory, need_weights=False)[0] for module in (ours, theirs)]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("weights", [False, True])
def test_causal_hint(padded: bool, weights: bool) -> None:
    theirs, ours = pair("MultiheadAttention", DIM, HEADS)
    later = torch.ones(QUERIES, KEYS, dtype=torch.bool).triu(1)
    others = {"attn_mask": later, "is_causal": True, "need_weights": weights}
    if padded:
        others["key_padding_mask"] = masks((None, "bool"))["key_padding_mask"]
    call = inputs({})
    assert_equal_results(results(ours, call, others), results(theirs, call, others))


def test_beside_padding_the_mask_rules_not_the_hint() -> None:
    theirs, ours = pair("MultiheadAttention", DIM, HEADS)
    others = masks(MASKS["bool and padding"]) | {"is_causal": True, "need_weights": False}
    call = inputs({})
    assert_equal_results(results(ours, call, others), results(theirs, call, others))


def test_causal_without_a_mask_means_causal() -> None:
    _, ours = pair("MultiheadAttention", DIM, HEADS)
    call = inputs({})
    later = torch.ones(QUERIES, KEYS, dtype=torch.bool).triu(1)
    for weights in (False, True):
        masked = results(ours, call, {"attn_mask": later, "need_weights": weights})
        assert_equal_results(results(ours, call, {"is_causal": True, "need_weights": weights}), masked)


def test_extra_keys_are_seen_under_a_causal_hint() -> None:
    """torch's own hint hides them, its mask does not; here both show them."""
    theirs, ours = pair("MultiheadAttention", DIM, HEADS, add_bias_kv=True)
    call = inputs({})
    later = torch.ones(QUERIES, KEYS, dtype=torch.bool).triu(1)
    expected = results(theirs, call, {"attn_mask": later, "need_weights": False})
    for hinted in ({"attn_mask": later}, {}):
        assert_equal_results(results(ours, call, hinted | {"is_causal": True, "need_weights": False}), expected)


@pytest.mark.parametrize("form", ["bool", "float"])
@pytest.mark.parametrize("weights", [False, True])
def test_fully_masked_rows_give_zero_and_finite_gradients(form: str, weights: bool) -> None:
    theirs, ours = pair("MultiheadAttention", DIM, HEADS, batch_first=True)
    mask = torch.zeros(QUERIES, KEYS, dtype=torch.bool)
    mask[2] = True
    padding = torch.zeros(BATCH, KEYS, dtype=torch.bool)
    padding[1] = True
    if form == "float":
        mask, padding = (torch.zeros(m.shape).double().masked_fill(m, float("-inf")) for m in (mask, padding))
    call = inputs({"batch_first": True})
    others = {"attn_mask": mask, "key_padding_mask": padding, "need_weights": weights}
    found = results(ours, call, others)
    assert all(tensor.isfinite().all() for tensor in found.values())
    empty = ours.out_proj.bias.detach().expand(QUERIES, DIM)
    torch.testing.assert_close(found["output 0"][1], empty)
    torch.testing.assert_close(found["output 0"][:, 2], empty[:BATCH])
    assert (found["gradient of query"][1] == 0).all()
    assert (found["gradient of query"][:, 2] == 0).all()
    assert (found["gradient of key"][1] == 0).all()
    keep = torch.ones(BATCH, QUERIES, dtype=torch.bool)
    keep[1], keep[:, 2] = False, False
    with torch.no_grad():
        expected = theirs(**call, **others)[0]
    torch.testing.assert_close(found["output 0"][keep], expected[keep], rtol=0, atol=1e-12)


def test_nan_in_padded_keys_stays_there() -> None:
    _, ours = pair("MultiheadAttention", DIM, HEADS, batch_first=True)
    call = inputs({"batch_first": True})
    padding = torch.zeros(BATCH, KEYS, dtype=torch.bool)
    padding[:, 4:] = True
    clean = ours(**call, key_padding_mask=padding)
    for name in ("key", "value"):
        call[name][:, 4:] = float("nan")
    for found, expected in zip(ours(**call, key_padding_mask=padding), clean, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_dropout_is_the_references_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = tfm.nn.MultiheadAttention(DIM, HEADS, dropout=0.3, batch_first=True).double()
    seed = torch.tensor(-(2**40) + 7)
    monkeypatch.setattr(ops, "draw_seed", lambda device: seed)
    x = torch.randn(BATCH, QUERIES, DIM, dtype=torch.float64)
    output, weights = ours(x, x, x, average_attn_weights=False)
    undropped = copy.deepcopy(ours).eval()(x, x, x, average_attn_weights=False)[1]
    rows = torch.arange(QUERIES).expand(BATCH, HEADS, -1)
    heads = torch.arange(BATCH * HEADS).view(BATCH, HEADS, 1)
    dropped = undropped * keep_mask(rows, QUERIES, heads, 0.3, seed, 0) * keep_scale(0.3)
    torch.testing.assert_close(weights, dropped, rtol=0, atol=1e-12)
    value = torch.nn.functional.linear(x, ours.in_proj_weight[2 * DIM :], ours.in_proj_bias[2 * DIM :])
    joined = (dropped @ value.unflatten(-1, (HEADS, -1)).transpose(1, 2)).transpose(1, 2).flatten(-2)
    torch.testing.assert_close(output, ours.out_proj(joined), rtol=0, atol=1e-12)


def test_dropout_rate_and_seed() -> None:
    ours = tfm.nn.MultiheadAttention(8, 2, dropout=0.25)
    x = torch.randn(64, 16, 8)
    torch.manual_seed(1)
    output, weights = ours(x, x, x, average_attn_weights=False)
    assert abs((weights == 0).double().mean().item() - 0.25) < 0.01
    torch.manual_seed(1)
    torch.testing.assert_close(ours(x, x, x)[0], output, rtol=0, atol=0)
    assert not torch.equal(ours(x, x, x)[0], output)
    assert (ours.eval()(x, x, x, average_attn_weights=False)[1] > 0).all()


def test_never_takes_torchs_fast_path(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise AssertionError("torch's fast path")

    monkeypatch.setattr(torch, "_native_multi_head_attention", fail)
    theirs, ours = (module.eval() for module in pair("MultiheadAttention", 8, 2, batch_first=True))
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    with torch.no_grad():
        with pytest.raises(AssertionError, match="fast path"):
            theirs(x, x, x)
        evaluated = ours(x, x, x)[0]
    torch.testing.assert_close(ours.train()(x, x, x)[0], evaluated, rtol=0, atol=0)


def test_signature_state_and_pickle() -> None:
    theirs, ours = pair("MultiheadAttention", 8, 2, add_bias_kv=True)
    assert inspect.signature(type(ours)) == inspect.signature(type(theirs))
    assert list(inspect.signature(ours.forward).parameters) == list(inspect.signature(theirs.forward).parameters)
    assert vars(ours).keys() == vars(theirs).keys()
    theirs.load_state_dict(ours.state_dict())
    call = {name: torch.randn(3, 2, 8, dtype=torch.float64) for name in ("query", "key", "value")}
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(copied) is tfm.nn.MultiheadAttention
        assert_equal_results(results(copied, call, {}), results(ours, call, {}))
    theirs.__class__ = tfm.nn.MultiheadAttention
    assert_equal_results(results(theirs, call, {}), results(ours, call, {}))


def test_autocast_and_half_precision() -> None:
    theirs, ours = pair("MultiheadAttention", 8, 2)
    x = torch.randn(4, 2, 8)
    truth = theirs(x.double(), x.double(), x.double(), need_weights=False)[0]
    theirs, ours = theirs.float(), ours.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = ours(x, x, x, need_weights=False)[0], theirs(x, x, x, need_weights=False)[0]
    assert found.dtype == expected.dtype == torch.bfloat16
    assert_matches(found, truth, expected)
    half = ours.bfloat16()(x.bfloat16(), x.bfloat16(), x.bfloat16())
    assert half[0].dtype == half[1].dtype == torch.bfloat16


@pytest.mark.parametrize("kind", [{}, {"kdim": DIM + 1, "vdim": DIM - 1}], ids=["", "kdim"])
def test_a_bias_may_have_another_dtype_than_its_weight(kind: dict[str, int]) -> None:
    theirs, ours = pair("MultiheadAttention", DIM, HEADS, **kind)
    for module in (theirs, ours):
        module.in_proj_bias = torch.nn.Parameter(module.in_proj_bias.half())
    query, key, value = (torch.randn(5, 3, size, dtype=torch.float64) for size in (DIM, ours.kdim, ours.vdim))
    # transposed, as torch's matmul of rows side by side refuses such a bias
    call = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (query, key, value)]
    torch.testing.assert_close(ours(*call), theirs(*call), rtol=0, atol=1e-10)
    ours(query, key, value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.zeros(5, 3, 11)}, r"query: expected \[\.\.\., 12\], got shape \(5, 3, 11\)"),
        ({"key": torch.zeros(7, 12)}, "expected `key` and `value` to be 3-D but found 2-D and 3-D"),
        ({"value": torch.zeros(6, 3, 12)}, "value: expected"),
        ({"key": torch.zeros(7, 2, 12), "value": torch.zeros(7, 2, 12)}, "key: expected batch 3 like query, got 2"),
        ({"key_padding_mask": torch.zeros(3, 5).bool()}, r"padding mask of \(3, 7\), got shape \(3, 5\)"),
        ({"key_padding_mask": torch.zeros(3, 7).int()}, "expected bool .* got torch.int32"),
        ({"attn_mask": torch.zeros(7)}, "expected `attn_mask` to be `None`, 2-D or 3-D but found 1-D"),
        ({"attn_mask": torch.zeros(5, 6)}, r"Expected `attn_mask` shape to be \(5, 7\)"),
        ({"attn_mask": torch.zeros(3, 5, 7)}, rf"Expected `attn_mask` shape to be \({3 * HEADS}, 5, 7\)"),
    ],
)
def test_says_what_was_expected(changes: dict[str, Tensor], message: str) -> None:
    ours = tfm.nn.MultiheadAttention(DIM, HEADS)
    call = {name: tensor.float() for name, tensor in inputs({}).items()}
    with pytest.raises(ValueError, match=message):
        ours(**(call | changes))
