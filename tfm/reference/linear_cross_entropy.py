"""Cross-entropy of a linear layer's output, a chunk of rows at a time, so that the whole [N, V] logits never exist.

Where a gradient is needed it is formed in the forward, in place of the chunk's logits: with p = softmax(logits) and
q the smoothed target, d loss / d logits = sum(q) p - q (Szegedy et al. 2016, section 7, for the smoothing).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# A chunk of logits should fit the caches of a CPU; on other devices it should feed a large matmul.
CHUNK_BYTES = {"cpu": 8 << 20}
DEFAULT_CHUNK_BYTES = 256 << 20


@dataclass(frozen=True)
class Options:
    """What shapes the loss besides its tensors: see tfm.ops.linear_cross_entropy."""

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
    """See tfm.ops.linear_cross_entropy, which has flattened `input` to [N, D] and `target` to [N] or [N, V]."""
    wide = torch.promote_types(input.dtype, torch.float32)
    class_weight = None if weight is None else weight.to(wide)
    divisor = None
    if reduction == "mean":
        divisor = _divisor(target, class_weight, options.ignore_index, wide)
    losses = _LinearCrossEntropy.apply(
        input, linear_weight, linear_bias, target, class_weight, divisor, reduction, options
    )
    return losses


def _divisor(target: Tensor, class_weight: Tensor | None, ignore_index: int, dtype: torch.dtype) -> Tensor:
    if target.is_floating_point():
        return torch.full((), target.shape[0], dtype=dtype, device=target.device)
    kept = target != ignore_index
    if class_weight is None:
        return kept.sum().to(dtype)
    return (class_weight[target.masked_fill(~kept, 0)] * kept).sum()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, linear_weight, linear_bias, target, class_weight, divisor, reduction, options):
        needs = ctx.needs_input_grad[:3]
        ctx.options, ctx.reduction, ctx.needs = options, reduction, needs
        scale = torch.ones((), dtype=torch.promote_types(input.dtype, torch.float32), device=input.device)
        if reduction == "mean":
            # Nothing to average is no loss, and no gradient: 0, where torch has NaN.
            scale = torch.where(divisor > 0, 1 / divisor, torch.zeros_like(divisor))
        if reduction == "none":
            losses, _ = _chunks(input, linear_weight, linear_bias, target, class_weight, None, (False,) * 3, options)
            ctx.save_for_backward(input, linear_weight, linear_bias, target, class_weight)
            return losses
        row_scale = scale.expand(input.shape[0])
        losses, grads = _chunks(input, linear_weight, linear_bias, target, class_weight, row_scale, needs, options)
        ctx.save_for_backward(*grads)
        return losses.sum() * scale

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        if ctx.reduction == "none":
            input, linear_weight, linear_bias, target, class_weight = ctx.saved_tensors
            _, grads = _chunks(input, linear_weight, linear_bias, target, class_weight, grad, ctx.needs, ctx.options)
        else:
            grads = [None if g is None else g * grad.to(g.dtype) for g in ctx.saved_tensors]
        return (*grads, None, None, None, None, None)


def _chunks(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    row_scale: Tensor | None,
    needs: tuple[bool, bool, bool],
    options: Options,
) -> tuple[Tensor, list[Tensor | None]]:
    """Losses [N], and, where `needs` asks, the gradients of input, linear weight and bias under `row_scale` [N]."""
    rows, classes = input.shape[0], linear_weight.shape[0]
    wide = torch.promote_types(input.dtype, torch.float32)
    weight = linear_weight.to(input.dtype)
    losses = torch.empty(rows, dtype=wide, device=input.device)
    d_input = torch.empty_like(input) if needs[0] else None
    d_weight = torch.zeros(weight.shape, dtype=wide, device=input.device) if needs[1] else None
    d_bias = torch.zeros(classes, dtype=wide, device=input.device) if needs[2] and linear_bias is not None else None
    chunk_bytes = CHUNK_BYTES.get(input.device.type, DEFAULT_CHUNK_BYTES)
    per_chunk = max(1, chunk_bytes // (classes * wide.itemsize))
    for start in range(0, rows, per_chunk):
        part = slice(start, start + per_chunk)
        x = input[part]
        logits = (x @ weight.t()).to(wide)
        if linear_bias is not None:
            logits = logits.add_(linear_bias.to(wide))
        losses[part], d_logits = _rows(logits, target[part], class_weight, options, any(needs))
        if d_logits is None:
            continue
        assert row_scale is not None
        d_logits = d_logits.mul_(row_scale[part, None])
        if d_bias is not None:
            d_bias += d_logits.sum(dim=0)
        narrow = d_logits.to(input.dtype)
        if d_input is not None:
            d_input[part] = narrow @ weight
        if d_weight is not None:
            if narrow.dtype == wide:
                d_weight.addmm_(narrow.t(), x)
            else:
                d_weight += narrow.t() @ x
    return losses, [
        d_input,
        None if d_weight is None else d_weight.to(linear_weight.dtype),
        None if d_bias is None or linear_bias is None else d_bias.to(linear_bias.dtype),
    ]


def _rows(
    logits: Tensor, target: Tensor, class_weight: Tensor | None, options: Options, needs_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Losses [m] of logits [m, V], which become, in place, their gradient [m, V]."""
    classes = logits.shape[1]
    smoothing, softcap = options.label_smoothing, options.softcap
    if softcap is not None:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    capped = logits.clone() if softcap is not None and needs_grad else None
    log_p = logits.log_softmax(dim=-1)
    lse = logits[:, 0] - log_p[:, 0] if classes > 0 else logits.new_zeros(len(logits))
    if target.is_floating_point():
        q = target.to(logits.dtype) * (1 - smoothing) + smoothing / classes
        q = q if class_weight is None else q * class_weight
        loss, mass, kept = -(q * log_p).sum(dim=-1), q.sum(dim=-1), None
    else:
        kept = target != options.ignore_index
        safe = target.masked_fill(~kept, 0)[:, None]
        uniform = smoothing / classes
        true = (1 - smoothing) if class_weight is None else (1 - smoothing) * class_weight[safe]
        spread = 1.0 if class_weight is None else class_weight
        loss = -(log_p.gather(1, safe) * true)[:, 0]
        if smoothing > 0:
            total = log_p.sum(dim=-1) if class_weight is None else log_p @ class_weight
            loss = loss - uniform * total
        mass = true + uniform * (classes if class_weight is None else class_weight.sum())
        mass = mass[:, 0] if isinstance(mass, Tensor) else mass
        loss = loss + options.z_loss * lse.square() if options.z_loss else loss
        loss = loss.masked_fill(~kept, 0.0)
    if target.is_floating_point() and options.z_loss:
        loss = loss + options.z_loss * lse.square()
    if not needs_grad:
        return loss, None
    grad = log_p.exp_()
    if options.z_loss:
        mass = mass + 2 * options.z_loss * lse
    if isinstance(mass, Tensor):
        grad = grad.mul_(mass[:, None])
    if kept is None:
        grad = grad.sub_(q)
    else:
        if smoothing > 0:
            grad = grad.sub_(uniform * spread)
        peak = true if isinstance(true, Tensor) else torch.full_like(grad[:, :1], true)
        grad = grad.scatter_add_(1, safe, -peak).masked_fill_(~kept[:, None], 0.0)
    if capped is not None:
        assert softcap is not None
        grad = grad.mul_(1 - (capped / softcap).square_())
    return loss, grad
