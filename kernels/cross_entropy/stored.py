"""Cross-entropy of rows of logits, and its gradient written over them or beside, in one launch.

For a row of logits a [V], with z = softcap · tanh((a + bias) / softcap) (z = a + bias where nothing caps), target t,
smoothing ε, and q = (1 - ε) · onehot(t) + ε / V (Szegedy et al. 2016, section 7):

    lse  = log sum exp z
    loss = (1 - ε) · (lse - z_t) + ε · (lse - mean z) + z_loss · lse²            (PaLM, section 5, for the last)
    dz   = (1 + 2 z_loss · lse) · exp(z - lse) - q          da = dz · (1 - (z / softcap)²) · the gradient of the loss

A row whose target is `ignore_index` gives 0 and zeros, whatever it holds; a target that is no class gives NaN, and is
never an address.

One program a row: it reads the row, and reads it again to write da, so an element of bf16 moves 4 bytes to and
from memory as long as the second read finds the row in the L2 cache. The maximum is kept for each group of GROUP
neighbours, which one thread holds: no barrier until the row ends, and 1 + 1/GROUP exponentials an element where a
running maximum for each column would take two. The last block of a row, all of a short one, stays in registers.

Instructions an element decide how near memory's speed it comes. No block but the last compares its columns with
anything, and no element asks whether it is the label's: what differs there is stored once all others are. Of 8 elements
of bf16, with smoothing, the loops take 70 + 47 instructions on sm_90.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tfm.kernels.activations import tanh
from tfm.kernels.launch import cross_entropy as launch
from tfm.kernels.softmax import power
from tfm.kernels.tape import Tape
from tfm.operators.cross_entropy import CrossEntropy, CrossEntropy_, LinearCrossEntropy

# Rows are padded to a multiple of this: loads are then whole vectors for any number of classes.
PADDING = 16
# Below every logit there may be, and finite, so that no difference of two maxima is NaN.
LOWEST = tl.constexpr(-1.0e38)
# Exponentials are powers of two: one multiply-add and one instruction each.
LOG2_E, LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)


@triton.jit
def softcapped(a, softcap):
    """Computes softcap · tanh(a / softcap); `a` itself where softcap is None."""
    if softcap is not None:
        cap = tl.cast(softcap, tl.float32)
        a = cap * tanh(a * (1.0 / cap))
    return a


@triton.jit
def load_logits(logits_row, bias, column, inside, softcap, EVICTION: tl.constexpr):
    """Loads a block of z in fp32: all of it where `inside` is None, else 0 outside."""
    other: tl.constexpr = None if inside is None else 0.0
    a = tl.load(logits_row + column, mask=inside, other=other, eviction_policy=EVICTION).to(tl.float32)
    if bias is not None:
        a += tl.load(bias + column, mask=inside, other=other)
    return softcapped(a, softcap)


@triton.jit
def fold(highest, exponentials, z):
    """Returns the maximum of each group of columns, and the sum of exp(z - maximum), with those of one more block."""
    higher = tl.maximum(highest, tl.max(z, axis=1, keep_dims=True))
    exponentials *= tl.exp2((highest - higher) * LOG2_E)
    exponentials += tl.sum(tl.exp2((z - higher) * LOG2_E), axis=1, keep_dims=True)
    return higher, exponentials


@triton.jit
def before_softcap(d, z, softcap):
    """Returns the gradient of a + bias, where d is that of z; `d` itself where softcap is None."""
    if softcap is not None:
        bounded = z * (1.0 / tl.cast(softcap, tl.float32))
        d *= 1.0 - bounded * bounded
    return d


@triton.jit
def loss_of_row(top, logarithm, peak, total, classes, smoothing, z_loss):
    """Computes the loss of a row whose largest z is `top`, where logarithm = lse - top.

    `peak` is the target's z, `total` with smoothing the sum of all.
    """
    # Differences first: with large logits the sum top + logarithm would round the loss away.
    loss = (top - peak) + logarithm
    if smoothing is not None:
        share = tl.cast(smoothing, tl.float32)
        loss = (1.0 - share) * loss + share * ((top - total / classes) + logarithm)
    if z_loss is not None:
        lse = top + logarithm
        loss += tl.cast(z_loss, tl.float32) * lse * lse
    return loss


@triton.jit(do_not_specialize=["classes", "ignore_index"])
def cross_entropy_kernel(
    logits, gradient, bias, target, losses, grad, divisor,
    classes, width, ignore_index, smoothing, z_loss, softcap,
    BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Each program computes one row's loss and its gradient, where they are wanted: gradient may be the logits.

    The gradient is that of the loss times grad[row] / divisor, each 1 where it is None.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_row = logits + row * width
    gradient_row = None if gradient is None else gradient + row * width
    # Neighbouring columns that share a maximum: what one 16-byte load gives a thread.
    GROUP: tl.constexpr = 128 // logits.dtype.element_ty.primitive_bitwidth
    group = tl.arange(0, BLOCK // GROUP)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    # Blocks before the last, which alone needs bounds; in 64 bits, those of one unrolled step are constants apart.
    whole = 0 if ONE_BLOCK else ((classes - 1) // BLOCK).to(tl.int64)
    last = tl.cast(whole * BLOCK, tl.int32) + group
    given = tl.load(target + row)
    if given == ignore_index:
        if losses is not None:
            tl.store(losses + row, 0.0)
        if gradient is not None:
            for block in range(whole + 1):
                column = block * BLOCK + group
                tl.store(gradient_row + column, tl.zeros_like(column).to(tl.float32), mask=column < width)
    else:
        is_class = (given >= 0) & (given < classes)
        label = tl.where(is_class, given, -1).to(tl.int32)
        peak = tl.load(logits_row + label, mask=is_class, other=float("nan")).to(tl.float32)
        if bias is not None:
            peak += tl.load(bias + label, mask=is_class, other=0.0)
        peak = softcapped(peak, softcap)
        highest = tl.full([BLOCK // GROUP, 1], LOWEST, tl.float32)
        exponentials = tl.zeros([BLOCK // GROUP, 1], tl.float32)
        total = tl.zeros([BLOCK // GROUP, 1], tl.float32)
        for block in tl.range(whole, loop_unroll_factor=UNROLL):
            # The cache keeps what is read again, and lets go first of what is not.
            z = load_logits(logits_row, bias, block * BLOCK + group, None, softcap, "evict_last")
            if smoothing is not None:
                total += tl.sum(z, axis=1, keep_dims=True)
            highest, exponentials = fold(highest, exponentials, z)
        z = load_logits(logits_row, bias, last, last < width, softcap, "evict_first")
        if smoothing is not None:
            total += tl.sum(z, axis=1, keep_dims=True)
        highest, exponentials = fold(highest, exponentials, tl.where(last < classes, z, float("-inf")))
        top = tl.max(highest)
        exponential = tl.sum(exponentials * tl.exp2((highest - top) * LOG2_E))
        logarithm = tl.log2(exponential) * LN_2
        if losses is not None:
            tl.store(losses + row, loss_of_row(top, logarithm, peak, tl.sum(total), classes, smoothing, z_loss))

        if gradient is not None:
            tl.debug_barrier()  # Every thread has read the target's logit and this row, before any overwrites them.
            mass = tl.where(label >= 0, 1.0, float("nan"))
            share = 1.0
            floor = 0.0
            if z_loss is not None:
                mass += 2.0 * tl.cast(z_loss, tl.float32) * (top + logarithm)
            if smoothing is not None:
                share -= tl.cast(smoothing, tl.float32)
                floor += tl.cast(smoothing, tl.float32) / classes
            factor = 1.0
            if grad is not None:
                factor = tl.load(grad + row)
            if divisor is not None:
                factor /= tl.load(divisor)
            # At the label the terms may cancel: exp(z - lse) from differences alone.
            of_label = tl.exp2((peak - top) * LOG2_E - logarithm * LOG2_E) * mass - (floor + share)
            of_label = before_softcap(of_label, peak, softcap) * factor
            # Elsewhere a power, as in tfm.kernels.softmax, by the sum of the row's; both have the same shift.
            IS_FORMED: tl.constexpr = bias is not None
            shift = top if IS_FORMED else top * LOG2_E
            weight = mass * factor / (power(top, shift, LOG2_E, IS_FORMED) * exponential)
            floor *= factor
            # The last block is still in registers.
            d = power(z, shift, LOG2_E, IS_FORMED) * weight - floor
            d = tl.where(last < classes, before_softcap(d, z, softcap), 0.0)
            tl.store(gradient_row + last, d, mask=last < width, eviction_policy="evict_first")
            # tools.check_kernels cannot know that no other block is the last; a barrier a row is cheap.
            tl.debug_barrier()
            for block in tl.range(whole, loop_unroll_factor=UNROLL):
                column = block * BLOCK + group
                z = load_logits(logits_row, bias, column, None, softcap, "evict_first")
                d = power(z, shift, LOG2_E, IS_FORMED) * weight - floor
                tl.store(gradient_row + column, before_softcap(d, z, softcap), eviction_policy="evict_first")
            tl.debug_barrier()  # Some thread has stored the label's element; another now stores what it should be.
            tl.store(gradient_row + label, of_label, mask=label >= 0)


@triton.jit(do_not_specialize=["rows", "chunks", "ignore_index"])
def mean_loss_kernel(losses, target, loss, scale, rows, chunks, ignore_index, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    """One program sums the losses, always in the same order; the mean is over the rows that count, 0 without any."""
    total = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.float32)
    for chunk in range(chunks):
        row = chunk * BLOCK + tl.arange(0, BLOCK)
        total += tl.load(losses + row, mask=row < rows, other=0.0)
        kept = tl.load(target + row, mask=row < rows, other=ignore_index) != ignore_index
        count += kept.to(tl.float32)
    factor = 1.0
    if MEAN:
        # Lanes count to 2**24 exactly; their sum is a number of rows, rounded as the division is.
        counted = tl.sum(count)
        factor = tl.where(counted > 0, 1.0 / tl.maximum(counted, 1.0), 0.0)
    tl.store(loss, tl.sum(total) * factor)
    tl.store(scale, factor)


def cross_entropy_(tape: Tape, call: CrossEntropy_) -> None:
    """Fills the losses and turns the logits into their gradient, as the operator does. One launch.

    The rows of the logits lie in a buffer of a multiple of PADDING columns, which holds 0 beyond the classes, and will
    again; so does the bias, of the buffer's width.
    """
    rows, width = call.logits.shape[0], call.logits.stride(0)
    # Whole rows of the buffer, since the kernel touches all of them.
    logits = call.logits.as_strided((rows, width), (width, 1))
    _launch(tape, call, logits, logits if call.want_gradient else None, call.bias, call.losses)


def cross_entropy(tape: Tape, call: CrossEntropy) -> tuple[Tensor, Tensor | None]:
    """Computes (losses, dlogits) of the operator. One launch."""
    losses, gradient = outputs = tape.outputs(call)
    if len(losses):
        _launch(tape, call, call.logits, gradient, None, losses)
    return outputs


def _launch(
    tape: Tape, call: CrossEntropy_ | CrossEntropy, logits: Tensor, gradient: Tensor | None, bias: Tensor | None,
    losses: Tensor | None,
) -> None:  # fmt: skip
    rows, classes = call.logits.shape
    extras = bias is not None, call.softcap is not None
    tiles = launch.cross_entropy(classes, logits.dtype, *extras, tape.chip(logits.device).major)
    tape.launch(
        cross_entropy_kernel, (rows,), tiles.options,
        logits=logits, gradient=gradient, bias=bias, target=call.target, losses=losses, grad=call.grad,
        divisor=call.divisor, classes=classes, width=logits.shape[1], ignore_index=call.ignore_index,
        smoothing=call.label_smoothing or None, z_loss=call.z_loss or None, softcap=call.softcap,
        BLOCK=tiles.block, ONE_BLOCK=tiles.chunks == 1, UNROLL=tiles.unroll,
    )  # fmt: skip


def mean_loss(tape: Tape, call: LinearCrossEntropy, losses: Tensor, loss: Tensor, scale: Tensor) -> None:
    """Fills loss and scale, fp32 scalars: the sum of losses [N] times scale, 1 / the number of targets that count.

    The scale is 1 unless the call asks for the mean. No count comes back to the host. One launch.
    """
    rows = losses.shape[0]
    tiles = launch.mean_loss(rows)
    tape.launch(
        mean_loss_kernel, (1,), tiles.options,
        losses=losses, target=call.target, loss=loss, scale=scale, rows=rows, chunks=tiles.chunks,
        ignore_index=call.ignore_index, MEAN=call.reduction == "mean", BLOCK=tiles.block,
    )  # fmt: skip
