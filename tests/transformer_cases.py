"""Calls of a Transformer with every kind of mask, and models to make them on."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

import tfm.nn
from tfm import ops

BATCH, TARGETS, SOURCES, DIM, HEADS = 4, 5, 7, 8, 2
SOURCE_LENGTHS, TARGET_LENGTHS = [7, 2, 5, 1], [1, 5, 3, 4]
CAUSAL = torch.ones(TARGETS, TARGETS, dtype=torch.bool).triu(1)
CAUSAL_FLOAT = torch.nn.Transformer.generate_square_subsequent_mask(TARGETS, dtype=torch.float64)


def padding(lengths: list[int], longest: int, form: str = "bool") -> Tensor:
    padded = torch.arange(longest) >= torch.tensor(lengths)[:, None]
    return padded if form == "bool" else torch.zeros(padded.shape).double().masked_fill(padded, float("-inf"))


def batch(length: int, batch_first: bool = True) -> Tensor:
    shape = (BATCH, length, DIM) if batch_first else (length, BATCH, DIM)
    return torch.randn(shape, dtype=torch.float64)


def transformers(**options: object) -> tuple[torch.nn.Module, torch.nn.Module]:
    given = {"d_model": DIM, "nhead": HEADS, "num_encoder_layers": 2, "num_decoder_layers": 2}
    given |= {"dim_feedforward": 12, "dropout": 0.0} | options
    pairs = []
    for library in (torch.nn, tfm.nn):
        torch.manual_seed(11)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "enable_nested_tensor")
            pairs.append(library.Transformer(**given).double())
    theirs, ours = pairs
    for (name, expected), (our_name, found) in zip(theirs.state_dict().items(), ours.state_dict().items(), strict=True):
        assert name == our_name
        assert torch.equal(expected, found), f"{name}: other initial values"
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


class Count:
    """How often, and on how many rows, an operation is called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.rows: list[int] = []
        original = getattr(ops, name)

        def counted(query: Tensor, *given: object, **named: object) -> object:
            self.rows.append(query.shape[:-2].numel())
            return original(query, *given, **named)

        monkeypatch.setattr(ops, name, counted)


CASES = {
    "nothing": {},
    "causal": {"tgt_mask": CAUSAL_FLOAT},
    "causal hint": {"tgt_mask": CAUSAL, "tgt_is_causal": True},
    "padding": {
        "src_key_padding_mask": padding(SOURCE_LENGTHS, SOURCES),
        "tgt_key_padding_mask": padding(TARGET_LENGTHS, TARGETS),
        "memory_key_padding_mask": padding(SOURCE_LENGTHS, SOURCES),
    },
    "causal and padding": {
        "tgt_mask": CAUSAL,
        "src_key_padding_mask": padding(SOURCE_LENGTHS, SOURCES),
        "tgt_key_padding_mask": padding(TARGET_LENGTHS, TARGETS),
        "memory_key_padding_mask": padding(SOURCE_LENGTHS, SOURCES),
        "tgt_is_causal": True,
    },
    "float causal and float padding": {
        "tgt_mask": CAUSAL_FLOAT,
        "src_key_padding_mask": padding(SOURCE_LENGTHS, SOURCES, "float"),
        "tgt_key_padding_mask": padding(TARGET_LENGTHS, TARGETS, "float"),
        "memory_key_padding_mask": padding(SOURCE_LENGTHS, SOURCES, "float"),
    },
    "memory padding only": {"memory_key_padding_mask": padding(SOURCE_LENGTHS, SOURCES)},
    "target padding only": {"tgt_key_padding_mask": padding(TARGET_LENGTHS, TARGETS), "tgt_mask": CAUSAL},
    "left padding": {
        "src_key_padding_mask": padding(SOURCE_LENGTHS, SOURCES).flip(1),
        "memory_key_padding_mask": padding(SOURCE_LENGTHS, SOURCES).flip(1),
    },
    "another mask and padding": {
        "tgt_mask": CAUSAL.roll(1, 0) & CAUSAL,
        "memory_mask": torch.arange(SOURCES).expand(TARGETS, -1) % 3 == 2,
        "tgt_key_padding_mask": padding(TARGET_LENGTHS, TARGETS),
        "memory_key_padding_mask": padding([7, 2, 5, 1], SOURCES),
        "src_key_padding_mask": padding([7, 2, 5, 1], SOURCES),
    },
    "masks a head": {
        "src_mask": torch.linspace(-2, 2, BATCH * HEADS * SOURCES * SOURCES).view(-1, SOURCES, SOURCES).double(),
        "tgt_mask": CAUSAL_FLOAT.expand(BATCH * HEADS, -1, -1),
        "memory_mask": torch.linspace(2, -2, BATCH * HEADS * TARGETS * SOURCES).view(-1, TARGETS, SOURCES).double(),
    },
    "float padding that also weighs": {
        "src_key_padding_mask": padding(SOURCE_LENGTHS, SOURCES, "float") + torch.arange(SOURCES) / 5,
        "memory_key_padding_mask": padding(SOURCE_LENGTHS, SOURCES, "float"),
    },
    "a wrong hint for masks a head": {
        "tgt_mask": torch.zeros_like(CAUSAL).expand(BATCH * HEADS, -1, -1),
        "tgt_is_causal": True,
        "tgt_key_padding_mask": padding(TARGET_LENGTHS, TARGETS),
    },
    "a wrong hint beside padding": {
        "tgt_mask": torch.zeros_like(CAUSAL),
        "tgt_is_causal": True,
        "tgt_key_padding_mask": padding(TARGET_LENGTHS, TARGETS),
    },
}
# The same object, so that the memory goes on packed.
CASES["causal and padding"]["memory_key_padding_mask"] = CASES["causal and padding"]["src_key_padding_mask"]
PACKED = ("padding", "causal and padding", "float causal and float padding")
