"""Token embedding: gather with positions and dropout, and its gradient's two kernels."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from tfm import ops
from tfm.kernels import embedding
from tfm.operators.embedding import Embedding, EmbeddingBackward
from tools.check_kernels.case import Case
from tools.check_kernels.described import chip, described, meta
from tools.host import sizes
from tools.host.call import Call
from tools.subjects import inputs
from tools.subjects.inputs import Outputs, Pass, Tensors

TOKENS, VOCABULARY = 8192, 32768


def compiled(every: bool) -> Iterator[Case]:
    """Yields cases with dropout; the forward with the sinusoid, which takes more registers; int64 tokens."""
    tokens, seed, on = meta(TOKENS, dtype="i64"), meta(dtype="i64"), chip(9)
    for dtype in ("bf16", "fp16", "fp32"):
        for columns in (16, 63, 512, 1000, 1024, 4096) if every else (512, 1000):
            label, weight = f"{columns} {dtype}", meta(VOCABULARY, columns, dtype=dtype)
            for learned in (False, True) if every else (False,):
                call = Embedding(
                    tokens, weight, tokens, weight if learned else None, seed, scale=2.0, dropout_p=0.1, site=0
                )
                yield from described(f"{'learned ' * learned}{label}", embedding.embedding, call, on)
            for sparse in (False, True):
                backward = EmbeddingBackward(
                    meta(TOKENS, columns, dtype=dtype), tokens, seed, scale=2.0, dropout_p=0.1, site=0,
                    rows=VOCABULARY, padding_idx=0, dtype=weight.dtype, sparse=sparse,
                )  # fmt: skip
                yield from described(f"{'sparse ' * sparse}{label}", embedding.embedding_backward, backward, on)


def pass_embedding(new: Tensors) -> Iterator[Outputs]:
    tokens, positions = new.below(inputs.CLASSES, inputs.ROWS), new.below(inputs.WIDTH, inputs.ROWS)
    weight, learned = new(inputs.CLASSES, inputs.COLUMNS), new(inputs.WIDTH, inputs.COLUMNS)
    for table in (None, learned):
        yield ops.embedding(tokens, weight, positions, position_weight=table, dropout_p=inputs.DROPOUT_P, padding_idx=0)
    # One token occurs so often that its rows are added up in parts.
    often = new.below(inputs.WIDTH, 3 * inputs.ROWS)
    often[3:] = 5
    for sparse in (False, True):
        yield ops.embedding(
            often, learned, new.below(inputs.WIDTH, 3 * inputs.ROWS), dropout_p=inputs.DROPOUT_P, sparse=sparse
        )


PASSES: dict[str, Pass] = {
    "embedding": pass_embedding,
}


def timed(seed: Tensor) -> list[Call]:
    """Returns the calls whose launches are counted and whose host time is told."""
    tokens, positions = torch.randint(0, sizes.CLASSES, (sizes.TOKENS,)), torch.arange(sizes.TOKENS)
    weight, learnt = sizes.leaf(sizes.CLASSES, sizes.WIDTH), sizes.leaf(sizes.TOKENS, sizes.WIDTH)
    call = partial(ops.embedding, tokens, weight, positions, scale=8.0, dropout_p=0.1, seed=seed)
    return [
        Call("embedding", call, (weight,)),
        Call("embedding, learnt positions", partial(call, position_weight=learnt), (weight, learnt)),
    ]
