"""What breaks in a night of training, provoked on purpose. Longer versions: studies/torture.py, studies/soak.py."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import checkpoint
import data
import train
from common import run_directory
from common.options import UserError
from common.run_directory import RunDirectory
from tests import faults
from tests.ranks import Ranks, run_ranks
from tests.toy import ROOT, files_of, make_documents, make_shards, read_log, reseal, toy_argv, train_command, train_environment

SMALL = {"num_layers": 1, "hidden_size": 8, "num_heads": 1, "intermediate_size": 8}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """With models this small, more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("toy") / "shards")


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory):
    """A small finished run; tests damage a copy."""
    out = tmp_path_factory.mktemp("finished") / "run"
    train.main(toy_argv(data_dir, out, **SMALL))
    return out


def losses(out):
    return [(r["step"], r["loss"], r["grad_norm"]) for r in read_log(out)]


def fails(argv, capsys, main=train.main):
    """Run main, which must exit with status 2 after one error line. Returns what it wrote to stderr."""
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    captured = capsys.readouterr()
    assert stopped.value.code == 2 and captured.err.count("error: ") == 1, captured.err
    return captured.err


# ---------------------------------------------------------------------------------------------------------------------
# Non-finite updates


@pytest.mark.parametrize("count, max_steps", [(3, 12), pytest.param(20, 60, marks=pytest.mark.slow)])
def test_all_ranks_skip_non_finite_updates(data_dir, tmp_path, count, max_steps):
    """NaN losses at random (step, rank) pairs: counted, ranks stay bit-equal, and resuming in between changes nothing."""
    rng = random.Random(count)
    steps = sorted(rng.sample(range(2, max_steps), count))
    ranks = [rng.randrange(2) for _ in steps]
    by_rank = {r: [step for step, rank in zip(steps, ranks) if rank == r] for r in range(2)}
    outputs = {}
    for name in ("straight", "resumed"):
        notes = tmp_path / f"{name}_notes"
        notes.mkdir()
        break_ranks = {
            rank: partial(faults.together, partial(faults.nan_at, by_rank[rank]), partial(faults.note_weights, notes))
            for rank in range(2)
        }
        argv = toy_argv(data_dir, tmp_path / name, max_steps=max_steps, checkpoint_interval=1, keep_checkpoints=max_steps)
        for start in range(2 if name == "resumed" else 1):
            statuses, outputs[name] = run_ranks(argv, 2, tmp_path / "output", break_ranks)
            assert statuses == [0, 0], outputs[name]
            if name == "resumed" and start == 0:  # as if killed after a skipped step
                for step in range(steps[1] + 1, max_steps + 1):
                    shutil.rmtree(tmp_path / name / f"step_{step:08d}")
        for step in range(1, max_steps + 1):
            assert (notes / f"{step}.0").read_text() == (notes / f"{step}.1").read_text()
        weights = [(notes / f"{step}.0").read_text() for step in range(2, max_steps + 1)]  # step 1 has a learning rate of 0
        unchanged = [before == after for before, after in zip(weights, weights[1:])]
        assert unchanged == [step in steps for step in range(3, max_steps + 1)]
    (final,) = [record["skipped"] for record in read_log(tmp_path / "straight") if record["step"] == max_steps]
    assert final == count
    skipped = read_log(tmp_path / "straight", "skipped")
    assert [(record["step"], record["ranks"]) for record in skipped] == [(s, [r]) for s, r in zip(steps, ranks)]
    samples = data.Samples(data_dir, "train", 32)
    for record in skipped:  # half of the step's samples, those on that rank
        ids = samples.order(np.arange((record["step"] - 1) * 16, record["step"] * 16), 17)[0]
        parts = samples.parts(ids, 10_000, record["ranks"][0], 2)
        assert record["samples"] == np.concatenate([ids[part] for part in parts]).tolist()
        text = f"step {record['step']}: update skipped, the gradient norm is nan, the loss nan on rank {record['ranks'][0]}"
        assert text in outputs["straight"]
    last = f"step_{max_steps:08d}"
    straight, resumed = files_of(tmp_path / "straight" / last), files_of(tmp_path / "resumed" / last)
    assert straight["model.safetensors"] == resumed["model.safetensors"]
    assert straight["optimizer.safetensors"] == resumed["optimizer.safetensors"]
    assert losses(tmp_path / "straight") == losses(tmp_path / "resumed")
    assert not any(math.isnan(loss) for _, loss, _ in losses(tmp_path / "straight") if loss is not None)


