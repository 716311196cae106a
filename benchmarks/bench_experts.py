"""A mixture of experts beside transformers' two ways: grouped products, its default, and a loop over the experts.

TFLOP/s count the three products of each chosen expert, and for the backward twice as many more.
"""

from __future__ import annotations

import importlib.util
import inspect
from dataclasses import dataclass
from types import MethodType, SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks.device import DEVICE, DTYPE
from benchmarks.inputs import random
from benchmarks.measure import measure
from benchmarks.shapes import sizes
from benchmarks.suite import FORWARD, OURS, Peer, Suite, Work
from tfm import ops


@dataclass(frozen=True)
class Mixture:
    """Tokens, the experts of each, all experts, the width of the model and that of an expert."""

    tokens: int
    places: int
    experts: int
    columns: int
    inner: int

    def __str__(self) -> str:
        return f"{self.tokens}x{self.columns}x{self.inner}, {self.places} of {self.experts}"


# Few large experts, as Mixtral's; many small ones, as Qwen2MoE's and DeepSeek's; a step of decoding.
# A GPU's run has no time left for them.
SIZES = sizes(
    gpu=[],
    cpu=[Mixture(512, 2, 8, 512, 1024), Mixture(1024, 8, 64, 256, 128), Mixture(4, 4, 64, 512, 256)],
    rehearsal=[Mixture(5, 2, 4, 16, 16)],
)


def ours(x, index, weights, first, second):
    return ops.experts(x, index, weights, first, second)


def _module(first, second):
    """Returns what transformers' functions take for a module."""
    from transformers.integrations.moe import _default_apply_gate

    module = SimpleNamespace(
        num_experts=len(first), gate_up_proj=first, down_proj=second, act_fn=nn.SiLU(), has_gate=True, has_bias=False,
        is_transposed=False, is_concatenated=True, has_post_expert_norm=False, _is_expert_parallel=False,
    )  # fmt: skip
    module._apply_gate = MethodType(_default_apply_gate, module)
    return module


def grouped(x, index, weights, first, second):
    from transformers.integrations.moe import grouped_mm_experts_forward

    return grouped_mm_experts_forward(_module(first, second), x, index, weights)


def loop(x, index, weights, first, second):
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    return inspect.unwrap(MixtralExperts.forward)(_module(first, second), x, index, weights)


def missing() -> str:
    return "" if importlib.util.find_spec("transformers") else "transformers is not installed"


def inputs(size: Mixture):
    x, weights = random(size.tokens, size.columns), random(size.tokens, size.places)
    index = torch.rand(size.tokens, size.experts, device=DEVICE).topk(size.places).indices
    first = random(size.experts, 2 * size.inner, size.columns, scale=0.05)
    return x, index, weights, first, random(size.experts, size.columns, size.inner, scale=0.05)


def work(size: Mixture, direction: str) -> Work:
    forward = 6 * size.tokens * size.places * size.columns * size.inner
    read = 3 * min(size.experts, size.tokens * size.places) * size.columns * size.inner * DTYPE.itemsize
    return Work(read, forward) if direction == FORWARD else Work(3 * read, 3 * forward)


def is_of_use(size: Mixture, direction: str) -> bool:
    """Tells whether anyone would do this: nobody trains a step of decoding."""
    return size.tokens > 8 or direction == FORWARD


PEERS = {
    OURS: Peer(ours, where=is_of_use),
    "grouped_mm": Peer(grouped, where=is_of_use, missing=missing),
    "eager": Peer(loop, where=is_of_use, missing=missing),
}
SUITE = Suite("experts", SIZES, PEERS, inputs, work)


@pytest.mark.parametrize("case", SUITE.cases(), ids=str)
def test_experts(benchmark, case):
    measure(benchmark, case)
