"""Whether FP8 pays: one layer's feed-forward path in bf16 and in FP8, part by part and as a whole.

    python -m studies.bench_fp8 --json=out/fp8.json        # under 100 seconds on one GPU, Triton's compilations included

The path: LayerNorm (bias, dropout, residual), gate+up product, GeGLU (dropout), down product; and backward, from the
gradients that the next LayerNorm gets. In FP8 the three products of each matrix read e4m3 activations and weights and
e5m2 gradients, which GeGLU and `quantize` write straight and transposed (kernels/fp8.py). Weights are converted in every
micro-batch, as training does. After the path, the same with autograd, a whole layer, and a forward and backward pass of
the whole model, all by the code that trains.

- Everything in FP8 is checked first, against the bf16 twin or fp32, with dropout on; what fails is reported, not timed.
- Times are medians of CUDA events; the entries of a group take turns, so all see the same clocks and temperature.
- The floor of a kernel is its bytes at the speed of a copy, measured here, and of a product its operations at the rate
  measured for FP8 or bf16 at 8192^3.

Read next: kernels/fp8.py
"""

import importlib
import json
import math
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

import kernels
from common.batch import Batch
from common.options import command, load_config
from common.processes import device_name
from common.versions import versions
from kernels import fp8
from kernels.backend import triton
from kernels.fp8 import E4M3, E5M2, product
from model import MaskedLM, ModelConfig

geglu = importlib.import_module("kernels.geglu")  # the file; kernels.geglu is the function
layernorm = importlib.import_module("kernels.layernorm")

DROPOUT, EPS = 0.1, 1e-12
LAYERS, VOCAB_SIZE = 12, 30522
WARM_PROCESSES = 10  # compile Triton's kernels side by side
MEASURED_MS = 1.5  # a measurement repeats its call for about this long

# Launch configurations to be timed: rows, columns, warps.
GEGLU_TILES = [(64, 64, 4), (64, 64, 8), (128, 64, 8), (64, 128, 8), (32, 128, 4), (32, 64, 4), (128, 32, 4), (32, 32, 2)]
QUANTIZE_TILES = [(64, 64, 4), (64, 64, 8), (64, 128, 8)]


@dataclass
class Fp8BenchConfig:
    # Options
    json: str = "out/fp8.json"  # results
    tokens: str = "131072,32768"  # micro-batches to measure
    hidden: int = 768  # C
    width: int = 3072  # F
    rounds: int = 15  # measurements per entry
    seconds: int = 95  # start nothing after this long
    warm: str = ""  # "k/n": only compile every n-th entry from the k-th; what the script starts of itself
    toy: bool = False  # few rows, a short run: tests the script itself


# ---------------------------------------------------------------------------------------------------------------------
# Inputs, and the operations to be measured


def make_inputs(tokens, C, F, device, dtype):
    """Everything the path reads; activations and gradients in dtype, parameters in fp32."""
    generator = torch.Generator(device).manual_seed(17)

    def normal(*shape, std=1.0, dtype=dtype):
        return torch.randn(shape, generator=generator, device=device).mul_(std).to(dtype)

    fp32 = torch.float32
    i = SimpleNamespace(tokens=tokens, C=C, F=F, device=device, dtype=dtype)
    i.x, i.residual, i.x_bias = normal(tokens, C), normal(tokens, C), normal(C, std=0.02, dtype=fp32)
    i.weight, i.bias = 1 + normal(C, std=0.1, dtype=fp32), normal(C, std=0.1, dtype=fp32)
    i.wg, i.wd = normal(2 * F, C, std=0.02, dtype=fp32), normal(C, F, std=0.02, dtype=fp32)
    i.seed, i.seed2 = (torch.randint(2**62, (1,), generator=generator, device=device) for _ in range(2))
    # The next LayerNorm's: its input, and the gradients of its output. Gradients of a mean over tokens are small.
    i.z2, i.dy2, i.dnext2 = normal(tokens, C), normal(tokens, C, std=1e-4), normal(tokens, C, std=1e-4)
    i.mean2, i.rstd2 = i.z2.float().mean(1), i.z2.float().var(1, correction=0).rsqrt()
    return i


