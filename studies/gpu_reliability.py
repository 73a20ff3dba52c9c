"""What reliability costs, and whether resuming is exact, on this machine's GPU; under 90 s on an H100.

    python tests/gpu_reliability.py --out=gpu_reliability          # writes .json and .md
    python tests/gpu_reliability.py --toy --out=/tmp/try           # the same on a CPU at toy size, to try the script
"""

import json
import os
import platform
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median


import numpy as np  # noqa: E402
import torch

import checkpoint
import train
from common import watch
from common.options import command, load_config
from tests.toy import make_shards, read_log


@dataclass
class GpuReliabilityConfig:
    out: str = "gpu_reliability"  # results, without the suffix
    toy: bool = False  # on the CPU, at toy size


def make_data(path, vocab_size, count, length):
    rng = np.random.default_rng(0)
    documents = [rng.integers(5, vocab_size, rng.integers(length // 4, length)) for _ in range(count)]
    return make_shards(path, documents, documents[:100], vocab_size=vocab_size)


def run(argv, stop_at=None):
    """train.main(argv), which gets SIGTERM as it begins step `stop_at`. Returns (exit status, seconds after SIGTERM)."""
    forward_backward, sent = train.forward_backward, []

    def signalling(model, batches, num_masked, cfg, process, step, *gradient_sum):
        if step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
            sent.append(time.perf_counter())
        return forward_backward(model, batches, num_masked, cfg, process, step, *gradient_sum)

    train.forward_backward = signalling
    try:
        train.main(argv)
        status = 0
    except SystemExit as stopped:
        status = stopped.code
    finally:
        train.forward_backward = forward_backward
    return status, time.perf_counter() - sent[0] if sent else None


def options(values):
    return [f"--{name}={value}" for name, value in values.items()]


def exact_resume(cfg, scratch, model, steps, resumes):
    """So many steps at once, and with stops in between: whether weights, moments and losses are the same bits."""
    data, scratch = scratch / "small_data", scratch / model
    if not data.exists():
        make_data(data, 1000, 2000, 126)
    size = {"hidden_size": 256, "num_layers": 4, "num_heads": 4, "intermediate_size": 512, "global_batch_size": 128}
    if cfg.toy:
        size = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 48, "global_batch_size": 8}
    argv = options({"model": model, "data_dir": data, "max_steps": steps, "log_interval": 1, "eval_interval": 0, "checkpoint_interval": 1000, **size})
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


def timed(function, times):
    """Wrap a function so that the seconds of each call are appended to `times`."""

    def wrapper(*args, **kwargs):
        start = time.perf_counter()
        result = function(*args, **kwargs)
        times.append(time.perf_counter() - start)
        return result

    return wrapper


def base_checkpoints(cfg, scratch):
    """The base model's run: seconds a save holds training up, seconds to write and verify, seconds after SIGTERM."""
    size = {"global_batch_size": 4096}
    if cfg.toy:
        size = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 48, "global_batch_size": 16}
    data = make_data(scratch / "base_data", 1000 if cfg.toy else 30522, 2000 if cfg.toy else 20000, 126)
    out = scratch / "base"
    argv = options({"data_dir": data, "out_dir": out, "max_steps": 1000, "log_interval": 1, "eval_interval": 0, "checkpoint_interval": 14, **size})
    held_up, written, verified = [], [], []
    originals = checkpoint.RunDirectory.save, checkpoint.write, checkpoint.damage
    checkpoint.RunDirectory.save = timed(checkpoint.RunDirectory.save, held_up)
    checkpoint.write = timed(checkpoint.write, written)
    checkpoint.damage = timed(checkpoint.damage, verified)
    try:
        status, after_sigterm = run(argv, stop_at=30)  # while the second checkpoint is being written
    finally:
        checkpoint.RunDirectory.save, checkpoint.write, checkpoint.damage = originals
    assert status == 128 + signal.SIGTERM and checkpoint.steps(out)[0] == 30, (status, checkpoint.steps(out))
    steps = {record["step"]: record for record in read_log(out)}
    ms = {step: 1000 / record["samples_per_second"] * size["global_batch_size"] for step, record in steps.items()}
    path = out / "step_00000030"
    return {
        "parameters": read_log(out, "start")[0]["num_params"],
        "bytes": sum(file.stat().st_size for file in path.iterdir()),
        "step_ms": median(ms[step] for step in range(7, 14)),
        "step_ms_while_writing": median(ms[step] for step in range(15, 20)),
        "save_holds_up_seconds": held_up[:2],
        "write_and_verify_seconds": written,
        "verify_seconds": verified[-len(written) :],
        "sigterm_to_end_seconds": after_sigterm,
    }


def guards(cfg, device):
    """Milliseconds of what each step pays for: found_inf in AdamW, on and off in turn; the stop flag; the checksum."""
    size = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 48} if cfg.toy else {}
    model_cfg = train.TrainConfig(**size)
    model = train.MaskedLM(model_cfg, 1000 if cfg.toy else 30522).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    norm = torch.ones((), device=device)

    def synchronize():
        if device.type == "cuda":
            torch.cuda.synchronize()

    def step(guarded):
        synchronize()
        start = time.perf_counter()
        optimizer.found_inf = (~norm.isfinite()).float() if guarded else None
        optimizer.step()
        synchronize()
        return 1000 * (time.perf_counter() - start)

    for i in range(6):
        step(i % 2)
    pairs = [(step(True), step(False)) for _ in range(100)]
    process = train.Process(0, 1, device, torch.float32)
    sums = []
    for _ in range(12):
        synchronize()
        start = time.perf_counter()
        checkpoint.compare_parameters(model, process, 1)
        sums.append(1000 * (time.perf_counter() - start))
    guard = watch.Watch(0)
    guard.world_size = 2  # the way of several processes; the store is not asked
    flags = []
    for i in range(50):
        asked = torch.zeros((), device=device)
        synchronize()
        start = time.perf_counter()
        guard.at(i)
        guard.all_stop(asked)
        flags.append(1000 * (time.perf_counter() - start))
    guard.close()
    return {
        "adamw_ms": median(off for _, off in pairs),
        "found_inf_ms": median(on - off for on, off in pairs),
        "checksum_ms": median(sums[2:]),
        "stop_flag_ms": median(flags[5:]),
    }


