"""Launch settings: they cover every shape, fit every chip, and do not depend on what must not matter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tfm.kernels.launch import embedding, norm, rotary
from tfm.kernels.launch.device import are_aligned, chip_of
from tfm.kernels.launch.rows import RowTiles

COLUMNS = st.integers(1, 32768)


def is_power_of_two(number):
    return number > 0 and number & (number - 1) == 0


def forward(rows, columns):
    return norm.forward(rows, columns, columns % 16 == 0)


def backward(rows, columns, multiprocessors=132):
    return norm.backward(rows, columns, columns % 16 == 0, False, multiprocessors)


def crowded(rows, columns, multiprocessors=132):
    return norm.backward(rows, columns, columns % 16 == 0, True, multiprocessors)


EVERY = pytest.mark.parametrize("settings_of", [forward, backward, crowded], ids=lambda settings: settings.__name__)


@EVERY
@given(rows=st.integers(0, 10**10), columns=COLUMNS)
def test_tiles_cover_the_rows(settings_of, rows, columns):
    tiles = settings_of(rows, columns)
    assert tiles.block_columns * tiles.chunks >= columns
    assert tiles.chunks == 1 or tiles.block_rows == 1
    assert all(map(is_power_of_two, (tiles.block_rows, tiles.block_columns, tiles.num_warps)))
    # Philox draws eight columns at once; CUDA allows 1,024 threads a block; triton 2**20 elements a tensor.
    assert tiles.block_columns % 8 == 0
    assert tiles.num_warps <= 32
    assert tiles.block_rows * tiles.block_columns <= 2**20
    # 16 elements a thread are what the registers hold.
    assert tiles.block_rows * tiles.block_columns <= 16 * 32 * tiles.num_warps
    assert tiles.programs >= 1
    # Sums that go through memory must not be overtaken by the next tile's.
    assert tiles.stages == 1 or tiles.chunks == 1
    assert tiles.max_registers is None or tiles.max_registers * 32 * tiles.num_warps <= 65536


@given(rows=st.integers(0, 10**10), columns=COLUMNS)
def test_forward_has_a_program_for_each_tile(rows, columns):
    tiles = forward(rows, columns)
    assert (tiles.programs - 1) * tiles.block_rows < max(rows, 1) <= tiles.programs * tiles.block_rows


@given(rows=st.integers(0, 10**10), columns=COLUMNS, multiprocessors=st.integers(1, 200))
def test_backward_programs_are_bounded(rows, columns, multiprocessors):
    tiles = backward(rows, columns, multiprocessors)
    assert tiles.programs <= 2 * multiprocessors
    assert (tiles.programs - 1) * tiles.block_rows < max(rows, 1)


@EVERY
@given(rows=st.lists(st.integers(0, 10**7), min_size=2, max_size=2), columns=COLUMNS)
def test_blocks_do_not_depend_on_the_rows(settings_of, rows, columns):
    first, second = (settings_of(number, columns) for number in rows)
    assert (first.block_rows, first.block_columns, first.chunks, first.num_warps) == (
        second.block_rows, second.block_columns, second.chunks, second.num_warps
    )  # fmt: skip


@pytest.mark.parametrize(
    ("columns", "forward_settings", "backward_settings"),
    [
        (512, RowTiles(2048, 4, 512, 1, 4, 1, 64), RowTiles(264, 4, 512, 1, 8, 3, 128)),
        (1000, RowTiles(8192, 1, 1024, 1, 4, 1, 255), RowTiles(264, 1, 1024, 1, 8, 1, 128)),
        (4096, RowTiles(8192, 1, 4096, 1, 8, 1, 64), RowTiles(264, 1, 4096, 1, 8, 2)),
        (8192, RowTiles(8192, 1, 8192, 1, 16, 1, 64), RowTiles(264, 1, 8192, 1, 16)),
        (8191, RowTiles(8192, 1, 8192, 1, 16, 1, 128), RowTiles(264, 1, 1024, 8, 8, 1, 128)),
        (32768, RowTiles(8192, 1, 4096, 8, 8, 1, 255), RowTiles(264, 1, 4096, 8, 8)),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
def test_settings_at_8192_rows(columns, forward_settings, backward_settings):
    assert forward(8192, columns) == forward_settings
    assert backward(8192, columns) == backward_settings


@given(rows=st.integers(0, 10**7), columns=st.integers(1, 10**5), chunk=st.sampled_from([16, 32]))
def test_embedding_tiles_cover_tokens_and_rows(rows, columns, chunk):
    chunks = rows // chunk
    first, second = embedding.backward(chunks, chunk, rows, columns)
    assert (first.programs, first.block_rows) == (chunks, chunk)
    for tiles, covered in ((embedding.forward(rows, columns), rows), (first, chunks * chunk), (second, rows)):
        assert tiles.programs * tiles.block_rows >= covered
        assert tiles.chunks * tiles.block_columns >= columns
        assert tiles.block_columns % 8 == 0
        assert tiles.block_rows * tiles.block_columns <= 16 * 32 * tiles.num_warps


@given(tokens=st.integers(0, 10**7), half=st.integers(0, 256), rest=st.integers(0, 512))
def test_rotary_tiles_cover_tokens_and_columns(tokens, half, rest):
    tiles = rotary.tiles(tokens, half, 2 * half + rest)
    assert tiles.programs * tiles.block_tokens >= tokens
    assert tiles.block_half >= half
    assert tiles.block_rest >= rest
    assert all(map(is_power_of_two, (tiles.block_tokens, tiles.block_half, max(tiles.block_rest, 1))))
    assert tiles.block_tokens * max(2 * tiles.block_half, tiles.block_rest) <= 16 * 32 * tiles.num_warps


def test_interpreter_strides():
    assert chip_of(torch.device("cpu")).multiprocessors == 2


def test_odd_strides_take_smaller_tiles():
    assert are_aligned(512, 1536, 0)
    assert not are_aligned(512, 515)
    assert norm.forward(8192, 512, aligned=False).block_rows == 2
    assert norm.backward(8192, 2048, aligned=False, crowded=False, multiprocessors=132).block_columns == 1024
    assert norm.backward(8192, 8192, aligned=True, crowded=True, multiprocessors=132).block_columns == 2048
