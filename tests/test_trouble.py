"""Other people's trouble: what went wrong for users of such software, or of this one, each kept as a test."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import checkpoint
import train
from common.meter import Meter
from common.options import UserError
from model import MaskedLM, ModelConfig, choose_kernels
from tests import faults, toy
from tests.ranks import Ranks, run_ranks
from tests.test_train import data_dir, fails  # noqa: F401, a fixture
from tests.toy import ROOT, make_run, make_shards, read_log, toy_argv


# ---------------------------------------------------------------------------------------------------------------------
# Schedules and resumes


def test_a_longer_run_continues_the_schedule_it_is_in(data_dir, tmp_path):  # noqa: F811
    """wsd while level: more max_steps used to mean a longer warm-up, which began again. Also when resumed once more."""
    options = {"schedule": "wsd", "warmup_fraction": 0.2, "checkpoint_interval": 4, "keep_checkpoints": 9}
    train.main(toy_argv(data_dir, tmp_path, max_steps=20, **options))
    for step in checkpoint.steps(tmp_path):
        if step > 8:
            shutil.rmtree(tmp_path / f"step_{step:08d}")
    for _ in range(2):
        train.main(toy_argv(data_dir, tmp_path, max_steps=40, **options))
        rates = [record["lr"] for record in read_log(tmp_path)]
        assert rates[:4] == pytest.approx([0, 3e-3 / 4, 3e-3 / 2, 3e-3 * 3 / 4]) and set(rates[4:32]) == {3e-3}
        assert rates[32:] == sorted(rates[32:], reverse=True) and rates[-1] < 1e-3
        shutil.rmtree(tmp_path / "step_00000040")


def test_gpu_hours_count_the_processes_of_each_second(data_dir, tmp_path):  # noqa: F811
    options = {"max_steps": 8, "hidden_dropout": 0, "price_per_gpu_hour": 3600, "checkpoint_interval": 4}
    assert run_ranks(toy_argv(data_dir, tmp_path / "run", **options), 2, tmp_path / "ranks")[0] == [0, 0]
    shutil.rmtree(tmp_path / "run" / "step_00000008")
    state = json.loads((tmp_path / "run" / "step_00000004" / "state.json").read_text())
    assert state["gpu_seconds"] == pytest.approx(2 * state["seconds"])
    assert run_ranks(toy_argv(data_dir, tmp_path / "run", **options), 1, tmp_path / "ranks")[0] == [0]
    end = read_log(tmp_path / "run", "end")[0]
    assert end["dollars"] == pytest.approx(end["seconds"] + state["seconds"], abs=0.01)


def test_a_slash_behind_a_directory_is_no_difference(data_dir, tmp_path, capsys, monkeypatch):  # noqa: F811
    """Tab completion adds it. And a mistyped directory leaves no empty out_dir behind."""
    monkeypatch.chdir(tmp_path)
    train.main(toy_argv(data_dir, "first", max_steps=1))
    for slash in ("", "/"):
        capsys.readouterr()
        train.main([*toy_argv(data_dir, "on", max_steps=2), f"--init_from=first{slash}"])
    assert "on: finished, 2 of 2 steps" in capsys.readouterr().out
    assert "fist" in fails([*toy_argv(data_dir, "new", max_steps=2), "--init_from=fist"], capsys)
    assert not os.path.exists("new")
    os.mkdir("mine")
    fails([*toy_argv(data_dir, "mine", max_steps=2), "--init_from=fist"], capsys)
    assert os.path.exists("mine")


def test_a_run_resumes_without_what_it_started_from(data_dir, tmp_path, capsys):  # noqa: F811
    first = tmp_path / "first"
    make_run(first)
    argv = toy_argv(data_dir, tmp_path / "run", init_from=first)
    train.main(argv)
    shutil.rmtree(first)
    shutil.rmtree(tmp_path / "run" / "step_00000010")
    train.main(argv)
    assert "resuming from" in capsys.readouterr().out
    assert "first: no such directory" in fails(toy_argv(data_dir, tmp_path / "new", init_from=first), capsys)


@pytest.mark.parametrize("other", ["manifest.json", "tokenizer.json", "log.jsonl", "runs"])
def test_a_directory_of_something_else_is_refused(data_dir, tmp_path, capsys, other):  # noqa: F811
    """data/mine typed for out/mine: the other corpus lost its tokenizer, and so all of its shards."""
    out = make_shards(tmp_path / "shards") if other == "manifest.json" else tmp_path / "other"
    os.makedirs(out, exist_ok=True)
    if other != "manifest.json":
        (tmp_path / "other" / other).mkdir()
    before = {path.name: path.read_bytes() for path in Path(out).iterdir() if path.is_file()}
    for options in ({}, {"dry_run": "true"}):
        assert f"{out}: holds {other} of something else than a run" in fails(toy_argv(data_dir, out, **options), capsys)
    assert {path.name: path.read_bytes() for path in Path(out).iterdir() if path.is_file()} == before


def test_a_failed_attempt_does_not_hold_its_directory(data_dir, tmp_path, capsys):  # noqa: F811
    """Without a checkpoint there is nothing to lose: other options start over. With one they are refused, with a way out."""
    out = tmp_path / "run"
    assert run_ranks(toy_argv(data_dir, out), 1, tmp_path / "ranks", {0: partial(faults.die_at, 2)})[0] == [-9]
    train.main(toy_argv(data_dir, out, seed=5))
    assert "starting over" in capsys.readouterr().out and read_log(out, "end")
    line = fails(toy_argv(data_dir, out, seed=6), capsys)
    assert "seed was 5 and is 6" in line and f"--init_from={out}" in line
    train.main(toy_argv(data_dir, out, seed=5))
    assert f"finished, 10 of 10 steps (to train on, give --init_from={out}" in capsys.readouterr().out


def test_the_last_checkpoint_must_be_on_disk(data_dir, tmp_path):  # noqa: F811
    """--on_save_error=continue trains through failed saves, but does not end with status 0 without the last one."""
    argv = toy_argv(data_dir, tmp_path / "run", on_save_error="continue", eval_interval=0)
    statuses, output = run_ranks(argv, 1, tmp_path / "ranks", {0: partial(faults.small_files, 50_000)})
    assert statuses == [2] and "trained to step 10, but its checkpoint was not written" in output, output


def test_a_signal_is_acknowledged_at_once(data_dir, tmp_path):  # noqa: F811
    ranks = Ranks(toy_argv(data_dir, tmp_path / "run"), 1, tmp_path / "ranks", {0: partial(faults.hang_at, 3)})
    while len(read_log(tmp_path / "run")) < 2:
        assert ranks.alive(), ranks.output()
        time.sleep(0.01)
    ranks.signal(signal.SIGTERM)
    while "SIGTERM: stopping after this step, with a checkpoint" not in ranks.output():  # while step 3 hangs
        assert ranks.alive()
        time.sleep(0.01)
    ranks.signal(signal.SIGKILL)
    ranks.wait()


@pytest.mark.parametrize("hang", [False, True])
def test_signals_when_nobody_reads_the_output(data_dir, tmp_path, hang):  # noqa: F811
    """Ctrl-C on `train.py | tee log` ends tee, too. The watchdog's thread failed to print, and the second signal did nothing."""
    fault = partial(faults.together, faults.unread_output, partial(faults.same_signal_within, 0.5))
    fault = partial(faults.together, fault, partial(faults.hang_at, 3)) if hang else fault
    out = tmp_path / "run"
    argv = toy_argv(data_dir, out, max_steps=10_000, eval_interval=0, checkpoint_interval=10_000, log_interval=1)
    ranks = Ranks(argv, 1, tmp_path / "ranks", {0: fault})
    while len(read_log(out)) < 2:
        assert ranks.alive()
        time.sleep(0.01)
    ranks.signal(signal.SIGTERM)
    if hang:
        time.sleep(1)
        ranks.signal(signal.SIGTERM)
    assert ranks.wait(20) == [143] and len(checkpoint.steps(out)) == (0 if hang else 1)


