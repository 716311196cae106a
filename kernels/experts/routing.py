"""Rows sorted by expert, without a word to the host: keys, torch's stable sort, and what follows from sorted keys."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tfm.kernels.tape import Tape
from tfm.operators.experts import ExpertsRouting

BLOCK = 1024


@triton.jit(do_not_specialize=["rows"])
def experts_keys_kernel(index, keys, rows, places, experts, index_t, index_k, BLOCK: tl.constexpr):
    """Each program stores the experts of BLOCK places, `experts` where there is none, so that these are sorted last."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    token, place = (row // places).to(tl.int64), (row % places).to(tl.int64)
    expert = tl.load(index + token * index_t + place * index_k, mask=inside, other=0)
    known = (expert >= 0) & (expert < experts)
    tl.store(keys + row, tl.where(known, expert, experts).to(tl.int32), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def experts_order_kernel(
    keys, sources, order, place, offsets, rows, experts, EXPERTS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Each program inverts BLOCK rows of the order; the first finds the experts' first rows among the sorted keys."""
    program = tl.program_id(0)
    row = program * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    source = tl.load(sources + row, mask=inside, other=0)
    tl.store(order + row, source.to(tl.int32), mask=inside)
    tl.store(place + source, row, mask=inside)
    if program == 0:
        expert = tl.arange(0, EXPERTS)
        # How many keys are smaller: between `low` and `high`, whose distance is halved.
        low, high = tl.zeros([EXPERTS], tl.int32), tl.zeros([EXPERTS], tl.int32) + rows
        step = rows
        while step > 0:
            middle = low + (high - low) // 2
            open_yet = (low < high) & (expert <= experts)
            is_smaller = tl.load(keys + middle, mask=open_yet, other=0) < expert
            low = tl.where(open_yet & is_smaller, middle + 1, low)
            high = tl.where(open_yet & (is_smaller == 0), middle, high)
            step = step // 2
        tl.store(offsets + expert, low, mask=expert <= experts)


def experts_routing(tape: Tape, call: ExpertsRouting) -> tuple[Tensor, Tensor, Tensor]:
    """Computes (order, place, offsets) of the operator. Two launches around torch's sort."""
    order, place, offsets = outputs = tape.outputs(call)
    rows = order.shape[0]
    if rows == 0:
        offsets.zero_()
        return outputs
    index, programs = call.index, -(-rows // BLOCK)
    keys = tape.empty((rows,), torch.int32, index.device)
    tape.launch(
        experts_keys_kernel, (programs,), {"num_warps": 4},
        index=index, keys=keys, rows=rows, places=index.shape[1], experts=call.experts,
        index_t=index.stride(0), index_k=index.stride(1), BLOCK=BLOCK,
    )  # fmt: skip
    sorted_keys, sources = torch.sort(keys, stable=True)
    tape.launch(
        experts_order_kernel, (programs,), {"num_warps": 4},
        keys=sorted_keys, sources=sources, order=order, place=place, offsets=offsets, rows=rows, experts=call.experts,
        EXPERTS=triton.next_power_of_2(call.experts + 1), BLOCK=BLOCK,
    )  # fmt: skip
    return outputs
