"""The training loop as a user runs it: resuming, several processes, micro-batches, the log, and refused options."""

import fcntl
import math
import os
import re
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch

import checkpoint
import train
from checkpoint import model_config
from common import compiled, estimate
from common.batch import Batch
from common.options import UserError, load_config
from common.processes import Process
from data import Samples
from model import MaskedLM, ModelConfig, SequenceClassifier
from tests import faults
from tests.ranks import Ranks, run_ranks
from tests.toy import TOY_OPTIONS, TOY_SIZE, files_of, make_documents, make_run, make_shards, read_log, run_train, toy_argv

CONFIGS = Path(train.__file__).parent / "configs"


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("toy") / "shards")


def losses(out_dir):
    return [record["loss"] for record in read_log(out_dir)]


def test_a_run_learns_and_writes_what_the_interface_promises(data_dir, tmp_path, capsys):
    out = tmp_path / "run"
    train.main(toy_argv(data_dir, out, max_steps=60, lr=0.02, eval_interval=30, checkpoint_interval=25, price_per_gpu_hour=2))
    printed = capsys.readouterr().out
    records = read_log(out)
    assert [record["step"] for record in records] == list(range(1, 61))
    assert records[0]["loss"] == pytest.approx(math.log(128), abs=0.3)  # the vocabulary of 100, padded to 128
    assert records[-1]["loss"] < records[0]["loss"] - 0.3
    keys = "step loss lr grad_norm tokens samples seconds tokens_per_second samples_per_second mfu gpu_hours dollars"
    assert set(keys.split()) | {"memory_gb", "mfu_6n"} <= records[-1].keys()
    assert records[-1]["mfu"] is None and records[-1]["memory_gb"] is None
    assert records[-1]["samples"] == 60 * 16
    assert records[-1]["dollars"] == pytest.approx(records[-1]["gpu_hours"] * 2)
    assert "step 60/60 | loss" in printed and "mfu" not in printed and "mem" not in printed and "of $" in printed
    (start,) = read_log(out, "start")
    assert start["config"]["hidden_size"] == 32 and start["world_size"] == 1 and start["kernels"] == "torch"
    weights = train.checkpoint.read_tensors(out / "step_00000060", "model.safetensors")
    assert start["num_params"] == sum(tensor.numel() for tensor in weights.values())
    evals = read_log(out, "eval")
    assert [record["step"] for record in evals] == [30, 60]
    assert evals[0]["num_masked"] == evals[1]["num_masked"] > 0 and evals[1]["loss"] < evals[0]["loss"]
    assert [record["step"] for record in read_log(out, "checkpoint")] == [25, 50, 60]
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == ["step_00000050", "step_00000060"]
    assert read_log(out, "end")[0]["step"] == 60
    # Running the same command again does nothing, and reports that.
    before = (out / "log.jsonl").read_bytes()
    train.main(toy_argv(data_dir, out, max_steps=60, lr=0.02, eval_interval=30, checkpoint_interval=25, price_per_gpu_hour=2))
    assert "finished" in capsys.readouterr().out and (out / "log.jsonl").read_bytes() == before


def test_casting_weights_once_a_step_changes_no_bit(data_dir):
    """In bf16: all micro-batches of a step in one autocast region, and each in its own."""
    cfg = train.TrainConfig(**TOY_SIZE, hidden_dropout=0.0)
    batches = Samples(data_dir, "train", 32).step_batches(0, 16, 0, 0.3, 128)
    assert len(batches) > 2
    process = Process(0, 1, torch.device("cpu"), torch.bfloat16)
    models = []
    for groups in ([batches], [[batch] for batch in batches]):
        torch.manual_seed(0)
        models.append(train.MaskedLM(cfg, 100))
        for group in groups:
            train.forward_backward(models[-1], group, torch.tensor(7.0), cfg, process, 1)
    for together, apart in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(together.grad, apart.grad) if together.grad is not None else apart.grad is None


