"""Every operation and every module on a batch of any size: what torch.compile is asked with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import tfm.nn
from tfm import ops

HEADS, HEAD_DIM, INNER, CLASSES = 2, 8, 24, 13
DIM = HEADS * HEAD_DIM


@dataclass(frozen=True)
class Size:
    """Sentences of a batch, the longest target and the longest source."""

    batch: int
    targets: int
    sources: int

    @property
    def tokens(self) -> tuple[int, int]:
        """Of the packed batch, whose sequences are one token shorter from one to the next."""
        return sum(self.lengths(self.targets)), sum(self.lengths(self.sources))

    def lengths(self, longest: int) -> list[int]:
        return [max(1, longest - place) for place in range(self.batch)]


# No two numbers of one size are the same, as torch takes those for one number; the first is compiled as it is.
SIZES = tuple(Size(*sizes) for sizes in ((3, 7, 5), (2, 9, 11), (4, 6, 13), (5, 17, 8), (7, 10, 19), (6, 33, 12)))

Inputs = Callable[[Size], tuple[Any, ...]]


@dataclass(frozen=True)
class Case:
    """`inputs` makes the arguments of `call`; those of floating point get gradients, but for the places in `frozen`."""

    call: Callable[..., Any]
    inputs: Inputs
    frozen: tuple[int, ...] = ()


def _weights(*shape: int) -> Tensor:
    return torch.randn(*shape) * 0.3


def _heads(size: Size) -> tuple[Tensor, Tensor, Tensor]:
    """As a layer makes them: views of [B, S, H, D]."""
    shapes = (size.targets, size.sources, size.sources)
    query, key, value = (torch.randn(size.batch, length, HEADS, HEAD_DIM).transpose(1, 2) for length in shapes)
    return query, key, value


def _bool_mask(size: Size) -> Tensor:
    return torch.rand(size.batch, 1, size.targets, size.sources) < 0.7


def _lengths(size: Size) -> Tensor:
    return torch.tensor(size.lengths(size.sources), dtype=torch.int32)


def _offsets(size: Size, longest: int) -> Tensor:
    return torch.tensor([0, *size.lengths(longest)]).cumsum(0).to(torch.int32)


def _packed(size: Size) -> tuple[Any, ...]:
    targets, sources = size.tokens
    query, key, value = (torch.randn(rows, HEADS, HEAD_DIM) for rows in (targets, sources, sources))
    offsets = _offsets(size, size.targets), _offsets(size, size.sources)
    return query, key, value, *offsets, size.targets, size.sources


def _rows(size: Size) -> Tensor:
    return torch.randn(size.batch, size.targets, DIM)


def _tokens(size: Size) -> Tensor:
    return torch.randint(CLASSES, (size.batch, size.targets))


def _cache(size: Size) -> tuple[Any, ...]:
    key_cache, value_cache = (torch.randn(size.batch, size.sources, HEADS, HEAD_DIM) for _ in range(2))
    parents = torch.randint(size.batch, (size.batch, size.sources), dtype=torch.int32)
    return torch.randn(size.batch, HEADS, HEAD_DIM), key_cache, value_cache, _lengths(size), parents


def _norm_weights() -> tuple[Tensor, Tensor]:
    return _weights(DIM), _weights(DIM)


def _feed_forward_weights() -> tuple[Tensor, ...]:
    return _weights(INNER, DIM), _weights(INNER), _weights(DIM, INNER), _weights(DIM)


def _residual_pair(size: Size) -> tuple[Tensor, Tensor]:
    return _rows(size), _rows(size)


def _rotary_tables(size: Size) -> tuple[Tensor, Tensor]:
    return ops.rotary_table(size.targets, HEAD_DIM)


def attention_with(**options: Any) -> Callable[..., Any]:
    return lambda query, key, value, *more: ops.attention(query, key, value, *more, **options)


OPERATIONS: dict[str, Case] = {
    "attention": Case(attention_with(), _heads),
    "attention, causal": Case(attention_with(is_causal=True), _heads),
    "attention, window": Case(attention_with(window_size=(3, 2), softcap=5.0, return_lse=True), _heads),
    "attention, dropout": Case(attention_with(dropout_p=0.3, seed=7), _heads),
    "attention, mask": Case(attention_with(), lambda size: (*_heads(size), _bool_mask(size))),
    "attention, one row": Case(attention_with(), lambda size: (*_heads(size), _bool_mask(size)[:, :, :1])),
    "attention, bias": Case(
        attention_with(), lambda size: (*_heads(size), torch.randn(HEADS, size.targets, size.sources))
    ),
    "attention, lengths": Case(
        lambda query, key, value, lengths: ops.attention(query, key, value, key_lengths=lengths),
        lambda size: (*_heads(size), _lengths(size)),
    ),
    "attention, bias and key mask": Case(
        lambda query, key, value, bias, lengths: ops.attention(
            query, key, value, bias, key_mask=torch.arange(key.shape[2]) >= key.shape[2] - lengths[:, None]
        ),
        lambda size: (*_heads(size), torch.randn(HEADS, size.targets, size.sources), _lengths(size)),
    ),
    "attention, weights": Case(attention_with(return_weights=True), _heads),
    "attention, starts": Case(
        lambda query, key, value, starts: ops.attention(query, key, value, is_causal=True, query_start=starts),
        lambda size: (*_heads(size), _lengths(size)),
    ),
    "attention, bottom right": Case(
        lambda q, k, v: ops.attention(q, k, v, is_causal=True, query_start=k.shape[2] - q.shape[2]), _heads
    ),
    "varlen_attention": Case(ops.varlen_attention, _packed),
    "varlen_attention, causal": Case(
        lambda *packed: ops.varlen_attention(*packed, is_causal=True, return_lse=True), _packed
    ),
    "decode_attention": Case(ops.decode_attention, _cache, frozen=(0, 1, 2)),
    "split_heads": Case(
        lambda x: ops.split_heads(x, 3, HEADS), lambda size: (torch.randn(size.batch, size.targets, 3 * DIM),)
    ),
    "dropout": Case(lambda x: ops.dropout(x, 0.3, seed=7), lambda size: (_rows(size),)),
    "embedding": Case(
        lambda tokens, weight, positions: ops.embedding(tokens, weight, positions, scale=2.0, padding_idx=0),
        lambda size: (_tokens(size), _weights(CLASSES, DIM), torch.arange(size.targets)),
    ),
    "embedding, learned positions": Case(
        lambda tokens, weight, positions, table: ops.embedding(
            tokens, weight, positions, position_weight=table, dropout_p=0.3, seed=7
        ),
        lambda size: (_tokens(size), _weights(CLASSES, DIM), torch.arange(size.targets), _weights(40, DIM)),
    ),
    "feed_forward": Case(ops.feed_forward, lambda size: (_rows(size), *_feed_forward_weights())),
    "feed_forward, gelu and dropout": Case(
        lambda *given: ops.feed_forward(*given, "gelu", 0.3, seed=7),
        lambda size: (_rows(size), *_feed_forward_weights()),
    ),
    "gated_feed_forward": Case(
        ops.gated_feed_forward,
        lambda size: (_rows(size), _weights(INNER, DIM), _weights(INNER, DIM), _weights(DIM, INNER)),
    ),
    "gated_feed_forward, joined": Case(
        lambda x, both, down: ops.gated_feed_forward(x, both, None, down),
        lambda size: (_rows(size), _weights(2 * INNER, DIM), _weights(DIM, INNER)),
    ),
    "linear_activation": Case(ops.linear_activation, lambda size: (_rows(size), _weights(INNER, DIM), _weights(INNER))),
    "layer_norm": Case(ops.layer_norm, lambda size: (_rows(size), *_norm_weights())),
    "rms_norm": Case(ops.rms_norm, lambda size: (_rows(size), _weights(DIM))),
    "residual_layer_norm": Case(ops.residual_layer_norm, lambda size: (*_residual_pair(size), *_norm_weights())),
    "residual_layer_norm, dropout": Case(
        lambda *given: ops.residual_layer_norm(*given, dropout_p=0.3, seed=7),
        lambda size: (*_residual_pair(size), *_norm_weights()),
    ),
    "residual_rms_norm": Case(ops.residual_rms_norm, lambda size: (*_residual_pair(size), _weights(DIM))),
    **{
        f"cross_entropy, {reduction}": Case(
            lambda *given, reduction=reduction: ops.cross_entropy(*given, reduction=reduction, label_smoothing=0.1),
            lambda size: (torch.randn(size.batch, size.targets, CLASSES), _tokens(size)),
        )
        for reduction in ("mean", "none")
    },
    **{
        f"linear_cross_entropy, {reduction}": Case(
            lambda *given, reduction=reduction: ops.linear_cross_entropy(
                *given, reduction=reduction, label_smoothing=0.1
            ),
            lambda size: (_rows(size), _weights(CLASSES, DIM), _tokens(size)),
        )
        for reduction in ("mean", "sum", "none")
    },
    "linear_cross_entropy, probabilities": Case(
        ops.linear_cross_entropy,
        lambda size: (
            _rows(size),
            _weights(CLASSES, DIM),
            torch.rand(size.batch, size.targets, CLASSES).softmax(-1),
        ),
        frozen=(2,),
    ),
    "rg_lru": Case(
        lambda x, gate, param, reset, state: ops.rg_lru(
            x, gate, x.sin(), param, reset=reset, initial_state=state, return_final_state=True
        ),
        lambda size: (
            _rows(size),
            _rows(size),
            _weights(DIM),
            torch.rand(size.batch, size.targets) < 0.2,
            _weights(size.batch, DIM),
        ),
    ),
    "rotary": Case(
        ops.rotary,
        lambda size: (_heads(size)[0], _heads(size)[0], *_rotary_tables(size)),
        frozen=(2, 3),
    ),
    "rotary, positions": Case(
        lambda query, cos, sin, positions: ops.rotary(query, None, cos, sin, positions, interleaved=True)[0],
        lambda size: (_heads(size)[0], *_rotary_tables(size), torch.arange(size.targets)),
        frozen=(1, 2),
    ),
    "rotary_": Case(
        lambda x, cos, sin: ops.rotary_(x * 1.0, 1, cos, sin),
        lambda size: (_heads(size)[0], *_rotary_tables(size)),
        frozen=(1, 2),
    ),
    "selective_scan": Case(
        lambda x, delta, A, B, skip, z, state: ops.selective_scan(
            x, delta, A, B, B.sin(), D=skip, z=z, delta_bias=skip, initial_state=state, return_final_state=True
        ),
        lambda size: (
            _rows(size),
            _rows(size),
            _weights(DIM, 3),
            torch.randn(size.batch, size.targets, 3),
            _weights(DIM),
            _rows(size),
            _weights(size.batch, DIM, 3),
        ),
    ),
    "wkv": Case(
        lambda decay, first, key, value: ops.wkv(decay, first, key, value, return_final_state=True),
        lambda size: (_weights(DIM), _weights(DIM), _rows(size), _rows(size)),
    ),
    "sinusoid": Case(lambda positions: ops.sinusoid(positions, DIM), lambda size: (torch.arange(size.targets),)),
}


def _source(size: Size) -> Tensor:
    return torch.randn(size.batch, size.sources, DIM)


def _padding(size: Size, longest: int) -> Tensor:
    return torch.arange(longest) >= torch.tensor(size.lengths(longest))[:, None]


def _causal(length: int) -> Tensor:
    return torch.full((length, length), float("-inf")).triu(1)


LAYER = (DIM, HEADS, INNER, 0.0)


def _pair(size: Size) -> tuple[Tensor, Tensor]:
    return _rows(size), _source(size)


def _attention_of_itself() -> Case:
    module = tfm.nn.MultiheadAttention(DIM, HEADS, batch_first=True)
    return Case(lambda x: module(x, x, x), lambda size: (_rows(size),))


def _attention_of_another() -> Case:
    module = tfm.nn.MultiheadAttention(DIM, HEADS, batch_first=True)
    return Case(
        lambda x, memory, padding, mask: module(
            x, memory, memory, key_padding_mask=padding, need_weights=False, attn_mask=mask
        ),
        lambda size: (*_pair(size), _padding(size, size.sources), _bool_mask(size)[0, 0]),
    )


def _attention_with_extra_keys() -> Case:
    module = tfm.nn.MultiheadAttention(DIM, HEADS, add_bias_kv=True, add_zero_attn=True)
    return Case(lambda x: module(x, x, x, need_weights=False), lambda size: (_rows(size),))


def _encoder_layer() -> Case:
    module = tfm.nn.TransformerEncoderLayer(*LAYER, batch_first=True)
    return Case(
        lambda x, padding: module(x, src_key_padding_mask=padding),
        lambda size: (_source(size), _padding(size, size.sources)),
    )


def _encoder() -> Case:
    layer = tfm.nn.TransformerEncoderLayer(*LAYER, norm_first=True)
    module = tfm.nn.TransformerEncoder(layer, 1, tfm.nn.RMSNorm(DIM), enable_nested_tensor=False)
    return Case(
        lambda x, lengths: module(x, lengths=lengths), lambda size: (_source(size).transpose(0, 1), _lengths(size))
    )


def _decoder() -> Case:
    layer = tfm.nn.TransformerDecoderLayer(*LAYER, batch_first=True)
    module = tfm.nn.TransformerDecoder(layer, 1, tfm.nn.LayerNorm(DIM))
    return Case(module, lambda size: (*_pair(size), _causal(size.targets)))


def _transformer() -> Case:
    module = tfm.nn.Transformer(DIM, HEADS, 1, 1, INNER, 0.0, batch_first=True)
    return Case(
        lambda target, source, mask, source_padding, target_padding: module(
            source, target, tgt_mask=mask, src_key_padding_mask=source_padding, tgt_key_padding_mask=target_padding,
            memory_key_padding_mask=source_padding, tgt_is_causal=True,
        ),
        lambda size: (
            *_pair(size), _causal(size.targets), _padding(size, size.sources), _padding(size, size.targets)
        ),
        frozen=(2,),
    )  # fmt: skip


MODULES: dict[str, Callable[[], Case]] = {
    "LayerNorm": lambda: Case(tfm.nn.LayerNorm(DIM), lambda size: (_rows(size),)),
    "RMSNorm": lambda: Case(tfm.nn.RMSNorm(DIM), lambda size: (_rows(size),)),
    "MultiheadAttention": _attention_of_itself,
    "MultiheadAttention, cross": _attention_of_another,
    "MultiheadAttention, extra keys": _attention_with_extra_keys,
    "TransformerEncoderLayer": _encoder_layer,
    "TransformerDecoderLayer": lambda: Case(tfm.nn.TransformerDecoderLayer(*LAYER, batch_first=True), _pair),
    "TransformerEncoder": _encoder,
    "TransformerDecoder": _decoder,
    "Transformer": _transformer,
}


def module_case(name: str) -> Case:
    """Made anew for each test, of the same weights."""
    torch.manual_seed(1)
    return MODULES[name]()
