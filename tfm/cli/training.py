"""`tfm train`: its flags, and what a flag means for a new run and for one that goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from tfm.cli.devices import DeviceName, Threads
from tfm.cli.streams import Lines
from tfm.errors import UserError

PresetName = Literal["demo", "tiny", "base", "big"]
Dtype = Literal["float32", "bfloat16"]
BleuTokenizer = Literal[
    "13a", "none", "intl", "char", "zh", "ja-mecab", "ko-mecab", "spm", "flores101", "flores200", "spBLEU-1K"
]
TEXT, MODEL, RECIPE, RUN = "Text", "Model", "Recipe", "Run"


def train(
    out: Annotated[Path, typer.Option(help="The run's folder; new or empty, unless --resume is given.")],
    source: Annotated[
        Path | None, typer.Option(help="Text to translate from, one sentence a line; UTF-8, plain, gzip, bzip2 or xz.")
    ] = None,
    target: Annotated[Path | None, typer.Option(help="Its translation, line by line.")] = None,
    valid_source: Annotated[Path | None, typer.Option(help="Text for validation.", rich_help_panel=TEXT)] = None,
    valid_target: Annotated[Path | None, typer.Option(help="Its translation.", rich_help_panel=TEXT)] = None,
    vocab_size: Annotated[
        int | None,
        typer.Option(
            min=1, max=1_000_000, help="Tokens of the vocabulary that both sides share.", rich_help_panel=TEXT
        ),
    ] = None,
    preset: Annotated[
        PresetName | None, typer.Option(help="Model and recipe; tiny by default.", rich_help_panel=MODEL)
    ] = None,
    dropout: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Dropout probability for embeddings and sublayer outputs.", rich_help_panel=MODEL
        ),
    ] = None,
    norm_first: Annotated[
        bool | None,
        typer.Option(
            "--norm-first/--norm-last", help="Put LayerNorm before or after each sublayer.", rich_help_panel=MODEL
        ),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(min=1, help="Most tokens in a sentence; longer pairs are skipped.", rich_help_panel=MODEL),
    ] = None,
    batch_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Largest batch: sentences x longest sentence.", rich_help_panel=RECIPE),
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(min=0, help="Peak learning rate, at the end of warm-up.", rich_help_panel=RECIPE)
    ] = None,
    warmup: Annotated[
        int | None, typer.Option(min=1, help="Updates until the learning rate peaks.", rich_help_panel=RECIPE)
    ] = None,
    label_smoothing: Annotated[
        float | None, typer.Option(min=0, max=1, help="Label smoothing of the training loss.", rich_help_panel=RECIPE)
    ] = None,
    clip_norm: Annotated[
        float | None, typer.Option(min=0, help="Largest gradient norm; 0 does not clip.", rich_help_panel=RECIPE)
    ] = None,
    max_steps: Annotated[
        int | None, typer.Option(min=1, help="Updates in all; a resumed run may raise it.", rich_help_panel=RECIPE)
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(min=0, help="Stop after this many minutes of this call.", rich_help_panel=RUN),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue the run in --out exactly from its last checkpoint. Its settings are read from the folder; "
            "only --max-steps, --minutes, --device, --threads and the paths of the same text may change.",
            rich_help_panel=RUN,
        ),
    ] = False,
    every: Annotated[
        int | None,
        typer.Option(min=1, help="Updates between checkpoints; an epoch by default.", rich_help_panel=RUN),
    ] = None,
    average: Annotated[
        int | None,
        typer.Option(
            min=1, help="Checkpoints kept and averaged into the final model; 1 by default.", rich_help_panel=RUN
        ),
    ] = None,
    log_every: Annotated[
        int | None, typer.Option(min=1, help="Updates between lines of the log; 20 by default.", rich_help_panel=RUN)
    ] = None,
    tokenize: Annotated[
        BleuTokenizer | None,
        typer.Option(help="sacrebleu's tokenizer for validation; 13a by default.", rich_help_panel=RUN),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0, max=2**63 - 1, help="Random seed of weights, batches and dropout; 1 by default.", rich_help_panel=RUN
        ),
    ] = None,
    device: Annotated[
        DeviceName | None,
        typer.Option(help="Device to compute on; auto, the default, takes a GPU if there is one.", rich_help_panel=RUN),
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Data type of activations; float32 by default.", rich_help_panel=RUN)
    ] = None,
    graphs: Annotated[
        bool | None,
        typer.Option(
            "--graphs/--no-graphs",
            help="On a GPU, replay each update as one CUDA graph, at twice the memory. On by default.",
            rich_help_panel=RUN,
        ),
    ] = None,
    threads: Threads = None,
) -> None:
    """Train a translation model on two files of parallel lines.

    The tokenizer is learnt from the text. Settings that are not given come from the preset.
    Ctrl-C, SIGTERM, SIGHUP or a closed output: the update under way is finished and saved; --resume goes on from there.
    """
    from tfm.cli import runs
    from tfm.cli.stopping import alone_in

    if (valid_source is None) != (valid_target is None):
        raise UserError("--valid-source and --valid-target: expected both or neither")
    if not resume and (source is None or target is None):
        raise UserError("--source and --target: expected two files of parallel lines")
    given = runs.Given(
        preset=preset,
        model={"dropout": dropout, "norm_first": norm_first, "max_length": max_length},
        recipe={
            "vocab_size": vocab_size,
            "batch_tokens": batch_tokens,
            "learning_rate": learning_rate,
            "warmup": warmup,
            "label_smoothing": label_smoothing,
            "clip_norm": clip_norm,
        },
        options={
            "interval": every,
            "keep": average,
            "log_every": log_every,
            "tokenize": tokenize,
            "seed": seed,
            "dtype": dtype,
            "graphs": graphs,
        },
        texts=runs.Texts(source, target, valid_source, valid_target),
        max_steps=max_steps,
        minutes=minutes,
        device=device,
        threads=threads,
    )
    with alone_in(out, new=not resume):
        if resume:
            runs.resume(Lines(), out, given)
        else:
            runs.check_new(out)
            runs.start(Lines(), out, given, command="train")
