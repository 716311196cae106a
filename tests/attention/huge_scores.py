"""Attention whose scores are huge but finite: masks of -1e9 or finfo.min, logits of 1e5, as plain torch in fp32 has it.

What is right there? fp32 itself saturates: finfo.min + 3 is finfo.min, and of scores beside -1e9 multiples of 64 are
left, so that a row of -1e9 attends to all its keys alike. Plain torch does that, float64 does not. Therefore the truth
is the softmax in float64 of scores that were formed in fp32. Those are one set of numbers and no matter of taste, since
every query and key here is made of small multiples of powers of two: q·k · scale is exact in fp32, whatever the order
of summation, fused or not, and a bias is added with one rounding. (Scales are powers of 4: torch may take the root.)

How well a backend may do on such scores does not depend on how lucky plain torch is, either: `assert_right` counts
roundings. A weight p of a score s may err by 1 + |s - top| of them, since s - top is rounded before it is an exponent;
and whatever is summed from weights, by as much as the terms of the sum do, even where they cancel.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tfm import ops
from tfm.sequences import Layout, offsets

LOWEST = torch.finfo(torch.float32).min
# What masks are made of; learnt biases, small numbers, stand beside the zeros.
FILLS = (0.0, -1e4, -1e9, LOWEST, float("-inf"), 1e9, 1e20, 1e30)
# One column of queries and keys carries this, the others at most 2: halves, so that products are exact.
DIM, MOST = 6, 2.0
# Roundings of a term, beside those of its exponent: products, sums, what is stored, and in fp32 an exp that knows 20
# bits (torch's own attention for CPUs has one).
ROUNDINGS = {torch.float32: 32, torch.float16: 4, torch.bfloat16: 4}

# Names to (truth, what its terms amount to), both float64.
Expected = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Problem:
    """One call. `runs`: for each kind of row of the mask (fill, number of keys) from the left, the last to the end.

    `logits` is the size of the scores before the mask, a power of 4; `shared` says of the mask's first three
    dimensions which are 1.
    """

    seed: int
    shape: tuple[int, int, int, int, int]
    logits: float = 1.0
    scale: float = 1.0
    runs: tuple[tuple[tuple[float, int], ...], ...] = ()
    shared: tuple[bool, bool, bool] = (False, False, False)
    is_causal: bool = False
    sink: float | None = None


def problems(longest: int, masked: bool = True) -> st.SearchStrategy[Problem]:
    """Up to `longest` queries and keys; `masked`: with float masks and sinks."""
    run = st.tuples(st.sampled_from(FILLS), st.integers(1, max(longest // 2, 1)))
    runs = st.lists(st.lists(run, min_size=1, max_size=4).map(tuple), max_size=3).map(tuple)
    heads = st.sampled_from([(1, 1), (2, 1), (2, 2)])
    return st.builds(
        lambda batch, heads, queries, keys, **rest: Problem(shape=(batch, *heads, queries, keys), **rest),
        batch=st.integers(1, 2),
        heads=heads,
        queries=st.integers(1, longest),
        keys=st.integers(1, longest),
        seed=st.integers(0, 2**20),
        logits=st.sampled_from([1.0, 4.0**5, 4.0**7, 4.0**8]),
        scale=st.sampled_from([1.0, 0.25, -1.0]),
        runs=runs if masked else st.just(()),
        shared=st.tuples(*[st.booleans()] * 3),
        is_causal=st.booleans(),
        sink=st.sampled_from([None, *FILLS[:4], 1e4]) if masked else st.none(),
    )


@dataclass
class Tensors:
    """float64, holding numbers that fp32 holds, and queries, keys, values and gradients such as the dtype has."""

    inputs: dict[str, Tensor]
    dout: Tensor
    dlse: Tensor


def make(problem: Problem, dtype: torch.dtype) -> Tensors:
    generator = torch.Generator().manual_seed(problem.seed)
    batch, heads, key_heads, queries, keys = problem.shape

    def halves(*shape: int) -> Tensor:
        return torch.randint(-int(2 * MOST), int(2 * MOST) + 1, shape, generator=generator).double() / 2

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).double()

    query, key = halves(batch, heads, queries, DIM), halves(batch, key_heads, keys, DIM)
    # Most scores of a row lie close to its top, some far below.
    side = problem.logits**0.5
    query[..., 0] = side * torch.tensor([1.0, 1.0, -1.0])[torch.randint(3, query.shape[:-1], generator=generator)]
    key[..., 0] = side * torch.tensor([1.0, 1.0, 1.0, 0.5, -1.0])[torch.randint(5, key.shape[:-1], generator=generator)]
    inputs = {"query": query, "key": key, "value": normal(batch, key_heads, keys, 5)}
    if problem.runs:
        sizes = [1 if one else size for one, size in zip(problem.shared, (batch, heads, queries), strict=True)]
        rows = torch.tensor([_row(runs, keys) for runs in problem.runs], dtype=torch.float64)
        bias = rows[torch.randint(len(rows), sizes, generator=generator)]
        inputs["bias"] = torch.where(bias == 0.0, halves(*bias.shape), bias)
    if problem.sink is not None:
        inputs["sinks"] = torch.full((heads,), problem.sink, dtype=torch.float32).double()
    return Tensors(inputs, normal(batch, heads, queries, 5), normal(batch, heads, queries).float().double())


def _row(runs: Iterable[tuple[float, int]], keys: int) -> list[float]:
    row = [fill for fill, length in runs for _ in range(length)]
    row += row[-1:] * (keys - len(row))
    # As fp32 holds them.
    return torch.tensor(row[:keys], dtype=torch.float32).tolist()


def expected(problem: Problem, tensors: Tensors, dtype: torch.dtype) -> Expected:
    """Output, lse, weights and every gradient, by the formulas of the softmax and its derivative, in float64."""
    x, scale = tensors.inputs, problem.scale
    query, (key, value) = x["query"], (_by_head(x[name], problem) for name in ("key", "value"))
    allowed = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool)
    allowed = allowed.tril() if problem.is_causal else allowed
    scores = query @ key.mT * scale
    assert torch.equal(scores, scores.float().double()), "products are exact"
    if "bias" in x:
        allowed = allowed & (x["bias"] > float("-inf"))
        scores = (scores + x["bias"]).float().double()
    scores = scores.masked_fill(~allowed, float("-inf"))
    sink = x["sinks"][:, None, None] if "sinks" in x else torch.tensor(float("-inf"))
    empty = ~allowed.expand(scores.shape).any(-1, keepdim=True)
    top = torch.maximum(scores.amax(-1, keepdim=True), sink)
    top = top.masked_fill(top == float("-inf"), 0.0)
    total = (scores - top).exp().sum(-1, keepdim=True) + (sink - top).exp()
    lse = top + total.log()
    p, p_sink = (_softmax(s, top, total) for s in (scores, sink.expand(top.shape)))

    # Of each the terms' sizes, and what they are multiplied with; where a narrow type underflows, too.
    least = torch.finfo(dtype).tiny * allowed
    p_size, sink_size = (weights * (1 + _finite(s - top).abs()) for weights, s in ((p, scores), (p_sink, sink)))
    p_size, sink_size = p_size + least, sink_size + torch.finfo(dtype).tiny
    dout, dlse = tensors.dout, tensors.dlse.masked_fill(empty[..., 0] & ("sinks" not in x), 0.0)[..., None]
    dp, dp_size = dout @ value.mT, dout.abs() @ value.abs().mT
    delta = (p * dp).sum(-1, keepdim=True) - dlse
    delta_size = (p_size * dp_size).sum(-1, keepdim=True) + dlse.abs()
    ds, ds_size = p * (dp - delta), p_size * (dp_size + delta_size) + least
    found = {
        "output": (p @ value, p_size @ value.abs()),
        "lse": (lse.masked_fill(lse == float("-inf"), 0.0)[..., 0], 1 + _finite(lse).abs()[..., 0]),
        "weights": (p, p_size),
        "dquery": (scale * ds @ key, abs(scale) * ds_size @ key.abs()),
        "dkey": (scale * ds.mT @ query, abs(scale) * ds_size.mT @ query.abs()),
        "dvalue": (p.mT @ dout, p_size.mT @ dout.abs()),
    }
    for name in ("dkey", "dvalue"):
        group = x["query"].shape[1] // x["key"].shape[1]
        found[name] = tuple(part.unflatten(1, (-1, group)).sum(2) for part in found[name])
    if "bias" in x:
        found["dbias"] = tuple(part.sum_to_size(x["bias"].shape) for part in (ds, ds_size))
    if "sinks" in x:
        found["dsinks"] = (-p_sink * delta).sum((0, 2, 3)), (sink_size * delta_size).sum((0, 2, 3))
    return found


def _by_head(x: Tensor, problem: Problem) -> Tensor:
    return x.repeat_interleave(problem.shape[1] // problem.shape[2], dim=1)


def _softmax(scores: Tensor, top: Tensor, total: Tensor) -> Tensor:
    return torch.where(scores > float("-inf"), (scores - top).exp() / total, 0.0)


def _finite(x: Tensor) -> Tensor:
    return x.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def results(problem: Problem, tensors: Tensors, impl: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same of ops.attention; bias and sinks are fp32."""
    names = {"query": dtype, "key": dtype, "value": dtype, "bias": torch.float32, "sinks": torch.float32}
    x = {name: tensors.inputs[name].to(names[name]).requires_grad_() for name in tensors.inputs}
    output, lse, weights = ops.attention(
        x["query"], x["key"], x["value"], x.get("bias"), is_causal=problem.is_causal, scale=problem.scale,
        sinks=x.get("sinks"), return_lse=True, return_weights=True, impl=impl,
    )  # fmt: skip
    finite = lse.masked_fill(lse == float("-inf"), 0.0)
    loss = (output * tensors.dout.to(dtype)).sum() + (finite * tensors.dlse.float()).sum()
    gradients = torch.autograd.grad(loss, list(x.values()))
    found = {"output": output, "lse": finite, "weights": weights}
    return found | {f"d{name}": gradient for name, gradient in zip(x, gradients, strict=True)}


