"""A mixture of feed-forward experts: grouped products over the rows that each expert got, and their gradients.

T tokens with K places each make T · K rows, which are sorted by expert. Of row j, token t and its expert e:

    pre[j] = first_e x[t] + first_bias_e        hidden = f(pre), or f(gate) · up of pre's two halves
    out[j] = second_e hidden[j] + second_bias_e        y[t] = Σ_k w[t, k] · out[place[t, k]], in the order of k

Backward, of a row with weight w, with d = second_eᵀ dy[t], the gradient of hidden were w 1:

    dw = d · hidden + dy[t] · second_bias_e        dpre = w · d, through the activation
    dx[t] = Σ_k first_eᵀ dpre[place[t, k]]        dfirst_e = Σ_j dpre[j] x[t]ᵀ        dfirst_bias_e = Σ_j dpre[j]
    dsecond_e = Σ_j w · dy[t] hidden[j]ᵀ        dsecond_bias_e = Σ_j w · dy[t]

Saved: what was given, the order of the rows, and pre. Weights come as one tensor for all experts or as one for each,
which are read where they lie; their gradients are one tensor for all either way.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tfm.operators.autograd import Differentiable, Forward
from tfm.operators.calling import run
from tfm.operators.declaration import FLOATS, MANY, Row, operator
from tfm.operators.watching import is_intercepted
from tfm.reference import experts as reference

ROWS = (
    Row(("experts",), "triton", FLOATS, max_columns=MANY),
    # In bf16 torch's own products are faster: processors have instructions for them.
    Row(("experts",), "native", (torch.float32,), max_columns=MANY, device="cpu"),
)


@operator("experts")
class ExpertsRouting(NamedTuple):
    """The places of all tokens sorted by expert, those of one expert in their own order.

    Attributes:
        index: [T, K], int32 or int64, any strides: the experts of each token; outside [0, experts) there is none.
        experts: how many there are.
    """

    index: Tensor  # type: ignore[assignment]
    experts: int

    def outputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns empty (order [T · K], place [T · K], offsets [experts + 1]), int32.

        Row j holds place order[j] % K of token order[j] // K, and place is the inverse of order; expert e has the rows
        from offsets[e] to offsets[e + 1]. Rows behind the last offset have no expert.
        """
        rows = self.index.shape[0] * self.index.shape[1]
        order, place, offsets = (
            torch.empty(size, dtype=torch.int32, device=self.index.device) for size in (rows, rows, self.experts + 1)
        )
        return order, place, offsets


@operator("experts")
class Experts(NamedTuple):
    """The mixture's outputs, of rows that are sorted.

    Attributes:
        x: [T, H], neighbouring columns side by side.
        order, place, offsets: of ExpertsRouting.
        weights: [T, K], contiguous.
        first: [E, W, H], contiguous, W = I or gated 2 I, gate above up; or for each of E experts its [W, H].
        second: [E, H, I] or for each its [H, I].
        first_bias, second_bias: [E, W] and [E, H], contiguous, or None.
        activation: a name of tfm.ops.feed_forward.
        gated: whether the activation of one half of pre multiplies the other.
        save: whether a backward follows.
    """

    x: Tensor
    order: Tensor
    place: Tensor
    offsets: Tensor
    weights: Tensor
    first: list[Tensor]
    second: list[Tensor]
    first_bias: Tensor | None
    second_bias: Tensor | None
    activation: str
    gated: bool
    save: bool

    def outputs(self) -> tuple[Tensor, Tensor]:
        """Returns empty (y [T, H], pre [T · K, W]), pre [0, W] where it is not kept."""
        x = self.x
        rows = self.order.shape[0] if self.save else 0
        pre = torch.empty((rows, self.first[0].shape[-2]), dtype=x.dtype, device=x.device)
        return torch.empty(x.shape, dtype=x.dtype, device=x.device), pre


