"""A dozen models on Triton's kernels, in the interpreter where there is no GPU: every kernel runs, and is right."""

from __future__ import annotations

from collections import Counter

import launches
import pytest
import torch
from harness import differences, step
from selection import long_but
from zoo import ZOO

import tfm

pytestmark = pytest.mark.triton
SPECIES = {species.name: species for species in ZOO}
CLOSE = 3e-5
# How often each model's kernels run in a forward and its backward: of attention as often as it attends.
LAUNCHES = {
    "bert": {"short_attention_forward_kernel": 2, "short_attention_backward_kernel": 2, "norm_forward_kernel": 6},
    "gpt2": {"short_attention_forward_kernel": 2, "norm_forward_kernel": 5},
    "gptj": {"short_attention_forward_kernel": 2, "norm_forward_kernel": 3},
    "llama": {"short_attention_forward_kernel": 2, "rotary_kernel": 4, "norm_forward_kernel": 5},
    "gemma2": {"short_attention_forward_kernel": 2, "norm_forward_kernel": 9},
    "falconrw": {"short_attention_forward_kernel": 2, "norm_forward_kernel": 5},
    "glm": {"short_attention_forward_kernel": 2, "rotary_kernel": 4},
    "t5": {"short_attention_forward_kernel": 6, "norm_forward_kernel": 12},
    "bart": {"short_attention_forward_kernel": 6, "norm_forward_kernel": 12},
    "rwkv": {"wkv_forward_kernel": 2},
    "recurrentgemma": {"rg_lru_forward_kernel": 2, "short_attention_forward_kernel": 1},
    "mixtral": {"short_attention_forward_kernel": 2},
    "mamba": {"selective_scan_forward_kernel": 2, "causal_conv1d_forward_kernel": 2},
    "zamba": {"selective_scan_forward_kernel": 10, "short_attention_forward_kernel": 2},
    "jamba": {"selective_scan_forward_kernel": 2, "short_attention_forward_kernel": 2},
}
HALVES = ("bert", "llama", "t5")


@pytest.fixture(autouse=True)
def on_triton():
    with tfm.use("triton"):
        yield


def ran(species, dtype, monkeypatch, device):
    model = species.make().to(device, dtype)
    tfm.accelerate(model)
    launched = launches.watch(monkeypatch)
    outcome = step(model, species, "right")
    monkeypatch.undo()
    return outcome, Counter(launched)


@pytest.mark.parametrize("name", long_but(("bert", "llama"), LAUNCHES))
def test_kernels_run_and_are_right(name, monkeypatch):
    species = SPECIES[name]
    expected = step(species.make(), species, "right")
    outcome, launched = ran(species, torch.float32, monkeypatch, "cpu")
    assert {kernel: launched[kernel] for kernel in LAUNCHES[name]} == LAUNCHES[name], launched
    apart = differences(outcome, expected)
    assert max(apart.values()) <= CLOSE, apart


@pytest.mark.parametrize("name", long_but(("bert",), HALVES))
def test_in_bf16_they_err_no_more_than_stock(name, monkeypatch):
    species = SPECIES[name]
    truth = step(species.make(), species, "right").logits
    allowed = (step(species.make().bfloat16(), species, "right").logits - truth).abs().max()
    outcome, launched = ran(species, torch.bfloat16, monkeypatch, "cpu")
    assert launched["short_attention_forward_kernel"] == LAUNCHES[name]["short_attention_forward_kernel"]
    assert (outcome.logits - truth).abs().max() <= 1.5 * allowed
