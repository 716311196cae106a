"""Wrong arguments of every operation: the message names the argument, says what was expected and what came."""

from __future__ import annotations

import pytest
from torch import float16, float64, int8, int32, int64, tensor, zeros

from tfm import ops

GOOD_CALLS = {
    "attention": {"query": zeros(2, 4, 5, 3), "key": zeros(2, 2, 7, 3), "value": zeros(2, 2, 7, 6)},
    "varlen_attention": {
        "query": zeros(9, 4, 3), "key": zeros(13, 2, 3), "value": zeros(13, 2, 5), "max_q": 5, "max_k": 7,
        "cu_seq_q": tensor([0, 5, 6, 6, 9]), "cu_seq_k": tensor([0, 2, 9, 13, 13]),
    },
    "dropout": {"x": zeros(3, 4), "dropout_p": 0.5},
    "rms_norm": {"x": zeros(3, 4), "weight": zeros(4)},
    "residual_rms_norm": {"x": zeros(3, 4), "residual": zeros(3, 4)},
    "feed_forward": {"x": zeros(2, 3), "w1": zeros(7, 3), "b1": zeros(7), "w2": zeros(4, 7), "b2": zeros(4)},
    "gated_feed_forward": {
        "x": zeros(2, 3), "gate_weight": zeros(7, 3), "up_weight": zeros(7, 3), "down_weight": zeros(4, 7),
    },
    "linear_activation": {"x": zeros(2, 3), "weight": zeros(7, 3), "bias": zeros(7)},
    "linear_cross_entropy": {"input": zeros(11, 5), "linear_weight": zeros(7, 5), "target": zeros(11, dtype=int64)},
    "embedding": {"tokens": zeros(3, 5, dtype=int64), "weight": zeros(11, 6), "positions": zeros(5, dtype=int64)},
}  # fmt: skip
# What is at fault, and the arguments that replace good ones.
BAD_CALLS = {
    "attention": [
        ("query", {"query": zeros(2, 3, 4)}),
        ("key", {"key": zeros(2, 2, 7, 4)}),
        ("key", {"key": zeros(3, 2, 7, 3)}),
        ("key", {"key": zeros(2, 2, 7, 3, dtype=float16)}),
        ("value", {"value": zeros(2, 2, 6, 4)}),
        ("value", {"value": zeros(2, 1, 7, 4)}),
        ("query", {"query": zeros(2, 3, 5, 3)}),
        ("query", {"query": zeros(2, 4, 5, 3, dtype=int32)}),
        ("attn_mask", {"attn_mask": zeros(5, 6)}),
        ("attn_mask", {"attn_mask": zeros(5, 7, dtype=int32)}),
        ("attn_mask", {"attn_mask": zeros(1, 1, 1, 5, 7)}),
        ("key_lengths", {"key_lengths": tensor([1, 2, 3])}),
        ("key_lengths", {"key_lengths": tensor([1.0, 2.0])}),
        ("key_mask", {"key_mask": zeros(2, 6, dtype=bool)}),
        ("key_mask", {"key_mask": zeros(2, 1, 1, 7, dtype=bool)}),
        ("key_mask", {"key_mask": zeros(2, 7, dtype=int64)}),
        ("query_start", {"query_start": tensor([1.0, 2.0])}),
        ("query_start", {"query_start": tensor([1])}),
        ("window_size", {"window_size": (1, 2, 3)}),
        ("softcap", {"softcap": 0.0}),
        ("value", {"value": zeros(2, 2, 7, 6, device="meta")}),
        ("sinks", {"sinks": zeros(2)}),
        ("dropout_p", {"dropout_p": 1.5}),
        ("dropout_p", {"dropout_p": float("nan")}),
        ("seed", {"dropout_p": 0.1, "seed": tensor([1, 2])}),
        ("impl", {"impl": "cuda"}),
    ],
    "varlen_attention": [
        ("query", {"query": zeros(1, 9, 4, 3)}),
        ("value", {"value": zeros(12, 2, 5)}),
        ("key", {"key": zeros(13, 2, 4)}),
        ("key", {"key": zeros(13, 2, 3, dtype=float64)}),
        ("query", {"query": zeros(9, 5, 3)}),
        ("cu_seq_q", {"cu_seq_q": tensor([0, 5, 6, 6])}),
        ("cu_seq_q", {"cu_seq_q": tensor([1, 5, 6, 6, 9])}),
        ("cu_seq_q", {"cu_seq_q": tensor([0, 5, 4, 6, 9])}),
        ("cu_seq_q", {"cu_seq_q": tensor([0.0, 9.0])}),
        ("cu_seq_q", {"cu_seq_q": tensor([], dtype=int32)}),
        ("cu_seq_k", {"cu_seq_k": tensor([0, 2, 9, 13])}),
        ("cu_seq_k", {"cu_seq_k": tensor([0, 2, 9, 13, 12])}),
        ("max_q", {"max_q": 4}),
        ("max_k", {"max_k": 6}),
        ("query_start", {"query_start": tensor([0, 1])}),
        ("sinks", {"sinks": zeros(1)}),
        ("dropout_p", {"dropout_p": -0.1}),
        ("impl", {"impl": ""}),
    ],
    "dropout": [
        ("dropout_p", {"dropout_p": 1.01}),
        ("dropout_p", {"dropout_p": -1e-9}),
        ("seed", {"seed": tensor([1])}),
        ("seed", {"seed": tensor(1, dtype=int32)}),
        ("seed", {"seed": 2**63}),
        ("x", {"x": zeros(3, dtype=int64)}),
        ("x", {"x": zeros(())}),
    ],
    "rms_norm": [
        ("x", {"x": zeros(3, 0)}),
        ("x", {"x": zeros(())}),
        ("x", {"x": zeros(3, 4, dtype=int64)}),
        ("weight", {"weight": zeros(5)}),
        ("weight", {"weight": zeros(1, 4)}),
        ("weight", {"weight": zeros(4, device="meta")}),
        ("impl", {"impl": "fast"}),
    ],
    "residual_rms_norm": [
        ("residual", {"residual": zeros(4)}),
        ("residual", {"residual": zeros(3, 4, dtype=int64)}),
        ("dropout_p", {"dropout_p": 2.0}),
        ("seed", {"dropout_p": 0.5, "seed": zeros(1)}),
    ],
    "feed_forward": [
        ("x", {"x": zeros(2, 3, dtype=int64)}),
        ("x", {"x": zeros(())}),
        ("w1", {"w1": zeros(7, 4)}),
        ("w1", {"w1": zeros(3)}),
        ("b1", {"b1": zeros(3)}),
        ("w2", {"w2": zeros(4, 3)}),
        ("b2", {"b2": zeros(7)}),
        ("b2", {"b2": zeros(4, device="meta")}),
        ("activation", {"activation": "swish"}),
        ("dropout_p", {"dropout_p": 7}),
        ("impl", {"impl": "torch"}),
    ],
    "gated_feed_forward": [
        ("x", {"x": zeros(())}),
        ("gate_weight", {"gate_weight": zeros(7, 2)}),
        ("up_weight", {"up_weight": zeros(6, 3)}),
        ("up_weight", {"up_weight": zeros(7, 3, dtype=int8)}),
        ("down_weight", {"down_weight": zeros(7, 4)}),
        ("activation", {"activation": None}),
        ("gate_bias", {"gate_bias": zeros(4)}),
        ("up_bias", {"up_bias": zeros(4)}),
        ("up_bias", {"gate_weight": zeros(14, 3), "up_weight": None, "up_bias": zeros(7)}),
        ("down_bias", {"down_bias": zeros(7)}),
    ],
    "linear_activation": [
        ("x", {"x": zeros(())}),
        ("weight", {"weight": zeros(7, 2)}),
        ("bias", {"bias": zeros(3)}),
        ("activation", {"activation": "swish"}),
    ],
    "linear_cross_entropy": [
        ("input", {"input": zeros(11, 5, dtype=int64)}),
        ("linear_weight", {"linear_weight": zeros(7, 4)}),
        ("linear_weight", {"linear_weight": zeros(5)}),
        ("linear_weight", {"input": zeros(())}),
        ("linear_weight", {"linear_weight": zeros(7, 5, device="meta")}),
        ("linear_weight", {"linear_weight": zeros(0, 5)}),
        ("target", {"target": zeros(10, dtype=int64)}),
        ("target", {"target": zeros(11, dtype=int32)}),
        ("target", {"target": zeros(11, 6)}),
        ("linear_bias", {"linear_bias": zeros(5)}),
        ("weight", {"weight": zeros(7, dtype=int64)}),
        ("weight", {"weight": zeros(11)}),
        ("reduction", {"reduction": "average"}),
        ("label_smoothing", {"label_smoothing": 1.1}),
        ("softcap", {"softcap": -1.0}),
        ("impl", {"impl": "liger"}),
    ],
    "embedding": [
        ("tokens", {"tokens": zeros(3, 5)}),
        ("weight", {"weight": zeros(11)}),
        ("weight", {"weight": zeros(11, 6, dtype=int64)}),
        ("weight", {"weight": zeros(11, 6, device="meta")}),
        ("positions", {"positions": zeros(5)}),
        ("positions", {"positions": zeros(4, dtype=int64)}),
        ("positions", {"positions": zeros(2, 3, 5, dtype=int64)}),
        ("position_weight", {"position_weight": zeros(9, 5)}),
        ("padding_idx", {"padding_idx": 11}),
        ("dropout_p", {"dropout_p": -1}),
        ("impl", {"impl": "gather"}),
    ],
}
CASES = [(operation, *case) for operation, cases in BAD_CALLS.items() for case in cases]


@pytest.mark.parametrize("operation", GOOD_CALLS)
def test_the_good_calls_are_good(operation):
    getattr(ops, operation)(**GOOD_CALLS[operation])


@pytest.mark.parametrize(("operation", "name", "change"), CASES, ids=[f"{case[0]}-{case[1]}" for case in CASES])
def test_says_what_was_expected_and_what_came(operation, name, change):
    with pytest.raises(ValueError, match=rf"^{name}: expected .+, got "):
        getattr(ops, operation)(**{**GOOD_CALLS[operation], **change})
