"""RWKV's attention by exponential decay, a state of three numbers a channel: one pass each way.

The state before step t is (a, b, p): e^p a sums the values so far with their weights, e^p b the weights alone. With u
the bonus of the step itself, w = -exp(decay), k and v the key and value of the step:

    q = max(p, u + k)        y = (e^(p-q) a + e^(u+k-q) v) / (e^(p-q) b + e^(u+k-q))
    p' = max(p + w, k)       a' = e^(p+w-p') a + e^(k-p') v        b' = e^(p+w-p') b + e^(k-p')

Of the two weights of either line one is 1 and the other e^-|difference|.

Backward, from the last step to the first, with s, z the weights of a' and n = dy / (the denominator of y):

    g = s (a da' + b db')        h = z (v da' + db')        f = e^(u+k-q) n (v - y) = -e^(p-q) n (a - b y)

    dw += dp' - h, dk += h where p' = p + w, or else dw += g, dk += dp' - g        dv += z da' + e^(u+k-q) n
    dk += f        du += f        dp = the step's part of dw - f
    da = s da' + e^(p-q) n        db = s db' - e^(p-q) n y

Where a maximum is subtracted, what its gradient and the larger exponent's have in common cancels; of the two forms of
each gradient the one is taken that is left over, which holds the smaller weight and is exact where that is tiny.

Why it is fast: keys and values are read once, the state stays in registers. For the backward the forward keeps the
state before every 8th step, 1.5 bytes for each number of `key`; the backward computes those between again, and they
fit the registers, too. Steps are taken one after the other: at 6,144 channels of all sequences, RWKV's 169 million
weights at batch 8, there are 192 warps, and arithmetic bounds a step, not memory.

ddecay and dfirst leave as a partial sum for each sequence, which a second launch adds up in one order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tfm.kernels.recurrence import CHANNELS, OPTIONS, channels_of, programs, steps_from, strides
from tfm.kernels.rows import sum_partials
from tfm.kernels.tape import Tape
from tfm.operators.recurrence import KEPT_EVERY
from tfm.operators.wkv import Wkv, WkvBackward

# The exponent of a state that holds nothing, as the reference has it.
NOTHING = tl.constexpr(-1e38)


@triton.jit
def shares(difference):
    """Computes the weights of two exponents, relative to the larger, from the first minus the second."""
    smaller = tl.exp(-tl.abs(difference))
    return tl.where(difference >= 0.0, 1.0, smaller), tl.where(difference >= 0.0, smaller, 1.0)


@triton.jit
def average(a, b, p, u, k, v):
    """Computes y, the weights of the state and of the step, and the denominator's reciprocal."""
    before, now = shares(p - (u + k))
    inverse = 1.0 / (before * b + now)
    return (before * a + now * v) * inverse, before, now, inverse


@triton.jit
def advance(a, b, p, w, k, v):
    """Computes the state after a step, and the weights of the one before and of the step."""
    decayed = p + w
    before, now = shares(decayed - k)
    return before * a + now * v, before * b + now, tl.maximum(decayed, k), before, now


@triton.jit
def load_state(state, apart, inside):
    """Loads numerator, denominator and maximum, which lie so far apart."""
    a = tl.load(state, mask=inside, other=0.0)
    b = tl.load(state + apart, mask=inside, other=0.0)
    return a, b, tl.load(state + 2 * apart, mask=inside, other=0.0)


@triton.jit
def store_state(state, apart, inside, a, b, p):
    """Stores numerator, denominator and maximum."""
    tl.store(state, a, mask=inside)
    tl.store(state + apart, b, mask=inside)
    tl.store(state + 2 * apart, p, mask=inside)


