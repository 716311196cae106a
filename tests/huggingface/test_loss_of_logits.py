"""The loss of accelerated models: ours wherever stock calls torch's, the same numbers, and what trainers look at."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from harness import differences, ran, step
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification
from zoo import BERT, MASKED, ZOO, Species, batch

import tfm
from tfm import native
from tfm.patching.families import FAMILIES
from tfm.patching.fusion import fusion_of

pytestmark = pytest.mark.skipif(
    bool(native.why_unavailable(torch.device("cpu"))), reason="without native kernels a CPU runs everything as before"
)
SPECIES = {species.name: species for species in ZOO}
SERVED = {family.name for family in FAMILIES if "cross_entropy" in family.served}
CLOSE = 3e-5
# As `loss_function`, as CrossEntropyLoss, as nn.CrossEntropyLoss, and as a module of the model's.
WAYS = pytest.mark.parametrize("name", ["llama", "bert", "electra", "distilbert", "t5"])


def pair(species: Species) -> tuple[nn.Module, nn.Module, tfm.patching.Report]:
    stock = species.make()
    ours = copy.deepcopy(stock)
    return stock, ours, tfm.accelerate(ours, only="cross_entropy")


@pytest.mark.parametrize("species", ZOO, ids=lambda species: species.name)
def test_all_losses_are_ours(species):
    _, ours, report = pair(species)
    assert ("cross_entropy" in report.counts) == (species.family in SERVED)
    if species.family in SERVED:
        assert ran(ours, species).ours["cross_entropy"] == 1
        assert report.stats().fused["cross_entropy"] == 1


@WAYS
def test_loss_and_gradients_are_those_of_stock(name):
    stock, ours, _ = pair(SPECIES[name])
    apart = differences(*(step(model, SPECIES[name], "right") for model in (ours, stock)))
    assert max(apart.values()) <= CLOSE, apart


@WAYS
def test_where_nothing_counts_the_loss_is_no_number_either(name):
    given = dict(batch(SPECIES[name].kind, "right"))
    given["labels"] = torch.full_like(given["labels"], -100)
    for model in pair(SPECIES[name])[:2]:
        assert model(**given).loss.isnan()


@pytest.mark.parametrize("count", [7, torch.tensor(7)])
def test_a_batch_may_be_a_part_of_one(count):
    given = batch(SPECIES["llama"].kind, "right")
    stock, ours, _ = (model for model in pair(SPECIES["llama"]))
    losses = [model(**given, num_items_in_batch=count).loss for model in (ours, stock)]
    torch.testing.assert_close(*losses)
    assert abs(losses[0] - stock(**given).loss) > 0.1


@WAYS
def test_trainers_find_the_signature_and_users_their_class(name):
    stock, ours, _ = pair(SPECIES[name])
    assert inspect.signature(ours.forward) == inspect.signature(stock.forward)
    again = type(ours)(stock.config)
    assert type(again) is type(stock)
    assert fusion_of(again) is None
    tfm.restore(ours)
    assert type(ours) is type(stock)
    assert vars(ours).keys() == vars(stock).keys()


def test_a_users_own_loss_function_stays():
    model = SPECIES["llama"].make()
    tfm.accelerate(model)
    model.loss_function = lambda logits, labels, **_: logits.float().mean()
    found = model(**batch(SPECIES["llama"].kind, "right"))
    torch.testing.assert_close(found.loss, found.logits.mean())
    tfm.restore(model)
    found = model(**batch(SPECIES["llama"].kind, "right"))
    torch.testing.assert_close(found.loss, found.logits.mean())


@pytest.mark.parametrize("of_tokens", [True, False])
def test_classifiers(of_tokens):
    torch.manual_seed(0)
    kind = BertForTokenClassification if of_tokens else BertForSequenceClassification
    stock = kind(BertConfig(**BERT, num_labels=5)).eval()
    ours = copy.deepcopy(stock)
    tfm.accelerate(ours)
    given = dict(batch(MASKED, "right"))
    tokens = given["input_ids"]
    labels = torch.randint(5, tokens.shape if of_tokens else tokens.shape[:1])
    # Whatever stands at padding counts for nothing.
    given["labels"] = labels.masked_fill(given["attention_mask"] == 0, -100) if of_tokens else labels
    losses = [model(**given).loss for model in (ours, stock)]
    torch.testing.assert_close(*losses)


def test_what_ours_does_not_serve_is_torchs():
    from tfm.patching.huggingface.cross_entropy import CrossEntropyLoss

    logits, target = torch.randn(2, 5, 3, requires_grad=True), torch.randint(5, (2, 3))
    weight = torch.rand(5)
    for given, options in (((logits, target), {}), ((logits[:, :, 0], target[:, 0]), {"weight": weight})):
        torch.testing.assert_close(CrossEntropyLoss(**options)(*given), F.cross_entropy(*given, **options))
    probabilities = torch.rand(2, 5).softmax(-1)
    torch.testing.assert_close(
        CrossEntropyLoss(label_smoothing=0.1)(logits[:, :, 0], probabilities),
        F.cross_entropy(logits[:, :, 0], probabilities, label_smoothing=0.1),
    )


@pytest.mark.parametrize("name", ["llama", "bert", "electra"])
def test_one_graph(name):
    stock, ours, _ = pair(SPECIES[name])
    given = batch(SPECIES[name].kind, "none")
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**given).loss, stock(**given).loss)


@WAYS
def test_under_autocast_the_loss_is_as_wide_as_stocks(name):
    species = SPECIES[name]
    stock, ours, _ = pair(species)
    truth = step(stock, species, "right").loss
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (step(model, species, "right").loss for model in (ours, stock))
    assert found.dtype == expected.dtype == torch.float32
    assert abs(found - truth) <= 1.5 * abs(expected - truth) + 1e-4


def test_in_bf16_it_errs_no_more_than_stock():
    species = SPECIES["llama"]
    truth = step(species.make(), species, "right").loss
    stock, ours = species.make().bfloat16(), species.make().bfloat16()
    tfm.accelerate(ours, only="cross_entropy")
    theirs, found = (step(model, species, "right") for model in (stock, ours))
    assert abs(found.loss - truth) <= 1.5 * abs(theirs.loss - truth) + 1e-3
    apart = differences(found, theirs)
    assert max(apart.values()) <= 0.02, apart
