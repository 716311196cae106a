"""Reading with every error text, and batches: each pair once, within the budget, the same whenever asked."""

import bz2
import gzip
import lzma
import random
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from tfm.data import (
    IGNORED,
    EncodedPairs,
    ParallelText,
    batches,
    encode_parallel,
    read_lines,
    read_parallel,
    split_lines,
)
from tfm.errors import UserError
from tfm.tokenizer import BOS, EOS, PAD, Tokenizer

torch.set_num_threads(1)


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def encoded(lengths):
    """Pairs of these (source, target) lengths, whose every token tells pair and place."""

    def side(numbers, base):
        rows = [[base + 1000 * i + j for j in range(n - 1)] + [EOS] for i, n in enumerate(numbers)]
        flat = torch.tensor([token for row in rows for token in row], dtype=torch.int32)
        return flat, torch.tensor([0, *numbers]).cumsum(0)

    return EncodedPairs(*side([s for s, _ in lengths], 10), *side([t for _, t in lengths], 10_000_000))


def random_pairs(count, longest=30, seed=0):
    draw = random.Random(seed)
    return encoded([(draw.randint(1, longest), draw.randint(1, longest)) for _ in range(count)])


def rows_of(flat, offsets):
    return [flat[a:b].tolist() for a, b in zip(offsets.tolist(), offsets.tolist()[1:], strict=False)]


# Reading

PACKERS = {"plain": lambda data: data, "gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress}


@pytest.mark.parametrize("pack", PACKERS.values(), ids=PACKERS)
@pytest.mark.parametrize("name", ["a.txt", "a.gz"])
@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("one\ntwo\n", ["one", "two"]),
        ("no break at the end", ["no break at the end"]),
        ("\n", [""]),
        ("a\r\nb\r\n", ["a", "b"]),
        ("two\r\r\n", ["two\r"]),
        ("a\x85b\u2028c\vd\re\x1cf\n", ["a\x85b\u2028c\vd\re\x1cf"]),
        ("a\rb\r", ["a", "b"]),
        ("a\r\rb", ["a", "", "b"]),
        ("BZh1, a name\n", ["BZh1, a name"]),
        ("\ufeffmark\n\ufeffmark\n", ["mark", "\ufeffmark"]),
        ("  kept  \n\n", ["  kept  ", ""]),
    ],
)
def test_read_lines(tmp_path, name, pack, text, lines):
    assert read_lines(write(tmp_path / name, pack(text.encode()))) == lines


@pytest.mark.parametrize("pack", PACKERS.values(), ids=PACKERS)
def test_two_files_end_to_end(tmp_path, pack):
    assert read_lines(write(tmp_path / "a", pack(b"a\n") + pack(b"b\n"))) == ["a", "b"]


def test_a_piece_of_a_text_is_split_at_line_feeds_alone():
    assert split_lines(b"a\rb", "a", first_line=2001) == ["a\rb"]


@pytest.mark.parametrize(
    ("start", "kind"),
    [
        pytest.param(
            b"\x28\xb5\x2f\xfd rest",
            "zstd",
            marks=pytest.mark.skipif(sys.version_info >= (3, 14), reason="this Python reads zstd"),
        ),
        (b"PK\x03\x04 rest", "zip"),
    ],
)
def test_other_compressions_are_named(tmp_path, start, kind):
    path = write(tmp_path / "a", start)
    with pytest.raises(UserError) as caught:
        read_lines(path)
    message = f"{path}: {kind}, which this Python does not read: expected gzip, bzip2, xz or plain text"
    assert str(caught.value) == message


@pytest.mark.skipif(sys.version_info < (3, 14), reason="Python 3.14 has zstd")
def test_zstd_is_read(tmp_path):
    from compression import zstd

    assert read_lines(write(tmp_path / "a", zstd.compress(b"a\nb\n"))) == ["a", "b"]


