"""What every kernel of attention is told of a call, by the names of its parameters.

Tensors come with the strides that decide how wide their loads are, as one tuple, `Heads`: Triton compiles a kernel for
strides of 1 and for multiples of 16, which they are wherever they can be. Numbers that vary from call to call stand
alone, since of a tuple's fields Triton forgets none.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tfm.kernels.attention.scores import Score
from tfm.kernels.launch.attention import any_length, short
from tfm.kernels.matmul import precision
from tfm.kernels.philox import threshold_and_scale
from tfm.kernels.tape import Tape
from tfm.operators.attention import Attention, row_statistics

# What a kernel that is compiled for one number of them serves, whatever they are.
VARYING = (
    *("heads", "group", "query_size", "key_size", "start", "left", "right", "threshold", "site"),
    *("row_kind", "row_h", "dlse_b", "dlse_h", "dlse_s", "words_b", "words_h", "words_s", "reach_b", "reach_h"),
)


class Heads(NamedTuple):
    """[B, H, S, D], or [N, H, D], whose sequences are told apart by their rows: a tensor, and its strides."""

    data: Tensor
    b: int
    h: int
    s: int
    d: int


class Lengths(NamedTuple):
    """Where sequences begin and end, and their first queries' positions; as in Attention."""

    cu_seq_q: Tensor | None
    cu_seq_k: Tensor | None
    key_lengths: Tensor | None
    starts: Tensor | None


def common_arguments(kernel: Any, call: Attention, whole: bool = False) -> dict[str, Any]:
    """Returns what `kernel` takes of `call`, tiles, results and sinks apart.

    `whole`: a head dim is one tile, a power of two that covers it, and not the sum of two.
    """
    words_b, words_h, words_s = broadcast_strides(call.words, 3)
    reach_b, reach_h = broadcast_strides(call.reach, 2)
    threshold, keep_scale = threshold_and_scale(call.dropout_p)
    dtype, is_packed = call.query.dtype, call.cu_seq_q is not None
    dims = [(dim, *((short.short_block(dim),) if whole else any_length.split_dim(dim, dtype))) for dim in call.dims]
    known = {
        "q": heads_of(call.query), "k": heads_of(call.key), "v": heads_of(call.value), "bias": bias_of(call.bias),
        "words": call.words, "reach": call.reach, "seed": call.seed,
        "lengths": Lengths(call.cu_seq_q, call.cu_seq_k, call.key_lengths, call.starts),
        "words_b": words_b, "words_h": words_h, "words_s": words_s, "reach_b": reach_b, "reach_h": reach_h,
        "row_kind": call.query.shape[:-1].numel(), "row_h": call.query.shape[0] if is_packed else call.max_q,
        "heads": call.heads, "group": call.heads // call.key_heads, "query_size": call.max_q, "key_size": call.max_k,
        "start": call.start, "left": call.left, "right": call.right, "score": Score.of(call.scale, call.softcap),
        "threshold": threshold, "keep_scale": keep_scale, "site": call.site,
        "DIMS": dims[0], "VALUE_DIMS": dims[1],
        "PRECISION": precision(dtype),
    }  # fmt: skip
    return {name: known[name] for name in kernel.arg_names if name in known}


def heads_of(x: Tensor | None) -> Heads | None:
    """Returns a tensor of heads with its strides; None where absent."""
    if x is None:
        return None
    if x.dim() == 4:
        return Heads(x, *x.stride())
    return Heads(x, 0, x.stride(1), x.stride(0), x.stride(2))


def bias_of(bias: Tensor | None) -> Heads | None:
    """Returns a bias, its keys side by side, with its strides: 0 along every dimension of size 1."""
    return None if bias is None else Heads(bias, *broadcast_strides(bias, 3), 1)


def broadcast_strides(x: Tensor | None, dims: int) -> tuple[int, ...]:
    """Returns the strides of the first `dims` dimensions: 0 along those of size 1, and where absent."""
    if x is None:
        return (0,) * dims
    return tuple(x.stride(dim) if x.shape[dim] > 1 else 0 for dim in range(dims))


def dlse_strides(x: Tensor | None) -> dict[str, int]:
    """Returns those of [B, H, S], or of [N, H]; 0 where absent."""
    steps = (0, 0, 0) if x is None else x.stride() if x.dim() == 3 else (0, x.stride(1), x.stride(0))
    return dict(zip(("dlse_b", "dlse_h", "dlse_s"), steps, strict=True))


def dense_statistics(call: Attention, statistics: Tensor) -> Tensor:
    """Returns the statistics laid out as the forward leaves them, which kernels take for granted; a copy if need be."""
    dense = statistics if statistics.dim() == 4 else statistics.transpose(1, 2)
    return statistics if dense.is_contiguous() else row_statistics(call.query).copy_(statistics)


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
