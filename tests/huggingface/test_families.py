"""accelerate() on a small model of every family: the same numbers, by other means, and not a trace after restore()."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import NamedTuple

import pytest
import torch
from harness import (
    Outcome,
    anatomy,
    changed_weights,
    continued,
    differences,
    far,
    generated,
    ran,
    set_dropout,
    step,
)
from torch import Tensor, nn
from zoo import CAUSAL, MASKED, SEQ2SEQ, ZOO, Species

import tfm
from tfm import native
from tfm.patching.families import FAMILIES

pytestmark = pytest.mark.skipif(
    bool(native.why_unavailable(torch.device("cpu"))), reason="without native kernels a CPU runs everything as before"
)
PADDINGS = ("right", "left", "none")
TOLERANCE = 1e-5
# Gradients are sums of thousands of products in another order.
LOOSER = 3e-5
# Their state is no cache that tokens can be added to.
WITHOUT_CACHE = {"rwkv", "mamba", "zamba", "jamba", "recurrentgemma", "xlnet", "gptneo"}
every = pytest.mark.parametrize("species", ZOO, ids=lambda species: species.name)


class Stock(NamedTuple):
    """A model as it was made, and what it gave then."""

    model: nn.Module
    outcomes: dict[str, Outcome]
    said: Tensor | None
    more: Tensor | None


@functools.cache
def stock(species: Species) -> Stock:
    model = species.make()
    outcomes = {padding: step(model, species, padding) for padding in PADDINGS}
    said = generated(model, species.kind) if species.kind != MASKED and species.name != "xlnet" else None
    with torch.no_grad():
        more = continued(model) if species.kind == CAUSAL and species.name not in WITHOUT_CACHE else None
    model.zero_grad()
    return Stock(model, outcomes, said, more)


def accelerated(species: Species) -> nn.Module:
    model = copy.deepcopy(stock(species).model)
    tfm.accelerate(model)
    return model


@every
@pytest.mark.parametrize("padding", PADDINGS)
def test_logits_loss_and_gradients_are_those_of_the_model(species, padding):
    apart = differences(step(accelerated(species), species, padding), stock(species).outcomes[padding])
    worst = max(apart, key=lambda name: apart[name])
    assert max(apart["loss"], apart["logits"]) <= TOLERANCE, apart
    assert apart[worst] <= LOOSER, (worst, apart[worst])


@every
def test_under_autocast_it_errs_no_more_than_the_model(species):
    # A copy, as some models keep what they computed last.
    model, truth = copy.deepcopy(stock(species).model), stock(species).outcomes["right"]
    with torch.autocast("cpu", torch.bfloat16):
        found = step(accelerated(species), species, "right")
        if species.name == "bigbird":
            # Whose own code scatters fp32 into bf16 there.
            with pytest.raises(RuntimeError, match=r"scatter\(\)"):
                step(model, species, "right")
            return
        expected = step(model, species, "right")
    assert (found.loss.dtype, found.logits.dtype) == (expected.loss.dtype, expected.logits.dtype)
    errors = [(one.logits - truth.logits).abs().mean() for one in (found, expected)]
    assert errors[0] <= 1.5 * errors[1] + 1e-4


@every
def test_it_says_the_same(species):
    before = stock(species)
    model = accelerated(species)
    if before.said is not None:
        assert torch.equal(generated(model, species.kind), before.said)
    if before.more is not None:
        with torch.no_grad():
            assert far(continued(model), before.more, before.more.abs().max().item()) <= TOLERANCE


@every
def test_what_is_served_is_what_the_table_of_families_says(species):
    model = copy.deepcopy(stock(species).model)
    report = tfm.accelerate(model)
    family = next(family for family in FAMILIES if family.name == species.family)
    served = {{"tfm.nn.LayerNorm": "norm"}.get(kind, kind) for kind in report.counts}
    assert served == set(family.served)
    assert family.model == species.model
    assert not report.left, report
    counts = ran(model, species)
    assert not any(calls.total() for calls in report.stats().plain.values()), report.stats()
    assert all(report.stats().fused.values())
    if "attention" in served:
        assert any("attention" in name for name in counts.ours)
        assert (counts.attention, counts.softmaxes) == (0, 0)
    if "recurrence" in served:
        assert counts.others <= ran(stock(species).model, species).others / 2


@every
def test_a_copy_a_pickle_and_changed_weights_count(species):
    model = accelerated(species)
    twin = copy.deepcopy(stock(species).model)
    with changed_weights(twin):
        expected = step(twin, species, "right")
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            step(other, species, "right")
            with changed_weights(other):
                apart = differences(step(other, species, "right"), expected)
                assert max(apart.values()) <= LOOSER, apart
    apart = differences(step(model, species, "right"), stock(species).outcomes["right"])
    assert max(apart.values()) <= LOOSER, apart


@every
def test_restore_leaves_nothing_and_others_do_not_notice(species):
    model, twin = species.make(), species.make()
    untouched = anatomy(twin)
    assert anatomy(model) == untouched
    tfm.accelerate(model)
    assert anatomy(twin) == untouched
    assert not ran(twin, species).ours
    again = tfm.accelerate(model)
    assert again.swapped == ()
    assert again.unchanged > 0
    tfm.restore(model)
    assert anatomy(model) == untouched
    assert not ran(model, species).ours
    assert torch.equal(step(model, species, "left").loss, step(twin, species, "left").loss)


@every
def test_training_without_dropout_is_the_same_and_dropout_drops(species):
    model, twin = accelerated(species).train(), copy.deepcopy(stock(species).model).train()
    for one in (model, twin):
        set_dropout(one, 0.0)
    apart = differences(step(model, species, "right"), step(twin, species, "right"))
    assert max(apart.values()) <= LOOSER, apart
    moved = []
    for one in (twin, model):
        still = step(one, species, "right").loss
        set_dropout(one, 0.3)
        moved.append((step(one, species, "right").loss - still).abs().item())
    assert (moved[0] > 1e-4) == (moved[1] > 1e-4), moved


@pytest.mark.parametrize("species", [x for x in ZOO if x.kind in (CAUSAL, SEQ2SEQ)], ids=lambda species: species.name)
def test_the_loss_needs_no_logits(species):
    model = copy.deepcopy(stock(species).model).train()
    set_dropout(model, 0.0)
    expected = step(model, species, "right")
    report = tfm.accelerate(model, fuse_loss=True)
    assert report.counts["loss"] == 1
    apart = differences(step(model, species, "right"), expected)
    assert max(apart.values()) <= LOOSER, apart
    assert report.stats().plain["loss"].total() == 0