def test_too_many_skipped_updates_in_a_row_end_the_run(data_dir, tmp_path, capsys, monkeypatch):
    forward, calls = train.MaskedLM.forward, []

    def poisoned(self, *batch):
        calls.append(1)
        return forward(self, *batch) * (math.inf if 6 <= len(calls) <= 15 or len(calls) >= 20 else 1)

    monkeypatch.setattr(train.MaskedLM, "forward", poisoned)
    out = tmp_path / "run"
    line = fails(toy_argv(data_dir, out, max_steps=60, log_interval=7), capsys)
    assert "step 30: 11 updates in a row were not finite" in line  # ten in a row, 6 to 15, are allowed
    assert checkpoint.steps(out) == [28, 24] and checkpoint.damage(out / "step_00000028") is None
    weights = [checkpoint.read_tensors(out / f"step_{step:08d}", "model.safetensors") for step in (24, 28)]
    assert all(torch.equal(weights[0][name], weights[1][name]) and weights[0][name].isfinite().all() for name in weights[0])
    assert read_log(out, "train")[-1]["loss"] is None and "NaN" not in (out / "log.jsonl").read_text()


def test_gradient_clipping(data_dir, tmp_path, monkeypatch):
    """The optimizer gets the same direction at the requested norm; the log holds the norm before clipping."""
    seen, step = [], torch.optim.AdamW.step

    def record(self, *args, **kwargs):
        seen.append(torch.cat([p.grad.flatten().clone() for group in self.param_groups for p in group["params"]]))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    for name, norm in (("free", 0), ("clipped", 0.1)):
        train.main(toy_argv(data_dir, tmp_path / name, max_steps=1, max_grad_norm=norm))
    free, clipped = seen
    assert free.norm() > 0.1 and clipped.norm() == pytest.approx(0.1, rel=1e-4)
    torch.testing.assert_close(clipped / clipped.norm(), free / free.norm())
    norms = [read_log(tmp_path / name)[0]["grad_norm"] for name in ("free", "clipped")]
    assert norms[0] == norms[1] == pytest.approx(free.norm().item(), rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Signals


def wait_for(ranks, text):
    while text not in ranks.output():
        assert ranks.alive(), ranks.output()
        time.sleep(0.002)


@pytest.mark.parametrize("number, to", [(signal.SIGTERM, [0, 1]), (signal.SIGINT, [1]), (signal.SIGUSR1, [0])])
def test_a_signal_to_one_rank_stops_all_after_the_same_step(data_dir, tmp_path, number, to):
    out = tmp_path / "run"
    argv = toy_argv(data_dir, out, max_steps=10_000, eval_interval=0, checkpoint_interval=10_000)
    ranks = Ranks(argv, 2, tmp_path)
    wait_for(ranks, "step 5/")
    sent = time.monotonic()
    ranks.signal(number, to)
    statuses = ranks.wait()
    assert statuses == [128 + number] * 2, ranks.output()
    assert time.monotonic() - sent < 10  # generous for a busy machine; studies/torture.py measures
    (step,) = checkpoint.steps(out)
    assert checkpoint.damage(out / f"step_{step:08d}") is None
    assert f"stopped after step {step} on request" in ranks.output() and read_log(out, "stop")[0]["step"] == step


def test_ddp_is_freed_before_its_process_group(data_dir, tmp_path):
    """Freed after it, it joins Gloo's thread with the GIL held, and one stop in 75 on a busy machine hung forever."""
    fault = dict.fromkeys(range(2), faults.note_end_of_ddp)
    ranks = Ranks(toy_argv(data_dir, tmp_path / "run", max_steps=10_000, eval_interval=0), 2, tmp_path, fault)
    wait_for(ranks, "step 5/")
    ranks.signal(signal.SIGTERM)
    assert ranks.wait() == [143, 143] and ranks.output().count("model freed first") == 2, ranks.output()
    statuses, output = run_ranks(toy_argv(data_dir, tmp_path / "finished", max_steps=3), 2, tmp_path, fault)
    assert statuses == [0, 0] and output.count("model freed first") == 2, output


@pytest.mark.parametrize("max_steps", [9, 5])
def test_a_signal_during_evaluation(data_dir, tmp_path, max_steps):
    """The evaluation is abandoned, and made up for on resume, even after the last step."""
    options = {"max_steps": max_steps, "eval_interval": 5, "micro_batch_tokens": 80}
    slow = dict.fromkeys(range(2), partial(faults.slow_evaluation, 0.4))  # 8 batches on rank 0, 7 on rank 1
    ranks = Ranks(toy_argv(data_dir, tmp_path / "run", **options), 2, tmp_path, slow)
    wait_for(ranks, "step 5/")
    time.sleep(0.5)
    ranks.signal(signal.SIGTERM, [1])
    assert ranks.wait() == [143, 143], ranks.output()
    assert checkpoint.steps(tmp_path / "run")[0] == 5 and read_log(tmp_path / "run", "eval") == []
    # Again, during the evaluation that makes up for it: training must not start before that is done.
    slower = dict.fromkeys(range(2), partial(faults.together, slow[0], partial(faults.slow_watch, 1.5)))
    ranks = Ranks(toy_argv(data_dir, tmp_path / "run", **options), 2, tmp_path, slower)
    while len(read_log(tmp_path / "run", "start")) == 1:
        assert ranks.alive(), ranks.output()
        time.sleep(0.01)
    time.sleep(0.5)
    ranks.signal(signal.SIGUSR1, [0])
    assert ranks.wait() == [138, 138], ranks.output()
    assert checkpoint.steps(tmp_path / "run")[0] == 5 and read_log(tmp_path / "run", "eval") == []
    for out in ("run", "straight"):
        statuses, output = run_ranks(toy_argv(data_dir, tmp_path / out, **options), 2, tmp_path)
        assert statuses == [0, 0], output
    evals = [[(r["step"], r["loss"]) for r in read_log(tmp_path / out, "eval")] for out in ("run", "straight")]
    assert evals[0] == evals[1] and losses(tmp_path / "run") == losses(tmp_path / "straight")


def test_a_signal_in_start_up_and_a_second_interrupt_exit_immediately(data_dir, tmp_path):
    out = tmp_path / "run"
    ranks = Ranks(toy_argv(data_dir, out, max_steps=9), 1, tmp_path, {0: partial(faults.slow_start, 60)})
    wait_for(ranks, "starting slowly")
    ranks.signal(signal.SIGUSR1)
    assert ranks.wait(20) == [138] and not checkpoint.steps(out)
    ranks = Ranks(toy_argv(data_dir, out, max_steps=9), 1, tmp_path, {0: partial(faults.hang_at, 3)})
    wait_for(ranks, "step 2/")
    ranks.signal(signal.SIGINT)
    time.sleep(0.3)
    ranks.signal(signal.SIGINT)  # too soon to count as a second one: launchers like `timeout -s INT` forward it again
    time.sleep(1)
    assert ranks.alive()  # waiting for its step to end
    ranks.signal(signal.SIGINT)
    assert ranks.wait(20) == [130]


def test_a_second_sigterm_ends_an_unfinished_step(data_dir, tmp_path):
    """On a CPU a step can last for hours, and only Ctrl-C or SIGKILL ended it."""
    faulty = partial(faults.together, partial(faults.hang_at, 3), partial(faults.same_signal_within, 2))
    ranks = Ranks(toy_argv(data_dir, tmp_path / "run", max_steps=9), 2, tmp_path, dict.fromkeys(range(2), faulty))
    wait_for(ranks, "step 2/")
    ranks.signal(signal.SIGTERM)
    wait_for(ranks, "SIGTERM: stopping after this step, with a checkpoint (Ctrl-C, or SIGTERM again after 2 s: at once, without one)")
    ranks.signal(signal.SIGTERM)  # as torchrun and `timeout` repeat it
    time.sleep(3)
    assert ranks.alive()
    ranks.signal(signal.SIGTERM)
    assert ranks.wait(20) == [143, 143]
    assert ranks.output().count("SIGTERM again: the unfinished step is abandoned; the same command resumes from the newest checkpoint") == 1


def test_a_second_sigterm_does_not_end_a_save(data_dir, tmp_path):
    faulty = partial(faults.together, partial(faults.slow_write, 3), partial(faults.same_signal_within, 0.5))
    argv = toy_argv(data_dir, tmp_path / "run", max_steps=10_000, eval_interval=0, checkpoint_interval=10_000)
    ranks = Ranks(argv, 1, tmp_path, {0: faulty})
    wait_for(ranks, "step 5/")
    ranks.signal(signal.SIGTERM)
    time.sleep(1.5)
    assert ranks.alive() and not checkpoint.steps(tmp_path / "run")
    ranks.signal(signal.SIGTERM)
    assert ranks.wait(20) == [143] and len(checkpoint.steps(tmp_path / "run")) == 1, ranks.output()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_under_torchrun(data_dir, tmp_path, number):
    """torchrun forwards signals and waits; its own exit status is 1."""
    out = tmp_path / "run"
    command = train_command(toy_argv(data_dir, out, max_steps=10_000, eval_interval=0, checkpoint_interval=10_000), 2)
    if number == signal.SIGUSR1:
        command.insert(command.index("--standalone"), "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1")
    with open(tmp_path / "output", "w") as output:
        running = subprocess.Popen(command, env=train_environment(), stdout=output, stderr=output)
    while "step 5/" not in (tmp_path / "output").read_text():
        assert running.poll() is None
        time.sleep(0.01)
    running.send_signal(number)
    assert running.wait(30) == 1
    (step,) = checkpoint.steps(out)
    assert checkpoint.damage(out / f"step_{step:08d}") is None
    assert f"stopped after step {step}" in (tmp_path / "output").read_text()


# ---------------------------------------------------------------------------------------------------------------------
# Ranks that hang, die or differ


def test_a_hanging_rank_ends_the_run_and_is_named(data_dir, tmp_path):
    out = tmp_path / "run"
    argv = toy_argv(data_dir, out, max_steps=20, hang_timeout=3)
    started = time.monotonic()
    statuses, output = run_ranks(argv, 2, tmp_path, {1: partial(faults.hang_at, 7)}, timeout=60)
    assert statuses == [3, 3], output
    assert time.monotonic() - started < 3 + 30
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    says = "no progress for 3 s: rank 1 is behind, last seen at step 7 after 0 forward passes; others are at 7 after 1"
    assert says in line
    assert checkpoint.newest(out).endswith("step_00000004")
    statuses, output = run_ranks(argv, 2, tmp_path)
    assert statuses == [0, 0] and f"resuming from {out}/step_00000004" in output


def test_a_rank_stuck_with_the_gil_exits_and_dumps_its_stack(data_dir, tmp_path):
    argv = toy_argv(data_dir, tmp_path / "run", max_steps=50, hang_timeout=2)
    statuses, output = run_ranks(argv, 2, tmp_path, {1: partial(faults.freeze_at, 7, notice_after=2)}, timeout=60)
    assert statuses == [3, 1], output
    assert "no progress for 2 s: rank 1 is behind" in output
    assert "Timeout (0:00:04)!" in output and 'faults.py", line' in output


def test_a_dying_rank_ends_the_run(data_dir, tmp_path):
    argv = toy_argv(data_dir, tmp_path / "run", max_steps=50)
    statuses, output = run_ranks(argv, 2, tmp_path, {1: partial(faults.die_at, 7)}, timeout=60)
    assert statuses == [3, -9], output
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "lost contact with another process: rank 1 is behind, last seen at step" in line and "Traceback" not in output


@pytest.mark.parametrize(
    "error, status, says",
    [
        (torch.OutOfMemoryError(), 2, "error: out of GPU memory with micro_batch_tokens=100 (try --micro_batch_tokens=50)"),
        (ValueError("a bug"), 1, "ValueError: a bug"),
    ],
)  # fmt: skip
def test_a_rank_that_fails_alone_reports_why_and_exits_immediately(data_dir, tmp_path, error, status, says):
    started = time.monotonic()
    argv = toy_argv(data_dir, tmp_path / "run", max_steps=50, micro_batch_tokens=100, hang_timeout=50)
    statuses, output = run_ranks(argv, 2, tmp_path, {1: partial(faults.raise_at, 7, error)}, timeout=60)
    assert statuses == [3, status] and time.monotonic() - started < 30
    assert output.count(says) == 1 and "lost contact" not in output  # rank 0 knows it was reported


def test_an_error_on_all_ranks_loses_no_checkpoint_and_is_reported_once(data_dir, tmp_path):
    """torchrun kills all ranks when the first one exits, so rank 1 must wait until rank 0 has saved and reported."""
    out, bad = tmp_path / "run", partial(faults.nan_at, range(5, 50))
    slow = {0: partial(faults.together, bad, partial(faults.slow_write, 1)), 1: bad}
    ranks = Ranks(toy_argv(data_dir, out, max_steps=50), 2, tmp_path, slow)
    ranks.processes[1].join()
    assert ranks.output().count("error: step 15: 11 updates in a row were not finite") == 1
    assert checkpoint.steps(out)[0] == 12 and ranks.wait() == [2, 2]


@pytest.mark.slow
def test_how_two_processes_end(tmp_path):
    """studies/gpu_faults.py at toy size."""
    from studies import gpu_faults

    gpu_faults.main(["--toy", f"--out={tmp_path}/ended"])


def test_ranks_started_with_different_options_do_not_train(data_dir, tmp_path):
    """As when one of two hosts has an older config file."""
    out = tmp_path / "run"
    faulty = {1: partial(faults.another_option, lr=1e-4)}
    statuses, output = run_ranks(toy_argv(data_dir, out, lr=1e-3), 2, tmp_path, faulty, timeout=60)
    assert statuses == [2, 2] and not checkpoint.steps(out)
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "rank 1 has lr=0.0001, rank 0 lr=0.001 (all hosts need the same command" in line


def test_ranks_that_differ_in_one_bit_are_found_before_the_next_checkpoint(data_dir, tmp_path):
    out = tmp_path / "run"
    argv = toy_argv(data_dir, out, max_steps=50, lr=1e-9)
    statuses, output = run_ranks(argv, 2, tmp_path, {1: partial(faults.one_ulp_at, 6)}, timeout=60)
    assert statuses == [2, 2], output
    assert "error: step 8: the parameters of rank 1 differ" in output
    assert checkpoint.steps(out) == [4]


@pytest.mark.slow
def test_four_two_and_eight_processes(data_dir, tmp_path):
    """Same samples and masks, so the same losses, and a final loss within 1e-3 of the run on four processes throughout."""
    options = {"hidden_dropout": 0, "max_steps": 30, "checkpoint_interval": 10, "eval_interval": 10}
    statuses, output = run_ranks(toy_argv(data_dir, tmp_path / "fixed", **options), 4, tmp_path, timeout=300)
    assert statuses == [0] * 4, output
    out = tmp_path / "changing"
    for processes, step in ((4, 20), (2, 30), (8, None)):
        statuses, output = run_ranks(toy_argv(data_dir, out, **options), processes, tmp_path, timeout=300)
        assert statuses == [0] * processes, output
        if step:  # as if killed after this step
            for later in range(step, 31, 10):
                shutil.rmtree(out / f"step_{later:08d}", ignore_errors=True)
    assert [start["world_size"] for start in read_log(out, "start")] == [4, 2, 8]
    assert [step for step, _, _ in losses(out)] == list(range(1, 31))
    fixed = [loss for _, loss, _ in losses(tmp_path / "fixed")]
    assert [loss for _, loss, _ in losses(out)] == pytest.approx(fixed, rel=1e-4)
    evals = [read_log(run, "eval")[-1]["loss"] for run in (out, tmp_path / "fixed")]
    assert evals[0] == pytest.approx(evals[1], rel=1e-3)
    for run in (out, tmp_path / "fixed"):
        assert [record["samples"] for record in read_log(run)] == [16 * step for step in range(1, 31)]
    assert [r["tokens"] for r in read_log(out)] == [r["tokens"] for r in read_log(tmp_path / "fixed")]


# ---------------------------------------------------------------------------------------------------------------------
# Damaged and hostile checkpoints


def damages(contents, rng, count, kind):
    """Yield (description, contents) for `count` damaged versions of a file: one bit flipped, or truncated."""
    for _ in range(count):
        if kind == "flip":
            byte, bit = rng.randrange(len(contents)), rng.randrange(8)
            yield f"bit {bit} of byte {byte}", contents[:byte] + bytes([contents[byte] ^ 1 << bit]) + contents[byte + 1 :]
        else:
            length = rng.randrange(len(contents))
            yield f"truncated to {length} bytes", contents[:length]


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["flip", "truncation"])
def test_every_flipped_bit_and_truncation_is_found(finished, tmp_path, capsys, kind, count):
    """In every file of a checkpoint: named in one line, and the previous checkpoint is taken."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    newest, before = run / "step_00000010", run / "step_00000008"
    names, rng, done = sorted(path.name for path in newest.iterdir()), random.Random(count), 0
    assert len(names) == 6 and checkpoint.newest(run) == str(newest)
    for i, name in enumerate(names):
        contents = (newest / name).read_bytes()
        for what, damaged in damages(contents, rng, count // 6 + (i < count % 6), kind):
            (newest / name).write_bytes(damaged)
            assert checkpoint.newest(run) == str(before), (name, what)
            err = capsys.readouterr().err
            assert err.startswith(f"warning: {newest}/") and err.count("\n") == 1, (name, what, err)
            assert name in err or name == "digests.json", (name, what, err)
            with pytest.raises(UserError, match=str(newest)):
                checkpoint.find(newest)
            done += 1
        (newest / name).write_bytes(contents)
    assert done == count and checkpoint.newest(run) == str(newest)


def other_damage(path, kind):
    weights, optimizer = path / "model.safetensors", path / "optimizer.safetensors"
    if kind == "missing":
        weights.unlink()
    elif kind == "no digests":
        (path / "digests.json").unlink()
    elif kind == "zeros":
        weights.write_bytes(bytes(weights.stat().st_size))
    elif kind == "swapped":
        contents = weights.read_bytes()
        weights.write_bytes(optimizer.read_bytes())
        optimizer.write_bytes(contents)
    elif kind == "extra":
        (path / "extra.pt").write_bytes(b"x")
    elif kind == "foreign digests":
        (path / "digests.json").write_text('{"../../etc/passwd": {"bytes": 1, "sha256": "0"}}')
    elif kind == "deep digests":
        (path / "digests.json").write_text("[" * 100_000)
    elif kind == "list":
        (path / "digests.json").write_text("[]")
    elif kind == "empty":
        for file in path.iterdir():
            file.unlink()
    elif kind == "fifo":
        weights.unlink()
        os.mkfifo(weights)
    elif kind == "directory":
        weights.unlink()
        weights.mkdir()


KINDS = [
    "missing", "no digests", "zeros", "swapped", "extra", "foreign digests", "deep digests", "list", "empty", "fifo",
    "directory",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_other_damage_is_found(finished, tmp_path, capsys, kind, data_dir):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    other_damage(run / "step_00000010", kind)
    assert checkpoint.newest(run) == str(run / "step_00000008")
    assert capsys.readouterr().err.count("\n") == 1
    train.main(toy_argv(data_dir, run, **SMALL))  # resumes from there, and writes the damaged checkpoint again
    assert f"resuming from {run}/step_00000008" in capsys.readouterr().out
    rewritten, straight = files_of(run / "step_00000010"), files_of(finished / "step_00000010")
    assert rewritten["model.safetensors"] == straight["model.safetensors"]
    assert rewritten["optimizer.safetensors"] == straight["optimizer.safetensors"]


def test_a_damaged_later_checkpoint_does_not_push_out_a_good_one(data_dir, finished, tmp_path):
    """With keep_checkpoints=1 the damaged newest one is not the one kept."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "step_00000010" / "state.json").write_text("{}")
    shutil.copytree(run / "step_00000008", run / "step_00000009")
    checkpoint.remove_old(run, step=9, keep=1)
    assert checkpoint.steps(run) == [9]
    shutil.rmtree(run)
    shutil.copytree(finished, run)
    (run / "step_00000010" / "state.json").write_text("{}")
    train.main(toy_argv(data_dir, run, **SMALL, keep_checkpoints=1, checkpoint_interval=9))
    assert checkpoint.steps(run) == [10] and checkpoint.damage(run / "step_00000010") is None


