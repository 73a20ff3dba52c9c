"""How a run of two processes ends when one of them is lost, hangs, fails or is asked to stop; two minutes on two GPUs.

    python tests/gpu_faults.py --out=gpu_faults           # writes .json
    python tests/gpu_faults.py --toy --out=/tmp/try       # the same on a CPU at toy size, to try the script

The processes are started by hand, without torchrun, which would end the second one for them. NCCL has ways to wait for
ever that Gloo, on which the other tests run, does not have.
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

import checkpoint
from common.options import UserError, command, load_config
from studies.gpu_scaling import make_data
from tests.toy import ROOT, read_log
from common.processes import device_name

AT_STEP, HANG_TIMEOUT, LONGEST = 55, 15, 60  # a step, while the checkpoint of step 50 is written; seconds; seconds

# What is done to rank 1: (to its code before it starts, or a signal to it), and with which statuses both ranks end.
CASES = {
    "killed": (signal.SIGKILL, [3, -9]),
    "hangs": (signal.SIGSTOP, [3, -9]),  # it is killed when rank 0 has ended
    "asked to stop": (signal.SIGTERM, [143, 143]),
    "out of memory": (f"faults.raise_at({AT_STEP}, torch.OutOfMemoryError('here'))", [3, 2]),
    "a bug": (f"faults.raise_at({AT_STEP}, ValueError('here'))", [3, 1]),
    "both fail": ("pass", [2, 2]),  # updates that are not finite, by their weight_decay
    "other options": ("faults.another_option(lr=1e-5)", [2, 2]),
}


@dataclass
class GpuFaultsConfig:
    out: str = "gpu_faults"  # results, without the suffix
    toy: bool = False  # on the CPU, at toy size


def start(cfg, data, out, port, before, **more):
    """Both ranks of a run, whose rank 1 calls `before` first."""
    options = {
        "data_dir": data, "out_dir": out, "max_steps": 100000, "global_batch_size": 64, "log_interval": 1, "num_layers": 2,
        "eval_samples": 64, "lr": 1e-4, "checkpoint_interval": 50, "hang_timeout": HANG_TIMEOUT, **more,
    }  # fmt: skip
    if cfg.toy:
        options |= {"hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "device": "cpu"}
    argv = [f"--{name}={value}" for name, value in options.items()]
    ranks = []
    for rank in range(2):
        code = f"import faults, torch, train; {before if rank else 'pass'}; train.main({argv!r})"
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        paths = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT}/tests", "OMP_NUM_THREADS": 1, "PYTHONFAULTHANDLER": 1}
        environment = {**os.environ, **{name: str(value) for name, value in {**place, **paths}.items()}}
        with open(f"{out}.{rank}.txt", "w") as output:
            ranks.append(subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=output, stderr=output))
    return ranks


def ended(process):
    try:
        return process.wait(LONGEST)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)  # shows where it stands
        time.sleep(2)
        process.kill()
        return f"not after {LONGEST} s"


def steps_of(out):
    return len(read_log(out)) if (out / "log.jsonl").exists() else 0


@command
def main(argv):
    cfg = load_config(GpuFaultsConfig, argv)
    if not cfg.toy and torch.cuda.device_count() < 2:
        raise UserError("two GPUs are needed (--toy tries the script on any machine)")
    device = device_name(torch.device("cpu" if cfg.toy else "cuda"))
    results = {"device": device, **checkpoint.versions(), "hang_timeout": HANG_TIMEOUT, "cases": {}}
    with tempfile.TemporaryDirectory() as scratch:
        data = make_data(Path(scratch) / "data", 500 if cfg.toy else 30522)
        for number, (name, (what, expected)) in enumerate(CASES.items()):
            out = Path(scratch) / str(number)
            by_signal = isinstance(what, signal.Signals)
            more = {"weight_decay": 1e30} if name == "both fail" else {}
            ranks = start(cfg, data, out, 29700 + number, "pass" if by_signal else what, **more)
            begun = time.monotonic()
            while all(process.poll() is None for process in ranks) and time.monotonic() - begun < 120:
                if by_signal and steps_of(out) >= AT_STEP:
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
