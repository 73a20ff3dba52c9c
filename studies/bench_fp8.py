"""Whether FP8 pays: one layer's feed-forward path in bf16 and in FP8, part by part and as a whole.

    python -m studies.bench_fp8 --json=out/fp8.json        # under 100 seconds on one GPU, Triton's compilations included

The path: LayerNorm (bias, dropout, residual), gate+up product, GeGLU (dropout), down product; and backward, from the
gradients that the next LayerNorm gets. In FP8 the three products of each matrix read e4m3 activations and weights and
e5m2 gradients, which LayerNorm, GeGLU and `quantize` write straight and transposed (kernels/fp8.py). Weights are
converted once per step, which has its own rows.

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
from common.options import command, load_config
from common.processes import device_name
from common.versions import versions
from kernels import fp8
from kernels.backend import triton
from kernels.fp8 import AMAX_SLOTS, E4M3, E5M2, amax_of, empty_fp8, product, quantize_grid, scale_for

geglu = importlib.import_module("kernels.geglu")  # the file; kernels.geglu is the function
layernorm = importlib.import_module("kernels.layernorm")

DROPOUT, EPS = 0.1, 1e-12
LAYERNORM_SCALE = 8.0  # a power of two: |LayerNorm's output| is at most sqrt(768) = 28 times its weight, e4m3's largest 448
STEP_TOKENS = 524288  # 4,096 samples of 128 tokens: how often weights are converted
WARM_PROCESSES = 10  # compile Triton's kernels side by side
MEASURED_MS = 1.5  # a measurement repeats its call for about this long

# Launch configurations to be timed: rows, columns, warps.
GEGLU_TILES = [(64, 64, 4), (128, 64, 8), (64, 128, 8), (128, 32, 4), (32, 128, 4), (128, 64, 4)]
LAYERNORM_TILES = [(4, 256, 4), (8, 256, 8), (16, 256, 8), (32, 256, 16)]
QUANTIZE_TILES = [(64, 64, 4), (128, 64, 8), (64, 128, 8), (128, 128, 8)]


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


def slots(device):
    return torch.zeros(AMAX_SLOTS.value, dtype=torch.int32, device=device)


class Scales:
    """Scales of a step, and their reciprocals: those that delayed scaling would find, from one pass in the other dtype."""

    def __init__(self, i):
        y, h, gu, *_, dz2, dgu = forward_and_backward(i, everything=True)
        largest = {"wg": i.wg, "wd": i.wd, "h": h, "dz": dz2, "dgu": dgu}
        formats = {"wg": E4M3, "wd": E4M3, "h": E4M3, "dz": E5M2, "dgu": E5M2}
        self.y = torch.tensor(LAYERNORM_SCALE, device=i.device)
        for name, tensor in largest.items():
            setattr(self, name, scale_for(tensor.abs().amax().float(), formats[name]))
        for name in ("y", *largest):
            setattr(self, f"inverse_{name}", getattr(self, name).reciprocal())
        self.one = torch.ones((), device=i.device)
        self.slots = {name: slots(i.device) for name in largest}
        self.all_slots = torch.zeros(72, AMAX_SLOTS.value, dtype=torch.int32, device=i.device)


def layernorm_fp8(i, s, tile, transposed=True):
    """y, z, mean, rstd as layernorm_op's, and y in FP8, transposed too if asked for."""
    y, z, mean, rstd = layernorm.empty_outputs(i.x, i.x_bias, i.residual, i.seed)
    y8, y8_t = empty_fp8(i.x, i.tokens, i.C, E4M3)
    cfg = {"C": i.C, **dict(zip(("BLOCK_R", "BLOCK_C", "num_warps"), tile))}
    layernorm.forward_kernel[(triton.cdiv(i.tokens, tile[0]),)](
        *(i.x, i.x_bias, i.residual, i.weight, i.bias, i.seed, y, z, mean, rstd, y8, y8_t if transposed else None, s.y),
        *(i.tokens, *layernorm.dropout_args(DROPOUT), EPS),
        **cfg,
    )
    return y, z, mean, rstd, y8, y8_t


