"""Attention for sequences of any length: FlashAttention-2 in Triton. Formulas and shapes: kernels/attention.py.

Nothing of size n x n reaches memory. Forward walks over the keys block by block with a running maximum m and sum l, and
rescales what it has when the maximum grows (algorithm 1 of the paper). It saves out and lse, D + 1 numbers per query and
head; backward recomputes P from q, k and lse (algorithm 2), which costs one more product and no memory.

Backward is two kernels: one owns a block of queries and sums dq over the keys, the other owns a block of keys and sums
dk and dv over the queries. Both compute S and dP; in return there are no atomics. Every result has one owner, which
sums in a fixed order, so equal inputs give equal bits.

Products accumulate in fp32; softmax and statistics are fp32; fp32 inputs are multiplied in full fp32, not TF32.

Source: Dao 2023, FlashAttention-2, arXiv 2307.08691.

Read next: kernels/attention_window.py
"""

import math

import torch
from torch import Tensor

from kernels.backend import operator, tl, triton

LOG2E = tl.constexpr(math.log2(math.e))  # exp(x) = exp2(x * LOG2E), and exp2 is what the hardware has
WARP_GROUP_MMA = (9, 10)  # major compute capabilities with wgmma or tcgen05; all others have mma.sync


# Helpers of these kernels and of attention_window.py's. A program works on one head; `offs` count rows from the start
# of its sequence or window.


@triton.jit
def row_ptrs(ptr, offs, row_stride, D: tl.constexpr):
    """(len(offs), D) pointers to rows of one head; 64-bit, since row number times stride overflows 32."""
    return ptr + offs.to(tl.int64)[:, None] * row_stride + tl.arange(0, D)[None, :]


@triton.jit
def load_rows(ptr, offs, length, row_stride, D: tl.constexpr):
    """(len(offs), D). Rows past the end of the sequence, another's or nobody's, read as 0."""
    return tl.load(row_ptrs(ptr, offs, row_stride, D), mask=offs[:, None] < length, other=0.0)


@triton.jit
def store_rows(ptr, offs, length, row_stride, D: tl.constexpr, tile):
    ptrs = row_ptrs(ptr, offs, row_stride, D)
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=offs[:, None] < length)


@triton.jit
def zero_rows(ptr, length, row_stride, D: tl.constexpr, BLOCK: tl.constexpr):
    """Zero `length` rows, shared by this head's programs: each takes every num_programs-th block."""
    for first in range(tl.program_id(1) * BLOCK, length, tl.num_programs(1) * BLOCK):
        store_rows(ptr, first + tl.arange(0, BLOCK), length, row_stride, D, tl.zeros((BLOCK, D), tl.float32))


@triton.jit
def alibi(i, j, slope):
    """Bias of query position i towards key position j, which broadcast to a tile. slope 0: no bias."""
    return -slope * tl.abs(i - j).to(tl.float32)


@triton.jit
def load_slope(slopes_ptr, h):
    """The head's slope times LOG2E, as all scores here: the kernels take exp2 where the formulas take exp."""
    if slopes_ptr is None:
        return 0.0
    else:
        return tl.load(slopes_ptr + h) * LOG2E


@triton.jit
def locate(cu_seqlens_ptr, B, H, total_tokens):
    """This program's work: (whether it is the tail, head, start, length).

    Sequence number B is the tail: the rows past the last sequence, which become 0. Heads vary fastest, so programs that
    run side by side read neighbouring bytes of the same rows.
    """
    b, h = tl.program_id(0) // H, tl.program_id(0) % H
    start = tl.load(cu_seqlens_ptr + b)
    end = tl.load(cu_seqlens_ptr + b + 1, mask=b < B, other=total_tokens)
    return b == B, h, start.to(tl.int64), end - start


@triton.jit
def mask_keys(scores, offs_n, length):
    """Scores with -inf for keys past the end of the sequence."""
    return tl.where(offs_n[None, :] < length, scores, float("-inf"))