def test_old_checkpoints_are_removed_only_after_the_new_one_verifies(data_dir, tmp_path, capsys, monkeypatch):
    """On a disk that stores something other than it was given."""
    write_file = checkpoint.write_file

    def lying(path, contents):
        late = "step_00000010" in str(path) and str(path).endswith("optimizer.safetensors")
        write_file(path, bytes(contents[:-1]) + bytes([contents[-1] ^ 1]) if late else contents)

    monkeypatch.setattr(checkpoint, "write_file", lying)
    line = fails(toy_argv(data_dir, tmp_path / "run"), capsys)
    assert "step_00000010/optimizer.safetensors: damaged, though just written" in line
    assert checkpoint.steps(tmp_path / "run") == [10, 8, 4]
    assert checkpoint.newest(tmp_path / "run").endswith("step_00000008")


def test_files_are_byte_for_byte_those_of_the_safetensors_library():
    tensors = {"b.x": torch.randn(3, 4), "a": torch.randn(()), 'é"q': torch.randn(5, 2).T, "z": torch.empty(0, 3)}
    expected = safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})
    assert checkpoint.safetensors_bytes(tensors).tobytes() == expected
    with pytest.raises(ValueError, match="a: a checkpoint holds float32"):
        checkpoint.safetensors_bytes({"a": torch.zeros(2, dtype=torch.bfloat16)})


