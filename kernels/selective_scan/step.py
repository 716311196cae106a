"""A step of the selective scan for a tile of channels by numbers of their states, and what is done for several.

Tiles of a group of steps are [BLOCK_CHANNELS, STRIDE], each number one thread's; their columns [BLOCK_CHANNELS, 1] are
known to all threads of a channel, and a tile [BLOCK_CHANNELS, BLOCK_STATES] has the state.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from tfm.kernels.activations import softplus
from tfm.kernels.recurrence import strides
from tfm.operators.selective_scan import SelectiveScan, SelectiveScanBackward

# Four numbers of a state a thread.
WARPS, TILE = 4, 512
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_tile(x, step, steps, stride, inside):
    """Loads a group of steps in fp32, 0 behind the last; x points at the channels."""
    return tl.load(x + step * stride, mask=inside & (step < steps), other=0.0).to(tl.float32)


@triton.jit
def load_vector(x, channel, inside):
    """Loads a number for each channel in fp32; None has zeros."""
    value = tl.zeros(channel.shape, tl.float32)
    if x is not None:
        value = tl.load(x + channel, mask=inside, other=0.0).to(tl.float32)
    return value


@triton.jit
def load_shared(x, step, steps, stride, known):
    """Loads a step's numbers that all channels share in fp32, 0 behind the last step; x points at the first step's."""
    # As a vector they would get a layout of their own, and be moved into the tile's.
    place = tl.broadcast_to(x + step.to(tl.int64) * stride, known.shape)
    return tl.load(place, mask=known & (step < steps), other=0.0).to(tl.float32)


@triton.jit
def load_state(state, place, known):
    """Loads a tile of states; None has zeros."""
    h = tl.zeros(known.shape, tl.float32)
    if state is not None:
        h = tl.load(state + place, mask=known, other=0.0)
    return h


@triton.jit
def load_sizes(delta, bias, step, steps, stride, inside):
    """Loads delta, its bias added, and computes Δ, 0 behind the last step: nothing decays there, and nothing enters."""
    before = load_tile(delta, step, steps, stride, inside) + bias
    return before, tl.where(step < steps, softplus(before), 0.0)


@triton.jit
def advance(h, rates, size, entering, b):
    """Computes the state after a step of size Δ from A log2 e and Δ x."""
    return tl.exp2(rates * size) * h + entering * b


@triton.jit
def columns_of(tile, LOG_STRIDE: tl.constexpr):
    """Returns the columns of a tile of 2^LOG_STRIDE."""
    parts = (tile,)
    for level in tl.static_range(LOG_STRIDE):
        even, odd = (), ()
        for i in tl.static_range(2**level):
            pairs = tl.reshape(parts[i], [tile.shape[0], 2 ** (LOG_STRIDE - level - 1), 2])
            first, second = tl.split(pairs)
            # Triton unpacks no tuple into another.
            even = even + (first,)  # type: ignore[assignment]  # noqa: RUF005
            odd = odd + (second,)  # type: ignore[assignment]  # noqa: RUF005
        parts = even + odd  # type: ignore[assignment]
    return parts


@triton.jit
def tile_of(columns, LOG_STRIDE: tl.constexpr):
    """Returns the tile of 2^LOG_STRIDE columns."""
    parts = columns
    for level in tl.static_range(LOG_STRIDE):
        wider = ()
        for i in tl.static_range(2 ** (LOG_STRIDE - level - 1)):
            both = tl.join(parts[i], parts[i + 2 ** (LOG_STRIDE - level - 1)])
            wider = wider + (tl.reshape(both, [columns[0].shape[0], 2 ** (level + 1)]),)  # type: ignore[assignment]  # noqa: RUF005
        parts = wider
    return parts[0]


@triton.jit
def through(h, x, delta, B, bias, rates, start, steps, x_s, delta_s, B_s, inside, is_state, LOG_STRIDE: tl.constexpr):
    """Computes the state after a group of steps, and the sizes of these."""
    step = (start + tl.arange(0, 2**LOG_STRIDE)).to(tl.int64)[None, :]
    _, size = load_sizes(delta, bias, step, steps, delta_s, inside)
    inputs = load_tile(x, step, steps, x_s, inside)
    sizes, entering = columns_of(size, LOG_STRIDE), columns_of(size * inputs, LOG_STRIDE)
    for i in tl.static_range(2**LOG_STRIDE):
        h = advance(h, rates, sizes[i], entering[i], load_shared(B, start + i, steps, B_s, is_state))
    return h, size


def block(channels: int, states: int) -> tuple[int, int, int]:
    """Returns BLOCK_CHANNELS, BLOCK_STATES and how many blocks hold the channels."""
    block_states = triton.next_power_of_2(states)
    block_channels = min(64, TILE // block_states)
    return block_channels, block_states, -(-channels // block_channels)


def options(call: SelectiveScan | SelectiveScanBackward, is_backward: bool = False) -> dict[str, int]:
    """Returns what the passes are compiled with.

    Registers for four programs a multiprocessor; for three in the backward and of wide states, for two in fp32, whose
    loads take twice as many. Left to itself, the assembler takes those or spills a word to fit one more.
    """
    registers = 168 if is_backward or call.A.shape[1] > 32 else 128
    return {"num_warps": WARPS, "maxnreg": 192 if call.x.dtype == torch.float32 else registers}


def shared_arguments(call: SelectiveScan | SelectiveScanBackward) -> dict[str, Any]:
    """Returns the arguments that all passes have."""
    _, steps, channels = call.x.shape
    states = call.A.shape[1]
    block_channels, block_states, _ = block(channels, states)
    return {
        "delta": call.delta, "A": call.A, "delta_bias": call.delta_bias, "channels": channels, "steps": steps,
        **strides("delta", call.delta),
        "STATES": states, "BLOCK_CHANNELS": block_channels, "BLOCK_STATES": block_states,
    }  # fmt: skip
