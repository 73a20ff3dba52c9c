"""Bidirectional ALiBi attention over packed sequences: a plain PyTorch reference, and FlashAttention-2 in Triton.

For each head, and for each sequence of n tokens on its own, with q, k, v the (n, D) rows of that sequence:

    S_ij = q_i . k_j / sqrt(D) - slope * |i - j|            scores; the second term is ALiBi
    P_ij = exp(S_ij - lse_i),  lse_i = log sum_j exp S_ij   softmax over the keys j
    out  = P v

and with dout the gradient that comes in:

    dv    = P^T dout
    dP    = dout v^T
    delta = rowsum(P * dP) = rowsum(out * dout)             one number a query
    dS    = P * (dP - delta)
    dq    = dS k / sqrt(D)
    dk    = dS^T q / sqrt(D)

Nothing of size n x n reaches memory. Forward walks over the keys block by block with a running maximum m and sum l,
and rescales what it has when the maximum grows (algorithm 1 of the paper). It saves out and lse, D + 1 numbers a
query and head; backward recomputes P from q, k and lse (algorithm 2), which costs one more product and no memory.
Backward is two kernels: one owns a block of queries and sums dq over the keys, the other owns a block of keys and
sums dk and dv over the queries. Both compute S and dP, the price of needing no atomic additions: every result has one
owner that sums in a fixed order, so equal inputs give equal bits.

Shapes: qkv (total_tokens, 3, H, D) fp32, fp16 or bf16; cu_seqlens (B + 1,) int32, first 0; slopes (H,) fp32;
out (total_tokens, H, D). Products accumulate in fp32; softmax and statistics are fp32; fp32 inputs are multiplied in
full fp32, not TF32. Sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1]. It may be empty but not longer than
max_seqlen: the grid is made for that length without asking the device, and what exceeds it would stay unwritten. Rows
past the last sequence come back as 0, and so do their gradients.

Sequences of up to 128 tokens have faster kernels of their own where these run: kernels/attention_window.py.

Limits: D a power of two from 16 to 128; no dropout on P, no gradient for the slopes, no second derivative.
Tested: tests/test_attention.py, by Triton's interpreter on a CPU and compiled on a GPU; tests/test_compile_kernels.py
inspects the machine code for sm_80 to sm_120.

Source: Dao 2023, FlashAttention-2, arXiv 2307.08691; Press et al. 2022, ALiBi, arXiv 2108.12409, here with |i - j|
since both sides are visible.

Read next: kernels/attention_window.py
"""

import math

import torch
from torch import Tensor

from kernels.attention_pieces import LOG2E, WARP_GROUP_MMA, alibi, compute_capability, load_rows, load_slope, store_rows, zero_rows
from kernels.attention_window import WindowAttention, fits_window
from kernels.backend import operator, tl, triton, uses_triton



@torch.compiler.disable  # its loop over lengths would be compiled anew for every batch
def attention_reference(q, k, v, cu_seqlens, max_seqlen, slopes):
    """The same function in plain PyTorch, for any device, dtype and head size: CPU path and yardstick of the tests.

    q, k, v: (total_tokens, H, D). Sequences of equal length are computed together, as one batch of b sequences.
    """
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff()
    groups = [
        starts[lengths == n, None] + torch.arange(n, device=q.device)  # (b, n): their rows in the flat stream
        for n in lengths.unique().tolist()
    ]
    # One gather and one split for all groups: backward of a gather a group would fill a full-size buffer for each.
    order = torch.cat([rows.flatten() for rows in groups])
    split = [x[order].split([rows.numel() for rows in groups]) for x in (q, k, v)]
    pieces = []
    for rows, *qkv in zip(groups, *split):
        qn, kn, vn = (x.unflatten(0, rows.shape).transpose(1, 2) for x in qkv)  # (b, H, n, D)
        scores = (qn @ kn.mT).to(torch.promote_types(q.dtype, torch.float32)) / math.sqrt(q.shape[-1])  # (b, H, n, n)
        if slopes is not None:
            position = torch.arange(rows.shape[1], device=q.device)
            scores = scores - slopes[:, None, None] * (position[:, None] - position).abs()
        out = scores.softmax(-1).to(q.dtype) @ vn
        pieces.append(out.transpose(1, 2).flatten(0, 1))  # (b * n, H, D)
    return torch.zeros_like(q).index_copy(0, order, torch.cat(pieces))


# Pieces of the kernels. Every program works on one head of one sequence, so positions count from the sequence's start.


