"""How training speeds up with more GPUs.

    python -m studies.scaling                                                # on 1, 2, 4 and 8 GPUs, if there are as many
    python -m studies.scaling --gpus=2 --models=base
    torchrun --nnodes=2 ... -m studies.scaling --out=out/scaling_16.json     # on torchrun's processes, several nodes too
    python -m tools.plot --scaling=out/scaling.json --out=scaling.svg

A step is train.py's own, from data.py's micro-batches, made during the step before, to fused AdamW, on random tokens with
C4's lengths. For each number of GPUs there are four kinds of steps. Kinds with the same batch use the same samples, and
take turns, so that all see the same clocks and temperatures:

    global     the recipe's batch, 4,096 samples, shared by all GPUs (strong scaling)
    per_gpu    512 samples on each GPU, which is the recipe's batch on eight (weak scaling)
    and both on each GPU alone, while all others are busy too: the speed that counts as 100 % efficiency

A block is a number of consecutive steps after two untimed ones; figures are medians over blocks. Exposed communication is a
step's time minus that of the same step without DistributedDataParallel, in ms.

Read next: tools/plot.py
"""

import datetime
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist

import train
from common import estimate, processes
from common.files import write_text
from common.options import UserError, command, load_config
from common.processes import Process
from common.versions import versions
from data import prefetch
from model import MaskedLM, choose_kernels, matrix_flops
from studies.bench_steps import Data
from tools import plot

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = {
    "base": ["configs/base.py"],
    "large": ["configs/large.py"],
    "bert": ["configs/bert_base.py", "--compile=true"],
}
TITLES = plot.SCALING_NAMES
TOY = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "intermediate_size": 48, "compile": "false", "device": "cpu"}

TURNS = 3  # blocks of each kind
BLOCK_SECONDS = 1.0
MAX_STEPS = 20  # in a block
UNTIMED_STEPS = 2  # before each block
FIRST_STEP = 1000  # past the learning rate of 0


@dataclass
class ScalingConfig:
    # Options
    gpus: str = "1,2,4,8"  # numbers of GPUs; those beyond this machine's are skipped
    models: str = "base,large,bert"  # MosaicBERT-Base and -Large, and the BERT baseline, compiled
    global_batch_size: int = 4096  # samples, shared by all GPUs
    per_gpu: int = 512  # samples on each GPU when the batch grows with their number
    micro_batch_tokens: int = 0  # as in train.py; 0: by the GPU's memory
    out: str = "out/scaling.json"  # results, rewritten after each model
    toy: bool = False  # a tiny model on the CPU: tests the code, times mean nothing


# ---------------------------------------------------------------------------------------------------------------------
# Measuring, in each process


@dataclass
class Kind:
    """One kind of steps, and its measurements."""

    name: str  # alone, together, without_reduction
    batch: str  # "global" or "per_gpu"
    model: torch.nn.Module
    process: Process
    samples: int  # in a step, over all its processes

    def __post_init__(self):
        self.blocks = []  # for each block, what `run` returned in each process


