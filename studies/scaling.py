"""How training speeds up with more GPUs: measured on this machine's, predicted for more.

    python -m studies.scaling                                                # on 1, 2, 4 and 8 GPUs, if there are as many
    python -m studies.scaling --gpus=2 --models=base
    torchrun --nnodes=2 ... -m studies.scaling --out=out/scaling_16.json     # on torchrun's processes, several nodes too
    python -m studies.scaling --predict=out/scaling.json --node_gbits=1600   # only predict, for another network
    python -m tools.plot --scaling=out/scaling.json --out=scaling.svg

A step is train.py's own, from data.py's micro-batches, made during the step before, to fused AdamW, on random tokens with
C4's lengths. For each number of GPUs there are four kinds of steps. Kinds with the same batch use the same samples, and
take turns, so that all see the same clocks and temperatures:

    global     the recipe's batch, 4,096 samples, shared by all GPUs (strong scaling)
    per_gpu    512 samples on each GPU, which is the recipe's batch on eight (weak scaling)
    and both on each GPU alone, while all others are busy too: the speed that counts as 100 % efficiency

A block is a number of consecutive steps after two untimed ones; figures are medians over blocks. Exposed communication is a
step's time minus that of the same step without DistributedDataParallel, in ms. The time in NCCL kernels comes from a
trace, and includes waiting for slower GPUs.

Read next: studies/step_time.py, for the prediction, or tools/plot.py
"""

import contextlib
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
from studies.step_time import NETWORK_SHARE, SAMPLED_STEPS, imbalance, padded_rows, predict
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
TRACED_STEPS = 3
UNTIMED_STEPS = 2  # before each block
SMALLEST_BATCH = 8  # samples on a GPU when 512 share 4,096
FIRST_STEP = 1000  # past the learning rate of 0


@dataclass
class ScalingConfig:
    # Measurement
    gpus: str = "1,2,4,8"  # numbers of GPUs; those beyond this machine's are skipped
    models: str = "base,large,bert"  # MosaicBERT-Base and -Large, and the BERT baseline, compiled
    global_batch_size: int = 4096  # samples, shared by all GPUs
    per_gpu: int = 512  # samples on each GPU when the batch grows with their number
    micro_batch_tokens: int = 0  # as in train.py; 0: by the GPU's memory
    out: str = "out/scaling.json"  # results, rewritten after each model
    toy: bool = False  # a tiny model on the CPU: tests the code, times mean nothing
    # Prediction
    predict: str = ""  # results to predict from, instead of measuring
    gpus_per_node: int = 8  # of the predicted machines
    node_gbits: float = 3200.0  # Gbit/s of a node's network, per direction: eight 400 Gbit/s adapters


# ---------------------------------------------------------------------------------------------------------------------
# Measuring, in each process


