"""Settings of attention of few queries over many keys, which programs share.

Elsewhere a program goes over all keys of its queries. A draft to verify or the beams of a long source are one tile of
queries, so that 8 heads of one sequence were 8 programs for an H200's 132 multiprocessors, and each would read its
8,000 keys alone, at some 30 GB/s. So their keys are cut every 256, as a decoding step's are
(tfm.kernels.launch.decode_attention), into 256 programs there: two on a multiprocessor. A piece's sums of 16 queries
are an eighth of the bytes of its keys and values in bf16, written and read once more by a second launch of some 2 µs,
which fewer keys than 2,048 do not repay.

Whether and how keys are cut follows from the longest sequence and the window alone, not from the number of sequences,
and so do the bits: where these fill the GPU anyway, that eighth is the price. Sentences have too few keys.

A tile has the 16 queries that a tensor core takes, not the 64 of HGMMA: bytes count here, not products, and its sums
are so few registers that no rule of the scores makes it smaller.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tfm.kernels.launch.attention.any_length import AttentionTiles, dims_class

# More queries are another tile, which would read the keys again.
MOST_QUERIES, LEAST_KEYS = 16, 2048


@dataclass(frozen=True)
class SplitTiles(AttentionTiles):
    """Tiles of a program that takes `split_keys` keys, from the first that its queries see."""

    split_keys: int = 256

    @property
    def tiles(self) -> int:
        """The tiles of a program."""
        return self.split_keys // self.block_keys

    def splits(self, seen: int, keys: int) -> int:
        """Returns how many programs share what queries see, `seen` of so many keys, which begin anywhere in a tile."""
        tiles = min(-(-seen // self.block_keys) + 1, -(-keys // self.block_keys))
        return -(-tiles // self.tiles)


# By class of head dims.
SPLIT_FORWARD = {
    64: SplitTiles(16, 64, 4, 3), 128: SplitTiles(16, 64, 4, 2), 192: SplitTiles(16, 32, 4, 2),
    256: SplitTiles(16, 32, 4, 2), 512: SplitTiles(16, 32, 4, 2),
}  # fmt: skip
SPLIT_FORWARD_FP32 = {
    64: SplitTiles(16, 32, 4, 2), 128: SplitTiles(16, 32, 8, 2), 192: SplitTiles(16, 32, 8, 2),
    256: SplitTiles(16, 32, 8, 2), 512: SplitTiles(16, 32, 8, 2),
}  # fmt: skip


def split_forward(max_q: int, seen: int, dim: int, value_dim: int, dtype: torch.dtype) -> SplitTiles | None:
    """Returns the tiles of programs that share keys, or None where each takes all of its queries' keys.

    `seen` are the most keys that a tile's queries see.
    """
    if max_q > MOST_QUERIES or seen < LEAST_KEYS:
        return None
    return (SPLIT_FORWARD_FP32 if dtype == torch.float32 else SPLIT_FORWARD)[dims_class(dim, value_dim)]