@pytest.mark.gpu
def test_python_keeps_running_while_a_checkpoint_waits_for_the_gpu():
    tensors, copied = checkpoint.snapshot({"model": {"weight": torch.ones(1000, device="cuda")}})
    with copied:
        torch.cuda._sleep(2_000_000_000)  # clock cycles, about a second

    def pack():
        with copied:
            checkpoint.serialize(tensors, {})

    packing = threading.Thread(target=pack)
    packing.start()
    turns = 0
    while packing.is_alive():
        time.sleep(0.01)
        turns += 1
    assert turns > 10


@pytest.mark.gpu
def test_the_allocator_uses_expandable_segments():
    script = """
import torch
from common.processes import join
join("cuda", "auto", 0)
kept = torch.zeros(1000, device="cuda")
print(all(segment["is_expandable"] for segment in torch.cuda.memory_snapshot()))
"""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("ALLOC_CONF")}
    assert subprocess.check_output([sys.executable, "-c", script], cwd=ROOT, env=environment) == b"True\n"


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="counts threads in /proc")
@pytest.mark.parametrize("work, started", [("checkpoint.safetensors_bytes({'a': big})", 1), ("big.clone()", 2)])
def test_writing_starts_no_second_thread_pool(work, started):
    """PyTorch operators start a pool for each thread that calls them; with two, the training pool sleeps between operators."""
    script = f"""
import os, threading, torch, checkpoint
torch.set_num_threads(2)
big = torch.randn(10**6)
def work():
    {work}
    print(len(os.listdir("/proc/self/task")) - before)
before = len(os.listdir("/proc/self/task"))
threading.Thread(target=work).start()
"""
    assert subprocess.check_output([sys.executable, "-c", script], cwd=ROOT, env=train_environment()) == b"%d\n" % started


