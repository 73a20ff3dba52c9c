"""How much faster training gets with more GPUs: measured on those here, predicted for more.

    python scaling.py                                                # on 1, 2, 4 and 8 GPUs, as far as they are here
    python scaling.py --gpus=2 --models=base
    torchrun --nnodes=2 ... scaling.py --out=out/scaling_16.json     # on the processes of a torchrun, several nodes too
    python scaling.py --predict=out/scaling.json --node_gbits=1600   # the prediction alone, for another network
    python plot.py --scaling=out/scaling.json --out=scaling.svg

A step is train.py's own, from its micro-batches, made by data.py while the step before runs, to fused AdamW, on random
tokens with lengths like C4's. For each number of GPUs there are four kinds of steps, those of one batch on the same samples,
taken in turn, so that all see the same clock and temperature:

    global     the batch of the recipe, 4,096 samples, shared by all GPUs (strong scaling)
    per_gpu    512 samples on each GPU, what the recipe's batch gives each of eight
    and both on each GPU alone, without the others though all are at work: 100 % efficiency is what they do then

and, where a GPU's 512 samples are one micro-batch, the same with PyTorch's DistributedDataParallel ("with DDP", ms a step).
A block is some steps in a row after two that are not timed; figures are medians of blocks. Exposed communication is what
a step takes longer, in ms, than one that is the same but for the sum of the gradients over the GPUs; the time in NCCL's
kernels is from a trace, and holds the wait for the slower GPU.

Read next: step_time.py, for the prediction, or plot.py
"""

import contextlib
import datetime
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import checkpoint
from tools import plot
import train
from common.options import UserError, command, load_config
from data import prefetch
from studies.bench import write_results
from studies.bench_steps import Data
from model import MaskedLM, matrix_flops
from studies.step_time import NETWORK_SHARE, STEPS_CUT, filled_rows, imbalance, predict

ROOT = Path(__file__).resolve().parent
CONFIGS = {
    "base": ["configs/base.py"],
    "large": ["configs/large.py"],
    "bert": ["configs/bert_base.py", "--compile=true"],
}
TITLES = {"base": "MosaicBERT-Base", "large": "MosaicBERT-Large", "bert": "BERT-Base, compiled"}
TOY = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 48, "compile": "false", "device": "cpu"}

TURNS = 3  # blocks of each kind
BLOCK_SECONDS = 1.0
MOST_STEPS = 20  # in a block
TRACED_STEPS = 3
UNTIMED_STEPS = 2  # before each block
SMALLEST_BATCH = 8  # samples of a GPU among 512 that share 4,096
STEP_OF_TABLE = 1000  # steps are numbered from here: past the learning rate of 0, not yet at its peak


@dataclass
class ScalingConfig:
    # What is measured
    gpus: str = "1,2,4,8"  # numbers of GPUs; those that are not here are left out
    models: str = "base,large,bert"  # MosaicBERT-Base and -Large, and the BERT baseline, compiled
    global_batch_size: int = 4096  # samples, shared by all GPUs
    per_gpu: int = 512  # samples of each GPU, where the batch grows with their number
    micro_batch_tokens: int = 0  # as of train.py; 0: chosen from the GPU's memory
    out: str = "out/scaling.json"  # results, written anew after each model
    toy: bool = False  # a tiny model on the CPU: tries the code, and measures nothing
    # What is predicted
    predict: str = ""  # results to predict from; nothing is measured then
    gpus_per_node: int = 8  # of the machines predicted for
    node_gbits: float = 3200.0  # Gbit/s of a node's network, in each direction: eight adapters of 400


# ---------------------------------------------------------------------------------------------------------------------
# Measuring, in each process


@dataclass
class Kind:
    """One kind of steps, and what was measured of it."""

    batch: str  # "global", "per_gpu", or "curve": on one GPU, for the prediction
    process: train.Process
    samples: int  # in a step, over all its processes
    gradient_sum: train.GradientSum | None = None
    ddp: DistributedDataParallel | None = None  # a model that sums its gradients itself
    turns: int = TURNS
    name: str = ""  # alone, together, without_reduction, ddp

    def __post_init__(self):
        self.blocks = []  # of each block, what `run` returned in each process


