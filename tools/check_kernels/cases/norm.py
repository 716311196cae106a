"""LayerNorm and RMSNorm behind bias, dropout and residual, with fp32 parameters and every gradient."""

from __future__ import annotations

from collections.abc import Iterator

from tfm.kernels import norm
from tfm.operators.norm import ResidualNorm, ResidualNormBackward
from tools.check_kernels.cases.case import DTYPES, Case
from tools.check_kernels.described import chip, described, meta

POWERS = [1 << bits for bits in range(4, 16)]
EVERYTHING = POWERS + [power - 1 for power in POWERS]
# Rows of odd length need the most registers.
HUNGRY = {True: (63, 1024, 4095, 8192, 32767), False: (1024, 8191)}


def norm_cases(every: bool) -> Iterator[Case]:
    """Both norms in every dtype: LayerNorm, and an RMSNorm of 1 + weight that rounds before the weight."""
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
