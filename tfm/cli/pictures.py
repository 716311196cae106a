"""`tfm attend` and `tfm plot`: what a model does inside, as PNG, PDF or SVG."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tfm.cli.devices import Device, prepare
from tfm.cli.streams import complain
from tfm.cli.translation import Folder

Out = Annotated[Path, typer.Option(help="The picture to write: .png, .pdf or .svg.")]

plot = typer.Typer(name="plot", help="Pictures that need no trained model.", no_args_is_help=True)


def attend(
    run: Folder,
    sentence: Annotated[str, typer.Argument(help="A sentence in the source language.")],
    translation: Annotated[
        str | None, typer.Option(help="Translation fed to the decoder; by default the model's own, greedy.")
    ] = None,
    out: Out = Path("attend.png"),
    device: Device = "auto",
) -> None:
    """Draw what every head attends to: encoder, decoder and cross-attention, layer by layer."""
    from tfm.attend import attend as attend_sentence
    from tfm.checkpoint import load_model
    from tfm.files import check_writable, is_printed_to, write_atomically
    from tfm.fonts import fonts_for
    from tfm.generate import translate
    from tfm.plots import attention_maps, format_of, text_of

    kind = format_of(out)
    check_writable(out)
    model, tokenizer = load_model(run, prepare(device, None))
    if translation is None:
        translation = translate(model, tokenizer, [sentence])[0]
    maps = attend_sentence(model, tokenizer, sentence, translation)
    if advice := fonts_for(text_of(maps)).advice:
        complain(f"warning: {advice}")
    write_atomically(out, attention_maps(maps, kind))
    typer.echo(f"{sentence} -> {translation}", err=is_printed_to(out))
    typer.echo(f"wrote {out}", err=is_printed_to(out))


@plot.command()
def positions(
    dim: Annotated[int, typer.Option(min=1, help="Columns of the encoding.")] = 128,
    length: Annotated[int, typer.Option(min=1, help="Number of positions.")] = 100,
    out: Out = Path("positions.png"),
) -> None:
    """Draw the sinusoidal positional encoding ("Attention Is All You Need", section 3.5)."""
    from tfm.files import check_writable, is_printed_to, write_atomically
    from tfm.plots import format_of, positional_encoding

    kind = format_of(out)
    check_writable(out)
    write_atomically(out, positional_encoding(length, dim, kind))
    typer.echo(f"wrote {out}", err=is_printed_to(out))


@plot.callback()
def _pictures() -> None:
    # With a callback typer keeps the name of a group's only command.
    pass
