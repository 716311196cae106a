"""LayerNorm and RMSNorm."""

from __future__ import annotations

import torch
from torch import Tensor

from tfm import ops
from tfm.errors import BadArgument
from tfm.nn.leaf import leaf

HALVES = (torch.float16, torch.bfloat16)


@leaf
class LayerNorm(torch.nn.LayerNorm):
    """`torch.nn.LayerNorm` (Ba et al. 2016, equation 4); over several dimensions, or none, it runs torch's own."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalises `input` [..., C] over its last dimension, and returns its shape.

        Raises:
            ValueError: a last dimension other than the one normalised.
        """
        if input.is_nested or len(self.normalized_shape) != 1 or answers_itself(self.weight):
            return super().forward(input)
        _check_columns(input, self.normalized_shape)
        return ops.layer_norm(widened(input), self.weight, self.bias, self.eps)


@leaf
class RMSNorm(torch.nn.RMSNorm):
    """`torch.nn.RMSNorm` (Zhang and Sennrich 2019, equation 4); over several dimensions, or none, torch's own runs."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalises `x` [..., C] over its last dimension, and returns its shape.

        Raises:
            ValueError: a last dimension other than the one normalised.
        """
        if x.is_nested or len(self.normalized_shape) != 1 or answers_itself(self.weight):
            return super().forward(x)
        _check_columns(x, self.normalized_shape)
        computed = torch.promote_types(x.dtype, torch.float32)
        eps = torch.finfo(computed).eps if self.eps is None else self.eps
        return ops.rms_norm(widened(x), self.weight, eps)


def answers_itself(parameter: Tensor | None) -> bool:
    """Tells whether `parameter` is of a class with its own __torch_function__, as for per-sample gradients."""
    if parameter is None or type(parameter) in (torch.nn.Parameter, Tensor):
        return False
    return type(parameter).__torch_function__ is not torch._C._disabled_torch_function_impl


def widened(x: Tensor) -> Tensor:
    """Returns `x` as layer norm takes it under autocast, which on a GPU runs it in fp32."""
    autocast = x.is_cuda and x.dtype in HALVES and torch.is_autocast_enabled("cuda")
    return x.float() if autocast else x


def _check_columns(x: Tensor, normalized_shape: tuple[int, ...]) -> None:
    columns = normalized_shape[0]
    if x.dim() == 0 or x.shape[-1] != columns:
        raise BadArgument(f"input: expected [..., {columns}], got shape {tuple(x.shape)}")
