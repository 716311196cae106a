"""torch.compile makes two graphs for any number of shapes: one for the first, and one for all others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from dynamic_cases import MODULES, OPERATIONS, SIZES, Case, Size, module_case
from selection import long_but
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import tfm
from tfm.reference import cross_entropy, dropout

# Compiling takes its time: `make test` goes through each case once, long tests through every combination.
CASES = (*OPERATIONS, *MODULES)


def case_of(name: str) -> Case:
    torch._dynamo.reset()
    return OPERATIONS[name] if name in OPERATIONS else module_case(name)


def tensors(results: Any) -> list[Tensor]:
    if isinstance(results, Tensor):
        return [results]
    return [x for part in results for x in tensors(part)] if isinstance(results, Sequence) else []


def run(call: Any, case: Case, size: Size, differentiates: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Results, and the gradients of what gets one, for inputs that depend on `size` alone."""
    torch.manual_seed(size.targets)
    inputs = case.inputs(size)
    learning = [
        x.requires_grad_()
        for place, x in enumerate(inputs)
        if differentiates and isinstance(x, Tensor) and x.is_floating_point() and place not in case.frozen
    ]
    with torch.set_grad_enabled(differentiates):
        results = tensors(call(*inputs))
    if not learning:
        return results, []
    weighted = [(x * torch.linspace(-1, 1, x.numel()).view(x.shape)).sum() for x in results if x.requires_grad]
    return results, list(torch.autograd.grad(torch.stack(weighted).sum(), learning))


def compare(compiled: Any, case: Case, sizes: Sequence[Size], differentiates: bool) -> None:
    for size in sizes:
        found, expected = (run(call, case, size, differentiates) for call in (compiled, case.call))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def check_graphs(name: str, impl: str, differentiates: bool, sizes: Sequence[Size] = SIZES) -> None:
    case, counter = case_of(name), CompileCounterWithBackend("aot_eager")
    with tfm.use(impl):
        compare(torch.compile(case.call, fullgraph=True, backend=counter), case, sizes, differentiates)
    assert counter.frame_count == 2


@pytest.mark.parametrize("name", CASES)
def test_two_graphs_serve_every_shape(name: str) -> None:
    check_graphs(name, "auto", differentiates=True)


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_two_graphs_serve_every_shape_without_gradients(name: str) -> None:
    check_graphs(name, "auto", differentiates=False)


# What the reference does by size: chunks, packing, and dropout's eight decisions of one draw.
BY_SIZE = (
    "attention, bottom right", "attention, dropout", "dropout", "varlen_attention", "linear_cross_entropy, none",
)  # fmt: skip


# The reference goes through the steps in Python: each length is a graph of its own.
STEP_BY_STEP = ("rg_lru", "selective_scan", "wkv")


DYNAMIC = (
    "attention, mask", "embedding", "residual_layer_norm", "linear_cross_entropy, mean", "TransformerEncoderLayer",
)  # fmt: skip


@pytest.mark.parametrize("name", long_but(BY_SIZE, [name for name in CASES if name not in STEP_BY_STEP]))
def test_two_graphs_of_the_reference_serve_every_shape(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Smaller than the largest batch, larger than the smallest.
    monkeypatch.setattr(dropout, "CHUNK", 64)
    monkeypatch.setitem(cross_entropy.CHUNK_BYTES, "cpu", 512)
    check_graphs(name, "reference", differentiates=True)


@pytest.mark.triton
@pytest.mark.parametrize("name", ["attention, mask", "layer_norm"])
def test_two_graphs_of_triton_serve_every_shape(name: str) -> None:
    check_graphs(name, "triton", True, SIZES[:4])


def check_dynamic(name: str, impl: str) -> None:
    case = case_of(name)
    compiled = torch.compile(case.call, fullgraph=True, backend="aot_eager", dynamic=True)
    with tfm.use(impl):
        compare(compiled, case, SIZES[:1], True)
        with torch._dynamo.config.patch(error_on_recompile=True):
            compare(compiled, case, SIZES[1:], True)


@pytest.mark.parametrize("name", long_but(DYNAMIC, CASES))
def test_dynamic_from_the_first(name: str) -> None:
    check_dynamic(name, "auto")


def test_the_reference_is_dynamic_from_the_first() -> None:
    check_dynamic("attention, mask", "reference")


@pytest.mark.long
@pytest.mark.parametrize("backend", ["inductor"])
def test_inductor_serves_every_shape(backend: str) -> None:
    case, counter = case_of("TransformerEncoderLayer"), CompileCounterWithBackend(backend)
    compare(torch.compile(case.call, fullgraph=True, backend=counter), case, SIZES[:4], True)
    assert counter.frame_count == 2


def test_a_size_that_is_marked_is_not_compiled_in() -> None:
    case = case_of("MultiheadAttention, cross")
    inputs = case.inputs(SIZES[0])
    for place, dims in enumerate(((0, 1), (0, 1), (0, 1), (0, 1))):
        for dim in dims:
            torch._dynamo.mark_dynamic(inputs[place], dim)
    compiled = torch.compile(case.call, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), case.call(*inputs))
    with torch._dynamo.config.patch(error_on_recompile=True):
        compare(compiled, case, SIZES[1:], False)
