"""TransformerEncoder, TransformerDecoder and Transformer against torch's: masks, flags, hooks, copies."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from torch import Tensor
from torch_pairs import assert_equal_results, results, stack_pair
from transformer_cases import (
    BATCH,
    CASES,
    CAUSAL,
    DIM,
    HEADS,
    PACKED,
    SOURCE_LENGTHS,
    SOURCES,
    TARGET_LENGTHS,
    TARGETS,
    Count,
    batch,
    padding,
    transformers,
)

import tfm.nn


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_equals_torch(batch_first: bool, norm_first: bool, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = transformers(batch_first=batch_first, norm_first=norm_first)
    call = CASES[case]
    inputs = {"src": batch(SOURCES, batch_first), "tgt": batch(TARGETS, batch_first)}
    padded = call.get("tgt_key_padding_mask", torch.zeros(BATCH, TARGETS))
    keep = padded == 0 if padded.dtype != torch.bool else ~padded
    keep = keep if batch_first else keep.t()
    expected = results(theirs, inputs, call, keep)
    packed, dense = Count(monkeypatch, "varlen_attention"), Count(monkeypatch, "attention")
    found = results(ours, inputs, call, keep)
    if case in PACKED:
        assert packed.rows == [sum(SOURCE_LENGTHS)] * 2 + [sum(TARGET_LENGTHS)] * 4
        assert not dense.rows
    assert_equal_results(found, expected)
    output = ours(**inputs, **call)
    assert (output[~keep] == 0).all()
    assert output.is_contiguous()
    torch.testing.assert_close(ours.eval()(**inputs, **call), output, rtol=0, atol=0)


@pytest.mark.parametrize(
    "options", [{"bias": False}, {"activation": "gelu"}, {"activation": torch.tanh}], ids=["no bias", "gelu", "tanh"]
)
def test_constructor_arguments(options: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = transformers(batch_first=True, layer_norm_eps=1e-3, **options)
    inputs, call = {"src": batch(SOURCES), "tgt": batch(TARGETS)}, CASES["causal and padding"]
    keep = ~call["tgt_key_padding_mask"]
    packed = Count(monkeypatch, "varlen_attention")
    assert_equal_results(results(ours, inputs, call, keep), results(theirs, inputs, call, keep))
    # A callable that tfm.ops does not know sees the shapes that torch would show it.
    assert bool(packed.rows) == (options.get("activation") is not torch.tanh)


@pytest.mark.parametrize("kind", ["Encoder", "Decoder"])
def test_unbatched(kind: str) -> None:
    theirs, ours = stack_pair(kind)
    x = torch.randn(TARGETS, DIM, dtype=torch.float64)
    keep = torch.arange(TARGETS) < 3
    if kind == "Encoder":
        inputs, call = {"src": x}, {"src_key_padding_mask": ~keep, "mask": CAUSAL}
    else:
        inputs = {"tgt": x, "memory": torch.randn(SOURCES, DIM, dtype=torch.float64)}
        call = {"tgt_key_padding_mask": ~keep, "tgt_mask": CAUSAL}
    assert_equal_results(results(ours, inputs, call, keep), results(theirs, inputs, call, keep))


def test_a_fully_masked_row_of_a_mask() -> None:
    _, ours = stack_pair("Encoder", batch_first=True)
    mask = torch.zeros(SOURCES, SOURCES, dtype=torch.bool)
    mask[3] = True
    source = batch(SOURCES)
    found = results(ours, {"src": source}, {"mask": mask})
    assert all(tensor.isfinite().all() for tensor in found.values())
    # That row's attention is 0, so what it makes of itself does not depend on the others.
    others = source.clone()
    others[:, :3] += 1
    torch.testing.assert_close(ours(others, mask)[:, 3], found["output 0"][:, 3], rtol=0, atol=1e-14)


def test_dropout_obeys_the_seed_and_eval() -> None:
    ours = tfm.nn.Transformer(DIM, HEADS, 1, 1, 12, dropout=0.5, batch_first=True).double()
    inputs, call = {"src": batch(SOURCES), "tgt": batch(TARGETS)}, CASES["padding"]
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(ours(**inputs, **call))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    ours.eval()
    assert torch.equal(ours(**inputs, **call), ours(**inputs, **call))


class MyLayer(torch.nn.TransformerEncoderLayer):
    """A user's subclass."""

    def forward(self, src: Tensor, *given: object, **named: object) -> Tensor:
        assert src.shape == (BATCH, SOURCES, DIM)
        return super().forward(src, *given, **named) + 1


