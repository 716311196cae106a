"""Attention problems for the tests of its kernels: sizes and rules as data, and runs of a backend on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import oracle
import torch
import torch.nn.functional as F
from torch import Tensor

from tfm import ops
from tfm.sequences import Layout, offsets

SEED, SITE = -0x0123456789ABCDEF, 3


@dataclass(frozen=True)
class Problem:
    """One call: B, Hq, Hkv, Sq, Sk, D, Dv, and the options of ops.attention.

    `mask` is ("bool" or "float", shape); among `rules` lists become int32 tensors, `sinks` True becomes a tensor,
    `relative_bias` one of so many distances to each side, and `key_mask` what valid_keys makes of its name.
    """

    shape: tuple[int, int, int, int, int, int, int]
    rules: dict[str, Any] = field(default_factory=dict)
    mask: tuple[str, tuple[int, ...]] | None = None

    @property
    def is_dropping(self) -> bool:
        return "dropout_p" in self.rules


# Pairwise: every rule meets another, every mask a length or a window; head dims that are split, padded, unequal.
PROBLEMS = {
    "plain": Problem((1, 2, 2, 65, 70, 16, 16)),
    "causal, dropout": Problem((1, 2, 1, 65, 65, 32, 32), {"is_causal": True, "dropout_p": 0.3}),
    "causal, bottom-right, 3 to 1": Problem((1, 3, 1, 33, 70, 80, 16), {"is_causal": True, "query_start": 37}),
    "causal, starts, rows empty": Problem((2, 1, 1, 35, 40, 17, 16), {"is_causal": True, "query_start": [-3, 5]}),
    "lengths, dropout": Problem((3, 1, 1, 17, 70, 16, 24), {"key_lengths": [70, 0, 33], "dropout_p": 0.1}),
    "lengths, causal, sinks": Problem(
        (2, 4, 2, 40, 40, 16, 16), {"key_lengths": [40, 9], "is_causal": True, "sinks": True}
    ),
    "window": Problem((1, 2, 1, 130, 130, 16, 16), {"window_size": (40, 3)}),
    "window, left only, softcap": Problem(
        (2, 1, 1, 65, 40, 16, 48), {"window_size": (33, -1), "query_start": [0, 30], "softcap": 0.7}
    ),
    "window, lengths, rows empty, dropout": Problem(
        (2, 1, 1, 65, 65, 16, 16), {"window_size": (1, 0), "key_lengths": [65, 20], "dropout_p": 0.4}
    ),
    "softcap, negative scale, dropout": Problem(
        (1, 1, 1, 33, 65, 96, 16), {"softcap": 30.0, "scale": -0.6, "dropout_p": 0.2}
    ),
    "scale 0": Problem((1, 1, 1, 17, 40, 16, 16), {"scale": 0.0}),
    "scale below 0": Problem((1, 1, 1, 33, 130, 16, 16), {"scale": -0.3, "is_causal": True, "query_start": 90}),
    "key padding, dropout": Problem((2, 2, 1, 33, 70, 16, 16), {"dropout_p": 0.2}, ("bool", (2, 1, 1, 70))),
    "key padding by head, causal": Problem((1, 2, 1, 40, 70, 16, 16), {"is_causal": True}, ("bool", (1, 2, 1, 70))),
    "bool mask [B, H, Sq, Sk]": Problem((2, 2, 2, 33, 70, 16, 16), {}, ("bool", (2, 2, 33, 70))),
    "bool mask [Sq, Sk], starts, dropout": Problem(
        (2, 2, 1, 40, 40, 16, 80), {"is_causal": True, "query_start": [0, 4], "dropout_p": 0.3}, ("bool", (40, 40))
    ),
    "bool mask [B, 1, Sq, 1]": Problem((2, 1, 1, 33, 40, 16, 16), {"key_lengths": [40, 12]}, ("bool", (2, 1, 33, 1))),
    "bias [1, H, Sq, Sk], causal": Problem((2, 2, 2, 40, 40, 16, 16), {"is_causal": True}, ("float", (1, 2, 40, 40))),
    "bias [B, 1, Sq, Sk], dropout, lengths": Problem(
        (2, 2, 1, 33, 40, 16, 16), {"key_lengths": [40, 21], "dropout_p": 0.2}, ("float", (2, 1, 33, 40))
    ),
    "bias [Sk], softcap": Problem((1, 2, 1, 33, 70, 16, 16), {"softcap": 1.5}, ("float", (70,))),
    "everything": Problem(
        (2, 4, 2, 40, 70, 24, 40),
        {
            "is_causal": True, "query_start": [25, -2], "window_size": (37, 1), "key_lengths": [70, 31],
            "softcap": 1.5, "sinks": True, "scale": 0.4, "dropout_p": 0.3,
        },
        ("float", (2, 4, 40, 70)),
    ),
    "bias by distance, causal, starts, dropout": Problem(
        (2, 2, 1, 70, 40, 16, 16),
        {"relative_bias": 7, "is_causal": True, "query_start": [5, -33], "dropout_p": 0.3},
    ),
    "bias by distance, bool mask, lengths, softcap": Problem(
        (2, 2, 2, 33, 70, 16, 24), {"relative_bias": 80, "key_lengths": [70, 21], "softcap": 1.5},
        ("bool", (2, 1, 33, 70)),
    ),
    "bias by distance, bias, window, sinks": Problem(
        (2, 2, 1, 40, 70, 16, 16), {"relative_bias": 20, "window_size": (30, 9), "query_start": 25, "sinks": True},
        ("float", (1, 2, 40, 70)),
    ),
    "bias by distance, key padding, dropout": Problem(
        (2, 2, 1, 33, 100, 16, 16), {"relative_bias": 20, "dropout_p": 0.2}, ("bool", (2, 1, 1, 100))
    ),
    "key mask on the left, causal, 2 to 1": Problem((2, 4, 2, 70, 70, 16, 24), {"key_mask": "left", "is_causal": True}),
    "key mask with holes, starts, dropout, sinks": Problem(
        (2, 2, 1, 33, 100, 16, 16),
        {"key_mask": "holes", "dropout_p": 0.2, "is_causal": True, "query_start": [70, -2], "sinks": True},
    ),
    "key mask, bias [1, H, Sq, Sk], causal": Problem(
        (2, 2, 2, 40, 40, 16, 16), {"key_mask": "left", "is_causal": True}, ("float", (1, 2, 40, 40))
    ),
    "key mask with holes, bias [H, 1, Sk], lengths, window, dropout": Problem(
        (3, 2, 1, 33, 100, 16, 16),
        {"key_mask": "holes", "key_lengths": [100, 0, 70], "window_size": (50, 60), "dropout_p": 0.2},
        ("float", (2, 1, 100)),
    ),
    "key mask, bool mask [Sq, Sk], softcap": Problem(
        (2, 2, 1, 40, 100, 16, 16), {"key_mask": "left", "softcap": 1.5}, ("bool", (40, 100))
    ),
    "key mask with holes, bool mask [H, 1, Sk]": Problem(
        (2, 2, 1, 33, 70, 16, 16), {"key_mask": "holes"}, ("bool", (2, 1, 70))
    ),
    "key mask, bias, bias by distance, starts": Problem(
        (2, 2, 1, 33, 70, 80, 16), {"key_mask": "left", "relative_bias": 20, "query_start": [40, 3]},
        ("float", (1, 2, 33, 70)),
    ),
    "bias of all distances": Problem((1, 2, 2, 5, 33, 16, 16), {"relative_bias": 0, "query_start": -200}),
    "three keys": Problem((2, 2, 2, 5, 3, 16, 16), {"dropout_p": 0.1}),
    "one query": Problem((1, 2, 2, 1, 130, 16, 16), {"is_causal": True, "query_start": 129}),
    "wide heads": Problem((1, 1, 1, 17, 40, 192, 128), {"is_causal": True, "query_start": 3}),
    "the widest heads": Problem((1, 1, 1, 17, 33, 256, 256), {"dropout_p": 0.5}),
    "heads that are slices": Problem(
        (1, 2, 1, 17, 33, 464, 464), {"dropout_p": 0.2, "sinks": True, "scale": -0.05}, ("float", (1, 1, 17, 33))
    ),
    "keys that are slices": Problem((1, 2, 1, 17, 33, 272, 40), {"is_causal": True, "query_start": 3}),
    "values that are slices": Problem((1, 2, 1, 17, 33, 24, 300), {"is_causal": True, "softcap": 2.0}),
    "the narrowest heads": Problem((2, 1, 1, 33, 40, 1, 2), {"sinks": True}),
}  # fmt: skip


def every_problem() -> dict[str, Problem]:
    """The full product of the rules, for long tests."""
    rules = product(
        ({}, {"is_causal": True}, {"is_causal": True, "query_start": [3, -4]}, {"window_size": (20, 3)}),
        ({}, {"key_lengths": [40, 17]}),
        ({}, {"softcap": 0.9}),
        ({}, {"sinks": True}),
        ({}, {"dropout_p": 0.3}),
    )
    shapes = ("bool", (2, 1, 1, 70)), ("bool", (1, 2, 40, 70)), ("float", (1, 2, 40, 70)), ("float", (2, 1, 40, 70))
    found = {}
    for chosen, mask, (key_heads, dim) in product(rules, (None, *shapes), ((2, 16), (1, 80))):
        combined = {name: value for part in chosen for name, value in part.items()}
        problem = Problem((2, 2, key_heads, 40, 70, dim, 16), combined, mask)
        found[f"{combined}, {mask}, {key_heads} key heads of {dim}"] = problem
    return found


@dataclass
class Tensors:
    """What a problem is computed from: in double precision holding values of `dtype`; `inputs` may be None."""

    inputs: dict[str, Tensor | None]
    rules: dict[str, Any]
    bool_mask: Tensor | None
    cotangents: tuple[Tensor, Tensor]


# Rules that are numbers of each head, with gradients.
LEARNT = ("sinks", "relative_bias")


def learnt_of(rules: dict[str, Any], heads: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random tensors for those of LEARNT that `rules` name."""
    shapes = {"sinks": (heads,), "relative_bias": (heads, 2 * rules.get("relative_bias", 0) + 1)}
    return {name: torch.randn(shapes[name], device=device).to(dtype) for name in LEARNT if name in rules}


