"""How fast the kernels and whole training steps are, compared with the alternatives.

    python -m studies.bench                                   # the default rows, under 8 minutes on one GPU
    python -m studies.bench --only='attention*,step_full'     # these rows, with all their peers
    python -m studies.bench --only='step_fill80/flex_t2'      # one peer, beside our own code
    python -m tools.plot --kernels=out/bench.json --out=kernels.svg

A row is a workload; its entries are implementations of it: "ours" and its peers (studies/peers.py). Each result is
printed and written to the JSON file as soon as it is measured.

- Every entry must first reproduce plain PyTorch in fp32: the result and all gradients, at the size that is timed, with
  dropout on. Its error may be twice that of plain PyTorch in bf16. Entries that fail the check are not timed.
- Times are medians of CUDA events. Entries take turns, so all see the same clocks and temperature; inputs rotate and
  exceed the cache. Forward is timed as in training; backward is forward and backward minus forward.
- A row's ceiling is the best the GPU could do: the bytes that must move at the speed of a copy, or the operations at the
  speed of a large matrix product, whichever takes longer. Both speeds are measured here, on random data.
- A whole step (studies/bench_steps.py) is forward, backward, accumulation and AdamW on 4,096 samples.
- What cannot run here says why ("not measured: ..."), and the rest continues.

Read next: studies/bench_steps.py
"""

import datetime
import fnmatch
import json
import math
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial

import torch

from common.files import write_text
from common.options import UserError, command, load_config
from common.processes import device_name
from common.trace import wait_for_gpu
from common.versions import versions
from studies import bench_kernels, bench_steps, peers
from studies.peers import NotMeasured, WrongNumbers

ROUNDS = 30  # measurements per entry
MEASURED_SECONDS = 2e-3  # a measurement repeats the call for about this long


@dataclass
class BenchConfig:
    # Options
    only: str = ""  # rows or row/entry, comma-separated, with * as wildcard; empty: the default rows
    list: bool = False  # print all rows and entries, the default ones marked *, and stop
    seconds: int = 460  # start nothing that would likely end later than this; 0: no limit
    out: str = "out/bench.json"  # results, rewritten after each row
    micro_batch_tokens: int = 0  # for whole steps; 0: 131,072 for the base model, 49,152 for the large one
    toy: bool = False  # tiny sizes on any machine: tests the benchmark itself, measures nothing


@dataclass
class Sizes:
    """The base model's, for 1,024 samples of 128 tokens."""

    tokens: int = 131072
    hidden: int = 768
    heads: int = 12
    width: int = 3072
    vocab: int = 30522
    masked: int = 39296  # rows of the head: 30 % of the tokens, rounded to 256
    samples: int = 4096  # in a whole step
    copy_bytes: int = 2**30
    matrix: int = 8192


TOY = Sizes(1024, 32, 2, 48, 500, 256, 16, 2**16, 64)