def packed_results(problem: Problem, tensors: Tensors, impl: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output, lse and gradients of ops.varlen_attention, as `results` has them: every sequence is whole."""
    batch, _, _, queries, keys = problem.shape
    cu_seq_q, cu_seq_k = (offsets(torch.full((batch,), length)) for length in (queries, keys))
    layouts = {"query": Layout.of(cu_seq_q, queries, batch * queries)}
    layouts["key"] = layouts["value"] = Layout.of(cu_seq_k, keys, batch * keys)
    x = {
        name: layout.pack(tensors.inputs[name].transpose(1, 2)).to(dtype).requires_grad_()
        for name, layout in layouts.items()
    }
    options: dict[str, Any] = {"is_causal": problem.is_causal, "scale": problem.scale, "return_lse": True, "impl": impl}
    output, lse = ops.varlen_attention(*x.values(), cu_seq_q, cu_seq_k, queries, keys, **options)
    output, lse = (layouts["query"].unpack(part).transpose(1, 2) for part in (output, lse))
    loss = (output * tensors.dout.to(dtype)).sum() + (lse * tensors.dlse.float()).sum()
    gradients = torch.autograd.grad(loss, list(x.values()))
    unpacked = zip(x, layouts.values(), gradients, strict=True)
    found = {f"d{name}": layout.unpack(gradient).transpose(1, 2) for name, layout, gradient in unpacked}
    return {"output": output, "lse": lse} | found


def decoded_results(problem: Problem, tensors: Tensors, impl: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The output of ops.decode_attention for the last query of each sequence: it sees every key."""
    x = {name: tensors.inputs[name].to(dtype) for name in ("query", "key", "value")}
    lengths = torch.full((problem.shape[0],), problem.shape[4], dtype=torch.int32)
    caches = (x[name].transpose(1, 2).contiguous() for name in ("key", "value"))
    output = ops.decode_attention(x["query"][:, :, -1], *caches, lengths, scale=problem.scale, impl=impl)
    return {"output": output[:, :, None]}


def assert_right(found: dict[str, Tensor], truth: Expected, dtype: torch.dtype) -> None:
    """Each element errs by at most so many ROUNDINGS for each of its terms, and is 0 where it has none.

    A rounding is no finer than the step of the smallest numbers, which weights and gradients of fp16 reach.
    """
    for name, result in found.items():
        true, size = (part[:, :, -result.shape[2] :] if name == "output" else part for part in truth[name])
        assert result.shape == true.shape, f"{name}: expected shape {tuple(true.shape)}, got {tuple(result.shape)}"
        assert result.isfinite().all(), f"{name}: {(~result.isfinite()).sum().item()} elements are not finite"
        kind = torch.float32 if name == "lse" else dtype
        eps, step = torch.finfo(kind).eps, torch.finfo(kind).smallest_normal * torch.finfo(kind).eps
        excess = (result.double() - true).abs() - ROUNDINGS[kind] * (eps * size + step * (size > 0))
        worst = int(excess.argmax())
        assert excess.flatten()[worst] <= 0, (
            f"{name}: expected {true.flatten()[worst]:.6e}, got {result.flatten()[worst]:.6e},"
            f" {(result.double() - true).abs().flatten()[worst] / (eps * size.flatten()[worst]):.3g} roundings off"
        )
