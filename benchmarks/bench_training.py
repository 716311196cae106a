"""Compares the bundled model with plain torch.nn.Transformer: tokens per second, and what the same minutes teach each.

    python -m benchmarks.bench_training --data DIR --minutes 20 --threads 2 --out benchmarks/results/training.json

Tokenizer, batches and their order, initial weights, recipe and update rule are the same for all, in one run; the models
are one function of their weights (tests/test_torch_translator.py). Tokens are real ones: source + target without
padding. BLEU is that of greedy translations, every model's by the same decoder. Compilation and warm-up are outside the
clock. --updates ends the training for quality after so many, or --minutes do, whichever comes first. Without --data and
with --minutes 0 nothing is learnt: the tokens are random then, in Multi30k's lengths, and --preset's model runs at its
own size.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.device import AS_GPU, CUDA, DEVICE, REHEARSAL
from benchmarks.progress import say
from benchmarks.record import environment, write
from benchmarks.suite import OURS
from benchmarks.timed_training import TimedTraining, learns, load, synthetic_task
from benchmarks.torch_translator import CONTENDERS, TorchTranslator, copy_back
from tfm.config import PRESETS
from tfm.errors import UserError
from tfm.model import Transformer
from tfm.train import Training

# The peers that ratios refer to: the first of them that takes part.
BASELINES = ("eager", "eager-bf16")
# How far a contender's first loss may be from the bundled model's, relatively: they are one function of their weights.
START_TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def measure_throughput(arguments: argparse.Namespace, record: dict[str, Any]) -> None:
    """Trains the contenders in turn, again and again, each round on the same batches; fills `record["throughput"]`."""
    task, device = load(arguments), torch.device(arguments.device)
    results: dict[str, Any] = {}
    record["throughput"] = results
    running: dict[str, TimedTraining] = {}
    for name in arguments.contenders:
        say(f"{name}: warming up")
        try:
            training = TimedTraining(name, task, device, seed=1)
            start_loss = training.start_loss()
            _check_start(name, start_loss, results)
            results[name] = {"start_loss": start_loss, "warm_up_seconds": training.warm_up(), "repeats": []}
            running[name] = training
        # Any error: a peer that cannot run here is a result, not the end of the benchmark.
        except Exception as error:
            results[name] = {"failed": _reason(error)}
            say(f"{name} failed: {_reason(error)}")
    for repeat in range(arguments.repeats):
        for name, training in list(running.items()):
            training.epoch, training.batch = repeat, 0
            say(f"{name}: speed, round {repeat + 1} of {arguments.repeats}, {arguments.throughput_seconds:g} seconds")
            try:
                results[name]["repeats"].append(training.run_for(arguments.throughput_seconds))
            except Exception as error:
                results[name]["failed"] = _reason(error)
                del running[name]
        for name in running:
            speed = results[name]["repeats"][-1]
            if arguments.baseline in running:
                baseline = results[arguments.baseline]["repeats"][-1]["tokens_per_second"]
                speed["ratio_to_eager"] = speed["tokens_per_second"] / baseline
        write(arguments.out, record)
    for name in running:
        results[name] |= summary([sample["tokens_per_second"] for sample in results[name]["repeats"]])
    write(arguments.out, record)


def summary(samples: list[float]) -> dict[str, float]:
    """Returns the median, and the distance between the extremes as a share of it."""
    median = statistics.median(samples)
    return {"median": median, "spread": (max(samples) - min(samples)) / median}


def _check_start(name: str, loss: float, results: dict[str, Any]) -> None:
    expected = next((result["start_loss"] for result in results.values() if "start_loss" in result), loss)
    tolerance = START_TOLERANCE[CONTENDERS[name].dtype]
    if not abs(loss - expected) <= tolerance * expected:
        raise ValueError(f"not the same model: its first loss is {loss:.6f}, expected {expected:.6f}")


def measure_quality(arguments: argparse.Namespace, record: dict[str, Any]) -> None:
    """Trains each contender in a process of its own, one after the other; fills `record["quality"]`."""
    record["quality"] = []
    for seed in arguments.train_seeds:
        for name in arguments.train_contenders:
            say(f"{name}, seed {seed}: training to translate, until {_limit(arguments)}")
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                try:
                    result = process.submit(train, arguments, name, seed).result()
                except Exception as error:
                    result = {"failed": _reason(error)}
            record["quality"].append({"contender": name, "seed": seed} | result)
            write(arguments.out, record)


def _limit(arguments: argparse.Namespace) -> str:
    limits = ((arguments.minutes, "minutes"), (arguments.updates, "updates"))
    return " or ".join(f"{limit:g} {unit}" for limit, unit in limits if limit is not None)


def train(arguments: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    """Trains one contender for --minutes or --updates, then translates the test set with its weights."""
    torch.set_num_threads(arguments.threads)
    task, device = load(arguments), torch.device(arguments.device)
    training = TimedTraining(name, task, device, seed)
    result: dict[str, Any] = {"start_loss": training.start_loss(), "warm_up_seconds": training.warm_up()}
    minutes, updates = (math.inf if limit is None else limit for limit in (arguments.minutes, arguments.updates))
    result |= training.run_for(60 * minutes, updates)
    if training.loss_steps:
        training._point(training.clock)
    epochs = training.epoch + training.batch / len(training._plan())
    result |= {"epochs": epochs, "train_loss": training.points[-1]["train_loss"], "points": training.points}
    model = training.model
    if isinstance(model, TorchTranslator):
        model = Transformer(task.config).to(device)
        copy_back(cast(TorchTranslator, training.model), model)
    say(f"{name}, seed {seed}: translating")
    for part, text in (("validation", task.validation), ("test", task.test)):
        options = replace(training.options, dtype="float32")
        judge = Training(training.run, model, task.tokenizer, task.recipe, task.pairs, text, options)
        result[part] = judge.validate()
    return result


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def table(record: dict[str, Any]) -> Table:
    """Makes a table of the record's medians."""
    rows = Table("contender", "tokens/s", "spread", "x eager", "updates", "epochs", "val loss", "BLEU")
    rows.columns[0].no_wrap = True
    trained = {(result["contender"], result["seed"]): result for result in record.get("quality", [])}
    for name, result in record.get("throughput", {}).items():
        if "failed" in result:
            rows.add_row(name, "failed")
            continue
        ratios = [sample["ratio_to_eager"] for sample in result["repeats"] if "ratio_to_eager" in sample]
        ratio = f"{statistics.median(ratios):.2f}" if ratios else ""
        rows.add_row(name, f"{result['median']:,.0f}", f"{result['spread']:.1%}", ratio)
    for (contender, seed), result in trained.items():
        name = f"{contender}, seed {seed}"
        if "failed" in result:
            rows.add_row(name, "failed")
            continue
        scores = (f"{result['validation']['loss']:.3f}", f"{result['test']['bleu']:.2f}")
        speed, baseline = result["tokens_per_second"], trained.get((BASELINES[0], seed), {}).get("tokens_per_second")
        ratio = f"{speed / baseline:.2f}" if baseline else ""
        rows.add_row(name, f"{speed:,.0f}", "", ratio, f"{result['updates']:,}", f"{result['epochs']:.1f}", *scores)
    return rows


