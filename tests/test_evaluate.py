"""The scores are sacrebleu's, and say what they are."""

from __future__ import annotations

import sys
import unicodedata

import pytest
import sacrebleu

from tfm.errors import UserError
from tfm.evaluate import TOKENIZERS, misfit, score

# Those that need no package of their own.
AT_HAND = ("13a", "none", "intl", "char", "zh")

TRANSLATIONS = ["Ein Hund läuft , schnell .", "Zwei Männer stehen im Garten.", "", "das ist ein haus"]
REFERENCES = ["Ein Hund läuft, schnell.", "Zwei Männer sitzen im Garten.", "Nichts.", "Das ist ein Haus"]


def test_bleu_is_papineni_s():
    """Four of five words, three of four pairs, two of three triples, one of two quadruples; nothing too short."""
    found = score(["a b c d e"], ["a b c d f"], tokenize="none")
    assert found.bleu == pytest.approx(100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)


def test_a_perfect_translation_scores_100():
    found = score(REFERENCES, REFERENCES)
    assert (found.bleu, found.chrf) == (pytest.approx(100), pytest.approx(100))


@pytest.mark.parametrize("tokenize", AT_HAND)
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


def test_how_an_accent_is_composed_matters_not():
    composed = ["un étudiant lit un très vieux livre"]
    decomposed = [unicodedata.normalize("NFD", line) for line in composed]
    assert decomposed != composed
    found = score(composed, decomposed), score(decomposed, composed)
    assert all((scores.bleu, scores.chrf) == (pytest.approx(100), pytest.approx(100)) for scores in found)


def test_tokenizer_and_case_matter():
    plain = score(TRANSLATIONS, REFERENCES, "none").bleu
    assert plain < score(TRANSLATIONS, REFERENCES, "13a").bleu < score(TRANSLATIONS, REFERENCES, "13a", True).bleu


def test_translations_of_nothing_score_0():
    found = score(["", ""], ["ein Haus", "ein Hund"])
    assert (found.bleu, found.chrf) == (0.0, 0.0)


# Languages without spaces between words

CHINESE = ["我喜欢你的猫。", "两个男人站在花园里。"]
JAPANESE = ["私はあなたの猫が好きです。", "庭に二人の男が立っています。"]
KOREAN = ["나는 당신의 고양이를 좋아합니다.", "두 남자가 정원에 서 있다."]
THAI = ["ฉันชอบแมวของคุณ", "ชายสองคนยืนอยู่ในสวน"]


@pytest.mark.parametrize(
    ("references", "language", "tokenize"),
    [
        (CHINESE, "Chinese", "zh"),
        (JAPANESE, "Japanese", "ja-mecab"),
        (KOREAN, "Korean", "ko-mecab"),
        (THAI, "Thai, Lao, Khmer, Burmese or Tibetan", "flores200"),
    ],
)
@pytest.mark.parametrize("given", ["13a", "intl"])
def test_a_tokenizer_that_cannot_cut_is_told(references, language, tokenize, given):
    said = misfit(given, references)
    assert said.startswith(f"the references are {language}, which tokenizer {given} does not cut into words")
    assert f"--tokenize {tokenize} does" in said
    assert misfit("char", references) == misfit("none", references) == ""


@pytest.mark.parametrize(
    "references",
    [REFERENCES, [], [""], ["我 喜欢 你 的 猫 。"], ["ฉัน ชอบ แมว ของ คุณ"], ["The sign says 我喜欢你的猫 in Chinese."]],
)
def test_text_in_words_is_no_misfit(references):
    assert misfit("13a", references) == ""


def test_chinese_is_scored_by_its_own_tokenizer():
    translations = ["我喜欢他的猫。", "两个男人坐在花园里。"]
    assert score(translations, CHINESE).bleu == 0.0
    found = score(translations, CHINESE, "zh")
    assert found.bleu == sacrebleu.corpus_bleu(translations, [CHINESE], tokenize="zh").score > 30
    assert "|tok:zh|" in found.bleu_signature


def test_every_tokenizer_of_sacrebleu_is_known():
    assert set(sacrebleu.BLEU.TOKENIZERS) <= set(TOKENIZERS)


def test_a_tokenizer_that_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "MeCab", None)
    with pytest.raises(UserError) as caught:
        misfit("ja-mecab", JAPANESE)
    assert str(caught.value).startswith(f"tokenize ja-mecab: sacrebleu {sacrebleu.__version__} cannot: ")
    assert "pip install sacrebleu[ja]" in str(caught.value)
    assert "\n" not in str(caught.value)
