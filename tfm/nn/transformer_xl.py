"""The decoder layer of Transformer-XL: segments with a memory, and attention by relative positions.

Dai et al. 2019, "Transformer-XL: Attentive Language Models Beyond a Fixed-Length Context", sections 3.2 and 3.3. The
parameters have the names and shapes of the last implementation in transformers (4.57, RelPartialLearnableDecoderLayer),
so that its weights load as they are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tfm import ops
from tfm.errors import BadArgument
from tfm.nn.fusible import LINEAR, own_calls

WEIGHTS, ATTENTION_RESIDUAL, HIDDEN, LAST_RESIDUAL = range(4)


def relative_positions(
    length: int,
    dim: int,
    longest: int | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Returns the sinusoids of the distances length - 1, ..., 1, 0 ("Attention Is All You Need", section 3.5).

    Args:
        length: the number of distances, of a memory and a segment together.
        dim: columns, an even number: all sines, then all cosines.
        longest: greater distances are as this one; None for no limit.
        device, dtype: of the result.

    Returns:
        [length, dim].

    Raises:
        ValueError: an odd `dim`.
    """
    if dim % 2:
        raise BadArgument(f"dim: expected an even number of columns, got {dim}")
    dtype = torch.get_default_dtype() if dtype is None else dtype
    computed = torch.promote_types(dtype, torch.float32)
    distances = torch.arange(length - 1, -1, -1, device=device, dtype=computed)
    if longest is not None:
        distances = distances.clamp(max=longest)
    angles = distances[:, None] / 10000 ** (torch.arange(0, dim, 2, device=device, dtype=computed) / dim)
    return torch.cat((angles.sin(), angles.cos()), -1).to(dtype)


class TransformerXLDecoderLayer(nn.Module):
    """One layer of Transformer-XL (equations of section 3.3): attention to a segment and its memory, and feed-forward.

    A stack passes each layer its own memory, what that layer was given before, and keeps what it returns:

        for index, layer in enumerate(layers):
            x, memories[index] = layer(x, memories[index], positions)

    Args:
        d_model: columns of a token.
        nhead: heads.
        dim_feedforward: columns within the feed-forward network.
        dropout: of both sublayers' results and within the feed-forward network.
        memory_length: how many tokens the memory that is returned holds at most.
        d_head: columns of a head; None is d_model / nhead.
        attention_dropout: of the weights of attention.
        same_length: every token attends to `memory_length` keys, its own included, not to all before it.
        norm_first: the norms come before the sublayers, not after.
        layer_norm_eps: added to the variances.
        batch_first: tensors are [B, S, E], not [S, B, E].
        device, dtype: of the parameters.

    Raises:
        ValueError: heads that do not divide `d_model`, where `d_head` is not given.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        memory_length: int = 0,
        *,
        d_head: int | None = None,
        attention_dropout: float = 0.0,
        same_length: bool = False,
        norm_first: bool = False,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if d_head is None and d_model % nhead:
            raise BadArgument(f"nhead: expected a divisor of d_model {d_model} where d_head is None, got {nhead}")
        columns = d_model // nhead if d_head is None else d_head
        self.memory_length, self.same_length = memory_length, same_length
        self.norm_first, self.batch_first = norm_first, batch_first
        self.dec_attn = _Attention(
            d_model, nhead, columns, dropout, attention_dropout, layer_norm_eps, device=device, dtype=dtype
        )
        self.pos_ff = _FeedForward(d_model, dim_feedforward, dropout, layer_norm_eps, device=device, dtype=dtype)

    def forward(
        self, x: Tensor, memory: Tensor | None = None, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Runs the layer on a segment.

        Args:
            x: [S, B, E], or [B, S, E] with batch_first.
            memory: [M, B, E] or [B, M, E], what this layer returned for the segments before; it gets no gradient. None
                for none, which is not the same as zeros: to these a token may attend.
            positions: [M + S, E], `relative_positions`, which a stack makes once; None makes them here.

        Returns:
            The output in the form of `x`, and the memory for the next segment, without gradient: the last
            `memory_length` tokens of `memory` and `x`.

        Raises:
            ValueError: shapes that do not fit.
        """
        axis, width = int(self.batch_first), self.dec_attn.qkv_net.in_features
        if x.dim() != 3 or x.shape[-1] != width:
            raise BadArgument(f"x: expected three dimensions, the last of {width}, got shape {tuple(x.shape)}")
        both = x
        if memory is not None:
            if memory.dim() != 3 or memory.shape[1 - axis] != x.shape[1 - axis] or memory.shape[-1] != width:
                raise BadArgument(f"memory: expected x's {tuple(x.shape)}, length apart, got {tuple(memory.shape)}")
            both = torch.cat((memory.detach().to(x.dtype), x), axis)
        keys = both.shape[axis]
        if positions is None:
            positions = relative_positions(keys, width, device=x.device, dtype=x.dtype)
        elif positions.shape != (keys, width):
            raise BadArgument(f"positions: expected [{keys}, {width}], got shape {tuple(positions.shape)}")
        attention, feed_forward = self.dec_attn, self.pos_ff
        rates = attention.dropatt, attention.drop, feed_forward.CoreNet[2], feed_forward.CoreNet[4]
        seed = ops.draw_seed(x.device) if any(_rate(dropout) > 0.0 for dropout in rates) else None
        window = self.memory_length if self.same_length else None
        y = attention(x, both, positions, axis, window, self.norm_first, seed)
        y = feed_forward(y, self.norm_first, seed)
        kept = both.detach().narrow(axis, max(keys - self.memory_length, 0), min(keys, self.memory_length))
        # Without a memory before it, it would share its values with `x`.
        kept = kept.clone() if memory is None else kept
        return y, kept


