"""Compares Hugging Face's models, accelerated, with stock and with torch.compile: forward and training step.

    python -m benchmarks.huggingface --out benchmarks/results/huggingface_cpu.json

Models of the families' shapes, some with fewer layers, with random weights, on random tokens in sentences of Multi30k's
lengths, padded to the longest of an unsorted batch, as a data loader makes them. Stock attends by SDPA, transformers'
default. All take turns, round by round, so that a ratio is of neighbours; compilation and warm-up are not timed. A
training step is forward, loss and backward, with the dropout that the configuration has.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import Module

import tfm
from benchmarks.progress import say
from benchmarks.record import environment, sources, write
from benchmarks.shapes import draw_lengths

STOCK, OURS, FUSED_LOSS, COMPILED = "stock", "ours", "ours, fuse_loss", "compile"
CONTENDERS = (STOCK, OURS, FUSED_LOSS, COMPILED)
FORWARD, TRAINING = "forward", "training step"
IGNORED, FIRST_WORD = -100, 3


class Shape(NamedTuple):
    """A model of a family.

    Attributes:
        model, config: names of its classes in transformers.
        is_translator: its labels are another sentence; otherwise they are its own tokens.
        options: of the configuration, where they are not its defaults.
    """

    model: str
    config: str
    is_translator: bool
    options: dict[str, Any]


SIX = {"encoder_layers": 6, "decoder_layers": 6}
HALF: dict[str, Any] = {"encoder_ffn_dim": 2048, "decoder_ffn_dim": 2048, "d_model": 512}
HEADS = {"encoder_attention_heads": 8, "decoder_attention_heads": 8}
BASE: dict[str, Any] = {"d_model": 768, "encoder_ffn_dim": 3072, "decoder_ffn_dim": 3072}
DROPOUT = {"attention_dropout": 0.1, "activation_dropout": 0.1}
LLAMA: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "vocab_size": 32000}
MIXTRAL = {**LLAMA, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
SHAPES = {
    "BERT-base, 4 layers": Shape("BertForMaskedLM", "BertConfig", False, {"num_hidden_layers": 4}),
    "T5-small": Shape(
        "T5ForConditionalGeneration", "T5Config", True, {"num_layers": 6, "decoder_start_token_id": 0, "num_heads": 8}
    ),
    "BART-base": Shape(
        "BartForConditionalGeneration", "BartConfig", True,
        {**BASE, **SIX, **DROPOUT, "encoder_attention_heads": 12, "decoder_attention_heads": 12},
    ),
    "Marian": Shape(
        "MarianMTModel", "MarianConfig", True, {**HALF, **SIX, **HEADS, "activation_function": "swish"}
    ),
    "GPT-2, 4 layers": Shape("GPT2LMHeadModel", "GPT2Config", False, {"n_layer": 4}),
    "Llama-160M, 4 layers": Shape("LlamaForCausalLM", "LlamaConfig", False, {**LLAMA, "num_hidden_layers": 4}),
    "Mixtral, tiny": Shape("MixtralForCausalLM", "MixtralConfig", False, {**MIXTRAL, "num_hidden_layers": 2}),
    "Mamba-130m, 2 layers": Shape("MambaForCausalLM", "MambaConfig", False, {"num_hidden_layers": 2}),
}  # fmt: skip


def made(shape: Shape) -> Any:
    """Returns a model with random weights, which keeps no cache."""
    import transformers

    torch.manual_seed(1)
    config = getattr(transformers, shape.config)(**shape.options)
    config.use_cache = False
    return getattr(transformers, shape.model)(config)


def batch(model: Any, shape: Shape, sentences: int) -> dict[str, Tensor]:
    """Returns padded sentences, and labels that count no padding."""
    generator = torch.Generator().manual_seed(1)
    vocabulary = model.config.vocab_size
    tokens, mask = _padded(sentences, vocabulary, generator)
    labels, valid = _padded(sentences, vocabulary, generator) if shape.is_translator else (tokens, mask)
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels.where(valid.bool(), IGNORED)}


def _padded(sentences: int, vocabulary: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor(draw_lengths(sentences, generator))
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    return torch.randint(FIRST_WORD, vocabulary - 1, mask.shape, generator=generator) * mask + (1 - mask), mask


def contenders(model: Module) -> dict[str, Module]:
    """Returns the model, its accelerated copies and a compiled one."""
    found = {name: model if name == STOCK else copy.deepcopy(model) for name in CONTENDERS}
    tfm.accelerate(found[OURS])
    tfm.accelerate(found[FUSED_LOSS], fuse_loss=True)
    found[COMPILED].compile()
    return found


def forward(model: Any, given: dict[str, Tensor], is_translator: bool) -> None:
    """Computes logits without gradients; a translator is given what its labels are shifted to."""
    model.eval()
    inputs = {name: x for name, x in given.items() if name != "labels"}
    if is_translator:
        inputs["decoder_input_ids"] = given["labels"].clamp(min=1)
    with torch.no_grad():
        model(**inputs)


def training_step(model: Any, given: dict[str, Tensor], is_translator: bool) -> None:
    """Computes the loss and all gradients."""
    model.train()
    model.zero_grad(set_to_none=True)
    model(**given).loss.backward()


WORK: dict[str, Callable[[Any, dict[str, Tensor], bool], None]] = {FORWARD: forward, TRAINING: training_step}


def measure(shape: Shape, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns an entry for each kind of work and contender: the seconds of each round, or why it failed."""
    model = made(shape)
    given = batch(model, shape, arguments.sentences)
    models = {name: one for name, one in contenders(model).items() if name in (STOCK, *arguments.peers)}
    entries = []
    for work, run in WORK.items():
        running = {name: one for name, one in models.items() if work == TRAINING or name != FUSED_LOSS}
        seconds: dict[str, list[float]] = {name: [] for name in running}
        failed: dict[str, str] = {}
        for place in range(-1, arguments.rounds):
            for name in [one for one in running if one not in failed]:
                begin = time.perf_counter()
                try:
                    run(running[name], given, shape.is_translator)
                except Exception as error:
                    failed[name] = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
                    continue
                if place >= 0:
                    seconds[name].append(time.perf_counter() - begin)
        for name in running:
            result = {"failed": failed[name]} if name in failed else {"seconds": seconds[name]}
            entries.append({"work": work, "contender": name} | result)
    padding = 1 - given["attention_mask"].float().mean().item()
    return [entry | {"shape": list(given["input_ids"].shape), "padding": padding} for entry in entries]


