"""What the tests of the feed-forward networks' backends share: inputs, what is run on them, and Triton's two ways."""

from __future__ import annotations

import oracle
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tfm import ops

SEED, SITE = -0x0123456789ABCDEF, 3
NAMES = {False: ("x", "w1", "b1", "w2", "b2"), True: ("x", "gate_weight", "up_weight", "down_weight")}
# Kernels by the way that is taken: a matmul with an epilogue, or the library's and an element-wise kernel.
SUMS = ["sum_partials_kernel"]
FORWARD = {"epilogue": ["linear_activation_kernel"], "library": ["activation_dropout_kernel"]}
BACKWARD = {"epilogue": ["linear_activation_backward_kernel"], "library": ["activation_dropout_backward_kernel"]}


def take(path, monkeypatch):
    """Takes one of the two ways, whatever the settings say of such small matrices."""
    from tfm.kernels.launch import feed_forward as launch

    def tiles(rows, columns):
        # As small as a GPU's tensor cores allow, for several tiles each way.
        shape = (64, 32, 16) if torch.cuda.is_available() else (16, 32, 16)
        programs = -(-rows // shape[0]) * -(-columns // shape[1])
        return launch.MatmulTiles(programs, *shape, slices=2, num_warps=4, num_stages=2)

    def forward(rows, columns, depth, gated, *_):
        return tiles(rows, 2 * columns if gated else columns) if path == "epilogue" else None

    def backward(rows, columns, *_):
        return tiles(rows, columns) if path == "epilogue" else None

    monkeypatch.setattr(launch, "linear_activation", forward)
    monkeypatch.setattr(launch, "linear_activation_backward", backward)


def inputs_of(rows, depth, hidden, out, device, dtype=torch.float32, weight_dtype=None, gated=False):
    """x, w1, b1, w2, b2, or x, gate, up, down: all needing gradients, of the size that keeps activations near 1."""
    rows = (rows,) if isinstance(rows, int) else rows
    first, second = (hidden, depth), (out, hidden)
    shapes = [first, first, second] if gated else [first, (hidden,), second, (out,)]
    tensors = [torch.randn(*rows, depth).to(dtype)]
    for shape in shapes:
        spread = max(1, shape[1]) ** -0.5 if len(shape) == 2 else 1.0
        tensors.append((spread * torch.randn(shape)).to(weight_dtype or dtype))
    return [tensor.to(device).requires_grad_() for tensor in tensors]


def network(activation="gelu", p=0.3, gated=False, impl="triton"):
    function = ops.gated_feed_forward if gated else ops.feed_forward
    return lambda *inputs: function(*inputs, activation, p, seed=SEED, site=SITE, impl=impl)


def run(function, inputs, cotangent):
    """The output and the gradients of those inputs that need one."""
    output = function(*inputs)
    needed = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
    return [output.detach(), *torch.autograd.grad(output, needed, cotangent.to(output.dtype))]


def assert_kernel_matches(inputs, activation="gelu", p=0.3, gated=False, cotangent=None, impl="triton"):
    """Against the reference in float64 and in the inputs' dtypes, which draws the same mask."""
    if cotangent is None:
        cotangent = torch.randn(*inputs[0].shape[:-1], inputs[3].shape[0], device=inputs[0].device)
    wide = [None if tensor is None else tensor.detach().double().requires_grad_() for tensor in inputs]
    plain = network(activation, p, gated, "reference")
    truth, same = run(plain, wide, cotangent), run(plain, inputs, cotangent)
    actual = run(network(activation, p, gated, impl), inputs, cotangent)
    given = [name for name, tensor in zip(NAMES[gated], inputs, strict=True) if tensor is not None]
    oracle.assert_all_match(actual, truth, same, ["output", *given])
    for result, plain_result in zip(actual, same, strict=True):
        assert result.dtype == plain_result.dtype


class KeptShapes(TorchDispatchMode):
    """Within the block, the shapes of the pre-activations that a backend keeps."""

    def __init__(self, namespace):
        super().__init__()
        self.operator, self.shapes = getattr(torch.ops, namespace).linear_activation.default, []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        if function is self.operator:
            self.shapes.append(tuple(result[1].shape))
        return result
