"""GeGLU with dropout as one operator: a plain PyTorch reference, and Triton kernels.

For each row of 2F elements, gate the first half and value the second, with keep the dropout mask and p the dropout
probability:

    gelu(g)  = g * Phi(g),   Phi(g) = (1 + erf(g / sqrt(2))) / 2       exact, not the tanh approximation
    out      = gelu(gate) * value * keep / (1 - p)

and with dout the incoming gradient:

    dvalue   = dout * keep / (1 - p) * gelu(gate)
    dgate    = dout * keep / (1 - p) * value * (Phi(gate) + gate * phi(gate)),   phi the normal density

Phi is computed from its upper tail, which takes one exponential and a polynomial P of degree 8:

    Phi(-a) = 2^P(a) for a >= 0,   gelu(g) = max(g, 0) - |g| Phi(-|g|)

P, with P(0) = -1, is fitted to log2 Phi(-a) so that the largest error of a Phi(-a) is least, 5e-8: below fp32's own
rounding of Phi near 1. P decreases throughout, so large |g| give exactly 0 and g. CUDA's erf takes about twice the
instructions, and at 3 TB/s of memory traffic there is time for about 57 per element in forward, dropout included.

Only x is saved for backward; the mask is drawn again from its seed, as in layernorm.py. PyTorch's own operators would
save four tensors of this size. Traffic per row: forward reads 2F values and writes F, backward reads 3F and writes 2F.

Limits: no second derivative.
Tested: tests/test_geglu.py, by Triton's interpreter on a CPU and compiled on a GPU.

Source: Shazeer 2020, GLU Variants Improve Transformer, arXiv 2002.05202.

Read next: kernels/cross_entropy.py
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import DTYPES, operator, tl, triton, uses_triton
from kernels.fp8 import E4M3, E5M2, add_amax, empty_fp8, store_fp8
from kernels.layernorm import dropout_args, keep_mask

MINUS_HALF_LOG2E = tl.constexpr(-0.5 * math.log2(math.e))
LOG2_PHI_0 = tl.constexpr(-0.5 * math.log2(2 * math.pi))  # log2 of the normal density at 0


def geglu_reference(x, dropout_prob=0.0):
    """The same function in plain PyTorch, for any device and dtype. It draws another dropout mask, PyTorch's own."""
    gate, value = x.chunk(2, dim=-1)  # each (num_rows, F)
    return F.dropout(F.gelu(gate) * value, dropout_prob)


@triton.jit
def upper_tail(a):
    """Phi(-a) for a >= 0, to 5e-8."""
    p = -2.3349236926151207e-06 * a + 3.373753861524165e-05
    p = p * a - 0.00016129264258779585
    p = p * a - 0.00019170613086316735
    p = p * a + 0.007126868236809969
    p = p * a - 0.05253361538052559
    p = p * a - 0.4591982662677765
    p = p * a - 1.1511059999465942
    return tl.exp2(p * a - 1)