# A gradient is a sum of products of a weight, which has a weight's roundings, and dp - delta, which has as many.
GRADIENT_ROUNDINGS = 2 * oracle.ROUNDINGS


def make(problem: Problem, device: torch.device, dtype: torch.dtype) -> Tensors:
    """Random tensors of `problem`, rounded to `dtype`; about a third of a mask forbids."""
    batch, heads, key_heads, queries, keys, dim, value_dim = problem.shape
    shapes = (batch, heads, queries, dim), (batch, key_heads, keys, dim), (batch, key_heads, keys, value_dim)
    inputs: dict[str, Tensor | None] = {
        name: torch.randn(shape, device=device).to(dtype)
        for name, shape in zip(("query", "key", "value"), shapes, strict=True)
    }
    rules = {name: value for name, value in problem.rules.items() if name not in LEARNT}
    for name in ("query_start", "key_lengths"):
        if isinstance(rules.get(name), list):
            rules[name] = torch.tensor(rules[name], dtype=torch.int32, device=device)
    if "key_mask" in rules:
        rules["key_mask"] = valid_keys(rules["key_mask"], batch, keys, device)
    mask = bias = None
    if problem.mask is not None:
        kind, shape = problem.mask
        mask = torch.rand(shape, device=device) < 0.7
        if kind == "float":
            bias, mask = torch.randn(shape, device=device).masked_fill(~mask, float("-inf")).to(dtype), None
    inputs["bias"] = bias
    inputs |= learnt_of(problem.rules, heads, device, dtype)
    if problem.is_dropping:
        rules |= {"seed": SEED, "site": SITE}
    cotangents = (
        torch.randn(batch, heads, queries, value_dim, device=device),
        torch.randn(batch, heads, queries, device=device),
    )
    return Tensors(inputs, rules, mask, cotangents)


