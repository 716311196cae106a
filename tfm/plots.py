"""Pictures as the bytes of a file: the loss of a run, the attention of every head, the positional encoding."""

from __future__ import annotations

import io
import math
import warnings
from pathlib import Path
from textwrap import fill
from typing import Any

import torch

from tfm import ops
from tfm.attend import AttentionMaps
from tfm.errors import UserError, extra
from tfm.fonts import fonts_for

with extra("translate"):
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

# With more tokens than this only every second, third, ... is labelled.
MOST_LABELS = 40
MOST_OF_A_SENTENCE = 200
FORMATS = ("png", "pdf", "svg")


def format_of(path: Path) -> str:
    """Returns the format that the ending of a picture's name stands for; PNG where it has none.

    Raises:
        UserError: an ending of another kind.
    """
    ending = path.suffix.lower().removeprefix(".") or "png"
    if ending not in FORMATS:
        raise UserError(f"{path}: expected a name that ends in {', '.join(f'.{name}' for name in FORMATS)}")
    return ending


def loss_curve(records: list[dict[str, Any]]) -> bytes:
    """Draws training loss, validation loss and BLEU over the updates, from the records of a run's log."""
    training = [record for record in records if record["event"] == "train"]
    validation = [record for record in records if record["event"] == "validation"]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="update", ylabel="loss, nats per token")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.plot(*_series(training, "loss"), color="tab:blue", label="training (with label smoothing)")
    if validation:
        axes.plot(*_series(validation, "loss"), "o-", color="tab:orange", label="validation")
        right = axes.twinx()
        right.set_ylabel("BLEU")
        right.set_ylim(0, max(10.0, 1.1 * max(record["bleu"] for record in validation)))
        right.plot(*_series(validation, "bleu"), "s--", color="tab:green", label="validation BLEU")
    figure.legend(loc="outside upper center", ncols=3)
    return _drawn(figure, "png")


def attention_maps(maps: AttentionMaps, kind: str = "png") -> bytes:
    """Draws a small heat map for each head, a row for each layer: encoder, decoder, then cross-attention."""
    parts = (
        ("encoder", maps.encoder, maps.source, maps.source),
        ("decoder", maps.decoder, maps.target, maps.target),
        ("cross", maps.cross, maps.target, maps.source),
    )
    heads = maps.encoder.shape[1]
    rows = sum(len(weights) for _, weights, _, _ in parts)
    side = min(max(1.6, 0.13 * max(len(maps.source), len(maps.target))), 3.0)
    width = side * heads + 2.0
    families = fonts_for(text_of(maps)).families
    figure = Figure(figsize=(width, (side + 0.3) * rows + 1.8), layout="constrained")
    title = "\n".join(fill(_cut(text), int(10 * width)) for text in (maps.sentence, f"→ {maps.translation}"))
    figure.suptitle(title, fontsize=9, fontfamily=families, parse_math=False)
    figure.supylabel("token that looks (query)", fontsize=8)
    figure.supxlabel("token that is looked at (key)", fontsize=8)
    grid = figure.subplots(rows, heads, squeeze=False)
    row = 0
    for name, weights, looking, looked_at in parts:
        for layer, layer_weights in enumerate(weights, start=1):
            for head, head_weights in enumerate(layer_weights):
                axes = grid[row, head]
                axes.set_title(f"{name}, layer {layer}, head {head + 1}", fontsize=7)
                image = axes.imshow(
                    head_weights.numpy(), vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest"
                )
                axes.tick_params(length=0)
                axes.set_yticks(
                    *_labels(looking if head == 0 else []), fontsize=6, fontfamily=families, parse_math=False
                )
                axes.set_xticks(
                    *_labels(looked_at if layer == len(weights) else []),
                    fontsize=6, fontfamily=families, parse_math=False, rotation=90,
                )  # fmt: skip
            row += 1
    bar = figure.colorbar(image, ax=grid, location="right", aspect=40, shrink=0.6)
    bar.set_label("attention weight; each row of a map sums to 1", fontsize=7)
    bar.ax.tick_params(labelsize=6)
    return _drawn(figure, kind)


def text_of(maps: AttentionMaps) -> str:
    """Returns all text of the picture that comes from outside."""
    return "".join((maps.sentence, maps.translation, *maps.source, *maps.target))


def positional_encoding(length: int, dim: int, kind: str = "png") -> bytes:
    """Draws the sinusoidal encoding of positions 0 to length - 1 ("Attention Is All You Need", section 3.5)."""
    encoding = ops.sinusoid(torch.arange(length), dim)
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="dimension", ylabel="position", title="Sinusoidal positional encoding")
    image = axes.imshow(encoding.numpy(), aspect="auto", cmap="RdBu", vmin=-1, vmax=1, interpolation="nearest")
    figure.colorbar(image, label="value")
    return _drawn(figure, kind)


def _series(records: list[dict[str, Any]], field: str) -> tuple[list[int], list[float]]:
    return [record["step"] for record in records], [record[field] for record in records]


def _cut(sentence: str) -> str:
    return sentence if len(sentence) <= MOST_OF_A_SENTENCE else f"{sentence[:MOST_OF_A_SENTENCE]} …"


def _labels(tokens: list[str]) -> tuple[list[int], list[str]]:
    """Returns places and texts of as many tokens as there is room for, the first among them."""
    step = math.ceil(len(tokens) / MOST_LABELS) or 1
    return list(range(0, len(tokens), step)), tokens[::step]


def _drawn(figure: Figure, kind: str) -> bytes:
    image = io.BytesIO()
    with warnings.catch_warnings():
        # A character that no font has shows as a box: tfm.fonts tells what to install.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(image, format=kind, dpi=110)
    return image.getvalue()
