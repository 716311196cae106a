"""A mixture of feed-forward experts; tfm.operators.experts gives the mathematics.

routing     the rows sorted by expert, and where each expert's begin
groups      what the grouped products share: which expert a tile is of, and where its weight lies
forward     first product with activation and gate, second product, the sum of each token's results
backward    the same way back, to the gradients of x and of the routing weights
weights     the gradients of weights and biases
"""

from tfm.kernels.experts.backward import experts_backward
from tfm.kernels.experts.forward import experts
from tfm.kernels.experts.routing import experts_routing

__all__ = ["experts", "experts_backward", "experts_routing"]
