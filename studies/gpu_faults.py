"""How a run of two processes ends when one is killed, hangs, fails or is asked to stop. Two minutes on two GPUs.

    python -m studies.gpu_faults --out=gpu_faults           # writes gpu_faults.json
    python -m studies.gpu_faults --toy --out=/tmp/try       # on a CPU at toy size, to try the script

Processes are started by hand: torchrun would end the second one itself. NCCL can wait forever where Gloo, which the CPU
tests use, does not.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from common.options import UserError, command, load_config
from common.processes import device_name
from common.versions import versions
from tests.toy import ROOT, TOY_SIZE, flags, make_documents, make_shards, read_log

AT_STEP, HANG_TIMEOUT, LONGEST = 55, 15, 60  # a step at which the checkpoint of step 50 is being written; seconds; seconds

# What happens to rank 1: {case: (code it runs before training, or the signal it gets, expected exit statuses)}.
CASES = {
    "killed": (signal.SIGKILL, [3, -9]),
    "hangs": (signal.SIGSTOP, [3, -9]),  # and is killed once rank 0 has ended
    "asked to stop": (signal.SIGTERM, [143, 143]),
    "out of memory": (f"faults.raise_at({AT_STEP}, torch.OutOfMemoryError('here'))", [3, 2]),
    "a bug": (f"faults.raise_at({AT_STEP}, ValueError('here'))", [3, 1]),
    "both fail": ("pass", [2, 2]),  # their weight_decay makes updates that are not finite
    "other options": ("faults.another_option(lr=1e-5)", [2, 2]),
}


@dataclass
class GpuFaultsConfig:
    out: str = "gpu_faults"  # results, without the suffix
    toy: bool = False  # on the CPU, at toy size


def start(cfg, data, out, port, fault, **more):
    """Start both ranks of a run; rank 1 executes the code `fault` first."""
    options = {
        "data_dir": data, "out_dir": out, "max_steps": 100000, "global_batch_size": 64, "log_interval": 1, "num_layers": 2,
        "eval_samples": 64, "lr": 1e-4, "checkpoint_interval": 50, "hang_timeout": HANG_TIMEOUT, **more,
    }  # fmt: skip
    if cfg.toy:
        options |= {**TOY_SIZE, "device": "cpu"}
    ranks = []
    for rank in range(2):
        code = f"import torch, train; from tests import faults; {fault if rank else 'pass'}; train.main({flags(options)!r})"
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        fixed = {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": 1, "PYTHONFAULTHANDLER": 1}
        environment = {**os.environ, **{name: str(value) for name, value in {**place, **fixed}.items()}}
        with open(f"{out}.{rank}.txt", "w") as output:
            ranks.append(subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=output, stderr=output))
    return ranks


def ended(process):
    """The exit status of a process, or a text if it is still alive after LONGEST seconds."""
    try:
        return process.wait(LONGEST)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)  # dumps its stacks
        time.sleep(2)
        process.kill()
        return f"not after {LONGEST} s"


def steps_logged(out):
    return len(read_log(out)) if (out / "log.jsonl").exists() else 0


@command
def main(argv):
    cfg = load_config(GpuFaultsConfig, argv)
    if not cfg.toy and torch.cuda.device_count() < 2:
        raise UserError("needs two GPUs (--toy tries the script on any machine)")
    device = device_name(torch.device("cpu" if cfg.toy else "cuda"))
    results = {"device": device, **versions(), "hang_timeout": HANG_TIMEOUT, "cases": {}}
    with tempfile.TemporaryDirectory() as scratch:
        vocab_size = 500 if cfg.toy else 30522
        documents = make_documents(8000, longest=127, shortest=30, vocab_size=vocab_size)
        data = make_shards(Path(scratch) / "data", documents, documents[:64], vocab_size=vocab_size)
        for number, (name, (what, expected)) in enumerate(CASES.items()):
            out = Path(scratch) / str(number)
            by_signal = isinstance(what, signal.Signals)
            more = {"weight_decay": 1e30} if name == "both fail" else {}
            ranks = start(cfg, data, out, 29700 + number, "pass" if by_signal else what, **more)
            begun = time.monotonic()
            while all(process.poll() is None for process in ranks) and time.monotonic() - begun < 120:
                if by_signal and steps_logged(out) >= AT_STEP:
                    break
                time.sleep(0.05)
            begun = time.monotonic()
            if by_signal:
                ranks[1].send_signal(what)
            statuses = [ended(ranks[0])]
            if what == signal.SIGSTOP:
                ranks[1].kill()
            statuses.append(ended(ranks[1]))
            seconds = time.monotonic() - begun
            lines = [line for rank in range(2) for line in Path(f"{out}.{rank}.txt").read_text().splitlines()]
            if all(isinstance(status, int) for status in statuses):
                lines = [line for line in lines if "rror" in line or line.startswith("stopped")]
            results["cases"][name] = {
                "statuses": statuses,
                "expected": expected,
                "seconds": round(seconds, 1),
                "checkpoints": sorted(path.name for path in out.glob("step_*")),
                "said": lines,
            }
            print(name, json.dumps(results["cases"][name]), flush=True)
            Path(f"{cfg.out}.json").write_text(json.dumps(results, indent=1) + "\n")
    for name, case in results["cases"].items():
        assert case["statuses"] == case["expected"], name
        assert any(line.startswith(("error: ", "stopped", "ValueError")) for line in case["said"]), name


if __name__ == "__main__":
    main()
