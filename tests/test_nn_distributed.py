"""DTensors through the layers: torch's operations shard them, which no kernel does."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_module, distribute_tensor

import tfm.nn
from tfm import ops

BATCH, LENGTH, DIM, HEADS = 2, 3, 8, 2
TORCH = tuple(map(int, torch.__version__.split(".")[:2]))


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    if not torch.distributed.is_gloo_available():
        pytest.skip("torch has no gloo here")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("dim", [0, 1], ids=["length", "batch"])
@pytest.mark.parametrize(
    ("name", "arguments"), [("LayerNorm", (DIM,)), ("RMSNorm", (DIM,)), ("MultiheadAttention", (DIM, HEADS))]
)
def test_layers_take_them(name: str, arguments: tuple[int, ...], dim: int, mesh: DeviceMesh) -> None:
    layer = getattr(tfm.nn, name)(*arguments)
    inputs = 3 if name == "MultiheadAttention" else 1
    x = torch.randn(LENGTH, BATCH, DIM)
    results = []
    for distribute in (False, True):
        if distribute:
            layer = distribute_module(layer, mesh)
            x = distribute_tensor(x, mesh, [Shard(dim)])
            if inputs > 1 and dim == 1 and TORCH < (2, 12):
                with pytest.raises(RuntimeError, match="Attempted to flatten multiple dimensions"):
                    distribute_module(torch.nn.Linear(DIM, DIM), mesh)(x)
                pytest.xfail("this torch's own linear layer takes no [L, B, D] that is sharded over B")
        x = x.detach().requires_grad_()
        output = layer(*[x] * inputs)
        output = output[0] if inputs > 1 else output
        assert isinstance(output, DTensor) == distribute
        output.sin().sum().backward()
        found = (output, x.grad)
        results.append([y.full_tensor() if distribute else y for y in found])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_a_backend_by_name_refuses_them(mesh: DeviceMesh) -> None:
    x = distribute_tensor(torch.randn(LENGTH, DIM), mesh, [Shard(0)])
    with pytest.raises(ValueError, match="DTensor knows torch's own operations alone"):
        ops.layer_norm(x, impl="native")
