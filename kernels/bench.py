"""How fast the kernels and whole training steps are, against what one would otherwise run.

    python -m kernels.bench                                   # the default rows, under 8 minutes on one GPU
    python -m kernels.bench --only='attention*,step_full'     # these rows, with every peer they have
    python -m kernels.bench --only='step_fill80/flex_t2'      # one peer, beside this project's own code
    python plot.py --kernels=bench.json --out=kernels.svg

Prints each row as soon as it is measured and writes it to a JSON file. A row is a piece of work, its entries are ways
of doing it: "ours" and its peers, which kernels/peers.py describes.

- Every entry must first give the numbers of plain PyTorch in fp32: outputs and all gradients, at the size that is timed,
  with dropout on. Its error may be twice that of plain PyTorch in bf16. Who fails is not timed.
- Times are medians of CUDA events. Entries take turns, so that all see the same clock and temperature; inputs rotate
  and are larger than the cache. Forward is forward as in training, and backward is the difference of both and forward.
- The ceiling of a row is what the GPU could do at best: the bytes that must move at the rate of a copy, or the
  operations at the rate of a large matrix product, whichever takes longer, both measured here on random data.
- Whole steps (kernels/bench_steps.py) are forward, backward, accumulation and AdamW on 4,096 samples.
- What cannot run here says why, "not measured: ...", and the rest goes on.

Read next: kernels/bench_steps.py
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
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import checkpoint
import kernels
from config import UserError, command, load_config
from kernels import bench_steps, peers
from kernels.layernorm import DROPOUT_LEVELS
from kernels.peers import NotMeasured, WrongNumbers
from model import LAYER_NORM_EPS, alibi_slopes
from train import device_name

DROPOUT = 0.1
ROUNDS = 30  # measurements of each entry
MEASURED_SECONDS = 2e-3  # calls follow each other for about this long in one measurement
INPUT_SETS = 2  # each is far larger than the 50 MB cache


@dataclass
class BenchConfig:
    # Options
    only: str = ""  # rows, or row/entry, comma-separated, * for anything; empty: the default rows
    list: bool = False  # print rows and entries, those of the default set marked *, and stop
    seconds: int = 460  # begin nothing that would end later than this; 0: no limit
    out: str = "bench.json"  # results so far, after each row
    micro_batch_tokens: int = 0  # of whole steps; 0: 131,072 for the base model, 49,152 for the large one
    toy: bool = False  # tiny sizes on any machine: tries the benchmark itself, and measures nothing


@dataclass
class Sizes:
    """The base model's, at 1,024 samples of 128 tokens."""

    tokens: int = 131072
    hidden: int = 768
    heads: int = 12
    width: int = 3072
    layers: int = 12
    vocab: int = 30522
    masked: int = 39296  # rows of the head: 30 % of the tokens, in steps of 256
    samples: int = 4096  # of a whole step
    copy_bytes: int = 2**30
    matrix: int = 8192


TOY = Sizes(1024, 32, 2, 48, 2, 500, 256, 16, 2**16, 64)


@dataclass
class Entry:
    """A way of doing a row's work."""

    make: object  # () -> function of the row's inputs; may raise
    reference: object  # (keep, *inputs) -> the same in plain PyTorch; keep: what dropout multiplies with, or None
    dropout_prob: float = 0.0  # with which it drops
    setting: str = "default"  # of torch.compile
    note: str = ""
    default: bool = True
    seconds: float = 2  # it takes about this long, compilation included


