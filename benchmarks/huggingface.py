"""Compares Hugging Face's models, accelerated, with stock, torch.compile and Liger: forward and training step.

    python -m benchmarks.huggingface
    python -m benchmarks.huggingface --models T5-small --peers ours

Models of the families' shapes, some with fewer layers, with random weights, on random tokens in sentences of Multi30k's
lengths, padded to the longest of an unsorted batch, as a data loader makes them; in bf16 on a GPU, in fp32 on a CPU.
Stock attends by SDPA, transformers' default. All take turns, round by round, so that a ratio is of neighbours;
compilation and warm-up are not timed. Liger alone comes after the others: it changes the process, so that what is stock
would be so no more. A training step is forward, loss and backward, with the dropout that the configuration has.

Environment: TFM_REHEARSAL=1 takes a GPU's path on a CPU, with tiny models (benchmarks/device.py).
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import Module

import tfm
from benchmarks.device import AS_GPU, CUDA, DEVICE, DTYPE, REHEARSAL, clock, kernels_as_on_a_gpu
from benchmarks.progress import say
from benchmarks.record import environment, sources, write
from benchmarks.shapes import draw_lengths

STOCK, OURS, FUSED_LOSS, COMPILED, LIGER = "stock", "ours", "ours, fuse_loss", "compile", "liger"
CONTENDERS = (STOCK, OURS, FUSED_LOSS, COMPILED, LIGER)
FORWARD, TRAINING = "forward", "training step"
IGNORED, FIRST_WORD = -100, 3
# Models whose own code goes through the steps in Python.
STEP_BY_STEP = ("mamba", "rwkv")
RECORD = Path(f"benchmarks/results/huggingface_{'gpu' if AS_GPU else 'cpu'}.json")


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
    "RWKV-169m, 2 layers": Shape(
        "RwkvForCausalLM", "RwkvConfig", False,
        {"hidden_size": 768, "attention_hidden_size": 768, "num_hidden_layers": 2},
    ),
}  # fmt: skip
# What a rehearsal makes of any configuration that has the name.
TINY = {
    **dict.fromkeys(("hidden_size", "attention_hidden_size", "d_model", "n_embd"), 32),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff"), 48),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "num_key_value_heads"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
    "vocab_size": 96, "d_kv": 16, "head_dim": 16, "num_local_experts": 2, "state_size": 4, "time_step_rank": 2,
    **dict.fromkeys(("pad_token_id", "decoder_start_token_id", "forced_eos_token_id"), 0),
    **dict.fromkeys(("bos_token_id", "eos_token_id"), 1),
}  # fmt: skip


def made(shape: Shape) -> Any:
    """Returns a model with random weights, which keeps no cache."""
    import transformers

    torch.manual_seed(1)
    make = getattr(transformers, shape.config)
    tiny = {name: value for name, value in TINY.items() if REHEARSAL and hasattr(make(), name)}
    config = make(**{**shape.options, **tiny})
    config.use_cache = False
    return getattr(transformers, shape.model)(config).to(DEVICE, DTYPE)


def batch(model: Any, shape: Shape, sentences: int) -> dict[str, Tensor]:
    """Returns padded sentences, and labels that count no padding."""
    generator = torch.Generator().manual_seed(1)
    vocabulary = model.config.vocab_size
    tokens, mask = _padded(sentences, vocabulary, generator)
    labels, valid = _padded(sentences, vocabulary, generator) if shape.is_translator else (tokens, mask)
    given = {"input_ids": tokens, "attention_mask": mask, "labels": labels.where(valid.bool(), IGNORED)}
    return {name: x.to(DEVICE) for name, x in given.items()}


def _padded(sentences: int, vocabulary: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor(draw_lengths(sentences, generator))
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    return torch.randint(FIRST_WORD, vocabulary - 1, mask.shape, generator=generator) * mask + (1 - mask), mask


def contender(model: Module, name: str) -> Module:
    """Returns the model as the contender has it: itself, or a copy."""
    found = model if name == STOCK else copy.deepcopy(model)
    if name in (OURS, FUSED_LOSS):
        tfm.accelerate(found, fuse_loss=name == FUSED_LOSS)
    if name == COMPILED:
        found.compile()
    if name == LIGER:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=found)
    return found


def why_not(model: Any, name: str) -> str:
    """Says why a contender has nothing for a model; empty where it has."""
    if name == COMPILED and model.config.model_type in STEP_BY_STEP:
        return "it unrolls every step, for minutes"
    if name != LIGER:
        return ""
    if not CUDA:
        return "its kernels need a GPU"
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger_kernel is not installed"
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    kind = model.config.model_type
    return "" if kind in MODEL_TYPE_TO_APPLY_LIGER_FN else f"it knows no {kind}"


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


WORK: dict[str, Callable[..., None]] = {FORWARD: forward, TRAINING: training_step}


def measure(shape: Shape, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns an entry for each kind of work and contender: the seconds of each round, or why there are none."""
    model = made(shape)
    given = batch(model, shape, arguments.sentences)
    entries = []
    # Liger's second, when nothing stock is to be timed any more.
    for group in ([name for name in CONTENDERS if name != LIGER], [LIGER]):
        models, refused = {}, {}
        for name in group:
            if name in (STOCK, *arguments.peers):
                if reason := why_not(model, name):
                    refused[name] = reason
                else:
                    models[name] = contender(model, name)
        for work, run in WORK.items():
            running = {name: one for name, one in models.items() if work == TRAINING or name != FUSED_LOSS}
            results = {name: {"failed": reason} for name, reason in refused.items()}
            results |= rounds(running, partial(run, given=given, is_translator=shape.is_translator), arguments.rounds)
            entries += [{"work": work, "contender": name} | result for name, result in results.items()]
    padding = 1 - given["attention_mask"].float().mean().item()
    return [entry | {"shape": list(given["input_ids"].shape), "padding": padding} for entry in entries]


