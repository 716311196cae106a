"""The arguments of attention's kernels, by the names of their parameters.

Tensors of heads come with the strides that decide how wide their loads are, as one tuple: Triton compiles a kernel for
strides of 1 and for multiples of 16, which they are wherever they can be. Numbers that vary from call to call stand
alone, since of a tuple's fields Triton forgets none.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tfm.kernels.attention.heads import Heads, heads_of
from tfm.kernels.attention.scores import Score
from tfm.kernels.attention.visible import Lengths, Mask, Window
from tfm.kernels.launch.attention import any_length, short
from tfm.kernels.matmul import precision
from tfm.kernels.philox import threshold_and_scale
from tfm.kernels.tape import Tape
from tfm.operators.attention import Attention, row_statistics

# A kernel that is compiled for one number of them serves whatever they are.
VARYING = ("heads", "group", "query_size", "key_size", "row_words", "row_kind", "start", "site")


class Dropout(NamedTuple):
    """The seed, None where nothing is dropped; how many of 65,536 outcomes drop; the factor of kept weights."""

    seed: Tensor | None
    threshold: int
    keep_scale: float


def common_arguments(kernel: Any, call: Attention, *, whole: bool = False, with_sink: bool = False) -> dict[str, Any]:
    """Returns what `kernel` takes of `call`, its tiles and results apart.

    Args:
        kernel: one of attention's.
        call: the operator's arguments.
        whole: a head dim is one tile, a power of two that covers it, and not the sum of two, unless it is slices.
        with_sink: whether the kernel has a use for each head's sink; without, one compilation serves both.
    """
    dtype, bits = call.query.dtype, call.words if call.reach is None else call.reach
    dims = [dims_of(dim, dtype, whole) for dim in call.dims]
    known = {
        "q": heads_of(call.query), "k": heads_of(call.key), "v": heads_of(call.value), "bias": bias_of(call.bias),
        "mask": Mask.of(call.words, call.reach, call.key_mask, call.max_q),
        "lengths": Lengths(call.cu_seq_q, call.cu_seq_k, call.key_lengths, call.starts),
        "window": Window(call.left, call.right), "score": Score.of(call, with_sink),
        "dropout": Dropout(call.seed, *threshold_and_scale(call.dropout_p)),
        "row_kind": call.query.shape[:-1].numel(), "heads": call.heads, "group": call.heads // call.key_heads,
        "query_size": call.max_q, "key_size": call.max_k, "row_words": 0 if bits is None else bits.shape[-1],
        "start": call.start, "site": call.site,
        "DIMS": dims[0], "VALUE_DIMS": dims[1], "PRECISION": precision(dtype),
    }  # fmt: skip
    return {name: known[name] for name in kernel.arg_names if name in known}


def is_biased(call: Attention) -> bool:
    """Tells whether something is added to scores."""
    return call.bias is not None or call.relative_bias is not None


def dims_of(dim: int, dtype: torch.dtype, whole: bool) -> tuple[int, int, int, int]:
    """Returns a head dim as kernels take it: see tfm.kernels.attention.heads."""
    slices = any_length.slices(dim, dtype)
    if whole and slices == 1:
        return dim, short.short_block(dim), 0, 1
    return dim, *any_length.split_dim(dim, dtype), slices


def bias_of(bias: Tensor | None) -> Heads | None:
    """Returns a bias, its keys side by side, with its strides: 0 along every dimension of size 1."""
    if bias is None:
        return None
    steps = (step if size > 1 else 0 for step, size in zip(bias.stride()[:3], bias.shape[:3], strict=True))
    return Heads(bias, *steps, 1)


def dense_rows(call: Attention, x: Tensor | None) -> Tensor | None:
    """Returns statistics, or one number a row, laid out as the forward leaves them; a copy if need be."""
    if x is None or (x if call.cu_seq_q is None else x.transpose(-1, -2)).is_contiguous():
        return x
    dense = row_statistics(call.query)
    return (dense if x.dim() == dense.dim() else dense[0]).copy_(x)


def problem(tape: Tape, call: Attention) -> tuple[int, int, torch.dtype, int, int]:
    """Returns what the launch settings ask: D, Dv, dtype, extras and the chip's major number."""
    is_masked = call.words is not None or call.key_mask is not None
    extras = (call.seed is not None) + 2 * (is_biased(call) or is_masked)
    return *call.dims, call.query.dtype, extras, tape.chip(call.query.device).major


def short_problem(tape: Tape, call: Attention) -> dict[str, Any]:
    """Returns what the launch settings of short sequences ask."""
    return {
        "max_q": call.max_q,
        "max_k": call.max_k,
        "dim": max(call.dims),
        "dtype": call.query.dtype,
        "has_bias": is_biased(call),
        "has_words": call.words is not None,
        "major": tape.chip(call.query.device).major,
    }
