"""Huge but finite scores: every backend that runs here gives what plain torch in fp32 gives (huge_scores.py).

`make test-all` draws 2,000 examples a backend.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import huge_scores
import pytest
import torch
from huge_scores import LOWEST, Problem, problems
from hypothesis import given, settings
from selection import EVERY

from tfm import native
from tfm.ops import backends

CPU = torch.device("cpu")
WHY_UNAVAILABLE = {
    "reference": "",
    "triton": "" if backends.has_triton() else "triton is not installed",
    "native": native.why_unavailable(CPU),
}
SKIPPED = {impl: pytest.mark.skipif(bool(why), reason=why) for impl, why in WHY_UNAVAILABLE.items()}
RUNS = [
    pytest.param(impl, dtype, id=f"{impl} {dtype}", marks=SKIPPED[impl])
    for impl, dtype in (
        ("reference", torch.float32), ("triton", torch.float32), ("triton", torch.float16),
        ("triton", torch.bfloat16),
        ("native", torch.float32), ("native", torch.bfloat16),
    )
]  # fmt: skip


# Tests of a backend that draw examples, its dtypes counted apart.
DRAWING = {"reference": 2, "triton": 9, "native": 4}


def examples(impl: str) -> settings:
    """Few where Triton's interpreter takes its time."""
    return settings(deadline=None, max_examples=2000 // DRAWING[impl] if EVERY else 6 if impl == "triton" else 20)


def at_any_length() -> AbstractContextManager[None]:
    """Returns a block in which Triton's kernels for long sequences serve every length, with several tiles at few."""
    from long_attention import SMALL, AttentionTiles, kernels_of_any_length

    return kernels_of_any_length(dict.fromkeys(SMALL, AttentionTiles(16, 16, 4, 2)))


def assert_right(problem: Problem, impl: str, dtype: torch.dtype) -> None:
    tensors = huge_scores.make(problem, dtype)
    truth = huge_scores.expected(problem, tensors, dtype)
    huge_scores.assert_right(huge_scores.results(problem, tensors, impl, dtype), truth, dtype)


@pytest.mark.parametrize(("impl", "dtype"), RUNS)
def test_padded(impl, dtype):
    # So long that the native kernels have several tiles.
    @examples(impl)
    @given(problems(33 if impl == "triton" else 300))
    def check(problem):
        assert_right(problem, impl, dtype)

    check()


@pytest.mark.parametrize(("impl", "dtype"), [run for run in RUNS if run.values[0] == "triton"])
def test_padded_at_any_length(impl, dtype):
    @examples(impl)
    @given(problems(50))
    def check(problem):
        assert_right(problem, impl, dtype)

    with at_any_length():
        check()


@pytest.mark.parametrize(("impl", "dtype"), RUNS)
def test_packed_and_decoding(impl, dtype):
    @examples(impl)
    @given(problems(33, masked=False))
    def check(problem):
        tensors = huge_scores.make(problem, dtype)
        truth = huge_scores.expected(problem, tensors, dtype)
        huge_scores.assert_right(huge_scores.packed_results(problem, tensors, impl, dtype), truth, dtype)
        if not problem.is_causal:
            huge_scores.assert_right(huge_scores.decoded_results(problem, tensors, impl, dtype), truth, dtype)

    check()
    with at_any_length() if impl == "triton" else nullcontext():
        check()


# Rows of a mask as runs from the left: see Problem.
NAMED = {
    "a row of finfo.min": Problem(1, (1, 1, 1, 4, 8), runs=(((0.0, 1),), ((LOWEST, 1),))),
    "a row of -1e9": Problem(2, (1, 1, 1, 4, 8), runs=(((0.0, 1),), ((-1e9, 1),))),
    "left padding and causal": Problem(
        3, (2, 2, 1, 40, 40), runs=(((LOWEST, 37), (0.0, 1)), ((0.0, 1),)), shared=(False, True, True), is_causal=True
    ),
    "right padding": Problem(4, (1, 1, 1, 20, 40), runs=(((0.0, 3), (LOWEST, 1)),)),
    "+1e30 on three keys": Problem(5, (1, 1, 1, 4, 40), runs=(((0.0, 20), (1e30, 3), (0.0, 1)),)),
    "logits of 1e4": Problem(6, (1, 2, 1, 33, 40), logits=4.0**7),
    "logits of 1e5, a negative scale": Problem(7, (1, 2, 1, 33, 40), logits=4.0**8, scale=-1.0),
    "sinks of 1e9 beside logits of 1e5": Problem(8, (1, 2, 1, 17, 40), logits=4.0**8, sink=1e9),
    "sinks below everything": Problem(9, (1, 2, 1, 17, 40), logits=4.0**8, sink=LOWEST),
}
# Whole tiles of native kernels.
LONG = {
    "keys 0-127 of 441": Problem(10, (1, 1, 1, 3, 441), runs=(((LOWEST, 128), (0.0, 1)),)),
    "150 left pads of 160": Problem(11, (1, 2, 2, 5, 160), runs=(((LOWEST, 150), (0.0, 1)),)),
    "keys 128-440 of 441": Problem(12, (1, 1, 1, 3, 441), runs=(((0.0, 128), (LOWEST, 1)),)),
}


@pytest.mark.parametrize(("impl", "dtype"), RUNS)
@pytest.mark.parametrize("problem", (NAMED | LONG).values(), ids=(NAMED | LONG).keys())
def test_named(problem, impl, dtype):
    assert_right(problem, impl, dtype)
    if impl == "triton" and problem in NAMED.values():
        with at_any_length():
            assert_right(problem, impl, dtype)
