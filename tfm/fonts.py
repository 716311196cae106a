"""Fonts for any script: which of those installed have a text's characters, and what to install for the others."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from tfm.errors import extra

with extra("translate"):
    from matplotlib import font_manager, rcParams
    from matplotlib.ft2font import FT2Font

# A font with a box for every character there is.
LAST_RESORT = "Last Resort"
# By the first word of Unicode's names of their characters: a font that has them, and its package in Debian.
CJK, NOTO = ("Noto Sans CJK", "fonts-noto-cjk"), ("Noto Sans", "fonts-noto-core")
KNOWN = {
    **dict.fromkeys(("CJK", "HIRAGANA", "KATAKANA", "HALFWIDTH", "FULLWIDTH", "IDEOGRAPHIC", "HANGUL"), CJK),
    **dict.fromkeys(("LATIN", "GREEK", "CYRILLIC", "COMBINING", "MODIFIER"), NOTO),
}
MOST_SHOWN = 8


@dataclass(frozen=True)
class Fonts:
    """`families` draw a text, the first that has a character each; nobody has those of `missing`."""

    families: tuple[str, ...]
    missing: str

    @property
    def advice(self) -> str:
        """One line on what to install; empty where nothing is missing."""
        if not self.missing:
            return ""
        wanted: dict[tuple[str, str], str] = {}
        for character in self.missing:
            font = _font_of(character)
            wanted[font] = wanted.get(font, "") + character
        fonts = ", ".join(
            f"{name} for {text[:MOST_SHOWN]}{' …' * (len(text) > MOST_SHOWN)} (on Debian: {package})"
            for (name, package), text in wanted.items()
        )
        return f"no installed font has every character, boxes stand for the others: install {fonts}"


@cache
def fonts_for(text: str) -> Fonts:
    """Returns matplotlib's own font, and behind it as few others as have what it lacks."""
    families = list(rcParams["font.family"])
    missing = {character for character in text if character.isprintable() and not character.isspace()}
    for family in families:
        missing -= _characters(font_manager.findfont(font_manager.FontProperties(family=[family])))
    others = {path: missing & _characters(path) for path in _installed()} if missing else {}
    while missing and others:
        best = max(others, key=lambda path: len(others[path] & missing))
        if not others[best] & missing:
            break
        missing -= others[best]
        font_manager.fontManager.addfont(best)
        families.append(FT2Font(best).family_name)
    return Fonts(tuple(families), "".join(sorted(missing)))


def _installed() -> Iterator[str]:
    """Yields the font files of this machine, those too that matplotlib has not met yet."""
    known = {entry.fname for entry in font_manager.fontManager.ttflist}
    yield from sorted(known | set(font_manager.findSystemFonts()))


def _characters(path: str) -> set[str]:
    """Returns the characters of a font; none where it cannot be read."""
    try:
        font = FT2Font(path)
        return set() if LAST_RESORT in font.family_name else set(map(chr, font.get_charmap()))
    except (OSError, RuntimeError):
        return set()


def _font_of(character: str) -> tuple[str, str]:
    script = unicodedata.name(character, "SYMBOLS").partition(" ")[0]
    if script in KNOWN:
        return KNOWN[script]
    if unicodedata.category(character).startswith("S"):
        return "Noto Sans Symbols or Noto Emoji", "fonts-noto-core"
    return f"Noto Sans {script.title()}", "fonts-noto-core"
