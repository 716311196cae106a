"""What Triton and csrc share: one schema, which csrc/schemas.cpp declares once more."""

from __future__ import annotations

import native
import pytest
import torch

from tfm.kernels import library
from tfm.native import NAMESPACE
from tfm.operators import TWINS


def arguments(schema: torch._C.FunctionSchema) -> str:
    """Behind the operator's name."""
    return str(schema).partition("(")[2]


@pytest.mark.skipif(bool(native.OBSTACLE), reason=native.OBSTACLE)
@pytest.mark.parametrize("operator", TWINS, ids=lambda operator: operator.name)
def test_twins_have_one_schema(operator):
    declared = getattr(getattr(torch.ops, NAMESPACE), operator.name).default._schema
    assert arguments(declared) == arguments(torch._C.parse_schema(f"{library.NAMESPACE}::{operator.schema}"))


def test_every_twin_is_a_kernel_of_triton_too():
    from tfm.kernels import decode_attention, embedding, linear_activation, linear_cross_entropy, norm, rotary  # noqa: F401
    from tfm.kernels.attention import operators  # noqa: F401

    for operator in TWINS:
        assert hasattr(getattr(torch.ops, library.NAMESPACE), operator.name)
