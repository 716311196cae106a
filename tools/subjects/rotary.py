"""Rotary position embedding."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from tfm import ops
from tfm.kernels import rotary
from tfm.operators.rotary import Rotary, Rotary_
from tools.check_kernels.case import Case
from tools.check_kernels.described import chip, described, meta
from tools.host import sizes
from tools.host.call import Call
from tools.subjects import inputs
from tools.subjects.inputs import Outputs, Pass, Tensors

BATCH, HEADS, LENGTH = 64, 16, 128


def compiled(every: bool) -> Iterator[Case]:
    """Yields queries and keys out of place, with positions; whole and partial rotation, halves and neighbours."""
    on, positions = chip(9), meta(BATCH, LENGTH, dtype="i64")
    for dtype in ("bf16", "fp16", "fp32"):
        for columns, half in ((64, 32), (80, 40), (96, 12), (128, 64), (256, 32)) if every else ((80, 40), (256, 32)):
            # As the parts of a projection lie: the heads of a token side by side.
            query = meta(BATCH, LENGTH, HEADS, columns, dtype=dtype).transpose(1, 2)
            tables = meta(LENGTH, half, dtype="fp32"), meta(LENGTH, half, dtype="fp32")
            for interleaved in (False, True):
                label = f"{2 * half} of {columns} {dtype}"
                label = f"interleaved {label}" if interleaved else label
                call = Rotary(query, query, *tables, positions, HEADS, interleaved, inverse=True)
                yield from described(label, rotary.rotary, call, on)
                if every:
                    in_place = Rotary_(query, *tables, positions, HEADS, interleaved)
                    yield from described(f"in place {label}", rotary.rotary_, in_place, on)


def pass_rotary(new: Tensors) -> Iterator[Outputs]:
    tables = ops.rotary_table(inputs.LONG, inputs.HEAD_DIM // 2)
    cos, sin = (table.to(new.device) for table in tables)
    query, key = (
        new(2, inputs.HEADS, inputs.LONG, inputs.HEAD_DIM),
        new(2, inputs.KEY_HEADS, inputs.LONG, inputs.HEAD_DIM),
    )
    yield tuple(turned for turned in ops.rotary(query, key, cos, sin) if turned is not None)


def pass_rotary_(new: Tensors) -> Iterator[Outputs]:
    cos, sin = (table.to(new.device) for table in ops.rotary_table(inputs.ROWS, inputs.HEAD_DIM))
    fused = new(inputs.ROWS, inputs.HEADS + 2 * inputs.KEY_HEADS, inputs.HEAD_DIM)
    for positions in (None, new.below(inputs.ROWS, inputs.ROWS)):
        yield ops.rotary_(2 * fused, inputs.HEADS + inputs.KEY_HEADS, cos, sin, positions, interleaved=True)


PASSES: dict[str, Pass] = {
    "rotary": pass_rotary,
    "rotary_": pass_rotary_,
}


def timed(seed: Tensor) -> list[Call]:
    """Returns the calls whose launches are counted and whose host time is told."""
    query, key, positions = sizes.heads(sizes.LENGTH), sizes.heads(sizes.LENGTH), torch.arange(sizes.LENGTH)
    cos, sin = ops.rotary_table(sizes.LENGTH, sizes.DIM)
    in_place = partial(ops.rotary_, query.detach(), sizes.HEADS, cos, sin, positions)
    return [
        Call("rotary", partial(ops.rotary, query, key, cos, sin, positions), (query, key)),
        Call("rotary_", in_place),
    ]
