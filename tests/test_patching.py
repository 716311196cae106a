"""accelerate() and restore() on models as users have them."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

import tfm
from tfm.patching import Report

DIM, HEADS = 8, 2


class MyEncoderLayer(nn.TransformerEncoderLayer):
    """A user's subclass, which must stay as it is."""


class LowRank(nn.Linear):
    """A LoRA-like replacement of a linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.sum(-1, keepdim=True)


class Translator(nn.Module):
    """A user's model: embedding, torch.nn's Transformer, norms of their own, a shared layer and a subclass."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, DIM)
        self.transformer = nn.Transformer(DIM, HEADS, 2, 1, 12, dropout=0.0, batch_first=True)
        self.refine = nn.TransformerEncoderLayer(DIM, HEADS, 12, 0.0, batch_first=True)
        self.refine_again = self.refine
        self.mine = MyEncoderLayer(DIM, HEADS, 12, 0.0, batch_first=True)
        self.image_norm = nn.LayerNorm((3, DIM))
        self.rms = nn.RMSNorm(DIM)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        padding = source == 0
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        x = self.transformer(
            self.embedding(source), self.embedding(target), tgt_mask=mask, tgt_is_causal=True,
            src_key_padding_mask=padding.float().masked_fill(padding, float("-inf")),
            memory_key_padding_mask=padding.float().masked_fill(padding, float("-inf")),
        )  # fmt: skip
        x = self.mine(self.refine_again(self.refine(x)))
        return self.rms(self.image_norm(x[:, :3]))


SOURCE = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 0, 0, 0]])
TARGET = torch.tensor([[1, 2, 3, 4], [6, 7, 8, 9]])


def classes(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules(remove_duplicate=False)}


def test_a_users_model_keeps_everything_but_its_classes() -> None:
    model = Translator()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    fired = []
    model.transformer.encoder.register_forward_hook(lambda *given: fired.append("encoder"))
    before, output = classes(model), model(SOURCE, TARGET)
    parameters, state = dict(model.named_parameters()), {k: v.clone() for k, v in model.state_dict().items()}
    fired.clear()
    report = tfm.accelerate(model)
    assert isinstance(report, Report)
    assert type(model) is Translator
    assert type(model.transformer) is tfm.nn.Transformer
    assert type(model.transformer.decoder.layers[0].multihead_attn) is tfm.nn.MultiheadAttention
    assert model.refine is model.refine_again
    assert type(model.refine) is tfm.nn.TransformerEncoderLayer
    assert type(model.rms) is tfm.nn.RMSNorm
    assert type(model.mine) is MyEncoderLayer
    assert type(model.mine.self_attn) is tfm.nn.MultiheadAttention
    assert type(model.image_norm) is nn.LayerNorm
    torch.testing.assert_close(model(SOURCE, TARGET), output)
    assert fired == ["encoder"]
    assert all(model.get_parameter(name) is parameter for name, parameter in parameters.items())
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    assert model.state_dict().keys() == state.keys()
    model(SOURCE, TARGET)[..., 0].square().sum().backward()
    optimizer.step()
    assert not torch.equal(
        model.transformer.encoder.layers[0].linear1.weight, state["transformer.encoder.layers.0.linear1.weight"]
    )
    changed = model(SOURCE, TARGET)
    restored = tfm.restore(model)
    assert classes(model) == before
    assert len(restored.swapped) == len(report.swapped)
    torch.testing.assert_close(model(SOURCE, TARGET), changed)


def test_the_report_reads_well() -> None:
    model = Translator()
    model.refine.linear1 = LowRank(DIM, 12)
    report = tfm.accelerate(model)
    assert report.counts == {
        "tfm.nn.Transformer": 1,
        "tfm.nn.TransformerEncoder": 1,
        "tfm.nn.TransformerDecoder": 1,
        "tfm.nn.TransformerEncoderLayer": 3,
        "tfm.nn.TransformerDecoderLayer": 1,
        "tfm.nn.MultiheadAttention": 6,
        "tfm.nn.LayerNorm": 4 + 3 + 2 + 2 + 2,
        "tfm.nn.RMSNorm": 1,
    }
    assert [(left.name, left.kind) for left in report.left] == [
        ("mine", "MyEncoderLayer"),
        ("image_norm", "LayerNorm"),
    ]
    text = str(report)
    assert text.splitlines()[0] == "replaced 27 modules"
    assert "  1 x tfm.nn.Transformer: transformer" in text
    assert "  refine calls its children one by one, unfused: linear1 is a LowRank" in text
    assert "left 2 modules" in text
    assert "mine (MyEncoderLayer): a subclass of torch.nn.TransformerEncoderLayer" in text
    assert "image_norm (LayerNorm): normalises over 2 dimensions, which torch does" in text
    assert max(map(len, text.splitlines())) < 1000


