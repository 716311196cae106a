"""The real-gated linear recurrent unit, its gates and its recurrence: one pass each way.

With s the logistic function, λ = 8 softplus(recurrent_param), and the state h before a step, which is 0 at a reset:

    i = s(input_gate)        r = s(recurrence_gate)        log a = -λ r        m = √(1 - a²), at a reset 1
    y = h' = a h + m i x

Backward, from the last step to the first, with g the gradient of h', dy included, and m' = min(1 / 2m, 1000):

    dx = g m i        dinput_gate = g m x i (1 - i)        dh = a g, at a reset 0
    dlog a = g (a h - 2 a² m' i x), at a reset 0
    drecurrence_gate = -λ r (1 - r) dlog a        dλ = -Σ r dlog a        drecurrent_param = 8 s(recurrent_param) dλ

1 - a² is formed without a, since a channel that keeps nearly all has an a whose digits are spent on its nearness to 1.

Why it is fast: x and both gates are read once, the state stays in registers. For the backward the forward keeps the
state before every 8th step, 0.5 bytes for each number of x; the backward computes those between again. Steps are taken
one after the other: at batch 8 a width of 2,560 makes 640 warps, and arithmetic bounds a step, not memory.

drecurrent_param leaves as a partial sum for each sequence, which a second launch adds up in one order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tfm.kernels.activations import exp, logistic, softplus
from tfm.kernels.recurrence import CHANNELS, OPTIONS, channels_of, programs, steps_from, strides
from tfm.kernels.rows import sum_partials
from tfm.kernels.tape import Tape
from tfm.operators.recurrence import KEPT_EVERY
from tfm.operators.rg_lru import RgLru, RgLruBackward

C = tl.constexpr(8.0)
# Where the root would be steeper than 1000.
LEAST = tl.constexpr(0.25 / 1000.0**2)


@triton.jit
def minus_expm1(x, decay):
    """Computes 1 - e^x of x <= 0, whose e^x is `decay`, to all digits near 0, too."""
    series = 1.0 / 40320
    series = series * x + 1.0 / 5040
    series = series * x + 1.0 / 720
    series = series * x + 1.0 / 120
    series = series * x + 1.0 / 24
    series = series * x + 1.0 / 6
    series = series * x + 0.5
    return tl.where(x > -0.35, -(x + series * x * x), 1.0 - decay)


@triton.jit
def kept_and_left(recurrence_gate, rate):
    """Computes r, r (1 - r), a and 1 - a² of log a = -rate r."""
    r, d_r = logistic(recurrence_gate)
    log_a = -rate * r
    a = exp(log_a, 0.0)
    return r, d_r, a, minus_expm1(2.0 * log_a, a * a)


@triton.jit
def advance(h, x, input_gate, recurrence_gate, fresh, rate):
    """Computes the state after a step."""
    i, _ = logistic(input_gate)
    _, _, a, left = kept_and_left(recurrence_gate, rate)
    return tl.where(fresh, i * x, a * h + tl.sqrt(left) * (i * x))


@triton.jit
def resets_from(reset, start, steps, stride, COUNT: tl.constexpr):
    """Loads which of COUNT steps begin anew; `reset` points at the sequence's steps, None resets nothing."""
    loaded = ()
    for i in tl.static_range(COUNT):
        fresh = start < 0
        if reset is not None:
            step = start + i
            fresh = tl.load(reset + step.to(tl.int64) * stride, mask=step < steps, other=0) != 0
        # Triton unpacks no tuple into another.
        loaded = loaded + (fresh,)  # type: ignore[assignment]  # noqa: RUF005
    return loaded


