"""The softmax weights of an attention that has run, from one more pass over q and k.

    weights = dropout(exp(s - top) / Σ)

in the dtype of the query, with the scores s and the two numbers of each row of the attention's forward: what
nn.MultiheadAttention returns beside its output. No gradient. Read: q and k once for each tile, from the second-level
cache after the first; written: B · Hq · Sq · Sk elements, each by one program of the single launch, and those bytes are
what the time goes to.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tfm.kernels.attention.arguments import VARYING, common_arguments, dense_statistics
from tfm.kernels.attention.scores import (
    add_bias,
    bend,
    column_bits,
    first_number,
    first_position,
    is_allowed,
    load_rows,
    load_statistics,
    locate,
    mask_tile,
    unit_of,
    words_of,
)
from tfm.kernels.launch.attention import scores as launch
from tfm.kernels.philox import keep_mask
from tfm.kernels.softmax import exponent
from tfm.kernels.tape import Tape
from tfm.operators.attention import AttentionWeights


@triton.jit(do_not_specialize=[*VARYING, "query_tiles", "key_tiles"])
def attention_weights_kernel(
    q, k, bias, words, reach, seed, lengths, statistics, weights,
    words_b, words_h, words_s, reach_b, reach_h, row_kind, row_h,
    heads, group, query_size, key_size, query_tiles, key_tiles, start, left, right, score, threshold, keep_scale, site,
    DIMS: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Each program writes BLOCK_QUERIES x BLOCK_KEYS weights of one (sequence, head); neighbours share queries."""
    DIM: tl.constexpr = DIMS[0]
    BLOCK_DIM: tl.constexpr = DIMS[1]
    BLOCK_QUERIES: tl.constexpr = TILE[0]
    BLOCK_KEYS: tl.constexpr = TILE[1]
    program = tl.program_id(0)
    first_column = program % key_tiles * BLOCK_KEYS
    first_row = program // key_tiles % query_tiles * BLOCK_QUERIES
    pair = program // key_tiles // query_tiles
    sequence, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    _, key_length = locate(sequence, None, lengths.key_lengths, key_size)
    position = first_position(sequence, lengths.starts, start)
    row, column = first_row + tl.arange(0, BLOCK_QUERIES), first_column + tl.arange(0, BLOCK_KEYS)
    is_row, inside = row < query_size, column < key_length
    if reach is not None:
        inside &= column_bits(reach + sequence * reach_b + head * reach_h, column, inside)

    query = load_rows(q.data + sequence * q.b + head * q.h, q, row, is_row, DIM, 0, BLOCK_DIM)
    key = load_rows(k.data + sequence * k.b + head // group * k.h, k, column, inside, DIM, 0, BLOCK_DIM)
    products = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    scores, _ = bend(products, score)
    unit = unit_of(score)
    if bias is not None:
        address = bias.data + sequence * bias.b + head * bias.h + row.to(tl.int64)[:, None] * bias.s
        address += column.to(tl.int64)[None, :] * bias.d
        scores = add_bias(scores, unit, address, is_row[:, None] & inside[None, :])
    allowed = inside[None, :]
    if left is not None or right is not None:
        allowed &= is_allowed(row[:, None], column[None, :], position, left, right, key_length)
    if words is not None:
        head_words = words_of(words, sequence, head, words_b, words_h)
        allowed &= mask_tile(head_words, row, words_s, is_row, first_column, BLOCK_KEYS)
    place = first_number(sequence, head, 0, heads, row_h, None) + row
    top, log_sum = load_statistics(statistics + place, row_kind, is_row)
    most = tl.where(allowed, 0.0, float("-inf"))
    result = tl.exp2(exponent(scores, unit, top[:, None], log_sum[:, None], most, bias is not None))
    if seed is not None:
        keep = keep_mask(row[:, None], first_column, sequence * heads + head, site, seed, threshold, BLOCK_KEYS)
        result = tl.where(keep, result * tl.cast(keep_scale, tl.float32), 0.0)
    address = weights + (pair.to(tl.int64) * query_size + row)[:, None] * key_size + column[None, :]
    tl.store(address, result, mask=is_row[:, None] & (column < key_size)[None, :])


def attention_weights(tape: Tape, call: AttentionWeights) -> Tensor:
    """The weights, as the operator says. One launch."""
    weights, attention = tape.outputs(call), call.attention
    tiles = launch.attention_weights(call.query.dtype, tape.chip(call.query.device).major)
    query_tiles, key_tiles = -(-call.max_q // tiles.block_queries), -(-call.max_k // tiles.block_keys)
    tape.launch(
        attention_weights_kernel, (query_tiles * key_tiles * attention.sequences * attention.heads,), tiles.options,
        **common_arguments(attention_weights_kernel, attention, whole=True),
        statistics=dense_statistics(attention, call.statistics), weights=weights,
        query_tiles=query_tiles, key_tiles=key_tiles, TILE=(tiles.block_queries, tiles.block_keys),
    )  # fmt: skip
    return weights
