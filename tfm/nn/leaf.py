"""What torch's older tracers see of tfm.nn's modules: torch.fx a leaf, as of torch.nn's; TorchScript a way out."""

from __future__ import annotations

import functools
from typing import Any, TypeVar

import torch
from torch.fx import Proxy

M = TypeVar("M", bound=Any)


def leaf(kind: M) -> M:
    """`kind`, a subclass of a module of torch's, that torch.fx records as one node instead of looking inside."""
    forward, of_torch = kind.forward, kind.__bases__[0].forward

    @functools.wraps(forward)
    def recorded_or_run(self: Any, *args: Any, **named: Any) -> Any:
        for x in (*args, *named.values()):
            if isinstance(x, Proxy):
                tracer: Any = x.tracer
                if tracer.root is self:
                    return of_torch(self, *args, **named)
                return tracer.create_proxy("call_module", tracer.path_of_module(self), args, named)
        return forward(self, *args, **named)

    kind.forward = recorded_or_run
    kind.__prepare_scriptable__ = _refuse_script
    return kind


def _refuse_script(module: torch.nn.Module) -> torch.nn.Module:
    """torch.jit.script calls it, of every module, before it compiles any."""
    name = type(module).__name__
    raise RuntimeError(
        f"torch.jit.script: tfm.nn.{name} is no TorchScript; tfm.restore(model) gives torch.nn.{name} back, and"
        " torch.jit.trace and torch.export take it as it is"
    )
