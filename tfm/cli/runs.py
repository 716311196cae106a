"""Starting and resuming a training run; shared by `tfm train` and `tfm demo`."""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import typer
from rich.console import Console

from tfm import plots
from tfm.checkpoint import Run
from tfm.cli.devices import prepare
from tfm.cli.progress import TrainingProgress, say
from tfm.config import PRESETS, Recipe, TransformerConfig
from tfm.data import EncodedPairs, ParallelText, batches, encode_parallel, read_parallel
from tfm.errors import UserError
from tfm.evaluate import misfit
from tfm.files import write_atomically
from tfm.model import Transformer
from tfm.tokenizer import Tokenizer
from tfm.train import Options, Training

RENAMED_FLAGS = {"interval": "every", "keep": "average"}


@dataclass(frozen=True)
class Texts:
    """Where the parallel text lies; None = not given."""

    source: Path | None = None
    target: Path | None = None
    valid_source: Path | None = None
    valid_target: Path | None = None

    def absolute(self) -> dict[str, str | None]:
        """For config.json, so that a run may be resumed from another folder."""
        return {name: None if path is None else str(path.resolve()) for name, path in vars(self).items()}


@dataclass(frozen=True)
class Given:
    """What the command line says of a run; None = not said.

    `model`, `recipe` and `options` hold fields of TransformerConfig, Recipe and Options. They belong to the run and may
    not change on resume; the rest may.
    """

    preset: str | None = None
    model: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    texts: Texts = Texts()
    max_steps: int | None = None
    minutes: float | None = None
    device: str | None = None
    threads: int | None = None


