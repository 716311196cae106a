"""One small pass of every kernel, Triton's and csrc's, with what takes most of their paths: dropout, masks, odd sizes.

    compute-sanitizer --tool racecheck python -m tools.sanitize.every_kernel [OPERATION ...]

Under the sanitizer a kernel takes a hundred times as long, so the sizes are a few tiles and a rest; forward and
backward both. Without a GPU Triton's kernels run in its interpreter, and csrc's are those for CPUs. What passed is a
line of the journal that TFM_JOURNAL names, if any, and so is a backend that is not there.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from tfm import native
from tfm.ops import backends
from tools import interpreter
from tools.gpu.child import JOURNAL, append
from tools.subjects import subjects
from tools.subjects.inputs import Pass, Tensors


@cache
def passes() -> dict[str, Pass]:
    """Returns every operation's pass, by its name."""
    return {name: function for subject in subjects() for name, function in subject.PASSES.items()}


def run(backend: str, operation: str, device: torch.device, dtype: torch.dtype) -> None:
    """Runs one operation's kernels, forward and backward; the GPU is done when this returns."""
    new = Tensors(device, dtype, short=backend == "native" and device.type == "cuda")
    with backends.use(backend):
        for outputs in passes()[operation](new):
            given = [x for x in (outputs if isinstance(outputs, tuple) else (outputs,)) if x.requires_grad]
            if given:
                torch.autograd.grad(given, new.leaves, [torch.ones_like(x) for x in given], allow_unused=True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def served(backend: str, device: torch.device) -> dict[str, tuple[torch.dtype, ...]]:
    """Returns the operations that the backend's kernels serve on such a device, with the dtypes of their passes."""
    rows = [row for row in backends.TABLE if row.backend == backend and row.device in ("", device.type)]
    halves = torch.float16, torch.bfloat16
    csrcs = backend == "native" and device.type == "cuda"
    return {
        operation: halves if csrcs and "attention" in operation else row.dtypes
        for row in rows
        for operation in row.operations
    }


def missing(backend: str, device: torch.device) -> str:
    """Says why the backend's kernels cannot run here; empty where they can."""
    if backend == "native":
        return native.why_unavailable(device)
    return backends.why_triton_unavailable(device, automatic=False)


def main(only: Sequence[str]) -> None:
    interpreter.mend()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for backend in ("triton", "native"):
        if reason := missing(backend, device):
            note("missing", f"{backend}: {reason}")
            continue
        for operation, dtypes in served(backend, device).items():
            if only and not any(name in operation for name in only):
                continue
            for dtype in dtypes:
                run(backend, operation, device, dtype)
                note("passed", f"{backend} {operation} {str(dtype).removeprefix('torch.')}")


def note(kind: str, what: str) -> None:
    print(f"{kind}: {what}", flush=True)
    if JOURNAL in os.environ:
        append(Path(os.environ[JOURNAL]), {kind: what})


if __name__ == "__main__":
    main(sys.argv[1:])
