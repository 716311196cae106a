"""Matrices seen as rows without copies, and sums over programs' partial results."""

from __future__ import annotations

import launches
import oracle
import pytest
import torch

from tfm.kernels.rows import as_rows, sum_partials
from tfm.kernels.tape import Tape

BASE = torch.arange(3 * 4 * 20.0).view(3, 4, 20)


@pytest.mark.parametrize(
    ("x", "stride", "copied"),
    [
        (BASE, 20, False),
        (BASE[..., 3:], 20, False),
        (BASE[:, 1], 80, False),
        (BASE[0, 0], 20, False),
        (BASE[:0], 20, False),
        (BASE[:1, :1].expand(3, 4, 20), 0, False),
        (BASE.transpose(0, 1), 20, True),
        (BASE[..., ::2], 10, True),
        (BASE[..., :1].expand(3, 4, 20), 20, True),
    ],
    ids=["whole", "columns", "one of each", "vector", "empty", "expanded rows", "swapped", "gaps", "expanded columns"],
)
def test_as_rows(x, stride, copied):
    rows, row_stride = as_rows(x)
    assert row_stride == stride
    assert (rows.data_ptr() != x.data_ptr()) == copied
    shape = (x[..., :1].numel(), x.shape[-1])
    assert torch.equal(rows.as_strided(shape, (row_stride, 1)), x.reshape(shape))


def test_nothing_has_no_rows():
    assert as_rows(None) == (None, 0)


@pytest.mark.parametrize(("programs", "columns"), [(1, 1), (3, 17), (128, 65), (264, 130)])
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32,),
        (None, torch.float32),
        (torch.float16, None),
        (torch.bfloat16, None),
        (torch.float32, torch.float16, None),
    ],
)
def test_sum_partials(programs, columns, dtypes, kernel_device, monkeypatch):
    launched = launches.watch(monkeypatch)
    partials = torch.randn(programs, len(dtypes), columns, device=kernel_device)
    sums = [None if kind is None else torch.empty(columns, dtype=kind, device=kernel_device) for kind in dtypes]
    sum_partials(Tape(), partials, *sums)
    for i, found in enumerate(sums):
        if found is not None:
            # Row after row, as the interpreter adds.
            truth, plain = partials[:, i].double().sum(0), sum(partials[:, i]).to(found.dtype)
            oracle.assert_matches(found, truth, plain)
    assert launched == ["sum_partials_kernel"]