@triton.jit
def locate(cu_seqlens_ptr, B, H, total_tokens):
    """What this program works on: (whether it is the tail, head, start, length).

    Sequence number B is the tail, the rows past the last sequence, which are to become 0. Heads go fastest: programs
    that run side by side read neighbouring bytes of the same rows.
    """
    b, h = tl.program_id(0) // H, tl.program_id(0) % H
    start = tl.load(cu_seqlens_ptr + b)
    end = tl.load(cu_seqlens_ptr + b + 1, mask=b < B, other=total_tokens)
    return b == B, h, start.to(tl.int64), end - start


@triton.jit
def mask_keys(scores, offs_n, length):
    """Keys past the sequence get no weight."""
    return tl.where(offs_n[None, :] < length, scores, float("-inf"))


@triton.jit(do_not_specialize=["B", "H", "total_tokens"])
def forward_kernel(
    qkv_ptr,  # (total_tokens, 3, H, D)
    out_ptr,  # (total_tokens, H, D): written
    lse_ptr,  # (H, total_tokens) fp32: written, log2 of the softmax denominators
    cu_seqlens_ptr,  # (B + 1,) int32: sequence starts, and the end of the last
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
        m_new = tl.maximum(m_i, tl.max(s, 1))  # finite: each block has a key inside the sequence
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
    """dk and dv for BLOCK_N keys of one head. Grid: ((B + 1) * H, blocks of the longest sequence).

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
        # No mask: queries past the sequence add 0, as dout, dP and delta are 0 there; keys past it are not stored.
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


# Tiles of up to 128 x 64 that compile without spilling registers to memory, found with tests/test_compile_kernels.py,
# Triton 3.6 and 3.9. Those of (64, 2) are the fastest of such tiles on an H100 with Triton 3.6; the others have not
# been timed. fp32 is for checks, not for speed.
LAUNCH = {  # (head size, bytes an element): (BLOCK_M, BLOCK_N, num_warps, num_stages)
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
# Instead of the above where a tile's product stays in registers (mma.sync), which it then overflows. Not timed.
LAUNCH_MMA_SYNC = {("forward", 32, 2): (64, 64, 4, 2), ("dq", 64, 2): (128, 32, 8, 2)}
HEAD_SIZES = sorted({head_size for head_size, _ in LAUNCH["forward"]})


def launch_config(name, D, element_size, major):
    """Launch constants of a kernel; major: of the GPU's compute capability."""
    values = LAUNCH[name][D, element_size]
    if major not in WARP_GROUP_MMA:
        values = LAUNCH_MMA_SYNC.get((name, D, element_size), values)
    return dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), values))


def sizes(qkv, cu_seqlens):
    """The arguments that all kernels take after their pointers: B, H, total_tokens, D."""
    total_tokens, _, H, D = qkv.shape
    return len(cu_seqlens) - 1, H, total_tokens, D


def grid(block, qkv, cu_seqlens, max_seqlen):
    """A program for each head of each sequence and of the tail, and for each block of rows."""
    return len(cu_seqlens) * qkv.shape[2], max(1, triton.cdiv(max_seqlen, block))


# The kernels as two PyTorch operators, opaque to torch.compile. Outputs are not initialised: kernels write every row.


