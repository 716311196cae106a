"""`tfm models`: which families of Hugging Face's models tfm.accelerate serves, and what of them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import typer


def models() -> None:
    """List the families of Hugging Face's models that tfm.accelerate serves, and what of each runs fused."""
    from rich.console import Console
    from rich.table import Table

    from tfm.patching.families import FAMILIES, TRIED

    table = Table("family", "class", "runs fused", "note")
    for family in FAMILIES:
        table.add_row(family.name, family.model, ", ".join(family.served).replace("_", "-"), family.note)
    Console().print(table)
    try:
        here = f"here is {version('transformers')}"
    except PackageNotFoundError:
        here = "none is installed here: pip install 'tfm[huggingface]'"
    typer.echo(f"Tried with transformers {' and '.join(TRIED)}; {here}.")
