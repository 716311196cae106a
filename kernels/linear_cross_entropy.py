"""Cross-entropy of a linear layer's output, its gradients formed on the way, and never more logits than a chunk.

With X [N, D], W [V, D], loss and dz of tfm.kernels.cross_entropy, for a chunk of rows at a time:

    logits = X Wᵀ          one cuBLAS product
    loss, dz               one launch, dz in place of the logits
    dX = dz W              one product, into its rows of dX
    dW += dzᵀ X            one product, summed in fp32 where it is stored; dbias += sum over rows of dz

"mean" and "sum" know every row's factor but for the incoming gradient, one scalar: the gradients are formed in the
forward, 6 N D V flops in all, and the backward multiplies them by that scalar and 1 / (targets that count), both still
on the device. "none" meets a factor for each row, and dW cannot be rescaled by rows: its backward forms the chunks
again, 8 N D V flops in all, and their softmax too: one saved from other roundings of the logits would leave an error
in p - 1 where p is near 1. Without gradients there is only the loss, from logits that are not even stored where
tfm.kernels.streaming_cross_entropy is faster.

Memory beside the results: one chunk of logits (launch.logits_rows), the chunk's rows of X where dW is wanted, and dW in
fp32. Launches: a product, the kernel, a product and a mask for dX and dW each chunk, and one to sum the losses; nothing
waits for the device. How many rows a chunk has chooses cuBLAS's kernels, so a row's last bits depend on the batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tfm.kernels import launch
from tfm.kernels.cross_entropy import PADDING, cross_entropy_, mean_loss
from tfm.kernels.library import register
from tfm.kernels.streaming_cross_entropy import streaming_cross_entropy
from tfm.operators import Operator

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def linear_cross_entropy_forward(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, reduction: str,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(loss, scale, dX, dW, dbias), the gradients still to be multiplied by scale, None where `needs` says no.

    For reduction "none": (losses [N], an empty tensor, None, None, None).
    """
    options = (ignore_index, label_smoothing, z_loss, softcap)
    target = target.contiguous()
    losses = torch.empty(input.shape[0], dtype=torch.float32, device=input.device)
    weight = linear_weight.to(input.dtype)
    grads: Gradients = (None, None, None)
    with torch.cuda.device_of(input):
        wanted = any(needs) and reduction != "none"
        tiles = None if wanted else _streaming_tiles(input, weight, linear_bias, softcap)
        if tiles is None:
            needs = needs if wanted else [False] * 3
            grads = _chunks(input, weight, linear_bias, target, losses, needs, *options)
        else:
            bias = _padded(linear_bias)
            streaming_cross_entropy(input.contiguous(), weight.contiguous(), bias, target, losses, *options, tiles)
        if reduction == "none":
            return losses, losses.new_empty(0), None, None, None
        return *mean_loss(losses, target, ignore_index, reduction == "mean"), *grads


def linear_cross_entropy_backward(
    grad: Tensor, input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None, needs: list[bool],
) -> Gradients:  # fmt: skip
    """The gradients of reduction "none" from those of the losses, grad [N], in the dtypes of the inputs."""
    target = target.contiguous()
    # As shares of the largest, so that dz keeps its digits in half precision; ignored rows may come with NaN.
    grad = torch.where(target != ignore_index, grad, 0.0).float()
    largest = grad.abs().amax() if len(grad) else grad.new_ones(())
    largest = torch.where(largest == 0, 1.0, largest)
    # A backward may be called under autocast, and what is fp32 here must stay so.
    with torch.cuda.device_of(input), torch.autocast(input.device.type, enabled=False):
        grads = _chunks(
            input, linear_weight.to(input.dtype), linear_bias, target, None, needs,
            ignore_index, label_smoothing, z_loss, softcap, grad, largest,
        )  # fmt: skip
    given = (input, linear_weight, linear_bias)
    return tuple(None if g is None else times(g, largest, x.dtype) for g, x in zip(grads, given, strict=True))


