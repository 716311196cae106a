"""The bundled corpus: its size, its balance, and what its held-out part keeps apart."""

from __future__ import annotations

import re
from collections import Counter
from itertools import combinations
from random import Random

import pytest

from tfm.demo import PHENOMENA, Pair, accuracy_by_phenomenon, corpus
from tools.demo_corpus import sampling
from tools.demo_corpus.morphology import english_text, french_text
from tools.demo_corpus.phrases import phrase


@pytest.fixture(scope="module")
def drawn() -> tuple[list[sampling.Sentence], list[sampling.Sentence]]:
    return sampling.split(0, 24_000)


@pytest.fixture(scope="module")
def parts() -> tuple[list[Pair], list[Pair]]:
    return corpus()


def tokens(text: str) -> list[str]:
    return re.findall(r"[\w-]+'?|\?", text)


def test_size_distinctness_and_balance(parts: tuple[list[Pair], list[Pair]]) -> None:
    training, held_out = parts
    assert len({pair.source for pair in training}) == len(training) == 24_000
    assert len({pair.source for pair in held_out}) == len(held_out) >= 500
    for part in parts:
        counts = Counter(pair.phenomenon for pair in part)
        assert set(counts) == set(PHENOMENA)
        assert max(counts.values()) - min(counts.values()) <= 1


def test_the_files_hold_what_the_grammar_writes(
    drawn: tuple[list[sampling.Sentence], list[sampling.Sentence]], parts: tuple[list[Pair], list[Pair]]
) -> None:
    assert parts == tuple([sentence.pair for sentence in part] for part in drawn)


def test_the_same_seed_gives_the_same_pairs_and_another_seed_others() -> None:
    first = sampling.draw(1, 2000)
    assert first == sampling.draw(1, 2000)
    assert {pair.source for pair in first[0]} != {pair.source for pair in sampling.draw(2, 2000)[0]}


def test_lengths_and_vocabulary(parts: tuple[list[Pair], list[Pair]]) -> None:
    pairs = [pair for part in parts for pair in part]
    assert all(2 <= len(side.split()) <= 20 for pair in pairs for side in (pair.source, pair.target))
    assert all(2 <= len(tokens(side)) <= 20 for pair in pairs for side in (pair.source, pair.target))
    assert len({word for pair in pairs for word in tokens(pair.source)}) >= 300
    assert len({word for pair in pairs for word in tokens(pair.target)}) >= 300


def test_one_source_has_one_target_whatever_drew_it() -> None:
    rng = Random(3)
    targets: dict[str, str] = {}
    for construct in sampling.CONSTRUCTIONS.values():
        for _ in range(1000):
            words = construct(rng)
            source, target = french_text(words.french), english_text(words.english)
            assert targets.setdefault(source, target) == target


def test_training_and_held_out_share_no_source(parts: tuple[list[Pair], list[Pair]]) -> None:
    training, held_out = parts
    assert not {pair.source for pair in training} & {pair.source for pair in held_out}


def test_held_out_sentences_combine_words_that_training_shows_only_apart(
    drawn: tuple[list[sampling.Sentence], list[sampling.Sentence]],
) -> None:
    training, held_out = drawn
    together = {frozenset(pair) for sentence in training for pair in combinations(sentence.lemmas, 2)}
    seen = {lemma for sentence in training for lemma in sentence.lemmas}
    counts = Counter(word for sentence in training for word in set(tokens(sentence.pair.source)))
    for sentence in held_out:
        assert any(frozenset(pair) not in together for pair in combinations(sentence.lemmas, 2)), sentence
        assert set(sentence.lemmas) <= seen, sentence
        assert min(counts[word] for word in tokens(sentence.pair.source)) >= 10, sentence


def test_je_suis_etudiant_is_held_out_and_etudiant_known(parts: tuple[list[Pair], list[Pair]]) -> None:
    training, held_out = parts
    assert held_out[0] == Pair("je suis étudiant", "I am a student", "professions")
    words = [set(tokens(pair.source)) for pair in training]
    assert not any(sentence & {"je", "j'"} and sentence & {"étudiant", "étudiante"} for sentence in words)
    sources = {pair.source for pair in training}
    assert {"il est étudiant", "je suis médecin"} <= sources
    assert sum("étudiant" in sentence for sentence in words) >= 15


def test_accuracy_by_phenomenon() -> None:
    pairs = [Pair("a", "A", "past"), Pair("b", "B", "past"), Pair("c", "C", "numbers")]
    assert accuracy_by_phenomenon(pairs, ["A ", "x", "C"]) == {"past": (1, 2), "numbers": (1, 1)}
    with pytest.raises(ValueError, match="expected one translation for each of 3 pairs, got 1"):
        accuracy_by_phenomenon(pairs, ["A"])


def test_more_than_the_grammar_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    only = {phenomenon: lambda rng: phrase("il dort", "he sleeps") for phenomenon in PHENOMENA}
    monkeypatch.setattr(sampling, "CONSTRUCTIONS", only)
    with pytest.raises(ValueError, match="expected 10 distinct sentences, the grammar gave 1"):
        sampling.draw(0, 10)
