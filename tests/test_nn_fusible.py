"""Layers whose children carry hooks or parametrizations, or were replaced, call them as torch does."""

from __future__ import annotations

import copy

import pytest
import torch
from layer_cases import (
    DIM,
    SOURCES,
    TARGETS,
    decoder_call,
    encoder_call,
    make,
    tokens,
    valid,
)
from torch import Tensor
from torch_pairs import assert_equal_results, results, stack_pair

import tfm.nn


def test_never_takes_torchs_fast_path(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise AssertionError("torch's fast path")

    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", fail)
    monkeypatch.setattr(torch, "_native_multi_head_attention", fail)
    theirs, ours = (layer.eval() for layer in make("Encoder", batch_first=True))
    source = tokens(SOURCES, True)
    with torch.no_grad():
        with pytest.raises(AssertionError, match="fast path"):
            theirs(source)
        ours(source)
        # Not even where it calls its children one by one: torch's would leave the replaced child out.
        ours.linear1 = torch.nn.Sequential(ours.linear1)
        ours(source)


class LowRank(torch.nn.Module):
    """A LoRA-like child: the base layer and a low-rank addition."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = torch.nn.Linear(base.in_features, 2, bias=False)
        self.up = torch.nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def with_low_rank(layer: torch.nn.Module) -> None:
    torch.manual_seed(3)
    layer.linear2 = LowRank(layer.linear2).double()


class Doubled(torch.nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def with_parametrization(layer: torch.nn.Module) -> None:
    torch.nn.utils.parametrize.register_parametrization(layer.linear1, "weight", Doubled())


def with_hook(layer: torch.nn.Module) -> None:
    layer.norm1.register_forward_hook(lambda module, inputs, output: 2 * output)


def with_patched_forward(layer: torch.nn.Module) -> None:
    original = layer.linear1.forward
    layer.linear1.forward = lambda x: original(x) + 1


def with_another_norm(layer: torch.nn.Module) -> None:
    layer.norm2 = torch.nn.RMSNorm(DIM).double()


def with_parametrized_attention(layer: torch.nn.Module) -> None:
    torch.nn.utils.parametrize.register_parametrization(layer.self_attn, "in_proj_weight", Doubled())


@pytest.mark.parametrize("kind", ["Encoder", "Decoder"])
@pytest.mark.parametrize(
    "change",
    [
        with_low_rank, with_parametrization, with_hook, with_patched_forward, with_another_norm,
        with_parametrized_attention,
    ],
)  # fmt: skip
def test_changed_children_are_called(kind: str, change: object) -> None:
    theirs, ours = make(kind, norm_first=True)
    inputs = {"src": tokens(SOURCES, False)}
    call = encoder_call("padding")
    keep = valid(call, "src_key_padding_mask", SOURCES, False)
    if kind == "Decoder":
        inputs = {"tgt": tokens(TARGETS, False), "memory": tokens(SOURCES, False)}
        call = decoder_call("padding")
        keep = valid(call, "tgt_key_padding_mask", TARGETS, False)
    unchanged = ours(**inputs, **call)
    change(theirs)
    change(ours)
    found = results(ours, inputs, call, keep)
    assert_equal_results(found, results(theirs, inputs, call, keep))
    assert not torch.allclose(found["output 0"], unchanged[keep])
    assert (ours(**inputs, **call)[~keep] == 0).all()


def test_hooks_on_any_child_fire() -> None:
    for name in ("self_attn", "linear1", "linear2", "norm1", "norm2", "dropout", "dropout1", "dropout2"):
        _, ours = make("Encoder")
        fired = []
        handle = getattr(ours, name).register_forward_pre_hook(lambda *given, fired=fired: fired.append(1))
        ours(tokens(SOURCES, False))
        handle.remove()
        ours(tokens(SOURCES, False))
        assert fired == [1], name


def test_global_hooks_fire() -> None:
    _, ours = make("Encoder")
    called = []
    handle = torch.nn.modules.module.register_module_forward_pre_hook(lambda module, _: called.append(type(module)))
    try:
        ours(tokens(SOURCES, False))
    finally:
        handle.remove()
    assert torch.nn.Linear in called
    assert tfm.nn.LayerNorm in called


def by_subclass(layer: torch.nn.Module, name: str) -> None:
    block = getattr(type(layer), name)
    own = {name: lambda *arguments, **options: 2 * block(*arguments, **options)}
    layer.__class__ = type("Own", (type(layer),), own)


def on_the_object(layer: torch.nn.Module, name: str) -> None:
    block = getattr(layer, name)
    setattr(layer, name, lambda *arguments, **options: 2 * block(*arguments, **options))


BLOCKS = [("Encoder", "_sa_block"), ("Encoder", "_ff_block")]
BLOCKS += [("Decoder", name) for name in ("_sa_block", "_mha_block", "_ff_block")]


@pytest.mark.parametrize("within", ["layer", "stack", "accelerated layer", "accelerated stack"])
@pytest.mark.parametrize("change", [by_subclass, on_the_object])
@pytest.mark.parametrize(("kind", "name"), BLOCKS)
def test_blocks_of_a_layers_own_are_called(kind: str, name: str, change: object, within: str) -> None:
    make_pair = stack_pair if "stack" in within else make
    theirs, ours = make_pair(kind)
    if "accelerated" in within:
        ours = copy.deepcopy(theirs)
        tfm.accelerate(ours)
    own = [module.layers[1] if "stack" in within else module for module in (theirs, ours)]
    inputs = {"src": tokens(SOURCES, False)}
    if kind == "Decoder":
        inputs = {"tgt": tokens(TARGETS, False), "memory": tokens(SOURCES, False)}
    unchanged = ours(**inputs)
    for layer in own:
        change(layer, name)
    found = results(ours, inputs, {})
    assert_equal_results(found, results(theirs, inputs, {}))
    assert not torch.allclose(found["output 0"], unchanged)
