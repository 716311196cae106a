"""Cross-entropy of a linear layer's output: cuBLAS's products around the kernel of tfm.kernels.cross_entropy.stored.

tfm/operators/chunks.py gives the mathematics and the loop over chunks of rows. Here the loss and the mean's factor
1 / (targets that count) stay on the device: the gradients leave the forward without it, and the backward multiplies it
by the incoming gradient. Without gradients there is only the loss, from logits that are not even stored where
tfm.kernels.cross_entropy.streamed is faster.

Memory beside the results: one chunk of logits (launch.logits_rows), the chunk's rows of X where dW is wanted, and dW in
fp32. Launches: a product, the kernel, a product and a mask for dX and dW each chunk, and one to sum the losses; nothing
waits for the device. A chunk's rows decide which kernels cuBLAS takes, so that a row's last bits depend on the batch.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from tfm.kernels.cross_entropy.stored import PADDING, cross_entropy_, mean_loss
from tfm.kernels.cross_entropy.streamed import streaming_cross_entropy
from tfm.kernels.launch import cross_entropy as launch
from tfm.kernels.tape import Tape, unplanned
from tfm.operators.chunks import Chunks
from tfm.operators.cross_entropy import (
    Gradients,
    LinearCrossEntropy,
    LinearCrossEntropyBackward,
    times,
    unscaled_gradients,
)


@unplanned
def linear_cross_entropy(
    tape: Tape, call: LinearCrossEntropy
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Computes (loss, scale, dX, dW, dbias) of the operator."""
    loss, scale, *gradients = outputs = tape.outputs(call)
    call = call._replace(linear_weight=call.linear_weight.to(call.input.dtype), target=call.target.contiguous())
    is_reduced = call.reduction != "none"
    losses = tape.empty(call.target.shape, torch.float32, call.input.device) if is_reduced else loss
    wanted = any(gradient is not None for gradient in gradients)
    tiles = None if wanted else _streaming_tiles(tape, call)
    if tiles is None:
        # Only dW's product would meet what ignored rows hold.
        kept = None if gradients[1] is None else (call.target != call.ignore_index)[:, None]
        _chunks(tape).run(call, losses, tuple(gradients), kept=kept)
    else:
        streaming_cross_entropy(tape, call, _chunks(tape).padded(call.linear_bias), losses, tiles)
    if is_reduced:
        mean_loss(tape, call, losses, loss, scale)
    return outputs


@unplanned
def linear_cross_entropy_backward(tape: Tape, call: LinearCrossEntropyBackward) -> Gradients:
    """Computes (dX, dW, dbias) of the operator."""
    given = call.input, call.linear_weight, call.linear_bias
    call = call._replace(linear_weight=call.linear_weight.to(call.input.dtype), target=call.target.contiguous())
    # Shares of the largest gradient, so that dz keeps its digits in half precision; ignored rows may hold NaN.
    kept = call.target != call.ignore_index
    grad = torch.where(kept, call.grad, 0.0).float()
    largest = grad.abs().amax() if len(grad) else grad.new_ones(())
    largest = torch.where(largest == 0, 1.0, largest)
    unscaled = unscaled_gradients(call.input, call.linear_weight, call.needs)
    _chunks(tape).run(call, None, unscaled, grad, largest, kept[:, None])
    d_input, d_weight, d_bias = (
        None if g is None or x is None else times(g, largest, x.dtype) for g, x in zip(unscaled, given, strict=True)
    )
    return d_input, d_weight, d_bias


def _chunks(tape: Tape) -> Chunks:
    return Chunks(partial(cross_entropy_, tape), launch.logits_rows, PADDING)


def _streaming_tiles(tape: Tape, call: LinearCrossEntropy) -> launch.StreamingTiles | None:
    input, weight = call.input, call.linear_weight
    aligned = all(x.data_ptr() % 16 == 0 and x.shape[1] * x.itemsize % 16 == 0 for x in (input, weight))
    plain = call.linear_bias is None and call.softcap is None
    major = tape.chip(input.device).major
    return launch.streaming_cross_entropy(input.shape[1], input.dtype, aligned, plain, major)
