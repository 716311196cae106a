"""How the kernels' launchers become operators of torch: opaque to torch.compile, each with its fake."""

from __future__ import annotations

from collections.abc import Callable

import torch

_library = torch.library.Library("tfm", "FRAGMENT")


def register(schema: str, launch: Callable, fake: Callable) -> None:
    """Defines operator tfm::`schema`.

    `launch` runs it on CUDA tensors and, in Triton's interpreter, on CPU tensors; `fake` makes its empty outputs.
    Gradients stay outside: an autograd.Function around the operator costs half of what register_autograd costs.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.needs_exact_strides,))
    _library.impl(name, launch, "CUDA")
    _library.impl(name, launch, "CPU")
    torch.library.register_fake(f"tfm::{name}", fake, lib=_library)
