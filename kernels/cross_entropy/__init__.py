"""Cross-entropy of a linear layer's output, whose logits are stored a chunk at a time or not at all.

linear      the products around the kernels, and which of the two serves a call
stored      the loss of a chunk of logits, and its gradient written over them
streamed    the loss alone, of logits that live in registers
"""

from tfm.kernels.cross_entropy.linear import linear_cross_entropy, linear_cross_entropy_backward

__all__ = ["linear_cross_entropy", "linear_cross_entropy_backward"]
