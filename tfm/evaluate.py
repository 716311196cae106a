"""BLEU and chrF, with sacrebleu's signatures."""

from __future__ import annotations

from dataclasses import dataclass

import sacrebleu


@dataclass(frozen=True)
class Scores:
    """Corpus BLEU and chrF, 0 to 100, and what exactly was computed."""

    bleu: float
    chrf: float
    bleu_signature: str
    chrf_signature: str


TOKENIZERS = ("13a", "none", "intl", "char")


def score(translations: list[str], references: list[str], tokenize: str = "13a", lowercase: bool = False) -> Scores:
    """Compare translations with one reference each.

    Args:
        translations, references: as many lines of each.
        tokenize: one of TOKENIZERS; "none" for text that is tokenized already, as papers on Multi30k report it.
        lowercase: ignore case.
    """
    bleu = sacrebleu.BLEU(tokenize=tokenize, lowercase=lowercase, force=True)
    chrf = sacrebleu.CHRF(lowercase=lowercase)
    return Scores(
        bleu.corpus_score(translations, [references]).score,
        chrf.corpus_score(translations, [references]).score,
        str(bleu.get_signature()),
        str(chrf.get_signature()),
    )
