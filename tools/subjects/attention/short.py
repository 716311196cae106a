"""Attention over few keys, the gradients of an attention's biases, and its weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from tfm.kernels import attention
from tfm.kernels.launch.attention import short as launch
from tfm.operators.attention import AttentionWeights
from tools.check_kernels.case import CHIPS, Case, merged
from tools.check_kernels.described import chip, described
from tools.subjects.attention.any_length import LENGTH, attention_call, backward_call

# What changes the code most: a bias, a mask as bits, neither on packed sequences, a mask of the keys beside a bias.
KINDS = ("bias", "mask", "packed", "bias keys")
TABLES = {
    "bf16": (launch.SHORT_FORWARD, launch.SHORT_BACKWARD),
    "fp32": (launch.SHORT_FORWARD_FP32, launch.SHORT_BACKWARD_FP32),
}
KERNELS = ("short_attention_forward", "short_attention_backward")


def short_attention_cases(every: bool) -> Iterator[Case]:
    """Yields every rule and dropout at once, at the rows of the launch settings, for either tensor core."""
    yield from merged(
        case
        for way, kernel in enumerate(KERNELS)
        for dtype, tables in TABLES.items()
        for row in _rows(dtype, tables[way], every)
        for case in _cases(*row)
        if case.name.split()[0] == kernel
    )


def _cases(dtype: str, dim: int, keys: int, kind: str, major: int) -> Iterator[Case]:
    """Yields the kernels of one call each way whose tiles are those keys; of two passes each by what it makes."""
    call = attention_call((dim, dim), f"{kind} dropout", dtype, keys)
    # With its gradient a bias asks for delta, too.
    backward = backward_call(call, "qkvbs" if "bias" in kind else "qkvs")
    for launched, arguments in ((attention.attention, call), (attention.attention_backward, backward)):
        for case in described("", launched, arguments, chip(major), capabilities=CHIPS[major]):
            blocks = case.arguments.get("TILE", (0, 0))
            if case.name.split()[0] not in KERNELS or blocks[1] != keys:
                continue
            made = [name for name in ("dv", "dq", "dk") if case.arguments.get(name) is not None]
            part = "".join(f" {name}" for name in made) if 0 < len(made) < 3 else ""
            capped = " capped" * (case.max_registers is not None)
            name = f"{case.name.split()[0]} {blocks[0]}x{keys} of {dim} {kind}{part} {dtype}{capped}"
            # The backward's tiles have the keys as rows.
            yield replace(
                case, name=name, matrix=_is_wide(dtype, blocks[0] if launched is attention.attention else keys)
            )


def score_cases(every: bool) -> Iterator[Case]:
    """Yields the gradients of biases, and the weights, at the head dims of the launch settings."""
    yield from merged(_score_cases(every))


def _score_cases(every: bool) -> Iterator[Case]:
    hungriest = ("bf16", 64), ("bf16", 128), ("bf16", 256), ("bf16", 464), ("fp32", 128)
    pairs = product(("bf16", "fp16", "fp32"), (16, 32, 64, 128, 256, 464)) if every else hungriest
    for (dtype, dim), (major, chips) in product(pairs, CHIPS.items()):
        # All sequences and heads share the bias.
        call = attention_call((dim, dim), "bias dropout", dtype, LENGTH, mask_shape=(1, 1))
        backward = backward_call(call, "b")
        for case in described(dtype, attention.attention_backward, backward, chip(major), capabilities=chips):
            if case.name.startswith("bias_gradient"):
                yield _named(case, dim, "", dtype)
        call = attention_call((dim, dim), "bias distance dropout", dtype, LENGTH, mask_shape=(1, 1))
        for case in described(
            dtype, attention.attention_backward, backward_call(call, "r"), chip(major), capabilities=chips
        ):
            if case.name.startswith("relative_bias_gradient"):
                # Squares are alike where the chips' other settings differ.
                yield _named(case, dim, f" for sm_{chips[0]}", dtype)
        for kind in ("bias", "mask") if every else ("bias",):
            call = attention_call((dim, dim), f"{kind} dropout", dtype, LENGTH)
            arguments = AttentionWeights(backward.statistics, *call)
            for case in described(dtype, attention.attention_weights, arguments, chip(major), capabilities=chips):
                yield _named(case, dim, f" {kind}", dtype)
    call = attention_call((64, 64), "bias", "bf16", LENGTH, mask_shape=(1, 1))
    for case in described("bf16", attention.attention_backward, backward_call(call, "b"), chip(9)):
        if case.name.startswith("sum_splits"):
            yield case
    call = attention_call((64, 64), "distance", "bf16", LENGTH)
    for case in described("bf16", attention.attention_backward, backward_call(call, "r"), chip(9)):
        if case.name.startswith("sum_distances"):
            yield case


def _named(case: Case, dim: int, kind: str, dtype: str) -> Case:
    queries, keys = case.arguments["TILE"]
    name = f"{case.name.split()[0]} {queries}x{keys} of {dim}{kind} {dtype}"
    return replace(case, name=name, matrix=_is_wide(dtype, queries))


def _rows(dtype: str, table: dict[tuple[int, int], object], every: bool) -> Iterator[tuple[str, int, int, str, int]]:
    """Yields (dtype, head dim, keys, kind, major) of every row of a table; narrower dims and fp16, too, where `every`.

    Elsewhere all of them in bf16 at 64, where most models are, and of the others the longest with its hungriest kind.
    """
    for dim, keys in table:
        common = dtype == "bf16" and dim == 64
        if not every and not common and (dim, keys) != max(row for row in table if row[0] == dim):
            continue
        dims = (16, 32, 64) if every and dim == 64 else (dim,)
        dtypes = ("bf16", "fp16") if every and dtype == "bf16" else (dtype,)
        yield from product(dtypes, dims, (keys,), KINDS if every or common else KINDS[:1], CHIPS)


def _is_wide(dtype: str, rows: int) -> bool:
    """Tells whether sm_90 must show HGMMA, which takes 64 rows; sentences are shorter (HMMA), and fp32 is exact."""
    return dtype != "fp32" and rows >= 64