class Bench:
    """One run: what was asked for, the clock, and the results so far."""

    def __init__(self, cfg, argv):
        self.cfg = cfg
        self.device = torch.device("cpu" if cfg.toy or not torch.cuda.is_available() else "cuda")
        self.sizes = TOY if cfg.toy else Sizes()
        self.dtype = torch.float32 if cfg.toy else torch.bfloat16
        self.rounds = 2 if cfg.toy else ROUNDS
        self.begun = time.perf_counter()
        self.failed = False
        self.results = {
            "device": "toy sizes, times mean nothing" if cfg.toy else device_name(self.device),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": " ".join(["python -m kernels.bench", *argv]),
            **checkpoint.versions(),
            "cuda": torch.version.cuda,
            "ceilings": {},
            "rows": [],
        }

    # Which rows, and for how long

    def selected(self, row, entry, default):
        patterns = [pattern.strip() for pattern in self.cfg.only.split(",") if pattern.strip()]
        if not patterns:
            return default
        if entry == "ours":
            return any(fnmatch.fnmatch(row, pattern.partition("/")[0]) for pattern in patterns)
        return any(fnmatch.fnmatch(f"{row}/{entry}", p if "/" in p else f"{p}/*") for p in patterns)

    def choose(self, row, entries):
        """The entries that were asked for; with --list none, but their names are printed."""
        chosen = {name: entry for name, entry in entries.items() if self.selected(row, name, entry.default)}
        if self.cfg.list:
            for name, entry in entries.items():
                mark = "*" if entry.default else " "
                if name in chosen or not self.cfg.only:
                    print(f"{mark} {row + '/' + name:28} about {entry.seconds:3.0f} s  {entry.note}")
            return {}
        return chosen

    def elapsed(self):
        return time.perf_counter() - self.begun

    def check_time(self, seconds):
        """Raises: NotMeasured when too little time is left."""
        if self.cfg.seconds and self.elapsed() + seconds > self.cfg.seconds:
            raise NotMeasured(f"would pass the limit of {self.cfg.seconds} s (--seconds, or --only for fewer rows)")

    # Results

    def attempt(self, row, name, entry, function):
        """function(), or None and a row that says why not. Nothing that a peer does ends the benchmark."""
        try:
            self.check_time(entry.seconds)
            with peers.compiling(entry.setting):
                return function()
        except (NotMeasured, ImportError) as reason:
            why = str(reason)
        except WrongNumbers as reason:
            why, self.failed = f"wrong numbers: {reason}", True
        except Exception as error:  # compilers and drivers raise what they like
            first = next((line for line in str(error).splitlines() if line.strip()), "")
            why, self.failed = f"{type(error).__name__}: {first[:200]}", self.failed or name == "ours"
        self.record(row, name, {"not_measured": why}, entry.note)
        return None

    def record(self, row, name, values, note=""):
        values = {"row": row, "entry": name, **values, "note": note}
        self.results["rows"].append(values)
        self.results["seconds"] = round(self.elapsed(), 1)
        print(line_of(values), flush=True)
        self.save()

    def save(self):
        try:
            os.makedirs(os.path.dirname(os.path.abspath(self.cfg.out)), exist_ok=True)
            with open(self.cfg.out + ".tmp", "w", encoding="utf-8") as file:
                json.dump(self.results, file, indent=1)
            os.replace(self.cfg.out + ".tmp", self.cfg.out)
        except OSError as error:
            raise UserError(f"{self.cfg.out}: {error.strerror} (give another --out)") from None

    # Time

    def synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def time_interleaved(self, functions):
        """{name: median seconds of functions[name](i)}, i counting calls. They take turns, `rounds` times."""
        calls = {}
        for name, function in functions.items():
            for i in range(3):
                function(i)
            self.synchronize()
            start = time.perf_counter()
            function(0)
            self.synchronize()
            calls[name] = max(1, min(20, round(MEASURED_SECONDS / (time.perf_counter() - start))))
        measured = {name: [] for name in functions}
        with Busy(self.device, self.sizes) as busy:
            for i in range(self.rounds):
                for name, function in functions.items():
                    measured[name].append(self.time_calls(busy, function, i, calls[name]))
        self.synchronize()
        return {name: statistics.median(read() for read in reads) for name, reads in measured.items()}

    def time_calls(self, busy, function, first, calls):
        """A function that tells the seconds of one of `calls` calls, once they are done."""
        if self.device.type == "cpu":
            start = time.perf_counter()
            for i in range(first, first + calls):
                function(i)
            seconds = (time.perf_counter() - start) / calls
            return lambda: seconds
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        busy()
        start.record()
        for i in range(first, first + calls):
            function(i)
        end.record()
        return lambda: start.elapsed_time(end) / 1e3 / calls

    def free(self):
        """Give memory back, and forget what was compiled."""
        torch._dynamo.reset()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # A row of operators

    def compare(self, row, entries, make_inputs, reveal, floors, tokens, valid=None):
        """Check, then time, forward and forward with backward.

        make_inputs(): (inputs, dout); gradients are taken to all floating-point inputs. reveal(function, inputs): what
        dropout multiplied with, given the function and one seed, or None. floors: {"forward", "both"}: seconds.
        valid: rows of outputs and gradients that count; the others are filling.
        """
        entries = self.choose(row, entries)
        if not entries:
            return
        sets = [make_inputs() for _ in range(INPUT_SETS)]
        functions, errors = {}, {}
        for name, entry in entries.items():

            def make_and_check(entry=entry):
                function = entry.make()
                return function, check(function, entry, sets[0], reveal, valid)

            made = self.attempt(row, name, entry, make_and_check)
            if made:
                functions[name], errors[name] = made
        if functions:
            forward = self.time_interleaved(
                {name: lambda i, f=f: f(*sets[i % INPUT_SETS][0]) for name, f in functions.items()}
            )
            both = self.time_interleaved(
                {name: lambda i, f=f: run(f, *sets[i % INPUT_SETS]) for name, f in functions.items()}
            )
        for name in functions:
            seconds = {"forward": forward[name], "backward": both[name] - forward[name], "both": both[name]}
            floor = {**floors, "backward": floors["both"] - floors["forward"]}
            values = {
                part: {
                    "ms": 1e3 * seconds[part],
                    "ns_per_token": 1e9 * seconds[part] / tokens,
                    "ceiling_ns_per_token": 1e9 * floor[part] / tokens,
                    "share_of_ceiling": floor[part] / seconds[part],
                }
                for part in seconds
            }
            self.record(row, name, {**values, "error": errors[name]}, entries[name].note)
        del sets, functions
        self.free()

    def floor(self, num_bytes=0, flops=0):
        """Seconds that the work takes at the measured ceilings."""
        ceilings = self.results["ceilings"]
        if not ceilings:  # --list
            return math.inf
        return max(num_bytes / ceilings["copy_bytes_per_second"], flops / ceilings["matrix_flops_per_second"])


