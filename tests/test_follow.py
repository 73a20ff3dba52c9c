"""tools/follow.py: what reaches each tracker, live and afterwards; TensorBoard for real (slow: it is not in requirements-dev.txt)."""

import json
import sys
from types import SimpleNamespace

import pytest

from tools import follow

START = {"event": "start", "config": {"lr": 0.1, "model": "bert"}}
END = {"event": "end", "step": 4, "seconds": 1.0}


def train(step, **more):
    return {"event": "train", "step": step, "loss": 1 / step, "mfu": None, **more}


def write(path, *records, rest=""):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + rest)


@pytest.fixture
def log(tmp_path):
    return tmp_path / "mine" / "log.jsonl"


@pytest.fixture
def tracker(monkeypatch):
    """The calls that a stand-in for every tracker's package received."""
    calls = []

    def call(name):
        return lambda *args, **kwargs: calls.append((name, *args, kwargs))

    names = ("init", "log", "finish", "start_run", "log_params", "log_metrics", "end_run", "add_scalar", "add_text", "close")
    module = SimpleNamespace(**{name: call(name) for name in names})
    module.SummaryWriter = lambda *args, **kwargs: call("SummaryWriter")(*args, **kwargs) or module
    for name in ("wandb", "trackio", "mlflow", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def eval_of(step):
    return {"event": "eval", "step": step, "loss": 2.5}


LOSSES = [({"train/loss": 1.0}, {"step": 1}), ({"train/loss": 0.5}, {"step": 2}), ({"eval/loss": 2.5}, {"step": 2})]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_wandb_and_trackio(name, log, tracker, capsys):
    checkpoint = {"event": "checkpoint", "step": 2, "seconds": 3.0}
    write(log, START, train(1), train(2), eval_of(2), checkpoint, START, train(2), rest='{"event": "train", "st')
    follow.main([f"--log={log}", f"--to={name}"])
    assert tracker == [
        ("init", {"project": "mosaicbert", "name": "mine", "config": START["config"]}),
        *[("log", *call) for call in LOSSES], ("finish", {}),
    ]  # fmt: skip
    assert capsys.readouterr().out == f"{log}: {name} has it up to step 2\n"


def test_mlflow(log, tracker):
    write(log, START, train(1), train(2), eval_of(2))
    follow.main([f"--log={log}", "--to=mlflow"])
    assert tracker == [
        ("start_run", {"run_name": "mine"}), ("log_params", START["config"], {}),
        *[("log_metrics", *call) for call in LOSSES], ("end_run", {}),
    ]  # fmt: skip


def test_tensorboard_calls(log, tracker):
    write(log, START, train(1), eval_of(1))
    follow.main([f"--log={log}"])
    assert tracker[0] == ("SummaryWriter", str(log.parent / "tensorboard"), {"purge_step": 0}) and tracker[1][0] == "add_text"
    assert tracker[2:] == [("add_scalar", "train/loss", 1.0, 1, {}), ("add_scalar", "eval/loss", 2.5, 1, {}), ("close", {})]


@pytest.mark.slow
def test_tensorboard_itself(log):
    from tensorboard.backend.event_processing import event_accumulator as reader

    write(log, START, train(1), train(2), eval_of(2))
    for _ in range(2):  # the second call replaces what the first one wrote
        follow.main([f"--log={log}"])
    events = reader.EventAccumulator(str(log.parent / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["train/loss", "eval/loss"]
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1.0), (2, 0.5)]


def test_live_follows_until_the_end_through_a_resume(log, tracker, monkeypatch):
    crashed = [START, train(1), train(2)]
    resumed = [START, train(1), START, train(2), train(3)]  # the log was cut back to the checkpoint of step 1
    states = [crashed, resumed, [*resumed, {"event": "stop", "step": 3}], [*resumed, START, train(4), END]]
    write(log, *states.pop(0))
    monkeypatch.setattr(follow.time, "sleep", lambda seconds: write(log, *states.pop(0)))
    follow.main([f"--log={log}", "--to=wandb", "--live"])
    assert [call[2]["step"] for call in tracker if call[0] == "log"] == [1, 2, 3, 4] and not states
    assert tracker[-1] == ("finish", {})


def test_ctrl_c_finishes_the_trackers_run(log, tracker, monkeypatch):
    def interrupt(seconds):
        raise KeyboardInterrupt

    write(log, START, train(1))
    monkeypatch.setattr(follow.time, "sleep", interrupt)
    with pytest.raises(SystemExit):
        follow.main([f"--log={log}", "--to=wandb", "--live"])
    assert tracker[-1] == ("finish", {})


def test_mistakes(log, tracker, monkeypatch, capsys):
    def refused(*argv):
        with pytest.raises(SystemExit) as stopped:
            follow.main(argv)
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and error.count("\n") == 1
        return error

    assert "not the log.jsonl of a run" in refused(f"--log={log}")
    write(log)
    assert "not the log.jsonl of a run" in refused(f"--log={log}")
    write(log, START, train(1))
    (log.parent / "config.json").write_text("{}")
    assert "config.json: not the log.jsonl of a run" in refused(f"--log={log.parent}/config.json")
    assert "did you mean wandb?" in refused(f"--log={log}", "--to=wandbb")
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    assert "--to=wandb: import of wandb halted" in (line := refused(f"--log={log}", "--to=wandb"))
    assert "(pip install wandb, if it is missing" in line
    sys.modules["trackio"].init = lambda **_: 1 / 0
    assert "--to=trackio: division by zero (pip install trackio, if it is missing; --debug shows where)" in refused(f"--log={log}", "--to=trackio")
