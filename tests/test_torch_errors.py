"""What torch refuses, tfm refuses: as a ValueError that is also what torch raises for the same mistake."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, bool, float64, int32, int64, uint8, zeros

import tfm.nn
from tfm import ops
from tfm.errors import AssertedArgument, BadArgument

# As many heads as samples: [4, 5, 5] might be a mask for each of either.
BATCH, HEADS, LENGTH, DIM = 4, 4, 5, 8
MASKS = {
    "one a sample": zeros(BATCH, LENGTH, LENGTH, dtype=bool),
    "a row": zeros(1, LENGTH, dtype=bool),
    "a column": zeros(LENGTH, 1),
    "one element": zeros(1, 1),
    "one for all": zeros(1, LENGTH, LENGTH),
    "rows a head": zeros(BATCH * HEADS, 1, LENGTH, dtype=bool),
    "columns a head": zeros(BATCH * HEADS, LENGTH, 1),
    "too many heads": zeros(2 * BATCH * HEADS, LENGTH, LENGTH),
    "four dimensions": zeros(BATCH, HEADS, LENGTH, LENGTH, dtype=bool),
    "a vector": zeros(LENGTH, dtype=bool),
    "a key too many": zeros(LENGTH, LENGTH + 1, dtype=bool),
    "int32": zeros(LENGTH, LENGTH, dtype=int32),
    "uint8": zeros(LENGTH, LENGTH, dtype=uint8),
    "int64 a head": zeros(BATCH * HEADS, LENGTH, LENGTH, dtype=int64),
    "complex": zeros(LENGTH, LENGTH, dtype=torch.complex64),
}
PADDING = {
    "one sequence": zeros(LENGTH, dtype=bool),
    "a row": zeros(1, LENGTH, dtype=bool),
    "a column": zeros(BATCH, 1, dtype=bool),
    "a key too many": zeros(BATCH, LENGTH + 1, dtype=bool),
    "transposed": zeros(LENGTH, BATCH, dtype=bool),
    "three dimensions": zeros(BATCH, HEADS, LENGTH, dtype=bool),
    "int32": zeros(BATCH, LENGTH, dtype=int32),
}
X = zeros(BATCH, LENGTH, DIM)
MODULES = {
    "MultiheadAttention": ((DIM, HEADS), {"query": X, "key": X, "value": X}, ("attn_mask",), ("key_padding_mask",)),
    "TransformerEncoderLayer": ((DIM, HEADS, 12), {"src": X}, ("src_mask",), ("src_key_padding_mask",)),
    "TransformerDecoderLayer": (
        (DIM, HEADS, 12),
        {"tgt": X, "memory": X},
        ("tgt_mask", "memory_mask"),
        ("tgt_key_padding_mask", "memory_key_padding_mask"),
    ),
    "Transformer": (
        (DIM, HEADS, 1, 1, 12),
        {"src": X, "tgt": X},
        ("src_mask", "tgt_mask", "memory_mask"),
        ("src_key_padding_mask", "tgt_key_padding_mask", "memory_key_padding_mask"),
    ),
}


def assert_refused_alike(theirs: Callable[[], object], ours: Callable[[], object]) -> None:
    with pytest.raises((RuntimeError, AssertionError)) as refused:
        theirs()
    with pytest.raises(ValueError, match=": ") as refused_here:
        ours()
    # For integers torch has a NotImplementedError, which is a RuntimeError.
    assert refused_here.type is (BadArgument if isinstance(refused.value, RuntimeError) else AssertedArgument)


def assert_modules_refuse(kind: str, changes: dict[str, Tensor], *, train: bool = True, **options: object) -> None:
    arguments, inputs, _, _ = MODULES[kind]
    calls = []
    for library in (torch.nn, tfm.nn):
        module = getattr(library, kind)(*arguments, batch_first=True).train(train)
        calls.append(lambda module=module: module(**(inputs | changes), **options))
    assert_refused_alike(*calls)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, (_, _, names, _) in MODULES.items() for name in names]
)
def test_attention_masks(kind: str, name: str, train: bool) -> None:
    for mask in MASKS.values():
        # torch's decoder stumbles over integers before it comes to look at them.
        if (kind, name) != ("Transformer", "tgt_mask") or mask.dtype == bool or mask.is_floating_point():
            assert_modules_refuse(kind, {name: mask}, train=train)


@pytest.mark.parametrize("padded", [False, True], ids=["", "with padding"])
@pytest.mark.parametrize("need_weights", [False, True], ids=["no weights", "weights"])
def test_attention_masks_of_attention(need_weights: bool, padded: bool) -> None:
    padding = {"key_padding_mask": zeros(BATCH, LENGTH, dtype=bool)} if padded else {}
    for mask in MASKS.values():
        assert_modules_refuse("MultiheadAttention", {"attn_mask": mask} | padding, need_weights=need_weights)


@pytest.mark.parametrize("kind", ["Encoder", "Decoder"])
@pytest.mark.parametrize("within", ["layer", "stack", "layer that calls its children"])
def test_masks_under_the_hint(kind: str, within: str) -> None:
    """torch looks at a mask's dtype and dimensions even where the hint replaces it."""
    x = zeros(BATCH, LENGTH, DIM)
    for name in ("int32", "uint8", "int64 a head", "complex", "four dimensions", "a vector"):
        calls = []
        for library in (torch.nn, tfm.nn):
            module = getattr(library, f"Transformer{kind}Layer")(DIM, HEADS, 12, batch_first=True)
            if "children" in within:
                module.linear1 = torch.nn.Sequential(module.linear1)
            if within == "stack":
                module = getattr(library, f"Transformer{kind}")(module, 2)
            mask = {"Encoder": "mask" if within == "stack" else "src_mask", "Decoder": "tgt_mask"}[kind]
            call = {mask: MASKS[name], "is_causal" if kind == "Encoder" else "tgt_is_causal": True}
            inputs = (x,) if kind == "Encoder" else (x, x)
            calls.append(lambda module=module, inputs=inputs, call=call: module(*inputs, **call))
        assert_refused_alike(*calls)


