"""What every kernel of attention is told of a call, by the names of its parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tfm.kernels import launch
from tfm.kernels.attention.scores import score_factors
from tfm.kernels.matmul import precision
from tfm.kernels.philox import threshold_and_scale
from tfm.kernels.tape import Tape
from tfm.operators.attention import Attention

# The arguments below that vary from call to call: a kernel compiled for one number serves all. The other strides decide
# how wide loads are, and are multiples of 16 wherever they can be.
VARYING = (
    *("heads", "group", "query_size", "key_size", "start", "left", "right", "threshold", "site"),
    *("row_kind", "row_b", "row_h", "dlse_b", "dlse_h", "words_b", "words_h", "words_s", "reach_b", "reach_h"),
)


def common_arguments(kernel: Any, call: Attention) -> dict[str, Any]:
    """Returns what `kernel` takes of `call`, tiles, results and sinks apart; a bias has rows of multiples of 16."""
    dim, value_dim = call.dims
    inner, outer = score_factors(call.scale, call.softcap)
    threshold, keep_scale = threshold_and_scale(call.dropout_p)
    first, rest = launch.split_dim(dim, call.query.dtype)
    value_first, value_rest = launch.split_dim(value_dim, call.query.dtype)
    known = {
        "q": call.query, "k": call.key, "v": call.value, "bias": call.bias, "words": call.words, "reach": call.reach,
        "seed": call.seed, "cu_seq_q": call.cu_seq_q, "cu_seq_k": call.cu_seq_k, "key_lengths": call.key_lengths,
        "starts": call.starts,
        **strides("q", call.query), **strides("k", call.key), **strides("v", call.value),
        **_broadcast_strides("bias", call.bias, "bhs"), "bias_k": 1,
        **_broadcast_strides("words", call.words, "bhs"),
        **_broadcast_strides("reach", call.reach, "bh"),
        "heads": call.heads, "group": call.heads // call.key_heads,
        "query_size": call.max_q, "key_size": call.max_k, "start": call.start, "left": call.left,
        "right": call.right, "inner": inner, "outer": outer, "scale": call.scale, "threshold": threshold,
        "keep_scale": keep_scale, "site": call.site,
        "DIM": dim, "DIM_FIRST": first, "DIM_REST": rest,
        "VALUE_DIM": value_dim, "VALUE_FIRST": value_first, "VALUE_REST": value_rest,
        # Where a head dim is one tile: a power of two that covers it.
        "BLOCK_DIM": launch.short_block(dim), "BLOCK_VALUE_DIM": launch.short_block(value_dim),
        "PRECISION": precision(call.query.dtype),
    }  # fmt: skip
    names = frozenset(kernel.arg_names)
    return {name: value for name, value in known.items() if name in names}


def strides(name: str, x: Tensor | None) -> dict[str, int]:
    """Returns those of [B, H, S, D], or of [N, H, D], whose sequences are told apart by their rows; 0 where absent."""
    if x is None:
        steps: tuple[int, ...] = (0, 0, 0, 0)
    elif x.dim() == 4:
        steps = x.stride()
    else:
        steps = (0, x.stride(1), x.stride(0), x.stride(2))
    return {f"{name}_{dim}": step for dim, step in zip("bhsd", steps, strict=True)}


def _broadcast_strides(name: str, x: Tensor | None, dims: str) -> dict[str, int]:
    """Returns 0 along every dimension of size 1."""
    if x is None:
        return {f"{name}_{dim}": 0 for dim in dims}
    steps = zip(x.stride(), x.shape, strict=False)
    return {f"{name}_{dim}": step if size > 1 else 0 for dim, (step, size) in zip(dims, steps, strict=False)}


def statistics_strides(x: Tensor) -> dict[str, int]:
    """Returns those of the forward's statistics; neighbouring queries always lie side by side."""
    batch, head = (x.stride(1), x.stride(2)) if x.dim() == 4 else (0, x.stride(2))
    return {"row_kind": x.stride(0), "row_b": batch, "row_h": head}


def dlse_strides(x: Tensor | None) -> dict[str, int]:
    """Returns those of [B, H, S], or of [N, H]; 0 where absent."""
    steps = (0, 0, 0) if x is None else x.stride() if x.dim() == 3 else (0, x.stride(1), x.stride(0))
    return dict(zip(("dlse_b", "dlse_h", "dlse_s"), steps, strict=True))


def problem(tape: Tape, call: Attention) -> tuple[int, int, torch.dtype, int, int]:
    """Returns what the launch settings ask: D, Dv, dtype, extras and the chip's major number."""
    extras = (call.seed is not None) + (call.bias is not None or call.words is not None)
    return *call.dims, call.query.dtype, extras, tape.chip(call.query.device).major


def short_problem(tape: Tape, call: Attention) -> dict[str, Any]:
    """Returns what the launch settings of short sequences ask."""
    return {
        "max_q": call.max_q,
        "max_k": call.max_k,
        "dim": max(call.dims),
        "dtype": call.query.dtype,
        "has_bias": call.bias is not None,
        "has_words": call.words is not None,
        "major": tape.chip(call.query.device).major,
    }