def parse(command_line: list[str] | None = None) -> argparse.Namespace:
    def names(text: str) -> list[str]:
        chosen = [name for name in text.split(",") if name]
        for name in chosen:
            if name not in CONTENDERS:
                raise argparse.ArgumentTypeError(f"expected some of {', '.join(CONTENDERS)}, got {name!r}")
        return chosen

    def updates(text: str) -> int:
        if not text.isdecimal() or not int(text):
            raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
        return int(text)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of Multi30k's tok files; default: the bundled corpus")
    parser.add_argument("--source-language", default="en")
    parser.add_argument("--target-language", default="de")
    parser.add_argument("--test-set", default="test_2016_flickr")
    parser.add_argument("--preset", choices=PRESETS, help="default: demo if it learns the bundled corpus, else tiny")
    parser.add_argument("--batch-tokens", type=int, help="default: 2048 on a CPU, the preset's on a GPU")
    parser.add_argument("--learning-rate", type=float, default=0.004)
    parser.add_argument("--warmup", type=int, default=1000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peers", type=names, default=["eager", "compile"], help=f"some of {', '.join(CONTENDERS)}")
    parser.add_argument(
        "--throughput-seconds", type=float, default=60.0, help="seconds of each repeat of a contender; 0 = skip"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--minutes", type=float, help="minutes of training for quality; 0 = skip; default: 20")
    parser.add_argument(
        "--updates", type=updates, help="end that training after so many updates; without --minutes by these alone"
    )
    parser.add_argument(
        "--train-peers", type=names, default=["eager"], help="like --peers, those to be trained for quality"
    )
    parser.add_argument("--train-seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[1])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/training.json"))
    parser.add_argument("--quick", action="store_true", help="rehearse: 3 seconds, 2 repeats, 0.1 minutes")
    arguments = parser.parse_args(command_line)
    arguments.contenders, arguments.train_contenders = beside(arguments.peers), beside(arguments.train_peers)
    arguments.baseline = next((name for name in BASELINES if name in arguments.contenders), None)
    if arguments.quick:
        arguments.throughput_seconds, arguments.repeats, arguments.minutes = 3.0, 2, 0.1
    elif arguments.minutes is None and arguments.updates is None:
        arguments.minutes = 20.0
    if arguments.preset is None:
        arguments.preset = "demo" if arguments.data is None and learns(arguments) else "tiny"
    if arguments.batch_tokens is None:
        on_gpu = torch.device(arguments.device).type == "cuda"
        arguments.batch_tokens = PRESETS[arguments.preset].recipe.batch_tokens if on_gpu else 2048
    return arguments


def beside(peers: list[str]) -> list[str]:
    """Returns the bundled model, in each dtype of the peers, and behind it the peers."""
    dtypes = {CONTENDERS[name].dtype for name in peers} or {"float32"}
    ours = [name for name, contender in CONTENDERS.items() if not contender.torch_model and contender.dtype in dtypes]
    return list(dict.fromkeys([*ours, *peers]))


def main() -> None:
    arguments = parse()
    # Contenders share this process: none may push out the matmuls that oneDNN has prepared for another.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")
    torch.set_num_threads(arguments.threads)
    if REHEARSAL:
        torch.compiler.set_stance("force_eager")
    # The folder of the data is the machine's, not the benchmark's.
    shown = {name: value for name, value in vars(arguments).items() if name not in ("data", "out")}
    record: dict[str, Any] = {
        "benchmark": "training",
        "environment": environment(torch.device(arguments.device)),
        "corpus": "multi30k" if arguments.data else "bundled" if learns(arguments) else "synthetic",
        "arguments": shown,
    }
    try:
        if arguments.throughput_seconds:
            measure_throughput(arguments, record)
        if learns(arguments):
            measure_quality(arguments, record)
    except UserError as error:
        raise SystemExit(f"bench_training: {error}") from None
    console = Console()
    console.print(table(record))
    failures = {name: result["failed"] for name, result in record.get("throughput", {}).items() if "failed" in result}
    failures |= {result["contender"]: result["failed"] for result in record.get("quality", []) if "failed" in result}
    for name, reason in failures.items():
        console.print(f"{name} failed: {reason}", markup=False)
    if any(name == arguments.baseline or not CONTENDERS[name].torch_model for name in failures):
        raise SystemExit(1)


STEPS = {OURS: "tfm-bf16", "eager": "eager-bf16"} if CUDA else {OURS: "tfm", "eager": "eager"}


@pytest.mark.parametrize("peer", STEPS)
def test_training_step(benchmark: Any, peer: str) -> None:
    benchmark.extra_info |= {"suite": "training", "direction": "step", "size": "tiny", "peer": peer, "mode": "eager"}
    training = TimedTraining(STEPS[peer], synthetic_task(), DEVICE, 1)
    plan = training._plan()
    batch = plan[len(plan) // 2]
    benchmark.pedantic(training._update, args=(batch,), rounds=5, warmup_rounds=3 if AS_GPU else 1)
    if benchmark.stats is not None:
        benchmark.extra_info["tokens_per_second"] = batch.tokens / benchmark.stats.stats.median


if __name__ == "__main__":
    main()