def quantize(x, scale, dtype, amax, tile, straight=True):
    """As kernels.fp8.quantize, with a launch configuration."""
    q, q_t = empty_fp8(x, *x.shape, dtype)
    cfg = {"C": x.shape[1], **dict(zip(("BLOCK_R", "BLOCK_C", "num_warps"), tile))}
    fp8.quantize_kernel[quantize_grid(len(x), cfg)](x, scale, q if straight else None, q_t, amax, len(x), **cfg)
    return q, q_t


def geglu_fp8(i, s, gu, tile):
    h8, h8_t = empty_fp8(gu, i.tokens, i.F, E4M3)
    cfg = dict(zip(("F_", "BLOCK_R", "BLOCK_F", "num_warps"), (i.F, *tile)))
    geglu.forward_kernel[geglu.grid(i.tokens, cfg)](
        gu, h8, i.seed2, h8_t, s.h, s.slots["h"], i.tokens, *layernorm.dropout_args(DROPOUT), **cfg
    )
    return h8, h8_t


def geglu_backward_fp8(i, s, dh, gu, tile):
    dgu8, dgu8_t = empty_fp8(gu, i.tokens, 2 * i.F, E5M2)
    cfg = dict(zip(("F_", "BLOCK_R", "BLOCK_F", "num_warps"), (i.F, *tile)))
    geglu.backward_kernel[geglu.grid(i.tokens, cfg)](
        dh, gu, dgu8, i.seed2, dgu8_t, s.dgu, s.slots["dgu"], i.tokens, *layernorm.dropout_args(DROPOUT), **cfg
    )
    return dgu8, dgu8_t


def layernorm_bf16(i):
    return layernorm.layernorm_op(i.x, i.x_bias, i.residual, i.weight, i.bias, i.seed, DROPOUT, EPS)


def next_layernorm_backward(i):
    """dz2, the gradient of the down product's result."""
    args = i.dy2, i.dnext2, i.z2, i.weight, None, i.mean2, i.rstd2
    return layernorm.layernorm_backward_op(*args, 0.0, True, True)[0]


def layernorm_backward(i, dy, dnext, z, mean, rstd):
    """(dresidual, dx, gradients of the parameters)"""
    return layernorm.layernorm_backward_op(dy, dnext, z, i.weight, i.seed, mean, rstd, DROPOUT, True, True)


@torch.no_grad()
def forward_and_backward(i, wg=None, wd=None, everything=False):
    """The path as it is today, in i.dtype. Returns d, dx, dresidual, dwg, dwd and the gradients of LayerNorm's parameters."""
    wg, wd = i.wg.to(i.dtype) if wg is None else wg, i.wd.to(i.dtype) if wd is None else wd
    y, z, mean, rstd = layernorm_bf16(i)
    gu = y @ wg.t()
    h = geglu.geglu_op(gu, i.seed2, DROPOUT)
    d = h @ wd.t()
    dz2 = next_layernorm_backward(i)
    dwd = dz2.t() @ h
    dgu = geglu.geglu_backward_op(dz2 @ wd, gu, i.seed2, DROPOUT)
    if everything:
        return y, h, gu, z, mean, rstd, dz2 @ wd, dz2, dgu
    del h, gu
    dy = dgu @ wg
    dwg = dgu.t() @ y
    dresidual, dx, dparams = layernorm_backward(i, dy, dz2, z, mean, rstd)
    return d, dx, dresidual, dwg, dwd, dparams


