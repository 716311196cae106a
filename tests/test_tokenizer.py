"""Round trips of any text, special tokens that no text can reach, and damaged files."""

import json
import sys
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tfm.errors import UserError
from tfm.tokenizer import ALPHABET, BOS, EOS, PAD, SMALLEST_VOCABULARY, SPECIAL_TOKENS, Tokenizer

CORPUS = [
    "the dog sees the cat .",
    "the cat sees the dog .",
    "le chien voit le chat .",
    "l &apos; étudiant voit le chien @-@ loup",
    # Often enough that a merge would spell any special token it could.
    *["<pad> <s> </s> ⟨pad⟩ ⟨bos⟩ ⟨eos⟩"] * 20,
]

ODD_LINES = {
    "empty": "",
    "one space": " ",
    "spaces around and inside": "   a  b   ",
    "tabs": "\ta\t\tb\t",
    "usual special tokens": "<pad><s> </s> <unk> [PAD]",
    "own special tokens": "⟨pad⟩ ⟨bos⟩⟨eos⟩",
    "moses escapes": "l &apos; étudiant @-@ loup &quot;",
    "line breaks of Unicode": "a\nb\rc\vd\fe\x1cf\x85g\u2028h\u2029i",
    "control characters": "\x00\x01\x1b\x7f\x9f",
    "combining marks, not normalised": "e\u0301 é \ufb01 \u1e9b\u0323",
    "emoji with joiners": "👩‍👩‍👧‍👦 🇫🇷 👍🏽",
    "right to left": "\u202eשלום\u202c عَرَبِيّ",
    "byte order mark and non-characters": "\ufeffa\uffff\U0010ffff",
    "characters of the byte alphabet": "ĠaĊĉ Ġ",
    "no-break and ideographic spaces": "\u00a0a\u3000b\u200b",
}

LINES = st.lists(st.one_of(st.text(), st.sampled_from([" ", *SPECIAL_TOKENS, *ODD_LINES.values()])), max_size=5).map(
    "".join
)


SPACES = [c for c in map(chr, range(sys.maxunicode + 1)) if c.isspace()]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(CORPUS, 400)


@pytest.fixture(scope="module")
def older(tokenizer, tmp_path_factory):
    """The same, of a file that was written without a normalizer."""
    path = tmp_path_factory.mktemp("older") / "tokenizer.json"
    tokenizer.save(path)
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"normalizer": None}), "utf-8")
    return Tokenizer.load(path)


def normal(line):
    return " ".join(unicodedata.normalize("NFC", line).split())


@pytest.mark.parametrize("line", ODD_LINES.values(), ids=ODD_LINES.keys())
def test_odd_lines_come_back(tokenizer, older, line):
    assert tokenizer.decode(tokenizer.encode([line])) == [normal(line)]
    assert older.decode(older.encode([line])) == [line]


@pytest.mark.parametrize(
    "line",
    [
        "je suis étudiant ",
        " je  suis étudiant",
        "je\u00a0suis\u2009étudiant",
        "je suis e\u0301tudiant",
        "je suis\tétudiant\r",
    ],
)
def test_what_looks_the_same_is_the_same(tokenizer, older, line):
    assert tokenizer.encode([line]) == tokenizer.encode(["je suis étudiant"])
    assert older.encode([line]) != older.encode(["je suis étudiant"])


def test_every_space_of_unicode_is_a_space(tokenizer):
    lines = [f"{space}a{space}{space}b{space}" for space in SPACES]
    assert len(lines) == 29
    assert tokenizer.encode(lines) == tokenizer.encode(["a b"]) * len(lines)
    assert tokenizer.encode(["", *SPACES]) == tokenizer.encode([""]) * (len(SPACES) + 1)


def test_training_sees_normal_text():
    """A vocabulary of decomposed and doubly spaced text is that of the same text composed."""
    written = ["l'e\u0301tudiant  voit l'e\u0301tudiant\u00a0"] * 3
    plain = ["l'étudiant voit l'étudiant"] * 3
    assert Tokenizer.train(written, 300).encode(plain) == Tokenizer.train(plain, 300).encode(plain)


@settings(deadline=None)
@given(lines=st.lists(LINES, max_size=4))
def test_any_text_comes_back_and_holds_no_special_id(tokenizer, older, lines):
    assert older.decode(older.encode(lines)) == lines
    encoded = tokenizer.encode(lines)
    # Which characters NFC knows depends on the Unicode of Python and of tokenizers.
    back = tokenizer.decode(encoded)
    assert [normal(line) for line in back] == [normal(line) for line in lines]
    assert tokenizer.encode(back) == encoded
    assert all(" ".join(line.split()) == line for line in back)
    assert not {PAD, BOS, EOS} & {token for ids in encoded for token in ids}
    assert all(0 <= token < tokenizer.vocab_size for ids in encoded for token in ids)


