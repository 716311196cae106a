"""`tfm translate` and `tfm evaluate`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from tfm.cli.devices import Device, Threads, prepare
from tfm.cli.streams import complain, standard_input, standard_output
from tfm.cli.training import BleuTokenizer
from tfm.errors import UserError

# Lines sorted by length and translated together; the output of each window is flushed.
WINDOW = 2000
# Bytes of lines after which a window is full, however few they are.
WINDOW_BYTES = 2**22

Folder = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a trained run.")]
Beam = Annotated[int, typer.Option(min=1, help="Hypotheses kept for each sentence; 1 is greedy.")]
LengthPenalty = Annotated[
    float, typer.Option(help="Hypotheses score log p / length ** this; larger values favour longer ones.")
]
BatchTokens = Annotated[int, typer.Option(min=1, help="Largest batch: sentences x longest source sentence.")]


def translate(
    run: Folder,
    beam: Beam = 1,
    length_penalty: LengthPenalty = 1.0,
    batch_tokens: BatchTokens = 4096,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Translate standard input to standard output: one line for each line, in order.

    Blank lines stay blank. A line longer than the model takes is cut, with a warning on stderr.
    """
    # Checked before the slow imports.
    stdin, stdout = standard_input(), standard_output()
    from tfm.checkpoint import load_model
    from tfm.data import lines_of, opened, split_lines
    from tfm.generate import Search
    from tfm.generate import translate as translate_lines

    model, tokenizer = load_model(run, prepare(device, threads))
    search = Search(beam, length_penalty, batch_tokens)
    done = 0

    def warn(index: int, tokens: int) -> None:
        _warn_truncated("<stdin>", done + index + 1, tokens, model.config.max_length)

    is_typed = stdin.isatty()
    given = lines_of(stdin if is_typed else opened(stdin, "<stdin>"), "<stdin>")
    window = 1 if is_typed else WINDOW
    while read := _window(given, window):
        lines = split_lines(b"".join(read), "<stdin>", first_line=done + 1)
        translations = translate_lines(model, tokenizer, lines, search, warn)
        stdout.write("".join(f"{line}\n" for line in translations).encode())
        stdout.flush()
        done += len(read)


def _window(lines: Iterator[bytes], most: int) -> list[bytes]:
    read, size = [], 0
    for line in lines:
        read.append(line)
        size += len(line)
        if len(read) == most or size >= WINDOW_BYTES:
            break
    return read


def evaluate(
    run: Folder,
    source: Annotated[
        Path, typer.Option(help="Text to translate, one sentence a line; UTF-8, plain, gzip, bzip2 or xz.")
    ],
    reference: Annotated[Path, typer.Option(help="Its reference translation, line by line.")],
    beam: Beam = 1,
    length_penalty: LengthPenalty = 1.0,
    batch_tokens: BatchTokens = 4096,
    tokenize: Annotated[
        BleuTokenizer, typer.Option(help="sacrebleu's tokenizer; none for text that is tokenized already.")
    ] = "13a",
    lowercase: Annotated[bool, typer.Option("--lowercase", help="Ignore case.")] = False,
    translations: Annotated[Path | None, typer.Option(help="Also write the translations to this file.")] = None,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Translate a text and compare it with its reference: BLEU and chrF, with sacrebleu's signatures."""
    # Checked before the slow imports.
    standard_output()
    from tfm.checkpoint import load_model
    from tfm.data import read_lines
    from tfm.evaluate import misfit, score
    from tfm.files import check_writable, write_atomically
    from tfm.generate import Search
    from tfm.generate import translate as translate_lines

    if translations is not None:
        check_writable(translations)
    lines, references = read_lines(source), read_lines(reference)
    if len(lines) != len(references):
        raise UserError(f"{source} has {len(lines)} lines but {reference} has {len(references)}: expected equally many")
    if warning := misfit(tokenize, references):
        complain(f"warning: {warning}")
    model, tokenizer = load_model(run, prepare(device, threads))

    def warn(index: int, tokens: int) -> None:
        _warn_truncated(str(source), index + 1, tokens, model.config.max_length)

    found = translate_lines(model, tokenizer, lines, Search(beam, length_penalty, batch_tokens), warn)
    scores = score(found, references, tokenize, lowercase)
    typer.echo(f"BLEU {scores.bleu:.2f}  {scores.bleu_signature}")
    typer.echo(f"chrF {scores.chrf:.2f}  {scores.chrf_signature}")
    # Last, so that a full disk does not lose the scores.
    if translations is not None:
        write_atomically(translations, "".join(f"{line}\n" for line in found).encode())


def _warn_truncated(name: str, line: int, tokens: int, max_length: int) -> None:
    kept = f"only the first {max_length - 1} are translated"
    typer.echo(f"tfm: warning: {name}:{line}: {tokens} tokens, {kept}", err=True)