@pytest.mark.parametrize("script", ["train.py", "prepare_c4.py"])
def test_an_error_that_nobody_reads_keeps_its_status(script):
    """It was Python's 1, or 120 where the output could not be flushed at the end."""
    command = f"({sys.executable} {script} --no_such_option=1; echo $? >&3) 2>&1 | true"
    result = subprocess.run(["bash", "-c", f"exec 3>&1; {command}"], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "2\n"


# ---------------------------------------------------------------------------------------------------------------------
# Nothing silently wrong


def test_nothing_masked_has_no_loss(tmp_path, capsys):
    """Text that is all [UNK] masks nothing: the loss is null, not a perfect 0."""
    unknown = [[1] * 20] * 40
    train.main(toy_argv(make_shards(tmp_path / "shards", unknown, unknown), tmp_path / "run", max_steps=2, eval_interval=0))
    printed = capsys.readouterr().out
    assert [record["loss"] for record in read_log(tmp_path / "run")] == [None, None]
    assert read_log(tmp_path / "run", "eval")[0]["loss"] is None and read_log(tmp_path / "run", "eval")[0]["num_masked"] == 0
    assert "no loss: nothing is masked" in printed and "no held-out loss, as nothing is masked" in printed


def test_many_epochs_and_large_models_on_a_cpu_are_warned_of(data_dir, capsys):  # noqa: F811
    class Many:
        total_weight = 1.0

        def __len__(self):
            return 19_000

    process, samples = SimpleNamespace(say=print, device=torch.device("cpu"), rank=0), Many()
    train.print_warnings(train.TrainConfig(chunk=True), process, 137_400_384, samples)
    printed = capsys.readouterr().out
    assert "70,000 steps are 15,091 epochs of 19,000 samples (try --max_steps=927" in printed
    assert "137,400,384 parameters on a CPU" in printed and "configs/small.py" in printed
    train.print_warnings(train.TrainConfig(max_steps=900, chunk=True), process, 600_000, samples)
    train.print_warnings(train.TrainConfig(max_steps=None, chunk=True), process, 600_000, samples)
    assert not capsys.readouterr().out
    train.print_warnings(train.TrainConfig(max_steps=3, global_batch_size=100_000, chunk=True), process, 600_000, samples)
    assert "global_batch_size=100,000 is more than all 19,000 samples: a step repeats some" in capsys.readouterr().out


def test_the_time_left_does_not_jump():
    """It follows from the average since the first report, not from the last one alone."""
    process = SimpleNamespace(world_size=1)
    meter = Meter(train.TrainConfig(max_steps=100), {"seconds": 0.0}, process, num_params=1, flops=None)
    meter.masked, meter.steps_per_second = 1, 100.0
    record = {"step": 50, "seconds": 60.0, "loss": 1.0, "lr": 0.1, "tokens_per_second": 1, "memory_gb": None, "dollars": None}
    assert "0:00:00 left" in meter.line(record)  # the first: 50 steps at 100 a second
    meter.first = {"step": 10, "seconds": 10.0}
    assert "0:01:00 done, 0:01:02 left" in meter.line(record)


@pytest.mark.parametrize("kind", ["mosaicbert", "bert"])
def test_the_padding_embedding_is_that_of_pad(kind):
    """A vocabulary whose id 0 is a word: it starts as any other and is trained; [PAD] is not."""
    torch.manual_seed(0)
    network = MaskedLM(ModelConfig(kind, 32, 1, 2, 48), 70, pad_id=3)
    words = network.bert.embeddings.word_embeddings
    assert words.weight[0].abs().min() > 0 and not words.weight[3].any()
    words(torch.tensor([0, 3])).sum().backward()
    assert words.weight.grad[0].all() and not words.weight.grad[3].any()


def test_training_asks_the_tokenizer_for_pad(tmp_path, monkeypatch):
    special = ["[UNK]", "[CLS]", "[PAD]", "[SEP]", "[MASK]"]
    monkeypatch.setattr(toy, "make_tokenizer", partial(toy.make_tokenizer, special=special))
    made = []
    monkeypatch.setattr(train, "MaskedLM", lambda *arguments: made.append(arguments) or MaskedLM(*arguments))
    train.main(toy_argv(make_shards(tmp_path / "shards"), tmp_path / "run", max_steps=1))
    assert made[0][2] == 2


def test_the_interpreter_refuses_bf16():
    cfg = ModelConfig(hidden_size=64, num_heads=2)
    with pytest.raises(UserError, match="interpreter multiplies bfloat16 wrongly"):
        choose_kernels("triton", cfg, torch.device("cpu"), torch.bfloat16)
    assert choose_kernels("triton", cfg, torch.device("cpu"), torch.float32) == "triton"


# ---------------------------------------------------------------------------------------------------------------------
# A first hour


def test_threads_wait_without_spinning():
    """Two threads that spin on two busy cores were slower by a factor of 17 than one."""
    code = "import common, os; print(os.environ['OMP_WAIT_POLICY'])"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.strip() == "PASSIVE"
    imported = [line for line in (ROOT / "train.py").read_text().splitlines() if line.startswith(("import ", "from "))]
    assert imported.index(next(line for line in imported if line.startswith("import common"))) < imported.index("import torch")


def test_ctrl_c_during_imports_is_one_line():
    code = "import common, os, signal; os.kill(os.getpid(), signal.SIGINT); import time; time.sleep(9)"
    hear = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # tests in a shell's background have it ignored
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, preexec_fn=hear)
    assert result.stderr == "stopped\n" and result.returncode


