"""One tensor given for two arguments of an operation: its gradients add up, under torch.compile too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tfm import native, ops

BACKENDS = [
    "reference",
    pytest.param(
        "native",
        marks=pytest.mark.skipif(bool(native.why_unavailable(torch.device("cpu"))), reason="tfm_native is not built"),
    ),
]
TOKENS = torch.tensor([0, 3, 3, 6, 1])
TARGET = torch.tensor([1, 0, 6, 3, 3, 2, 5])
CALLS = {
    "attention": lambda x: ops.attention(*[x[None, None]] * 3),
    "residual_layer_norm": lambda x: torch.stack(ops.residual_layer_norm(x, x, x[0], x[0])),
    "residual_rms_norm": lambda x: torch.stack(ops.residual_rms_norm(x, x, x[0])),
    "layer_norm": lambda x: ops.layer_norm(x, x[0], x[0]),
    "embedding": lambda x: ops.embedding(TOKENS, x, TOKENS, position_weight=x),
    "feed_forward": lambda x: ops.feed_forward(x, x, None, x, None, "gelu"),
    "gated_feed_forward": lambda x: ops.gated_feed_forward(x, x, x, x, "silu"),
    "linear_activation": lambda x: ops.linear_activation(x, x, x[0], "silu"),
    "linear_cross_entropy": lambda x: ops.linear_cross_entropy(x, x, TARGET, label_smoothing=0.1),
    "rotary": lambda x: torch.stack(ops.rotary(x[None, None, :, :6], x[None, None, :, :6], *[x.detach()[:, :3]] * 2)),
}


def result_and_gradient(call, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = call(x)
    (y * torch.linspace(-1, 2, y.numel()).view(y.shape)).sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize("name", CALLS)
def test_compiled_as_eager(name: str, impl: str) -> None:
    torch._dynamo.reset()
    x = torch.randn(7, 7)
    with ops.backends.use(impl):
        expected = result_and_gradient(CALLS[name], x)
        found = result_and_gradient(torch.compile(CALLS[name], backend="aot_eager", fullgraph=True), x)
    for actual, right in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, right)
