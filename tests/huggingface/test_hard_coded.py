"""Attention that classes compute themselves: other masks, weights, caches, and classes or models that are left."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from harness import differences, far, generated, ran, set_dropout, step
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import CAUSAL, LENGTH, MASKED, ZOO, Species, batch

import tfm
from tfm import native
from tfm.patching.fusion import fusions
from tfm.patching.huggingface.hard_coded import ADAPTERS

pytestmark = pytest.mark.skipif(
    bool(native.why_unavailable(torch.device("cpu"))), reason="without native kernels a CPU runs everything as before"
)
TOLERANCE = 1e-5
LOOSER = 3e-5
KNOWN = {species.name: species for species in ZOO}
# Their masks are ours: of keys, while all their attention runs fused.
READERS = ("gptj", "codegen", "gptneo", "falcon7b", "falcon40b", "falconrw", "bigbird full")
OTHERS = ("flaubert", "deberta", "xlnet", "longformer", "bigbird")


def made(name: str, **options: object) -> Species:
    """Returns a species with further options of its config."""
    known = KNOWN[name]
    return Species(known.name, known.family, known.model, known.config, known.kind, known.options | options)


def pair(species: Species) -> tuple[nn.Module, nn.Module, tfm.patching.Report]:
    """Returns a model as it was made, the same accelerated, and the report."""
    model = species.make()
    fused = copy.deepcopy(model)
    return model, fused, tfm.accelerate(fused, only="attention")


def attention_plain(report: tfm.patching.Report) -> int:
    return report.stats().plain["attention"].total()


class Dense(TorchDispatchMode):
    """Counts what has the shape of scores or of a dense mask, [B, 1 or H, S, S]."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and found.dim() == 4 and found.shape[-2:] == (LENGTH, LENGTH):
            self.count += 1
        return found


@pytest.mark.parametrize("name", [*READERS, "flaubert", "longformer"])
def test_nothing_dense_is_made_of_a_mask_of_keys(name):
    model, fused, _ = pair(made(name))
    given = batch(KNOWN[name].kind, "left")
    for one, is_dense in ((model, True), (fused, False)):
        with Dense() as dense, torch.no_grad():
            one(**given)
        # Longformer's own attention is by its window too.
        assert (dense.count > 0) == (is_dense and name != "longformer")


@pytest.mark.parametrize("name", READERS)
def test_masks_are_the_models_own_unless_all_attention_is_ours(name):
    species = made(name)
    model = species.make()
    parts = [part for part, module in model.named_modules() if type(module).__name__ in ADAPTERS]
    expected = step(copy.deepcopy(model), species, "left")
    partly = copy.deepcopy(model)
    report = tfm.accelerate(partly, exclude=parts[0])
    assert max(differences(step(partly, species, "left"), expected).values()) <= LOOSER
    assert attention_plain(report) == 0
    tfm.accelerate(partly)
    assert max(differences(step(partly, species, "left"), expected).values()) <= LOOSER
    tfm.restore(partly.get_submodule(parts[0]))
    assert max(differences(step(partly, species, "left"), expected).values()) <= LOOSER


@pytest.mark.parametrize("name", READERS)
def test_another_model_of_the_same_config_object_does_not_notice(name):
    species = made(name)
    model = species.make()
    torch.manual_seed(5)
    other = type(model)(model.config).eval()
    expected = other(**batch(species.kind, "left")).logits
    tfm.accelerate(model)
    assert torch.equal(other(**batch(species.kind, "left")).logits, expected)
    torch.manual_seed(5)
    new = type(model)(model.config).eval()
    assert torch.equal(new(**batch(species.kind, "left")).logits, expected)


@pytest.mark.parametrize("name", [*READERS, *OTHERS])
def test_weights_are_given_if_asked_for(name):
    # Where Falcon runs on torch's own function, the weights that it gives are not those of that.
    is_falcon = name.startswith("falcon")
    species = made(name, **({"attn_implementation": "eager", "alibi": False} if is_falcon else {}))
    model, fused, report = pair(species)
    given = batch(species.kind, "none")
    with torch.no_grad():
        found, expected = (one(**given, output_attentions=True) for one in (fused, model))
    assert far(found.logits, expected.logits, expected.logits.abs().max().item()) <= TOLERANCE
    assert len(found.attentions) == len(expected.attentions) == 2
    for ours, theirs in zip(found.attentions, expected.attentions, strict=True):
        assert far(ours, theirs, 1.0) <= TOLERANCE
    # Weights by their place in a window or by blocks are the class's own.
    assert (attention_plain(report) > 0) == (name in ("longformer", "bigbird"))