class Busy:
    """Work for the GPU ahead of each measurement: it clears the cache, and lets Python run ahead of the GPU."""

    def __init__(self, device, sizes):
        self.device, self.size = device, sizes.copy_bytes

    def __enter__(self):
        self.source, self.target = (torch.empty(self.size, dtype=torch.uint8, device=self.device) for _ in range(2))
        return lambda: self.target.copy_(self.source)

    def __exit__(self, *_):
        del self.source, self.target


def line_of(values):
    """A row of the table on the screen."""
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
    text += f" | error {values['error']:.1e}" if values.get("error") is not None else ""
    return text + (f" | {values['note']}" if values["note"] else "")


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def run(function, inputs, dout):
    """The gradients of one forward and backward pass."""
    return torch.autograd.grad(function(*inputs), differentiable(inputs), dout)


def differentiable(inputs):
    return [x for x in inputs if x.requires_grad]


def outputs_of(function, inputs, dout):
    """[output, gradient of each input that has one]. Functions may write over their inputs, so they get copies."""
    inputs = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, differentiable(inputs), dout)]


def check(function, entry, inputs_and_dout, reveal, valid=None):
    """The largest relative rms error of outputs and gradients against fp32. Raises: WrongNumbers."""
    inputs, dout = inputs_and_dout
    keep = None
    if entry.dropout_prob:
        kept = reveal(function, inputs)
        share, sigma = 1 - kept.float().mean().item(), math.sqrt(entry.dropout_prob / kept.numel())
        if abs(share - entry.dropout_prob) > 6 * sigma:
            raise WrongNumbers(f"dropout drops {share:.4f} instead of {entry.dropout_prob:.4f}")
        keep = kept / (1 - entry.dropout_prob)
    torch.manual_seed(1)
    got = outputs_of(function, inputs, dout)
    own = outputs_of(partial(entry.reference, keep), inputs, dout)
    single = [x.detach().float().requires_grad_() if x.requires_grad else x for x in inputs]
    exact = outputs_of(partial(entry.reference, keep), single, dout.float())
    return compare_numbers(got, own, exact, valid)


def compare_numbers(got, own, exact, valid=None):
    """The rule of the tests: by largest and by rms error, at most twice PyTorch's own and one unit in the last place."""
    worst = 0.0
    for i, (g, o, e) in enumerate(zip(got, own, exact)):
        if valid is not None and len(e) > valid:
            g, o, e = g[:valid], o[:valid], e[:valid]
        eps = 1e-5 if o.dtype == torch.float32 else torch.finfo(o.dtype).eps
        name = f"gradient {i}" if i else "output"
        for kind, measure in (("largest", lambda x: x.abs().max()), ("rms", lambda x: x.square().mean().sqrt())):
            error, own_error, scale = (measure(x.float()).item() for x in (g.float() - e, o.float() - e, e))
            bound = 2 * own_error + eps * scale
            if not error <= bound:  # also for NaN
                raise WrongNumbers(f"{name}: {kind} error {error:.2e} is over {bound:.2e}")
        worst = max(worst, error / max(scale, 1e-30))
    return worst


