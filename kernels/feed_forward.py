"""The position-wise feed-forward network, plain and gated: two matmuls with an activation and dropout between them.

With the hidden layer of tfm.kernels.activation_dropout,

    y = hidden w2ᵀ + b2                      pre = x w1ᵀ + b1

Backward, with the gradient dpre of the pre-activation that the second matmul's gradient leaves in its epilogue:

    dx = dpre w1    dw1 = dpreᵀ x    db1 = sum over rows of dpre    dw2 = dyᵀ hidden    db2 = sum over rows of dy

Saved: x, the weights, the pre-activation (ReLU's hidden instead) and the seed. Forward: 2 launches, 3 where cuBLAS and
an element-wise kernel are faster. Backward: dpre with hidden and db1's partial sums, their sum, dx, dw1 and dw2 are 5
launches, 6 by cuBLAS, one more for db2; a gate and up with weights of their own take one more for dx.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tfm.kernels.linear_activation import keeps_hidden


class FeedForward(torch.autograd.Function):
    """Autograd of both; the second output is what the backward needs of the hidden layer, empty where not `save`."""

    @staticmethod
    def forward(x, weight, up_weight, b1, w2, b2, gated, activation, dropout_p, seed, site, save):
        rows = x.reshape(-1, x.shape[-1])
        hidden, pre = torch.ops.tfm.linear_activation(
            rows, weight, up_weight, b1, gated, activation, dropout_p, seed, site, save
        )  # fmt: skip
        y = hidden @ w2.t() if b2 is None else torch.addmm(b2.to(x.dtype), hidden, w2.t())
        return y.view(*x.shape[:-1], w2.shape[0]), hidden if keeps_hidden(gated, activation) else pre

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, up_weight, b1, w2, b2, ctx.gated, ctx.activation, ctx.dropout_p, seed, ctx.site, _ = inputs
        _, saved = output
        ctx.save_for_backward(x, weight, up_weight, w2, saved, seed)
        ctx.bias_dtypes = tuple(None if bias is None else bias.dtype for bias in (b1, b2))
        ctx.mark_non_differentiable(saved)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, _):
        x, weight, up_weight, w2, saved, seed = ctx.saved_tensors
        needs_x, needs_weight, needs_up, needs_b1, needs_w2, needs_b2 = ctx.needs_input_grad[:6]
        hidden_settings = ctx.gated, ctx.activation, ctx.dropout_p, seed, ctx.site
        dx = dweight = dup = db1 = dw2 = db2 = None
        # The gradients have the dtypes of their operands, whatever autocast says of this moment.
        with torch.autocast(dy.device.type, enabled=False):
            dy = dy.reshape(-1, dy.shape[-1])
            hidden = saved if keeps_hidden(ctx.gated, ctx.activation) else None
            recompute = needs_w2 and hidden is None
            if needs_x or needs_weight or needs_up or needs_b1:
                dpre, recomputed, db1 = torch.ops.tfm.linear_activation_backward(
                    dy, w2, saved, *hidden_settings, recompute, ctx.bias_dtypes[0] if needs_b1 else None
                )  # fmt: skip
                dx = input_gradient(dpre, weight, up_weight).view(x.shape) if needs_x else None
                dweight, dup = weight_gradients(dpre, x.reshape(-1, x.shape[-1]), up_weight, needs_weight, needs_up)
            elif recompute:
                recomputed = torch.ops.tfm.activation_dropout(saved, *hidden_settings)
            if needs_w2:
                dw2 = dy.t() @ (recomputed if recompute else hidden)
            if needs_b2:
                db2 = dy.sum(0, dtype=ctx.bias_dtypes[1])
        return dx, dweight, dup, db1, dw2, db2, None, None, None, None, None, None


def input_gradient(dpre: Tensor, weight: Tensor, up_weight: Tensor | None) -> Tensor:
    """dx [rows, depth]."""
    if up_weight is None:
        return dpre @ weight
    dgate, dup = dpre.chunk(2, dim=1)
    return torch.addmm(dgate @ weight, dup, up_weight)


def weight_gradients(
    dpre: Tensor, x: Tensor, up_weight: Tensor | None, needs_weight: bool, needs_up: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Those of the first weight and of up's own; both are halves of one product."""
    if up_weight is None:
        return (dpre.t() @ x if needs_weight else None), None
    if needs_weight and needs_up:
        dweight, dup = (dpre.t() @ x).chunk(2)
        return dweight, dup
    dgate, dup = dpre.chunk(2, dim=1)
    return (dgate.t() @ x if needs_weight else None), (dup.t() @ x if needs_up else None)


def feed_forward(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None,
    activation: str, dropout_p: float, seed: Tensor | None, site: int,
) -> Tensor:  # fmt: skip
    """See tfm.ops.feed_forward."""
    return _apply(x, w1, None, b1, w2, b2, False, activation, dropout_p, seed, site)


def gated_feed_forward(
    x: Tensor, gate_weight: Tensor, up_weight: Tensor | None, down_weight: Tensor,
    activation: str, dropout_p: float, seed: Tensor | None, site: int,
) -> Tensor:  # fmt: skip
    """See tfm.ops.gated_feed_forward."""
    return _apply(x, gate_weight, up_weight, None, down_weight, None, True, activation, dropout_p, seed, site)


def _apply(x, weight, up_weight, b1, w2, b2, gated, activation, dropout_p, seed, site):
    # Weights take the dtype of x, as those of torch's autocast do; biases are read in their own.
    weight, up_weight, w2 = (None if matrix is None else matrix.to(x.dtype) for matrix in (weight, up_weight, w2))
    given = (x, weight, up_weight, b1, w2)
    save = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in given)
    seed = None if seed is None else seed.to(x.device)
    return FeedForward.apply(x, weight, up_weight, b1, w2, b2, gated, activation, dropout_p, seed, site, save)[0]
