"""A causal convolution over each channel's own sequence, with bias and SiLU: one pass each way.

Forward, of a channel with W weights, where x before the first step is the initial state or 0:

    z[t] = bias + Σ_k w[k] · x[t - W + 1 + k]        y = z, or z · s(z) with s the logistic function

Backward, with dz = dy, or dy · s(z) (1 + z (1 - s(z))), and z computed again:

    dx[t] = Σ_k w[k] · dz[t + W - 1 - k]        dw[k] = Σ_t dz[t] · x[t - W + 1 + k]        dbias = Σ_t dz[t]

The final state is the last W - 1 steps of x, state included; its gradient is added to theirs, and what falls before the
first step is the initial state's.

Why it is fast: a tile of channels by steps is read from memory once, its shifted neighbours from the first-level cache;
each way moves x and y, or x, dy and dx, once. Strides are those of x, whichever of channels and steps lie side by side.
dw and dbias leave as a partial sum for each tile of steps, which a second launch adds up in one order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tfm.kernels.activations import activate, activate_with_derivative
from tfm.kernels.rows import sum_partials
from tfm.kernels.tape import Tape
from tfm.operators.causal_conv1d import CausalConv1d, CausalConv1dBackward

# Elements of a tile, eight a thread, and its longest extent along those that lie side by side.
TILE, LONGEST, WARPS = 1024, 128, 4


@triton.jit
def step(x, state, channel, position, steps, x_s, inside, WIDTH: tl.constexpr):
    """Loads x at these positions in fp32, [BLOCK_CHANNELS, BLOCK_STEPS]; before the first step the state, or else 0."""
    value = tl.load(x + position * x_s, mask=inside & (position >= 0) & (position < steps), other=0.0).to(tl.float32)
    if state is not None:
        before = inside & (position < 0) & (position > -WIDTH)
        place = state + channel * (WIDTH - 1) + position + WIDTH - 1
        value += tl.load(place, mask=before, other=0.0).to(tl.float32)
    return value


@triton.jit
def convolved(x, weight, bias, state, channel, position, steps, x_s, inside, WIDTH: tl.constexpr):
    """Computes z of the formulas above."""
    total = tl.zeros([channel.shape[0], position.shape[1]], tl.float32)
    if bias is not None:
        total += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    for k in tl.static_range(WIDTH):
        tap = tl.load(weight + channel * WIDTH + k, mask=inside, other=0.0).to(tl.float32)
        total += tap * step(x, state, channel, position + (k - WIDTH + 1), steps, x_s, inside, WIDTH)
    return total


@triton.jit
def tile_of(channels, steps, BLOCK_CHANNELS: tl.constexpr, BLOCK_STEPS: tl.constexpr):
    """Returns a program's sequence, channels [BLOCK_CHANNELS, 1], steps [1, BLOCK_STEPS] and step tile."""
    step_tiles, channel_tiles = tl.maximum(tl.cdiv(steps, BLOCK_STEPS), 1), tl.cdiv(channels, BLOCK_CHANNELS)
    program = tl.program_id(0)
    tile, rest = program % step_tiles, program // step_tiles
    channel = (rest % channel_tiles * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS))[:, None]
    position = (tile * BLOCK_STEPS + tl.arange(0, BLOCK_STEPS))[None, :]
    return (rest // channel_tiles).to(tl.int64), channel.to(tl.int64), position.to(tl.int64), tile


@triton.jit(do_not_specialize=["steps"])
def causal_conv1d_forward_kernel(
    x, weight, bias, initial_state, y, final_state, channels, steps, x_b, x_d, x_s, y_b, y_d, y_s,
    SILU: tl.constexpr, WIDTH: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_STEPS: tl.constexpr,
):  # fmt: skip
    """Each program computes BLOCK_CHANNELS channels of BLOCK_STEPS steps of one sequence."""
    sequence, channel, position, tile = tile_of(channels, steps, BLOCK_CHANNELS, BLOCK_STEPS)
    inside = channel < channels
    x += sequence * x_b + channel * x_d
    if initial_state is not None:
        initial_state += sequence * channels * (WIDTH - 1)
    total = convolved(x, weight, bias, initial_state, channel, position, steps, x_s, inside, WIDTH)
    if SILU:
        total = activate(total, "silu")
    y += sequence * y_b + channel * y_d
    final_state += (sequence * channels + channel) * (WIDTH - 1)
    tl.store(y + position * y_s, total, mask=inside & (position < steps))
    if tile == 0:
        for k in tl.static_range(WIDTH - 1):
            last = tl.zeros([1, 1], tl.int64) + steps + (k - WIDTH + 1)
            tl.store(final_state + k, step(x, initial_state, channel, last, steps, x_s, inside, WIDTH), mask=inside)


@triton.jit(do_not_specialize=["steps"])
def causal_conv1d_backward_kernel(
    dy, dfinal_state, x, weight, bias, initial_state, dx, dinitial_state, partials,
    channels, steps, dy_b, dy_d, dy_s, x_b, x_d, x_s, dx_b, dx_d, dx_s,
    SILU: tl.constexpr, WIDTH: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_STEPS: tl.constexpr,
):  # fmt: skip
    """Covers the same tiles; partials [sequences · step tiles, channels · (WIDTH + 1)] get their dw and dbias."""
    sequence, channel, position, tile = tile_of(channels, steps, BLOCK_CHANNELS, BLOCK_STEPS)
    inside = channel < channels
    x += sequence * x_b + channel * x_d
    dy += sequence * dy_b + channel * dy_d
    dx += sequence * dx_b + channel * dx_d
    state_first = (sequence * channels + channel) * (WIDTH - 1)
    if initial_state is not None:
        initial_state += sequence * channels * (WIDTH - 1)
    if dfinal_state is not None:
        dfinal_state += state_first
    row = sequence * tl.maximum(tl.cdiv(steps, BLOCK_STEPS), 1) + tile
    partials += row * channels * (WIDTH + 1)

    total = tl.zeros([BLOCK_CHANNELS, BLOCK_STEPS], tl.float32)
    for ahead in tl.static_range(WIDTH):
        d_z = gradient(
            dy, x, weight, bias, initial_state, channel, position + ahead, steps, dy_s, x_s, inside, SILU, WIDTH
        )
        tap = tl.load(weight + channel * WIDTH + (WIDTH - 1 - ahead), mask=inside, other=0.0).to(tl.float32)
        total += tap * d_z
        if ahead == 0:
            summed = tl.sum(d_z, axis=1, keep_dims=True)
            tl.store(partials + channels * WIDTH + channel, summed, mask=inside)
            for k in tl.static_range(WIDTH):
                value = step(x, initial_state, channel, position + (k - WIDTH + 1), steps, x_s, inside, WIDTH)
                summed = tl.sum(d_z * value, axis=1, keep_dims=True)
                tl.store(partials + channel * WIDTH + k, summed, mask=inside)
    total += from_final_state(dfinal_state, position, steps, inside, WIDTH)
    tl.store(dx + position * dx_s, total, mask=inside & (position < steps))

    if dinitial_state is not None:
        dinitial_state += state_first
        if tile == 0:
            for j in tl.static_range(WIDTH - 1):
                place = tl.zeros([1, 1], tl.int64) + (j - WIDTH + 1)
                before = tl.zeros([BLOCK_CHANNELS, 1], tl.float32)
                for ahead in tl.static_range(WIDTH):
                    if j + ahead >= WIDTH - 1:
                        at = place + ahead
                        behind = gradient(
                            dy, x, weight, bias, initial_state, channel, at, steps, dy_s, x_s, inside, SILU, WIDTH
                        )
                        tap = tl.load(weight + channel * WIDTH + (WIDTH - 1 - ahead), mask=inside, other=0.0)
                        before += tap.to(tl.float32) * behind
                before += from_final_state(dfinal_state, place, steps, inside, WIDTH)
                tl.store(dinitial_state + j, before, mask=inside)


@triton.jit
def gradient(
    dy, x, weight, bias, state, channel, position, steps, dy_s, x_s, inside,
    SILU: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Computes dz at these positions, 0 after the last step."""
    d_y = tl.load(dy + position * dy_s, mask=inside & (position < steps), other=0.0).to(tl.float32)
    if SILU:
        z = convolved(x, weight, bias, state, channel, position, steps, x_s, inside, WIDTH)
        _, derivative = activate_with_derivative(z, "silu")
        d_y *= derivative
    return d_y


@triton.jit
def from_final_state(dfinal_state, position, steps, inside, WIDTH: tl.constexpr):
    """Loads the part of dx at these positions that comes from the final state's gradient."""
    if dfinal_state is None:
        return 0.0
    else:  # noqa: RET505 - triton takes a return for the end of both branches
        place = position - steps + WIDTH - 1
        known = inside & (place >= 0) & (place < WIDTH - 1)
        return tl.load(dfinal_state + place, mask=known, other=0.0).to(tl.float32)


def causal_conv1d(tape: Tape, call: CausalConv1d) -> tuple[Tensor, Tensor]:
    """Computes (y, final_state) of the operator. One launch."""
    y, final_state = outputs = tape.outputs(call)
    if call.x.shape[0] == 0 or call.x.shape[1] == 0:
        return outputs
    programs, arguments = _arguments(call)
    tape.launch(
        causal_conv1d_forward_kernel, (programs,), {"num_warps": WARPS},
        **arguments, **_strides("x", call.x), **_strides("y", y), y=y, final_state=final_state,
    )  # fmt: skip
    return outputs


def causal_conv1d_backward(tape: Tape, call: CausalConv1dBackward) -> tuple[Tensor, Tensor | None, Tensor]:
    """Computes (dx, dinitial_state, dparameters) of the operator. Two launches."""
    dx, dinitial_state, dparameters = outputs = tape.outputs(call)
    batch, channels, steps = call.x.shape
    if batch == 0 or channels == 0:
        dparameters.zero_()
        return outputs
    programs, arguments = _arguments(call)
    rows = batch * max(1, -(-steps // arguments["BLOCK_STEPS"]))
    partials = tape.empty((rows, 1, dparameters.shape[0]), dparameters.dtype, dx.device)
    tape.launch(
        causal_conv1d_backward_kernel, (programs,), {"num_warps": WARPS},
        **arguments, **_strides("dy", call.dy), **_strides("x", call.x), **_strides("dx", dx),
        dy=call.dy, dfinal_state=call.dfinal_state, dx=dx, dinitial_state=dinitial_state, partials=partials,
    )  # fmt: skip
    sum_partials(tape, partials, dparameters)
    return outputs


def _arguments(call: CausalConv1d | CausalConv1dBackward) -> tuple[int, dict]:
    """Returns the number of programs and the arguments that both kernels share."""
    batch, channels, steps = call.x.shape
    # The tile is longest along the dimension whose elements lie side by side.
    along = min(LONGEST, triton.next_power_of_2(channels if call.x.stride(1) == 1 else max(1, steps)))
    across = TILE // LONGEST
    block_channels, block_steps = (along, across) if call.x.stride(1) == 1 else (across, along)
    # No steps still make one tile: its program stores the state.
    programs = batch * -(-channels // block_channels) * max(1, -(-steps // block_steps))
    return programs, {
        "x": call.x, "weight": call.weight, "bias": call.bias, "initial_state": call.initial_state,
        "channels": channels, "steps": steps, "SILU": call.silu, "WIDTH": call.weight.shape[1],
        "BLOCK_CHANNELS": block_channels, "BLOCK_STEPS": block_steps,
    }  # fmt: skip


def _strides(name: str, x: Tensor) -> dict[str, int]:
    return {f"{name}_{dim}": stride for dim, stride in zip("bds", x.stride(), strict=True)}