# ---------------------------------------------------------------------------------------------------------------------
# This project's side: the one place that follows changes of the kernels


def our_attention(batch, slopes):
    windows = {} if getattr(batch, "windows", None) is None else {"windows": batch.windows}
    return lambda qkv: kernels.attention_qkvpacked(qkv, batch.cu_seqlens, batch.max_seqlen, slopes, **windows)


def our_layernorm(x, residual, weight, bias):
    out = kernels.dropout_add_layernorm(x, residual, weight, bias, DROPOUT, LAYER_NORM_EPS)
    return out[0] if isinstance(out, tuple) else out


def our_geglu(x):
    return kernels.geglu(x, DROPOUT)


def our_cross_entropy():
    if not callable(getattr(kernels, "cross_entropy", None)):
        raise NotMeasured("kernels has no cross_entropy: the model takes PyTorch's")
    return kernels.cross_entropy


def our_linear_cross_entropy():
    """What model.MaskedLM does with the hidden states of the masked tokens."""
    loss = kernels.cross_entropy if callable(getattr(kernels, "cross_entropy", None)) else peers.cross_entropy
    return lambda hidden, weight, bias, labels: loss(F.linear(hidden, weight, bias), labels)


OUR_DROPOUT = round(DROPOUT * DROPOUT_LEVELS) / DROPOUT_LEVELS


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def ceilings(bench):
    """Copy bandwidth and matrix rate, on random data. Always measured: other rows are held against them."""
    if bench.cfg.list:
        return
    size, n = bench.sizes.copy_bytes, bench.sizes.matrix
    sources = [torch.randint(256, (size,), dtype=torch.uint8, device=bench.device) for _ in range(2)]
    target = torch.empty_like(sources[0])
    a, b = (torch.randn(n, n, device=bench.device).to(bench.dtype) for _ in range(2))
    seconds = bench.time_interleaved(
        {"copy": lambda i: target.copy_(sources[i % 2]), "matrix": lambda i: (a, b)[i % 2] @ (b, a)[i % 2]}
    )
    target.copy_(sources[0])
    error = relative_error(a @ b, a.float() @ b.float())
    if not torch.equal(target, sources[0]) or error > 4e-3:
        raise UserError(f"this machine computes wrongly: a matrix product has error {error:.1e}")
    found = {"copy_bytes_per_second": 2 * size / seconds["copy"], "matrix_flops_per_second": 2 * n**3 / seconds["matrix"]}
    bench.results["ceilings"] = found
    copy, matrix = found.values()
    values = {"ms": 1e3 * seconds["copy"], "rate": f"{copy / 1e12:.2f} TB/s, read and write", "value": copy}
    bench.record("ceiling", "copy", values)
    values = {"ms": 1e3 * seconds["matrix"], "rate": f"{matrix / 1e12:.0f} TFLOP/s", "value": matrix, "error": error}
    bench.record("ceiling", f"matrix_{n}", values)
    bench.free()


def relative_error(got, exact):
    return ((got.float() - exact).norm() / exact.norm()).item()


