"""The heads of one fused projection, and their gradients as one tensor again, without a copy."""

from __future__ import annotations

import torch
from torch import Tensor

from tfm.tracing import tracing
from tfm.transforms import beyond_one_backward, transforming, wraps_tensors


class SplitHeads(torch.autograd.Function):
    """Views of a projection. Gradients that lie in one tensor as the views do are that tensor; others are stacked."""

    @staticmethod
    def forward(ctx, x, parts, heads):
        return x.unflatten(-1, (parts, heads, -1)).unbind(-3)

    @staticmethod
    def backward(ctx, *gradients):
        whole = None
        # Second derivatives, batches and compiled autograd have to see every part, not the memory of the first.
        plain = torch.compiler.is_compiling() or beyond_one_backward(*gradients)
        if not plain and are_side_by_side(gradients):
            first = gradients[0]
            outer, width = first.shape[:-2], len(gradients) * first.shape[-2:].numel()
            whole = first.as_strided((*outer, width), (*first.stride()[:-2], 1))
        if whole is None:
            whole = torch.stack(gradients, -3)
            # Not -1, which says nothing where there are no rows.
            whole = whole.reshape(*whole.shape[:-3], whole.shape[-3:].numel())
        return whole, None, None


# Without a look for what transforms left: none is at work where it is called.
_split = super(torch.autograd.Function, SplitHeads).apply


def split_heads(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """Splits a projection [..., parts · heads · D] into `parts` views [..., heads, D], say query, key and value."""
    # Dynamo and Inductor fuse what autograd would copy; transforms, traces and DTensor take no such Function.
    plain = torch.compiler.is_compiling() or transforming() or tracing() or wraps_tensors(x)
    if plain or not (x.requires_grad and torch.is_grad_enabled()):
        return x.unflatten(-1, (parts, heads, -1)).unbind(-3)
    return _split(x, parts, heads)


def joined_parts(heads: tuple[Tensor, ...], wanted: list[bool]) -> int:
    """Returns how many of query, key and value lie side by side, with gradients wanted: 3, 2 (key and value) or 0."""
    if torch.compiler.is_compiling() or not (wanted[1] and wanted[2]):
        return 0
    # From [B, H, S, D] to [B, S, H, D].
    views = tuple(x.transpose(1, 2) if x.dim() == 4 else x for x in heads)
    if wanted[0] and are_side_by_side(views):
        return 3
    return 2 if are_side_by_side(views[1:]) else 0


def are_side_by_side(views: tuple[Tensor, ...]) -> bool:
    """Tells whether [..., H, D] views lie in one tensor as x.unflatten(-1, (parts, H, D)).unbind(-3) lays them."""
    first = views[0]
    steps, shape, offset = first.stride(), first.shape, first.storage_offset()
    width = shape[-2] * shape[-1]
    if steps[-1] != 1 or steps[-2] != shape[-1] or any(step < len(views) * width for step in steps[:-2]):
        return False
    storage = first.untyped_storage()._cdata
    return all(
        x.shape == shape
        and x.stride() == steps
        and x.storage_offset() == offset + place * width
        and x.untyped_storage()._cdata == storage
        for place, x in enumerate(views)
    )
