"""A run's folder: everything that a trained model needs, in files that are replaced whole or not at all.

    config.json                 the model, its recipe, and how it is being trained
    paths.json                  where this machine keeps the training text; for --resume alone, and not to be shared
    tokenizer.json
    log.jsonl                   one JSON object a line: training, validation, checkpoints
    state.safetensors           where training stands: weights, optimizer, random state
    checkpoints/step-*.safetensors   the weights of the last checkpoints
    model.safetensors           the weights that translate
    loss.png

Nothing is pickled. Tensors carry a SHA-256, so that an altered file is noticed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tfm import records
from tfm.config import Recipe, TransformerConfig, to_dict
from tfm.errors import UserError, extra
from tfm.files import write_atomically
from tfm.model import Transformer
from tfm.tokenizer import Tokenizer

with extra("translate"):
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save

CHECKPOINT = re.compile(r"step-([0-9]{8,})\.safetensors")


@dataclass(frozen=True)
class Run:
    """The folder of one training run, and the paths of its files."""

    folder: Path

    @property
    def config(self) -> Path:
        return self.folder / "config.json"

    @property
    def paths(self) -> Path:
        return self.folder / "paths.json"

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer.json"

    @property
    def log(self) -> Path:
        return self.folder / "log.jsonl"

    @property
    def state(self) -> Path:
        return self.folder / "state.safetensors"

    @property
    def model(self) -> Path:
        return self.folder / "model.safetensors"

    @property
    def loss_curve(self) -> Path:
        return self.folder / "loss.png"

    def read_log(self) -> list[dict[str, Any]]:
        """Returns the records of the log, without what a crash tore off at its end.

        Raises:
            UserError: a line is no record.
        """
        return records.parse_log(contents(self.log) if self.log.is_file() else b"", self.log)

    def checkpoints(self, after: int = -1) -> list[Path]:
        """Lists the weights kept of the steps after `after`, oldest first; other files there are not the run's."""
        found = {path: CHECKPOINT.fullmatch(path.name) for path in (self.folder / "checkpoints").glob("*")}
        steps = {path: int(match[1]) for path, match in found.items() if match and int(match[1]) > after}
        return sorted(steps, key=lambda path: steps[path])

    def checkpoint(self, step: int) -> Path:
        return self.folder / "checkpoints" / f"step-{step:08d}.safetensors"

    def write_config(self, model: TransformerConfig, recipe: Recipe, training: dict[str, Any]) -> None:
        """Writes config.json; `training` is what the trainer wants back on resume, such as its options."""
        values = {"model": to_dict(model), "recipe": to_dict(recipe), "training": training}
        write_atomically(self.config, (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())

    def read_config(self) -> tuple[TransformerConfig, Recipe, dict[str, Any]]:
        """Returns what `write_config` wrote.

        Raises:
            UserError: the folder is no run, or its config.json is damaged.
        """
        if not self.folder.is_dir():
            raise UserError(f"{self.folder}: no such run folder")
        if not self.config.is_file():
            raise UserError(f"{self.folder}: not a run folder, config.json is missing")
        values = records.parse_config(contents(self.config), self.config)
        return values.model, values.recipe, values.training

    def is_begun(self) -> bool:
        """Tells whether training has left a state to resume from.

        Raises:
            UserError: it has left weights or has logged a checkpoint, but the state is missing.
        """
        if self.state.is_file():
            return True
        steps = [record["step"] for record in self.read_log() if record["event"] == "checkpoint"]
        trained = [f"the log records the checkpoint of step {step}" for step in steps[-1:]]
        trained += [f"{path.name} is here" for path in (self.model, *self.checkpoints()) if path.exists()]
        if trained:
            raise UserError(
                f"{self.state}: missing, though {trained[0]}: without it the run cannot go on, and starting again "
                "would overwrite its weights; put it back, or train in another folder"
            )
        return False

    def read_tokenizer(self, model: TransformerConfig, training: dict[str, Any]) -> Tokenizer:
        """Returns the tokenizer, checked against what `read_config` gave.

        Raises:
            UserError: it is missing, damaged, or another run's.
        """
        tokenizer = Tokenizer.load(self.tokenizer)
        if tokenizer.vocab_size != model.vocab_size:
            sizes = f"{tokenizer.vocab_size} tokens, the model {model.vocab_size}"
            raise UserError(f"{self.tokenizer}: does not belong to the model beside it: it has {sizes}")
        if training.get("tokenizer_sha256", self.tokenizer_sha256()) != self.tokenizer_sha256():
            raise UserError(f"{self.tokenizer}: not the tokenizer that the model beside it was trained with")
        return tokenizer

    def tokenizer_sha256(self) -> str:
        """Returns the SHA-256 of the tokenizer's file; the trainer stores it in config.json."""
        return hashlib.sha256(contents(self.tokenizer)).hexdigest()


def contents(path: Path) -> bytes:
    """Returns the bytes of a small file of a run; raises UserError where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def load_model(folder: str | os.PathLike[str], device: torch.device | str = "cpu") -> tuple[Transformer, Tokenizer]:
    """Returns the trained model of a run, in eval mode on `device`, and its tokenizer.

    Raises:
        UserError: the folder is no run, has no checkpoint yet, or a file in it is damaged.
    """
    run = Run(Path(folder))
    config, _, training = run.read_config()
    tokenizer = run.read_tokenizer(config, training)
    if not run.model.is_file():
        raise UserError(f"{run.folder}: no checkpoint yet, model.safetensors is missing")
    weights, _ = load_tensors(run.model)
    # Checked before anything of the size that config.json asks for is allocated.
    check_tensors(run.model, weights, layout(config).state_dict())
    model = Transformer(config)
    model.load_state_dict(weights)
    return model.to(device).eval(), tokenizer


def layout(config: TransformerConfig) -> Transformer:
    """Returns the model of `config` without its memory: its names, shapes and dtypes."""
    with torch.device("meta"):
        return Transformer(config)


def load_weights(model: Transformer, weights: dict[str, Tensor], path: Path) -> None:
    """Puts `weights`, read from `path`, into `model`; raises UserError where they are another model's."""
    check_tensors(path, weights, model.state_dict())
    model.load_state_dict(weights)


def check_tensors(path: Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises UserError where the tensors of `path` differ from those expected in names, shapes or dtypes."""
    for name in sorted({*expected, *found}):
        if name not in found or name not in expected:
            raise UserError(
                f"{path}: {name} is {'missing' if name in expected else 'unknown'}: another model's weights"
            )
        for kind in ("shape", "dtype"):
            one, other = getattr(expected[name], kind), getattr(found[name], kind)
            if one != other:
                words = (tuple(one), tuple(other)) if kind == "shape" else (one, other)
                raise UserError(f"{path}: {name}: expected {kind} {words[0]}, got {words[1]}")


def average(paths: Iterable[Path], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the arithmetic mean of several checkpoints of a model with such `weights`, summed in float64.

    Raises:
        UserError: a file is damaged, or another model's.
    """
    files = list(paths)
    total: dict[str, Tensor] = {}
    for path in files:
        found, _ = load_tensors(path)
        check_tensors(path, found, weights)
        for name, tensor in found.items():
            total[name] = total[name] + tensor.double() if name in total else tensor.double()
    return {name: (tensor / len(files)).float() for name, tensor in total.items()}


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Writes a safetensors file, atomically; `metadata` is any JSON."""
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    described = {"tfm": json.dumps(metadata), "sha256": digest(on_cpu, json.dumps(metadata))}
    write_atomically(path, save(on_cpu, metadata=described))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns what `save_tensors` wrote.

    Raises:
        UserError: the file is missing, truncated, altered, or was not written by tfm.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: truncated or damaged (not a file)")
    try:
        # Opened by its descriptor: safetensors takes no path that is not UTF-8.
        with path.open("rb") as file, safe_open(f"/dev/fd/{file.fileno()}", framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: truncated or damaged ({error})") from None
    if "sha256" not in metadata or "tfm" not in metadata:
        raise UserError(f"{path}: not written by tfm, its checksum is missing")
    if digest(tensors, metadata["tfm"]) != metadata["sha256"]:
        raise UserError(f"{path}: damaged, its contents do not match its checksum")
    return tensors, records.parse_object(metadata["tfm"], path)


def digest(tensors: dict[str, Tensor], metadata: str) -> str:
    """Returns the SHA-256 over names, dtypes, shapes, bytes and the metadata."""
    sha = hashlib.sha256(metadata.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        sha.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