def valid_keys(pattern: str, batch: int, keys: int, device: torch.device) -> Tensor:
    """A key_mask, padding on the "left", of the first sequence most, or "holes" anywhere."""
    if pattern == "holes":
        return torch.rand(batch, keys, device=device) < 0.7
    padding = torch.arange(batch, 0, -1, device=device) * keys // (batch + 1)
    return torch.arange(keys, device=device) >= padding[:, None]


def attend(tensors: Tensors, inputs: dict[str, Tensor | None], impl: str) -> tuple[Tensor, Tensor]:
    """(output, lse) of ops.attention on these inputs."""
    mask = tensors.bool_mask if inputs["bias"] is None else inputs["bias"]
    query, key, value = inputs["query"], inputs["key"], inputs["value"]
    learnt = {name: inputs.get(name) for name in LEARNT}
    return ops.attention(query, key, value, mask, return_lse=True, impl=impl, **learnt, **tensors.rules)


def results(tensors: Tensors, impl: str, dtype: torch.dtype, with_lse: bool = True) -> dict[str, Tensor]:
    """Output, lse (0 for -inf) and every gradient, of the inputs in `dtype`; `with_lse`: lse, too, is used."""
    inputs = {name: None if x is None else x.to(dtype).requires_grad_() for name, x in tensors.inputs.items()}
    output, lse = attend(tensors, inputs, impl)
    finite = lse.masked_fill(lse == float("-inf"), 0.0)
    loss = (output * tensors.cotangents[0].to(output.dtype)).sum()
    if with_lse:
        loss = loss + (finite * tensors.cotangents[1].to(finite.dtype)).sum()
    wanted = {name: x for name, x in inputs.items() if x is not None}
    gradients = torch.autograd.grad(loss, list(wanted.values()))
    found = {"output": output.detach(), "lse": finite.detach()}
    return found | {f"d{name}": gradient for name, gradient in zip(wanted, gradients, strict=True)}


