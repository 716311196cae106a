"""Attention over a cache: bytes on their way to a program, and from how many keys on a row is cut.

The least times on an H200 (4.3 TB/s) in bf16: 3.8 µs for 256 hypotheses of 30 tokens and 8 heads of 64; 11 µs for 2,048
of them in beams of 4, which read 126 MB of 49 MB, the rest from the second-level cache; 244 µs for 16 rows of 4,000
tokens and 32 heads of 128, and 61 µs where four query heads share a key head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from benchmarks.bench_decode_attention import SUITE
from benchmarks.shapes import Decoding
from benchmarks.suite import FORWARD
from tfm.kernels.launch.decode_attention import DecodeTiles
from tools.tune.candidates.sweep import Arguments, LaunchSweep

# Keys of a tile, keys of a piece, warps, tiles on their way to a program, and the expected share of today's time.
SENTENCES = (
    (32, 256, 1, 1, 1.00),
    (64, 256, 2, 1, 0.98),
    (32, 256, 1, 2, 1.03),
)
PIECES = (
    (32, 256, 2, 1, 1.00),
    (32, 512, 2, 1, 0.99),
    (32, 256, 4, 2, 0.96),
    (32, 512, 4, 2, 0.94),
    (32, 1024, 4, 3, 0.96),
    (64, 512, 4, 1, 0.97),
    (16, 256, 1, 1, 1.03),
)
SHARED = (
    (32, 256, 4, 2, 1.00),
    (32, 256, 4, 3, 0.97),
    (64, 256, 4, 2, 0.93),
    (64, 512, 4, 3, 0.92),
    (128, 512, 8, 2, 0.95),
)


def tiles(
    current: DecodeTiles, arguments: Arguments, keys: int, piece: int, warps: int, stages: int
) -> Iterator[DecodeTiles]:
    yield replace(current, block_keys=keys, split_keys=piece, num_warps=warps, stages=stages)


SWEEPS = (
    LaunchSweep(
        "decode_attention.tiles", SUITE, FORWARD,
        question="A warp asks for 8 KB at once and 20 lie on a multiprocessor: is that enough where a program takes"
        " one tile, and does the table of ancestors cost its latency again?",
        prediction="256 hypotheses take 7 µs, 2,048 in beams 25 µs; 64 keys in two warps are within 2 %.",
        sizes=[Decoding(256, 30, 8, 64), Decoding(2048, 30, 8, 64, beam=4)],
        rehearsal=Decoding(2, 5, 2, 16, beam=2), table=SENTENCES, settings=tiles,
    ),
    LaunchSweep(
        "decode_attention.tiles", SUITE, FORWARD,
        question="Which tiles, on their way while another is computed with, keep memory busy over thousands of keys?",
        prediction="Today's reach 80 % of a copy at 4,000 keys (305 µs); two tiles on their way, cut every 512, 85 %.",
        sizes=[Decoding(16, 2000, 32, 128), Decoding(16, 4000, 32, 128)],
        rehearsal=Decoding(1, 300, 1, 16), table=PIECES, settings=tiles,
    ),
    LaunchSweep(
        "decode_attention.tiles", SUITE, FORWARD,
        question="Query heads that share keys multiply by tensor cores from shared memory: how wide a tile?",
        prediction="Today's take 80 µs at 4,000 keys of 8 heads, 76 % of a copy; 64 keys a tile 74 µs.",
        sizes=[Decoding(16, 4000, 32, 128, key_heads=8)],
        rehearsal=Decoding(1, 300, 2, 16, key_heads=1), table=SHARED, settings=tiles,
    ),
)  # fmt: skip