@torch.no_grad()
def forward_and_backward_fp8(i, s, w, tiles, fast_backward):
    """The same in FP8. w: weights in FP8, straight and transposed. tiles: the launch configurations in use."""
    if tiles["layernorm"]:
        y, z, mean, rstd, y8, y8_t = layernorm_fp8(i, s, tiles["layernorm"])
    else:
        y, z, mean, rstd = layernorm_bf16(i)
        y8, y8_t = quantize(y, s.y, E4M3, None, tiles["quantize"])
    gu = product(y8, w.wg8, s.inverse_y, s.inverse_wg)
    h8, h8_t = geglu_fp8(i, s, gu, tiles["geglu"])
    d = product(h8, w.wd8, s.inverse_h, s.inverse_wd)
    del y, y8, h8  # neither is saved for backward
    dz2 = next_layernorm_backward(i)
    dz8, dz8_t = quantize(dz2, s.dz, E5M2, s.slots["dz"], tiles["quantize"])
    dwd = product(dz8_t, h8_t, s.inverse_dz, s.inverse_h, fast_backward)
    dh = product(dz8, w.wd8_t, s.inverse_dz, s.inverse_wd, fast_backward)
    del dz8, dz8_t, h8_t
    dgu8, dgu8_t = geglu_backward_fp8(i, s, dh, gu, tiles["geglu_backward"])
    del gu, dh
    dy = product(dgu8, w.wg8_t, s.inverse_dgu, s.inverse_wg, fast_backward)
    dwg = product(dgu8_t, y8_t, s.inverse_dgu, s.inverse_y, fast_backward)
    dresidual, dx, dparams = layernorm_backward(i, dy, dz2, z, mean, rstd)
    return d, dx, dresidual, dwg, dwd, dparams


def weights_fp8(i, s, tile=QUANTIZE_TILES[0]):
    w = SimpleNamespace()
    w.wg8, w.wg8_t = quantize(i.wg, s.wg, E4M3, s.slots["wg"], tile)
    w.wd8, w.wd8_t = quantize(i.wd, s.wd, E4M3, s.slots["wd"], tile)
    return w


def update_scales(s):
    """Once per step, for the 6 scaled tensors of each of 12 layers: here without the history, one more maximum."""
    scale = scale_for(amax_of(s.all_slots), E4M3)
    s.all_slots.zero_()
    return scale, scale.reciprocal()


# ---------------------------------------------------------------------------------------------------------------------
# What is measured: groups of entries that take turns


@dataclass
class Entry:
    run: object  # () -> tensors
    bytes: int = 0  # that must be read or written
    flops: int = 0
    is_fp8: bool = False
    twin: str = ""  # the bf16 entry whose results these are, for checks
    result: object = None  # (what run returns) -> (straight, transposed, scale), for checks
    tile: tuple = ()


def name_of(tile):
    return "x".join(map(str, tile[:2])) + f" {tile[2]} warps"


