"""Ragged batches: lengths, offsets, and the way between padded [B, S, ...] and packed [N, ...] tensors.

A packed batch lays the sentences of a batch end to end, without padding; `cu_seq` [B + 1] int32 holds where each
begins, as in torch.nn.attention.varlen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tfm.transforms import transforming


def offsets(lengths: Tensor) -> Tensor:
    """Lengths [B] of any integer dtype to offsets [B + 1] int32: 0, then the running sum."""
    zero = torch.zeros(1, dtype=torch.int32, device=lengths.device)
    return torch.cat((zero, lengths.cumsum(0).to(torch.int32)))


def valid_positions(lengths: Tensor, max_length: int) -> Tensor:
    """Lengths [B] to bool [B, max_length], True where a position lies inside its sequence."""
    return torch.arange(max_length, device=lengths.device) < lengths[:, None]


class _Unpack(torch.autograd.Function):
    """Rows [N, ...] to [B * S, ...], 0 at padding. Its backward is `_Pack`, a gather like the forward."""

    @staticmethod
    def forward(ctx, rows, layout):
        ctx.layout = layout
        return _unpacked(rows, layout)

    @staticmethod
    def backward(ctx, grad):
        return _Pack.apply(grad, ctx.layout), None


class _Pack(torch.autograd.Function):
    """The inverse of `_Unpack`: what lies at padding is left behind."""

    @staticmethod
    def forward(ctx, rows, layout):
        ctx.layout = layout
        return rows.index_select(0, layout.to_packed)

    @staticmethod
    def backward(ctx, grad):
        return _Unpack.apply(grad, ctx.layout), None


def _unpacked(rows: Tensor, layout: Layout) -> Tensor:
    if rows.shape[0] == 0:
        return rows.new_zeros((layout.to_padded.shape[0], *rows.shape[1:]))
    padded = rows.index_select(0, layout.to_padded)
    if layout.padding is not None:
        return padded.index_fill_(0, layout.padding, 0)
    padding = ~valid_positions(layout.cu_seq.diff(), layout.max_length).flatten()
    return padded.masked_fill(padding.view(-1, *[1] * (rows.dim() - 1)), 0)


@dataclass(frozen=True)
class Layout:
    """How the tokens of one ragged batch lie in memory, packed and padded.

    Attributes:
        cu_seq: [B + 1] int32, where each sequence begins in the packed tensor.
        max_length: S, the padded length.
        to_packed: [N] int64, for each packed row its row in the padded tensor [B * S].
        to_padded: [B * S] int64, for each padded row its packed row, 0 for padding.
        padding: [B * S - N] int64, the padded rows that are padding; None under torch.compile, which would make graphs
            of their own for none and for one.
    """

    cu_seq: Tensor
    max_length: int
    to_packed: Tensor
    to_padded: Tensor
    padding: Tensor | None

    @classmethod
    def of(cls, cu_seq: Tensor, max_length: int, tokens: int) -> Layout:
        """The layout of sequences at offsets `cu_seq` [B + 1], `tokens` of them in all, padded to `max_length`."""
        starts = cu_seq[:-1].long()
        position = torch.arange(max_length, device=cu_seq.device)
        valid = position < cu_seq.diff()[:, None]
        to_padded = torch.where(valid, starts[:, None] + position, 0).flatten()
        padding = None
        if not torch.compiler.is_compiling():
            # Sorting puts padding first; unlike nonzero it needs no read of the device.
            padding = valid.flatten().byte().argsort(stable=True)[: to_padded.shape[0] - tokens]
        token = torch.arange(tokens, device=cu_seq.device)
        sequence = torch.searchsorted(cu_seq[1:].contiguous(), token, right=True)
        to_packed = sequence * max_length + token - starts[sequence]
        return cls(cu_seq, max_length, to_packed, to_padded, padding)

    @property
    def is_rectangular(self) -> bool:
        """All sequences are known to have the padded length: both forms are then one piece of memory."""
        return self.padding is not None and self.padding.shape[0] == 0

    def unpack(self, packed: Tensor) -> Tensor:
        """[N, ...] to [B, S, ...] with zeros at padding."""
        shape = (self.cu_seq.shape[0] - 1, self.max_length, *packed.shape[1:])
        if self.is_rectangular:
            return packed.reshape(shape)
        # Transforms take no such Function.
        padded = _unpacked(packed, self) if transforming() else _Unpack.apply(packed, self)
        return padded.view(shape)

    def pack(self, padded: Tensor) -> Tensor:
        """[B, S, ...] to [N, ...]; what lies at padding is left behind."""
        rows = padded.flatten(0, 1)
        if self.is_rectangular:
            return rows
        return rows.index_select(0, self.to_packed) if transforming() else _Pack.apply(rows, self)


def pack(padded: Tensor, lengths: Tensor) -> tuple[Tensor, Layout]:
    """A padded batch [B, S, ...] and its lengths [B] to ([N, ...], its layout). One device-to-host read."""
    cu_seq = offsets(lengths)
    layout = Layout.of(cu_seq, padded.shape[1], int(cu_seq[-1]))
    return layout.pack(padded), layout


def unpack(packed: Tensor, layout: Layout) -> Tensor:
    """A packed batch [N, ...] back to [B, S, ...], zeros at padding."""
    return layout.unpack(packed)