class Scales:
    """A Scaled for each tensor: what delayed scaling would find, from one pass in the other dtype."""

    def __init__(self, i):
        y, h, *_, dz, dgu = forward_and_backward(i, everything=True)
        tensors = {"y": y, "wg": i.wg, "wd": i.wd, "h": h, "dz": dz, "dgu": dgu}
        scales = fp8.Scales(1, [KINDS[name] for name in tensors]).to(i.device)
        scales.set(torch.stack([tensor.abs().amax().float() for tensor in tensors.values()])[None])
        for name, of_it in zip(tensors, scales.of_layer(0)):
            setattr(self, name, of_it)
        self.of_12_layers = fp8.Scales(12, (*kernels.LINEAR, *kernels.FEED_FORWARD)).to(i.device)


KINDS = {"y": "activation", "wg": "weight", "wd": "weight", "h": "activation", "dz": "gradient", "dgu": "gradient"}


def layernorm_bf16(i):
    return layernorm.layernorm_op(i.x, i.x_bias, i.residual, i.weight, i.bias, i.seed, DROPOUT, EPS)


def next_layernorm_backward(i):
    """dz, the gradient of the down product's result."""
    args = i.dy2, i.dnext2, i.z2, i.weight, None, i.mean2, i.rstd2
    return layernorm.layernorm_backward_op(*args, 0.0, True, True)[0]


def layernorm_backward(i, dy, dnext, z, mean, rstd):
    """(dresidual, dx, gradients of the parameters)"""
    return layernorm.layernorm_backward_op(dy, dnext, z, i.weight, i.seed, mean, rstd, DROPOUT, True, True)


@torch.no_grad()
def forward_and_backward(i, everything=False):
    """The path as it is today, in i.dtype. Returns d, dx, dresidual, dwg, dwd and the gradients of LayerNorm's parameters."""
    wg, wd = i.wg.to(i.dtype), i.wd.to(i.dtype)
    y, z, mean, rstd = layernorm_bf16(i)
    gu = y @ wg.t()
    h = geglu.geglu_op(gu, i.seed2, DROPOUT)
    d = h @ wd.t()
    dz = next_layernorm_backward(i)
    dwd = dz.t() @ h
    dgu = geglu.geglu_backward_op(dz @ wd, gu, i.seed2, DROPOUT)
    if everything:
        return y, h, gu, z, mean, rstd, dz @ wd, dz, dgu
    del h, gu
    dy = dgu @ wg
    dwg = dgu.t() @ y
    dresidual, dx, dparams = layernorm_backward(i, dy, dz, z, mean, rstd)
    return d, dx, dresidual, dwg, dwd, dparams


@torch.no_grad()
def forward_and_backward_fp8(i, s, tiles, fast_backward):
    """The same in FP8, as kernels/fp8_layers.py does it. tiles: launch configurations."""
    geglu_tile = dict(zip(("F_", "BLOCK_R", "BLOCK_F", "num_warps"), (i.F, *tiles["GeGLU forward"])))
    backward_tile = dict(zip(("F_", "BLOCK_R", "BLOCK_F", "num_warps"), (i.F, *tiles["GeGLU backward"])))
    y, z, mean, rstd = layernorm_bf16(i)
    y8, y8_t = quantize(y, E4M3, s.y, tiles["cast the gradient from LayerNorm"])
    wg8, wg8_t = quantize(i.wg, E4M3, s.wg, tiles["cast the gradient from LayerNorm"])
    wd8, wd8_t = quantize(i.wd, E4M3, s.wd, tiles["cast the gradient from LayerNorm"])
    gu = product(y8, wg8, s.y, s.wg, i.dtype)
    h8, h8_t = geglu.geglu_fp8(gu, i.seed2, DROPOUT, s.h, geglu_tile)
    d = product(h8, wd8, s.h, s.wd, i.dtype)
    del y, y8, h8, wg8, wd8  # not saved for backward
    dz = next_layernorm_backward(i)
    dz8, dz8_t = quantize(dz, E5M2, s.dz, tiles["cast the gradient from LayerNorm"])
    dwd = product(dz8_t, h8_t, s.dz, s.h, i.dtype, fast_backward)
    dh = product(dz8, wd8_t, s.dz, s.wd, i.dtype, fast_backward)
    del dz8, dz8_t, h8_t
    dgu8, dgu8_t = geglu.geglu_backward_fp8(dh, gu, i.seed2, DROPOUT, s.dgu, backward_tile)
    del gu, dh
    dy = product(dgu8, wg8_t, s.dgu, s.wg, i.dtype, fast_backward)
    dwg = product(dgu8_t, y8_t, s.dgu, s.y, i.dtype, fast_backward)
    dresidual, dx, dparams = layernorm_backward(i, dy, dz, z, mean, rstd)
    return d, dx, dresidual, dwg, dwd, dparams


