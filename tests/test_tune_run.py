"""A run of the tuner: processes that die cost one candidate, the time is shared, and the record is always whole."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
import tune_cases
from tune_cases import SWEEP

from tools.gpu import child
from tools.tune import __main__ as command
from tools.tune import run, worker
from tools.tune.candidates import FAMILIES
from tools.tune.findings import findings
from tools.tune.problems import Task, tasks
from tools.tune.trials import Trial

pytestmark = pytest.mark.triton

# The second candidate of the first sweep ends its process.
DEADLY = (tune_cases.sweep((tune_cases.DEADLY, 0.5), (4, 0.7)), SWEEP)
SCRIPT = f"""
import sys

sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_tune_run
from tools.tune.candidates import FAMILIES
from tools.tune import worker

FAMILIES["deadly"] = test_tune_run.DEADLY
worker.main()
"""


@pytest.fixture
def tuner(monkeypatch, tmp_path):
    """The command in this process, with processes that know the sweeps above, too; then the environment as it was."""
    for name, value in {"TFM_REHEARSAL": "1", "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("OUT", raising=False)
    monkeypatch.setitem(FAMILIES, "deadly", DEADLY)
    script = tmp_path / "worker.py"
    script.write_text(SCRIPT)
    monkeypatch.setattr(run, "WORKER", (str(script),))
    handler = signal.getsignal(signal.SIGTERM)

    def call(*words):
        return command.main([*words, "--rehearse", "--out", str(tmp_path / "record.json")])

    yield call
    signal.signal(signal.SIGTERM, handler)


def journal_of(tmp_path, chosen, clock, until, timing=lambda steps, mode: [1.0, 1.1, 0.9]):
    journal = tmp_path / "journal.jsonl"
    worker.try_tasks(chosen, journal, until, clock, timing)
    return journal, child.read(journal)


def test_a_process_that_dies_costs_one_candidate(tuner, tmp_path, capsys):
    assert tuner("deadly", "--seconds", "300") == 0
    written = json.loads((tmp_path / "record.json").read_text())
    first, second = written["sweeps"]
    assert [trial["reason"] for trial in first["trials"]] == ["", "its process ended by signal 6", ""]
    assert [bool(trial["samples"]) for trial in first["trials"]] == [True, False, True]
    # The task behind it has its turn in the next process.
    assert [bool(trial["samples"]) for trial in second["trials"]] == [True, False, True, False, True]
    assert first["verdicts"][0]["expected"] == 0.5
    assert written["sources"].keys() >= {"kernels/norm.py"}
    assert written["environment"]["torch"] == torch.__version__
    # Of one that dies nothing is compiled behind it, and the other process goes on.
    assert written["compiled"]["candidates"] >= 3
    assert any("signal 6" in reason for reason in written["compiled"]["processes"].values())
    printed = capsys.readouterr().out
    assert "its process ended by signal 6" in printed
    assert printed.index("(today's)") < printed.index("Faster than today's:") < printed.index("record.json, after")


def test_a_candidate_that_hangs_ends_its_process(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "MOST_SECONDS", 1)
    process = os.fork()
    if process == 0:
        worker.Journal(tmp_path / "journal.jsonl", 0).begin(1, Trial("f()", "Settings()", 0.5, False))
        time.sleep(60)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(process, 0)[1]) == signal.SIGALRM
    (line,) = child.read(tmp_path / "journal.jsonl")
    assert line["begun"] == [0, 1]


def test_time_is_divided_among_the_tasks(tmp_path):
    # Ten seconds pass from each look at the clock to the next: the first of three gets a third, and none is left then.
    chosen = [Task("double", SWEEP, 3, torch.float32)] * 3
    seconds = iter(range(0, 1000, 10)).__next__
    _, lines = journal_of(tmp_path, chosen, seconds, until=60)
    first, *others = findings(chosen, lines)
    assert [bool(trial.samples) for trial in first.trials] == [True, False, False, False, False]
    assert [trial.reason for trial in first.trials[1:]] == ["out of time"] * 4
    assert [len(finding.trials) for finding in others] == [0, 0]


def test_what_was_begun_is_not_begun_again(tmp_path):
    chosen = [Task("double", SWEEP, 3, torch.float32)] * 2
    journal, lines = journal_of(tmp_path, chosen, float, until=1.0)
    # As if the process had died in the second candidate of the first task, and of another while it was built.
    kept = lines[: lines.index(next(line for line in lines if line.get("begun") == [0, 2])) + 1]
    journal.write_text("".join(json.dumps(line) + "\n" for line in kept))
    run.close(journal, kept, "died")
    child.append(journal, {"begun": [1, 0], "trial": lines[0]["trial"]})
    run.close(journal, child.read(journal), "died")
    _, lines = journal_of(tmp_path, chosen, float, until=1.0)
    begun = [tuple(line["begun"]) for line in lines if "begun" in line]
    assert sorted(begun) == [*((0, place) for place in range(6)), (1, 0)]
    first, second = findings(chosen, lines)
    assert [trial.reason == "died" for trial in first.trials] == [False, True, False, False, False]
    assert [trial.reason for trial in second.trials] == ["died"]


def test_the_list_needs_no_gpu(tuner, capsys):
    assert tuner("all", "--list") == 0
    printed = capsys.readouterr().out
    assert re.search(r"Candidates and expected shares: .*warps=4: 0.70", printed)
    assert SWEEP.question in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing"], "family: expected one of all, norm"),
        (["norm", "--size", "7x7"], "--size: expected a part of one of"),
    ],
)
def test_command_line_errors(words, message, tuner, capsys):
    assert tuner(*words) == 2
    assert message in capsys.readouterr().err


def test_sizes_are_chosen_by_a_part_of_their_name():
    assert {str(task.size) for task in tasks("norm", "8192x1024")} == {"8192x1024 dropout 0.1"}
    assert {task.dtype for task in tasks("all", rehearse=True)} == {torch.bfloat16}


@pytest.mark.parametrize(("given", "name"), [("", "tuned.json"), ("folder", "h200_all.json")])
def test_a_folder_takes_the_record_under_the_name_of_the_gpu(given, name, tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    monkeypatch.setenv("OUT", str(tmp_path / (given or name)))
    assert command.destination(command.parse(["all"]), "H200").name == name
    monkeypatch.delenv("OUT")
    place = command.destination(command.parse(["all"]), "NVIDIA H200")
    # Not among the records of operations, the newest of which README shows.
    assert place.parts[-3:] == ("results", "tuning", "nvidia_h200_all.json")
