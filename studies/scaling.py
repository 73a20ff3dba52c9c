"""How training speeds up with more GPUs.

    python -m studies.scaling                              # on 1, 2, 4 and 8 GPUs, if there are as many
    python -m studies.scaling --gpus=2 --models=base
    python -m tools.plot --scaling=out/scaling.json --out=scaling.svg

Runs train.py on random tokens with C4's lengths, for each number of GPUs with two batches:

    global     the recipe's, 4,096 samples, shared by all GPUs (strong scaling)
    per_gpu    512 samples on each GPU, which is the recipe's batch on eight (weak scaling)

100 % efficiency is what each GPU reaches alone while all others do the same, as clocks depend on temperature and power.
Figures are medians over the log's lines, without the first steps.

Read next: tools/figures/speed.py
"""

import datetime
import json
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common.files import write_text
from common.options import UserError, command, load_config
from common.versions import versions
from tests.toy import TOY_SIZE, flags, make_shards, read_log, start_train
from tools.figures import reading

CONFIGS = {"base": ["configs/base.py"], "large": ["configs/large.py"], "bert": ["configs/bert_base.py", "--compile=true"]}
TITLES = reading.SCALING_NAMES
C4_SHORT_SHARE = 0.261  # of samples, with 30 to 128 tokens: a mean of 115, as in 1,000 documents of C4 cut at 128 tokens
STEPS, UNTIMED_STEPS, INTERVAL = 50, 20, 5  # of a run; its first ones, in which memory grows; in a line of the log


@dataclass
class ScalingConfig:
    gpus: str = "1,2,4,8"  # numbers of GPUs; those beyond this machine's are skipped
    models: str = "base,large,bert"  # MosaicBERT-Base and -Large, and the BERT baseline, compiled
    global_batch_size: int = 4096  # samples, shared by all GPUs
    per_gpu: int = 512  # samples on each GPU when the batch grows with their number
    out: str = "out/scaling.json"  # results, rewritten after each model
    toy: bool = False  # a tiny model on the CPU: tests the code, times mean nothing


def requested(cfg):
    """(models, numbers of GPUs, GPUs here). Raises: UserError."""
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
    here = 2 if cfg.toy else torch.cuda.device_count()
    if numbers[0] > here:
        raise UserError(f"--gpus={cfg.gpus}: this machine has {here} GPUs (--toy tests the code on any machine)")
    return names, numbers, here


def make_data(path, toy):
    """Shards of random tokens with C4's lengths, at most 126: a part of the documents is shorter."""
    count, vocab_size, rng = 256 if toy else 16384, 500 if toy else 30522, np.random.default_rng(0)
    short = rng.random(count) < C4_SHORT_SHARE
    documents = [rng.integers(5, vocab_size, n) for n in np.where(short, rng.integers(28, 127, count), 126)]
    return make_shards(path, documents, documents[:64], vocab_size=vocab_size)


