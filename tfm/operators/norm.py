"""LayerNorm and RMSNorm behind a bias, dropout and a residual connection: the operators and their gradients.

kernels/norm.py gives the mathematics.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tfm.operators.autograd import Differentiable, Forward
from tfm.operators.calling import run
from tfm.operators.declaration import CPU_FLOATS, FLOATS, MANY, Row, operator
from tfm.reference import norm as reference

NORMS = ("layer_norm", "residual_layer_norm", "rms_norm", "residual_rms_norm")
ROWS = (
    Row(NORMS, "triton", FLOATS, max_columns=32768),
    Row(NORMS, "native", CPU_FLOATS, max_columns=MANY, device="cpu"),
    Row(NORMS, "native", FLOATS, max_columns=32768, device="cuda"),
)


@operator("norm")
class ResidualNorm(NamedTuple):
    """h = residual + dropout(x + x_bias), and y, its norm over the last dimension.

    Attributes:
        x: [..., C].
        x_bias: [C] or None, as all tensors below may be.
        residual: the shape of `x`; without it h is `x`, and is not given.
        weight: [C].
        bias: [C].
        seed: int64 scalar; None where nothing is dropped.
        eps: added to the variance or the mean square.
        dropout_p: of `x`.
        site: which of the dropouts that share the seed this is.
        centred: LayerNorm, else RMSNorm.
        weight_offset: added to the weight.
        round_first: round what is normalised before the weight.
        out_dtype: of y; None is that of h.
    """

    x: Tensor
    x_bias: Tensor | None
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    seed: Tensor | None
    eps: float
    dropout_p: float
    site: int
    centred: bool
    weight_offset: float
    round_first: bool
    out_dtype: torch.dtype | None

    def outputs(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """Returns empty (y, h, statistics), the last fp32 [2, rows], mean and 1 / deviation, or [1, rows], 1 / rms."""
        x, stored = self.x, self.x.dtype
        if self.residual is not None:
            stored = torch.promote_types(stored, self.residual.dtype)
        y = torch.empty_like(x, dtype=self.out_dtype or stored, memory_format=torch.contiguous_format)
        h = None
        if self.residual is not None:
            h = torch.empty_like(x, dtype=stored, memory_format=torch.contiguous_format)
        rows = x.numel() // x.shape[-1]
        return y, h, torch.empty((2 if self.centred else 1, rows), dtype=torch.float32, device=x.device)


@operator("norm")
class ResidualNormBackward(NamedTuple):
    """The gradients of ResidualNorm, from those of y and, where it has users, of h.

    The last five are the dtypes of the gradients, None where one is not wanted.
    """

    dy: Tensor
    dh: Tensor | None
    h: Tensor
    statistics: Tensor
    weight: Tensor | None
    seed: Tensor | None
    dropout_p: float
    site: int
    weight_offset: float
    dx: torch.dtype | None
    dx_bias: torch.dtype | None
    dresidual: torch.dtype | None
    dweight: torch.dtype | None
    dbias: torch.dtype | None

    def outputs(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Returns empty (dx, dx_bias, dresidual, dweight, dbias)."""
        h = self.h

        def matrix(dtype: torch.dtype | None) -> Tensor | None:
            return None if dtype is None else torch.empty_like(h, dtype=dtype, memory_format=torch.contiguous_format)

        def vector(dtype: torch.dtype | None) -> Tensor | None:
            return None if dtype is None else torch.empty(h.shape[-1], dtype=dtype, device=h.device)

        return matrix(self.dx), vector(self.dx_bias), matrix(self.dresidual), vector(self.dweight), vector(self.dbias)


class Norm(Differentiable):
    """The operation that gives (y, h); h is None without a residual. Saved: h or x, the statistics, weight and seed."""

    arguments = ResidualNorm
    learns = ("x", "x_bias", "residual", "weight", "bias")

    @staticmethod
    def forward(namespace, call, wanted):
        y, h, statistics = run(namespace, call)
        dtypes = [None if x is None else x.dtype for x in call[:5]]
        saved = (call.x if h is None else h, statistics, call.weight, call.seed)
        return Forward((y, h), saved, (dtypes, call[6:]))

    @staticmethod
    def backward(namespace, saved, options, grads, wanted):
        (dy, dh), h = grads, saved[0]
        dtypes, (_, dropout_p, site, _, weight_offset, *_) = options
        asked = [dtype if needed else None for dtype, needed in zip(dtypes, wanted, strict=True)]
        # Without dropout x and residual have one gradient: it is written once.
        shared = saved[-1] is None and asked[0] == asked[2]
        if shared:
            asked[2] = None
        dy = torch.zeros_like(h) if dy is None else dy
        call = ResidualNormBackward(dy, dh, *saved, dropout_p, site, weight_offset, *asked)  # type: ignore[call-arg]
        dx, dx_bias, dresidual, dweight, dbias = run(namespace, call)
        return dx, dx_bias, dx if shared else dresidual, dweight, dbias

    @staticmethod
    def again(saved, options, grads):
        h, _, weight, seed = saved
        dtypes, (eps, dropout_p, site, centred, weight_offset, round_first, out_dtype) = options
        has_residual = dtypes[2] is not None

        def outputs(x, x_bias, residual, weight, bias):
            # h is sum and result at once, and autograd knows it as such: what is added to it here is 0.
            total = h + reference.add_residual(x, residual, x_bias, dropout_p, seed, site) if has_residual else x
            if centred:
                return reference.layer_norm(total, weight, bias, eps, out_dtype), total
            return reference.rms_norm(total, weight, eps, weight_offset, round_first, out_dtype), total

        shapes = (h.shape, h.shape[-1:], h.shape, h.shape[-1:], h.shape[-1:])
        x, x_bias, residual, _, bias = (
            None if dtype is None else torch.zeros(shape, dtype=dtype, device=h.device)
            for shape, dtype in zip(shapes, dtypes, strict=True)
        )
        return outputs, (x if has_residual else h, x_bias, residual, weight, bias)
