"""Half a feed-forward network: a linear layer with its activation, and an activation with a gate by itself.

The operators are those of tfm.operators.feed_forward. With its hidden layer and dpre, the gradient of its
pre-activation,

    dx = dpre weight    dweight = dpreᵀ x    dbias = sum over rows of dpre

Saved: x, the weight, the pre-activation (ReLU's hidden instead) and the seed. Triton: forward 1 launch, 2 where cuBLAS
and an element-wise kernel are faster; backward dpre and the bias's partial sums, their sum, dx and dweight are 4.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tfm.autocast import without_autocast
from tfm.operators.autograd import Differentiable, Forward
from tfm.operators.calling import run
from tfm.operators.feed_forward import ActivationDropout, ActivationDropoutBackward, LinearActivation, keeps_hidden
from tfm.reference import feed_forward as reference


class Layer(NamedTuple):
    """A call of linear layer and activation.

    Attributes:
        x: [..., depth].
        weight: [columns, depth], of the dtype of x.
        bias: [columns] or None.
        activation, dropout_p, seed, site: as in ActivationDropout.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    activation: str
    dropout_p: float
    seed: Tensor | None
    site: int


class ActivatedLinear(Differentiable):
    """The operation that gives (hidden,)."""

    arguments = Layer
    learns = ("x", "weight", "bias")

    @staticmethod
    def forward(namespace, call, wanted):
        x, weight, bias, activation, dropout_p, seed, site = call
        rows, layer = x.reshape(-1, x.shape[-1]), (activation, dropout_p, seed, site)
        hidden, pre = run(namespace, LinearActivation(rows, weight, None, bias, False, *layer, any(wanted)))
        # Autograd would not let a view made in here be changed in place.
        y = torch.ops.aten._unsafe_view(hidden, (*x.shape[:-1], weight.shape[0]))
        # What is saved is the result itself, so that autograd notices where that is changed.
        kept = y if keeps_hidden(False, activation) else pre
        return Forward((y,), (x, weight, bias, kept, seed), (activation, dropout_p, site))

    @staticmethod
    def backward(namespace, saved, options, grads, wanted):
        (x, weight, bias, kept, seed), (activation, dropout_p, site) = saved, options
        needs_x, needs_weight, needs_bias = wanted
        with without_autocast(x.device):
            kept = kept.view(-1, weight.shape[0])
            dhidden = grads[0].reshape(kept.shape).contiguous()
            dbias = bias.dtype if needs_bias else None
            layer = False, activation, dropout_p, seed, site
            dpre, _, dbias = run(namespace, ActivationDropoutBackward(dhidden, kept, *layer, False, dbias))
            dx = (dpre @ weight).view(x.shape) if needs_x else None
            dweight = dpre.t() @ x.reshape(-1, x.shape[-1]) if needs_weight else None
        return dx, dweight, dbias

    @staticmethod
    def again(saved, options, grads):
        (x, weight, bias, _, seed), (activation, dropout_p, site) = saved, options

        def output(x, weight, bias):
            return (reference.linear_activation(x, weight, bias, activation, dropout_p, seed, site),)

        return output, (x, weight, bias)


class Gated(NamedTuple):
    """A call of an activation and its gate; the arguments are those of ActivationDropout from `activation` on.

    Attributes:
        pre: [rows, 2 · columns], contiguous, gate first.
    """

    pre: Tensor
    activation: str
    dropout_p: float
    seed: Tensor | None
    site: int


class GatedActivation(Differentiable):
    """The operation that gives (hidden,) of pre-activations."""

    arguments = Gated
    learns = ("pre",)

    @staticmethod
    def forward(namespace, call, wanted):
        pre, *layer = call
        activation, dropout_p, seed, site = layer
        hidden = run(namespace, ActivationDropout(pre, True, *layer))
        return Forward((hidden,), (pre, seed), (activation, dropout_p, site))

    @staticmethod
    def backward(namespace, saved, options, grads, wanted):
        (pre, seed), (activation, dropout_p, site) = saved, options
        layer = True, activation, dropout_p, seed, site
        return run(namespace, ActivationDropoutBackward(grads[0].contiguous(), pre, *layer, False, None))[:1]

    @staticmethod
    def again(saved, options, grads):
        (pre, seed), (activation, dropout_p, site) = saved, options

        def output(pre):
            return (reference.gated_activation(pre, activation, dropout_p, seed, site),)

        return output, (pre,)
