"""Cross-entropy over stored logits, and over logits that are never stored."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tfm import ops
from tfm.kernels import cross_entropy
from tfm.kernels.cross_entropy import stored
from tfm.kernels.launch.cross_entropy import TILE_ROWS
from tfm.operators.cross_entropy import CrossEntropy, CrossEntropy_, LinearCrossEntropy
from tools.check_kernels.case import Case
from tools.check_kernels.described import chip, described, meta
from tools.host import sizes
from tools.host.call import Call
from tools.subjects import inputs
from tools.subjects.inputs import Outputs, Pass, Tensors

ROWS, DIM = 8192, 512
Options = tuple[int, float, float, float | None]
# Ignored class, label smoothing, z-loss and softcap: as translation models are trained, and with everything.
USUAL: Options = (-100, 0.1, 0.0, None)
EVERYTHING: Options = (-100, 0.1, 0.01, 30.0)


def compiled(every: bool) -> Iterator[Case]:
    """Yields rows of one block, of several and of more warps, with their gradients; every tile of streamed logits."""
    powers = [1 << bits for bits in range(8, 19)]
    for dtype in ("bf16", "fp16", "fp32"):
        for classes in powers if every else (4096, 32768, 65536):
            yield from _stored(dtype, classes)
    for dtype in ("bf16", "fp16"):
        yield from _streamed(dtype, "sm_90", 9, USUAL)
        for major in (9, 10):
            yield from _streamed(dtype, f"sm_{10 * major} everything", major, EVERYTHING)


def _stored(dtype: str, classes: int) -> Iterator[Case]:
    """Yields losses and gradients in one launch, as the forward makes them; and with grad, divisor and all else."""
    label, target = f"{classes} {dtype}", meta(TILE_ROWS, dtype="i64")
    input, weight = meta(TILE_ROWS, DIM, dtype=dtype), meta(classes, DIM, dtype=dtype)
    call = LinearCrossEntropy(input, weight, None, target, "mean", *USUAL, needs=[True] * 3)
    yield from described(label, cross_entropy.linear_cross_entropy, call, chip(9))
    bias, losses, divisor = meta(classes, dtype="fp32"), meta(TILE_ROWS, dtype="fp32"), meta(dtype="fp32")
    logits = meta(TILE_ROWS, classes, dtype=dtype)
    rows = CrossEntropy_(logits, bias, target, losses, *EVERYTHING, True, grad=losses, divisor=divisor)
    yield from described(f"{label} everything", stored.cross_entropy_, rows, chip(9))
    kept = CrossEntropy(logits, target, *USUAL, True, grad=None, divisor=divisor)
    yield from described(f"{label} kept", cross_entropy.cross_entropy, kept, chip(9))
    if dtype != "fp32":
        biased = CrossEntropy_(logits, bias, target, losses, *USUAL, True, grad=None, divisor=None)
        yield from described(
            f"{label} bias", stored.cross_entropy_, biased, chip(9), capabilities=(80, 86, 89, 90, 120)
        )


def _streamed(dtype: str, name: str, major: int, options: Options) -> Iterator[Case]:
    """Yields the loss alone: logits in registers, what combines their shares, and the sum over rows."""
    input, weight, target = meta(ROWS, DIM, dtype=dtype), meta(32768, DIM, dtype=dtype), meta(ROWS, dtype="i64")
    bias = None if options is USUAL else meta(32768, dtype="fp32")
    call = LinearCrossEntropy(input, weight, bias, target, "mean", *options, needs=[False] * 3)
    yield from described(
        f"{dtype} {name}", cross_entropy.linear_cross_entropy, call, chip(major),
        matrix=("streaming_statistics",), capabilities=(10 * major,),
    )  # fmt: skip


def pass_linear_cross_entropy(new: Tensors) -> Iterator[Outputs]:
    target = new.below(inputs.CLASSES, inputs.ROWS)
    target[::5] = -100
    weight, bias = new(inputs.CLASSES, inputs.COLUMNS), new(inputs.CLASSES)
    for x in (new(inputs.ROWS, inputs.COLUMNS), new(inputs.ROWS, inputs.COLUMNS).detach()):
        with torch.set_grad_enabled(x.requires_grad):
            yield ops.linear_cross_entropy(x, weight, target, linear_bias=bias, label_smoothing=0.1, z_loss=1e-4)
    yield ops.linear_cross_entropy(
        new(3, inputs.COLUMNS), new(inputs.WIDE, inputs.COLUMNS), new.below(inputs.WIDE, 3), reduction="none"
    )


def pass_cross_entropy(new: Tensors) -> Iterator[Outputs]:
    target = new.below(inputs.CLASSES, inputs.ROWS)
    target[::5] = -100
    for logits in (new(inputs.ROWS, inputs.CLASSES), new(inputs.ROWS, inputs.CLASSES).detach()):
        with torch.set_grad_enabled(logits.requires_grad):
            for reduction in ("mean", "none"):
                yield ops.cross_entropy(logits, target, reduction=reduction, label_smoothing=0.1, z_loss=1e-4)
    yield ops.cross_entropy(new(3, inputs.WIDE), new.below(inputs.WIDE, 3), softcap=3.0)


PASSES: dict[str, Pass] = {
    "cross_entropy": pass_cross_entropy,
    "linear_cross_entropy": pass_linear_cross_entropy,
}


def _constants(reduction: str, device: str) -> dict[str, Any]:
    target = torch.tensor([3, 0, -100, 6, 2], device=device)
    return {"target": target, "label_smoothing": 0.1, "reduction": reduction}


# For tests of what holds for all operations: name, operation, shapes of what learns, and the rest, made for a device.
SAMPLES = [
    ("cross_entropy", "cross_entropy", {"input": (5, 7)}, partial(_constants, "sum")),
    ("cross_entropy rows", "cross_entropy", {"input": (5, 7)}, partial(_constants, "none")),
]


def timed(seed: Tensor) -> list[Call]:
    """Returns the calls whose launches are counted and whose host time is told."""
    x, weight, target = (
        sizes.leaf(sizes.TOKENS, sizes.WIDTH),
        sizes.leaf(sizes.CLASSES, sizes.WIDTH),
        torch.randint(0, sizes.CLASSES, (sizes.TOKENS,)),
    )
    call = partial(ops.linear_cross_entropy, x, weight, target, label_smoothing=0.1)
    logits = sizes.leaf(sizes.TOKENS, sizes.CLASSES)
    of_logits = Call("cross_entropy, mean", partial(ops.cross_entropy, logits, target, label_smoothing=0.1), (logits,))
    return [of_logits] + [
        Call(f"linear_cross_entropy, {reduction}", partial(call, reduction=reduction), (x, weight))
        for reduction in ("mean", "none")
    ]
