"""The pass that compute-sanitizer watches leaves no kernel out."""

from __future__ import annotations

import launches
import torch

from benchmarks import sanitized_pass
from benchmarks.compiled import CASES, cases_of


def test_every_kernel_is_launched(kernel_device, monkeypatch):
    launched = launches.watch(monkeypatch)
    for operation in sanitized_pass.operations():
        sanitized_pass.run(operation, kernel_device, torch.float16)
    assert {case.kernel.fn.__name__ for case in cases_of(CASES, every=False)} <= set(launched)