def table(results):
    """Markdown rows for results/reliability.md."""
    saves, costs = results["base_checkpoints"], results["guards"]
    step, interval = saves["step_ms"], train.TrainConfig().checkpoint_interval
    held_up = 1000 * median(saves["save_holds_up_seconds"])
    slower = max(0.0, saves["step_ms_while_writing"] / step - 1) * 1000 * median(saves["write_and_verify_seconds"])
    rows = [
        *((f"resume, {exact['model']}", f"{exact['steps']} steps at once and with {exact['resumes']} resumes, {exact['kernels']} "
           f"kernels, {exact['dtype']}: the same bits: weights {exact['weights_equal']}, optimizer {exact['optimizer_equal']}, "
           f"losses {exact['losses_equal']}") for exact in results["exact_resume"]),
        ("checkpoint", f"{saves['bytes'] / 1e9:.2f} GB: training held up {held_up / 1000:.2f} s, written and verified in the "
         f"background in {median(saves['write_and_verify_seconds']):.1f} s, of which verifying {median(saves['verify_seconds']):.1f} s"),
        ("SIGTERM to end", f"{saves['sigterm_to_end_seconds']:.1f} s"),
    ]  # fmt: skip
    for gpus in (1, 8):
        this_step = step / gpus  # of the same global batch
        hour = 3_600_000 / (interval * this_step)  # saves in an hour
        shares = {
            "saves": (held_up + slower) / (interval * this_step),
            "checksum": costs["checksum_ms"] / (interval * this_step) if gpus > 1 else 0.0,
            "found_inf": max(0.0, costs["found_inf_ms"]) / this_step,
            "stop flag": costs["stop_flag_ms"] / this_step if gpus > 1 else 0.0,
        }
        text = ", ".join(f"{name} {100 * share:.3f} %" for name, share in shares.items())
        seconds = hour * (held_up + slower) / 1000
        rows.append(("overhead, one GPU" if gpus == 1 else f"overhead, {gpus} GPUs (calculated)", f"step {this_step:.0f} ms, {hour:.1f} saves an hour take "
                     f"{seconds:.1f} s of it; {text}; together {100 * sum(shares.values()):.3f} %"))  # fmt: skip
    return "\n".join(["| what | figure |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows)])


@command
def main(argv):
    cfg = load_config(GpuReliabilityConfig, argv)
    start = time.perf_counter()
    device = torch.device("cpu" if cfg.toy else "cuda")
    about = {"device": train.device_name(device), "python": platform.python_version(), **checkpoint.versions()}
    results = {"about": about, "date": time.strftime("%Y-%m-%d")}
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        results["exact_resume"] = [
            exact_resume(cfg, scratch, "mosaicbert", 40 if cfg.toy else 200, 4),
            exact_resume(cfg, scratch, "bert", 15 if cfg.toy else 60, 2),
        ]
        results["base_checkpoints"] = base_checkpoints(cfg, scratch)
        results["guards"] = guards(cfg, device)
    results["seconds"] = time.perf_counter() - start
    text = table(results)
    Path(f"{cfg.out}.json").write_text(json.dumps(results, indent=1) + "\n")
    Path(f"{cfg.out}.md").write_text(text + "\n")
    print(json.dumps(results, indent=1))
    print(text)
    exact = results["exact_resume"][0]  # of BERT's, PyTorch's attention decides
    assert exact["weights_equal"] and exact["optimizer_equal"] and exact["losses_equal"]


if __name__ == "__main__":
    main()
