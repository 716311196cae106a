"""RWKV's attention by decay: the cases that are compiled, a small pass, and calls whose host time is told."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import Tensor

from tfm import ops
from tfm.kernels import wkv as kernels
from tfm.operators.recurrence import KEPT_EVERY
from tfm.operators.wkv import Wkv, WkvBackward
from tools.check_kernels.case import Case
from tools.check_kernels.described import chip, described, meta
from tools.host import sizes
from tools.host.call import Call
from tools.subjects import inputs
from tools.subjects.inputs import Outputs, Pass, Tensors

BATCH, STEPS, CHANNELS = 8, 1024, 768


def compiled(every: bool) -> Iterator[Case]:
    """Yields cases with states on both sides, and of training, without either."""
    for dtype in ("bf16", "fp16", "fp32"):
        x, weight = meta(BATCH, STEPS, CHANNELS, dtype=dtype), meta(CHANNELS, dtype="fp32")
        state = meta(3, BATCH, CHANNELS, dtype="fp32")
        kept = meta(BATCH * STEPS // KEPT_EVERY * 3 * CHANNELS, dtype="fp32")
        for given in (state, None) if every else (state,):
            label = f"{'without' if given is None else 'with'} a state {dtype}"
            call = Wkv(weight, weight, x, x, given, KEPT_EVERY)
            yield from described(label, kernels.wkv, call, chip(9))
            yield from described(
                label, kernels.wkv_backward, WkvBackward(x, given, *call[:4], kept, KEPT_EVERY), chip(9)
            )


def pass_wkv(new: Tensors) -> Iterator[Outputs]:
    decay, first, state = new(inputs.ROWS), new(inputs.ROWS), new(3, 2, inputs.ROWS)
    for steps in (inputs.ROWS, 1):
        key, value = new(2, steps, inputs.ROWS), new(2, steps, inputs.ROWS)
        yield ops.wkv(decay, first, key, value, initial_state=state, return_final_state=True)
        yield ops.wkv(decay, first, key, value)


# For tests of what holds for all operations: name, operation, shapes of what learns, and the rest. No state, which may
# not be any numbers: denominators are sums of weights.
SAMPLES = [
    (
        "wkv", "wkv",
        {"decay": (4,), "first": (4,), "key": (2, 5, 4), "value": (2, 5, 4)},
        {"return_final_state": True},
    ),
]  # fmt: skip
PASSES: dict[str, Pass] = {"wkv": pass_wkv}


def timed(seed: Tensor) -> list[Call]:
    """Returns the calls whose launches are counted and whose host time is told."""
    tokens = (sizes.SENTENCES, sizes.LENGTH, sizes.WIDTH)
    leaves = sizes.leaf(sizes.WIDTH), sizes.leaf(sizes.WIDTH), sizes.leaf(*tokens), sizes.leaf(*tokens)
    return [Call("wkv", partial(ops.wkv, *leaves), leaves)]