class Bench:
    """One run: its options, its clock, and its results so far."""

    def __init__(self, cfg, argv):
        self.cfg = cfg
        self.device = torch.device("cpu" if cfg.toy or not torch.cuda.is_available() else "cuda")
        self.sizes = TOY if cfg.toy else Sizes()
        self.dtype = torch.float32 if cfg.toy else torch.bfloat16
        self.rounds = 1 if cfg.toy else ROUNDS
        self.begun = time.perf_counter()
        self.failed = False
        self.patterns = [pattern.strip() for pattern in cfg.only.split(",") if pattern.strip()]
        self.unmatched = set(self.patterns)
        self.results = {
            "device": "toy sizes, times mean nothing" if cfg.toy else device_name(self.device),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": " ".join(["python -m studies.bench", *argv]),
            **versions(),
            "cuda": torch.version.cuda,
            "ceilings": {},
            "rows": [],
        }

    # Which rows, and for how long

    def selected(self, row, name, entry):
        """Whether to run an entry; "ours" runs beside any peer."""
        asking = [p for p in self.patterns if fnmatch.fnmatch(f"{row}/{name}", p if "/" in p else f"{p}/*")]
        self.unmatched -= set(asking)
        beside = name == "ours" and any(fnmatch.fnmatch(row, p.partition("/")[0]) for p in self.patterns)
        return bool(asking) or beside if self.patterns else entry.default

    def choose(self, row, entries):
        """The entries to run; with --list their names are printed, and none run."""
        chosen = {name: entry for name, entry in entries.items() if self.selected(row, name, entry)}
        if self.cfg.list:
            for name, entry in entries.items():
                mark = "*" if entry.default else " "
                if name in chosen or not self.patterns:
                    print(f"{mark} {row + '/' + name:28} about {entry.seconds:3.0f} s  {entry.note}")
            return {}
        return chosen

    def elapsed(self):
        return time.perf_counter() - self.begun

    def out_of_time(self, seconds=0):
        return bool(self.cfg.seconds) and self.elapsed() + seconds > self.cfg.seconds

    def check_time(self, seconds):
        """Raises: NotMeasured when fewer seconds are left."""
        if self.out_of_time(seconds):
            raise NotMeasured(f"would exceed the limit of {self.cfg.seconds} s (--seconds, or --only for fewer rows)")

    # Results

    def attempt(self, row, name, entry, function):
        """function(), or None and a row that says why it failed. A failing row doesn't end the benchmark.

        entry: what is attempted, or None for a whole row.
        """
        try:
            with peers.compiling(entry.setting if entry else "default"):
                return function()
        except (NotMeasured, ImportError) as reason:
            why = str(reason)
        except WrongNumbers as reason:
            why, self.failed = f"wrong numbers: {reason}", True
        except UserError:
            raise
        except Exception as error:  # compilers and drivers raise anything
            first = next((line for line in str(error).splitlines() if line.strip()), "")
            why, self.failed = f"{type(error).__name__}: {first[:200]}", self.failed or name == "ours"
        self.record(row, name, {"not_measured": why}, entry.note if entry else "")
        return None

    def record(self, row, name, values, note=""):
        values = {"row": row, "entry": name, **values, "note": note}
        self.results["rows"].append(values)
        self.results["seconds"] = round(self.elapsed(), 1)
        print(line_of(values), flush=True)
        write_results(self.cfg.out, self.results)

    # Time

    def time_interleaved(self, functions):
        """{name: median seconds of functions[name](i)}, i counting calls. They take turns for `rounds` rounds."""
        calls = dict.fromkeys(functions, 1)
        for name, function in functions.items() if not self.cfg.toy else ():
            for i in range(3):
                function(i)
            wait_for_gpu()
            start = time.perf_counter()
            function(0)
            wait_for_gpu()
            calls[name] = max(1, min(20, round(MEASURED_SECONDS / (time.perf_counter() - start))))
        measured = {name: [] for name in functions}
        # A copy ahead of each measurement flushes the cache, and lets Python run ahead of the GPU.
        source, target = (torch.empty(self.sizes.copy_bytes, dtype=torch.uint8, device=self.device) for _ in range(2))
        for i in range(self.rounds):
            for name, function in functions.items():
                target.copy_(source)
                measured[name].append(self.time_calls(function, i, calls[name]))
        wait_for_gpu()
        return {name: statistics.median(read() for read in reads) for name, reads in measured.items()}

    def time_calls(self, function, first, calls):
        """A function that returns the seconds per call, once all are done."""
        if self.device.type == "cpu":
            start = time.perf_counter()
            for i in range(first, first + calls):
                function(i)
            seconds = (time.perf_counter() - start) / calls
            return lambda: seconds
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for i in range(first, first + calls):
            function(i)
        end.record()
        return lambda: start.elapsed_time(end) / 1e3 / calls

    def free(self):
        """Free memory and compiled code."""
        torch._dynamo.reset()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def floor(self, num_bytes=0, flops=0):
        """Seconds the work takes at the measured ceilings."""
        ceilings = self.results["ceilings"]
        if not ceilings:  # --list
            return math.inf
        return max(num_bytes / ceilings["copy_bytes_per_second"], flops / ceilings["matrix_flops_per_second"])


