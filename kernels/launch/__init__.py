"""Launch settings as pure functions of the problem: no autotuning, the same on every run, testable without a GPU.

Matmuls apart, block sizes never depend on the number of rows, so that a row's numbers do not change with the batch
around it.
"""

from tfm.kernels.launch.attention.any_length import (
    AttentionTiles,
    attention_backward_keys,
    attention_backward_queries,
    attention_forward,
    mask_bits,
    split_dim,
)
from tfm.kernels.launch.attention.scores import BIAS_PROGRAMS, attention_weights, bias_gradient, bias_splits
from tfm.kernels.launch.attention.short import (
    SHORT_BACKWARD,
    SHORT_BACKWARD_FP32,
    SHORT_FORWARD,
    SHORT_FORWARD_FP32,
    ShortBackwardTiles,
    ShortForwardTiles,
    short_attention_backward,
    short_attention_forward,
    short_block,
)
from tfm.kernels.launch.cross_entropy import (
    CrossEntropyTiles,
    StreamingTiles,
    cross_entropy,
    logits_rows,
    mean_loss,
    streaming_cross_entropy,
    streaming_losses,
)
from tfm.kernels.launch.device import Chip, are_aligned, chip_of
from tfm.kernels.launch.feed_forward import (
    ElementTiles,
    MatmulTiles,
    activation_dropout,
    activation_dropout_backward,
    linear_activation,
    linear_activation_backward,
)
from tfm.kernels.launch.rows import RowTiles

__all__ = [
    "BIAS_PROGRAMS",
    "SHORT_BACKWARD",
    "SHORT_BACKWARD_FP32",
    "SHORT_FORWARD",
    "SHORT_FORWARD_FP32",
    "AttentionTiles",
    "Chip",
    "CrossEntropyTiles",
    "ElementTiles",
    "MatmulTiles",
    "RowTiles",
    "ShortBackwardTiles",
    "ShortForwardTiles",
    "StreamingTiles",
    "activation_dropout",
    "activation_dropout_backward",
    "are_aligned",
    "attention_backward_keys",
    "attention_backward_queries",
    "attention_forward",
    "attention_weights",
    "bias_gradient",
    "bias_splits",
    "chip_of",
    "cross_entropy",
    "linear_activation",
    "linear_activation_backward",
    "logits_rows",
    "mask_bits",
    "mean_loss",
    "short_attention_backward",
    "short_attention_forward",
    "short_block",
    "split_dim",
    "streaming_cross_entropy",
    "streaming_losses",
]
