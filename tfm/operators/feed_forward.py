"""The position-wise feed-forward network, plain and gated: two matmuls with an activation and dropout between them.

With the hidden layer of tfm.kernels.feed_forward.elementwise,

    y = hidden w2ᵀ + b2                      pre = x w1ᵀ + b1

Backward, with the gradient dpre of the pre-activation that the second matmul's gradient leaves on its way:

    dx = dpre w1    dw1 = dpreᵀ x    db1 = sum over rows of dpre    dw2 = dyᵀ hidden    db2 = sum over rows of dy

Saved: x, the weights, b1, the pre-activation (ReLU's hidden instead) and the seed. Triton: forward 2 launches, 3 where
cuBLAS and an element-wise kernel are faster. Backward: dpre with hidden and db1's partial sums, their sum, dx, dw1 and
dw2 are 5 launches, 6 by cuBLAS, one more for db2; a gate and up with weights of their own take one more for dx.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tfm.autocast import without_autocast
from tfm.operators.autograd import Differentiable, Forward
from tfm.operators.calling import run
from tfm.operators.declaration import CPU_FLOATS, FLOATS, MANY, Row, operator
from tfm.reference import feed_forward as reference

NETWORKS = ("feed_forward", "gated_feed_forward", "linear_activation")
ROWS = (
    Row(NETWORKS, "triton", FLOATS, max_columns=MANY),
    Row(NETWORKS, "native", CPU_FLOATS, max_columns=MANY, device="cpu"),
    Row(NETWORKS, "native", FLOATS, max_columns=MANY, device="cuda"),
)


def keeps_hidden(gated: bool, activation: str) -> bool:
    """Says whether the backward works from hidden itself instead of the pre-activation."""
    return activation == "relu" and not gated


@operator("feed_forward")
class ActivationDropout(NamedTuple):
    """The hidden layer of its pre-activation.

    Attributes:
        pre: [rows, columns], contiguous; gated [rows, 2 · columns], gate first.
        gated: whether the activation of one half multiplies the other.
        activation: a name of tfm.ops.feed_forward.
        dropout_p: of hidden.
        seed: int64 scalar; None where nothing is dropped.
        site: which of the dropouts that share the seed this is.
    """

    pre: Tensor
    gated: bool
    activation: str
    dropout_p: float
    seed: Tensor | None
    site: int

    def outputs(self) -> Tensor:
        """Returns an empty hidden [rows, columns]."""
        rows, columns = self.pre.shape
        return _matrix(rows, columns // 2 if self.gated else columns, self.pre)


@operator("feed_forward")
class ActivationDropoutBackward(NamedTuple):
    """The gradient of the pre-activation, from that of hidden.

    Attributes:
        dhidden: [rows, columns], contiguous.
        saved: hidden where `keeps_hidden`, else the pre-activation.
        gated, activation, dropout_p, seed, site: as in ActivationDropout.
        recompute: whether to give hidden, which then was not saved.
        dbias: the dtype of the bias's gradient; None where it is not wanted.
    """

    dhidden: Tensor
    saved: Tensor
    gated: bool
    activation: str
    dropout_p: float
    seed: Tensor | None
    site: int
    recompute: bool
    dbias: torch.dtype | None

    def outputs(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Returns empty (dpre, hidden, dbias), None where not wanted."""
        return _gradients(self.saved, self.gated, self.recompute, self.dbias)


@operator("feed_forward")
class LinearActivation(NamedTuple):
    """The hidden layer of x weightᵀ + bias; gated, of x weightᵀ beside x up_weightᵀ.

    Attributes:
        x: [rows, depth].
        weight: [columns, depth]; gated without up_weight [2 · columns, depth], gate first.
        up_weight: [columns, depth] or None.
        bias: [columns] or None, as it is where gated.
        gated, activation, dropout_p, seed, site: as in ActivationDropout.
        save: whether a backward follows.
    """

    x: Tensor
    weight: Tensor
    up_weight: Tensor | None
    bias: Tensor | None
    gated: bool
    activation: str
    dropout_p: float
    seed: Tensor | None
    site: int
    save: bool

    @property
    def columns(self) -> int:
        """The number of hidden's columns."""
        rows = self.weight.shape[0]
        return rows // 2 if self.gated and self.up_weight is None else rows

    @property
    def keeps_pre(self) -> bool:
        """True where the backward needs the pre-activation."""
        return self.save and not keeps_hidden(self.gated, self.activation)

    def outputs(self) -> tuple[Tensor, Tensor]:
        """Returns empty (hidden, pre), pre as ActivationDropout takes it, [0] where it is not kept."""
        x, rows, columns = self.x, self.x.shape[0], self.columns
        hidden = _matrix(rows, columns, x)
        if not self.keeps_pre:
            return hidden, torch.empty(0, dtype=x.dtype, device=x.device)
        return hidden, _matrix(rows, 2 * columns, x) if self.gated else torch.empty_like(hidden)


