"""Do several GPUs train as one does, and does a run killed on several resume on one? Under a minute on two H100s.

    python -m studies.gpu_scaling --out=gpu_scaling          # writes gpu_scaling.json
    python -m studies.gpu_scaling --toy --out=/tmp/try       # on a CPU at toy size, to try the script

The base model, without dropout, for 100 steps of 64 samples. Several GPUs may differ from one only in the order of sums,
and so does one GPU that splits the batch into more micro-batches. That gives a bound which knows nothing of several GPUs:
twice the largest relative difference in a step's loss between splits on one GPU, which shows the rounding of bf16. All
runs train at the same time, side by side on the same GPUs.
"""

import json
import os
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from common.options import UserError, command, load_config
from common.processes import device_name
from common.versions import versions
from tests.ranks import descendants
from tests.toy import TOY_SIZE, flags, make_documents, make_shards, read_log, start_train

CHECKPOINT, KILLED_AFTER = 40, 50  # steps: of the checkpoint to resume from, and of the kill at the earliest
SUMS_IN_FP32 = 1e-6  # relative: where everything is fp32, splits may agree by chance


@dataclass
class GpuScalingConfig:
    gpus: int = 2  # to compare with one
    steps: int = 100
    batch: int = 64  # samples per step
    out: str = "gpu_scaling"  # results, without the suffix
    toy: bool = False  # on the CPU, at toy size


class Run:
    """train.py, started on the GPUs `visible`; each process splits its share of a step into about `splits` micro-batches."""

    def __init__(self, cfg, data, out, visible, splits=1, **options):
        self.out, tokens = out, cfg.batch * 128 // len(visible) // splits
        toy = {**TOY_SIZE, "device": "cpu", "lr": 3e-3} if cfg.toy else {}
        options = {
            "data_dir": data, "out_dir": out, "max_steps": cfg.steps, "global_batch_size": cfg.batch, "log_interval": 1,
            "micro_batch_tokens": max(128, tokens), "hidden_dropout": 0, "lr": 1e-4, "warmup_fraction": 0.3,
            "eval_interval": 0, "eval_samples": 64, "checkpoint_interval": 1000, **toy, **options,
        }  # fmt: skip
        out.parent.mkdir(parents=True, exist_ok=True)
        self.output = out.with_suffix(".txt")
        self.process = start_train(flags(options), visible, self.output)

    def kill(self):
        for pid in [self.process.pid, *descendants(self.process.pid)]:
            os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def check(self):
        if status := self.process.wait():
            raise UserError(f"train.py ended with {status}: {self.output.read_text()[-3000:]}")

    def records(self):
        return read_log(self.out)


def largest_difference(records, others):
    """The largest relative difference of two runs' losses at the same step."""
    losses, others = ({record["step"]: record["loss"] for record in run} for run in (records, others))
    assert losses.keys() == others.keys()
    return max(abs(others[step] / losses[step] - 1) for step in losses)


@command
def main(argv):
    cfg = load_config(GpuScalingConfig, argv)
    if not cfg.toy and torch.cuda.device_count() < cfg.gpus:
        hint = "--toy tries the script on any machine"
        raise UserError(f"--gpus={cfg.gpus}: this machine has {torch.cuda.device_count()} ({hint})")
    begun, everywhere = time.perf_counter(), list(range(cfg.gpus))
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        vocab_size = 500 if cfg.toy else 30522
        documents = make_documents(8000, longest=127, shortest=30, vocab_size=vocab_size)
        data = make_shards(scratch / "data", documents, documents[:64], vocab_size=vocab_size)
        killed = Run(cfg, data, scratch / "killed", everywhere, checkpoint_interval=CHECKPOINT)
        many = Run(cfg, data, scratch / "many", everywhere)
        one, three, five = (
            Run(cfg, data, scratch / f"splits_{splits}", [i % cfg.gpus], splits) for i, splits in enumerate((1, 3, 5))
        )
        while not (killed.out / f"step_{CHECKPOINT:08d}").exists() or len(killed.records()) < KILLED_AFTER:
            if killed.process.poll() is not None:
                raise UserError(f"train.py ended before it could be killed: {killed.output.read_text()[-3000:]}")
            time.sleep(0.01)
        killed.kill()
        killed_at = len(killed.records())
        resumed = Run(cfg, data, killed.out, [0], checkpoint_interval=CHECKPOINT)
        for run in (one, three, five, many, resumed):
            run.check()
        starts = read_log(killed.out, "start")
        tokens = [[record["tokens"] for record in run.records()] for run in (one, many, resumed)]
        spread = max(largest_difference(one.records(), run.records()) for run in (three, five))
        results = {
            "device": device_name(torch.device("cpu" if cfg.toy else "cuda")),
            **versions(),
            "gpus": cfg.gpus,
            "steps": cfg.steps,
            "tokens_equal": tokens[0] == tokens[1] == tokens[2],
            "first_loss": one.records()[0]["loss"],
            "last_loss": one.records()[-1]["loss"],
            "spread_of_cuts_on_one": spread,
            "bound": 2 * spread + SUMS_IN_FP32,
            "largest_difference_of_several": largest_difference(one.records(), many.records()),
            "largest_difference_of_resumed": largest_difference(one.records(), resumed.records()),
            "killed_after_step": killed_at,
            "resumed_from": Path(starts[-1]["resumed_from"]).name,
            "processes": [start["world_size"] for start in starts],
            "seconds": round(time.perf_counter() - begun, 1),
        }
    text = json.dumps(results, indent=1)
    Path(f"{cfg.out}.json").write_text(text + "\n")
    print(text)
    assert results["tokens_equal"]
    assert results["processes"] == [cfg.gpus, 1] and starts[-1]["resumed_from"]
    assert len(tokens[0]) == cfg.steps
    for name in ("several", "resumed"):
        assert results[f"largest_difference_of_{name}"] <= results["bound"], name


if __name__ == "__main__":
    main()
