"""Weights of accelerated models: files, casts, other layers in their place, quantised ones; and dropout at its rate."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from harness import differences, far, step
from torch import Tensor, nn
from zoo import CAUSAL, SEQ2SEQ, ZOO, batch

import tfm
from tfm import native

pytestmark = pytest.mark.skipif(
    bool(native.why_unavailable(torch.device("cpu"))), reason="without native kernels a CPU runs everything as before"
)
SPECIES = {species.name: species for species in ZOO}
CLOSE = 3e-5


class Linear4bit(nn.Linear):
    """A linear layer as bitsandbytes has them: its weight is packed bytes of another shape, which forward unpacks."""

    def __init__(self, whole: nn.Linear) -> None:
        super().__init__(whole.in_features, whole.out_features, whole.bias is not None)
        self.step = whole.weight.detach().abs().max() / 7
        levels = (whole.weight.detach() / self.step).round().to(torch.int8).reshape(-1, 2) & 15
        self.weight = nn.Parameter((levels[:, :1] | levels[:, 1:] << 4).to(torch.uint8), requires_grad=False)
        self.bias = whole.bias

    def forward(self, x: Tensor) -> Tensor:
        levels = torch.cat((self.weight & 15, self.weight >> 4), 1).to(x.dtype)
        levels = torch.where(levels > 7, levels - 16, levels)
        return F.linear(x, (levels * self.step).reshape(self.out_features, self.in_features), self.bias)


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "mixtral", "mamba"])
def test_files_are_those_of_the_model(name, tmp_path):
    species = SPECIES[name]
    model, twin = species.make(), species.make()
    tfm.accelerate(model)
    assert list(model.state_dict()) == list(twin.state_dict())
    for one, folder in ((model, "ours"), (twin, "theirs")):
        one.save_pretrained(tmp_path / folder)
    assert (tmp_path / "ours/config.json").read_text() == (tmp_path / "theirs/config.json").read_text()
    loaded = type(twin).from_pretrained(tmp_path / "ours").eval()
    assert type(loaded) is type(twin)
    assert max(differences(step(loaded, species, "right"), step(twin, species, "right")).values()) == 0


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "t5"])
def test_weights_that_are_loaded_count(name):
    species = SPECIES[name]
    model, twin = species.make(), species.make()
    tfm.accelerate(model)
    step(model, species, "right")
    others = {key: x * 1.1 for key, x in twin.state_dict().items()}
    model.load_state_dict(others)
    twin.load_state_dict(others)
    apart = differences(step(model, species, "right"), step(twin, species, "right"))
    assert max(apart.values()) <= CLOSE, apart


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "gemma", "bart"])
@pytest.mark.parametrize("quantised_first", [True, False])
def test_quantised_layers_are_called(name, quantised_first):
    species = SPECIES[name]
    model, twin = species.make(), species.make()

    def quantise(one: nn.Module) -> None:
        for parent in list(one.modules()):
            for child_name, child in list(parent.named_children()):
                # T5 casts what goes into `wo` to the dtype of its weight, which transformers never quantises to bytes.
                if type(child) is nn.Linear and child.out_features != 64 and child_name != "wo":
                    setattr(parent, child_name, Linear4bit(child))

    quantise(twin)
    if quantised_first:
        quantise(model)
    tfm.accelerate(model)
    if not quantised_first:
        quantise(model)
    given = batch(species.kind, "right")
    with torch.no_grad():
        found, expected = model(**given).loss, twin(**given).loss
    assert far(found, expected, expected.item()) <= CLOSE


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "gptneo"])
def test_a_model_may_become_another_dtype(name):
    species = SPECIES[name]
    model, twin = species.make(), species.make().double()
    report = tfm.accelerate(model)
    model.double()
    apart = differences(step(model, species, "left"), step(twin, species, "left"))
    assert max(apart.values()) <= 1e-6, apart
    assert report.stats().fused


def test_rwkv_rescales_its_weights_where_they_are():
    species = dataclasses.replace(SPECIES["rwkv"], options=SPECIES["rwkv"].options | {"rescale_every": 1})
    model, twin = species.make(), species.make()
    tfm.accelerate(model)
    given = {"input_ids": batch(species.kind, "none")["input_ids"], "use_cache": False}
    for mode in (False, True, False):
        model.train(mode), twin.train(mode)
        with torch.no_grad():
            found, expected = model(**given).logits, twin(**given).logits
        assert far(found, expected, expected.abs().max().item()) <= 1e-5


# The layers that make values, and those that read what attention gives.
VALUES, READERS = ("value", "v_proj", "v_lin"), ("output.dense", "out_proj", "out_lin")


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("bert", "attention_probs_dropout_prob"), ("opt", "attention_dropout"), ("bart", "attention_dropout"),
        ("distilbert", "attention_dropout"), ("flaubert", "attention_dropout"),
        ("biogpt", "attention_probs_dropout_prob"),
    ],
)  # fmt: skip
def test_attention_drops_at_its_rate(name, option):
    """With values of 1, and queries of 0 so that all keys weigh the same, n kept of m keys give n / m / (1 - p)."""
    rate = 0.3
    species = dataclasses.replace(SPECIES[name], options=SPECIES[name].options | {option: rate})
    model = species.make().train()
    with torch.no_grad():
        for path, module in model.named_modules():
            if isinstance(module, nn.Linear) and path.endswith((*VALUES, "query", "q_proj", "q_lin")):
                module.weight.zero_()
                module.bias.fill_(1.0 if path.endswith(VALUES) else 0.0)
    report = tfm.accelerate(model)
    # All keys of the decoder's attention are not there from the first query on, as they are in the encoder.
    where = "model.encoder" if species.kind == SEQ2SEQ else ""
    seen: list[Tensor] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and path.endswith(READERS) and "att" in path and path.startswith(where):
            module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    given = {key: x for key, x in batch(species.kind, "none").items() if key != "labels"}
    given |= {"decoder_input_ids": given["input_ids"][:, :3]} if species.kind == SEQ2SEQ else {}
    torch.manual_seed(0)
    with torch.no_grad():
        for _ in range(10):
            model(**given)
    assert report.stats().fused["attention"]
    found = torch.stack(seen)
    length = given["input_ids"].shape[1]
    keys = torch.arange(1, length + 1)[:, None] if species.kind == CAUSAL else torch.tensor(length)
    # One column a head: all columns of a head are the same.
    deviation = (found - 1)[..., ::8] * (keys * (1 - rate) / rate).sqrt()
    assert deviation.mean().abs() < 5 / math.sqrt(deviation.numel())
    assert abs(deviation.square().mean() - 1) < 0.15
    model.eval()
    seen.clear()
    with torch.no_grad():
        model(**given)
    assert far(torch.stack(seen), torch.ones_like(torch.stack(seen)), 1.0) <= 1e-6