class Bench:
    """One model on the processes of this run."""

    def __init__(self, cfg, name, process, watchdog, samples):
        self.cfg, self.name, self.train_cfg = cfg, name, train_config(cfg, name)
        self.together, self.watchdog, self.samples = process, watchdog, samples
        self.samples.padded = self.train_cfg.model == "bert"
        self.rank, self.gpus, self.device = process.rank, process.world_size, process.device
        self.alone = Process(0, 1, self.device, process.dtype)
        self.backend = choose_kernels(self.train_cfg.kernels, self.train_cfg, self.device)
        torch.manual_seed(self.train_cfg.seed)
        raw_model = MaskedLM(self.train_cfg, samples.vocab_size).to(self.device).train()
        self.num_params = sum(parameter.numel() for parameter in raw_model.parameters())
        self.optimizer = torch.optim.AdamW(raw_model.parameters(), fused=True)
        # Compiled once for both: the model under DistributedDataParallel works by itself too.
        self.model_alone = train.wrap(raw_model, self.train_cfg, self.alone, samples)
        self.model = train.wrap(self.model_alone, replace(self.train_cfg, compile=False), process, samples)
        self.kinds = self.make_kinds()

    def make_kinds(self):
        """Alone, together and without reduction, for both kinds of batch."""
        kinds = []
        for batch, size in (("global", self.cfg.global_batch_size), ("per_gpu", self.cfg.per_gpu)):
            kinds.append(Kind("alone", batch, self.model_alone, self.alone, size))
            if self.gpus > 1:
                size = size if batch == "global" else size * self.gpus
                kinds.append(Kind("together", batch, self.model, self.together, size))
                kinds.append(Kind("without_reduction", batch, self.model_alone, self.together, size))
        return {(kind.batch, kind.name): kind for kind in kinds}

    def micro_batch_tokens(self, kind):
        """What train.py would choose for this batch and number of processes."""
        cfg = train_config(self.cfg, self.name, kind.samples)
        return estimate.choose_micro_batch_tokens(
            cfg, kind.process, self.backend, self.num_params, self.samples.vocab_size
        )

    def part(self, kind):
        """(samples in a step, the process whose share of them this GPU takes).

        A GPU alone takes the whole recipe batch; of other batches, the samples it also has together.
        """
        process = kind.process if kind.batch == "global" else self.together
        return kind.samples * process.world_size // kind.process.world_size, process

    def run(self, kind, num_steps, turn=0):
        """[seconds, tokens, FLOPs] per step of this process, averaged after two untimed steps.

        turn: kinds with equally many samples use the same ones in the same turn.
        """
        cfg, process, most = self.train_cfg, kind.process, self.micro_batch_tokens(kind)
        samples, part = self.part(kind)

        def make(step):
            batches = self.samples.train_step(step, samples, cfg.seed, cfg.mask_prob, most, part.rank, part.world_size)
            return step, [batch.pinned_for(self.device) for batch in batches]

        if self.gpus > 1:
            dist.barrier()
        tokens = flops = 0
        first = FIRST_STEP + turn * (UNTIMED_STEPS + MAX_STEPS)
        for step, batches in prefetch(make, range(first, first + UNTIMED_STEPS + num_steps)):
            timed = step >= first + UNTIMED_STEPS
            if step == first + UNTIMED_STEPS:
                self.synchronize()
                start = time.perf_counter()
            self.watchdog.at(step)
            _, _, asked = train.train_step(kind.model, [self.optimizer], batches, cfg, process, step)
            if process.world_size > 1:
                self.watchdog.all_stop(asked)  # as in training, it keeps the host at most a step ahead of the GPU
            if timed:
                tokens += sum(batch.num_tokens for batch in batches)
                flops += sum(
                    matrix_flops(cfg, self.samples.vocab_size, b.num_tokens, b.sum_squared_lengths, b.num_masked)
                    for b in batches
                )
        self.synchronize()
        return [value / num_steps for value in (time.perf_counter() - start, tokens, flops)]

    def synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def measure(self):
        """The rows of the result."""
        counts = {}  # {samples in a step: steps in a block}
        for kind in self.kinds.values():  # compiles, allocates, and finds how many steps make a block
            seconds = max(row[0] for row in self.together.gather(self.run(kind, 1)))
            count = 1 if self.cfg.toy else max(1, min(MAX_STEPS, round(BLOCK_SECONDS / seconds)))
            samples, _ = self.part(kind)
            counts[samples] = max(count, counts.get(samples, 1))
            self.together.say(f"{TITLES[self.name]}, {kind.samples} samples, {kind.name}: first {1e3 * seconds:,.1f} ms")
        for turn in range(1, 1 + TURNS):
            for kind in self.kinds.values():
                kind.blocks.append(self.together.gather(self.run(kind, counts[self.part(kind)[0]], turn)))
        alone = {batch: self.alone_row(self.kinds[batch, "alone"]) for batch in ("global", "per_gpu")}
        rows = list(alone.values())
        if self.gpus > 1:
            for batch in alone:
                kind, without = self.kinds[batch, "together"], self.kinds[batch, "without_reduction"]
                rows.append(self.together_row(kind, without, alone[batch]))
        return rows

    def alone_row(self, kind):
        """The mean over GPUs that work independently."""
        by_gpu = [[block[gpu] for block in kind.blocks] for gpu in range(self.gpus)]
        rows = [self.row(kind, blocks, 1) for blocks in by_gpu]
        rates = ("samples_per_second", "tokens_per_second")
        row = rows[0] | {key: statistics.mean(r[key] for r in rows) for key in rates}
        row["ms"] = 1e3 * kind.samples / row["samples_per_second"]
        row["tokens"] = statistics.median(statistics.mean(process[1] for process in block) for block in kind.blocks)
        row["mfu"] = rows[0]["mfu"] and statistics.mean(r["mfu"] for r in rows)
        return row | {"each_ms": [r["ms"] for r in rows]}

    def together_row(self, kind, without, alone):
        row, without = self.row(kind, slowest(kind), self.gpus), self.row(without, slowest(without), self.gpus)
        return row | {
            "efficiency": row["tokens_per_second"] / (self.gpus * alone["tokens_per_second"]),
            "without_reduction_ms": without["ms"],
            "communication_ms": row["ms"] - without["ms"],
        }

    def row(self, kind, blocks, gpus):
        """A row of the result: medians over blocks of what `run` returns."""
        peak, most = estimate.peak_flops(self.device), self.micro_batch_tokens(kind)
        seconds = statistics.median(block[0] for block in blocks)
        flops = statistics.median(block[2] / block[0] for block in blocks)  # per second
        return {
            "model": self.name,
            "gpus": gpus,
            "beside": self.gpus,
            "batch": kind.batch,
            "samples": kind.samples,
            "ms": 1e3 * seconds,
            "blocks_ms": [round(1e3 * block[0], 3) for block in blocks],
            "samples_per_second": kind.samples / seconds,
            "tokens": statistics.median(block[1] for block in blocks),
            "tokens_per_second": statistics.median(block[1] / block[0] for block in blocks),
            "flops_per_second": flops,
            "mfu": flops / gpus / peak if peak else None,
            "micro_batch_tokens": most,
            "memory_gb": torch.cuda.max_memory_reserved() / 1e9 if self.device.type == "cuda" else None,  # so far
        }


