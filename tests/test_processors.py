"""The matrix of processors: which tests run in it, what is skipped and why, and that a failure is one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import processors
from tools.processors import SETTINGS, Setting, computing, has

PLAIN = {"torch": "AVX512", "oneDNN": "Intel AVX-512 with Intel DL Boost", "tfm": "avx512"}
DEFAULT, *_, OURS = SETTINGS


@pytest.fixture
def on_this(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, str]]:
    """What is in use under a setting, by its name; nothing changes under those that are not named."""
    found: dict[str, dict[str, str]] = {}
    # The tests within these tests want no plugins, which take seconds.
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setattr(processors, "instructions", lambda setting: PLAIN | found.get(str(setting), {}))
    return found


def test_what_compares_tensors_runs_and_what_starts_processes_does_not() -> None:
    names = {path.name for path in computing()}
    kernels = {path.name for path in processors.TESTS.rglob("test_*_kernels.py")} - {"test_check_kernels.py"}
    kernels -= {"test_check_native_kernels.py"}
    assert names >= kernels | {"test_huge_scores.py", "test_patching_huge_masks.py", "test_nn_fusible.py"}
    assert names >= {path.name for path in processors.TESTS.rglob("test_*.py") if "import oracle\n" in path.read_text()}
    assert not names & {"test_cli_training.py", "test_packaging.py", "test_gpu_run.py", "test_config.py"}


def test_a_processor_has_what_comes_before() -> None:
    assert [has(PLAIN, name) for name in ("DEFAULT", "AVX2", "AVX512")] == [True, True, True]
    assert [has({"torch": "AVX2"}, name) for name in ("DEFAULT", "AVX2", "AVX512")] == [True, True, False]
    # Of aarch64.
    assert [has({"torch": "SVE256"}, name) for name in ("DEFAULT", "AVX2", "AVX512")] == [True, False, False]


def test_a_process_is_given_one_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    given = processors.environment(DEFAULT)
    assert given["ATEN_CPU_CAPABILITY"] == "default"
    assert given["OMP_NUM_THREADS"] == "1"
    assert not {"ONEDNN_MAX_CPU_ISA", "TFM_INSTRUCTION_SET"} & given.keys()


def test_each_setting_is_a_row(
    on_this: dict[str, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    file = tmp_path / "test_computes.py"
    file.write_text(
        "import os\n\n\ndef test_passes(): pass\n\n\n"
        "def test_of_one_setting(): assert os.environ.get('ATEN_CPU_CAPABILITY') == 'default'\n"
    )
    monkeypatch.setattr(processors, "computing", lambda: [file])
    on_this[str(DEFAULT)] = {"torch": "DEFAULT"}
    on_this[str(OURS)] = {"tfm": "avx2"}
    wide = Setting("ONEDNN_MAX_CPU_ISA", "AVX512_CORE", "AVX1024")
    monkeypatch.setattr(processors, "CAPABILITIES", (*processors.CAPABILITIES, "AVX1024"))
    monkeypatch.setattr(processors, "SETTINGS", (DEFAULT, SETTINGS[2], wide, OURS))
    assert processors.main(["--", "-p", "no:cacheprovider"]) == 1
    plain, head, *rows = capfd.readouterr().out.splitlines()[-6:]
    assert plain == "plain: torch AVX512, oneDNN Intel AVX-512 with Intel DL Boost, tfm avx512"
    assert head.split() == ["setting", "passed", "failed", "minutes", "in", "use"]
    assert rows[0].split()[:3] == ["ATEN_CPU_CAPABILITY=default", "2", "0"]
    assert rows[1].split(maxsplit=3)[:3] == ["ONEDNN_MAX_CPU_ISA=AVX2", "not", "run"]
    assert "it changes nothing here: torch AVX512, " in rows[1]
    assert rows[2].endswith("not run   this processor has no AVX1024")
    assert rows[3].split()[:3] == ["TFM_INSTRUCTION_SET=avx2", "1", "1"]


def test_tests_that_did_not_run_are_a_failure(
    on_this: dict[str, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    file = tmp_path / "test_computes.py"
    file.write_text("def test_passes(): pass\n")
    monkeypatch.setattr(processors, "computing", lambda: [file])
    on_this[str(OURS)] = {"tfm": "avx2"}
    assert processors.main([str(OURS), "--", "--an-option-that-is-none"]) == 1
    assert "pytest ended with status 4; " in capfd.readouterr().out


def test_a_setting_that_nobody_knows(capsys: pytest.CaptureFixture) -> None:
    assert processors.main(["ATEN_CPU_CAPABILITY=sse"]) == 2
    assert "expected settings among ATEN_CPU_CAPABILITY=default, " in capsys.readouterr().err


def test_a_probe_says_what_is_in_use() -> None:
    found = processors.instructions(DEFAULT)
    assert found["torch"] == "DEFAULT"
    assert found["tfm"] != "not here"