@pytest.mark.parametrize("name", ["gptj", "codegen", "gptneo", "falcon7b", "falcon40b", "falconrw"])
def test_masks_that_are_more_than_of_keys(name):
    species = made(name)
    model, fused, report = pair(species)
    tokens = batch(CAUSAL, "none")["input_ids"]
    # Two sequences in a row, and a mask of the user's own.
    packed = {"position_ids": torch.cat((torch.arange(8), torch.arange(LENGTH - 8)))[None].expand(3, -1)}
    own = torch.ones(LENGTH, LENGTH).tril().bool()
    own[9:, 2:5] = False
    own = torch.zeros(LENGTH, LENGTH).masked_fill(~own, torch.finfo(torch.float32).min)[None, None].expand(3, 1, -1, -1)
    cases = [packed, {"attention_mask": own}]
    if name == "falconrw":
        # Its ALiBi is counted from a mask of keys.
        cases = cases[:1]
    for given in cases:
        with torch.no_grad():
            found, expected = (one(input_ids=tokens, **given).logits for one in (fused, model))
        assert far(found, expected, expected.abs().max().item()) <= TOLERANCE
    assert attention_plain(report) == 0


@pytest.mark.parametrize("name", ["gptj", "codegen", "gptneo", "falcon7b", "falcon40b"])
def test_a_static_cache_and_beams(name):
    species = made(name)
    model, fused, report = pair(species)
    for options in ({}, {"num_beams": 3}):
        expected = generated(model, CAUSAL, **options)
        for cache in ("dynamic", "static"):
            assert torch.equal(generated(fused, CAUSAL, cache_implementation=cache, **options), expected)
    assert attention_plain(report) == 0


def test_windows_of_gpt_neo_end_at_the_query_in_a_cache_of_any_length():
    # Those of the model itself end with the cache.
    model, fused, _ = pair(made("gptneo"))
    tokens = batch(CAUSAL, "none")["input_ids"]
    cache = transformers.StaticCache(config=fused.config, max_cache_len=40)
    with torch.no_grad():
        expected = model(tokens).logits
        found = torch.cat([fused(part, past_key_values=cache).logits for part in tokens.split((9, 1, 7), 1)], 1)
    assert far(found, expected, expected.abs().max().item()) <= TOLERANCE


def test_several_tokens_on_a_filled_cache_of_gpt_neo():
    # Without padding: the model itself counts its positions.
    model, fused, _ = pair(made("gptneo"))
    tokens = batch(CAUSAL, "none")["input_ids"]
    with torch.no_grad():
        expected = model(tokens).logits[:, -4:]
        cache = fused(tokens[:, :-4], use_cache=True).past_key_values
        found = fused(tokens[:, -4:], past_key_values=cache).logits
    assert far(found, expected, expected.abs().max().item()) <= TOLERANCE


@pytest.mark.parametrize("name", [*READERS, *OTHERS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, "autocast"])
def test_sixteen_bits_err_no_more_than_the_model_itself(name, dtype):
    if (name, dtype) == ("bigbird", "autocast"):
        pytest.skip("the model itself fails there")
    species = made(name)
    given = batch(species.kind, "right")
    truth = species.make().double()(**given).logits
    valid = given["attention_mask"].bool()
    errors = []
    for one in pair(species)[:2]:
        if dtype is torch.bfloat16:
            found = one.to(dtype)(**given).logits
        else:
            with torch.autocast("cpu", torch.bfloat16):
                found = one(**given).logits
        errors.append((found.double() - truth)[valid].pow(2).mean().sqrt().item())
    assert errors[1] <= 1.5 * errors[0] + 1e-6, errors


@pytest.mark.parametrize("name", [*READERS, *OTHERS])
def test_attention_drops_while_training(name):
    _, fused, _ = pair(made(name))
    set_dropout(fused, 0.0)
    fused.train()
    given = batch(KNOWN[name].kind, "none")
    with torch.no_grad():
        still = fused(**given).logits
        for part, _, fusion in fusions(fused):
            if fusion.what == "attention":
                module = fused.get_submodule(part)
                for dropout in ("attn_dropout", "attention_dropout", "dropout"):
                    found = getattr(module, dropout, None)
                    if isinstance(found, nn.Dropout):
                        found.p = 0.5
                    elif found is not None:
                        module.dropout = 0.5
        moved = not torch.allclose(fused(**given).logits, still)
    # BigBird's blocks and Falcon without ALiBi do not drop, whatever their configs say.
    assert moved == (name not in ("bigbird", "falcon7b", "falcon40b"))


