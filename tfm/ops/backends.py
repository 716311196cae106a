"""The one place where a backend is chosen for an operation.

`impl="auto"` reads TABLE top to bottom and takes the first row that fits; the reference serves whatever no row takes.
A backend asked for by name, in a call or by `use`, is never replaced by another: it runs or raises ValueError.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from tfm import native
from tfm.operators import ROWS, Row
from tfm.tracing import tracing
from tfm.transforms import transforming, wraps_tensors

BACKENDS = ("reference", "triton", "native")

# Each subject has its rows beside its operators. On GPUs csrc comes after Triton, and serves where Triton is missing,
# until a record shows where it is faster.
TABLE = ROWS

# Loaded once, here: Dynamo cannot trace it.
native.load()

# Looked up once: the search walks sys.path, and torch 2.11's Dynamo breaks its graph there.
_HAS_TRITON = importlib.util.find_spec("triton") is not None

# A plain module global: Dynamo guards on it, where a ContextVar would break the graph.
_forced: str | None = None


@contextmanager
def use(impl: str) -> Iterator[None]:
    """Makes every operation called with impl="auto" inside the block run on backend `impl`, or raise ValueError.

    "auto" gives the choice back to the table. The setting is one for the whole process, not for a thread.
    """
    global _forced
    _check_name(impl)
    before, _forced = _forced, None if impl == "auto" else impl
    try:
        yield
    finally:
        _forced = before


def forced() -> str | None:
    """Returns the backend that `use` sets here; None where the table chooses."""
    return _forced


def exports_plainly() -> bool:
    """Tells whether torch's own operations alone are recorded: in traces, and in export under `use("reference")`."""
    return tracing() or (_forced == "reference" and torch.compiler.is_exporting())


def choose(
    operation: str,
    impl: str,
    x: Tensor,
    reference_only: str = "",
    *others: torch.dtype | None,
    native_unavailable: str = "",
) -> str:
    """Returns the backend that runs `operation` on tensors like `x`.

    `reference_only`: the reason, in words, why no kernel does what the caller asks for; empty where kernels do.
    `others`: the dtypes of the other tensors, results included, where they may differ from `x`'s.
    `native_unavailable`: the reason why csrc does not do it, where only csrc does not.

    Raises:
        ValueError: `impl` is no backend, or one that cannot run here; the message says why.
    """
    if impl == "auto":
        impl = _forced or "auto"
    _check_name(impl)
    if impl == "reference":
        return impl
    if transforming():
        reference_only = "transforms and forward-mode differentiation need operations of torch's own"
    if wraps_tensors(x):
        reference_only = f"{type(x).__name__} knows torch's own operations alone"
    if tracing():
        reference_only = "a trace holds torch's own operations alone"
    rows = [row for row in TABLE if operation in row.operations and impl in ("auto", row.backend)]
    reason = "" if rows else f"{operation} has no backend of that name"
    for row in rows:
        if row.device not in ("", x.device.type):
            reason = reason or f"expected {row.device.upper()} tensors, got {x.device.type} tensors"
            continue
        refused = native_unavailable if row.backend == "native" else ""
        reason = reference_only or refused or why_unavailable(row, x, others, automatic=impl == "auto")
        if not reason:
            return row.backend
    if impl == "auto":
        return "reference"
    raise ValueError(f"{operation} cannot run with impl={impl!r}: {reason}")


def why_unavailable(row: Row, x: Tensor, others: tuple[torch.dtype | None, ...], automatic: bool) -> str:
    """Says why `row` cannot serve `x` beside the `others`; empty where it can."""
    # Triton's kernels read the other tensors in any dtype.
    for dtype in (x.dtype, *others) if row.backend == "native" else (x.dtype,):
        if dtype is not None and dtype not in row.dtypes:
            return f"expected one of {', '.join(map(_dtype_name, row.dtypes))}, got {_dtype_name(dtype)}"
    if x.dim() and x.shape[-1] > row.max_columns:
        return f"expected at most {row.max_columns} columns, got {x.shape[-1]}"
    if row.backend == "triton":
        return why_triton_unavailable(x.device, automatic)
    return native.why_unavailable(x.device)


def why_triton_unavailable(device: torch.device, automatic: bool) -> str:
    """Says why Triton kernels cannot run on `device`; empty where they can. `auto` never takes the interpreter."""
    if not has_triton():
        return "triton is not installed"
    if device.type == "cpu" and (automatic or not interpreting()):
        return "CPU tensors need Triton's interpreter: set TRITON_INTERPRET=1 before triton is imported"
    if device.type not in ("cpu", "cuda"):
        return f"expected CUDA tensors, got {device.type} tensors"
    if device.type == "cuda":
        if torch.version.cuda is None:
            return "the kernels are for NVIDIA GPUs, and this torch is built for others"
        # Dynamo folds the properties to constants, but breaks its graph at get_device_capability.
        chip = torch.cuda.get_device_properties(device)
        return "" if chip.major >= 8 else f"expected compute capability 8.0 or newer, got {chip.major}.{chip.minor}"
    return ""


def has_triton() -> bool:
    """Tells whether triton can be imported."""
    return _HAS_TRITON


def interpreting() -> bool:
    """Tells whether Triton runs kernels in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _check_name(impl: str) -> None:
    if impl != "auto" and impl not in BACKENDS:
        raise ValueError(f"impl: expected one of {', '.join(('auto', *BACKENDS))}, got {impl!r}")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
