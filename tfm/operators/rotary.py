"""Rotary position embedding, out of place and in place: the operators and their gradients.

kernels/rotary.py gives the mathematics.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tfm.operators.autograd import Differentiable, Forward
from tfm.operators.calling import run
from tfm.operators.declaration import CPU_FLOATS, FLOATS, MANY, Changed, Row, operator
from tfm.reference import rotary as reference

ROTARIES = ("rotary", "rotary_")
ROWS = (
    Row(ROTARIES, "triton", FLOATS, max_columns=1024),
    Row(ROTARIES, "native", CPU_FLOATS, max_columns=MANY, device="cpu"),
)


@operator("rotary")
class Rotary(NamedTuple):
    """Turns the first `turned` heads of `x`, copies the others, and turns all heads of `other`.

    Attributes:
        x: [B, H, S, D] or packed [N, H, D].
        other: the same with its own number of heads; None where there is none.
        cos: a row for each token, [B, S, R/2] or what broadcasts to it; with `positions` a table [P, R/2].
        sin: as `cos`.
        positions: integers that broadcast to the tokens; None where `cos` has a row for each.
        turned: how many heads of `x`.
        interleaved: pairs are columns 2i and 2i + 1, not i and i + R/2.
        inverse: turn back, as the gradients are.
    """

    x: Tensor
    other: Tensor | None
    cos: Tensor
    sin: Tensor
    positions: Tensor | None
    turned: int
    interleaved: bool
    inverse: bool

    def outputs(self) -> tuple[Tensor, Tensor | None]:
        """Returns empty tensors like `x` and `other`, tokens and heads in the order of their memory."""

        def empty(x: Tensor) -> Tensor:
            kept = torch.preserve_format if x.stride(-1) == 1 else torch.contiguous_format
            return torch.empty_like(x, memory_format=kept)

        return empty(self.x), None if self.other is None else empty(self.other)


@operator("rotary")
class Rotary_(NamedTuple):
    """Turns the first `heads` heads of `x` where they lie; the other arguments are as in Rotary."""

    x: Changed
    cos: Tensor
    sin: Tensor
    positions: Tensor | None
    heads: int
    interleaved: bool

    def outputs(self) -> None:
        """Returns nothing: `x` is written."""


class DifferentiableRotary(Differentiable):
    """The operation out of place. Saved: the tables and positions, nothing of the size of a query."""

    arguments = Rotary
    learns = ("x", "other")

    @staticmethod
    def forward(namespace, call, wanted):
        turned = run(namespace, call)
        constant = tuple(y for y, needed in zip(turned, wanted, strict=True) if y is not None and not needed)
        return Forward(turned, (call.cos, call.sin, call.positions), call.interleaved, constant)

    @staticmethod
    def backward(namespace, saved, options, grads, wanted):
        asked = [d if needed else None for d, needed in zip(grads, wanted, strict=True)]
        given = [d for d in asked if d is not None]
        if not given:
            return None, None
        (cos, sin, positions), (first, second) = saved, (*given, None)[:2]
        turned = iter(run(namespace, Rotary(first, second, cos, sin, positions, first.shape[1], options, True)))
        return [None if d is None else next(turned) for d in asked]

    @staticmethod
    def again(saved, options, grads):
        cos, sin, positions = saved

        def turned(*parts):
            return [None if x is None else reference.rotary(x, cos, sin, positions, options) for x in parts]

        return turned, [None if d is None else torch.zeros_like(d) for d in grads]


class DifferentiableRotary_(Differentiable):
    """The operation in place; other heads pass their gradient through. Saved: the tables and positions."""

    arguments = Rotary_
    learns = ("x",)
    changes = True

    @staticmethod
    def forward(namespace, call, wanted):
        run(namespace, call)
        if not (wanted[0] or torch.compiler.is_compiling()):
            torch.autograd.graph.increment_version(call.x)  # what autograd kept of it is no more
        return Forward((call.x,), (call.cos, call.sin, call.positions), (call.heads, call.interleaved))

    @staticmethod
    def backward(namespace, saved, options, grads, wanted):
        (dx,), (cos, sin, positions), (heads, interleaved) = grads, saved, options
        return run(namespace, Rotary(dx, None, cos, sin, positions, heads, interleaved, inverse=True))[:1]

    @staticmethod
    def again(saved, options, grads):
        (cos, sin, positions), (heads, interleaved) = saved, options

        def turned(x):
            first, others = x.split((heads, x.shape[1] - heads), dim=1)
            return (torch.cat((reference.rotary(first, cos, sin, positions, interleaved), others), dim=1),)

        return turned, (torch.zeros_like(grads[0]),)