class Bomb:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "config.json", "tokenizer.json"])
def test_a_pickle_is_never_opened(finished, data_dir, tmp_path, capsys, name):
    run, canary = tmp_path / "run", tmp_path / "canary"
    shutil.copytree(finished, run)
    for step in (8, 10):
        path = run / f"step_{step:08d}"
        torch.save({"state": Bomb(canary)}, path / name)
        reseal(path)
    if name == "tokenizer.json":  # training reads that of the shards
        from tools import fill_mask

        fails([f"--checkpoint={run}", "--text=w1 [MASK]"], capsys, fill_mask.main)
    else:
        shutil.rmtree(run / "step_00000010")  # so that there is a step to do
        fails(toy_argv(data_dir, run, **SMALL), capsys)
    assert not canary.exists()


def test_paths_out_of_the_shard_directory_are_refused(tmp_path, capsys):
    """A manifest may only name files in its own directory."""
    shards = Path(make_shards(tmp_path / "shards"))
    shutil.copy(shards / "train_00000.bin", tmp_path / "train_00000.bin")
    manifest = json.loads((shards / "manifest.json").read_text())
    for name in ("../train_00000.bin", str(tmp_path / "train_00000.bin"), "a/../train_00000.bin", "", 3):
        manifest["shards"][0]["file"] = name
        (shards / "manifest.json").write_text(json.dumps(manifest))
        assert f"{shards}/manifest.json: " in fails(toy_argv(shards, tmp_path / "out"), capsys)


