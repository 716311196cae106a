"""The operators that several backends compute: each one's schema, its empty outputs and its autograd, once for all.

Backend "triton" computes tfm::name (tfm.kernels), backend "native" tfm_native::name (csrc). Gradients stay outside the
operators: an autograd.Function around them costs half of what torch's register_autograd costs.
"""

import torch

from tfm.operators import attention, cross_entropy, decode_attention, embedding, feed_forward, norm, rotary
from tfm.operators.operator import Operator

__all__ = ["NATIVE", "TWINS", "Operator", "register_fakes"]

# Of Triton and of csrc, whose csrc/schemas.cpp declares them once more.
TWINS = (
    *attention.OPERATORS,
    *decode_attention.OPERATORS,
    *embedding.OPERATORS,
    *feed_forward.OPERATORS,
    *norm.OPERATORS,
    *rotary.OPERATORS,
)
# Of csrc: the twins, and what it alone has.
NATIVE = (*TWINS, attention.ATTENTION_BACKWARD_JOINED, cross_entropy.CROSS_ENTROPY_IN_PLACE)


def register_fakes(namespace: str) -> None:
    """Gives the native operators, which `namespace` defines already, their fakes."""
    for operator in NATIVE:
        torch.library.register_fake(f"{namespace}::{operator.name}", operator.fake)