def groups_for(i, s):
    """{group: {name: Entry}}; tensors between the parts come from one pass of the bf16 path."""
    T, C, F = i.tokens, i.C, i.F
    y, h, gu, z, mean, rstd, dh, dz2, dgu = forward_and_backward(i, everything=True)
    wg, wd = i.wg.to(i.dtype), i.wd.to(i.dtype)
    groups = {}

    # Writers
    unfused = {"bf16": Entry(lambda: layernorm_bf16(i), 8 * T * C)}
    fused = unfused | {
        "FP8, straight only": Entry(partial(layernorm_fp8, i, s, LAYERNORM_TILES[0], False), 9 * T * C, is_fp8=True)
    }
    for tile in LAYERNORM_TILES:
        fused[f"FP8 {name_of(tile)}"] = Entry(
            *(partial(layernorm_fp8, i, s, tile), 10 * T * C, 0, True, "bf16", lambda out: (*out[4:], s.y), tile)
        )
    groups["LayerNorm forward"] = fused

    def quantizing(x, scale, dtype, amax, tile):
        size = x.numel() * (x.element_size() + 2)
        run = partial(quantize, x, scale, dtype, amax, tile)
        return Entry(run, size, 0, True, "copy", lambda out: (*out, scale), tile)

    def copying(x):
        return Entry(lambda: x.clone(), 2 * x.numel() * x.element_size())

    y8 = quantize(y, s.y, E4M3, None, QUANTIZE_TILES[0])[0]
    dqkv = dgu[:, : 3 * C].contiguous()
    for title, x, scale, dtype, amax in (
        ("cast LayerNorm's output", y, s.y, E4M3, None),
        ("cast the gradient from LayerNorm", dz2, s.dz, E5M2, s.slots["dz"]),
        ("cast Wqkv's gradient", dqkv, s.dgu, E5M2, s.slots["dgu"]),
    ):
        groups[title] = {"copy": copying(x)}
        for tile in QUANTIZE_TILES:
            groups[title][name_of(tile)] = quantizing(x, scale, dtype, amax, tile)
    groups["transpose LayerNorm's FP8 output"] = {
        name_of(tile): Entry(
            partial(quantize, y8, s.one, E4M3, None, tile, False), 2 * T * C, 0, True, "",
            lambda out: (y8, out[1], None), tile,
        )
        for tile in QUANTIZE_TILES
    }  # fmt: skip

    groups["GeGLU forward"] = {"bf16": Entry(lambda: geglu.geglu_op(gu, i.seed2, DROPOUT), 6 * T * F)}
    groups["GeGLU backward"] = {"bf16": Entry(lambda: geglu.geglu_backward_op(dh, gu, i.seed2, DROPOUT), 10 * T * F)}
    for tile in GEGLU_TILES:
        groups["GeGLU forward"][f"FP8 {name_of(tile)}"] = Entry(
            *(partial(geglu_fp8, i, s, gu, tile), 6 * T * F, 0, True, "bf16", lambda out: (*out, s.h), tile)
        )
        groups["GeGLU backward"][f"FP8 {name_of(tile)}"] = Entry(
            *(partial(geglu_backward_fp8, i, s, dh, gu, tile), 10 * T * F, 0, True, "bf16", lambda out: (*out, s.dgu), tile)
        )

    groups["LayerNorm backward"] = {
        "next, without dropout": Entry(lambda: next_layernorm_backward(i), 8 * T * C),
        "with dropout": Entry(lambda: layernorm_backward(i, dz2, i.dnext2, z, mean, rstd), 10 * T * C),
    }

    # Products. Both operands (m, k) and (n, k), and what is read transposed for dw.
    q = partial(quantize, tile=QUANTIZE_TILES[0])
    y8, y8_t = q(y, s.y, E4M3, None)
    h8, h8_t = q(h, s.h, E4M3, None)
    dz8, dz8_t = q(dz2, s.dz, E5M2, None)
    dgu8, dgu8_t = q(dgu, s.dgu, E5M2, None)
    dqkv8, dqkv8_t = q(dqkv, s.dgu, E5M2, None)
    w = weights_fp8(i, s)
    wqkv, wqkv8, wqkv8_t = wg[: 3 * C], w.wg8[: 3 * C], w.wg8_t[:, : 3 * C].contiguous()
    for title, m, n, k, bf16, operands in (
        ("gate+up", T, 2 * F, C, lambda: y @ wg.t(), (y8, w.wg8, s.inverse_y, s.inverse_wg)),
        ("gate+up dx", T, C, 2 * F, lambda: dgu @ wg, (dgu8, w.wg8_t, s.inverse_dgu, s.inverse_wg)),
        ("gate+up dw", 2 * F, C, T, lambda: dgu.t() @ y, (dgu8_t, y8_t, s.inverse_dgu, s.inverse_y)),
        ("down", T, C, F, lambda: h @ wd.t(), (h8, w.wd8, s.inverse_h, s.inverse_wd)),
        ("down dx", T, F, C, lambda: dz2 @ wd, (dz8, w.wd8_t, s.inverse_dz, s.inverse_wd)),
        ("down dw", C, F, T, lambda: dz2.t() @ h, (dz8_t, h8_t, s.inverse_dz, s.inverse_h)),
        ("Wqkv", T, 3 * C, C, lambda: y @ wqkv.t(), (y8, wqkv8, s.inverse_y, s.inverse_wg)),
        ("Wqkv dx", T, C, 3 * C, lambda: dqkv @ wqkv, (dqkv8, wqkv8_t, s.inverse_dgu, s.inverse_wg)),
        ("Wqkv dw", 3 * C, C, T, lambda: dqkv.t() @ y, (dqkv8_t, y8_t, s.inverse_dgu, s.inverse_y)),
    ):
        flops = 2 * m * n * k
        groups[f"product {title}"] = {
            "bf16": Entry(bf16, 0, flops),
            "FP8 fast": Entry(partial(product, *operands, True), 0, flops, True, "bf16"),
            "FP8 slow": Entry(partial(product, *operands, False), 0, flops, True, "bf16"),
        }

    parameters = 3 * F * C
    groups["weights, once per step"] = {
        "bf16 cast": Entry(lambda: (i.wg.to(i.dtype), i.wd.to(i.dtype)), 6 * parameters),
        "FP8, both ways": Entry(lambda: vars(weights_fp8(i, s)), 6 * parameters, is_fp8=True),
        "scales of 12 layers": Entry(lambda: update_scales(s)),
    }
    return groups


