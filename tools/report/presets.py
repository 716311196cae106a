"""The table of presets in docs/translation.md, from tfm.config: sizes, and what training holds whatever the batch."""

from __future__ import annotations

import torch

from tfm.config import PRESETS
from tfm.model import Transformer

# fp32 weights, their gradients, and Adam's two moments.
BYTES_OF_TRAINING = 4 * 4
SUITS = {
    "demo": "the bundled corpus; any few thousand short sentences; the one to begin with on a CPU",
    "tiny": "tens of thousands of sentences, as Multi30k's 29,000",
    "base": "millions of sentences, as WMT's; a GPU",
    "big": "tens of millions of sentences; a GPU",
}


def table() -> str:
    """Returns the table in Markdown, a row a preset."""
    head = (
        "preset",
        "layers, width, heads",
        "vocabulary",
        "parameters",
        "training holds",
        "batch",
        "updates",
        "text it suits",
    )
    lines = [head, ("---",) * len(head)]
    for name, preset in PRESETS.items():
        recipe, config = preset.recipe, preset.config(preset.recipe.vocab_size)
        size = parameters(name)
        lines.append(
            (
                f"`{name}`",
                f"{config.encoder_layers} + {config.decoder_layers}, {config.dim}, {config.heads}",
                f"{recipe.vocab_size:,}",
                f"{size / 1e6:,.1f} M",
                f"{BYTES_OF_TRAINING * size / 1e6:,.0f} MB",
                f"{recipe.batch_tokens:,} tokens",
                f"{recipe.max_steps:,}, {recipe.warmup:,} of them warm-up",
                SUITS[name],
            )
        )
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def parameters(name: str) -> int:
    """Counts the parameters of a preset with the whole vocabulary that its recipe asks for."""
    preset = PRESETS[name]
    with torch.device("meta"):
        model = Transformer(preset.config(preset.recipe.vocab_size))
    return sum(parameter.numel() for parameter in model.parameters())
