"""tfm.nn's modules as torch's tracers see them: torch.fx a leaf, Dynamo one of torch.nn's, TorchScript an error."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.fx import Proxy

M = TypeVar("M", bound=Any)


def leaf(kind: M) -> M:
    """Makes torch.fx record `kind`, whose last base is a module of torch, as one node instead of looking inside.

    Dynamo counts it among the modules that come with torch, for
    `torch.compiler.skip_guard_on_inbuilt_nn_modules_unsafe`, but not a user's subclass of it.
    """
    forward, of_torch = kind.forward, kind.__bases__[-1].forward

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
    # The same as torch._dynamo.mark_static, without importing it.
    kind._dynamo_marked_static = True
    kind.__init_subclass__ = classmethod(_unmarking(kind))
    return kind


def _unmarking(kind: Any) -> Callable[..., None]:
    """Returns an `__init_subclass__` for `kind` with which Dynamo counts its subclasses as a user's."""

    def unmark(subclass: Any, **named: Any) -> None:
        super(kind, subclass).__init_subclass__(**named)
        subclass._dynamo_marked_static = False

    return unmark


def _refuse_script(module: torch.nn.Module) -> torch.nn.Module:
    """Refuses torch.jit.script, which calls it of every module before it compiles any."""
    name = type(module).__name__
    raise RuntimeError(
        f"torch.jit.script: tfm.nn.{name} cannot be scripted; tfm.restore(model) gives torch.nn.{name} back, and"
        " torch.jit.trace and torch.export take it as it is"
    )
