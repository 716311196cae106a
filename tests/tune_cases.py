"""A sweep of an operation that works with 1 to 8 warps, gives wrong gradients with 16, and does not launch with 32."""

from __future__ import annotations

import os
from dataclasses import replace

import torch

from benchmarks.suite import BOTH, OURS, Peer, Suite, Work
from tfm.kernels.launch import rows
from tools.tune.candidates.sweep import LaunchSweep

TABLE = ((2, 0.9), (4, 0.7), (16, 0.6), (32, 0.8))
# Of a candidate that does not come back.
DEADLY = 128
TODAYS = rows.sum_partials(32)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.warps = rows.sum_partials(x.shape[-1]).num_warps
        if ctx.warps == DEADLY:
            os.abort()
        if ctx.warps == 32:
            raise RuntimeError("out of resource: registers\nmore lines")
        return 2 * x

    @staticmethod
    def backward(ctx, dy):
        return 2 * dy if ctx.warps < 16 else 2.1 * dy


def warps(current, arguments, warps):
    assert arguments["columns"] in (32, 64)
    yield replace(current, num_warps=warps)


def leaf(size):
    return (torch.randn(size, 32, requires_grad=True),)


SUITE = Suite("double", [3], {OURS: Peer(Doubled.apply)}, leaf, lambda *_: Work())


def sweep(*table):
    said = {"question": "Which?", "prediction": "The fastest."}
    return LaunchSweep("rows.sum_partials", SUITE, BOTH, **said, sizes=[3], rehearsal=3, table=table, settings=warps)


SWEEP = sweep(*TABLE)