@settings(deadline=None)
@given(lines=st.lists(st.text().map(lambda line: line.replace("\n", "")), min_size=1))
def test_split_lines_undoes_joining(lines):
    # A byte order mark and a "\r" at a line's end are the two things dropped.
    lines = [line.rstrip("\r").replace("\ufeff", "") for line in lines]
    assert split_lines("".join(f"{line}\n" for line in lines).encode(), "a") == lines


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty, expected at least one line"),
        (gzip.compress(b"", mtime=0), "empty, expected at least one line"),
        (b"\xef\xbb\xbf", "empty, expected at least one line"),
        (
            gzip.compress(b"some text\n" * 50, mtime=0)[:-9],
            "truncated or damaged gzip file (Compressed file ended before",
        ),
        (b"\x1f\x8b", "truncated or damaged gzip file ("),
        (b"\x1f\x8b\x00\x00 not gzip", "truncated or damaged gzip file ("),
        (gzip.compress(b"a\n", mtime=0) + b"rest", "truncated or damaged gzip file (Not a gzipped file"),
        (gzip.compress(b"a\n", mtime=0)[:-8] + bytes(8), "truncated or damaged gzip file (CRC check failed"),
        (gzip.compress(b"a\n", mtime=0)[:10] + b"\xff" * 20, "truncated or damaged gzip file (Error -3"),
        (bz2.compress(b"a\n")[:-4], "truncated or damaged bzip2 file (Compressed file ended before"),
        (bz2.compress(b"a\n")[:10] + b"\xff" * 20, "truncated or damaged bzip2 file (Invalid data stream"),
        (lzma.compress(b"a\n")[:-4], "truncated or damaged xz file (Compressed file ended before"),
        (lzma.compress(b"a\n")[:6] + b"\xff" * 20, "truncated or damaged xz file (Corrupt input data"),
    ],
)
def test_damaged_files(tmp_path, content, message):
    path = write(tmp_path / "a.gz", content)
    with pytest.raises(UserError) as caught:
        read_lines(path)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("pack", PACKERS.values(), ids=PACKERS)
@pytest.mark.parametrize(
    ("content", "where"),
    [
        (b"\xff\xfea\x00", "1: not valid UTF-8 (byte 0xff at column 1)"),
        ("bon\nété ".encode() + b"\xe9t\xe9\nfin\n", "2: not valid UTF-8 (byte 0xe9 at column 5)"),
        (b"a\nb\n\xe2\x82", "3: not valid UTF-8 (byte 0xe2 at column 1)"),
        (b"a\n\xed\xa0\x80", "2: not valid UTF-8 (byte 0xed at column 1)"),
    ],
)
def test_undecodable_bytes_are_located(tmp_path, pack, content, where):
    path = write(tmp_path / "a.txt", pack(content))
    with pytest.raises(UserError) as caught:
        read_lines(path)
    assert str(caught.value) == f"{path}:{where}"


def test_what_is_no_file_is_named(tmp_path):
    cases = {
        tmp_path / "none": "no such file",
        tmp_path: "a directory, expected a text file",
        write(tmp_path / "file", "a") / "below": "cannot be read (Not a directory)",
    }
    for path, message in cases.items():
        with pytest.raises(UserError) as caught:
            read_lines(path)
        assert str(caught.value) == f"{path}: {message}"


def test_read_parallel_drops_pairs_with_a_blank_side(tmp_path):
    source = write(tmp_path / "a.en", "one\n\nthree\n \t\nfive\n")
    target = write(tmp_path / "a.fr", "un\ndeux\n\u00a0\n\ncinq\n")
    assert read_parallel(source, target) == ParallelText(["one", "five"], ["un", "cinq"], dropped=3)


def test_different_line_counts_give_both(tmp_path):
    source, target = write(tmp_path / "a.en", "one\ntwo\n"), write(tmp_path / "a.fr", "un\ndeux\ntrois\n")
    with pytest.raises(UserError) as caught:
        read_parallel(source, target)
    assert str(caught.value) == (
        f"{source} has 2 lines but {target} has 3: expected equally many, line i of one translating line i of the other"
    )


def test_nothing_but_blank_sides_is_refused(tmp_path):
    source, target = write(tmp_path / "a.en", "one\n\n"), write(tmp_path / "a.fr", "\ndeux\n")
    with pytest.raises(UserError) as caught:
        read_parallel(source, target)
    assert str(caught.value) == f"{source} and {target}: in every pair of lines a side is blank"


# Encoding


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["the dog sees the cat", "le chien voit le chat"] * 3, 320)


def test_encode_parallel_ends_each_sentence(tokenizer, monkeypatch):
    text = ParallelText(["the dog", "the cat sees", "dog"], ["le chien", "le chat voit", "chien"])
    monkeypatch.setattr("tfm.data.plan.LINES_PER_ENCODING", 2)
    pairs = encode_parallel(text, tokenizer, max_length=100)
    assert (len(pairs), pairs.skipped) == (3, 0)
    assert rows_of(pairs.source, pairs.source_offsets) == [[*ids, EOS] for ids in tokenizer.encode(text.source)]
    assert rows_of(pairs.target, pairs.target_offsets) == [[*ids, EOS] for ids in tokenizer.encode(text.target)]