@triton.jit
def tile(num_rows, F_: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr):
    """This program's tile of a (num_rows, F) matrix: (rows, columns, which exist, `first` of keep_mask)."""
    PARTS: tl.constexpr = (F_ + BLOCK_F - 1) // BLOCK_F
    part = tl.program_id(0) % PARTS
    offs_r = (tl.program_id(0) // PARTS * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    offs_f = part * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = (offs_r < num_rows)[:, None] & (offs_f < F_)[None, :]
    return offs_r, offs_f, mask, (offs_r * PARTS + part) * (BLOCK_F // 8)


@triton.jit(do_not_specialize=["num_rows", "threshold"])
def forward_kernel(
    x_ptr,  # (num_rows, 2F)
    out_ptr,  # (num_rows, F): written
    seed_ptr,  # (1,) int64, or None for no dropout
    out_t_ptr,  # (F, num_rows): written where out is FP8, else None
    scale_ptr,  # () fp32, of FP8, or None
    amax_ptr,  # (AMAX_SLOTS,) int32: raised, or None
    num_rows,
    threshold,  # elements whose 16 random bits are below this are dropped
    keep_scale,  # 1 / (1 - p)
    F_: tl.constexpr,
    BLOCK_R: tl.constexpr,  # rows of one program
    BLOCK_F: tl.constexpr,  # columns of one program
):
    offs_r, offs_f, mask, first = tile(num_rows, F_, BLOCK_R, BLOCK_F)
    r, f = offs_r[:, None], offs_f[None, :]
    gate = tl.load(x_ptr + r * (2 * F_) + f, mask=mask, other=0.0).to(tl.float32)  # (BLOCK_R, BLOCK_F)
    value = tl.load(x_ptr + r * (2 * F_) + F_ + f, mask=mask, other=0.0).to(tl.float32)  # (BLOCK_R, BLOCK_F)
    out = (tl.maximum(gate, 0.0) - tl.abs(gate) * upper_tail(tl.abs(gate))) * value
    if seed_ptr is not None:
        out = tl.where(keep_mask(seed_ptr, first, threshold, BLOCK_R, BLOCK_F), out * keep_scale, 0.0)
    if scale_ptr is None:
        tl.store(out_ptr + r * F_ + f, out.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        add_amax(out, amax_ptr)
        store_fp8(out, scale_ptr, out_ptr, out_t_ptr, offs_r, offs_f, offs_f < F_, num_rows, F_)


@triton.jit(do_not_specialize=["num_rows", "threshold"])
def backward_kernel(
    dout_ptr,  # (num_rows, F)
    x_ptr,  # (num_rows, 2F)
    dx_ptr,  # (num_rows, 2F): written
    seed_ptr,  # (1,) int64, or None for no dropout
    dx_t_ptr,  # (2F, num_rows): written where dx is FP8, else None
    scale_ptr,  # () fp32, of FP8, or None
    amax_ptr,  # (AMAX_SLOTS,) int32: raised, or None
    num_rows,
    threshold,
    keep_scale,
    F_: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    offs_r, offs_f, mask, first = tile(num_rows, F_, BLOCK_R, BLOCK_F)
    r, f = offs_r[:, None], offs_f[None, :]
    gate = tl.load(x_ptr + r * (2 * F_) + f, mask=mask, other=0.0).to(tl.float32)  # (BLOCK_R, BLOCK_F)
    value = tl.load(x_ptr + r * (2 * F_) + F_ + f, mask=mask, other=0.0).to(tl.float32)  # (BLOCK_R, BLOCK_F)
    dout = tl.load(dout_ptr + r * F_ + f, mask=mask, other=0.0).to(tl.float32)  # (BLOCK_R, BLOCK_F)
    if seed_ptr is not None:
        dout = tl.where(keep_mask(seed_ptr, first, threshold, BLOCK_R, BLOCK_F), dout * keep_scale, 0.0)
    tail = upper_tail(tl.abs(gate))
    cdf = tl.where(gate < 0, tail, 1 - tail)
    density = tl.exp2(gate * gate * MINUS_HALF_LOG2E + LOG2_PHI_0)
    dgate = dout * value * (cdf + gate * density)
    if scale_ptr is None:
        tl.store(dx_ptr + r * (2 * F_) + f, dgate.to(dx_ptr.dtype.element_ty), mask=mask)
        tl.store(dx_ptr + r * (2 * F_) + F_ + f, (dout * gate * cdf).to(dx_ptr.dtype.element_ty), mask=mask)
    else:
        dvalue = dout * gate * cdf
        add_amax(tl.maximum(tl.abs(dgate), tl.abs(dvalue)), amax_ptr)
        store_fp8(dgate, scale_ptr, dx_ptr, dx_t_ptr, offs_r, offs_f, offs_f < F_, num_rows, 2 * F_)
        store_fp8(dvalue, scale_ptr, dx_ptr, dx_t_ptr, offs_r, F_ + offs_f, offs_f < F_, num_rows, 2 * F_)


# 1,024 columns divide F of both the base and the large model. Measured on an H100 with 131,072 rows of F = 3,072 in bf16,
# with dropout: 6.04 ns per row forward and 10.12 backward, the speed of a copy. Seven other tiles were 0 to 2 % slower.
def launch_config(F_):
    return {"F_": F_, "BLOCK_R": 1, "BLOCK_F": 1024, "num_warps": 4}


def grid(num_rows, cfg):
    return (triton.cdiv(num_rows, cfg["BLOCK_R"]) * triton.cdiv(cfg["F_"], cfg["BLOCK_F"]),)


# With FP8, on an H200 with F = 3,072: 5.03 ns per row forward and 7.90 backward, where bf16 takes 4.28 and 7.08. Of eight
# tiles the best for both; 32 x 128 is 5 % slower forward and 2 % faster backward (results/fp8_h200).
def launch_config_fp8(F_):
    return {"F_": F_, "BLOCK_R": 32, "BLOCK_F": 64, "num_warps": 4}


def geglu_fp8(x, seed, dropout_prob, scaled):
    """out in e4m3, (num_rows, F), and transposed. scaled: its kernels.fp8.Scaled."""
    num_rows, width = x.shape
    out, out_t = empty_fp8(x, num_rows, width // 2, E4M3)
    cfg = launch_config_fp8(width // 2)
    forward_kernel[grid(num_rows, cfg)](
        x, out, seed, out_t, scaled.scale, scaled.slots, num_rows, *dropout_args(dropout_prob), **cfg
    )
    return out, out_t


def geglu_backward_fp8(dout, x, seed, dropout_prob, scaled):
    """dx in e5m2, (num_rows, 2F), and transposed. scaled: its kernels.fp8.Scaled."""
    dx, dx_t = empty_fp8(x, *x.shape, E5M2)
    cfg = launch_config_fp8(x.shape[1] // 2)
    backward_kernel[grid(len(x), cfg)](
        dout, x, dx, seed, dx_t, scaled.scale, scaled.slots, len(x), *dropout_args(dropout_prob), **cfg
    )
    return dx, dx_t


# The kernels as two PyTorch operators. Outputs start uninitialised: the kernels write every element.


@operator("geglu")
def geglu_op(x: Tensor, seed: Tensor | None, dropout_prob: float) -> Tensor:
    num_rows, width = x.shape
    out = torch.empty((num_rows, width // 2), dtype=x.dtype, device=x.device)
    cfg = launch_config(width // 2)
    if num_rows:
        forward_kernel[grid(num_rows, cfg)](x, out, seed, None, None, None, num_rows, *dropout_args(dropout_prob), **cfg)
    return out


@geglu_op.register_fake
def _(x, seed, dropout_prob):
    return x.new_empty(x.shape[0], x.shape[1] // 2)


@operator("geglu_backward")
def geglu_backward_op(dout: Tensor, x: Tensor, seed: Tensor | None, dropout_prob: float) -> Tensor:
    dx = torch.empty_like(x)
    dout = dout.contiguous()  # autograd passes any layout: sum() an expanded scalar
    cfg = launch_config(x.shape[1] // 2)
    if len(x):
        backward_kernel[grid(len(x), cfg)](dout, x, dx, seed, None, None, None, len(x), *dropout_args(dropout_prob), **cfg)
    return dx


@geglu_backward_op.register_fake
def _(dout, x, seed, dropout_prob):
    return torch.empty_like(x)


class GeGLU(torch.autograd.Function):
    """out, differentiable in x."""

    @staticmethod
    def forward(ctx, x, seed, dropout_prob):
        ctx.dropout_prob = dropout_prob
        ctx.save_for_backward(x, seed)
        return geglu_op(x, seed, dropout_prob)

    @staticmethod
    def backward(ctx, dout):
        return geglu_backward_op(dout, *ctx.saved_tensors, ctx.dropout_prob), None, None


def geglu(x, dropout_prob=0.0):
    """dropout(gelu(gate) * value) for the halves of x, with the exact gelu; differentiable.

    x: (num_rows, 2F) in fp32, fp16 or bf16; arithmetic is fp32. Returns (num_rows, F) in x's dtype.
    dropout_prob: torch.manual_seed decides what is dropped.

    Raises: ValueError for wrong shapes or dtypes.
    """
    if x.dim() != 2 or x.shape[1] % 2:
        raise ValueError(f"geglu: x has shape {tuple(x.shape)}; expected (num_rows, 2 * F)")
    if not 0 <= dropout_prob < 1:
        raise ValueError(f"geglu: dropout_prob={dropout_prob}; expected 0 <= dropout_prob < 1")
    if not uses_triton(x.device):
        return geglu_reference(x, dropout_prob)
    if x.dtype not in DTYPES:
        raise ValueError(f"geglu: the Triton kernels take float32, float16 or bfloat16, not {x.dtype}")
    if not x.is_contiguous():
        raise ValueError("geglu: the Triton kernels take contiguous x only; call .contiguous() on it")
    seed = torch.randint(2**62, (1,), device=x.device) if dropout_prob > 0 else None
    return GeGLU.apply(x, seed, dropout_prob)
