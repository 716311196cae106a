"""Autocast at the entrance of an operation: its inputs take autocast's dtype, and inside autocast is off.

A backend chooses its own precisions: what it keeps in fp32 must stay so.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from tfm.taping import computed


def under_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Returns the tensors in autocast's dtype where it is on for their device; float64 stays float64."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 or not x.is_floating_point() else cast(x, dtype) for x in tensors)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns `x` in this dtype."""
    return x if x.dtype == dtype else computed(Tensor.to, x, dtype)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Returns the context in which backends run. Torch has no autocast for tensors without values."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