@triton.jit(do_not_specialize=["B", "H", "total_tokens"])
def forward_kernel(
    qkv_ptr,  # (total_tokens, 3, H, D)
    out_ptr,  # (total_tokens, H, D): written
    lse_ptr,  # (H, total_tokens) fp32: written, log2 of the softmax denominators
    cu_seqlens_ptr,  # (B + 1,) int32
    slopes_ptr,  # (H,) fp32, or None for no bias
    B,
    H,
    total_tokens,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,  # queries of one program
    BLOCK_N: tl.constexpr,  # keys of one step
):
    """out and lse for BLOCK_M queries of one head. Grid: ((B + 1) * H, blocks of the longest sequence)."""
    is_tail, h, start, length = locate(cu_seqlens_ptr, B, H, total_tokens)
    row_stride = 3 * H * D
    out_ptr += (start * H + h) * D
    if is_tail:
        zero_rows(out_ptr, length, H * D, D, BLOCK_M)
        return
    if tl.program_id(1) * BLOCK_M >= length:
        return

    q_ptr = qkv_ptr + start * row_stride + h * D
    k_ptr, v_ptr = q_ptr + H * D, q_ptr + 2 * H * D
    lse_ptr += h.to(tl.int64) * total_tokens + start
    scale, slope = LOG2E / D**0.5, load_slope(slopes_ptr, h)

    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    q = load_rows(q_ptr, offs_m, length, row_stride, D)  # (BLOCK_M, D)
    m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)  # largest score so far
    l_i = tl.zeros((BLOCK_M,), tl.float32)  # sum of exp2(score - m_i) so far
    acc = tl.zeros((BLOCK_M, D), tl.float32)  # sum of exp2(score - m_i) * v so far
    for start_n in range(0, length, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, offs_n, length, row_stride, D)  # (BLOCK_N, D)
        v = load_rows(v_ptr, offs_n, length, row_stride, D)  # (BLOCK_N, D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # (BLOCK_M, BLOCK_N)
        s = mask_keys(s + alibi(offs_m[:, None], offs_n[None, :], slope), offs_n, length)
        m_new = tl.maximum(m_i, tl.max(s, 1))  # finite: every block has a key inside the sequence
        alpha = tl.exp2(m_i - m_new)  # 0 in the first step
        p = tl.exp2(s - m_new[:, None])
        l_i = l_i * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
        m_i = m_new
    store_rows(out_ptr, offs_m, length, H * D, D, acc / l_i[:, None])
    tl.store(lse_ptr + offs_m, m_i + tl.log2(l_i), mask=offs_m < length)


@triton.jit(do_not_specialize=["B", "H", "total_tokens"])
def dq_kernel(
    dout_ptr,  # (total_tokens, H, D)
    qkv_ptr,  # (total_tokens, 3, H, D)
    out_ptr,  # (total_tokens, H, D)
    lse_ptr,  # (H, total_tokens) fp32
    delta_ptr,  # (H, total_tokens) fp32: written, for dkv_kernel
    dqkv_ptr,  # (total_tokens, 3, H, D): its q third is written
    cu_seqlens_ptr,  # (B + 1,) int32
    slopes_ptr,  # (H,) fp32, or None
    B,
    H,
    total_tokens,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,  # queries of one program
    BLOCK_N: tl.constexpr,  # keys of one step
):
    """delta and dq for BLOCK_M queries of one head. Grid as in forward_kernel."""
    is_tail, h, start, length = locate(cu_seqlens_ptr, B, H, total_tokens)
    row_stride = 3 * H * D
    dq_ptr = dqkv_ptr + start * row_stride + h * D
    if is_tail:
        zero_rows(dq_ptr, length, row_stride, D, BLOCK_M)
        return
    if tl.program_id(1) * BLOCK_M >= length:
        return

    q_ptr = qkv_ptr + start * row_stride + h * D
    k_ptr, v_ptr = q_ptr + H * D, q_ptr + 2 * H * D
    out_ptr += (start * H + h) * D
    dout_ptr += (start * H + h) * D
    lse_ptr += h.to(tl.int64) * total_tokens + start
    delta_ptr += h.to(tl.int64) * total_tokens + start
    scale, slope = LOG2E / D**0.5, load_slope(slopes_ptr, h)

    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    q = load_rows(q_ptr, offs_m, length, row_stride, D)  # (BLOCK_M, D)
    dout = load_rows(dout_ptr, offs_m, length, H * D, D)  # (BLOCK_M, D)
    out = load_rows(out_ptr, offs_m, length, H * D, D)  # (BLOCK_M, D)
    lse = tl.load(lse_ptr + offs_m, mask=offs_m < length, other=0.0)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    tl.store(delta_ptr + offs_m, delta, mask=offs_m < length)

    dq = tl.zeros((BLOCK_M, D), tl.float32)
    for start_n in range(0, length, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, offs_n, length, row_stride, D)  # (BLOCK_N, D)
        v = load_rows(v_ptr, offs_n, length, row_stride, D)  # (BLOCK_N, D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # (BLOCK_M, BLOCK_N)
        s = mask_keys(s + alibi(offs_m[:, None], offs_n[None, :], slope), offs_n, length)
        p = tl.exp2(s - lse[:, None])
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    store_rows(dq_ptr, offs_m, length, row_stride, D, dq / D**0.5)


