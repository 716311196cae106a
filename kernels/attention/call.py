"""One attention as its kernels see it: the tensors, the rules, and what every kernel is told of both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tfm.kernels import launch
from tfm.kernels.attention.scores import score_factors
from tfm.kernels.philox import threshold_and_scale
from tfm.operators import attention as operators

# The arguments below that vary from call to call: a kernel compiled for one number serves all. The other strides decide
# how wide loads are, and are multiples of 16 wherever they can be.
VARYING = (
    *("heads", "group", "query_size", "key_size", "start", "left", "right", "threshold", "site"),
    *("row_kind", "row_b", "row_h", "dlse_b", "dlse_h", "words_b", "words_h", "words_s", "reach_b", "reach_h"),
)


class Call(operators.Call):
    """What the operator is given; rows of `bias` begin at multiples of 16 elements."""

    @property
    def launch_problem(self) -> tuple[int, int, torch.dtype, int, int]:
        """What the launch settings ask: D, Dv, dtype, extras and the chip's major number."""
        extras = (self.seed is not None) + (self.bias is not None or self.words is not None)
        return *self.dims, self.query.dtype, extras, launch.chip_of(self.query.device).major

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
    # Not `allow_tf32`, which raises where this is how it was set.
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


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


def statistics_strides(x: Tensor) -> dict[str, int]:
    """Of what tfm.operators.attention.row_statistics gives; neighbouring queries always lie side by side."""
    batch, head = (x.stride(1), x.stride(2)) if x.dim() == 4 else (0, x.stride(2))
    return {"row_kind": x.stride(0), "row_b": batch, "row_h": head}
