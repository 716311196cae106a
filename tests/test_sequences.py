"""Offsets, masks and the way between padded and packed batches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tfm import sequences
from tfm.sequences import Layout, Ragged

LENGTHS = st.lists(st.integers(0, 6), max_size=5)


def padded_batch(lengths, extra=0, dtype=torch.float64):
    return torch.randn(len(lengths), max(lengths, default=0) + extra, 2, 3, dtype=dtype)


@given(lengths=LENGTHS, dtype=st.sampled_from([torch.int32, torch.int64]))
def test_offsets_are_the_running_sum(lengths, dtype):
    found = sequences.offsets(torch.tensor(lengths, dtype=dtype))
    assert found.dtype == torch.int32
    assert found.tolist() == [sum(lengths[:index]) for index in range(len(lengths) + 1)]


def test_valid_positions():
    found = sequences.valid_positions(torch.tensor([2, 0, 3]), 3)
    assert found.tolist() == [[True, True, False], [False] * 3, [True] * 3]


@settings(deadline=None)
@given(lengths=LENGTHS, extra=st.integers(0, 3))
def test_packs_sentence_after_sentence_and_back(lengths, extra):
    padded = padded_batch(lengths, extra)
    packed = Ragged.pack(padded, torch.tensor(lengths, dtype=torch.int64))
    expected = [padded[index, :length] for index, length in enumerate(lengths)]
    assert torch.equal(packed.values, torch.cat(expected) if expected else padded.flatten(0, 1))
    assert packed.layout.positions.tolist() == [place for length in lengths for place in range(length)]
    assert packed.layout.shape == (len(lengths), padded.shape[1], sum(lengths))
    valid = sequences.valid_positions(torch.tensor(lengths, dtype=torch.int64), padded.shape[1])
    assert torch.equal(packed.padded(), padded * valid[..., None, None])
    assert packed.layout.is_rectangular == bool(valid.all())


@pytest.mark.parametrize("lengths", [[3, 0, 5], [4, 4]], ids=["ragged", "rectangular"])
def test_gradients_to_the_second_order(lengths):
    cu_seq = sequences.offsets(torch.tensor(lengths))
    layout = Layout.of(cu_seq, max(lengths), sum(lengths))
    padded, packed = padded_batch(lengths).requires_grad_(), torch.randn(sum(lengths), 2).double().requires_grad_()
    assert torch.autograd.gradcheck(layout.pack, padded)
    assert torch.autograd.gradcheck(layout.unpack, packed)
    assert torch.autograd.gradgradcheck(layout.pack, padded)
    assert torch.autograd.gradgradcheck(layout.unpack, packed)


def test_nan_in_padding_is_left_behind():
    lengths = torch.tensor([2, 4])
    padded = padded_batch([2, 4])
    padded[0, 2:] = float("nan")
    padded.requires_grad_()
    packed = Ragged.pack(padded, lengths)
    assert packed.values.isfinite().all()
    (grad,) = torch.autograd.grad(packed.values.square().sum(), padded)
    assert (grad[0, 2:] == 0).all()
    assert (packed.padded()[0, 2:] == 0).all()


def test_padding_gets_no_gradient_from_the_packed_side():
    layout = Layout.of(torch.tensor([0, 1, 4], dtype=torch.int32), 3, 4)
    packed = torch.randn(4, 2, requires_grad=True)
    cotangent = torch.full((2, 3, 2), float("nan"))
    cotangent[0, :1], cotangent[1] = 1.0, 2.0
    (grad,) = torch.autograd.grad(layout.unpack(packed), packed, cotangent)
    assert grad.tolist() == [[1.0, 1.0], *[[2.0, 2.0]] * 3]


def test_indices_are_inverse_to_each_other():
    layout = Layout.of(torch.tensor([0, 2, 2, 5], dtype=torch.int32), 4, 5)
    to_packed, to_padded, padding = layout.indices
    assert to_packed.tolist() == [0, 1, 8, 9, 10]
    assert to_padded[to_packed].tolist() == [0, 1, 2, 3, 4]
    assert sorted(padding.tolist()) == [2, 3, 4, 5, 6, 7, 11]
    assert not layout.is_rectangular
    assert layout.indices is layout.indices


def test_a_layout_that_takes_another_finds_its_indices_anew():
    held, other = (Layout.of(sequences.offsets(torch.tensor(lengths)), 4, 6) for lengths in ([2, 4], [3, 3]))
    padded = padded_batch([4, 4])
    assert not torch.equal(held.pack(padded), other.pack(padded))
    held.copy_(other)
    assert torch.equal(held.pack(padded), other.pack(padded))
    assert torch.equal(held.positions, other.positions)


def test_a_layout_of_another_shape_is_not_taken():
    held, other = (Layout.of(sequences.offsets(torch.tensor(lengths)), 4, sum(lengths)) for lengths in ([2, 4], [6]))
    with pytest.raises(ValueError, match=r"^other: expected a layout of \(B, S, N\) \(2, 4, 6\), got \(1, 4, 6\)$"):
        held.copy_(other)


def test_token_ids_lie_end_to_end():
    ragged = Ragged.of([[5, 6], [], [7, 8, 9]])
    assert ragged.values.tolist() == [5, 6, 7, 8, 9]
    assert ragged.padded().tolist() == [[5, 6, 0], [0, 0, 0], [7, 8, 9]]
    assert (len(ragged), ragged.layout.lengths.tolist()) == (3, [2, 0, 3])
    assert len(Ragged.of([])) == 0


def test_nothing_is_read_from_the_device():
    # Tensors without values have none to read.
    layout = Layout.of(torch.empty(3, dtype=torch.int32, device="meta"), 4, 5)
    assert layout.unpack(layout.pack(torch.empty(2, 4, device="meta"))).shape == (2, 4)


def test_indices_found_in_inference_serve_in_training():
    layout, padded = Layout.of(torch.tensor([0, 2, 5], dtype=torch.int32), 4, 5), torch.randn(2, 4, requires_grad=True)
    with torch.inference_mode():
        layout.pack(padded)
    (grad,) = torch.autograd.grad(layout.unpack(layout.pack(padded)).sum(), padded)
    assert grad.tolist() == [[1, 1, 0, 0], [1, 1, 1, 0]]


def test_indices_found_under_a_transform_end_with_it():
    layout, x = Layout.of(torch.tensor([0, 2, 5], dtype=torch.int32), 4, 5), torch.randn(5)
    grad = torch.func.grad(lambda x: layout.pack(layout.unpack(x)).square().sum())(x)
    assert torch.equal(grad, 2 * x)
    assert "_indices" not in vars(layout)


def test_what_fills_a_layout_up_stands_behind():
    layout = Ragged.of([[5, 6], [7]]).layout.filled(10, 6, 4)
    assert layout.shape == (6, 4, 10)
    assert layout.lengths.tolist() == [2, 1, 4, 3, 0, 0]
    assert layout.positions.tolist() == [0, 1] + [0] * 8


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.bfloat16], ids=str)
def test_packs_tokens_and_masks_too(dtype):
    padded = torch.tensor([[1, 1, 0], [1, 0, 0]]).to(dtype)
    packed = Ragged.pack(padded, torch.tensor([2, 1]))
    assert torch.equal(packed.values, torch.ones(3, dtype=dtype))
    assert torch.equal(packed.padded(), padded)


def test_rectangular_batches_are_not_copied():
    padded = padded_batch([4, 4])
    packed = Ragged.pack(padded, torch.tensor([4, 4]))
    assert packed.values.data_ptr() == padded.data_ptr() == packed.padded().data_ptr()


def test_packing_takes_any_strides():
    padded = torch.randn(5, 2, 3, dtype=torch.float64).transpose(0, 1)[:, ::2]
    packed = Ragged.pack(padded, torch.tensor([1, 3]))
    assert torch.equal(packed.values, torch.cat((padded[0, :1], padded[1])))
    assert torch.equal(packed.layout.unpack(packed.values.t().contiguous().t())[1], padded[1])


def test_compiles_into_one_graph():
    def function(padded, cu_seq):
        layout = Layout.of(cu_seq, padded.shape[1], 6)
        return layout.unpack(layout.pack(padded) * 2)

    padded, cu_seq = padded_batch([2, 4]).requires_grad_(), torch.tensor([0, 2, 6], dtype=torch.int32)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    found, expected = compiled(padded, cu_seq), function(padded, cu_seq)
    assert torch.equal(found, expected)
    cotangent = torch.randn_like(expected)
    assert torch.equal(*(torch.autograd.grad(output, padded, cotangent)[0] for output in (found, expected)))


def test_compiles_with_a_layout_that_is_given():
    def function(padded, layout):
        return layout.unpack(layout.pack(padded) * 2)

    padded, layout = padded_batch([2, 4]), Layout.of(torch.tensor([0, 2, 6], dtype=torch.int32), 4, 6)
    expected = function(padded, layout)
    assert torch.equal(torch.compile(function, fullgraph=True, backend="aot_eager")(padded, layout), expected)
