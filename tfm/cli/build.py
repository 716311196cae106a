"""`tfm build`: compiles the native operators for this machine."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from tfm.cli.progress import clock, say
from tfm.errors import UserError

if TYPE_CHECKING:
    from tfm.native.build import Built


def build(
    force: Annotated[bool, typer.Option("--force", help="Recompile everything.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show each command and what the compiler says.")] = False,
    no_cuda: Annotated[bool, typer.Option("--no-cuda", help="Leave CUDA out even if nvcc is installed.")] = False,
    if_possible: Annotated[
        bool, typer.Option("--if-possible", help="If there is no compiler, say so and exit with status 0.")
    ] = False,
) -> None:
    """Compile the native operators: C++ for this machine's kind of CPU and, if nvcc is installed, CUDA.

    The library is cached under a hash of its sources, so a second call has nothing to do. Everything works without it,
    but slower on CPUs.
    """
    import torch

    from tfm import native
    from tfm.native import toolchain

    console = Console()
    missing = toolchain.missing()
    if missing and if_possible:
        say(console, f"the native operators are not compiled: {missing}")
        return
    start = time.perf_counter()
    built = _build(console, force, verbose, not no_cuda)
    took = f"built in {clock(time.perf_counter() - start)}" if built.is_new else "up to date"
    gpus = ", ".join(sorted({word.rsplit("=", 1)[1] for word in built.cuda.gencode}))
    say(console, f"{took}: {built.library}, {f'CUDA for {gpus}' if gpus else f'without CUDA: {built.cuda.why_not}'}")
    loaded = native.library()
    if loaded != built.library:
        say(console, f"but what is loaded is {loaded}")
    elif native.why_unavailable(torch.device("cpu")):
        raise UserError(native.why_unavailable(torch.device("cpu")))


def _build(console: Console, force: bool, verbose: bool, with_cuda: bool) -> Built:
    from tfm.native.build import BuildError, Listener, build

    def line(text: str) -> None:
        say(console, text)

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_interactive)
    task = bar.add_task("compiling", total=None, visible=not verbose)

    def report(done: int, total: int, what: str) -> None:
        if console.is_interactive:
            bar.update(task, completed=done, total=total, description=what)
        else:
            line(f"{done}/{total} {what}")

    try:
        with bar:
            return build(force, with_cuda, Listener(report, line, verbose))
    except BuildError as error:
        raise UserError(str(error)) from None
