"""FP8 matrix products: tensors stored in 8 bits with one scale each, and the kernels and helpers that write them.

    q = saturate(x * scale), rounded to bf16 and then to FP8
    x is about q / scale,   a @ b is about (q_a @ q_b) / (scale_a * scale_b)

Two formats. e4m3, for activations and weights: 3 bits of mantissa, so a relative rounding error of at most 2^-4, normal
from 2^-6 to 448. e5m2, for gradients: 2 bits, at most 2^-3, normal from 2^-14 to 57,344. Values beyond the largest become
the largest, never infinity. Scales are powers of two: multiplying by one rounds nothing, so a scale decides only which
values are too large or too small for the format.

Scales are delayed, since to know this step's largest magnitude (amax) a tensor would have to be read twice. With limit the
largest number that a tensor's amax may become, a fraction of the format's:

    largest = max(amax of this step, 0.9 * largest),   scale = 2^floor(log2(limit / largest)) in the next step

So a tensor may grow by 4 (e4m3) or 64 (e5m2) from one step to the next before its largest elements saturate, and a
spike is soon forgotten. Each program that writes a tensor adds its own amax by an atomic maximum, whose result does not
depend on the order. `Scales` holds the state, on the GPU; nothing waits for it.

The matrix units of Hopper and Ada want both operands with the summed dimension contiguous. In a layer y = x W^T, with W
(out, in), that is x and W as they are for y, dy and W^T for dx, but dy^T and x^T, contiguous, for dW = dy^T x. So
whoever writes x or dy writes it twice, straight and transposed, 2 bytes per element, as many as bf16 takes once.

Limits: GPUs of compute capability 8.9 or higher; numbers of rows divisible by 16.
Tested: tests/test_fp8.py, by Triton's interpreter on a CPU and compiled on a GPU.

Sources: Micikevicius et al. 2022, FP8 Formats for Deep Learning, arXiv 2209.05433; DeepSeek-AI 2024, arXiv 2412.19437,
section 3.3.2, for the matrix units' sums.

Read next: kernels/fp8_layers.py
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from kernels.backend import tl, triton

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
AMAX_SLOTS = tl.constexpr(64)  # per tensor, so that programs seldom wait for each other's atomic operation


@triton.jit
def store_fp8(x, scale_ptr, ptr, t_ptr, offs_r, offs_c, columns, num_rows, C: tl.constexpr):
    """Store a tile x, (BLOCK_R, BLOCK_C) fp32, in FP8: at rows offs_r and columns offs_c of ptr, (num_rows, C), and of its
    transpose t_ptr, (C, num_rows). NaN stays NaN.

    offs_r: (BLOCK_R,) int64, offs_c: (BLOCK_C,), columns: which of them exist. num_rows is a multiple of 16, which the
    compiler must know to store 16 bytes at a time.

    The tile is transposed in bf16, and rounded to FP8 from there. Transposing FP8 itself would move half the bytes, but
    on Hopper GPUs stored wrong bytes: a bug of NVIDIA's assembler in versions 12.8 and 12.9, which Triton 3.6 to 3.8 use
    (triton-lang/triton issue 11111). tests/test_compile_kernels.py checks that no FP8 tile changes its layout.
    """
    LARGEST: tl.constexpr = 448.0 if ptr.dtype.element_ty == tl.float8e4nv else 57344.0
    num_rows = num_rows // 16 * 16
    rows = offs_r < num_rows
    x = tl.clamp(x * tl.load(scale_ptr), -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL).to(tl.bfloat16)
    q = x.to(tl.float32).to(ptr.dtype.element_ty)
    tl.store(ptr + offs_r[:, None] * C + offs_c[None, :], q, mask=rows[:, None] & columns[None, :])
    q_t = tl.trans(x).to(tl.float32).to(t_ptr.dtype.element_ty)
    t_ptrs = t_ptr + offs_c.to(tl.int64)[:, None] * num_rows + offs_r[None, :]
    tl.store(t_ptrs, q_t, mask=columns[:, None] & rows[None, :])


@triton.jit
def add_amax(x, amax_ptr):
    """Raise one of the tensor's AMAX_SLOTS maxima to that of |x|. amax_ptr: int32, since the bits of magnitudes are ordered
    as the magnitudes are."""
    amax = tl.max(tl.max(tl.abs(x), 1), 0)
    tl.atomic_max(amax_ptr + tl.program_id(0) % AMAX_SLOTS, amax.to(tl.int32, bitcast=True), sem="relaxed")


@triton.jit(do_not_specialize=["num_rows"])
def quantize_kernel(
    x_ptr,  # (num_rows, C)
    scale_ptr,  # () fp32
    q_ptr,  # (num_rows, C) FP8: written
    q_t_ptr,  # (C, num_rows) FP8: written
    amax_ptr,  # (AMAX_SLOTS,) int32: raised
    partial_ptr,  # (blocks of rows, C) fp32: written, each block's sums over rows; or None
    num_rows,
    C: tl.constexpr,
    BLOCK_R: tl.constexpr,  # rows of one program
    BLOCK_C: tl.constexpr,  # columns of one program
):
    PARTS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    block = tl.program_id(0) // PARTS
    offs_r = (block * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    offs_c = tl.program_id(0) % PARTS * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (offs_r < num_rows)[:, None] & (offs_c < C)[None, :]
    x = tl.load(x_ptr + offs_r[:, None] * C + offs_c[None, :], mask=mask, other=0.0).to(tl.float32)  # (BLOCK_R, BLOCK_C)
    add_amax(x, amax_ptr)
    if partial_ptr is not None:
        tl.store(partial_ptr + block.to(tl.int64) * C + offs_c, tl.sum(x, 0), mask=offs_c < C)
    store_fp8(x, scale_ptr, q_ptr, q_t_ptr, offs_r, offs_c, offs_c < C, num_rows, C)


class Scaled(NamedTuple):
    """What a tensor in FP8 comes with: its scale, 1 / scale, both () fp32, and its (AMAX_SLOTS,) int32 maxima.

    1 / scale lies at a multiple of 16 bytes: otherwise cuBLAS answers CUBLAS_STATUS_NOT_SUPPORTED.
    """

    scale: Tensor
    inverse: Tensor
    slots: Tensor


class Scales(nn.Module):
    """Delayed scaling of the same tensors in each of num_layers layers. kinds: theirs, keys of FIRST."""

    FIRST = {"activation": 2.0**3, "weight": 2.0**6, "gradient": 2.0**20}  # scales of the first step
    LIMIT = {"activation": 448 / 4, "weight": 448 / 4, "gradient": 57344 / 64}
    DECAY = 0.9

    def __init__(self, num_layers, kinds):
        super().__init__()
        first = torch.tensor([self.FIRST[kind] for kind in kinds]).repeat(num_layers, 1)
        # Not in the state dict, which holds the published weights' names: checkpoint.py saves `largest`.
        self.register_buffer("scale", first, persistent=False)  # (num_layers, len(kinds)), as are these:
        # 4 equal numbers each, 16 bytes
        self.register_buffer("inverse", (1 / first)[..., None].repeat(1, 1, 4), persistent=False)
        self.register_buffer("largest", torch.zeros_like(first), persistent=False)  # 0: not seen yet
        self.register_buffer("limit", torch.tensor([self.LIMIT[kind] for kind in kinds]), persistent=False)
        slots = torch.zeros(*first.shape, AMAX_SLOTS.value, dtype=torch.int32)
        self.register_buffer("slots", slots, persistent=False)

    def of_layer(self, layer):
        """A Scaled for each tensor."""
        return [Scaled(*each) for each in zip(self.scale[layer], self.inverse[layer, :, 0], self.slots[layer])]

    def update(self, reduce):
        """After a step: scales for the next. Returns whether every magnitude was finite, on the device.

        reduce: takes the amaxes, (num_layers, len(kinds)) fp32, to their maxima over all processes.
        """
        amax = reduce(self.slots.amax(-1).view(torch.float32))
        finite = amax.isfinite()
        self.restore(torch.where(finite, torch.maximum(amax, self.DECAY * self.largest), self.largest))
        return finite.all()

    def restore(self, largest):
        """Continue from `largest`, a tensor or what its `tolist` gave: set the scales, and forget what was seen since."""
        self.slots.zero_()
        self.largest.copy_(torch.as_tensor(largest))
        exponent = torch.floor(torch.log2(self.limit / self.largest)).clamp(-100, 100)
        self.scale.copy_(torch.where(self.largest > 0, torch.exp2(exponent), self.scale))
        self.inverse.copy_((1 / self.scale)[..., None])


# The fastest of three tiles on an H200 (results/fp8_h200): 0.80 ns a row of 768 and 2.42 of 2,304, 90 % of a copy's speed.
def launch_config_fp8(C):
    return {"C": C, "BLOCK_R": 64, "BLOCK_C": 128, "num_warps": 8}


def empty_fp8(x, num_rows, C, dtype):
    """Uninitialised (num_rows, C) and (C, num_rows) of dtype, on x's device."""
    return x.new_empty((num_rows, C), dtype=dtype), x.new_empty((C, num_rows), dtype=dtype)


