"""Ragged batches: sequences of different lengths, and the way between padded [B, S, ...] and packed [N, ...] tensors.

A packed batch lays its sequences end to end, without padding. `Layout` says where each begins, as `cu_seq` does in
torch.nn.attention.varlen; `Ragged` is rows with their layout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tfm.transforms import transforming

Record = TypeVar("Record", bound="TensorRecord")


def offsets(lengths: Tensor, dtype: torch.dtype = torch.int32) -> Tensor:
    """Turns lengths [B] of any integer dtype into offsets [B + 1]: 0, then the running sum."""
    return F.pad(lengths.cumsum(0, dtype=dtype), (1, 0))


def valid_positions(lengths: Tensor, max_length: int) -> Tensor:
    """Turns lengths [B] into bool [B, max_length], True where a position lies inside its sequence."""
    return torch.arange(max_length, device=lengths.device) < lengths[:, None]


class TensorRecord:
    """Base of frozen dataclasses of tensors, other such records and numbers, to move and overwrite as a whole."""

    def map(self: Record, function: Callable[[Tensor], Tensor]) -> Record:
        """Returns the record with `function` applied to each tensor."""
        changed: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                changed[name] = function(value)
            elif isinstance(value, TensorRecord):
                changed[name] = value.map(function)
        return replace(self, **changed)  # type: ignore[type-var]

    def to(self: Record, device: torch.device | str, non_blocking: bool = False) -> Record:
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self: Record) -> Record:
        """Returns the record in page-locked memory, which `to(..., non_blocking=True)` needs to run beside the host."""
        return self.map(Tensor.pin_memory)

    def clone(self: Record) -> Record:
        return self.map(Tensor.clone)

    def copy_(self: Record, other: Record) -> None:
        """Takes the numbers of a record of the same shapes, in place; from pinned memory the host does not wait."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                value.copy_(getattr(other, name), non_blocking=True)
            elif isinstance(value, TensorRecord):
                value.copy_(getattr(other, name))


class RowIndices(NamedTuple):
    """Rows of one form of a batch by their numbers in the other.

    Attributes:
        to_packed: [N] int64, for each packed row its row in the padded tensor [B * S].
        to_padded: [B * S] int64, for each padded row its packed row, 0 for padding.
        padding: [B * S - N] int64, the padded rows that are padding; bool [B * S] under torch.compile, which would make
            graphs of their own for none and for one.
    """

    to_packed: Tensor
    to_padded: Tensor
    padding: Tensor


