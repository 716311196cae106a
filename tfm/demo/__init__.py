"""The bundled corpus: French sentences that a grammar wrote, each with its one English translation.

About one in sixteen combinations of two content words is reserved: no training sentence has both words, every held-out
sentence has at least one such combination, and each of its words is frequent in training (the systematicity split of
Lake and Baroni, "Generalization without Systematicity", 2018). tools/demo_corpus of the repository holds the grammar.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TRAINING, HELD_OUT = (Path(__file__).parent / f"{part}.tsv.gz" for part in ("training", "held_out"))
PHENOMENA = (
    "present", "past", "future", "agreement", "adjectives", "negation", "numbers", "professions", "idioms", "questions",
    "relative clauses", "possession", "contractions", "object pronouns", "infinitives",
)  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """A French sentence, its English translation, and the phenomenon it was written for (one of PHENOMENA)."""

    source: str
    target: str
    phenomenon: str


def corpus() -> tuple[list[Pair], list[Pair]]:
    """Reads the 24,000 training pairs and the 500 held-out pairs, both balanced over PHENOMENA.

    The first held-out pair is "je suis étudiant", "I am a student".
    """
    return _read(TRAINING), _read(HELD_OUT)


def accuracy_by_phenomenon(pairs: Sequence[Pair], translations: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Counts (translations equal to the target, pairs) for each phenomenon; spaces at the ends do not matter."""
    if len(pairs) != len(translations):
        raise ValueError(f"expected one translation for each of {len(pairs)} pairs, got {len(translations)}")
    counts = {phenomenon: (0, 0) for phenomenon in PHENOMENA if any(p.phenomenon == phenomenon for p in pairs)}
    for pair, translation in zip(pairs, translations, strict=True):
        correct, total = counts[pair.phenomenon]
        counts[pair.phenomenon] = correct + (translation.strip() == pair.target), total + 1
    return counts


def _read(path: Path) -> list[Pair]:
    pairs = []
    for line in gzip.decompress(path.read_bytes()).decode().splitlines():
        phenomenon, source, target = line.split("\t")
        pairs.append(Pair(source, target, phenomenon))
    return pairs
