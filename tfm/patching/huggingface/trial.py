"""Small twins of modules, on which a forward of theirs and one of ours are compared before a module gets ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from tfm.ops.backends import use
from tfm.patching.fusion import Fused, fuse, plain_kind

# Modules of one class are alike; they are only looked at.
_KNOWN: dict[tuple[type[Module], type[Fused]], bool] = {}


def twin_of(module: Module, parameters: Mapping[str, Tensor], modules: Mapping[str, Module], **attributes: Any) -> Any:
    """Returns a module in evaluation like `module`, but with these parameters, children and attributes."""
    kind: Any = plain_kind(module)
    twin = kind.__new__(kind)
    vars(twin).update(vars(module))
    learned = {name: Parameter(x.clone(), requires_grad=False) for name, x in parameters.items()}
    vars(twin).update({"_parameters": learned, "_modules": dict(modules), "training": False, **attributes})
    return twin


def does_the_same(
    module: Module, forward: type[Fused], make: Callable[[], Module], run: Callable[[Any], list[Tensor]]
) -> bool:
    """Tells whether `forward` gives on a twin what the module's own class gives.

    Args:
        module: any of its class; all are taken to be alike.
        forward: ours.
        make: makes a twin, the same at each call.
        run: calls a twin and returns all that comes of it, states included.
    """
    key = plain_kind(module), forward
    if key not in _KNOWN:
        _KNOWN[key] = _tried(forward, make, run)
    return _KNOWN[key]


def _tried(forward: type[Fused], make: Callable[[], Module], run: Callable[[Any], list[Tensor]]) -> bool:
    theirs, ours = make(), make()
    fuse(ours, "trial", forward)
    try:
        with torch.no_grad(), use("reference"):
            expected, found = run(theirs), run(ours)
    except Exception:
        return False
    return len(expected) == len(found) and all(
        x.shape == y.shape and x.dtype == y.dtype and torch.allclose(x, y, rtol=1e-4, atol=1e-5)
        for x, y in zip(found, expected, strict=True)
    )