@dataclass(frozen=True, eq=False)
class Layout(TensorRecord):
    """The layout of B sequences, N rows in all, packed end to end or padded to one length.

    Attributes:
        cu_seq: [B + 1] int32, where each sequence begins in the packed tensor.
        max_length: S, the padded length: no sequence is longer.
        positions: [N] int64, each row's place in its sequence, from 0.
    """

    cu_seq: Tensor
    max_length: int
    positions: Tensor

    @classmethod
    def of(cls, cu_seq: Tensor, max_length: int, rows: int) -> Layout:
        """Lays out sequences at offsets `cu_seq` [B + 1], `rows` in all, without reading from the device."""
        first = cu_seq[:-1].repeat_interleave(cu_seq.diff(), output_size=rows)
        return cls(cu_seq, max_length, torch.arange(rows, device=cu_seq.device) - first)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def rows(self) -> int:
        """N."""
        return self.positions.shape[0]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, S, N): all that launches follow from."""
        return self.cu_seq.shape[0] - 1, self.max_length, self.rows

    @property
    def lengths(self) -> Tensor:
        """[B] int32."""
        return self.cu_seq.diff()

    @property
    def is_rectangular(self) -> bool:
        """True where all sequences are known to have the padded length: both forms are then one piece of memory."""
        return not torch.compiler.is_compiling() and self.rows == self.shape[0] * self.max_length

    @property
    def indices(self) -> RowIndices:
        """Indices between the two forms, found at first use, without reading from the device."""
        # A graph computes equal values once anyway, and a transform's tensors must not outlive it.
        if torch.compiler.is_compiling() or transforming():
            return self._find_indices()
        found: RowIndices | None = vars(self).get("_indices")
        if found is None:
            found = self._find_indices()
            object.__setattr__(self, "_indices", found)
        return found

    def _find_indices(self) -> RowIndices:
        position = torch.arange(self.max_length, device=self.cu_seq.device)
        valid = position < self.lengths[:, None]
        to_padded = torch.where(valid, self.cu_seq[:-1, None].long() + position, 0).flatten()
        valid = valid.flatten()
        if torch.compiler.is_compiling():
            first = torch.arange(self.shape[0], device=valid.device) * self.max_length
            first = first.repeat_interleave(self.lengths, output_size=self.rows)
            return RowIndices(first + self.positions, to_padded, ~valid)
        # Sorting puts padding first; unlike nonzero it needs no read of the device.
        padding_first = valid.byte().argsort(stable=True)
        count = valid.shape[0] - self.rows
        return RowIndices(padding_first[count:], to_padded, padding_first[:count])

    def unpack(self, packed: Tensor) -> Tensor:
        """Pads [N, ...] to [B, S, ...], with zeros."""
        shape = (*self.shape[:2], *packed.shape[1:])
        if self.is_rectangular:
            return packed.reshape(shape)
        # Transforms do not take such a Function.
        padded = _unpacked(packed, self.indices) if transforming() else _Unpack.apply(packed, self.indices)
        return padded.view(shape)

    def pack(self, padded: Tensor) -> Tensor:
        """Packs [B, S, ...] into [N, ...]; what lies at padding is left behind."""
        rows = padded.flatten(0, 1)
        if self.is_rectangular:
            return rows
        return rows.index_select(0, self.indices.to_packed) if transforming() else _Pack.apply(rows, self.indices)

    def filled(self, rows: int, sequences: int, max_length: int) -> Layout:
        """Returns the layout with sequences added behind, until there are so many rows and sequences.

        The added ones have `max_length` rows, which must be at least this layout's, as long as rows are left, and then
        none. Their rows are all at position 0.
        """
        added = torch.arange(1, sequences - len(self) + 1, dtype=self.cu_seq.dtype, device=self.cu_seq.device)
        cu_seq = torch.cat((self.cu_seq, (self.cu_seq[-1] + added * max_length).clamp(max=rows)))
        return Layout(cu_seq, max_length, F.pad(self.positions, (0, rows - self.rows)))

    def copy_(self, other: Layout) -> None:
        """Takes the numbers of a layout of the same shape, in place; from pinned memory the host does not wait."""
        if other.shape != self.shape:
            raise ValueError(f"other: expected a layout of (B, S, N) {self.shape}, got {other.shape}")
        super().copy_(other)
        vars(self).pop("_indices", None)


@dataclass(frozen=True, eq=False)
class Ragged(TensorRecord):
    """A packed batch: `values` [N, ...], sequence after sequence, and their layout."""

    values: Tensor
    layout: Layout

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]]) -> Ragged:
        """Packs lists of token ids, as int64 in the host's memory."""
        lengths = list(map(len, sequences))
        cu_seq = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        values = torch.tensor(list(chain.from_iterable(sequences)), dtype=torch.int64)
        return cls(values, Layout.of(cu_seq, max(lengths, default=0), len(values)))

    @classmethod
    def pack(cls, padded: Tensor, lengths: Tensor) -> Ragged:
        """Packs a padded batch [B, S, ...] of sequences of these lengths [B], with one read from the device."""
        cu_seq = offsets(lengths)
        layout = Layout.of(cu_seq, padded.shape[1], int(cu_seq[-1]))
        return cls(layout.pack(padded), layout)

    def __len__(self) -> int:
        return len(self.layout)

    @property
    def device(self) -> torch.device:
        return self.values.device

    def padded(self) -> Tensor:
        """Returns [B, S, ...], zeros at padding."""
        return self.layout.unpack(self.values)


class _Unpack(torch.autograd.Function):
    """Turns rows [N, ...] into [B * S, ...], 0 at padding. Its backward is `_Pack`, a gather like the forward."""

    @staticmethod
    def forward(ctx, rows, indices):
        ctx.indices = indices
        return _unpacked(rows, indices)

    @staticmethod
    def backward(ctx, grad):
        return _Pack.apply(grad, ctx.indices), None


class _Pack(torch.autograd.Function):
    """The inverse of `_Unpack`: what lies at padding is left behind."""

    @staticmethod
    def forward(ctx, rows, indices):
        ctx.indices = indices
        return rows.index_select(0, indices.to_packed)

    @staticmethod
    def backward(ctx, grad):
        return _Unpack.apply(grad, ctx.indices), None


def _unpacked(rows: Tensor, indices: RowIndices) -> Tensor:
    if rows.shape[0] == 0:
        return rows.new_zeros((indices.to_padded.shape[0], *rows.shape[1:]))
    padded = rows.index_select(0, indices.to_padded)
    if indices.padding.dtype == torch.bool:
        return padded.masked_fill(indices.padding.view(-1, *[1] * (rows.dim() - 1)), 0)
    return padded.index_fill_(0, indices.padding, 0)
