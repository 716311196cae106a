"""The commands from end to end: what they print and write, how they stop, and that resuming is exact."""

from __future__ import annotations

import io
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, get_args

import pytest
import sacrebleu
import torch
from rich.console import Console
from small_run import FLAGS, STEPS, complaints, log_of, pairs, start_tfm, tfm, write_text

from tfm import native
from tfm.checkpoint import Run, load_model, load_tensors, save_tensors
from tfm.cli import translation
from tfm.cli.progress import TrainingProgress, clock
from tfm.cli.training import BleuTokenizer, Dtype, PresetName
from tfm.config import PRESETS
from tfm.evaluate import TOKENIZERS
from tfm.generate import Search, translate
from tfm.tokenizer import EOS
from tfm.train import Training

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An uninterrupted run, and what training it printed. `source.txt` and `target.txt` lie beside it."""
    folder = tmp_path_factory.mktemp("trained")
    result = tfm("train", *write_text(folder), *validation_flags(folder), *FLAGS, "--out", folder / "run")
    assert result.exit_code == 0, result.stderr
    return folder / "run", result.stdout


def validation_flags(folder: Path) -> list[str]:
    flags = []
    for name, lines in zip(("source", "target"), pairs(), strict=True):
        path = folder / f"valid-{name}.txt"
        path.write_text("".join(f"{line}\n" for line in lines[:4]), encoding="utf-8")
        flags += [f"--valid-{name}", str(path)]
    return flags


def raise_signal_at(monkeypatch: pytest.MonkeyPatch, step: int, number: int) -> None:
    update = Training._update

    def raising(self: Training, batch: Any) -> Any:
        result = update(self, batch)
        if self.step == step:
            signal.raise_signal(number)
        return result

    monkeypatch.setattr(Training, "_update", raising)


def losses(run: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in log_of(run) if record["event"] == "train"]


class Died(Exception):
    """Stands for the end of the process."""


# train


def test_train_tells_what_it_reads_and_learns(trained: tuple[Path, str]) -> None:
    run, printed = trained
    assert "read 200 pairs" in printed
    assert "read 4 pairs" in printed
    assert "vocabulary: 400 tokens\n" in printed
    assert f"step {STEPS}/{STEPS}  epoch 3  loss " in printed
    assert "tokens/s" in printed
    assert f"validation at step {STEPS}: loss " in printed
    assert printed.count(f"source       {pairs()[0][0]}\n") == STEPS // 10
    assert printed.count("    translation  ") == 3 * STEPS // 10
    assert f"tfm translate {run}" in printed
    assert losses(run)[-1][1] < 0.9 * losses(run)[0][1]


def test_a_run_holds_its_files_and_no_others(trained: tuple[Path, str]) -> None:
    run, _ = trained
    files = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    tensors = {"state.safetensors", "model.safetensors", f"checkpoints/step-{STEPS:08}.safetensors"}
    assert files == {"config.json", "tokenizer.json", "log.jsonl", "loss.png"} | tensors
    assert (run / "loss.png").read_bytes().startswith(PNG)


def test_train_counts_blank_and_long_pairs(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_text("le chien\n\n" + "chat " * 80 + "\nla rue\n", encoding="utf-8")
    target.write_text("the dog\nnothing\nmany cats\nthe street\n", encoding="utf-8")
    flags = ["--source", source, "--target", target, *FLAGS, "--max-steps", "1", "--out", tmp_path / "run"]
    result = tfm("train", *flags)
    assert result.exit_code == 0
    assert "read 3 pairs" in result.stdout
    assert "dropped 1 with a blank side" in result.stdout
    assert "skipped 1 pairs with a side of more than 64 tokens" in result.stdout
    assert "the text does not fill the 400 asked for" in result.stdout


def test_time_ends_training_with_a_checkpoint(tmp_path: Path) -> None:
    flags = [*write_text(tmp_path), *FLAGS, "--dtype", "bfloat16", "--norm-first"]
    result = tfm("train", *flags, "--minutes", "0", "--out", tmp_path / "run")
    assert result.exit_code == 0
    assert "time is up at step 1;" in result.stdout
    model, _ = load_model(tmp_path / "run")
    assert model.config.norm_first


def test_averaging_keeps_and_averages_the_last_checkpoints(tmp_path: Path) -> None:
    flags = ["--average", "2", "--every", "2", "--max-steps", "6"]
    assert tfm("train", *write_text(tmp_path), *FLAGS, *flags, "--out", tmp_path / "run").exit_code == 0
    run = Run(tmp_path / "run")
    assert [path.name for path in run.checkpoints()] == ["step-00000004.safetensors", "step-00000006.safetensors"]
    first, last = (load_tensors(path)[0] for path in run.checkpoints())
    for name, tensor in load_tensors(run.model)[0].items():
        assert torch.equal(tensor, ((first[name].double() + last[name].double()) / 2).float())
    assert not torch.equal(first["embedding"], last["embedding"])


# Stopping and resuming


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_resume_repeats_nothing(
    trained: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, status: int
) -> None:
    run = tmp_path / "run"
    handler = signal.getsignal(number)
    raise_signal_at(monkeypatch, 13, number)
    result = tfm("train", *write_text(tmp_path), *validation_flags(tmp_path), *FLAGS, "--out", run)
    assert result.exit_code == status
    assert result.stderr == (
        f"tfm: stopped by {signal.Signals(number).name} at step 13, saved; "
        f"continue with: tfm train --resume --out {run}\n"
    )
    assert signal.getsignal(number) is handler
    assert load_tensors(run / "state.safetensors")[1]["step"] == 13
    # The process was told to go: it does not stay to validate.
    assert [record["step"] for record in log_of(run) if record["event"] == "validation"] == [10]
    monkeypatch.undo()
    result = tfm("train", "--resume", "--out", run)
    assert result.exit_code == 0
    assert "resuming at step 13" in result.stdout
    assert losses(run) == losses(trained[0])
    assert weights_of(run) == weights_of(trained[0])


def test_a_killed_run_resumes_to_the_same_bits(trained: tuple[Path, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = [*write_text(tmp_path), *validation_flags(tmp_path), *FLAGS]
    process = start_tfm("train", *flags, "--out", run, stdout=subprocess.DEVNULL)
    log = run / "log.jsonl"
    deadline = time.monotonic() + 60
    while not (log.exists() and '"step": 12,' in log.read_text("utf-8")):
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.stderr.close()
    assert losses(run)[-1][0] < STEPS
    assert tfm("train", "--resume", "--out", run).exit_code == 0
    assert log_of(run) == log_of(trained[0])
    assert weights_of(run) == weights_of(trained[0])


def test_a_run_without_a_checkpoint_starts_again(
    trained: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"

    def die(self: Training) -> None:
        raise Died

    monkeypatch.setattr(Training, "save", die)
    with pytest.raises(Died):
        tfm("train", *write_text(tmp_path), *FLAGS, "--out", run)
    assert losses(run)[-1][0] == 10
    monkeypatch.undo()
    result = tfm("train", "--resume", "--out", run)
    assert result.exit_code == 0
    assert "no checkpoint was written yet: starting again from step 0 with the same seed, 1" in result.stdout
    assert losses(run) == losses(trained[0])


def test_resume_of_a_finished_run_goes_on_only_to_another_end(trained: tuple[Path, str], tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained[0], tmp_path / "run"))
    before = log_of(run)
    result = tfm("train", "--resume", "--out", run)
    assert result.exit_code == 0
    assert f"done already, at step {STEPS} of {STEPS}" in result.stdout
    assert log_of(run) == before
    assert tfm("train", "--resume", "--max-steps", STEPS + 2, "--out", run).exit_code == 0
    assert losses(run)[-1][0] == STEPS + 2
    assert Run(run).read_config()[1].max_steps == STEPS + 2


def test_resume_finds_the_same_text_elsewhere(trained: tuple[Path, str], tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained[0], tmp_path / "run"))
    flags = write_text(tmp_path)
    assert tfm("train", "--resume", *flags, "--max-steps", STEPS + 1, "--out", run).exit_code == 0
    assert Run(run).read_config()[2]["source"] == flags[1]


def weights_of(run: Path) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in load_tensors(run / "model.safetensors")[0].items()}


# translate and evaluate


@pytest.fixture(scope="module")
def talkative(trained: tuple[Path, str]) -> Path:
    """The run with a model that never ends a sentence early; a few updates teach most models to say nothing."""
    run = Run(Path(shutil.copytree(trained[0], trained[0].with_name("talkative"))))
    weights, metadata = load_tensors(run.model)
    weights["embedding"][EOS] = 0
    save_tensors(run.model, weights, metadata)
    return run.folder


def test_translate_gives_a_line_for_each_line(talkative: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = pairs()[0]
    stdin = f"{source[0]}\r\n\n \t\n{source[1]}\n{'chat ' * 70}\u2028x\n{source[2]}".encode()
    lines = [source[0], "", " \t", source[1], "chat " * 70 + "\u2028x", source[2]]
    model, tokenizer = load_model(talkative)
    expected = translate(model, tokenizer, lines, Search(beam=2))
    for window in (2, translation.WINDOW):
        monkeypatch.setattr(translation, "WINDOW", window)
        result = tfm("translate", talkative, "--beam", "2", "--threads", "1", stdin=stdin)
        assert result.exit_code == 0
        assert result.stdout_bytes.decode().split("\n") == [*expected, ""]
        assert result.stderr.startswith("tfm: warning: <stdin>:5: ")
        assert result.stderr.endswith(" tokens, only the first 63 are translated\n")
    assert expected[1] == expected[2] == ""
    assert all(expected[i] for i in (0, 3, 4, 5))


@pytest.mark.parametrize(("stdin", "lines"), [(b"", 0), (b"\n", 1), (b"\n\n", 2), (b"\xef\xbb\xbfoui", 1)])
def test_translate_of_little(trained: tuple[Path, str], stdin: bytes, lines: int) -> None:
    result = tfm("translate", trained[0], "--threads", "1", stdin=stdin)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.count("\n") == lines


def test_a_closed_pipe_ends_quietly(trained: tuple[Path, str], tmp_path: Path) -> None:
    source = tmp_path / "many"
    source.write_text("oui\n" * 3 * translation.WINDOW, encoding="utf-8")
    with source.open("rb") as stdin:
        process = start_tfm("translate", trained[0], "--threads", "1", stdin=stdin)
        assert process.stdout.readline().endswith(b"\n")
        process.stdout.close()
        assert complaints(process.stderr.read()) == []
        assert process.wait() == 1
        process.stderr.close()


def test_evaluate_is_what_sacrebleu_says(talkative: Path, tmp_path: Path) -> None:
    folder, written = talkative.parent, tmp_path / "out.txt"
    texts = ["--source", folder / "valid-source.txt", "--reference", folder / "valid-target.txt"]
    flags = ["--tokenize", "none", "--lowercase", "--translations", written, "--threads", "1"]
    result = tfm("evaluate", talkative, *texts, *flags)
    assert result.exit_code == 0
    found = written.read_text("utf-8").splitlines()
    references = [[line.upper() for line in pairs()[1][:4]]]
    bleu = sacrebleu.BLEU(tokenize="none", lowercase=True, force=True)
    chrf = sacrebleu.CHRF(lowercase=True)
    bleu_score, chrf_score = bleu.corpus_score(found, references).score, chrf.corpus_score(found, references).score
    assert result.stdout == (
        f"BLEU {bleu_score:.2f}  {bleu.get_signature()}\nchrF {chrf_score:.2f}  {chrf.get_signature()}\n"
    )
    assert chrf_score > 0


# Pictures, demo, doctor, and the command itself


def test_attend_draws_the_models_own_translation(trained: tuple[Path, str], tmp_path: Path) -> None:
    sentence, out = pairs()[0][0], tmp_path / "new" / "a.png"
    model, tokenizer = load_model(trained[0])
    result = tfm("attend", trained[0], sentence, "--out", out)
    assert result.stdout == f"{sentence} -> {translate(model, tokenizer, [sentence])[0]}\nwrote {out}\n"
    assert out.read_bytes().startswith(PNG)


def test_plot_positions(tmp_path: Path) -> None:
    out = tmp_path / "p.png"
    assert tfm("plot", "positions", "--dim", "7", "--length", "5", "--out", out).stdout == f"wrote {out}\n"
    assert out.read_bytes().startswith(PNG)


@pytest.fixture
def small_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """`tfm demo` on little text, for a few updates."""
    from dataclasses import replace

    from tfm import config, demo

    training, held_out = demo.corpus(size=200)
    preset = config.PRESETS["demo"]
    small = replace(preset, recipe=replace(preset.recipe, max_steps=4, vocab_size=400))
    monkeypatch.setattr(demo, "corpus", lambda: (training, held_out[:24]))
    monkeypatch.setitem(config.PRESETS, "demo", small)


def test_demo_ends_with_the_models_own_words(small_demo: None, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    for _ in range(2):
        result = tfm("demo", "--out", out, "--threads", "1")
        assert result.exit_code == 0
    model, tokenizer = load_model(out)
    said = translate(model, tokenizer, ["je suis étudiant"])[0]
    assert result.stdout.splitlines()[-1] == f"je suis étudiant -> {said}"
    for phenomenon in ("negation", "relative clauses", "all"):
        assert any(phenomenon in line for line in result.stdout.splitlines())
    assert "translated 24 held-out sentences" in result.stdout
    assert len((out / "held-out.fr").read_text("utf-8").splitlines()) == 24


def test_demo_leaves_other_folders_alone(small_demo: None, trained: tuple[Path, str], tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("years")
    for folder in (other, trained[0]):
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        result = tfm("demo", "--out", folder)
        assert result.exit_code == 2
        assert "not made by `tfm demo`" in result.stderr
        assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.triton
def test_doctor_tries_every_backend() -> None:
    result = tfm("doctor")
    assert result.exit_code == 0
    rows = dict(line.split(maxsplit=1) for line in result.stdout.splitlines() if " on " not in line[:19])
    assert rows["torch"].startswith(torch.__version__)
    assert "instructions" in rows["CPU"]
    tried = {line[:19].strip(): line[19:] for line in result.stdout.splitlines() if " on " in line[:19]}
    assert tried["reference on cpu"].startswith("works (greatest error ")
    if not torch.cuda.is_available():
        # The tests run Triton in its interpreter.
        assert tried["triton on cpu"].startswith("works (greatest error ")
    if native.load()[0] == "":
        assert tried["native on cpu"].startswith("works (greatest error ")
        assert rows["tfm_native"].startswith(f"{native.library()}, kernels for ")
    assert {"ninja", "nvcc"} <= rows.keys()


@pytest.mark.triton
def test_doctor_says_why_a_backend_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from tfm.cli.doctor import try_backend

    monkeypatch.setenv("TRITON_INTERPRET", "0")
    answer = try_backend("triton", torch.device("cpu"))
    assert answer.startswith("not here: CPU tensors need Triton's interpreter")


def test_version_and_help() -> None:
    from tfm import __version__

    assert tfm("--version").stdout == f"tfm {__version__}\n"
    for command in (
        [],
        ["train"],
        ["translate"],
        ["evaluate"],
        ["attend"],
        ["plot", "positions"],
        ["demo"],
        ["build"],
        ["doctor"],
    ):
        assert tfm(*command, "--help").exit_code == 0
    process = start_tfm("--version")
    assert process.communicate()[0].decode() == f"tfm {__version__}\n"


def test_the_commands_load_nothing_slow() -> None:
    slow = {"matplotlib", "sacrebleu", "tokenizers", "triton", "safetensors", "tfm.train", "tfm.config"}
    code = "import sys, tfm.cli; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=Path(__file__).parent.parent).split()
    assert "tfm.cli.training" in loaded
    assert not slow & set(loaded)


def test_flags_offer_what_the_library_takes() -> None:
    assert get_args(PresetName) == tuple(PRESETS)
    assert get_args(BleuTokenizer) == TOKENIZERS
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in get_args(Dtype))


# Progress


def test_a_terminal_shows_a_bar() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    record = {"event": "train", "step": 30, "epoch": 0, "loss": 2.5, "learning_rate": 1e-3, "tokens_per_second": 4321.0}
    with TrainingProgress(console, first_step=10, last_step=50, seconds=None) as progress:
        progress.report(record | {"seconds": 10.0})
        assert progress.bar is not None
        assert progress.bar.tasks[0].completed == pytest.approx(0.5)
        progress.bar.refresh()
    shown = console.file.getvalue()
    for part in ("step 30/50", "loss 2.500", "lr 1.00e-03", "4,321 tokens/s", "0:10 left"):
        assert part in shown


def test_time_left_is_what_ends_first(capsys: pytest.CaptureFixture[str]) -> None:
    record = {"event": "train", "step": 30, "epoch": 0, "loss": 2.5, "learning_rate": 1e-3, "tokens_per_second": 1.0}
    for seconds, left in ((None, "0:10"), (12.0, "0:02"), (100.0, "0:10")):
        progress = TrainingProgress(Console(width=120), first_step=10, last_step=50, seconds=seconds)
        progress.report(record | {"seconds": 10.0})
        assert capsys.readouterr().out.endswith(f"1 tokens/s  {left} left\n")


def test_samples_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    odd = "[bold]a[/bold] :smile: " + "long " * 40 + "end"
    sample = {"source": odd, "reference": odd, "translation": odd}
    record = {"event": "validation", "step": 3, "loss": 1.0, "perplexity": 2.7, "bleu": 9.0, "samples": [sample]}
    TrainingProgress(Console(width=80), 0, 10, None).report(record)
    assert capsys.readouterr().out.count(f"  {odd}\n") == 3


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.1, "1:00"), (61, "1:01"), (3723, "1:02:03")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text
