"""The operators of attention, each stated once, and the tensors that they fill."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tfm.operators.declaration import Length, joined, operator

# The most that start, left and right may be: farther than any key, yet the sum of three such numbers fits 32 bits.
FAR = 1 << 29


@operator("attention")
class Attention(NamedTuple):
    """softmax(scale · query keyᵀ + bias) value, under the rules that tfm.kernels.attention.visible states.

    Attributes:
        query: [B, Hq, Sq, D], or packed [Nq, Hq, D]; any strides, as `key` and `value`.
        key: [B, Hkv, Sk, D] or [Nk, Hkv, D].
        value: [B, Hkv, Sk, Dv] or [Nk, Hkv, Dv].
        bias: [B|1, Hq|1, Sq|1, Sk], or None, as all below may be.
        words: int32 [B|1, Hq|1, Sq, W], a bit for each key that a query may attend to.
        reach: int32 [B|1, Hq|1, W], a bit for each key that some query may attend to by bias or words.
        key_mask: bool [B, Sk], dense, where padded: the keys that queries may attend to, whatever the others say.
        sinks: [Hq].
        relative_bias: [Hq, 2 R + 1], added to scores by the key's distance from the query's position, up to R.
        cu_seq_q: [B + 1], with `cu_seq_k` where packed.
        cu_seq_k: [B + 1].
        key_lengths: [B], where padded.
        starts: [B], the position of each sequence's first query; None is `start` for all.
        seed: int64 scalar; None where nothing is dropped.
        max_q: packed, at least the longest sequence's queries; else Sq.
        max_k: likewise of keys.
        start: see `starts`.
        left: the window's side, None where open.
        right: likewise.
        scale: of the scores.
        softcap: of the scores.
        dropout_p: of the softmax weights.
        site: of the dropout.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    words: Tensor | None
    reach: Tensor | None
    key_mask: Tensor | None
    sinks: Tensor | None
    relative_bias: Tensor | None
    cu_seq_q: Tensor | None
    cu_seq_k: Tensor | None
    key_lengths: Tensor | None
    starts: Tensor | None
    seed: Tensor | None
    max_q: Length
    max_k: Length
    start: Length
    left: int | None
    right: int | None
    scale: float
    softcap: float | None
    dropout_p: float
    site: int

    def outputs(self) -> tuple[Tensor, Tensor]:
        """Returns empty (output, statistics), the latter as `row_statistics` says."""
        return rows_like(self.query, self.value.shape[-1]), row_statistics(self.query)

    @property
    def sequences(self) -> int:
        """B."""
        return self.query.shape[0] if self.cu_seq_q is None else self.cu_seq_q.shape[0] - 1

    @property
    def heads(self) -> int:
        """Hq."""
        return self.query.shape[1]

    @property
    def key_heads(self) -> int:
        """Hkv."""
        return self.key.shape[1]

    @property
    def dims(self) -> tuple[int, int]:
        """(D, Dv)."""
        return self.query.shape[-1], self.value.shape[-1]


# The number of its fields that are tensors; they come first.
TENSORS = Attention._fields.index("max_q")


class Incoming(NamedTuple):
    """The arguments of a backward that are not the forward's.

    Attributes:
        dout: the gradient of the output.
        dlse: that of the natural log of the softmax denominators, where someone uses it.
        output: of the forward.
        statistics: of the forward.
        wanted: whether each of query, key, value, bias, sinks and relative_bias needs its gradient.
    """

    dout: Tensor
    dlse: Tensor | None
    output: Tensor
    statistics: Tensor
    wanted: list[bool]


class Gradients(NamedTuple):
    """The gradients of what learns, each laid out as what it is the gradient of."""

    query: Tensor | None
    key: Tensor | None
    value: Tensor | None
    bias: Tensor | None
    sinks: Tensor | None
    relative_bias: Tensor | None

    @property
    def of_biases(self) -> bool:
        """Whether that of a bias is among them."""
        return self.bias is not None or self.relative_bias is not None


BackwardArguments: Any = joined("BackwardArguments", Incoming, Attention)


