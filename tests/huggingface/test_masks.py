"""Masks that people give to Hugging Face's models themselves, weights of attention, and configs that are shared."""

from __future__ import annotations

import copy

import pytest
import torch
from harness import anatomy, differences, far, ran, step
from torch import Tensor
from zoo import BART, CAUSAL, LLAMA, SEQ2SEQ, ZOO, Species, batch

import tfm
from tfm import native

pytestmark = pytest.mark.skipif(
    bool(native.why_unavailable(torch.device("cpu"))), reason="without native kernels a CPU runs everything as before"
)
SPECIES = {species.name: species for species in ZOO}
CLOSE = 3e-5


def logits(model: torch.nn.Module, **given: Tensor) -> Tensor:
    with torch.no_grad():
        return model(**given).logits


def close(found: Tensor, expected: Tensor) -> bool:
    return far(found, expected, expected.abs().max().item()) <= CLOSE


@pytest.mark.parametrize("padding", ["right", "left", "none"])
def test_chunks_side_by_side_are_no_windows(padding):
    options = {
        "head_dim": 8, "attention_chunk_size": 4, "num_local_experts": 2, "intermediate_size_mlp": 44,
        "num_experts_per_tok": 1, "no_rope_layers": [1, 0],
    }  # fmt: skip
    species = Species("llama 4", "", "Llama4ForCausalLM", "Llama4TextConfig", CAUSAL, LLAMA | options)
    model = species.make()
    expected = step(model, species, padding)
    report = tfm.accelerate(model)
    apart = differences(step(model, species, padding), expected)
    assert max(apart.values()) <= CLOSE, apart
    assert report.stats().fused["attention"] == 2


@pytest.mark.parametrize(
    ("model", "options"),
    [
        # Its decoder's attention says that it is not causal: only the mask does.
        ("BigBirdPegasusForCausalLM", {}),
        # Attention of its own in the encoder reads the same config.
        ("PegasusXForConditionalGeneration", {"block_size": 4, "num_global_tokens": 2}),
        ("BigBirdPegasusForConditionalGeneration", {"block_size": 2, "num_random_blocks": 1}),
    ],
)
def test_attention_that_says_other_than_its_masks(model, options):
    kind = CAUSAL if model.endswith("CausalLM") else SEQ2SEQ
    species = Species(model, "", model, f"{model.partition('For')[0]}Config", kind, BART | options)
    made = species.make()
    expected = {padding: step(made, species, padding) for padding in ("right", "left", "none")}
    tfm.accelerate(made)
    for padding, outcome in expected.items():
        apart = differences(step(made, species, padding), outcome)
        assert max(apart.values()) <= CLOSE, (padding, apart)


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, "finfo.min") for name in ("llama", "gpt2", "gptj", "codegen", "mistral", "qwen2moe", "opt")]
    # GPT-J and CodeGen would add True to the scores as 1.
    + [(name, "bool") for name in ("llama", "gpt2", "mistral", "qwen2moe", "opt")],
)
def test_a_mask_of_ones_own_in_four_dimensions(name, kind):
    """Rows of padding at the left attend to nothing: all of them is finfo.min, as transformers' own masks have it."""
    species = SPECIES[name]
    given = batch(species.kind, "left")
    valid = given["attention_mask"].bool()
    length = valid.shape[1]
    allowed = torch.ones(length, length, dtype=torch.bool).tril()[None, None] & valid[:, None, None, :]
    mask = allowed if kind == "bool" else torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
    positions = (valid.cumsum(1) - 1).clamp(min=0)
    model = species.make()
    tokens = given["input_ids"]
    arguments = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
    expected = logits(model, **arguments)
    tfm.accelerate(model)
    found = logits(model, **arguments)
    assert close(found[valid], expected[valid])


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "gemma2", "glm", "deepseek"])
def test_sentences_that_are_packed_do_not_see_each_other(name):
    """Positions that begin anew tell transformers where sentences end, when no mask is given."""
    species = SPECIES[name]
    model = species.make()
    tokens = batch(species.kind, "none")["input_ids"][:1]
    positions = torch.cat((torch.arange(7), torch.arange(tokens.shape[1] - 7)))[None]
    given = {"input_ids": tokens, "position_ids": positions, "use_cache": False}
    expected = logits(model, **given)
    alone = logits(model, input_ids=tokens[:, 7:], use_cache=False)
    tfm.accelerate(model)
    found = logits(model, **given)
    assert close(found, expected)
    assert close(found[:, 7:], alone)


@pytest.mark.parametrize(
    "name", ["gpt2", "opt", "llama", "gptj", "codegen", "gptneo", "flaubert", "bart", "t5", "albert"]
)
def test_weights_of_attention_are_those_of_the_model(name):
    species = SPECIES[name]
    model = species.make()
    if model._supports_sdpa:
        model.set_attn_implementation("eager")
    given = {key: x for key, x in batch(species.kind, "none").items() if key != "labels" or species.kind == "seq2seq"}
    with torch.no_grad():
        expected = model(**given, output_attentions=True)
        tfm.accelerate(model)
        found = model(**given, output_attentions=True)
    for key in ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions"):
        theirs, ours = expected.get(key), found.get(key)
        assert (theirs is None) == (ours is None), key
        # T5 of transformers 5.17 cannot be told to use its eager attention, and has no weights then: ours are extra.
        if theirs:
            assert len(ours) == len(theirs)
            assert all(close(x, y) for x, y in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("lengths", [(30, 8, 30), (8, 30)])
def test_bigbird_takes_short_sentences_between_long_ones(lengths):
    """A short one makes the model put other modules in place of its attention, and keep them."""
    species = SPECIES["bigbird"]
    model, twin = species.make(), species.make()
    tfm.accelerate(model)
    generator = torch.Generator().manual_seed(2)
    for length in lengths:
        tokens = torch.randint(3, 64, (2, length), generator=generator)
        assert close(logits(model, input_ids=tokens), logits(twin, input_ids=tokens))
    tfm.restore(model)
    assert not ran(model, species).ours


@pytest.mark.parametrize("name", ["llama", "gptj", "bert"])
def test_models_of_one_config_are_both_right(name):
    species = SPECIES[name]
    model = species.make()
    other = type(model)(model.config).eval()
    other.load_state_dict(model.state_dict())
    given = {key: x for key, x in batch(species.kind, "left").items() if key != "labels"}
    valid = given["attention_mask"].bool()
    expected = logits(other, **given)[valid]
    tfm.accelerate(model)
    for one in (model, other):
        assert close(logits(one, **given)[valid], expected)
    tfm.restore(model)
    assert close(logits(other, **given)[valid], expected)


@pytest.mark.parametrize("name", ["llama", "gptj", "bigbird full", "t5"])
def test_a_part_of_a_model_can_be_accelerated_and_restored_alone(name):
    species = SPECIES[name]
    model = species.make()
    untouched = anatomy(copy.deepcopy(model))
    given = {key: x for key, x in batch(species.kind, "left").items() if key != "labels" or species.kind == "seq2seq"}
    expected = logits(model, **given)
    base = model.base_model
    report = tfm.accelerate(base)
    assert report.swapped
    found = logits(model, **given)
    valid = given["attention_mask"].bool() if found.shape[:2] == given["attention_mask"].shape else slice(None)
    assert close(found[valid], expected[valid])
    tfm.restore(base)
    assert anatomy(model) == untouched
