"""The feed-forward network's matmuls with their epilogues, and the element-wise kernels beside cuBLAS."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch
from torch import Tensor

from tfm import ops
from tfm.kernels import feed_forward
from tfm.kernels.launch.device import Chip
from tfm.operators.feed_forward import (
    ActivationDropout,
    ActivationDropoutBackward,
    LinearActivation,
    LinearActivationBackward,
    keeps_hidden,
)
from tfm.ops.feed_forward import ACTIVATIONS
from tools.check_kernels.case import CHIPS, Case
from tools.check_kernels.described import chip, described, meta
from tools.host import sizes
from tools.host.call import Budget, Call
from tools.subjects import inputs
from tools.subjects.inputs import Outputs, Pass, Tensors

HIDDEN = 2048
# Each takes smaller tiles than the one before, on 132 multiprocessors.
ROWS = (8192, 1024, 512, 64)
# The second ends within a step; the last is cuBLAS's.
EVEN, ODD, DEEP = 512, 496, 2048


def compiled(every: bool) -> Iterator[Case]:
    """Yields dropout, bias, and what the backward needs; GELU takes the most registers, plain and gated."""
    for gated in (False, True):
        yield from _matmul_cases(every, gated)
        yield from _element_cases(every, gated)


def _matmul_cases(every: bool, gated: bool) -> Iterator[Case]:
    """Yields the largest tiles, those of small chips, and smaller ones with a depth that ends within a step."""
    everything = dict.fromkeys(product(ROWS, (9, 8), ("bf16", "fp16"), ("gelu", "relu")))
    everything |= dict.fromkeys(product(ROWS[:1], (9,), ("bf16",), ACTIVATIONS))
    hungriest = [(8192, 9, "bf16", "gelu"), (8192, 8, "bf16", "gelu"), (1024, 9, "bf16", "gelu")]
    # The one that keeps hidden instead of the pre-activation.
    hungriest += [] if gated else [(8192, 9, "bf16", "relu")]
    for rows, major, dtype, activation in everything if every else hungriest:
        depth, on = EVEN if rows == ROWS[0] else ODD, Chip(major, multiprocessors=132)
        capabilities = CHIPS[8] if major == 8 else CHIPS[9] + CHIPS[10]
        name = f"{rows}/sm_{10 * major} {activation}{' gated' * gated} {dtype}"
        x, weight = meta(rows, depth, dtype=dtype), meta(HIDDEN, depth, dtype=dtype)
        bias, layer = None if gated else meta(HIDDEN, dtype="fp32"), _layer(gated, activation)
        call = LinearActivation(x, weight, weight if gated else None, bias, *layer, save=True)
        yield from described(
            name, feed_forward.linear_activation, call, on, matrix=("linear_activation",), capabilities=capabilities
        )
        backward = _backward(rows, HIDDEN, depth, dtype, gated, activation)
        yield from described(
            name, feed_forward.linear_activation_backward, backward, on,
            matrix=("linear_activation",), capabilities=capabilities,
        )  # fmt: skip


def _element_cases(every: bool, gated: bool) -> Iterator[Case]:
    """Yields rows of odd lengths, which take an address for each element."""
    everything = product((16, 63, 511, 512), ("bf16", "fp16", "fp32"), ("gelu",))
    hungriest = [(511, "bf16", "gelu"), (512, "fp32", "gelu")]
    for columns, dtype, activation in everything if every else hungriest:
        name = f"{columns} {activation}{' gated' * gated} {dtype}"
        pre = meta(ROWS[0], 2 * columns if gated else columns, dtype=dtype)
        call = ActivationDropout(pre, *_layer(gated, activation))
        yield from described(name, feed_forward.activation_dropout, call, chip(9))
        backward = _backward(ROWS[0], columns, DEEP, dtype, gated, activation)
        yield from described(name, feed_forward.linear_activation_backward, backward, chip(9))
        alone = ActivationDropoutBackward(backward.saved[:, :columns], *backward[2:-2], False, backward.dbias)
        yield from described(f"{name} alone", feed_forward.activation_dropout_backward, alone, chip(9))


def _backward(
    rows: int, columns: int, depth: int, dtype: str, gated: bool, activation: str
) -> LinearActivationBackward:
    dy, weight = meta(rows, depth, dtype=dtype), meta(depth, columns, dtype=dtype)
    saved = meta(rows, 2 * columns if gated else columns, dtype=dtype)
    recompute, dbias = not keeps_hidden(gated, activation), None if gated else torch.float32
    return LinearActivationBackward(dy, weight, saved, *_layer(gated, activation), recompute, dbias)


def _layer(gated: bool, activation: str) -> tuple[bool, str, float, Tensor, int]:
    """Returns the arguments from `gated` to `site`, with dropout."""
    return gated, activation, 0.1, meta(dtype="i64"), 0


def pass_feed_forward(new: Tensors) -> Iterator[Outputs]:
    for columns, activation in (
        (inputs.COLUMNS, "relu"),
        (inputs.COLUMNS, "gelu"),
        (inputs.COLUMNS - 1, "gelu"),
        (inputs.EVEN, "silu"),
    ):
        first, second = (new(inputs.WIDTH, columns), new(inputs.WIDTH)), (new(columns, inputs.WIDTH), new(columns))
        yield ops.feed_forward(new(inputs.ROWS, columns), *first, *second, activation, inputs.DROPOUT_P)


def pass_gated_feed_forward(new: Tensors) -> Iterator[Outputs]:
    for columns in (inputs.COLUMNS, inputs.COLUMNS - 1):
        gate, up, down = new(inputs.WIDTH, columns), new(inputs.WIDTH, columns), new(columns, inputs.WIDTH)
        yield ops.gated_feed_forward(new(inputs.ROWS, columns), gate, up, down, "silu", inputs.DROPOUT_P)


def pass_linear_activation(new: Tensors) -> Iterator[Outputs]:
    for columns, activation in ((inputs.COLUMNS, "relu"), (inputs.COLUMNS - 1, "gelu")):
        layer = new(inputs.ROWS, columns), new(inputs.WIDTH, columns), new(inputs.WIDTH)
        yield ops.linear_activation(*layer, activation, inputs.DROPOUT_P)


PASSES: dict[str, Pass] = {
    "linear_activation": pass_linear_activation,
    "feed_forward": pass_feed_forward,
    "gated_feed_forward": pass_gated_feed_forward,
}


def timed(seed: Tensor) -> list[Call]:
    """Returns the calls whose launches are counted and whose host time is told."""
    budget = Budget(host=25)
    x, w1, b1 = sizes.leaf(sizes.TOKENS, sizes.WIDTH), sizes.leaf(sizes.HIDDEN, sizes.WIDTH), sizes.leaf(sizes.HIDDEN)
    gate, up, w2 = (
        sizes.leaf(sizes.HIDDEN, sizes.WIDTH),
        sizes.leaf(sizes.HIDDEN, sizes.WIDTH),
        sizes.leaf(sizes.WIDTH, sizes.HIDDEN),
    )
    found = []
    for activation in ("relu", "gelu"):
        call = partial(ops.feed_forward, x, w1, b1, w2, None, activation, 0.1, seed=seed)
        found.append(Call(f"feed_forward, {activation}", call, (x, w1, b1, w2), budget))
    call = partial(ops.linear_activation, x, w1, b1, "gelu", 0.1, seed=seed)
    found.append(Call("linear_activation, gelu", call, (x, w1, b1)))
    call = partial(ops.gated_feed_forward, x, gate, up, w2, "silu", 0.1, seed=seed)
    return [*found, Call("gated_feed_forward, silu", call, (x, gate, up, w2), budget)]
