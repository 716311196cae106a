"""The mixture of experts: the cases that are compiled, small passes, and calls whose host time is told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tfm import ops
from tfm.kernels import experts as kernels
from tfm.operators.experts import Experts, ExpertsBackward, ExpertsRouting
from tools.check_kernels.case import CHIPS, Case
from tools.check_kernels.described import chip, described, meta
from tools.host import sizes
from tools.host.call import Call
from tools.subjects import inputs
from tools.subjects.inputs import Outputs, Pass, Tensors

EXPERTS, PLACES, COLUMNS = 8, 2, 1024
# Of as many tokens tiles are large, of these few small.
MANY, FEW = 4096, 256
# The second ends within a step.
EVEN, ODD = 512, 496
# What multiplies matrices, by the beginnings of the kernels' names.
PRODUCTS = ("experts_hidden", "experts_product", "experts_weight_gradient")


def compiled(every: bool) -> Iterator[Case]:
    """Yields the largest tiles, those of small chips, and smaller ones; all with biases and all gradients."""
    sizes = [(MANY, EVEN, 9), (MANY, EVEN, 8), (FEW, ODD, 9)]
    for tokens, depth, major in sizes:
        capabilities = CHIPS[8] if major == 8 else CHIPS[9] + CHIPS[10]
        for dtype in ("bf16", "fp16", "fp32") if every else ("bf16", "fp32"):
            for activation in ("gelu", "silu", "relu") if every else ("gelu",):
                for gated in (True, False):
                    # One tensor for all experts, or one for each.
                    for separate in (False, True) if every or (gated and major == 9) else (False,):
                        label = (
                            f"{tokens}/sm_{10 * major} {activation}{' gated' * gated}{' separate' * separate} {dtype}"
                        )
                        for launch, call in _calls(tokens, depth, dtype, activation, gated, separate):
                            label_of = f"{label} backward" if launch is kernels.experts_backward else label
                            matrix = () if dtype == "fp32" else PRODUCTS
                            yield from numbered(
                                described(label_of, launch, call, chip(major), matrix=matrix, capabilities=capabilities)
                            )


def numbered(cases: Iterable[Case]) -> Iterator[Case]:
    """Yields the cases of a call; of several launches of one kernel the later ones have numbers."""
    met: Counter[str] = Counter()
    for case in cases:
        met[case.name] += 1
        yield case if met[case.name] == 1 else replace(case, name=f"{case.name} {met[case.name]}")


def _calls(tokens: int, depth: int, dtype: str, activation: str, gated: bool, separate: bool) -> Iterator[tuple]:
    """Yields launch functions with a call of each."""
    rows, width = tokens * PLACES, COLUMNS * (2 if gated else 1)
    x, weights = meta(tokens, depth, dtype=dtype), meta(tokens, PLACES, dtype="fp32")
    shapes = (width, depth), (depth, COLUMNS)
    first, second = (
        [meta(*shape, dtype=dtype) for _ in range(EXPERTS)] if separate else [meta(EXPERTS, *shape, dtype=dtype)]
        for shape in shapes
    )
    biases = meta(EXPERTS, width, dtype="fp32"), meta(EXPERTS, depth, dtype="fp32")
    order, place, offsets = (meta(size, dtype="i32") for size in (rows, rows, EXPERTS + 1))
    routed = order, place, offsets, weights
    yield kernels.experts_routing, ExpertsRouting(meta(tokens, PLACES, dtype="i64"), EXPERTS)
    yield kernels.experts, Experts(x, *routed, first, second, *biases, activation, gated, save=True)
    pre = meta(rows, width, dtype=dtype)
    layer: list[Any] = [first, second, *biases, activation, gated]
    yield kernels.experts_backward, ExpertsBackward(x, x, *routed, pre, *layer, [True] * 6)  # type: ignore[call-arg]


def pass_experts(new: Tensors) -> Iterator[Outputs]:
    for columns, gated in ((inputs.COLUMNS, True), (inputs.COLUMNS - 1, False)):
        x, weights = new(inputs.ROWS, columns), new(inputs.ROWS, 2)
        # One of four has no tokens, and some places have no expert.
        index = 2 * new.below(3, inputs.ROWS, 2) - 1
        shapes = (inputs.WIDTH, columns), (columns, inputs.WIDTH // 2 if gated else inputs.WIDTH)
        stacked = [new(4, *shape) for shape in shapes]
        biases: dict[str, Any] = {"first_bias": new(4, inputs.WIDTH), "second_bias": new(4, columns)}
        yield ops.experts(x, index, weights, *stacked, **biases, gated=gated)
        first, second = ([new(*shape) for _ in range(3)] for shape in shapes)
        yield ops.experts(x, index, weights, first, second, activation="gelu", gated=gated)
        yield ops.experts(x.detach()[:0], index[:0], weights.detach()[:0], first, second, gated=gated)


def _index(device: str) -> dict[str, Tensor]:
    # Some without an expert, one token twice with the same.
    return {"top_k_index": torch.tensor([[0, 2], [2, 1], [-1, 0], [2, 2], [3, 4]], device=device)}


# For tests of what holds for all operations: name, operation, shapes of what learns, and the rest.
SAMPLES = [
    (
        "experts", "experts",
        {
            "x": (5, 6), "top_k_weights": (5, 2), "first_weight": (4, 8, 6), "second_weight": (4, 6, 4),
            "first_bias": (4, 8), "second_bias": (4, 6),
        },
        _index,
    ),
    (
        "experts plain", "experts",
        {"x": (5, 6), "top_k_weights": (5, 2), "first_weight": (4, 7, 6), "second_weight": (4, 6, 7)},
        lambda device: _index(device) | {"activation": "relu", "gated": False},
    ),
]  # fmt: skip
PASSES: dict[str, Pass] = {"experts": pass_experts}


def timed(seed: Tensor) -> list[Call]:
    """Returns the calls whose launches are counted and whose host time is told."""
    x, weights = sizes.leaf(sizes.TOKENS, sizes.WIDTH), sizes.leaf(sizes.TOKENS, PLACES)
    index = torch.arange(sizes.TOKENS * PLACES).view(-1, PLACES) % EXPERTS
    first = sizes.leaf(EXPERTS, 2 * sizes.WIDTH, sizes.WIDTH)
    second = sizes.leaf(EXPERTS, sizes.WIDTH, sizes.WIDTH)
    learning = x, weights, first, second
    return [Call("experts", partial(ops.experts, x, index, weights, first, second), learning)]
