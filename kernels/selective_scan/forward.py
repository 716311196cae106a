"""The forward: from the first step of a sequence to the last."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tfm.kernels.activations import activate
from tfm.kernels.recurrence import channels_of, strides
from tfm.kernels.selective_scan.chunks import cut, states_before_chunks
from tfm.kernels.selective_scan.step import (
    LOG2_E,
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
    tile_of,
)
from tfm.kernels.tape import Tape
from tfm.operators.selective_scan import SelectiveScan

# Of the steps that are loaded at once.
LOG_STRIDE = 3


@triton.jit(do_not_specialize=["steps", "chunk_steps"])
def selective_scan_forward_kernel(
    x, delta, A, B, C, D, z, delta_bias, initial_state, y, final_state, kept, channels, steps, chunk_steps,
    x_b, x_s, x_d, delta_b, delta_s, delta_d, B_b, B_s, B_d, C_b, C_s, C_d, z_b, z_s, z_d, y_b, y_s, y_d,
    STATES: tl.constexpr, LOG_STRIDE: tl.constexpr, REACH: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, BLOCK_STATES: tl.constexpr,
):  # fmt: skip
    """Each program goes through a chunk of BLOCK_CHANNELS channels of one sequence, 2^LOG_STRIDE steps at a time.

    initial_state and final_state have a state for each chunk, kept one for every REACH groups of steps; 0 keeps none.
    """
    STRIDE: tl.constexpr = 2**LOG_STRIDE
    sequence, channel, inside = channels_of(channels, BLOCK_CHANNELS)
    channel, inside, state = channel[:, None], inside[:, None], tl.arange(0, BLOCK_STATES)[None, :]
    x += sequence * x_b + channel * x_d
    delta += sequence * delta_b + channel * delta_d
    y += sequence * y_b + channel * y_d
    B += sequence * B_b + state * B_d
    C += sequence * C_b + state * C_d
    if z is not None:
        z += sequence * z_b + channel * z_d
    known = inside & (state < STATES)
    # Masks that say nothing of channels: B and C are there for all of them.
    is_state = tl.broadcast_to(state < STATES, known.shape)
    place = channel * STATES + state
    groups = tl.maximum(tl.cdiv(steps, STRIDE), 1)
    rates = load_state(A, place, known).to(tl.float32) * LOG2_E
    bias, skip = load_vector(delta_bias, channel, inside), load_vector(D, channel, inside)
    chunk = (sequence * tl.num_programs(1) + tl.program_id(1)) * channels * STATES
    h = load_state(initial_state, chunk + place, known)
    chunk_groups = chunk_steps // STRIDE
    first = tl.program_id(1) * chunk_groups
    # Once even where there is no step: the backward asks for the state before the first.
    for ahead in range(tl.minimum(chunk_groups, groups - first)):
        group = first + ahead
        start = group * STRIDE
        step = (start + tl.arange(0, STRIDE)).to(tl.int64)[None, :]
        if REACH:
            at = (sequence * tl.cdiv(groups, REACH) + group // REACH) * channels * STATES
            tl.store(kept + at + place, h, mask=known & (group % REACH == 0))
        inputs = load_tile(x, step, steps, x_s, inside)
        _, size = load_sizes(delta, bias, step, steps, delta_s, inside)
        sizes, entering = columns_of(size, LOG_STRIDE), columns_of(size * inputs, LOG_STRIDE)
        seen = ()
        for i in tl.static_range(STRIDE):
            h = advance(h, rates, sizes[i], entering[i], load_shared(B, start + i, steps, B_s, is_state))
            c = load_shared(C, start + i, steps, C_s, is_state)
            # Triton unpacks no tuple into another.
            seen = seen + (tl.sum(c * h, axis=1, keep_dims=True),)  # type: ignore[assignment]  # noqa: RUF005
        result = tile_of(seen, LOG_STRIDE) + skip * inputs
        if z is not None:
            result *= activate(load_tile(z, step, steps, z_s, inside), "silu")
        tl.store(y + step * y_s, result, mask=inside & (step < steps))
    if final_state is not None:
        tl.store(final_state + chunk + place, h, mask=known)


def selective_scan(tape: Tape, call: SelectiveScan) -> tuple[Tensor, Tensor, Tensor]:
    """Computes (y, final_state, kept) of the operator. One launch, or three where the sequence is cut into chunks."""
    y, final_state, kept = outputs = tape.outputs(call)
    batch, steps, _ = call.x.shape
    _, _, blocks = block(*call.A.shape)
    if batch * blocks == 0:
        return outputs
    chunks, chunk_steps = cut(batch, steps, *call.A.shape)
    before, after = call.initial_state, final_state
    if chunks > 1:
        before, after = states_before_chunks(tape, call, chunks, chunk_steps, final_state), None
    z = call.x if call.z is None else call.z
    tape.launch(
        selective_scan_forward_kernel, (batch * blocks, chunks), options(call),
        **shared_arguments(call), **strides("x", call.x), **strides("B", call.B), **strides("C", call.C),
        **strides("z", z), **strides("y", y),
        x=call.x, B=call.B, C=call.C, D=call.D, z=call.z, initial_state=before, y=y, final_state=after, kept=kept,
        chunk_steps=chunk_steps, LOG_STRIDE=LOG_STRIDE, REACH=call.kept_every >> LOG_STRIDE,
    )  # fmt: skip
    return outputs
