"""RG-LRU: the cases that are compiled, a small pass, and calls whose host time is told."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tfm import ops
from tfm.kernels import rg_lru as kernels
from tfm.operators.recurrence import KEPT_EVERY
from tfm.operators.rg_lru import RgLru, RgLruBackward
from tools.check_kernels.case import Case
from tools.check_kernels.described import chip, described, meta
from tools.host import sizes
from tools.host.call import Call
from tools.subjects import inputs
from tools.subjects.inputs import Outputs, Pass, Tensors

BATCH, STEPS, CHANNELS = 8, 2048, 2560


def compiled(every: bool) -> Iterator[Case]:
    """Yields cases with resets and states on both sides, and of training, without any."""
    for dtype in ("bf16", "fp16", "fp32"):
        x, weight = meta(BATCH, STEPS, CHANNELS, dtype=dtype), meta(CHANNELS, dtype="fp32")
        state, reset = meta(BATCH, CHANNELS, dtype="fp32"), torch.empty(BATCH, STEPS, dtype=torch.bool, device="meta")
        kept = meta(BATCH * STEPS // KEPT_EVERY * CHANNELS, dtype="fp32")
        for given, anew in ((state, reset), (None, None)) if every else ((state, reset),):
            label = f"{'without' if given is None else 'with'} resets {dtype}"
            call = RgLru(x, x, x, weight, anew, given, KEPT_EVERY)
            yield from described(label, kernels.rg_lru, call, chip(9))
            backward = RgLruBackward(x, given, *call[:5], kept, KEPT_EVERY)
            yield from described(label, kernels.rg_lru_backward, backward, chip(9))


def pass_rg_lru(new: Tensors) -> Iterator[Outputs]:
    param, state = new(inputs.ROWS), new(2, inputs.ROWS)
    for steps in (inputs.ROWS, 1):
        x, entering, staying = (new(2, steps, inputs.ROWS) for _ in range(3))
        reset = torch.arange(2 * steps, device=new.device).view(2, steps) % 7 == 3
        yield ops.rg_lru(x, entering, staying, param, reset=reset, initial_state=state, return_final_state=True)
        yield ops.rg_lru(x, entering, staying, param)


def _constants(device: str) -> dict[str, Any]:
    reset = torch.tensor([[True, False, False, False, True], [False, False, True, True, False]], device=device)
    return {"reset": reset, "return_final_state": True}


# For tests of what holds for all operations: name, operation, shapes of what learns, and the rest, made for a device.
SAMPLES = [
    (
        "rg_lru", "rg_lru",
        {
            "x": (2, 5, 4), "input_gate": (2, 5, 4), "recurrence_gate": (2, 5, 4), "recurrent_param": (4,),
            "initial_state": (2, 4),
        },
        _constants,
    ),
]  # fmt: skip
PASSES: dict[str, Pass] = {"rg_lru": pass_rg_lru}


def timed(seed: Tensor) -> list[Call]:
    """Returns the calls whose launches are counted and whose host time is told."""
    tokens = [sizes.leaf(sizes.SENTENCES, sizes.LENGTH, sizes.WIDTH) for _ in range(3)]
    leaves = (*tokens, sizes.leaf(sizes.WIDTH))
    return [Call("rg_lru", partial(ops.rg_lru, *leaves), leaves)]
