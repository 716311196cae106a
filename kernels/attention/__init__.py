"""Masked softmax attention ("Attention Is All You Need", section 3.2.1, equation 1), forward and backward.

choice              which kernels serve which lengths: the launch functions of the operators
arguments           what every kernel is told of a call
scores              what the kernels share: where sequences lie, which keys a query sees, what a score is
short_forward, short_backward       all keys of a head on chip: one launch each way
forward, backward_queries, backward_keys        sequences of any length
mask_bits           a dense mask, read once
bias_gradient       the gradient of an additive bias, summed over the dimensions it is broadcast along
weights             the softmax weights themselves, where somebody asks for them
"""

from tfm.kernels.attention.choice import attention, attention_backward
from tfm.kernels.attention.mask_bits import attention_mask_bits
from tfm.kernels.attention.weights import attention_weights

__all__ = ["attention", "attention_backward", "attention_mask_bits", "attention_weights"]
