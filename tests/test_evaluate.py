"""The scores are sacrebleu's, and say what they are."""

from __future__ import annotations

import pytest
import sacrebleu

from tfm.evaluate import TOKENIZERS, score

TRANSLATIONS = ["Ein Hund läuft , schnell .", "Zwei Männer stehen im Garten.", "", "das ist ein haus"]
REFERENCES = ["Ein Hund läuft, schnell.", "Zwei Männer sitzen im Garten.", "Nichts.", "Das ist ein Haus"]


def test_bleu_is_papineni_s():
    """Four of five words, three of four pairs, two of three triples, one of two quadruples; nothing too short."""
    found = score(["a b c d e"], ["a b c d f"], tokenize="none")
    assert found.bleu == pytest.approx(100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)


def test_a_perfect_translation_scores_100():
    found = score(REFERENCES, REFERENCES)
    assert (found.bleu, found.chrf) == (pytest.approx(100), pytest.approx(100))


@pytest.mark.parametrize("tokenize", TOKENIZERS)
@pytest.mark.parametrize("lowercase", [False, True])
def test_scores_and_signatures_are_sacrebleu_s(tokenize, lowercase):
    found = score(TRANSLATIONS, REFERENCES, tokenize, lowercase)
    bleu = sacrebleu.corpus_bleu(TRANSLATIONS, [REFERENCES], tokenize=tokenize, lowercase=lowercase)
    chrf = sacrebleu.metrics.CHRF(lowercase=lowercase).corpus_score(TRANSLATIONS, [REFERENCES])
    assert (found.bleu, found.chrf) == (bleu.score, chrf.score)
    case = "lc" if lowercase else "mixed"
    assert (
        found.bleu_signature == f"nrefs:1|case:{case}|eff:no|tok:{tokenize}|smooth:exp|version:{sacrebleu.__version__}"
    )
    assert f"case:{case}" in found.chrf_signature
    assert sacrebleu.__version__ in found.chrf_signature


def test_tokenizer_and_case_matter():
    plain = score(TRANSLATIONS, REFERENCES, "none").bleu
    assert plain < score(TRANSLATIONS, REFERENCES, "13a").bleu < score(TRANSLATIONS, REFERENCES, "13a", True).bleu


def test_translations_of_nothing_score_0():
    found = score(["", ""], ["ein Haus", "ein Hund"])
    assert (found.bleu, found.chrf) == (0.0, 0.0)
