"""Pages say what the records say, and what they say of a record is marked when the sources have moved on."""

from __future__ import annotations

import json

import pytest
from matplotlib.figure import Figure
from measured import entry, gpu_record

from tfm.config import PRESETS
from tools.report import charts, front, presets, tables
from tools.report.__main__ import main
from tools.report.pages import PAGES, PARTS
from tools.report.records import ROOT, load, newest, sha256
from tools.report.sources import sources_of, subject_of, subjects


@pytest.fixture
def site(tmp_path):
    """A folder with every page that is written, its parts old."""
    folder = tmp_path / "pages"
    for page in PAGES:
        parts = [f"{part.begin}\nOLD\n{part.end}\n" for part in PARTS if part.page == page]
        (folder / page).parent.mkdir(parents=True, exist_ok=True)
        (folder / page).write_text("\n".join(["before", *parts, "after\n"]))
    return folder


def test_pages_match_the_records(capsys):
    assert main(["--check"]) == 0, capsys.readouterr().err


def test_readme_says_first_whether_anything_has_run_on_a_gpu():
    head, _, _ = (ROOT / "README.md").read_text(encoding="utf-8").partition("## ")
    has_run = any(record.environment.get("gpu") for record in load(ROOT / "benchmarks" / "results"))
    assert ("**None of it has run on a GPU yet.**" in head) != has_run


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 200


def test_every_picture_of_a_record_is_there():
    for record in newest(load(ROOT / "benchmarks" / "results")):
        assert len(tables.charts_of(record)) == 2, record.path


def test_a_record_becomes_a_table(tmp_path):
    text = tables.device(gpu_record(tmp_path))
    assert "### NVIDIA H200" in text
    assert "memory 4,300 GB/s (a copy that no cache holds), bf16 matmul 780 TFLOP/s" in text
    assert "1,200 passed, 1 failed, 3 skipped" in text
    head, _, eager, graph = (line for line in text.splitlines() if line.startswith("|"))
    assert head == "| case | time | rate | of what bounds it | eager / ours | compile / ours | liger / ours |"
    assert eager == ("| 4,096 tokens of 512, forward | 20.0 µs | 800 GB/s | 50% of memory | 2.50 | 1.25 | failed |")
    assert graph == ("| 4,096 tokens of 512, forward, one graph | 8.0 µs | 2,000 GB/s | 50% of memory | 500.00 |  |  |")
    assert tables.STALE not in text


def test_presets_are_counted():
    """Of tiny by hand: a layer's four projections, two matmuls and norms; a decoder's layer attends twice."""
    width, inner, vocabulary, layers = 128, 256, 9712, 4
    attention, norm = 4 * (width * width + width), 2 * width
    feed_forward = 2 * width * inner + inner + width
    encoder, decoder = attention + feed_forward + 2 * norm, 2 * attention + feed_forward + 3 * norm
    assert presets.parameters("tiny") == vocabulary * width + layers * (encoder + decoder)
    rows = presets.table().splitlines()
    assert rows[3].startswith("| `tiny` | 4 + 4, 128, 4 | 9,712 | 2.6 M | 41 MB | 8,192 tokens | 8,000, 2,000 of them")
    assert set(presets.SUITS) == set(PRESETS)
    assert len(rows) == 2 + len(PRESETS)


def test_faster_than_memory_is_from_caches(tmp_path):
    rows = [entry("ours", 1e-6, share=1.414), entry("ours", 1e-6, share=0.8, ceiling="cache", suite="rms_norm")]
    text = tables.device(gpu_record(tmp_path, benchmarks=rows))
    assert "| in cache, 1.41 × memory |" in text
    assert "| 80% of cache |" in text
    assert "memory is no bound of it" in text
    assert "memory is no bound of it" not in tables.device(gpu_record(tmp_path))


