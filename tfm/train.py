"""The training loop of the bundled model: packed batches, Adam with inverse-square-root warm-up, exact resume."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tfm import precision, state
from tfm.checkpoint import Run, average, check_tensors, load_tensors, save_tensors
from tfm.config import AS_WRITTEN, Recipe, check_counts, shortened
from tfm.data import Batch, BatchPlan, EncodedPairs, ParallelText, batches, encode_parallel
from tfm.errors import UserError
from tfm.evaluate import TOKENIZERS, score
from tfm.files import write_atomically
from tfm.generate import Search, translate
from tfm.graphs import CudaGraphs, GraphedSteps
from tfm.model import Transformer
from tfm.records import Place
from tfm.state import State
from tfm.tokenizer import Tokenizer

SAMPLES = 3
# Batches are filled up to multiples of these, so that their shapes are few: tokens, sentences and longest sentence.
# A sixteenth of the budget costs 3 % of the tokens, and 64 graphs cover an epoch of Multi30k.
ROWS, SENTENCES, LENGTH, BUDGET_PARTS = 64, 64, 16, 16
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Options:
    """The settings in which a run may differ without being another model.

    Attributes:
        seed: of the batch order; the caller seeds torch with it before it builds the model.
        dtype: of the activations; "bfloat16" trains under autocast, weights stay fp32.
        interval: updates between checkpoints, with validation; None = an epoch.
        log_every: updates between log lines.
        keep: checkpoints kept, and averaged into the model that translates.
        tokenize: sacrebleu's tokenizer for the validation BLEU.
        graphs: on a GPU, an update is one CUDA graph for each shape of batch; they take as much memory again.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = AS_WRITTEN

    seed: int = 1
    dtype: str = "float32"
    interval: int | None = None
    log_every: int = 20
    keep: int = 1
    tokenize: str = "13a"
    graphs: bool = True

    def __post_init__(self) -> None:
        check_counts(self, "log_every", "keep", *(["interval"] if self.interval is not None else []))
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed: expected a number from 0 to 2**63 - 1, got {shortened(self.seed)}")
        for name, known in (("dtype", DTYPES), ("tokenize", TOKENIZERS)):
            if getattr(self, name) not in known:
                raise UserError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")


