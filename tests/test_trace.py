"""common/trace.py: the option, the trace, and the time the GPU is busy."""

import gzip
import json

import pytest

import train
from common.options import UserError
from common.trace import busy_seconds, first_and_last
from tests.toy import make_shards, read_log, toy_argv


def test_busy_time_is_the_union_of_intervals():
    def event(start, length, category="kernel", phase="X"):
        return {"ph": phase, "cat": category, "ts": start, "dur": length}

    events = [
        event(100.0, 50.0),
        event(120.0, 10.0, "gpu_memcpy"),  # inside the first
        event(140.0, 30.0, "gpu_memset"),  # overlaps its end
        event(200.0, 5.0),
        event(0.0, 1000.0, "cpu_op"),
        event(0.0, 1000.0, "kernel", "f"),  # a flow arrow to a kernel
        {"ph": "M", "name": "process_name"},
    ]
    assert busy_seconds(events) == pytest.approx(75e-6)
    assert busy_seconds(events[::-1]) == pytest.approx(75e-6)
    assert busy_seconds([]) == 0


@pytest.mark.parametrize("option", ["3", "4:2", "0:2", "a:b", "1:2:3", "-1:2"])
def test_bad_options_are_refused(option):
    with pytest.raises(UserError, match="the first and the last step"):
        first_and_last(option)


@pytest.mark.parametrize("option, traced", [("2:3", True), ("4:9", True), ("7:8", False)])
def test_a_run_is_traced_and_unchanged(option, traced, tmp_path, capsys):
    """Steps in the middle, past the last step, and never reached; the losses are the same as without a trace."""
    out, data_dir = tmp_path / "run", make_shards(tmp_path / "shards")
    train.main(toy_argv(data_dir, out, max_steps=5, profile=option))
    path = out / f"trace_{option.replace(':', '_')}.json.gz"
    assert path.exists() == traced == (f"trace in {path}" in (printed := capsys.readouterr().out))
    assert f"steps {option}: " in printed
    if traced:
        names = [event.get("name") for event in json.load(gzip.open(path))["traceEvents"]]
        assert "aten::mm" in names
    train.main(toy_argv(data_dir, tmp_path / "plain", max_steps=5))
    assert [r["loss"] for r in read_log(out)] == [r["loss"] for r in read_log(tmp_path / "plain")]
