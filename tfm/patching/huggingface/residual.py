"""Residual connections with their norm, as BERT and its kin have them: a linear layer, dropout, addition, LayerNorm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Dropout, LayerNorm, Linear, Module

from tfm import nn, ops
from tfm.patching.fusion import Change, Fused, fusing, plain_kind, why_altered, why_no_kernel
from tfm.patching.huggingface.trial import twin_of

PARTS = ("dense", "LayerNorm", "dropout")
NORMS = (LayerNorm, nn.LayerNorm)


class FusedOutput(Fused):
    """LayerNorm(input_tensor + dropout(dense(hidden_states))): all behind the product in one pass."""

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """Returns the shape of `input_tensor` [..., C]."""
        reason = _why_not(self, input_tensor)
        if reason:
            return self.plainly(reason, hidden_states, input_tensor)
        self.fusedly()
        dense, norm, dropout_p = self.dense, self.LayerNorm, self.dropout.p if self.training else 0.0
        bias = None
        if not why_altered("dense", dense, (Linear,)) and not torch.is_autocast_enabled(input_tensor.device.type):
            # The bias is added on the way.
            x, bias = torch.nn.functional.linear(hidden_states, dense.weight), dense.bias
        else:
            x = dense(hidden_states)
        return ops.residual_layer_norm(x, input_tensor, norm.weight, norm.bias, norm.eps, dropout_p, x_bias=bias)[0]


def change_of(module: Module) -> Change | None:
    """Returns what such a module would become; None for any other."""
    return fusing("residual", FusedOutput) if is_output(module) else None


def _why_not(module: Module, x: Tensor) -> str:
    reason = why_altered("LayerNorm", module._modules.get("LayerNorm"), NORMS)
    reason = reason or why_altered("dropout", module._modules.get("dropout"), (Dropout,))
    if not reason and torch.is_autocast_enabled(x.device.type):
        reason = "autocast has the norm in fp32"
    return reason or why_no_kernel("residual_layer_norm", x)


def is_output(module: Module) -> bool:
    """Tells whether a module is such a one, by a trial on a small twin."""
    children: dict[str, Any] = dict(module._modules)
    if sorted(children) != sorted(PARTS) or type(children["dense"]) is not Linear or module._parameters:
        return False
    if plain_kind(children["LayerNorm"]) not in NORMS or type(children["dropout"]) is not Dropout:
        return False
    generator = torch.Generator().manual_seed(0)
    dense, norm, dropout = Linear(6, 4), LayerNorm(4), Dropout(0.5)
    for parameter in (*dense.parameters(), *norm.parameters()):
        parameter.data = torch.randn(parameter.shape, generator=generator)
    twin = twin_of(module, {}, {"dense": dense, "LayerNorm": norm, "dropout": dropout.eval()})
    x, residual = torch.randn(3, 6, generator=generator), torch.randn(3, 4, generator=generator)
    try:
        with torch.no_grad():
            theirs = plain_kind(module).forward(twin, x, residual)
    except Exception:
        return False
    return isinstance(theirs, Tensor) and torch.allclose(theirs, norm(dense(x) + residual), rtol=1e-4, atol=1e-5)