def test_logged_speed_includes_the_wait_for_the_gpu(data_dir, tmp_path, monkeypatch):
    """Python runs ahead of a GPU, and the collective before a report waits for it: part of the time of the reported steps."""
    gather = Process.gather

    def late(self, values):
        time.sleep(0.2)
        return gather(self, values)

    monkeypatch.setattr(Process, "gather", late)
    train.main(toy_argv(data_dir, tmp_path, max_steps=4, log_interval=2, eval_interval=0))
    assert all(2 * 16 / record["samples_per_second"] > 0.2 for record in read_log(tmp_path))


@pytest.mark.parametrize("options", [{}, {"model": "bert", "attention_dropout": 0.1, "chunk": True}, {"optimizer": "muon"}])
def test_killed_and_resumed_equals_uninterrupted(data_dir, tmp_path, options):
    """SIGKILL in the middle of a run with dropout, then the same command: every byte as in an uninterrupted run."""
    options = {"max_steps": 40, "checkpoint_interval": 7, "final_mask_prob": 0.15, **options}
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert run_ranks(toy_argv(data_dir, straight, **options), 1, tmp_path)[0] == [0]
    running = Ranks(toy_argv(data_dir, broken, **options), 1, tmp_path)
    while not (broken / "step_00000014").exists():
        assert running.alive(), running.output()
        time.sleep(0.005)
    running.signal(signal.SIGKILL)
    assert running.wait() == [-signal.SIGKILL]
    reached = train.checkpoint.steps(broken)[0]
    assert reached < 40
    assert run_ranks(toy_argv(data_dir, broken, **options), 1, tmp_path)[0] == [0]
    assert [start["resumed_from"] for start in read_log(broken, "start")][-1].endswith(f"step_{reached:08d}")
    last = [files_of(out / "step_00000040") for out in (straight, broken)]
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert last[0][name] == last[1][name]
    exact = [[(r["step"], r["loss"], r["grad_norm"], r["tokens"]) for r in read_log(out)] for out in (straight, broken)]
    assert exact[0] == exact[1]
    evals = [[(r["step"], r["loss"]) for r in read_log(out, "eval")] for out in (straight, broken)]
    assert evals[0] == evals[1]


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_cuda_graphs_and_checkpointing_change_no_bit(data_dir, tmp_path, monkeypatch, optimizer):
    """The same run with dropout, replayed, launched by Python, and with activation checkpointing: the same losses, gradient
    norms and weights."""
    replayed, called = [], train.GraphedStep.__call__
    monkeypatch.setattr(train.GraphedStep, "__call__", lambda *args: replayed.append(1) or called(*args))
    options = {"hidden_size": 64, "max_steps": 40, "device": "cuda", "kernels": "triton", "micro_batch_tokens": 300}
    names = ("graphed", "eager", "checkpointed")
    for name in names:
        monkeypatch.setattr(train, "MAX_GRAPHED_TOKENS", 0 if name == "eager" else 65536)
        options["activation_checkpointing"] = name == "checkpointed"
        train.main(toy_argv(data_dir, tmp_path / name, optimizer=optimizer, hidden_dropout=0.1, **options))
        count = len(replayed)
        replayed.clear()
        assert (count >= 40) == (name == "graphed")
    exact = [[(r["loss"], r["grad_norm"]) for r in read_log(tmp_path / name)] for name in names]
    last = [files_of(tmp_path / name / "step_00000040")["model.safetensors"] for name in names]
    assert exact[0] == exact[1] == exact[2] and last[0] == last[1] == last[2]


