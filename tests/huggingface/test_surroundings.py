"""accelerate() among what people do with Hugging Face's models: mixed and unknown models, hooks, caches, wrappers."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from harness import NEW_TOKENS, differences, generated, set_dropout, step
from peft import LoraConfig, PeftModel, get_peft_model
from selection import long_but
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    BertConfig,
    BertModel,
    GenerationConfig,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.models.bert.modeling_bert import BertAttention
from transformers.pytorch_utils import Conv1D
from zoo import BERT, CAUSAL, ZOO, batch

import tfm
from tfm import native
from tfm.patching import Report

pytestmark = pytest.mark.skipif(
    bool(native.why_unavailable(torch.device("cpu"))), reason="without native kernels a CPU runs everything as before"
)
SPECIES = {species.name: species for species in ZOO}
CLOSE = 3e-5


class Reader(nn.Module):
    """A user's model: a BERT whose states one of torch's Transformers reads on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bert = BertModel(BertConfig(**BERT))
        layer = nn.TransformerEncoderLayer(32, 4, 44, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.encoder(states, src_key_padding_mask=attention_mask == 0)


class Scores(nn.Module):
    """An attention that the tests invent: it scales by something else, and asks no interface."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.query(x) @ x.transpose(1, 2), -1) @ x


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= CLOSE * expected.abs().max())


def test_a_users_model_of_both_houses():
    model = Reader().eval()
    given = {name: x for name, x in batch("masked", "right").items() if name != "labels"}
    with torch.no_grad():
        expected = model(**given)
        report = tfm.accelerate(model)
        found = model(**given)
    valid = given["attention_mask"].bool()
    assert close(found[valid], expected[valid])
    assert {"attention", "residual", "tfm.nn.TransformerEncoder", "tfm.nn.MultiheadAttention"} <= report.counts.keys()
    restored = tfm.restore(model)
    assert len(restored.swapped) == len(report.swapped)
    assert type(model.bert.encoder.layer[0].attention) is BertAttention


@pytest.mark.parametrize(
    ("make", "given"),
    [
        pytest.param(
            lambda: ViTForImageClassification(
                ViTConfig(
                    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=44, image_size=8,
                    patch_size=4,
                )
            ),
            {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))},
            id="vision",
        ),
        pytest.param(
            lambda: WhisperForConditionalGeneration(
                WhisperConfig(
                    vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
                    decoder_attention_heads=4, encoder_ffn_dim=44, decoder_ffn_dim=44, num_mel_bins=8,
                    max_source_positions=12, max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                    decoder_start_token_id=1,
                )
            ),
            {
                "input_features": torch.randn(2, 8, 24, generator=torch.Generator().manual_seed(0)),
                "decoder_input_ids": torch.tensor([[1, 5, 6, 7], [1, 8, 9, 0]]),
            },
            id="speech",
        ),
    ],
)  # fmt: skip
def test_models_that_nobody_thought_of_are_right(make, given):
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        expected = model(**given).logits
        report = tfm.accelerate(model)
        assert close(model(**given).logits, expected)
    assert report.counts["attention"]


def test_a_class_that_the_tests_invent_is_left():
    model = Scores()
    report = tfm.accelerate(model)
    assert report.swapped == ()
    assert type(model) is Scores


def with_adapters(model: nn.Module) -> PeftModel:
    """The model with LoRA in every linear layer that PEFT allows, of weights that add something."""
    kinds = (nn.Linear, Conv1D)
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, kinds)}
    targets = sorted(names - {"lm_head", "decoder", "out_proj"})
    torch.manual_seed(5)
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False))


@pytest.mark.parametrize("adapters_first", [True, False])
@pytest.mark.parametrize("name", ["llama", "bert", "t5", "gpt2", "mixtral", "mamba"])
def test_adapters_of_peft_count(name, adapters_first):
    """Their gradients too, and what they are merged into."""
    species = SPECIES[name]
    twin = with_adapters(species.make())
    model = species.make()
    if adapters_first:
        model = with_adapters(model)
        report = tfm.accelerate(model)
    else:
        report = tfm.accelerate(model)
        model = with_adapters(model)
    apart = differences(step(model, species, "right"), step(twin, species, "right"))
    assert max(apart.values()) <= CLOSE, apart
    assert report.counts["recurrence" if name == "mamba" else "attention"]
    merged, expected = (one.merge_and_unload().requires_grad_() for one in (model, twin))
    apart = differences(step(merged, species, "right"), step(expected, species, "right"))
    assert max(apart.values()) <= CLOSE, apart


@pytest.mark.parametrize(
    "name", long_but(("bert", "llama"), ("llama", "bert", "t5", "mistral", "mamba", "bart", "gpt2"))
)
def test_it_compiles_whole(name):
    species = SPECIES[name]
    model = species.make()
    given = {key: x for key, x in batch(species.kind, "left").items() if key != "labels" or species.kind == "seq2seq"}
    given |= {"use_cache": False} if species.kind == CAUSAL else {}
    with torch.no_grad():
        expected = model(**given).logits
        tfm.accelerate(model)
        torch._dynamo.reset()
        found = torch.compile(model, fullgraph=True, backend="eager")(**given).logits
    valid = given["attention_mask"].bool() if found.shape[1] == given["attention_mask"].shape[1] else slice(None)
    assert close(found[valid], expected[valid])


@pytest.mark.parametrize("name", ["llama", "bert", "bart", "t5"])
def test_hooks_see_what_they_saw(name):
    species = SPECIES[name]

    def seen(one: nn.Module) -> list[Tensor]:
        found: list[Tensor] = []
        linears = [module for module in one.modules() if isinstance(module, nn.Linear)]
        hooks = [module.register_forward_hook(lambda m, args, result: found.append(result)) for module in linears]
        step(one, species, "right")
        for hook in hooks:
            hook.remove()
        return found

    model = species.make()
    expected = seen(model)
    tfm.accelerate(model)
    found = seen(model)
    assert len(found) == len(expected)
    assert all(close(x, y) for x, y in zip(found, expected, strict=True) if x.shape == y.shape)


def test_weights_and_states_can_be_asked_for():
    species = SPECIES["bert"]
    model = species.make()
    given = {name: x for name, x in batch(species.kind, "right").items() if name != "labels"}
    model.set_attn_implementation("eager")
    asked = {"output_attentions": True, "output_hidden_states": True}
    with torch.no_grad():
        expected = model(**given, **asked)
        tfm.accelerate(model)
        found = model(**given, **asked)
    valid = given["attention_mask"].bool()
    assert len(found.attentions) == len(expected.attentions) == 2
    for x, y in zip(found.attentions, expected.attentions, strict=True):
        assert close(x.transpose(1, 2)[valid], y.transpose(1, 2)[valid])
    for x, y in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert close(x[valid], y[valid])


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_checkpointing_gives_the_same(name):
    species = SPECIES[name]
    model = species.make()
    set_dropout(model, 0.0)
    expected = step(model, species, "right")
    tfm.accelerate(model)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    apart = differences(step(model, species, "right"), expected)
    assert max(apart.values()) <= CLOSE, apart


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}, {"assisted": True}],
    ids=lambda options: " ".join(options),
)
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "t5"])
def test_every_way_to_generate(name, options):
    species = SPECIES[name]
    model, options = species.make(), dict(options)
    if options.get("cache_implementation") and name == "mistral":
        pytest.skip("a static cache of stock's windows is compiled, which takes a minute")
    if options.pop("assisted", False):
        if name == "t5":
            pytest.skip("an assistant of an encoder-decoder model needs one sentence at a time")
        given = {"input_ids": torch.arange(3, 12)[None], "max_new_tokens": NEW_TOKENS, "do_sample": False}
        assistant = copy.deepcopy(model)
        expected = model.generate(**given, assistant_model=assistant)
        tfm.accelerate(model)
        assert torch.equal(model.generate(**given, assistant_model=assistant), expected)
        return
    options["generation_config"] = GenerationConfig(disable_compile=True, pad_token_id=0, **options)
    options = {"generation_config": options["generation_config"]}
    expected = generated(model, species.kind, **options)
    tfm.accelerate(model)
    assert torch.equal(generated(model, species.kind, **options), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "bert", "t5", "gemma"])
def test_halves_err_no_more_than_stock(name, dtype):
    species = SPECIES[name]
    truth = step(species.make(), species, "right")
    stock = step(species.make().to(dtype), species, "right")
    model = species.make().to(dtype)
    tfm.accelerate(model)
    ours = step(model, species, "right")
    error, allowed = (ours.logits - truth.logits).abs().max(), (stock.logits - truth.logits).abs().max()
    assert error <= 1.5 * allowed + torch.finfo(dtype).eps * truth.logits.abs().max()


def test_autocast_is_obeyed():
    species = SPECIES["bert"]
    model = species.make()
    truth = step(model, species, "right").logits
    with torch.autocast("cpu", torch.bfloat16):
        stock = step(model, species, "right").logits
        tfm.accelerate(model)
        ours = step(model, species, "right").logits
    assert ours.dtype == stock.dtype
    assert (ours - truth).abs().max() <= 1.5 * (stock - truth).abs().max()


def test_parts_can_be_chosen_and_left():
    model = SPECIES["llama"].make()
    report = tfm.accelerate(model, only=["norm", "model.layers.0.mlp"])
    assert report.counts == {"norm": 5, "feed_forward": 1}
    assert report.left == ()
    tfm.restore(model)
    report = tfm.accelerate(model, exclude=["model.layers.1.*", "norm"])
    assert report.counts == {"attention": 1, "feed_forward": 1, "cross_entropy": 1}
    expected = step(SPECIES["llama"].make(), SPECIES["llama"], "left")
    assert max(differences(step(model, SPECIES["llama"], "left"), expected).values()) <= CLOSE
    assert report.stats().fused["attention"] == 1
    assert report.stats().plain["attention"] == {"excluded by 'model.layers.1.*'": 1}
    with pytest.raises(ValueError, match=r"^only: expected layer, attention, .*got 'layers.9'"):
        tfm.accelerate(model, only="layers.9")


def test_a_report_says_what_and_where():
    report = tfm.accelerate(SPECIES["llama"].make())
    assert isinstance(report, Report)
    assert "2 x attention: model.layers.*.self_attn" in str(report)


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_wrapped_for_many_devices(one_process):
    species = SPECIES["llama"]
    expected = step(species.make(), species, "right")
    model = species.make()
    tfm.accelerate(model)
    wrapped = DistributedDataParallel(model)
    loss = wrapped(**batch(species.kind, "right")).loss
    loss.backward()
    assert close(loss.detach(), expected.loss)
    sharded = species.make()
    tfm.accelerate(sharded)
    mesh = init_device_mesh("cpu", (1,))
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    loss = sharded(**batch(species.kind, "right")).loss
    loss.backward()
    assert close(loss.detach(), expected.loss)
