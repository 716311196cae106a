"""Decoding with a cache is decoding without one; the beam finds what a search written out finds."""

from __future__ import annotations

import copy
import itertools
import math
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import pairs_of, parallel_lines, run_model, sentence, small_config, small_model
from torch import Tensor
from torch.testing import assert_close

from tfm.data import BatchPlan
from tfm.errors import UserError
from tfm.generate import EXTRA_LENGTH, Cache, Search, beam_search, translate
from tfm.model import Transformer
from tfm.ops.backends import use
from tfm.sequences import Ragged
from tfm.tokenizer import BOS, EOS, PAD, Tokenizer

WORDS = 9
LENGTHS = [5, 1, 9, 4, 4, 2, 7]


@cache
def half_taught(norm_first: bool = False, max_length: int = 14) -> Transformer:
    """Has begun to learn to turn sentences round: unlike random weights it varies, hesitates, and comes to an end."""
    torch.manual_seed(1)
    model = Transformer(small_config(vocab_size=WORDS, norm_first=norm_first, max_length=max_length)).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        sources = [sentence(int(torch.randint(1, 9, ())), WORDS) for _ in range(32)]
        pairs = pairs_of([(source, [*source[-2::-1], EOS]) for source in sources])
        batch = BatchPlan(pairs, torch.arange(32), [(0, 32)])[0]
        model.loss(run_model(model, batch), batch.target_output).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def random_model(**changes: Any) -> Transformer:
    return small_model(spread=0.5, **changes).eval()


@torch.no_grad()
def full_decode(model: Transformer, source: list[int], prefix: list[int]) -> Tensor:
    """Log-probabilities of each token's successor, [len(prefix), vocab_size], by the whole decoder at once."""
    return model.logits(model(Ragged.of([source]), Ragged.of([prefix]))).log_softmax(-1)


def length_limit(model: Transformer, source: list[int]) -> int:
    return min(len(source) + EXTRA_LENGTH, model.config.max_length)


def slow_beam_search(model: Transformer, source: list[int], search: Search) -> list[int]:
    """The rule of `beam_search` in plain Python: one sentence, one hypothesis at a time, no cache."""
    running, ended = [(0.0, [BOS])], []
    for length in itertools.count(1):
        grown = []
        for score, tokens in running:
            log_p = full_decode(model, source, tokens)[-1].tolist()
            allowed = [EOS] if length == length_limit(model, source) else range(EOS, len(log_p))
            grown += [(score + log_p[token], [*tokens, token]) for token in allowed]
        grown = sorted(grown, reverse=True)[: 2 * search.beam]
        ended += [
            (score / length**search.length_penalty, tokens)
            for score, tokens in grown[: search.beam]
            if tokens[-1] == EOS
        ]
        running = [(score, tokens) for score, tokens in grown if tokens[-1] != EOS][: search.beam]
        if len(ended) >= search.beam or length == length_limit(model, source):
            return max(ended)[1][1:-1]
    raise AssertionError("unreachable")


# The cache


@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize("beam", [1, 3])
def test_step_by_step_equals_all_at_once(norm_first, beam):
    """Twenty steps, past the cache's first growth, each hypothesis continuing another one of its sentence."""
    model = random_model(norm_first=norm_first)
    sources = [sentence(length) for length in LENGTHS]
    prefixes = [[[BOS] for _ in range(beam)] for _ in sources]
    with torch.inference_mode():
        decoder = Cache.of(model, sources, beam)
        for step in range(20):
            tokens = torch.tensor([[prefix[-1] for prefix in row] for row in prefixes])
            log_p = decoder.step(tokens).log_softmax(-1)
            if step % 5 == 0:
                for b, row in enumerate(prefixes):
                    for k, prefix in enumerate(row):
                        expected = full_decode(model, sources[b], prefix)[-1].float()
                        assert_close(log_p[b, k], expected, rtol=1e-5, atol=1e-5)
            parent = torch.randint(beam, (len(sources), beam))
            keep = torch.tensor([b for b in range(len(sources)) if b != 1]) if step == 12 else None
            if keep is not None:
                sources, prefixes, parent = [[rows[b] for b in keep] for rows in (sources, prefixes, parent.unbind())]
                parent = torch.stack(parent)
            prefixes = [
                [[*row[p], int(torch.randint(EOS + 1, 23, ()))] for p in parents.tolist()]
                for row, parents in zip(prefixes, parent, strict=True)
            ]
            decoder.reorder(parent, keep)