def quantize(x, dtype, of_x, tile):
    return fp8.quantize(x, dtype, of_x, dict(zip(("C", "BLOCK_R", "BLOCK_C", "num_warps"), (x.shape[1], *tile))))


# ---------------------------------------------------------------------------------------------------------------------
# What is measured: groups of entries that take turns


@dataclass
class Entry:
    run: object  # () -> tensors
    bytes: int = 0  # that must be read or written
    flops: int = 0
    is_fp8: bool = False
    twin: str = ""  # the bf16 entry whose results these are, for checks
    scale: object = None  # of what a writer returns, (straight, transposed)
    tile: tuple = ()


def name_of(tile):
    return "x".join(map(str, tile[:2])) + f" {tile[2]} warps"


def groups_for(i, s):
    """{group: {name: Entry}}; tensors between the parts come from one pass of the bf16 path."""
    T, C, F = i.tokens, i.C, i.F
    y, h, gu, z, mean, rstd, dh, dz, dgu = forward_and_backward(i, everything=True)
    wg, wd = i.wg.to(i.dtype), i.wd.to(i.dtype)
    dqkv = dgu[:, : 3 * C].contiguous()
    groups = {"LayerNorm forward": {"bf16": Entry(lambda: layernorm_bf16(i), 8 * T * C)}}
    groups["LayerNorm backward"] = {
        "next, without dropout": Entry(lambda: next_layernorm_backward(i), 8 * T * C),
        "with dropout": Entry(lambda: layernorm_backward(i, dz, i.dnext2, z, mean, rstd), 10 * T * C),
    }
    for title, x, dtype, of_x in (
        ("cast LayerNorm's output", y, E4M3, s.y),
        ("cast the gradient from LayerNorm", dz, E5M2, s.dz),
        ("cast Wqkv's gradient", dqkv, E5M2, s.dgu),
        ("cast gate+up's weight", i.wg, E4M3, s.wg),
    ):
        groups[title] = {"copy": Entry(lambda x=x: x.clone(), 2 * x.numel() * x.element_size())}
        for tile in QUANTIZE_TILES:
            run, size = partial(quantize, x, dtype, of_x, tile), x.numel() * (x.element_size() + 2)
            groups[title][name_of(tile)] = Entry(run, size, 0, True, "copy", of_x.scale, tile)

    groups["GeGLU forward"] = {"bf16": Entry(lambda: geglu.geglu_op(gu, i.seed2, DROPOUT), 6 * T * F)}
    groups["GeGLU backward"] = {"bf16": Entry(lambda: geglu.geglu_backward_op(dh, gu, i.seed2, DROPOUT), 10 * T * F)}
    for tile in GEGLU_TILES:
        cfg = dict(zip(("F_", "BLOCK_R", "BLOCK_F", "num_warps"), (F, *tile)))
        run = partial(geglu.geglu_fp8, gu, i.seed2, DROPOUT, s.h, cfg)
        groups["GeGLU forward"][f"FP8 {name_of(tile)}"] = Entry(run, 6 * T * F, 0, True, "bf16", s.h.scale, tile)
        run = partial(geglu.geglu_backward_fp8, dh, gu, i.seed2, DROPOUT, s.dgu, cfg)
        groups["GeGLU backward"][f"FP8 {name_of(tile)}"] = Entry(run, 10 * T * F, 0, True, "bf16", s.dgu.scale, tile)

    # Products: both operands, (m, k) and (n, k), and what they stand for.
    q = partial(quantize, tile=QUANTIZE_TILES[0])
    (y8, y8_t), (h8, h8_t) = q(y, E4M3, s.y), q(h, E4M3, s.h)
    (dz8, dz8_t), (dgu8, dgu8_t), (dqkv8, dqkv8_t) = q(dz, E5M2, s.dz), q(dgu, E5M2, s.dgu), q(dqkv, E5M2, s.dgu)
    (wg8, wg8_t), (wd8, wd8_t) = q(i.wg, E4M3, s.wg), q(i.wd, E4M3, s.wd)
    wqkv, wqkv8, wqkv8_t = wg[: 3 * C], wg8[: 3 * C], wg8_t[:, : 3 * C].contiguous()
    for title, m, n, k, bf16, operands in (
        ("gate+up", T, 2 * F, C, lambda: y @ wg.t(), (y8, wg8, s.y, s.wg)),
        ("gate+up dx", T, C, 2 * F, lambda: dgu @ wg, (dgu8, wg8_t, s.dgu, s.wg)),
        ("gate+up dw", 2 * F, C, T, lambda: dgu.t() @ y, (dgu8_t, y8_t, s.dgu, s.y)),
        ("down", T, C, F, lambda: h @ wd.t(), (h8, wd8, s.h, s.wd)),
        ("down dx", T, F, C, lambda: dz @ wd, (dz8, wd8_t, s.dz, s.wd)),
        ("down dw", C, F, T, lambda: dz.t() @ h, (dz8_t, h8_t, s.dz, s.h)),
        ("Wqkv", T, 3 * C, C, lambda: y @ wqkv.t(), (y8, wqkv8, s.y, s.wg)),
        ("Wqkv dx", T, C, 3 * C, lambda: dqkv @ wqkv, (dqkv8, wqkv8_t, s.dgu, s.wg)),
        ("Wqkv dw", 3 * C, C, T, lambda: dqkv.t() @ y, (dqkv8_t, y8_t, s.dgu, s.y)),
    ):
        flops = 2 * m * n * k
        groups[f"product {title}"] = {
            "bf16": Entry(bf16, 0, flops),
            "FP8 fast": Entry(partial(product, *operands, i.dtype), 0, flops, True, "bf16"),
            "FP8 slow": Entry(partial(product, *operands, i.dtype, False), 0, flops, True, "bf16"),
        }
    groups["once per step"] = {
        "bf16 cast of both weights": Entry(lambda: (i.wg.to(i.dtype), i.wd.to(i.dtype)), 18 * F * C),
        "scales of 12 layers": Entry(lambda: s.of_12_layers.update(lambda amax: amax)),
    }
    return groups


