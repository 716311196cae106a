"""Cross-entropy of a linear layer's output, a chunk of rows at a time, so that the whole [N, V] logits never exist.

Where a gradient is needed it is formed in the forward, in place of the chunk's logits: with p = softmax(logits) and
q the smoothed target, d loss / d logits = sum(q) p - q (Szegedy et al. 2016, section 7, for the smoothing).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tfm.autocast import without_autocast
from tfm.transforms import Recomputed, differentiable_by, transforming

# A chunk of logits should fit the caches of a CPU; on other devices it should feed a large matmul.
CHUNK_BYTES = {"cpu": 4 << 20}
DEFAULT_CHUNK_BYTES = 256 << 20


class Options(NamedTuple):
    """The options that shape the loss: see tfm.ops.linear_cross_entropy."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float | None


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    options: Options,
) -> Tensor:
    """Computes tfm.ops.linear_cross_entropy, which has flattened `input` to [N, D] and `target` to [N] or [N, V]."""
    if not torch.is_grad_enabled():
        # An autograd.Function is told that a gradient is needed even then.
        input, linear_weight = input.detach(), linear_weight.detach()
        linear_bias = None if linear_bias is None else linear_bias.detach()
    class_weight = None if weight is None else weight.to(torch.promote_types(input.dtype, torch.float32))
    if transforming():
        return whole(input, linear_weight, target, linear_bias, class_weight, reduction, options)
    return _LinearCrossEntropy.apply(input, linear_weight, linear_bias, target, class_weight, reduction, options)


def whole(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None, class_weight: Tensor | None,
    reduction: str, options: Options,
) -> Tensor:  # fmt: skip
    """Computes the same from all the logits at once, in operations that torch can differentiate again and again."""
    wide = torch.promote_types(input.dtype, torch.float32)
    # An ignored row may hold NaN, which 0 would not stop in the product with the gradient.
    kept = _kept(target, options.ignore_index)
    logits = F.linear(input.masked_fill(~kept, 0), linear_weight.to(input.dtype)).to(wide)
    if linear_bias is not None:
        logits = logits + linear_bias.to(wide)
    return of_logits(logits, target, class_weight, reduction, options)