class Training:
    """One run: the model, its optimizer, and the place in the data where it stands."""

    def __init__(
        self,
        run: Run,
        model: Transformer,
        tokenizer: Tokenizer,
        recipe: Recipe,
        pairs: EncodedPairs,
        validation: ParallelText | None,
        options: Options = Options(),
    ) -> None:
        self.run, self.model, self.tokenizer, self.recipe = run, model, tokenizer, recipe
        self.pairs, self.validation, self.options = pairs, validation, options
        if validation is not None:
            self.validation_pairs = encode_parallel(validation, tokenizer, model.config.max_length)
        self.device = model.embedding.device
        on_gpu = self.device.type == "cuda"
        # A tensor, since a graph reads it anew at each replay.
        self.learning_rate = torch.zeros((), device=self.device)
        self.optimizer = torch.optim.Adam(
            model.parameters(), self.learning_rate, recipe.betas, recipe.adam_eps, fused=True, capturable=on_gpu
        )
        self.steps = GraphedSteps(
            self._step, self.device, CudaGraphs(self.device) if on_gpu and options.graphs else None
        )
        self.step, self.epoch, self.batch = 0, 0, 0
        self.saved_step, self.validated_step = 0, 0
        self.stop_reason: str | None = None
        # Sums since the last log line, kept on the device so that a step need not wait for its loss.
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.loss_steps = 0
        # The device's own count of updates, and the first of them that was not finite.
        self.updates, self.first_bad_step = torch.zeros(2, dtype=torch.int64, device=self.device).unbind()
        self.gradient_norm = torch.zeros((), device=self.device)

    def train(
        self,
        report: Callable[[dict[str, Any]], None] = lambda record: None,
        max_steps: int | None = None,
        seconds: float | None = None,
    ) -> str:
        """Trains until `max_steps` updates in all, `seconds` of this call, or `stop`; returns which it was.

        Args:
            report: told of every record that goes to the log.
            max_steps: the recipe's where None.
            seconds: None = no limit.

        Raises:
            UserError: the loss is not finite, or a file cannot be written. The last checkpoint stays good.
        """
        last_step = self.recipe.max_steps if max_steps is None else max_steps
        started, tokens = time.perf_counter(), 0
        logged_at, logged_tokens = started, 0
        self.model.train()
        plan = self._plan()
        interval = self.options.interval or len(plan)
        if self.validated_step < self.saved_step and self.saved_step % interval == 0:
            self._validate(report)
        while self.step < last_step and self.stop_reason is None:
            if self.batch == len(plan):
                self.epoch, self.batch = self.epoch + 1, 0
                plan = self._plan()
            batch = plan[self.batch]
            self._update(batch)
            tokens += batch.tokens
            logs = self.step % self.options.log_every == 0
            if logs:
                # Waits for the device, so that the clock sees the updates' end.
                self._check_finite()
            now = time.perf_counter()
            if logs:
                speed = (tokens - logged_tokens) / (now - logged_at)
                self._log(report, speed, now - started)
                logged_at, logged_tokens = time.perf_counter(), tokens
            if seconds is not None and now - started >= seconds and self.stop_reason is None:
                self.stop_reason = "time"
            if self.step % interval == 0 and self.step < last_step and self.stop_reason is None:
                self._check_finite()
                paused = time.perf_counter()
                self._checkpoint(report)
                logged_at += time.perf_counter() - paused
        if self.step > self.saved_step:
            self._checkpoint(report)
        reason, self.stop_reason = self.stop_reason or "steps", None
        return reason

    def stop(self, reason: str) -> None:
        """Ends `train` after the update under way, with a checkpoint. Safe in a signal handler."""
        self.stop_reason = reason

    def _plan(self) -> BatchPlan:
        return batches(self.pairs, self.recipe.batch_tokens, self.options.seed, self.epoch)

    def _prepared(self, batch: Batch) -> Batch:
        """Rounds the batch so that few shapes occur: each costs a graph capture (GPU) or oneDNN set-up (CPU, bf16)."""
        if self.device.type == "cuda":
            tokens = ROWS * max(1, self.recipe.batch_tokens // (BUDGET_PARTS * ROWS))
            return batch.rounded(tokens, SENTENCES, LENGTH).pin_memory()
        return batch.rounded(ROWS) if self.options.dtype == "bfloat16" else batch

    def _update(self, batch: Batch) -> None:
        """Updates the weights once, by a batch in the host's memory, which does not wait for it."""
        self.step, self.batch = self.step + 1, self.batch + 1
        self.learning_rate.fill_(self.recipe.learning_rate_at(self.step))
        self.steps(self._prepared(batch))
        self.loss_steps += 1

    def _step(self, batch: Batch) -> None:
        """Computes an update on the device."""
        loss = batch_loss(self.model, batch, self.recipe.label_smoothing, self.options.dtype)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        bad = ~(loss.detach().isfinite() & norm.isfinite())
        self.first_bad_step += self.updates * ((self.first_bad_step == 0) & bad)
        self.loss_sum += loss.detach()
        self.gradient_norm.copy_(norm)

    def _log(self, report: Callable[[dict[str, Any]], None], speed: float, elapsed: float) -> None:
        record = {
            "event": "train",
            "step": self.step,
            "epoch": self.epoch,
            "loss": self.loss_sum.item() / self.loss_steps,
            "gradient_norm": self.gradient_norm.item(),
            "learning_rate": self.recipe.learning_rate_at(self.step),
            "tokens_per_second": speed,
            "seconds": elapsed,
        }
        self.loss_sum.zero_()
        self.loss_steps = 0
        self._record(record, report)

    def _check_finite(self) -> None:
        step = int(self.first_bad_step)
        if step:
            kept = f"the checkpoint of step {self.saved_step} is kept" if self.saved_step else "no checkpoint yet"
            raise UserError(f"the loss or its gradient is not finite at step {step}: training stopped, {kept}")

    def _checkpoint(self, report: Callable[[dict[str, Any]], None]) -> None:
        """Saves; then validates, unless the process was told to go: a signal leaves it seconds."""
        self._check_finite()
        self.save()
        self.saved_step = self.step
        path = self.run.checkpoint(self.step).relative_to(self.run.folder)
        self._record({"event": "checkpoint", "step": self.step, "path": str(path)}, report)
        if self.stop_reason in (None, "time"):
            self._validate(report)

    def _validate(self, report: Callable[[dict[str, Any]], None]) -> None:
        if self.validation is not None:
            self._record({"event": "validation", "step": self.step} | self.validate(), report)
            self.validated_step = self.step

    def validate(self) -> dict[str, Any]:
        """Returns the loss per token without smoothing, BLEU of greedy translations, and the first few of them."""
        assert self.validation is not None
        loss = self.validation_loss()
        self.model.eval()
        translations = translate(self.model, self.tokenizer, self.validation.source, Search())
        scores = score(translations, self.validation.target, self.options.tokenize)
        self.model.train()
        samples = list(zip(self.validation.source, self.validation.target, translations, strict=True))[:SAMPLES]
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "bleu": scores.bleu,
            "signature": scores.bleu_signature,
            "samples": [{"source": s, "reference": r, "translation": t} for s, r, t in samples],
        }

    def validation_loss(self) -> float:
        """Returns the loss per token of the validation text, without dropout and smoothing."""
        self.model.eval()
        total, count = 0.0, 0
        with torch.inference_mode():
            budget = max(self.recipe.batch_tokens, self.model.config.max_length)
            for batch in batches(self.validation_pairs, budget, shuffle=False):
                loss = batch_loss(self.model, batch.to(self.device), 0.0, self.options.dtype)
                total, count = total + loss.item() * len(batch.target_output), count + len(batch.target_output)
        self.model.train()
        return total / count

    def save(self) -> None:
        """Saves everything that `resume` needs, and the weights that translate."""
        weights = self.model.state_dict()
        save_tensors(self.run.checkpoint(self.step), weights, {"step": self.step})
        checkpoints = self.run.checkpoints()
        save_tensors(self.run.model, average(checkpoints[-self.options.keep :], weights), {"step": self.step})
        place = Place(self.step, self.epoch, self.batch, self.loss_steps)
        # Last, so that a run that dies earlier resumes at the previous checkpoint and writes the files above again.
        state.write(self.run.state, self.model, self.optimizer, self.loss_sum, place)
        for old in checkpoints[: -self.options.keep]:
            old.unlink()

    def resume(self, found: State | None = None) -> None:
        """Takes up where the last `save` stood: the same weights, random numbers, batches and losses.

        Args:
            found: the state, where the caller has read it.

        Raises:
            UserError: there is no checkpoint, or it is damaged.
        """
        if not self.run.is_begun():
            raise UserError(f"{self.run.folder}: nothing to resume, no checkpoint was written yet")
        found = state.read(self.run.state, self.model.config) if found is None else found
        place, records = found.place, self.run.read_log()
        logged = max((record["step"] for record in records if record["event"] == "checkpoint"), default=0)
        if logged > place.step:
            raise UserError(
                f"{self.run.state}: stands at step {place.step}, though the log records the checkpoint of step "
                f"{logged}: going on from here would overwrite newer weights"
            )
        if place.batch > len(batches(self.pairs, self.recipe.batch_tokens, self.options.seed, place.epoch)):
            raise UserError(f"{self.run.state}: batch {place.batch}: epoch {place.epoch} has fewer")
        newer = self.run.checkpoints(after=place.step)
        for path in self.run.checkpoints()[: -len(newer) or None]:
            # Otherwise only the next save would find that one is damaged, and could not write the average.
            check_tensors(path, load_tensors(path)[0], self.model.state_dict())
        found.restore(self.model, self.optimizer)
        self.loss_sum.copy_(found.tensors["loss_sum"])
        self.step, self.epoch, self.batch, self.loss_steps = place.step, place.epoch, place.batch, place.loss_steps
        self.saved_step = self.step
        self.updates.fill_(self.step)
        for path in newer:
            path.unlink()
        # Records after the checkpoint will be logged again, and a validation that was missed then is made up for now.
        records = [record for record in records if record["step"] <= self.step]
        write_atomically(self.run.log, "".join(map(_line, records)).encode())
        self.validated_step = max((r["step"] for r in records if r["event"] == "validation"), default=0)

    def _record(self, record: dict[str, Any], report: Callable[[dict[str, Any]], None]) -> None:
        self.run.folder.mkdir(parents=True, exist_ok=True)
        with self.run.log.open("a", encoding="utf-8") as log:
            log.write(_line(record))
        report(record)


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def batch_loss(model: Transformer, batch: Batch, label_smoothing: float, dtype: str = "float32") -> Tensor:
    """Returns the mean cross-entropy of a batch's target tokens, a scalar."""
    if dtype == "float32":
        return model.loss(model(batch.source, batch.target_input), batch.target_output, label_smoothing)
    hidden = precision.call(model, batch.source, batch.target_input)
    with torch.autocast(hidden.device.type, torch.bfloat16):
        return model.loss(hidden, batch.target_output, label_smoothing)
