"""The options --device and --threads."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tfm.cli.streams import complain
from tfm.errors import UserError

if TYPE_CHECKING:
    import torch

DeviceName = Literal["auto", "cpu", "cuda"]
Device = Annotated[DeviceName, typer.Option(help="Device to compute on; auto takes a GPU if there is one.")]
Threads = Annotated[int | None, typer.Option(min=1, max=1024, help="CPU threads; torch's default unless given.")]


def prepare(device: str, threads: int | None) -> torch.device:
    """Returns the device of that name, and sets the threads. Warns where native kernels are missing.

    Raises:
        UserError: there is no such device here.
    """
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise UserError(f"--device cuda: torch {torch.__version__} finds no CUDA device here")
    chosen = torch.device("cuda" if available and device != "cpu" else "cpu")
    if chosen.type == "cpu":
        say_what_is_missing()
    return chosen


@cache
def say_what_is_missing() -> None:
    """Warns on stderr, once: a CPU without native kernels does everything, but slowly."""
    import torch

    from tfm import native
    from tfm.native import toolchain

    if reason := native.why_unavailable(torch.device("cpu")):
        needed = toolchain.missing()
        first = f", which needs more first: {needed}" if needed and "`tfm build`" in reason else ""
        complain(f"note: slower than it could be, on the reference in plain torch: {reason}{first}")
