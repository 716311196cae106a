"""Statements: one function for each phenomenon of a simple sentence, each drawing a random sentence."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from tools.demo_corpus import lexicon
from tools.demo_corpus.clauses import clause, question
from tools.demo_corpus.lexicon import GOODS, INDEFINITE, MASS
from tools.demo_corpus.phrases import (
    KINDS,
    NUMBERS,
    Determiner,
    NounPhrase,
    Phrase,
    coordinated,
    determined,
    determiner_for,
    fitting_adjective,
    location,
    name,
    noun_phrase,
    object_phrase,
    phrase,
    pronoun,
    subject,
    time,
)
from tools.demo_corpus.verbs import AVOIR, ETRE, HABITER, INTRANSITIVE, JOUER, PARLER, PEOPLE, TRANSITIVE, VOULOIR, Verb

INANIMATE = ("food", *MASS, "opening", "place", *GOODS)
LOCATED = ("animal", "person", "object", "dish", "text")
NO_ARTICLE: Determiner = ("", "", "", "a", "")
NOT_ANY: Determiner = ("de", "de", "de", "a", "")
NOT_ANY_MASS: Determiner = ("de", "de", "de", "", "")
A_LOT: Determiner = ("beaucoup de", "beaucoup de", "beaucoup de", "a lot of", "a lot of")
BE_IN_STATE = replace(AVOIR, english="be", english_past="was")


def object_of(rng: Random, verb: Verb, *, pointed: bool = False) -> NounPhrase:
    """Draws an object the verb takes. "j'aime les chats" is about cats in general: a pointed verb has no plural."""
    pointed = pointed or verb.pointed
    return object_phrase(rng, verb.objects, pointed=pointed, plural=0 if verb.pointed else 0.3)


def action(rng: Random, tense: str, *, pointed: bool = False) -> tuple[Verb, Phrase]:
    """Draws a verb that has this tense, with its object if it takes one."""
    if rng.random() < 0.3:
        return rng.choice(INTRANSITIVE), Phrase()
    verb = rng.choice([v for v in TRANSITIVE if v.completed or tense != "past"])
    return verb, object_of(rng, verb, pointed=pointed)


def statement(rng: Random, tense: str) -> Phrase:
    """Draws a sentence in which somebody does something, at times with an adverbial of time."""
    verb, complement = action(rng, tense)
    who = subject(rng, animals=verb.animate)
    when = Phrase() if verb.pointed else time(rng, tense)
    return clause(who, verb, tense, complement + when)


def predicate(rng: Random, who: NounPhrase, degree: float = 0.2) -> Phrase:
    """Draws an adjective that agrees with the subject: "très fatiguées"."""
    kind = "person" if who.kind == "name" else who.kind
    adjective = rng.choice([a for a in lexicon.ADJECTIVES if kind in a.kinds and a.masculine != "nouveau"])
    words = phrase(adjective.agreed(who.feminine, who.plural), adjective.english, adjective.masculine)
    return phrase(*rng.choice(lexicon.DEGREES)) + words if adjective.gradable and rng.random() < degree else words


def state(rng: Random, who: NounPhrase, when: str) -> Phrase:
    """Draws a predicate, with an adverbial of time if the state is one that passes."""
    words = predicate(rng, who)
    return words + time(rng, when, 0.4) if lexicon.PASSING & set(words.lemmas) else words


def present(rng: Random) -> Phrase:
    draw = rng.random()
    if draw < 0.12:
        what = determined(rng.choice(KINDS[rng.choice(LOCATED)]), INDEFINITE, rng.random() < 0.4)
        return phrase("il y a", "there are" if what.plural else "there is") + what + location(rng)
    if draw < 0.25:
        return clause(noun_phrase(rng, LOCATED, pointed=True), ETRE, "present", location(rng))
    return statement(rng, "present")


def past(rng: Random) -> Phrase:
    draw = rng.random()
    if draw < 0.12:
        who = subject(rng, pointed=True)
        return clause(who, ETRE, "imperfect", state(rng, who, "imperfect"))
    if draw < 0.22:
        return clause(subject(rng), AVOIR, "imperfect", noun_phrase(rng, AVOIR.objects))
    return statement(rng, "past")


def future(rng: Random) -> Phrase:
    if rng.random() < 0.15:
        who = subject(rng, pointed=True)
        return clause(who, ETRE, "future", state(rng, who, "future"))
    return statement(rng, "future")


def agreement(rng: Random) -> Phrase:
    draw = rng.random()
    if draw < 0.12:
        who = coordinated(rng)
    elif draw < 0.55:
        who = subject(rng, animals=True, pointed=True)
    else:
        who = noun_phrase(rng, INANIMATE, pointed=True, plural=0.5, adjective=0)
    return clause(who, ETRE, "present", state(rng, who, "state"))


def adjectives(rng: Random) -> Phrase:
    draw = rng.random()
    if draw < 0.25:
        return phrase("c'est", "it is") + described(rng, (*GOODS, "animal"), INDEFINITE)
    if draw < 0.5:
        verb = rng.choice(INTRANSITIVE)
        people: tuple[str, ...] = ("person", "relative", "animal") if verb.animate else ("person", "relative")
        return clause(described(rng, people), verb)
    tense = rng.choice(("present", "present", "past", "future"))
    verb = rng.choice([AVOIR, *(v for v in TRANSITIVE if v.completed and not v.pointed and v.objects != PEOPLE)])
    if verb is AVOIR and tense == "past":
        tense = "imperfect"
    kinds = tuple(k for k in verb.objects if k not in ("name", "parent"))
    return clause(subject(rng, animals=verb.animate), verb, tense, described(rng, kinds))


def described(rng: Random, kinds: tuple[str, ...], determiner: Determiner | None = None) -> NounPhrase:
    """Draws a noun phrase with one or two adjectives; a determiner that is given is used, in the singular.

    Of two, the second is one of colour, nationality or state, so that both languages keep the same order.
    """
    noun = rng.choice(KINDS[rng.choice(kinds)])
    before, after = (fitting_adjective(rng, noun, before_noun) for before_noun in (True, False))
    chosen = [a for a in (before, after) if a]
    if len(chosen) == 2 and (chosen[1].gradable or rng.random() < 0.5):
        chosen = [rng.choice(chosen)]
    plural = determiner is None and noun.kind not in MASS and rng.random() < 0.3
    return determined(noun, determiner or determiner_for(rng, noun.kind, pointed=False), plural, chosen)


def negation(rng: Random) -> Phrase:
    draw = rng.random()
    word = rng.choice(("pas", "pas", "jamais", "plus"))
    if draw < 0.15:
        who = subject(rng, pointed=True)
        return clause(who, ETRE, rng.choice(("present", "imperfect")), predicate(rng, who, 0), negation=word)
    if draw < 0.3:
        verb = rng.choice((AVOIR, VOULOIR))
        what = determined(rng.choice(KINDS[rng.choice(("animal", *GOODS))]), NOT_ANY)
        return clause(subject(rng), verb, "present", what, negation=rng.choice(("pas", "plus")))
    if draw < 0.4:
        verb = rng.choice([v for v in (*TRANSITIVE, VOULOIR) if set(MASS) & set(v.objects)])
        mass = rng.choice([n for kind in MASS if kind in verb.objects for n in KINDS[kind]])
        return clause(subject(rng), verb, "present", determined(mass, NOT_ANY_MASS), negation=word)
    if draw < 0.5:
        verb = rng.choice([v for v in TRANSITIVE if not v.pointed])
        whom = verb.objects == PEOPLE
        nobody = phrase("", "nobody" if whom else "nothing")
        who = subject(rng, animals=verb.animate)
        return clause(who, verb, rng.choice(("present", "future")), nobody, negation="personne" if whom else "rien")
    tense = rng.choice(("present", "present", "past", "future"))
    if tense == "past" and word == "plus":
        word = "pas"
    verb, complement = action(rng, tense, pointed=True)
    return clause(subject(rng, animals=verb.animate), verb, tense, complement, negation=word)


def numbers(rng: Random) -> Phrase:
    draw = rng.random()
    number = rng.choice(NUMBERS)
    if draw < 0.15:
        french, english = number[0], number[3]
        age = phrase(f"{french} ans", f"{english} years old", french)
        return clause(subject(rng), BE_IN_STATE, rng.choice(("present", "imperfect", "future")), age)
    if draw < 0.25:
        french, english = rng.choice(lexicon.NUMBERS[:10])
        verb = rng.choice([v for v in INTRANSITIVE if v is not JOUER])
        when = phrase(f"à {french} heures", f"at {english} o'clock", french)
        tense = rng.choice(("present", "past", "future"))
        return clause(subject(rng, animals=verb.animate), verb, tense, when)
    if draw < 0.45:
        verb = rng.choice(INTRANSITIVE)
        tense = rng.choice(("present", "past", "future"))
        return clause(counted(rng, number, ("person", "animal") if verb.animate else ("person",)), verb, tense)
    if draw < 0.6:
        what = counted(rng, number, LOCATED)
        return phrase("il y a", "there are") + what + location(rng)
    countable = [v for v in TRANSITIVE if not v.pointed and v.objects != PEOPLE and v.objects != ("drink",)]
    verb = rng.choice([AVOIR, AVOIR, *countable])
    if rng.random() < 0.2:
        noun = rng.choice(KINDS[rng.choice(verb.objects if "name" not in verb.objects else GOODS)])
        what = determined(noun, A_LOT, noun.kind not in MASS)
        return clause(subject(rng), verb, "present", what)
    kinds = [k for k in verb.objects if k in KINDS and k not in (*MASS, "parent", "relative", "landmark")]
    tense = rng.choice(("present", "present", "imperfect" if verb is AVOIR else "past", "future"))
    return clause(subject(rng), verb, tense, counted(rng, number, kinds))


def counted(rng: Random, number: Determiner, kinds: list[str] | tuple[str, ...]) -> NounPhrase:
    """Draws some number of things: "trois chats"."""
    what = determined(rng.choice(KINDS[rng.choice(kinds)]), number, True)
    return replace(what, lemmas=(number[0], *what.lemmas))


def professions(rng: Random) -> Phrase:
    draw = rng.random()
    if draw < 0.65:
        who = pronoun(rng)
    elif draw < 0.78:
        who = name(rng)
    elif draw < 0.85:
        who = coordinated(rng)
    else:
        who = noun_phrase(rng, ("relative", "parent"), adjective=0)
    job = profession(rng, who)
    draw = rng.random()
    if draw < 0.15:
        return question(who, ETRE, "present", job)
    if draw < 0.35:
        return clause(who, ETRE, "present", job, negation=rng.choice(("pas", "plus")))
    return clause(who, ETRE, rng.choice(("present", "present", "present", "imperfect", "future")), job)


def profession(rng: Random, who: NounPhrase) -> NounPhrase:
    """Draws a profession without an article in French, agreeing with the subject: "étudiantes", "students"."""
    jobs = [n for n in KINDS["profession"] if n.feminine == who.feminine]
    return determined(rng.choice(jobs), NO_ARTICLE, who.plural)


def idioms(rng: Random) -> Phrase:
    draw = rng.random()
    who = subject(rng)
    if draw < 0.4:
        state = rng.choice(lexicon.STATES)
        words = phrase(*state, state[0])
        tense = rng.choice(("present", "present", "imperfect", "future"))
        if rng.random() < 0.2:
            return question(who, BE_IN_STATE, tense, words)
        return clause(who, BE_IN_STATE, tense, words, negation=rng.choice(("", "", "", "pas", "plus", "jamais")))
    tense = rng.choice(("present", "present", "past", "future"))
    if draw < 0.6:
        preposition, what = rng.choice((("à", lexicon.GAMES), ("de", lexicon.INSTRUMENTS)))
        french, english = rng.choice(what)
        verb, words = JOUER, phrase(f"{preposition} {french}", english, french)
    elif draw < 0.8:
        french, english = rng.choice(lexicon.LANGUAGES)
        verb, words = PARLER, phrase(french, english, french)
    else:
        french, english = rng.choice(lexicon.HOMES)
        verb, words = HABITER, phrase(french, english, french)
    if rng.random() < 0.15:
        return question(who, verb, tense, words)
    return clause(who, verb, tense, words, negation=rng.choice(("", "", "", "pas")))
