"""Training and held-out pairs from the grammar, separate as tfm.demo promises."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from random import Random
from zlib import crc32

from tfm.demo import PHENOMENA, Pair
from tools.demo_corpus import statements, structures
from tools.demo_corpus.lexicon import PRONOUNS
from tools.demo_corpus.morphology import english_text, french_text
from tools.demo_corpus.phrases import Phrase
from tools.demo_corpus.verbs import VERBS

CONSTRUCTIONS: dict[str, Callable[[Random], Phrase]] = {
    "present": statements.present,
    "past": statements.past,
    "future": statements.future,
    "agreement": statements.agreement,
    "adjectives": statements.adjectives,
    "negation": statements.negation,
    "numbers": statements.numbers,
    "professions": statements.professions,
    "idioms": statements.idioms,
    "questions": structures.questions,
    "relative clauses": structures.relatives,
    "possession": structures.possession,
    "contractions": structures.contractions,
    "object pronouns": structures.pronouns,
    "infinitives": structures.infinitives,
}
HELD_OUT = 500
MIN_WORDS, MAX_WORDS = 2, 20
RESERVED_ONE_IN = 16
# A held-out word occurs at least once in this many training pairs, fifteen times in the default 24,000.
PAIRS_PER_OCCURRENCE = 1600
TRIES = 400
SUBJECTS = frozenset(row[0] for row in PRONOUNS)
INFINITIVES = frozenset(verb.infinitive for verb in VERBS)


@dataclass(frozen=True)
class Sentence:
    """A pair with the lemmas of its content words."""

    pair: Pair
    lemmas: tuple[str, ...]


FIRST_HELD_OUT = Sentence(Pair("je suis étudiant", "I am a student", "professions"), ("je", "étudiant"))


def draw(seed: int = 0, size: int = 24_000) -> tuple[list[Pair], list[Pair]]:
    """Draws `size` training pairs and 500 held-out pairs, both balanced over PHENOMENA; equal arguments, equal pairs.

    The first held-out pair is "je suis étudiant", "I am a student". Which combinations are reserved does not depend on
    the seed. Raises ValueError when the grammar cannot give that many pairs.
    """
    training, held_out = split(seed, size)
    return [sentence.pair for sentence in training], [sentence.pair for sentence in held_out]


def split(seed: int, size: int) -> tuple[list[Sentence], list[Sentence]]:
    """Returns the two parts of `draw`, with lemmas."""
    training = _draw(Random(f"{seed} training"), size, [], lambda sentence: not has_reserved(sentence.lemmas))
    counts = Counter(word for sentence in training for word in words(sentence.pair))
    enough = -(-size // PAIRS_PER_OCCURRENCE)

    def suitable(sentence: Sentence) -> bool:
        return has_reserved(sentence.lemmas) and all(counts[word] >= enough for word in words(sentence.pair))

    return training, _draw(Random(f"{seed} held-out"), HELD_OUT, [FIRST_HELD_OUT], suitable)


def words(pair: Pair) -> list[str]:
    """Returns the words of both sides, French ones marked to keep the languages apart; clitics such as j' are words."""
    french = re.findall(r"[\w-]+'?|\?", pair.source)
    return [f"fr:{word}" for word in french] + pair.target.replace("?", " ?").split()


def has_reserved(lemmas: Sequence[str]) -> bool:
    """Tells whether two of the lemmas must not meet in a training sentence."""
    return any(reserved(*sorted(pair)) for pair in combinations(lemmas, 2))


@cache
def reserved(first: str, second: str) -> bool:
    """Tells whether this combination is kept for the held-out part; the lemmas come in alphabetical order.

    A pronoun and a verb never are: together they make the verb's form, which training must show.
    """
    if {first, second} == {"je", "étudiant"}:
        return True
    if {first, second} & SUBJECTS and {first, second} & INFINITIVES:
        return False
    return crc32(f"{first} {second}".encode()) % RESERVED_ONE_IN == 0


def _draw(rng: Random, size: int, first: list[Sentence], wanted: Callable[[Sentence], bool]) -> list[Sentence]:
    """Draws new wanted sentences after `first`, phenomenon after phenomenon, until there are `size`."""
    drawn = list(first)
    sources = {sentence.pair.source for sentence in drawn}
    open_phenomena = list(PHENOMENA)
    while len(drawn) < size:
        for phenomenon in tuple(open_phenomena):
            if len(drawn) == size:
                break
            sentence = _one(rng, phenomenon, sources, wanted)
            if sentence is None:
                open_phenomena.remove(phenomenon)
            else:
                sources.add(sentence.pair.source)
                drawn.append(sentence)
        if not open_phenomena:
            raise ValueError(f"expected {size} distinct sentences, the grammar gave {len(drawn)}")
    return drawn


def _one(rng: Random, phenomenon: str, sources: set[str], wanted: Callable[[Sentence], bool]) -> Sentence | None:
    for _ in range(TRIES):
        drawn = CONSTRUCTIONS[phenomenon](rng)
        source = french_text(drawn.french)
        if source in sources or len(set(drawn.lemmas)) < len(drawn.lemmas):
            continue
        sentence = Sentence(Pair(source, english_text(drawn.english), phenomenon), drawn.lemmas)
        lengths = len(source.split()), len(sentence.pair.target.split())
        if min(lengths) >= MIN_WORDS and max(lengths) <= MAX_WORDS and wanted(sentence):
            return sentence
    return None