def drawn(monkeypatch, chart, record):
    """The axes of the one figure that `chart` saves, with their labels in order from the top."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    chart(record)
    (figure,) = figures
    (axes,) = figure.axes
    lowest, highest = axes.get_ylim()
    assert lowest > highest
    return axes, [label.get_text() for label in axes.get_yticklabels()]


MIXED = [
    entry("ours", 1e-6, share=1.6),
    entry("ours", 1e-6, suite="rotary", size="8x64 heads 8x64", share=0.3, ceiling="matmul"),
    entry("eager", 2e-6),
    entry("eager", 0.5e-6, suite="rotary", size="8x64 heads 8x64"),
    entry("ours", 1e-6, size="512x512", share=0.5),
    entry("eager", 32e-6, size="512x512"),
]
PLACES = [
    "layer_norm",
    "4,096 tokens of 512, forward",
    "512 tokens of 512, forward",
    "rotary",
    "8 sentences of 64 tokens, 8 heads of 64, forward",
]


def test_the_roofline_has_one_place_a_subject_and_clips_nothing(tmp_path, monkeypatch):
    axes, places = drawn(monkeypatch, charts.roofline, gpu_record(tmp_path, benchmarks=MIXED))
    assert places == PLACES
    bars = {round(bar.get_y() + bar.get_height() / 2): bar.get_width() for bar in axes.patches}
    assert bars == {1: 1.6, 2: 0.5, 4: 0.3}
    assert axes.get_xlim()[1] > 1.6
    assert axes.get_legend_handles_labels()[1] == [
        "faster than memory: its data lies in caches",
        "of memory's rate",
        "of the rate of matmuls",
    ]


def test_speed_ups_stand_beside_their_cases_on_plain_ticks(tmp_path, monkeypatch):
    axes, places = drawn(monkeypatch, charts.speed_up, gpu_record(tmp_path, benchmarks=MIXED))
    assert places == PLACES
    (points,) = axes.collections
    assert sorted((round(x, 6), y) for x, y in points.get_offsets().tolist()) == [(0.5, 4), (2, 1), (32, 2)]
    left, right = axes.get_xlim()
    assert left < 0.5 < 32 < right
    ticks = [tick for tick in axes.get_xticks() if left <= tick <= right]
    assert [axes.xaxis.get_major_formatter()(tick) for tick in ticks] == ["0.5", "1", "2", "5", "10", "20"]


def test_changed_sources_make_rows_stale(tmp_path):
    sources = {source: sha256(ROOT / source) for source in sources_of("layer_norm")}
    record = gpu_record(tmp_path, sources=sources | {"kernels/norm.py": "0" * 64})
    assert record.changed_sources("layer_norm") == ["kernels/norm.py"]
    text = tables.device(record)
    assert "**layer_norm** (stale: kernels/norm.py changed since)" in text
    assert text.count("(stale) |") == 2


def test_ours_that_failed_says_why(tmp_path):
    text = tables.device(gpu_record(tmp_path, benchmarks=[entry("ours"), entry("eager", 5e-5)]))
    assert "| 4,096 tokens of 512, forward | failed: out of memory |  |  |  |" in text


def test_training_steps_of_a_gpu_are_told(tmp_path):
    repeats = [{"tokens_per_second": speed} for speed in (100e3, 110e3, 105e3)]
    slower = [{"tokens_per_second": speed} for speed in (50e3, 44e3, 42e3)]
    results = {"tfm-bf16": {"repeats": repeats}, "eager-bf16": {"repeats": slower}, "compile-bf16": {"failed": "why"}}
    text = tables.device(gpu_record(tmp_path, training={"base": {"throughput": results}}))
    assert "**Training step, preset base**" in text
    assert "| tfm, autocast bf16 | 105,000 | 100,000-110,000 | 2.50 (2.00-2.50) |" in text
    assert "| torch.compile, autocast bf16 | failed: why |" in text


def test_what_bounds_the_slowest_kernels_is_told(tmp_path):
    case = {"suite": "rotary", "size": "8x64", "direction": "forward", "peer": "ours", "share": 0.29}
    profiled = [
        case | {"state": "done", "reason": "", "kernel": "rotary_kernel", "bound": "memory (DRAM 81% of peak)"},
        case | {"state": "failed", "reason": "ERR_NVGPUCTRPERM", "suite": "layer_norm"},
    ]
    text = tables.device(gpu_record(tmp_path, profile=profiled))
    assert "| rotary 8x64, forward, ours | 29% | `rotary_kernel` | memory (DRAM 81% of peak) |" in text
    assert "| layer_norm 8x64, forward, ours | 29% |  | failed: ERR_NVGPUCTRPERM |" in text
    assert "What bounds" not in tables.device(gpu_record(tmp_path))


@pytest.mark.parametrize(("updates", "shown"), [(8000, "8,000"), (5120, "5,120 of 8,000")])
def test_what_a_gpu_taught_is_told(updates, shown, tmp_path):
    learnt = {"contender": "tfm-bf16", "seed": 1, "tokens_per_second": 3e6, "updates": updates, "epochs": 117.6}
    learnt |= {"validation": {"loss": 1.71, "bleu": 34.56}, "test": {"bleu": 33.21}}
    arguments = {"preset": "tiny", "minutes": 1.5, "updates": 8000, "test_set": "test_2016_flickr"}
    quality = {"corpus": "multi30k", "arguments": arguments, "quality": [learnt]}
    text = tables.device(gpu_record(tmp_path, quality=quality))
    assert "**Translation, preset tiny trained on Multi30k**" in text
    assert "Within 8,000 updates each, greedy BLEU" in text
    assert f"| tfm, autocast bf16, seed 1 | 3,000,000 | {shown} | 117.6 | 1.710 | 34.6 | 33.2 |" in text


def test_newest_record_of_each_device_counts(tmp_path):
    gpu_record(tmp_path, "a", "2026-03-01T00:00:00+00:00")
    gpu_record(tmp_path, "b", "2026-02-01T00:00:00+00:00")
    gpu_record(tmp_path, "c", "2026-01-01T00:00:00+00:00", gpu="NVIDIA A100")
    assert [record.path.stem for record in newest(load(tmp_path))] == ["c", "a"]


def test_what_no_record_covers_is_printed(tmp_path, site, capsys):
    arguments = ["--results", str(tmp_path), "--pages", str(site)]
    assert main(arguments) == 0
    assert "No record of a GPU yet" in capsys.readouterr().out
    gpu_record(tmp_path, benchmarks=[entry("ours", 1e-3, suite="training")])
    assert main(arguments) == 0
    assert "`norm`" in capsys.readouterr().out
    assert "No record of a GPU covers: " in (site / "README.md").read_text()
    assert "No record of a GPU covers: " in (site / "benchmarks" / "README.md").read_text()


def test_writes_pages_and_pictures_once(tmp_path, site, capsys):
    gpu_record(tmp_path)
    arguments = ["--results", str(tmp_path), "--pages", str(site)]
    assert main([*arguments, "--check"]) == 1
    said = capsys.readouterr().err
    for page in PAGES:
        assert page in said
        assert "OLD" in (site / page).read_text()
    assert main(arguments) == 0
    for page in PAGES:
        written = (site / page).read_text()
        assert written.startswith("before\n")
        assert written.endswith("\nafter\n")
        assert "OLD" not in written
    assert "![h200 roofline](h200_roofline.png)" in (site / "benchmarks" / "README.md").read_text()
    assert (tmp_path / "h200_roofline.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "h200_speed_up.png").read_bytes().startswith(b"\x89PNG")
    assert main([*arguments, "--check"]) == 0


def test_of_two_trainings_the_newer_speaks_of_speed(tmp_path):
    old = json.loads((ROOT / "benchmarks" / "results" / "multi30k_cpu.json").read_text())
    new = {name: value for name, value in old.items() if name != "quality"}
    new["environment"] = old["environment"] | {"date": "2099-01-01T00:00:00+00:00"}
    for name, data in (("old", old), ("new", new)):
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    text = tables.markdown(load(tmp_path), tmp_path)
    first, second = text.index("`new.json`"), text.index("`old.json`")
    assert first < text.index("Real tokens a second") < second < text.index("greedy BLEU")
    assert text.count("Real tokens a second") == text.count("greedy BLEU") == 1


@pytest.mark.parametrize("damage", ["{", "[]", '{"format": 99}', '{"format": 1}'])
def test_damaged_records_are_one_line(damage, tmp_path, site, capsys):
    (tmp_path / "broken.json").write_text(damage)
    assert main(["--results", str(tmp_path), "--pages", str(site)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("report: ")
    assert "broken.json: expected a record" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("page", PAGES)
def test_a_page_without_markers_is_one_line(page, tmp_path, site, capsys):
    (site / page).write_text("nothing\n")
    assert main(["--results", str(tmp_path), "--pages", str(site)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"report: {page}: expected the lines ")
    assert error.count("\n") == 1


def test_an_operation_is_a_row_of_the_front_page(tmp_path):
    """The median of its cases, and their range; other ways of ours are no cases of their own."""
    times = {"64x64": (1e-6, 2e-6), "64x128": (1e-6, 4e-6), "64x256": (2e-6, 2e-6)}
    rows = [
        entry(peer, time, size=size)
        for size, pair in times.items()
        for peer, time in zip(("ours", "eager"), pair, strict=True)
    ]
    rows += [entry("ours, padded", 1e-9, size="64x64"), entry("liger", size="64x64")]
    text = front.operations([gpu_record(tmp_path, benchmarks=rows)], ROOT)
    assert "| operation | cases | eager / ours | liger / ours |" in text
    assert "| `layer_norm` | 3 | 2.00 (1.00-4.00) |  |" in text
    assert "NVIDIA H200, torch " in text
    moved_on = gpu_record(tmp_path, benchmarks=rows, sources={})
    assert "| `layer_norm` (stale) |" in front.operations([moved_on], ROOT)


def test_the_front_page_shows_the_newest_training(tmp_path):
    assert front.training_speed([], tmp_path) == "No training has a record yet."
    record = json.loads((ROOT / "benchmarks" / "results" / "multi30k_cpu.json").read_text())
    for name, date in (("new", "2099-01-01"), ("old", "2098-01-01")):
        record["environment"] |= {"date": f"{date}T00:00:00+00:00"}
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    text = front.training_speed(load(tmp_path), tmp_path)
    assert "`new.json`, 2099-01-01" in text
    assert "| tfm, fp32 |" in text
    assert "old.json" not in text
    assert "greedy BLEU" not in text


def test_sources_are_a_subjects_files_and_what_they_import_or_include(tmp_path):
    files = {
        "tfm/ops/scaled.py": "def scaled(x):\n    return x\n\n\ndef half_scaled(x):\n    return x\n",
        "tfm/ops/rescaled.py": "",
        "tfm/ops/long_scaled.py": "",
        "tfm/ops/checks.py": "",
        "kernels/scaled.py": "from tfm.kernels.launch import scaled as settings\nfrom tfm.kernels.near import x\n",
        "kernels/launch/__init__.py": "from tfm.kernels import unrelated\n",
        "kernels/launch/scaled.py": "",
        "kernels/launch/long_scaled.py": "",
        "kernels/long_scaled/__init__.py": "from tfm.kernels.scaled import TILES\n",
        "kernels/rescaled.py": "",
        "kernels/near.py": "from tfm.kernels.philox import philox\n",
        "kernels/philox.py": "",
        "kernels/unrelated.py": "",
        "csrc/cpu/scaled/forward.cpp": '#include "common/tensor.h"\n#include "operators/scaled.h"\n',
        "csrc/cpu/checks.h": "",
        "csrc/cuda/scaled_forward.cuh": "",
        "csrc/cuda/rescaled.cu": "",
        "csrc/common/tensor.h": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert subjects(tmp_path) == ["long_scaled", "rescaled", "scaled"]
    assert [subject_of(name, tmp_path) for name in ("scaled", "half_scaled", "training")] == ["scaled", "scaled", ""]
    reached = ["kernels/launch/scaled.py", "kernels/near.py", "kernels/philox.py", "kernels/scaled.py"]
    assert sources_of("half_scaled", tmp_path) == reached
    longer = ["kernels/launch/long_scaled.py", "kernels/long_scaled/__init__.py"]
    assert sources_of("long_scaled", tmp_path) == sorted(reached + longer)
    assert sources_of("scaled", tmp_path, "csrc/cpu") == ["csrc/common/tensor.h", "csrc/cpu/scaled/forward.cpp"]
    assert sources_of("scaled", tmp_path, "csrc/cuda") == ["csrc/cuda/scaled_forward.cuh"]
    assert sources_of("training", tmp_path, "csrc/cuda") == ["csrc/cuda/rescaled.cu", "csrc/cuda/scaled_forward.cuh"]


def test_losses_at_equal_updates_are_told(tmp_path):
    side = [{"mean": 6.0, "deviation": 0.5}, {"mean": 5.25, "deviation": 0.125}]
    apart = [{"mean": 0.0, "standard_error": 1.0, "p": 1.0}, {"mean": -0.25, "standard_error": 0.5, "p": 0.625}]
    losses = {"tfm": side, "eager": side, "difference": apart}
    data = {
        "benchmark": "learning",
        "environment": {"date": "2026-01-02T00:00:00+00:00", "gpu": None, "cpu": "a CPU"},
        "corpus": "bundled",
        "arguments": {"preset": "demo", "dropout": 0.3, "batch_tokens": 1024},
        "points": [50, 100],
        "summary": {"seeds": [1, 2], "train_loss": losses, "validation_loss": losses},
    }
    (tmp_path / "learning.json").write_text(json.dumps(data))
    text = tables.markdown(load(tmp_path), tmp_path)
    assert "2 seeds of each from the same weights on the same batches (`learning.json`, 2026-01-02)" in text
    assert "| 100 | 5.250 ± 0.125 | 5.250 ± 0.125 | -0.250 ± 0.500 | 62% |" in text
