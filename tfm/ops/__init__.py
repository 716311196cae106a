"""Every operation of tfm as a function: documented, checked, and dispatched to a backend (tfm.ops.backends)."""

from tfm.operators.attention import split_heads
from tfm.ops.attention import attention
from tfm.ops.causal_conv1d import causal_conv1d
from tfm.ops.cross_entropy import cross_entropy, linear_cross_entropy
from tfm.ops.decode_attention import decode_attention
from tfm.ops.dropout import draw_seed, dropout
from tfm.ops.embedding import embedding, sinusoid
from tfm.ops.experts import experts
from tfm.ops.feed_forward import feed_forward, gated_feed_forward, linear_activation
from tfm.ops.norm import layer_norm, residual_layer_norm, residual_rms_norm, rms_norm
from tfm.ops.relative_bias import alibi_bias, alibi_slopes, t5_bias
from tfm.ops.rg_lru import rg_lru
from tfm.ops.rotary import rotary, rotary_, rotary_table
from tfm.ops.selective_scan import selective_scan
from tfm.ops.varlen_attention import varlen_attention
from tfm.ops.wkv import wkv

__all__ = [
    "alibi_bias",
    "alibi_slopes",
    "attention",
    "causal_conv1d",
    "cross_entropy",
    "decode_attention",
    "draw_seed",
    "dropout",
    "embedding",
    "experts",
    "feed_forward",
    "gated_feed_forward",
    "layer_norm",
    "linear_activation",
    "linear_cross_entropy",
    "residual_layer_norm",
    "residual_rms_norm",
    "rg_lru",
    "rms_norm",
    "rotary",
    "rotary_",
    "rotary_table",
    "selective_scan",
    "sinusoid",
    "split_heads",
    "t5_bias",
    "varlen_attention",
    "wkv",
]
