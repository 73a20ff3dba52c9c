"""Runs shared out among processes: order, locks, resume, and what a run that fails does to the others."""

import dataclasses
import fcntl
import json
import os
import signal
from dataclasses import dataclass

import pytest

from common.options import UserError
from common.run_queue import finish, log_path, result, work


@dataclass(frozen=True)
class Run:
    name: str
    cost: float = 1.0
    after: str = ""
    artifact: str = ""
    number: int = 0

    @property
    def identity(self):
        return {"number": self.number}


class Worker:
    """Does a run by writing down its name, or by failing as the name says."""

    done = []

    def run(self, run, log, say):
        if run.name == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if run.name == "mistaken":
            raise UserError("a mistake (fix it)")
        self.done.append(run.name)
        log.write(json.dumps({"event": "start", "identity": run.identity}) + "\n")
        log.write(json.dumps({"event": "end", "pid": os.getpid()}) + "\n")
        if run.artifact:
            open(run.artifact, "w").close()
        return f"{run.name} done"


@pytest.fixture
def done():
    Worker.done.clear()
    return Worker.done


def test_a_run_waits_for_the_one_that_it_starts_from(tmp_path, done, capsys):
    finish(str(tmp_path / "runs"), [Run("b", after="c"), Run("a", cost=5.0), Run("c")], Worker, 1)
    assert done == ["a", "c", "b"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("a done | 1 of 3 runs, about") and lines[2] == "b done | 3 of 3 runs"


def test_only_what_is_unfinished_is_done(tmp_path, done):
    runs = [Run("a"), Run("b"), Run("c")]
    work(str(tmp_path), runs, Worker)
    log = tmp_path / "b.jsonl"
    log.write_text(log.read_text()[:-9])  # as a kill leaves it
    done.clear()
    work(str(tmp_path), runs, Worker)
    assert done == ["b"]
    kept = dataclasses.replace(runs[2], artifact=str(tmp_path / "kept"))  # its artifact was not asked for, then
    assert result(str(tmp_path), runs[2]) and not result(str(tmp_path), kept)
    work(str(tmp_path), [kept], Worker)
    assert done == ["b", "c"] and result(str(tmp_path), kept)
    with pytest.raises(UserError, match="c.jsonl: holds a run with another number"):
        work(str(tmp_path), [Run("c", number=1)], Worker)


def test_a_run_that_another_process_holds_is_left_to_it(tmp_path, done, monkeypatch):
    runs = [Run("a"), Run("b")]

    def other_finishes(_):
        assert done == ["b"]
        held.write('{"event": "start", "identity": {"number": 0}}\n{"event": "end"}\n')
        held.close()

    monkeypatch.setattr("common.run_queue.time.sleep", other_finishes)
    held = open(log_path(str(tmp_path), runs[0]), "a")
    fcntl.flock(held, fcntl.LOCK_EX)
    work(str(tmp_path), runs, Worker)
    assert done == ["b"]


@pytest.mark.parametrize("name, says", [("killed", "killed by SIGKILL"), ("mistaken", None)])
def test_a_job_that_fails_ends_all(tmp_path, name, says, capfd):
    with pytest.raises(UserError if says else SystemExit) as error:
        finish(str(tmp_path), [Run(name), Run("b"), Run("c")], Worker, 2)
    if says:
        assert says in str(error.value)
    else:
        assert error.value.code == 2 and "error: a mistake (fix it)\n" in capfd.readouterr().err
