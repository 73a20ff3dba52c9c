"""What checkpoints cost on this machine's GPU, and whether resuming is exact there. Under 90 s on an H100.

    python -m studies.gpu_reliability --out=gpu_reliability          # writes gpu_reliability.json
    python -m studies.gpu_reliability --toy --out=/tmp/try           # on a CPU at toy size, to try the script
"""

import json
import os
import platform
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from unittest import mock

import torch

import checkpoint
import train
from common.options import command, load_config
from common.processes import device_name
from common.versions import versions
from tests.toy import TOY_SIZE, flags, make_documents, make_shards, read_log


@dataclass
class GpuReliabilityConfig:
    out: str = "gpu_reliability"  # results, without the suffix
    toy: bool = False  # on the CPU, at toy size


def run(argv, stop_at=None):
    """train.main(argv), with a SIGTERM as step `stop_at` begins. Returns (exit status, seconds from SIGTERM to the end)."""
    forward_backward, sent = train.forward_backward, []

    def signalling(model, batches, num_masked, cfg, process, step, *rest):
        if step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
            sent.append(time.perf_counter())
        return forward_backward(model, batches, num_masked, cfg, process, step, *rest)

    status = 0
    try:
        with mock.patch.object(train, "forward_backward", signalling):
            train.main(argv)
    except SystemExit as stopped:
        status = stopped.code
    return status, time.perf_counter() - sent[0] if sent else None


def exact_resume(cfg, scratch, model, steps, resumes):
    """Whether weights, moments and losses of an uninterrupted run and of one stopped and resumed are the same bits."""
    data, scratch = scratch / "small_data", scratch / model
    if not data.exists():
        make_shards(data, make_documents(2000, longest=126, shortest=31, vocab_size=1000), vocab_size=1000)
    size = {"hidden_size": 256, "num_layers": 4, "num_heads": 4, "intermediate_size": 512, "global_batch_size": 128}
    if cfg.toy:
        size = {**TOY_SIZE, "global_batch_size": 8}
    intervals = {"log_interval": 1, "eval_interval": 0, "checkpoint_interval": 1000}
    argv = flags({"model": model, "data_dir": data, "max_steps": steps, **intervals, **size})
    start = time.perf_counter()
    assert run([*argv, f"--out_dir={scratch}/straight"])[0] == 0
    for stop_at in [(i + 1) * steps // (resumes + 1) for i in range(resumes)]:
        status, _ = run([*argv, f"--out_dir={scratch}/resumed"], stop_at)
        assert status == 128 + signal.SIGTERM, status
    assert run([*argv, f"--out_dir={scratch}/resumed"])[0] == 0
    resumed_from = [record["resumed_from"] for record in read_log(scratch / "resumed", "start")]
    assert len(resumed_from) == resumes + 1 and None not in resumed_from[1:]
    last = f"step_{steps:08d}"
    same = {
        name: (scratch / "straight" / last / name).read_bytes() == (scratch / "resumed" / last / name).read_bytes()
        for name in ("model.safetensors", "optimizer.safetensors")
    }
    losses = [[(r["step"], r["loss"], r["grad_norm"]) for r in read_log(scratch / out)] for out in ("straight", "resumed")]
    first = read_log(scratch / "straight", "start")[0]
    return {
        "model": model, "steps": steps, "resumes": resumes, "kernels": first["kernels"], "dtype": first["dtype"],
        "weights_equal": same["model.safetensors"], "optimizer_equal": same["optimizer.safetensors"],
        "losses_equal": losses[0] == losses[1] and len(losses[0]) == steps,
        "first_loss": losses[0][0][1], "last_loss": losses[0][-1][1], "seconds": time.perf_counter() - start,
    }  # fmt: skip


def base_checkpoints(cfg, scratch):
    """A run of the base model: seconds that a save blocks training, to write and verify, and from SIGTERM to the end."""
    size = {"global_batch_size": 4096}
    if cfg.toy:
        size = {**TOY_SIZE, "global_batch_size": 16}
    vocab_size = 1000 if cfg.toy else 30522
    documents = make_documents(2000 if cfg.toy else 20000, longest=126, shortest=31, vocab_size=vocab_size)
    data = make_shards(scratch / "base_data", documents, vocab_size=vocab_size)
    out = scratch / "base"
    intervals = {"log_interval": 1, "eval_interval": 0, "checkpoint_interval": 14}
    argv = flags({"data_dir": data, "out_dir": out, "max_steps": 1000, **intervals, **size})
    save, blocked = checkpoint.Saver.save, []

    def timed(*args):
        start = time.perf_counter()
        save(*args)
        blocked.append(time.perf_counter() - start)

    with mock.patch.object(checkpoint.Saver, "save", timed):
        status, after_sigterm = run(argv, stop_at=30)  # while the second checkpoint is being written
    assert status == 128 + signal.SIGTERM and checkpoint.steps(out)[0] == 30, (status, checkpoint.steps(out))
    steps = {record["step"]: record for record in read_log(out)}
    ms = {step: 1000 / record["samples_per_second"] * size["global_batch_size"] for step, record in steps.items()}
    path, start = out / "step_00000030", time.perf_counter()
    assert checkpoint.damage(path) is None
    verify_seconds = time.perf_counter() - start
    return {
        "parameters": read_log(out, "start")[0]["num_params"],
        "bytes": sum(file.stat().st_size for file in path.iterdir()),
        "step_ms": median(ms[step] for step in range(7, 14)),
        "step_ms_while_writing": median(ms[step] for step in range(15, 20)),
        "save_holds_up_seconds": blocked[:2],
        "write_and_verify_seconds": [record["seconds"] for record in read_log(out, "checkpoint")],
        "verify_seconds": verify_seconds,
        "sigterm_to_end_seconds": after_sigterm,
    }


@command
def main(argv):
    cfg = load_config(GpuReliabilityConfig, argv)
    start = time.perf_counter()
    device = torch.device("cpu" if cfg.toy else "cuda")
    about = {"device": device_name(device), "python": platform.python_version(), **versions()}
    results = {"about": about, "date": time.strftime("%Y-%m-%d")}
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        results["exact_resume"] = [
            exact_resume(cfg, scratch, "mosaicbert", 40 if cfg.toy else 200, 4),
            exact_resume(cfg, scratch, "bert", 15 if cfg.toy else 60, 2),
        ]
        results["base_checkpoints"] = base_checkpoints(cfg, scratch)
    results["seconds"] = time.perf_counter() - start
    Path(f"{cfg.out}.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))
    exact = results["exact_resume"][0]  # MosaicBERT; BERT's depends on PyTorch's attention
    assert exact["weights_equal"] and exact["optimizer_equal"] and exact["losses_equal"]


if __name__ == "__main__":
    main()
