"""The backward: from the last step of a sequence to the first."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tfm.kernels.activations import activate_with_derivative, logistic
from tfm.kernels.recurrence import channels_of, strides
from tfm.kernels.rows import sum_partials
from tfm.kernels.selective_scan.channel_sums import sum_channels
from tfm.kernels.selective_scan.chunks import cut, gradients_behind_chunks
from tfm.kernels.selective_scan.step import (
    LN_2,
    LOG2_E,
    WARPS,
    advance,
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
    tile_of,
)  # fmt: skip
from tfm.kernels.tape import Tape
from tfm.operators.selective_scan import SelectiveScanBackward

# Of the steps whose states are in registers at once, beside what they leave.
LOG_STRIDE = 2


@triton.jit
def gather(sums, contribution, slot, SLOTS: tl.constexpr):
    """Puts the sums over each warp's channels into its row `slot` of sums [warps, SLOTS, states]."""
    rows: tl.constexpr = sums.shape[0]
    own = tl.sum(tl.reshape(contribution, [rows, SLOTS, sums.shape[2]]), axis=1, keep_dims=True)
    return tl.where(tl.arange(0, SLOTS)[None, :, None] == slot, own, sums)


@triton.jit(do_not_specialize=["sequences", "steps", "chunk_steps"])
def selective_scan_backward_kernel(
    dy, dfinal_state, x, delta, A, B, C, D, z, delta_bias, kept, dx, ddelta, dz, dinitial_state, of_channels, partials,
    sequences, channels, steps, chunk_steps,
    dy_b, dy_s, dy_d, x_b, x_s, x_d, delta_b, delta_s, delta_d, B_b, B_s, B_d, C_b, C_s, C_d, z_b, z_s, z_d,
    dx_b, dx_s, dx_d, ddelta_b, ddelta_s, ddelta_d, dz_b, dz_s, dz_d,
    STATES: tl.constexpr, LOG_STRIDE: tl.constexpr, REACH: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, BLOCK_STATES: tl.constexpr,
):  # fmt: skip
    """Covers the same channels from the last step to the first; of REACH groups of steps the first has a kept state.

    dfinal_state and dinitial_state have a state for each chunk.
    of_channels [2, blocks, sequences, steps, STATES] gets dB and dC of the block's channels, partials
    [sequences, chunks, STATES + 2, channels] dA, dD and ddelta_bias of the chunk.
    """
    STRIDE: tl.constexpr = 2**LOG_STRIDE
    sequence, channel, inside = channels_of(channels, BLOCK_CHANNELS)
    blocks = tl.cdiv(channels, BLOCK_CHANNELS)
    part = sequences.to(tl.int64) * steps * STATES
    of_channels += tl.program_id(0) % blocks * part + sequence * steps * STATES
    channel, inside, state = channel[:, None], inside[:, None], tl.arange(0, BLOCK_STATES)[None, :]
    dy += sequence * dy_b + channel * dy_d
    x += sequence * x_b + channel * x_d
    delta += sequence * delta_b + channel * delta_d
    dx += sequence * dx_b + channel * dx_d
    ddelta += sequence * ddelta_b + channel * ddelta_d
    B += sequence * B_b + state * B_d
    C += sequence * C_b + state * C_d
    if z is not None:
        z += sequence * z_b + channel * z_d
        dz += sequence * dz_b + channel * dz_d
    known = inside & (state < STATES)
    is_state = tl.broadcast_to(state < STATES, known.shape)
    place = channel * STATES + state
    groups = tl.maximum(tl.cdiv(steps, STRIDE), 1)
    rates = load_state(A, place, known).to(tl.float32) * LOG2_E
    bias, skip = load_vector(delta_bias, channel, inside), load_vector(D, channel, inside)
    chunk = sequence * tl.num_programs(1) + tl.program_id(1)
    g = load_state(dfinal_state, chunk * channels * STATES + place, known)
    chunk_groups = chunk_steps // STRIDE
    first = tl.program_id(1) * chunk_groups
    last = tl.minimum(first + chunk_groups, groups) - 1
    d_rates = tl.zeros([BLOCK_CHANNELS, BLOCK_STATES], tl.float32)
    d_skip = tl.zeros([BLOCK_CHANNELS, 1], tl.float32)
    d_bias = tl.zeros([BLOCK_CHANNELS, 1], tl.float32)

    for back in range(last + 1 - first):
        group = last - back
        start = group * STRIDE
        step = (start + tl.arange(0, STRIDE)).to(tl.int64)[None, :]
        there = inside & (step < steps)
        inputs = load_tile(x, step, steps, x_s, inside)
        before_size, size = load_sizes(delta, bias, step, steps, delta_s, inside)
        d_y = load_tile(dy, step, steps, dy_s, inside)
        d_seen = d_y
        if z is not None:
            gate, d_gate = activate_with_derivative(load_tile(z, step, steps, z_s, inside), "silu")
            d_seen *= gate
        sizes, values = columns_of(size, LOG_STRIDE), columns_of(inputs, LOG_STRIDE)
        at = group // REACH
        h = load_state(kept, (sequence * tl.cdiv(groups, REACH) + at) * channels * STATES + place, known)
        for ahead in range(group - at * REACH):
            earlier = (at * REACH + ahead) * STRIDE
            h, _ = through(h, x, delta, B, bias, rates, earlier, steps, x_s, delta_s, B_s, inside, is_state, LOG_STRIDE)
        states, seen = (h,), ()
        for i in tl.static_range(STRIDE):
            h = advance(h, rates, sizes[i], sizes[i] * values[i], load_shared(B, start + i, steps, B_s, is_state))
            states = states + (h,)  # type: ignore[assignment]  # noqa: RUF005
            if z is not None:
                c = load_shared(C, start + i, steps, C_s, is_state)
                seen = seen + (tl.sum(c * h, axis=1, keep_dims=True) + skip * values[i],)  # type: ignore[assignment]  # noqa: RUF005
        if z is not None:
            d_z = tile_of(seen, LOG_STRIDE) * (d_y * d_gate)
            tl.store(dz + step * dz_s, d_z, mask=there)

        arriving = columns_of(d_seen, LOG_STRIDE)
        some_rates = tl.zeros([BLOCK_CHANNELS, BLOCK_STATES], tl.float32)
        d_b = tl.zeros([BLOCK_CHANNELS // SLOTS, SLOTS, BLOCK_STATES], tl.float32)
        d_c = tl.zeros([BLOCK_CHANNELS // SLOTS, SLOTS, BLOCK_STATES], tl.float32)
        some_skip = tl.zeros([BLOCK_CHANNELS, 1], tl.float32)
        d_inputs, d_sizes = (), ()
        for i in tl.static_range(STRIDE - 1, -1, -1):
            b = load_shared(B, start + i, steps, B_s, is_state)
            c = load_shared(C, start + i, steps, C_s, is_state)
            d_c = gather(d_c, states[i + 1] * arriving[i], i % SLOTS, SLOTS)
            g += c * arriving[i]
            d_b = gather(d_b, g * (sizes[i] * values[i]), i % SLOTS, SLOTS)
            d_entering = tl.sum(g * b, axis=1, keep_dims=True)
            g *= tl.exp2(rates * sizes[i])
            d_decay = g * states[i]
            some_rates += d_decay * sizes[i]
            d_size = values[i] * d_entering + LN_2 * tl.sum(d_decay * rates, axis=1, keep_dims=True)
            some_skip += values[i] * arriving[i]
            d_inputs = (sizes[i] * d_entering + skip * arriving[i],) + d_inputs  # type: ignore[assignment]  # noqa: RUF005
            d_sizes = (d_size,) + d_sizes  # type: ignore[assignment]  # noqa: RUF005
            if i % SLOTS == 0:
                row = start + i + tl.arange(0, SLOTS)[:, None]
                address = of_channels + row.to(tl.int64) * STATES + state
                tl.store(address, tl.sum(d_b, axis=0), mask=(row < steps) & (state < STATES))
                tl.store(address + blocks * part, tl.sum(d_c, axis=0), mask=(row < steps) & (state < STATES))
        d_rates += some_rates
        d_skip += some_skip
        share, _ = logistic(before_size)
        d_before = tile_of(d_sizes, LOG_STRIDE) * tl.where(there, share, 0.0)
        d_bias += tl.sum(d_before, axis=1, keep_dims=True)
        tl.store(dx + step * dx_s, tile_of(d_inputs, LOG_STRIDE), mask=there)
        tl.store(ddelta + step * ddelta_s, d_before, mask=there)

    if dinitial_state is not None:
        tl.store(dinitial_state + chunk * channels * STATES + place, g, mask=known)
    partials += chunk * (STATES + 2) * channels + channel
    tl.store(partials + state * channels, d_rates, mask=known)
    partials += STATES * channels
    tl.store(partials, d_skip, mask=inside)
    tl.store(partials + channels, d_bias, mask=inside)


def selective_scan_backward(
    tape: Tape, call: SelectiveScanBackward
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """Computes (dx, ddelta, dB, dC, dz, dparameters, dinitial_state) of the operator.

    Three launches, or five where the sequence is cut into chunks.
    """
    dx, ddelta, dB, dC, dz, dparameters, dinitial_state = outputs = tape.outputs(call)
    batch, steps, channels = call.x.shape
    states = call.A.shape[1]
    block_channels, _, blocks = block(channels, states)
    if batch * blocks == 0:
        for none in (dB, dC, dparameters):
            none.zero_()
        return outputs
    chunks, chunk_steps = cut(batch, steps, channels, states)
    behind, before = call.dfinal_state, dinitial_state
    if chunks > 1:
        behind, before = gradients_behind_chunks(tape, call, chunks, chunk_steps, dinitial_state), None
    of_channels = tape.empty((2, blocks, batch, steps, states), torch.float32, call.x.device)
    partials = tape.empty((batch * chunks, 1, (states + 2) * channels), torch.float32, call.x.device)
    z, d_z = (call.x, dx) if call.z is None else (call.z, dz)
    tape.launch(
        selective_scan_backward_kernel, (batch * blocks, chunks), options(call, is_backward=True),
        **shared_arguments(call), **strides("x", call.x), **strides("B", call.B), **strides("C", call.C),
        **strides("z", z), **strides("dy", call.dy), **strides("dx", dx), **strides("ddelta", ddelta),
        **strides("dz", d_z),
        x=call.x, B=call.B, C=call.C, D=call.D, z=call.z, kept=call.kept, dy=call.dy, dfinal_state=behind,
        dx=dx, ddelta=ddelta, dz=dz, dinitial_state=before, of_channels=of_channels, partials=partials,
        sequences=batch, chunk_steps=chunk_steps, LOG_STRIDE=LOG_STRIDE, REACH=call.kept_every >> LOG_STRIDE,
        SLOTS=min(2**LOG_STRIDE, block_channels // WARPS),
    )  # fmt: skip
    sum_channels(tape, of_channels, dB, dC)
    sum_partials(tape, partials, dparameters)
    return outputs
