"""Cross-entropy of logits, and of a linear layer's output, whose logits are stored a chunk at a time or not at all.

linear      the products around the kernels, and which of the two serves a call
stored      the loss of logits, and its gradient written over them or beside
streamed    the loss alone, of logits that live in registers
"""

from tfm.kernels.cross_entropy.linear import linear_cross_entropy, linear_cross_entropy_backward
from tfm.kernels.cross_entropy.stored import cross_entropy

__all__ = ["cross_entropy", "linear_cross_entropy", "linear_cross_entropy_backward"]
