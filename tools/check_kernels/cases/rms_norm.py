"""RMSNorm behind bias, dropout and residual."""

from __future__ import annotations

from collections.abc import Iterator

from tools.check_kernels.cases.case import Case
from tools.check_kernels.cases.norm import norm_cases


def rms_norm_cases(every: bool) -> Iterator[Case]:
    """The norm's cases, not centred: 1 + weight, rounded before the weight."""
    yield from norm_cases("rms_norm", (1024, 8191), every, centred=False)
