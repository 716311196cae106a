"""Attention of any length, forward, of programs that share keys: what their pieces add up to.

Each program of tfm.kernels.attention.forward leaves acc, top and sum of its share of the keys; here they become one
(tfm.kernels.splits), and then out and the statistics, as they do there, a sink counted once.

Read: Dv + 2 numbers of fp32 for each query, head and share; written: out and two numbers a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tfm.kernels.attention.arguments import common_arguments, is_biased
from tfm.kernels.attention.heads import Heads, head_of, heads_of
from tfm.kernels.attention.scores import finish_rows, store_statistics, unit_of
from tfm.kernels.splits import TOGETHER, add_pieces
from tfm.kernels.tape import Tape
from tfm.operators.attention import Attention


class Pieces(NamedTuple):
    """The pieces of all rows, in the order of their statistics.

    Attributes:
        values: [rows, splits, Dv], the sums of values.
        sums: [rows, splits, 2], tops and sums of powers.
        splits: how many programs share a row's keys.
    """

    values: Tensor
    sums: Tensor
    splits: int

    @classmethod
    def of(cls, tape: Tape, call: Attention, splits: int) -> Pieces:
        """Returns those of a call, still empty."""
        device, rows = call.query.device, call.query.shape[:-1].numel()
        values, sums = (tape.empty((rows, splits, size), torch.float32, device) for size in (call.dims[1], 2))
        return cls(values, sums, splits)

    @property
    def heads(self) -> Heads:
        """The first piece of each row, as rows of one head."""
        return Heads(self.values, 0, 0, self.splits * self.values.shape[-1], 1)


@triton.jit(do_not_specialize=["heads", "query_size", "row_kind", "splits"])
def attention_combine_kernel(
    values, sums, out, statistics, score, dropout, heads, query_size, row_kind, splits,
    VALUE_DIM: tl.constexpr, BLOCK_VALUE_DIM: tl.constexpr, BLOCK_SPLITS: tl.constexpr, IS_BIASED: tl.constexpr,
):  # fmt: skip
    """Each program adds up the pieces of one query and head; packed queries are as of one sequence."""
    place = tl.program_id(0).to(tl.int64)
    top, total, acc = add_pieces(
        values, sums, place * splits, splits, VALUE_DIM, BLOCK_VALUE_DIM, BLOCK_SPLITS, IS_BIASED
    )
    pair, row = place // query_size, place % query_size
    sequence, head = pair // heads, pair % heads
    unit = tl.abs(unit_of(score))
    is_empty, top, log_sum, norm = finish_rows(top, total, unit, score, head, dropout.keep_scale, IS_BIASED)
    store_statistics(statistics + place, row_kind, top, log_sum, None)
    column = tl.arange(0, BLOCK_VALUE_DIM)
    address = head_of(out, sequence, head, row) + column * out.d
    tl.store(address, tl.where(is_empty, 0.0, acc * norm), mask=column < VALUE_DIM)


def combine_pieces(tape: Tape, call: Attention, pieces: Pieces, output: Tensor, statistics: Tensor) -> None:
    """Fills the results of `call` from its pieces. One launch."""
    rows, splits, value_dim = pieces.values.shape
    arguments = common_arguments(attention_combine_kernel, call, with_sink=True)
    if call.cu_seq_q is not None:
        arguments["query_size"] = call.query.shape[0]
    tape.launch(
        attention_combine_kernel, (rows,), {"num_warps": 1},
        **arguments, values=pieces.values, sums=pieces.sums, out=heads_of(output), statistics=statistics,
        splits=splits, VALUE_DIM=value_dim, BLOCK_VALUE_DIM=max(16, triton.next_power_of_2(value_dim)),
        BLOCK_SPLITS=TOGETHER, IS_BIASED=is_biased(call),
    )  # fmt: skip
