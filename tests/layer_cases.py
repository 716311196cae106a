"""Calls of an encoder or decoder layer with every kind of mask."""

from __future__ import annotations

import torch
from torch import Tensor
from torch_pairs import pair

BATCH, TARGETS, SOURCES, DIM, HEADS, HIDDEN = 3, 5, 7, 8, 2, 12

CONSTRUCTORS = {
    "post-norm": {},
    "pre-norm": {"norm_first": True},
    "batch_first gelu": {"batch_first": True, "activation": "gelu"},
    "pre-norm without bias": {"norm_first": True, "bias": False, "batch_first": True, "activation": torch.nn.ReLU()},
    "tanh gelu": {"activation": torch.nn.GELU("tanh"), "layer_norm_eps": 1e-3},
    "a callable of its own": {"activation": torch.nn.functional.mish, "norm_first": True},
}
MASKS = ("none", "causal hint", "bool", "float", "bool a head", "padding", "float and padding", "all padded")


def make(kind: str, **options: object) -> tuple[torch.nn.Module, torch.nn.Module]:
    return pair(f"Transformer{kind}Layer", DIM, HEADS, HIDDEN, 0.0, **options)


def tokens(length: int, batch_first: bool) -> Tensor:
    shape = (BATCH, length, DIM) if batch_first else (length, BATCH, DIM)
    return torch.randn(shape, dtype=torch.float64)


def padding_of(length: int, float_form: bool, empty: int | None = None) -> Tensor:
    """The last sequence is full, the first has a hole, `empty` has nothing."""
    padded = torch.zeros(BATCH, length, dtype=torch.bool)
    padded[0, 1], padded[0, -1], padded[1, -2:] = True, True, True
    if empty is not None:
        padded[empty] = True
    return torch.zeros(padded.shape).double().masked_fill(padded, float("-inf")) if float_form else padded


def attention_mask(name: str, queries: int, keys: int) -> Tensor | None:
    if name == "causal hint":
        return torch.ones(queries, keys, dtype=torch.bool).triu(1)
    shape = (BATCH * HEADS, queries, keys) if "head" in name else (queries, keys)
    masked = torch.rand(shape) < 0.4
    masked[..., 0], masked[..., 2] = False, False
    if name.startswith("bool"):
        return masked
    if name.startswith("float"):
        return torch.randn(shape, dtype=torch.float64).masked_fill(masked, float("-inf"))
    return None


def encoder_call(mask: str) -> dict[str, object]:
    call = {"src_mask": attention_mask(mask, SOURCES, SOURCES), "is_causal": mask == "causal hint"}
    if "padd" in mask:
        empty = 1 if mask == "all padded" else None
        call["src_key_padding_mask"] = padding_of(SOURCES, mask.startswith("float"), empty)
    return call


def decoder_call(mask: str) -> dict[str, object]:
    call = {
        "tgt_mask": attention_mask(mask, TARGETS, TARGETS),
        "memory_mask": attention_mask(mask, TARGETS, SOURCES),
        "tgt_is_causal": mask == "causal hint",
        "memory_is_causal": mask == "causal hint",
    }
    if "padd" in mask:
        empty = 1 if mask == "all padded" else None
        call["tgt_key_padding_mask"] = padding_of(TARGETS, mask.startswith("float"))
        call["memory_key_padding_mask"] = padding_of(SOURCES, mask.startswith("float"), empty)
    return call


def valid(call: dict[str, object], name: str, length: int, batch_first: bool) -> Tensor:
    padding = call.get(name)
    if padding is None:
        padding = torch.zeros(BATCH, length, dtype=torch.bool)
    keep = ~padding if padding.dtype == torch.bool else padding != float("-inf")
    return keep if batch_first else keep.t()