class _Attention(nn.Module):
    """Attention by content and relative position, with dropout, residual connection and norm."""

    def __init__(
        self,
        d_model: int,
        nhead: int,
        d_head: int,
        dropout: float,
        attention_dropout: float,
        eps: float,
        **options: object,
    ) -> None:
        super().__init__()
        self.nhead, self.d_head = nhead, d_head
        made: dict[str, object] = {"bias": False, **options}
        self.qkv_net = nn.Linear(d_model, 3 * nhead * d_head, **made)  # type: ignore[arg-type]
        self.o_net = nn.Linear(nhead * d_head, d_model, **made)  # type: ignore[arg-type]
        self.r_net = nn.Linear(d_model, nhead * d_head, **made)  # type: ignore[arg-type]
        # u and v of the paper: one for all layers where a model shares them.
        self.r_w_bias = nn.Parameter(torch.empty(nhead, d_head, **options))  # type: ignore[call-overload]
        self.r_r_bias = nn.Parameter(torch.empty(nhead, d_head, **options))  # type: ignore[call-overload]
        nn.init.normal_(self.r_w_bias, std=0.02)
        nn.init.normal_(self.r_r_bias, std=0.02)
        self.drop, self.dropatt = nn.Dropout(dropout), nn.Dropout(attention_dropout)
        self.layer_norm = nn.LayerNorm(d_model, eps=eps, **options)  # type: ignore[arg-type]

    def forward(
        self,
        x: Tensor,
        both: Tensor,
        positions: Tensor,
        axis: int,
        window: int | None,
        norm_first: bool,
        seed: Tensor | None,
    ) -> Tensor:
        """Returns the shape of `x`; `both` is the memory and `x`, one after the other along `axis`."""
        norm, start = self.layer_norm, both.shape[axis] - x.shape[axis]
        source = ops.layer_norm(both, norm.weight, norm.bias, norm.eps) if norm_first else both
        query, key, value = (self._heads(part, axis) for part in self._projected(source, axis, start))
        # The paper's terms b and d; its a and c are the scores of attention itself.
        scale = self.d_head**-0.5
        place = (query + self.r_r_bias[:, None].to(query.dtype)) * scale
        # [H, D, M + S + 1]: one more, so that rows of the scores can be shifted where they lie.
        towards = F.pad(self.r_net(positions).unflatten(-1, (self.nhead, self.d_head)).permute(1, 2, 0), (0, 1))
        bias = _shifted(place @ towards)
        y = ops.attention(
            query + self.r_w_bias[:, None].to(query.dtype), key, value, bias, _rate(self.dropatt), True, scale,
            query_start=start, window_size=(-1 if window is None else window - 1, -1), seed=seed, site=WEIGHTS,
        )  # fmt: skip
        y = self.o_net((y.transpose(1, 2) if axis else y.permute(2, 0, 1, 3)).flatten(2))
        return _added(y, x, None if norm_first else norm, self.drop, seed, ATTENTION_RESIDUAL)

    def _projected(self, source: Tensor, axis: int, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """Returns queries of what begins at `start`, keys and values of all."""
        columns, linear = self.nhead * self.d_head, self.qkv_net
        if start == 0 or type(linear) not in LINEAR or own_calls(linear):
            query, key, value = linear(source).chunk(3, -1)
            return query.narrow(axis, start, source.shape[axis] - start), key, value
        query = F.linear(source.narrow(axis, start, source.shape[axis] - start), linear.weight[:columns])
        key, value = F.linear(source, linear.weight[columns:]).chunk(2, -1)
        return query, key, value

    def _heads(self, x: Tensor, axis: int) -> Tensor:
        """Returns [B, H, S, D]."""
        x = x.unflatten(-1, (self.nhead, self.d_head))
        return x.transpose(1, 2) if axis else x.permute(1, 2, 0, 3)


class _FeedForward(nn.Module):
    """The feed-forward network, with dropout, residual connection and norm."""

    def __init__(self, d_model: int, d_inner: int, dropout: float, eps: float, **options: object) -> None:
        super().__init__()
        self.CoreNet = nn.Sequential(
            nn.Linear(d_model, d_inner, **options),  # type: ignore[arg-type]
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(d_inner, d_model, **options),  # type: ignore[arg-type]
            nn.Dropout(dropout),
        )
        self.layer_norm = nn.LayerNorm(d_model, eps=eps, **options)  # type: ignore[arg-type]

    def forward(self, x: Tensor, norm_first: bool, seed: Tensor | None) -> Tensor:
        """Returns the shape of `x`."""
        first: Any
        second: Any
        norm, (first, activation, within, second, last) = self.layer_norm, self.CoreNet
        y = ops.layer_norm(x, norm.weight, norm.bias, norm.eps) if norm_first else x
        if any(type(linear) not in LINEAR or own_calls(linear) for linear in (first, second)):
            y = second(ops.dropout(activation(first(y)), _rate(within), seed=seed, site=HIDDEN))
        else:
            y = ops.feed_forward(
                y, first.weight, first.bias, second.weight, second.bias, "relu", _rate(within), seed=seed, site=HIDDEN
            )
        return _added(y, x, None if norm_first else norm, last, seed, LAST_RESIDUAL)


def _shifted(scores: Tensor) -> Tensor:
    """Returns scores [..., S, K + 1] by distance, the greatest first, as scores [..., S, K] by key, without a copy.

    Row i is moved to the left by S - 1 - i (appendix B of the paper); what then stands at keys behind a query has no
    meaning.
    """
    queries, keys = scores.shape[-2], scores.shape[-1] - 1
    return scores.flatten(-2).narrow(-1, max(queries - 1, 0), queries * keys).unflatten(-1, (queries, keys))


def _added(
    y: Tensor, x: Tensor, norm: nn.LayerNorm | None, dropout: nn.Module, seed: Tensor | None, site: int
) -> Tensor:
    """Returns x + dropout(y), normalised where there is a norm."""
    if norm is None:
        return x + ops.dropout(y, _rate(dropout), seed=seed, site=site)
    return ops.residual_layer_norm(y, x, norm.weight, norm.bias, norm.eps, _rate(dropout), seed=seed, site=site)[0]


def _rate(dropout: nn.Module) -> float:
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
