"""The operators that several backends compute: each stated once, with its gradients, in the file of its subject.

Backend "triton" computes tfm::name (tfm.kernels), backend "native" tfm_native::name (csrc).
"""

from importlib import import_module
from pkgutil import iter_modules

from tfm.operators.declaration import OPERATORS, Operator, Row, define

# A subject's file declares its operators as it is imported; its ROWS say which backends serve its operations.
ROWS: tuple[Row, ...] = tuple(
    row for module in iter_modules(__path__) for row in getattr(import_module(f"{__name__}.{module.name}"), "ROWS", ())
)

__all__ = ["OPERATORS", "ROWS", "Operator", "Row", "define"]
