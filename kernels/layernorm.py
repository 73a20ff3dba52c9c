"""Dropout, residual addition and LayerNorm as one operator: a plain PyTorch reference, and Triton kernels.

For each row of C elements, with keep the dropout mask and p the probability of dropping:

    z    = x * keep / (1 - p) + residual
    mean = sum(z) / C,   rstd = 1 / sqrt(sum((z - mean)^2) / C + eps)
    xhat = (z - mean) * rstd
    y    = xhat * weight + bias

and with dy the gradient that comes in, g = dy * weight:

    dz        = rstd * (g - mean(g) - xhat * mean(g * xhat))
    dresidual = dz
    dx        = dz * keep / (1 - p)
    dweight   = sum over rows of dy * xhat,   dbias = sum over rows of dy

Shapes: x, residual, y (num_rows, C) of one dtype, fp32, fp16 or bf16; weight, bias (C,) fp32. All arithmetic and all
statistics are fp32, also for half-precision x. Saved for backward: z in x's dtype (x itself when z is x), mean and
rstd in fp32. The mask is not saved but drawn again from its seed. dweight and dbias take two stages without atomic
additions: a fixed number of programs sum their rows in fp32, then PyTorch sums those partial sums in a fixed order.

Dropout: the mask is a function of (seed, row, column) alone. One call of the Philox generator gives 128 bits, which
decide 8 elements with 16 bits each, so p is rounded to a multiple of 1 / 65536, and 1 - p above is the rounded one:
the expected value of a dropped-out element is exactly x. The seed is drawn from PyTorch's generator for x's device
and stays there, so torch.manual_seed decides everything, and drawing it waits for nothing.

Limits: C up to 8192, no second derivative. Tested: tests/test_layernorm.py, by Triton's interpreter on a CPU and
compiled on a GPU. Not proven: any architecture but sm_80 and sm_90.

Source: Ba et al. 2016, Layer Normalization, arXiv 1607.06450; Salmon et al. 2011, Parallel Random Numbers: As Easy as
1, 2, 3 (Philox; with 7 rounds it passes the BigCrush tests).

Read next: tests/test_layernorm.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import tl, triton

PHILOX_ROUNDS = tl.constexpr(7)
DROPOUT_LEVELS = 65536  # 2^16: 16 random bits decide one element


def dropout_add_layernorm_reference(x, residual, weight, bias, dropout_prob=0.0, eps=1e-12):
    """The same function in plain PyTorch, for any device and dtype. Its mask is another one, from PyTorch's generator."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    z = F.dropout(x.to(dtype), dropout_prob)
    if residual is not None:
        z = z + residual
    return F.layer_norm(z, weight.shape, weight.to(dtype), bias.to(dtype), eps).to(x.dtype)


