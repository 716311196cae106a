"""Byte-level byte-pair encoding, one vocabulary for both languages.

Byte-pair encoding of words is Sennrich et al., 2016 (https://arxiv.org/abs/1508.07909); working on bytes, so that no
text is unknown, is GPT-2's (Radford et al., 2019, section 2.2). The work is done by Hugging Face's `tokenizers`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from tfm.errors import UserError, extra
from tfm.files import write_atomically

with extra("translate"):
    import tokenizers
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

PAD, BOS, EOS = 0, 1, 2

# No merge can spell these: the brackets are outside the byte-level alphabet.
SPECIAL_TOKENS = ["⟨pad⟩", "⟨bos⟩", "⟨eos⟩"]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + len(ALPHABET)

# The characters that str.split breaks at.
SPACES = "[\\t-\\r\\x1c- \\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}\\x{205f}\\x{3000}]+"
# NFC, runs of white space as one space, none at the end; the space at the front is the added one.
NORMALIZER = normalizers.Sequence(
    [normalizers.NFC(), normalizers.Replace(Regex(SPACES), " "), normalizers.Replace(Regex("(?<=[^ ]) \\z"), "")]
)

# Everything str.splitlines breaks at.
LINE_BREAKS = dict.fromkeys(map(ord, "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"), " ")


class Tokenizer:
    """Lines of text to lists of token ids and back: all of any Unicode text, but for how it is composed and spaced.

    What comes back from `decode(encode([line]))` is `" ".join(unicodedata.normalize("NFC", line).split())`: two
    spellings that look the same are the same tokens, in training and in translation.

    Made by `Tokenizer.train` or `Tokenizer.load`. A file without a normalizer, as older ones are, gives a tokenizer
    that keeps every space and character as it is. No text, "<pad>" or "</s>" included, ever becomes `PAD`, `BOS` or
    `EOS`. A line is encoded behind one added space, so that its first word has the tokens it has inside a line.
    """

    def __init__(self, model: models.BPE, normalizes: bool = True) -> None:
        self._tokenizer = tokenizers.Tokenizer(model)
        if normalizes:
            self._tokenizer.normalizer = NORMALIZER
        self._tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._tokenizer.decoder = decoders.ByteLevel()
        # The spelling of a special token is plain text where a text contains it.
        self._tokenizer.encode_special_tokens = True

    @classmethod
    def train(cls, lines: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learns a vocabulary of `vocab_size` tokens from the lines of both languages together.

        The result depends on the lines and the size alone. Pairs seen only once are not merged, so a small corpus may
        not fill the size asked for: `vocab_size` of the result is the size reached.

        Raises:
            UserError: `vocab_size` does not hold the 256 bytes and the special tokens.
        """
        if vocab_size < SMALLEST_VOCABULARY:
            raise UserError(
                f"vocabulary size {vocab_size} is too small: expected at least {SMALLEST_VOCABULARY} "
                f"({len(ALPHABET)} bytes and {len(SPECIAL_TOKENS)} special tokens)"
            )
        trained = cls(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=SPECIAL_TOKENS,
            initial_alphabet=ALPHABET,
            show_progress=False,
        )
        trained._tokenizer.train_from_iterator((f" {line}" for line in lines), trainer)
        return trained

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size()

    def encode(self, lines: Sequence[str]) -> list[list[int]]:
        """Returns the token ids of each line, without special tokens. An empty line is one token, the added space.

        Raises:
            UserError: a line holds a lone surrogate, which is no Unicode text and has no UTF-8 bytes.
        """
        for number, line in enumerate(lines, start=1):
            # isascii costs nothing, and most lines end here.
            if not line.isascii():
                _check_unicode(line, number)
        encodings = self._tokenizer.encode_batch_fast([f" {line}" for line in lines], add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        """Returns the text of each sequence of ids. Never fails on what a model may generate.

        Special tokens and ids outside the vocabulary are skipped; bytes that are not UTF-8 become U+FFFD.
        """
        return [text.removeprefix(" ") for text in self._tokenizer.decode_batch(sequences, skip_special_tokens=True)]

    def decode_lines(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        """Returns what `decode` does, with a space for every line break, so that one sequence is one line of output."""
        return [text.translate(LINE_BREAKS) for text in self.decode(sequences)]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the JSON of Hugging Face's `tokenizers`, whole or not at all."""
        write_atomically(Path(path), self._tokenizer.to_str(pretty=True).encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Reads what `save` wrote.

        Raises:
            UserError: the file cannot be read, or is not a whole tokenizer of this class.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path}: cannot read the tokenizer ({error.strerror})") from None
        except UnicodeDecodeError:
            raise UserError(f"{path}: not a tokenizer file (not valid UTF-8)") from None
        try:
            file = json.loads(text)
            vocabulary, merges = file["model"]["vocab"], [(left, right) for left, right in file["model"]["merges"]]
            normalizer = file.get("normalizer")
            missing = [token for token in SPECIAL_TOKENS + ALPHABET if token not in vocabulary]
            numbered = sorted(vocabulary.values()) == list(range(len(vocabulary)))
            special = [vocabulary.get(token) for token in SPECIAL_TOKENS] == [PAD, BOS, EOS]
            loaded = cls(models.BPE(vocab=vocabulary, merges=merges), normalizes=normalizer is not None)
            ours = normalizer in (None, json.loads(loaded._tokenizer.to_str())["normalizer"])
        # tokenizers raises a bare Exception.
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(f"{path}: not a tokenizer file ({reason})") from None
        if missing:
            raise UserError(f"{path}: not a tokenizer file (its vocabulary lacks {missing[0]!r})")
        if not (numbered and special):
            raise UserError(
                f"{path}: not a tokenizer file (its ids are not 0 to {len(vocabulary) - 1}, specials first)"
            )
        if not ours:
            raise UserError(f"{path}: not a tokenizer file (its normalizer is another program's or version's)")
        loaded._tokenizer.add_special_tokens(SPECIAL_TOKENS)
        return loaded


def _check_unicode(line: str, number: int) -> None:
    try:
        line.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"line {number}: not Unicode text (lone surrogate U+{ord(line[error.start]):04X} "
            f"at column {error.start + 1})"
        ) from None
