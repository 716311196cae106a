"""Word forms and spelling: French inflection, elision and contraction; English inflection and a/an.

Everything here maps strings to strings and holds for the lexicon of this package, not for all of French or English.
"""

from __future__ import annotations

from collections.abc import Sequence

VOWELS = "aàâeéèêiîoôuûyœ"
# An h aspiré, and the two numbers that behave like one, block elision.
ASPIRATED = ("hibou", "haricot", "hamster", "huit", "onze")
ELIDING = {"je", "me", "te", "le", "la", "ne", "de", "que"}
BEFORE_VOWEL = {"ma": "mon", "ta": "ton", "sa": "son", "ce": "cet"}
CONTRACTIONS = {("de", "le"): "du", ("de", "les"): "des", ("à", "le"): "au", ("à", "les"): "aux"}
FUTURE_ENDINGS = ("ai", "as", "a", "ons", "ez", "ont")
CONSONANT_SOUND = ("use", "uni")


def starts_with_vowel(word: str) -> bool:
    """Tells whether a French word begins with a vowel sound, so that the word before it elides."""
    word = word.lower()
    return word[0] in VOWELS + "h" and not word.startswith(ASPIRATED)


def french_text(words: Sequence[str]) -> str:
    """Joins French words: elision (j', l', d', qu'), contraction (au, du, des, aux), mon/cet before a vowel."""
    text = ""
    skip = False
    for i, word in enumerate(words):
        following = words[i + 1] if i + 1 < len(words) else "."
        if skip:
            skip = False
        elif (word, following) in CONTRACTIONS and not (following == "le" and starts_with_vowel(words[i + 2])):
            text += CONTRACTIONS[word, following] + " "
            skip = True
        elif word in ELIDING and starts_with_vowel(following):
            text += word[:-1] + "'"
        elif word in BEFORE_VOWEL and starts_with_vowel(following):
            text += BEFORE_VOWEL[word] + " "
        else:
            text += word + " "
    return text.rstrip()


def english_text(words: Sequence[str]) -> str:
    """Joins English words: "an" before a vowel sound, the question mark without a space."""
    text = ""
    for i, word in enumerate(words):
        if word == "a" and words[i + 1][0].lower() in "aeiou" and not words[i + 1].startswith(CONSONANT_SOUND):
            word = "an"
        text += word if word == "?" or not text else " " + word
    return text


def french_plural(word: str) -> str:
    """Returns the plural of a noun or an adjective: chat, chats; bateau, bateaux; gris, gris."""
    if word.endswith(("s", "x", "z")):
        return word
    return word + ("x" if word.endswith("eau") else "s")


def english_plural(word: str) -> str:
    """Returns the plural of a noun: cat, cats; box, boxes; story, stories."""
    if word.endswith(("s", "x", "ch", "sh")):
        return word + "es"
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + "s"


def third_person(verb: str) -> str:
    """Returns the third person singular, inflecting the first word: look for, looks for; go, goes; have, has."""
    if verb == "have":
        return "has"
    first, *rest = verb.split()
    first = first + "es" if first.endswith("o") else english_plural(first)
    return " ".join([first, *rest])


def regular_past(verb: str) -> str:
    """Returns the regular simple past, inflecting the first word: listen to, listened to; carry, carried."""
    first, *rest = verb.split()
    if first.endswith("e"):
        first += "d"
    elif first.endswith("y") and first[-2] not in "aeiou":
        first = first[:-1] + "ied"
    else:
        first += "ed"
    return " ".join([first, *rest])


def present_forms(infinitive: str, strong: str = "") -> tuple[str, ...]:
    """Returns the present forms of a regular -er, -ir or -re verb; `strong` is the stressed stem (achèt-)."""
    stem, group = infinitive[:-2], infinitive[-2:]
    if group == "er":
        strong = strong or stem
        weak = stem[:-1] + "ç" if stem.endswith("c") else stem + "e" if stem.endswith("g") else stem
        return (strong + "e", strong + "es", strong + "e", weak + "ons", stem + "ez", strong + "ent")
    endings = ("is", "is", "it", "issons", "issez", "issent") if group == "ir" else ("s", "s", "", "ons", "ez", "ent")
    return tuple(stem + ending for ending in endings)


def future_forms(stem: str) -> tuple[str, ...]:
    """Returns the six forms of the futur simple on its stem: manger-, sera-."""
    return tuple(stem + ending for ending in FUTURE_ENDINGS)


def future_stem(infinitive: str, strong: str = "") -> str:
    """Returns the regular stem of the futur simple: manger, finir, vendr, achèter."""
    if infinitive.endswith("re"):
        return infinitive[:-1]
    return strong + "er" if strong else infinitive


def participle(infinitive: str) -> str:
    """Returns the regular past participle, masculine singular: mangé, fini, vendu."""
    return infinitive[:-2] + {"er": "é", "ir": "i", "re": "u"}[infinitive[-2:]]


def agree(word: str, feminine: bool, plural: bool) -> str:
    """Returns a regular adjective or participle in a gender and number: parti, partie, partis, parties."""
    if feminine:
        word += "e"
    return french_plural(word) if plural else word
