"""A run's log: what is a record is read as it is, all else is one line, and what is read can be drawn."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from altered_json import altered, check_line, values
from hypothesis import given, settings
from hypothesis import strategies as st

from tfm import plots
from tfm.checkpoint import Run
from tfm.errors import UserError
from tfm.records import parse_log

LOG = [
    {"event": "train", "step": 20, "epoch": 0, "loss": 5.5, "gradient_norm": 1.0, "learning_rate": 1e-3, "seconds": 9},
    {"event": "checkpoint", "step": 20, "path": "checkpoints/step-00000020.safetensors"},
    {"event": "validation", "step": 20, "loss": 5.0, "bleu": 1.5, "samples": [{"source": "a\u2028b"}]},
]


@given(st.dictionaries(st.text(max_size=9), values, max_size=4))
@settings(deadline=None, max_examples=40)
def test_what_a_record_tells_beside_is_kept(more):
    more = {name: value for name, value in more.items() if json.dumps(value) == json.dumps(value).replace("NaN", "")}
    lines = [more | record for record in LOG]
    try:
        data = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
    except UnicodeEncodeError:
        return
    assert parse_log(data, "log") == json.loads(json.dumps(lines))


def test_events_of_tomorrow_are_records():
    assert parse_log(b'{"event": "pause", "step": 3}\n', "log") == [{"event": "pause", "step": 3}]


@pytest.mark.parametrize("line", ["{}", "[]", "1", '{"event": "train", "step": 1}', '{"event": "train", "step": -1}'])
def test_a_line_that_is_no_record(tmp_path, line):
    run = Run(tmp_path)
    run.log.write_text(json.dumps(LOG[0]) + "\n" + line + "\n")
    with pytest.raises(UserError) as raised:
        run.read_log()
    assert str(raised.value).startswith(f"{run.log}:2: ")


@pytest.mark.parametrize(
    "damage", [b'{"event": "tr', b"\0\0\n", b"\xff\n", b"{\n"], ids=["torn", "zeros", "bytes", "JSON"]
)
def test_what_a_crash_tore_off_is_left_out(tmp_path, damage):
    run = Run(tmp_path)
    assert run.read_log() == []
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in LOG).encode()
    run.log.write_bytes(lines + damage)
    assert run.read_log() == LOG
    if damage.endswith(b"\n"):
        # Whole lines after it: no crash wrote that, and they may record a checkpoint.
        run.log.write_bytes(damage + lines)
        with pytest.raises(UserError, match=r"log\.jsonl:1: not JSON"):
            run.read_log()


@given(data=st.lists(st.sampled_from(LOG).flatmap(altered), min_size=1, max_size=3))
@settings(deadline=None, max_examples=150)
def test_any_log_is_read_or_refused(data):
    try:
        records = parse_log(b"".join(line + b"\n" for line in data), "log")
    except UserError as refusal:
        check_line(refusal, Path("log"))
        return
    for record in records:
        assert isinstance(record["event"], str)
        assert type(record["step"]) is int
        json.dumps(record)


@pytest.mark.parametrize("loss", [1e308, 10**400], ids=["float", "int"])
def test_no_loss_is_that_large(loss):
    with pytest.raises(UserError, match=r"log:1: loss: expected a (loss|valid number), got 1"):
        parse_log(json.dumps(LOG[0] | {"loss": loss}).encode() + b"\n", "log")


@pytest.mark.parametrize("loss", [math.nan, math.inf, 3e38, 0])
def test_what_is_read_can_be_drawn(loss):
    lines = [json.dumps(record | ({"loss": loss} if "loss" in record else {})) + "\n" for record in LOG]
    assert plots.loss_curve(parse_log("".join(lines).encode(), "log")).startswith(b"\x89PNG")