@pytest.mark.parametrize("beam", [1, 3])
def test_neither_a_beam_nor_leaving_moves_what_is_cached(beam):
    with torch.inference_mode():
        decoder = Cache.of(random_model(), [sentence(length) for length in LENGTHS], beam)
        decoder.step(torch.full((len(LENGTHS), beam), BOS))
        held = [(tensor, tensor.clone()) for past in decoder.past for tensor in past]
        decoder.reorder(torch.randint(beam, (len(LENGTHS), beam)), None)
        decoder.reorder(torch.randint(beam, (2, beam)), torch.tensor([0, 3]))
        now = [tensor for past in decoder.past for tensor in past]
    for tensor, (before, contents) in zip(now, held, strict=True):
        assert tensor is before
        torch.testing.assert_close(tensor[:, 0], contents[:, 0], rtol=0, atol=0)


@pytest.mark.parametrize("beam", [1, 3])
def test_every_backend_of_a_cpu_finds_the_same(beam):
    model = copy.deepcopy(half_taught()).float()
    sources = [sentence(length, WORDS) for length in LENGTHS * 2]
    expected = beam_search(half_taught(), sources, Search(beam))
    for impl in ("reference", "auto"):
        with use(impl):
            assert beam_search(model, sources, Search(beam)) == expected


# Searching


@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
def test_greedy_is_the_likeliest_token_each_time(norm_first):
    model = half_taught(norm_first)
    sources = [sentence(length, WORDS) for length in LENGTHS * 2]
    for source, found in zip(sources, beam_search(model, sources, Search()), strict=True):
        tokens = [BOS]
        while tokens[-1] != EOS and len(tokens) < length_limit(model, source):
            log_p = full_decode(model, source, tokens)[-1]
            log_p[[PAD, BOS]] = -math.inf
            tokens.append(int(log_p.argmax()))
        assert found == [token for token in tokens[1:] if token != EOS]


@pytest.mark.parametrize("beam", [1, 2, 3, 5])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
def test_the_beam_finds_what_the_slow_search_finds(beam, length_penalty, norm_first):
    model, search = half_taught(norm_first), Search(beam, length_penalty)
    sources = [sentence(length, WORDS) for length in LENGTHS]
    expected = [slow_beam_search(model, source, search) for source in sources]
    assert beam_search(model, sources, search) == expected
    assert len(set(map(len, expected))) > 1, "all end at once: the test says nothing about batches"


@given(
    seed=st.integers(0, 10_000),
    beam=st.integers(1, 4),
    lengths=st.lists(st.integers(1, 9), min_size=2, max_size=9),
    norm_first=st.booleans(),
)
@settings(deadline=None, max_examples=40)
def test_a_sentence_does_not_depend_on_its_batch(seed, beam, lengths, norm_first):
    torch.manual_seed(seed)
    sources, search = [sentence(length, WORDS) for length in lengths], Search(beam)
    alone = [beam_search(half_taught(norm_first), [source], search)[0] for source in sources]
    assert beam_search(half_taught(norm_first), sources, search) == alone


@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 1.0, 3.0])
def test_a_beam_wide_enough_finds_the_best_of_all(length_penalty):
    """Six tokens, three of them words, at most three words: forty translations, and a beam that holds them all."""
    model = random_model(vocab_size=6, max_length=4)
    sources = [sentence(length, 6) for length in (3, 1, 4)]
    for source, found in zip(sources, beam_search(model, sources, Search(41, length_penalty)), strict=True):
        candidates = [list(words) for n in range(4) for words in itertools.product((3, 4, 5), repeat=n)]
        assert len(candidates) == 40

        def score(words, source=source):
            log_p = full_decode(model, source, [BOS, *words])
            return sum(log_p[i, token].item() for i, token in enumerate([*words, EOS])) / (
                (len(words) + 1) ** length_penalty
            )

        assert found == max(candidates, key=score)


def test_a_wider_beam_finds_likelier_translations():
    model = half_taught()
    sources = [sentence(length, WORDS) for length in LENGTHS * 3]

    def log_p_of_all(beam):
        found = beam_search(model, sources, Search(beam, length_penalty=0.0))
        return sum(
            full_decode(model, source, [BOS, *t])[range(len(t) + 1), [*t, EOS]].sum().item()
            for source, t in zip(sources, found, strict=True)
        )

    assert log_p_of_all(8) > log_p_of_all(1)


@pytest.mark.parametrize("beam", [1, 4])
def test_special_tokens_are_never_emitted(beam):
    """From a model that wants nothing else."""
    model = random_model()
    source = sentence(4)
    with torch.no_grad():
        # Every output is the last norm's bias, and PAD and BOS are what resembles it most.
        norm = model.decoder.layers[-1].feed_forward_norm
        norm.weight.zero_()
        norm.bias.copy_(torch.randn(16))
        model.embedding[[PAD, BOS]] = 10 * norm.bias
        model.embedding[EOS] = -10 * norm.bias
    assert full_decode(model, source, [BOS])[-1].topk(2).indices.sort().values.tolist() == [PAD, BOS]
    (found,) = beam_search(model, [source], Search(beam))
    # EOS comes last of all, so the limit ends it.
    assert len(found) == length_limit(model, source) - 1
    assert min(found) > EOS


