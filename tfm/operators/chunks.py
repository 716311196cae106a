"""The loop over chunks of rows that computes a linear layer's cross-entropy, and never more logits than a chunk's.

With X [N, D], W [V, D], loss and dz of kernels/cross_entropy/stored.py, for a chunk of rows at a time:

    logits = X Wᵀ          one product
    loss, dz               one kernel, dz in place of the logits
    dX = dz W              one product, into its rows of dX
    dW += dzᵀ X            one product, summed in fp32 where it is stored; dbias += sum over rows of dz

A backend brings the kernel and how many rows a chunk has: kernels/cross_entropy/linear.py, tfm/native/cross_entropy.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tfm.autocast import without_autocast
from tfm.operators.cross_entropy import CrossEntropy_, Gradients, LinearCrossEntropy, LinearCrossEntropyBackward
from tfm.reference.cross_entropy import Options


@dataclass(frozen=True)
class Chunks:
    """The loop as a backend runs it.

    Attributes:
        cross_entropy_: the kernel.
        rows: gives how many rows a chunk has, from all rows, the buffer's columns and the bytes of a logit.
        padding: the buffer has a multiple of so many columns, 0 beyond the classes; so does the bias.
    """

    cross_entropy_: Callable[[CrossEntropy_], object]
    rows: Callable[[int, int, int], int]
    padding: int

    def padded(self, bias: Tensor | None) -> Tensor | None:
        """Returns the bias in fp32, as long as a row of the logits' buffer."""
        return None if bias is None else F.pad(bias.float(), (0, -len(bias) % self.padding)).contiguous()

    def run(
        self, call: LinearCrossEntropy | LinearCrossEntropyBackward, losses: Tensor | None, gradients: Gradients,
        grad: Tensor | None = None, divisor: Tensor | None = None, kept: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Fills losses and those of the gradients (dX, dW, dbias) that are given; dW and dbias are fp32.

        Args:
            call: has a weight of the dtype of its input, and a contiguous target.
            losses: [N] fp32.
            gradients: as `unscaled_gradients` makes them.
            grad: [N] fp32, the gradients of the losses; None for 1.
            divisor: fp32 scalar that divides grad; None for 1.
            kept: [N, 1], False for the rows that are ignored, which may hold NaN; None where there are none.
        """
        input, weight, target = call.input, call.linear_weight, call.target
        d_input, d_weight, d_bias = gradients
        if len(input) == 0:
            for gradient in gradients:
                if gradient is not None:
                    gradient.zero_()
            return
        wanted = any(gradient is not None for gradient in gradients)
        classes = weight.shape[0]
        width = -(-classes // self.padding) * self.padding
        step = self.rows(len(input), width, input.itemsize)
        buffer = torch.empty((min(step, len(input)), width), dtype=input.dtype, device=input.device)
        if width > classes:
            buffer[:, classes:] = 0.0
        bias = self.padded(call.linear_bias)
        options = Options(call.ignore_index, call.label_smoothing, call.z_loss, call.softcap)
        # A backward may be called under autocast, yet fp32 must stay fp32 here.
        with without_autocast(input.device):
            for start in range(0, len(input), step):
                part = slice(start, start + step)
                x = input[part]
                logits = buffer[: len(x), :classes]
                torch.mm(x, weight.t(), out=logits)
                rows = CrossEntropy_(
                    logits, bias, target[part], None if losses is None else losses[part], *options, wanted,
                    None if grad is None else grad[part], divisor,
                )  # fmt: skip
                self.cross_entropy_(rows)
                if d_weight is not None:
                    # A gradient of 0 would not keep the NaN of an ignored row out of the product.
                    counted = x if kept is None else torch.where(kept[part], x, 0.0)
                    _add_product(d_weight, logits.t(), counted, first=start == 0)
                if d_bias is not None:
                    _add_rows(d_bias, logits, first=start == 0)
                if d_input is not None:
                    torch.mm(logits, weight, out=d_input[part])


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """Sets total = a b where it is the first, else adds a b; total is fp32, and so are the sums inside."""
    if a.dtype == total.dtype:
        torch.mm(a, b, out=total) if first else total.addmm_(a, b)
    elif not a.is_cuda:
        # Only cuBLAS multiplies 16-bit matrices into fp32: elsewhere a chunk's product is rounded, their sum is not.
        product = torch.mm(a, b)
        total.copy_(product) if first else total.add_(product)
    elif first:
        torch.mm(a, b, out_dtype=total.dtype, out=total)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


def _add_rows(total: Tensor, rows: Tensor, first: bool) -> None:
    """Sets total to the sum over rows where it is the first, else adds that sum."""
    if rows.dtype != total.dtype and not rows.is_cuda:
        # torch's sum over the rows of a 16-bit matrix takes four times as long as a product with ones.
        _add_product(total[None], rows.new_ones(1, len(rows)), rows, first)
        return
    summed = rows.sum(0, dtype=total.dtype)
    total.copy_(summed) if first else total.add_(summed)