def paths_for(i, s, tiles):
    return {
        "bf16": lambda: forward_and_backward(i),
        "FP8": lambda: forward_and_backward_fp8(i, s, tiles, True),
        "FP8, slow accumulation in backward": lambda: forward_and_backward_fp8(i, s, tiles, False),
    }


TILED = {"GeGLU forward": GEGLU_TILES, "GeGLU backward": GEGLU_TILES, "cast the gradient from LayerNorm": QUANTIZE_TILES}


def default_tiles():
    return {group: tiles[0] for group, tiles in TILED.items()}


def models_for(cfg, tokens, device, names=("layer", "model")):
    """{"layer, bf16": a forward and backward pass, ...}: of one layer and of the whole model, by the code that trains."""
    runs = {}
    for name in names:
        for dtype in ("bf16", "FP8"):
            torch.manual_seed(0)
            size = ModelConfig(
                hidden_size=cfg.hidden,
                intermediate_size=cfg.width,
                num_heads=cfg.hidden // 64,
                num_layers=1 if name == "layer" else LAYERS,
            )
            with torch.device(device):
                model = MaskedLM(size, VOCAB_SIZE)
                if dtype == "FP8":
                    model.bert.use_fp8()
            inputs = model_inputs(tokens, device) if name == "model" else layer_inputs(tokens, cfg.hidden, device)
            runs[f"{name}, {dtype}"] = partial(run_model if name == "model" else run_layer, model, *inputs)
    return runs


