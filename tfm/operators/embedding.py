"""Token rows, scaled, with positions and dropout: the operators and their gradients.

kernels/embedding.py gives the mathematics.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tfm.operators.autograd import Differentiable, Forward
from tfm.operators.calling import run
from tfm.operators.declaration import CPU_FLOATS, FLOATS, MANY, Length, Row, joined, operator
from tfm.reference import embedding as reference

ROWS = (
    Row(("embedding",), "triton", FLOATS, max_columns=MANY),
    Row(("embedding",), "native", CPU_FLOATS, max_columns=MANY, device="cpu"),
)


@operator("embedding")
class Embedding(NamedTuple):
    """dropout(weight[tokens] · scale + position).

    Attributes:
        tokens: int32 or int64, any shape.
        weight: [V, D].
        positions: integers that broadcast to the shape of `tokens`.
        position_weight: [P, D] in the dtype of `weight` or in fp32; None is the sinusoid.
        seed: int64 scalar; None where nothing is dropped.
        scale: of the token rows.
        dropout_p: of the sum.
        site: which of the dropouts that share the seed this is.
    """

    tokens: Tensor
    weight: Tensor
    positions: Tensor
    position_weight: Tensor | None
    seed: Tensor | None
    scale: float
    dropout_p: float
    site: int

    def outputs(self) -> Tensor:
        """Returns an empty [*tokens.shape, D] in the dtype of `weight`."""
        shape = (*self.tokens.shape, self.weight.shape[1])
        return torch.empty(shape, dtype=self.weight.dtype, device=self.weight.device)


@operator("embedding")
class EmbeddingBackward(NamedTuple):
    """The gradient of a table, of tokens or of positions.

    Attributes:
        dy: [*tokens.shape, D].
        tokens: the rows of the table that the forward read.
        seed: as in the forward.
        scale: as in the forward; 1 for positions.
        dropout_p: as in the forward.
        site: as in the forward.
        rows: those of the table.
        padding_idx: the row whose gradient is 0; None where there is none.
        dtype: of the gradient.
        sparse: as values and their indices, of as many rows as there are tokens.
    """

    dy: Tensor
    tokens: Tensor
    seed: Tensor | None
    scale: float
    dropout_p: float
    site: int
    rows: Length
    padding_idx: int | None
    dtype: torch.dtype
    sparse: bool

    def outputs(self) -> tuple[Tensor, Tensor | None]:
        """Returns an empty gradient [rows, D], or values [tokens, D] and indices, int64 [1, tokens]."""
        count, device = self.tokens.numel(), self.dy.device
        shape = (count if self.sparse else self.rows, self.dy.shape[-1])
        indices = torch.empty((1, count), dtype=torch.int64, device=device) if self.sparse else None
        return torch.empty(shape, dtype=self.dtype, device=device), indices


class TokenGradient(NamedTuple):
    """The form in which the gradient of the tokens' table is written, as in EmbeddingBackward."""

    padding_idx: int | None
    sparse: bool


LearntEmbedding = joined("LearntEmbedding", Embedding, TokenGradient)


class DifferentiableEmbedding(Differentiable):
    """One backward for the tokens' table, one for the positions'. Saved: tokens, positions and the seed."""

    arguments = LearntEmbedding
    learns = ("weight", "position_weight")

    @staticmethod
    def forward(namespace, call, wanted):
        forward = Embedding._make(call[: len(Embedding._fields)])
        tables = [None if x is None else (len(x), x.dtype) for x in (call.weight, call.position_weight)]
        options = (tables, call.scale, call.dropout_p, call.site, call.padding_idx, call.sparse)
        return Forward((run(namespace, forward),), (call.tokens, call.positions, call.seed), options)

    @staticmethod
    def backward(namespace, saved, options, grads, wanted):
        (dy,), (tokens, positions, seed) = grads, saved
        tables, scale, dropout_p, site, padding_idx, sparse = options
        dweight = dpositions = None
        if wanted[0]:
            rows, dtype = tables[0]
            call = EmbeddingBackward(dy, tokens, seed, scale, dropout_p, site, rows, padding_idx, dtype, sparse)
            dweight, indices = run(namespace, call)
            if sparse:
                # In torch 2.11 sparse_coo_tensor(check_invariants=False) warns about itself.
                dweight = torch.ops.aten._sparse_coo_tensor_unsafe(indices, dweight, (rows, dy.shape[-1]))
        if wanted[1]:
            rows, dtype = tables[1]
            places = positions.expand(tokens.shape)
            call = EmbeddingBackward(dy, places, seed, 1.0, dropout_p, site, rows, None, dtype, sparse=False)
            dpositions, _ = run(namespace, call)
        return dweight, dpositions

    @staticmethod
    def again(saved, options, grads):
        (dy,), (tokens, positions, seed) = grads, saved
        tables, scale, dropout_p, site, padding_idx, sparse = options

        def output(weight, position_weight):
            places = positions.expand(tokens.shape)
            rest = (scale, dropout_p, padding_idx, sparse, seed, site)
            return (reference.embedding(tokens, weight, places, position_weight, *rest),)

        return output, [
            None if table is None else torch.zeros((), dtype=table[1], device=dy.device).expand(table[0], dy.shape[-1])
            for table in tables
        ]
