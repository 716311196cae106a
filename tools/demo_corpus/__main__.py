"""Writes the bundled corpus where the package keeps it."""

from __future__ import annotations

import gzip

from tfm.demo import HELD_OUT, TRAINING, Pair
from tools.demo_corpus.sampling import draw


def packed(pairs: list[Pair]) -> bytes:
    """Writes one line a pair: phenomenon, source and target, separated by tabs; gzip without a time or a name."""
    lines = "".join(f"{pair.phenomenon}\t{pair.source}\t{pair.target}\n" for pair in pairs)
    return gzip.compress(lines.encode(), mtime=0)


def main() -> None:
    for path, pairs in zip((TRAINING, HELD_OUT), draw(), strict=True):
        path.write_bytes(packed(pairs))
        print(f"{path}: {len(pairs):,} pairs, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