@triton.jit(do_not_specialize=["B", "H", "total_tokens"])
def dkv_kernel(
    dout_ptr,  # (total_tokens, H, D)
    qkv_ptr,  # (total_tokens, 3, H, D)
    lse_ptr,  # (H, total_tokens) fp32
    delta_ptr,  # (H, total_tokens) fp32
    dqkv_ptr,  # (total_tokens, 3, H, D): its k and v thirds are written
    cu_seqlens_ptr,  # (B + 1,) int32
    slopes_ptr,  # (H,) fp32, or None
    B,
    H,
    total_tokens,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,  # queries of one step
    BLOCK_N: tl.constexpr,  # keys of one program
):
    """dk and dv for BLOCK_N keys of one head. Grid as in forward_kernel.

    Tiles are transposed, keys by queries, so that P^T and dS^T enter their products as they are.
    """
    is_tail, h, start, length = locate(cu_seqlens_ptr, B, H, total_tokens)
    row_stride = 3 * H * D
    dk_ptr = dqkv_ptr + start * row_stride + (H + h) * D
    dv_ptr = dk_ptr + H * D
    if is_tail:
        zero_rows(dk_ptr, length, row_stride, D, BLOCK_N)
        zero_rows(dv_ptr, length, row_stride, D, BLOCK_N)
        return
    if tl.program_id(1) * BLOCK_N >= length:
        return

    q_ptr = qkv_ptr + start * row_stride + h * D
    k_ptr, v_ptr = q_ptr + H * D, q_ptr + 2 * H * D
    dout_ptr += (start * H + h) * D
    lse_ptr += h.to(tl.int64) * total_tokens + start
    delta_ptr += h.to(tl.int64) * total_tokens + start
    scale, slope = LOG2E / D**0.5, load_slope(slopes_ptr, h)

    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = load_rows(k_ptr, offs_n, length, row_stride, D)  # (BLOCK_N, D)
    v = load_rows(v_ptr, offs_n, length, row_stride, D)  # (BLOCK_N, D)
    dk = tl.zeros((BLOCK_N, D), tl.float32)
    dv = tl.zeros((BLOCK_N, D), tl.float32)
    for start_m in range(0, length, BLOCK_M):
        # No mask: queries past the end add 0, since dout, dP and delta are 0 there; keys past it are not stored.
        offs_m = start_m + tl.arange(0, BLOCK_M)
        q = load_rows(q_ptr, offs_m, length, row_stride, D)  # (BLOCK_M, D)
        dout = load_rows(dout_ptr, offs_m, length, H * D, D)  # (BLOCK_M, D)
        lse = tl.load(lse_ptr + offs_m, mask=offs_m < length, other=0.0)
        delta = tl.load(delta_ptr + offs_m, mask=offs_m < length, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision="ieee") * scale  # (BLOCK_N, BLOCK_M)
        p = tl.exp2(s + alibi(offs_m[None, :], offs_n[:, None], slope) - lse[None, :])
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
        dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    store_rows(dk_ptr, offs_n, length, row_stride, D, dk / D**0.5)
    store_rows(dv_ptr, offs_n, length, row_stride, D, dv)


# Tiles of up to 128 x 64 that spill no registers, by tests/test_compile_kernels.py with Triton 3.6 and 3.9. Those for
# (64, 2) are the fastest of them on an H100 with Triton 3.6; the others have not been timed. fp32 is for checks, not for
# speed.
LAUNCH = {  # (head size, bytes per element): (BLOCK_M, BLOCK_N, num_warps, num_stages)
    "forward": {
        (16, 2): (128, 64, 8, 2),
        (32, 2): (128, 64, 8, 2),
        (64, 2): (128, 32, 4, 3),
        (128, 2): (128, 64, 8, 2),
        (16, 4): (32, 32, 4, 1),
        (32, 4): (32, 32, 4, 1),
        (64, 4): (32, 32, 4, 1),
        (128, 4): (32, 16, 8, 1),
    },
    "dq": {
        (16, 2): (128, 64, 8, 2),
        (32, 2): (128, 64, 8, 2),
        (64, 2): (128, 64, 8, 1),
        (128, 2): (64, 64, 8, 1),
        (16, 4): (32, 32, 4, 1),
        (32, 4): (32, 32, 8, 1),
        (64, 4): (32, 32, 8, 1),
        (128, 4): (16, 16, 8, 1),
    },
    "dkv": {
        (16, 2): (64, 128, 8, 2),
        (32, 2): (64, 128, 8, 2),
        (64, 2): (32, 128, 8, 1),
        (128, 2): (64, 64, 8, 1),
        (16, 4): (32, 32, 4, 1),
        (32, 4): (32, 32, 8, 1),
        (64, 4): (32, 32, 4, 1),
        (128, 4): (32, 32, 8, 1),
    },
}
# For GPUs with mma.sync, which keeps a tile's product in registers: the above would spill. Not timed.
LAUNCH_MMA_SYNC = {("forward", 32, 2): (64, 64, 4, 2), ("dq", 64, 2): (128, 32, 8, 2)}
HEAD_SIZES = sorted({head_size for head_size, _ in LAUNCH["forward"]})