@operator("feed_forward")
class LinearActivationBackward(NamedTuple):
    """The gradient of the pre-activation, from that of hidden weightᵀ.

    Attributes:
        dy: [rows, depth].
        weight: [depth, columns].
        saved: hidden where `keeps_hidden`, else the pre-activation.
        gated, activation, dropout_p, seed, site: as in ActivationDropout.
        recompute: whether to give hidden, which then was not saved.
        dbias: the dtype of the bias's gradient; None where it is not wanted.
    """

    dy: Tensor
    weight: Tensor
    saved: Tensor
    gated: bool
    activation: str
    dropout_p: float
    seed: Tensor | None
    site: int
    recompute: bool
    dbias: torch.dtype | None

    def outputs(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Returns empty (dpre, hidden, dbias), None where not wanted."""
        return _gradients(self.saved, self.gated, self.recompute, self.dbias)


class Network(NamedTuple):
    """A call of either network; the weights have the dtype of x.

    Attributes:
        x: [..., depth].
        weight, up_weight, b1: of the first layer, as in LinearActivation.
        w2: [outputs, columns].
        b2: [outputs] or None.
        gated, activation, dropout_p, seed, site: as in ActivationDropout.
    """

    x: Tensor
    weight: Tensor
    up_weight: Tensor | None
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None
    gated: bool
    activation: str
    dropout_p: float
    seed: Tensor | None
    site: int


class FeedForward(Differentiable):
    """The operation that gives (y,), as the formulas above say."""

    arguments = Network
    learns = ("x", "weight", "up_weight", "b1", "w2", "b2")

    @staticmethod
    def forward(namespace, call, wanted):
        x, weight, up_weight, b1, w2, b2, gated, activation, dropout_p, seed, site = call
        # The gradient of b2 needs nothing of the hidden layer.
        save = any(wanted[:-1])
        rows = x.reshape(-1, x.shape[-1])
        hidden, pre = run(
            namespace,
            LinearActivation(rows, weight, up_weight, b1, gated, activation, dropout_p, seed, site, save),
        )
        y = hidden @ w2.t() if b2 is None else torch.addmm(b2.to(x.dtype), hidden, w2.t())
        # Autograd would not let a view made in here be changed in place.
        y = torch.ops.aten._unsafe_view(y, (*x.shape[:-1], w2.shape[0]))
        saved = x, weight, up_weight, b1, w2, hidden if keeps_hidden(gated, activation) else pre, seed
        bias_dtypes = tuple(None if bias is None else bias.dtype for bias in (b1, b2))
        return Forward((y,), saved, (gated, activation, dropout_p, site, bias_dtypes))

    @staticmethod
    def backward(namespace, saved, options, grads, wanted):
        x, weight, up_weight, _, w2, kept, seed = saved
        gated, activation, dropout_p, site, (b1_dtype, b2_dtype) = options
        needs_x, needs_weight, needs_up, needs_b1, needs_w2, needs_b2 = wanted
        layer = gated, activation, dropout_p, seed, site
        dx = dweight = dup = db1 = dw2 = db2 = None
        # The gradients have the dtypes of their operands, whatever autocast says at this moment.
        with without_autocast(x.device):
            dy = grads[0].reshape(-1, w2.shape[0])
            hidden = kept if keeps_hidden(gated, activation) else None
            recompute = needs_w2 and hidden is None
            if needs_x or needs_weight or needs_up or needs_b1:
                dbias = b1_dtype if needs_b1 else None
                call = LinearActivationBackward(dy, w2, kept, *layer, recompute, dbias)
                dpre, recomputed, db1 = run(namespace, call)
                dx = input_gradient(dpre, weight, up_weight).view(x.shape) if needs_x else None
                dweight, dup = weight_gradients(dpre, x.reshape(-1, x.shape[-1]), up_weight, needs_weight, needs_up)
            elif recompute:
                recomputed = run(namespace, ActivationDropout(kept, *layer))
            if needs_w2:
                dw2 = dy.t() @ (recomputed if recompute else hidden)
            if needs_b2:
                db2 = dy.sum(0, dtype=b2_dtype)
        return dx, dweight, dup, db1, dw2, db2

    @staticmethod
    def again(saved, options, grads):
        x, weight, up_weight, b1, w2, _, seed = saved
        gated, activation, dropout_p, site, (_, b2_dtype) = options

        def output(x, weight, up_weight, b1, w2, b2):
            if gated:
                layer = activation, dropout_p, seed, site
                return (reference.gated_feed_forward(x, weight, up_weight, w2, *layer, down_bias=b2),)
            return (reference.feed_forward(x, weight, b1, w2, b2, activation, dropout_p, seed, site),)

        b2 = None if b2_dtype is None else torch.zeros(w2.shape[:1], dtype=b2_dtype, device=x.device)
        return output, (x, weight, up_weight, b1, w2, b2)


def input_gradient(dpre: Tensor, weight: Tensor, up_weight: Tensor | None) -> Tensor:
    """Returns dx [rows, depth]."""
    if up_weight is None:
        return dpre @ weight
    dgate, dup = dpre.chunk(2, dim=1)
    return torch.addmm(dgate @ weight, dup, up_weight)


def weight_gradients(
    dpre: Tensor, x: Tensor, up_weight: Tensor | None, needs_weight: bool, needs_up: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Returns the gradients of the first weight and of up's own; both are halves of one product."""
    if up_weight is None:
        return (dpre.t() @ x if needs_weight else None), None
    if needs_weight and needs_up:
        dweight, dup = (dpre.t() @ x).chunk(2)
        return dweight, dup
    dgate, dup = dpre.chunk(2, dim=1)
    return (dgate.t() @ x if needs_weight else None), (dup.t() @ x if needs_up else None)


def _matrix(rows: int, columns: int, like: Tensor) -> Tensor:
    return torch.empty((rows, columns), dtype=like.dtype, device=like.device)


def _gradients(
    saved: Tensor, gated: bool, recompute: bool, dbias: torch.dtype | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    rows, width = saved.shape
    columns = width // 2 if gated else width
    hidden = _matrix(rows, columns, saved) if recompute else None
    sums = None if dbias is None else torch.empty(columns, dtype=dbias, device=saved.device)
    return torch.empty_like(saved, memory_format=torch.contiguous_format), hidden, sums
