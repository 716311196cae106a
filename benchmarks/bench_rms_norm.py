"""dropout, residual, RMSNorm in one.

GB/s counts each tensor once: x, residual, y and h forward; dy, dh, h, dx and dresidual backward.
"""

from __future__ import annotations

import pytest

from benchmarks.device import DTYPE
from benchmarks.inputs import random
from benchmarks.measure import measure
from benchmarks.peers import EPS, RMS_NORM, ours_natively
from benchmarks.shapes import RMS_NORMS, Norm
from benchmarks.suite import FORWARD, OURS, Peer, Suite, Work
from tfm import ops


def ours(x, residual, weight, dropout_p):
    return ops.residual_rms_norm(x, residual, weight, EPS, dropout_p)


def inputs(size: Norm):
    return random(size.rows, size.columns), random(size.rows, size.columns), random(size.columns), size.dropout_p


def work(size: Norm, direction: str) -> Work:
    tensors = 4 if direction == FORWARD else 9
    return Work(bytes=tensors * size.rows * size.columns * DTYPE.itemsize)


PEERS = {OURS: Peer(ours)} | ours_natively(Peer(ours)) | RMS_NORM
SUITE = Suite("rms_norm", RMS_NORMS, PEERS, inputs, work)


@pytest.mark.parametrize("case", SUITE.cases(), ids=str)
def test_rms_norm(benchmark, case):
    measure(benchmark, case)