def gemm(bench):
    """The twelve products of a layer's four matrices: forward, and both gradients, as autograd asks for them."""
    s = bench.sizes
    shapes = {  # out features, in features
        "Wqkv": (3 * s.hidden, s.hidden), "Wo": (s.hidden, s.hidden), "Wgate_up": (2 * s.width, s.hidden),
        "Wdown": (s.hidden, s.width),
    }  # fmt: skip
    entry = Entry(None, None, seconds=1)
    flops = seconds = 0
    for name, (n, k) in shapes.items():
        parts = bench.choose("gemm", {f"{name}_{part}": entry for part in ("forward", "dx", "dw")})
        if not parts:
            continue
        x, w, dy = (
            torch.randn(shape, device=bench.device).to(bench.dtype) for shape in ((s.tokens, k), (n, k), (s.tokens, n))
        )
        products = {
            f"{name}_forward": lambda x, w, dy: x @ w.T,
            f"{name}_dx": lambda x, w, dy: dy @ w,
            f"{name}_dw": lambda x, w, dy: dy.T @ x,
        }
        products = {part: products[part] for part in parts}
        single = x.float(), w.float(), dy.float()
        errors = {part: relative_error(product(x, w, dy), product(*single)) for part, product in products.items()}
        del single
        times = bench.time_interleaved({part: lambda i, f=f: f(x, w, dy) for part, f in products.items()})
        for part, time_ in times.items():
            if errors[part] > 4e-3:
                bench.record("gemm", part, {"not_measured": f"wrong numbers: error {errors[part]:.1e}"})
                bench.failed = True
                continue
            rate = 2 * s.tokens * n * k / time_
            share = rate / bench.results["ceilings"]["matrix_flops_per_second"]
            text = f"{rate / 1e12:.0f} TFLOP/s, {100 * share:.0f} % of the ceiling"
            bench.record("gemm", part, {"ms": 1e3 * time_, "rate": text, "value": rate, "error": errors[part]})
            flops, seconds = flops + 2 * s.tokens * n * k, seconds + time_
        del x, w, dy
        bench.free()
    if seconds:
        text = f"{flops / seconds / 1e12:.0f} TFLOP/s, {1e9 * seconds / s.tokens:.1f} ns/token and layer"
        bench.record("gemm", "all", {"ms": 1e3 * seconds, "rate": text, "value": flops / seconds})


def attention_floors(bench, tokens, sum_squared_lengths):
    """Forward reads q, k, v and writes out; backward reads them and dout, and writes dq, dk, dv: 4 and 7 rows.

    Two products forward, five backward, of 2 D operations a pair of tokens and head.
    """
    row, products = 2 * bench.sizes.hidden, 2 * bench.sizes.hidden * sum_squared_lengths
    forward = bench.floor(4 * row * tokens, 2 * products)
    return {"forward": forward, "both": forward + bench.floor(7 * row * tokens, 5 * products)}


