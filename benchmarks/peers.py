"""Lists what each operation is measured against: the functions people would use instead, and each way to run them.

Every peer computes what ours does (tests/test_peers.py) and is run as a careful user would: masks, block masks and
position tables are built once a batch, outside the clock; attention takes heads as views of a projection, as layers
have them. SDPA is one kernel, so torch.compile, which calls the same, is no peer of attention. Liger-Kernel's functions
know no dropout and no residual connection, except where they do: torch does the rest.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.device import DEVICE
from benchmarks.shapes import FEED_FORWARDS, FLEX_AT, LONG, Channels
from benchmarks.suite import FORWARD, OURS, Peer
from tfm.native import why_unavailable
from tfm.ops.backends import use

# Inductor's own CUDA graphs would hide what "graph" cases show.
MAX_AUTOTUNE = "max-autotune-no-cudagraphs"
EPS = 1e-6


def ours_natively(ours: Peer, where: Callable[[Any, str], bool] = lambda size, direction: True) -> dict[str, Peer]:
    """Runs ours by csrc's kernels beside Triton's, where csrc has them; on a CPU `ours` is csrc's already."""
    how: dict[str, Any] = {"context": partial(use, "native"), "missing": lambda: why_unavailable(DEVICE)}
    return {f"{OURS}, native": replace(ours, gpu=True, where=where, **how)}


def by_torch(function: Callable[..., Any], autotuned: Sequence[Any] = ()) -> dict[str, Peer]:
    """Runs plain torch, eager and compiled; autotuned at few sizes, forward alone: that takes half a minute each."""

    def where(size: Any, direction: str) -> bool:
        return direction == FORWARD and size in autotuned

    return {
        "eager": Peer(function),
        "compile": Peer(function, compiled="default"),
        "max-autotune": Peer(function, compiled=MAX_AUTOTUNE, gpu=True, where=where),
    }


def liger(function: Callable[..., Any]) -> dict[str, Peer]:
    """Runs a function that calls Liger-Kernel."""
    missing = "" if importlib.util.find_spec("liger_kernel") else "liger_kernel is not installed"
    return {"liger": Peer(function, gpu=True, missing=lambda: missing)}


def recurrent(ours: Callable[..., Any], transformers: Callable[..., Any]) -> dict[str, Peer]:
    """Runs ours, and transformers' own code, which goes through the steps in Python; nobody trains a step."""

    def where(size: Channels, direction: str) -> bool:
        return size.steps > 1 or direction == FORWARD

    missing = "" if importlib.util.find_spec("transformers") else "transformers is not installed"
    return {
        OURS: Peer(ours, where=where),
        "eager": Peer(transformers, where=where, missing=lambda: missing),
    }


@cache
def _liger() -> Any:
    return importlib.import_module("liger_kernel.transformers.functional")


def layer_norm(x, residual, weight, bias, dropout_p):
    h = residual + F.dropout(x, dropout_p)
    return F.layer_norm(h, h.shape[-1:], weight, bias, EPS), h


def liger_layer_norm(x, residual, weight, bias, dropout_p):
    h = residual + F.dropout(x, dropout_p)
    return _liger().liger_layer_norm(h, weight, bias, EPS), h


LAYER_NORM = by_torch(layer_norm) | liger(liger_layer_norm)


def rms_norm(x, residual, weight, dropout_p):
    h = residual + F.dropout(x, dropout_p)
    return F.rms_norm(h, h.shape[-1:], weight, EPS), h


def liger_rms_norm(x, residual, weight, dropout_p):
    # In place, it would write the gradient over the caller's.
    return _liger().liger_fused_add_rms_norm(F.dropout(x, dropout_p), residual, weight, EPS, in_place=False)


RMS_NORM = by_torch(rms_norm) | liger(liger_rms_norm)


def feed_forward(x, w1, b1, w2, b2, dropout_p):
    return F.linear(F.dropout(F.relu(F.linear(x, w1, b1)), dropout_p), w2, b2)


FEED_FORWARD = by_torch(feed_forward, autotuned=FEED_FORWARDS[:1])


def gated_feed_forward(x, gate, up, down, dropout_p):
    return F.linear(F.dropout(F.silu(F.linear(x, gate)) * F.linear(x, up), dropout_p), down)


def liger_gated_feed_forward(x, gate, up, down, dropout_p):
    return F.linear(F.dropout(_liger().liger_swiglu(F.linear(x, gate), F.linear(x, up)), dropout_p), down)


GATED_FEED_FORWARD = by_torch(gated_feed_forward) | liger(liger_gated_feed_forward)


def linear_cross_entropy(x, weight, target, label_smoothing):
    return F.cross_entropy(F.linear(x, weight), target, label_smoothing=label_smoothing)


def cross_entropy(logits, target, label_smoothing):
    return F.cross_entropy(logits, target, label_smoothing=label_smoothing)


CROSS_ENTROPY = by_torch(cross_entropy)