def write_results(path, results):
    """Write a dictionary as JSON, atomically. Raises: UserError."""
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        write_text(path, json.dumps(results, indent=1))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror} (give another --out)") from None


def line_of(values):
    """A line of the printed table."""
    text = f"{values['row'] + '/' + values['entry']:28}"
    if "not_measured" in values:
        return f"{text} not measured: {values['not_measured']}"
    for part in ("forward", "backward", "both"):
        if part in values:
            numbers = values[part]
            text += f" | {part} {numbers['ms']:7.3f} ms {numbers['ns_per_token']:6.2f} ns/token"
            if numbers["share_of_ceiling"]:
                text += f" {100 * numbers['share_of_ceiling']:3.0f} %"
    if "samples_per_second" in values:
        text += f" | {values['samples_per_second']:8,.1f} samples/s {values['ms']:8.1f} ms"
        if values["mfu"]:
            text += f" | mfu {100 * values['mfu']:.1f} %"
        text += f" | {values['peak_gib']:.1f} GiB at {values['micro_batch_tokens']:,} tokens"
    if "rate" in values:
        text += f" | {values['ms']:7.3f} ms | {values['rate']}"
    if values.get("ours_faster") and values["entry"] != "ours":
        text += f" | ours is {values['ours_faster']:.2f} x as fast"
    text += f" | error {values['error']:.1e}" if values.get("error") is not None else ""
    return text + (f" | {values['note']}" if values["note"] else "")


# ---------------------------------------------------------------------------------------------------------------------


def ceilings(bench):
    """Copy bandwidth and matrix rate, on random data. Always measured: other rows are compared with them."""
    size, n = bench.sizes.copy_bytes, bench.sizes.matrix
    sources = [torch.randint(256, (size,), dtype=torch.uint8, device=bench.device) for _ in range(2)]
    target = torch.empty_like(sources[0])
    a, b = (torch.randn(n, n, device=bench.device).to(bench.dtype) for _ in range(2))
    seconds = bench.time_interleaved(
        {"copy": lambda i: target.copy_(sources[i % 2]), "matrix": lambda i: (a, b)[i % 2] @ (b, a)[i % 2]}
    )
    copy, matrix = 2 * size / seconds["copy"], 2 * n**3 / seconds["matrix"]
    bench.results["ceilings"] = {"copy_bytes_per_second": copy, "matrix_flops_per_second": matrix}
    values = {"ms": 1e3 * seconds["copy"], "rate": f"{copy / 1e12:.2f} TB/s, read and write", "value": copy}
    bench.record("ceiling", "copy", values)
    values = {"ms": 1e3 * seconds["matrix"], "rate": f"{matrix / 1e12:.0f} TFLOP/s", "value": matrix}
    bench.record("ceiling", f"matrix_{n}", values)
    bench.free()


@command
def main(argv):
    cfg = load_config(BenchConfig, argv)
    if not (torch.cuda.is_available() or cfg.toy or cfg.list):
        raise UserError("studies.bench needs an NVIDIA GPU (--toy tests its code on any machine)")
    if 0 < cfg.micro_batch_tokens < 1024:
        raise UserError(f"micro_batch_tokens={cfg.micro_batch_tokens}: must be at least 1024 (0 chooses for you)")
    if cfg.toy and peers.BACKEND == "inductor":
        peers.BACKEND = "aot_eager"
    bench = Bench(cfg, argv)
    if not cfg.list:
        versions = ", ".join(f"{name} {version}" for name, version in bench.results["versions"].items())
        print(f"{bench.results['device']}; {versions}; commit {bench.results['commit']}", flush=True)
        ceilings(bench)
    with tempfile.TemporaryDirectory() as directory:
        data = bench_steps.Data(directory, bench.sizes)
        for row, function in {**bench_kernels.rows(data), **bench_steps.rows(data)}.items():
            bench.attempt(row, "ours", None, partial(function, bench, row))
            bench.free()
    if not cfg.list:
        print(f"{bench.elapsed():.0f} s; written to {cfg.out}")
    if bench.unmatched:
        raise UserError(f"--only: no such row: {', '.join(sorted(bench.unmatched))} (--list shows all)")
    if bench.failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
