"""`make versions`: which pairs are run, what is run anew, how summaries are read, the table. Nothing is installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools import versions
from tools.report import versions as report
from tools.report.records import load, rows_of_versions
from tools.versions import PAIRS, Pair

PYTEST = """
............F....                                                        [100%]
=================================== FAILURES ===================================
E   5 passed in words
=========================== short test summary info ============================
FAILED tests/norm/test_norm.py::test_rows[fp32-3] - AssertionError: expected 1
ERROR tests/test_files.py
=== 2 failed, 5461 passed, 41 skipped, 3 warnings, 1 error in 576.12s (0:09:36) ===
"""
KERNELS = """
kernel
  sm_80   4    64      0   16384     4 (50%)  HMMA 32

1149 compilations in 605 s, 1130 s of one core
slowest: attention, sm_100, 9 s of one core
2 failures
attention, sm_80: spills: 8 bytes of stack, 2 loads and 2 stores
norm, sm_90: its exception (spill) is not needed
"""
MACHINE = {"cpu": "a processor", "cores": 2, "python": "3.11.7", "uncommitted_changes": False}
TESTS = MACHINE | {"date": "2026-03-01T10:00:00+00:00", "commit": "a" * 40, "minutes": 9.6}
GREEN = TESTS | {"passed": 5461, "failed": 0, "skipped": 41, "failures": []}
KERNELS_GREEN = TESTS | {"compiled": 1149, "faults": 0, "failures": [], "minutes": 7.3}


@pytest.fixture
def ran(monkeypatch, tmp_path):
    """The parts that a run asks for, in order, as (pair, part); all of them pass, and nothing is run."""
    asked = []

    def run_part(part, environment):
        name = next(name for name, known in versions.PARTS.items() if known is part)
        asked.append((environment.name, name))
        return {"tests": GREEN, "kernels": KERNELS_GREEN}[name]

    monkeypatch.setattr(versions, "make_environment", lambda pair: Path(pair.name))
    monkeypatch.setattr(versions, "run_part", run_part)
    monkeypatch.setattr(versions, "is_current", bool)
    return asked


def test_every_torch_has_the_triton_it_asks_for_and_the_newest_is_tried_ahead():
    assert [pair.torch for pair in PAIRS] == ["2.11.0", "2.12.0", "2.13.0", "2.14.1", "2.14.1"]
    assert [pair.forced for pair in PAIRS] == [False] * 4 + [True]
    assert len({pair.name for pair in PAIRS}) == len(PAIRS)


def test_pins_are_those_of_the_tests_without_torchs_own():
    text = "# a comment\ntorch==2.13.0\ntriton==3.7.1\ntokenizers==0.23.3\nsetuptools==84.2.1\n"
    ours = "# a comment\ntokenizers==0.23.3\ntorch==2.14.1\n"
    assert versions.pins(text, Pair("2.14.1", "3.8.0")) == ours + "triton==3.8.0\n"
    assert versions.pins(text, Pair("2.14.1", "3.9.0", forced=True)) == ours
    other = Pair("2.14.1", "3.9.0", forced=True, beside=("tokenizers==0.20.1",))
    assert versions.pins(text, other) == "# a comment\ntorch==2.14.1\ntokenizers==0.20.1\n"


def test_a_summary_of_pytest_is_read():
    assert versions.read_tests(PYTEST) == {
        "passed": 5461,
        "skipped": 41,
        "failed": 3,
        "failures": ["tests/norm/test_norm.py::test_rows[fp32-3] - AssertionError: expected 1", "tests/test_files.py"],
    }


def test_a_summary_of_check_kernels_is_read():
    found = versions.read_kernels(KERNELS)
    assert (found["compiled"], found["faults"]) == (1149, 2)
    assert [line.split(":")[0] for line in found["failures"]] == ["attention, sm_80", "norm, sm_90"]
    green = KERNELS[: KERNELS.index("2 failures")] + "0 failures\n\n"
    assert versions.read_kernels(green) == {"compiled": 1149, "faults": 0, "failures": []}


def stand_in_for_make(folder, monkeypatch, program):
    make = folder / "make"
    make.write_text(f"#!{sys.executable}\nimport os, sys\n{program}\n")
    make.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


@pytest.mark.parametrize("part", versions.PARTS)
@pytest.mark.parametrize("summary", ["", "== 1 passed in 0.1s ==\n1 compilations in 1 s\n0 failures\n"])
def test_an_exit_status_is_a_failure_whatever_the_summary_says(part, summary, monkeypatch, tmp_path):
    program = f"print({summary + 'no compiler'!r})\nprint('make: error')\nsys.exit(2)"
    stand_in_for_make(tmp_path, monkeypatch, program)
    done = versions.run_part(versions.PARTS[part], tmp_path)
    assert versions.faults(done) == [done["ended"]] == ["exit status 2: no compiler"]
    assert versions.faults(None) == ["not run"]


def test_the_makefile_is_called_for_the_environment_alone(monkeypatch, tmp_path):
    """Under `make versions ONLY=x` no variable of that make may reach the one that is called."""
    program = (
        "print('== 1 passed in 0.1s ==', file=sys.stderr)\n"
        "assert not [name for name in os.environ if name.startswith('MAKE')], os.environ\n"
        f"assert sys.argv[1:] == ['--old-file={tmp_path}/.installed', 'test', 'VENV={tmp_path}'], sys.argv"
    )
    stand_in_for_make(tmp_path, monkeypatch, program)
    for name in ("MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES"):
        monkeypatch.setenv(name, "1")
    done = versions.run_part(versions.PARTS["tests"], tmp_path)
    assert (done["passed"], done["failed"], done["failures"]) == (1, 0, [])
    assert {"date", "commit", "minutes", "cpu", "python"} <= set(done)


def test_make_takes_the_environment_as_made():
    """The Makefile would put its own torch in where constraints.txt is newer than the environment."""
    words = ["make", "--dry-run", "--old-file=/nowhere/.installed", "check-kernels", "VENV=/nowhere"]
    printed = subprocess.run(words, cwd=versions.ROOT, capture_output=True, text=True, check=True).stdout
    assert "/nowhere/bin/python -m tools.check_kernels" in printed
    assert "pip" not in printed


def test_what_the_record_has_is_not_run_again(ran, tmp_path):
    out = ["--out", str(tmp_path / "versions.json")]
    assert versions.main([*out, "--only", "torch-2.12", "--parts", "tests"]) == 0
    assert ran == [("torch-2.12.0-triton-3.7.0", "tests")]
    assert versions.main([*out, "--only", "torch-2.12,triton-3.9"]) == 0
    name = "torch-2.14.1-triton-3.9.0"
    assert ran[1:] == [("torch-2.12.0-triton-3.7.0", "kernels"), (name, "tests"), (name, "kernels")]
    ran.clear()
    assert versions.main([*out, "--only", "triton-3.9", "--again", "--parts", "kernels"]) == 0
    assert ran == [(name, "kernels")]
    stored = rows_of_versions(load(tmp_path))
    assert [(row["torch"], row["triton"]) for row in stored] == [("2.12.0", "3.7.0"), ("2.14.1", "3.9.0")]


def test_a_part_is_stored_before_the_next_begins(ran, tmp_path, monkeypatch):
    def run_part(part, environment):
        if part is versions.PARTS["kernels"]:
            raise KeyboardInterrupt
        return GREEN

    monkeypatch.setattr(versions, "run_part", run_part)
    out = tmp_path / "versions.json"
    with pytest.raises(KeyboardInterrupt):
        versions.main(["--out", str(out), "--only", "torch-2.11"])
    assert json.loads(out.read_text())["rows"] == [{"torch": "2.11.0", "triton": "3.6.0", "tests": GREEN}]


def test_failures_of_the_record_are_failures(ran, tmp_path, capsys):
    out = tmp_path / "versions.json"
    failed = GREEN | {"failed": 1, "failures": ["tests/norm/test_norm.py::test_rows"]}
    versions.write_rows(out, {PAIRS[0].name: {"torch": "2.11.0", "triton": "3.6.0", "tests": failed}})
    assert versions.main(["--out", str(out), "--only", "2.11", "--parts", "tests"]) == 1
    assert "torch-2.11.0-triton-3.6.0, tests: tests/norm/test_norm.py::test_rows" in capsys.readouterr().out
    assert ran == []


def test_a_pair_that_cannot_be_installed_does_not_stop_the_others(ran, tmp_path, monkeypatch, capsys):
    def make_environment(pair):
        if pair == PAIRS[0]:
            raise subprocess.CalledProcessError(1, ["pip"])
        return Path(pair.name)

    monkeypatch.setattr(versions, "make_environment", make_environment)
    assert versions.main(["--out", str(tmp_path / "v.json"), "--only", "2.11,2.12", "--parts", "tests"]) == 1
    assert ran == [(PAIRS[1].name, "tests")]
    assert "torch-2.11.0-triton-3.6.0: no environment: " in capsys.readouterr().out


def test_only_records_of_these_sources_count(monkeypatch, tmp_path):
    def git(*words):
        subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x@y", *words], cwd=tmp_path, check=True)

    (tmp_path / "tfm").mkdir()
    (tmp_path / "tfm" / "a.py").write_text("1")
    (tmp_path / "README.md").write_text("1")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "one")
    monkeypatch.setattr(versions, "ROOT", tmp_path)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, capture_output=True, text=True, check=True)
    done = GREEN | {"commit": head.stdout.strip()}
    assert versions.is_current(done)
    assert not versions.is_current(None)
    assert not versions.is_current(done | {"uncommitted_changes": True})
    assert not versions.is_current(done | {"commit": "0" * 40})
    (tmp_path / "README.md").write_text("2")
    assert versions.is_current(done)
    assert not versions.has_changed("HEAD")
    (tmp_path / "tfm" / "a.py").write_text("2")
    assert versions.has_changed("HEAD")
    assert not versions.is_current(done)


def test_the_table_says_what_ran_and_what_did_not():
    failing = TESTS | {"date": "2026-03-02T10:00:00+00:00", "passed": 5460, "failed": 1, "skipped": 41}
    failing |= {"failures": ["tests/norm/test_norm.py::test_rows"], "uncommitted_changes": True}
    rows = [
        {"torch": "2.11.0", "triton": "3.6.0", "tests": GREEN, "kernels": KERNELS_GREEN},
        {"torch": "2.12.0", "triton": "3.7.0", "tests": failing},
        {"torch": "2.13.0", "triton": "3.7.1", "kernels": TESTS | {"ended": "exit status 2: no compiler"}},
    ]
    text = report.table(rows)
    assert text.startswith("Tried on 2026-03-01; 2026-03-02, on a processor, Python 3.11.7:\n")
    assert "| 2.11.0 | 3.6.0 | 5,461 | 0 | 41 | 1,149 | 0 | 17 | 2026-03-01, aaaaaaa |" in text
    assert "| 2.12.0 | 3.7.0 | 5,460 | 1 | 41 | not run |  | 10 | 2026-03-02, aaaaaaa with changes |" in text
    assert "| 2.13.0 | 3.7.1 | not run |  |  | exit status 2: no compiler |  | 10 | 2026-03-01, aaaaaaa |" in text
    assert report.failures(rows).endswith("- torch 2.12.0, triton 3.7.0: `tests/norm/test_norm.py::test_rows`")
    assert report.failures(rows[:1]) == "Under the versions of README's table nothing failed."
    assert report.table([]) == "No version has a record yet."