def test_masks_beside_lengths() -> None:
    encoder = tfm.nn.TransformerEncoder(tfm.nn.TransformerEncoderLayer(DIM, HEADS, 12, batch_first=True), 2)
    for name in ("int32", "uint8", "a vector"):
        with pytest.raises(AssertedArgument, match="mask: expected"):
            encoder(X, MASKS[name], is_causal=True, lengths=[5, 3, 4, 1])


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, (_, _, _, names) in MODULES.items() for name in names]
)
def test_padding_masks(kind: str, name: str) -> None:
    for padding in PADDING.values():
        assert_modules_refuse(kind, {name: padding})


@pytest.mark.parametrize(
    "changes",
    [
        {"query": zeros(BATCH, LENGTH, DIM + 1)},
        {"key": zeros(BATCH, LENGTH, DIM + 1), "value": zeros(BATCH, LENGTH, DIM + 1)},
        {"value": zeros(BATCH, LENGTH, DIM + 1)},
        {"value": zeros(BATCH, LENGTH + 1, DIM)},
        {"key": zeros(1, LENGTH, DIM), "value": zeros(1, LENGTH, DIM)},
        {"key": zeros(LENGTH, DIM), "value": zeros(LENGTH, DIM)},
        {"query": zeros(LENGTH, DIM)},
        dict.fromkeys(("query", "key", "value"), zeros(1, BATCH, LENGTH, DIM)),
        dict.fromkeys(("query", "key", "value"), zeros(DIM)),
        dict.fromkeys(("query", "key", "value"), zeros(LENGTH, DIM)) | {"attn_mask": zeros(1, LENGTH, LENGTH)},
        dict.fromkeys(("query", "key", "value"), zeros(LENGTH, DIM)) | {"key_padding_mask": zeros(1, LENGTH)},
    ],
)
def test_inputs_of_attention(changes: dict[str, Tensor]) -> None:
    assert_modules_refuse("MultiheadAttention", changes)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("TransformerEncoderLayer", {"src": zeros(BATCH, LENGTH, DIM + 1)}),
        ("TransformerEncoderLayer", {"src": zeros(1, BATCH, LENGTH, DIM)}),
        ("TransformerDecoderLayer", {"memory": zeros(BATCH, LENGTH, DIM + 1)}),
        ("TransformerDecoderLayer", {"memory": zeros(1, LENGTH, DIM)}),
        ("TransformerDecoderLayer", {"tgt": zeros(LENGTH, DIM), "memory": zeros(1, LENGTH, DIM)}),
        ("Transformer", {"src": zeros(BATCH, LENGTH, DIM + 1)}),
        ("Transformer", {"tgt": zeros(BATCH, LENGTH, DIM + 1)}),
        ("Transformer", {"src": zeros(1, LENGTH, DIM)}),
        ("Transformer", {"src": zeros(1, LENGTH, DIM), "tgt": zeros(LENGTH, DIM)}),
    ],
)
def test_inputs_of_layers(kind: str, changes: dict[str, Tensor]) -> None:
    assert_modules_refuse(kind, changes)


@pytest.mark.parametrize(("name", "shape"), [("LayerNorm", (3, 5)), ("RMSNorm", (3, 5)), ("LayerNorm", ())])
def test_inputs_of_norms(name: str, shape: tuple[int, ...]) -> None:
    theirs, ours = (getattr(library, name)(DIM) for library in (torch.nn, tfm.nn))
    assert_refused_alike(lambda: theirs(zeros(shape)), lambda: ours(zeros(shape)))