@operator("experts")
class ExpertsBackward(NamedTuple):
    """The gradients of Experts.

    Attributes:
        dy: [T, H], neighbouring columns side by side.
        x, order, place, offsets, weights, first, second, first_bias, second_bias: as there.
        pre: its second output.
        activation, gated: as there.
        wanted: which are, in the order of the outputs.
    """

    dy: Tensor
    x: Tensor
    order: Tensor
    place: Tensor
    offsets: Tensor
    weights: Tensor
    pre: Tensor
    first: list[Tensor]
    second: list[Tensor]
    first_bias: Tensor | None
    second_bias: Tensor | None
    activation: str
    gated: bool
    wanted: list[bool]

    @property
    def experts(self) -> int:
        """The number of experts."""
        return self.offsets.shape[0] - 1

    def outputs(
        self,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Returns empty gradients of x, weights, first [E, W, H], second [E, H, I] and biases; None if not wanted."""
        first, second = ((self.experts, *x[0].shape[-2:]) for x in (self.first, self.second))
        shapes = self.x.shape, self.weights.shape, first, second, first[:2], second[:2]
        like = self.x, self.weights, self.first[0], self.second[0], self.first_bias, self.second_bias
        dx, dweights, dfirst, dsecond, dfirst_bias, dsecond_bias = (
            torch.empty(shape, dtype=x.dtype, device=x.device) if wanted and x is not None else None
            for shape, x, wanted in zip(shapes, like, self.wanted, strict=True)
        )
        return dx, dweights, dfirst, dsecond, dfirst_bias, dsecond_bias


class Mixture(NamedTuple):
    """A call of the operation, with the attributes of ExpertsRouting and Experts."""

    x: Tensor
    weights: Tensor
    first_bias: Tensor | None
    second_bias: Tensor | None
    first: list[Tensor]
    second: list[Tensor]
    index: Tensor  # type: ignore[assignment]
    experts: int
    activation: str
    gated: bool


class MixtureOfExperts(Differentiable):
    """The operation that gives (y,)."""

    arguments = Mixture
    learns = ("x", "weights", "first_bias", "second_bias", "first", "second")

    @staticmethod
    def forward(namespace, call, wanted):
        x, weights, first_bias, second_bias, first, second, index, experts, activation, gated = call
        routing = run(namespace, ExpertsRouting(index, experts))
        layer: list[Any] = [first, second, first_bias, second_bias, activation, gated]
        y, pre = run(namespace, Experts(x, *routing, weights, *layer, any(wanted)))  # type: ignore[call-arg]
        saved = x, weights, first_bias, second_bias, *first, *second, index, *routing, pre
        return Forward((y,), saved, (len(first), activation, gated))

    @staticmethod
    def backward(namespace, saved, options, grads, wanted):
        count, activation, gated = options
        x, weights, first_bias, second_bias, *others = saved
        first, second, (_, *routing, pre) = others[:count], others[count : 2 * count], others[2 * count :]
        small, of_first, of_second = wanted[:4], wanted[4 : 4 + count], wanted[4 + count :]
        dy = grads[0] if grads[0].stride(-1) == 1 else grads[0].contiguous()
        layer: list[Any] = [first, second, first_bias, second_bias, activation, gated]
        asked = [*small[:2], any(of_first), any(of_second), *small[2:]]
        call = ExpertsBackward(dy, x, *routing, weights, pre, *layer, asked)  # type: ignore[call-arg]
        dx, dweights, dfirst, dsecond, dfirst_bias, dsecond_bias = run(namespace, call)
        parts = (*_parts(dfirst, first, of_first), *_parts(dsecond, second, of_second))
        return dx, dweights, dfirst_bias, dsecond_bias, *parts

    @staticmethod
    def again(saved, options, grads):
        count, activation, gated = options
        learning, index = saved[: 4 + 2 * count], saved[4 + 2 * count]

        def output(x, weights, first_bias, second_bias, *others):
            first, second = (part[0] if part[0].dim() == 3 else list(part) for part in (others[:count], others[count:]))
            biases = first_bias, second_bias
            return (reference.experts(x, index, weights, first, second, *biases, activation, gated, is_intercepted()),)

        return output, learning


def _parts(gradient: Tensor | None, weights: list[Tensor], wanted: Any) -> list[Tensor | None]:
    """Returns the gradient of all experts as the weights came: whole, or of each expert its own."""
    if gradient is None:
        return [None] * len(weights)
    if weights[0].dim() == 3:
        return [gradient]
    return [part if is_wanted else None for part, is_wanted in zip(gradient.unbind(), wanted, strict=True)]
