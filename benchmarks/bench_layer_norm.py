"""dropout, residual, LayerNorm in one: ours against torch's operations one by one, and compiled by Inductor.

    pytest benchmarks/bench_layer_norm.py -o python_files='bench_*.py' --benchmark-enable --benchmark-group-by=group

On a GPU ours are the Triton kernels in bf16, on a CPU the reference in fp32 on one thread. GB/s counts each tensor
once, as a perfect kernel would move it: x, residual, y and h forward; dy, dh, h, dx and dresidual backward.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tfm import ops

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
# (rows, columns): tokens of a batch by the model's width; the last two are those of published norm benchmarks.
SIZES = [(4096, 512), (16384, 1024), (16384, 4096), (8192, 8192)] if CUDA else [(256, 512), (1024, 512)]
DROPOUT_P = 0.1
FORWARD_TENSORS, BACKWARD_TENSORS = 4, 5


def ours(x, residual, weight, bias):
    return ops.residual_layer_norm(x, residual, weight, bias, dropout_p=DROPOUT_P)


def eager(x, residual, weight, bias):
    h = residual + F.dropout(x, DROPOUT_P)
    return F.layer_norm(h, h.shape[-1:], weight, bias), h


PEERS = {"ours": ours, "eager": eager, "compile": eager}


@pytest.fixture(autouse=True)
def _one_thread():
    """A second one would measure what else runs on the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def inputs(request):
    """x, residual, weight, bias, dy and dh of one size."""
    x, residual, dy, dh = torch.randn(4, *request.param, device=DEVICE, dtype=DTYPE)
    weight, bias = torch.randn(2, request.param[1], device=DEVICE, dtype=DTYPE)
    return [tensor.clone().requires_grad_() for tensor in (x, residual, weight, bias)], (dy, dh)


@pytest.fixture(params=PEERS)
def function(request):
    if request.param != "compile":
        return PEERS[request.param]
    torch._dynamo.reset()
    return torch.compile(PEERS[request.param], fullgraph=True, dynamic=False)


def measure(benchmark, step, inputs, tensors):
    """Times `step`, and records what it would move at best."""

    def finished():
        step()
        if CUDA:
            torch.cuda.synchronize()

    finished()
    rows, columns = inputs[0].shape
    benchmark.group = f"{benchmark.name.partition('[')[0]} {rows}x{columns}"
    benchmark(finished)
    moved = tensors * inputs[0].numel() * inputs[0].element_size()
    benchmark.extra_info |= {"device": str(DEVICE), "dtype": str(DTYPE), "bytes": moved}
    if benchmark.stats is not None:
        benchmark.extra_info["GB/s"] = moved / benchmark.stats.stats.median / 1e9


def test_forward(benchmark, function, inputs):
    tensors, _ = inputs

    @torch.no_grad()
    def step():
        function(*tensors)

    measure(benchmark, step, tensors, FORWARD_TENSORS)


def test_forward_and_backward(benchmark, function, inputs):
    tensors, cotangents = inputs

    def step():
        torch.autograd.grad(function(*tensors), tensors, cotangents)

    measure(benchmark, step, tensors, FORWARD_TENSORS + BACKWARD_TENSORS)