def tiles(num_rows, C, cfg):
    """The grid of a kernel whose programs have one tile each."""
    return (triton.cdiv(num_rows, cfg["BLOCK_R"]) * triton.cdiv(C, cfg["BLOCK_C"]),)


def quantize(x, dtype, scaled):
    """x, (num_rows, C) contiguous, in FP8: itself, and transposed. dtype: E4M3 or E5M2."""
    return quantize_and_sum(x, dtype, scaled, sums=False)[:2]


def quantize_and_sum(x, dtype, scaled, sums=True):
    """quantize(x, dtype, scaled), and x's sum over rows, (C,) fp32, which costs no other pass over x."""
    num_rows, C = x.shape
    q, q_t = empty_fp8(x, num_rows, C, dtype)
    cfg = launch_config_fp8(C)
    partial = x.new_empty((triton.cdiv(num_rows, cfg["BLOCK_R"]), C), dtype=torch.float32) if sums else None
    quantize_kernel[tiles(num_rows, C, cfg)](x, scaled.scale, q, q_t, scaled.slots, partial, num_rows, **cfg)
    return q, q_t, partial.sum(0) if sums else None


def product(a, b, of_a, of_b, dtype, fast=True, bias=None):
    """a @ b.T + bias of the tensors that a (m, k) and b (n, k), both contiguous FP8, stand for. of_a, of_b: Scaled.

    bias: (n,) or None; it and the result are rounded to bf16, whatever dtype is.
    fast: the matrix units add up in their own registers, of about 14 bits of mantissa, instead of fp32's 24. They cut off
    what is below, so a sum of k products is off by some k / 1.3e6 (results/fp8_h200/sums.txt, simulated): 0.5 % for a row
    of 6,144, but 10 % for 131,072 tokens.
    """
    bias = None if bias is None else bias.bfloat16()
    options = {"bias": bias, "out_dtype": torch.bfloat16, "use_fast_accum": fast}
    return torch._scaled_mm(a, b.t(), of_a.inverse, of_b.inverse, **options).to(dtype)
