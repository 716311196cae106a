"""Masked softmax attention ("Attention Is All You Need", section 3.2.1, equation 1), forward and backward.

choice              the launch functions of the operators: which kernels serve which lengths
arguments           the arguments that every kernel takes of a call
heads               tensors of heads, and tiles of their rows
visible             where sequences lie, and which keys a query sees
scores              what a score is, and what the softmax leaves of each row
short_forward, short_backward       all keys of a head on chip: one launch each way
forward, backward_queries, backward_keys        sequences of any length
combine             the forward's pieces, where programs share keys
mask_bits           a dense mask, read once
gradient_tile       a tile of the gradient of scores, for what is summed over tiles:
bias_gradient       the gradient of an additive bias, summed over the dimensions it is broadcast along
relative_bias_gradient      the gradient of a bias by distance
weights             the softmax weights themselves, where somebody asks for them
"""

from tfm.kernels.attention.choice import attention, attention_backward, attention_backward_joined
from tfm.kernels.attention.mask_bits import attention_mask_bits
from tfm.kernels.attention.weights import attention_weights

__all__ = ["attention", "attention_backward", "attention_backward_joined", "attention_mask_bits", "attention_weights"]