def times(unscaled: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """`unscaled` times an fp32 scalar on the device, in fp32, rounded once to `dtype`. One launch."""
    # As a vector of one the factor is not rounded to the narrower dtype first, as a scalar tensor would be.
    return torch.mul(unscaled, factor.view(1), out=torch.empty_like(unscaled, dtype=dtype))


def _streaming_tiles(
    input: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None
) -> launch.StreamingTiles | None:
    aligned = all(x.data_ptr() % 16 == 0 and x.shape[1] * x.itemsize % 16 == 0 for x in (input, weight))
    plain = bias is None and softcap is None
    major = launch.chip(input.device).major
    return launch.streaming_cross_entropy(input.shape[1], input.dtype, aligned, plain, major)


def _padded(bias: Tensor | None) -> Tensor | None:
    """In fp32, as long as a row of the logits' buffer."""
    return None if bias is None else F.pad(bias.float(), (0, -len(bias) % PADDING)).contiguous()


def _chunks(
    input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, losses: Tensor | None,
    needs: list[bool], ignore_index: int, smoothing: float, z_loss: float, softcap: float | None,
    grad: Tensor | None = None, largest: Tensor | None = None,
) -> Gradients:  # fmt: skip
    """Fills losses where given, and forms the gradients that `needs` asks for; dW is fp32."""
    d_input, d_weight, d_bias = grads = _empty_gradients(input, weight, needs)
    if len(input) == 0:
        return tuple(None if g is None else g.zero_() for g in grads)
    classes = weight.shape[0]
    width = -(-classes // PADDING) * PADDING
    step = launch.logits_rows(len(input), width, input.itemsize)
    buffer = torch.empty((min(step, len(input)), width), dtype=input.dtype, device=input.device)
    if width > classes:
        buffer[:, classes:] = 0.0
    bias = _padded(bias)
    kept = (target != ignore_index)[:, None] if needs[1] else None
    for start in range(0, len(input), step):
        part = slice(start, start + step)
        x = input[part]
        logits = buffer[: len(x), :classes]
        torch.mm(x, weight.t(), out=logits)
        cross_entropy_(
            logits, bias, target[part], None if losses is None else losses[part],
            ignore_index, smoothing, z_loss, softcap, any(needs), None if grad is None else grad[part], largest,
        )  # fmt: skip
        if d_weight is not None:
            # An ignored row may hold NaN, which a gradient of 0 would not stop in the product.
            _add_product(d_weight, logits.t(), torch.where(kept[part], x, 0.0), first=start == 0)
        if d_bias is not None:
            total = logits.sum(0, dtype=torch.float32)
            d_bias.copy_(total) if start == 0 else d_bias.add_(total)
        if d_input is not None:
            torch.mm(logits, weight, out=d_input[part])
    return d_input, d_weight, d_bias


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total = a b where it is the first, total += a b after; total is fp32, and so are the sums inside."""
    if a.dtype == total.dtype or not a.is_cuda:
        # Only cuBLAS has products of 16-bit matrices with fp32 results.
        a, b = a.to(total.dtype), b.to(total.dtype)
        torch.mm(a, b, out=total) if first else total.addmm_(a, b)
    elif first:
        torch.mm(a, b, out_dtype=total.dtype, out=total)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


def _empty_gradients(input: Tensor, weight: Tensor, needs: list[bool]) -> Gradients:
    shapes = (input.shape, weight.shape, weight.shape[:1])
    dtypes = (input.dtype, torch.float32, torch.float32)
    return tuple(
        torch.empty(shape, dtype=dtype, device=input.device) if needed else None
        for shape, dtype, needed in zip(shapes, dtypes, needs, strict=True)
    )


def _fake_forward(input, linear_weight, linear_bias, target, reduction, *options):
    needs = options[-1]
    if reduction == "none":
        losses = input.new_empty(input.shape[0], dtype=torch.float32)
        return losses, losses.new_empty(0), None, None, None
    loss = input.new_empty((), dtype=torch.float32)
    return loss, torch.empty_like(loss), *_empty_gradients(input, linear_weight, needs)


def _fake_backward(grad, input, linear_weight, linear_bias, target, *options):
    given = (input, linear_weight, linear_bias)
    return tuple(x.new_empty(x.shape) if needed else None for x, needed in zip(given, options[-1], strict=True))


OPTIONS = "int ignore_index, float label_smoothing, float z_loss, float? softcap, bool[3] needs"
register(
    Operator(
        "linear_cross_entropy(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, str reduction,"
        f" {OPTIONS}) -> (Tensor loss, Tensor scale, Tensor? d_input, Tensor? d_weight, Tensor? d_bias)",
        _fake_forward,
    ),
    linear_cross_entropy_forward,
)
register(
    Operator(
        "linear_cross_entropy_backward(Tensor grad, Tensor input, Tensor linear_weight, Tensor? linear_bias,"
        f" Tensor target, {OPTIONS}) -> (Tensor? d_input, Tensor? d_weight, Tensor? d_bias)",
        _fake_backward,
    ),
    linear_cross_entropy_backward,
)


class LinearCrossEntropy(torch.autograd.Function):
    """Autograd of the two operators."""

    @staticmethod
    def forward(input, linear_weight, linear_bias, target, reduction, *options):
        return torch.ops.tfm.linear_cross_entropy(input, linear_weight, linear_bias, target, reduction, *options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *given, target, ctx.reduction, _, _, _, _, _ = inputs
        ctx.options = inputs[5:]
        _, scale, *grads = output
        if ctx.reduction == "none":
            ctx.save_for_backward(*given, target)
        else:
            ctx.save_for_backward(scale, *grads)
            ctx.dtypes = tuple(None if x is None else x.dtype for x in given)
        ctx.mark_non_differentiable(scale, *(g for g in grads if g is not None))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad, *_):
        # once_differentiable would let a second one pass where the first was of the loss itself, and count it as 0.
        if torch.is_grad_enabled():
            raise RuntimeError("linear_cross_entropy: expected to be differentiated once, got create_graph=True")
        nothing = (None,) * 7
        if grad is None:
            return None, None, None, *nothing
        if ctx.reduction == "none":
            return *torch.ops.tfm.linear_cross_entropy_backward(grad, *ctx.saved_tensors, *ctx.options), *nothing
        scale, *grads = ctx.saved_tensors
        factor = grad * scale
        scaled = (None if g is None else times(g, factor, dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True))
        return *scaled, *nothing


def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, reduction: str,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None,
) -> Tensor:  # fmt: skip
    """See tfm.ops.linear_cross_entropy, which has flattened `input` to [N, D] and `target` to [N]."""
    given = (input, linear_weight, linear_bias)
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in given]
    options = (ignore_index, label_smoothing, z_loss, softcap, needs)
    return LinearCrossEntropy.apply(*given, target, reduction, *options)[0]
