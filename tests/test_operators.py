"""What follows from the declarations: schemas, fakes, and that every backend computes what it should."""

from __future__ import annotations

from importlib import import_module
from typing import NamedTuple

import native
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tfm import ops
from tfm.native import NAMESPACE
from tfm.operators import OPERATORS, declaration
from tfm.ops import registry


@pytest.mark.triton
@pytest.mark.parametrize("operator", OPERATORS.values(), ids=lambda operator: operator.name)
def test_triton_computes_all_but_what_csrc_alone_has(operator):
    launch = getattr(import_module(f"tfm.kernels.{operator.subject}"), operator.name, None)
    assert (launch is None) == operator.is_native_only
    assert hasattr(getattr(torch.ops, registry.NAMESPACE), operator.name) != operator.is_native_only


@pytest.mark.skipif(bool(native.WHY_UNAVAILABLE), reason=native.WHY_UNAVAILABLE)
@pytest.mark.parametrize("operator", OPERATORS.values(), ids=lambda operator: operator.name)
def test_csrc_computes_all(operator):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{operator.name}", "CPU")


@pytest.mark.parametrize("namespace", [registry.NAMESPACE, NAMESPACE])
def test_every_operator_on_tensors_has_a_fake(namespace):
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith(f"{namespace}::")]
    for name in names:
        schema = getattr(getattr(torch.ops, namespace), name.split("::")[1]).default._schema
        if any("Tensor" in str(argument.type) for argument in schema.arguments):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "Meta"), name


def test_a_schema_follows_from_a_named_tuple(monkeypatch):
    monkeypatch.setattr(declaration, "OPERATORS", {})

    @declaration.operator("scaling")
    class ScaleRows_(NamedTuple):
        x: declaration.Changed
        y: declaration.MaybeChanged
        factors: Tensor | None
        rows: declaration.Length
        kind: str
        dtype: torch.dtype | None
        wanted: list[bool]

        def outputs(self) -> tuple[Tensor, Tensor | None]:
            return self.x, None

    (operator,) = declaration.OPERATORS.values()
    assert operator.schema == (
        "scale_rows_(Tensor(a!) x, Tensor(b!)? y, Tensor? factors, SymInt rows, str kind, ScalarType? dtype,"
        " bool[] wanted) -> (Tensor, Tensor?)"
    )
    assert operator.fake(torch.ones(2), *[None] * 2, 3, "", None, [])[1] is None


@pytest.mark.skipif(bool(native.WHY_UNAVAILABLE), reason=native.WHY_UNAVAILABLE)
@pytest.mark.parametrize(("parts", "packed"), [(3, False), (2, False), (3, True)])
def test_gradients_side_by_side_obey_torch(parts, packed):
    """The operator as a backward calls it; with its fakes that backward runs on fake tensors too."""
    fused = torch.randn((5, 18) if packed else (2, 5, 18), requires_grad=True)

    def gradient(fused):
        heads = ops.split_heads(fused, 3, 2)
        query, key, value = heads if parts == 3 else (heads[0] * 2.0, *heads[1:])
        if packed:
            cu_seq = torch.tensor([0, 2, 5], dtype=torch.int32)
            output = ops.varlen_attention(query, key, value, cu_seq, cu_seq, 3, 3, impl="native")
        else:
            output = ops.attention(*(x.transpose(1, 2) for x in (query, key, value)), impl="native")
        return torch.autograd.grad(output.square().sum(), fused)[0]

    with native.Called() as called:
        expected = gradient(fused)
    (arguments,) = (call for name, call in called.calls if name == "tfm_native::attention_backward_joined")
    detached = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in arguments)
    torch.library.opcheck(torch.ops.tfm_native.attention_backward_joined.default, detached)
    with FakeTensorMode() as mode:
        found = gradient(mode.from_tensor(fused))
    assert (found.shape, found.stride()) == (expected.shape, expected.stride())


@pytest.mark.skipif(bool(native.WHY_UNAVAILABLE), reason=native.WHY_UNAVAILABLE)
def test_cross_entropy_in_place_obeys_torch():
    logits, target, losses = torch.randn(3, 16), torch.tensor([4, 0, -100]), torch.empty(3)
    options = (-100, 0.1, 0.01, 2.0, True, torch.ones(3), torch.tensor(2.0))
    torch.library.opcheck(torch.ops.tfm_native.cross_entropy_.default, (logits, None, target, losses, *options))
