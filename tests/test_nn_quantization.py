"""torch.ao's eager quantization of models made of these layers: what torch's own give."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.ao import quantization

import tfm.nn

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own: torch.ao.quantization moves to another package.

DIM, HEADS = 8, 2


class Quantized(torch.nn.Module):
    """One layer between the stubs."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.enter, self.layer, self.leave = quantization.QuantStub(), layer, quantization.DeQuantStub()

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return self.leave(self.layer(x, x, x)[0] if hasattr(self.layer, "out_proj") else self.layer(x))


@pytest.fixture
def engine() -> None:
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("torch has no fbgemm here")
    before, torch.backends.quantized.engine = torch.backends.quantized.engine, "fbgemm"
    yield
    torch.backends.quantized.engine = before


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("accelerated", [False, True], ids=["made", "accelerated"])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [("MultiheadAttention", (DIM, HEADS)), ("MultiheadAttention", (DIM, HEADS, 0.1, False)), ("LayerNorm", (DIM,))],
)
def test_static(name: str, arguments: tuple[object, ...], accelerated: bool) -> None:
    theirs = getattr(torch.nn, name)(*arguments)
    ours = copy.deepcopy(theirs)
    if accelerated:
        tfm.accelerate(ours)
    else:
        ours = getattr(tfm.nn, name)(*arguments)
        ours.load_state_dict(theirs.state_dict())
    x = torch.randn(5, 3, DIM)
    results = []
    for layer in (theirs, ours):
        model = Quantized(layer).eval()
        model.qconfig = quantization.get_default_qconfig("fbgemm")
        prepared = quantization.prepare(model)
        prepared(x)
        converted = quantization.convert(prepared)
        results.append((converted.layer, converted(x)))
    (their_layer, expected), (our_layer, found) = results
    assert type(our_layer) is type(their_layer)
    # What calibrated a norm is rounded in another order, so that a number may fall on the other side of a step.
    step = 1.001 * their_layer.scale if name == "LayerNorm" else 0.0
    assert (found - expected).abs().max() <= step


@pytest.mark.usefixtures("engine")
def test_prepares_where_torchs_name_means_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn, "MultiheadAttention", tfm.nn.MultiheadAttention)
    model = Quantized(torch.nn.MultiheadAttention(DIM, HEADS)).eval()
    model.qconfig = quantization.get_default_qconfig("fbgemm")
    assert isinstance(quantization.prepare(model).layer, torch.ao.nn.quantizable.MultiheadAttention)


@pytest.mark.usefixtures("engine")
def test_dynamic() -> None:
    theirs = torch.nn.TransformerEncoderLayer(DIM, HEADS, 12, 0.0).eval()
    ours = copy.deepcopy(theirs)
    tfm.accelerate(ours)
    x = torch.randn(3, 5, DIM)
    expected, found = (quantization.quantize_dynamic(layer)(x) for layer in (theirs, ours))
    torch.testing.assert_close(found, expected)