def run(cfg, name, samples, groups, data):
    """Train on several groups of GPUs side by side, `samples` a step on each. Returns [(start record, train records)]."""
    options = {
        "data_dir": data, "global_batch_size": samples, "max_steps": STEPS, "log_interval": INTERVAL, "eval_interval": 0,
        **({**TOY_SIZE, "compile": "false", "device": "cpu"} if cfg.toy else {}),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        outs = [Path(scratch) / str(i) for i in range(len(groups))]
        argv = [*CONFIGS[name], *flags(options)]
        runs = [start_train([*argv, f"--out_dir={out}"], gpus, f"{out}.txt") for out, gpus in zip(outs, groups)]
        for status, out in zip([process.wait() for process in runs], outs):
            if status:
                errors = [line for line in Path(f"{out}.txt").read_text().splitlines() if line.startswith("error: ")]
                raise RuntimeError((errors or [f"ended with status {status}"])[0])
        return [(read_log(out, "start")[0], [r for r in read_log(out) if r["step"] > UNTIMED_STEPS]) for out in outs]


def row_of(name, batch, samples, gpus, beside, runs):
    """A row of the results: the median over the lines of a log, then the mean over runs."""
    keys = "samples_per_second", "tokens_per_second", "mfu"
    medians = [[statistics.median(record[key] or 0 for record in records) for key in keys] for _, records in runs]
    rate, tokens, mfu = map(statistics.mean, zip(*medians))
    memory = max((record["memory_gb"] or 0) for _, records in runs for record in records)
    return {
        "model": name, "gpus": gpus, "beside": beside, "batch": batch, "samples": samples, "ms": 1e3 * samples / rate,
        "each_ms": [1e3 * samples / median[0] for median in medians], "samples_per_second": rate,
        "tokens_per_second": tokens, "mfu": mfu or None, "memory_gb": memory or None,
    }  # fmt: skip


def measure(cfg, name, gpus, data):
    """(the device's name, rows of one model on so many GPUs): each GPU alone, then all together, for both batches."""
    rows = []
    for batch, each in (("global", cfg.global_batch_size), ("per_gpu", cfg.per_gpu)):
        runs = run(cfg, name, each, [[gpu] for gpu in range(gpus)], data)
        alone = row_of(name, batch, each, 1, gpus, runs)
        rows.append(alone)
        if gpus > 1:
            samples = each if batch == "global" else each * gpus
            together = row_of(name, batch, samples, gpus, gpus, run(cfg, name, samples, [range(gpus)], data))
            rows.append(together | {"efficiency": together["tokens_per_second"] / (gpus * alone["tokens_per_second"])})
    return runs[0][0]["device"], rows


def percent(value):
    return "n/a" if value is None else f"{100 * value:.1f} %"


def table(results):
    """The rows, in Markdown."""
    lines = ["| model | batch | GPUs | samples/s | tokens/s | MFU | efficiency | ms a step |", "|---" * 8 + "|"]
    for row in results["rows"]:
        if "not_measured" in row:
            lines.append(f"| {TITLES[row['model']]} | | {row['gpus']} | not measured: {row['not_measured']} |||||")
            continue
        gpus = f"1, beside {row['beside'] - 1} more" if row["gpus"] < row["beside"] else row["gpus"]
        batch = f"{row['samples']:,}" if row["batch"] == "global" else f"{row['samples'] // row['gpus']:,} a GPU"
        lines.append(
            f"| {TITLES[row['model']]} | {batch} | {gpus} | {row['samples_per_second']:,.0f} | "
            f"{row['tokens_per_second']:,.0f} | {percent(row['mfu'])} | {percent(row.get('efficiency'))} | {row['ms']:,.1f} |"
        )
    return "\n".join(lines)


@command
def main(argv):
    cfg = load_config(ScalingConfig, argv)
    if cfg.toy:
        cfg.global_batch_size, cfg.per_gpu = 64, 16
    names, numbers, here = requested(cfg)
    print("".join(f"{n} GPUs: not measured, this machine has {here}\n" for n in numbers if n > here), end="", flush=True)
    present = [n for n in numbers if n <= here]
    results = {
        "device": "", "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), **versions(),
        "cuda": torch.version.cuda, "toy": cfg.toy, "global_batch_size": cfg.global_batch_size, "per_gpu": cfg.per_gpu,
        "rows": [],
    }  # fmt: skip
    os.makedirs(os.path.dirname(os.path.abspath(cfg.out)), exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        data = make_data(Path(directory) / "data", cfg.toy)
        for gpus in [n for n in present if n > 1] or present:  # a single GPU is measured beside the others
            for name in names:
                start = time.perf_counter()
                try:
                    results["device"], rows = measure(cfg, name, gpus, data)
                except RuntimeError as reason:
                    rows = [{"model": name, "gpus": gpus, "not_measured": str(reason)}]
                results["rows"] += rows
                print(f"{TITLES[name]} on {gpus}: {time.perf_counter() - start:.0f} s", flush=True)
                write_text(cfg.out, json.dumps(results, indent=1))
    print(f"\n{table(results)}\n\nwritten to {cfg.out}")
    if any("not_measured" in row for row in results["rows"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
