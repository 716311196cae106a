"""The operators of Triton's kernels, `torch.ops.tfm`: opaque to torch.compile, and imported when they are first called.

Without triton, or until someone asks for it, the kernels' modules are not imported.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from tfm import native
from tfm.operators import OPERATORS, Operator, define
from tfm.operators.calling import recorders

NAMESPACE = "tfm"


def namespace_of(backend: str) -> str:
    """Returns the namespace in torch.ops whose operators the backend, "triton" or "native", computes."""
    return native.NAMESPACE if backend == "native" else NAMESPACE


def _kernel(item: Operator) -> Callable:
    """Returns what torch calls for the operator: its launch function, on the device of the first argument, a tensor."""
    launch: Callable | None = None
    tape: Any = None
    make = item.arguments._make

    def computed(*arguments: Any) -> Any:
        nonlocal launch, tape
        if launch is None:
            launch = getattr(import_module(f"tfm.kernels.{item.subject}"), item.name)
            tape = import_module("tfm.kernels.tape").Tape()
        with torch.cuda.device_of(arguments[0]):
            return launch(tape, make(arguments))

    return computed


def _recorded(item: Operator, call: Any) -> tuple[Callable[[Any], Any], Any]:
    """Runs an operator's call; returns what runs others of its kind, by plans where there are any, and the results."""
    launch = getattr(import_module(f"tfm.kernels.{item.subject}"), item.name)
    return import_module("tfm.kernels.plan").recorded(launch, call)


recorders[NAMESPACE] = _recorded
_library = define(NAMESPACE, native=False)
for _item in OPERATORS.values():
    if not _item.is_native_only:
        # CPU tensors are served by Triton's interpreter.
        for _device in ("CUDA", "CPU"):
            _library.impl(_item.name, _kernel(_item), _device)
