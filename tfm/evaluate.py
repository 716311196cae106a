"""BLEU and chrF, with sacrebleu's signatures."""

from __future__ import annotations

import unicodedata
from collections import Counter
from dataclasses import dataclass

from tfm.errors import UserError, extra

with extra("translate"):
    import sacrebleu


@dataclass(frozen=True)
class Scores:
    """Corpus BLEU and chrF, 0 to 100, and what exactly was computed."""

    bleu: float
    chrf: float
    bleu_signature: str
    chrf_signature: str


@dataclass(frozen=True)
class Writing:
    """A way to write that spaces and punctuation do not cut into words.

    Attributes:
        languages: in words.
        scripts: the first words of Unicode's names of its letters, which are most of a text's.
        told_by: those of them that no other such writing has; at least a tenth of the letters.
        tokenize: of TOKENIZERS, what cuts it.
        longest: a text with words longer than this on average is not cut yet.
    """

    languages: str
    scripts: frozenset[str]
    told_by: frozenset[str]
    tokenize: str
    longest: float


# The names of sacrebleu's tokenizers.
TOKENIZERS = (
    "13a", "none", "intl", "char", "zh", "ja-mecab", "ko-mecab", "spm", "flores101", "flores200", "spBLEU-1K",
)  # fmt: skip
BY_PUNCTUATION = ("13a", "intl")
HAN, KANA = frozenset({"CJK"}), frozenset({"HIRAGANA", "KATAKANA", "HALFWIDTH"})
HANGUL, INDOCHINA = frozenset({"HANGUL"}), frozenset({"THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN"})
WRITINGS = (
    Writing("Japanese", KANA | HAN, KANA, "ja-mecab", longest=4.0),
    Writing("Chinese", HAN, HAN, "zh", longest=4.0),
    # Its spaces separate phrases: particles are attached to words.
    Writing("Korean", HANGUL, HANGUL, "ko-mecab", longest=2.0),
    Writing("Thai, Lao, Khmer, Burmese or Tibetan", INDOCHINA, INDOCHINA, "flores200", longest=8.0),
)


def score(translations: list[str], references: list[str], tokenize: str = "13a", lowercase: bool = False) -> Scores:
    """Compares translations with one reference each, both in NFC: what looks the same is the same.

    Args:
        translations, references: as many lines of each.
        tokenize: one of TOKENIZERS; "none" for text that is tokenized already, as papers on Multi30k report it.
        lowercase: ignore case.

    Raises:
        UserError: sacrebleu lacks what the tokenizer needs.
    """
    bleu = _bleu(tokenize, lowercase)
    chrf = sacrebleu.CHRF(lowercase=lowercase)
    translations, references = map(_composed, (translations, references))
    return Scores(
        bleu.corpus_score(translations, [references]).score,
        chrf.corpus_score(translations, [references]).score,
        str(bleu.get_signature()),
        str(chrf.get_signature()),
    )


def misfit(tokenize: str, references: list[str]) -> str:
    """Says why BLEU by this tokenizer would mean little for such references; empty where it means what it should.

    Raises:
        UserError: as `score`, before there is anything to compare.
    """
    _bleu(tokenize, lowercase=False)
    writing = _writing(references)
    if tokenize not in BY_PUNCTUATION or writing is None:
        return ""
    return (
        f"the references are {writing.languages}, which tokenizer {tokenize} does not cut into words: BLEU says "
        f"little: --tokenize {writing.tokenize} does, and --tokenize char compares characters"
    )


def _writing(lines: list[str]) -> Writing | None:
    """Returns how a text is written that is not cut into words; None where it is."""
    letters: Counter[str] = Counter()
    for character, count in Counter("".join(lines)).items():
        if character.isalpha():
            letters[unicodedata.name(character, "").partition(" ")[0]] += count
    words, total = sum(len(line.split()) for line in lines), letters.total()
    for writing in WRITINGS:
        own, telling = (sum(letters[name] for name in names) for names in (writing.scripts, writing.told_by))
        if own > total / 2 and telling >= total / 10:
            return writing if own > writing.longest * words else None
    return None


def _composed(lines: list[str]) -> list[str]:
    return [unicodedata.normalize("NFC", line) for line in lines]


def _bleu(tokenize: str, lowercase: bool) -> sacrebleu.BLEU:
    try:
        return sacrebleu.BLEU(tokenize=tokenize, lowercase=lowercase, force=True)
    # A tokenizer may need a package of its own, a newer sacrebleu, or a model that cannot be fetched.
    except (ImportError, RuntimeError, OSError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"tokenize {tokenize}: sacrebleu {sacrebleu.__version__} cannot: {reason}") from None
