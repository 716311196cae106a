"""Token embedding: gather with positions and dropout, and its gradient's two kernels."""

from __future__ import annotations

from collections.abc import Iterator

from tfm.kernels import embedding
from tfm.operators.embedding import Embedding, EmbeddingBackward
from tools.check_kernels.cases.case import Case
from tools.check_kernels.described import chip, described, meta

TOKENS, VOCABULARY = 8192, 32768


def embedding_cases(every: bool) -> Iterator[Case]:
    """With dropout; the forward with the sinusoid, which takes more registers than a table; int64 tokens."""
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