def test_help_into_head_and_its_defaults():
    command = f"{sys.executable} prepare_c4.py --help | head -n 1; {sys.executable} prepare_c4.py --help | grep workers"
    result = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert not result.stderr and f"[{os.cpu_count()}]" in result.stdout


@pytest.mark.parametrize("option, nearest", [("learning_rate", "lr"), ("resume", "out_dir"), ("batch_size", "global_batch_size")])
def test_what_others_call_an_option_is_suggested(option, nearest, capsys):
    assert f"did you mean {nearest}?" in fails([f"--{option}=1"], capsys)


def test_compiling_on_a_cpu_does_not_recompile(data_dir, tmp_path, monkeypatch):  # noqa: F811
    """The reference attention loops over the lengths of a batch; it stays outside of what is compiled."""
    from torch._dynamo.testing import CompileCounter

    counts = []
    for steps in (1, 5):
        counter = CompileCounter()
        torch._dynamo.reset()
        with monkeypatch.context() as patch:
            compile = torch.compile
            patch.setattr(torch, "compile", lambda model, options: compile(model, backend=counter))
            train.main(toy_argv(data_dir, tmp_path / str(steps), max_steps=steps, compile=True, eval_interval=0, hidden_dropout=0))
        counts.append(counter.frame_count)
    assert 0 < counts[0] == counts[1]