@settings(deadline=None)
@given(data=st.data())
def test_generated_ids_always_decode_to_one_line(tokenizer, data):
    ids = data.draw(st.lists(st.lists(st.integers(0, tokenizer.vocab_size + 8)), max_size=4))
    lines = tokenizer.decode_lines(ids)
    assert len(lines) == len(ids)
    assert all(len(line.splitlines()) <= 1 and line == "".join(line.splitlines()) for line in lines)


def test_decode_keeps_line_breaks_and_decode_lines_does_not(older):
    ids = older.encode(["a\nb\u2028c\r"])
    assert older.decode(ids) == ["a\nb\u2028c\r"]
    assert older.decode_lines(ids) == ["a b c "]


def test_bytes_that_are_not_utf8_become_replacement_characters(tokenizer):
    (ids,) = tokenizer.encode(["\U0001f600"])
    assert tokenizer.decode([ids[:-1]]) == ["\ufffd"]


def test_special_tokens_are_skipped(tokenizer):
    (ids,) = tokenizer.encode(["the dog"])
    assert tokenizer.decode([[BOS, *ids, EOS, PAD, PAD]]) == ["the dog"]
    assert tokenizer.decode([[], [PAD]]) == ["", ""]


def test_the_first_word_has_the_tokens_it_has_inside_a_line(tokenizer):
    first, inside = tokenizer.encode(["dog", "the dog"])
    assert inside[-len(first) :] == first


def test_training_is_deterministic(tokenizer, tmp_path):
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path in paths:
        Tokenizer.train(iter(CORPUS), 400).save(path)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_training_reaches_the_size_asked_for():
    assert Tokenizer.train(CORPUS, 280).vocab_size == 280


def test_a_size_the_corpus_cannot_fill_is_capped():
    capped = Tokenizer.train(CORPUS, 100_000)
    assert SMALLEST_VOCABULARY < capped.vocab_size < 600
    assert Tokenizer.train([], 1000).vocab_size == SMALLEST_VOCABULARY == 259


def test_a_size_without_room_for_the_bytes_is_refused():
    with pytest.raises(
        UserError, match=r"^vocabulary size 258 is too small: expected at least 259 \(256 bytes and 3 special tokens\)$"
    ):
        Tokenizer.train(CORPUS, 258)


def test_a_lone_surrogate_is_refused(tokenizer):
    with pytest.raises(UserError, match=r"^line 2: not Unicode text \(lone surrogate U\+D800 at column 3\)$"):
        tokenizer.encode(["é", "ab\ud800"])


def test_loading_gives_the_same_tokenizer(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "a.json")
    loaded = Tokenizer.load(tmp_path / "a.json")
    loaded.save(tmp_path / "b.json")
    lines = [*CORPUS, *ODD_LINES.values()]
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert loaded.vocab_size == tokenizer.vocab_size
    assert loaded.encode(lines) == tokenizer.encode(lines)
    assert loaded.decode(loaded.encode(lines)) == list(map(normal, lines))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json"]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.json: cannot read the tokenizer \(No such file or directory\)$"):
        Tokenizer.load(tmp_path / "none.json")


def truncated(text):
    return text[: len(text) // 2]


def without_vocabulary(text):
    parts = json.loads(text)
    del parts["model"]["vocab"]
    return json.dumps(parts)


def without_a_byte(text):
    parts = json.loads(text)
    parts["model"]["vocab"]["odd"] = parts["model"]["vocab"].pop(ALPHABET[0])
    parts["model"]["merges"] = []
    return json.dumps(parts)


def with_a_gap_in_ids(text):
    parts = json.loads(text)
    parts["model"]["vocab"]["odd"] = 10_000
    return json.dumps(parts)


def with_specials_swapped(text):
    parts = json.loads(text)
    vocabulary = parts["model"]["vocab"]
    vocabulary[SPECIAL_TOKENS[0]], vocabulary[SPECIAL_TOKENS[1]] = 1, 0
    return json.dumps(parts)


def with_a_merge_of_nothing_known(text):
    parts = json.loads(text)
    parts["model"]["merges"].append(["no", "token"])
    return json.dumps(parts)


def with_a_normalizer_of_another_kind(text):
    return json.dumps(json.loads(text) | {"normalizer": {"type": "Lowercase"}})


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncated, "JSONDecodeError"),
        (lambda text: "", "JSONDecodeError"),
        (lambda text: "[]", "TypeError"),
        (without_vocabulary, "KeyError: 'vocab'"),
        (without_a_byte, "its vocabulary lacks '!'"),
        (with_a_gap_in_ids, "its ids are not 0 to"),
        (with_specials_swapped, "its ids are not 0 to"),
        (with_a_normalizer_of_another_kind, "its normalizer is another program's or version's"),
        (with_a_merge_of_nothing_known, "Token `no` out of vocabulary"),
    ],
)
def test_a_damaged_file_is_one_clear_line(tokenizer, tmp_path, damage, reason):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    path.write_text(damage(path.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        Tokenizer.load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: not a tokenizer file (")
    assert reason in message
    assert "\n" not in message


def test_a_binary_file_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"not a tokenizer file \(not valid UTF-8\)$"):
        Tokenizer.load(path)