def test_a_users_layer_is_called_as_torch_would(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = (
        library.TransformerEncoder(MyLayer(DIM, HEADS, 12, 0.0, batch_first=True), 2).double()
        for library in (torch.nn, tfm.nn)
    )
    ours.load_state_dict(theirs.state_dict())
    call = {"src_key_padding_mask": padding(SOURCE_LENGTHS, SOURCES)}
    keep = ~call["src_key_padding_mask"]
    packed = Count(monkeypatch, "varlen_attention")
    inputs = {"src": batch(SOURCES)}
    assert_equal_results(results(ours, inputs, call, keep), results(theirs, inputs, call, keep))
    lengths = results(ours, inputs, {"lengths": SOURCE_LENGTHS}, keep)
    assert_equal_results(lengths, results(theirs, inputs, call, keep))
    assert (ours(**inputs, **call)[~keep] == 0).all()
    assert not packed.rows


@pytest.mark.parametrize("kind", ["Encoder", "Decoder"])
def test_hooks_on_layers_and_their_children_fire(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = stack_pair(kind, batch_first=True)
    if kind == "Encoder":
        inputs, call = {"src": batch(SOURCES)}, {"src_key_padding_mask": padding(SOURCE_LENGTHS, SOURCES)}
        keep = ~padding(SOURCE_LENGTHS, SOURCES)
    else:
        inputs = {"tgt": batch(TARGETS), "memory": batch(SOURCES)}
        call, keep = {"tgt_key_padding_mask": padding(TARGET_LENGTHS, TARGETS)}, ~padding(TARGET_LENGTHS, TARGETS)
    expected = results(ours, inputs, call, keep)
    for path in ("layers.0", "layers.1.linear2", "layers.1.self_attn", "norm"):
        shapes = []
        handle = ours.get_submodule(path).register_forward_hook(
            lambda module, given, output, shapes=shapes: shapes.append((output, output[0])[isinstance(output, tuple)])
        )
        assert_equal_results(results(ours, inputs, call, keep), expected)
        handle.remove()
        assert [tensor.shape[:2] for tensor in shapes] == [keep.shape], path


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_torchs() -> None:
    theirs, ours = stack_pair("Encoder", batch_first=True)
    nested = torch.nested.nested_tensor([torch.randn(length, DIM).double() for length in (3, 1, 4)])
    with torch.no_grad():
        found, expected = (stack.eval()(nested).to_padded_tensor(0.0) for stack in (ours, theirs))
    assert torch.equal(found, expected)


def test_custom_stacks_and_lengths() -> None:
    class Memory(torch.nn.Module):
        def forward(self, src: Tensor, **named: object) -> Tensor:
            return src

    custom = torch.nn.TransformerDecoder(torch.nn.TransformerDecoderLayer(DIM, HEADS, 12), 1)
    ours = tfm.nn.Transformer(DIM, HEADS, 1, 1, 12, custom_encoder=Memory(), custom_decoder=custom, batch_first=False)
    assert type(ours.decoder) is torch.nn.TransformerDecoder
    source, target = torch.randn(SOURCES, BATCH, DIM), torch.randn(TARGETS, BATCH, DIM)
    assert ours(source, target).shape == target.shape
    for lengths in ({"src_lengths": SOURCE_LENGTHS}, {"tgt_lengths": TARGET_LENGTHS}):
        with pytest.raises(ValueError, match="lengths: expected none"):
            ours(source, target, **lengths)


def test_signatures_state_and_copies() -> None:
    theirs, ours = transformers()
    assert list(inspect.signature(type(ours)).parameters) == list(inspect.signature(type(theirs)).parameters)
    ours_parameters = inspect.signature(ours.forward).parameters
    for name in inspect.signature(theirs.forward).parameters:
        assert ours_parameters[name].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert vars(ours).keys() == vars(theirs).keys()
    theirs.load_state_dict(ours.state_dict())
    inputs = {"src": batch(SOURCES, False), "tgt": batch(TARGETS, False)}
    expected = results(ours, inputs, {})
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert_equal_results(results(copied, inputs, {}), expected)
    # The classes alone make the difference, down to torch's own children.
    for module in theirs.modules():
        if type(module).__name__.startswith("Transformer"):
            module.__class__ = getattr(tfm.nn, type(module).__name__)
    assert_equal_results(results(theirs, inputs, {}), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"src_lengths": [7, 2, 5]}, "src: expected 4 lengths, got 3"),
        ({"src_lengths": [8, 2, 5, 1]}, r"src: expected lengths in \[0, 7\], got \[8, 2, 5, 1\]"),
        ({"tgt_lengths": torch.tensor([1.0, 2, 3, 4])}, "lengths: expected int32 or int64, got torch.float32"),
        ({"tgt_lengths": [1] * 4, "tgt_key_padding_mask": torch.zeros(4, 5).bool()}, "tgt: expected a padding mask or"),
        ({"src_key_padding_mask": torch.zeros(4, 6).bool()}, r"src: expected a padding mask of \(4, 7\)"),
        ({"src": torch.zeros(4, 7, 9)}, r"src: expected \[..., 8\], got shape \(4, 7, 9\)"),
        ({"tgt": torch.zeros(3, 5, 8)}, "tgt: expected batch 4 like src"),
    ],
)
def test_says_what_was_expected(call: dict[str, object], message: str) -> None:
    ours = tfm.nn.Transformer(DIM, HEADS, 1, 1, 12, batch_first=True)
    with pytest.raises(ValueError, match=message):
        ours(**({"src": torch.zeros(BATCH, SOURCES, DIM), "tgt": torch.zeros(BATCH, TARGETS, DIM)} | call))