def test_encode_parallel_skips_a_side_too_long(tokenizer):
    # "é" is two bytes that no merge joins: with the space and EOS, n of them are 2n + 2 tokens.
    text = ParallelText(["é", "éé", "é", "éé"], ["é", "é", "éé", "éé"])
    for max_length, skipped in [(6, 0), (5, 3), (4, 3)]:
        pairs = encode_parallel(text, tokenizer, max_length)
        assert (len(pairs), pairs.skipped) == (4 - skipped, skipped)
        assert max(pairs.source_lengths.max(), pairs.target_lengths.max()) <= max_length


def test_encode_parallel_with_every_pair_too_long(tokenizer):
    message = "^none of 1 pairs has at most 3 tokens a side, end of sentence included$"
    with pytest.raises(UserError, match=message):
        encode_parallel(ParallelText(["é"], ["é"]), tokenizer, max_length=3)


# Batches


@settings(deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), max_size=40),
    batch_tokens=st.integers(12, 60),
    seed=st.integers(0, 2**63),
    shuffle=st.booleans(),
)
def test_every_pair_once_and_within_the_budget(lengths, batch_tokens, seed, shuffle):
    pairs = encoded(lengths)
    plan = batches(pairs, batch_tokens, seed, epoch=3, shuffle=shuffle)
    assert sorted(i for k in range(len(plan)) for i in plan.indices(k).tolist()) == list(range(len(lengths)))
    for k, batch in enumerate(plan):
        chosen = [lengths[i] for i in plan.indices(k).tolist()]
        assert len(batch) == len(chosen)
        longest = (batch.source.layout.max_length, batch.target_input.layout.max_length)
        assert longest == tuple(map(max, zip(*chosen, strict=True)))
        assert len(batch) * max(longest) <= batch_tokens
        assert batch.tokens == sum(s + t for s, t in chosen)


def test_a_batch_ends_only_where_the_next_pair_would_not_fit():
    pairs = random_pairs(300)
    longest = torch.maximum(pairs.source_lengths, pairs.target_lengths)
    plan = batches(pairs, 100, shuffle=False)
    for k in range(len(plan) - 1):
        with_next = torch.cat([plan.indices(k), plan.indices(k + 1)[:1]])
        assert len(with_next) * longest[with_next].max() > 100


def test_packed_tokens_are_the_sentences():
    pairs = random_pairs(50)
    plan = batches(pairs, 100, seed=1, epoch=2)
    sources, targets = rows_of(pairs.source, pairs.source_offsets), rows_of(pairs.target, pairs.target_offsets)
    for k, batch in enumerate(plan):
        chosen = plan.indices(k).tolist()
        source, target = batch.source.layout, batch.target_input.layout
        assert rows_of(batch.source.values, source.cu_seq) == [sources[i] for i in chosen]
        assert rows_of(batch.target_output, target.cu_seq) == [targets[i] for i in chosen]
        assert rows_of(batch.target_input.values, target.cu_seq) == [[BOS, *targets[i][:-1]] for i in chosen]
        assert source.positions.tolist() == [j for i in chosen for j in range(len(sources[i]))]
        assert target.positions.tolist() == [j for i in chosen for j in range(len(targets[i]))]
        assert source.cu_seq.dtype == target.cu_seq.dtype == torch.int32
        tokens = (batch.source.values, batch.target_input.values, batch.target_output)
        assert {tensor.dtype for tensor in (*tokens, source.positions, target.positions)} == {torch.int64}


def test_padded_and_packed_agree():
    for batch in batches(random_pairs(50), 100, seed=1):
        for side in (batch.source, batch.target_input, replace(batch.target_input, values=batch.target_output)):
            rows = rows_of(side.values, side.layout.cu_seq)
            expected = [row + [PAD] * (side.layout.max_length - len(row)) for row in rows]
            assert_close(side.padded(), torch.tensor(expected))


def tensors_of(batch):
    found = []
    batch.map(lambda tensor: found.append(tensor) or tensor)
    return found


def contents(batch):
    return [batch.shape, *(tensor.tolist() for tensor in tensors_of(batch))]


def test_a_plan_is_a_pure_function_of_its_arguments():
    pairs = random_pairs(200)
    plan = batches(pairs, 100, seed=5, epoch=7)
    torch.manual_seed(1)
    again = batches(pairs, 100, seed=5, epoch=7)
    assert [contents(batch) for batch in plan] == [contents(batch) for batch in again]
    # Resuming at batch k needs none before it.
    assert contents(again[len(again) - 1]) == contents(list(plan)[-1])


