"""`tfm demo`: the bundled model on the bundled corpus, from nothing to translations in minutes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from tfm.cli.devices import Device, Threads
from tfm.cli.progress import clock, say
from tfm.cli.streams import Lines
from tfm.errors import UserError

if TYPE_CHECKING:
    from tfm.checkpoint import Run
    from tfm.demo import Pair

CHECKPOINTS = 4
VALIDATION_PAIRS = 60
SAMPLES = 12
SHOWN_LAST = "je suis étudiant"


def demo(
    minutes: Annotated[float | None, typer.Option(min=0, help="End training after this time.")] = None,
    out: Annotated[Path, typer.Option(help="The run's folder; an older demo in it is replaced.")] = Path("runs/demo"),
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Train a small French-English model on a grammar's sentences and show what it has learnt.

    It is tested on 500 sentences that combine words never seen together in training.
    """
    from tfm.checkpoint import Run
    from tfm.cli.stopping import alone_in

    console = Lines()
    with alone_in(out, new=True):
        _clear(Run(out))
        _train_and_show(console, Run(out), minutes, device, threads)


def _train_and_show(console: Lines, run: Run, minutes: float | None, device: str, threads: int | None) -> None:
    from tfm.checkpoint import load_model
    from tfm.cli import runs
    from tfm.config import PRESETS
    from tfm.demo import accuracy_by_phenomenon, corpus
    from tfm.generate import translate

    started = time.perf_counter()
    training_pairs, held_out = corpus()
    source, target = _write_text(run, "train", training_pairs)
    valid_source, valid_target = _write_text(run, "validation", held_out[:VALIDATION_PAIRS])
    _write_text(run, "held-out", held_out)
    given = runs.Given(
        preset="demo",
        options={"interval": -(-PRESETS["demo"].recipe.max_steps // CHECKPOINTS)},
        texts=runs.Texts(source, target, valid_source, valid_target),
        minutes=minutes,
        device=device,
        threads=threads,
    )
    training = runs.start(console, run.folder, given, command="demo")
    say(console, f"trained in {clock(time.perf_counter() - started)}")

    started = time.perf_counter()
    model, tokenizer = load_model(run.folder, training.device)
    translations = translate(model, tokenizer, [pair.source for pair in held_out])
    say(console, f"translated {len(held_out)} held-out sentences in {clock(time.perf_counter() - started)}")
    counts = accuracy_by_phenomenon(held_out, translations)
    console.print(_table(counts))
    every = len(held_out) // SAMPLES
    for index in range(1, SAMPLES * every, every):
        say(console, f"{held_out[index].source} -> {translations[index]}")
    shown = [pair.source for pair in held_out].index(SHOWN_LAST)
    say(console, "")
    say(console, f"{SHOWN_LAST} -> {translations[shown]}")


def _clear(run: Run) -> None:
    """Removes an older demo from its folder.

    Raises:
        UserError: the folder holds something else.
    """
    texts = {path for part in ("train", "validation", "held-out") for path in _text_files(run, part)}
    # Without config.json it is a demo that was stopped before it began to train.
    made_here = run.read_config()[2].get("command") == "demo" if run.config.exists() else False
    if not made_here and not set(run.folder.iterdir()) <= texts:
        raise UserError(f"--out {run.folder}: not empty and not made by `tfm demo`; give another folder")
    for path in (
        run.config,
        run.paths,
        run.tokenizer,
        run.log,
        run.state,
        run.model,
        run.loss_curve,
        *run.checkpoints(),
        *texts,
    ):
        path.unlink(missing_ok=True)


def _text_files(run: Run, part: str) -> tuple[Path, Path]:
    return run.folder / f"{part}.fr", run.folder / f"{part}.en"


def _write_text(run: Run, part: str, pairs: list[Pair]) -> tuple[Path, Path]:
    from tfm.files import write_atomically

    source, target = _text_files(run, part)
    write_atomically(source, "".join(f"{pair.source}\n" for pair in pairs).encode())
    write_atomically(target, "".join(f"{pair.target}\n" for pair in pairs).encode())
    return source, target


def _table(counts: dict[str, tuple[int, int]]) -> Table:
    """Counts the exactly right translations for each phenomenon, and of all."""
    table = Table("phenomenon", "right", "of", "%")
    for column in table.columns[1:]:
        column.justify = "right"
    correct, total = (sum(column) for column in zip(*counts.values(), strict=True))
    for name, (right, of) in counts.items():
        table.add_row(name, str(right), str(of), f"{100 * right / of:.1f}")
    table.add_section()
    table.add_row("all", str(correct), str(total), f"{100 * correct / total:.1f}")
    return table
