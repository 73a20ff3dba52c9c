"""What reliability costs on this machine's GPU, and whether resuming is exact there. Under 90 s on an H100.

    python -m studies.gpu_reliability --out=gpu_reliability          # writes gpu_reliability.json and .md
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

import numpy as np
import torch

import checkpoint
import train
from common import watch
from common.options import command, load_config
from common.processes import Process, device_name
from common.versions import versions
from tests.toy import TOY_SIZE, flags, make_shards, read_log


@dataclass
class GpuReliabilityConfig:
    out: str = "gpu_reliability"  # results, without the suffix
    toy: bool = False  # on the CPU, at toy size


def make_data(path, vocab_size, count, length):
    """Shards of `count` documents of random tokens, each of length / 4 to length - 1."""
    rng = np.random.default_rng(0)
    documents = [rng.integers(5, vocab_size, rng.integers(length // 4, length)) for _ in range(count)]
    return make_shards(path, documents, documents[:100], vocab_size=vocab_size)


def run(argv, stop_at=None):
    """train.main(argv), with a SIGTERM as step `stop_at` begins. Returns (exit status, seconds from SIGTERM to the end)."""
    forward_backward, sent = train.forward_backward, []

    def signalling(model, batches, num_masked, cfg, process, step, *rest):
        if step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
            sent.append(time.perf_counter())
        return forward_backward(model, batches, num_masked, cfg, process, step, *rest)

    train.forward_backward = signalling
    try:
        train.main(argv)
        status = 0
    except SystemExit as stopped:
        status = stopped.code
    finally:
        train.forward_backward = forward_backward
    return status, time.perf_counter() - sent[0] if sent else None


def exact_resume(cfg, scratch, model, steps, resumes):
    """Whether weights, moments and losses of an uninterrupted run and of one stopped and resumed are the same bits."""
    data, scratch = scratch / "small_data", scratch / model
    if not data.exists():
        make_data(data, 1000, 2000, 126)
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


def timed(function, times):
    """`function`, with the seconds of each call appended to `times`."""

    def wrapper(*args, **kwargs):
        start = time.perf_counter()
        result = function(*args, **kwargs)
        times.append(time.perf_counter() - start)
        return result

    return wrapper


def base_checkpoints(cfg, scratch):
    """A run of the base model: seconds that a save blocks training, to write and verify, and from SIGTERM to the end."""
    size = {"global_batch_size": 4096}
    if cfg.toy:
        size = {**TOY_SIZE, "global_batch_size": 16}
    data = make_data(scratch / "base_data", 1000 if cfg.toy else 30522, 2000 if cfg.toy else 20000, 126)
    out = scratch / "base"
    intervals = {"log_interval": 1, "eval_interval": 0, "checkpoint_interval": 14}
    argv = flags({"data_dir": data, "out_dir": out, "max_steps": 1000, **intervals, **size})
    blocked, written, verified = [], [], []
    originals = checkpoint.Saver.save, checkpoint.write, checkpoint.damage
    checkpoint.Saver.save = timed(checkpoint.Saver.save, blocked)
    checkpoint.write = timed(checkpoint.write, written)
    checkpoint.damage = timed(checkpoint.damage, verified)
    try:
        status, after_sigterm = run(argv, stop_at=30)  # while the second checkpoint is being written
    finally:
        checkpoint.Saver.save, checkpoint.write, checkpoint.damage = originals
    assert status == 128 + signal.SIGTERM and checkpoint.steps(out)[0] == 30, (status, checkpoint.steps(out))
    steps = {record["step"]: record for record in read_log(out)}
    ms = {step: 1000 / record["samples_per_second"] * size["global_batch_size"] for step, record in steps.items()}
    path = out / "step_00000030"
    return {
        "parameters": read_log(out, "start")[0]["num_params"],
        "bytes": sum(file.stat().st_size for file in path.iterdir()),
        "step_ms": median(ms[step] for step in range(7, 14)),
        "step_ms_while_writing": median(ms[step] for step in range(15, 20)),
        "save_holds_up_seconds": blocked[:2],
        "write_and_verify_seconds": written,
        "verify_seconds": verified[-len(written) :],
        "sigterm_to_end_seconds": after_sigterm,
    }


def guards(cfg, device):
    """Milliseconds of each guard: found_inf in AdamW, measured on and off in turn; the stop flag; the checksum."""
    model_cfg = train.TrainConfig(**TOY_SIZE if cfg.toy else {})
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
    process = Process(0, 1, device, torch.float32)
    sums = []
    for _ in range(12):
        synchronize()
        start = time.perf_counter()
        checkpoint.compare_parameters(model, process, 1)
        sums.append(1000 * (time.perf_counter() - start))
    watchdog = watch.Watch(0)
    watchdog.world_size = 2  # takes the path of several processes; there is no store to ask
    flags = []
    for i in range(50):
        asked = torch.zeros((), device=device)
        synchronize()
        start = time.perf_counter()
        watchdog.at(i)
        watchdog.all_stop(asked)
        flags.append(1000 * (time.perf_counter() - start))
    watchdog.close()
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
    blocked = 1000 * median(saves["save_holds_up_seconds"])
    written, verified = median(saves["write_and_verify_seconds"]), median(saves["verify_seconds"])
    slower = max(0.0, saves["step_ms_while_writing"] / step - 1) * 1000 * written
    rows = []
    for exact in results["exact_resume"]:
        rows.append((
            f"resume, {exact['model']}",
            f"{exact['steps']} steps without and with {exact['resumes']} resumes, {exact['kernels']} kernels, {exact['dtype']}: "
            f"same bits: weights {exact['weights_equal']}, optimizer {exact['optimizer_equal']}, losses {exact['losses_equal']}",
        ))  # fmt: skip
    rows.append((
        "checkpoint",
        f"{saves['bytes'] / 1e9:.2f} GB: training blocked for {blocked / 1000:.2f} s, written and verified in the background "
        f"in {written:.1f} s ({verified:.1f} s to verify)",
    ))  # fmt: skip
    rows.append(("SIGTERM to end", f"{saves['sigterm_to_end_seconds']:.1f} s"))
    for gpus in (1, 8):
        this_step = step / gpus  # the same global batch
        per_hour = 3_600_000 / (interval * this_step)  # saves
        shares = {
            "saves": (blocked + slower) / (interval * this_step),
            "checksum": costs["checksum_ms"] / (interval * this_step) if gpus > 1 else 0.0,
            "found_inf": max(0.0, costs["found_inf_ms"]) / this_step,
            "stop flag": costs["stop_flag_ms"] / this_step if gpus > 1 else 0.0,
        }
        text = ", ".join(f"{name} {100 * share:.3f} %" for name, share in shares.items())
        seconds = per_hour * (blocked + slower) / 1000
        rows.append((
            "overhead, one GPU" if gpus == 1 else f"overhead, {gpus} GPUs (calculated)",
            f"step {this_step:.0f} ms, {per_hour:.1f} saves an hour cost {seconds:.1f} s; {text}; "
            f"together {100 * sum(shares.values()):.3f} %",
        ))  # fmt: skip
    return "\n".join(["| what | figure |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows)])


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
        results["guards"] = guards(cfg, device)
    results["seconds"] = time.perf_counter() - start
    text = table(results)
    Path(f"{cfg.out}.json").write_text(json.dumps(results, indent=1) + "\n")
    Path(f"{cfg.out}.md").write_text(text + "\n")
    print(json.dumps(results, indent=1))
    print(text)
    exact = results["exact_resume"][0]  # MosaicBERT; BERT's depends on PyTorch's attention
    assert exact["weights_equal"] and exact["optimizer_equal"] and exact["losses_equal"]


if __name__ == "__main__":
    main()
