"""Embeddings of accelerated models: all that is given to them, rows without gradient, what keeps them as they are."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import BertConfig, BigBirdConfig, RobertaConfig
from transformers.models.bert.modeling_bert import BertEmbeddings
from transformers.models.big_bird.modeling_big_bird import BigBirdEmbeddings
from transformers.models.distilbert.modeling_distilbert import DistilBertConfig, Embeddings
from transformers.models.roberta.modeling_roberta import RobertaEmbeddings

import tfm
from tfm import native

pytestmark = pytest.mark.skipif(
    bool(native.why_unavailable(torch.device("cpu"))), reason="without native kernels a CPU runs everything as before"
)
SIZES = {"vocab_size": 40, "hidden_size": 12, "num_attention_heads": 2, "max_position_embeddings": 20}
MODULES = {
    "bert": lambda: BertEmbeddings(BertConfig(**SIZES)),
    "roberta": lambda: RobertaEmbeddings(RobertaConfig(**SIZES)),
    "big_bird": lambda: BigBirdEmbeddings(BigBirdConfig(**SIZES, rescale_embeddings=True)),
    "distilbert": lambda: Embeddings(DistilBertConfig(vocab_size=40, dim=12, n_heads=2, max_position_embeddings=20)),
}
every = pytest.mark.parametrize("name", MODULES)
TOKENS = torch.randint(5, 40, (3, 7), generator=torch.Generator().manual_seed(0))
POSITIONS, TYPES = torch.arange(7).flip(0)[None] + 2, TOKENS % 2


def pair(name: str) -> tuple[nn.Module, nn.Module, tfm.patching.Report]:
    torch.manual_seed(0)
    stock = MODULES[name]().eval()
    for parameter in stock.parameters():
        parameter.data = torch.randn(parameter.shape)
    ours = copy.deepcopy(stock)
    return stock, ours, tfm.accelerate(ours)


def both(stock: nn.Module, ours: nn.Module, **given: torch.Tensor | None) -> None:
    results = []
    for module in (stock, ours):
        module.zero_grad()
        y = module(**given)
        y.sin().sum().backward()
        results.append((y.detach(), *(x.grad for x in module.parameters() if x.grad is not None)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


@every
def test_all_that_may_be_given(name):
    stock, ours, report = pair(name)
    both(stock, ours, input_ids=TOKENS)
    both(stock, ours, input_ids=TOKENS, position_ids=POSITIONS)
    if name != "distilbert":
        both(stock, ours, input_ids=TOKENS, token_type_ids=TYPES)
    both(stock, ours, input_ids=None, inputs_embeds=torch.randn(3, 7, 12))
    assert not report.stats().plain["embedding"]


@every
def test_padding_has_no_gradient(name):
    stock, ours, _ = pair(name)
    padding = stock.word_embeddings.padding_idx
    tokens = TOKENS.clone()
    tokens[1:, 4:] = padding
    both(stock, ours, input_ids=tokens)
    assert (ours.word_embeddings.weight.grad[padding] == 0).all()


@every
def test_dropout_is_drawn_where_it_was(name):
    stock, ours, _ = pair(name)
    for module in (stock, ours):
        module.train()
        module.dropout.p = 0.5
    torch.manual_seed(4)
    expected = stock(input_ids=TOKENS)
    torch.manual_seed(4)
    torch.testing.assert_close(ours(input_ids=TOKENS), expected, rtol=1e-4, atol=1e-5)


@every
def test_tables_with_hooks_or_options_are_called(name):
    seen = []
    for change in (
        lambda module: module.word_embeddings.register_forward_hook(lambda *given: seen.append(given[0])),
        lambda module: setattr(module.word_embeddings, "max_norm", 0.5),
        lambda module: module.LayerNorm.register_forward_hook(lambda *given: seen.append(given[0])),
    ):
        stock, ours, report = pair(name)
        change(stock)
        change(ours)
        torch.testing.assert_close(ours(input_ids=TOKENS), stock(input_ids=TOKENS))
        assert report.stats().fused["embedding"] == 0
        assert report.stats().plain["embedding"].total() == 1
    assert len(seen) == 4


def test_compiled_they_are_stocks():
    stock, ours, _ = pair("bert")
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(input_ids=TOKENS), stock(input_ids=TOKENS))


def test_a_class_with_a_rule_of_its_own_is_left(monkeypatch):
    """What a trial finds to be another sum stays, and is no fault."""

    class Others(BertEmbeddings):
        __module__ = BertEmbeddings.__module__

        def forward(self, input_ids, position_ids=None):
            return self.LayerNorm(self.word_embeddings(input_ids) - self.position_embeddings(input_ids % 3))

    torch.manual_seed(0)
    module = Others(BertConfig(**SIZES)).eval()
    expected = module(TOKENS)
    report = tfm.accelerate(module)
    assert "embedding" not in report.counts
    torch.testing.assert_close(module(TOKENS), expected)
