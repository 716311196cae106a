"""Cross-entropy of a linear layer's output on CPUs: torch's own products around csrc/cpu/cross_entropy.cpp.

Unlike a GPU, a CPU may look at the targets while it runs the loop of tfm/operators/chunks.py. Ignored rows are left out
before the first product, and the mean's 1 / count goes into each dz as it is rounded, so that a backward whose gradient
is 1 has nothing to do.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from tfm.operators.chunks import Chunks
from tfm.operators.cross_entropy import (
    Gradients,
    LinearCrossEntropy,
    LinearCrossEntropyBackward,
    unscaled_gradients,
)

Call = TypeVar("Call", LinearCrossEntropy, LinearCrossEntropyBackward)

# Rows of a chunk by the bytes of a logit, as measured on two cores with V = 9,712 and 32,000. Fewer, and the sum of dW,
# V D numbers a chunk, takes longer than the product that it adds: in bf16, whose products are five times as fast, it
# needs more rows. More, and the logits leave the caches between the products (1,964 rows of fp32: 15 % slower).
ROWS = {4: 256, 2: 768}
# No chunk is larger, unless the results are too. Those up to 32 MB glibc keeps, which spares the next call its pages.
CHUNK_BYTES = 64 << 20
# Fewer than one row in so many may be ignored and yet go through the products.
FEW_IGNORED = 16
# torch adds up fewer elements than this on one thread.
SUMMED_AT_ONCE = 1 << 14


def logits_rows(rows: int, width: int, itemsize: int) -> int:
    """Returns the rows of a chunk: chunks of nearly one size, of whole tiles of the processor's matrix units."""
    budget = max(CHUNK_BYTES, rows * width * itemsize // 16)
    most = max(1, min(ROWS[itemsize], budget // (width * itemsize)))
    even = -(-rows // -(-rows // most))
    return min(most, -(-even // 32) * 32)


# The names are looked up at each call: the library may be loaded after this module.
CHUNKS = Chunks(
    lambda call: torch.ops.tfm_native.cross_entropy_.default(*call), lambda *shape: logits_rows(*shape), padding=16
)


def implement(library: torch.library.Library) -> None:
    """Makes these functions what the operators of `library`'s namespace compute on CPUs."""
    for name, function in (
        ("linear_cross_entropy", lambda *given: linear_cross_entropy(LinearCrossEntropy(*given))),
        (
            "linear_cross_entropy_backward",
            lambda *given: linear_cross_entropy_backward(LinearCrossEntropyBackward(*given)),
        ),
    ):
        library.impl(name, function, "CPU")


def linear_cross_entropy(
    call: LinearCrossEntropy,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Computes the operator; `scale` is 1, as the gradients are those of the loss already."""
    is_reduced = call.reduction != "none"
    counted, index, kept = _counted(call)
    rows = len(counted.input)
    losses = torch.empty(rows, dtype=torch.float32)
    count = rows if kept is None else int(kept.sum())
    divisor = torch.tensor(float(max(1, count) if call.reduction == "mean" else 1))
    needs = call.needs if is_reduced else [False] * 3
    gradients = unscaled_gradients(counted.input, counted.linear_weight, needs)
    CHUNKS.run(counted, losses, gradients, divisor=divisor, kept=kept)
    if not is_reduced:
        return _spread(losses, index, len(call.input)), losses.new_empty(0), None, None, None
    # In parts of a fixed size, so that the sum does not depend on the threads.
    loss = torch.stack([part.sum() for part in losses.split(SUMMED_AT_ONCE)]).sum() / divisor
    d_input, d_weight, d_bias = gradients
    d_input = None if d_input is None else _spread(d_input, index, len(call.input))
    return loss, torch.ones(()), d_input, d_weight, d_bias


def linear_cross_entropy_backward(call: LinearCrossEntropyBackward) -> Gradients:
    """Computes the operator."""
    counted, index, kept = _counted(call)
    weight, bias = call.linear_weight, call.linear_bias
    d_input, d_weight, d_bias = gradients = unscaled_gradients(counted.input, weight, call.needs)
    CHUNKS.run(counted, None, gradients, _rows(call.grad, index).float().contiguous(), kept=kept)
    d_input = None if d_input is None else _spread(d_input, index, len(call.input))
    d_weight = None if d_weight is None else d_weight.to(weight.dtype)
    d_bias = None if d_bias is None or bias is None else d_bias.to(bias.dtype)
    return d_input, d_weight, d_bias


def _counted(call: Call) -> tuple[Call, Tensor | None, Tensor | None]:
    """Returns the call for the rows that count, their indices, and a mask [N, 1] of those that count.

    The indices are None where all or most rows count, the mask where all that are left do. A few ignored rows stay:
    oneDNN prepares bf16 products, a millisecond each, for every number of rows it meets.
    """
    which = call.target != call.ignore_index
    count = int(which.sum())
    index = kept = None
    if count < len(which):
        if len(which) - count < len(which) // FEW_IGNORED:
            kept = which[:, None]
        else:
            index = which.nonzero()[:, 0]
    input, target = _rows(call.input, index), _rows(call.target, index).contiguous()
    counted = call._replace(input=input, linear_weight=call.linear_weight.to(input.dtype), target=target)
    return counted, index, kept


def _rows(x: Tensor, index: Tensor | None) -> Tensor:
    return x if index is None else x.index_select(0, index)


def _spread(x: Tensor, index: Tensor | None, rows: int) -> Tensor:
    """Puts them back among all rows, 0 for those that do not count."""
    return x if index is None else x.new_zeros((rows, *x.shape[1:])).index_copy_(0, index, x)