def paths_for(i, s, tiles):
    w = weights_fp8(i, s)
    wg, wd = i.wg.to(i.dtype), i.wd.to(i.dtype)
    unfused = tiles | {"layernorm": None}
    return {
        "bf16": lambda: forward_and_backward(i, wg, wd),
        "FP8": lambda: forward_and_backward_fp8(i, s, w, tiles, True),
        "FP8, slow accumulation in backward": lambda: forward_and_backward_fp8(i, s, w, tiles, False),
        "FP8, LayerNorm's output cast by itself": lambda: forward_and_backward_fp8(i, s, w, unfused, True),
    }


DEFAULT_TILES = {
    "layernorm": LAYERNORM_TILES[1],
    "geglu": GEGLU_TILES[0],
    "geglu_backward": GEGLU_TILES[0],
    "quantize": QUANTIZE_TILES[0],
}

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
    straight, transposed, scale = entry.result(entry.run())
    if not torch.equal(straight.t().contiguous().view(torch.uint8), transposed.view(torch.uint8)):
        return "the transposed copy differs from the straight one"
    if scale is None:
        return ""
    relative, smallest = (2**-4, 2**-9) if straight.dtype == E4M3 else (2**-3, 2**-16)
    error = (straight.float() / scale - expected.float()).abs()
    allowed = expected.float().abs() * (relative + 2**-7) + smallest / 2 / scale
    share = 0.0 if straight.is_cuda else 0.1  # Triton's interpreter loses carries when it rounds to FP8
    if not (error > allowed).float().mean() <= share:
        return f"{(error > allowed).float().mean():.2%} of the elements beyond the format's rounding error"
    return ""


def check_amax(s, expected):
    """Delayed scaling's maxima against the bf16 twins'. expected: {name: tensor}."""
    for name, tensor in expected.items():
        got, want = amax_of(s.slots[name]).item(), tensor.abs().amax().item()
        if not math.isclose(got, want, rel_tol=2**-7):
            return f"amax of {name} is {got}, not {want}"
    return ""


def check_saturation(i, s, gu, tile):
    """A scale 2^20 too large gives the largest number, not infinity or NaN."""
    spike = SimpleNamespace(h=s.h * 2**20, slots=s.slots)
    h8, _ = geglu_fp8(i, spike, gu, tile)
    largest = h8.float().abs().amax().item()
    return "" if largest == 448 else f"the largest is {largest}, not 448"


def check_all(device, C, F, tokens, say, working):
    """Check every entry at a small size; remove those that fail from `working`: {group: set of names}."""
    i = make_inputs(tokens, C, F, device, torch.bfloat16)
    s = Scales(i)
    groups = groups_for(i, s)
    problems = {}
    for group, entries in groups.items():
        working[group] = set(entries)
        for name, entry in entries.items():
            try:
                if entry.result:
                    twin = first(entries[entry.twin].run()) if entry.twin else None
                    problem = check_writer(entry, twin)
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
    gu, dgu = groups["product gate+up"]["bf16"].run(), groups["GeGLU backward"]["bf16"].run()
    h = groups["GeGLU forward"]["bf16"].run()
    for tile in GEGLU_TILES:
        name = f"FP8 {name_of(tile)}"
        if name in working["GeGLU forward"] and name in working["GeGLU backward"]:
            for tensor in s.slots.values():
                tensor.zero_()
            groups["GeGLU forward"][name].run(), groups["GeGLU backward"][name].run()
            problem = check_amax(s, {"h": h, "dgu": dgu}) or check_saturation(i, s, gu, tile)
            if problem:
                problems[f"GeGLU / {name}"] = problem
    for name, problem in problems.items():
        say(f"WRONG {name}: {problem}")

    # The whole path against fp32: the same kernels in fp32 draw the same dropout masks.
    exact = make_inputs(tokens, C, F, device, torch.float32)
    for name in ("x", "residual", "z2", "dy2", "dnext2", "mean2", "rstd2"):
        setattr(exact, name, getattr(i, name).float())
    names = "d", "dx", "dresidual", "dwg", "dwd", "dweight and dbias"
    errors = {}
    try:
        reference = forward_and_backward(exact)
        for path, run in paths_for(i, s, DEFAULT_TILES).items():
            errors[path] = {name: relative_error(*pair) for name, *pair in zip(names, run(), reference)}
            say(f"error against fp32, {path}: " + ", ".join(f"{name} {error:.2%}" for name, error in errors[path].items()))
    except Exception as exception:
        say(f"NOT CHECKED against fp32: {type(exception).__name__}: {str(exception)[:300]}")
    return {"problems": problems, "errors_against_fp32": errors}


