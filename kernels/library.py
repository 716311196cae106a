"""How the kernels' launchers become operators of torch, opaque to torch.compile: tfm::name."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tfm.operators.operator import Operator

# Of the kernels' operators, in torch.ops.
NAMESPACE = "tfm"

_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def register(operator: Operator, launch: Callable) -> None:
    """`launch` computes `operator` on CUDA tensors and, in Triton's interpreter, on CPU tensors."""
    _library.define(operator.schema, tags=(torch.Tag.needs_exact_strides,))
    _library.impl(operator.name, launch, "CUDA")
    _library.impl(operator.name, launch, "CPU")
    torch.library.register_fake(f"{NAMESPACE}::{operator.name}", operator.fake, lib=_library)
