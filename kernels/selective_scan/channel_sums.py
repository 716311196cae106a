"""The gradients of B and C: what blocks of channels leave for each step, added up."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tfm.kernels.recurrence import strides
from tfm.kernels.tape import Tape

# Numbers of a tile, four a thread, whose sums of a block of channels lie side by side.
TILE, OPTIONS = 512, {"num_warps": 4}


@triton.jit(do_not_specialize=["sequences", "steps"])
def selective_scan_sums_kernel(
    partials, dB, dC, blocks, sequences, steps, dB_b, dB_s, dB_d, dC_b, dC_s, dC_d,
    STATES: tl.constexpr, BLOCK_STEPS: tl.constexpr, BLOCK_STATES: tl.constexpr,
):  # fmt: skip
    """Each program adds up BLOCK_STEPS steps of either part of partials [2, blocks, sequences, steps, STATES]."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_STEPS + tl.arange(0, BLOCK_STEPS)[:, None]
    state, part = tl.arange(0, BLOCK_STATES)[None, :], tl.program_id(1)
    rows = sequences.to(tl.int64) * steps
    known = (row < rows) & (state < STATES)
    partials += part * blocks * rows * STATES + row * STATES + state
    total = tl.zeros([BLOCK_STEPS, BLOCK_STATES], tl.float32)
    for _ in range(blocks):
        total += tl.load(partials, mask=known, other=0.0)
        partials += rows * STATES
    sequence, step = row // steps, row % steps
    if part == 0:
        tl.store(dB + sequence * dB_b + step * dB_s + state * dB_d, total, mask=known)
    else:
        tl.store(dC + sequence * dC_b + step * dC_s + state * dC_d, total, mask=known)


def sum_channels(tape: Tape, partials: Tensor, dB: Tensor, dC: Tensor) -> None:
    """Fills dB and dC [B, S, N] with the sums over the blocks of partials [2, blocks, B, S, N]. One launch."""
    batch, steps, states = dB.shape
    block_states = triton.next_power_of_2(states)
    block_steps = TILE // block_states
    if (tiles := -(-batch * steps // block_steps)) == 0:
        return
    tape.launch(
        selective_scan_sums_kernel, (tiles, 2), OPTIONS,
        **strides("dB", dB), **strides("dC", dC), partials=partials, dB=dB, dC=dC, blocks=partials.shape[1],
        sequences=batch, steps=steps, STATES=states, BLOCK_STEPS=block_steps, BLOCK_STATES=block_states,
    )  # fmt: skip
