"""Rotary position embedding, out of place and in place: the operators and their autograd.

kernels/rotary.py gives the mathematics. Saved: the tables and positions, nothing of the size of a query.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tfm.operators.operator import Operator, distinct
from tfm.reference import rotary as reference
from tfm.transforms import Recomputed, differentiable_by, is_differentiated


def forward_output(x: Tensor) -> Tensor:
    """Still empty, its tokens and heads in the order of x's memory."""
    kept = torch.preserve_format if x.stride(-1) == 1 else torch.contiguous_format
    return torch.empty_like(x, memory_format=kept)


ROTARY = Operator(
    "rotary(Tensor x, Tensor? other, Tensor cos, Tensor sin, Tensor? positions, int turned, bool interleaved,"
    " bool inverse) -> (Tensor, Tensor?)",
    fake=lambda x, other, *_: (forward_output(x), None if other is None else forward_output(other)),
)
ROTARY_IN_PLACE = Operator(
    "rotary_(Tensor(a!) x, Tensor cos, Tensor sin, Tensor? positions, int heads, bool interleaved) -> ()",
    fake=lambda *_: None,
)
OPERATORS = (ROTARY, ROTARY_IN_PLACE)


def _recompute(ctx, *grads: Tensor | None) -> Recomputed:
    cos, sin, positions = ctx.saved_tensors

    def turned(_, *parts):
        return [None if x is None else reference.rotary(x, cos, sin, positions, ctx.interleaved) for x in parts[:2]]

    return turned, (None, *(None if d is None else torch.zeros_like(d) for d in grads), *[None] * 4)


def _recompute_in_place(ctx, dx: Tensor) -> Recomputed:
    heads, interleaved = ctx.options
    cos, sin, positions = ctx.saved_tensors

    def turned(_, x, *rest):
        first, others = x.split((heads, x.shape[1] - heads), dim=1)
        return (torch.cat((reference.rotary(first, cos, sin, positions, interleaved), others), dim=1),)

    return turned, (None, torch.zeros_like(dx), *[None] * 5)


class Rotary(torch.autograd.Function):
    """Autograd of the operator out of place; `key` may be None."""

    @staticmethod
    def forward(ctx, namespace, query, key, cos, sin, positions, interleaved):
        ctx.save_for_backward(cos, sin, positions)
        ctx.namespace, ctx.interleaved = namespace, interleaved
        ctx.set_materialize_grads(False)
        operator = getattr(torch.ops, namespace).rotary.default
        turned = operator(query, key, cos, sin, positions, query.shape[1], interleaved, False)
        pairs = zip(turned, ctx.needs_input_grad[1:3], strict=True)
        ctx.mark_non_differentiable(*(y for y, needed in pairs if y is not None and not needed))
        return turned

    @staticmethod
    @differentiable_by(_recompute)
    def backward(ctx, dquery, dkey):
        wanted = [d if needed else None for d, needed in zip((dquery, dkey), ctx.needs_input_grad[1:3], strict=True)]
        given = [d for d in wanted if d is not None]
        if not given:
            return (None,) * 7
        first, second = (*given, None)[:2]
        operator = getattr(torch.ops, ctx.namespace).rotary.default
        turned = operator(first, second, *ctx.saved_tensors, first.shape[1], ctx.interleaved, True)
        remaining = iter(turned)
        return None, *(None if d is None else next(remaining) for d in wanted), *[None] * 4


class RotaryInPlace(torch.autograd.Function):
    """Autograd of the operator in place; heads that are not turned hand their gradient through."""

    @staticmethod
    def forward(ctx, namespace, x, heads, cos, sin, positions, interleaved):
        ctx.save_for_backward(cos, sin, positions)
        ctx.namespace, ctx.options = namespace, (heads, interleaved)
        getattr(torch.ops, namespace).rotary_.default(x, cos, sin, positions, heads, interleaved)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    @differentiable_by(_recompute_in_place)
    def backward(ctx, dx):
        heads, interleaved = ctx.options
        operator = getattr(torch.ops, ctx.namespace).rotary.default
        return None, operator(dx, None, *ctx.saved_tensors, heads, interleaved, True)[0], *[None] * 5


def rotary(
    namespace: str, query: Tensor, key: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor | None,
    interleaved: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """See tfm.ops.rotary."""
    if not is_differentiated(query, key):
        # The Function takes longer than a decoding step's few tokens.
        operator = getattr(torch.ops, namespace).rotary.default
        return operator(query, key, cos, sin, positions, query.shape[1], interleaved, False)
    return Rotary.apply(namespace, *distinct((query, key, cos, sin, positions)), interleaved)


def rotary_(
    namespace: str, x: Tensor, heads: int, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool
) -> Tensor:
    """See tfm.ops.rotary_."""
    if not is_differentiated(x):
        # Dynamo does not trace a Function that changes what needs no gradient.
        getattr(torch.ops, namespace).rotary_.default(x, cos, sin, positions, heads, interleaved)
        if not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version(x)  # what autograd kept of it is no more
        return x
    return RotaryInPlace.apply(namespace, x, heads, cos, sin, positions, interleaved)
