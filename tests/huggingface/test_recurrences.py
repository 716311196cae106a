"""accelerate() on models with a state, where they go on from it step by step, and several steps at once."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from harness import differences, far, ran, step
from torch import Tensor, nn
from transformers.models.rwkv.modeling_rwkv import rwkv_linear_attention_cpu
from zoo import CAUSAL, ZOO, batch

import tfm
from tfm import native
from tfm.patching.huggingface import state_space

pytestmark = pytest.mark.skipif(
    bool(native.why_unavailable(torch.device("cpu"))), reason="without native kernels a CPU runs everything as before"
)
SPECIES = {species.name: species for species in ZOO}
MAMBAS = ["mamba", "zamba", "jamba"]
ALL = pytest.mark.parametrize("name", ["rwkv", "recurrentgemma", *MAMBAS])
CLOSE = 1e-5
TOKENS = batch(CAUSAL, "none")["input_ids"]


def pair(name: str, **options: object) -> tuple[nn.Module, nn.Module, tfm.patching.Report]:
    """A model, and the same accelerated, with its report."""
    species = SPECIES[name]
    stock = replace(species, options=species.options | options).make()
    ours = copy.deepcopy(stock)
    return stock, ours, tfm.accelerate(ours)


def reasons(report: tfm.patching.Report) -> set[str]:
    """Why calls ran as before."""
    return {reason for calls in report.stats().plain.values() for reason in calls}


def say(model: nn.Module, tokens: Tensor, **options: object) -> Tensor:
    return model.generate(tokens, max_new_tokens=6, do_sample=False, use_cache=True, **options)  # type: ignore[operator]


@pytest.mark.parametrize("impl", ["reference", "native"])
def test_wkv_is_that_of_transformers(impl):
    """State and all gradients included."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((6,), (6,), (2, 19, 6), (2, 19, 6), (3, 2, 6))
    leaves = [torch.randn(shape, generator=generator) for shape in shapes]
    leaves[4][1] = 1 + leaves[4][1].abs()
    for leaf in leaves:
        leaf.requires_grad_()
    y, state = rwkv_linear_attention_cpu(*leaves[:4], state=leaves[4].unbind(), return_state=True)
    expected = y, torch.stack(state)
    found = tfm.ops.wkv(*leaves[:4], initial_state=leaves[4], return_final_state=True, impl=impl)
    cotangents = [torch.randn(x.shape, generator=generator) for x in expected]
    both = [(*x, *torch.autograd.grad(x, leaves, cotangents)) for x in (found, expected)]
    torch.testing.assert_close(*both, rtol=1e-4, atol=1e-5)


@ALL
def test_a_token_at_a_time(name):
    stock, ours, report = pair(name)
    expected = say(stock, TOKENS[:1])
    assert torch.equal(say(ours, TOKENS[:1]), expected)
    # The prompt and five tokens behind it, fused in every layer.
    assert not reasons(report)
    calls = report.stats().fused["recurrence"]
    assert calls == 6 * report.counts["recurrence"]


def test_several_sentences_of_recurrentgemma():
    stock, ours, report = pair("recurrentgemma")
    assert torch.equal(say(ours, TOKENS), say(stock, TOKENS))
    assert not reasons(report)
    kept = [name for name, _ in ours.named_modules() if name.endswith("rg_lru")]
    assert kept
    for name in kept:
        found, expected = (model.get_submodule(name).recurrent_states for model in (ours, stock))
        assert far(found, expected, expected.abs().max().item()) <= CLOSE


@pytest.mark.parametrize("name", MAMBAS)
def test_several_sentences_of_mambas(name):
    """The caches too: what was convolved, and the state."""
    stock, ours, report = pair(name)
    options = {"return_dict_in_generate": True}
    found, expected = (say(model, TOKENS, **options) for model in (ours, stock))
    assert torch.equal(found.sequences, expected.sequences)
    assert not reasons(report)
    for one, other in zip(found.past_key_values.layers, expected.past_key_values.layers, strict=True):
        for kept in ("conv_states", "recurrent_states"):
            for place, x in getattr(other, kept, {}).items():
                assert far(getattr(one, kept)[place], x, x.abs().max().item()) <= CLOSE


def test_several_sentences_of_rwkv_are_taken_for_one_as_stock_takes_them():
    """transformers' one step mixes each sentence with all: what it says stays, and is counted."""
    stock, ours, report = pair("rwkv")
    assert torch.equal(say(ours, TOKENS), say(stock, TOKENS))
    assert reasons(report) == {"transformers takes one step of several sequences for several steps"}


def test_rwkv_goes_on_from_a_state():
    stock, ours, report = pair("rwkv")
    with torch.no_grad():
        results = []
        for model in (stock, ours):
            first = model(TOKENS[:, :9], use_cache=True)
            more = model(TOKENS[:, 9:], state=first.state, use_cache=True)
            results.append((first.logits, more.logits, *more.state))
        whole = stock(TOKENS, use_cache=False).logits
    for expected, found in zip(*results, strict=True):
        assert far(found, expected, expected.abs().max().item()) <= CLOSE
    assert far(results[1][1], whole[:, 9:], whole.abs().max().item()) <= CLOSE
    assert not reasons(report)


