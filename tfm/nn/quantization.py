"""torch.ao.quantization's tables, which go by exact class, with the classes of this package beside torch's.

In the eager mode `prepare` puts an observed attention, made of torch's functions, in place of each MultiheadAttention,
and `convert` a quantized LayerNorm in place of each LayerNorm.
"""

from __future__ import annotations

import copy

import torch
from torch.ao.nn import quantizable, quantized
from torch.ao.quantization.quantization_mappings import DEFAULT_STATIC_QUANT_MODULE_MAPPINGS
from torch.ao.quantization.quantize import get_default_custom_config_dict

from tfm.nn.attention import MultiheadAttention
from tfm.nn.norm import LayerNorm


class ObservedAttention(quantizable.MultiheadAttention):
    """The attention that torch calls to observe one; torch's own takes only what is exactly torch's."""

    @classmethod
    def from_float(cls, other: MultiheadAttention) -> quantizable.MultiheadAttention:
        theirs: torch.nn.Module = copy.copy(other)
        theirs.__class__ = quantizable.MultiheadAttention._FLOAT_MODULE
        return quantizable.MultiheadAttention.from_float(theirs)


def register() -> None:
    """Enters the classes into the tables that `prepare` and `convert` use where they are given none."""
    DEFAULT_STATIC_QUANT_MODULE_MAPPINGS[LayerNorm] = quantized.LayerNorm
    observed = get_default_custom_config_dict()["float_to_observed_custom_module_class"]
    observed[MultiheadAttention] = ObservedAttention