@operator("attention")
def attention_op(qkv: Tensor, cu_seqlens: Tensor, slopes: Tensor | None, max_seqlen: int) -> tuple[Tensor, Tensor]:
    """(out, lse)"""
    total_tokens, _, H, D = qkv.shape
    out = torch.empty((total_tokens, H, D), dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty((H, total_tokens), dtype=torch.float32, device=qkv.device)
    cfg = launch_config("forward", qkv.shape[-1], qkv.element_size(), compute_capability(qkv))
    forward_kernel[grid(cfg["BLOCK_M"], qkv, cu_seqlens, max_seqlen)](
        qkv, out, lse, cu_seqlens, slopes, *sizes(qkv, cu_seqlens), **cfg
    )
    return out, lse


@operator("attention_backward")
def attention_backward_op(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, slopes: Tensor | None, max_seqlen: int
) -> Tensor:
    """dqkv"""
    dout = dout.contiguous()  # autograd may hand over any layout: sum() gives an expanded scalar
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


@attention_op.register_fake
def _(qkv, cu_seqlens, slopes, max_seqlen):
    total_tokens, _, H, D = qkv.shape
    return qkv.new_empty(total_tokens, H, D), qkv.new_empty(H, total_tokens, dtype=torch.float32)


@attention_backward_op.register_fake
def _(dout, qkv, out, lse, cu_seqlens, slopes, max_seqlen):
    return torch.empty_like(qkv)


class Attention(torch.autograd.Function):
    """out, differentiable in qkv."""

    @staticmethod
    def forward(ctx, qkv, cu_seqlens, slopes, max_seqlen):
        out, lse = attention_op(qkv, cu_seqlens, slopes, max_seqlen)
        ctx.max_seqlen = max_seqlen
        ctx.save_for_backward(qkv, out, lse, cu_seqlens, slopes)
        return out

    @staticmethod
    def backward(ctx, dout):
        return attention_backward_op(dout, *ctx.saved_tensors, ctx.max_seqlen), None, None, None


def check_attention(q, k, v, cu_seqlens, slopes, windows=None):
    """Raises: ValueError for what neither the kernels nor the reference would understand."""
    if q.dim() != 3 or not q.shape == k.shape == v.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"attention: q, k, v have shapes {shapes}; expected (total_tokens, H, D) for each")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.dtype != torch.int32:
        got = f"{cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
        raise ValueError(f"attention: cu_seqlens is {got}; expected int32 of shape (B + 1,), B at least 1")
    if slopes is not None and slopes.shape != q.shape[1:2]:
        raise ValueError(f"attention: slopes have shape {tuple(slopes.shape)}; expected ({q.shape[1]},), one a head")
    if windows is not None and (windows.dim() != 1 or windows.shape[0] < 2 or windows.dtype != torch.int32):
        got = f"{windows.dtype} of shape {tuple(windows.shape)}"
        raise ValueError(f"attention: windows is {got}; expected what pack gives, int32 of shape (W + 1,)")
    for name, x in (("k", k), ("v", v), ("cu_seqlens", cu_seqlens), ("slopes", slopes), ("windows", windows)):
        if x is not None and x.device != q.device:
            raise ValueError(f"attention: {name} is on {x.device} but q on {q.device}")
        if name in "kv" and x.dtype != q.dtype:
            raise ValueError(f"attention: {name} is {x.dtype} but q {q.dtype}")


def check_attention_triton(qkv, slopes):
    """Raises: ValueError for inputs that only the reference takes."""
    limit = "attention: the Triton kernels take"
    if qkv.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"{limit} float32, float16 or bfloat16, not {qkv.dtype}")
    if qkv.shape[-1] not in HEAD_SIZES:
        raise ValueError(f"{limit} head sizes {HEAD_SIZES}, not {qkv.shape[-1]}")
    if not qkv.is_contiguous():
        raise ValueError(f"{limit} contiguous qkv only; call .contiguous() on it")
    if slopes is not None and slopes.dtype != torch.float32:
        raise ValueError(f"{limit} slopes in float32, not {slopes.dtype}")


def attention(q, k, v, cu_seqlens, max_seqlen, slopes, windows=None):
    """softmax(q k^T / sqrt(D) - slope * |i - j|) v in each sequence on its own; differentiable in q, k, v.

    q, k, v, result: (total_tokens, H, D). cu_seqlens: (B + 1,) int32, sequence b is rows cu_seqlens[b] to
    cu_seqlens[b + 1]; empty ones are allowed, none may be longer than max_seqlen. slopes: (H,) fp32, or None for no
    bias. windows: what common.batch.pack says of these sequences, on the same device: short ones are faster with it, and
    the result is the same. Rows past the last sequence are 0. For the kernels q, k, v are copied into one tensor;
    attention_qkvpacked saves that.
    """
    check_attention(q, k, v, cu_seqlens, slopes, windows)
    if uses_triton(q.device):
        return run_attention(torch.stack((q, k, v), dim=1), cu_seqlens, max_seqlen, slopes, windows)
    return attention_reference(q, k, v, cu_seqlens, max_seqlen, slopes)


def attention_qkvpacked(qkv, cu_seqlens, max_seqlen, slopes, windows=None):
    """attention of qkv (total_tokens, 3, H, D), contiguous; its gradient is one tensor of the same shape."""
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ValueError(f"attention: qkv has shape {tuple(qkv.shape)}; expected (total_tokens, 3, H, D)")
    q, k, v = qkv.unbind(1)
    check_attention(q, k, v, cu_seqlens, slopes, windows)
    if uses_triton(qkv.device):
        return run_attention(qkv, cu_seqlens, max_seqlen, slopes, windows)
    return attention_reference(q, k, v, cu_seqlens, max_seqlen, slopes)


def run_attention(qkv, cu_seqlens, max_seqlen, slopes, windows):
    """By the kernels: of windows where these fit, else of any length. Raises: ValueError for what neither takes."""
    check_attention_triton(qkv, slopes)
    if fits_window(qkv, max_seqlen):
        return WindowAttention.apply(qkv, cu_seqlens, windows, slopes)
    return Attention.apply(qkv, cu_seqlens, slopes, max_seqlen)