def test_rwkv_rescales_its_weights_in_place():
    """At the first call in evaluation, and back in training: nothing of ours keeps a weight."""
    stock, ours, report = pair("rwkv", rescale_every=1)
    species = SPECIES["rwkv"]
    for training in (False, True, False):
        for model in (stock, ours):
            model.train(training)
        apart = differences(step(ours, species, "none"), step(stock, species, "none"))
        assert max(apart.values()) <= 3 * CLOSE, apart
    assert not reasons(report)


@ALL
def test_most_of_what_runs_is_ours(name):
    stock, ours, _ = pair(name)
    assert ran(ours, SPECIES[name]).others <= ran(stock, SPECIES[name]).others / 2


# Stock's experts of Jamba refuse the zoo's widths in bf16.
@pytest.mark.parametrize("name", ["rwkv", "recurrentgemma", "mamba", "zamba"])
def test_bf16_is_as_near_as_stock(name):
    stock, _, _ = pair(name)
    half = copy.deepcopy(stock).bfloat16()
    ours = copy.deepcopy(half)
    report = tfm.accelerate(ours)
    with torch.no_grad():
        truth, theirs, found = (model(TOKENS).logits.float() for model in (stock, half, ours))
    assert (found - truth).abs().mean() <= 1.5 * (theirs - truth).abs().mean()
    assert not reasons(report)


@ALL
def test_autocast(name):
    """Norms give fp32 there, products bf16: Jamba has both in one scan."""
    stock, ours, report = pair(name)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (step(model, SPECIES[name], "right") for model in (ours, stock))
    truth = step(stock, SPECIES[name], "right")
    assert (found.loss.dtype, found.logits.dtype) == (expected.loss.dtype, expected.logits.dtype)
    for key in ("loss", "logits"):
        errors = [(getattr(one, key) - getattr(truth, key)).abs().mean() for one in (found, expected)]
        assert errors[0] <= 1.5 * errors[1] + 1e-3, key
    assert not reasons(report)


class Named(nn.Linear):
    """A user's own linear layer."""


def test_parts_that_are_not_torchs_are_called():
    stock, ours, report = pair("rwkv")
    for model in (stock, ours):
        model.rwkv.blocks[0].feed_forward.key.__class__ = Named
    seen = []
    for module in (ours.rwkv.blocks[1].feed_forward.value, ours.rwkv.blocks[1].attention.key):
        module.register_forward_hook(lambda module, given, result: seen.append(result.shape))
    species = SPECIES["rwkv"]
    apart = differences(step(ours, species, "none"), step(stock, species, "none"))
    assert max(apart.values()) <= 3 * CLOSE, apart
    assert len(seen) == 2
    assert len(reasons(report)) == 2


def test_a_package_of_kernels_is_left_its_mixers(monkeypatch):
    monkeypatch.setattr(state_space, "PACKAGE", "torch")
    _, _, report = pair("mamba")
    assert set(report.counts) == {"norm", "cross_entropy"}
    assert {(left.name, left.reason) for left in report.left} == {
        (f"backbone.layers.{layer}.mixer", "torch is installed, whose kernels serve it") for layer in (0, 1)
    }


@pytest.mark.parametrize("impl", ["reference", "native"])
def test_the_scan_is_that_of_transformers(impl):
    """All gradients and the state included, of widths, activations and softplus that ours has and has not."""
    generator = torch.Generator().manual_seed(0)

    def new(*shape):
        return torch.randn(shape, generator=generator).requires_grad_()

    with tfm.ops.backends.use(impl):
        for softplus in (True, False):
            given = new(2, 4, 9), new(2, 4, 9), (-new(4, 3).exp()).detach(), new(2, 3, 9), new(2, 3, 9)
            options = {"D": new(4), "z": new(2, 4, 9), "delta_bias": new(4), "delta_softplus": softplus}
            results = []
            for function in (state_space.scan, state_space.theirs.mamba_selective_scan):
                y, state = function(*given, **options, return_last_state=True)
                leaves = [x for x in (*given, options["D"], options["z"], options["delta_bias"]) if x.requires_grad]
                results.append((y, state, *torch.autograd.grad(y.sin().sum() + state.sum(), leaves)))
            torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
        for width, activation in ((4, "silu"), (2, None), (5, "silu"), (4, "gelu")):
            x, weight, bias = new(2, 4, 9), new(4, width), new(4)
            taps = [torch.ones(2, 4, width) for _ in range(2)]
            one, other = state_space, state_space.theirs
            results = [
                (
                    whole(x, weight, bias, activation=activation),
                    step(x[..., :1], kept, weight, bias, activation=activation), kept,
                )
                for whole, step, kept in (
                    (one.convolve, one.convolve_step, taps[0]),
                    (other.causal_conv1d_fn, other.causal_conv1d_update, taps[1]),
                )
            ]  # fmt: skip
            torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_a_convolution_with_a_hook_is_called():
    _, ours, report = pair("recurrentgemma")
    seen = []
    block = next(module for name, module in ours.named_modules() if name.endswith("temporal_block"))
    block.conv_1d.register_forward_hook(lambda module, given, result: seen.append(result.shape))
    with torch.no_grad():
        ours(TOKENS)
    assert len(seen) == 1
    assert len(reasons(report)) == 1
