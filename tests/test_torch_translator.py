"""The peer is the bundled model: the comparison of benchmarks/bench_training.py is of equals."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import pytest
import torch
from torch import Tensor

from benchmarks.torch_translator import TorchTranslator, copy_back, copy_weights, corresponding
from tfm.config import TransformerConfig
from tfm.data import Batch, EncodedPairs, batches
from tfm.model import Transformer
from tfm.tokenizer import EOS
from tfm.train import batch_loss

CONFIG = TransformerConfig(
    vocab_size=600, dim=32, heads=4, ffn_dim=48, encoder_layers=2, decoder_layers=3, dropout=0.0, max_length=64
)


def batch_of(source_lengths: list[int], target_lengths: list[int]) -> Batch:
    def side(lengths: list[int]) -> tuple[Tensor, Tensor]:
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        tokens = torch.randint(3, CONFIG.vocab_size, (int(offsets[-1]),), dtype=torch.int32)
        tokens[offsets[1:] - 1] = EOS
        return tokens, offsets

    pairs = EncodedPairs(*side(source_lengths), *side(target_lengths))
    return batches(pairs, 10_000, shuffle=False)[0]


def models(config: TransformerConfig) -> tuple[Transformer, TorchTranslator]:
    """In train mode and float64, with random biases and norms, so that no pair of parameters can be swapped unseen."""
    ours, theirs = Transformer(config).double(), TorchTranslator(config, torch.float64)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, mean=0.1, std=0.2)
    copy_weights(ours, theirs)
    return ours, theirs


BATCHES = {
    "ragged": ([7, 1, 12, 3, 9], [2, 11, 5, 1, 9]),
    "no-source-padding": ([6, 6, 6], [1, 8, 4]),
    "no-padding": ([5, 5], [7, 7]),
    "chunked-loss": ([20] * 10, list(range(20, 40, 2))),
}


@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
def test_same_loss_and_gradients(lengths: tuple[list[int], list[int]]) -> None:
    ours, theirs = models(CONFIG)
    batch = batch_of(*lengths)
    loss, their_loss = batch_loss(ours, batch, 0.1), batch_loss(cast(Transformer, theirs), batch, 0.1)
    assert their_loss.item() == pytest.approx(loss.item(), rel=1e-12)
    loss.backward()
    their_loss.backward()
    for rows in corresponding(ours, theirs):
        assert rows.ours.grad is not None
        assert rows.theirs.grad is not None
        expected, came = rows.ours.grad[rows.our_rows], rows.theirs.grad[rows.their_rows]
        torch.testing.assert_close(came, expected, rtol=1e-9, atol=1e-11)


def test_correspondence_covers_every_parameter_once() -> None:
    ours, theirs = models(CONFIG)
    covered = {id(parameter): 0 for model in (ours, theirs) for parameter in model.parameters()}
    for rows in corresponding(ours, theirs):
        covered[id(rows.ours)] += rows.ours[rows.our_rows].numel()
        covered[id(rows.theirs)] += rows.theirs[rows.their_rows].numel()
    for model in (ours, theirs):
        for name, parameter in model.named_parameters():
            assert covered[id(parameter)] == parameter.numel(), name


def test_copy_back() -> None:
    ours, theirs = models(CONFIG)
    again = Transformer(CONFIG).double()
    copy_back(theirs, again)
    for (name, expected), came in zip(ours.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(came, expected), name


def test_dropout_stands_where_the_recipe_has_it() -> None:
    config = replace(CONFIG, dropout=0.3)
    _, theirs = models(config)
    batch = batch_of([9, 4], [3, 8])
    rates: list[float] = []
    with pytest.MonkeyPatch.context() as patch:
        dropout = torch.nn.functional.dropout

        def spy(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
            rates.append(p)
            return dropout(input, p, training, inplace)

        patch.setattr(torch.nn.functional, "dropout", spy)
        batch_loss(cast(Transformer, theirs), batch, 0.1)
    sublayers = 2 * config.encoder_layers + 3 * config.decoder_layers
    embeddings = 2
    assert [rate for rate in rates if rate] == [0.3] * (sublayers + embeddings)
    assert all(module.dropout == 0.0 for module in theirs.modules() if isinstance(module, torch.nn.MultiheadAttention))