@triton.jit
def keep_mask(seed_ptr, offs_r, threshold, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """(BLOCK_R, BLOCK_C), True for elements that stay. Forward and backward draw the same."""
    groups = tl.arange(0, BLOCK_C // 8)  # of 8 columns, one generator call each
    counter = offs_r.to(tl.int64)[:, None] * (BLOCK_C // 8) + groups[None, :]  # (BLOCK_R, BLOCK_C // 8)
    a, b, c, d = tl.randint4x(tl.load(seed_ptr), counter, PHILOX_ROUNDS)  # 32 bits each
    bits = tl.join(tl.join(a, b), tl.join(c, d))  # (BLOCK_R, BLOCK_C // 8, 2, 2)
    bits = tl.join(bits & 0xFFFF, (bits >> 16) & 0xFFFF)  # (BLOCK_R, BLOCK_C // 8, 2, 2, 2)
    return tl.reshape(bits.to(tl.int32), (BLOCK_R, BLOCK_C)) >= threshold


@triton.jit(do_not_specialize=["num_rows", "threshold"])
def forward_kernel(
    x_ptr,  # (num_rows, C)
    residual_ptr,  # (num_rows, C), or None
    weight_ptr,  # (C,) fp32
    bias_ptr,  # (C,) fp32
    seed_ptr,  # (1,) int64, or None for no dropout
    y_ptr,  # (num_rows, C): written
    z_ptr,  # (num_rows, C): written, or None when z is x
    mean_ptr,  # (num_rows,) fp32: written
    rstd_ptr,  # (num_rows,) fp32: written
    num_rows,
    threshold,  # elements whose 16 bits are below this are dropped
    keep_scale,  # 1 / (1 - p)
    eps,
    C: tl.constexpr,
    BLOCK_R: tl.constexpr,  # rows of one program
    BLOCK_C: tl.constexpr,  # C rounded up to a power of two
):
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_c = tl.arange(0, BLOCK_C)
    offs = offs_r.to(tl.int64)[:, None] * C + offs_c[None, :]  # (BLOCK_R, BLOCK_C)
    rows, columns = offs_r < num_rows, offs_c < C
    mask = rows[:, None] & columns[None, :]

    z = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if seed_ptr is not None:
        z = tl.where(keep_mask(seed_ptr, offs_r, threshold, BLOCK_R, BLOCK_C), z * keep_scale, 0.0)
    if residual_ptr is not None:
        z += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if z_ptr is not None:
        tl.store(z_ptr + offs, z.to(z_ptr.dtype.element_ty), mask=mask)

    mean = tl.sum(z, 1) / C  # (BLOCK_R,)
    centred = tl.where(columns[None, :], z - mean[:, None], 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, 1) / C + eps)  # (BLOCK_R,)
    weight = tl.load(weight_ptr + offs_c, mask=columns, other=0.0)  # (BLOCK_C,)
    bias = tl.load(bias_ptr + offs_c, mask=columns, other=0.0)  # (BLOCK_C,)
    y = centred * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + offs_r, mean, mask=rows)
    tl.store(rstd_ptr + offs_r, rstd, mask=rows)


@triton.jit(do_not_specialize=["num_rows", "threshold"])
def backward_kernel(
    dy_ptr,  # (num_rows, C)
    z_ptr,  # (num_rows, C)
    weight_ptr,  # (C,) fp32
    seed_ptr,  # (1,) int64, or None for no dropout
    mean_ptr,  # (num_rows,) fp32
    rstd_ptr,  # (num_rows,) fp32
    dz_ptr,  # (num_rows, C): written, or None when only dx is wanted
    dx_ptr,  # (num_rows, C): written, or None when it equals dz
    partial_ptr,  # (2, programs, C) fp32: written, each program's part of dweight and of dbias
    num_rows,
    threshold,
    keep_scale,
    C: tl.constexpr,
    BLOCK_R: tl.constexpr,  # rows of one step
    BLOCK_C: tl.constexpr,
):
    """Each program takes every num_programs-th block of rows, so its sums depend on nothing but the row count."""
    pid, programs = tl.program_id(0), tl.num_programs(0)
    offs_c = tl.arange(0, BLOCK_C)
    columns = offs_c < C
    weight = tl.load(weight_ptr + offs_c, mask=columns, other=0.0)  # (BLOCK_C,)
    dweight = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    dbias = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for first in range(pid * BLOCK_R, num_rows, programs * BLOCK_R):
        offs_r = first + tl.arange(0, BLOCK_R)
        offs = offs_r.to(tl.int64)[:, None] * C + offs_c[None, :]  # (BLOCK_R, BLOCK_C)
        rows = offs_r < num_rows
        mask = rows[:, None] & columns[None, :]
        dy = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + offs_r, mask=rows, other=0.0)  # (BLOCK_R,)
        rstd = tl.load(rstd_ptr + offs_r, mask=rows, other=0.0)  # (BLOCK_R,)

        xhat = (z - mean[:, None]) * rstd[:, None]
        g = dy * weight[None, :]  # 0 outside the mask, so that every sum below counts only what is inside
        mean_g, mean_gx = tl.sum(g, 1) / C, tl.sum(g * xhat, 1) / C  # (BLOCK_R,)
        dz = rstd[:, None] * (g - mean_g[:, None] - xhat * mean_gx[:, None])
        dweight += dy * xhat
        dbias += dy
        if dz_ptr is not None:
            tl.store(dz_ptr + offs, dz.to(dz_ptr.dtype.element_ty), mask=mask)
        if dx_ptr is not None:
            dx = tl.where(keep_mask(seed_ptr, offs_r, threshold, BLOCK_R, BLOCK_C), dz * keep_scale, 0.0)
            tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(partial_ptr + pid * C + offs_c, tl.sum(dweight, 0), mask=columns)
    tl.store(partial_ptr + (programs + pid) * C + offs_c, tl.sum(dbias, 0), mask=columns)


# A tile has 4096 elements, 32 in each of 128 threads, and a row of up to 1024 lies in one warp, so that its sums need
# no barrier. Chosen by these counts and by tests/test_compile_kernels.py (no spilled registers), not yet by timing.
MAX_C = 8192
TILE_ELEMENTS = 4096
PROGRAMS_PER_SM = 2  # in backward; more would only enlarge the second stage
PROGRAMS_ON_CPU = 4  # the interpreter's "device"


def launch_config(C):
    BLOCK_C = max(8, triton.next_power_of_2(C))  # 8: the elements of one generator call
    return {
        "C": C,
        "BLOCK_R": max(1, TILE_ELEMENTS // BLOCK_C),
        "BLOCK_C": BLOCK_C,
        "num_warps": max(4, BLOCK_C // 1024),
    }


def dropout_args(dropout_prob):
    """(threshold, keep_scale) of the kernels."""
    threshold = min(round(dropout_prob * DROPOUT_LEVELS), DROPOUT_LEVELS - 1)
    return threshold, DROPOUT_LEVELS / (DROPOUT_LEVELS - threshold)


# The kernels as two PyTorch operators, opaque to torch.compile. An operator may not return its inputs, nor one tensor
# twice: what need not exist is an empty tensor, for which the autograd formula puts the tensor it equals.


@torch.library.custom_op("mosaicbert::dropout_add_layernorm", mutates_args=())
def layernorm_op(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    seed: Tensor | None,
    dropout_prob: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, z, mean, rstd); z is empty when it would equal x."""
    num_rows, C = x.shape
    cfg = launch_config(C)
    y = torch.empty_like(x)
    z = torch.empty_like(x) if z_differs(residual, seed) else torch.empty(0, dtype=x.dtype, device=x.device)
    mean = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    forward_kernel[(triton.cdiv(num_rows, cfg["BLOCK_R"]),)](
        x, residual, weight, bias, seed, y, z if z_differs(residual, seed) else None, mean, rstd,
        num_rows, *dropout_args(dropout_prob), eps, **cfg,
    )  # fmt: skip
    return y, z, mean, rstd