def torchs_linear_cross_entropy(x, weight, target, label_smoothing):
    # Its chunks support no smoothing, and with it only report that they are not used.
    options = None if label_smoothing else torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(x, weight, target, label_smoothing=label_smoothing, options=options)


def liger_linear_cross_entropy(x, weight, target, label_smoothing):
    return _liger().liger_fused_linear_cross_entropy(x, weight, target, label_smoothing=label_smoothing)


def _torchs_missing() -> str:
    return "" if hasattr(F, "linear_cross_entropy") else f"torch {torch.__version__} has no F.linear_cross_entropy"


LINEAR_CROSS_ENTROPY = by_torch(linear_cross_entropy) | {
    "torch's fused": Peer(torchs_linear_cross_entropy, missing=_torchs_missing),
    **liger(liger_linear_cross_entropy),
}


def embedding(tokens, weight, positions, table, dropout_p):
    return F.dropout(F.embedding(tokens, weight) * weight.shape[1] ** 0.5 + table[positions], dropout_p)


EMBEDDING = by_torch(embedding)


def rotary(query, key, cos, sin):
    cos, sin = cos[:, None], sin[:, None]
    return tuple(x * cos + _half_turned(x) * sin for x in (query, key))


def _half_turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def liger_rotary(query, key, cos, sin):
    return _liger().liger_rope(query, key, cos, sin)


ROTARY = by_torch(rotary) | liger(liger_rotary)


def sdpa(query, key, value, mask, is_causal):
    return F.scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal)


# What torch chooses by itself; of long sequences one of the others, and not measured twice.
SDPA = {"eager": Peer(sdpa, where=lambda size, _: size not in LONG)} | {
    f"sdpa {name}": Peer(sdpa, context=partial(sdpa_kernel, backend), gpu=True)
    for name, backend in (
        ("flash", SDPBackend.FLASH_ATTENTION),
        ("efficient", SDPBackend.EFFICIENT_ATTENTION),
        ("cudnn", SDPBackend.CUDNN_ATTENTION),
    )
}
# It holds whole matrices of scores in memory: of interest where a mask that learns rules the others out.
SDPA["sdpa math"] = Peer(
    sdpa, context=partial(sdpa_kernel, SDPBackend.MATH), gpu=True, where=lambda size, _: size.mask == "bias"
)


def decode_attention(query, key_cache, value_cache, key, value, length, parent):
    """Decodes as Hugging Face's models do: caches [R, Hkv, capacity, D], whose rows each step of a beam reorders."""
    if parent is not None:
        key_cache, value_cache = key_cache.index_select(0, parent), value_cache.index_select(0, parent)
    key_cache[:, :, length - 1], value_cache[:, :, length - 1] = key, value
    keys, values = key_cache[:, :, :length], value_cache[:, :, :length]
    grouped = keys.shape[1] != query.shape[1]
    return F.scaled_dot_product_attention(query[:, :, None], keys, values, enable_gqa=grouped)[:, :, 0]


# Nobody differentiates a step of decoding.
DECODE_ATTENTION = {
    name: Peer(decode_attention, compiled=mode, where=lambda _, direction: direction == FORWARD)
    for name, mode in (("eager", None), ("compile", "default"))
}


def flex(query, key, value, bias, block_mask):
    """Calls FlexAttention with an additive bias [1, H, Sq, Sk] that learns, or None, and its sparse mask, or None."""
    from torch.nn.attention.flex_attention import flex_attention

    if bias is None:
        return flex_attention(query, key, value, block_mask=block_mask)

    def add(score, batch, head, row, column):
        return score + bias[0, head, row, column]

    return flex_attention(query, key, value, score_mod=add, block_mask=block_mask)


def block_mask(lengths: Tensor | None, is_causal: bool, queries: int, keys: int) -> Any:
    """Makes FlexAttention's mask: keys before `lengths` [B], no later than the query; None where none is masked."""
    from torch.nn.attention.flex_attention import create_block_mask

    if lengths is not None:
        return create_block_mask(lambda b, h, i, j: j < lengths[b], len(lengths), None, queries, keys, DEVICE)
    if is_causal:
        return create_block_mask(lambda b, h, i, j: j <= i, None, None, queries, keys, DEVICE)
    return None


def flex_peer(inputs: Callable[[Any], tuple[Any, ...]]) -> dict[str, Peer]:
    """Runs `flex` on these inputs, at the few sizes that it is compiled for."""
    return {"flex": Peer(flex, compiled="default", inputs=inputs, gpu=True, where=lambda size, _: size in FLEX_AT)}


def torch_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal):
    """Calls torch's own packed flash attention."""
    return _varlen(is_causal)(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)


@cache
def _varlen(is_causal: bool) -> Callable[..., Any]:
    from torch.nn.attention.varlen import varlen_attn

    if not is_causal:
        return varlen_attn
    # A flag until torch 2.10, then a window.
    if "is_causal" in inspect.signature(varlen_attn).parameters:
        causal: dict[str, Any] = {"is_causal": True}
        return partial(varlen_attn, **causal)
    return partial(varlen_attn, window_size=(-1, 0))
