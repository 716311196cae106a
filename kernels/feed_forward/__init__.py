"""The position-wise feed-forward network, plain and gated ("Attention Is All You Need", section 3.3).

linear_activation       the first matmul with bias, activation, gate and dropout in its epilogue, and its backward
activation_dropout      the same element by element, beside a matmul of cuBLAS
"""
