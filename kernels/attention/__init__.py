"""Masked softmax attention ("Attention Is All You Need", section 3.2.1, equation 1), forward and backward.

operators           which kernel serves which length, and what tfm.ops calls (autograd: tfm.operators.attention)
call                one attention as every kernel is told of it
scores              what the kernels share: where sequences lie, which keys a query sees, what a score is
short_forward, short_backward       all keys of a head on chip: one launch each way
forward, backward_queries, backward_keys        sequences of any length
mask_bits           a dense mask, read once
bias_gradient       the gradient of an additive bias, summed over the dimensions it is broadcast along
weights             the softmax weights themselves, where somebody asks for them
"""
