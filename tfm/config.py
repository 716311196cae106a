"""The shape of a model and the recipe of its training, as data; presets with the paper that each comes from."""

from __future__ import annotations

import math
import reprlib
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from tfm.errors import UserError
from tfm.ops.feed_forward import ACTIVATIONS

SCHEDULES = ("inverse_sqrt", "linear")

# pydantic's settings for these classes: no value is made to fit, and no field is ignored.
AS_WRITTEN = {"extra": "forbid", "strict": True}
# Larger counts are typing errors: no such model fits any memory, and no such run ends.
LARGEST = {"vocab_size": 2**24, "dim": 2**16, "ffn_dim": 2**20, "encoder_layers": 1000, "decoder_layers": 1000}
LARGEST_COUNT = 2**31 - 1


def check_counts(config: object, *names: str) -> None:
    """Raises UserError where a field of these names is outside the range from 1 to its sensible limit."""
    for name in names:
        count, largest = getattr(config, name), LARGEST.get(name, LARGEST_COUNT)
        if count < 1:
            raise UserError(f"{name}: expected at least 1, got {count}")
        if count > largest:
            raise UserError(f"{name}: expected at most {largest:,}, got {shortened(count)}")


def shortened(value: object) -> str:
    """Shortens a value, whatever it is, for a message of one line."""
    try:
        return reprlib.repr(value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} too large to show"


@dataclass(frozen=True)
class TransformerConfig:
    """The shape of an encoder-decoder Transformer; names as in "Attention Is All You Need", table 3."""

    __pydantic_config__: ClassVar[dict[str, Any]] = AS_WRITTEN

    vocab_size: int
    dim: int = 512  # d_model
    heads: int = 8  # h
    ffn_dim: int = 2048  # d_ff
    encoder_layers: int = 6  # N
    decoder_layers: int = 6
    dropout: float = 0.1  # P_drop, of the embeddings and of every sublayer's output (section 5.4)
    attention_dropout: float = 0.0  # of the softmax weights
    activation_dropout: float = 0.0  # inside the feed-forward network
    activation: str = "relu"
    norm_first: bool = False  # pre-norm (Xiong et al. 2020) instead of the paper's post-norm
    norm_eps: float = 1e-5
    max_length: int = 512  # tokens in a sentence, its end included

    def __post_init__(self) -> None:
        check_counts(self, "vocab_size", "dim", "heads", "ffn_dim", "encoder_layers", "decoder_layers", "max_length")
        if self.dim % self.heads:
            raise UserError(f"dim: expected a multiple of the {self.heads} heads, got {self.dim}")
        for name in ("dropout", "attention_dropout", "activation_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}: expected a probability in [0, 1], got {getattr(self, name)}")
        if not 0 <= self.norm_eps < math.inf:
            raise UserError(f"norm_eps: expected a finite number from 0, got {self.norm_eps}")
        if self.activation not in ACTIVATIONS:
            raise UserError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")


@dataclass(frozen=True)
class Recipe:
    """The settings that a model is trained with."""

    __pydantic_config__: ClassVar[dict[str, Any]] = AS_WRITTEN

    vocab_size: int  # of the tokenizer asked for; the corpus may not fill it
    batch_tokens: int  # sentences x longest sentence of a batch
    learning_rate: float  # the peak, reached at the end of the warm-up
    warmup: int  # updates
    max_steps: int  # updates
    betas: tuple[float, float] = (0.9, 0.98)
    adam_eps: float = 1e-9
    label_smoothing: float = 0.1
    clip_norm: float = 1.0  # of the gradient; 0 = no clipping
    schedule: str = "inverse_sqrt"  # of the learning rate after the warm-up; or "linear", to 0 at max_steps

    def __post_init__(self) -> None:
        check_counts(self, "vocab_size", "batch_tokens", "warmup", "max_steps")
        if not 0 <= self.label_smoothing <= 1:
            raise UserError(f"label_smoothing: expected a number in [0, 1], got {self.label_smoothing}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"betas: expected two numbers in [0, 1), got {self.betas}")
        for name in ("learning_rate", "adam_eps", "clip_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name}: expected a finite number from 0, got {getattr(self, name)}")
        if self.schedule not in SCHEDULES:
            raise UserError(f"schedule: expected one of {', '.join(SCHEDULES)}, got {self.schedule!r}")

    def learning_rate_at(self, step: int) -> float:
        """Returns the rate of update `step`, from 1: linear warm-up, then inverse square root ("Attention", eq. 3)."""
        if self.schedule == "linear":
            left = max(self.max_steps + 1 - step, 0) / max(self.max_steps + 1 - self.warmup, 1)
            return self.learning_rate * min(step / self.warmup, left)
        return self.learning_rate * min(step / self.warmup, (self.warmup / step) ** 0.5)


@dataclass(frozen=True)
class Preset:
    """A model without its vocabulary size, and its recipe."""

    source: str
    model: dict[str, Any]
    recipe: Recipe

    def config(self, vocab_size: int, **changes: Any) -> TransformerConfig:
        """Returns the model of this preset for a vocabulary, with `changes` to its fields."""
        return TransformerConfig(vocab_size=vocab_size, **(self.model | changes))


PRESETS = {
    "demo": Preset(
        "the bundled corpus on two CPU cores, in minutes",
        {"dim": 128, "heads": 4, "ffn_dim": 256, "encoder_layers": 2, "decoder_layers": 2, "dropout": 0.0},
        Recipe(
            vocab_size=2000,
            batch_tokens=2048,
            learning_rate=4e-3,
            warmup=200,
            max_steps=1000,
            schedule="linear",
        ),
    ),
    "tiny": Preset(
        "Wu et al. 2021, 'Good for Misconceived Reasons', Transformer-Tiny on Multi30k",
        {"dim": 128, "heads": 4, "ffn_dim": 256, "encoder_layers": 4, "decoder_layers": 4, "dropout": 0.3},
        Recipe(
            vocab_size=9712,
            batch_tokens=8192,
            learning_rate=5e-3,
            warmup=2000,
            max_steps=8000,
            adam_eps=1e-8,
            clip_norm=25.0,
        ),
    ),
    "base": Preset(
        "Vaswani et al. 2017, 'Attention Is All You Need', table 3, base",
        {"dim": 512, "heads": 8, "ffn_dim": 2048, "encoder_layers": 6, "decoder_layers": 6, "dropout": 0.1},
        Recipe(vocab_size=37000, batch_tokens=25000, learning_rate=7e-4, warmup=4000, max_steps=100_000),
    ),
    "big": Preset(
        "Vaswani et al. 2017, 'Attention Is All You Need', table 3, big",
        {"dim": 1024, "heads": 16, "ffn_dim": 4096, "encoder_layers": 6, "decoder_layers": 6, "dropout": 0.3},
        Recipe(vocab_size=37000, batch_tokens=25000, learning_rate=4.9e-4, warmup=4000, max_steps=300_000),
    ),
}


def to_dict(config: TransformerConfig | Recipe) -> dict[str, Any]:
    """Returns plain values, for JSON."""
    return asdict(config)