def test_translations_may_be_fifty_tokens_longer_than_their_source():
    model = random_model(max_length=512)
    with torch.no_grad():
        model.decoder.layers[-1].feed_forward_norm.weight.zero_()
        model.decoder.layers[-1].feed_forward_norm.bias.copy_(-10 * model.embedding[EOS])
    found = beam_search(model, [sentence(3), sentence(6)], Search())
    assert [len(tokens) for tokens in found] == [3 + 50 - 1, 6 + 50 - 1]


def test_a_beam_wider_than_the_vocabulary_works():
    model = random_model(vocab_size=5, max_length=6)
    sources = [sentence(length, 5) for length in (2, 4)]
    search = Search(beam=9)
    assert beam_search(model, sources, search) == [slow_beam_search(model, source, search) for source in sources]


@pytest.mark.parametrize("field", ["beam", "batch_tokens"])
def test_a_search_of_nothing_is_refused(field):
    with pytest.raises(UserError, match=f"{field}: expected at least 1, got 0"):
        Search(**{field: 0})


def test_the_model_is_left_as_it_was():
    model, source = random_model(), sentence(4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    beam_search(model, [source], Search(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


# Lines of text


@cache
def text_model() -> tuple[Transformer, Tokenizer]:
    """Random, but for a leaning to end: its translations are nonsense of various lengths."""
    torch.manual_seed(5)
    source, target = parallel_lines(40)
    tokenizer = Tokenizer.train([*source, *target], 290)
    return random_model(vocab_size=tokenizer.vocab_size, max_length=24, norm_first=True), tokenizer


LINES = ["un deux trois", "", "six", " \t ", "quatre quatre", "un " * 9, "ça ☃ &apos; @-@", "deux", "cinq six un"]


@pytest.mark.parametrize("beam", [1, 3])
@pytest.mark.parametrize("batch_tokens", [1, 17, 100_000])
def test_lines_keep_their_order_in_batches_of_any_size(beam, batch_tokens):
    model, tokenizer = text_model()
    found = translate(model, tokenizer, LINES, Search(beam, batch_tokens=batch_tokens))
    for line, translation in zip(LINES, found, strict=True):
        if line.strip():
            (tokens,) = beam_search(model, [[*tokenizer.encode([line])[0], EOS]], Search(beam))
            assert translation == tokenizer.decode_lines([tokens])[0]
        else:
            assert translation == ""
    assert len(set(found)) > 3
    assert not any("\n" in line for line in found)


@pytest.mark.parametrize("lines", [[], [""], ["", "  ", "\u3000"]], ids=["none", "one blank", "several"])
def test_blank_lines_stay_blank(lines):
    assert translate(*text_model(), lines) == [""] * len(lines)


def test_long_lines_are_cut_and_reported():
    model, tokenizer = text_model()
    limit = model.config.max_length - 1
    long = "ç" * limit
    (tokens,) = tokenizer.encode([long])
    assert len(tokens) > limit
    (fitting,) = [n for n in range(limit) if len(tokenizer.encode(["z" * n])[0]) == limit]
    told = []
    lines = ["un", long, "z" * fitting, "deux"]
    found = translate(model, tokenizer, lines, on_truncated=lambda *of: told.append(of))
    assert told == [(1, len(tokens))]
    (expected,) = beam_search(model, [[*tokens[:limit], EOS]], Search())
    assert found[1] == tokenizer.decode_lines([expected])[0]
    assert found == translate(model, tokenizer, lines)


def test_the_batches_hold_what_they_may(monkeypatch):
    model, tokenizer = text_model()
    lines, _ = parallel_lines(30)
    seen = []

    def spy(model, sources, search):
        seen.append([len(source) for source in sources])
        return beam_search(model, sources, search)

    monkeypatch.setattr("tfm.generate.beam_search", spy)
    translate(model, tokenizer, lines, Search(batch_tokens=40))
    assert sum(map(len, seen)) == 30
    assert all(len(batch) * max(batch) <= 40 for batch in seen)
    assert len(seen) < 20


@pytest.mark.parametrize("penalty", [1000.0, math.nan])
def test_a_length_penalty_out_of_range(penalty):
    with pytest.raises(UserError, match=r"length_penalty: expected a number in \[-10, 10\], got"):
        Search(length_penalty=penalty)
