"""Training the bundled translation model from Python, and translating with it: what `tfm train` and `tfm translate` do.

Trains preset demo on the first thousand French-English pairs of the bundled corpus for a few updates, saves a run's
folder, loads it and translates. Prints each logged loss, which falls, and three translations: after so few updates they
are guesses; `make demo` trains long enough for right ones.
"""

from dataclasses import replace
from pathlib import Path

import torch

from tfm.checkpoint import Run, load_model
from tfm.config import PRESETS
from tfm.data import ParallelText, encode_parallel
from tfm.demo import corpus
from tfm.generate import Search, translate
from tfm.model import Transformer
from tfm.tokenizer import Tokenizer
from tfm.train import Options, Training


def main(folder: str = "runs/example", updates: int = 40) -> None:
    torch.manual_seed(1)
    pairs = corpus()[0][:1000]
    text = ParallelText([pair.source for pair in pairs], [pair.target for pair in pairs])

    preset = PRESETS["demo"]
    recipe = replace(preset.recipe, batch_tokens=512, warmup=20)
    tokenizer = Tokenizer.train([*text.source, *text.target], vocab_size=500)
    model = Transformer(preset.config(tokenizer.vocab_size))
    run = Run(Path(folder))
    run.write_config(model.config, recipe, {})
    tokenizer.save(run.tokenizer)

    encoded = encode_parallel(text, tokenizer, model.config.max_length)
    training = Training(run, model, tokenizer, recipe, encoded, validation=None, options=Options(log_every=10))

    def report(record: dict) -> None:
        if record["event"] == "train":
            print(f"update {record['step']}: loss {record['loss']:.2f}")

    training.train(report, max_steps=updates)

    model, tokenizer = load_model(run.folder)
    sources = text.source[:3]
    for source, translation in zip(sources, translate(model, tokenizer, sources, Search(beam=4)), strict=True):
        print(f"{source} -> {translation}")


if __name__ == "__main__":
    main()
