"""Provides what a training benchmark trains on, and its clock."""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import cast

import torch

from benchmarks.device import REHEARSAL
from benchmarks.progress import say
from benchmarks.shapes import draw_lengths
from benchmarks.torch_translator import CONTENDERS
from tfm import demo
from tfm.checkpoint import Run
from tfm.config import PRESETS, Recipe, TransformerConfig
from tfm.data import Batch, EncodedPairs, ParallelText, batches, encode_parallel, read_parallel
from tfm.model import Transformer
from tfm.tokenizer import Tokenizer
from tfm.train import Options, Training, batch_loss

WARM_UP_BATCHES = 12
UPDATES_PER_POINT = 50
# Seconds between lines on stderr.
SECONDS_PER_LINE = 30.0
# For presets whose texts are small; Multi30k fills no more.
VOCABULARIES = {"demo": 2000, "tiny": 9712}


@dataclass(frozen=True)
class Task:
    """Holds what is learnt: the texts, their tokenizer, the model's shape and the recipe."""

    training: ParallelText
    validation: ParallelText
    test: ParallelText
    tokenizer: Tokenizer
    config: TransformerConfig
    recipe: Recipe
    pairs: EncodedPairs


class TimedTraining(Training):
    """Trains a contender by the update of `tfm train`, with a clock around updates alone."""

    def __init__(self, name: str, task: Task, device: torch.device, seed: int) -> None:
        self.contender = CONTENDERS[name]
        torch.manual_seed(seed)
        # A peer has the bundled model's interface.
        model = cast(Transformer, self.contender.build(task.config, device))
        is_peer = self.contender.torch_model
        options = Options(seed=seed, dtype=self.contender.dtype, tokenize="none", graphs=not is_peer)
        nowhere = Run(Path(tempfile.gettempdir()))
        validation = task.validation if task.validation.source else None
        super().__init__(nowhere, model, task.tokenizer, task.recipe, task.pairs, validation, options)
        self.points: list[dict[str, float]] = []
        self.clock = 0.0

    def _prepared(self, batch: Batch) -> Batch:
        if not self.contender.torch_model:
            return super()._prepared(batch)
        # A peer's padded batches have few shapes as they are, and a sentence more would be work for nothing.
        return batch.pin_memory() if self.device.type == "cuda" else batch

    def start_loss(self) -> float:
        """Returns the untrained model's loss on the first batch, without dropout."""
        self.model.eval()
        # Compiling what is run once would cost minutes.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            batch = self._plan()[0].to(self.device)
            loss = batch_loss(self.model, batch, self.recipe.label_smoothing, self.options.dtype).item()
        self.model.train()
        return loss

    def warm_up(self) -> float:
        """Updates on short to long batches, or all shapes that become graphs, and undoes it; returns the seconds."""
        started = time.perf_counter()
        self.model.train()
        parameters = list(self.model.parameters())
        initial = [parameter.detach().clone() for parameter in parameters]
        for batch in self._warm_up_batches():
            self._update(batch)
        with torch.no_grad():
            for parameter, weights in zip(parameters, initial, strict=True):
                parameter.copy_(weights)
                for state in self.optimizer.state[parameter].values():
                    state.zero_()
        self.step = self.batch = self.loss_steps = 0
        self.updates.zero_()
        self.loss_sum.zero_()
        self._synchronize()
        torch.manual_seed(self.options.seed)
        return time.perf_counter() - started

    def _warm_up_batches(self) -> list[Batch]:
        plan = batches(self.pairs, self.recipe.batch_tokens, shuffle=False)
        if self.steps.capture is None:
            return [plan[place * (len(plan) - 1) // (WARM_UP_BATCHES - 1)] for place in range(WARM_UP_BATCHES)]
        # One is run, the next is captured.
        return 2 * list({self._prepared(batch).shape: batch for batch in plan}.values())

    def run_for(self, seconds: float, updates: float = math.inf) -> dict[str, float]:
        """Trains for so long, or so many updates where they take less; returns what was done, and how fast."""
        tokens, first, plan = 0, self.step, self._plan()
        self._synchronize()
        started, elapsed, said = time.perf_counter(), 0.0, 0.0
        while elapsed < seconds and self.step - first < updates:
            if self.batch == len(plan):
                self.epoch, self.batch = self.epoch + 1, 0
                plan = self._plan()
            batch = plan[self.batch]
            self._update(batch)
            tokens += batch.tokens
            if self.step % UPDATES_PER_POINT == 0:
                self._point(self.clock + elapsed)
            elapsed = time.perf_counter() - started
            if elapsed - said >= SECONDS_PER_LINE:
                said = elapsed
                say(f"  {elapsed:,.0f} s: {self.step - first:,} updates, {tokens / elapsed:,.0f} tokens/s")
        self._synchronize()
        elapsed = time.perf_counter() - started
        self._check_finite()
        self.clock += elapsed
        done = self.step - first
        return {"seconds": elapsed, "updates": done, "tokens": tokens, "tokens_per_second": tokens / elapsed}

    def _point(self, seconds: float) -> None:
        loss = self.loss_sum.item() / self.loss_steps
        self.points.append({"seconds": seconds, "step": self.step, "epoch": self.epoch, "train_loss": loss})
        self.loss_sum.zero_()
        self.loss_steps = 0

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def learns(arguments: argparse.Namespace) -> bool:
    """Says whether the command line asks for a training that is to teach something: --minutes 0 does not."""
    return arguments.minutes != 0


def load(arguments: argparse.Namespace) -> Task:
    """Loads the task the command line names; without --data the bundled corpus, or random tokens that teach nothing.

    Raises:
        UserError: a file of --data is missing or damaged.
    """
    if arguments.data is None and not learns(arguments):
        return synthetic_task(arguments.preset, arguments.batch_tokens)
    if arguments.data is None:
        training, held_out = (
            ParallelText([pair.source for pair in pairs], [pair.target for pair in pairs]) for pairs in demo.corpus()
        )
        half = len(held_out) // 2
        validation = ParallelText(held_out.source[:half], held_out.target[:half])
        test = ParallelText(held_out.source[half:], held_out.target[half:])
    else:
        languages = (arguments.source_language, arguments.target_language)
        parts = ("train", "val", arguments.test_set)
        training, validation, test = (
            read_parallel(*(arguments.data / f"{part}.lc.norm.tok.{language}.gz" for language in languages))
            for part in parts
        )
    preset = PRESETS[arguments.preset]
    changes = {name: getattr(arguments, name) for name in ("batch_tokens", "learning_rate", "warmup")}
    recipe = replace(preset.recipe, schedule="inverse_sqrt", **changes)
    tokenizer = Tokenizer.train(chain(training.source, training.target), recipe.vocab_size)
    config = preset.config(tokenizer.vocab_size)
    pairs = encode_parallel(training, tokenizer, config.max_length)
    return Task(training, validation, test, tokenizer, config, recipe, pairs)


def synthetic_task(preset: str = "tiny", batch_tokens: int = 2048) -> Task:
    """Makes random tokens in Multi30k's number and lengths, so that sorting leaves as little padding."""
    vocabulary, sentences, changes = VOCABULARIES.get(preset, 32_000), 29_000, {"max_length": 64}
    if REHEARSAL:
        vocabulary, sentences, batch_tokens = 50, 60, 128
        changes |= {"dim": 32, "heads": 2, "ffn_dim": 48, "encoder_layers": 1, "decoder_layers": 1}
    config = PRESETS[preset].config(vocabulary, **changes)
    generator = torch.Generator().manual_seed(1)
    sides: list[torch.Tensor] = []
    for _ in range(2):
        offsets = torch.tensor([0, *draw_lengths(sentences, generator)]).cumsum(0)
        tokens = torch.randint(3, vocabulary, (int(offsets[-1]),), generator=generator, dtype=torch.int32)
        sides += [tokens, offsets]
    source, source_offsets, target, target_offsets = sides
    pairs = EncodedPairs(source, source_offsets, target, target_offsets)
    recipe = replace(PRESETS[preset].recipe, batch_tokens=batch_tokens)
    nothing = ParallelText([], [])
    tokenizer = cast(Tokenizer, None)  # nothing is translated
    return Task(nothing, nothing, nothing, tokenizer, config, recipe, pairs)