@triton.jit(do_not_specialize=["steps"])
def wkv_forward_kernel(
    decay, first, key, value, initial_state, y, final_state, kept,
    sequences, channels, steps, key_b, key_s, key_d, value_b, value_s, value_d, y_b, y_s, y_d,
    KEEPS: tl.constexpr, STRIDE: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Each program goes through BLOCK_CHANNELS channels of one sequence, STRIDE steps at a time."""
    sequence, channel, inside = channels_of(channels, BLOCK_CHANNELS)
    key += sequence * key_b + channel * key_d
    value += sequence * value_b + channel * value_d
    y += sequence * y_b + channel * y_d
    kept += sequence * tl.maximum(tl.cdiv(steps, STRIDE), 1) * 3 * channels + channel
    place, apart = sequence * channels + channel, sequences.to(tl.int64) * channels
    w = -tl.exp(tl.load(decay + channel, mask=inside, other=0.0).to(tl.float32))
    u = tl.load(first + channel, mask=inside, other=0.0).to(tl.float32)
    if initial_state is not None:
        a, b, p = load_state(initial_state + place, apart, inside)
    else:
        a = tl.zeros([BLOCK_CHANNELS], tl.float32)
        b = tl.zeros([BLOCK_CHANNELS], tl.float32)
        p = tl.full([BLOCK_CHANNELS], NOTHING, tl.float32)
    # Once even where there is no step: the backward asks for the state before the first.
    for chunk in range(tl.maximum(tl.cdiv(steps, STRIDE), 1)):
        start = chunk * STRIDE
        if KEEPS:
            store_state(kept, channels, inside, a, b, p)
            kept += 3 * channels
        k = steps_from(key, start, steps, key_s, inside, STRIDE)
        v = steps_from(value, start, steps, value_s, inside, STRIDE)
        for i in tl.static_range(STRIDE):
            step = start + i
            known = step < steps
            result, _, _, _ = average(a, b, p, u, k[i], v[i])
            tl.store(y + step.to(tl.int64) * y_s, result, mask=inside & known)
            next_a, next_b, next_p, _, _ = advance(a, b, p, w, k[i], v[i])
            a, b, p = tl.where(known, next_a, a), tl.where(known, next_b, b), tl.where(known, next_p, p)
    store_state(final_state + place, apart, inside, a, b, p)


@triton.jit(do_not_specialize=["steps"])
def wkv_backward_kernel(
    dy, dfinal_state, decay, first, key, value, kept, dkey, dvalue, dinitial_state, partials,
    sequences, channels, steps, dy_b, dy_s, dy_d, key_b, key_s, key_d, value_b, value_s, value_d,
    dkey_b, dkey_s, dkey_d, dvalue_b, dvalue_s, dvalue_d, STRIDE: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Covers the same channels from the last step to the first; partials [sequences, 2, channels] get dw w and du."""
    sequence, channel, inside = channels_of(channels, BLOCK_CHANNELS)
    dy += sequence * dy_b + channel * dy_d
    key += sequence * key_b + channel * key_d
    value += sequence * value_b + channel * value_d
    dkey += sequence * dkey_b + channel * dkey_d
    dvalue += sequence * dvalue_b + channel * dvalue_d
    place, apart = sequence * channels + channel, sequences.to(tl.int64) * channels
    chunks = tl.maximum(tl.cdiv(steps, STRIDE), 1)
    kept += (sequence * chunks + chunks - 1) * 3 * channels + channel
    w = -tl.exp(tl.load(decay + channel, mask=inside, other=0.0).to(tl.float32))
    u = tl.load(first + channel, mask=inside, other=0.0).to(tl.float32)
    d_w = tl.zeros([BLOCK_CHANNELS], tl.float32)
    d_u = tl.zeros([BLOCK_CHANNELS], tl.float32)
    if dfinal_state is not None:
        d_a, d_b, d_p = load_state(dfinal_state + place, apart, inside)
    else:
        d_a = tl.zeros([BLOCK_CHANNELS], tl.float32)
        d_b = tl.zeros([BLOCK_CHANNELS], tl.float32)
        d_p = tl.zeros([BLOCK_CHANNELS], tl.float32)

    for chunk in range(chunks):
        start = (chunks - 1 - chunk) * STRIDE
        a, b, p = load_state(kept, channels, inside)
        kept -= 3 * channels
        k = steps_from(key, start, steps, key_s, inside, STRIDE)
        v = steps_from(value, start, steps, value_s, inside, STRIDE)
        d_y = steps_from(dy, start, steps, dy_s, inside, STRIDE)
        states = ()
        for i in tl.static_range(STRIDE):
            states = states + ((a, b, p),)  # type: ignore[assignment]  # noqa: RUF005
            known = start + i < steps
            next_a, next_b, next_p, _, _ = advance(a, b, p, w, k[i], v[i])
            a, b, p = tl.where(known, next_a, a), tl.where(known, next_b, b), tl.where(known, next_p, p)
        some_w = tl.zeros([BLOCK_CHANNELS], tl.float32)
        some_u = tl.zeros([BLOCK_CHANNELS], tl.float32)
        for back in tl.static_range(STRIDE):
            step = start + (STRIDE - 1 - back)
            known = step < steps
            a, b, p = states[STRIDE - 1 - back]
            k_now, v_now = k[STRIDE - 1 - back], v[STRIDE - 1 - back]
            _, _, _, before, now = advance(a, b, p, w, k_now, v_now)
            of_state, of_step = before * (a * d_a + b * d_b), now * (v_now * d_a + d_b)
            is_older = p + w >= k_now
            step_w = tl.where(is_older, d_p - of_step, of_state)
            step_k = tl.where(is_older, of_step, d_p - of_state)
            result, share, own, inverse = average(a, b, p, u, k_now, v_now)
            n = d_y[STRIDE - 1 - back] * inverse
            step_u = n * tl.where(p >= u + k_now, own * (v_now - result), share * (b * result - a))
            tl.store(dkey + step.to(tl.int64) * dkey_s, step_k + step_u, mask=inside & known)
            tl.store(dvalue + step.to(tl.int64) * dvalue_s, now * d_a + own * n, mask=inside & known)
            some_w += tl.where(known, step_w, 0.0)
            some_u += tl.where(known, step_u, 0.0)
            d_p = tl.where(known, step_w - step_u, d_p)
            d_a = tl.where(known, before * d_a + share * n, d_a)
            d_b = tl.where(known, before * d_b - share * n * result, d_b)
        d_w += some_w
        d_u += some_u

    store_state(dinitial_state + place, apart, inside, d_a, d_b, d_p)
    partials += sequence * 2 * channels + channel
    tl.store(partials, d_w * w, mask=inside)
    tl.store(partials + channels, d_u, mask=inside)


def wkv(tape: Tape, call: Wkv) -> tuple[Tensor, Tensor, Tensor]:
    """Computes (y, final_state, kept) of the operator. One launch."""
    y, final_state, kept = outputs = tape.outputs(call)
    if (grid := programs(call.key)) == 0:
        return outputs
    tape.launch(
        wkv_forward_kernel, (grid,), OPTIONS,
        **_shared(call), **strides("y", y), initial_state=call.initial_state, y=y, final_state=final_state, kept=kept,
        KEEPS=call.kept_every > 0,
    )  # fmt: skip
    return outputs


def wkv_backward(tape: Tape, call: WkvBackward) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Computes (ddecay, dfirst, dkey, dvalue, dinitial_state) of the operator. Two launches."""
    ddecay, dfirst, dkey, dvalue, dinitial_state = outputs = tape.outputs(call)
    batch, _, channels = call.key.shape
    if (grid := programs(call.key)) == 0:
        ddecay.zero_()
        dfirst.zero_()
        return outputs
    partials = tape.empty((batch, 2, channels), dinitial_state.dtype, dinitial_state.device)
    tape.launch(
        wkv_backward_kernel, (grid,), OPTIONS,
        **_shared(call), **strides("dy", call.dy), **strides("dkey", dkey), **strides("dvalue", dvalue),
        dy=call.dy, dfinal_state=call.dfinal_state, kept=call.kept, dkey=dkey, dvalue=dvalue,
        dinitial_state=dinitial_state, partials=partials,
    )  # fmt: skip
    sum_partials(tape, partials, ddecay, dfirst)
    return outputs


def _shared(call: Wkv | WkvBackward) -> dict:
    """Returns the arguments that both kernels have."""
    batch, steps, channels = call.key.shape
    return {
        "decay": call.decay, "first": call.first, "key": call.key, "value": call.value,
        "sequences": batch, "channels": channels, "steps": steps,
        **strides("key", call.key), **strides("value", call.value),
        "STRIDE": call.kept_every or KEPT_EVERY, "BLOCK_CHANNELS": CHANNELS,
    }  # fmt: skip
