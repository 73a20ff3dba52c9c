"""Dropout, residual addition and LayerNorm as one operator: a plain PyTorch reference, and Triton kernels.

For each row of C elements, with keep the dropout mask and p the dropout probability:

    z    = (x + x_bias) * keep / (1 - p) + residual
    mean = sum(z) / C,   rstd = 1 / sqrt(sum((z - mean)^2) / C + eps)
    xhat = (z - mean) * rstd
    y    = xhat * weight + bias

y is returned twice, the second time as the next residual: one tensor, but two gradients. In a post-LN Transformer both a
matrix product and the next residual addition read it. Autograd would add their gradients in a kernel of its own, 3
activations of traffic; here the backward kernel reads both. With dy their sum and g = dy * weight:

    dz        = rstd * (g - mean(g) - xhat * mean(g * xhat))
    dresidual = dz
    dx        = dz * keep / (1 - p)
    dweight   = sum over rows of dy * xhat,   dbias = sum over rows of dy,   dx_bias = sum over rows of dx

x_bias is the bias of the Linear that produced x. Added here it is free, and its gradient needs no pass over dx.

Saved for backward: z in x's dtype (x itself where z is x), and mean and rstd in fp32. The mask is not saved but drawn
again from its seed. Sums over rows take two stages and no atomics: a fixed number of programs sum their rows in fp32,
then PyTorch adds these partial sums in a fixed order.

A row is processed in parts of 256 columns, 3 for C = 768, so no lane idles; one block of 1,024 would waste a quarter of
them. A part is 8 elements (one 16-byte load) for each lane of one warp, so a row's sums need no barrier.

Traffic in activations of C elements: forward reads 2 and writes 2; backward reads 3 and writes 2, or 1 without dropout.

Dropout: the mask is a pure function of (seed, row, column). One call of the Philox generator gives 128 bits, 16 for each
of 8 elements, so p is rounded to a multiple of 1 / 65536. The 1 - p above is the rounded one, so that the expected value
is exactly x. The seed is drawn from PyTorch's generator on x's device and stays there: torch.manual_seed decides
everything, and nothing waits for the GPU.

Limits: C up to 8192, no second derivative. Machine code is checked for sm_80 and sm_90 only.
Tested: tests/test_layernorm.py, by Triton's interpreter on a CPU and compiled on a GPU.

Source: Ba et al. 2016, Layer Normalization, arXiv 1607.06450; Salmon et al. 2011, Parallel Random Numbers: As Easy as
1, 2, 3 (Philox; with 7 rounds it passes the BigCrush tests).

Read next: kernels/geglu.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import DTYPES, operator, tl, triton, uses_triton

PHILOX_ROUNDS = tl.constexpr(7)
DROPOUT_LEVELS = 2**16  # 16 random bits decide one element


def dropout_add_layernorm_reference(x, residual, weight, bias, dropout_prob=0.0, eps=1e-12, x_bias=None):
    """The same function in plain PyTorch, for any device and dtype. It draws another dropout mask, PyTorch's own."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    z = x.to(dtype) if x_bias is None else x.to(dtype) + x_bias
    z = F.dropout(z, dropout_prob)
    if residual is not None:
        z = z + residual
    y = F.layer_norm(z, weight.shape, weight.to(dtype), bias.to(dtype), eps).to(x.dtype)
    return y, y