QUERY, KEY = zeros(2, 4, 5, 8), zeros(2, 4, 7, 8)


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_mask": zeros(5, 6)},
        {"attn_mask": zeros(2, 5, 7, dtype=bool)},
        {"attn_mask": zeros(8, 5, 7)},
        {"attn_mask": zeros(1, 1, 1, 5, 7)},
        {"attn_mask": zeros(5, 7, dtype=int32)},
        {"key": zeros(2, 4, 7, 9)},
        {"key": zeros(3, 4, 7, 8), "value": zeros(3, 4, 7, 8)},
        {"key": zeros(2, 3, 7, 8), "value": zeros(2, 3, 7, 8)},
        {"key": KEY.double(), "value": KEY.double()},
        {"query": QUERY.int(), "key": KEY.int(), "value": KEY.int()},
        {"query": zeros(8), "key": zeros(8), "value": zeros(8)},
        {"key": KEY.to("meta"), "value": KEY.to("meta")},
        {"dropout_p": 1.5},
        {"dropout_p": -0.5},
    ],
)
def test_attention(changes: dict[str, object]) -> None:
    call = {"query": QUERY, "key": KEY, "value": KEY} | changes
    assert_refused_alike(lambda: F.scaled_dot_product_attention(**call), lambda: ops.attention(**call))


@pytest.mark.parametrize(
    ("weight", "bias"),
    [
        (zeros(5), None),
        (None, zeros(5)),
        (zeros(1, 4), None),
        (zeros(4, dtype=int32), None),
        (zeros(4).to("meta"), None),
    ],
)
def test_norms(weight: Tensor | None, bias: Tensor | None) -> None:
    x = zeros(3, 4)
    assert_refused_alike(lambda: F.layer_norm(x, (4,), weight, bias), lambda: ops.layer_norm(x, weight, bias))
    if bias is None and weight is not None and weight.dtype != int32:
        assert_refused_alike(lambda: F.rms_norm(x, (4,), weight), lambda: ops.rms_norm(x, weight))


@pytest.mark.parametrize(
    "changes",
    [
        {"input": zeros(3, 5)},
        {"input": zeros(3, 5, dtype=uint8)},
        {"weight": zeros(11)},
        {"weight": zeros(11, 6, 2)},
        {"padding_idx": 11},
        {"padding_idx": -12},
    ],
)
def test_embedding(changes: dict[str, object]) -> None:
    call = {"input": zeros(3, 5, dtype=int64), "weight": zeros(11, 6)} | changes
    others = {name: value for name, value in call.items() if name != "input"}
    positions = zeros(5, dtype=int64)
    assert_refused_alike(
        lambda: F.embedding(**call), lambda: ops.embedding(call["input"], positions=positions, **others)
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"input": zeros(9, 6)},
        {"target": zeros(9, 1, dtype=int64)},
        {"target": zeros(9, dtype=int32)},
        {"target": zeros(9, dtype=bool)},
        {"target": zeros(9, 6)},
        {"target": zeros(9, dtype=int64, device="meta")},
        {"weight": zeros(6)},
        {"linear_bias": zeros(6)},
        {"linear_weight": zeros(5)},
        {"label_smoothing": 1.5},
    ],
)
def test_cross_entropy(changes: dict[str, object]) -> None:
    call = {"input": zeros(9, 5), "linear_weight": zeros(7, 5), "target": zeros(9, dtype=int64)} | changes

    def theirs() -> Tensor:
        others = {name: value for name, value in call.items() if name in ("weight", "label_smoothing")}
        logits = F.linear(call["input"], call["linear_weight"], call.get("linear_bias"))
        return F.cross_entropy(logits, call["target"], **others)

    assert_refused_alike(theirs, lambda: ops.linear_cross_entropy(**call))


@pytest.mark.parametrize(
    "changes", [{"x": zeros(2, 4)}, {"x": zeros(())}, {"b1": zeros(6)}, {"w2": zeros(4, 6)}, {"b2": zeros(3)}]
)
def test_feed_forward(changes: dict[str, Tensor]) -> None:
    call = {"x": zeros(2, 3), "w1": zeros(7, 3), "b1": zeros(7), "w2": zeros(4, 7), "b2": zeros(4)} | changes

    def theirs() -> Tensor:
        return F.linear(F.relu(F.linear(call["x"], call["w1"], call["b1"])), call["w2"], call["b2"])

    assert_refused_alike(theirs, lambda: ops.feed_forward(**call))


def test_probabilities_and_reductions_stay_a_value_error() -> None:
    with pytest.raises(ValueError, match="dropout_p"):
        ops.dropout(zeros(3, dtype=float64), 1.5)
    with pytest.raises(ValueError, match="reduction") as refused:
        ops.linear_cross_entropy(zeros(9, 5), zeros(7, 5), zeros(9, dtype=int64), reduction="all")
    assert type(refused.value) is ValueError
