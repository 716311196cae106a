"""Cross-entropy of a linear layer's output: cuBLAS's products around the kernel of tfm.kernels.cross_entropy.stored.

tfm/operators/cross_entropy.py gives the mathematics and the loop over chunks of rows. Here the loss and the
mean's factor 1 / (targets that count) stay on the device: the gradients leave the forward without it, and the backward
multiplies it by the incoming gradient. Without gradients there is only the loss, from logits that are not even stored
where tfm.kernels.cross_entropy.streamed is faster.

Memory beside the results: one chunk of logits (launch.logits_rows), the chunk's rows of X where dW is wanted, and dW in
fp32. Launches: a product, the kernel, a product and a mask for dX and dW each chunk, and one to sum the losses; nothing
waits for the device. How many rows a chunk has chooses cuBLAS's kernels, so a row's last bits depend on the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tfm.kernels import launch
from tfm.kernels.cross_entropy.stored import PADDING, cross_entropy_, mean_loss
from tfm.kernels.cross_entropy.streamed import streaming_cross_entropy
from tfm.kernels.library import NAMESPACE as NAMESPACE
from tfm.kernels.library import register
from tfm.operators.cross_entropy import (
    LINEAR_CROSS_ENTROPY,
    LINEAR_CROSS_ENTROPY_BACKWARD,
    Chunks,
    Gradients,
    times,
)

# The settings are looked up at each call.
CHUNKS = Chunks(cross_entropy_, lambda *shape: launch.logits_rows(*shape), PADDING)


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
            kept = _kept(target, ignore_index, needs)
            grads = CHUNKS.run(input, weight, linear_bias, target, losses, needs, options, kept=kept)
        else:
            bias = CHUNKS.padded(linear_bias)
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
    options = (ignore_index, label_smoothing, z_loss, softcap)
    with torch.cuda.device_of(input):
        grads = CHUNKS.run(
            input, linear_weight.to(input.dtype), linear_bias, target, None, needs, options, grad, largest,
            _kept(target, ignore_index, needs),
        )  # fmt: skip
    given = (input, linear_weight, linear_bias)
    return tuple(None if g is None else times(g, largest, x.dtype) for g, x in zip(grads, given, strict=True))


def _kept(target: Tensor, ignore_index: int, needs: list[bool]) -> Tensor | None:
    """[N, 1], False for ignored rows; None where no product needs it."""
    return (target != ignore_index)[:, None] if needs[1] else None


def _streaming_tiles(
    input: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None
) -> launch.StreamingTiles | None:
    aligned = all(x.data_ptr() % 16 == 0 and x.shape[1] * x.itemsize % 16 == 0 for x in (input, weight))
    plain = bias is None and softcap is None
    major = launch.chip_of(input.device).major
    return launch.streaming_cross_entropy(input.shape[1], input.dtype, aligned, plain, major)


register(LINEAR_CROSS_ENTROPY, linear_cross_entropy_forward)
register(LINEAR_CROSS_ENTROPY_BACKWARD, linear_cross_entropy_backward)
