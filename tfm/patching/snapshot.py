"""A module as a recording of it reads it: what its tree consists of, and where its tensors lie."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from operator import is_

import torch
from torch import Tensor
from torch.nn import Module


class Snapshot:
    """All attributes of a module and of those inside it, training flags and dropout probabilities included.

    An attribute that is set anew is noticed, and so are tensors that moved; what changes inside a list or an object
    that stays the same is not.

    Attributes:
        tensors: parameters, buffers and other tensors that the modules hold, each once.
        why_eager: the reason why no recording of this module could be right; empty where one can.
        gradients: for each tensor that needs one, the memory in which every graph's backward leaves it.
    """

    def __init__(self, module: Module) -> None:
        modules = list(module.modules())
        self.dicts = [d for m in modules for d in (vars(m), *(v for v in vars(m).values() if isinstance(v, dict)))]
        self.lengths = list(map(len, self.dicts))
        # Most of a module's dicts are for hooks, and empty.
        self.filled = [d for d in self.dicts if d]
        self.values = list(chain.from_iterable(map(dict.values, self.filled)))
        self.places = [(d, name, x) for d in self.filled for name, x in d.items() if isinstance(x, Tensor)]
        self.tensors = list({x: None for _, _, x in self.places})
        self.memory = [_memory(x) for x in self.tensors]
        self.why_eager = next(filter(None, map(_why_eager, modules[1:])), "")
        if not all(type(x) in (Tensor, torch.nn.Parameter) for x in self.tensors):
            self.why_eager = "holds tensors that are no plain ones"
        self.gradients: dict[Tensor, Tensor] = {}

    def holds(self) -> bool:
        """Tells whether the module is as it was; it costs the host some microseconds a layer."""
        return (
            list(map(len, self.dicts)) == self.lengths
            and all(map(is_, chain.from_iterable(map(dict.values, self.filled)), self.values))
            and [_memory(x) for x in self.tensors] == self.memory
        )

    def is_on(self, device: torch.device) -> bool:
        """Tells whether all tensors are on `device`."""
        return all(x.device == device for x in self.tensors)

    def gradient_of(self, x: Tensor) -> Tensor:
        """Returns the memory for the gradient of a tensor."""
        if x not in self.gradients:
            self.gradients[x] = torch.empty_like(x, requires_grad=False)
        return self.gradients[x]

    @contextmanager
    def replaced(self, others: Mapping[Tensor, Tensor]) -> Iterator[None]:
        """Puts other tensors in the place of some of the module's."""
        try:
            for attributes, name, x in self.places:
                attributes[name] = others.get(x, x)
            yield
        finally:
            for attributes, name, x in self.places:
                attributes[name] = x


def _memory(x: Tensor) -> tuple[object, ...]:
    return x.data_ptr(), x.dtype, x.shape, x.stride(), x.requires_grad


def _why_eager(module: Module) -> str:
    if isinstance(module, torch.jit.ScriptModule):
        return "holds what TorchScript compiled"
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return "modules inside carry hooks" if hooks else ""
