"""The attention weights of every head of a trained model, for one sentence and its translation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tfm.errors import UserError
from tfm.model import CrossAttention, SelfAttention, Transformer
from tfm.sequences import Layout, Ragged
from tfm.tokenizer import BOS, EOS, SPECIAL_TOKENS, Tokenizer


@dataclass(frozen=True, eq=False)
class AttentionMaps:
    """Softmax weights, fp32 on the CPU; row i says how much token i attends to each token, and sums to 1.

    Attributes:
        sentence, translation: what was given.
        source: the S tokens that the encoder reads, its end included.
        target: the T tokens that the decoder reads; its first is BOS.
        encoder: [layers, heads, S, S].
        decoder: [layers, heads, T, T], zero after the diagonal.
        cross: [layers, heads, T, S].
    """

    sentence: str
    translation: str
    source: list[str]
    target: list[str]
    encoder: Tensor
    decoder: Tensor
    cross: Tensor


def attend(model: Transformer, tokenizer: Tokenizer, sentence: str, translation: str) -> AttentionMaps:
    """Returns the attention weights of one forward pass over `sentence` and, as the decoder's input, `translation`.

    Args:
        model: in eval mode.
        tokenizer: of the model.

    Raises:
        UserError: the sentence is blank, or one of the two is longer than the model takes.
    """
    if not sentence.strip():
        raise UserError("the sentence is blank")
    source, target = tokenizer.encode([sentence, translation])
    for name, tokens in (("sentence", source), ("translation", target)):
        if len(tokens) >= model.config.max_length:
            limit = model.config.max_length - 1
            raise UserError(f"the {name} has {len(tokens)} tokens, the model takes at most {limit}")
    source, target = [*source, EOS], [BOS, *target]
    encoder, decoder, cross = attention_weights(model, source, target)
    labels = _labels(tokenizer, source), _labels(tokenizer, target)
    return AttentionMaps(sentence, translation, *labels, encoder, decoder, cross)


@torch.inference_mode()
def attention_weights(model: Transformer, source: list[int], target: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the softmax weights of a real forward pass ("Attention Is All You Need", equation 1).

    Args:
        model: in eval mode.
        source: S token ids, the end included.
        target: T token ids, BOS included.

    Returns:
        Those of the encoder [layers, heads, S, S], the decoder [layers, heads, T, T] and between them
        [layers, heads, T, S].
    """
    encoder: list[Tensor] = []
    decoder: list[Tensor] = []
    cross: list[Tensor] = []

    def of_self(module: SelfAttention, inputs: tuple[Tensor, Layout, bool, Tensor | None]) -> None:
        x, _, is_causal, _ = inputs
        query, key, _ = module.project(x)
        (decoder if is_causal else encoder).append(_weights(query, key, is_causal))

    def of_cross(module: CrossAttention, inputs: tuple[Tensor, Layout, Tensor, Layout, Tensor | None]) -> None:
        x, _, key_value, _, _ = inputs
        cross.append(_weights(module.project(x), key_value[:, 0], False))

    hooks = []
    for module in model.modules():
        if isinstance(module, SelfAttention):
            hooks.append(module.register_forward_pre_hook(of_self))
        elif isinstance(module, CrossAttention):
            hooks.append(module.register_forward_pre_hook(of_cross))
    try:
        model(*(Ragged.of([tokens]).to(model.embedding.device) for tokens in (source, target)))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(encoder), torch.stack(decoder), torch.stack(cross)


def _weights(query: Tensor, key: Tensor, is_causal: bool) -> Tensor:
    """Turns [N, heads, D] and [M, heads, D] into softmax weights [heads, N, M], fp32 on the CPU."""
    scores = torch.einsum("nhd,mhd->hnm", query.float(), key.float()) / math.sqrt(query.shape[-1])
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
    return scores.softmax(dim=-1).cpu()


def _labels(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    texts = tokenizer.decode([[token] for token in tokens])
    special = range(len(SPECIAL_TOKENS))
    return [SPECIAL_TOKENS[token] if token in special else text for token, text in zip(tokens, texts, strict=True)]