@pytest.mark.parametrize("used, captured", [(70, False), (30, True)])
def test_steps_that_would_not_fit_twice_are_not_captured(monkeypatch, used, captured):
    """The 1.3 billion parameters of configs/xl.py took 109 of 150 GB, and ran out of memory in the third step."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: used)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (100 - used, 100))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: pytest.fail("captured"))
    calls = []
    graphed = train.GraphedStep(lambda batch: calls.append(1) or torch.zeros(()))
    batch = Batch(torch.zeros(5), torch.tensor([0, 5]), 5, None)
    graphed(batch)
    if captured:
        with pytest.raises(pytest.fail.Exception, match="captured"):
            graphed(batch)
    else:
        graphed(batch), graphed(batch)
    assert len(calls) == (1 if captured else 3)


def test_neither_processes_nor_micro_batches_nor_buckets_change_the_losses(data_dir, tmp_path):
    options = {"hidden_dropout": 0, "max_steps": 40, "eval_interval": 20, "checkpoint_interval": 20}
    runs = {}
    buckets = dict.fromkeys(range(2), partial(faults.small_buckets, 0.005))
    rows = [("one", 1, 0, {}), ("small", 1, 80, {}), ("two", 2, 100, {}), ("buckets", 2, 100, buckets)]
    for name, processes, micro, fault in rows:
        argv = toy_argv(data_dir, tmp_path / name, micro_batch_tokens=micro, **options)
        statuses, output = run_ranks(argv, processes, tmp_path, fault)
        assert statuses == [0] * processes, output
        runs[name] = tmp_path / name
    for name in ("small", "two", "buckets"):
        assert losses(runs[name]) == pytest.approx(losses(runs["one"]), rel=1e-5)
        for event, key in (("eval", "loss"), ("train", "grad_norm")):
            expected = [record[key] for record in read_log(runs["one"], event)]
            assert [record[key] for record in read_log(runs[name], event)] == pytest.approx(expected, rel=1e-4)
        expected = [record["tokens"] for record in read_log(runs["one"])]
        assert [record["tokens"] for record in read_log(runs[name])] == expected
    assert read_log(runs["two"], "start")[0]["world_size"] == 2


def test_activation_checkpointing_changes_no_bit_of_a_run(data_dir, tmp_path):
    """Two processes with dropout, several micro-batches each; and it may be switched on when a run resumes."""
    options, without, with_it = {"micro_batch_tokens": 100, "checkpoint_interval": 5}, tmp_path / "without", tmp_path / "with"
    for out, switched in ((without, False), (with_it, True)):
        argv = toy_argv(data_dir, out, activation_checkpointing=switched, **options)
        assert run_ranks(argv, 2, tmp_path)[0] == [0, 0]
    exact = [[(r["step"], r["loss"], r["grad_norm"]) for r in read_log(out)] for out in (without, with_it)]
    last = [files_of(out / "step_00000010") for out in (without, with_it)]
    assert exact[0] == exact[1] and last[0]["model.safetensors"] == last[1]["model.safetensors"]
    train.checkpoint.shutil.rmtree(without / "step_00000010")
    assert run_ranks(toy_argv(data_dir, without, activation_checkpointing=True, **options), 2, tmp_path)[0] == [0, 0]
    assert files_of(without / "step_00000010")["model.safetensors"] == last[0]["model.safetensors"]


def test_activation_checkpointing_is_not_captured_in_cuda_graphs(monkeypatch):
    """PyTorch can't set the random state, as it does before a layer runs again, while a graph is captured."""
    process = Process(0, 1, torch.device("cuda"), torch.bfloat16)
    for name in ("Stream", "set_stream", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: None)
    for switched in (False, True):
        cfg = train.TrainConfig(activation_checkpointing=switched)
        assert (train.graph_gradients(None, cfg, process, "triton", 8192) is None) == switched


def test_resume_with_another_number_of_processes(data_dir, tmp_path):
    """Two processes under torchrun, then one: the same samples and masks, so the same losses up to rounding."""
    options = {"hidden_dropout": 0, "max_steps": 12}
    assert run_ranks(toy_argv(data_dir, tmp_path / "one", **options), 1, tmp_path)[0] == [0]
    two = tmp_path / "two"
    result = run_train(toy_argv(data_dir, two, **options), processes=2)
    assert result.returncode == 0, result.stderr
    train.checkpoint.shutil.rmtree(two / "step_00000012")  # as if it had been killed after step 8
    assert run_ranks(toy_argv(data_dir, two, **options), 1, tmp_path)[0] == [0]
    assert [record["step"] for record in read_log(two)] == list(range(1, 13))
    assert losses(two) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