def rounds(models: dict[str, Module], run: Callable[[Module], None], count: int) -> dict[str, dict[str, Any]]:
    """Has all models take turns so often, after once untimed; returns the seconds of each, or why it failed."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    failed: dict[str, str] = {}
    for place in range(-1, count):
        for name in [one for one in models if one not in failed]:
            begin = clock()
            try:
                run(models[name])
            except Exception as error:
                failed[name] = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
                continue
            if place >= 0:
                seconds[name].append(clock() - begin)
    return {name: {"failed": failed[name]} if name in failed else {"seconds": seconds[name]} for name in models}


def seconds_of(entries: list[dict[str, Any]], work: str, contender: str) -> list[float]:
    """Returns the seconds of each round; nothing where a contender has none."""
    of = {entry["contender"]: entry.get("seconds", []) for entry in entries if entry["work"] == work}
    return of.get(contender, [])


def ratios(entries: list[dict[str, Any]], work: str, contender: str) -> list[float]:
    """Returns how many times as fast as stock a contender was in each round; nothing where one of them failed."""
    both = seconds_of(entries, work, STOCK), seconds_of(entries, work, contender)
    return [theirs / ours for theirs, ours in zip(*both, strict=False)]


def peers_of(record: dict[str, Any]) -> list[str]:
    """Returns who was to run beside stock, of any model."""
    named = {entry["contender"] for entries in record["models"].values() for entry in entries}
    return [name for name in CONTENDERS[1:] if name in named]


def table(record: dict[str, Any]) -> Table:
    """Makes a table of the medians."""
    peers = peers_of(record)
    rows = Table("model", "work", f"{STOCK}, ms", *(f"{name}, x stock" for name in peers))
    for model, entries in record["models"].items():
        for work in WORK:
            stock = seconds_of(entries, work, STOCK)
            cells = [ratios(entries, work, name) for name in peers]
            shown = [f"{statistics.median(x):.2f}" if x else "" for x in cells]
            rows.add_row(model, work, f"{1e3 * statistics.median(stock):,.1f}" if stock else "failed", *shown)
    return rows


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, help="default: all, which is a record; some write none")
    usual = [name for name in CONTENDERS[1:] if AS_GPU or name != LIGER]
    parser.add_argument("--peers", nargs="*", choices=CONTENDERS[1:], default=usual, help="beside stock")
    parser.add_argument("--sentences", type=int, default=48, help="of a batch; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2, help="on a CPU")
    parser.add_argument("--out", type=Path, help=f"default: {RECORD}")
    arguments = parser.parse_args(command_line)
    out = arguments.out or (None if arguments.models else RECORD)
    torch.set_num_threads(arguments.threads)
    record: dict[str, Any] = {"benchmark": "huggingface", "environment": environment(DEVICE)}
    record |= {"sources": sources(), "sentences": arguments.sentences, "dtype": str(DTYPE).removeprefix("torch.")}
    record |= {"threads": arguments.threads, "models": {}}
    for name in arguments.models or SHAPES:
        say(f"{name}: {arguments.rounds} rounds")
        with kernels_as_on_a_gpu():
            record["models"][name] = measure(SHAPES[name], arguments)
        if out is not None:
            write(out, record)
    Console().print(table(record))


if __name__ == "__main__":
    main()
