"""Chunks of a sequence, side by side, where sequences and channels are too few for a GPU.

The state after a chunk is that after the same chunk from zeros, and the state before it times e^(A Σ Δ), with Σ Δ the
sum of the chunk's steps. So one launch goes through all chunks from zeros, a second from one chunk to the next, and the
pass itself is given the state before each. So is the backward, from the right: the gradient of the state before a chunk
is that of the chunk alone, and the gradient of the state after it times the same. That is half as much work again or
more, in a third of the time or less. Into how many chunks a sequence is cut depends on sizes alone.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tfm.kernels.activations import activate
from tfm.kernels.recurrence import CHANNELS, channels_of, steps_from, strides
from tfm.kernels.recurrence import OPTIONS as ONE_WARP
from tfm.kernels.selective_scan.step import (
    LOG2_E,
    block,
    columns_of,
    load_shared,
    load_sizes,
    load_state,
    load_tile,
    load_vector,
    options,
    shared_arguments,
    through,
)
from tfm.kernels.tape import Tape
from tfm.operators.selective_scan import KEPT_EVERY, SelectiveScan, SelectiveScanBackward

# Three programs on each multiprocessor of the largest GPU; what would not be cut in three is not cut. Chunks begin
# where a state is kept, and have four such groups of steps, at least.
PROGRAMS, FEWEST, LEAST_GROUPS = 396, 3, 4
# Of the steps that are loaded at once.
LOG_STRIDE = 3
# Chunks whose states are loaded at once.
TOGETHER = 8


@triton.jit(do_not_specialize=["steps", "chunk_steps"])
def selective_scan_chunk_states_kernel(
    x, delta, A, B, delta_bias, ends, sizes, channels, steps, chunk_steps,
    x_b, x_s, x_d, delta_b, delta_s, delta_d, B_b, B_s, B_d,
    STATES: tl.constexpr, LOG_STRIDE: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_STATES: tl.constexpr,
):  # fmt: skip
    """Each program goes through a chunk of BLOCK_CHANNELS channels: ends gets the state, sizes Σ Δ."""
    STRIDE: tl.constexpr = 2**LOG_STRIDE
    sequence, channel, inside = channels_of(channels, BLOCK_CHANNELS)
    channel, inside, state = channel[:, None], inside[:, None], tl.arange(0, BLOCK_STATES)[None, :]
    x += sequence * x_b + channel * x_d
    delta += sequence * delta_b + channel * delta_d
    B += sequence * B_b + state * B_d
    known = inside & (state < STATES)
    is_state = tl.broadcast_to(state < STATES, known.shape)
    place = channel * STATES + state
    rates = load_state(A, place, known).to(tl.float32) * LOG2_E
    bias = load_vector(delta_bias, channel, inside)
    h = tl.zeros([BLOCK_CHANNELS, BLOCK_STATES], tl.float32)
    total = tl.zeros([BLOCK_CHANNELS, 1], tl.float32)
    chunk_groups = chunk_steps // STRIDE
    first = tl.program_id(1) * chunk_groups
    for group in range(chunk_groups):
        start = (first + group) * STRIDE
        h, size = through(h, x, delta, B, bias, rates, start, steps, x_s, delta_s, B_s, inside, is_state, LOG_STRIDE)
        total += tl.sum(size, axis=1, keep_dims=True)
    chunk = sequence * tl.num_programs(1) + tl.program_id(1)
    tl.store(ends + chunk * channels * STATES + place, h, mask=known)
    tl.store(sizes + chunk * channels + channel, total, mask=inside)


@triton.jit(do_not_specialize=["steps", "chunk_steps"])
def selective_scan_chunk_gradients_kernel(
    dy, delta, A, C, z, delta_bias, ends, sizes, channels, steps, chunk_steps,
    dy_b, dy_s, dy_d, delta_b, delta_s, delta_d, C_b, C_s, C_d, z_b, z_s, z_d,
    STATES: tl.constexpr, LOG_STRIDE: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_STATES: tl.constexpr,
):  # fmt: skip
    """Goes through the same chunks from their last steps: ends gets the gradient of the state before each."""
    STRIDE: tl.constexpr = 2**LOG_STRIDE
    sequence, channel, inside = channels_of(channels, BLOCK_CHANNELS)
    channel, inside, state = channel[:, None], inside[:, None], tl.arange(0, BLOCK_STATES)[None, :]
    dy += sequence * dy_b + channel * dy_d
    delta += sequence * delta_b + channel * delta_d
    C += sequence * C_b + state * C_d
    if z is not None:
        z += sequence * z_b + channel * z_d
    known = inside & (state < STATES)
    is_state = tl.broadcast_to(state < STATES, known.shape)
    place = channel * STATES + state
    rates = load_state(A, place, known).to(tl.float32) * LOG2_E
    bias = load_vector(delta_bias, channel, inside)
    g = tl.zeros([BLOCK_CHANNELS, BLOCK_STATES], tl.float32)
    total = tl.zeros([BLOCK_CHANNELS, 1], tl.float32)
    chunk_groups = chunk_steps // STRIDE
    last = (tl.program_id(1) + 1) * chunk_groups - 1
    for back in range(chunk_groups):
        start = (last - back) * STRIDE
        step = (start + tl.arange(0, STRIDE)).to(tl.int64)[None, :]
        _, size = load_sizes(delta, bias, step, steps, delta_s, inside)
        d_seen = load_tile(dy, step, steps, dy_s, inside)
        if z is not None:
            d_seen *= activate(load_tile(z, step, steps, z_s, inside), "silu")
        total += tl.sum(size, axis=1, keep_dims=True)
        steps_sizes, arriving = columns_of(size, LOG_STRIDE), columns_of(d_seen, LOG_STRIDE)
        for i in tl.static_range(STRIDE - 1, -1, -1):
            g += load_shared(C, start + i, steps, C_s, is_state) * arriving[i]
            g *= tl.exp2(rates * steps_sizes[i])
    chunk = sequence * tl.num_programs(1) + tl.program_id(1)
    tl.store(ends + chunk * channels * STATES + place, g, mask=known)
    tl.store(sizes + chunk * channels + channel, total, mask=inside)


@triton.jit(do_not_specialize=["chunks"])
def selective_scan_carry_kernel(
    A, states, sizes, first, last, channels, chunks,
    IS_BACKWARD: tl.constexpr, STATES: tl.constexpr, TOGETHER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each program goes from chunk to chunk with BLOCK numbers of a sequence's state: `states` get those before each.

    IS_BACKWARD: from the last chunk to the first.
    """
    numbers = channels * STATES
    sequence, number, inside = channels_of(numbers, BLOCK)
    channel, place = number // STATES, sequence * numbers + number
    rates = tl.load(A + number, mask=inside, other=0.0).to(tl.float32) * LOG2_E
    apart, channels_apart = tl.cast(numbers, tl.int64), tl.cast(channels, tl.int64)
    states += sequence * chunks * numbers + number
    sizes += sequence * chunks * channels + channel
    if IS_BACKWARD:
        states += (chunks - 1) * apart
        sizes += (chunks - 1) * channels_apart
        apart, channels_apart = -apart, -channels_apart
    h = load_state(first, place, inside)
    for group in range(tl.cdiv(chunks, TOGETHER)):
        start = group * TOGETHER
        ends = steps_from(states, start, chunks, apart, inside, TOGETHER)
        total = steps_from(sizes, start, chunks, channels_apart, inside, TOGETHER)
        for i in tl.static_range(TOGETHER):
            tl.store(states + (start + i) * apart, h, mask=inside & (start + i < chunks))
            h = tl.exp2(rates * total[i]) * h + ends[i]
    tl.store(last + place, h, mask=inside)


