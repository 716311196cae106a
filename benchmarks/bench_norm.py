"""Measures dropout, residual and LayerNorm or RMSNorm in one.

GB/s counts each tensor once, as a perfect kernel would move it: x, residual, y and h forward; dy, dh, h, dx and
dresidual backward.
"""

from __future__ import annotations

import pytest

from benchmarks.device import DTYPE
from benchmarks.inputs import random
from benchmarks.measure import measure
from benchmarks.peers import EPS, LAYER_NORM, RMS_NORM, ours_natively
from benchmarks.shapes import LAYER_NORMS, RMS_NORMS, Norm
from benchmarks.suite import FORWARD, OURS, Peer, Suite, Work
from tfm import ops


def ours(x, residual, weight, bias, dropout_p):
    return ops.residual_layer_norm(x, residual, weight, bias, EPS, dropout_p)


def ours_rms(x, residual, weight, dropout_p):
    return ops.residual_rms_norm(x, residual, weight, EPS, dropout_p)


def inputs(size: Norm):
    shape = size.rows, size.columns
    return random(*shape), random(*shape), random(size.columns), random(size.columns), size.dropout_p


def rms_inputs(size: Norm):
    return random(size.rows, size.columns), random(size.rows, size.columns), random(size.columns), size.dropout_p


def work(size: Norm, direction: str) -> Work:
    tensors = 4 if direction == FORWARD else 9
    return Work(bytes=tensors * size.rows * size.columns * DTYPE.itemsize)


PEERS = {OURS: Peer(ours)} | ours_natively(Peer(ours)) | LAYER_NORM
RMS_PEERS = {OURS: Peer(ours_rms)} | ours_natively(Peer(ours_rms)) | RMS_NORM
LAYER = Suite("layer_norm", LAYER_NORMS, PEERS, inputs, work)
RMS = Suite("rms_norm", RMS_NORMS, RMS_PEERS, rms_inputs, work)


@pytest.mark.parametrize("case", LAYER.cases(), ids=str)
def test_layer_norm(benchmark, case):
    measure(benchmark, case)


@pytest.mark.parametrize("case", RMS.cases(), ids=str)
def test_rms_norm(benchmark, case):
    measure(benchmark, case)