@pytest.mark.parametrize("name", ["gptj", "codegen", "gptneo", "falcon7b", "falconrw", "flaubert", "deberta", "xlnet"])
def test_whole_graphs_compile(name):
    species = made(name)
    model, fused, _ = pair(species)
    given = {key: x for key, x in batch(species.kind, "right").items() if key != "labels"}
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    with torch.no_grad():
        found, expected = compiled(**given).logits, model(**given).logits
    valid = given["attention_mask"].bool()
    assert far(found[valid], expected[valid], expected.abs().max().item()) <= TOLERANCE


def test_a_class_that_computes_something_else_is_left_with_the_reason():
    species = made("gptj")
    model = species.make()
    module = model.transformer.h[0].attn

    class GPTJAttention(type(module)):
        def _attn(self, query, key, value, attention_mask=None):
            return super()._attn(query / 2, key, value, attention_mask)

    GPTJAttention.__module__ = type(module).__module__
    module.__class__ = GPTJAttention
    expected = step(copy.deepcopy(model), species, "left")
    report = tfm.accelerate(model)
    assert [(one.name, "something else" in one.reason) for one in report.left] == [("transformer.h.0.attn", True)]
    assert max(differences(step(model, species, "left"), expected).values()) <= LOOSER


@pytest.mark.parametrize("first", ["replaced", "accelerated"])
def test_a_forward_of_its_own_is_never_given_our_masks(first):
    species = made("gptj")
    model = species.make()
    expected = step(copy.deepcopy(model), species, "left")
    module = model.transformer.h[0].attn

    def replace():
        # As libraries do that place a model's parts on several devices.
        plain = species.make().transformer.h[0].attn
        plain.load_state_dict(module.state_dict())
        plain._parameters, plain._modules = module._parameters, module._modules
        module.forward = plain.forward

    if first == "replaced":
        replace()
    report = tfm.accelerate(model)
    assert [one.reason for one in report.left] == (
        ["its forward was replaced on the object itself"] if first == "replaced" else []
    )
    if first == "accelerated":
        replace()
    assert max(differences(step(model, species, "left"), expected).values()) <= LOOSER


def test_falcons_eager_alibi_is_left():
    model = made("falconrw", attn_implementation="eager").make()
    report = tfm.accelerate(model, only="attention")
    assert {one.reason for one in report.left} == {"its eager attention adds ALiBi twice"}


@pytest.mark.parametrize("padding", ["right", "left", "none"])
def test_longformer_with_global_tokens(padding):
    species = made("longformer")
    model, fused, report = pair(species)
    given = dict(batch(MASKED, padding))
    some = torch.zeros(3, LENGTH, dtype=torch.long)
    some[0, 0], some[0, 9], some[1, -1 if padding == "left" else 0] = 1, 1, 1
    outcomes = []
    for one in (fused, model):
        output = one(**given, global_attention_mask=some)
        output.loss.backward()
        outcomes.append((output, {key: x.grad for key, x in one.named_parameters()}))
    (found, ours), (expected, theirs) = outcomes
    valid = given.get("attention_mask", torch.ones(3, LENGTH)).bool()
    assert far(found.logits[valid], expected.logits[valid], expected.logits.abs().max().item()) <= TOLERANCE
    largest = max(x.abs().max().item() for x in theirs.values() if x is not None)
    for name, gradient in theirs.items():
        assert (gradient is None) == (ours[name] is None)
        assert gradient is None or far(ours[name], gradient, largest) <= LOOSER
    assert attention_plain(report) == 0


def test_xlnet_with_memory():
    model, fused, report = pair(made("xlnet", mem_len=8))
    tokens = batch(CAUSAL, "none")["input_ids"]
    with torch.no_grad():
        found, expected = (one(tokens[:, 6:], mems=one(tokens[:, :6]).mems) for one in (fused, model))
    for ours, theirs in zip((found.logits, *found.mems), (expected.logits, *expected.mems), strict=True):
        assert far(ours, theirs, theirs.abs().max().item()) <= TOLERANCE
    assert attention_plain(report) == 0


