"""Runs shared out among processes: order, locks, resume, and what a run that fails does to the others."""

import atexit
import dataclasses
import errno
import fcntl
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest
import torch

from common.options import UserError, command
from common.run_queue import finish, log_path, result, work
from tests.ranks import descendants
from tests.toy import ROOT


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
    """Does a run by writing down its name, or by failing as the name begins."""

    done = []

    def run(self, run, log, say):
        if run.name == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if run.name.startswith("mistaken"):
            raise UserError("a mistake (fix it)")
        if run.name == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "disk")
        if run.name.startswith("slow"):
            time.sleep(60)
        if run.name == "large" and multiprocessing.parent_process() and not os.path.exists("alone"):
            open("alone", "w").close()
            atexit.register(time.sleep, 3)  # ends after the others, which have done all runs by then
            raise torch.AcceleratorError("CUDA error: out of memory")
        if run.name == "larger":
            raise torch.OutOfMemoryError("CUDA out of memory")
        if run.name == "lost":
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nSearch for ...")
        if run.name == "asserted":
            raise torch.AcceleratorError("CUDA error: device-side assert triggered")
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
    with pytest.raises(UserError, match="c.jsonl: holds a run with different number"):
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


@pytest.mark.parametrize(
    "name, says",
    [
        ("killed", "killed by SIGKILL"),
        ("mistaken", "a mistake (fix it)"),
        ("full", "No space left on device"),
        ("lost", "lost: CUDA error: an illegal memory access was encountered (with MPS a killed process"),
    ],
)
def test_a_job_that_fails_ends_all(tmp_path, name, says, capfd):
    with pytest.raises((UserError, OSError)) as error:
        finish(str(tmp_path), [Run(name), Run("slow"), Run("c")], Worker, 2)
    assert says in str(error.value) and not capfd.readouterr().err


def test_a_job_without_memory_leaves_its_run_to_the_others(tmp_path, capfd, monkeypatch):
    """One of 24 jobs that shared a GPU ended them all, and with them, under MPS, those of other suites."""
    monkeypatch.chdir(tmp_path)
    runs = [Run("large"), Run("b"), Run("c")]
    finish("runs", runs, Worker, 2)
    assert all(result("runs", run) for run in runs)
    assert "out of GPU memory with " in capfd.readouterr().out


def test_a_fault_of_a_kernel_keeps_its_traceback(tmp_path, capfd):
    with pytest.raises(torch.AcceleratorError, match="device-side assert"):
        finish(str(tmp_path), [Run("asserted")], Worker, 1)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_run_that_fits_nowhere_is_one_error(tmp_path, jobs):
    with pytest.raises(UserError, match=r"^out of GPU memory \(lower --batch_size"):
        finish(str(tmp_path), [Run("larger"), Run("b")], Worker, jobs)


def test_jobs_that_fail_together_end_in_one_line(tmp_path, capfd):
    """Each printed its own, and one time in five torch.multiprocessing raised a TypeError."""
    with pytest.raises(SystemExit) as status:
        command(lambda _: finish(str(tmp_path), [Run("mistaken"), Run("mistaken too")], Worker, 2))([])
    assert status.value.code == 2 and capfd.readouterr().err == "error: a mistake (fix it)\n"


def hear_ctrl_c():
    """A shell starts what runs in its background with SIGINT ignored, and so the tests, and so what they start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def to_workers(pid, number):
    """As `timeout` sends it to all of them, in any order."""
    for child in descendants(pid):
        os.kill(child, number)


@pytest.mark.parametrize("send, number", [(os.killpg, signal.SIGINT), (os.kill, signal.SIGTERM), (to_workers, signal.SIGTERM)])
def test_a_signal_ends_jobs_in_one_line(tmp_path, send, number):
    code = (
        "from common.options import command; from common.run_queue import finish\n"
        "from tests.test_run_queue import Run, Worker\n"
        "if __name__ == '__main__':\n"
        f"    command(lambda _: finish({str(tmp_path / 'runs')!r}, [Run('a'), Run('slow'), Run('slower')], Worker, 2))([])\n"
    )
    (tmp_path / "suite.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(
        [sys.executable, "suite.py"], cwd=tmp_path, env=environment, start_new_session=True, preexec_fn=hear_ctrl_c, **pipes
    )
    while not (tmp_path / "runs" / "slower.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.05)
    # A terminal sends Ctrl-C to all of them, `kill` SIGTERM to one.
    send(process.pid, number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number and output.splitlines()[1:] == [
        "stopped; 1 of 3 runs finished and kept; the others start again with the same command"
    ]