def slowest(kind):
    """Blocks as if of one process: the slowest one's seconds, and sums of everything else."""
    return [[max(row[0] for row in block), *np.sum(block, 0)[1:].tolist()] for block in kind.blocks]


def train_config(cfg, name, samples=None):
    """The TrainConfig of a shipped configuration, for this many samples in a step."""
    toy = [f"--{option}={value}" for option, value in TOY.items()] if cfg.toy else []
    file, *options = CONFIGS[name]
    argv = [str(ROOT / file), *options, *toy, f"--micro_batch_tokens={cfg.micro_batch_tokens}"]
    return load_config(train.TrainConfig, [*argv, f"--global_batch_size={samples or cfg.global_batch_size}"])


def make_samples(directory, toy):
    """Random tokens with C4's lengths, truncated to 128."""
    return Data(directory, SimpleNamespace(samples=256 if toy else 16384, vocab=500 if toy else 30522)).samples("c4")


def measure_here(cfg, names):
    """In a process of torchrun: measure on all of them, and write the results on rank 0."""
    results, options = about(cfg), train_config(cfg, names[0])
    with (
        processes.joined(options.device, options.dtype, options.hang_timeout) as (process, watchdog),
        tempfile.TemporaryDirectory() as directory,
    ):
        results["device"] = "toy, times mean nothing" if cfg.toy else processes.device_name(process.device)
        samples = make_samples(directory, cfg.toy)
        for name in names:
            bench = Bench(cfg, name, process, watchdog, samples)
            results["rows"] += bench.measure()
            if process.rank == 0:
                write_results(cfg.out, results)
            del bench
            gc.collect()


# ---------------------------------------------------------------------------------------------------------------------
# Results


def about(cfg):
    return {
        "device": "",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **versions(),
        "cuda": torch.version.cuda,
        "toy": cfg.toy,
        "global_batch_size": cfg.global_batch_size,
        "per_gpu": cfg.per_gpu,
        "rows": [],
    }


def write_results(path, results):
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    write_text(path, json.dumps(results, indent=1))


