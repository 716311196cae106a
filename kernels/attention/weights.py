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

from tfm.kernels.attention.arguments import VARYING, common_arguments, dense_rows
from tfm.kernels.attention.heads import head_of, products_of
from tfm.kernels.attention.scores import load_statistics, rows_of, scores_of, unit_of
from tfm.kernels.attention.visible import allowed_tile, first_position, locate, reached, word_rows
from tfm.kernels.launch.attention import scores as launch
from tfm.kernels.philox import keep_mask
from tfm.kernels.softmax import exponent
from tfm.kernels.tape import Tape
from tfm.operators.attention import AttentionWeights


@triton.jit(do_not_specialize=[*VARYING, "query_tiles", "key_tiles"])
def attention_weights_kernel(
    q, k, bias, statistics, weights, mask, lengths, window, score, dropout,
    heads, group, query_size, key_size, row_words, row_kind, query_tiles, key_tiles, start, site,
    DIMS: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Each program writes BLOCK_QUERIES x BLOCK_KEYS weights of one (sequence, head); neighbours share queries."""
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
    if mask.reach is not None or mask.keys is not None:
        inside &= reached(mask, sequence, head, heads, column, inside, row_words, key_size)

    q_head, k_head = head_of(q, sequence, head, 0), head_of(k, sequence, head // group, 0)
    products = products_of(q_head, q, row, is_row, k_head, k, column, inside, DIMS, PRECISION)
    unit = unit_of(score)
    scores, _ = scores_of(
        products, score, unit, bias, sequence, head, row[:, None], column[None, :], position,
        is_row[:, None] & inside[None, :],
    )  # fmt: skip
    IS_BIASED: tl.constexpr = bias is not None or score.relative_bias is not None
    words = word_rows(mask, sequence, head, heads, query_size, row_words)
    allowed = allowed_tile(
        inside, row, column, is_row, position, window, words, first_column, row_words, BLOCK_KEYS, KEYS_ARE_ROWS=False
    )
    place = rows_of(sequence, head, 0, heads, query_size, row_kind, None) + row
    top, log_sum = load_statistics(statistics + place, row_kind, is_row)
    most = tl.where(allowed, 0.0, float("-inf"))
    result = tl.exp2(exponent(scores, unit, top[:, None], log_sum[:, None], most, IS_BIASED))
    if dropout.seed is not None:
        keep = keep_mask(row[:, None], first_column, pair, site, dropout.seed, dropout.threshold, BLOCK_KEYS)
        result = tl.where(keep, result * tl.cast(dropout.keep_scale, tl.float32), 0.0)
    address = weights + (pair.to(tl.int64) * query_size + row)[:, None] * key_size + column[None, :]
    tl.store(address, result, mask=is_row[:, None] & (column < key_size)[None, :])


def attention_weights(tape: Tape, call: AttentionWeights) -> Tensor:
    """Computes the weights of the operator. One launch."""
    weights, attention = tape.outputs(call), call.attention
    tiles = launch.attention_weights(call.query.dtype, tape.chip(call.query.device).major)
    query_tiles, key_tiles = -(-call.max_q // tiles.block_queries), -(-call.max_k // tiles.block_keys)
    tape.launch(
        attention_weights_kernel, (query_tiles * key_tiles * attention.sequences * attention.heads,), tiles.options,
        **common_arguments(attention_weights_kernel, attention, whole=True),
        statistics=dense_rows(attention, call.statistics), weights=weights,
        query_tiles=query_tiles, key_tiles=key_tiles, TILE=(tiles.block_queries, tiles.block_keys),
    )  # fmt: skip
    return weights
