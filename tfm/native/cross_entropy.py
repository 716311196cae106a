"""Cross-entropy of a linear layer's output on CPUs: torch's own products around csrc/cpu/cross_entropy.cpp.

What it adds to the loop of tfm/operators/cross_entropy.py: a CPU may look at the targets. Ignored rows are left
out before the first product, and the mean's 1 / count goes into each dz as it is rounded, so that a backward whose
gradient is 1 has nothing to do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tfm.native import NAMESPACE
from tfm.operators.cross_entropy import (
    LINEAR_CROSS_ENTROPY,
    LINEAR_CROSS_ENTROPY_BACKWARD,
    Chunks,
    Gradients,
)

__all__ = ["NAMESPACE", "logits_rows"]

# Rows of a chunk by the bytes of a logit, as measured on two cores with V = 9,712 and 32,000. Fewer, and the sum of dW,
# V D numbers a chunk, takes longer than the product that it adds: in bf16, whose products are five times as fast, it
# needs more rows. More, and the logits leave the caches between the products (1,964 rows of fp32: 15 % slower).
ROWS = {4: 256, 2: 768}
# No chunk is larger, unless the results are too. Those up to 32 MB glibc keeps, which spares the next call its pages.
CHUNK_BYTES = 64 << 20
# Fewer than one row in so many may be ignored and yet go through the products.
FEW_IGNORED = 16
# Below so many elements torch adds them up on one thread.
SUMMED_AT_ONCE = 1 << 14


def logits_rows(rows: int, width: int, itemsize: int) -> int:
    """How many rows a chunk has: chunks of one size, nearly, of whole tiles of the processor's matrix units."""
    budget = max(CHUNK_BYTES, rows * width * itemsize // 16)
    most = max(1, min(ROWS[itemsize], budget // (width * itemsize)))
    even = -(-rows // -(-rows // most))
    return min(most, -(-even // 32) * 32)


# What the names stand for is looked up at each call: the library may be loaded after this module.
CHUNKS = Chunks(
    lambda *args: torch.ops.tfm_native.cross_entropy_.default(*args), lambda *shape: logits_rows(*shape), padding=16
)


def linear_cross_entropy_forward(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, reduction: str,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """The operator; `scale` is 1, as the gradients are those of the loss already."""
    options = (ignore_index, label_smoothing, z_loss, softcap)
    index, kept = _counted(target, ignore_index)
    x, labels = _rows(input, index), _rows(target, index).contiguous()
    losses = torch.empty(len(x), dtype=torch.float32)
    count = len(x) if kept is None else int(kept.sum())
    divisor = torch.tensor(float(max(1, count) if reduction == "mean" else 1))
    wanted = needs if reduction != "none" else [False] * 3
    weight = linear_weight.to(input.dtype)
    d_input, d_weight, d_bias = CHUNKS.run(
        x, weight, linear_bias, labels, losses, wanted, options, divisor=divisor, kept=kept
    )  # fmt: skip
    if reduction == "none":
        return _spread(losses, index, len(input)), losses.new_empty(0), None, None, None
    # In parts of a fixed size, so that the sum does not depend on the threads.
    loss = torch.stack([part.sum() for part in losses.split(SUMMED_AT_ONCE)]).sum() / divisor
    d_input = None if d_input is None else _spread(d_input, index, len(input))
    return loss, torch.ones(()), d_input, d_weight, d_bias


def linear_cross_entropy_backward(
    grad: Tensor, input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None, needs: list[bool],
) -> Gradients:  # fmt: skip
    """The operator."""
    index, kept = _counted(target, ignore_index)
    x, labels, factors = (_rows(rows, index) for rows in (input, target, grad))
    d_input, d_weight, d_bias = CHUNKS.run(
        x, linear_weight.to(input.dtype), linear_bias, labels.contiguous(), None, needs,
        (ignore_index, label_smoothing, z_loss, softcap), factors.float().contiguous(),
        kept=kept,
    )  # fmt: skip
    d_input = None if d_input is None else _spread(d_input, index, len(input))
    d_weight = None if d_weight is None else d_weight.to(linear_weight.dtype)
    d_bias = None if d_bias is None or linear_bias is None else d_bias.to(linear_bias.dtype)
    return d_input, d_weight, d_bias


def _counted(target: Tensor, ignore_index: int) -> tuple[Tensor | None, Tensor | None]:
    """The indices of the rows that count, None where all or most do; and which do [N, 1], None where all that is left.

    A few ignored rows stay: oneDNN prepares bf16 products, a millisecond each, for every number of rows it meets.
    """
    kept = target != ignore_index
    count = int(kept.sum())
    if count == len(kept):
        return None, None
    if len(kept) - count < len(kept) // FEW_IGNORED:
        return None, kept[:, None]
    return kept.nonzero()[:, 0], None


def _rows(x: Tensor, index: Tensor | None) -> Tensor:
    return x if index is None else x.index_select(0, index)


def _spread(x: Tensor, index: Tensor | None, rows: int) -> Tensor:
    """Back to all rows, 0 for those that do not count."""
    return x if index is None else x.new_zeros((rows, *x.shape[1:])).index_copy_(0, index, x)


_library = torch.library.Library(NAMESPACE, "FRAGMENT")
for _operator, _function in (
    (LINEAR_CROSS_ENTROPY, linear_cross_entropy_forward),
    (LINEAR_CROSS_ENTROPY_BACKWARD, linear_cross_entropy_backward),
):
    _library.define(_operator.schema)
    _library.impl(_operator.name, _function, "CPU")
    torch.library.register_fake(f"{NAMESPACE}::{_operator.name}", _operator.fake, lib=_library)
