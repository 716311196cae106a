"""What judges accelerate() can be trusted: a model is equal to itself, and every fault that one might make shows."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from harness import anatomy, changed_weights, differences, far, ran, set_dropout, step
from torch import nn
from zoo import ZOO, batch

SPECIES = {species.name: species for species in ZOO}
# Far above the 1e-5 that the tests of families allow.
SHOWS = 1e-4


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "mamba", "mixtral"])
def test_a_model_is_equal_to_itself(name):
    species = SPECIES[name]
    apart = differences(step(species.make(), species, "left"), step(species.make(), species, "left"))
    assert max(apart.values()) == 0


@pytest.mark.parametrize("name", ["llama", "bert", "bart", "gemma2", "deepseek", "zamba"])
def test_a_wrong_scale_shows(name):
    species = SPECIES[name]
    model = species.make()
    expected = step(model, species, "right")
    attentions = [module for module in model.modules() if isinstance(getattr(module, "scaling", None), float)]
    assert attentions
    for attention in attentions:
        attention.scaling *= 1.05
    assert differences(step(model, species, "right"), expected)["logits"] > SHOWS


@pytest.mark.parametrize("species", ZOO, ids=lambda species: species.name)
def test_a_norm_without_its_weight_shows(species):
    model = species.make()
    expected = step(model, species, "right")
    norms = [module for module in model.modules() if type(module).__name__.endswith(("Norm", "Norm1D"))]
    weighted = [norm.weight for norm in norms if getattr(norm, "weight", None) is not None]
    assert weighted
    with torch.no_grad():
        weighted[0].fill_(0.0 if "Gemma" in type(norms[0]).__name__ else 1.0)
    found = step(model, species, "right")
    # Other experts may be asked then, and have gradients.
    assert far(found.logits, expected.logits, expected.logits.abs().max().item()) > SHOWS


@pytest.mark.parametrize(
    ("name", "attribute"),
    [("mistral", "sliding_window"), ("gemma2", "attn_logit_softcapping"), ("qwen2", "sliding_window")],
)
def test_a_rule_of_attention_that_is_ignored_shows(name, attribute):
    species = SPECIES[name]
    model = species.make()
    expected = step(model, species, "none")
    for module in model.modules():
        if getattr(module, attribute, None) is not None:
            setattr(module, attribute, None)
    if attribute == "sliding_window":
        model.config.sliding_window = batch(species.kind, "none")["input_ids"].shape[1]
    assert differences(step(model, species, "none"), expected)["logits"] > SHOWS


@pytest.mark.parametrize(
    ("name", "padding"), [("llama", "left"), ("bert", "right"), ("t5", "right"), ("falconrw", "left")]
)
def test_padding_that_is_attended_to_shows(name, padding):
    species = SPECIES[name]
    model = species.make()
    given = batch(species.kind, padding)
    valid = given["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**given).logits
        found = model(**given | {"attention_mask": torch.ones_like(given["attention_mask"])}).logits
    seen = valid if expected.shape[:2] == valid.shape else slice(None)
    assert far(found[seen], expected[seen], expected[seen].abs().max().item()) > SHOWS


def test_what_is_no_number_is_infinitely_far():
    assert far(torch.tensor([math.nan, 1.0]), torch.ones(2), 1.0) == math.inf
    assert far(torch.ones(2), torch.ones(3), 1.0) == math.inf


def test_what_ran_is_counted():
    species = SPECIES["bert"]
    model = species.make()
    counts = ran(model, species)
    assert (counts.attention, counts.softmaxes, counts.ours.total()) == (2, 0, 0)
    model.set_attn_implementation("eager")
    counts = ran(model, species)
    assert (counts.attention, counts.softmaxes) == (0, 2)
    assert counts.others > 10


@pytest.mark.parametrize("change", ["class", "attribute", "number", "hook", "config"])
def test_a_trace_that_is_left_is_found(change):
    model = SPECIES["t5"].make()
    before = anatomy(copy.deepcopy(model))
    assert anatomy(model) == before
    module = model.decoder.block[1].layer[0]
    if change == "class":
        module.__class__ = type("T5LayerSelfAttention", (type(module),), {})
    elif change == "attribute":
        module.forward = module.forward
    elif change == "number":
        module.SelfAttention.n_heads += 1
    elif change == "hook":
        module.register_forward_hook(lambda *_: None)
    else:
        model.decoder.config._attn_implementation_internal = "tfm"
    assert anatomy(model) != before


def test_dropout_is_set_everywhere_and_weights_come_back():
    model = SPECIES["bart"].make().train()
    set_dropout(model, 0.25)
    dropouts = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    assert all(p == 0.25 for p in dropouts)
    assert model.model.encoder.layers[0].self_attn.dropout == 0.25
    before = copy.deepcopy(model.state_dict())
    with changed_weights(model):
        assert not torch.equal(model.state_dict()["lm_head.weight"], before["lm_head.weight"])
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
