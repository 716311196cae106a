"""The position-wise feed-forward network, plain and gated: two matmuls with an activation and dropout between them.

With the hidden layer of tfm.kernels.feed_forward.activation_dropout,

    y = hidden w2ᵀ + b2                      pre = x w1ᵀ + b1

Backward, with the gradient dpre of the pre-activation that the second matmul's gradient leaves on its way:

    dx = dpre w1    dw1 = dpreᵀ x    db1 = sum over rows of dpre    dw2 = dyᵀ hidden    db2 = sum over rows of dy

Saved: x, the weights, b1, the pre-activation (ReLU's hidden instead) and the seed. Triton: forward 2 launches, 3 where
cuBLAS and an element-wise kernel are faster. Backward: dpre with hidden and db1's partial sums, their sum, dx, dw1 and
dw2 are 5 launches, 6 by cuBLAS, one more for db2; a gate and up with weights of their own take one more for dx.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tfm.autocast import without_autocast
from tfm.operators.operator import Operator, distinct
from tfm.reference import feed_forward as reference
from tfm.transforms import Recomputed, differentiable_by


def keeps_hidden(gated: bool, activation: str) -> bool:
    """Whether the backward works from hidden itself instead of the pre-activation."""
    return activation == "relu" and not gated


def hidden_columns(pre: Tensor, gated: bool) -> int:
    """The columns of the hidden layer whose pre-activation this is."""
    return pre.shape[1] // 2 if gated else pre.shape[1]


def forward_shapes(
    x: Tensor, weight: Tensor, up_weight: Tensor | None, gated: bool, activation: str, save: bool
) -> tuple[tuple[int, int], tuple[int, ...]]:
    """Of hidden and pre; pre is empty where it is not kept."""
    columns = weight.shape[0] // 2 if gated and up_weight is None else weight.shape[0]
    kept = save and not keeps_hidden(gated, activation)
    return (x.shape[0], columns), (x.shape[0], 2 * columns if gated else columns) if kept else (0,)


def backward_outputs(
    saved: Tensor, gated: bool, recompute: bool, dbias: torch.dtype | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What the backward fills, still empty."""
    columns = hidden_columns(saved, gated)
    hidden = saved.new_empty((saved.shape[0], columns)) if recompute else None
    return torch.empty_like(saved), hidden, None if dbias is None else saved.new_empty(columns, dtype=dbias)


ACTIVATION_DROPOUT = Operator(
    "activation_dropout(Tensor pre, bool gated, str activation, float dropout_p, Tensor? seed, int site) -> Tensor",
    fake=lambda pre, gated, *_: pre.new_empty((pre.shape[0], hidden_columns(pre, gated))),
)
LINEAR_ACTIVATION = Operator(
    "linear_activation(Tensor x, Tensor weight, Tensor? up_weight, Tensor? bias, bool gated, str activation,"
    " float dropout_p, Tensor? seed, int site, bool save) -> (Tensor hidden, Tensor pre)",
    fake=lambda x, weight, up_weight, bias, gated, activation, dropout_p, seed, site, save: tuple(
        x.new_empty(shape) for shape in forward_shapes(x, weight, up_weight, gated, activation, save)
    ),
)
LINEAR_ACTIVATION_BACKWARD = Operator(
    "linear_activation_backward(Tensor dy, Tensor weight, Tensor saved, bool gated, str activation, float dropout_p,"
    " Tensor? seed, int site, bool recompute, ScalarType? dbias) -> (Tensor, Tensor?, Tensor?)",
    fake=lambda dy, weight, saved, gated, activation, dropout_p, seed, site, recompute, dbias: backward_outputs(
        saved, gated, recompute, dbias
    ),
)
OPERATORS = (ACTIVATION_DROPOUT, LINEAR_ACTIVATION, LINEAR_ACTIVATION_BACKWARD)


def _recompute(ctx, dy: Tensor) -> Recomputed:
    x, weight, up_weight, b1, w2, _, seed = ctx.saved_tensors
    settings = ctx.activation, ctx.dropout_p, seed, ctx.site

    def output(_, x, weight, up_weight, b1, w2, b2, *rest):
        if ctx.gated:
            return (reference.gated_feed_forward(x, weight, up_weight, w2, *settings),)
        return (reference.feed_forward(x, weight, b1, w2, b2, *settings),)

    dtype = ctx.bias_dtypes[1]
    b2 = None if dtype is None else torch.zeros(w2.shape[:1], dtype=dtype, device=x.device)
    return output, (None, x, weight, up_weight, b1, w2, b2, *[None] * 6)