@pytest.mark.slow
def test_three_processes_resume_bit_for_bit(data_dir, tmp_path):
    """With three or more, the order of sums over processes must not depend on where the run was resumed."""
    options = {"global_batch_size": 24, "max_steps": 12, "hidden_size": 64}
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    small = dict.fromkeys(range(3), partial(faults.small_buckets, 0.02))
    for out in (straight, broken):
        assert run_ranks(toy_argv(data_dir, out, **options), 3, tmp_path, small)[0] == [0, 0, 0]
    train.checkpoint.shutil.rmtree(broken / "step_00000012")
    assert run_ranks(toy_argv(data_dir, broken, **options), 3, tmp_path, small)[0] == [0, 0, 0]
    weights = [files_of(out / "step_00000012")["model.safetensors"] for out in (straight, broken)]
    assert weights[0] == weights[1]


def test_a_damaged_newest_checkpoint_is_named_and_the_previous_one_used(data_dir, tmp_path, capsys):
    out = tmp_path / "run"
    train.main(toy_argv(data_dir, out))
    weights = files_of(out / "step_00000010")["model.safetensors"]
    path = out / "step_00000010" / "model.safetensors"
    path.write_bytes(weights[:200] + bytes([weights[200] ^ 1]) + weights[201:])
    train.main(toy_argv(data_dir, out))
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and str(path) in captured.err
    assert f"resuming from {out}/step_00000008" in captured.out
    assert path.read_bytes() == weights


def fails(argv, capsys):
    """Run train.main, which must exit with status 2 after one error line. Returns the line."""
    with pytest.raises(SystemExit) as stopped:
        train.main(argv)
    captured = capsys.readouterr()
    assert stopped.value.code == 2
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
    return captured.err


def test_weights_that_are_no_shares_are_said(data_dir, tmp_path, capsys):
    other = make_shards(tmp_path / "other")
    for weights, said in (((0.7, 0.7), 1), ((0.7, 0.3), 0), ((0.1, 0.9), 0)):
        train.main(toy_argv(f"{data_dir}:{weights[0]},{other}:{weights[1]}", tmp_path / "run", dry_run=True))
        line = f"--data_dir: weights add up to 1.4, not 1: the shares are {data_dir} 50.0%, {other} 50.0%\n"
        assert capsys.readouterr().out.count(line) == said


