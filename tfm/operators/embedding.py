"""Token rows, scaled, with positions and dropout: the operators and their autograd.

kernels/embedding.py gives the mathematics. Saved: tokens, positions and the seed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tfm.operators.operator import Operator, distinct
from tfm.reference import embedding as reference
from tfm.transforms import Recomputed, differentiable_by


def forward_output(tokens: Tensor, weight: Tensor) -> Tensor:
    """What the forward fills, still empty."""
    return torch.empty((*tokens.shape, weight.shape[1]), dtype=weight.dtype, device=weight.device)


def backward_outputs(
    dy: Tensor, tokens: Tensor, rows: int, dtype: torch.dtype, sparse: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradient or its values, and the values' indices, still empty."""
    count = tokens.numel()
    gradient = torch.empty((count if sparse else rows, dy.shape[-1]), dtype=dtype, device=dy.device)
    return gradient, torch.empty((1, count), dtype=torch.int64, device=dy.device) if sparse else None


EMBEDDING = Operator(
    "embedding(Tensor tokens, Tensor weight, Tensor positions, Tensor? position_weight, Tensor? seed, float scale,"
    " float dropout_p, int site) -> Tensor",
    fake=lambda tokens, weight, *_: forward_output(tokens, weight),
)
EMBEDDING_BACKWARD = Operator(
    "embedding_backward(Tensor dy, Tensor tokens, Tensor? seed, float scale, float dropout_p, int site, SymInt rows,"
    " int? padding_idx, ScalarType dtype, bool sparse) -> (Tensor, Tensor?)",
    fake=lambda dy, tokens, seed, scale, dropout_p, site, rows, padding_idx, dtype, sparse: backward_outputs(
        dy, tokens, rows, dtype, sparse
    ),
)
OPERATORS = (EMBEDDING, EMBEDDING_BACKWARD)


def _recompute(ctx, dy: Tensor) -> Recomputed:
    tokens, positions, seed = ctx.saved_tensors
    scale, padding_idx, sparse = ctx.options

    def output(_, tokens, weight, positions, position_weight, *rest):
        places = positions.expand(tokens.shape)
        options = (scale, ctx.dropout[0], padding_idx, sparse, seed, ctx.dropout[1])
        return (reference.embedding(tokens, weight, places, position_weight, *options),)

    tables = (
        None if rows is None else torch.zeros((), dtype=dtype, device=dy.device).expand(rows, dy.shape[-1])
        for rows, dtype in ctx.tables
    )
    return output, (None, tokens, next(tables), positions, next(tables), *[None] * 6)


class Embedding(torch.autograd.Function):
    """Autograd of the two operators: one backward for the tokens' table, one for the positions'."""

    @staticmethod
    def forward(
        ctx, namespace, tokens, weight, positions, position_weight, seed, scale, dropout_p, site, padding_idx, sparse
    ):  # fmt: skip
        ctx.save_for_backward(tokens, positions, seed)
        ctx.namespace, ctx.dropout, ctx.options = namespace, (dropout_p, site), (scale, padding_idx, sparse)
        ctx.tables = [
            (None, None) if table is None else (len(table), table.dtype) for table in (weight, position_weight)
        ]
        operator = getattr(torch.ops, namespace).embedding.default
        return operator(tokens, weight, positions, position_weight, seed, scale, dropout_p, site)

    @staticmethod
    @differentiable_by(_recompute)
    def backward(ctx, dy):
        tokens, positions, seed = ctx.saved_tensors
        scale, padding_idx, sparse = ctx.options
        operator = getattr(torch.ops, ctx.namespace).embedding_backward.default
        dweight = dpositions = None
        if ctx.needs_input_grad[2]:
            rows, dtype = ctx.tables[0]
            dweight, indices = operator(dy, tokens, seed, scale, *ctx.dropout, rows, padding_idx, dtype, sparse)
            if sparse:
                # torch.sparse_coo_tensor(check_invariants=False) warns of itself in torch 2.11.
                dweight = torch.ops.aten._sparse_coo_tensor_unsafe(indices, dweight, (rows, dy.shape[-1]))
        if ctx.needs_input_grad[4]:
            rows, dtype = ctx.tables[1]
            places = positions.expand(tokens.shape)
            dpositions, _ = operator(dy, places, seed, 1.0, *ctx.dropout, rows, None, dtype, False)
        return None, None, dweight, None, dpositions, *[None] * 6


def embedding(
    namespace: str, tokens: Tensor, weight: Tensor, positions: Tensor, position_weight: Tensor | None, scale: float,
    dropout_p: float, padding_idx: int | None, sparse: bool, seed: Tensor | None, site: int,
) -> Tensor:  # fmt: skip
    """See tfm.ops.embedding."""
    # A table of positions is read in the dtype of the tokens', or in fp32.
    if position_weight is not None and position_weight.dtype != weight.dtype:
        position_weight = position_weight.float()
    seed = None if seed is None else seed.to(weight.device)
    tensors = distinct((tokens, weight, positions, position_weight))
    return Embedding.apply(namespace, *tensors, seed, scale, dropout_p, site, padding_idx, sparse)
