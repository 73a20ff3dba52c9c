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
    """The same function in plain PyTorch, for any device and dtype. Its dropout mask is another one, PyTorch's own."""
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
    y = (z - mean[:, None]) * rstd[:, None] * weight[None, :] + bias[None, :]
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


# 16 elements a thread, in blocks of at least 128 threads. With 32 a thread registers spill for some C and GPUs, as
# tests/test_compile_kernels.py shows. Other tiles have not been timed.
MAX_C = 8192
TILE_ELEMENTS = 2048
PROGRAMS_PER_SM = 4  # of backward: as many as fit at its up to 128 registers a thread
PROGRAMS_ON_CPU = 4  # of backward, under the interpreter


def launch_config(C):
    BLOCK_C = max(8, triton.next_power_of_2(C))  # 8: the elements of one generator call
    return {
        "C": C,
        "BLOCK_R": max(1, TILE_ELEMENTS // BLOCK_C),
        "BLOCK_C": BLOCK_C,
        "num_warps": max(4, BLOCK_C // 512),
    }


def dropout_args(dropout_prob):
    """(threshold, keep_scale) of the kernels."""
    threshold = min(round(dropout_prob * DROPOUT_LEVELS), DROPOUT_LEVELS - 1)
    return threshold, DROPOUT_LEVELS / (DROPOUT_LEVELS - threshold)


# The kernels as two PyTorch operators, opaque to torch.compile. An operator may return neither its inputs nor one
# tensor twice: what would equal another tensor comes back empty, and the autograd formula uses that other tensor.


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
    """(y, z, mean, rstd); z is empty where it would equal x."""
    y, z, mean, rstd = empty_outputs(x, residual, seed)
    cfg = launch_config(x.shape[1])
    forward_kernel[(triton.cdiv(len(x), cfg["BLOCK_R"]),)](
        *(x, residual, weight, bias, seed, y, z if len(z) else None, mean, rstd),
        *(len(x), *dropout_args(dropout_prob), eps),
        **cfg,
    )
    return y, z, mean, rstd


@layernorm_op.register_fake
def _(x, residual, weight, bias, seed, dropout_prob, eps):
    return empty_outputs(x, residual, seed)


def empty_outputs(x, residual, seed):
    y, z = torch.empty_like(x), torch.empty_like(x[:0] if residual is None and seed is None else x)
    mean = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    return y, z, mean, torch.empty_like(mean)


@torch.library.custom_op("mosaicbert::dropout_add_layernorm_backward", mutates_args=())
def layernorm_backward_op(
    dy: Tensor,
    z: Tensor,
    weight: Tensor,
    seed: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dropout_prob: float,
    has_residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dz, dx, (2, C) dweight and dbias); dx is empty where it would equal dz, and dz where nobody wants it."""
    dy = dy.contiguous()  # autograd may hand over any layout: sum() gives an expanded scalar
    dz, dx = empty_gradients(z, seed, has_residual)
    programs = PROGRAMS_ON_CPU
    if dy.is_cuda:
        programs = PROGRAMS_PER_SM * torch.cuda.get_device_properties(dy.device).multi_processor_count
    partial = torch.empty((2, programs, dy.shape[1]), dtype=torch.float32, device=dy.device)
    backward_kernel[(programs,)](
        *(dy, z, weight, seed, mean, rstd, dz if len(dz) else None, dx if len(dx) else None, partial),
        *(len(dy), *dropout_args(dropout_prob)),
        **launch_config(dy.shape[1]),
    )
    return dz, dx, partial.sum(1)


@layernorm_backward_op.register_fake
def _(dy, z, weight, seed, mean, rstd, dropout_prob, has_residual):
    return *empty_gradients(z, seed, has_residual), weight.new_empty(2, z.shape[1])


def empty_gradients(z, seed, has_residual):
    dz = torch.empty_like(z if has_residual or seed is None else z[:0])
    dx = torch.empty_like(z[:0] if seed is None else z)
    return dz, dx


def setup_context(ctx, inputs, output):
    x, residual, weight, bias, seed, ctx.dropout_prob, _ = inputs
    _, z, mean, rstd = output
    ctx.has_residual = residual is not None
    ctx.save_for_backward(z if ctx.has_residual or seed is not None else x, weight, seed, mean, rstd)
    ctx.set_materialize_grads(False)  # only y has a gradient: do not fill the others with zeros


def backward(ctx, dy, *_):
    _, _, seed, _, _ = ctx.saved_tensors
    dz, dx, dparams = layernorm_backward_op(dy, *ctx.saved_tensors, ctx.dropout_prob, ctx.has_residual)
    return dz if seed is None else dx, dz if ctx.has_residual else None, *dparams, None, None, None


layernorm_op.register_autograd(backward, setup_context=setup_context)


def check_layernorm(x, residual, weight, bias, dropout_prob):
    """Raises: ValueError for what neither the kernels nor the reference would understand."""
    if x.dim() != 2:
        raise ValueError(f"dropout_add_layernorm: x has shape {tuple(x.shape)}; expected (num_rows, C)")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        got, want = (f"{t.dtype} of shape {tuple(t.shape)}" for t in (residual, x))
        raise ValueError(f"dropout_add_layernorm: residual is {got}; expected {want}, like x")
    if not weight.shape == bias.shape == x.shape[1:]:
        got = f"{tuple(weight.shape)} and {tuple(bias.shape)}"
        raise ValueError(f"dropout_add_layernorm: weight and bias have shapes {got}; expected ({x.shape[1]},) for each")
    if any(t is not None and t.device != x.device for t in (residual, weight, bias)):
        raise ValueError(f"dropout_add_layernorm: residual, weight and bias must be where x is, on {x.device}")
    if not 0 <= dropout_prob < 1:
        raise ValueError(f"dropout_add_layernorm: dropout_prob={dropout_prob}; expected 0 <= dropout_prob < 1")


def dropout_add_layernorm_triton(x, residual, weight, bias, dropout_prob=0.0, eps=1e-12):
    """The function by the kernels; differentiable in x, residual, weight and bias.

    Raises: ValueError for inputs that only the reference takes.
    """
    limit = "dropout_add_layernorm: the Triton kernels take"
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"{limit} x in float32, float16 or bfloat16, not {x.dtype}")
    if weight.dtype != torch.float32 or bias.dtype != torch.float32:
        raise ValueError(f"{limit} weight and bias in float32, not {weight.dtype} and {bias.dtype}")
    if not 1 <= x.shape[1] <= MAX_C:
        raise ValueError(f"{limit} rows of 1 to {MAX_C}, not {x.shape[1]}")
    if any(t is not None and not t.is_contiguous() for t in (x, residual, weight, bias)):
        raise ValueError(f"{limit} contiguous tensors only; call .contiguous() on x, residual, weight and bias")
    seed = torch.randint(2**62, (1,), device=x.device) if dropout_prob > 0 else None
    return layernorm_op(x, residual, weight, bias, seed, dropout_prob, eps)[0]
