"""One attention as its kernels see it: the tensors, the rules, and what every kernel is told of both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tfm.kernels import launch
from tfm.kernels.attention.scores import score_factors
from tfm.kernels.philox import threshold_and_scale

# The arguments below that vary from call to call: a kernel compiled for one number serves all.
VARYING = ("heads", "group", "query_size", "key_size", "start", "left", "right", "threshold", "site")


@dataclass(frozen=True)
class Call:
    """The arguments of the operator, with the mask as bits and the rules as tfm.kernels.attention.scores states them.

    Attributes:
        query: [B, Hq, Sq, D], or packed [Nq, Hq, D]; any strides, as `key` and `value`.
        key: [B, Hkv, Sk, D] or [Nk, Hkv, D].
        value: [B, Hkv, Sk, Dv] or [Nk, Hkv, Dv].
        bias: [B|1, Hq|1, Sq|1, Sk], rows that begin at multiples of 16 elements, or None, as all below may be.
        words: int32 [B|1, Hq|1, Sq, W], a bit for each key that a query may attend to.
        reach: int32 [B|1, Hq|1, W], a bit for each key that some query may attend to.
        sinks: [Hq].
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
    sinks: Tensor | None
    cu_seq_q: Tensor | None
    cu_seq_k: Tensor | None
    key_lengths: Tensor | None
    starts: Tensor | None
    seed: Tensor | None
    max_q: int
    max_k: int
    start: int
    left: int | None
    right: int | None
    scale: float
    softcap: float | None
    dropout_p: float
    site: int

    @property
    def is_packed(self) -> bool:
        return self.cu_seq_q is not None

    @property
    def sequences(self) -> int:
        return self.query.shape[0] if self.cu_seq_q is None else self.cu_seq_q.shape[0] - 1

    @property
    def heads(self) -> int:
        return self.query.shape[1]

    @property
    def key_heads(self) -> int:
        return self.key.shape[1]

    @property
    def dims(self) -> tuple[int, int]:
        """(D, Dv)."""
        return self.query.shape[-1], self.value.shape[-1]

    @property
    def launch_problem(self) -> tuple[int, int, torch.dtype, int, int]:
        """What the launch settings ask: D, Dv, dtype, extras and the chip's major number."""
        extras = (self.seed is not None) + (self.bias is not None or self.words is not None)
        return *self.dims, self.query.dtype, extras, launch.chip(self.query.device).major

    def arguments(self) -> dict[str, Any]:
        """What every kernel takes under these names, tiles and outputs apart."""
        dim, value_dim = self.dims
        inner, outer = score_factors(self.scale, self.softcap)
        threshold, keep_scale = threshold_and_scale(self.dropout_p)
        first, rest = launch.split_dim(dim, self.query.dtype)
        value_first, value_rest = launch.split_dim(value_dim, self.query.dtype)
        return {
            "q": self.query, "k": self.key, "v": self.value, "bias": self.bias, "words": self.words,
            "reach": self.reach, "seed": self.seed, "cu_seq_q": self.cu_seq_q, "cu_seq_k": self.cu_seq_k,
            "key_lengths": self.key_lengths, "starts": self.starts,
            **strides("q", self.query), **strides("k", self.key), **strides("v", self.value),
            **_broadcast_strides("bias", self.bias, "bhs"), "bias_k": 1,
            **_broadcast_strides("words", self.words, "bhs"),
            **_broadcast_strides("reach", self.reach, "bh"),
            "heads": self.heads, "group": self.heads // self.key_heads,
            "query_size": self.max_q, "key_size": self.max_k, "start": self.start, "left": self.left,
            "right": self.right, "inner": inner, "outer": outer, "threshold": threshold, "keep_scale": keep_scale,
            "site": self.site,
            "DIM": dim, "DIM_FIRST": first, "DIM_REST": rest,
            "VALUE_DIM": value_dim, "VALUE_FIRST": value_first, "VALUE_REST": value_rest,
            "PRECISION": precision(self.query.dtype),
        }  # fmt: skip


def precision(dtype: torch.dtype) -> str:
    """How products of fp32 are formed: torch's own setting of TF32 rules."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def strides(name: str, x: Tensor | None) -> dict[str, int]:
    """Of [B, H, S, D], or of [N, H, D], whose sequences are told apart by their rows; 0 where absent."""
    if x is None:
        steps: tuple[int, ...] = (0, 0, 0, 0)
    elif x.dim() == 4:
        steps = x.stride()
    else:
        steps = (0, x.stride(1), x.stride(0), x.stride(2))
    return {f"{name}_{dim}": step for dim, step in zip("bhsd", steps, strict=True)}


def _broadcast_strides(name: str, x: Tensor | None, dims: str) -> dict[str, int]:
    """0 along every dimension of size 1."""
    if x is None:
        return {f"{name}_{dim}": 0 for dim in dims}
    steps = zip(x.stride(), x.shape, strict=False)
    return {f"{name}_{dim}": step if size > 1 else 0 for dim, (step, size) in zip(dims, steps, strict=False)}


def rows_like(x: Tensor, columns: int, dtype: torch.dtype | None = None) -> Tensor:
    """Empty, of the shape of `x` but for the last dimension, dense, its dimensions in memory as those of `x` are.

    So a [B, S, H, D] projection seen as [B, H, S, D] has an output whose heads lie side by side again.
    """
    leading = range(x.dim() - 1)
    order = sorted(leading, key=lambda dim: (x.stride(dim), -dim), reverse=True)
    dense = torch.empty([x.shape[dim] for dim in order] + [columns], dtype=dtype or x.dtype, device=x.device)
    return dense.permute([order.index(dim) for dim in leading] + [x.dim() - 1])


def row_statistics(query: Tensor) -> Tensor:
    """Empty fp32, one number for each query and head: [B, Hq, Sq], or [Nq, Hq] whose heads lie apart."""
    if query.dim() == 4:
        return torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
    rows, heads, _ = query.shape
    return torch.empty((heads, rows), dtype=torch.float32, device=query.device).transpose(0, 1)


def statistics_strides(x: Tensor) -> dict[str, int]:
    """Of what row_statistics gives; neighbouring queries always lie side by side."""
    batch, head = (x.stride(0), x.stride(1)) if x.dim() == 3 else (0, x.stride(1))
    return {"row_b": batch, "row_h": head}
