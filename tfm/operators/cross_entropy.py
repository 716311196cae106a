"""Cross-entropy, of a linear layer's output or of logits, its gradients formed in the forward: operators and gradients.

"mean" and "sum" know every row's factor but for the incoming gradient, one scalar: the gradients are formed in the
forward, 6 N D V flops in all, and the backward multiplies them by that scalar: X, W and the targets are saved for
second derivatives alone. "none" meets a factor for each row, and dW cannot be rescaled by rows: its backward forms the
chunks again, 8 N D V flops in all, and their softmax too: one saved from other roundings of the logits would leave an
error in p - 1 where p is near 1.

tfm/operators/chunks.py has the loop that every backend runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tfm.operators.autograd import Differentiable, Forward
from tfm.operators.calling import run
from tfm.operators.declaration import CPU_FLOATS, FLOATS, MANY, Changed, MaybeChanged, Row, operator
from tfm.reference import cross_entropy as reference
from tfm.transforms import is_readable

LOSSES = ("linear_cross_entropy", "cross_entropy")
ROWS = (
    Row(LOSSES, "triton", FLOATS, max_columns=MANY),
    Row(LOSSES, "native", CPU_FLOATS, max_columns=MANY, device="cpu"),
)

# dX, dW and dbias, None where not wanted.
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


@operator("cross_entropy")
class LinearCrossEntropy(NamedTuple):
    """The loss of input linear_weightᵀ + linear_bias, and its gradients.

    Attributes:
        input: [N, D].
        linear_weight: [V, D].
        linear_bias: [V] or None.
        target: [N] int64.
        reduction, ignore_index, label_smoothing, z_loss, softcap: as in tfm.ops.linear_cross_entropy.
        needs: which of the first three get a gradient.
    """

    input: Tensor
    linear_weight: Tensor
    linear_bias: Tensor | None
    target: Tensor
    reduction: str
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float | None
    needs: list[bool]

    def outputs(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Returns empty (loss, scale, dX, dW, dbias), fp32 but for dX; the gradients are still to be scaled.

        For reduction "none" (losses [N], [0], None, None, None).
        """
        input = self.input
        if self.reduction == "none":
            # Not len(), which would fix a symbolic length.
            return _single(input.shape[:1], input), _single((0,), input), None, None, None
        loss = _single((), input)
        return loss, torch.empty_like(loss), *unscaled_gradients(input, self.linear_weight, self.needs)


@operator("cross_entropy")
class LinearCrossEntropyBackward(NamedTuple):
    """The gradients of reduction "none", from those of the losses.

    Attributes:
        grad: [N].
        input, linear_weight, ..., needs: as in LinearCrossEntropy.
    """

    grad: Tensor
    input: Tensor
    linear_weight: Tensor
    linear_bias: Tensor | None
    target: Tensor
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float | None
    needs: list[bool]

    def outputs(self) -> Gradients:
        """Returns empty (dX, dW, dbias) in the dtypes of what they are gradients of."""
        d_input, d_weight, d_bias = (
            torch.empty_like(x, memory_format=torch.contiguous_format) if needed and x is not None else None
            for x, needed in zip(self[1:4], self.needs, strict=True)
        )
        return d_input, d_weight, d_bias


@operator("cross_entropy", is_native_only=True)
class CrossEntropy_(NamedTuple):
    """The losses of rows of logits; the logits become their gradient. The kernel within the loop over chunks.

    Attributes:
        logits: [m, V]; the rows are contiguous.
        bias: fp32, added to each row; None for none.
        target: [m] int64.
        losses: [m] fp32, to be filled; None where not wanted.
        ignore_index, label_smoothing, z_loss, softcap: as in LinearCrossEntropy.
        want_gradient: whether the logits become their gradient.
        grad: [m] fp32, the gradients of the losses; None for 1.
        divisor: fp32 scalar that divides grad; None for 1.
    """

    logits: Changed
    bias: Tensor | None
    target: Tensor
    losses: MaybeChanged
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float | None
    want_gradient: bool
    grad: Tensor | None
    divisor: Tensor | None

    def outputs(self) -> None:
        """Returns nothing: what it computes is written in place."""


@operator("cross_entropy")
class CrossEntropy(NamedTuple):
    """The losses of rows of logits that are kept, and their gradients beside them.

    Attributes:
        logits: [N, V], contiguous.
        target: [N] int64, contiguous.
        ignore_index, ..., divisor: as in CrossEntropy_.
    """

    logits: Tensor
    target: Tensor
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float | None
    want_gradient: bool
    grad: Tensor | None
    divisor: Tensor | None

    def outputs(self) -> tuple[Tensor, Tensor | None]:
        """Returns empty (losses fp32 [N], dlogits), the latter None where it is not wanted."""
        gradient = torch.empty_like(self.logits) if self.want_gradient else None
        return _single(self.logits.shape[:1], self.logits), gradient