@dataclass
class Kind:
    """One kind of steps, and its measurements."""

    name: str  # alone, together, without_reduction
    batch: str  # "global", "per_gpu", or "curve": on one GPU, for the prediction
    model: torch.nn.Module
    process: Process
    samples: int  # in a step, over all its processes
    turns: int = TURNS

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
        self.clocks = []
        self.kinds = self.make_kinds()

    def make_kinds(self):
        """Alone, together and without reduction, for both kinds of batch; then smaller batches alone."""
        kinds = []
        for batch, size in (("global", self.cfg.global_batch_size), ("per_gpu", self.cfg.per_gpu)):
            kinds.append(Kind("alone", batch, self.model_alone, self.alone, size))
            if self.gpus > 1:
                size = size if batch == "global" else size * self.gpus
                kinds.append(Kind("together", batch, self.model, self.together, size))
                kinds.append(Kind("without_reduction", batch, self.model_alone, self.together, size))
        size = self.cfg.global_batch_size // 2
        while size >= SMALLEST_BATCH and self.name != "bert":
            checked = size * self.gpus == self.cfg.global_batch_size  # checks the prediction
            if size != self.cfg.per_gpu:
                kinds.append(Kind("alone", "curve", self.model_alone, self.alone, size, turns=TURNS if checked else 1))
            size //= 2
        return kinds

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

    def run(self, kind, num_steps, turn=0, trace=None):
        """[seconds, tokens, FLOPs, calls of cudaMalloc] per step of this process, averaged after two untimed steps.

        turn: kinds with equally many samples use the same ones in the same turn. trace: a torch.profiler.profile of the
        timed steps.
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
                if trace:
                    trace.start()
                    dist.barrier()  # processes take different times to start it
                allocations, start = self.allocations(), time.perf_counter()
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
        sums = [time.perf_counter() - start, tokens, flops, self.allocations() - allocations]
        return [value / num_steps for value in sums]

    def allocations(self):
        """How often PyTorch has asked the GPU for memory; steady training never does."""
        return torch.cuda.memory_stats()["num_device_alloc"] if self.device.type == "cuda" else 0

    def synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def measure(self):
        """The rows of the result."""
        counts = {}  # {samples in a step: steps in a block}
        for kind in self.kinds:  # compiles, allocates, and finds how many steps make a block
            seconds = max(row[0] for row in self.together.gather(self.run(kind, 1)))
            count = 1 if self.cfg.toy else max(1, min(MAX_STEPS, round(BLOCK_SECONDS / seconds)))
            samples, _ = self.part(kind)
            counts[samples] = max(count, counts.get(samples, 1))
            self.together.say(f"{TITLES[self.name]}, {kind.samples} samples, {kind.name}: first {1e3 * seconds:,.1f} ms")
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
                kind, without = by_name[batch, "together"], by_name[batch, "without_reduction"]
                rows.append(self.together_row(kind, without, alone[batch]))
        return rows + [self.alone_row(kind) for kind in self.kinds if kind.batch == "curve"]

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
            "nccl_ms": self.nccl_ms(kind),
        }

    def row(self, kind, blocks, gpus):
        """A row of the result: medians over blocks of what `run` returns."""
        peak, most = estimate.peak_flops(self.device), self.micro_batch_tokens(kind)
        work = padded_rows(self.samples, self.train_cfg, kind.samples, most, gpus)
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
            "micro_steps": len(work) / SAMPLED_STEPS,
            "imbalance": imbalance(work),
            "allocations": max(block[3] for block in blocks),
            "memory_gb": torch.cuda.max_memory_reserved() / 1e9 if self.device.type == "cuda" else None,  # so far
        }

    def nccl_ms(self, kind):
        """Milliseconds per step in NCCL kernels, on rank 0; None on a CPU."""
        if self.device.type == "cpu":
            return None
        trace = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        self.run(kind, TRACED_STEPS, trace=trace)
        trace.stop()
        found = [event.self_device_time_total for event in trace.key_averages() if "nccl" in event.key.lower()]
        return sum(found) / 1e3 / TRACED_STEPS

    def buckets(self):
        """Bytes of DistributedDataParallel's all-reduce buckets, in the order they become ready."""
        return [int(size) for size in self.model._get_ddp_logging_data()["rebuilt_bucket_sizes"].split(",")]

    def link(self):
        """How fast the GPUs all-reduce gradients: bytes and number of buckets, seconds for them, and for 8 bytes."""
        gradients = [torch.zeros(size // 4, device=self.device) for size in self.buckets()]
        few = [torch.zeros(2, device=self.device)]

        def seconds(tensors, repeats):
            times = []
            for _ in range(repeats + 2):
                dist.barrier()
                self.synchronize()
                start = time.perf_counter()
                for tensor in tensors:
                    dist.all_reduce(tensor)
                self.synchronize()
                times.append(time.perf_counter() - start)
            return statistics.median(times[2:])

        return {
            "gpus": self.gpus,
            "bytes": 4 * self.num_params,
            "groups": len(gradients),
            "seconds": seconds(gradients, 2 if self.cfg.toy else 10),
            "latency": seconds(few, 2 if self.cfg.toy else 50),
        }

    def facts(self):
        """What the prediction needs besides the rows. In the file buckets are called groups, as before there was DDP."""
        if self.gpus == 1:
            return {"link": None, "clocks": self.clocks}
        buckets = self.buckets()
        return {"groups": len(buckets), "last_bytes": buckets[-1], "link": self.link(), "clocks": self.clocks}

    @contextlib.contextmanager
    def clocks_noted(self, kind):
        """Ask nvidia-smi for this machine's clocks (MHz) and power (W) while recipe batches run."""
        query = None
        if self.rank == 0 and self.device.type == "cuda" and kind.batch == "global":
            argv = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits"]
            with contextlib.suppress(OSError):
                query = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        yield
        if query:
            with contextlib.suppress(subprocess.TimeoutExpired):
                lines = query.communicate(timeout=30)[0].splitlines()
                self.clocks.append({"kind": kind.name, "mhz_and_watts": lines})


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
            results["models"][f"{name} {process.world_size}"] = bench.facts()
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
        "models": {},
    }


def write_results(path, results):
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    write_text(path, json.dumps(results, indent=1))


def names_of(text, known, option):
    """The names in a comma-separated list. Raises: UserError for an unknown one."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise UserError(f"--{option}={text}: no {name!r} (known: {', '.join(known)})")
    if not names:
        raise UserError(f"--{option}: empty (known: {', '.join(known)})")
    return names


def numbers_of(cfg):
    """The requested numbers of GPUs. Raises: UserError."""
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
        "| model | batch | GPUs | samples/s | tokens/s | MFU | efficiency | ms a step (blocks) | exposed | NCCL |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        if "not_measured" in row:
            lines.append(f"| {TITLES[row['model']]} | | {row['gpus']} | not measured: {row['not_measured']} |||||||")
            continue
        if row["batch"] == "curve":
            continue
        gpus = f"1, beside {row['beside'] - 1} more" if row["gpus"] < row["beside"] else row["gpus"]
        blocks = f"{min(row['blocks_ms']):,.1f} to {max(row['blocks_ms']):,.1f}"
        lines.append(
            f"| {TITLES[row['model']]} | {batch_of(row)} | {gpus} | {row['samples_per_second']:,.0f} | "
            f"{row['tokens_per_second']:,.0f} | {percent(row['mfu'])} | {percent(row.get('efficiency'))} | "
            f"{row['ms']:,.1f} ({blocks}) | {number(row.get('communication_ms'))} | {number(row.get('nccl_ms'))} |"
        )
    return "\n".join(lines)


def predicted_table(results, cfg):
    """The predictions: against the measurements, then for more GPUs."""
    lines = ["Predicted step times against the measured ones:", ""]
    for row in results["predicted"]:
        if row["measured_ms"] and row["gpus"] > 1:
            off = row["ms"] / row["measured_ms"] - 1
            lines.append(
                f"    {TITLES[row['model']]}, {row['batch']}, {row['gpus']} GPUs: {row['ms']:,.1f} ms predicted, "
                f"{row['measured_ms']:,.1f} ms measured ({100 * off:+.1f} %)"
            )
    lines += [
        "",
        f"Predicted, not measured: nodes of {cfg.gpus_per_node} GPUs, {cfg.node_gbits:,.0f} Gbit/s a node at "
        f"{NETWORK_SHARE:.0%} utilization:",
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
    names = names_of(cfg.models, CONFIGS, "models")
    numbers = numbers_of(cfg)
    if cfg.predict:
        results = plot.read_scaling(cfg.predict)
        if any(facts["link"] and "groups" not in facts["link"] for facts in results["models"].values()):
            raise UserError(f"{cfg.predict}: from an older version, which recorded too little to predict (measure again)")
        cfg.toy = results["toy"]
        return show(results, cfg)
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
                    results["models"] |= measured["models"]
                else:
                    failed = True
                    results["rows"].append({"model": name, "gpus": gpus, "not_measured": f"ended with status {status}"})
                print(f"{TITLES[name]} on {gpus}: {time.perf_counter() - start:.0f} s", flush=True)
                write_results(cfg.out, results)
    show(results, cfg)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