def make_batch(tokens, device):
    """Sequences of 128 random tokens, 30 % of which are masked."""
    ids = torch.randint(5, VOCAB_SIZE, (tokens,), device=device)
    starts = torch.arange(0, tokens + 1, min(128, tokens), dtype=torch.int32, device=device)
    masked = torch.randperm(tokens, device=device)[: int(0.3 * tokens) // 256 * 256].sort().values
    return Batch(ids, starts, min(128, tokens), windows=None, masked_positions=masked, labels=ids[masked])


def model_inputs(tokens, device):
    return (make_batch(tokens, device),)


def layer_inputs(tokens, C, device):
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # the interpreter multiplies bf16 wrongly
    x, dy = (torch.randn(tokens, C, device=device, dtype=dtype) for _ in range(2))
    return make_batch(tokens, device), x.requires_grad_(), 1e-4 * dy


def run_model(model, batch):
    """The gradients of all parameters."""
    with torch.autocast(batch.input_ids.device.type, torch.bfloat16):
        loss = model(batch) / len(batch.labels)
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    if model.bert.fp8:
        model.bert.fp8.update(lambda amax: amax)
    return gradients


def run_layer(model, batch, x, dy):
    """The first layer's output, and the gradients of its input and parameters."""
    encoder = model.bert
    layer, scaled = encoder.encoder.layer[0], encoder.fp8.of_layer(0) if encoder.fp8 else None
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
        y, residual = layer(x, x, batch, encoder.slopes, None, scaled)
    gradients = torch.autograd.grad((y, residual), [x, *layer.parameters()], (dy, dy))
    if encoder.fp8:
        encoder.fp8.update(lambda amax: amax)
    return y.detach(), *gradients


# ---------------------------------------------------------------------------------------------------------------------
# Checks


def relative_error(x, reference):
    """Frobenius norm of the difference, relative to the reference's."""
    x, reference = x.float(), reference.float()
    return ((x - reference).norm() / reference.norm()).item()


def check_writer(entry, expected):
    """What is wrong with an FP8 writer's result, or "". expected: the bf16 twin's.

    The error is at most half a step of the format: 2^-4 or 2^-3 relative, and for numbers below the smallest normal one
    half of the smallest step; and bf16's own 2^-8, of the twin.
    """
    straight, transposed = entry.run()
    if not torch.equal(straight.t().contiguous().view(torch.uint8), transposed.view(torch.uint8)):
        wrong = (straight.t().contiguous().view(torch.uint8) != transposed.view(torch.uint8)).float().mean()
        return f"{wrong:.2%} of the transposed copy's bytes differ from the straight one's"
    relative, smallest = (2**-4, 2**-9) if straight.dtype == E4M3 else (2**-3, 2**-16)
    error = (straight.float() / entry.scale - expected.float()).abs()
    allowed = expected.float().abs() * (relative + 2**-7) + smallest / 2 / entry.scale
    share = 0.0 if straight.is_cuda else 0.1  # Triton's interpreter loses carries when it rounds to FP8
    if not (error > allowed).float().mean() <= share:
        return f"{(error > allowed).float().mean():.2%} of the elements beyond the format's rounding error"
    return ""


def check_all(cfg, device, tokens, say, working):
    """Check every entry at a small size; remove those that fail from `working`: {group: set of names}."""
    i = make_inputs(tokens, cfg.hidden, cfg.width, device, torch.bfloat16)
    s = Scales(i)
    groups = groups_for(i, s)
    problems = {}
    for group, entries in groups.items():
        working[group] = set(entries)
        for name, entry in entries.items():
            try:
                if entry.scale is not None:
                    problem = check_writer(entry, entries[entry.twin].run())
                elif entry.twin:
                    error = relative_error(entry.run(), entries[entry.twin].run())
                    worst = 0.08 if device.type == "cuda" else 0.2
                    problem = "" if error < worst else f"relative error {error:.3f} against bf16"
                else:
                    entry.run()
                    problem = ""
            except Exception as exception:  # a configuration that does not compile is reported, and the rest goes on
                problem = f"{type(exception).__name__}: {str(exception).strip()[:300]}"
            if problem:
                problems[f"{group} / {name}"] = problem
                working[group].discard(name)
    for name, problem in problems.items():
        say(f"WRONG {name}: {problem}")

    # The whole path against fp32: the same kernels in fp32 draw the same dropout masks.
    exact = make_inputs(tokens, cfg.hidden, cfg.width, device, torch.float32)
    for name in ("x", "residual", "z2", "dy2", "dnext2", "mean2", "rstd2"):
        setattr(exact, name, getattr(i, name).float())
    names = "d", "dx", "dresidual", "dwg", "dwd", "dweight and dbias"
    errors = {}
    try:
        reference = forward_and_backward(exact)
        for path, run in paths_for(i, s, default_tiles()).items():
            errors[path] = {name: relative_error(*pair) for name, *pair in zip(names, run(), reference)}
            say(f"error against fp32, {path}: " + ", ".join(f"{name} {error:.2%}" for name, error in errors[path].items()))
    except Exception as exception:
        say(f"NOT CHECKED against fp32: {type(exception).__name__}: {str(exception)[:300]}")
    return {"problems": problems, "errors_against_fp32": errors, "layer": check_layer(cfg, tokens, device, say)}


def check_layer(cfg, tokens, device, say):
    """A layer's relative errors against bf16, with the same dropout; and whether FP8 repeats its own bits."""
    runs = models_for(cfg, tokens, device, ("layer",))

    def results(name):
        torch.manual_seed(1)
        return runs[name]()

    try:
        for _ in range(3):
            results("layer, FP8")  # finds the scales
        expected, got, again = results("layer, bf16"), results("layer, FP8"), results("layer, FP8")
        errors = [relative_error(*pair) for pair in zip(got, expected)]
        repeats = all(torch.equal(*pair) for pair in zip(got, again))
        say(f"layer in FP8 against bf16: {', '.join(f'{error:.2%}' for error in errors)}; repeats its bits: {repeats}")
        return {"errors": errors, "repeats": repeats}
    except Exception as exception:
        say(f"NOT CHECKED layer: {type(exception).__name__}: {str(exception)[:300]}")


# ---------------------------------------------------------------------------------------------------------------------
# Timing


def time_interleaved(functions, rounds, device):
    """{name: median milliseconds per call}, the functions taking turns."""
    cuda = device.type == "cuda"
    calls, times = {}, {name: [] for name in functions}
    for round_ in range(-1, rounds):  # the first one also finds out how long each takes
        marks = {}
        for name, function in functions.items():
            if not cuda:
                start = time.perf_counter()
                function()
                times[name].append(1e3 * (time.perf_counter() - start))
                continue
            repeats = calls.get(name, 1)
            if round_ < 0:
                function()
            else:
                torch.cuda._sleep(2_000_000)  # about 1 ms, in which the CPU can launch ahead
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(repeats):
                function()
            end.record()
            marks[name] = start, end, repeats
        if not cuda:
            continue
        torch.cuda.synchronize()
        for name, (start, end, repeats) in marks.items():
            ms = start.elapsed_time(end) / repeats
            if round_ < 0:
                calls[name] = max(1, min(20, math.ceil(MEASURED_MS / max(ms, 1e-3))))
            else:
                times[name].append(ms)
    return {name: statistics.median(values) for name, values in times.items()}


def measure_ceilings(device, rounds, toy):
    """(bytes per second of a copy, {is_fp8: operations per second})"""
    size, n = (2**16, 256) if toy else (2**30, 8192)
    source = torch.randn(size // 2, device=device, dtype=torch.bfloat16)
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    a8, b8 = a.to(E4M3), b.to(E4M3)
    one = fp8.Scaled(*(torch.ones((), device=device) for _ in range(3)))
    out = torch.empty_like(source)
    functions = {"copy": lambda: out.copy_(source), False: lambda: a @ b.t(), True: lambda: product(a8, b8, one, one, a.dtype)}
    times = time_interleaved(functions, rounds, device)
    return 2 * source.numel() * 2 / times["copy"] * 1e3, {key: 2 * n**3 / times[key] * 1e3 for key in (False, True)}


def measure(cfg, tokens, device, working, ceilings, started, say):
    """All groups and the path at one micro-batch."""
    i = make_inputs(tokens, cfg.hidden, cfg.width, device, torch.bfloat16)
    s = Scales(i)
    copy_rate, flop_rate = ceilings
    rows, best = {}, {}
    say(f"\n{tokens:,} tokens{'':40}ms   ns/token   of floor")
    groups = groups_for(i, s)
    for group, entries in groups.items():
        entries = {name: entry for name, entry in entries.items() if name in working[group]}
        if time.perf_counter() - started > cfg.seconds and not cfg.toy:
            say(f"{group}: not measured, out of time")
            continue
        times = time_interleaved({name: entry.run for name, entry in entries.items()}, cfg.rounds, device)
        for name, ms in times.items():
            floor = 1e3 * max(entries[name].bytes / copy_rate, entries[name].flops / flop_rate[entries[name].is_fp8])
            row = {"ms": ms, "ns_per_token": 1e6 * ms / tokens, "share_of_floor": floor / ms}
            if entries[name].flops:
                row["tflops"] = entries[name].flops / ms / 1e9
            rows[f"{group} / {name}"] = row
            rate = f"   {row['tflops']:6.0f} TFLOP/s" if "tflops" in row else ""
            say(f"{group + ' / ' + name:52}{ms:8.4f}{row['ns_per_token']:10.3f}{row['share_of_floor']:10.1%}{rate}")
        tiled = {name: ms for name, ms in times.items() if entries[name].tile}
        if tiled:
            best[group] = min(tiled, key=tiled.get)

    tiles = default_tiles()
    for group in tiles.keys() & best.keys():
        tiles[group] = groups[group][best[group]].tile
    del groups
    memory = {}
    paths = {f"path, {name}": run for name, run in paths_for(i, s, tiles).items()} | models_for(
        *(cfg, tokens, device, ("layer",) if cfg.toy else ("layer", "model"))
    )
    for name, run in list(paths.items()):
        try:
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                run()
                memory[name] = (torch.cuda.max_memory_allocated() - before) / 2**30
            else:
                memory[name] = 0.0
        except Exception as exception:
            say(f"NOT MEASURED {name}: {type(exception).__name__}: {str(exception)[:300]}")
            del paths[name]
    times = time_interleaved(paths, cfg.rounds, device)
    summary = {"tiles": tiles, "best": best, "memory_gib": memory, "speedup": {}}
    for name, ms in times.items():
        twin = times.get(name.partition(",")[0] + ", bf16", math.nan)
        summary["speedup"][name] = twin / ms
        rows[name] = {"ms": ms, "ns_per_token": 1e6 * ms / tokens, "faster": twin / ms, "gib": memory[name]}
        say(f"{name:52}{ms:8.4f}{1e6 * ms / tokens:10.3f}{twin / ms:9.3f}x{memory[name]:8.2f} GiB")
    return {"rows": rows, "summary": summary}


def warm(cfg, device):
    """Compile every n-th entry, for the cache on disk."""
    k, n = map(int, cfg.warm.split("/"))
    i = make_inputs(256, cfg.hidden, cfg.width, device, torch.bfloat16)
    s = Scales(i)
    exact = make_inputs(256, cfg.hidden, cfg.width, device, torch.float32)
    runs = [entry.run for entries in groups_for(i, s).values() for entry in entries.values() if entry.tile]
    runs += [partial(forward_and_backward, exact)]
    runs += [lambda name=name: [run() for run in models_for(cfg, 256, device, (name,)).values()] for name in ("layer", "model")]
    for run in runs[k::n]:
        try:
            run()
        except Exception:
            pass  # the main process will say so


@command
def main(argv):
    started = time.perf_counter()
    cfg = load_config(Fp8BenchConfig, argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        kernels.set_backend("triton")
    if cfg.toy:
        for tiles in (GEGLU_TILES, QUANTIZE_TILES):
            del tiles[2:]
    torch.backends.cuda.matmul.allow_tf32 = False
    if cfg.warm:
        return warm(cfg, device)

    def say(text):
        print(text, flush=True)

    say(f"{device_name(device)}, torch {torch.__version__}, triton {triton.__version__}")
    if device.type == "cuda":
        command_line = [sys.executable, "-m", "studies.bench_fp8", f"--hidden={cfg.hidden}", f"--width={cfg.width}"]
        workers = [
            subprocess.Popen([*command_line, f"--warm={k}/{WARM_PROCESSES}"], stderr=subprocess.DEVNULL)
            for k in range(WARM_PROCESSES)
        ]
        for worker in workers:
            worker.wait()
        say(f"compiled after {time.perf_counter() - started:.0f} s")
    working = {}
    checks = check_all(cfg, device, 128 if cfg.toy else 4096, say, working)
    say(f"checked after {time.perf_counter() - started:.0f} s")
    ceilings = measure_ceilings(device, cfg.rounds, cfg.toy)
    rates = f"8192^3 in bf16 {ceilings[1][False] / 1e12:.0f}, FP8 {ceilings[1][True] / 1e12:.0f} TFLOP/s"
    say(f"copy {ceilings[0] / 1e12:.2f} TB/s; {rates}")
    result = {"device": device_name(device), "versions": versions(), "checks": checks, "sizes": {}}
    result["ceilings"] = {"copy_bytes_per_s": ceilings[0], "bf16_flops": ceilings[1][False], "fp8_flops": ceilings[1][True]}
    for tokens in map(int, cfg.tokens.split(",")):
        try:
            result["sizes"][tokens] = measure(cfg, tokens, device, working, ceilings, started, say)
        except Exception as exception:
            say(f"{tokens:,} tokens not measured: {type(exception).__name__}: {str(exception)[:500]}")
        Path(cfg.json).parent.mkdir(parents=True, exist_ok=True)
        Path(cfg.json).write_text(json.dumps(result, indent=1))
    say(f"done after {time.perf_counter() - started:.0f} s; written to {cfg.json}")


if __name__ == "__main__":
    main()
