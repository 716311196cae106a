"""The parts that recurrences share whose state is held in registers: which channels a program has, and its steps.

Each thread has one channel of one sequence and goes through its steps. It loads those from one kept state to the next
at once, so that it waits for memory once for all of them; they are written out one after the other in the program.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# One warp, so that few channels still spread over many multiprocessors.
CHANNELS, OPTIONS = 32, {"num_warps": 1}


@triton.jit
def channels_of(channels, BLOCK_CHANNELS: tl.constexpr):
    """Returns a program's sequence, its channels, and which of these there are."""
    tiles = tl.cdiv(channels, BLOCK_CHANNELS)
    program = tl.program_id(0)
    channel = (program % tiles * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)).to(tl.int64)
    return (program // tiles).to(tl.int64), channel, channel < channels


@triton.jit
def steps_from(x, start, steps, stride, inside, COUNT: tl.constexpr):
    """Loads COUNT steps in fp32, 0 behind the last; x points at the sequence's channels."""
    loaded = ()
    for i in tl.static_range(COUNT):
        step = start + i
        value = tl.load(x + step.to(tl.int64) * stride, mask=inside & (step < steps), other=0.0)
        # Triton unpacks no tuple into another.
        loaded = loaded + (value.to(tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
    return loaded


def programs(x: Tensor) -> int:
    """Returns the number of programs for x [B, S, D]."""
    return x.shape[0] * -(-x.shape[2] // CHANNELS)


def strides(name: str, x: Tensor) -> dict[str, int]:
    """Returns the strides of x [B, S, D] by the names of a kernel's parameters."""
    return {f"{name}_{dim}": stride for dim, stride in zip("bsd", x.stride(), strict=True)}
