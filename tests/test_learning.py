"""The comparison at equal updates: both sides learn from the same start, and its statistics are right."""

from __future__ import annotations

import json
import math
from concurrent.futures import Executor, Future

import pytest

from benchmarks import learning


class InThisProcess(Executor):
    def __init__(self, processes, mp_context):
        assert processes == 2

    def submit(self, function, *arguments):
        future = Future()
        future.set_result(function(*arguments))
        return future


def run(contender, seed, *losses):
    return {"contender": contender, "seed": seed, "train_loss": list(losses), "validation_loss": list(losses)}


def test_summary_pairs_runs_by_their_seed():
    runs = [run("tfm", 1, 6.0, 5.0), run("eager", 2, 5.0, 3.0), run("eager", 1, 6.0, 4.5), run("tfm", 2, 7.0, 3.5)]
    found = learning.summary([*runs, run("tfm", 3, 9.0, 9.0)], [1, 2, 3])
    assert found["seeds"] == [1, 2]
    losses = found["validation_loss"]
    assert losses["tfm"][0] == {"mean": 6.5, "deviation": pytest.approx(math.sqrt(0.5))}
    assert losses["difference"][1] == {"mean": 0.5, "standard_error": 0.0, "p": 0.5}
    assert losses["difference"][0] == {"mean": 1.0, "standard_error": pytest.approx(1.0), "p": 1.0}


@pytest.mark.parametrize(
    ("differences", "p"), [([1.0, 2.0, 3.0], 2 / 8), ([1.0, -1.0], 1.0), ([0.0, 0.0, 0.0], 1.0), ([3.0, 0.5], 1 / 2)]
)
def test_p_is_the_share_of_sign_patterns(differences, p):
    assert learning.paired_difference(differences)["p"] == p


def test_a_rehearsal_leaves_the_curves_of_both_sides(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(learning, "UPDATES_PER_POINT", 2)
    monkeypatch.setattr(learning, "curve", lambda arguments, name, seed: run(name, seed, 6.0, 5.0))
    monkeypatch.setattr(learning, "ProcessPoolExecutor", InThisProcess)
    out = tmp_path / "learning.json"
    monkeypatch.setattr("sys.argv", ["learning", "--seeds", "1,2", "--updates", "4", "--out", str(out)])
    learning.main()
    record = json.loads(out.read_text())
    assert record["points"] == [2, 4]
    assert sorted((run["contender"], run["seed"]) for run in record["runs"]) == [
        ("eager", 1), ("eager", 2), ("tfm", 1), ("tfm", 2),
    ]  # fmt: skip
    assert record["summary"]["train_loss"]["difference"][0]["mean"] == 0.0