def cut(batch: int, steps: int, channels: int, states: int) -> tuple[int, int]:
    """Returns into how many chunks a sequence is cut, and how many steps each has."""
    _, _, blocks = block(channels, states)
    groups = max(1, -(-steps // KEPT_EVERY))
    chunks = min(PROGRAMS // (batch * blocks), groups // LEAST_GROUPS)
    if chunks < FEWEST:
        return 1, groups * KEPT_EVERY
    chunk_groups = -(-groups // chunks)
    return -(-groups // chunk_groups), chunk_groups * KEPT_EVERY


def states_before_chunks(
    tape: Tape, call: SelectiveScan, chunks: int, chunk_steps: int, final_state: Tensor
) -> Tensor:  # fmt: skip
    """Returns the states [B, chunks, D, N] before chunks, and fills the state after the last one. Two launches."""
    ends, sizes, shared = _from_zeros(tape, call, chunks, chunk_steps)
    _, _, blocks = block(*call.A.shape)
    tape.launch(
        selective_scan_chunk_states_kernel, (call.x.shape[0] * blocks, chunks), options(call),
        **shared, **strides("x", call.x), **strides("B", call.B),
        x=call.x, B=call.B,
    )  # fmt: skip
    _carry(tape, call.A, ends, sizes, call.initial_state, final_state, is_backward=False)
    return ends


def gradients_behind_chunks(
    tape: Tape, call: SelectiveScanBackward, chunks: int, chunk_steps: int, dinitial_state: Tensor
) -> Tensor:  # fmt: skip
    """Returns the gradients of the states after chunks, and fills that of the state before all. Two launches."""
    ends, sizes, shared = _from_zeros(tape, call, chunks, chunk_steps)
    _, _, blocks = block(*call.A.shape)
    z = call.x if call.z is None else call.z
    tape.launch(
        selective_scan_chunk_gradients_kernel, (call.x.shape[0] * blocks, chunks), options(call),
        **shared, **strides("dy", call.dy), **strides("C", call.C), **strides("z", z),
        dy=call.dy, C=call.C, z=call.z,
    )  # fmt: skip
    _carry(tape, call.A, ends, sizes, call.dfinal_state, dinitial_state, is_backward=True)
    return ends


def _from_zeros(
    tape: Tape, call: SelectiveScan | SelectiveScanBackward, chunks: int, chunk_steps: int
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Returns memory for what each chunk makes of zeros, for its Σ Δ, and the arguments of both kernels for that."""
    channels, states = call.A.shape
    ends = tape.empty((call.x.shape[0], chunks, channels, states), torch.float32, call.x.device)
    sizes = tape.empty((call.x.shape[0], chunks, channels), torch.float32, call.x.device)
    rest = {"ends": ends, "sizes": sizes, "chunk_steps": chunk_steps, "LOG_STRIDE": LOG_STRIDE}
    return ends, sizes, shared_arguments(call) | rest


def _carry(
    tape: Tape, A: Tensor, states: Tensor, sizes: Tensor, first: Tensor | None, last: Tensor, *, is_backward: bool
) -> None:  # fmt: skip
    batch, chunks, channels, numbers = states.shape
    tape.launch(
        selective_scan_carry_kernel, (batch * -(-channels * numbers // CHANNELS),), ONE_WARP,
        A=A, states=states, sizes=sizes, first=first, last=last, channels=channels, chunks=chunks,
        IS_BACKWARD=is_backward, STATES=numbers, TOGETHER=TOGETHER, BLOCK=CHANNELS,
    )  # fmt: skip