def of_logits(
    logits: Tensor, target: Tensor, class_weight: Tensor | None, reduction: str, options: Options
) -> Tensor:  # fmt: skip
    """Computes tfm.ops.cross_entropy of logits [N, V]."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    kept = _kept(target, options.ignore_index)
    class_weight = None if class_weight is None else class_weight.to(wide)
    floor = _floor(class_weight, logits.shape[1], options.label_smoothing, logits.new_empty((), dtype=wide))
    q = _smoothed(target, kept, class_weight, floor, 1 - options.label_smoothing, wide)
    # Of its own memory, which is used up.
    mine = logits.to(wide).masked_fill(~kept, 0)
    losses = _rows(mine, q, options, needs_grad=False)[0].masked_fill(~kept[:, 0], 0)
    if reduction == "none":
        return losses
    return losses.sum() * _share(losses, target, class_weight, reduction, options.ignore_index)


def _recompute(ctx, grad: Tensor) -> Recomputed:
    input, linear_weight, linear_bias, target, class_weight = ctx.saved_tensors[:5]

    def loss(input, linear_weight, linear_bias, *rest):
        return (whole(input, linear_weight, target, linear_bias, class_weight, ctx.reduction, ctx.options),)

    return loss, (input, linear_weight, linear_bias, *[None] * 4)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, linear_weight, linear_bias, target, class_weight, reduction, options):
        ctx.options, ctx.reduction, ctx.needs = options, reduction, ctx.needs_input_grad[:3]
        tensors = input, linear_weight, linear_bias, target, class_weight
        if reduction == "none":
            losses, _ = _chunks(*tensors, None, (False, False, False), options)
            ctx.save_for_backward(*tensors)
            return losses
        losses, grads = _chunks(*tensors, None, ctx.needs, options)
        scale = _share(losses, target, class_weight, reduction, options.ignore_index)
        ctx.save_for_backward(*tensors, scale, *grads)
        return losses.sum() * scale

    @staticmethod
    @differentiable_by(_recompute)
    def backward(ctx, grad):
        # Autograd rounds each gradient to the dtype of its input.
        if ctx.reduction == "none":
            input, linear_weight, linear_bias, target, class_weight = ctx.saved_tensors
            with without_autocast(grad.device):
                _, grads = _chunks(
                    input, linear_weight, linear_bias, target, class_weight, grad, ctx.needs, ctx.options
                )
        else:
            # Scaled only now, so that the gradients of half precision do not underflow.
            scale, *unscaled = ctx.saved_tensors[5:]
            grads = [None if g is None else g.to(scale.dtype) * (grad * scale) for g in unscaled]
        return (*grads, None, None, None, None)


def _share(losses: Tensor, target: Tensor, class_weight: Tensor | None, reduction: str, ignore_index: int) -> Tensor:
    """Returns the factor of the sum of the losses."""
    if reduction == "sum":
        return losses.new_ones(())
    kept = _kept(target, ignore_index)[:, 0]
    if class_weight is None or target.is_floating_point():
        divisor = kept.sum().to(losses.dtype)
    else:
        divisor = (class_weight[target.masked_fill(~kept, 0)] * kept).sum().to(losses.dtype)
    # Without anything to average, loss and gradient are 0, where torch has NaN.
    return torch.where(divisor > 0, 1 / divisor, 0.0)


def _kept(target: Tensor, ignore_index: int) -> Tensor:
    """Returns bool [N, 1], False for the rows that count for nothing."""
    if target.is_floating_point():
        return torch.ones(target.shape[0], 1, dtype=torch.bool, device=target.device)
    return (target != ignore_index)[:, None]


def _chunks(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    row_grad: Tensor | None,
    needs: tuple[bool, bool, bool],
    options: Options,
) -> tuple[Tensor, list[Tensor | None]]:
    """Computes losses [N] and, where `needs` asks, the gradients of input, linear weight and bias.

    `row_grad` [N] is the gradient of each loss, None for 1. The gradients of weight and bias are fp32 at least.
    """
    rows, classes = input.shape[0], linear_weight.shape[0]
    wide = torch.promote_types(input.dtype, torch.float32)
    weight = linear_weight.to(input.dtype)
    kept = _kept(target, options.ignore_index)
    factor = kept.to(wide) if row_grad is None else torch.where(kept, row_grad[:, None], 0.0)
    floor = _floor(class_weight, classes, options.label_smoothing, factor)
    losses = torch.empty(rows, dtype=wide, device=input.device)
    d_input = torch.empty_like(input) if needs[0] else None
    d_weight = torch.zeros(weight.shape, dtype=wide, device=input.device) if needs[1] else None
    d_bias = torch.zeros(classes, dtype=wide, device=input.device) if needs[2] else None
    for part in _parts(rows, classes * wide.itemsize, input.device):
        # An ignored row may hold NaN, which 0 would not stop in the product with the gradient.
        x = input[part].masked_fill(~kept[part], 0)
        logits = (x @ weight.t()).to(wide)
        if linear_bias is not None:
            logits.add_(linear_bias)
        q = _smoothed(target[part], kept[part], class_weight, floor, 1 - options.label_smoothing, wide)
        loss, d_logits = _rows(logits, q, options, any(needs))
        losses[part] = loss.masked_fill(~kept[part, 0], 0)
        if d_logits is None:
            continue
        # Factors of rows are cheaper on the narrow side of each product.
        narrow = d_logits.to(input.dtype)
        if d_input is not None:
            d_input[part] = (narrow @ weight).mul_(factor[part])
        if d_weight is not None:
            scaled = (x * factor[part]).to(input.dtype)
            if narrow.dtype == wide:
                d_weight.addmm_(narrow.t(), scaled)
            else:
                d_weight += narrow.t() @ scaled
        if d_bias is not None:
            d_bias.addmv_(d_logits.t(), factor[part, 0])
    return losses, [d_input, d_weight, d_bias]


def _parts(rows: int, row_bytes: int, device: torch.device) -> list[slice]:
    """Returns the chunks of rows; one under torch.compile, whose graphs hold no loop of any length."""
    if torch.compiler.is_compiling():
        return [slice(None)]
    per_chunk = max(1, CHUNK_BYTES.get(device.type, DEFAULT_CHUNK_BYTES) // row_bytes)
    return [slice(start, start + per_chunk) for start in range(0, rows, per_chunk)]


def _floor(class_weight: Tensor | None, classes: int, smoothing: float, like: Tensor) -> Tensor | None:
    """Returns what smoothing gives to every class, [V] in the dtype of `like`; None for nothing."""
    if smoothing == 0.0:
        return None
    return (like.new_ones(classes) if class_weight is None else class_weight) * (smoothing / classes)


@dataclass(frozen=True)
class _Target:
    """q of a chunk's rows, smoothed and times the class weights.

    Attributes:
        base: what every class gets, [m, V], or [V] for all rows, or None for 0.
        peak: what one class gets beyond that, (its index [m, 1], how much [m, 1]); None for probabilities.
        mass: [m, 1], the sum of q; None for 1.
    """

    base: Tensor | None
    peak: tuple[Tensor, Tensor] | None
    mass: Tensor | None


def _smoothed(
    target: Tensor, kept: Tensor, class_weight: Tensor | None, floor: Tensor | None, share: float, dtype: torch.dtype
) -> _Target:
    """Makes q of `target` [m] or [m, V] with `share` of its weight, over `floor`."""
    if target.is_floating_point():
        q = target.to(dtype) * share
        q = q if class_weight is None else q * class_weight
        q = q if floor is None else q + floor
        return _Target(q, None, q.sum(dim=-1, keepdim=True))
    index = target[:, None].masked_fill(~kept, 0)
    if class_weight is None:
        return _Target(floor, (index, kept.to(dtype) * share), None)
    height = class_weight[index] * share
    return _Target(floor, (index, height), height if floor is None else height + floor.sum())


def _rows(logits: Tensor, q: _Target, options: Options, needs_grad: bool) -> tuple[Tensor, Tensor | None]:
    """Computes losses [m] of logits [m, V], whose memory is used up, and their gradients [m, V]."""
    slope = None
    if options.softcap is not None:
        logits = logits.div_(options.softcap).tanh_()
        slope = 1 - logits.square() if needs_grad else None
        # Not in place: where autograd follows, it needs the tanh again.
        logits = logits * options.softcap
    log_p = logits.log_softmax(dim=-1)
    loss, mass = log_p.new_zeros(len(log_p)), q.mass
    if q.base is not None:
        loss = loss - (log_p.mv(q.base) if q.base.dim() == 1 else (log_p * q.base).sum(dim=-1))
    if q.peak is not None:
        index, height = q.peak
        loss = loss - (log_p.gather(1, index) * height)[:, 0]
    if options.z_loss:
        lse = logits.logsumexp(dim=-1)
        loss = loss + options.z_loss * lse.square()
        mass = (1 if mass is None else mass) + 2 * options.z_loss * lse[:, None]
    if not needs_grad:
        return loss, None
    grad = log_p.exp_()
    if mass is not None:
        grad = grad.mul_(mass)
    if q.base is not None:
        grad = grad.sub_(q.base)
    if q.peak is not None:
        index, height = q.peak
        grad = grad.scatter_add_(1, index, -height)
    return loss, grad if slope is None else grad.mul_(slope)