def test_format_versions(data_dir, tmp_path, capsys):
    """A run of format 1, which had no number yet, resumes; a run of a later format is refused with its number."""
    old = tmp_path / "old"
    shutil.copytree(ROOT / "tests" / "format_1", old)
    samples = data.Samples(data_dir, "train", 32)  # the digest depends on the tokenizers version that wrote tokenizer.json
    for path in (old, old / "step_00000004"):
        config = json.loads((path / "config.json").read_text())
        assert "format" not in config and "max_grad_norm" not in config
        config |= {"tokenizer_sha256": samples.tokenizer_sha256, "train_data": samples.digest}
        (path / "config.json").write_text(json.dumps(config))
    reseal(old / "step_00000004")
    options = {**SMALL, "schedule": "wsd"}
    train.main(toy_argv(data_dir, old, **options))
    assert f"resuming from {old}/step_00000004" in capsys.readouterr().out
    train.main(toy_argv(data_dir, tmp_path / "new", **options))
    for before, now in zip(losses(old), losses(tmp_path / "new"), strict=True):
        assert before == pytest.approx(now, rel=1e-4)  # its first steps were computed on another machine
    for step in (8, 10):
        path = tmp_path / "new" / f"step_{step:08d}"
        config = json.loads((path / "config.json").read_text())
        assert config["format"] == checkpoint.FORMAT == 3
        (path / "config.json").write_text(json.dumps({**config, "format": 4}))
        reseal(path)
    line = fails(toy_argv(data_dir, tmp_path / "new", **options), capsys)
    assert "step_00000010: checkpoint format 4, and this code reads 1 to 3 (use newer code)" in line


