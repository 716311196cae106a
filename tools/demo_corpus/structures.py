"""Larger structures: one function for each of questions, relatives, possession, contractions, pronouns, infinitives."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from tools.demo_corpus import lexicon
from tools.demo_corpus.clauses import QUESTION_MARK, clause, question
from tools.demo_corpus.lexicon import DEFINITE, DEMONSTRATIVE, GOODS, HUMAN, MASS, POSSESSIVES
from tools.demo_corpus.phrases import (
    KINDS,
    Determiner,
    NounPhrase,
    Phrase,
    determined,
    extended,
    location,
    name,
    noun_phrase,
    object_phrase,
    phrase,
    pronoun,
    subject,
    time,
)
from tools.demo_corpus.statements import action, predicate, profession
from tools.demo_corpus.verbs import (
    ALLER,
    AVOIR,
    DEVOIR,
    ETRE,
    GIVING,
    GOING_TO,
    INTRANSITIVE,
    PARLER,
    PEOPLE,
    POUVOIR,
    TRANSITIVE,
    VENIR,
    VOULOIR,
    Verb,
)

TENSES = ("present", "present", "past", "future")
CIRCUMSTANCES = (("où", "where", TENSES), ("quand", "when", TENSES[2:]), ("pourquoi", "why", TENSES))
THINGS = ("animal", "opening", *GOODS)
PERSONAL = tuple(v for v in TRANSITIVE if "name" in v.objects)
IMPERSONAL = tuple(v for v in TRANSITIVE if "name" not in v.objects)
WHO = NounPhrase(("qui",), ("who",))
# "aller à la maison" is to go home; one goes "en ville" and "dans la forêt".
NOT_A_GOAL = ("maison", "ville", "forêt", "cuisine")
GOALS = tuple(n for n in (*KINDS["place"], *KINDS["landmark"]) if n.singular not in NOT_A_GOAL)
PARTS = tuple(n for n in KINDS["opening"] if n.singular in ("porte", "fenêtre"))
BUILDINGS = tuple(n for n in KINDS["place"] if n.singular not in ("ville", "village", "forêt", "parc", "jardin"))
HIS: Determiner = ("son", "sa", "ses", "his", "his")
HER: Determiner = ("son", "sa", "ses", "her", "her")


def questions(rng: Random) -> Phrase:
    draw = rng.random()
    tense = rng.choice(TENSES)
    if draw < 0.3:
        verb, complement = action(rng, tense)
        return question(subject(rng, animals=verb.animate), verb, tense, complement)
    if draw < 0.4:
        who = subject(rng, pointed=True) if rng.random() < 0.6 else noun_phrase(rng, THINGS, pointed=True, adjective=0)
        return question(who, ETRE, "present", predicate(rng, who, 0))
    if draw < 0.5:
        what = noun_phrase(rng, ("animal", "place", "person", "relative", *GOODS), pointed=True)
        return clause(replace(WHO, french=("où",), english=("where",), person=what.person), ETRE, "present", what) + (
            QUESTION_MARK
        )
    if draw < 0.55:
        what = noun_phrase(rng, ("vehicle", "clothes", "animal", "dish"), pointed=True, adjective=0)
        opening = replace(WHO, french=("de", "quelle", "couleur"), english=("what", "colour"), person=what.person)
        return clause(opening, ETRE, "present", what) + QUESTION_MARK
    if draw < 0.65:
        verb, complement = action(rng, tense)
        return clause(WHO, verb, tense, complement) + QUESTION_MARK
    if draw < 0.8:
        french, english, tenses = rng.choice(CIRCUMSTANCES)
        verb = rng.choice([v for v in INTRANSITIVE if (french, v.infinitive) != ("où", "tomber")])
        who = subject(rng, animals=verb.animate)
        return question(who, verb, rng.choice(tenses), asked=phrase(french, english))
    if draw < 0.92:
        people = rng.random() < 0.4
        verb = rng.choice([v for v in (PERSONAL if people else IMPERSONAL) if v.completed or tense != "past"])
        asked = phrase("qui", "who") if people else phrase("que", "what")
        return question(subject(rng), verb, tense, asked=asked)
    noun = rng.choice(KINDS[rng.choice(("animal", *GOODS))])
    asked = phrase("combien de", "how many") + phrase(noun.plural, noun.english_plural, noun.lemma)
    return question(subject(rng), AVOIR, rng.choice(("present", "imperfect")), asked=asked)


def relatives(rng: Random) -> Phrase:
    draw = rng.random()
    if draw < 0.35:
        return finished(rng, doing(rng, ("person", "profession", "animal")))
    if draw < 0.55:
        verb = rng.choice([v for v in PERSONAL if v.infinitive not in ("voir", "regarder", "chercher")])
        return clause(subject(rng), verb, "present", doing(rng, ("person", "profession")))
    if draw < 0.65:
        return shown(doing(rng, ("person", "profession", "animal"), DEFINITE))
    if draw < 0.75:
        return shown(done_to(rng, DEFINITE))
    return finished(rng, done_to(rng))


def shown(what: NounPhrase) -> Phrase:
    return phrase("voici", "here are" if what.plural else "here is") + what


def antecedent(rng: Random, kinds: tuple[str, ...], determiner: Determiner | None) -> NounPhrase:
    noun = rng.choice(KINDS[rng.choice(kinds)])
    plural = rng.random() < 0.35 and noun.kind not in ("place", *MASS)
    return determined(noun, determiner or (DEFINITE if rng.random() < 0.8 else DEMONSTRATIVE), plural)


def doing(rng: Random, kinds: tuple[str, ...], determiner: Determiner | None = None) -> NounPhrase:
    """Draws a noun phrase with a relative qui: "la fille qui chante"."""
    who = antecedent(rng, kinds, determiner)
    relative = replace(who, french=("qui",), english=("who" if who.kind in HUMAN else "that",), lemmas=())
    if rng.random() < 0.2:
        return extended(who, clause(relative, ETRE, "present", location(rng)))
    tense = rng.choice(("present", "present", "past"))
    verb, complement = action(rng, tense)
    while who.kind == "animal" and not verb.animate:
        verb, complement = action(rng, tense)
    return extended(who, clause(relative, verb, tense, complement))


def done_to(rng: Random, determiner: Determiner | None = None) -> NounPhrase:
    """Draws a noun phrase with a relative que and an agreeing participle: "la pomme qu'il a mangée"."""
    tense = rng.choice(("present", "past", "past", "future"))
    verb = rng.choice([v for v in TRANSITIVE if v.completed])
    kinds = tuple(k for k in verb.objects if k in KINDS and k not in ("parent", "relative"))
    what = antecedent(rng, kinds, determiner)
    body = clause(subject(rng), verb, tense, antecedent=what)
    return extended(what, phrase("que", "that") + body)


def finished(rng: Random, who: NounPhrase) -> Phrase:
    """Makes the noun phrase with its relative clause the subject of a sentence."""
    if who.kind not in (*HUMAN, "animal") or rng.random() < 0.6:
        return clause(who, ETRE, "present", predicate(rng, who, 0.1))
    return clause(who, rng.choice([v for v in INTRANSITIVE if v.animate or who.kind != "animal"]))


def possession(rng: Random) -> Phrase:
    draw = rng.random()
    if draw < 0.25:
        what = determined(rng.choice(KINDS[rng.choice(THINGS)]), rng.choice(POSSESSIVES))
        opening = rng.choice((("c'est", "it is"), ("ce n'est pas", "it is not"), ("est-ce que c'est", "is it")))
        return phrase(*opening) + what + (QUESTION_MARK if opening[1] == "is it" else Phrase())
    if draw < 0.55:
        who = owner(rng)
        tense = rng.choice(TENSES)
        verb = rng.choice([v for v in TRANSITIVE if v.completed and {"relative", *GOODS} & set(v.objects)])
        kind = rng.choice([k for k in verb.objects if k in ("relative", "parent", *GOODS)])
        his = POSSESSIVES[4] if who.plural else HER if who.feminine else HIS
        what = determined(rng.choice(KINDS[kind]), his, rng.random() < 0.3 and kind != "parent")
        return clause(who, verb, tense, what)
    whose = owned(rng)
    if draw < 0.7 and not whose.plural:
        return phrase("c'est", "it is") + whose
    if draw < 0.85:
        return clause(whose, ETRE, rng.choice(("present", "imperfect")), predicate(rng, whose, 0.1))
    verb = rng.choice([v for v in TRANSITIVE if v.completed and whose.kind in v.objects])
    return clause(pronoun(rng), verb, rng.choice(TENSES), whose)


def owner(rng: Random) -> NounPhrase:
    """Draws a third person whose gender shows, so that son is his or her."""
    while True:
        who = subject(rng)
        if who.person in (2, 5) and who.kind != "profession" and "enfant" not in who.lemmas:
            return who


def owned(rng: Random) -> NounPhrase:
    """Draws something that somebody owns: "le chien du voisin", "the neighbour's dog"."""
    if rng.random() < 0.4:
        of_whom: NounPhrase = name(rng)
    else:
        of_whom = noun_phrase(rng, ("person", "relative", "parent", "profession"), pointed=True, adjective=0)
    what = determined(rng.choice(KINDS[rng.choice(("animal", *GOODS))]), DEFINITE, rng.random() < 0.3)
    *words, last = of_whom.english
    genitive = last + ("'" if of_whom.plural and last.endswith("s") else "'s")
    return replace(
        what,
        french=(*what.french, "de", *of_whom.french),
        english=(*words, genitive, *what.english[1:]),
        lemmas=what.lemmas + of_whom.lemmas,
    )


def contractions(rng: Random) -> Phrase:
    draw = rng.random()
    tense = rng.choice(TENSES)
    if draw < 0.4:
        verb, preposition = rng.choice(((ALLER, ("à", "to")), (VENIR, ("de", "from"))))
        goal = determined(rng.choice(GOALS), DEFINITE if rng.random() < 0.8 else DEMONSTRATIVE, rng.random() < 0.1)
        return clause(subject(rng, animals=True), verb, tense, phrase(*preposition) + goal + time(rng, tense, 0.15))
    if draw < 0.6:
        verb = rng.choice(GIVING)
        what = noun_phrase(rng, verb.objects)
        return clause(subject(rng), verb, tense, what + receiver(rng))
    if draw < 0.7:
        return clause(subject(rng), PARLER, tense, receiver(rng))
    if draw < 0.85:
        what = noun_phrase(rng, ("animal", "vehicle", "person", "relative"), pointed=True, adjective=0)
        return clause(what, ETRE, "present", by(rng))
    part = determined(rng.choice(PARTS), DEFINITE, rng.random() < 0.3)
    whole = phrase("de", "of") + determined(rng.choice(BUILDINGS), DEFINITE)
    if rng.random() < 0.4:
        verb = rng.choice([v for v in TRANSITIVE if v.completed and "opening" in v.objects])
        return clause(subject(rng), verb, tense, part + whole)
    return clause(extended(part, whole), ETRE, "present", predicate(rng, part, 0.1))


def receiver(rng: Random) -> Phrase:
    """Draws somebody who is given something: "aux enfants", "à Marie"."""
    return phrase("à", "to") + object_phrase(rng, PEOPLE, pointed=True, plural=0.4)


def by(rng: Random) -> Phrase:
    """Draws a place near or next to something, with de and its contractions."""
    preposition = rng.choice((("près de", "near"), ("à côté de", "next to")))
    return phrase(*preposition) + determined(rng.choice((*KINDS["place"], *KINDS["landmark"])), DEFINITE)


def pronouns(rng: Random) -> Phrase:
    who = pronoun(rng) if rng.random() < 0.7 else subject(rng, pronouns=0)
    tense = rng.choice(("present", "present", "future"))
    if rng.random() < 0.3:
        french, english, _ = rng.choice([p for p in lexicon.STRESSED_PRONOUNS if apart(who.person, p[2])])
        preposition = rng.choice((("avec", "with"), ("sans", "without")))
        company = phrase(*preposition) + phrase(french, english)
        verb = rng.choice([v for v in INTRANSITIVE if v.infinitive not in ("tomber", "répondre", "pleurer")])
        return clause(who, verb, rng.choice(TENSES), company)
    verb, whom = personal_pronoun(rng, who)
    if rng.random() < 0.15:
        return question(who, verb, tense, object_pronoun=whom)
    return clause(who, verb, tense, object_pronoun=whom, negation=rng.choice(("", "", "", "pas", "jamais", "plus")))


def apart(person: int, other: int) -> bool:
    """Tells whether two persons are not one: neither je with me or nous, nor tu with te or vous."""
    return person in (2, 5) or person % 3 != other % 3


def personal_pronoun(rng: Random, who: NounPhrase) -> tuple[Verb, Phrase]:
    """Draws a verb and an object pronoun; l' would hide whether it is him or her, so le and la want a consonant."""
    verb = rng.choice(PERSONAL)
    elides = verb.infinitive[0] in "aeéio"
    fitting = [
        (french, english)
        for french, english, person in lexicon.OBJECT_PRONOUNS
        if apart(who.person, person) and not (elides and french in ("le", "la"))
    ]
    return verb, phrase(*rng.choice(fitting))


def infinitives(rng: Random) -> Phrase:
    who = subject(rng)
    auxiliary, opening = rng.choice(((VOULOIR, "to"), (POUVOIR, ""), (DEVOIR, ""), (GOING_TO, "going to")))
    draw = rng.random()
    if draw < 0.15:
        verb, whom = personal_pronoun(rng, who)
        done = Phrase((*whom.french, verb.infinitive), (*verb.english.split(), *whom.english), (verb.infinitive,))
    elif draw < 0.3:
        be = profession(rng, who) if rng.random() < 0.5 else predicate(rng, who, 0)
        done = phrase("être", "be") + be
    else:
        verb, complement = action(rng, "present", pointed=True)
        done = phrase(verb.infinitive, verb.english, verb.infinitive) + complement
    complement = phrase("", opening) + done
    draw = rng.random()
    if draw < 0.15:
        return question(who, auxiliary, "present", complement)
    negation = "pas" if draw < 0.3 else ""
    return clause(who, auxiliary, "present", complement, negation=negation)
