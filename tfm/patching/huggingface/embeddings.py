"""Embeddings of tokens, positions and types behind one another: rows added up as they are read, the last in the norm.

A module runs its own forward, with its own rule of what positions and types there are, on a stand-in of itself: its
tables give what is still to be read, additions are noted, and the norm reads all of it at once.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Dropout, Embedding, LayerNorm, Module

from tfm import nn, ops
from tfm.patching.fusion import Change, Fused, fusing, plain_kind, why_altered, why_no_kernel
from tfm.patching.huggingface.trial import does_the_same, twin_of

TOKENS, POSITIONS, TYPES = "word_embeddings", "position_embeddings", "token_type_embeddings"
TABLES = (TOKENS, POSITIONS, TYPES)
NORM, DROPOUT = "LayerNorm", "dropout"
NORMS = (LayerNorm, nn.LayerNorm)


class Rows(NamedTuple):
    """Rows of a table that are to be read: `of`, by the name of the table, and which."""

    of: str
    table: Any
    indices: Tensor


class RowSum:
    """Rows of several tables, not yet read nor added up; read, if anything but the norm wants them."""

    def __init__(self, *rows: Rows) -> None:
        self.rows = rows

    def __add__(self, other: Any) -> Any:
        """Notes a sum of rows."""
        return RowSum(*self.rows, *other.rows) if isinstance(other, RowSum) else self.read() + other

    def __radd__(self, other: Any) -> Tensor:
        """Reads the rows, which something else is added to."""
        return other + self.read()

    def __mul__(self, other: Any) -> Tensor:
        """Reads the rows, and scales them."""
        return self.read() * other

    def __getattr__(self, name: str) -> Any:
        return getattr(self.read(), name)

    def read(self) -> Tensor:
        """Returns the sum."""
        first, *others = (rows.table(rows.indices) for rows in self.rows)
        for one in others:
            first = first + one
        return first


class StandIn:
    """A module as its own forward sees it, but for its tables, its norm and its dropout."""

    def __init__(self, module: Module) -> None:
        self.module = module

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.module, name)
        if name in TABLES:
            return lambda indices: RowSum(Rows(name, found, indices))
        if name == NORM:
            return partial(_normalised, found)
        if name == DROPOUT:
            return partial(_dropped, found)
        return found


def _dropped(dropout: Any, x: Any) -> Any:
    if not isinstance(x, RowSum):
        return dropout(x)
    return dropout(x.read()) if dropout.training and dropout.p > 0 else x


def _normalised(norm: Any, x: Any) -> Tensor:
    """Returns the norm of rows that are read here: of tokens and positions in one operation, of types in the norm's."""
    if not isinstance(x, RowSum):
        return norm(x)
    by_table = {rows.of: rows for rows in x.rows}
    if len(by_table) != len(x.rows) or not {TOKENS, POSITIONS} <= by_table.keys():
        return norm(x.read())
    tokens, positions = by_table[TOKENS], by_table[POSITIONS]
    embedded = ops.embedding(
        tokens.indices, tokens.table.weight, positions.indices, position_weight=_learning(positions.table),
        padding_idx=tokens.table.padding_idx,
    )  # fmt: skip
    if TYPES not in by_table:
        return norm(embedded)
    types = by_table[TYPES].table(by_table[TYPES].indices)
    return ops.residual_layer_norm(types, embedded, norm.weight, norm.bias, eps=norm.eps)[0]


def _learning(table: Any) -> Tensor:
    """Returns a table's weight, of which the row of padding, if there is one, gets no gradient."""
    weight: Tensor = table.weight
    if table.padding_idx is None or not (torch.is_grad_enabled() and weight.requires_grad):
        return weight
    is_padding = torch.arange(len(weight), device=weight.device) == table.padding_idx
    return torch.where(is_padding[:, None], weight.detach(), weight)


class FusedEmbeddings(Fused):
    """Embeddings whose tables are read where they are added up."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module's own forward on its stand-in."""
        reason = _why_not(self)
        if reason:
            return self.plainly(reason, *args, **kwargs)
        self.fusedly()
        return self._plain_kind.forward(StandIn(self), *args, **kwargs)


def _why_not(module: Module) -> str:
    if torch.compiler.is_compiling():
        return "compiled"
    for name in TABLES:
        if name in module._modules:
            reason = why_altered(name, module._modules[name], (Embedding,))
            table: Any = module._modules[name]
            if reason or table.max_norm is not None or table.scale_grad_by_freq or table.sparse:
                return reason or f"{name} has options of its own"
    norm: Any = module._modules[NORM]
    return why_altered(NORM, norm, NORMS) or why_no_kernel("embedding", norm.weight)


def change_of(module: Module) -> Change | None:
    """Returns what embeddings with a norm would become; None for any other module."""
    parts = module._modules
    if not {TOKENS, POSITIONS, NORM, DROPOUT} <= parts.keys() <= {*TABLES, NORM, DROPOUT} or module._parameters:
        return None
    is_known = plain_kind(_part(module, DROPOUT)) is Dropout and plain_kind(_part(module, NORM)) in NORMS
    is_ours = is_known and does_the_same(module, FusedEmbeddings, lambda: _twin(module), _tried)
    return fusing("embedding", FusedEmbeddings) if is_ours else None


def _part(module: Module, name: str) -> Module:
    found = module._modules[name]
    assert found is not None
    return found


def _twin(module: Module) -> Any:
    generator = torch.Generator().manual_seed(0)
    padding = getattr(module, "padding_idx", None) or 0
    children: dict[str, Module] = {NORM: LayerNorm(4), DROPOUT: Dropout(0.0)}
    for name in TABLES:
        if name in module._modules:
            children[name] = Embedding(padding + 9, 4, padding_idx=padding if name == TOKENS else None)
    for child in children.values():
        for parameter in child.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return twin_of(module, {}, children, training=False)


def _tried(twin: Any) -> list[Tensor]:
    """Returns what comes of tokens alone, and of tokens with positions."""
    first = (getattr(twin, "padding_idx", None) or 0) + 1
    tokens = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 2]]) + first
    positions = torch.tensor([[3, 0, 2, 1]])
    return [type(twin).forward(twin, tokens), type(twin).forward(twin, tokens, position_ids=positions)]
