"""LayerNorm and RMSNorm behind bias, dropout and residual, with fp32 parameters and every gradient."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor

from tfm import ops
from tfm.kernels import norm
from tfm.operators.norm import ResidualNorm, ResidualNormBackward
from tools.check_kernels.case import DTYPES, Case
from tools.check_kernels.described import chip, described, meta
from tools.host import sizes
from tools.host.call import Budget, Call
from tools.subjects import inputs
from tools.subjects.inputs import Outputs, Pass, Tensors

POWERS = [1 << bits for bits in range(4, 16)]
EVERYTHING = POWERS + [power - 1 for power in POWERS]
# Rows of odd length need the most registers.
HUNGRY = {True: (63, 1024, 4095, 8192, 32767), False: (1024, 8191)}


def compiled(every: bool) -> Iterator[Case]:
    """Yields both norms in every dtype: LayerNorm, and an RMSNorm of 1 + weight that rounds before the weight."""
    for centred in (True, False):
        for given, stored in DTYPES:
            for columns in EVERYTHING if every else HUNGRY[centred]:
                yield from _cases(centred, given, stored, columns, (False, True) if every else (True,))


def _cases(centred: bool, given: str, stored: str, columns: int, with_x_bias: tuple[bool, ...]) -> Iterator[Case]:
    name = "layer_norm" if centred else "rms_norm"
    label = f"{name} {columns} {given if given == stored else f'{given}+{stored}'}"
    rows, on = columns, chip(9)
    x, residual, seed = meta(rows, columns, dtype=given), meta(rows, columns, dtype=stored), meta(dtype="i64")
    vector = meta(columns, dtype="fp32")
    bias = vector if centred else None
    call = ResidualNorm(
        x, vector, residual, vector, bias, seed, eps=1e-5, dropout_p=0.1, site=0,
        centred=centred, weight_offset=0.0 if centred else 1.0, round_first=not centred, out_dtype=None,
    )  # fmt: skip
    yield from described(label, norm.residual_norm, call, on)
    y, h, statistics = call.outputs()
    assert h is not None
    for x_bias in with_x_bias:
        backward = ResidualNormBackward(
            y, h, h, statistics, vector, seed, call.dropout_p, call.site, call.weight_offset, dx=x.dtype,
            dx_bias=vector.dtype if x_bias else None, dresidual=residual.dtype, dweight=vector.dtype,
            dbias=vector.dtype if centred else None,
        )  # fmt: skip
        yield from described(f"{'x_bias ' * x_bias}{label}", norm.residual_norm_backward, backward, on)


def pass_layer_norm(new: Tensors) -> Iterator[Outputs]:
    yield ops.layer_norm(new(inputs.ROWS, inputs.COLUMNS - 1), new(inputs.COLUMNS - 1), new(inputs.COLUMNS - 1))


def pass_residual_layer_norm(new: Tensors) -> Iterator[Outputs]:
    for shape in inputs.SHAPES:
        weight, bias, x_bias = (new(shape[1]) for _ in range(3))
        yield ops.residual_layer_norm(new(*shape), new(*shape), weight, bias, dropout_p=inputs.DROPOUT_P, x_bias=x_bias)


def pass_rms_norm(new: Tensors) -> Iterator[Outputs]:
    yield ops.rms_norm(new(inputs.ROWS, inputs.COLUMNS - 1), new(inputs.COLUMNS - 1))


def pass_residual_rms_norm(new: Tensors) -> Iterator[Outputs]:
    x, residual = new(inputs.ROWS, inputs.COLUMNS), new(inputs.ROWS, inputs.COLUMNS)
    yield ops.residual_rms_norm(x, residual, new(inputs.COLUMNS), dropout_p=inputs.DROPOUT_P)


PASSES: dict[str, Pass] = {
    "layer_norm": pass_layer_norm,
    "residual_layer_norm": pass_residual_layer_norm,
    "rms_norm": pass_rms_norm,
    "residual_rms_norm": pass_residual_rms_norm,
}


def timed(seed: Tensor) -> list[Call]:
    """Returns the calls whose launches are counted and whose host time is told."""
    budget = Budget(host=16)
    x, residual = sizes.leaf(sizes.TOKENS, sizes.WIDTH), sizes.leaf(sizes.TOKENS, sizes.WIDTH)
    weight, bias, x_bias = sizes.leaf(sizes.WIDTH), sizes.leaf(sizes.WIDTH), sizes.leaf(sizes.WIDTH)
    drop: dict[str, Any] = {"dropout_p": 0.1, "seed": seed}
    added = partial(ops.residual_layer_norm, x, residual, weight, bias, x_bias=x_bias, **drop)
    added_rms = partial(ops.residual_rms_norm, x, residual, weight, **drop)
    return [
        Call("layer_norm", partial(ops.layer_norm, x, weight, bias), (x, weight, bias), budget),
        Call("residual_layer_norm", added, (x, residual, weight, bias, x_bias), budget),
        Call("residual_rms_norm", added_rms, (x, residual, weight), budget),
        Call("rms_norm", partial(ops.rms_norm, x, weight), (x, weight), budget),
    ]
