"""What the tests of the embedding's backends share: tokens, what is run on them, and the paper's positions."""

from __future__ import annotations

import math

import oracle
import torch

from tfm import ops

SEED, SITE, SCALE = -0x0123456789ABCDEF, 2, 2.5


def paper(positions, dim: int) -> torch.Tensor:
    """PE(pos, 2i) = sin(pos / 10000^(2i/dim)), PE(pos, 2i + 1) = cos(the same), one element at a time."""
    rows = [
        [(math.cos if j % 2 else math.sin)(position / 10000 ** ((j - j % 2) / dim)) for j in range(dim)]
        for position in positions
    ]
    return torch.tensor(rows, dtype=torch.float64).view(len(positions), dim)


def run(impl, tokens, weight, positions, position_weight, cotangent, p=0.3, padding_idx=None, **options):
    """(y, dweight) or, with a table of positions, (y, dweight, dpositions)."""
    tables = [weight, *([] if position_weight is None else [position_weight])]
    fixed = {"scale": SCALE, "dropout_p": p, "padding_idx": padding_idx, "seed": SEED, "site": SITE, "impl": impl}
    y = ops.embedding(tokens, weight, positions, position_weight=position_weight, **(fixed | options))
    return [y.detach(), *torch.autograd.grad(y, tables, cotangent.to(y.dtype))]


def assert_kernel_matches(tokens, dim, vocabulary, dtype=torch.float32, learned=False, impl="triton", **options):
    """With positions counted in the last dimension of `tokens`."""
    positions = torch.arange(tokens.shape[-1], device=tokens.device)
    tables = [torch.randn(vocabulary, dim), torch.randn(tokens.shape[-1] + 3, dim) if learned else None]
    given = [None if t is None else t.to(tokens.device, dtype).requires_grad_() for t in tables]
    wide = [None if t is None else t.detach().double().requires_grad_() for t in given]
    cotangent = torch.randn(*tokens.shape, dim, device=tokens.device)
    actual, truth, plain = (
        run(backend, tokens, weight, positions, position_weight, cotangent, **options)
        for backend, (weight, position_weight) in ((impl, given), ("reference", wide), ("reference", given))
    )
    oracle.assert_all_match(actual, truth, plain, ("y", "weight", "positions")[: len(actual)])


# Tokens that fill whole chunks of 32, and that do not.
TOKENS = {
    "few": lambda: torch.randint(11, (3, 5)),
    "one": lambda: torch.full((100,), 7),
    "chunks": lambda: torch.tensor([1] * 31 + [2] * 33 + [5] * 64 + [6] + [9] * 95 + [10] * 32),
    "shuffled": lambda: torch.randint(3, (2, 90)),
}