# ---------------------------------------------------------------------------------------------------------------------
# Full disks


def interrupted(data_dir, out, tmp_path, **options):
    """A run killed in step 11 of 20. The checkpoint of step 4 exists, that of step 8 may. Returns the run's argv."""
    argv = toy_argv(data_dir, out, max_steps=20, **options)
    assert run_ranks(argv, 1, tmp_path, {0: partial(faults.die_at, 11)})[0] == [-9]
    assert checkpoint.steps(out)[-1] == 4
    return argv


def test_files_half_written_by_a_killed_run_are_removed(tmp_path):
    (tmp_path / "step_00000004.tmp").mkdir()
    for name in ("config.json.71.tmp", "tokenizer.json.71.tmp", "log.jsonl.71.tmp", "mine.tmp"):
        (tmp_path / name).write_text("half")
    with RunDirectory(tmp_path) as run:
        run.begin(0, {}, "{}")
    assert set(os.listdir(tmp_path)) == {"config.json", "tokenizer.json", "log.jsonl", "mine.tmp"}


@pytest.mark.parametrize("on_save_error", ["stop", "continue"])
def test_a_full_disk_while_saving(data_dir, tmp_path, on_save_error):
    """File sizes are limited so that the log fits and a checkpoint does not."""
    out = tmp_path / "run"
    argv = interrupted(data_dir, out, tmp_path, on_save_error=on_save_error)
    kept = {step: files_of(out / f"step_{step:08d}") for step in checkpoint.steps(out)}
    statuses, output = run_ranks(argv, 1, tmp_path, {0: partial(faults.small_files, 50_000)})
    assert "checkpoint not saved: File too large (0.3" in output and "MB needed" in output
    assert "earlier ones are intact" in output
    assert {step: files_of(out / f"step_{step:08d}") for step in checkpoint.steps(out)} == kept
    assert not list(out.glob("*.tmp")) and "Traceback" not in output
    assert statuses == [2] and output.count("error: ") == 1, output
    if on_save_error == "continue":  # it trains to the end, and fails for want of the last checkpoint
        assert output.count("warning: ") >= 3 and read_log(out)[-1]["step"] == 20
        assert "trained to step 20, but its checkpoint was not written" in output
    for directory in (out, tmp_path / "straight"):  # with space again, it finishes like any other run
        statuses, output = run_ranks(toy_argv(data_dir, directory, max_steps=20), 1, tmp_path)
        assert statuses == [0], output
    weights = [files_of(directory / "step_00000020")["model.safetensors"] for directory in (out, tmp_path / "straight")]
    assert weights[0] == weights[1]
    assert losses(out) == losses(tmp_path / "straight")