@triton.jit
def keep_mask(seed_ptr, first, threshold, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """(BLOCK_R, BLOCK_C), True for elements to keep; the same in forward and backward.

    first: (BLOCK_R,) int64 counters of the generator. Each row uses BLOCK_C // 8 of them, and no two rows share any.
    """
    counter = first[:, None] + tl.arange(0, BLOCK_C // 8)[None, :]  # (BLOCK_R, BLOCK_C // 8): 8 columns per call
    a, b, c, d = tl.randint4x(tl.load(seed_ptr), counter, PHILOX_ROUNDS)  # 32 bits each
    bits = tl.join(tl.join(a, b), tl.join(c, d)).to(tl.uint32)  # (BLOCK_R, BLOCK_C // 8, 2, 2)
    bits = tl.join(bits << 16, bits)  # (BLOCK_R, BLOCK_C // 8, 2, 2, 2): only the upper halves count
    return tl.reshape(bits, (BLOCK_R, BLOCK_C)) >= (threshold.to(tl.uint32) << 16)


@triton.jit
def columns_of(i, C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Columns of part i and which exist, (BLOCK_R, BLOCK_C): loads in this shape need no change of layout."""
    offs_c = tl.broadcast_to(i * BLOCK_C + tl.arange(0, BLOCK_C)[None, :], (BLOCK_R, BLOCK_C))
    return offs_c, offs_c < C


@triton.jit
def part_of_rows(offs_r, num_rows, i, C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Part i of some rows, (BLOCK_R, BLOCK_C): (offsets, which exist, columns, which exist, `first` of keep_mask)."""
    offs_c, columns = columns_of(i, C, BLOCK_R, BLOCK_C)
    r = offs_r.to(tl.int64)
    first = (r * ((C + BLOCK_C - 1) // BLOCK_C) + i) * (BLOCK_C // 8)  # (BLOCK_R,)
    return r[:, None] * C + offs_c, (offs_r < num_rows)[:, None] & columns, offs_c, columns, first


@triton.jit
def statistics(parts, eps, C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """(mean, rstd), each (BLOCK_R,), of rows in parts; columns that don't exist are 0."""
    total, squares = parts[0], tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for i in tl.static_range(1, len(parts)):
        total += parts[i]
    mean = tl.sum(total, 1) / C
    for i in tl.static_range(len(parts)):
        centred = tl.where(columns_of(i, C, BLOCK_R, BLOCK_C)[1], parts[i] - mean[:, None], 0.0)
        squares += centred * centred
    return mean, 1 / tl.sqrt(tl.sum(squares, 1) / C + eps)


@triton.jit
def through_layernorm(dys, xhats, rstd, weight_ptr, C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """The parts of dz from those of dy and xhat. dy is 0 where nothing exists, so it adds nothing to the sums."""
    sum_g, sum_gx = tl.zeros((BLOCK_R, BLOCK_C), tl.float32), tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    gs, dzs = (), ()
    for i in tl.static_range(len(dys)):
        offs_c, columns = columns_of(i, C, BLOCK_R, BLOCK_C)
        g = dys[i] * tl.load(weight_ptr + offs_c, mask=columns, other=0.0)
        sum_g += g
        sum_gx += g * xhats[i]
        gs = gs + (g,)
    mean_g, mean_gx = tl.sum(sum_g, 1) / C, tl.sum(sum_gx, 1) / C  # (BLOCK_R,)
    for i in tl.static_range(len(dys)):
        dzs = dzs + (rstd[:, None] * (gs[i] - mean_g[:, None] - xhats[i] * mean_gx[:, None]),)
    return dzs


@triton.jit
def store_sums(sums, partial_ptr, KINDS: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Store this program's share of KINDS sums over rows. sums: KINDS tiles for each part of the columns."""
    pid, programs = tl.program_id(0), tl.num_programs(0)
    for i in tl.static_range(len(sums)):
        offs_c = i // KINDS * BLOCK_C + tl.arange(0, BLOCK_C)
        row_ptr = partial_ptr + (i % KINDS * programs + pid) * C
        tl.store(row_ptr + offs_c, tl.sum(sums[i], 0), mask=offs_c < C)


@triton.jit(do_not_specialize=["num_rows", "threshold"])
def forward_kernel(
    x_ptr,  # (num_rows, C)
    x_bias_ptr,  # (C,) fp32, or None
    residual_ptr,  # (num_rows, C), or None
    weight_ptr,  # (C,) fp32
    bias_ptr,  # (C,) fp32
    seed_ptr,  # (1,) int64, or None for no dropout
    y_ptr,  # (num_rows, C): written
    z_ptr,  # (num_rows, C): written, or None where z is x
    mean_ptr,  # (num_rows,) fp32: written
    rstd_ptr,  # (num_rows,) fp32: written
    num_rows,
    threshold,  # elements whose 16 random bits are below this are dropped
    keep_scale,  # 1 / (1 - p)
    eps,
    C: tl.constexpr,
    BLOCK_R: tl.constexpr,  # rows of one program
    BLOCK_C: tl.constexpr,  # columns of one part
):
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    PARTS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    parts = ()
    for i in tl.static_range(PARTS):
        offs, mask, offs_c, columns, first = part_of_rows(offs_r, num_rows, i, C, BLOCK_R, BLOCK_C)
        z = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        if x_bias_ptr is not None:
            z += tl.load(x_bias_ptr + offs_c, mask=columns, other=0.0)
        if seed_ptr is not None:
            z = tl.where(keep_mask(seed_ptr, first, threshold, BLOCK_R, BLOCK_C), z * keep_scale, 0.0)
        if residual_ptr is not None:
            z += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        if z_ptr is not None:
            tl.store(z_ptr + offs, z.to(z_ptr.dtype.element_ty), mask=mask)
        parts = parts + (z,)

    mean, rstd = statistics(parts, eps, C, BLOCK_R, BLOCK_C)
    for i in tl.static_range(PARTS):
        offs, mask, offs_c, columns, first = part_of_rows(offs_r, num_rows, i, C, BLOCK_R, BLOCK_C)
        weight = tl.load(weight_ptr + offs_c, mask=columns, other=0.0)
        bias = tl.load(bias_ptr + offs_c, mask=columns, other=0.0)
        y = (parts[i] - mean[:, None]) * rstd[:, None] * weight + bias
        tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + offs_r, mean, mask=offs_r < num_rows)
    tl.store(rstd_ptr + offs_r, rstd, mask=offs_r < num_rows)


@triton.jit(do_not_specialize=["num_rows", "threshold"])
def backward_kernel(
    dy_ptr,  # (num_rows, C)
    dnext_ptr,  # (num_rows, C): the gradient of the next residual, or None
    z_ptr,  # (num_rows, C)
    weight_ptr,  # (C,) fp32
    seed_ptr,  # (1,) int64, or None for no dropout
    mean_ptr,  # (num_rows,) fp32
    rstd_ptr,  # (num_rows,) fp32
    dz_ptr,  # (num_rows, C): written, or None where only dx is wanted
    dx_ptr,  # (num_rows, C): written, or None where it equals dz
    partial_ptr,  # (2 or 3, programs, C) fp32: written, each program's share of dweight, dbias and dx_bias
    num_rows,
    threshold,
    keep_scale,
    C: tl.constexpr,
    BLOCK_R: tl.constexpr,  # rows of one step
    BLOCK_C: tl.constexpr,
    SUM_DX: tl.constexpr,  # whether dx_bias is wanted
):
    """Each program takes every num_programs-th block of rows, so its sums depend only on the number of rows."""
    pid, programs = tl.program_id(0), tl.num_programs(0)
    PARTS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    KINDS: tl.constexpr = 3 if SUM_DX else 2
    sums = ()  # for each part of the columns: dweight, dbias and, if wanted, dx_bias
    for _ in tl.static_range(KINDS * PARTS):
        sums = sums + (tl.zeros((BLOCK_R, BLOCK_C), tl.float32),)
    for block in range(pid * BLOCK_R, num_rows, programs * BLOCK_R):
        offs_r = block + tl.arange(0, BLOCK_R)
        mean = tl.load(mean_ptr + offs_r, mask=offs_r < num_rows, other=0.0)  # (BLOCK_R,)
        rstd = tl.load(rstd_ptr + offs_r, mask=offs_r < num_rows, other=0.0)  # (BLOCK_R,)
        dys, xhats = (), ()
        for i in tl.static_range(PARTS):
            offs, mask, offs_c, columns, first = part_of_rows(offs_r, num_rows, i, C, BLOCK_R, BLOCK_C)
            dy = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            if dnext_ptr is not None:
                dy += tl.load(dnext_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            z = tl.load(z_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            dys, xhats = dys + (dy,), xhats + ((z - mean[:, None]) * rstd[:, None],)
        dzs = through_layernorm(dys, xhats, rstd, weight_ptr, C, BLOCK_R, BLOCK_C)

        new = ()
        for i in tl.static_range(PARTS):
            offs, mask, offs_c, columns, first = part_of_rows(offs_r, num_rows, i, C, BLOCK_R, BLOCK_C)
            dx = dzs[i]
            if dz_ptr is not None:
                tl.store(dz_ptr + offs, dx.to(dz_ptr.dtype.element_ty), mask=mask)
            if seed_ptr is not None:
                dx = tl.where(keep_mask(seed_ptr, first, threshold, BLOCK_R, BLOCK_C), dx * keep_scale, 0.0)
            if dx_ptr is not None:
                tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
            new = new + (sums[KINDS * i] + dys[i] * xhats[i], sums[KINDS * i + 1] + dys[i])
            if SUM_DX:
                new = new + (sums[KINDS * i + 2] + dx,)  # 0 in rows that don't exist, as rstd is
        sums = new
    store_sums(sums, partial_ptr, KINDS, C, BLOCK_C)


# One row per warp for C up to 1,024; tests/test_compile_kernels.py shows what spills. Measured on an H100 with 131,072
# rows of 768 in bf16, in ns per row: forward 2.13 (96 % of a copy's speed; one to eight warps, of one or two rows each,
# differ by 0.8 %); backward with dropout, both gradients and all sums 2.84 (90 %). With programs of one warp the backward
# kernel alone is 3 % faster, but takes 3.15 with its eight times as many partial sums; more programs than run at once
# cost 5 to 12 %, and loading a step ahead 30 %.
MAX_C = 8192
WARPS = 4  # per program, which takes as many rows at once
PROGRAMS_PER_SM = 2  # of backward, all resident: at up to 255 registers per thread no more fit
PROGRAMS_ON_CPU = 4  # of backward, under the interpreter


def launch_config(C):
    """Launch constants of both kernels."""
    BLOCK_C = triton.next_power_of_2(C) if C <= 256 else max(256, triton.next_power_of_2(triton.cdiv(C, 4)))
    BLOCK_C = max(8, BLOCK_C)  # one call of the generator
    num_warps = max(WARPS, BLOCK_C // 256)
    return {"C": C, "BLOCK_R": max(1, 256 * num_warps // BLOCK_C), "BLOCK_C": BLOCK_C, "num_warps": num_warps}


def backward_programs(device):
    """How many programs share the rows in backward: fixed for each kind of GPU, so that equal inputs give equal sums."""
    if device.type != "cuda":
        return PROGRAMS_ON_CPU
    return PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count


def dropout_args(dropout_prob):
    """(threshold, keep_scale) of the kernels."""
    threshold = min(round(dropout_prob * DROPOUT_LEVELS), DROPOUT_LEVELS - 1)
    return threshold, DROPOUT_LEVELS / (DROPOUT_LEVELS - threshold)


# The kernels as two PyTorch operators. An operator may return neither an input nor the same tensor twice: a result that
# would equal another tensor comes back empty, and DropoutAddLayerNorm uses that other tensor.


@operator("dropout_add_layernorm")
def layernorm_op(
    x: Tensor,
    x_bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    seed: Tensor | None,
    dropout_prob: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, z, mean, rstd); z is empty where it would equal x."""
    y, z, mean, rstd = empty_outputs(x, x_bias, residual, seed)
    cfg = launch_config(x.shape[1])
    forward_kernel[(triton.cdiv(len(x), cfg["BLOCK_R"]),)](
        *(x, x_bias, residual, weight, bias, seed, y, z if len(z) else None, mean, rstd),
        *(len(x), *dropout_args(dropout_prob), eps),
        **cfg,
    )
    return y, z, mean, rstd


@layernorm_op.register_fake
def _(x, x_bias, residual, weight, bias, seed, dropout_prob, eps):
    return empty_outputs(x, x_bias, residual, seed)


def empty_outputs(x, x_bias, residual, seed):
    z_is_x = x_bias is None and residual is None and seed is None
    y, z = torch.empty_like(x), torch.empty_like(x[:0] if z_is_x else x)
    mean = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    return y, z, mean, torch.empty_like(mean)


@operator("dropout_add_layernorm_backward")
def layernorm_backward_op(
    dy: Tensor,
    dnext: Tensor | None,
    z: Tensor,
    weight: Tensor,
    seed: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dropout_prob: float,
    has_residual: bool,
    has_x_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dz, dx, (2 or 3, C) dweight, dbias and dx_bias); dx is empty where it would equal dz, dz where it is unused."""
    # Autograd passes any layout: sum() an expanded scalar.
    dy, dnext = dy.contiguous(), None if dnext is None else dnext.contiguous()
    dz, dx = empty_gradients(z, seed, has_residual)
    programs = backward_programs(dy.device)
    partial = torch.empty((2 + has_x_bias, programs, dy.shape[1]), dtype=torch.float32, device=dy.device)
    backward_kernel[(programs,)](
        *(dy, dnext, z, weight, seed, mean, rstd, dz if len(dz) else None, dx if len(dx) else None, partial),
        *(len(dy), *dropout_args(dropout_prob)),
        SUM_DX=has_x_bias,
        **launch_config(dy.shape[1]),
    )
    return dz, dx, partial.sum(1)


@layernorm_backward_op.register_fake
def _(dy, dnext, z, weight, seed, mean, rstd, dropout_prob, has_residual, has_x_bias):
    return *empty_gradients(z, seed, has_residual), weight.new_empty(2 + has_x_bias, z.shape[1])


def empty_gradients(z, seed, has_residual):
    dz = torch.empty_like(z if has_residual or seed is None else z[:0])
    dx = torch.empty_like(z[:0] if seed is None else z)
    return dz, dx


class DropoutAddLayerNorm(torch.autograd.Function):
    """Returns one tensor twice, so that backward gets two gradients and can add them in the kernel."""

    @staticmethod
    def forward(ctx, x, residual, weight, bias, seed, dropout_prob, eps, x_bias):
        y, z, mean, rstd = layernorm_op(x, x_bias, residual, weight, bias, seed, dropout_prob, eps)
        ctx.dropout_prob, ctx.has_residual, ctx.has_x_bias = dropout_prob, residual is not None, x_bias is not None
        ctx.save_for_backward(z if len(z) else x, weight, seed, mean, rstd)
        ctx.set_materialize_grads(False)  # one of the outputs may be unused: no zeros for it
        return y, y.view_as(y)

    @staticmethod
    def backward(ctx, dy, dnext):
        if dy is None:
            dy, dnext = dnext, None
        has = ctx.has_residual, ctx.has_x_bias
        dz, dx, dparams = layernorm_backward_op(dy, dnext, *ctx.saved_tensors, ctx.dropout_prob, *has)
        dx = dx if len(dx) else dz
        dx_bias = dparams[2] if ctx.has_x_bias else None
        return dx, dz if ctx.has_residual else None, dparams[0], dparams[1], None, None, None, dx_bias


def check(x, residual, weight, bias, dropout_prob, x_bias):
    """Raises: ValueError for inputs that the backend in use cannot take."""
    vectors = [t for t in (weight, bias, x_bias) if t is not None]
    if x.dim() != 2:
        raise ValueError(f"dropout_add_layernorm: x has shape {tuple(x.shape)}; expected (num_rows, C)")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        got, want = (f"{t.dtype} of shape {tuple(t.shape)}" for t in (residual, x))
        raise ValueError(f"dropout_add_layernorm: residual is {got}; expected {want}, like x")
    if any(t.shape != x.shape[1:] for t in vectors):
        got = " and ".join(str(tuple(t.shape)) for t in vectors)
        raise ValueError(f"dropout_add_layernorm: weight and biases have shapes {got}; expected ({x.shape[1]},) for each")
    if any(t is not None and t.device != x.device for t in (residual, *vectors)):
        raise ValueError(f"dropout_add_layernorm: residual, weight and biases must be where x is, on {x.device}")
    if not 0 <= dropout_prob < 1:
        raise ValueError(f"dropout_add_layernorm: dropout_prob={dropout_prob}; expected 0 <= dropout_prob < 1")
    if not uses_triton(x.device):
        return
    limit = "dropout_add_layernorm: the Triton kernels take"
    if x.dtype not in DTYPES:
        raise ValueError(f"{limit} x in float32, float16 or bfloat16, not {x.dtype}")
    if any(t.dtype != torch.float32 for t in vectors):
        raise ValueError(f"{limit} weight and biases in float32, not {', '.join(str(t.dtype) for t in vectors)}")
    if not 1 <= x.shape[1] <= MAX_C:
        raise ValueError(f"{limit} rows of 1 to {MAX_C}, not {x.shape[1]}")
    if any(t is not None and not t.is_contiguous() for t in (x, residual, *vectors)):
        raise ValueError(f"{limit} contiguous tensors only; call .contiguous() on x, residual, weight and biases")


def dropout_add_layernorm(x, residual, weight, bias, dropout_prob=0.0, eps=1e-12, x_bias=None):
    """LayerNorm(dropout(x + x_bias) + residual) * weight + bias for each row, returned twice; differentiable.

    Use the second result as the next residual: backward then adds both gradients itself.

    x, and the results: (num_rows, C) in fp32, fp16 or bf16; all arithmetic and statistics are fp32.
    residual: like x, or None. weight, bias: (C,) fp32. x_bias: likewise, or None.
    dropout_prob: torch.manual_seed decides what is dropped.

    Raises: ValueError for wrong shapes, dtypes or devices.
    """
    check(x, residual, weight, bias, dropout_prob, x_bias)
    if not uses_triton(x.device):
        return dropout_add_layernorm_reference(x, residual, weight, bias, dropout_prob, eps, x_bias)
    seed = torch.randint(2**62, (1,), device=x.device) if dropout_prob > 0 else None
    return DropoutAddLayerNorm.apply(x, residual, weight, bias, seed, dropout_prob, eps, x_bias)