def check_new(out: Path) -> None:
    """Raises UserError where `out` holds anything."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: a file, expected a folder")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out}: not empty; give --resume to continue the run in it, or another folder")


def start(console: Console, out: Path, given: Given, command: str) -> Training:
    """Train a new run in the folder `out`, and return it trained.

    Raises:
        UserError: what was given cannot be trained on.
        typer.Exit: a signal ended training; everything is saved.
    """
    device = prepare(given.device or "auto", given.threads)
    name = given.preset or "tiny"
    preset = PRESETS[name]
    recipe = replace(preset.recipe, **_said(given.recipe | {"max_steps": given.max_steps}))
    options = Options(**_said(given.options))
    text, validation = _read(console, given.texts)
    tokenizer = Tokenizer.train(chain(text.source, text.target), recipe.vocab_size)
    asked = (
        ""
        if tokenizer.vocab_size == recipe.vocab_size
        else f": the text does not fill the {recipe.vocab_size:,} asked for"
    )
    say(console, f"vocabulary: {tokenizer.vocab_size:,} tokens{asked}")
    config = preset.config(tokenizer.vocab_size, **_said(given.model))
    pairs = _encode(console, text, tokenizer, config)
    run = Run(out)
    training = _build(console, run, config, tokenizer, recipe, pairs, validation, options, device)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(run.tokenizer)
    described = {
        "command": command,
        "preset": name,
        **given.texts.absolute(),
        "device": given.device,
        "threads": given.threads,
        "options": asdict(options),
        "text_sha256": fingerprint(pairs),
        "tokenizer_sha256": run.tokenizer_sha256(),
    }
    run.write_config(config, recipe, described)
    _train(console, training, given.minutes)
    return training


def resume(console: Console, out: Path, given: Given) -> Training:
    """Continue the run in `out` from its last checkpoint, or from its first step where there is none yet.

    Raises:
        UserError: `out` holds no run, `given` contradicts it, or its text has changed.
        typer.Exit: a signal ended training; everything is saved.
    """
    run = Run(out)
    config, recipe, described = run.read_config()
    try:
        options = Options(**described["options"])
        texts = Texts(**{name: _path(described[name]) for name in vars(given.texts)})
        preset, text_sha256 = described["preset"], described["text_sha256"]
        device, threads = described["device"], described["threads"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{run.config}: not written by `tfm train` ({error})") from None
    chosen = {"preset": given.preset, **given.model, **given.recipe, **given.options}
    stored = {**vars(config), **vars(recipe), **vars(options), "preset": preset}
    for name, value in _said(chosen).items():
        if value != stored[name]:
            flag = RENAMED_FLAGS.get(name, name).replace("_", "-")
            raise UserError(
                f"--{flag} {value}: the run in {out} was started with {stored[name]}, and --resume keeps it"
            )
    texts = replace(texts, **_said(vars(given.texts)))
    recipe = replace(recipe, **_said({"max_steps": given.max_steps}))
    device, threads = given.device or device, given.threads or threads
    where = prepare(device or "auto", threads)
    tokenizer = run.read_tokenizer(config, described)
    text, validation = _read(console, texts)
    pairs = _encode(console, text, tokenizer, config)
    if fingerprint(pairs) != text_sha256:
        raise UserError(f"{texts.source} and {texts.target}: not the text that the run in {out} was started with")
    training = _build(console, run, config, tokenizer, recipe, pairs, validation, options, where)
    if run.state.is_file():
        training.resume()
        say(console, f"resuming at step {training.step:,}")
    else:
        for path in (run.log, *run.checkpoints()):
            path.unlink(missing_ok=True)
        say(console, f"no checkpoint was written yet: starting again from step 0 with the same seed, {options.seed}")
    run.write_config(config, recipe, described | texts.absolute() | {"device": device, "threads": threads})
    if training.step >= recipe.max_steps:
        say(
            console,
            f"{out}: done already, at step {training.step:,} of {recipe.max_steps:,}; --max-steps sets another end",
        )
        return training
    _train(console, training, given.minutes)
    return training


def fingerprint(pairs: EncodedPairs) -> str:
    """SHA-256 of the encoded text, which is the text and the tokenizer."""
    sha = hashlib.sha256()
    for tensor in (pairs.source, pairs.source_offsets, pairs.target, pairs.target_offsets):
        sha.update(tensor.numpy().tobytes())
    return sha.hexdigest()


@contextmanager
def stopped_by_signals(training: Training) -> Iterator[None]:
    """SIGINT and SIGTERM end training after the update under way, with a checkpoint; a second one ends it at once."""
    stops = (signal.SIGINT, signal.SIGTERM)

    def stop(number: int, frame: FrameType | None) -> None:
        if training.stop_reason in [s.name for s in stops]:
            raise KeyboardInterrupt
        training.stop(signal.Signals(number).name)

    before = {number: signal.signal(number, stop) for number in stops}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def draw_loss(run: Run) -> None:
    """loss.png from log.jsonl."""
    write_atomically(run.loss_curve, plots.loss_curve(run.read_log()))


def _read(console: Console, texts: Texts) -> tuple[ParallelText, ParallelText | None]:
    assert texts.source is not None
    assert texts.target is not None
    text = read_parallel(texts.source, texts.target)
    _say_read(console, text, texts.source, texts.target)
    if texts.valid_source is None or texts.valid_target is None:
        return text, None
    validation = read_parallel(texts.valid_source, texts.valid_target)
    _say_read(console, validation, texts.valid_source, texts.valid_target)
    return text, validation


def _say_read(console: Console, text: ParallelText, source: Path, target: Path) -> None:
    dropped = f"; dropped {text.dropped:,} with a blank side" if text.dropped else ""
    say(console, f"read {len(text):,} pairs from {source} and {target}{dropped}")


def _encode(console: Console, text: ParallelText, tokenizer: Tokenizer, config: TransformerConfig) -> EncodedPairs:
    pairs = encode_parallel(text, tokenizer, config.max_length)
    if pairs.skipped:
        say(console, f"skipped {pairs.skipped:,} pairs with a side of more than {config.max_length} tokens")
    return pairs


def _build(
    console: Console,
    run: Run,
    config: TransformerConfig,
    tokenizer: Tokenizer,
    recipe: Recipe,
    pairs: EncodedPairs,
    validation: ParallelText | None,
    options: Options,
    device: torch.device,
) -> Training:
    if validation is not None and (warning := misfit(options.tokenize, validation.target)):
        typer.echo(f"tfm: warning: {warning}", err=True)
    updates = len(batches(pairs, recipe.batch_tokens))
    torch.manual_seed(options.seed)
    model = Transformer(config).to(device)
    size = sum(parameter.numel() for parameter in model.parameters())
    say(console, f"model: {size:,} parameters, {options.dtype} on {device.type}; an epoch is {updates:,} updates")
    return Training(run, model, tokenizer, recipe, pairs, validation, options)


def _train(console: Console, training: Training, minutes: float | None) -> None:
    run, last_step = training.run, training.recipe.max_steps
    seconds = None if minutes is None else 60 * minutes
    with TrainingProgress(console, training.step, last_step, seconds) as progress, stopped_by_signals(training):

        def report(record: dict[str, Any]) -> None:
            progress.report(record)
            if record["event"] == "checkpoint":
                draw_loss(run)

        reason = training.train(report, seconds=seconds)
    draw_loss(run)
    if reason in signal.Signals.__members__:
        again = f"continue with: tfm train --resume --out {run.folder}"
        typer.echo(f"tfm: stopped by {reason} at step {training.step}, saved; {again}", err=True)
        raise typer.Exit(128 + signal.Signals[reason])
    why = "time is up" if reason == "time" else "done"
    say(console, f"{why} at step {training.step:,}; translate with: tfm translate {run.folder} < INPUT")


def _said(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _path(value: str | None) -> Path | None:
    return None if value is None else Path(value)
