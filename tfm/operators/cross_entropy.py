"""Cross-entropy of a linear layer's output, its gradients formed on the way, and never more logits than a chunk.

With X [N, D], W [V, D], loss and dz of kernels/cross_entropy/stored.py, for a chunk of rows at a time:

    logits = X Wᵀ          one product
    loss, dz               one kernel, dz in place of the logits
    dX = dz W              one product, into its rows of dX
    dW += dzᵀ X            one product, summed in fp32 where it is stored; dbias += sum over rows of dz

"mean" and "sum" know every row's factor but for the incoming gradient, one scalar: the gradients are formed in the
forward, 6 N D V flops in all, and the backward multiplies them by that scalar: X, W and the targets are saved for
second derivatives alone. "none" meets a factor for each row, and
dW cannot be rescaled by rows: its backward forms the chunks again, 8 N D V flops in all, and their softmax too: one
saved from other roundings of the logits would leave an error in p - 1 where p is near 1.

Here are the operators' schemas and fakes, their autograd, and the loop over the chunks. A backend brings the kernel and
how many rows a chunk has: kernels/cross_entropy/linear.py, tfm/native/cross_entropy.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tfm.autocast import without_autocast
from tfm.operators.operator import Operator, distinct
from tfm.reference import cross_entropy as reference
from tfm.transforms import Recomputed, differentiable_by, is_readable

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def empty_gradients(input: Tensor, weight: Tensor, needs: list[bool]) -> Gradients:
    """(dX, dW, dbias) as the loop fills them, None where `needs` says no."""
    d_input = torch.empty_like(input, memory_format=torch.contiguous_format) if needs[0] else None
    d_weight = torch.empty(weight.shape, dtype=torch.float32, device=input.device) if needs[1] else None
    d_bias = torch.empty(weight.shape[:1], dtype=torch.float32, device=input.device) if needs[2] else None
    return d_input, d_weight, d_bias


def _fake_forward(input, linear_weight, linear_bias, target, reduction, *options):
    needs = options[-1]
    if reduction == "none":
        losses = input.new_empty(input.shape[0], dtype=torch.float32)
        return losses, losses.new_empty(0), None, None, None
    loss = input.new_empty((), dtype=torch.float32)
    return loss, torch.empty_like(loss), *empty_gradients(input, linear_weight, needs)


def _fake_backward(grad, input, linear_weight, linear_bias, target, *options):
    given = (input, linear_weight, linear_bias)
    return tuple(x.new_empty(x.shape) if needed else None for x, needed in zip(given, options[-1], strict=True))


_OPTIONS = "int ignore_index, float label_smoothing, float z_loss, float? softcap, bool[3] needs"
# (loss, scale, dX, dW, dbias), the gradients still to be multiplied by scale, None where `needs` says no.
# For reduction "none": (losses [N], an empty tensor, None, None, None).
LINEAR_CROSS_ENTROPY = Operator(
    "linear_cross_entropy(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, str reduction,"
    f" {_OPTIONS}) -> (Tensor loss, Tensor scale, Tensor? d_input, Tensor? d_weight, Tensor? d_bias)",
    _fake_forward,
)
# The gradients of reduction "none" from those of the losses, grad [N], in the dtypes of the inputs.
LINEAR_CROSS_ENTROPY_BACKWARD = Operator(
    "linear_cross_entropy_backward(Tensor grad, Tensor input, Tensor linear_weight, Tensor? linear_bias,"
    f" Tensor target, {_OPTIONS}) -> (Tensor? d_input, Tensor? d_weight, Tensor? d_bias)",
    _fake_backward,
)

# Of csrc alone: what its loop calls for each chunk, as Chunks says.
CROSS_ENTROPY_IN_PLACE = Operator(
    "cross_entropy_(Tensor(a!) logits, Tensor? bias, Tensor target, Tensor(b!)? losses, int ignore_index,"
    " float label_smoothing, float z_loss, float? softcap, bool want_gradient, Tensor? grad, Tensor? divisor) -> ()",
    fake=lambda *_: None,
)


@dataclass(frozen=True)
class Chunks:
    """What the loop is told by a backend.

    Attributes:
        cross_entropy_: the kernel: (logits, bias, target, losses, ignore_index, label_smoothing, z_loss, softcap,
            want_gradient, grad, divisor). It fills `losses` [m] (fp32) where given, and turns the logits [m, V] into
            their gradient where wanted, times grad [m] where given, divided by the scalar `divisor` where given.
        rows: how many rows a chunk has, from all rows, the buffer's columns and the bytes of a logit.
        padding: the buffer has a multiple of so many columns, 0 beyond the classes; so does the bias.
    """

    cross_entropy_: Callable[..., None]
    rows: Callable[[int, int, int], int]
    padding: int

    def padded(self, bias: Tensor | None) -> Tensor | None:
        """In fp32, as long as a row of the logits' buffer."""
        return None if bias is None else F.pad(bias.float(), (0, -len(bias) % self.padding)).contiguous()

    def run(
        self, input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, losses: Tensor | None,
        needs: list[bool], options: tuple[int, float, float, float | None], grad: Tensor | None = None,
        divisor: Tensor | None = None, kept: Tensor | None = None,
    ) -> Gradients:  # fmt: skip
        """Fills losses where given, and forms the gradients that `needs` asks for; dW and dbias are fp32.

        `weight` is of the dtype of `input`. `kept` [N, 1] is False for the rows that are ignored, which may hold NaN;
        None where there are none.
        """
        d_input, d_weight, d_bias = grads = empty_gradients(input, weight, needs)
        if len(input) == 0:
            for gradient in grads:
                if gradient is not None:
                    gradient.zero_()
            return grads
        classes = weight.shape[0]
        width = -(-classes // self.padding) * self.padding
        step = self.rows(len(input), width, input.itemsize)
        buffer = torch.empty((min(step, len(input)), width), dtype=input.dtype, device=input.device)
        if width > classes:
            buffer[:, classes:] = 0.0
        bias = self.padded(bias)
        # A backward may be called under autocast, and what is fp32 here must stay so.
        with without_autocast(input.device):
            for start in range(0, len(input), step):
                part = slice(start, start + step)
                x = input[part]
                logits = buffer[: len(x), :classes]
                torch.mm(x, weight.t(), out=logits)
                self.cross_entropy_(
                    logits, bias, target[part], None if losses is None else losses[part], *options, any(needs),
                    None if grad is None else grad[part], divisor,
                )  # fmt: skip
                if d_weight is not None:
                    # A gradient of 0 would not stop the NaN of an ignored row in the product.
                    counted = x if kept is None else torch.where(kept[part], x, 0.0)
                    _add_product(d_weight, logits.t(), counted, first=start == 0)
                if d_bias is not None:
                    _add_rows(d_bias, logits, first=start == 0)
                if d_input is not None:
                    torch.mm(logits, weight, out=d_input[part])
        return grads


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total = a b where it is the first, total += a b after; total is fp32, and so are the sums inside."""
    if a.dtype == total.dtype:
        torch.mm(a, b, out=total) if first else total.addmm_(a, b)
    elif not a.is_cuda:
        # Only cuBLAS has products of 16-bit matrices with fp32 results: a chunk's is rounded, their sum is not.
        product = torch.mm(a, b)
        total.copy_(product) if first else total.add_(product)
    elif first:
        torch.mm(a, b, out_dtype=total.dtype, out=total)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


def _add_rows(total: Tensor, rows: Tensor, first: bool) -> None:
    """The same for the sum over rows."""
    if rows.dtype != total.dtype and not rows.is_cuda:
        # torch's sum over the rows of a 16-bit matrix takes four times as long as a product with ones.
        _add_product(total[None], rows.new_ones(1, len(rows)), rows, first)
        return
    summed = rows.sum(0, dtype=total.dtype)
    total.copy_(summed) if first else total.add_(summed)


def times(unscaled: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """`unscaled` times an fp32 scalar on the device, in fp32, rounded once to `dtype`. One launch."""
    # As a vector of one the factor is not rounded to the narrower dtype first, as a scalar tensor would be.
    return torch.mul(unscaled, factor.view(1), out=torch.empty_like(unscaled, dtype=dtype))


def _is_one(factor: Tensor) -> bool:
    """Whether there is nothing to multiply by: most losses are called with 1. Only a CPU knows it without waiting."""
    return is_readable(factor) and factor.item() == 1.0


def _recompute(ctx, grad: Tensor) -> Recomputed:
    input, linear_weight, linear_bias, target = ctx.saved_tensors[:4]

    def loss(_, input, linear_weight, linear_bias, *rest):
        options = reference.Options(*ctx.options[:-1])
        return (reference.whole(input, linear_weight, target, linear_bias, None, ctx.reduction, options),)

    return loss, (None, input, linear_weight, linear_bias, *[None] * 7)


class LinearCrossEntropy(torch.autograd.Function):
    """Autograd of the two operators."""

    @staticmethod
    def forward(ctx, namespace, input, linear_weight, linear_bias, target, reduction, *options):
        operator = getattr(torch.ops, namespace).linear_cross_entropy.default
        loss, scale, *grads = operator(input, linear_weight, linear_bias, target, reduction, *options)
        ctx.namespace, ctx.reduction, ctx.options = namespace, reduction, options
        given = (input, linear_weight, linear_bias)
        ctx.save_for_backward(*given, target, scale, *grads)
        return loss

    @staticmethod
    @differentiable_by(_recompute)
    def backward(ctx, grad):
        *given, target, scale, d_input, d_weight, d_bias = ctx.saved_tensors
        nothing = (None,) * 7  # of target, reduction and options
        if ctx.reduction == "none":
            operator = getattr(torch.ops, ctx.namespace).linear_cross_entropy_backward.default
            return None, *operator(grad, *given, target, *ctx.options), *nothing
        factor = grad * scale
        # What is handed on as it is may become a parameter's gradient, and change: only where no backward follows.
        is_done = _is_one(factor) and not torch._C._autograd._get_current_graph_task_keep_graph()
        scaled = (
            g if g is None or (is_done and g.dtype == x.dtype) else times(g, factor, x.dtype)
            for g, x in zip((d_input, d_weight, d_bias), given, strict=True)
        )
        return None, *scaled, *nothing


def linear_cross_entropy(
    namespace: str, input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, reduction: str,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None,
) -> Tensor:  # fmt: skip
    """See tfm.ops.cross_entropy, which has flattened `input` to [N, D] and `target` to [N]."""
    given = (input, linear_weight, linear_bias)
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in given]
    options = (ignore_index, label_smoothing, z_loss, softcap, needs)
    return LinearCrossEntropy.apply(namespace, *distinct(given), target, reduction, *options)
