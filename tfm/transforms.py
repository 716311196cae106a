"""Tells where torch's transforms are at work, and computes there what they need by torch's own operations.

Kernels know one thing, the gradient of one call. Second derivatives, batched gradients, torch.func and forward-mode
differentiation come from the reference, which torch can differentiate as often as it likes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tfm.autocast import without_autocast
from tfm.taping import here

# Outputs of a Function as its inputs give them: a function of all its arguments, and those arguments.
Recomputed = tuple[Callable[..., Sequence[Tensor | None]], Sequence[Any]]


def transforming() -> bool:
    """Tells whether a transform of torch.func, or forward-mode differentiation, is at work: Dynamo guards on both."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def wraps_tensors(x: Tensor) -> bool:
    """Tells whether `x` is of a class that runs torch's operations on tensors inside it, as DTensor does on shards."""
    return type(x) is not Tensor and is_traceable_wrapper_subclass(x)


def is_readable(x: Tensor) -> bool:
    """Tells whether the host may read values of `x` without waiting: on a CPU, unless it is a trace's stand-in."""
    if x.device.type != "cpu" or type(x) is not Tensor or torch.compiler.is_compiling() or transforming():
        return False
    if here.tape is not None:
        # What follows from values holds for no other call.
        here.tape.is_whole = False
    return True


def is_differentiated(*tensors: Tensor | None) -> bool:
    """Tells whether a gradient of any of them is recorded, or its tangent carried on."""
    if torch.is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                return True
    if forward_ad._current_level < 0:
        return False
    return any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def gradients(
    compute: Callable[..., Sequence[Tensor | None]], arguments: Sequence[Any], needed: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Returns the gradients of the `arguments` that are needed, from those of `compute(*arguments)`, by torch itself.

    They are partial ones, as a backward gives them, whatever else connects the arguments. An argument that is not a
    tensor has none.
    """
    places = [place for place, x in enumerate(arguments) if needed[place] and isinstance(x, Tensor)]
    given = [place for place, grad in enumerate(grads) if grad is not None]

    def of_places(*tensors: Tensor) -> tuple[Tensor | None, ...]:
        filled = list(arguments)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        outputs = compute(*filled)
        return tuple(outputs[place] for place in given)

    if not places or not given:
        return (None,) * len(arguments)
    with without_autocast(arguments[places[0]].device):
        pull_back = torch.func.vjp(of_places, *(arguments[place] for place in places))[1]
        found = dict(zip(places, pull_back(tuple(grads[place] for place in given)), strict=True))
    return tuple(found.get(place) for place in range(len(arguments)))


def beyond_one_backward(*grads: Tensor | None) -> bool:
    """Tells, within a backward, whether what it gives is differentiated again, or comes in batches."""
    # A backward runs with gradients enabled only under create_graph=True; a graph that is compiled has none of this.
    if torch.compiler.is_compiling():
        return False
    # torch.autograd.grad(is_grads_batched=True) has a vmap of its own.
    batched = any(grad is not None and torch._C._functorch.is_legacy_batchedtensor(grad) for grad in grads)
    return batched or torch.is_grad_enabled() or transforming()


def differentiable_by(recompute: Callable[..., Recomputed]) -> Callable[[Callable], Callable]:
    """Decorates a Function's backward by kernels: its gradients may be differentiated again, or come in batches.

    Then, and only then, they are those of `recompute(ctx, *grads)`, in the order of the Function's arguments. Where an
    output is linear in an argument that was not saved, zeros may stand for that argument.
    """

    def decorate(backward: Callable) -> Callable:
        @functools.wraps(backward)
        def either(ctx: Any, *grads: Tensor | None) -> Any:
            if beyond_one_backward(*grads):
                return gradients(*recompute(ctx, *grads), ctx.needs_input_grad, grads)
            return backward(ctx, *grads)

        return either

    return decorate