class LossOfLogits(Differentiable):
    """The operation that gives (the sum of the losses / divisor,), or the losses [N] where there is no divisor.

    Of a sum all losses weigh the same, in most backwards 1 / divisor: the gradient of the logits is formed in the
    forward, in the only pass over them, and saved in their place. Logits are saved too, for second derivatives.
    """

    arguments = CrossEntropy
    learns = ("logits",)

    @staticmethod
    def forward(namespace, call, wanted):
        is_reduced = call.divisor is not None
        losses, gradient = run(namespace, call._replace(want_gradient=is_reduced and wanted[0]))
        loss = losses.sum() / call.divisor if is_reduced else losses
        return Forward((loss,), (call.logits, call.target, call.divisor, gradient), call[2:6])

    @staticmethod
    def backward(namespace, saved, options, grads, wanted):
        (grad,), (logits, target, divisor, gradient) = grads, saved
        if divisor is None:
            call = CrossEntropy(logits, target, *options, True, grad.contiguous(), None)  # type: ignore[call-arg]
            return (run(namespace, call)[1],)
        is_done = _is_one(grad) and not torch._C._autograd._get_current_graph_task_keep_graph()
        return (gradient if is_done else times(gradient, grad, logits.dtype),)

    @staticmethod
    def again(saved, options, grads):
        logits, target, divisor, _ = saved

        def loss(logits):
            losses = reference.of_logits(logits, target, None, "none", reference.Options(*options))
            return (losses if divisor is None else losses.sum() / divisor,)

        return loss, (logits,)


class Loss(Differentiable):
    """The operation that gives (loss,). Saved: input, weight, bias, target, scale and the gradients already formed."""

    arguments = LinearCrossEntropy
    learns = ("input", "linear_weight", "linear_bias")

    @staticmethod
    def forward(namespace, call, wanted):
        loss, scale, *formed = run(namespace, LinearCrossEntropy(*call[:-1], list(wanted)))  # type: ignore[call-arg]
        return Forward((loss,), (*call[:4], scale, *formed), call[4:-1])

    @staticmethod
    def backward(namespace, saved, options, grads, wanted):
        (grad,), (input, linear_weight, linear_bias, target, scale, *formed) = grads, saved
        given, (reduction, *rest) = (input, linear_weight, linear_bias), options
        if reduction == "none":
            call = LinearCrossEntropyBackward(grad, *given, target, *rest, list(wanted))  # type: ignore[call-arg]
            return run(namespace, call)
        factor = grad * scale
        # A saved gradient handed on as it is may become a parameter's, and change: only where no backward follows.
        is_done = _is_one(factor) and not torch._C._autograd._get_current_graph_task_keep_graph()
        return tuple(
            g if g is None or (is_done and g.dtype == x.dtype) else times(g, factor, x.dtype)
            for g, x in zip(formed, given, strict=True)
        )

    @staticmethod
    def again(saved, options, grads):
        input, linear_weight, linear_bias, target = saved[:4]
        reduction, *rest = options

        def loss(input, linear_weight, linear_bias):
            options = reference.Options(*rest)
            return (reference.whole(input, linear_weight, target, linear_bias, None, reduction, options),)

        return loss, (input, linear_weight, linear_bias)


def unscaled_gradients(input: Tensor, weight: Tensor, needs: list[bool]) -> Gradients:
    """Returns empty (dX, dW, dbias) as a backend fills them, dW and dbias in fp32."""
    rows = torch.contiguous_format
    d_input = torch.empty_like(input, memory_format=rows) if needs[0] else None
    d_weight = torch.empty_like(weight, dtype=torch.float32, memory_format=rows) if needs[1] else None
    return d_input, d_weight, _single(weight.shape[:1], input) if needs[2] else None


def _single(shape: Sequence[int], like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def times(unscaled: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns `unscaled` times an fp32 scalar on the device, in fp32, rounded once to `dtype`. One launch."""
    # As a vector of one element the factor is not rounded to the narrower dtype first, as a scalar tensor would be.
    return torch.mul(unscaled, factor.view(1), out=torch.empty_like(unscaled, dtype=dtype))


def _is_one(factor: Tensor) -> bool:
    """Says whether there is nothing to multiply by, as in most backwards. Only a CPU knows it without waiting."""
    return is_readable(factor) and factor.item() == 1.0