class Bench:
    """One model on the processes of this run."""

    def __init__(self, cfg, name, process, guard, samples):
        self.cfg, self.name, self.train_cfg = cfg, name, train_config(cfg, name)
        self.together, self.guard, self.samples = process, guard, samples
        self.samples.padded = self.train_cfg.model == "bert"
        self.rank, self.gpus, self.device = process.rank, process.world_size, process.device
        self.alone = train.Process(0, 1, self.device, process.dtype)
        torch.manual_seed(self.train_cfg.seed)
        self.raw_model = MaskedLM(self.train_cfg, self.samples.vocab_size).to(self.device).train()
        self.model = train.compiled(self.raw_model) if self.train_cfg.compile else self.raw_model
        self.num_params = sum(parameter.numel() for parameter in self.raw_model.parameters())
        self.optimizer = torch.optim.AdamW(self.raw_model.parameters(), fused=True)
        self.gradient_sum = train.GradientSum(self.raw_model) if self.gpus > 1 else None
        self.clocks = []
        self.kinds = self.make_kinds()

    def make_kinds(self):
        """Alone, together, without reduction, for each way to set the batch; and smaller batches alone."""
        kinds = []
        for batch, size in (("global", self.cfg.global_batch_size), ("per_gpu", self.cfg.per_gpu)):
            kinds.append(Kind(batch, self.alone, size, name="alone"))
            if self.gradient_sum:
                size = size if batch == "global" else size * self.gpus
                kinds.append(Kind(batch, self.together, size, self.gradient_sum, name="together"))
                kinds.append(Kind(batch, self.together, size, name="without_reduction"))
        if self.gradient_sum and not self.train_cfg.compile:  # the last batch only: it would reduce with each micro-step
            kinds.append(Kind(batch, self.together, size, ddp=data_parallel(self.raw_model, self.device), name="ddp"))
        size = self.cfg.global_batch_size // 2
        while size >= SMALLEST_BATCH and self.name != "bert":
            checked = size * self.gpus == self.cfg.global_batch_size  # against it, the prediction
            if size != self.cfg.per_gpu:
                kinds.append(Kind("curve", self.alone, size, turns=TURNS if checked else 1, name="alone"))
            size //= 2
        return kinds

    def micro_batch_tokens(self, kind):
        """What train.py would choose for this batch and number of processes."""
        cfg = train_config(self.cfg, self.name, kind.samples)
        return train.choose_micro_batch_tokens(cfg, kind.process, self.num_params, self.samples.vocab_size)

    def part(self, kind):
        """(samples in a step, the process whose share of them this GPU has).

        A GPU alone has the whole recipe's batch, else its share of one for all: the samples it also has together.
        """
        process = kind.process if kind.batch == "global" else self.together
        return kind.samples * process.world_size // kind.process.world_size, process

    def run(self, kind, num_steps, turn=0, trace=None):
        """[seconds, tokens, FLOPs, calls of cudaMalloc] of a step of this process: the mean of some, after two untimed.

        turn: all have the same samples in the same turn, if their steps have equally many. trace: a torch.profiler.profile
        that is to see the timed ones.
        """
        cfg, process, most = self.train_cfg, kind.process, self.micro_batch_tokens(kind)
        samples, part = self.part(kind)

        def make(step):
            batches = self.samples.train_step(step, samples, cfg.seed, cfg.mask_prob, most, part.rank, part.world_size)
            return [batch.pinned_for(self.device) for batch in batches]

        if self.gpus > 1:
            dist.barrier()
        self.guard.world_size = process.world_size
        tokens = flops = 0
        first = STEP_OF_TABLE + turn * (UNTIMED_STEPS + MOST_STEPS)
        steps = range(first, first + UNTIMED_STEPS + num_steps)
        for step, batches in zip(steps, prefetch(make, steps)):
            timed = step >= steps.start + UNTIMED_STEPS
            if step == steps.start + UNTIMED_STEPS:
                self.synchronize()
                if trace:
                    trace.start()
                    dist.barrier()  # starting takes each process another time
                allocations, begun = self.allocations(), time.perf_counter()
            self.guard.at(step)
            num_masked, asked_to_stop = train.sum_counts(batches, self.guard.signal > 0, process)
            train.forward_backward(
                kind.ddp or self.model, batches, num_masked.clamp(min=1), cfg, process, step, kind.gradient_sum
            )
            train.update(self.raw_model, self.optimizer, cfg, process, step)
            if self.guard.all_stop(asked_to_stop):
                raise SystemExit(128 + self.guard.signal)
            if timed:
                tokens += sum(batch.num_tokens for batch in batches)
                flops += sum(
                    matrix_flops(cfg, self.samples.vocab_size, b.num_tokens, b.sum_squared_lengths, b.num_masked)
                    for b in batches
                )
        self.synchronize()
        sums = [time.perf_counter() - begun, tokens, flops, self.allocations() - allocations]
        return [value / num_steps for value in sums]

    def allocations(self):
        """How often memory was asked of the GPU so far: not at all in steady training."""
        return torch.cuda.memory_stats()["num_device_alloc"] if self.device.type == "cuda" else 0

    def synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def measure(self):
        """The rows of the result."""
        counts = {}  # of steps in a block, by the samples in one
        for kind in self.kinds:  # compiles, allocates, and tells how many steps make a block
            seconds = max(row[0] for row in self.together.gather(self.run(kind, 1)))
            count = 1 if self.cfg.toy else max(1, min(MOST_STEPS, round(BLOCK_SECONDS / seconds)))
            samples, _ = self.part(kind)
            counts[samples] = max(count, counts.get(samples, 1))
            if self.rank == 0:
                print(f"{TITLES[self.name]}, {kind.samples} samples, {kind.name}: {1e3 * seconds:,.1f} ms at first", flush=True)
        for turn in range(1, 1 + TURNS):
            for kind in self.kinds:
                if turn <= kind.turns:
                    with self.clocks_noted(kind):
                        block = self.run(kind, counts[self.part(kind)[0]], turn)
                    kind.blocks.append(self.together.gather(block))
        by_name = {(kind.batch, kind.name): kind for kind in self.kinds if kind.batch != "curve"}
        alone = {batch: self.alone_row(by_name[batch, "alone"]) for batch in ("global", "per_gpu")}
        rows = list(alone.values())
        if self.gpus > 1:
            for batch in alone:
                kind = by_name[batch, "together"]
                rows.append(self.together_row(kind, by_name[batch, "without_reduction"], alone[batch]))
                if ddp := by_name.get((batch, "ddp")):
                    rows[-1]["ddp_ms"] = self.row(ddp, slowest(ddp), self.gpus)["ms"]
        return rows + [self.alone_row(kind) for kind in self.kinds if kind.batch == "curve"]

    def alone_row(self, kind):
        """Of GPUs that work each for itself: the mean of their rates."""
        of_gpus = [[block[gpu] for block in kind.blocks] for gpu in range(self.gpus)]
        rows = [self.row(kind, blocks, 1) for blocks in of_gpus]
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
            "nccl_ms": self.nccl_ms(kind),
        }

    def row(self, kind, blocks, gpus):
        """A row of the result from blocks of what `run` returns; what it holds are medians."""
        peak, most = train.peak_flops(self.device), self.micro_batch_tokens(kind)
        work = filled_rows(self.samples, self.train_cfg, kind.samples, most, gpus)
        seconds = statistics.median(block[0] for block in blocks)
        flops = statistics.median(block[2] / block[0] for block in blocks)  # a second
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
            "micro_steps": len(work) / STEPS_CUT,
            "imbalance": imbalance(work),
            "allocations": max(block[3] for block in blocks),
            "memory_gb": torch.cuda.max_memory_reserved() / 1e9 if self.device.type == "cuda" else None,  # so far
        }

    def nccl_ms(self, kind):
        """Of a step, on rank 0: milliseconds in NCCL's kernels; None on a CPU."""
        if self.device.type == "cpu":
            return None
        trace = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        self.run(kind, TRACED_STEPS, trace=trace)
        trace.stop()
        found = [event.self_device_time_total for event in trace.key_averages() if "nccl" in event.key.lower()]
        return sum(found) / 1e3 / TRACED_STEPS

    def link(self):
        """What the GPUs' link does with gradients: {bytes, groups, seconds of summing them, of 8 bytes alone}."""
        if self.gpus == 1:
            return None
        groups, few = self.gradient_sum.groups, torch.zeros(2, device=self.device)
        for parameter in self.raw_model.parameters():
            parameter.grad = torch.zeros_like(parameter)

        def seconds(starts, repeats):
            times = []
            for i in range(repeats + 2):
                dist.barrier()
                self.synchronize()
                begun = time.perf_counter()
                for start in starts:
                    start().wait()
                self.synchronize()
                times.append(time.perf_counter() - begun)
            return statistics.median(times[2:])

        return {
            "gpus": self.gpus,
            "bytes": 4 * self.num_params,
            "groups": len(groups),
            "seconds": seconds([partial(train.start_sum, group) for group in groups], 2 if self.cfg.toy else 10),
            "latency": seconds([lambda: dist.all_reduce(few, async_op=True)], 2 if self.cfg.toy else 50),
        }

    @contextlib.contextmanager
    def clocks_noted(self, kind):
        """Ask nvidia-smi, while the recipe's steps run, for MHz and watts of the GPUs of this machine."""
        asked = None
        if self.rank == 0 and self.device.type == "cuda" and kind.batch == "global":
            query = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits"]
            with contextlib.suppress(OSError):
                asked = subprocess.Popen(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        yield
        if asked:
            with contextlib.suppress(subprocess.TimeoutExpired):
                said = asked.communicate(timeout=30)[0].splitlines()
                self.clocks.append({"kind": kind.name, "mhz_and_watts": said})


def slowest(kind):
    """Blocks as of one process: the seconds of the slowest, and the sums of all else."""
    return [[max(row[0] for row in block), *np.sum(block, 0)[1:].tolist()] for block in kind.blocks]


def data_parallel(model, device):
    """PyTorch's way to sum gradients, beside which ours is measured."""
    device_ids = [device.index] if device.type == "cuda" else None
    with warnings.catch_warnings():  # torch 2.13 has another name for broadcast_buffers, which 2.11 does not know
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(model, device_ids, broadcast_buffers=False, gradient_as_bucket_view=True)


def train_config(cfg, name, samples=None):
    """The TrainConfig of a shipped configuration, for so many samples in a step."""
    toy = [f"--{option}={value}" for option, value in TOY.items()] if cfg.toy else []
    file, *options = CONFIGS[name]
    argv = [str(ROOT / file), *options, *toy, f"--micro_batch_tokens={cfg.micro_batch_tokens}"]
    return load_config(train.TrainConfig, [*argv, f"--global_batch_size={samples or cfg.global_batch_size}"])


def make_samples(directory, toy):
    """Random tokens; lengths like those of C4, cut at 128."""
    return Data(directory, SimpleNamespace(samples=256 if toy else 16384, vocab=500 if toy else 30522)).samples("c4")


def measure_here(cfg, names):
    """In a process of torchrun: rank 0 writes the results of these processes."""
    results = about(cfg)
    with (
        train.watched_process(train_config(cfg, names[0])) as (process, guard),
        tempfile.TemporaryDirectory() as directory,
    ):
        results["device"] = "toy, times mean nothing" if cfg.toy else train.device_name(process.device)
        samples = make_samples(directory, cfg.toy)
        for name in names:
            bench = Bench(cfg, name, process, guard, samples)
            results["rows"] += bench.measure()
            groups = train.gradient_groups(bench.raw_model, train.GROUP_BYTES)  # those of several hosts
            last_bytes = 4 * sum(parameter.numel() for parameter in groups[-1])
            facts = {"groups": len(groups), "last_bytes": last_bytes, "link": bench.link(), "clocks": bench.clocks}
            results["models"][f"{name} {process.world_size}"] = facts
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
        **checkpoint.versions(),
        "cuda": torch.version.cuda,
        "toy": cfg.toy,
        "global_batch_size": cfg.global_batch_size,
        "per_gpu": cfg.per_gpu,
        "rows": [],
        "models": {},
    }


