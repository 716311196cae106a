"""Rotary position embedding."""

from __future__ import annotations

from collections.abc import Iterator

from tfm.kernels import rotary
from tfm.operators.rotary import Rotary, Rotary_
from tools.check_kernels.cases.case import Case
from tools.check_kernels.described import chip, described, meta

BATCH, HEADS, LENGTH = 64, 16, 128


def rotary_cases(every: bool) -> Iterator[Case]:
    """Queries and keys out of place, with positions; whole and partial rotation, halves and neighbours."""
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
