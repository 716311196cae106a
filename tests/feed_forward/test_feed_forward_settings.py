"""Settings of matmuls with an epilogue: they cover every shape, and say where cuBLAS is better."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tfm.kernels.launch import feed_forward as launch
from tfm.kernels.launch.device import Chip, chip_of

HOPPER, AMPERE = Chip(9, 132), Chip(8, 108)


def forward(rows, columns=2048, depth=512, gated=False, dtype=torch.bfloat16, aligned=True, chip=HOPPER):
    return launch.linear_activation(rows, columns, depth, gated, dtype, aligned, chip)


def backward(rows, columns=2048, depth=512, dtype=torch.bfloat16, aligned=True, chip=HOPPER):
    return launch.linear_activation_backward(rows, columns, depth, dtype, aligned, chip)


@given(rows=st.integers(0, 10**7), columns=st.integers(1, 10**5), gated=st.booleans())
@pytest.mark.parametrize("chip", [HOPPER, AMPERE], ids=["hopper", "ampere"])
def test_tiles_cover_the_matrix(chip, rows, columns, gated):
    for tiles, width in (
        (forward(rows, columns, gated=gated, chip=chip), columns * (2 if gated else 1)),
        (backward(rows, columns, chip=chip), columns),
    ):
        row_tiles, column_tiles = -(-rows // tiles.block_rows), -(-width // tiles.block_columns)
        assert tiles.programs == row_tiles * column_tiles
        # Warpgroups of Hopper multiply 64 rows; a slice of hidden has octets of the dropout mask.
        assert tiles.block_rows >= 64
        assert tiles.block_columns // tiles.slices // (2 if gated else 1) >= 8
        assert tiles.num_warps * 32 * 64 >= tiles.block_rows * tiles.block_columns


@given(rows=st.integers(0, 10**7), columns=st.integers(1, 10**5))
def test_element_tiles_cover_the_matrix(rows, columns):
    for tiles in (launch.activation_dropout(rows, columns), launch.activation_dropout_backward(rows, columns)):
        strips = -(-columns // tiles.block_columns)
        assert tiles.programs == strips * -(-rows // (tiles.block_rows * tiles.tiles))
        assert tiles.block_columns % 8 == 0


@pytest.mark.parametrize("settings_of", [forward, backward], ids=["forward", "backward"])
def test_cublas_where_it_is_better(settings_of):
    assert settings_of(8192) is not None
    assert settings_of(8192, depth=1024) is not None
    assert settings_of(8192, depth=2048) is None
    assert settings_of(8192, aligned=False) is None
    assert settings_of(8192, dtype=torch.float32) is None


def test_few_rows_still_fill_the_chip():
    assert [forward(rows).programs for rows in (8192, 1024, 512, 64)] == [1024, 256, 256, 64]
    assert backward(8192) == launch.MatmulTiles(1024, 128, 128, 64, 8, 8, 3, max_registers=128)
    assert backward(8192, chip=AMPERE) == launch.MatmulTiles(1024, 128, 128, 32, 8, 8, 4, max_registers=128)


def test_the_interpreter_is_taken_for_hopper():
    assert chip_of(torch.device("cpu")) == Chip(9, 2)