@operator("attention")
class AttentionBackward(BackwardArguments):
    """The gradients of Attention."""

    __slots__ = ()

    @property
    def attention(self) -> Attention:
        """The call whose gradients these are."""
        return Attention(*self[len(Incoming._fields) :])

    def outputs(
        self,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Returns `Gradients`, empty, None where not wanted."""
        learnt = self.query, self.key, self.value, self.bias, self.sinks, self.relative_bias
        return Gradients(*map(gradient_like, self.wanted, learnt))


class Parts(NamedTuple):
    """The number of views of one projection.

    Attributes:
        parts: 3, query, key and value, or 2, key and value.
    """

    parts: int


JoinedArguments: Any = joined("JoinedArguments", Incoming, Parts, Attention)


@operator("attention")
class AttentionBackwardJoined(JoinedArguments):
    """The gradients of Attention of views of one projection: they lie in one tensor as the views do."""

    __slots__ = ()

    @property
    def plain(self) -> AttentionBackward:
        """The call whose gradients lie apart."""
        incoming = len(Incoming._fields)
        return AttentionBackward(*self[:incoming], *self[incoming + 1 :])

    def outputs(self) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Returns empty (dquery, joined [parts, *key.shape], dbias, dsinks, drelative_bias).

        With 3 parts dquery is in `joined`.
        """
        key = self.key
        # Tokens lie as key's do in memory, the parts side by side in each.
        tokens = sorted(range(0, key.dim() - 1, 2), key=lambda dim: (key.stride(dim), -dim), reverse=True)
        joined = key.new_empty([key.shape[dim] for dim in tokens] + [self.parts, key.shape[1], key.shape[-1]])
        places = [tokens.index(dim) if dim in tokens else len(tokens) + 1 for dim in range(key.dim() - 1)]
        dquery, _, _, dbias, dsinks, drelative = self.wanted
        return (
            gradient_like(dquery and self.parts == 2, self.query),
            joined.permute(len(tokens), *places, -1),
            gradient_like(dbias, self.bias),
            gradient_like(dsinks, self.sinks),
            gradient_like(drelative, self.relative_bias),
        )


class Statistics(NamedTuple):
    """The statistics that the forward left of each row."""

    statistics: Tensor


WeightsArguments: Any = joined("WeightsArguments", Statistics, Attention)


@operator("attention")
class AttentionWeights(WeightsArguments):
    """The softmax weights of a padded attention that has run, as dropout leaves them."""

    __slots__ = ()

    @property
    def attention(self) -> Attention:
        """The call whose weights these are."""
        return Attention(*self[len(Statistics._fields) :])

    def outputs(self) -> Tensor:
        """Returns an empty [B, Hq, Sq, Sk] in the dtype of the query."""
        query = self.query
        shape = (query.shape[0], query.shape[1], self.max_q, self.max_k)
        return torch.empty(shape, dtype=query.dtype, device=query.device)


def rows_like(x: Tensor, columns: int) -> Tensor:
    """Returns an empty tensor of the shape of `x` but for the last dimension, dense, laid out in memory as `x` is.

    So a [B, S, H, D] projection seen as [B, H, S, D] has an output whose heads lie side by side again.
    """
    order = sorted(range(x.dim() - 1), key=lambda dim: (x.stride(dim), -dim), reverse=True)
    # It is no view of another tensor: autograd would not let anyone change that in place.
    return torch.empty_permuted((*x.shape[:-1], columns), (*order, x.dim() - 1), dtype=x.dtype, device=x.device)


def row_statistics(query: Tensor) -> Tensor:
    """Returns an empty fp32 tensor of two numbers for each query and head: [2, B, Hq, Sq], or [2, Nq, Hq], heads apart.

    The first is top, the largest score in natural units, sink included; the second log2 Σ exp(s - top), from 0 up.
    They stay apart, since their sum would round the second away where scores are huge (a mask of finfo.min): a weight
    is exp2((s - top) · log2(e) - log2 Σ), at most 1. Without keys top is -inf and the sum's logarithm 0, sink or not.
    """
    if query.dim() == 4:
        return torch.empty((2, *query.shape[:-1]), dtype=torch.float32, device=query.device)
    rows, heads, _ = query.shape
    return torch.empty((2, heads, rows), dtype=torch.float32, device=query.device).transpose(1, 2)


def gradient_like(is_wanted: bool, x: Tensor | None) -> Tensor | None:
    """Returns an empty gradient of `x`, laid out as it is; None where there is none or nobody wants it."""
    if x is None or not is_wanted:
        return None
    return rows_like(x, x.shape[-1]) if x.dim() > 1 else torch.empty_like(x)
