"""Clauses: the verb with its tense, agreement, negation and auxiliaries in both languages.

Tenses are present, past (the passé composé, for the English simple past), imperfect (of être and avoir) and future. The
English present is the simple one throughout.
"""

from __future__ import annotations

from tools.demo_corpus.morphology import agree, third_person
from tools.demo_corpus.phrases import NounPhrase, Phrase
from tools.demo_corpus.verbs import AVOIR, ETRE, Verb

# rien and personne are said in English by the object: nothing, nobody.
NEGATIONS = {"": (), "pas": ("not",), "jamais": ("never",), "plus": ("no", "longer"), "rien": (), "personne": ()}
BE = {
    "present": ("am", "are", "is", "are", "are", "are"),
    "past": ("was", "were", "was", "were", "were", "were"),
    "imperfect": ("was", "were", "was", "were", "were", "were"),
}
MODALS = ("can", "must")
NOTHING = Phrase()
QUESTION_MARK = Phrase(("?",), ("?",))


def clause(
    subject: NounPhrase,
    verb: Verb,
    tense: str = "present",
    complement: Phrase = NOTHING,
    *,
    negation: str = "",
    object_pronoun: Phrase = NOTHING,
    antecedent: NounPhrase | None = None,
) -> Phrase:
    """Makes a statement. `antecedent` is what a relative "que" stands for: a participle with avoir agrees with it."""
    french_verb = _french_verb(subject, verb, tense, negation, object_pronoun, antecedent)
    before, after = _english_verb(subject.person, verb, tense, negation)
    return Phrase(
        (*subject.french, *french_verb, *complement.french),
        (*subject.english, *before, *after, *object_pronoun.english, *complement.english),
        (*subject.lemmas, *_content(verb), *complement.lemmas),
    )


def question(
    subject: NounPhrase,
    verb: Verb,
    tense: str = "present",
    complement: Phrase = NOTHING,
    *,
    asked: Phrase = NOTHING,
    object_pronoun: Phrase = NOTHING,
) -> Phrase:
    """Makes a question with est-ce que, after the phrase that is asked for (empty for yes or no)."""
    before, after = _english_verb(subject.person, verb, tense, "")
    if not before:
        before, after = (_do(tense, subject.person),), tuple(verb.english.split())
    french_verb = _french_verb(subject, verb, tense, "", object_pronoun, None)
    body = Phrase(
        (*asked.french, "est-ce", "que", *subject.french, *french_verb, *complement.french),
        (*asked.english, *before, *subject.english, *after, *object_pronoun.english, *complement.english),
        (*asked.lemmas, *subject.lemmas, *_content(verb), *complement.lemmas),
    )
    return body + QUESTION_MARK


def _content(verb: Verb) -> tuple[str, ...]:
    return () if verb.infinitive in ("être", "avoir") else (verb.infinitive,)


def _french_verb(
    subject: NounPhrase, verb: Verb, tense: str, negation: str, object_pronoun: Phrase, antecedent: NounPhrase | None
) -> tuple[str, ...]:
    done: tuple[str, ...] = ()
    if tense == "past":
        finite = (ETRE if verb.with_etre else AVOIR).present[subject.person]
        controller = subject if verb.with_etre else antecedent
        agreed = agree(verb.participle, controller.feminine, controller.plural) if controller else verb.participle
        done = (agreed,)
    else:
        finite = {"present": verb.present, "future": verb.future, "imperfect": verb.imperfect}[tense][subject.person]
    if not negation:
        return (*object_pronoun.french, finite, *done)
    return ("ne", *object_pronoun.french, finite, negation, *done)


def _english_verb(person: int, verb: Verb, tense: str, negation: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns (auxiliary and negation, main verb); only the first part goes before the subject in a question."""
    denial = NEGATIONS[negation]
    base = tuple(verb.english.split())
    if tense == "future":
        return ("will", *denial), base
    if verb.english == "be":
        return (BE[tense][person], *denial), ()
    if verb.english in MODALS:
        return (("cannot",) if verb.english == "can" and negation == "pas" else (verb.english, *denial)), ()
    if negation == "pas":
        return (_do(tense, person), *denial), base
    if tense != "present":
        return denial, tuple(verb.english_past.split())
    return denial, tuple(third_person(verb.english).split()) if person == 2 else base


def _do(tense: str, person: int) -> str:
    if tense != "present":
        return "did"
    return "does" if person == 2 else "do"