def attention(bench, row, samples):
    """ALiBi attention of one micro-batch. samples: data.Samples, of which the first make the micro-batch."""
    s, device = bench.sizes, bench.device
    slopes = alibi_slopes(s.heads).to(device)
    host = bench_steps.first_batch(samples, s.tokens // samples.seq_length)
    batch = host.to(device)
    flat = peers.unpadded([host], device)[0]
    lengths = batch.cu_seqlens[: batch.num_samples + 1].diff()
    place = torch.arange(samples.seq_length, device=device) < lengths[:, None]  # (B, S): where padding puts tokens

    def inputs():
        qkv = torch.randn(len(batch.input_ids), 3, s.heads, s.hidden // s.heads, device=device)
        dout = torch.randn_like(qkv[:, 0]).to(bench.dtype)
        return [qkv.to(bench.dtype).requires_grad_()], dout

    def reference(keep, qkv, slopes=slopes):
        return kernels.attention_reference(*qkv.unbind(1), batch.cu_seqlens, batch.max_seqlen, slopes)

    def flex():
        mask, attend = peers.flex_layout(flat), peers.compiled(peers.flex_attention)
        return lambda qkv: attend(qkv, mask, slopes)

    def varlen():
        return lambda qkv: peers.varlen_attention(qkv, peers.varlen_layout(flat), slopes)

    def dense(backend):
        bias = peers.alibi_bias(lengths, samples.seq_length, slopes, bench.dtype)
        full = bool(place.all())
        where = place.flatten().nonzero()[:, 0]

        def attend(qkv):
            with sdpa_kernel(backend):
                if full:
                    return peers.padded_attention(qkv, bias, slopes)
                stream = qkv.new_zeros(place.numel(), *qkv.shape[1:]).index_copy(0, where, qkv[: len(where)])
                out = peers.padded_attention(stream, bias, slopes)[where]
                return F.pad(out, (0, 0, 0, 0, 0, len(qkv) - len(where)))

        return attend

    no_bias = partial(reference, slopes=None)
    entries = {
        "ours": Entry(lambda: our_attention(batch, slopes), reference),
        "varlen": Entry(varlen, no_bias, note="varlen_attn, without ALiBi"),
        "flex": Entry(flex, reference, seconds=15, note="FlexAttention, mask built before"),
        "sdpa_cudnn": Entry(lambda: dense(SDPBackend.CUDNN_ATTENTION), reference, note="dense ALiBi, padded"),
        "sdpa_efficient": Entry(lambda: dense(SDPBackend.EFFICIENT_ATTENTION), reference, note="dense ALiBi, padded"),
    }
    floors = attention_floors(bench, batch.num_tokens, batch.sum_squared_lengths)
    bench.compare(row, entries, inputs, None, floors, batch.num_tokens, valid=batch.num_tokens)


def layernorm_floors(bench, tokens):
    """Forward reads x and residual, writes y and their sum; backward reads dy and the sum, writes two gradients.

    The mask is drawn again, so it moves no bytes. (With the second gradient that comes in: one row more.)
    """
    row = 2 * bench.sizes.hidden * tokens
    return {"forward": bench.floor(4 * row), "both": bench.floor(8 * row)}


def layernorm(bench):
    s, device = bench.sizes, bench.device

    def inputs():
        x, residual, dout = (torch.randn(s.tokens, s.hidden, device=device).to(bench.dtype) for _ in range(3))
        weight, bias = torch.randn(2, s.hidden, device=device)
        return [x.requires_grad_(), residual.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()], dout

    def reference(keep, x, residual, weight, bias):
        z = residual + (x.float() * keep).to(x.dtype)
        return F.layer_norm(z, (s.hidden,), weight.to(z.dtype), bias.to(z.dtype), LAYER_NORM_EPS)

    def reveal(function, inputs):
        """Rows of equal numbers: what stays is above their mean."""
        torch.manual_seed(1)
        x, residual, weight, bias = inputs
        values = (torch.ones_like(x), torch.zeros_like(x), torch.ones_like(weight), torch.zeros_like(bias))
        return function(*(value.requires_grad_() for value in values)).detach() >= 0

    def peer(setting):
        normalize = peers.compiled(peers.dropout_add_layernorm)
        return lambda *inputs: normalize(*inputs, DROPOUT, setting)

    def liger():
        normalize = peers.liger("liger_layer_norm")
        return lambda x, residual, *weights: normalize(F.dropout(x, DROPOUT) + residual, *weights, LAYER_NORM_EPS)

    entries = {"ours": Entry(lambda: our_layernorm, reference, OUR_DROPOUT)}
    entries |= compiled_entries(peer, reference)
    entries["liger"] = Entry(liger, reference, DROPOUT, note="dropout and sum by PyTorch")
    bench.compare("layernorm", entries, inputs, reveal, layernorm_floors(bench, s.tokens), s.tokens)


def compiled_entries(make, reference, settings=("default", "t1", "t2")):
    """Entries of a function with dropout, compiled with each setting."""
    return {
        f"compiled_{setting}": Entry(
            partial(make, setting), reference, peers.dropped_share(setting, DROPOUT), setting, seconds=6
        )
        for setting in settings
    }


def geglu_floors(bench, tokens):
    """Forward reads both halves and writes one; backward reads three and writes two."""
    half = 2 * bench.sizes.width * tokens
    return {"forward": bench.floor(3 * half), "both": bench.floor(8 * half)}


def geglu(bench):
    s, device = bench.sizes, bench.device

    def inputs():
        x = torch.randn(s.tokens, 2 * s.width, device=device).to(bench.dtype)
        return [x.requires_grad_()], torch.randn(s.tokens, s.width, device=device).to(bench.dtype)

    def reference(keep, x, approximate="none"):
        gate, value = x.chunk(2, dim=-1)
        out = F.gelu(gate, approximate=approximate) * value
        return out if keep is None else (out.float() * keep).to(x.dtype)

    def reveal(function, inputs):
        torch.manual_seed(1)
        return function(torch.ones_like(inputs[0]).requires_grad_()).detach() != 0

    def peer(setting):
        gate = peers.compiled(peers.geglu)
        return lambda x: gate(x, DROPOUT, setting)

    def liger():
        gate = peers.liger("liger_geglu")
        return lambda x: gate(*x.chunk(2, dim=-1))

    entries = {"ours": Entry(lambda: our_geglu, reference, OUR_DROPOUT)}
    entries |= compiled_entries(peer, reference)
    entries["liger"] = Entry(liger, partial(reference, approximate="tanh"), note="tanh, without dropout")
    bench.compare("geglu", entries, inputs, reveal, geglu_floors(bench, s.tokens), s.tokens)


def cross_entropy_floors(bench, rows, vocab):
    """The logits are read once, and their gradient is written once: with the loss, as it can be known then."""
    seconds = bench.floor(2 * 2 * rows * vocab)
    return {"forward": seconds, "both": seconds}


def cross_entropy(bench):
    """Cross-entropy of bf16 logits, and the gradient to them; times are of the tokens of the micro-batch."""
    s, device = bench.sizes, bench.device
    vocab = peers.round_up(s.vocab, 64)

    def inputs():
        logits = torch.randn(s.masked, vocab, device=device).to(bench.dtype)
        return [logits.requires_grad_(), torch.randint(s.vocab, (s.masked,), device=device)], torch.ones((), device=device)

    def reference(keep, logits, labels):
        return peers.cross_entropy(logits, labels)

    entries = {
        "ours": Entry(our_cross_entropy, reference),
        "compiled": Entry(lambda: peers.compiled(peers.cross_entropy), reference, seconds=6),
        "eager": Entry(lambda: peers.cross_entropy, reference),
        "liger": Entry(lambda: partial(peers.liger("liger_cross_entropy"), reduction="sum"), reference),
    }
    floors = cross_entropy_floors(bench, s.masked, vocab)
    bench.compare("cross_entropy", entries, inputs, None, floors, s.tokens)


def head_floors(bench, rows, vocab):
    """Three products of the hidden states, the embedding matrix and the logits or their gradient."""
    product = 2 * rows * vocab * bench.sizes.hidden
    return {"forward": bench.floor(flops=product), "both": bench.floor(flops=3 * product)}


def head(bench):
    """The decoder's matrix with cross-entropy, and all gradients."""
    s, device = bench.sizes, bench.device
    vocab = peers.round_up(s.vocab, 64)

    def inputs():
        hidden = torch.randn(s.masked, s.hidden, device=device)
        weight, bias = 0.02 * torch.randn(vocab, s.hidden, device=device), 0.02 * torch.randn(vocab, device=device)
        leaves = [x.to(bench.dtype).requires_grad_() for x in (hidden, weight, bias)]
        return [*leaves, torch.randint(s.vocab, (s.masked,), device=device)], torch.ones((), device=device)

    def reference(keep, hidden, weight, bias, labels):
        return peers.linear_cross_entropy(hidden, weight, bias, labels)

    def liger():
        loss = peers.liger("liger_fused_linear_cross_entropy")
        return lambda hidden, weight, bias, labels: loss(hidden, weight, labels, bias, reduction="sum")

    entries = {
        "ours": Entry(our_linear_cross_entropy, reference),
        "compiled": Entry(lambda: peers.compiled(peers.linear_cross_entropy), reference, seconds=6),
        "liger": Entry(liger, reference, note="in chunks of rows"),
    }
    bench.compare("head", entries, inputs, None, head_floors(bench, s.masked, vocab), s.tokens)


def rows(bench, directory):
    """Everything, in the order of the table."""
    ceilings(bench)
    gemm(bench)
    data = bench_steps.Data(directory, bench.sizes)
    attention(bench, "attention_full", data.samples("full"))
    attention(bench, "attention_fill80", data.samples("fill80"))
    attention(bench, "attention_512", data.samples("full", 512))
    layernorm(bench)
    geglu(bench)
    cross_entropy(bench)
    head(bench)
    bench_steps.rows(bench, data)


@command
def main(argv):
    cfg = load_config(BenchConfig, argv)
    if not (torch.cuda.is_available() or cfg.toy or cfg.list):
        raise UserError("kernels.bench needs an NVIDIA GPU (--toy tries its code on any machine)")
    bench = Bench(cfg, argv)
    if cfg.toy:
        peers.BACKEND = "aot_eager"
    if not cfg.list:
        versions = ", ".join(f"{name} {version}" for name, version in bench.results["versions"].items())
        print(f"{bench.results['device']}; {versions}; commit {bench.results['commit']}", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        rows(bench, directory)
    if cfg.list:
        return
    if not any(row["row"] != "ceiling" for row in bench.results["rows"]):
        raise UserError(f"--only={cfg.only}: no such row (--list shows all)")
    print(f"{bench.elapsed():.0f} s; written to {cfg.out}")
    if bench.failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
