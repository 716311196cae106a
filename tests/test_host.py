"""What the host launches, waits for and has compiled is what the committed record says."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from selection import EVERY

from tfm import ops
from tfm.ops import backends
from tools.check_kernels.case import Case
from tools.host.batches import MOST
from tools.host.launches import Counting, Launches, Watching
from tools.host.record import exact_changes, over_budget

pytestmark = pytest.mark.triton
ROOT = Path(__file__).parent.parent
RECORD = ROOT / "benchmarks" / "results" / "host.json"
# The compilations of so few say the same of the record as those of all.
BATCHES = 200 if EVERY else 24


@pytest.fixture(scope="session")
def committed():
    return json.loads(RECORD.read_text())


@pytest.fixture(scope="session")
def counted(tmp_path_factory):
    """What is so, by a process of its own: Triton is not interpreted there."""
    path = tmp_path_factory.mktemp("host") / "host.json"
    command = [sys.executable, "-m", "tools.host", "--counts", "--batches", str(BATCHES), "--out", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text())


def test_launches_syncs_and_compilations_are_those_of_the_record(counted, committed):
    # Rows of a new operation are not held against anything until the record is made again.
    changes = "\n".join(line for line in exact_changes(committed, counted, BATCHES) if not line.endswith(": a new row"))
    assert not changes, f"{changes}\nwhere that is meant, `make host` renews benchmarks/results/host.json"


def test_ragged_batches_ask_for_few_compilations(counted, committed):
    assert committed["batches"] == 200
    for record in (committed, counted):
        for kind, asked in record["compilations"].items():
            assert sum(map(len, asked.values())) <= MOST, (kind, asked)


def test_every_operation_of_triton_has_rows(counted):
    names = {re.split(r"[, ]", row["name"])[0] for row in counted["rows"]}
    operations = {name for row in backends.TABLE if row.backend == "triton" for name in row.operations}
    assert operations - {"varlen_attention"} <= names
    assert all(hasattr(ops, name) for name in operations)


def test_a_launch_more_is_named(committed):
    changed = copy.deepcopy(committed)
    row = next(row for row in changed["rows"] if row["name"] == "layer_norm" and row["direction"] == "forward")
    row["triton"]["norm_forward_kernel"] += 1
    row["syncs"]["tolist"] = 1
    assert exact_changes(committed, changed) == [
        "layer_norm, forward: triton 1 -> 2 (norm_forward_kernel 1 -> 2)",
        "layer_norm, forward: syncs 0 -> 1 (tolist 0 -> 1)",
    ]


def test_a_compilation_more_is_named_by_few_batches_too(committed):
    changed = copy.deepcopy(committed)
    asked = changed["compilations"]["attention, key lengths"]["short_attention_forward_kernel"]
    before = len(asked)
    asked.append(7)
    line = f"short_attention_forward_kernel {before} -> {before + 1}"
    assert [line in change for change in exact_changes(committed, changed)] == [True]
    # Of eight batches the last is number 7.
    assert len(exact_changes(committed, changed, ran=8)) == 1
    assert exact_changes(committed, changed, ran=7) == []


def test_a_row_that_comes_or_goes_is_named(committed):
    changed = copy.deepcopy(committed)
    row = changed["rows"].pop()
    key = f"{row['name']}, {row['direction']}"
    assert exact_changes(committed, changed) == [f"{key}: no row any more"]
    assert exact_changes(changed, committed) == [f"{key}: a new row"]


def test_products_other_launches_and_waits_are_told_apart():
    found = Launches()
    x, weight = torch.ones(3, 4), torch.ones(5, 4)
    with Watching(found), Counting(found), torch.inference_mode():
        y = F.linear(x.view(3, 4), weight.t().t())
        y.new_empty(3)
        y.sum().item()
        y.tolist()
        y[y > 2.0]
        y[:, [1, 3]] = 7.0
    assert found.products == {"mm": 1}
    assert found.others == {"sum": 1, "gt": 1, "index": 1, "copy from the host": 1, "index_put_": 1}
    assert found.syncs == {"_local_scalar_dense": 1, "tolist": 1, "index": 1}
    assert found.total == 6


@pytest.mark.parametrize("argument", ["i32:16", 1])
def test_a_case_is_compiled_for_no_more_than_a_launch_tells(argument):
    stride = SimpleNamespace(name="row_b", do_not_specialize=True, do_not_specialize_on_alignment=False)
    pointer = SimpleNamespace(name="sums", do_not_specialize=False, do_not_specialize_on_alignment=True)
    kernel = SimpleNamespace(params=[stride, pointer])
    Case("a kernel", kernel, {"row_b": "i32", "sums": "*fp32"}, num_warps=4)
    with pytest.raises(ValueError, match="row_b is not specialised on"):
        Case("a kernel", kernel, {"row_b": argument, "sums": None}, num_warps=4)
    with pytest.raises(ValueError, match="sums is not specialised on"):
        Case("a kernel", kernel, {"row_b": None, "sums": "*fp32:16"}, num_warps=4)


def test_what_is_over_its_budget_is_seen(committed):
    row = copy.deepcopy(committed["rows"][0])
    row["budget"], row["host"] = {"launches": 0, "host": 1.0}, 1.0
    assert over_budget(row) == ["launches"]
    row["host"] = 1.1
    assert over_budget(row) == ["launches", "host"]
