"""Pictures as PNG bytes: the loss of a run, the attention of every head, the positional encoding."""

from __future__ import annotations

import io
import warnings
from typing import Any

import torch
from torch import Tensor

from tfm import ops
from tfm.attend import AttentionMaps
from tfm.errors import extra

with extra("translate"):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

# Beyond this many tokens their labels would be a grey bar.
MOST_LABELS = 40


def loss_curve(records: list[dict[str, Any]]) -> bytes:
    """Training loss, validation loss and BLEU over the updates, from the records of a run's log."""
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
    return _png(figure)


def attention_maps(maps: AttentionMaps) -> bytes:
    """One small heat map for each head: encoder, decoder and cross-attention above each other, a row for each layer."""
    parts = (
        ("encoder", maps.encoder, maps.source, maps.source),
        ("decoder", maps.decoder, maps.target, maps.target),
        ("cross", maps.cross, maps.target, maps.source),
    )
    heads = maps.encoder.shape[1]
    rows = sum(len(weights) for _, weights, _, _ in parts)
    side = min(max(1.6, 0.13 * max(len(maps.source), len(maps.target))), 3.0)
    figure = Figure(figsize=(side * heads + 1.2, (side + 0.3) * rows + 1.2), layout="constrained")
    grid = figure.subplots(rows, heads, squeeze=False)
    row = 0
    for name, weights, looking, looked_at in parts:
        for layer, layer_weights in enumerate(weights, start=1):
            for head, head_weights in enumerate(layer_weights):
                axes = grid[row, head]
                axes.set_title(f"{name}, layer {layer}, head {head + 1}", fontsize=7)
                _heat_map(axes, head_weights, looking if head == 0 else [], looked_at if layer == len(weights) else [])
            row += 1
    return _png(figure)


def positional_encoding(length: int, dim: int) -> bytes:
    """The sinusoidal encoding of positions 0 to length - 1 ("Attention Is All You Need", section 3.5)."""
    encoding = ops.sinusoid(torch.arange(length), dim)
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="dimension", ylabel="position", title="Sinusoidal positional encoding")
    image = axes.imshow(encoding.numpy(), aspect="auto", cmap="RdBu", vmin=-1, vmax=1, interpolation="nearest")
    figure.colorbar(image)
    return _png(figure)


def _series(records: list[dict[str, Any]], field: str) -> tuple[list[int], list[float]]:
    return [record["step"] for record in records], [record[field] for record in records]


def _heat_map(axes: Axes, weights: Tensor, rows: list[str], columns: list[str]) -> None:
    """[N, M] with labels where there is room for them; text is never read as a formula."""
    axes.imshow(weights.numpy(), vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest")
    rows, columns = (labels if len(labels) <= MOST_LABELS else [] for labels in (rows, columns))
    axes.set_yticks(range(len(rows)), rows, fontsize=6, parse_math=False)
    axes.set_xticks(range(len(columns)), columns, fontsize=6, rotation=90, parse_math=False)
    axes.tick_params(length=0)


def _png(figure: Figure) -> bytes:
    image = io.BytesIO()
    with warnings.catch_warnings():
        # A script that the font lacks shows as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(image, format="png", dpi=110)
    return image.getvalue()
