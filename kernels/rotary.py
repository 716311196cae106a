"""Rotary position embedding (Su et al., "RoFormer", 2021, equation 34) of queries and keys, out of place and in place.

Forward, for each pair (a, b) of a head's columns and its token's angle:

    a' = a · cos - b · sin        b' = b · cos + a · sin

Backward, the transpose: the same with -sin, scaled tables included.

Saved: the tables and positions, nothing of the size of a query.

Why it is fast: one launch for queries and keys, with any strides, so that views of a fused projection need no copy;
each is read and written once. A program reads its tokens' rows of the tables once for 8 heads: at 40 heads of 128
columns in bf16 they are an eighth of the traffic, from the cache. 8,192 such tokens are 168 MB: 39 µs at the speed of a
copy on an H200, 4.3 TB/s.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from tfm.kernels.launch import rotary as settings
from tfm.kernels.rows import side_by_side
from tfm.kernels.tape import Tape
from tfm.operators.rotary import Rotary, Rotary_


@triton.jit
def load_angle(table, place, places, stride, column_stride, column, inside):
    """Loads cos or sin of a tile in fp32; NaN where the table has no such row."""
    pointer = table + place.to(tl.int64) * stride + column * column_stride
    return tl.load(pointer, mask=inside & (place >= 0) & (place < places), other=float("nan")).to(tl.float32)


@triton.jit
def turn(
    x, y, c, s, known, batch, place, first_head, last_head, turned, half, columns,
    x_batch, x_head, x_token, y_batch, y_head, y_token,
    INTERLEAVED: tl.constexpr, IN_PLACE: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Turns the heads from `first_head` to `last_head` of a tile of tokens; those from `turned` on are copied."""
    x_row = x + batch * x_batch + place * x_token
    y_row = y + batch * y_batch + place * y_token
    column = tl.arange(0, BLOCK_HALF)[None, :]
    inside = known & (column < half)
    both = tl.arange(0, 2 * BLOCK_HALF)[None, :]
    for head in range(first_head, last_head):
        source = x_row + tl.cast(head, tl.int64) * x_head
        target = y_row + tl.cast(head, tl.int64) * y_head
        if INTERLEAVED:
            pair = tl.load(source + both, mask=known & (both < 2 * half), other=0.0).to(tl.float32)
            a, b = tl.split(tl.reshape(pair, [c.shape[0], BLOCK_HALF, 2]))
        else:
            a = tl.load(source + column, mask=inside, other=0.0).to(tl.float32)
            b = tl.load(source + half + column, mask=inside, other=0.0).to(tl.float32)
        turned_a = tl.where(head < turned, a * c - b * s, a)
        turned_b = tl.where(head < turned, b * c + a * s, b)
        if INTERLEAVED:
            pair = tl.reshape(tl.join(turned_a, turned_b), [c.shape[0], 2 * BLOCK_HALF])
            tl.store(target + both, pair, mask=known & (both < 2 * half))
        else:
            tl.store(target + column, turned_a, mask=inside)
            tl.store(target + half + column, turned_b, mask=inside)
        if BLOCK_REST > 0 and not IN_PLACE:
            rest = 2 * half + tl.arange(0, BLOCK_REST)[None, :]
            unturned = known & (rest < columns)
            tl.store(target + rest, tl.load(source + rest, mask=unturned), mask=unturned)


