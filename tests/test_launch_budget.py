"""A layer's launches: what its design promises, counted on any machine, and in a captured graph on a GPU."""

from __future__ import annotations

import pytest
import torch
from launch_counts import count
from samples import small_model
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import tfm
from tfm import ops
from tfm.model import State
from tfm.sequences import Layout

LENGTHS = (5, 4, 17)
DIM, HEADS = 64, 2
# Kernels of a layer: the sublayers' own, "Add & Norm"s, the products of cuBLAS and what autograd adds up between them.
FORWARD = {"encoder": 7, "decoder": 11}
BACKWARD = {"encoder": 17, "decoder": 26}


def layer_and_inputs(kind, device):
    """A post-norm layer of the bundled model in fp16, dropping out everywhere, and a packed batch for it."""
    dropouts = {"dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.1}
    model = small_model(torch.float16, dim=DIM, heads=HEADS, ffn_dim=DIM, **dropouts).to(device)
    offsets = torch.tensor([0, *LENGTHS], device=device).cumsum(0).to(torch.int32)
    layout = Layout.of(offsets, max(LENGTHS), sum(LENGTHS))
    x = torch.randn(sum(LENGTHS), DIM, dtype=torch.float16, device=device, requires_grad=True)
    seed = ops.draw_seed(device)
    if kind == "encoder":
        return lambda: model.encoder.layers[0](State(x, x), layout, seed).normed, [
            x,
            *model.encoder.layers[0].parameters(),
        ]
    memory = torch.randn(sum(LENGTHS), 2, HEADS, DIM // HEADS, dtype=torch.float16, device=device, requires_grad=True)
    layer = model.decoder.layers[0]
    return lambda: layer(State(x, x), layout, memory, layout, seed).normed, [x, memory, *layer.parameters()]


@pytest.mark.parametrize("kind", FORWARD)
def test_a_layer_keeps_its_budget(kind, kernel_device):
    layer, inputs = layer_and_inputs(kind, kernel_device)
    outputs = []
    with tfm.use("triton"):
        forward = count(lambda: outputs.append(layer()))
        cotangent = torch.ones_like(outputs[0])
        backward = count(lambda: torch.autograd.grad(outputs[0], inputs, cotangent))
    assert forward.total() == FORWARD[kind], forward
    assert backward.total() == BACKWARD[kind], backward


@pytest.mark.gpu
@pytest.mark.parametrize("kind", FORWARD)
def test_a_captured_layer_has_no_more_nodes(kind):
    layer, inputs = layer_and_inputs(kind, torch.device("cuda"))
    cotangent = torch.ones_like(layer())
    forward = lambda: layer()  # noqa: E731
    both = lambda: torch.autograd.grad(layer(), inputs, cotangent)  # noqa: E731
    assert nodes(forward) <= FORWARD[kind]
    assert nodes(both) <= FORWARD[kind] + BACKWARD[kind]


def nodes(step):
    """The kernels of one replay of `step` as a CUDA graph; cuBLAS's split-K reductions are counted apart."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as run:
        graph.replay()
        torch.cuda.synchronize()
    kernels = [event.name for event in run.events() if event.device_type == DeviceType.CUDA]
    return sum("splitk" not in name.lower() for name in kernels)
