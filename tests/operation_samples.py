"""A small call or two of every operation, as a function of the tensors that it differentiates by.

What is promised of all operations is tested over them: a new one is covered as soon as it stands here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import native
import pytest
import torch
from torch import Tensor

from tfm import ops
from tfm.ops import backends
from tools.subjects import subjects

# Of each, by the names of its own arguments: shapes of the tensors that get a gradient, and all that is constant.
Constants = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """`call(**leaves, impl=...)` is the operation; `shapes` are its leaves', constants are made anew for a device."""

    name: str
    operation: str
    shapes: dict[str, tuple[int, ...]]
    constants: Callable[[str], Constants] = field(default=lambda device: {})
    has_backends: bool = True

    def leaves(
        self, dtype: torch.dtype = torch.float32, device: str = "cpu", requires_grad: bool = True
    ) -> list[Tensor]:
        """The same numbers in any dtype."""
        generator = torch.Generator().manual_seed(len(self.name))
        drawn = (0.5 * torch.randn(shape, generator=generator) for shape in self.shapes.values())
        return [x.to(device, dtype).requires_grad_(requires_grad) for x in drawn]

    def __call__(self, *leaves: Tensor, impl: str = "auto", device: str = "cpu", **changes: Any) -> tuple[Tensor, ...]:
        """The results that are tensors."""
        named = dict(zip(self.shapes, leaves, strict=True))
        if self.operation == "rotary_":
            # In place of what needs no gradient it would change the leaf.
            named["x"] = named["x"] * 1.0
        options = {"impl": impl} if self.has_backends else {}
        result = getattr(ops, self.operation)(**named | self.constants(device) | options | changes)
        return tuple(x for x in (result if isinstance(result, tuple) else (result,)) if x is not None)

    def gradients(
        self, leaves: list[Tensor], impl: str, create_graph: bool = False, **changes: Any
    ) -> tuple[Tensor, ...]:
        """Of a sum of the results in which each element counts differently, and none linearly."""
        return torch.autograd.grad(curved(self(*leaves, impl=impl, **changes)), leaves, create_graph=create_graph)


def curved(results: tuple[Tensor, ...]) -> Tensor:
    """A scalar with a second derivative of its own in every element."""
    return sum((weights_of(x) * x.sin()).sum() for x in results)


def weights_of(x: Tensor) -> Tensor:
    """Different for each element, the same in any dtype."""
    return (torch.arange(x.numel(), dtype=x.dtype, device=x.device).view(x.shape) * 0.7).cos()


NAMED: dict[str, Any] = {"ids": lambda sample: sample.name}

DROP = {"dropout_p": 0.4, "seed": 7, "site": 3}


def _masked(device: str) -> Constants:
    mask = torch.ones(2, 1, 3, 5, dtype=torch.bool, device=device)
    mask[0, 0, 1] = False
    mask[1, 0, :, 4] = False
    return DROP | {"attn_mask": mask, "window_size": (3, -1), "query_start": 2}


def _weighed(device: str) -> Constants:
    lengths = torch.tensor([5, 2], device=device)
    return DROP | {"key_lengths": lengths, "return_lse": True, "return_weights": True}


def _left_padded(device: str) -> Constants:
    key_mask = torch.tensor([[False, False, True, True, True], [True, True, False, True, True]], device=device)
    return DROP | {"key_mask": key_mask, "is_causal": True, "query_start": 2}


def _packed(device: str) -> Constants:
    queries = torch.tensor([0, 2, 2, 5], dtype=torch.int32, device=device)
    keys = torch.tensor([0, 1, 2, 6], dtype=torch.int32, device=device)
    return DROP | {"cu_seq_q": queries, "cu_seq_k": keys, "max_q": 3, "max_k": 4, "is_causal": True, "query_start": 1}


def _tokens(device: str) -> Constants:
    tokens = torch.tensor([[3, 1, 0], [6, 3, 5]], device=device)
    return DROP | {"tokens": tokens, "positions": torch.arange(3, device=device), "scale": 3.0, "padding_idx": 1}


def _classes(device: str) -> Constants:
    target = torch.tensor([4, 0, -100, 8, 4], device=device)
    return {"target": target, "label_smoothing": 0.1, "z_loss": 0.01, "softcap": 3.0}


def _losses(device: str) -> Constants:
    return _classes(device) | {"reduction": "none"}


def _probabilities(device: str) -> Constants:
    target = torch.arange(45, device=device, dtype=torch.float32).view(5, 9).sin().softmax(-1)
    return {"target": target, "weight": torch.arange(1.0, 10.0, device=device)}


def _tables(device: str) -> Constants:
    cos, sin = ops.rotary_table(7, 4, device=device)
    return {"cos": cos, "sin": sin, "positions": torch.tensor([5, 0, 3], device=device)}


def _first_heads(device: str) -> Constants:
    return _tables(device) | {"heads": 3, "interleaved": True}


def _cache(device: str) -> Constants:
    return {
        "key_cache": torch.ones(3, 5, 2, 4, device=device),
        "value_cache": torch.ones(3, 5, 2, 4, device=device),
        "lengths": torch.tensor([1, 5, 3], dtype=torch.int32, device=device),
    }