def read(path):
    """Results as a dictionary. Raises: UserError."""

    def interpret(results):
        [row["model"] for row in results["rows"]], results["models"], results["device"], results["toy"]
        return results

    return plot.read_result(path, "result of scaling.py", interpret)


def names_of(text, known, option):
    """The names of a comma-separated list. Raises: UserError for one that is not known."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise UserError(f"--{option}={text}: no {name!r} (known: {', '.join(known)})")
    if not names:
        raise UserError(f"--{option}: empty (known: {', '.join(known)})")
    return names


def numbers_of(cfg):
    """The numbers of GPUs asked for. Raises: UserError."""
    try:
        numbers = sorted({int(number) for number in cfg.gpus.split(",")})
    except ValueError:
        numbers = [0]
    if numbers[0] < 1:
        raise UserError(f"--gpus={cfg.gpus}: expected numbers of GPUs (as --gpus=1,2)")
    if cfg.global_batch_size % max(numbers):
        raise UserError(f"--global_batch_size={cfg.global_batch_size} is not a multiple of {max(numbers)} GPUs")
    return numbers


def batch_of(row):
    return f"{row['samples']:,}" if row["batch"] == "global" else f"{row['samples'] // row['gpus']:,} a GPU"


def percent(value):
    return "n/a" if value is None else f"{100 * value:.1f} %"


def number(value):
    return "n/a" if value is None else f"{value:,.1f}"


def table(results):
    """The measured rows, in Markdown."""
    lines = [
        "| model | batch | GPUs | samples/s | tokens/s | MFU | efficiency | ms a step (blocks) | exposed | NCCL | with DDP |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        if "not_measured" in row:
            lines.append(f"| {TITLES[row['model']]} | | {row['gpus']} | not measured: {row['not_measured']} ||||||||")
            continue
        if row["batch"] == "curve":
            continue
        beside = f"1, beside {row['beside'] - 1} more" if row["gpus"] < row["beside"] else row["gpus"]
        blocks = f"{min(row['blocks_ms']):,.1f} to {max(row['blocks_ms']):,.1f}"
        lines.append(
            f"| {TITLES[row['model']]} | {batch_of(row)} | {beside} | {row['samples_per_second']:,.0f} | "
            f"{row['tokens_per_second']:,.0f} | {percent(row['mfu'])} | {percent(row.get('efficiency'))} | "
            f"{row['ms']:,.1f} ({blocks}) | {number(row.get('communication_ms'))} | {number(row.get('nccl_ms'))} | "
            f"{number(row.get('ddp_ms'))} |"
        )
    return "\n".join(lines)


def predicted_table(results, cfg):
    """What the model of the step time says: beside what was measured, then for more GPUs."""
    lines = ["The model of the step time beside what was measured:", ""]
    for row in results["predicted"]:
        if row["measured_ms"] and row["gpus"] > 1:
            off = row["ms"] / row["measured_ms"] - 1
            lines.append(
                f"    {TITLES[row['model']]}, {row['batch']}, {row['gpus']} GPUs: {row['ms']:,.1f} ms predicted, "
                f"{row['measured_ms']:,.1f} ms measured ({100 * off:+.1f} %)"
            )
    lines += [
        "",
        f"Predicted, not measured: nodes of {cfg.gpus_per_node} GPUs, {cfg.node_gbits:,.0f} Gbit/s a node, of which "
        f"{NETWORK_SHARE:.0%} are reached:",
        "",
        "| model | batch | GPUs | samples/s | MFU | efficiency | ms a step |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results["predicted"]:
        if row["measured_ms"] is None:
            lines.append(
                f"| {TITLES[row['model']]} | {batch_of(row)} | {row['gpus']} | {row['samples_per_second']:,.0f} | "
                f"{percent(row['mfu'])} | {percent(row['efficiency'])} | {row['ms']:,.1f} |"
            )
    return "\n".join(lines)


def show(results, cfg):
    """Predict, print, and write."""
    with tempfile.TemporaryDirectory() as directory:
        train_configs = {name: train_config(cfg, name) for name in CONFIGS}
        samples = make_samples(directory, cfg.toy)
        results["predicted"] = predict(results, train_configs, samples, cfg.gpus_per_node, cfg.node_gbits)
    results["node_gbits"], results["gpus_per_node"] = cfg.node_gbits, cfg.gpus_per_node
    print(f"\n{table(results)}\n\n{predicted_table(results, cfg)}")
    write_results(cfg.out, results)
    print(f"written to {cfg.out}")


def start(cfg, gpus, name, part):
    """Measure one model on so many GPUs in a torchrun of its own: what goes wrong there ends nothing here."""
    options = {
        "models": name, "gpus": gpus, "global_batch_size": cfg.global_batch_size, "per_gpu": cfg.per_gpu,
        "micro_batch_tokens": cfg.micro_batch_tokens, "toy": str(cfg.toy).lower(), "out": part,
    }  # fmt: skip
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
    argv = [str(ROOT / "scaling.py"), *(f"--{option}={value}" for option, value in options.items())]
    return subprocess.run([*launcher, *argv]).returncode


@command
def main(argv):
    cfg = load_config(ScalingConfig, argv)
    if cfg.toy:
        cfg.global_batch_size, cfg.per_gpu = 64, 16
    names = names_of(cfg.models, CONFIGS, "models")
    numbers = numbers_of(cfg)
    if cfg.predict:
        results = read(cfg.predict)
        if any(facts["link"] and "groups" not in facts["link"] for facts in results["models"].values()):
            raise UserError(f"{cfg.predict}: of an older version, which noted too little to predict from (measure again)")
        cfg.toy = results["toy"]
        return show(results, cfg)
    if "RANK" in os.environ:  # started by torchrun, by the user's or by our own
        return measure_here(cfg, names)
    here = 2 if cfg.toy else torch.cuda.device_count()
    if not here:
        raise UserError("scaling.py needs NVIDIA GPUs (--toy tries its code on any machine)")
    print("".join(f"{n} GPUs: not measured, {here} are here\n" for n in numbers if n > here), end="", flush=True)
    present = [n for n in numbers if n <= here]
    present = [n for n in present if n > 1] or present  # one GPU is measured beside the others
    if not present:
        raise UserError(f"--gpus={cfg.gpus}: {here} GPUs are here")
    results, failed = about(cfg), False
    with tempfile.TemporaryDirectory() as directory:
        part = os.path.join(directory, "part.json")
        for gpus in present:
            for name in names:
                begun = time.perf_counter()
                status = start(cfg, gpus, name, part)
                if status == 0:
                    measured = read(part)
                    results["device"] = measured["device"]
                    results["rows"] += measured["rows"]
                    results["models"] |= measured["models"]
                else:
                    failed = True
                    results["rows"].append({"model": name, "gpus": gpus, "not_measured": f"ended with status {status}"})
                print(f"{TITLES[name]} on {gpus}: {time.perf_counter() - begun:.0f} s", flush=True)
                write_results(cfg.out, results)
    show(results, cfg)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
