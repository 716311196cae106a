"""Starting and resuming a training run; shared by `tfm train` and `tfm demo`."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from tfm import plots, state
from tfm.checkpoint import Run
from tfm.cli.devices import prepare
from tfm.cli.progress import TrainingProgress, say
from tfm.cli.stopping import OUTPUT, end, pasted, stopped_by_signals
from tfm.cli.streams import Lines, complain
from tfm.cli.texts import Texts
from tfm.config import PRESETS, Recipe, TransformerConfig
from tfm.data import EncodedPairs, ParallelText, batches, encode_parallel, read_parallel
from tfm.errors import UserError
from tfm.evaluate import misfit
from tfm.files import write_atomically
from tfm.model import Transformer
from tfm.records import Started, check
from tfm.tokenizer import Tokenizer
from tfm.train import Options, Training

RENAMED_FLAGS = {"interval": "every", "keep": "average"}


@dataclass(frozen=True)
class Given:
    """The flags of a run on the command line; None where a flag was not given.

    `model`, `recipe` and `options` hold fields of TransformerConfig, Recipe and Options. They belong to the run and may
    not change on resume; the rest may.
    """

    preset: str | None = None
    model: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    texts: Texts = field(default_factory=Texts)
    max_steps: int | None = None
    minutes: float | None = None
    device: str | None = None
    threads: int | None = None


def check_new(out: Path) -> None:
    """Raises UserError where the folder `out` holds anything."""
    if any(out.iterdir()):
        raise UserError(f"--out {out}: not empty; give --resume to continue the run in it, or another folder")


def start(console: Lines, out: Path, given: Given, command: str) -> Training:
    """Trains a new run in the folder `out`, and returns it trained.

    Raises:
        UserError: the text or the settings cannot be trained with.
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
        "device": given.device,
        "threads": given.threads,
        "options": asdict(options),
        "text_sha256": fingerprint(pairs),
        "tokenizer_sha256": run.tokenizer_sha256(),
    }
    run.write_config(config, recipe, described)
    given.texts.write(run)
    _train(console, training, given.minutes)
    return training


def resume(console: Lines, out: Path, given: Given) -> Training:
    """Continues the run in `out` from its last checkpoint, or from its first step where there is none yet.

    Raises:
        UserError: `out` holds no run, `given` contradicts it, or its text has changed.
        typer.Exit: a signal ended training; everything is saved.
    """
    run = Run(out)
    config, recipe, described = run.read_config()
    started, options, texts = read_started(run, described)
    _check_kept(out, given, {**vars(config), **vars(recipe), **vars(options), "preset": started.preset})
    texts = replace(texts, **_said(vars(given.texts)))
    if texts.source is None or texts.target is None:
        raise UserError(f"{run.folder}: the location of its text is not recorded; give --source and --target")
    device, threads = given.device or started.device, given.threads or started.threads
    where = prepare(device or "auto", threads)
    tokenizer = run.read_tokenizer(config, described)
    found = state.read(run.state, config) if run.is_begun() else None
    changed = replace(recipe, **_said({"max_steps": given.max_steps}))
    if changed != recipe:
        _say_end(console, out, recipe, changed, 0 if found is None else found.place.step)
    text, validation = _read(console, texts)
    pairs = _encode(console, text, tokenizer, config)
    if fingerprint(pairs) != started.text_sha256:
        raise UserError(f"{texts.source} and {texts.target}: not the text that the run in {out} was started with")
    training = _build(console, run, config, tokenizer, changed, pairs, validation, options, where)
    if found is not None:
        training.resume(found)
        say(console, f"resuming at step {training.step:,}")
    else:
        run.log.unlink(missing_ok=True)
        say(console, f"no checkpoint was written yet: starting again from step 0 with the same seed, {options.seed}")
    kept = {name: value for name, value in described.items() if name not in vars(texts)}
    run.write_config(config, changed, kept | {"device": device, "threads": threads})
    texts.write(run)
    if training.step >= changed.max_steps:
        say(
            console,
            f"{out}: done already, at step {training.step:,} of {changed.max_steps:,}; --max-steps sets another end",
        )
        return training
    _train(console, training, given.minutes)
    return training


def read_started(run: Run, described: dict[str, Any]) -> tuple[Started, Options, Texts]:
    """Returns how the run was started, from the `training` of its config.json and from paths.json.

    Raises:
        UserError: they are not as `tfm train` writes them.
    """
    if "preset" not in described:
        raise UserError(f"{run.config}: not written by `tfm train`, training.preset is missing")
    started = check(Started, described, f"{run.config}: training")
    options = check(Options, started.options, f"{run.config}: training.options")
    return started, options, Texts.read(run, started)


