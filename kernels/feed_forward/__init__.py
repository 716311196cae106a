"""The position-wise feed-forward network, plain and gated ("Attention Is All You Need", section 3.3).

epilogue       the first matmul with bias, activation, gate and dropout in its epilogue, and its backward
elementwise    the same element by element, beside a matmul of cuBLAS
"""

from tfm.kernels.feed_forward.elementwise import activation_dropout, activation_dropout_backward
from tfm.kernels.feed_forward.epilogue import linear_activation, linear_activation_backward

__all__ = ["activation_dropout", "activation_dropout_backward", "linear_activation", "linear_activation_backward"]