def first(out):
    return out[0] if isinstance(out, tuple) else out


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
    a8, b8, one = a.to(E4M3), b.to(E4M3), torch.ones((), device=device)
    out = torch.empty_like(source)
    functions = {"copy": lambda: out.copy_(source), False: lambda: a @ b.t(), True: lambda: product(a8, b8, one, one)}
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

    tiles = dict(DEFAULT_TILES)
    for key, group in (
        ("layernorm", "LayerNorm forward"),
        ("geglu", "GeGLU forward"),
        ("geglu_backward", "GeGLU backward"),
        ("quantize", "cast the gradient from LayerNorm"),
    ):
        if group in best:
            tiles[key] = groups[group][best[group]].tile
    del groups
    memory = {}
    paths = paths_for(i, s, tiles)
    for name, run in list(paths.items()):
        try:
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                run()
                memory[name] = (torch.cuda.max_memory_allocated() - before) / 2**30
        except Exception as exception:
            say(f"NOT MEASURED path / {name}: {type(exception).__name__}: {str(exception)[:300]}")
            del paths[name]
    times = time_interleaved(paths, cfg.rounds, device)
    summary = {"tiles": tiles, "best": best, "memory_gib": memory, "speedup": {}}
    for name, ms in times.items():
        rows[f"path / {name}"] = {"ms": ms, "ns_per_token": 1e6 * ms / tokens}
        say(f"{'path / ' + name:52}{ms:8.4f}{1e6 * ms / tokens:10.3f}   {memory.get(name, 0):.2f} GiB")

    def weights(name):
        return rows.get(f"weights, once per step / {name}", {"ms": 0.0})["ms"]

    weights_bf16, weights_fp8_ = weights("bf16 cast"), weights("FP8, both ways") + weights("scales of 12 layers") / 12
    share = tokens / STEP_TOKENS  # of the weights' conversion
    for name, ms in times.items():
        if name != "bf16" and "bf16" in times:
            summary["speedup"][name] = times["bf16"] / ms
            counted = (times["bf16"] + share * weights_bf16) / (ms + share * weights_fp8_)
            summary["speedup"][f"{name}, with the weights' share"] = counted
    for name, ratio in summary["speedup"].items():
        say(f"{name:60}{ratio:6.3f}x bf16")
    return {"rows": rows, "summary": summary}


def warm(cfg, device):
    """Compile every n-th entry, for the cache on disk."""
    k, n = map(int, cfg.warm.split("/"))
    i = make_inputs(256, cfg.hidden, cfg.width, device, torch.bfloat16)
    s = Scales(i)
    exact = make_inputs(256, cfg.hidden, cfg.width, device, torch.float32)
    runs = [entry.run for entries in groups_for(i, s).values() for entry in entries.values() if entry.tile]
    runs += [partial(forward_and_backward, exact)]
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
        for tiles in (GEGLU_TILES, LAYERNORM_TILES, QUANTIZE_TILES):
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
    checks = check_all(device, cfg.hidden, cfg.width, 128 if cfg.toy else 4096, say, working)
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