QKV = {"query": (2, 4, 3, 6), "key": (2, 2, 5, 6), "value": (2, 2, 5, 4)}
PACKED = {"query": (5, 2, 6), "key": (6, 2, 6), "value": (6, 2, 4), "sinks": (2,)}
PACKED_LEARNED = PACKED | {"attn_mask": (3, 1, 3, 4), "relative_bias": (2, 7)}
LEARNED = QKV | {"attn_mask": (4, 3, 5), "sinks": (4,)}
NEAR = QKV | {"relative_bias": (4, 5)}
ROW = (2, 3, 11)
NORM = {"x": ROW, "weight": (11,), "bias": (11,)}
RESIDUAL = {"x": ROW, "residual": ROW, "x_bias": (11,), "weight": (11,)}
PLAIN = {"x": (2, 3, 6), "w1": (10, 6), "b1": (10,), "w2": (5, 10), "b2": (5,)}
GATED = {"x": (2, 3, 6), "gate_weight": (8, 6), "up_weight": (8, 6), "down_weight": (5, 8)}
LOSS = {"input": (5, 6), "linear_weight": (9, 6), "linear_bias": (9,)}


def _always(**constants: Any) -> Callable[[str], Constants]:
    return lambda device: constants


SAMPLES = [
    Sample("attention", "attention", QKV, _always(is_causal=True, query_start=2)),
    Sample("attention masked", "attention", QKV, _masked),
    Sample("attention learned", "attention", LEARNED, _always(softcap=2.0, scale=0.6, return_lse=True)),
    Sample("attention near", "attention", NEAR, _always(window_size=(2, 3), return_lse=True)),
    Sample("attention weights", "attention", QKV, _weighed),
    Sample("attention padded", "attention", LEARNED, _left_padded),
    Sample("varlen_attention", "varlen_attention", PACKED, _packed),
    Sample("varlen_attention learned", "varlen_attention", PACKED_LEARNED, _packed),
    Sample("layer_norm", "layer_norm", NORM),
    Sample("residual_layer_norm", "residual_layer_norm", RESIDUAL | {"bias": (11,)}, _always(**DROP)),
    Sample("rms_norm", "rms_norm", {"x": ROW, "weight": (11,)}, _always(weight_offset=1.0)),
    Sample("residual_rms_norm", "residual_rms_norm", RESIDUAL),
    Sample("feed_forward relu", "feed_forward", PLAIN, _always(**DROP)),
    Sample("feed_forward gelu", "feed_forward", PLAIN, _always(activation="gelu")),
    Sample("gated_feed_forward", "gated_feed_forward", GATED, _always(**DROP)),
    Sample(
        "gated_feed_forward joined", "gated_feed_forward",
        {"x": (4, 6), "gate_weight": (16, 6), "down_weight": (5, 8)}, _always(up_weight=None, activation="gelu_tanh"),
    ),
    Sample("linear_cross_entropy", "linear_cross_entropy", LOSS, _classes),
    Sample("linear_cross_entropy rows", "linear_cross_entropy", LOSS, _losses),
    Sample("linear_cross_entropy probabilities", "linear_cross_entropy", LOSS, _probabilities),
    Sample("embedding", "embedding", {"weight": (7, 6), "position_weight": (4, 6)}, _tokens),
    Sample("embedding sinusoid", "embedding", {"weight": (7, 5)}, _tokens),
    Sample("rotary", "rotary", {"query": (2, 4, 3, 6), "key": (2, 1, 3, 6)}, _tables),
    Sample("rotary_", "rotary_", {"x": (2, 4, 3, 6)}, _first_heads),
    Sample("decode_attention", "decode_attention", {"query": (3, 4, 4)}, _cache),
    Sample("dropout", "dropout", {"x": (3, 9)}, _always(**DROP), has_backends=False),
    Sample("split_heads", "split_heads", {"x": (2, 3, 12)}, _always(parts=3, heads=2), has_backends=False),
]  # fmt: skip
# A subject may bring its own, beside what else it is proven on.
BROUGHT = [
    Sample(name, operation, shapes, constants if callable(constants) else _always(**constants))
    for subject in (subjects() if backends.has_triton() else ())
    for name, operation, shapes, constants in getattr(subject, "SAMPLES", ())
]
SAMPLES += BROUGHT
# Of inference: decode_attention takes no tensor that needs a gradient.
DIFFERENTIABLE = [sample for sample in SAMPLES if sample.operation != "decode_attention"]


def on_backends(samples: list[Sample]) -> list[Any]:
    """(sample, impl) for each sample and each backend that computes it on a CPU, as parameters of a test."""
    parameters = []
    for sample in samples:
        of_operation = {row.backend for row in backends.TABLE if sample.operation in row.operations}
        if sample.name == "linear_cross_entropy probabilities":
            of_operation = set()
        for impl in ("reference", *sorted(of_operation)):
            marks = {"native": native.MARKS[:1], "triton": [pytest.mark.triton], "reference": []}[impl]
            parameters.append(pytest.param(sample, impl, marks=marks, id=f"{sample.name}-{impl}"))
    return parameters