@triton.jit(do_not_specialize=["steps"])
def rg_lru_forward_kernel(
    x, input_gate, recurrence_gate, recurrent_param, reset, initial_state, y, final_state, kept, channels, steps,
    x_b, x_s, x_d, input_b, input_s, input_d, recurrence_b, recurrence_s, recurrence_d, reset_b, reset_s, y_b, y_s, y_d,
    KEEPS: tl.constexpr, STRIDE: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Each program goes through BLOCK_CHANNELS channels of one sequence, STRIDE steps at a time."""
    sequence, channel, inside = channels_of(channels, BLOCK_CHANNELS)
    x += sequence * x_b + channel * x_d
    input_gate += sequence * input_b + channel * input_d
    recurrence_gate += sequence * recurrence_b + channel * recurrence_d
    y += sequence * y_b + channel * y_d
    if reset is not None:
        reset += sequence * reset_b
    chunks = tl.maximum(tl.cdiv(steps, STRIDE), 1)
    kept += sequence * chunks * channels + channel
    place = sequence * channels + channel
    rate = C * softplus(tl.load(recurrent_param + channel, mask=inside, other=0.0).to(tl.float32))
    if initial_state is not None:
        h = tl.load(initial_state + place, mask=inside, other=0.0)
    else:
        h = tl.zeros([BLOCK_CHANNELS], tl.float32)
    # Once even where there is no step: the backward asks for the state before the first.
    for chunk in range(chunks):
        start = chunk * STRIDE
        if KEEPS:
            tl.store(kept, h, mask=inside)
            kept += channels
        value = steps_from(x, start, steps, x_s, inside, STRIDE)
        entering = steps_from(input_gate, start, steps, input_s, inside, STRIDE)
        staying = steps_from(recurrence_gate, start, steps, recurrence_s, inside, STRIDE)
        fresh = resets_from(reset, start, steps, reset_s, STRIDE)
        for i in tl.static_range(STRIDE):
            step = start + i
            h = tl.where(step < steps, advance(h, value[i], entering[i], staying[i], fresh[i], rate), h)
            tl.store(y + step.to(tl.int64) * y_s, h, mask=inside & (step < steps))
    tl.store(final_state + place, h, mask=inside)


@triton.jit(do_not_specialize=["steps"])
def rg_lru_backward_kernel(
    dy, dfinal_state, x, input_gate, recurrence_gate, recurrent_param, reset, kept,
    dx, dinput_gate, drecurrence_gate, dinitial_state, partials, channels, steps,
    dy_b, dy_s, dy_d, x_b, x_s, x_d, input_b, input_s, input_d, recurrence_b, recurrence_s, recurrence_d,
    reset_b, reset_s, dx_b, dx_s, dx_d, dinput_b, dinput_s, dinput_d, drecurrence_b, drecurrence_s, drecurrence_d,
    STRIDE: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Covers the same channels from the last step to the first; partials [sequences, channels] get drecurrent_param."""
    sequence, channel, inside = channels_of(channels, BLOCK_CHANNELS)
    dy += sequence * dy_b + channel * dy_d
    x += sequence * x_b + channel * x_d
    input_gate += sequence * input_b + channel * input_d
    recurrence_gate += sequence * recurrence_b + channel * recurrence_d
    dx += sequence * dx_b + channel * dx_d
    dinput_gate += sequence * dinput_b + channel * dinput_d
    drecurrence_gate += sequence * drecurrence_b + channel * drecurrence_d
    if reset is not None:
        reset += sequence * reset_b
    chunks = tl.maximum(tl.cdiv(steps, STRIDE), 1)
    kept += (sequence * chunks + chunks - 1) * channels + channel
    place = sequence * channels + channel
    param = tl.load(recurrent_param + channel, mask=inside, other=0.0).to(tl.float32)
    rate = C * softplus(param)
    d_rate = tl.zeros([BLOCK_CHANNELS], tl.float32)
    if dfinal_state is not None:
        g = tl.load(dfinal_state + place, mask=inside, other=0.0)
    else:
        g = tl.zeros([BLOCK_CHANNELS], tl.float32)

    for chunk in range(chunks):
        start = (chunks - 1 - chunk) * STRIDE
        h = tl.load(kept, mask=inside, other=0.0)
        kept -= channels
        value = steps_from(x, start, steps, x_s, inside, STRIDE)
        entering = steps_from(input_gate, start, steps, input_s, inside, STRIDE)
        staying = steps_from(recurrence_gate, start, steps, recurrence_s, inside, STRIDE)
        d_y = steps_from(dy, start, steps, dy_s, inside, STRIDE)
        fresh = resets_from(reset, start, steps, reset_s, STRIDE)
        states = ()
        for i in tl.static_range(STRIDE):
            states = states + (h,)  # type: ignore[assignment]  # noqa: RUF005
            h = advance(h, value[i], entering[i], staying[i], fresh[i], rate)
        some_rate = tl.zeros([BLOCK_CHANNELS], tl.float32)
        for back in tl.static_range(STRIDE):
            step = start + (STRIDE - 1 - back)
            known = step < steps
            x_now, anew = value[STRIDE - 1 - back], fresh[STRIDE - 1 - back]
            i_now, d_i = logistic(entering[STRIDE - 1 - back])
            r, d_r, a, left = kept_and_left(staying[STRIDE - 1 - back], rate)
            m = tl.where(anew, 1.0, tl.sqrt(left))
            steep = 0.5 * tl.rsqrt(tl.maximum(left, LEAST))
            g_now = g + d_y[STRIDE - 1 - back]
            d_log = g_now * (a * states[STRIDE - 1 - back] - 2.0 * a * a * steep * (i_now * x_now))
            d_log = tl.where(anew, 0.0, d_log)
            place_of_step = step.to(tl.int64)
            tl.store(dx + place_of_step * dx_s, g_now * m * i_now, mask=inside & known)
            tl.store(dinput_gate + place_of_step * dinput_s, g_now * m * x_now * d_i, mask=inside & known)
            tl.store(drecurrence_gate + place_of_step * drecurrence_s, -rate * d_r * d_log, mask=inside & known)
            some_rate -= tl.where(known, r * d_log, 0.0)
            g = tl.where(known, tl.where(anew, 0.0, a * g_now), g)
        d_rate += some_rate

    tl.store(dinitial_state + place, g, mask=inside)
    share, _ = logistic(param)
    tl.store(partials + place, d_rate * C * share, mask=inside)


def rg_lru(tape: Tape, call: RgLru) -> tuple[Tensor, Tensor, Tensor]:
    """Computes (y, final_state, kept) of the operator. One launch."""
    y, final_state, kept = outputs = tape.outputs(call)
    if (grid := programs(call.x)) == 0:
        return outputs
    tape.launch(
        rg_lru_forward_kernel, (grid,), OPTIONS,
        **_shared(call), **strides("y", y), initial_state=call.initial_state, y=y, final_state=final_state, kept=kept,
        KEEPS=call.kept_every > 0,
    )  # fmt: skip
    return outputs


def rg_lru_backward(tape: Tape, call: RgLruBackward) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Computes (dx, dinput_gate, drecurrence_gate, drecurrent_param, dinitial_state) of the operator. Two launches."""
    dx, dinput_gate, drecurrence_gate, drecurrent_param, dinitial_state = outputs = tape.outputs(call)
    batch, _, channels = call.x.shape
    if (grid := programs(call.x)) == 0:
        drecurrent_param.zero_()
        return outputs
    partials = tape.empty((batch, 1, channels), dinitial_state.dtype, dinitial_state.device)
    tape.launch(
        rg_lru_backward_kernel, (grid,), OPTIONS,
        **_shared(call), **strides("dy", call.dy), **strides("dx", dx), **strides("dinput", dinput_gate),
        **strides("drecurrence", drecurrence_gate),
        dy=call.dy, dfinal_state=call.dfinal_state, kept=call.kept, dx=dx, dinput_gate=dinput_gate,
        drecurrence_gate=drecurrence_gate, dinitial_state=dinitial_state, partials=partials,
    )  # fmt: skip
    sum_partials(tape, partials, drecurrent_param)
    return outputs


def _shared(call: RgLru | RgLruBackward) -> dict:
    """Returns the arguments that both kernels have."""
    reset_b, reset_s = (0, 0) if call.reset is None else call.reset.stride()
    return {
        "x": call.x, "input_gate": call.input_gate, "recurrence_gate": call.recurrence_gate,
        "recurrent_param": call.recurrent_param, "reset": call.reset,
        "channels": call.x.shape[2], "steps": call.x.shape[1],
        **strides("x", call.x), **strides("input", call.input_gate), **strides("recurrence", call.recurrence_gate),
        "reset_b": reset_b, "reset_s": reset_s, "STRIDE": call.kept_every or KEPT_EVERY, "BLOCK_CHANNELS": CHANNELS,
    }  # fmt: skip
