"""Masked softmax attention, padded and packed: the operators and their gradients.

kernels/attention gives the mathematics.

calls        the operators
gradients    the gradients
mask_bits    masks as bits, the operator that makes them
heads        the heads of a fused projection, whose gradients are one tensor again
"""

from tfm.operators.attention.calls import (
    FAR,
    Attention,
    AttentionBackward,
    AttentionBackwardJoined,
    AttentionWeights,
    Gradients,
    row_statistics,
)
from tfm.operators.attention.gradients import Attended, AttendedWithLse
from tfm.operators.attention.heads import split_heads
from tfm.operators.attention.mask_bits import AttentionMaskBits
from tfm.operators.declaration import CPU_FLOATS, FLOATS, MANY, Row

OPERATIONS = ("attention", "varlen_attention")
ROWS = (
    Row(OPERATIONS, "triton", FLOATS, max_columns=512),
    Row(OPERATIONS, "native", CPU_FLOATS, max_columns=MANY, device="cpu"),
    Row(OPERATIONS, "native", FLOATS, max_columns=64, device="cuda"),
)

__all__ = [
    "FAR",
    "ROWS",
    "Attended",
    "AttendedWithLse",
    "Attention",
    "AttentionBackward",
    "AttentionBackwardJoined",
    "AttentionMaskBits",
    "AttentionWeights",
    "Gradients",
    "row_statistics",
    "split_heads",
]
