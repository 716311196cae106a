"""A run's folder: everything that a trained model needs, in files that are replaced whole or not at all.

    config.json                 the model, its recipe, and how it is being trained
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
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tfm.config import Recipe, TransformerConfig, from_dict, to_dict
from tfm.errors import UserError, extra
from tfm.files import write_atomically
from tfm.model import Transformer
from tfm.tokenizer import Tokenizer

with extra("translate"):
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save


@dataclass(frozen=True)
class Run:
    """The folder of one training run, and where its files lie."""

    folder: Path

    @property
    def config(self) -> Path:
        return self.folder / "config.json"

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
        """The records of the log, up to the first line that is torn or damaged."""
        records = []
        for line in self.log.read_bytes().splitlines(keepends=True) if self.log.exists() else []:
            try:
                records.append(json.loads(line if line.endswith(b"\n") else b""))
            except ValueError:
                break
        return records

    def checkpoints(self) -> list[Path]:
        """The weights kept, oldest first."""
        return sorted((self.folder / "checkpoints").glob("step-*.safetensors"))

    def checkpoint(self, step: int) -> Path:
        return self.folder / "checkpoints" / f"step-{step:08d}.safetensors"

    def write_config(self, model: TransformerConfig, recipe: Recipe, training: dict[str, Any]) -> None:
        """`training` is what the trainer wants back on resume: paths, seed and the like."""
        values = {"model": to_dict(model), "recipe": to_dict(recipe), "training": training}
        write_atomically(self.config, (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())

    def read_config(self) -> tuple[TransformerConfig, Recipe, dict[str, Any]]:
        """What `write_config` wrote.

        Raises:
            UserError: the folder is no run, or its config.json is damaged.
        """
        if not self.folder.is_dir():
            raise UserError(f"{self.folder}: no such run folder")
        if not self.config.is_file():
            raise UserError(f"{self.folder}: not a run folder, config.json is missing")
        try:
            values = json.loads(self.config.read_text("utf-8"))
            model, recipe, training = values["model"], values["recipe"], values["training"]
            return from_dict(TransformerConfig, model), from_dict(Recipe, recipe), dict(training)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.config}: damaged ({error})") from None
        except UserError as error:
            raise UserError(f"{self.config}: {error}") from None

    def read_tokenizer(self, model: TransformerConfig, training: dict[str, Any]) -> Tokenizer:
        """The tokenizer, checked against what `read_config` gave.

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
        """Of the tokenizer's file; the trainer stores it in config.json."""
        return hashlib.sha256(self.tokenizer.read_bytes()).hexdigest()


def load_model(folder: str | os.PathLike[str], device: torch.device | str = "cpu") -> tuple[Transformer, Tokenizer]:
    """The trained model of a run, in eval mode on `device`, and its tokenizer.

    Raises:
        UserError: the folder is no run, has no checkpoint yet, or a file in it is damaged.
    """
    run = Run(Path(folder))
    config, _, training = run.read_config()
    tokenizer = run.read_tokenizer(config, training)
    if not run.model.is_file():
        raise UserError(f"{run.folder}: no checkpoint yet, model.safetensors is missing")
    weights, _ = load_tensors(run.model)
    model = Transformer(config)
    load_weights(model, weights, run.model)
    return model.to(device).eval(), tokenizer


def load_weights(model: Transformer, weights: dict[str, Tensor], path: Path) -> None:
    """Puts `weights`, read from `path`, into `model`; UserError where they are another model's."""
    expected = model.state_dict()
    for name in sorted(set(expected) | set(weights)):
        if name not in weights or name not in expected:
            raise UserError(
                f"{path}: {name} is {'missing' if name in expected else 'unknown'}: another model's weights"
            )
        if expected[name].shape != weights[name].shape:
            shapes = f"expected shape {tuple(expected[name].shape)}, got {tuple(weights[name].shape)}"
            raise UserError(f"{path}: {name}: {shapes}")
    model.load_state_dict(weights)


def average(paths: Iterable[Path]) -> dict[str, Tensor]:
    """The arithmetic mean of several checkpoints' weights, summed in float64."""
    files = list(paths)
    total: dict[str, Tensor] = {}
    for path in files:
        for name, tensor in load_tensors(path)[0].items():
            total[name] = total[name] + tensor.double() if name in total else tensor.double()
    return {name: (tensor / len(files)).float() for name, tensor in total.items()}


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """A safetensors file, written atomically; `metadata` is any JSON."""
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    described = {"tfm": json.dumps(metadata), "sha256": digest(on_cpu, json.dumps(metadata))}
    write_atomically(path, save(on_cpu, metadata=described))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_tensors` wrote.

    Raises:
        UserError: the file is missing, truncated, altered, or was not written by tfm.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: truncated or damaged ({error})") from None
    if "sha256" not in metadata or "tfm" not in metadata:
        raise UserError(f"{path}: not written by tfm, its checksum is missing")
    if digest(tensors, metadata["tfm"]) != metadata["sha256"]:
        raise UserError(f"{path}: damaged, its contents do not match its checksum")
    return tensors, json.loads(metadata["tfm"])


def digest(tensors: dict[str, Tensor], metadata: str) -> str:
    """SHA-256 over names, dtypes, shapes, bytes, and the metadata."""
    sha = hashlib.sha256(metadata.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        sha.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
