"""Small models of transformers on a padded batch, stock beside accelerated."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    MarianConfig,
    MarianMTModel,
    MBartConfig,
    MBartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

import tfm
from tfm.patching import Report

VOCABULARY, WIDTH = 99, 32
# Padding behind, on both sides, none, before.
VALID = torch.tensor([[1] * 5 + [0] * 4, [0] * 2 + [1] * 6 + [0], [1] * 9, [0] * 3 + [1] * 6])
TOKENS = int(VALID.sum())

BERT: dict[str, Any] = {
    "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "vocab_size": VOCABULARY,
}  # fmt: skip
BART: dict[str, Any] = {
    "d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": VOCABULARY,
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
T5: dict[str, Any] = {
    "d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY,
    "decoder_start_token_id": 0, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 5,
}  # fmt: skip
DISTIL: dict[str, Any] = {"dim": WIDTH, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": VOCABULARY}

Maker = Callable[..., nn.Module]
ENCODERS: dict[str, Maker] = {
    "bert": lambda **given: BertModel(BertConfig(**BERT, **given)),
    "albert": lambda **given: AlbertModel(AlbertConfig(embedding_size=16, **BERT, **given)),
    "distilbert": lambda **given: DistilBertModel(DistilBertConfig(**DISTIL, **given)),
}
TRANSLATORS: dict[str, Maker] = {
    "t5": lambda **given: T5ForConditionalGeneration(T5Config(**T5, **given)),
    "flan-t5": lambda **given: T5ForConditionalGeneration(T5Config(**T5, feed_forward_proj="gated-gelu", **given)),
    "umt5": lambda **given: UMT5ForConditionalGeneration(UMT5Config(**T5, **given)),
    "bart": lambda **given: BartForConditionalGeneration(BartConfig(**BART, **given)),
    "marian": lambda **given: MarianMTModel(MarianConfig(**BART, activation_function="swish", **given)),
    "mbart": lambda **given: MBartForConditionalGeneration(MBartConfig(**BART, **given)),
}
MODELS = ENCODERS | TRANSLATORS


def stock(name: str, **given: Any) -> nn.Module:
    """Makes a model in evaluation, whose every parameter shows."""
    torch.manual_seed(0)
    model = MODELS[name](**given).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def pair(name: str, **given: Any) -> tuple[Any, Any, Report]:
    """Makes a model, a copy that is accelerated, and the report."""
    model = stock(name, **given)
    ours = copy.deepcopy(model)
    return model, ours, tfm.accelerate(ours)


def inputs(name: str, valid: Tensor = VALID) -> dict[str, Tensor]:
    """Makes a padded batch; labels for those that translate."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, VOCABULARY, valid.shape, generator=generator)
    given = {"input_ids": torch.where(valid.bool(), ids, 1), "attention_mask": valid}
    if name in TRANSLATORS:
        given["labels"] = torch.randint(4, VOCABULARY, (len(valid), 7), generator=generator)
        given["labels"][0, 4:] = -100
    return given


def encoder_of(model: Any) -> Any:
    """Returns the stack that packs."""
    if hasattr(model, "get_encoder") and model.config.is_encoder_decoder:
        return model.get_encoder()
    return model.transformer if hasattr(model, "transformer") else model.encoder


def step(model: Any, name: str, valid: Tensor = VALID) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Runs forward and backward, and returns the encoder's states at valid tokens, the loss and the gradients."""
    model.zero_grad()
    given = inputs(name, valid)
    output = model(**given)
    states = output.encoder_last_hidden_state if name in TRANSLATORS else output[0]
    states = states[valid.bool()]
    loss = output.loss if name in TRANSLATORS else (states * states.detach().roll(1, 0)).mean()
    loss.backward()
    return states.detach(), loss.detach(), {n: x.grad for n, x in model.named_parameters() if x.grad is not None}


def apart(found: Any, expected: Any) -> float:
    """Returns the greatest difference of two steps, as a share of the scale of each part."""
    assert found[2].keys() == expected[2].keys()
    largest = max(x.abs().max() for x in expected[2].values())
    pairs = [(found[0], expected[0], expected[0].abs().max()), (found[1], expected[1], expected[1].abs())]
    pairs += [(found[2][n], expected[2][n], largest) for n in expected[2]]
    return max(float((x - y).abs().max() / scale) for x, y, scale in pairs)