def launch_config(name, D, element_size, major):
    """Launch constants of a kernel. major: the GPU's major compute capability."""
    values = LAUNCH[name][D, element_size]
    if major not in WARP_GROUP_MMA:
        values = LAUNCH_MMA_SYNC.get((name, D, element_size), values)
    return dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), values))


def compute_capability(tensor):
    """The major number of the tensor's GPU; elsewhere, as in the interpreter, that of a GPU with warp groups."""
    return torch.cuda.get_device_properties(tensor.device).major if tensor.is_cuda else WARP_GROUP_MMA[0]


def sizes(qkv, cu_seqlens):
    """The arguments of all kernels after their pointers: B, H, total_tokens, D."""
    total_tokens, _, H, D = qkv.shape
    return len(cu_seqlens) - 1, H, total_tokens, D


def grid(block, qkv, cu_seqlens, max_seqlen):
    """One program per head of each sequence and of the tail, and per block of rows."""
    return len(cu_seqlens) * qkv.shape[2], max(1, triton.cdiv(max_seqlen, block))


# The kernels as two PyTorch operators. Outputs start uninitialised: the kernels write every row.


@operator("flash_attention")
def flash_attention_op(qkv: Tensor, cu_seqlens: Tensor, slopes: Tensor | None, max_seqlen: int) -> tuple[Tensor, Tensor]:
    """(out, lse)"""
    total_tokens, _, H, D = qkv.shape
    out = torch.empty((total_tokens, H, D), dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty((H, total_tokens), dtype=torch.float32, device=qkv.device)
    cfg = launch_config("forward", qkv.shape[-1], qkv.element_size(), compute_capability(qkv))
    forward_kernel[grid(cfg["BLOCK_M"], qkv, cu_seqlens, max_seqlen)](
        qkv, out, lse, cu_seqlens, slopes, *sizes(qkv, cu_seqlens), **cfg
    )
    return out, lse


@operator("flash_attention_backward")
def flash_attention_backward_op(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, slopes: Tensor | None, max_seqlen: int
) -> Tensor:
    """dqkv"""
    dout = dout.contiguous()  # autograd passes any layout: sum() an expanded scalar
    dqkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    cfg = launch_config("dq", qkv.shape[-1], qkv.element_size(), compute_capability(qkv))
    dq_kernel[grid(cfg["BLOCK_M"], qkv, cu_seqlens, max_seqlen)](
        dout, qkv, out, lse, delta, dqkv, cu_seqlens, slopes, *sizes(qkv, cu_seqlens), **cfg
    )
    cfg = launch_config("dkv", qkv.shape[-1], qkv.element_size(), compute_capability(qkv))
    dkv_kernel[grid(cfg["BLOCK_N"], qkv, cu_seqlens, max_seqlen)](
        dout, qkv, lse, delta, dqkv, cu_seqlens, slopes, *sizes(qkv, cu_seqlens), **cfg
    )
    return dqkv


@flash_attention_op.register_fake
def _(qkv, cu_seqlens, slopes, max_seqlen):
    total_tokens, _, H, D = qkv.shape
    return qkv.new_empty(total_tokens, H, D), qkv.new_empty(H, total_tokens, dtype=torch.float32)


@flash_attention_backward_op.register_fake
def _(dout, qkv, out, lse, cu_seqlens, slopes, max_seqlen):
    return torch.empty_like(qkv)


class FlashAttention(torch.autograd.Function):
    """out, differentiable in qkv."""

    @staticmethod
    def forward(ctx, qkv, cu_seqlens, slopes, max_seqlen):
        out, lse = flash_attention_op(qkv, cu_seqlens, slopes, max_seqlen)
        ctx.max_seqlen = max_seqlen
        ctx.save_for_backward(qkv, out, lse, cu_seqlens, slopes)
        return out

    @staticmethod
    def backward(ctx, dout):
        return flash_attention_backward_op(dout, *ctx.saved_tensors, ctx.max_seqlen), None, None, None
