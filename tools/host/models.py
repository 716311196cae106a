"""Every operation, layers, a training step and a decoding step, at the sizes of tools.host.sizes.

They launch as much as larger ones; but a loss over many classes goes by chunks, and launches more.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, cast
from unittest.mock import patch

import torch
from torch import Tensor

from tfm import nn
from tfm.checkpoint import Run
from tfm.config import PRESETS, TransformerConfig
from tfm.data import BatchPlan, EncodedPairs
from tfm.generate import Cache, Search, beam_search
from tfm.model import Transformer
from tfm.tokenizer import EOS, Tokenizer
from tfm.train import Options, Training
from tools.host.call import Budget, Call
from tools.host.huggingface import huggingface_cases
from tools.host.launches import Launches
from tools.host.rows import BACKWARD, Piece, pieces
from tools.host.sizes import CLASSES, HALF, HEADS, HIDDEN, LENGTH, SENTENCES, WIDTH, leaf
from tools.host.timing import Timed, seconds_of_add
from tools.subjects import subjects

LAYERS, BEAM = 6, 4
# The first steps make what the later ones find.
STEADY = 3
# A layer draws its seed besides: one launch.
ENCODER, DECODER, LAYER_BACKWARD = Budget(launches=7 + 1, host=200), Budget(launches=11 + 1), Budget(launches=20)
DECODING = Budget(launches=8 * LAYERS + 3)
Observed = TypeVar("Observed")


def layer_cases() -> list[Call]:
    """Returns drop-in layers in training, post-norm, with and without a padding mask."""
    options: dict[str, Any] = {"dropout": 0.1, "batch_first": True, "dtype": HALF}
    encoder = nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, **options)
    decoder = nn.TransformerDecoderLayer(WIDTH, HEADS, HIDDEN, **options)
    x, memory = leaf(SENTENCES, LENGTH, WIDTH), leaf(SENTENCES, LENGTH, WIDTH)
    padding = torch.zeros(SENTENCES, LENGTH, dtype=torch.bool)
    padding[0, LENGTH // 2 :] = True
    found = []
    for name, mask in (("", None), (", padding mask", padding)):
        encode = partial(encoder, x, src_key_padding_mask=mask)
        found.append(Call(f"encoder layer{name}", encode, (x, *encoder.parameters()), ENCODER, LAYER_BACKWARD))
    for name, mask in (("", None), (", padding masks", padding)):
        decode = partial(
            decoder, x, memory, tgt_is_causal=True, tgt_key_padding_mask=mask, memory_key_padding_mask=mask
        )  # fmt: skip
        leaves = (x, memory, *decoder.parameters())
        found.append(Call(f"decoder layer{name}", decode, leaves, DECODER, LAYER_BACKWARD))
    return found


def small_model(layers: int = LAYERS, **changes: Any) -> Transformer:
    """Returns the bundled model, of the paper's depth where nothing is said."""
    return Transformer(TransformerConfig(CLASSES, WIDTH, HEADS, HIDDEN, layers, layers, **changes))


def ragged_pairs(lengths: list[tuple[int, int]]) -> EncodedPairs:
    """Returns sentence pairs of these lengths, of one token each."""

    def side(place: int) -> tuple[Tensor, Tensor]:
        sizes = torch.tensor([0, *(pair[place] for pair in lengths)])
        return torch.full((int(sizes.sum()),), EOS + 1, dtype=torch.int32), sizes.cumsum(0)

    return EncodedPairs(*side(0), *side(1))


def training(model: Transformer, pairs: EncodedPairs) -> Training:
    """Returns the training of `model` in bf16 under autocast; nothing is read or written."""
    run, options = Run(Path(tempfile.gettempdir()) / "none"), Options(dtype="bfloat16", graphs=False)
    return Training(run, model, cast(Tokenizer, None), PRESETS["base"].recipe, pairs, None, options)


def training_step() -> Callable[[], Any]:
    """Returns an update of the bundled model: forward, backward, clipping and Adam."""
    pairs = ragged_pairs([(LENGTH, LENGTH - 1)] * SENTENCES)
    batch = BatchPlan(pairs, torch.arange(len(pairs)), [(0, len(pairs))])[0]
    return partial(training(small_model(), pairs).steps, batch)


def decode(model: Transformer, lengths: list[int], observe: Callable[[], Observed]) -> list[Observed]:
    """Translates sentences of these lengths, and returns what `observe` says at the beginning of each step.

    Between two of them lie a step of the model and one of the search. No translation ends before the model's limit: the
    logits are others than the model's, whose kernels do not run.
    """
    logits = torch.randn(len(lengths), BEAM, CLASSES)
    logits[..., EOS] = torch.finfo(torch.float32).min
    step, seen = Cache.step, []

    def observed(cache: Cache, latest: Tensor) -> Tensor:
        seen.append(observe())
        step(cache, latest)
        return logits

    with patch.object(Cache, "step", observed):
        beam_search(model, [[EOS + 1] * (length - 1) + [EOS] for length in lengths], Search(beam=BEAM))
    return seen


def _steady_steps(observe: Callable[[], Observed], steps: int) -> list[Observed]:
    """Decodes as `decode`, in steps that find what the first ones made, the cache's room among it."""
    model = small_model(max_length=STEADY + steps).to(HALF).eval()
    return decode(model, [LENGTH] * SENTENCES, observe)[STEADY:]


class DecodingStep(Piece):
    """One step of a translation, search included."""

    def count(self, found: Launches) -> Launches:
        before, after = _steady_steps(found.copy, 2)
        return after - before

    def time(self) -> Timed:
        seconds = min(later - earlier for earlier, later in pairwise(_steady_steps(time.process_time, 12)))
        return Timed(seconds, seconds_of_add())


def everything() -> list[Piece]:
    """Returns all rows of the table, in their order."""
    search = partial(_steady_steps, lambda: None, 2)
    return [
        *pieces(call for subject in subjects() for call in subject.timed(torch.tensor(5))),
        *pieces(layer_cases()),
        *pieces(huggingface_cases()),
        Piece(f"training step, {LAYERS} + {LAYERS} layers", BACKWARD, training_step()),
        DecodingStep(f"decoding step, {LAYERS} layers", "forward and search", search, DECODING),
    ]