def _check_kept(out: Path, given: Given, stored: dict[str, Any]) -> None:
    """Raises UserError where the command line contradicts what belongs to the run."""
    chosen = {"preset": given.preset, **given.model, **given.recipe, **given.options}
    for name, value in _said(chosen).items():
        if value != stored[name]:
            flag = RENAMED_FLAGS.get(name, name).replace("_", "-")
            raise UserError(
                f"--{flag} {value}: the run in {out} was started with {stored[name]}, and --resume keeps it"
            )


def _say_end(console: Lines, out: Path, before: Recipe, after: Recipe, step: int) -> None:
    """Says what another --max-steps changes.

    Raises:
        UserError: the run is beyond it already, so it must be a slip, which config.json should not keep.
    """
    if after.max_steps < before.max_steps and after.max_steps <= step:
        raise UserError(
            f"--max-steps {after.max_steps}: the run in {out} is at step {step} already; nothing is changed"
        )
    say(console, f"the run ends at step {after.max_steps:,}, not {before.max_steps:,}; --max-steps changes that again")
    rates = [recipe.learning_rate_at(step + 1) for recipe in (before, after)]
    if rates[0] != rates[1]:
        say(
            console,
            f"its learning rate falls to 0 by that step: the next update is made at {rates[1]:.3g}, not {rates[0]:.3g}",
        )


def fingerprint(pairs: EncodedPairs) -> str:
    """Returns the SHA-256 of the encoded text, which tells both the text and the tokenizer."""
    sha = hashlib.sha256()
    for tensor in (pairs.source, pairs.source_offsets, pairs.target, pairs.target_offsets):
        sha.update(tensor.numpy().tobytes())
    return sha.hexdigest()


def draw_loss(run: Run) -> None:
    """Draws loss.png from log.jsonl."""
    write_atomically(run.loss_curve, plots.loss_curve(run.read_log()))


def _read(console: Lines, texts: Texts) -> tuple[ParallelText, ParallelText | None]:
    assert texts.source is not None
    assert texts.target is not None
    text = read_parallel(texts.source, texts.target)
    _say_read(console, text, texts.source, texts.target)
    if texts.valid_source is None or texts.valid_target is None:
        return text, None
    validation = read_parallel(texts.valid_source, texts.valid_target)
    _say_read(console, validation, texts.valid_source, texts.valid_target)
    return text, validation


def _say_read(console: Lines, text: ParallelText, source: Path, target: Path) -> None:
    dropped = f"; dropped {text.dropped:,} with a blank side" if text.dropped else ""
    say(console, f"read {len(text):,} pairs from {source} and {target}{dropped}")


def _encode(console: Lines, text: ParallelText, tokenizer: Tokenizer, config: TransformerConfig) -> EncodedPairs:
    pairs = encode_parallel(text, tokenizer, config.max_length)
    if pairs.skipped:
        say(console, f"skipped {pairs.skipped:,} pairs with a side of more than {config.max_length} tokens")
    return pairs


def _build(
    console: Lines,
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
        complain(f"warning: {warning}")
    updates = len(batches(pairs, recipe.batch_tokens))
    torch.manual_seed(options.seed)
    model = Transformer(config).to(device)
    size = sum(parameter.numel() for parameter in model.parameters())
    say(console, f"model: {size:,} parameters, {options.dtype} on {device.type}; an epoch is {updates:,} updates")
    return Training(run, model, tokenizer, recipe, pairs, validation, options)


def _train(console: Lines, training: Training, minutes: float | None) -> None:
    run, last_step = training.run, training.recipe.max_steps
    seconds = None if minutes is None else 60 * minutes
    with TrainingProgress(console, training.step, last_step, seconds) as progress, stopped_by_signals(training):

        def report(record: dict[str, Any]) -> None:
            progress.report(record)
            if console.watched.lost is not None and training.stop_reason in (None, "time"):
                training.stop(OUTPUT)
            if record["event"] == "checkpoint":
                draw_loss(run)

        if console.watched.lost is not None:
            training.stop(OUTPUT)
        reason = training.train(report, seconds=seconds)
    draw_loss(run)
    if reason not in ("steps", "time"):
        end(console, training, reason)
    why = "time is up" if reason == "time" else "done"
    say(console, f"{why} at step {training.step:,}; translate with: tfm translate {pasted(run.folder)} < INPUT")


def _said(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
