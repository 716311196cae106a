"""The operators that several backends compute: each stated once, with its gradients, in the file of its subject.

Backend "triton" computes tfm::name (tfm.kernels), backend "native" tfm_native::name (csrc).
"""

from importlib import import_module
from pkgutil import iter_modules

import torch

from tfm.operators.declaration import OPERATORS, Operator, Row, define

# Whoever adds a subject adds a file here, and a row of a backend to its ROWS.
SUBJECTS = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]
ROWS: tuple[Row, ...] = tuple(row for subject in SUBJECTS for row in getattr(subject, "ROWS", ()))

__all__ = ["OPERATORS", "ROWS", "Operator", "Row", "define"]

from tfm.operators import attention, cross_entropy, feed_forward  # noqa: E402

TWINS = (*attention.OPERATORS, *feed_forward.OPERATORS)
NATIVE = (*TWINS, attention.ATTENTION_BACKWARD_JOINED, cross_entropy.CROSS_ENTROPY_IN_PLACE)


def register_fakes(namespace: str) -> None:
    for operator in NATIVE:
        torch.library.register_fake(f"{namespace}::{operator.name}", operator.fake)