def test_seed_and_epoch_each_change_the_order():
    pairs = random_pairs(200)
    orders = {
        tuple(i for k in range(len(plan)) for i in plan.indices(k).tolist())
        for plan in (batches(pairs, 100, seed, epoch) for seed in range(3) for epoch in range(3))
    }
    assert len(orders) == 9


def test_shuffling_mixes_equal_lengths_and_the_order_of_batches():
    plan = batches(encoded([(3, 3)] * 40 + [(9, 9)] * 40), 36, seed=0, epoch=0)
    widths = [batch.source.layout.max_length for batch in plan]
    assert widths != sorted(widths)
    assert any(indices != sorted(indices) for indices in (plan.indices(k).tolist() for k in range(len(plan))))


def test_without_shuffling_batches_run_from_short_to_long_whatever_the_seed():
    pairs = random_pairs(100)
    plan = batches(pairs, 100, seed=1, epoch=1, shuffle=False)
    order = [i for k in range(len(plan)) for i in plan.indices(k).tolist()]
    lengths = list(zip(pairs.source_lengths.tolist(), pairs.target_lengths.tolist(), strict=True))
    assert order == sorted(range(100), key=lambda i: (lengths[i], i))
    assert order == batches(pairs, 100, seed=2, epoch=0, shuffle=False).order.tolist()


def test_a_sentence_longer_than_the_budget_is_refused():
    pairs = encoded([(3, 4), (5, 21)])
    with pytest.raises(
        UserError, match=r"^a batch of 20 tokens cannot hold the longest sentence: expected at least 21$"
    ):
        batches(pairs, 20)
    assert len(batches(pairs, 21)) == 2


def test_past_the_last_batch_is_an_index_error():
    plan = batches(random_pairs(3), 100)
    with pytest.raises(IndexError):
        plan[len(plan)]


def test_to_moves_every_tensor():
    batch = batches(random_pairs(5), 100)[0].to("meta", non_blocking=True)
    tensors = tensors_of(batch)
    assert len(tensors) == 7
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert isinstance(batch.source.layout.max_length, int)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu_nothing_changes():
    batch = batches(random_pairs(50), 200)[0]
    moved = batch.pin_memory().to("cuda", non_blocking=True)
    assert contents(moved) == contents(batch)
    for side, expected in ((moved.source, batch.source), (moved.target_input, batch.target_input)):
        assert_close(side.padded().cpu(), expected.padded())


@pytest.mark.parametrize("multiples", [(16,), (1,), (64, 8, 4), (7, 3, 1), (32, 1, 5)], ids=str)
def test_a_rounded_batch_is_filled_up_behind_its_sentences(multiples):
    tokens, sentences, length = [*multiples, 1, 1][:3]
    batch = batches(random_pairs(30), 150, shuffle=False)[2]
    rounded = batch.rounded(*multiples)
    assert len(rounded) % sentences == 0
    for side, before in ((rounded.source, batch.source), (rounded.target_input, batch.target_input)):
        filled, layout = side.layout, before.layout
        for values, own in ((side.values, before.values), (filled.positions, layout.positions)):
            assert len(values) % tokens == 0
            assert len(values) - len(own) < tokens
            assert torch.equal(values[: len(own)], own)
            assert not values[len(own) :].any()
        assert filled.max_length == -(-layout.max_length // length) * length
        assert torch.equal(filled.cu_seq[: len(layout.cu_seq)], layout.cu_seq)
        assert (filled.cu_seq[0], filled.cu_seq[-1]) == (0, len(side.values))
        assert 0 <= filled.lengths.min() <= filled.lengths.max() <= filled.max_length
    assert torch.equal(rounded.target_output[: len(batch.target_output)], batch.target_output)
    assert (rounded.target_output[len(batch.target_output) :] == IGNORED).all()
    assert rounded.rounded(*multiples).shape == rounded.shape


def test_a_batch_takes_the_numbers_of_another():
    one, other = (batches(random_pairs(30), 150, seed)[0].rounded(150, 30, 30) for seed in (1, 2))
    assert one.shape == other.shape
    held = one.clone()
    pointers = [tensor.data_ptr() for tensor in tensors_of(held)]
    held.copy_(other)
    assert contents(held) == contents(other) != contents(one)
    assert pointers == [tensor.data_ptr() for tensor in tensors_of(held)]
