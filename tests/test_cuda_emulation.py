"""The emulation that CUDA's kernels are tested under runs a right kernel, and stops each wrong one with its reason."""

from __future__ import annotations

import ctypes
import re

import emulated
import pytest
import torch

RACE = r"race in shared memory: thread \d+"
# In the order of tests/cuda_emulation/mistakes.cu, after the right kernel.
MISTAKES = {
    "reads without a barrier": RACE + r" writes what thread \d+ read",
    "overwrites what is read": RACE + r" writes what thread \d+ read",
    "takes a shuffle for a barrier": RACE + r" reads what thread \d+ wrote",
    "blocks write one place": r"race in global memory: thread \d+ writes what thread \d+ wrote in another block",
    "reads what nobody wrote": r"shared memory is read before it is written",
    "reads beyond shared memory": r"byte 515 of 512 bytes of shared memory is touched \(thread 127,0,0",
    "barrier in a branch": r"never come: 100 of 128 threads wait at a barrier, 28 have returned",
    "shuffles with lanes that left": r"never come: .* thread 0 in __shfl_xor_sync",
    "shuffles from outside the mask": r"lane \d+ shuffles from lane \d+, which its mask does not name",
    "masks disagree": r"__shfl_sync with mask \w+ meets __shfl_sync with mask \w+",
    "crooked vector": r"mistakes\.cu:\d+: crooked address",
    "outside a local array": r"mistakes\.cu:\d+: index 4 is outside",
}


@pytest.fixture(scope="module")
def run_kernel():
    library = ctypes.CDLL(str(emulated.library("mistakes", emulated.EMULATION / "mistakes.cu")))
    library.run_kernel.restype = ctypes.c_char_p

    def run(index):
        x, y = torch.arange(256, dtype=torch.float32), torch.zeros(256)
        failure = library.run_kernel(index, ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()))
        return failure.decode(), y

    return run


def test_a_right_kernel_runs(run_kernel):
    for _ in range(2):
        failure, y = run_kernel(0)
        assert failure == ""
        assert y[:2].tolist() == [127 * 64, 16]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_and_does_no_lasting_harm(mistake, run_kernel):
    index = 1 + list(MISTAKES).index(mistake)
    for _ in range(2):
        failure, _ = run_kernel(index)
        assert re.match(rf"cuda emulation: .*{MISTAKES[mistake]}", failure), failure
    assert run_kernel(0)[0] == ""