def test_xlnet_with_two_streams_and_segments():
    model, fused, report = pair(made("xlnet"))
    tokens = batch(CAUSAL, "none")["input_ids"]
    order = torch.zeros(3, LENGTH, LENGTH)
    order[:, :, -2:] = 1.0
    targets = torch.zeros(3, 2, LENGTH)
    targets[:, 0, -2] = targets[:, 1, -1] = 1.0
    given = {
        "perm_mask": order,
        "target_mapping": targets,
        "token_type_ids": (torch.arange(LENGTH) > 8).long().expand(3, -1),
    }
    outcomes = []
    for one in (fused, model):
        logits = one(tokens, **given).logits
        logits.square().sum().backward()
        outcomes.append((logits, {key: x.grad for key, x in one.named_parameters()}))
    (found, ours), (expected, theirs) = outcomes
    assert far(found, expected, expected.abs().max().item()) <= TOLERANCE
    largest = max(x.abs().max().item() for x in theirs.values() if x is not None)
    for name, gradient in theirs.items():
        assert gradient is None or far(ours[name], gradient, largest) <= LOOSER
    assert attention_plain(report) == 0


@pytest.mark.parametrize(
    "options",
    [
        {"share_att_key": False},
        {"pos_att_type": ["c2p"]},
        {"pos_att_type": []},
        {"relative_attention": False},
        {"conv_kernel_size": 3},
    ],
    ids=str,
)
def test_deberta_by_its_options(options):
    species = made("deberta", **options)
    model, fused, report = pair(species)
    for padding in ("left", "right"):
        assert max(differences(step(fused, species, padding), step(model, species, padding)).values()) <= LOOSER
    assert attention_plain(report) == 0


def test_bigbird_stays_fused_when_a_short_input_has_its_attention_replaced():
    species = made("bigbird", block_size=4)
    model, fused, report = pair(species)
    before = step(copy.deepcopy(model), species, "right")
    assert max(differences(step(fused, species, "right"), before).values()) <= LOOSER
    inner = fused.bert.encoder.layer[0].attention.self
    assert type(inner).__name__ == "BigBirdSelfAttention"
    assert (ran(fused, species).softmaxes, attention_plain(report)) == (0, 0)
    assert report.stats().fused["attention"] == 4
    tfm.restore(fused)
    assert type(fused.bert.encoder.layer[0].attention.self).__module__ == type(model).__module__
    assert not ran(fused, species).ours


# Some lengths have a plan of their own.
@pytest.mark.parametrize(("length", "block"), [(32, 2), (1024, 64)])
def test_bigbirds_random_blocks_while_training(length, block):
    species = made("bigbird", num_random_blocks=3, block_size=block, max_position_embeddings=2 * length)
    model, fused, report = pair(species)
    tokens = torch.randint(3, 64, (2, length), generator=torch.Generator().manual_seed(2))
    outcomes = []
    for one in (fused, model):
        set_dropout(one.train(), 0.0)
        output = one(input_ids=tokens, labels=tokens)
        output.loss.backward()
        outcomes.append((output.logits, one.bert.encoder.layer[0].attention.self.query.weight.grad))
    for found, expected in zip(*outcomes, strict=True):
        assert far(found, expected, expected.abs().max().item()) <= LOOSER
    assert attention_plain(report) == 0


def test_bigbird_decodes_beside_an_encoder():
    options = {"is_decoder": True, "add_cross_attention": True, "attention_type": "original_full"}
    config = transformers.BigBirdConfig(**KNOWN["bigbird"].options | options)
    torch.manual_seed(0)
    model = transformers.BigBirdForCausalLM(config).eval()
    fused = copy.deepcopy(model)
    report = tfm.accelerate(fused, only="attention")
    given = batch(CAUSAL, "left")
    source = torch.randn(3, 6, 32, generator=torch.Generator().manual_seed(1))
    source_mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 6])
    logits = []
    for one in (fused, model):
        with torch.no_grad():
            first = one(
                input_ids=given["input_ids"][:, :-4], attention_mask=given["attention_mask"][:, :-4],
                encoder_hidden_states=source, encoder_attention_mask=source_mask, use_cache=True,
            )  # fmt: skip
            logits.append(
                one(
                    input_ids=given["input_ids"][:, -4:], attention_mask=given["attention_mask"],
                    encoder_hidden_states=source, encoder_attention_mask=source_mask,
                    past_key_values=first.past_key_values, use_cache=True,
                ).logits
            )  # fmt: skip
    assert far(logits[0], logits[1], logits[1].abs().max().item()) <= TOLERANCE
    assert attention_plain(report) == 0


@pytest.mark.parametrize("name", ["gptj", "falcon7b"])
def test_checkpointed_layers(name):
    species = made(name)
    model, fused, _ = pair(species)
    for one in (model, fused):
        set_dropout(one.train(), 0.0)
        one.gradient_checkpointing_enable()
    assert max(differences(step(fused, species, "left"), step(model, species, "left")).values()) <= LOOSER