@triton.jit(do_not_specialize=["tokens", "length", "period", "places", "turned", "x_heads", "other_heads", "x_groups"])
def rotary_kernel(
    x, y, other, other_y, cos, sin, positions,
    tokens, x_heads, other_heads, turned, length, period, places, half, columns, x_groups,
    x_batch, x_head, x_token, y_batch, y_head, y_token,
    other_batch, other_head, other_token, other_y_batch, other_y_head, other_y_token, angle_stride, angle_column,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, IN_PLACE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, GROUP: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Each program turns GROUP heads of BLOCK_TOKENS tokens: the first `x_groups` x's, the others `other`'s."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)[:, None]
    known = token < tokens
    batch, place = token // length, token % length
    angle = token % period
    if positions is not None:
        angle = tl.load(positions + angle, mask=known, other=0)
    column = tl.arange(0, BLOCK_HALF)[None, :]
    c = load_angle(cos, angle, places, angle_stride, angle_column, column, known & (column < half))
    s = load_angle(sin, angle, places, angle_stride, angle_column, column, known & (column < half))
    s = -s if INVERSE else s
    group = tl.program_id(1)
    if other is None or group < x_groups:
        turn(
            x, y, c, s, known, batch, place, group * GROUP, tl.minimum((group + 1) * GROUP, x_heads), turned,
            half, columns, x_batch, x_head, x_token, y_batch, y_head, y_token,
            INTERLEAVED, IN_PLACE, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip
    else:
        group -= x_groups
        turn(
            other, other_y, c, s, known, batch, place, group * GROUP, tl.minimum((group + 1) * GROUP, other_heads),
            other_heads, half, columns, other_batch, other_head, other_token,
            other_y_batch, other_y_head, other_y_token, INTERLEAVED, IN_PLACE, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip


def rotary(tape: Tape, call: Rotary) -> tuple[Tensor, Tensor | None]:
    """Computes the operator out of place. One launch."""
    outputs = y, other_y = tape.outputs(call)
    x, other = side_by_side(call.x), side_by_side(call.other)
    _launch(tape, call, x, y, other, other_y, call.turned, call.inverse)
    return outputs


def rotary_(tape: Tape, call: Rotary_) -> None:
    """Computes the operator in place. One launch; two copies more where columns are not neighbours."""
    part = call.x.narrow(1, 0, call.heads)
    x = side_by_side(part)
    _launch(tape, call, x, x, None, None, call.heads, inverse=False)
    if x is not part:
        part.copy_(x)


def _launch(
    tape: Tape, call: Rotary | Rotary_, x: Tensor, y: Tensor, other: Tensor | None, other_y: Tensor | None,
    turned: int, inverse: bool,
) -> None:  # fmt: skip
    """Turns `x` into `y` and `other` into `other_y`, all with their columns side by side, by the angles of `call`."""
    packed = x.dim() == 3
    shape = x.shape[:1] if packed else (x.shape[0], x.shape[2])
    cos, sin, positions = call.cos, call.sin, call.positions
    tokens, columns, half = math.prod(shape), x.shape[-1], cos.shape[-1]
    if tokens == 0 or columns == 0:
        return
    if positions is None:
        cos, sin = (_rows_of(table, shape) for table in (cos, sin))
        period = len(cos)
    else:
        positions = _repeating(positions, shape)
        period = positions.numel()
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    heads, other_heads = x.shape[1], 0 if other is None else other.shape[1]
    tiles = settings.tiles(tokens, half, columns)
    groups, other_groups = (-(-number // tiles.group) for number in (heads, other_heads))
    strides: dict[str, int] = {}
    for name, tensor in (("x", x), ("y", y), ("other", other), ("other_y", other_y)):
        steps = (0, 0, 0) if tensor is None else tensor.stride()[:3]
        batch, head, token = (0, steps[1], steps[0]) if packed else steps
        strides |= {f"{name}_batch": batch, f"{name}_head": head, f"{name}_token": token}
    tape.launch(
        rotary_kernel, (tiles.programs, groups + other_groups), tiles.options,
        x=x, y=y, other=other, other_y=other_y, cos=cos, sin=sin, positions=positions,
        tokens=tokens, x_heads=heads, other_heads=other_heads, turned=turned,
        length=tokens if packed else shape[1], period=period, places=len(cos), half=half, columns=columns,
        x_groups=groups, **strides, angle_stride=cos.stride(0), angle_column=cos.stride(1),
        INTERLEAVED=call.interleaved, INVERSE=inverse, IN_PLACE=x is y,
        BLOCK_TOKENS=tiles.block_tokens, GROUP=tiles.group, BLOCK_HALF=tiles.block_half, BLOCK_REST=tiles.block_rest,
    )  # fmt: skip


def _repeating(values: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Returns one value for each token, or for each of those that repeat along the leading dimensions."""
    while values.dim() and values.shape[0] == 1:
        values = values[0]
    if tuple(values.shape) != tuple(shape[len(shape) - values.dim() :]):
        values = values.expand(shape)
    return values.contiguous()


def _rows_of(table: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Returns a row of the table for each token, or for each of those that repeat, as `_repeating`."""
    while table.dim() > 1 and table.shape[0] == 1:
        table = table[0]
    if tuple(table.shape[:-1]) != tuple(shape[len(shape) - table.dim() + 1 :]):
        table = table.expand(*shape, table.shape[-1])
    return table.reshape(table.shape[:-1].numel(), table.shape[-1])
