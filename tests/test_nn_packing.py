"""What packing promises: nothing is computed on padding, read twice from the device, or leaked out of padding."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor
from torch_pairs import assert_equal_results, results, stack_pair
from transformer_cases import (
    BATCH,
    CASES,
    CAUSAL,
    CAUSAL_FLOAT,
    DIM,
    HEADS,
    SOURCE_LENGTHS,
    SOURCES,
    TARGET_LENGTHS,
    TARGETS,
    Count,
    batch,
    padding,
    transformers,
)

from tfm import ops


@pytest.mark.parametrize("form", ["list", "tensor"])
def test_lengths_stand_for_padding_masks(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = transformers(batch_first=True)
    inputs = {"src": batch(SOURCES), "tgt": batch(TARGETS)}
    keep = ~padding(TARGET_LENGTHS, TARGETS)
    expected = results(ours, inputs, CASES["causal and padding"], keep)
    lengths = {"src_lengths": SOURCE_LENGTHS, "tgt_lengths": TARGET_LENGTHS}
    if form == "tensor":
        lengths = {name: torch.tensor(given) for name, given in lengths.items()}
    packed = Count(monkeypatch, "varlen_attention")
    assert_equal_results(results(ours, inputs, lengths | {"tgt_is_causal": True}, keep), expected)
    assert packed.rows == [sum(SOURCE_LENGTHS)] * 2 + [sum(TARGET_LENGTHS)] * 4
    # With a mask of another form they go into padded attention.
    dense = {"tgt_mask": CAUSAL_FLOAT.expand(BATCH * HEADS, -1, -1)}
    assert_equal_results(results(ours, inputs, lengths | dense, keep), expected)


def test_one_read_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values cross from tensors to Python once in a stack, and not at all where the host knows the lengths."""
    _, ours = transformers(batch_first=True)
    source, target = batch(SOURCES), batch(TARGETS)
    reads = []
    for name in ("tolist", "item", "__bool__", "__int__"):
        original = getattr(Tensor, name)
        monkeypatch.setattr(
            Tensor, name, lambda self, *given, original=original: reads.append(1) or original(self, *given)
        )
    # The CPU's checks of offsets are no device reads.
    monkeypatch.setattr(sys.modules["tfm.ops.varlen_attention"], "check_offsets", lambda *given: None)
    masks = CASES["causal and padding"]
    ours(source, target, **masks)
    assert len(reads) == 1
    # Two stacks, where the memory's mask is another than the source's.
    reads.clear()
    ours(source, target, **(masks | {"memory_key_padding_mask": masks["src_key_padding_mask"].clone()}))
    assert len(reads) == 2
    reads.clear()
    ours(source, target, src_lengths=SOURCE_LENGTHS, tgt_lengths=TARGET_LENGTHS, tgt_is_causal=True)
    ours(source, target)
    assert not reads


def test_more_padding_same_results() -> None:
    _, ours = transformers(batch_first=True)
    source, target = batch(SOURCES), batch(TARGETS)
    short = {"src_lengths": [5, 2, 5, 1], "tgt_lengths": [1, 3, 3, 2]}
    for extra in ({"tgt_is_causal": True}, {"tgt_mask": CAUSAL}):
        full = ours(source, target, **short, **extra)
        extra = {name: given if given is True else given[:3, :3] for name, given in extra.items()}
        less = ours(source[:, :5], target[:, :3], **short, **extra)
        torch.testing.assert_close(full[:, :3], less, rtol=0, atol=1e-14)
        assert (full[:, 3:] == 0).all()


@pytest.mark.parametrize("packed", [False, True])
def test_sequences_without_tokens_or_keys(packed: bool) -> None:
    theirs, ours = transformers(batch_first=True)
    sources, targets = [7, 0, 5, 1], [0, 5, 3, 4]
    call = {
        "src_key_padding_mask": padding(sources, SOURCES),
        "memory_key_padding_mask": padding(sources, SOURCES),
        "tgt_key_padding_mask": padding(targets, TARGETS),
        "tgt_mask": CAUSAL if packed else CAUSAL[None].expand(BATCH * HEADS, -1, -1),
    }
    inputs = {"src": batch(SOURCES), "tgt": batch(TARGETS)}
    found = results(ours, inputs, call)
    assert all(tensor.isfinite().all() for tensor in found.values())
    keep = ~padding(targets, TARGETS)
    keep[1] = False  # torch's own may be NaN: its memory has no keys
    with torch.no_grad():
        expected = theirs(**inputs, **call)
    torch.testing.assert_close(found["output 0"][keep], expected[keep], rtol=0, atol=1e-10)
    assert (found["output 0"][~padding(targets, TARGETS)] != 0).any()
    assert (found["gradient of src"][1] == 0).all()
    nothing = ours(**inputs, src_lengths=[0] * BATCH, tgt_lengths=[0] * BATCH)
    assert nothing.shape == (BATCH, TARGETS, DIM)
    assert (nothing == 0).all()


@pytest.mark.parametrize("case", ["padding", "another mask and padding"])
def test_nan_in_padding_reaches_nothing(case: str) -> None:
    _, ours = transformers(batch_first=True)
    call = CASES[case]
    inputs = {"src": batch(SOURCES), "tgt": batch(TARGETS)}
    poisoned = {
        name: tensor.masked_fill(call[f"{name}_key_padding_mask"][..., None], float("nan"))
        for name, tensor in inputs.items()
    }
    assert_equal_results(results(ours, poisoned, call), results(ours, inputs, call))


@pytest.mark.parametrize("norm_first", [False, True])
def test_dropout_is_the_same_packed_and_in_attention_padded(norm_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention counts rows within a sequence, so packing changes no weight's fate; token-wise rows are the packed."""
    _, ours = transformers(batch_first=True, norm_first=norm_first)
    for module in ours.modules():
        if isinstance(module, torch.nn.MultiheadAttention):
            module.dropout = 0.4
    seed = torch.tensor(99)
    monkeypatch.setattr(ops, "draw_seed", lambda device: seed)
    inputs = {"src": batch(SOURCES), "tgt": batch(TARGETS)}
    keep = ~padding(TARGET_LENGTHS, TARGETS)
    call = CASES["causal and padding"]
    packed = results(ours, inputs, call, keep)
    padded = call | {"tgt_mask": CAUSAL.expand(BATCH * HEADS, -1, -1)}
    assert_equal_results(results(ours, inputs, padded, keep), packed)
    assert not torch.allclose(ours.eval()(**inputs, **call)[keep], packed["output 0"])


def test_functorch_stays_padded() -> None:
    _, ours = stack_pair("Encoder", batch_first=True)
    source, padded = batch(SOURCES), padding(SOURCE_LENGTHS, SOURCES)
    ours(source, src_key_padding_mask=padded).sum().backward()
    expected = {name: parameter.grad for name, parameter in ours.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        call = {"src_key_padding_mask": padded}
        return torch.func.functional_call(ours, parameters, (source,), call).sum()

    gradients = torch.func.grad(loss)({name: tensor.detach() for name, tensor in ours.named_parameters()})
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-10)
