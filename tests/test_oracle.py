"""The oracle's tolerance: any honest order of computing passes, whatever the machine, and a small fault does not."""

from __future__ import annotations

import oracle
import pytest
import torch
from torch import Tensor

ROWS, INNER, CLASSES = 33, 64, 130


@pytest.fixture
def inputs():
    return torch.randn(ROWS, INNER), torch.randn(CLASSES, INNER) / INNER**0.5


def softmax_sums(x: Tensor, weight: Tensor, bent=lambda weights: weights, columns=slice(None)) -> Tensor:
    """softmax(tanh(x wᵀ)) w: a product, two transcendentals, a sum and a product again."""
    weight = weight[columns]
    return bent((x @ weight.t()).tanh().softmax(-1)) @ weight


# Each a way in which a processor or a kernel may well compute the same in fp32.
ORDERS = {
    "as it is": softmax_sums,
    "backwards": lambda x, w: softmax_sums(x.flip(1), w.flip(1)).flip(1),
    "classes backwards": lambda x, w: softmax_sums(x, w, columns=torch.arange(CLASSES - 1, -1, -1)),
    "row by row": lambda x, w: torch.stack([softmax_sums(row[None], w)[0] for row in x]),
    "products in chunks": lambda x, w: sum_of_chunks(x, w, 8),
    "one term after another": lambda x, w: sum_of_chunks(x, w, 1),
}


def sum_of_chunks(x: Tensor, weight: Tensor, size: int) -> Tensor:
    logits = torch.zeros(ROWS, CLASSES)
    for part, weights in zip(x.split(size, 1), weight.split(size, 1), strict=True):
        logits = logits + part @ weights.t()
    shares = logits.tanh().softmax(-1)
    return sum(part @ rows for part, rows in zip(shares.split(10, 1), weight.split(10), strict=True))


@pytest.mark.parametrize("judge", ORDERS)
@pytest.mark.parametrize("order", ORDERS)
def test_every_order_passes_whichever_is_the_plain_one(inputs, order, judge):
    truth = softmax_sums(*(x.double() for x in inputs))
    oracle.assert_matches(ORDERS[order](*inputs), truth, ORDERS[judge](*inputs))


def test_the_bound_does_not_hang_on_a_lucky_plain_result(inputs):
    truth = softmax_sums(*(x.double() for x in inputs))
    oracle.assert_matches(softmax_sums(*inputs), truth, truth.float())
    oracle.assert_matches(truth.float() * (1 + 3 * torch.finfo(torch.float32).eps), truth, truth.float())


FAULTS = {
    "weights rounded to bf16": lambda weights: weights.bfloat16().float(),
    "weights rounded to fp16": lambda weights: weights.half().float(),
    "the tenth class 1e-3 too heavy": lambda weights: weights * (1 + 1e-3 * (torch.arange(CLASSES) == 10)),
    "all 1e-5 too light": lambda weights: weights * (1 - 1e-5),
    "all 1e-6 too light": lambda weights: weights * (1 - 1e-6),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(inputs, fault):
    truth, plain = softmax_sums(*(x.double() for x in inputs)), softmax_sums(*inputs)
    with pytest.raises(AssertionError, match="exceeds"):
        oracle.assert_matches(softmax_sums(*inputs, bent=FAULTS[fault]), truth, plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_rounding_too_many_is_caught_in_narrow_dtypes(inputs, dtype):
    """Not the last one, which plain torch has as well, but those of sums that kernels keep in fp32."""
    x, weight = (tensor.to(dtype) for tensor in inputs)
    truth, plain = x.double() @ weight.double().t(), x @ weight.t()
    oracle.assert_matches((x.float() @ weight.float().t()).to(dtype), truth, plain)
    rounded = torch.zeros(ROWS, CLASSES, dtype=dtype)
    for column in range(INNER):
        rounded = rounded + x[:, column, None] * weight[None, :, column]
    with pytest.raises(AssertionError, match="exceeds"):
        oracle.assert_matches(rounded, truth, plain)


def test_a_dropped_term_is_caught(inputs):
    """One product in 64, 1e-5 of the largest result."""
    x, weight = inputs
    x[:, 0] = 1e-5 * (x @ weight.t()).abs().max() / weight[:, 0].abs().max()
    truth, plain = x.double() @ weight.double().t(), x @ weight.t()
    with pytest.raises(AssertionError, match="exceeds"):
        oracle.assert_matches(x[:, 1:] @ weight[:, 1:].t(), truth, plain)


def test_double_precision_is_held_to_its_own_roundings(inputs):
    x, weight = (tensor.double() for tensor in inputs)
    truth = softmax_sums(x, weight)
    with pytest.raises(AssertionError, match="exceeds"):
        oracle.assert_matches(truth * (1 + 1e-14), truth, truth)