def test_world_size_without_rank_is_refused(data_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.delenv("RANK", raising=False)
    assert "start it with torchrun, or unset WORLD_SIZE" in fails(toy_argv(data_dir, tmp_path / "run"), capsys)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(data_dir, tmp_path, capsys):
    """Days of training may be in a backup, or on a disk that is not mounted."""
    out = tmp_path / "run"
    train.main(toy_argv(data_dir, out))
    for step in train.checkpoint.steps(out):
        (out / f"step_{step:08d}" / "model.safetensors").unlink()
    before, log = sorted(out.rglob("*")), (out / "log.jsonl").read_bytes()
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        train.main(toy_argv(data_dir, out))
    *warnings, error = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(warnings) == 2 and all("checkpoint skipped" in line for line in warnings)
    assert error.startswith(f"error: {out}: none of its 2 checkpoints is undamaged (")
    assert (sorted(out.rglob("*")), (out / "log.jsonl").read_bytes()) == (before, log)


@pytest.mark.parametrize(
    "option, says",
    [
        ("--lr=0", "lr=0.0"), ("--lr=-1", "lr=-1"), ("--lr=2", "lr=2"), ("--lr=fast", "'fast' is not a number"),
        ("--lr=nan", "not a number"), ("--lr", "no value"), ("--mask_prob=0", "mask_prob"), ("--mask_prob=1.5", "mask_prob"),
        ("--hidden_dropout=1", "hidden_dropout"), ("--hidden_dropout=-0.1", "hidden_dropout"),
        ("--attention_dropout=0.1", "MosaicBERT has none"), ("--num_heads=3", "not a multiple of num_heads=3"),
        ("--hidden_size=0", "hidden_size"), ("--num_layers=-1", "num_layers"), ("--seq_length=2", "seq_length"),
        ("--max_steps=0", "max_steps"), ("--max_steps=1.5", "not a whole number"), ("--global_batch_size=0", "at least 1"),
        ("--micro_batch_tokens=31", "less than seq_length=32"), ("--warmup_fraction=1.1", "warmup_fraction"),
        ("--schedule=cosine", "one of linear, wsd"), ("--device=gpu", "one of auto, cpu, cuda"),
        ("--compile=perhaps", "true or false"), ("--beta2=1", "beta2"), ("--checkpoint_interval=0", "checkpoint_interval"),
        ("--activation_checkpointing --compile", "not both"),
        ("--leraning_rate=1", "unknown option"), ("--global_batch=1", "did you mean global_batch_size"),
        ("--data_dir=nowhere", "prepare_c4.py"), ("--data_dir=", "data_dir: empty (a shard directory made by prepare_c4.py)"),
        ("--data_dir=configs/base.py", "configs/base.py: a file (give its directory)"),
        ("--model=bert --seq_length=513", "512 positions"),
        ("--init_from=nowhere", "nowhere: no such directory"), ("--eval_only", "no checkpoint to evaluate"),
        ("configs/none.py", "configs/none.py"), ("--kernels=cuda", "one of auto, triton, torch"),
    ],
)  # fmt: skip
def test_mistakes_end_in_one_line(data_dir, tmp_path, capsys, option, says):
    out = tmp_path / "out"
    assert says in fails([*toy_argv(data_dir, out), *option.split()], capsys)
    assert not (out / "log.jsonl").exists()


def test_the_batch_must_be_a_multiple_of_the_processes(data_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "global_batch_size=16 is not a multiple of 3 processes" in fails(toy_argv(data_dir, tmp_path / "out"), capsys)


def test_triton_without_a_gpu_is_refused(data_dir, tmp_path):
    result = run_train(toy_argv(data_dir, tmp_path / "out", kernels="triton"), TRITON_INTERPRET="0")
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr


@pytest.mark.parametrize("damage", ["truncated", "other tokenizer", "token", "offsets", "missing", "foreign", "manifest"])
def test_damaged_shards_are_refused_before_training(tmp_path, capsys, damage):
    data = Path(make_shards(tmp_path / "shards"))
    shard = data / "train_00001.bin"
    contents = bytearray(shard.read_bytes())
    if damage == "truncated":
        shard.write_bytes(contents[:-1])
    elif damage == "other tokenizer":
        tokenizer = data / "tokenizer.json"
        tokenizer.write_text(tokenizer.read_text().replace('"w7"', '"w7x"'))
    elif damage == "token":
        contents[-1] = 255
        shard.write_bytes(contents)
    elif damage == "offsets":
        contents[64] = 1
        shard.write_bytes(contents)
    elif damage == "missing":
        shard.unlink()
    elif damage == "foreign":
        shard.write_bytes(b"hello" * 100)
    else:
        (data / "manifest.json").write_text('{"shards": 3}')
    line = fails(toy_argv(data, tmp_path / "out"), capsys)
    assert str(data / "manifest.json" if damage == "manifest" else data) in line
    assert not (tmp_path / "out").exists()


def test_another_run_in_the_same_directory_is_refused(data_dir, tmp_path, capsys):
    out = tmp_path / "run"
    train.main(toy_argv(data_dir, out))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    line = fails(toy_argv(data_dir, out, lr=1e-3, hidden_dropout=0), capsys)
    assert "lr was 0.003 and is 0.001" in line and "hidden_dropout" in line
    assert "max_steps was 10 and is 20" in fails(toy_argv(data_dir, out, max_steps=20), capsys)
    other = make_shards(tmp_path / "other", make_documents(50, seed=9))
    assert "train_data" in fails(toy_argv(other, out), capsys)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_what_may_differ_on_resume(data_dir, tmp_path, capsys):
    """wsd has not begun to decay, so the run may get longer; the other options change no result."""
    out = tmp_path / "run"
    train.main(toy_argv(data_dir, out, schedule="wsd", max_steps=20, checkpoint_interval=8))
    train.checkpoint.shutil.rmtree(out / "step_00000020")
    longer = {"max_steps": 40, "micro_batch_tokens": 128, "keep_checkpoints": 5, "price_per_gpu_hour": 1, "eval_interval": 0}
    train.main(toy_argv(data_dir, out, schedule="wsd", checkpoint_interval=8, **longer))
    assert "resuming" in capsys.readouterr().out
    assert read_log(out)[-1]["step"] == 40 and len(read_log(out)) == 40


def test_a_second_live_run_is_refused(data_dir, tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    held = os.open(out, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    assert "in use" in fails(toy_argv(data_dir, out), capsys)
    os.close(held)


def test_init_from_a_fine_tuned_model(data_dir, tmp_path, capsys):
    """The classifier is left out, and a new masked-language-model head added, as fill_mask's error promises."""
    run = Path(make_run(tmp_path / "tuned"))
    config, texts = train.checkpoint.read_config(run / "step_00000001"), {}
    for name in ("config.json", "tokenizer.json", "state.json"):
        texts[name] = (run / "step_00000001" / name).read_text()
    weights = train.checkpoint.weights_of(SequenceClassifier(model_config(config), config["vocab_size"], 3))
    assert "classifier.weight" in weights and not any(name.startswith("cls.") for name in weights)
    train.checkpoint.save(str(run), 2, {"model.safetensors": weights}, texts)
    train.main(toy_argv(data_dir, tmp_path / "second", init_from=run, max_steps=1, warmup_fraction=1))
    assert "with a new masked-language-model head" in capsys.readouterr().out


def test_init_from_and_eval_only(data_dir, tmp_path, capsys):
    first = tmp_path / "first"
    train.main(toy_argv(data_dir, first))
    weights = train.checkpoint.read_tensors(first / "step_00000010", "model.safetensors")
    train.main(toy_argv(data_dir, tmp_path / "second", init_from=first, max_steps=1, warmup_fraction=1))
    second = train.checkpoint.read_tensors(tmp_path / "second" / "step_00000001", "model.safetensors")
    for name, tensor in weights.items():  # step 1 has a learning rate of 0
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=0)
    assert "started from" in capsys.readouterr().out
    train.main([*toy_argv(data_dir, tmp_path / "second", init_from=first, max_steps=1, warmup_fraction=1), "--dry_run"])
    assert "started from" not in capsys.readouterr().out  # it would resume
    before = (first / "log.jsonl").read_bytes()
    train.main([*toy_argv(data_dir, first), "--eval_only"])
    loss = read_log(first, "eval")[-1]["loss"]
    assert f"step 10: held-out loss {loss:.4f}" in capsys.readouterr().out
    found = set()
    for length in (16, 64):  # as docs/training.md compares lengths
        train.main([*toy_argv(data_dir, first, seq_length=length, chunk="true"), "--eval_only"])
        found.add(re.search(r"step 10: held-out loss (\S+),", capsys.readouterr().out)[1])
    assert len(found) == 2
    assert (first / "log.jsonl").read_bytes() == before


def test_a_run_without_its_checkpoints_says_that_it_begins_again(data_dir, tmp_path, capsys):
    argv = toy_argv(data_dir, tmp_path / "run", max_steps=4)
    train.main(argv)
    assert "begin again" not in capsys.readouterr().out
    for path in (tmp_path / "run").glob("step_*"):
        shutil.rmtree(path)
    with pytest.raises(UserError, match="run: a run that has no checkpoint yet [(]wait"):
        checkpoint.find(str(tmp_path / "run"))
    train.main(argv)
    assert f"{tmp_path / 'run'}: holds no checkpoint, so the run and its log begin again" in capsys.readouterr().out


def test_a_model_that_memory_cannot_hold(data_dir, tmp_path, monkeypatch, capsys):
    """--hidden_size=65536 ended in a traceback with this error."""

    def full(*_):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried to allocate")

    monkeypatch.setattr(train, "MaskedLM", full)
    with pytest.raises(SystemExit) as stopped:
        train.main(toy_argv(data_dir, tmp_path / "run"))
    assert stopped.value.code == 2 and capsys.readouterr().err.startswith("error: out of memory (try a smaller model")


def test_dry_run_trains_nothing(data_dir, tmp_path, capsys):
    train.main([*toy_argv(data_dir, tmp_path / "run", price_per_gpu_hour=2.5), "--dry_run"])
    printed = capsys.readouterr().out
    assert "parameters" in printed and "FLOP" in printed and "$" in printed
    assert not (tmp_path / "run").exists()


def test_a_run_says_how_much_of_the_text_its_samples_take(tmp_path, capsys):
    """Of long documents they took 6 %, and nothing said so."""
    long, short = (make_shards(tmp_path / name, make_documents(50, size + 1, shortest=size)) for name, size in (("l", 300), ("s", 30)))
    says = f"{long}: samples are the first 30 tokens of each document, about 10% of all (--chunk=true takes the rest, too)\n"
    for data_dir, option, count in (
        (long, "--dry_run", 1), (f"{short}:0.9,{long}:0.1", "--dry_run", 1), (short, "--dry_run", 0),
        (long, "--dry_run --chunk=true", 0), (long, "--seq_length=290 --dry_run", 0), (long, "--max_steps=1", 1),
    ):  # fmt: skip
        train.main([*toy_argv(data_dir, tmp_path / "run", warmup_fraction=1), *option.split()])
        printed = capsys.readouterr().out
        assert printed.count(says) == printed.count("tokens of each document") == count


@pytest.mark.slow
def test_compile_gives_the_same_losses(data_dir, tmp_path):
    options = {"hidden_dropout": 0, "max_steps": 4, "num_layers": 1}
    for compile in ("false", "true"):
        assert run_train(toy_argv(data_dir, tmp_path / compile, compile=compile, **options)).returncode == 0
    assert losses(tmp_path / "true") == pytest.approx(losses(tmp_path / "false"), rel=1e-5)


def test_fused_sums_are_off_before_torch_2_12(monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "compile", lambda model, options: seen.append(options) or model)
    for version in ("2.11.0+cu130", "2.12.0", "2.13.0+cpu"):
        monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
        compiled.compiled(torch.nn.Identity())
    assert seen == [compiled.WITHOUT_FUSED_SUMS, {}, {}]
    monkeypatch.undo()
    torch.compile(len, options=compiled.WITHOUT_FUSED_SUMS)  # raises if Inductor does not know a name


def test_bert_is_compiled_once(monkeypatch):
    """Other numbers of samples, tokens and masked tokens run the same graph."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, options: compile(model, backend="aot_eager", fullgraph=True))
    torch.manual_seed(0)
    model = MaskedLM(ModelConfig("bert", 32, 2, 2, 48, hidden_dropout=0.0), 100)
    fast = compiled.compiled(model.train())
    for num_samples, num_masked, stance in ((4, 6, "default"), (7, 6, "fail_on_recompile"), (3, 9, "fail_on_recompile")):
        cu_seqlens = torch.arange(num_samples + 1, dtype=torch.int32) * 8
        ids = torch.randint(5, 100, (8 * num_samples - 1,))
        cu_seqlens[-1] -= 1
        positions, labels = torch.randperm(len(ids))[:num_masked].sort().values, torch.randint(5, 100, (num_masked,))
        batch = Batch(ids, cu_seqlens, 8, None, masked_positions=positions, labels=labels)
        with torch.compiler.set_stance(stance):
            loss = fast(batch)
            loss.backward()
        torch.testing.assert_close(loss, model(batch))


def test_learning_rates_of_the_original():
    """Composer's linear_decay_with_warmup for 70,000 steps: up over 4,200, then down over 65,800 to alpha_f."""
    cfg = train.TrainConfig(final_lr_fraction=0.02)
    assert train.lr_at(cfg, 1) == 0
    assert train.lr_at(cfg, 2101) == pytest.approx(5e-4 / 2)
    assert train.lr_at(cfg, 4201) == pytest.approx(5e-4)
    assert train.lr_at(cfg, 4201 + 32_900) == pytest.approx(5e-4 * (0.02 + 0.98 / 2))
    assert train.lr_at(train.TrainConfig(), 70_000) == pytest.approx(5e-4 / 65_800)
    wsd = train.TrainConfig(schedule="wsd", max_steps=100, warmup_fraction=0.1, decay_fraction=0.2)
    assert [train.lr_at(wsd, step) for step in (11, 50, 80)] == [5e-4] * 3
    assert train.lr_at(wsd, 91) == pytest.approx(2.5e-4)
    falling = train.TrainConfig(max_steps=11, final_mask_prob=0.15)
    assert [train.mask_prob_at(falling, step) for step in (1, 6, 11)] == pytest.approx([0.3, 0.225, 0.15])


def test_micro_batches_fit_common_gpus():
    """base.py on 24, 40 and 80 GB: at least 8,192 tokens, more on larger GPUs, and within their memory."""

    class Card:
        device, dtype = torch.device("cuda"), torch.bfloat16
        world_size = 1

        def __init__(self, gigabytes):
            self.bytes = gigabytes * 1e9

        def gather(self, values):
            return [[self.bytes]]

    chosen = []
    for gigabytes in (24, 40, 80):
        card = Card(gigabytes)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "get_device_properties", lambda device: type("P", (), {"total_memory": card.bytes}))
            cfg = train.TrainConfig()
            tokens = estimate.choose_micro_batch_tokens(cfg, card, "triton", 137_400_384, 30_522)
            assert estimate.memory_bytes(cfg, card.dtype, True, 137_400_384, 30_522, tokens) < 0.9 * card.bytes
        chosen.append(tokens)
    assert 8192 <= chosen[0] < chosen[1] < chosen[2]


def test_estimate_knows_what_activation_checkpointing_saves():
    """Of base.py's 12 layers, the input of each and twice what one computes stay: bytes a token, in bf16."""
    sizes = [
        estimate.memory_bytes(train.TrainConfig(activation_checkpointing=on), torch.bfloat16, True, 0, 30522, 1)
        for on in (False, True)
    ]
    layer = 2 * (8 * 768 + 3 * 3072)
    assert sizes[0] - sizes[1] == 12 * layer - (12 * 2 * 768 + 2 * layer)


def test_xl_fits_the_gpus_that_its_config_names():
    rows = re.findall(r"^ +(80|141) GB +([\d,]+) +([\d,]+) +([\d,]+)", (CONFIGS / "xl.py").read_text(), re.MULTILINE)
    assert [size for size, *_ in rows] == ["80", "141"]
    for size, *printed in rows:
        for options, tokens in zip(([], ["--fp8"], ["--activation_checkpointing"]), printed):
            cfg = load_config(train.TrainConfig, [str(CONFIGS / "xl.py"), *options])
            room = estimate.fitting_tokens(cfg, torch.bfloat16, True, 1_300_328_256, 30_522, int(size) * 1e9)
            assert f"{room:,}" == tokens


def test_every_option_is_used():
    names = ("train.py", "model.py", "optim.py", "common/budget.py", "common/estimate.py")
    source = "".join((Path(train.__file__).parent / name).read_text() for name in names)
    for name in TOY_OPTIONS.keys() | {field.name for field in train.dataclasses.fields(train.TrainConfig)}:
        assert f"cfg.{name}" in source or f"self.{name}" in source or f'"{name}"' in source, name


def test_every_shipped_config_loads():
    configs = sorted(CONFIGS.glob("*.py"))
    names = {"smoke", "base", "base_512", "base_2048", "large", "xl", "bert_base", "bert_large"}
    assert {path.stem for path in configs} >= names
    for path in configs:
        load_config(train.TrainConfig, [str(path)]).check(world_size=8)


def test_help_lists_every_option(capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    for field in train.dataclasses.fields(train.TrainConfig):
        assert f"--{field.name}=" in printed, field.name


def skewed_clock():
    """Report every 0.1 s, and let rank 1's clock run three times as fast as rank 0's."""
    train.TARGET_LOG_SECONDS = 0.1
    if os.environ["RANK"] == "1":
        clock = time.perf_counter
        time.perf_counter = lambda: 3 * clock()


def test_processes_report_after_the_same_steps(data_dir, tmp_path):
    """With log_interval=0 rank 0's clock decides. With a clock each, one rank would wait to report while the other trains."""
    argv = toy_argv(data_dir, tmp_path / "run", log_interval=0, max_steps=40, eval_interval=0, hang_timeout=10)
    statuses, output = run_ranks(argv, 2, tmp_path / "ranks", {0: skewed_clock, 1: skewed_clock})
    assert statuses == [0, 0], output
    assert read_log(tmp_path / "run")[-1]["step"] == 40