def ratios(entries: list[dict[str, Any]], work: str, contender: str) -> list[float]:
    """Returns how many times as fast as stock a contender was in each round; nothing where one of them failed."""
    of = {entry["contender"]: entry.get("seconds", []) for entry in entries if entry["work"] == work}
    return [theirs / ours for theirs, ours in zip(of[STOCK], of.get(contender, []), strict=False)]


def table(record: dict[str, Any]) -> Table:
    """Makes a table of the medians."""
    rows = Table("model", "work", f"{STOCK}, ms", *(f"{name}, x stock" for name in CONTENDERS[1:]))
    for model, entries in record["models"].items():
        for work in WORK:
            stock = [x for one in entries if (one["work"], one["contender"]) == (work, STOCK) for x in one["seconds"]]
            cells = [ratios(entries, work, name) for name in CONTENDERS[1:]]
            shown = [f"{statistics.median(x):.2f}" if x else "" for x in cells]
            rows.add_row(model, work, f"{1e3 * statistics.median(stock):,.0f}", *shown)
    return rows


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--peers", nargs="*", choices=CONTENDERS[1:], default=CONTENDERS[1:], help="beside stock")
    parser.add_argument("--sentences", type=int, default=48, help="of a batch; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/huggingface_cpu.json"))
    arguments = parser.parse_args(command_line)
    torch.set_num_threads(arguments.threads)
    record: dict[str, Any] = {"benchmark": "huggingface", "environment": environment(torch.device("cpu"))}
    record |= {"sources": sources(), "sentences": arguments.sentences, "threads": arguments.threads, "models": {}}
    for name in arguments.models:
        say(f"{name}: {arguments.rounds} rounds")
        record["models"][name] = measure(SHAPES[name], arguments)
        write(arguments.out, record)
    Console().print(table(record))


if __name__ == "__main__":
    main()
