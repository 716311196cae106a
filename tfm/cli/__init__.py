"""The `tfm` command. A user's mistake ends in one line on stderr and exit status 2, never in a traceback.

Packages that are slow to import (torch, matplotlib, sacrebleu) are imported inside the commands that need them.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

from tfm.errors import MissingExtra, UserError, extra

with extra("build"):
    import typer
    from typer.core import TyperGroup

    from tfm.cli import build, demo, doctor, models, pictures, streams, training, translation

SMALLER_RUN = "try a smaller model or, in a new run, a lower --batch-tokens"
SMALLER_SEARCH = "try a lower --beam or --batch-tokens"
LESS_MEMORY = {"train": SMALLER_RUN, "demo": SMALLER_RUN, "translate": SMALLER_SEARCH, "evaluate": SMALLER_SEARCH}


class Commands(TyperGroup):
    """The commands, and the one place where users' mistakes become messages. All other errors stay as they are."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (UserError, MissingExtra) as error:
            message = str(error)
        except BrokenPipeError:
            raise  # typer ends quietly
        except OSError as error:
            message = _described(error)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            advice = LESS_MEMORY.get(ctx.invoked_subcommand, "what was asked for does not fit")
            message = f"out of memory: {advice}"
        except KeyboardInterrupt:
            streams.complain("interrupted")
            raise typer.Exit(130) from None
        streams.complain("error: " + " ".join(message.splitlines()))
        raise typer.Exit(2)


app = typer.Typer(
    name="tfm",
    cls=Commands,
    help="Train a translation model on parallel text, translate with it, look inside it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(training.train)
app.command()(translation.translate)
app.command()(translation.evaluate)
app.command()(pictures.attend)
app.add_typer(pictures.plot)
app.command()(demo.demo)
app.command()(build.build)
app.command()(doctor.doctor)
app.command()(models.models)


def _print_version(wanted: bool) -> None:
    if wanted:
        from tfm import __version__

        typer.echo(f"tfm {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Runs the command line."""
    streams.prepare()
    status: Any = 0
    try:
        app(prog_name="tfm")
    except SystemExit as ending:
        status = ending.code
    except OSError as error:
        # It comes from what typer prints by itself, such as help.
        status = _refused(error)
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        status = status or _refused(error)
        streams.discard(sys.stdout)
    sys.exit(status)


def _refused(error: OSError) -> int:
    streams.complain(f"error: {_described(error)}")
    return 2


def _described(error: OSError) -> str:
    place = f"{error.filename}: " if error.filename is not None else ""
    return f"{place}{error.strerror or error}"


def _is_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    import torch

    # On a CPU torch has no exception class for it.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
