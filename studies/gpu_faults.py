"""How a run of two processes ends when one is killed, hangs, fails or is asked to stop. Two minutes on two GPUs.

    python -m studies.gpu_faults --out=gpu_faults           # writes gpu_faults.json
    python -m studies.gpu_faults --toy --out=/tmp/try       # on a CPU at toy size, to try the script

Processes are started by hand: torchrun would end the second one itself. NCCL can wait forever where Gloo, which the CPU
tests use, does not.
"""

import json
import os
import signal
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from common.options import UserError, command, load_config
from common.processes import device_name
from common.versions import versions
from tests import faults
from tests.ranks import Ranks
from tests.toy import TOY_SIZE, flags, make_documents, make_shards, read_log

AT_STEP, HANG_TIMEOUT, LONGEST = 55, 15, 60  # a step at which the checkpoint of step 50 is being written; seconds; seconds

# What happens to rank 1: {case: (what it calls before training, or the signal it gets, expected exit statuses)}.
CASES = {
    "killed": (signal.SIGKILL, [3, -9]),
    "hangs": (signal.SIGSTOP, [3, -9]),  # and is killed once rank 0 has ended
    "asked to stop": (signal.SIGTERM, [143, 143]),
    "out of memory": (partial(faults.raise_at, AT_STEP, torch.OutOfMemoryError("here")), [3, 2]),
    "a bug": (partial(faults.raise_at, AT_STEP, ValueError("here")), [3, 1]),
    "both fail": (None, [2, 2]),  # their weight_decay makes updates that are not finite
    "other options": (partial(faults.another_option, lr=1e-5), [2, 2]),
}


@dataclass
class GpuFaultsConfig:
    out: str = "gpu_faults"  # results, without the suffix
    toy: bool = False  # on the CPU, at toy size


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
            options = {
                "data_dir": data, "out_dir": out, "max_steps": 100000, "global_batch_size": 64, "log_interval": 1,
                "num_layers": 2, "eval_samples": 64, "lr": 1e-4, "checkpoint_interval": 50, "hang_timeout": HANG_TIMEOUT,
                "weight_decay": 1e30 if name == "both fail" else 0, **({**TOY_SIZE, "device": "cpu"} if cfg.toy else {}),
            }  # fmt: skip
            by_signal = isinstance(what, signal.Signals)
            fault = {} if by_signal else {1: what}
            gpus = "" if cfg.toy else os.environ.get("CUDA_VISIBLE_DEVICES", "0,1")
            ranks = Ranks(flags(options), 2, Path(scratch) / f"{number}_output", fault, gpus=gpus)
            begun = time.monotonic()
            while all(process.is_alive() for process in ranks.processes) and time.monotonic() - begun < 120:
                if by_signal and len(read_log(out)) >= AT_STEP:
                    break
                time.sleep(0.05)
            begun = time.monotonic()
            if by_signal:
                ranks.signal(what, [1])
            if what == signal.SIGSTOP:
                ranks.processes[0].join(LONGEST)
                ranks.signal(signal.SIGKILL, [1])
            statuses = ranks.wait(LONGEST)
            seconds = time.monotonic() - begun
            lines = [line for line in ranks.output().splitlines() if "rror" in line or line.startswith("stopped")]
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
