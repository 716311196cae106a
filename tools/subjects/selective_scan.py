"""The selective scan: the cases that are compiled, a small pass, and calls whose host time is told."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor

from tfm import ops
from tfm.kernels import selective_scan as kernels
from tfm.operators.selective_scan import KEPT_EVERY, SelectiveScan, SelectiveScanBackward
from tools.check_kernels.case import Case
from tools.check_kernels.described import chip, described, meta
from tools.host import sizes
from tools.host.call import Call
from tools.subjects import inputs
from tools.subjects.inputs import Outputs, Pass, Tensors

BATCH, STEPS, CHANNELS = 8, 2048, 1536
# So few that a sequence is cut into chunks, whatever its states.
FEW = 512
STATES = (16, 64)
# Of the numbers that B and C are a part of, a row.
JOINED = 256
# Steps of a sequence that is cut into chunks, the last of them shorter.
CUT = 200


def compiled(every: bool) -> Iterator[Case]:
    """Yields cases with everything, of a sequence in chunks and of many; of training; and of steps side by side."""
    for dtype in ("bf16", "fp16", "fp32"):
        for states in STATES:
            yield from _compiled("chunks", 1, states, dtype, is_whole=True, channels=FEW)
            yield from _compiled("whole", BATCH, states, dtype, is_whole=True)
            if every:
                yield from _compiled("bare", BATCH, states, dtype, is_whole=False)
                yield from _compiled("steps", BATCH, states, dtype, is_whole=True, is_transposed=True)


def _compiled(
    name: str, batch: int, states: int, dtype: str, *, is_whole: bool, is_transposed: bool = False,
    channels: int = CHANNELS,
) -> Iterator[Case]:  # fmt: skip
    x = meta(batch, STEPS, channels, dtype=dtype)
    if is_transposed:
        x = meta(batch, channels, STEPS, dtype=dtype).transpose(1, 2)
    A, weight = meta(channels, states, dtype="fp32"), meta(channels, dtype="fp32")
    B = meta(batch, STEPS, JOINED, dtype=dtype)[..., :states]
    state = meta(batch, channels, states, dtype="fp32")
    kept = meta(STEPS // KEPT_EVERY * state.numel(), dtype="fp32")
    D, z, bias, given = (weight, x, weight, state) if is_whole else (None, None, None, None)
    call = SelectiveScan(x, x, A, B, B, D, z, bias, given, KEPT_EVERY)
    yield from described(f"{states} {name} {dtype}", kernels.selective_scan, call, chip(9))
    backward = SelectiveScanBackward(x, given, *call[:8], kept, KEPT_EVERY)
    yield from described(f"{states} {name} {dtype} back", kernels.selective_scan_backward, backward, chip(9))


def pass_selective_scan(new: Tensors) -> Iterator[Outputs]:
    states = 5
    # The long sequence, which is cut into chunks, has few channels: its steps take the time.
    for batch, steps, channels in ((1, CUT, 3), (2, inputs.ROWS, inputs.ROWS), (2, 1, inputs.ROWS)):
        decay, D, bias, state = new(channels, states), new(channels), new(channels), new(batch, channels, states)
        x, delta, z = (new(batch, steps, channels) for _ in range(3))
        B, C = (new(batch, steps, states) for _ in range(2))
        yield ops.selective_scan(
            x, delta, -decay.exp(), B, C, D=D, z=z, delta_bias=bias, initial_state=state, return_final_state=True
        )
        yield ops.selective_scan(x, delta, -decay.exp(), B, C)


def _constants(device: str) -> dict[str, Any]:
    return {"return_final_state": True}


# For tests of what holds for all operations: name, operation, shapes of what learns, and the rest, made for a device.
# Of few steps: A is drawn on both sides of 0, where states grow from step to step.
SAMPLES = [
    (
        "selective_scan", "selective_scan",
        {
            "x": (2, 2, 4), "delta": (2, 2, 4), "A": (4, 3), "B": (2, 2, 3), "C": (2, 2, 3), "D": (4,), "z": (2, 2, 4),
            "delta_bias": (4,), "initial_state": (2, 4, 3),
        },
        _constants,
    ),
]  # fmt: skip
PASSES: dict[str, Pass] = {"selective_scan": pass_selective_scan}


def timed(seed: Tensor) -> list[Call]:
    """Returns the calls whose launches are counted and whose host time is told."""
    x, delta = (sizes.leaf(sizes.SENTENCES, sizes.LENGTH, sizes.WIDTH) for _ in range(2))
    B, C = (sizes.leaf(sizes.SENTENCES, sizes.LENGTH, STATES[0]) for _ in range(2))
    leaves = (x, delta, sizes.leaf(sizes.WIDTH, STATES[0]), B, C)
    return [Call("selective_scan", partial(ops.selective_scan, *leaves), leaves)]