@pytest.mark.parametrize("on_save_error", ["stop", "continue"])
def test_a_full_disk_while_logging(data_dir, tmp_path, capsys, monkeypatch, on_save_error):
    """Half a line fits. The half is removed, and with "continue" later lines are written once there is space."""
    out, lines = tmp_path / "run", []

    class Full(faults.HalfWriting):
        def write(self, line):
            lines.append(line)
            if len(lines) in (6, 7):
                self.file.write(line[:20])
                return 20
            return self.file.write(line)

    def open_log(path, mode="r", **options):
        return Full(open(path, mode, **options), None) if mode == "ab" else open(path, mode, **options)

    monkeypatch.setattr(run_directory, "open", open_log, raising=False)
    argv = toy_argv(data_dir, out, on_save_error=on_save_error, checkpoint_interval=100)
    if on_save_error == "stop":
        assert f"{out}/log.jsonl: No space left on device" in fails(argv, capsys)
        assert (out / "log.jsonl").read_bytes() == b"".join(lines[:5])
    else:
        train.main(argv)
        assert capsys.readouterr().err.count("No space left on device") == 2
        assert (out / "log.jsonl").read_bytes() == b"".join(lines[:5] + lines[7:])


def test_a_full_disk_while_preparing(tmp_path):
    """Nothing half-written remains, and the same command resumes once there is space."""
    rng = random.Random(0)
    for i in range(2):
        text = "\n".join(" ".join(f"w{rng.randrange(500)}" for _ in range(40)) for _ in range(800))
        (tmp_path / f"{i}.txt").write_text(text)
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(500))]
    (tmp_path / "vocab.txt").write_text("\n".join(vocab) + "\n")

    def run(out, fault=None):
        argv = [f"--source={tmp_path}/[01].txt", f"--tokenizer={tmp_path}/vocab.txt", f"--out={out}", "--workers=1"]
        ranks = Ranks(argv, 1, tmp_path / "output", {0: fault} if fault else None, script="prepare_c4")
        return ranks.wait(), ranks.output()

    for limit in (1_000, 60_000):  # too small for the tokenizer, for a shard
        statuses, output = run(tmp_path / "shards", partial(faults.small_files, limit))
        assert statuses == [2] and output.count("error: ") == 1 and "File too large" in output, output
        assert not (tmp_path / "shards" / "manifest.json").exists()
    assert run(tmp_path / "shards")[0] == run(tmp_path / "clean")[0] == [0]
    names = sorted(path.name for path in (tmp_path / "shards").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "clean").iterdir())
    for name in names:
        if name.endswith(".bin"):
            assert (tmp_path / "shards" / name).read_bytes() == (tmp_path / "clean" / name).read_bytes()


def test_disk_space_is_checked_at_the_start(data_dir, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage._replace(free=1_100_000))
    line = fails(toy_argv(data_dir, tmp_path / "run", keep_checkpoints=4), capsys)
    assert "1.10 MB free, but checkpoints will take 1.41 MB more (free some" in line  # 5 checkpoints of 12 bytes per parameter
    train.main(toy_argv(data_dir, tmp_path / "run", keep_checkpoints=2))


# ---------------------------------------------------------------------------------------------------------------------
# Damaged shards


@pytest.mark.parametrize("count", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_fuzzed_shards(tmp_path, count):
    """Mutated headers, offsets, tokens and lengths give a one-line error or a correct read. In a process of its own."""
    make_shards(tmp_path / "shards", make_documents(40), shards=1)
    command = [sys.executable, "-m", "studies.fuzz_shards", str(tmp_path / "shards"), str(count)]
    result = subprocess.run(command, capture_output=True, text=True, env=train_environment(), cwd=ROOT)
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads(result.stdout)
    assert report["refused"] + report["read"] == count and report["refused"] > count / 2 and report["read"] > count / 50
    assert report["anonymous_mb"] < 400, report


# ---------------------------------------------------------------------------------------------------------------------
# The golden run

GOLDEN = ROOT / "tests" / "golden_losses.json"


def golden_run(data_dir, out, **options):
    """Losses of 50 steps with a falling masking rate and clipping. No dropout: its random numbers differ on GPUs."""
    options = {"max_steps": 50, "hidden_size": 64, "intermediate_size": 96, "lr": 0.01, "hidden_dropout": 0, **options}
    options |= {"final_mask_prob": 0.15, "max_grad_norm": 1.0, "dtype": "float32"}
    train.main(toy_argv(data_dir, out, eval_interval=0, checkpoint_interval=100, **options))
    return [record["loss"] for record in read_log(out)]


def test_the_golden_run(data_dir, tmp_path):
    """After a deliberate change of the numbers, rewrite it: MAKE_GOLDEN=1 pytest tests/test_reliability.py -k golden"""
    first, second = golden_run(data_dir, tmp_path / "first"), golden_run(data_dir, tmp_path / "second")
    assert first == second
    if os.environ.get("MAKE_GOLDEN"):
        GOLDEN.write_text(json.dumps(first, indent=0) + "\n")
    golden = json.loads(GOLDEN.read_text())
    assert len(golden) == 50 and golden[-1] < golden[0] - 0.5
    assert first == pytest.approx(golden, abs=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_the_golden_run_on_a_gpu(data_dir, tmp_path, kernels):
    losses = golden_run(data_dir, tmp_path / "run", device="cuda", kernels=kernels)
    assert losses == pytest.approx(json.loads(GOLDEN.read_text()), abs=1e-2)