def test_no_step_is_made_beyond_the_last(data_dir, tmp_path):  # noqa: F811
    """One ahead, the masking rate of a step after the last one would be below 0."""
    train.main(toy_argv(data_dir, tmp_path / "run", max_steps=2, final_mask_prob=0.1))
    assert read_log(tmp_path / "run", "end")[0]["step"] == 2


def test_wsd_never_falls_before_the_warm_up_ends(data_dir, tmp_path, capsys):  # noqa: F811
    cfg = train.TrainConfig(schedule="wsd", warmup_steps=200, max_steps=210)  # as a budget may plan it
    rates = [train.lr_at(cfg, step) for step in range(1, 211)]
    assert rates[199] < rates[200] == cfg.lr and rates[205] == pytest.approx(cfg.lr / 2)
    options = "--schedule=wsd --warmup_steps=9 --decay_fraction=0.2"
    assert "more than max_steps together" in fails([*toy_argv(data_dir, tmp_path), *options.split()], capsys)


def test_evaluation_alone_may_vary(data_dir, tmp_path, capsys):  # noqa: F811
    argv = toy_argv(data_dir, tmp_path / "run")
    train.main(argv)
    train.main([*argv, "--eval_only", "--eval_samples=10", "--dtype=bfloat16", "--lr=0.5", f"--data_dir={data_dir}"])
    assert "step 10: held-out loss" in capsys.readouterr().out
    assert "hidden_size was 32 and is 64" in fails([*argv, "--eval_only", "--hidden_size=64"], capsys)


def test_steps_that_are_not_traced_are_reported(data_dir, tmp_path, capsys):  # noqa: F811
    train.main(toy_argv(data_dir, tmp_path / "run", max_steps=2, profile="20:22"))
    assert "steps 20:22: not traced" in capsys.readouterr().out
