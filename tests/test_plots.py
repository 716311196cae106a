"""Attention weights are the model's own; pictures show what they are given."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import matplotlib.image
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.ttLib.tables._g_l_y_f import Glyph
from matplotlib import font_manager
from matplotlib.figure import Figure
from torch.testing import assert_close

from tfm import ops, plots
from tfm.attend import AttentionMaps, attend, attention_weights
from tfm.config import TransformerConfig
from tfm.errors import UserError
from tfm.fonts import fonts_for
from tfm.model import CrossAttention, SelfAttention, Transformer
from tfm.tokenizer import BOS, EOS, Tokenizer

SOURCE, TARGET = [7, 5, 9, 11, 6, EOS], [BOS, 8, 3, 12]


def small_model(norm_first: bool = False) -> Transformer:
    shape = {"dim": 12, "heads": 3, "ffn_dim": 16, "encoder_layers": 2, "decoder_layers": 3}
    config = TransformerConfig(vocab_size=20, norm_first=norm_first, dropout=0.3, max_length=32, **shape)
    return Transformer(config).eval()


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved."""
    saved: list[Figure] = []
    savefig = Figure.savefig

    def keep(self: Figure, *args: object, **kwargs: object) -> None:
        saved.append(self)
        savefig(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


def pixels(png: bytes) -> tuple[int, ...]:
    return matplotlib.image.imread(io.BytesIO(png), format="png").shape


# Attention weights


def test_weights_are_distributions_and_causal_where_due() -> None:
    encoder, decoder, cross = attention_weights(small_model(), SOURCE, TARGET)
    assert (encoder.shape, decoder.shape, cross.shape) == ((2, 3, 6, 6), (3, 3, 4, 4), (3, 3, 4, 6))
    for weights in (encoder, decoder, cross):
        assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        assert (weights >= 0).all()
    assert torch.equal(decoder, decoder.tril())
    assert (decoder.diagonal(dim1=-2, dim2=-1) > 0).all()
    assert not torch.equal(encoder, encoder.tril())


@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
def test_weights_give_what_the_model_attends_to(norm_first: bool) -> None:
    model = small_model(norm_first)
    values: dict[str, list[torch.Tensor]] = {"encoder": [], "decoder": [], "cross": []}
    outputs: dict[str, list[torch.Tensor]] = {"encoder": [], "decoder": [], "cross": []}

    def watch(kind: str, module: SelfAttention | CrossAttention) -> None:
        def value_of(_: torch.nn.Module, inputs: tuple) -> None:
            is_self = isinstance(module, SelfAttention)
            values[kind].append(module.project(inputs[0])[2] if is_self else inputs[2][:, 1])

        module.register_forward_pre_hook(value_of)
        # What enters the output projection is what ops.varlen_attention gave.
        module.output.register_forward_pre_hook(lambda _, inputs: outputs[kind].append(inputs[0]))

    for layer in model.encoder.layers:
        watch("encoder", layer.self_attention)
    for layer in model.decoder.layers:
        watch("decoder", layer.self_attention)
        watch("cross", layer.cross_attention)
    found = dict(zip(("encoder", "decoder", "cross"), attention_weights(model, SOURCE, TARGET), strict=True))
    for kind, weights in found.items():
        assert len(weights) == len(values[kind]) == len(outputs[kind])
        for layer_weights, value, output in zip(weights, values[kind], outputs[kind], strict=True):
            assert_close(torch.einsum("hnm,mhd->nhd", layer_weights, value).flatten(1), output)


def test_weights_leave_no_hooks() -> None:
    model = small_model()
    attention_weights(model, SOURCE, TARGET)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_attend_labels_tokens() -> None:
    tokenizer = Tokenizer.train(["oui oui oui", "yes yes"] * 3, 270)
    config = TransformerConfig(tokenizer.vocab_size, dim=8, heads=2, ffn_dim=8, max_length=8)
    model = Transformer(config).eval()
    maps = attend(model, tokenizer, "oui", "yes")
    assert maps.source[-1] == "⟨eos⟩"
    assert "".join(maps.source[:-1]) == "oui"
    assert maps.target[0] == "⟨bos⟩"
    assert "".join(maps.target[1:]) == "yes"
    assert maps.cross.shape == (6, 2, len(maps.target), len(maps.source))
    with pytest.raises(UserError, match="the sentence is blank"):
        attend(model, tokenizer, "  ", "yes")
    with pytest.raises(UserError, match=r"the translation has .* tokens, the model takes at most 7"):
        attend(model, tokenizer, "oui", "123456789")


# Pictures


def test_attention_maps_show_every_head(figures: list[Figure]) -> None:
    odd = ["$x^", "日", "_{", "\\frac", "⟨eos⟩"]
    encoder = torch.rand(2, 3, 5, 5)
    decoder = torch.rand(1, 3, 2, 2)
    cross = torch.rand(1, 3, 2, 5)
    png = plots.attention_maps(AttentionMaps("$x^ 日", "a$", odd, ["⟨bos⟩", "a$"], encoder, decoder, cross))
    assert pixels(png)[2] == 4
    (figure,) = figures
    *heat_maps, bar = figure.axes
    drawn = [axes.images[0].get_array() for axes in heat_maps]
    expected = [*encoder.flatten(0, 1), *decoder.flatten(0, 1), *cross.flatten(0, 1)]
    assert all((array == weights.numpy()).all() for array, weights in zip(drawn, expected, strict=True))
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == odd
    assert [label.get_text() for label in figure.axes[3].get_xticklabels()] == odd
    assert figure.axes[9].get_title() == "cross, layer 1, head 1"
    assert figure.get_suptitle() == "$x^ 日\n→ a$"
    assert bar.get_ylabel() == "attention weight; each row of a map sums to 1"
    assert bar.get_ylim() == (0, 1)
    assert (figure.get_supylabel(), figure.get_supxlabel()) == (
        "token that looks (query)",
        "token that is looked at (key)",
    )


def test_attention_maps_of_a_long_sentence_stay_a_picture(figures: list[Figure]) -> None:
    tokens = [f"wort{place}" for place in range(300)]
    square, text = torch.rand(1, 2, 300, 300), " ".join(tokens)
    height, width, _ = pixels(plots.attention_maps(AttentionMaps(text, text, tokens, tokens, square, square, square)))
    assert max(height, width) < 2000
    assert figures[0].get_suptitle().replace("\n", " ").endswith(f"→ {text[:198]} …")
    axes = figures[0].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == tokens[::8]
    assert axes.get_yticks().tolist() == list(range(0, 300, 8))
    assert [label.get_text() for label in axes.get_xticklabels()] == tokens[::8]


@pytest.mark.parametrize(
    ("name", "start"), [("a.png", b"\x89PNG"), ("a.PDF", b"%PDF"), ("a.b.svg", b"<?xml"), ("picture", b"\x89PNG")]
)
def test_the_ending_is_the_format(name: str, start: bytes) -> None:
    assert plots.positional_encoding(3, 4, plots.format_of(Path(name))).startswith(start)


def test_another_ending_is_refused() -> None:
    with pytest.raises(UserError, match=r"^x/a\.jpg: expected a name that ends in \.png, \.pdf, \.svg$"):
        plots.format_of(Path("x/a.jpg"))


# Fonts


def font_of(characters: str, family: str, path: Path) -> str:
    """A font of empty glyphs."""
    builder = FontBuilder(1000)
    names = [".notdef", *(f"u{ord(character):x}" for character in characters)]
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(character): f"u{ord(character):x}" for character in characters})
    builder.setupGlyf({name: Glyph() for name in names})
    builder.setupHorizontalMetrics(dict.fromkeys(names, (600, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": family, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    return str(path)


@pytest.fixture
def installed_fonts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """matplotlib's own and those that a test adds."""
    found: list[str] = []
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: found)
    bundled = [entry for entry in font_manager.fontManager.ttflist if "mpl-data" in entry.fname]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", bundled)
    fonts_for.cache_clear()
    yield found
    fonts_for.cache_clear()


def test_a_font_that_is_missing_is_named(installed_fonts: list[str]) -> None:
    assert fonts_for("étudiant ⟨eos⟩ да").advice == ""
    fonts = fonts_for("日 é 가 ไ\n日")
    assert fonts.missing == "ไ日가"
    assert fonts.advice == (
        "no installed font has every character, boxes stand for the others: install Noto Sans Thai for ไ (on Debian: "
        "fonts-noto-core), Noto Sans CJK for 日가 (on Debian: fonts-noto-cjk)"
    )


def test_of_many_missing_characters_a_few_are_named(installed_fonts: list[str]) -> None:
    many = "".join(map(chr, range(0x4E00, 0x4E20)))
    assert fonts_for(many).advice.endswith(f"Noto Sans CJK for {many[:8]} … (on Debian: fonts-noto-cjk)")


def test_installed_fonts_serve_what_matplotlibs_lacks(
    installed_fonts: list[str], tmp_path: Path, figures: list[Figure]
) -> None:
    installed_fonts += [font_of("日", "One Character", tmp_path / "a.ttf"), str(tmp_path / "no font.ttf")]
    installed_fonts += [font_of("日本", "Two Characters", tmp_path / "b.ttf")]
    fonts = fonts_for("a日本")
    assert (fonts.families[-1], fonts.missing, fonts.advice) == ("Two Characters", "", "")
    square = torch.ones(1, 1, 1, 1)
    plots.attention_maps(AttentionMaps("日本", "a", ["日本"], ["a"], square, square, square))
    texts = [figures[0].axes[0].get_yticklabels()[0], figures[0].axes[2].get_xticklabels()[0]]
    assert all(text.get_fontfamily()[-1] == "Two Characters" for text in texts)


def test_positions_are_the_papers(figures: list[Figure]) -> None:
    plots.positional_encoding(length=9, dim=6)
    assert (figures[0].axes[0].images[0].get_array() == ops.sinusoid(torch.arange(9), 6).numpy()).all()


def record(event: str, step: int, **values: float) -> dict[str, object]:
    return {"event": event, "step": step, **values}


def test_loss_curve_shows_the_log(figures: list[Figure]) -> None:
    records = [record("train", 1, loss=5.0), record("train", 2, loss=4.0), record("checkpoint", 2)]
    plots.loss_curve(records)
    plots.loss_curve([*records, record("validation", 2, loss=4.5, bleu=12.0)])
    plots.loss_curve([])
    alone, both, empty = figures
    assert alone.axes[0].lines[0].get_xydata().tolist() == [[1, 5], [2, 4]]
    assert len(alone.axes) == 1
    assert both.axes[0].lines[1].get_xydata().tolist() == [[2, 4.5]]
    assert both.axes[1].lines[0].get_xydata().tolist() == [[2, 12]]
    assert empty.axes[0].lines[0].get_xydata().tolist() == []
