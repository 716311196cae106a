"""The table of a run, for people."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.table import Table

from tools.host import batches
from tools.host.record import Row, launches_of, over_budget, sizes, total
from tools.host.rows import BACKWARD


def of_rows(rows: Iterable[Row]) -> Table:
    """Makes a line for each direction of each case; what is over its budget is red."""
    table = Table(title="Launches and host time", caption="times: multiples of one torch.add")
    table.add_column("")
    table.add_column("")
    for head in ("Triton", "products", "others", "launches", "syncs", "time", "µs"):
        table.add_column(head, justify="right")
    name = ""
    for row in rows:
        over = over_budget(row)
        table.add_row(
            "" if row["name"] == name else row["name"],
            row["direction"],
            *(str(sum(row[part].values())) for part in ("triton", "products", "others")),
            _spent(launches_of(row), row["budget"]["launches"], "launches" in over),
            str(sum(row["syncs"].values())),
            _spent(row.get("host"), row["budget"]["host"], "host" in over),
            f"{row['microseconds']:,.0f}" if "microseconds" in row else "",
            end_section=row["direction"] == BACKWARD,
        )
        name = row["name"]
    return table


def of_compilations(found: dict[str, batches.Compilations], ran: int) -> Table:
    """Makes a line for each kind of batch."""
    table = Table(title=f"Compilations over {ran} ragged batches")
    for head in ("", f"of {batches.MOST}", "last at batch", "by kernel"):
        table.add_column(head)
    for kind, asked in found.items():
        count = total(asked)
        last = max((max(at) for at in asked.values()), default=0)
        kernels = ", ".join(f"{name.removesuffix('_kernel')} {size}" for name, size in sizes(asked).items())
        table.add_row(kind, _marked(str(count), count > batches.MOST), str(last + 1), kernels)
    return table


def _spent(spent: Any, most: Any, is_over: bool) -> str:
    if spent is None:
        return ""
    return f"{_marked(f'{spent:,.0f}', is_over)} of {most:,.0f}" if most is not None else f"{spent:,.0f}"


def _marked(text: str, is_over: bool) -> str:
    return f"[red]{text}[/red]" if is_over else text
