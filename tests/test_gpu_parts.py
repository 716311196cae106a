"""The command line of `python -m tools.gpu`, how its parts share time, and what becomes of processes that fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from measured import a_run

from tools.gpu import __main__ as command
from tools.gpu import child, proof, pytest_journal, speed
from tools.gpu.run import Part


def test_a_lost_gpu_ends_the_process(tmp_path, monkeypatch):
    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with ...")

    def leave(status):
        raise SystemExit(status)

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    monkeypatch.setattr(os, "_exit", leave)
    fixture = SimpleNamespace(extra_info={"peer": "ours"})
    item = SimpleNamespace(nodeid="bench_x.py::test_x", funcargs={"benchmark": fixture})
    path = tmp_path / "journal.jsonl"
    with pytest.raises(SystemExit, match=str(child.GPU_LOST)):
        pytest_journal.Journal(path, is_worker=False).pytest_runtest_teardown(item)
    test, benchmark = child.read(path)
    reason = "the GPU was lost: CUDA error: an illegal memory access was encountered"
    assert (test["finished"], test["outcome"], test["message"]) == (item.nodeid, "failed", reason)
    assert benchmark["entry"]["extra_info"] == {"peer": "ours", "failed": reason}


def test_a_command_ends_with_all_that_it_started(tmp_path):
    inner = f"import time, pathlib; pathlib.Path({str(tmp_path / 'begun')!r}).touch(); time.sleep(60)"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    late = child.Command((sys.executable, "-c", outer), tmp_path / "late.jsonl", {})
    quick = child.Command((sys.executable, "-c", "raise SystemExit('no such thing')"), tmp_path / "quick.jsonl", {})
    ends = child.run({"late": late, "quick": quick}, seconds=2.0)
    assert ends["late"].state == "out of time"
    assert (ends["quick"].state, ends["quick"].reason) == ("failed", "exit status 1: no such thing")
    assert (tmp_path / "begun").exists()
    processes = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(tmp_path / "begun") not in processes


def test_time_is_shared_out_and_failures_survived(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    given = {}

    def part(name, weight, used):
        def work(run, seconds):
            given[name] = seconds
            now[0] += used(seconds)
            if name == "fails":
                raise RuntimeError("a part that fails")
            return "done", ""

        return Part(name, weight, work)

    run = a_run(tmp_path, minutes=(100 + 3) / 60)
    short, fails, greedy = part("short", 1, lambda _: 10), part("fails", 1, float), part("greedy", 2, lambda _: 80)
    run.do_all([short, fails, greedy, part("late", 1, float)])
    assert given == pytest.approx({"short": 20, "fails": 22.5, "greedy": 45})
    parts = {row["name"]: row for row in json.loads(run.options.out.read_text())["parts"]}
    assert (parts["fails"]["state"], parts["fails"]["reason"]) == ("failed", "RuntimeError: a part that fails")
    assert (parts["late"]["state"], parts["late"]["reason"]) == ("out of time", "not begun")


def test_suites_share_time_by_their_cases(tmp_path):
    run = a_run(tmp_path)
    few, many, broken = (Part(name, 10, lambda run, seconds: ("done", "")) for name in ("few", "many", "broken"))
    assert [run.weight(part) for part in (few, many, broken)] == [10, 10, 10]
    run.cases = {"few": 10, "many": 30}
    assert [run.weight(part) for part in (few, many, broken)] == [5, 15, 10]


def test_choices_made_beside_other_work_are_forgotten(tmp_path):
    for name in ("ab/chosen.best_config", "ab/code.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    speed.forget_tuning(tmp_path)
    assert [path.name for path in tmp_path.rglob("*.*")] == ["code.py"]


def test_without_the_sanitizer(tmp_path, monkeypatch):
    monkeypatch.setattr(proof.record, "cuda_tool", lambda name: None)
    run = a_run(tmp_path)
    state, reason = proof.sanitizer(run, 10.0)
    assert state == "missing"
    assert "no compute-sanitizer" in reason
    assert run.record["sanitizer"]["racecheck"]["state"] == "missing"


@pytest.mark.parametrize(
    ("tool", "said", "state", "reason"),
    [
        ("memcheck", "========= ERROR SUMMARY: 0 errors", "done", "0 errors"),
        ("memcheck", "========= Invalid __global__ read\n========= ERROR SUMMARY: 3 errors", "failed", "3 errors"),
        (
            "racecheck",
            "========= RACECHECK SUMMARY: 2 hazards displayed (0 errors, 2 warnings)",
            "done",
            "0 errors, 2 warnings",
        ),
        ("racecheck", "========= Error: no such GPU", "failed", "without a summary"),
    ],
)
def test_what_the_sanitizer_says(tool, said, state, reason, tmp_path):
    one = child.Command((), tmp_path / "journal.jsonl", {})
    one.output.write_text(said)
    verdict = proof._verdict(tool, one, child.End(0, 1.0, ""))
    assert (verdict["state"], verdict["reason"]) == (state, reason)
    assert verdict["report"] == said.splitlines()


def test_a_run_may_be_of_some_parts():
    def names(*words):
        return [part.name for part in command.parts(command.parse(["--rehearse", *words]))]

    assert names("--parts", "tests,native") == ["environment", "native", "tests"]
    assert names("--parts", "training,norm") == ["environment", "norm", "training tiny"]
    assert len(names()) == len(command.plan(command.parse(["--rehearse"])))


def test_two_calls_make_up_a_run():
    whole = [part.name for part in command.parts(command.parse(["--rehearse"]))]
    calls = {}
    for call in command.CALLS:
        options = command.parse(["--rehearse", "--call", call])
        assert (options.minutes, options.out.name) == (command.CALL_MINUTES, f"rehearsal_{call}.json")
        calls[call] = [part.name for part in command.parts(options)]
    assert calls["proof"] == ["environment", "native", "kernels", "tests", "sanitizer"]
    assert {name for names in calls.values() for name in names} == set(whole)
    # The second builds csrc, too: what it measures has to be there.
    assert set(calls["proof"]) & set(calls["speed"]) == {"environment", "native"}
    assert "attention" in calls["speed"]


def test_the_record_lies_where_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.delenv("OUT", raising=False)
    words = ["--rehearse", "--only", "norm"]
    assert command.parse(words).out == command.ROOT / "runs" / "rehearsal_norm.json"
    for out, expected in ((tmp_path, tmp_path / "rehearsal_norm.json"), (tmp_path / "x.json",) * 2):
        assert command.parse([*words, "--out", str(out)]).out == expected
        monkeypatch.setenv("OUT", str(out))
        assert command.parse(words).out == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected an NVIDIA GPU"),
        (["--rehearse", "--only", "nonsense"], "--only: expected some of attention, "),
        (["--rehearse", "--only", ","], "got none"),
        (["--rehearse", "--parts", "test"], "--parts: expected some of environment, native, "),
        (["--rehearse", "--call", "proof", "--parts", "tests"], "--call: expected no --parts beside it, got both"),
        (["--rehearse", "--minutes", "-1"], "--minutes: expected a positive number, got -1"),
        (["--rehearse", "--data", "nowhere"], "--data: expected a folder, got nowhere"),
        (["--rehearse", "--out", "/proc/none/x.json"], "/proc/none/x.json: cannot be written"),
    ],
)
def test_mistakes_are_one_line(words, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("tools.gpu: ")
    assert message in said
    assert said.count("\n") == 1