def test_twice_is_once() -> None:
    model = Translator()
    first = tfm.accelerate(model)
    second = tfm.accelerate(model)
    assert second.swapped == ()
    assert second.unchanged == len(first.swapped)
    assert str(second).startswith(f"nothing replaced, {len(first.swapped)} modules already done")
    tfm.restore(model)
    again = tfm.restore(model)
    assert again.swapped == ()
    assert str(again) == "nothing restored"


def test_the_model_itself_may_be_the_transformer() -> None:
    model = nn.Transformer(DIM, HEADS, 1, 1, 12, batch_first=True)
    keys = vars(model).keys()
    report = tfm.accelerate(model)
    assert type(model) is tfm.nn.Transformer
    assert "1 x tfm.nn.Transformer: the model itself" in str(report)
    tfm.restore(model)
    assert type(model) is nn.Transformer
    assert vars(model).keys() == keys


def test_copies_can_be_restored_and_loaded() -> None:
    model = Translator()
    before = classes(model)
    tfm.accelerate(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(copied(SOURCE, TARGET), model(SOURCE, TARGET))
        tfm.restore(copied)
        assert classes(copied) == before
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    Translator().load_state_dict(torch.load(file, weights_only=True))


def test_modules_made_as_ours_are_not_restored() -> None:
    model = nn.Sequential(tfm.nn.LayerNorm(DIM), nn.LayerNorm(DIM))
    tfm.accelerate(model)
    report = tfm.restore(model)
    assert [type(module) for module in model] == [tfm.nn.LayerNorm, nn.LayerNorm]
    assert [(left.name, left.reason) for left in report.left] == [("0", "made as a tfm.nn module, not by accelerate()")]


def test_replaced_and_hooked_children_still_act() -> None:
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(DIM, HEADS, 12, 0.0, batch_first=True), 2, enable_nested_tensor=False
    )
    replaced = LowRank(DIM, 12)
    replaced.load_state_dict(model.layers[1].linear1.state_dict())
    model.layers[1].linear1 = replaced
    model.layers[0].norm1.register_forward_hook(lambda module, given, output: 3 * output)
    x = torch.randn(2, 5, DIM)
    expected = model(x)
    report = tfm.accelerate(model)
    torch.testing.assert_close(model(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), expected)
    notes = {module.name: module.note for module in report.swapped if module.note}
    assert notes == {
        "layers.0": "calls its children one by one, unfused: norm1 carries hooks",
        "layers.1": "calls its children one by one, unfused: linear1 is a LowRank",
    }


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_what_is_left_and_why() -> None:
    attention = nn.MultiheadAttention(DIM, HEADS)
    nn.utils.parametrize.register_parametrization(attention, "in_proj_weight", Doubled())
    patched = nn.LayerNorm(DIM)
    patched.forward = lambda x: x
    model = nn.ModuleDict({"attention": attention, "patched": patched, "linear": nn.Linear(2, 2)})
    report = tfm.accelerate(model)
    assert {left.name: left.reason for left in report.left} == {
        "attention": "a torch.nn.MultiheadAttention with parametrizations",
        "patched": "its forward was replaced on the object itself",
    }
    assert str(report).startswith("nothing replaced")
    assert type(patched) is nn.LayerNorm


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_left() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.LayerNorm(DIM)))
    report = tfm.accelerate(nn.Sequential(scripted, nn.LayerNorm(DIM)))
    assert [left.name for left in report.left] == ["0"]
    assert "TorchScript" in report.left[0].reason
    assert report.counts == {"tfm.nn.LayerNorm": 1}


def test_a_compiled_model_is_changed_inside() -> None:
    torch._dynamo.reset()
    model = nn.TransformerEncoderLayer(DIM, HEADS, 12, 0.0, batch_first=True)
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(2, 5, DIM)
    expected = compiled(x)
    report = tfm.accelerate(compiled)
    assert type(model) is tfm.nn.TransformerEncoderLayer
    assert report.swapped[0].name == "_orig_mod"
    torch.testing.assert_close(compiled(x), expected)
    # A mask under which only ours is finite shows that the compiled code is the new one.
    padding = torch.ones(2, 5, dtype=torch.bool)
    assert (compiled(x, src_key_padding_mask=padding) == 0).all()


def test_norms_inside_hugging_face_modules_are_torchs():
    bart = pytest.importorskip("transformers.models.bart.modeling_bart")
    model = nn.Module()
    model.embedding = bart.BartLearnedPositionalEmbedding(7, DIM)
    model.embedding.layer_norm = nn.LayerNorm(DIM)
    report = tfm.accelerate(model)
    assert type(model.embedding.layer_norm) is tfm.nn.LayerNorm
    assert type(model.embedding) is bart.BartLearnedPositionalEmbedding
    assert not report.left


@pytest.mark.parametrize("function", [tfm.accelerate, tfm.restore])
def test_takes_modules_only(function: object) -> None:
    with pytest.raises(TypeError, match=r"^\w+: expected a torch.nn.Module, got dict$"):
        function({"weight": torch.zeros(2)})
