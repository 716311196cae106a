"""Masks as bits: one launch for what tfm.operators.attention.mask_bits describes."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tfm.kernels.attention.visible import Window, allowed_tile, first_position
from tfm.kernels.launch.attention import any_length as launch
from tfm.kernels.tape import Tape
from tfm.operators.attention import AttentionMaskBits

COUNTS = ("heads", "word_sequences", "queries", "keys", "start")
STEPS = ("mask_b", "mask_h", "mask_q", "words_b", "words_h", "words_q", "reach_b", "reach_h")


@triton.jit(do_not_specialize=[*COUNTS, *STEPS])
def mask_bits_kernel(
    mask, words, reach, starts,
    mask_b, mask_h, mask_q, mask_k, words_b, words_h, words_q, reach_b, reach_h,
    heads, word_sequences, queries, keys, start, window,
    BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """Each program packs BLOCK_KEYS keys of one (sequence, head), all queries of them."""
    sequence, head = tl.program_id(0).to(tl.int64) // heads, tl.program_id(0) % heads
    column = tl.program_id(1) * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    word = tl.program_id(1) * (BLOCK_KEYS // 32) + tl.arange(0, BLOCK_KEYS // 32)
    mask += sequence * mask_b + head * mask_h
    position = first_position(sequence, starts, start)
    reached = tl.zeros([BLOCK_KEYS // 32], tl.int32)
    # A bound rather than one more condition: triton 3.9's interpreter takes no scalar beside a block as a mask.
    written = tl.where(sequence < word_sequences, queries, 0)
    for first in range(0, queries, BLOCK_QUERIES):
        row = first + tl.arange(0, BLOCK_QUERIES)
        inside = (row < queries)[:, None] & (column < keys)[None, :]
        address = mask + row.to(tl.int64)[:, None] * mask_q + column.to(tl.int64)[None, :] * mask_k
        if mask.dtype.element_ty == tl.int1:
            allowed = tl.load(address, mask=inside, other=0) != 0
        else:
            allowed = tl.load(address, mask=inside, other=float("-inf")).to(tl.float32) != float("-inf")
        if words is not None:
            place = words + sequence * words_b + head * words_h + row.to(tl.int64)[:, None] * words_q + word[None, :]
            tl.store(place, pack(allowed), mask=(row < written)[:, None])
        allowed &= allowed_tile(
            column < keys, row, column, None, position, window, None, 0, keys, BLOCK_KEYS, KEYS_ARE_ROWS=False
        )
        # Bits of a word are summed once each: first whether any query has them, then the word.
        reached |= tl.reshape(pack((tl.max(allowed.to(tl.int32), axis=0) != 0)[None, :]), [BLOCK_KEYS // 32])
    tl.store(reach + sequence * reach_b + head * reach_h + word, reached)


@triton.jit
def pack(bits):
    """Packs int1 [R, C] into int32 [R, C // 32]: column j is bit j % 32 of word j // 32."""
    grouped = tl.reshape(bits.to(tl.int32), [bits.shape[0], bits.shape[1] // 32, 32])
    return tl.sum(grouped << tl.arange(0, 32)[None, None, :], axis=2)


def attention_mask_bits(tape: Tape, call: AttentionMaskBits) -> tuple[Tensor, Tensor]:
    """Computes (words, reach) of the operator. One launch."""
    words, reach = tape.outputs(call)
    mask, window = call.mask, Window.closed(call.left, call.right)
    batch, heads, queries, keys = mask.shape
    tiles = launch.mask_bits(queries)
    if call.has_one_row:
        # Its reach is the row itself: the window is the attention kernels' business.
        queries, window = min(queries, 1), Window.closed(None, None)
    tape.launch(
        mask_bits_kernel, (reach.shape[0] * heads, reach.shape[-1] * 32 // tiles.block_columns), tiles.options,
        mask=mask, words=words if words.numel() > 0 else None, reach=reach, starts=call.starts,
        mask_b=mask.stride(0) if batch > 1 else 0, mask_h=mask.stride(1), mask_q=mask.stride(2), mask_k=mask.stride(3),
        words_b=words.stride(0), words_h=words.stride(1), words_q=words.stride(2),
        reach_b=reach.stride(0), reach_h=reach.stride(1),
        heads=heads, word_sequences=batch, queries=queries, keys=keys, start=call.start, window=window,
        BLOCK_QUERIES=tiles.block_rows, BLOCK_KEYS=tiles.block_columns,
    )  # fmt: skip
    return words, reach
