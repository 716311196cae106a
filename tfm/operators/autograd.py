"""One autograd.Function for all operations, and what an operation states of its gradients.

Gradients stay outside the operators: a Function around them costs half of what torch's register_autograd costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tfm.operators.calling import Steps
from tfm.taping import here
from tfm.transforms import beyond_one_backward, gradients, is_differentiated


class Forward(NamedTuple):
    """The results of an operation's forward, and what its backward needs.

    Attributes:
        outputs: what the caller gets; None where there is none.
        saved: the tensors that the backward needs.
        options: whatever else it needs, no tensors.
        constant: those of the outputs that have no gradient.
    """

    outputs: tuple[Tensor | None, ...]
    saved: tuple[Tensor | None, ...]
    options: Any
    constant: tuple[Tensor, ...] = ()


class Differentiable:
    """An operation with gradients; subclasses state it and are never instantiated.

    Attributes:
        arguments: the NamedTuple of its calls.
        learns: the names of the fields that have gradients, in the order of the fields; of a list each tensor has one,
            in its place.
        changes: whether the first of them is changed in place, and is the output.
        places: where they stand in a call.
    """

    arguments: Any = None
    learns: tuple[str, ...] = ()
    changes = False
    places: tuple[int, ...] = ()

    def __init_subclass__(cls) -> None:
        cls.places = tuple(cls.arguments._fields.index(name) for name in cls.learns)

    @staticmethod
    def forward(namespace: str, call: Any, wanted: Sequence[bool]) -> Forward:
        """Computes the call by the operators of `namespace`; `wanted` says which gradients will be needed."""
        raise NotImplementedError

    @staticmethod
    def backward(
        namespace: str, saved: Sequence[Tensor | None], options: Any, grads: Sequence[Tensor | None],
        wanted: Sequence[bool],
    ) -> Sequence[Tensor | None]:  # fmt: skip
        """Returns the gradients of the fields that learn, None where not wanted; of `grads` at least one is given."""
        raise NotImplementedError

    @staticmethod
    def again(
        saved: Sequence[Tensor | None], options: Any, grads: Sequence[Tensor | None]
    ) -> tuple[Callable[..., Sequence[Tensor | None]], Sequence[Tensor | None]]:
        """Returns the outputs as a function in torch's own operations, and its arguments, for higher derivatives.

        Where an output is linear in a tensor that was not saved, zeros may stand for that tensor.
        """
        raise NotImplementedError


class _Function(torch.autograd.Function):
    """The one Function. Only tensors that may have a gradient are arguments of their own: each costs 0.15 µs."""

    # Not setup_context, whose arguments torch binds by name, 23 µs a call: that is most of what a small norm takes.
    @staticmethod
    def forward(ctx, operation, namespace, call, *learning):
        outputs, saved, ctx.options, constant = operation.forward(namespace, call, ctx.needs_input_grad[3:])
        ctx.save_for_backward(*saved)
        ctx.operation, ctx.namespace = operation, namespace
        ctx.set_materialize_grads(False)
        if constant:
            ctx.mark_non_differentiable(*constant)
        if operation.changes:
            ctx.mark_dirty(learning[0])
        return outputs

    @staticmethod
    def backward(ctx, *grads):
        wanted = ctx.needs_input_grad[3:]
        operation, saved = ctx.operation, ctx.saved_tensors
        for grad in grads:  # any() of a generator would take longer
            if grad is not None:
                break
        else:
            return (None,) * (3 + len(wanted))
        if beyond_one_backward(*grads):
            compute, learning = operation.again(saved, ctx.options, grads)
            found = gradients(compute, learning, wanted, grads)
        else:
            namespace = ctx.namespace
            if namespace.__class__ is Steps:
                namespace = namespace.of_backward(saved, grads, wanted)
            found = operation.backward(namespace, saved, ctx.options, grads, wanted)
            if namespace.__class__ is Steps and namespace.is_open:
                namespace.close()
        return None, None, None, *found


# torch's own `apply` looks through the arguments for what transforms left, where none is at work, too.
bare_apply: Callable[..., Any] = super(torch.autograd.Function, _Function).apply


def apply(operation: type[Differentiable], namespace: str, call: Any) -> Any:
    """Returns the outputs of `operation` for this call, with gradients for the fields that learn."""
    if not torch.compiler.is_compiling() and here.tape is not None:
        return here.tape.apply(operation, namespace, call)
    learning = _learning(operation, call)
    if not is_differentiated(*learning):
        # The Function takes longer than a decoding step's few tokens.
        return operation.forward(namespace, call, (False,) * len(learning))[0]
    if torch.compiler.is_compiling():
        learning = _distinct(learning)
    return _Function.apply(operation, namespace, call, *learning)


def _learning(operation: type[Differentiable], call: Any) -> list[Tensor | None]:
    """Returns what of a call may have a gradient, the tensors of a list one by one."""
    found: list[Tensor | None] = []
    for place in operation.places:
        x = call[place]
        if x.__class__ is list:
            found += x
        else:
            found.append(x)
    return found


def _distinct(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Returns a view of each tensor that comes again: Dynamo does not trace a Function that gets one twice."""
    found: list[Tensor | None] = []
    for x in tensors:
        again = x is not None and any(x is other for other in found)
        found.append(x.view_as(x) if again and x is not None else x)
    return found
