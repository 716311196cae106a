"""Noun phrases and adjuncts in both languages at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

from tools.demo_corpus import lexicon
from tools.demo_corpus.lexicon import DEFINITE, DEMONSTRATIVE, INDEFINITE, MASS, POSSESSIVES, Adjective, Noun
from tools.demo_corpus.morphology import starts_with_vowel

Determiner = tuple[str, str, str, str, str]
PARTITIVE: Determiner = ("de le", "de la", "de les", "some", "some")
NUMBERS: tuple[Determiner, ...] = tuple((fr, fr, fr, en, en) for fr, en in lexicon.NUMBERS)
KINDS = {
    kind: tuple(n for n in lexicon.NOUNS if n.kind == kind) for kind in dict.fromkeys(n.kind for n in lexicon.NOUNS)
}
OWNABLE = ("animal", "parent", "relative", *lexicon.GOODS)
# Kinds of which a plain "a" or "some" would be odd, and kinds that are seldom plural.
UNIQUE = ("parent", "relative", "place", "landmark")


@dataclass(frozen=True)
class Phrase:
    """Words before elision in both languages, and the lemmas of the content words."""

    french: tuple[str, ...] = ()
    english: tuple[str, ...] = ()
    lemmas: tuple[str, ...] = ()

    def __add__(self, other: Phrase) -> Phrase:
        return Phrase(self.french + other.french, self.english + other.english, self.lemmas + other.lemmas)


@dataclass(frozen=True)
class NounPhrase(Phrase):
    """A phrase that verbs and adjectives agree with; `person` runs over je, tu, il, nous, vous, ils."""

    person: int = 2
    feminine: bool = False
    plural: bool = False
    kind: str = "person"


def extended(noun_phrase: NounPhrase, tail: Phrase) -> NounPhrase:
    """Returns the noun phrase with words after it that change nothing in its agreement, such as a relative clause."""
    whole = Phrase.__add__(noun_phrase, tail)
    return replace(noun_phrase, french=whole.french, english=whole.english, lemmas=whole.lemmas)


def phrase(french: str, english: str, *lemmas: str) -> Phrase:
    """Makes a phrase from two strings of words."""
    return Phrase(tuple(french.split()), tuple(english.split()), lemmas)


def pronoun(rng: Random) -> NounPhrase:
    """Draws a subject pronoun, and gender and number where the pronoun leaves them open."""
    french, english, person, feminine, plural = rng.choice(lexicon.PRONOUNS)
    feminine = rng.random() < 0.4 if feminine is None else feminine
    plural = rng.random() < 0.5 if plural is None else plural
    return NounPhrase((french,), (english,), (french,), person, feminine, plural)


def name(rng: Random) -> NounPhrase:
    """Draws a first name."""
    text, feminine = rng.choice(lexicon.NAMES)
    return NounPhrase((text,), (text,), (text,), 2, feminine, False, "name")


def fitting_adjective(rng: Random, noun: Noun, before_noun: bool | None = None) -> Adjective | None:
    """Draws an adjective to put beside this noun, if there is one."""
    fitting = [
        adjective
        for adjective in lexicon.ADJECTIVES
        if noun.kind in adjective.kinds
        and before_noun in (None, adjective.before_noun)
        and (adjective.masculine, noun.lemma) not in lexicon.UNSAID
    ]
    return rng.choice(fitting) if fitting else None


def determined(
    noun: Noun, determiner: Determiner, plural: bool = False, adjectives: Sequence[Adjective] = ()
) -> NounPhrase:
    """Joins determiner, noun and adjectives on their two sides: "un vieux livre rouge", "an old red book"."""
    before = [a for a in adjectives if a.before_noun]
    after = [a for a in adjectives if not a.before_noun]
    french = [noun.plural if plural else noun.singular]
    for adjective in reversed(before):
        if not plural and not noun.feminine and starts_with_vowel(french[0]):
            french.insert(0, adjective.before_vowel)
        else:
            french.insert(0, adjective.agreed(noun.feminine, plural))
    french += [a.agreed(noun.feminine, plural) for a in after]
    article = determiner[2] if plural else determiner[int(noun.feminine)]
    if before and article == "des":
        article = "de"
    english = [a.english for a in (*before, *after)] + [noun.english_plural if plural else noun.english]
    return NounPhrase(
        (*article.split(), *french),
        (*determiner[4 if plural else 3].split(), *english),
        (noun.lemma, *(a.masculine for a in adjectives)),
        5 if plural else 2,
        noun.feminine,
        plural,
        noun.kind,
    )


def determiner_for(rng: Random, kind: str, pointed: bool) -> Determiner:
    """Draws a determiner that is natural for this kind of noun; `pointed` keeps to the, this and my."""
    if kind in MASS:
        return DEFINITE if pointed or rng.random() < 0.3 else PARTITIVE
    if kind in ("parent", "relative"):
        return rng.choice(POSSESSIVES) if kind == "parent" or rng.random() < 0.8 else DEFINITE
    draw = rng.random()
    if draw < 0.45:
        return DEFINITE
    if draw < 0.6:
        return DEMONSTRATIVE
    if draw < 0.75 and kind in OWNABLE:
        return rng.choice(POSSESSIVES)
    return DEFINITE if pointed or kind in UNIQUE else INDEFINITE


def noun_phrase(
    rng: Random,
    kinds: Sequence[str],
    *,
    pointed: bool = False,
    plural: float = 0.3,
    adjective: float = 0.1,
) -> NounPhrase:
    """Draws a noun of one of `kinds` with a determiner; `plural` and `adjective` are the chances of having them."""
    nouns = KINDS[rng.choice(kinds)]
    noun = rng.choice(nouns)
    is_plural = noun.kind not in (*MASS, "parent") and rng.random() < (plural / 3 if noun.kind in UNIQUE else plural)
    determiner = determiner_for(rng, noun.kind, pointed)
    chosen = fitting_adjective(rng, noun) if rng.random() < adjective else None
    return determined(noun, determiner, is_plural, (chosen,) if chosen else ())


def object_phrase(rng: Random, kinds: Sequence[str], *, pointed: bool = False, plural: float = 0.3) -> NounPhrase:
    """Draws an object for a verb that takes `kinds`: a noun phrase or, where people are meant, a name."""
    kind = rng.choice(kinds)
    return name(rng) if kind == "name" else noun_phrase(rng, (kind,), pointed=pointed, plural=plural)


def subject(rng: Random, *, animals: bool = False, pronouns: float = 0.5, pointed: bool = False) -> NounPhrase:
    """Draws somebody: a pronoun, a name, a person or, with `animals`, an animal."""
    draw = rng.random()
    if draw < pronouns:
        return pronoun(rng)
    if draw < pronouns + 0.12:
        return name(rng)
    kinds = ("person", "relative", "relative", "profession", *(("animal",) * 3 if animals else ()))
    return noun_phrase(rng, kinds, pointed=pointed)


def coordinated(rng: Random) -> NounPhrase:
    """Draws two names: "Marie et Paul", masculine unless both are women's."""
    first, second = rng.sample(lexicon.NAMES, 2)
    return NounPhrase(
        (first[0], "et", second[0]),
        (first[0], "and", second[0]),
        (first[0], second[0]),
        5,
        first[1] and second[1],
        True,
    )


def time(rng: Random, tense: str, chance: float = 0.25) -> Phrase:
    """Draws an adverbial of time that goes with the tense, or nothing."""
    return phrase(*rng.choice(lexicon.TIMES[tense])) if rng.random() < chance else Phrase()


def location(rng: Random) -> Phrase:
    """Draws a place: in one, near one, or on or under a piece of furniture or a thing."""
    draw = rng.random()
    if draw < 0.5:
        return phrase("dans", "in") + noun_phrase(rng, ("place",), pointed=True, plural=0, adjective=0.05)
    if draw < 0.8:
        where = noun_phrase(rng, ("place", "landmark"), pointed=True, plural=0, adjective=0)
        return phrase(*rng.choice(lexicon.AROUND)) + where
    furniture = rng.choice([n for n in KINDS["device"] if n.singular in ("table", "chaise")])
    return phrase(*rng.choice(lexicon.ON_SURFACES)) + determined(furniture, rng.choice((DEFINITE, POSSESSIVES[0])))
