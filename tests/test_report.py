"""README says what the records say, and what it says of a record is marked when the sources have moved on."""

from __future__ import annotations

import json
import shutil

import pytest
from measured import entry, gpu_record

from benchmarks.report import tables
from benchmarks.report.__main__ import BEGIN, END, main
from benchmarks.report.records import ROOT, load, newest, sha256
from benchmarks.report.sources import sources_of


@pytest.fixture
def readme(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"before\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    return path


def test_readme_matches_the_records(capsys):
    assert main(["--check"]) == 0, capsys.readouterr().err


def test_every_picture_in_readme_is_there():
    for record in newest(load(ROOT / "benchmarks" / "results")):
        assert len(tables.charts_of(record)) == 2, record.path


def test_a_record_becomes_a_table(tmp_path):
    text = tables.device(gpu_record(tmp_path))
    assert "### NVIDIA H200" in text
    assert "copy 4,300 GB/s, bf16 matmul 780 TFLOP/s" in text
    assert "1,200 passed, 1 failed, 3 skipped" in text
    head, _, eager, graph = (line for line in text.splitlines() if line.startswith("|"))
    assert head == "| case | time | rate | of ceiling | eager / ours | compile / ours | liger / ours |"
    assert eager == "| 4096x512, forward | 20.0 µs | 800 GB/s | 50% | 2.50 | 1.25 | failed |"
    assert graph == "| 4096x512, forward, graph | 8.0 µs | 2,000 GB/s | 50% | 500.00 |  |  |"
    assert tables.STALE not in text


def test_changed_sources_make_rows_stale(tmp_path):
    sources = {source: sha256(ROOT / source) for source in sources_of("layer_norm")}
    record = gpu_record(tmp_path, sources=sources | {"kernels/norm.py": "0" * 64})
    assert record.changed_sources("layer_norm") == ["kernels/norm.py"]
    text = tables.device(record)
    assert "**layer_norm** (stale: kernels/norm.py changed since)" in text
    assert text.count("(stale) |") == 2


def test_ours_that_failed_says_why(tmp_path):
    text = tables.device(gpu_record(tmp_path, benchmarks=[entry("ours"), entry("eager", 5e-5)]))
    assert "| 4096x512, forward | failed: out of memory |  |  |  |" in text


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


def test_what_no_record_covers_is_printed(tmp_path, readme, capsys):
    arguments = ["--results", str(tmp_path), "--readme", str(readme)]
    assert main(arguments) == 0
    assert "No record of a GPU yet" in capsys.readouterr().out
    gpu_record(tmp_path, benchmarks=[entry("ours", 1e-3, suite="training")])
    assert main(arguments) == 0
    assert "`layer_norm`" in capsys.readouterr().out
    assert "No record of a GPU covers: " in readme.read_text()


def test_writes_readme_and_pictures_once(tmp_path, readme, capsys):
    gpu_record(tmp_path)
    arguments = ["--results", str(tmp_path), "--readme", str(readme)]
    assert main([*arguments, "--check"]) == 1
    assert "old" in readme.read_text()
    assert main(arguments) == 0
    written = readme.read_text()
    assert written.startswith("before\n")
    assert written.endswith("\nafter\n")
    assert "![h200 roofline](h200_roofline.png)" in written
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
def test_damaged_records_are_one_line(damage, tmp_path, readme, capsys):
    (tmp_path / "broken.json").write_text(damage)
    assert main(["--results", str(tmp_path), "--readme", str(readme)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("report: ")
    assert "broken.json: expected a record" in error
    assert error.count("\n") == 1


def test_readme_without_markers_is_one_line(tmp_path, readme, capsys):
    readme.write_text("nothing\n")
    assert main(["--results", str(tmp_path), "--readme", str(readme)]) == 2
    assert "expected the lines" in capsys.readouterr().err


def test_sources_follow_imports_and_names(tmp_path):
    """An operation rests upon the files it reaches, and of a package upon those whose names are used."""
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels")
    (tmp_path / "tfm" / "ops").mkdir(parents=True)
    operation = tmp_path / "tfm" / "ops" / "scaled.py"
    operation.write_text(
        "def scaled(x):\n    from tfm.kernels import scaled as kernels\n    return kernels.scaled(x)\n"
    )
    (tmp_path / "kernels" / "scaled.py").write_text(
        "from tfm.kernels import launch\n\nTILES = launch.scaled_tiles(8)\n"
    )
    settings = tmp_path / "kernels" / "launch"
    (settings / "scaled.py").write_text("from tfm.kernels.philox import philox\n")
    package = settings / "__init__.py"
    package.write_text(f"from tfm.kernels.launch.scaled import scaled_tiles\n{package.read_text()}")
    expected = ["kernels/launch/scaled.py", "kernels/philox.py", "kernels/scaled.py"]
    assert sources_of("scaled", tmp_path) == expected


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