class FeedForward(torch.autograd.Function):
    """Autograd of the operators; the pre-activation is kept where `save`."""

    @staticmethod
    def forward(ctx, namespace, x, weight, up_weight, b1, w2, b2, gated, activation, dropout_p, seed, site, save):
        rows = x.reshape(-1, x.shape[-1])
        hidden, pre = getattr(torch.ops, namespace).linear_activation.default(
            rows, weight, up_weight, b1, gated, activation, dropout_p, seed, site, save
        )  # fmt: skip
        saved = hidden if keeps_hidden(gated, activation) else pre
        ctx.save_for_backward(x, weight, up_weight, b1, w2, saved, seed)
        ctx.namespace, ctx.gated, ctx.activation, ctx.dropout_p, ctx.site = (
            namespace, gated, activation, dropout_p, site
        )  # fmt: skip
        ctx.bias_dtypes = tuple(None if bias is None else bias.dtype for bias in (b1, b2))
        y = hidden @ w2.t() if b2 is None else torch.addmm(b2.to(x.dtype), hidden, w2.t())
        # To autograd a view made in here could not be changed in place.
        return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], w2.shape[0]))

    @staticmethod
    @differentiable_by(_recompute)
    def backward(ctx, dy):
        x, weight, up_weight, _, w2, saved, seed = ctx.saved_tensors
        needs_x, needs_weight, needs_up, needs_b1, needs_w2, needs_b2 = ctx.needs_input_grad[1:7]
        hidden_settings = ctx.gated, ctx.activation, ctx.dropout_p, seed, ctx.site
        operators = getattr(torch.ops, ctx.namespace)
        dx = dweight = dup = db1 = dw2 = db2 = None
        # The gradients have the dtypes of their operands, whatever autocast says of this moment.
        with without_autocast(dy.device):
            dy = dy.reshape(-1, dy.shape[-1])
            hidden = saved if keeps_hidden(ctx.gated, ctx.activation) else None
            recompute = needs_w2 and hidden is None
            if needs_x or needs_weight or needs_up or needs_b1:
                dpre, recomputed, db1 = operators.linear_activation_backward.default(
                    dy, w2, saved, *hidden_settings, recompute, ctx.bias_dtypes[0] if needs_b1 else None
                )  # fmt: skip
                dx = input_gradient(dpre, weight, up_weight).view(x.shape) if needs_x else None
                dweight, dup = weight_gradients(dpre, x.reshape(-1, x.shape[-1]), up_weight, needs_weight, needs_up)
            elif recompute:
                recomputed = operators.activation_dropout.default(saved, *hidden_settings)
            if needs_w2:
                dw2 = dy.t() @ (recomputed if recompute else hidden)
            if needs_b2:
                db2 = dy.sum(0, dtype=ctx.bias_dtypes[1])
        return None, dx, dweight, dup, db1, dw2, db2, None, None, None, None, None, None


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
    namespace: str, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None,
    activation: str, dropout_p: float, seed: Tensor | None, site: int,
) -> Tensor:  # fmt: skip
    """See tfm.ops.feed_forward."""
    return _apply(namespace, x, w1, None, b1, w2, b2, False, activation, dropout_p, seed, site)


def gated_feed_forward(
    namespace: str, x: Tensor, gate_weight: Tensor, up_weight: Tensor | None, down_weight: Tensor,
    activation: str, dropout_p: float, seed: Tensor | None, site: int,
) -> Tensor:  # fmt: skip
    """See tfm.ops.gated_feed_forward."""
    return _apply(
        namespace, x, gate_weight, up_weight, None, down_weight, None, True, activation, dropout_p, seed, site
    )


def _apply(namespace, x, weight, up_weight, b1, w2, b2, gated, activation, dropout_p, seed, site):
    # Weights take the dtype of x, as those of torch's autocast do; a bias is read in its own, or in fp32.
    weight, up_weight, w2 = (None if matrix is None else matrix.to(x.dtype) for matrix in (weight, up_weight, w2))
    b1 = b1 if b1 is None or b1.dtype == x.dtype else b1.float()
    given = (x, weight, up_weight, b1, w2)
    save = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in given)
    seed = None if seed is None else seed.to(x.device)
    return FeedForward.apply(namespace, *distinct((*given, b2)), gated, activation, dropout_p, seed, site, save)
