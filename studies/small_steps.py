"""What a step of few samples loses to Python, and what Muon adds to it: whole steps of configs/base.py, in turn.

    python -m studies.small_steps --out=small_steps.json          # under 2 minutes on an H200

Random tokens, all samples full. A row's time is that of the slower of host and GPU, as in training: 20 steps between two
synchronizations; medians over the turns.
"""

import itertools
import json
import os
import tempfile
import time
from dataclasses import dataclass, replace
from statistics import median

import numpy as np
import torch

import train
from common.files import write_text
from common.options import UserError, command, load_config
from common.processes import Process, device_name, pick_device
from common.trace import wait_for_gpu
from common.versions import versions
from data import Samples
from model import MaskedLM, choose_kernels
from optim import make_optimizers
from tests.toy import TOY_SIZE, make_shards

STEPS, TURNS = 20, 5


@dataclass
class SmallStepsConfig:
    out: str = ""  # JSON file for the results
    samples: str = "128,256,512,4096"  # per step
    toy: bool = False  # on the CPU, at toy size


class Row:
    """A model that trains; `step()` is one whole step."""

    def __init__(self, cfg, process, samples, graphed):
        torch.manual_seed(0)
        self.cfg, self.process = cfg, process
        self.model = MaskedLM(cfg, samples.vocab_size).to(process.device).train()
        self.optimizers = make_optimizers(self.model, cfg)
        most = min(131072, cfg.global_batch_size * cfg.seq_length)
        self.batches = samples.step_batches(0, cfg.global_batch_size, 1, cfg.mask_prob, most)
        self.batches = [batch.pinned_for(process.device) for batch in self.batches]
        backend = "triton" if process.device.type == "cuda" else "torch"
        self.graphed = train.graph_gradients(self.model, cfg, process, backend, most) if graphed else None
        self.seconds = []

    def step(self):
        train.train_step(self.model, self.optimizers, self.batches, self.cfg, self.process, 2, graphed=self.graphed)

    def turn(self, steps=STEPS):
        for _ in range(2):
            self.step()
        wait_for_gpu()
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        wait_for_gpu()
        self.seconds.append((time.perf_counter() - start) / steps)


@command
def main(argv):
    cfg = load_config(SmallStepsConfig, argv)
    device, dtype = pick_device("cpu" if cfg.toy else "auto", "auto")
    if device.type == "cpu" and not cfg.toy:
        raise UserError("there is no GPU here (--toy tries the script on the CPU)")
    process = Process(0, 1, device, dtype)
    base = train.TrainConfig(warmup_fraction=0.0, schedule="wsd", max_steps=10)
    if cfg.toy:
        base = replace(base, **TOY_SIZE, seq_length=32)
    choose_kernels("auto", base, device)
    counts, results = [int(count) for count in cfg.samples.split(",")], []
    with tempfile.TemporaryDirectory() as scratch:
        vocab_size, rng = 100 if cfg.toy else 30522, np.random.default_rng(0)
        documents = rng.integers(5, vocab_size, (max(counts), base.seq_length - 2))
        path = make_shards(os.path.join(scratch, "data"), documents, documents[:2], vocab_size=vocab_size)
        samples = Samples(path, "train", base.seq_length)
        for count in counts:
            rows = []
            for optimizer, graphed in itertools.product(("adamw", "muon"), (False, True)):
                row = Row(replace(base, optimizer=optimizer, global_batch_size=count), process, samples, graphed)
                rows += [row] if row.graphed or not graphed else []
            for row in rows * TURNS:
                row.turn(STEPS if count * base.seq_length < 200_000 else 4)
            for row in rows:
                ms, optimizer, graphed = 1000 * median(row.seconds), row.cfg.optimizer, row.graphed is not None
                rate = 1000 * sum(batch.num_tokens for batch in row.batches) / ms
                name = f"{count:5d} samples, {optimizer}{', graphed' * graphed}"
                print(f"{name}: {ms:.2f} ms, {rate:,.0f} tokens/s", flush=True)
                about = {"samples": count, "optimizer": optimizer, "graphed": graphed}
                results.append({**about, "ms": ms, "tokens_per_second": rate})
            del rows, row
            if device.type == "cuda":
                torch.cuda.empty_cache()
    if cfg.out:
        write_text(cfg.out, json.dumps({"device": device_name(device), **versions(), "rows": results}, indent=1))


if __name__ == "__main__":
    main()