def requested(cfg):
    """(models, numbers of GPUs). Raises: UserError."""
    names = cfg.models.split(",")
    for name in names:
        if name not in CONFIGS:
            raise UserError(f"--models={cfg.models}: no {name!r} (known: {', '.join(CONFIGS)})")
    try:
        numbers = sorted({int(number) for number in cfg.gpus.split(",")})
    except ValueError:
        numbers = [0]
    if numbers[0] < 1:
        raise UserError(f"--gpus={cfg.gpus}: expected numbers of GPUs (as --gpus=1,2)")
    if cfg.global_batch_size % max(numbers):
        raise UserError(f"--global_batch_size={cfg.global_batch_size} is not a multiple of {max(numbers)} GPUs")
    return names, numbers


def percent(value):
    return "n/a" if value is None else f"{100 * value:.1f} %"


def table(results):
    """The measured rows, in Markdown."""
    lines = [
        "| model | batch | GPUs | samples/s | tokens/s | MFU | efficiency | ms a step (blocks) | exposed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        if "not_measured" in row:
            lines.append(f"| {TITLES[row['model']]} | | {row['gpus']} | not measured: {row['not_measured']} ||||||")
            continue
        gpus = f"1, beside {row['beside'] - 1} more" if row["gpus"] < row["beside"] else row["gpus"]
        batch = f"{row['samples']:,}" if row["batch"] == "global" else f"{row['samples'] // row['gpus']:,} a GPU"
        exposed = f"{row['communication_ms']:,.1f}" if "communication_ms" in row else "n/a"
        blocks = f"{min(row['blocks_ms']):,.1f} to {max(row['blocks_ms']):,.1f}"
        lines.append(
            f"| {TITLES[row['model']]} | {batch} | {gpus} | {row['samples_per_second']:,.0f} | "
            f"{row['tokens_per_second']:,.0f} | {percent(row['mfu'])} | {percent(row.get('efficiency'))} | "
            f"{row['ms']:,.1f} ({blocks}) | {exposed} |"
        )
    return "\n".join(lines)


def launch(cfg, gpus, name, part):
    """Measure one model on this many GPUs under its own torchrun, so that a crash there ends nothing here."""
    options = {
        "models": name, "gpus": gpus, "global_batch_size": cfg.global_batch_size, "per_gpu": cfg.per_gpu,
        "micro_batch_tokens": cfg.micro_batch_tokens, "toy": str(cfg.toy).lower(), "out": part,
    }  # fmt: skip
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
    argv = ["-m", "studies.scaling", *(f"--{option}={value}" for option, value in options.items())]
    return subprocess.run([*torchrun, *argv], cwd=ROOT).returncode


@command
def main(argv):
    cfg = load_config(ScalingConfig, argv)
    if cfg.toy:
        cfg.global_batch_size, cfg.per_gpu = 64, 16
    names, numbers = requested(cfg)
    if "RANK" in os.environ:  # started by torchrun, the user's or `launch`
        return measure_here(cfg, names)
    here = 2 if cfg.toy else torch.cuda.device_count()
    if not here:
        raise UserError("studies.scaling needs NVIDIA GPUs (--toy tests its code on any machine)")
    print("".join(f"{n} GPUs: not measured, this machine has {here}\n" for n in numbers if n > here), end="", flush=True)
    present = [n for n in numbers if n <= here]
    present = [n for n in present if n > 1] or present  # a single GPU is measured beside the others
    if not present:
        raise UserError(f"--gpus={cfg.gpus}: this machine has {here} GPUs")
    results, failed = about(cfg), False
    with tempfile.TemporaryDirectory() as directory:
        part = os.path.join(directory, "part.json")
        for gpus in present:
            for name in names:
                start = time.perf_counter()
                status = launch(cfg, gpus, name, part)
                if status == 0:
                    measured = plot.read_scaling(part)
                    results["device"] = measured["device"]
                    results["rows"] += measured["rows"]
                else:
                    failed = True
                    results["rows"].append({"model": name, "gpus": gpus, "not_measured": f"ended with status {status}"})
                print(f"{TITLES[name]} on {gpus}: {time.perf_counter() - start:.0f} s", flush=True)
                write_results(cfg.out, results)
    print(f"\n{table(results)}\n\nwritten to {cfg.out}")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
