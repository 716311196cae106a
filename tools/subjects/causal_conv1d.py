"""The causal convolution: the cases that are compiled, a small pass, and calls whose host time is told."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import Tensor

from tfm import ops
from tfm.kernels import causal_conv1d as kernels
from tfm.operators.causal_conv1d import CausalConv1d, CausalConv1dBackward
from tools.check_kernels.case import Case
from tools.check_kernels.described import chip, described, meta
from tools.host import sizes
from tools.host.call import Call
from tools.subjects import inputs
from tools.subjects.inputs import Outputs, Pass, Tensors

BATCH, STEPS, CHANNELS = 8, 2048, 1024


def compiled(every: bool) -> Iterator[Case]:
    """Yields cases with bias, SiLU and both states; steps or channels side by side."""
    for dtype in ("bf16", "fp16", "fp32"):
        for width in (2, 3, 4) if every else (4,):
            for channels_first in (True, False):
                x = meta(BATCH, CHANNELS, STEPS, dtype=dtype)
                if not channels_first:
                    x = meta(BATCH, STEPS, CHANNELS, dtype=dtype).transpose(1, 2)
                state, bias = meta(BATCH, CHANNELS, width - 1, dtype=dtype), meta(CHANNELS, dtype="fp32")
                label = f"{width} {'steps' if channels_first else 'channels'} side by side {dtype}"
                call = CausalConv1d(x, meta(CHANNELS, width, dtype="fp32"), bias, state, silu=True)
                yield from described(label, kernels.causal_conv1d, call, chip(9))
                backward = CausalConv1dBackward(x, state, *call)
                yield from described(label, kernels.causal_conv1d_backward, backward, chip(9))


def pass_causal_conv1d(new: Tensors) -> Iterator[Outputs]:
    for size in ((2, inputs.ROWS, inputs.WIDTH), (1, inputs.COLUMNS, 2)):
        x, weight, bias, state = new(*size), new(size[1], 4), new(size[1]), new(*size[:2], 3)
        for given in (x, x.transpose(1, 2).contiguous().transpose(1, 2)):
            yield ops.causal_conv1d(
                given, weight, bias, initial_state=state, activation="silu", return_final_state=True
            )
        yield ops.causal_conv1d(x, weight[:, :2])


# For tests of what holds for all operations: name, operation, shapes of what learns, and the rest.
SAMPLES = [
    (
        "causal_conv1d", "causal_conv1d",
        {"x": (2, 3, 5), "weight": (3, 4), "bias": (3,), "initial_state": (2, 3, 3)},
        {"activation": "silu", "return_final_state": True},
    ),
]  # fmt: skip
PASSES: dict[str, Pass] = {"causal_conv1d": pass_causal_conv1d}


def timed(seed: Tensor) -> list[Call]:
    """Returns the calls whose launches are counted and whose host time is told."""
    x, weight, bias = (
        sizes.leaf(sizes.SENTENCES, sizes.WIDTH, sizes.LENGTH),
        sizes.leaf(sizes.WIDTH, 4),
        sizes.leaf(sizes.WIDTH),
    )
    return [Call("causal_conv1d", partial(ops.causal_conv1d, x, weight, bias, activation="silu"), (x, weight, bias))]