def assert_matches(
    tensors: Tensors, dtype: torch.dtype, with_lse: bool = True, impl: str = "triton"
) -> dict[str, Tensor]:
    """The kernels of `impl` against the reference in float64, by the tolerance that the reference in `dtype` sets."""
    actual = results(tensors, impl, dtype, with_lse)
    truth, plain = (results(tensors, "reference", kind, with_lse) for kind in (torch.float64, dtype))
    for name, result in actual.items():
        roundings = GRADIENT_ROUNDINGS if name.startswith("d") else oracle.ROUNDINGS
        oracle.assert_matches(result, truth[name], plain[name], name, roundings=roundings)
    return actual


@dataclass(frozen=True)
class Packing:
    """Sequences of these lengths, packed and padded: `queries` and `keys` move tensors between the two."""

    query_lengths: list[int]
    key_lengths: list[int]
    device: torch.device

    @property
    def arguments(self) -> tuple[Tensor, Tensor, int, int]:
        """cu_seq_q, cu_seq_k, max_q, max_k."""
        lengths = self.query_lengths, self.key_lengths
        cu_seq_q, cu_seq_k = (offsets(torch.tensor(part, dtype=torch.int64, device=self.device)) for part in lengths)
        return cu_seq_q, cu_seq_k, max(lengths[0], default=0), max(lengths[1], default=0)

    @property
    def queries(self) -> Layout:
        cu_seq_q, _, max_q, _ = self.arguments
        return Layout.of(cu_seq_q, max_q, sum(self.query_lengths))

    @property
    def keys(self) -> Layout:
        _, cu_seq_k, _, max_k = self.arguments
        return Layout.of(cu_seq_k, max_k, sum(self.key_lengths))

    def padded(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """[N, H, D] to [B, H, S, D], zeros at padding."""
        layouts = zip((self.queries, self.keys, self.keys), (query, key, value), strict=True)
        return [layout.unpack(x).transpose(1, 2) for layout, x in layouts]


# What packed and padded sequences have in the same bits.
PACKED = ("output", "lse", "query", "key", "value")
PACKED_RULES = {
    "dropout": {"dropout_p": 0.3},
    "causal, dropout": {"is_causal": True, "dropout_p": 0.1},
    "starts, window": {"query_start": [-3, 6, 0, 1], "window_size": (20, 3)},
    "softcap, scale, sinks": {"softcap": 0.9, "scale": 0.3, "sinks": True},
    "bias by distance, starts": {"relative_bias": 9, "is_causal": True, "query_start": [-3, 6, 0, 70]},
    "bool mask, dropout": {"attn_mask": ("bool", (4, 1, 40, 70)), "dropout_p": 0.1},
    "mask of a row": {"attn_mask": ("bool", (4, 2, 1, 70))},
    "bias, bias by distance": {"attn_mask": ("float", (1, 2, 40, 70)), "relative_bias": 30, "window_size": (20, 3)},
}


def packing(device: torch.device) -> Packing:
    """Sequences of cross-attention: one without queries, one without keys."""
    return Packing([33, 1, 0, 40], [5, 70, 3, 0], device)


def packed_problem(rules: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Callable[..., dict[str, Tensor]]:
    """attended(impl, dtype, layout), the latter "packed" or "padded": output, lse and gradients by name, packed."""
    rules = {"seed": SEED, "site": SITE} | rules
    if isinstance(rules.get("query_start"), list):
        rules["query_start"] = torch.tensor(rules["query_start"], device=device)
    lengths = packing(device)
    queries, keys = sum(lengths.query_lengths), sum(lengths.key_lengths)
    shapes = {"query": (queries, 2, 16), "key": (keys, 1, 16), "value": (keys, 1, 24)}
    inputs = {name: torch.randn(shape, device=device).to(dtype) for name, shape in shapes.items()}
    inputs |= learnt_of(rules, 2, device, dtype)
    if "attn_mask" in rules:
        kind, shape = rules.pop("attn_mask")
        mask = torch.rand(shape, device=device) < 0.7
        if kind == "bool":
            rules["attn_mask"] = mask
        else:
            inputs["attn_mask"] = torch.randn(shape, device=device).masked_fill(~mask, float("-inf")).to(dtype)
    rules = {name: value for name, value in rules.items() if name not in LEARNT}
    cotangents = torch.randn(queries, 2, 24, device=device), torch.randn(queries, 2, device=device)

    def attended(impl: str, kind: torch.dtype, layout: str) -> dict[str, Tensor]:
        some = {name: x.to(kind).requires_grad_() for name, x in inputs.items()}
        query, key, value, *_ = some.values()
        options = rules | {name: x for name, x in some.items() if name not in shapes}
        options |= {"return_lse": True, "impl": impl}
        if layout == "packed":
            output, lse = ops.varlen_attention(query, key, value, *lengths.arguments, **options)
        else:
            key_lengths = torch.tensor(lengths.key_lengths, device=device)
            output, lse = ops.attention(*lengths.padded(query, key, value), key_lengths=key_lengths, **options)
            output, lse = lengths.queries.pack(output.transpose(1, 2)), lengths.queries.pack(lse.transpose(1, 2))
        lse = lse.masked_fill(lse == float("-inf"), 0.0)
        loss = (output * cotangents[0].to(kind)).sum() + (lse * cotangents[1].to(lse.dtype)).sum()
        gradients = torch.autograd.grad(loss, list(some.values()))
        return {"output": output.detach(), "lse": lse.detach()} | dict(zip(some, gradients, strict=True))

    return attended


UNREACHED = (
    "lengths", "causal", "window", "key padding", "mask", "mask and causal", "bias", "key mask", "key mask and bias",
    "key mask and mask",
)  # fmt: skip


def unreached(how: str, device: torch.device) -> tuple[dict[str, Any], Tensor]:
    """Options for [2, 2, 40, 16] queries on [2, 1, 70, 16] keys, and which keys they leave to nobody, [2, 1, 70, 1]."""
    hidden = torch.zeros(2, 1, 70, 1, dtype=torch.bool, device=device)
    options: dict[str, Any] = {}
    if how == "lengths":
        options = {"key_lengths": torch.tensor([33, 70], device=device)}
        hidden[0, :, 33:] = True
    elif how == "causal":
        options = {"is_causal": True, "query_start": 3}
        hidden[:, :, 43:] = True
    elif how == "window":
        options = {"window_size": (10, 2), "query_start": 20}
        hidden[:, :, :10] = hidden[:, :, 62:] = True
    elif how == "key padding":
        options = {"attn_mask": torch.rand(2, 1, 1, 70, device=device) < 0.7}
        hidden[:] = ~options["attn_mask"].transpose(2, 3)
    elif how.startswith("key mask"):
        options = {"key_mask": valid_keys("left", 2, 70, device)}
        options["key_mask"][:, 50] = False
        hidden[:] = ~options["key_mask"][:, None, :, None]
        mask = torch.ones(40, 70, dtype=torch.bool, device=device)
        mask[:, 60], mask[35] = False, False
        if how != "key mask":
            hidden[:, :, 60] = True
            bias = torch.randn(1, 2, 40, 70, device=device).masked_fill(~mask, float("-inf"))
            options["attn_mask"] = bias if how == "key mask and bias" else mask
    else:
        mask = torch.rand(2, 2, 40, 70, device=device) < 0.7
        mask[0, :, :, 3:6] = mask[1, :, :, 66] = mask[1, 0, :, 9] = False
        hidden[0, :, 3:6] = hidden[1, :, 66] = True
        mask[:, :, 35] = False
        options = {"attn_mask": mask}
        if how == "mask and causal":  # keys that the mask leaves to none but queries before them
            mask[:, :, 30:, 30] = False
            hidden[:, :, 30] = True
            hidden[:, :, 40:] = True
            options["is_causal"] = True
        elif how == "bias":
            options["attn_mask"] = torch.randn(2, 2, 40, 70, device=device).masked_fill(~mask, float("-inf"))
    return options, hidden


NOTHING_ALLOWED = {
    "mask": {"attn_mask": torch.zeros(40, 70, dtype=torch.bool)},
    "key padding": {"attn_mask": torch.zeros(2, 1, 1, 70, dtype=torch.bool)},
    "bias": {"attn_mask": torch.full((1, 2, 40, 70), float("-inf"))},
    "lengths": {"key_lengths": torch.zeros(2, dtype=torch.int32)},
    "key mask": {"key_mask": torch.zeros(2, 70, dtype=torch.bool)},
    "key mask that does not meet a bias": {
        "key_mask": (torch.arange(70) < 40).expand(2, 70),
        "attn_mask": torch.zeros(1, 2, 40, 70).masked_fill(torch.arange(70) < 40, float("-inf")),
    },
    "causal": {"is_causal": True, "query_start": -40},
}


def strided(x):
    return F.pad(x, (0, 5, 0, 2))[..., :-2, :-5]


VIEWS = {
    "rows apart": strided,
    "columns apart": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "heads last": lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "sequence first": lambda x: x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
}
