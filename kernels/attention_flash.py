"""Attention for sequences of any length: FlashAttention-2 in Triton. Formulas and shapes: kernels/attention.py.

Nothing of size n x n reaches memory. Forward walks over the keys block by block with a running maximum m and sum l, and
rescales what it has when the maximum grows (algorithm 1 of the paper). It saves out and lse, D + 1 numbers per query and
head; backward recomputes P from q, k and lse (algorithm 2), which costs one more product and no memory.

Backward is two kernels: one owns a block of queries and sums dq over the keys, the other owns a block of keys and sums
dk and dv over the queries. Both compute S and dP; in return there are no atomics. Every result has one owner, which
sums in a fixed order, so equal inputs give equal bits.

A program owns a block of rows and walks over all blocks of the other side, one per step:

- A partial block, the sequence's last, comes first, in a loop of at most one step, with masks. The loop over full
  blocks has none; on Hopper and Blackwell TMA loads them, through descriptors.
- Positions count from the step's first row. A score of forward takes three instructions before its exponential: i - j;
  the product less slope * |i - j|; that times the scale, less the maximum.
- Programs that run side by side work on one sequence, so k and v come from memory once, and for its other blocks from
  the L2 cache: with U the size of q, forward moves 4 U, where reading k and v for each of 8 blocks would take 18 U.

Products accumulate in fp32; softmax and statistics are fp32; fp32 inputs are multiplied in full fp32, not TF32.

Source: Dao 2023, FlashAttention-2, arXiv 2307.08691.

Read next: kernels/attention_window.py
"""

import math

import torch
from torch import Tensor

from kernels.backend import TensorDescriptor, operator, tl, triton

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
def load_full(ptr, desc, first, row, column, row_stride, D: tl.constexpr, BLOCK: tl.constexpr):
    """(BLOCK, D) from row `first` of the sequence on, all of it inside; through a descriptor, if there is one.

    row, column: where in the descriptor's tensor ptr points.
    """
    if desc is None:
        return tl.load(row_ptrs(ptr, first + tl.arange(0, BLOCK), row_stride, D))
    else:
        return desc.load([row + first, column])


@triton.jit
def store_rows(ptr, offs, length, row_stride, D: tl.constexpr, tile):
    ptrs = row_ptrs(ptr, offs, row_stride, D)
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=offs[:, None] < length)


@triton.jit
def zero_rows(ptr, length, row_stride, D: tl.constexpr, BLOCK: tl.constexpr, block=0, num_blocks=1):
    """Zero `length` rows, shared by num_blocks programs: number `block` takes every num_blocks-th block of rows."""
    for first in range(block * BLOCK, length, num_blocks * BLOCK):
        store_rows(ptr, first + tl.arange(0, BLOCK), length, row_stride, D, tl.zeros((BLOCK, D), tl.float32))


@triton.jit
def alibi(i, j, slope):
    """Bias of query position i towards key position j, which broadcast to a tile. slope 0: no bias."""
    return -slope * tl.abs((i - j).to(tl.float32))


@triton.jit
def load_slope(slopes_ptr, h):
    """The head's slope times LOG2E, as all scores here: the kernels take exp2 where the formulas take exp."""
    if slopes_ptr is None:
        return 0.0
    else:
        return tl.load(slopes_ptr + h) * LOG2E


@triton.jit
def locate(cu_seqlens_ptr, B, H, total_tokens, num_blocks):
    """This program's work: (whether it is the tail, head, number of its block, start, length).

    Sequence number B is the tail: the rows past the last sequence, which become 0. Heads vary fastest, so programs that
    run side by side read neighbouring bytes of the same rows; then a sequence's blocks, which all read its k and v.
    """
    h, block, b = tl.program_id(0) % H, tl.program_id(0) // H % num_blocks, tl.program_id(0) // H // num_blocks
    start = tl.load(cu_seqlens_ptr + b)
    end = tl.load(cu_seqlens_ptr + b + 1, mask=b < B, other=total_tokens)
    return b == B, h, block, start.to(tl.int64), end - start


@triton.jit
def mask_keys(scores, offs_n, length):
    """Scores with -inf for keys past the end of the sequence."""
    return tl.where(offs_n[None, :] < length, scores, float("-inf"))


@triton.jit
def forward_step(q, k, v, acc, m_i, l_i, i, first, length, slope):
    """(acc, m_i, l_i) after a block of keys from position `first` on. i: the queries' positions, fp32.

    length: the sequence's, for a block that may reach beyond its end; None for one that does not.
    """
    scale: tl.constexpr = LOG2E / q.shape[1] ** 0.5
    j = tl.arange(0, k.shape[0])
    s = tl.dot(q, tl.trans(k), input_precision="ieee")  # (BLOCK_M, BLOCK_N), not yet scaled
    # Subtracted, since Triton would turn a sum into the product's accumulator, and need more registers.
    s -= alibi((i - first)[:, None], j.to(tl.float32)[None, :], -slope / scale)
    if length is not None:
        s = mask_keys(s, first + j, length)
    m_new = tl.maximum(m_i, tl.max(s, 1) * scale)  # finite: every block has a key inside the sequence
    alpha = tl.exp2(m_i - m_new)  # 0 in the first step
    p = tl.exp2(s * scale - m_new[:, None])
    l_i = l_i * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
    return acc, m_new, l_i


@triton.jit(do_not_specialize=["B", "H", "total_tokens", "num_blocks"])
def forward_kernel(
    qkv_ptr,  # (total_tokens, 3, H, D)
    kv_desc,  # (total_tokens, 3 * H * D) in tiles of (BLOCK_N, D), or None
    out_ptr,  # (total_tokens, H, D): written
    lse_ptr,  # (H, total_tokens) fp32: written, log2 of the softmax denominators
    cu_seqlens_ptr,  # (B + 1,) int32
    slopes_ptr,  # (H,) fp32, or None for no bias
    B,
    H,
    total_tokens,
    num_blocks,  # of the longest sequence
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,  # queries of one program
    BLOCK_N: tl.constexpr,  # keys of one step
):
    """out and lse for BLOCK_M queries of one head. Grid: ((B + 1) * num_blocks * H,)."""
    is_tail, h, block, start, length = locate(cu_seqlens_ptr, B, H, total_tokens, num_blocks)
    row_stride = 3 * H * D
    out_ptr += (start * H + h) * D
    if is_tail:
        zero_rows(out_ptr, length, H * D, D, BLOCK_M, block, num_blocks)
        return
    if block * BLOCK_M >= length:
        return

    q_ptr = qkv_ptr + start * row_stride + h * D
    k_ptr, v_ptr = q_ptr + H * D, q_ptr + 2 * H * D
    lse_ptr += h.to(tl.int64) * total_tokens + start
    slope, row, column = load_slope(slopes_ptr, h), start.to(tl.int32), h * D

    offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    i = offs_m.to(tl.float32)
    q = load_rows(q_ptr, offs_m, length, row_stride, D)  # (BLOCK_M, D)
    m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)  # largest score so far
    l_i = tl.zeros((BLOCK_M,), tl.float32)  # sum of exp2(score - m_i) so far
    acc = tl.zeros((BLOCK_M, D), tl.float32)  # sum of exp2(score - m_i) * v so far
    full = length // BLOCK_N * BLOCK_N
    for first in tl.range(full, length, BLOCK_N, num_stages=1):  # once or not at all
        offs_n = first + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, offs_n, length, row_stride, D)  # (BLOCK_N, D)
        v = load_rows(v_ptr, offs_n, length, row_stride, D)  # (BLOCK_N, D)
        acc, m_i, l_i = forward_step(q, k, v, acc, m_i, l_i, i, first, length, slope)
    for first in range(0, full, BLOCK_N):
        k = load_full(k_ptr, kv_desc, first, row, column + H * D, row_stride, D, BLOCK_N)  # (BLOCK_N, D)
        v = load_full(v_ptr, kv_desc, first, row, column + 2 * H * D, row_stride, D, BLOCK_N)  # (BLOCK_N, D)
        acc, m_i, l_i = forward_step(q, k, v, acc, m_i, l_i, i, first, None, slope)
    store_rows(out_ptr, offs_m, length, H * D, D, acc / l_i[:, None])
    tl.store(lse_ptr + offs_m, m_i + tl.log2(l_i), mask=offs_m < length)


@triton.jit
def dq_step(q, dout, k, v, dq, lse, delta, i, first, length, slope):
    """dq after a block of keys. i, first, length: as in forward_step."""
    scale: tl.constexpr = LOG2E / q.shape[1] ** 0.5
    j = tl.arange(0, k.shape[0])
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # (BLOCK_M, BLOCK_N)
    dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
    s += alibi((i - first)[:, None], j.to(tl.float32)[None, :], slope) - lse[:, None]
    if length is not None:
        s = mask_keys(s, first + j, length)
    ds = tl.exp2(s) * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit(do_not_specialize=["B", "H", "total_tokens", "num_blocks"])
def dq_kernel(
    dout_ptr,  # (total_tokens, H, D)
    qkv_ptr,  # (total_tokens, 3, H, D)
    kv_desc,  # as in forward_kernel
    out_ptr,  # (total_tokens, H, D)
    lse_ptr,  # (H, total_tokens) fp32
    delta_ptr,  # (H, total_tokens) fp32: written, for dkv_kernel
    dqkv_ptr,  # (total_tokens, 3, H, D): its q third is written
    cu_seqlens_ptr,  # (B + 1,) int32
    slopes_ptr,  # (H,) fp32, or None
    B,
    H,
    total_tokens,
    num_blocks,  # of the longest sequence
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,  # queries of one program
    BLOCK_N: tl.constexpr,  # keys of one step
):
    """delta and dq for BLOCK_M queries of one head. Grid as in forward_kernel."""
    is_tail, h, block, start, length = locate(cu_seqlens_ptr, B, H, total_tokens, num_blocks)
    row_stride = 3 * H * D
    dq_ptr = dqkv_ptr + start * row_stride + h * D
    if is_tail:
        zero_rows(dq_ptr, length, row_stride, D, BLOCK_M, block, num_blocks)
        return
    if block * BLOCK_M >= length:
        return

    q_ptr = qkv_ptr + start * row_stride + h * D
    k_ptr, v_ptr = q_ptr + H * D, q_ptr + 2 * H * D
    out_ptr += (start * H + h) * D
    dout_ptr += (start * H + h) * D
    lse_ptr += h.to(tl.int64) * total_tokens + start
    delta_ptr += h.to(tl.int64) * total_tokens + start
    slope, row, column = load_slope(slopes_ptr, h), start.to(tl.int32), h * D

    offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    i = offs_m.to(tl.float32)
    q = load_rows(q_ptr, offs_m, length, row_stride, D)  # (BLOCK_M, D)
    dout = load_rows(dout_ptr, offs_m, length, H * D, D)  # (BLOCK_M, D)
    out = load_rows(out_ptr, offs_m, length, H * D, D)  # (BLOCK_M, D)
    lse = tl.load(lse_ptr + offs_m, mask=offs_m < length, other=0.0)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    tl.store(delta_ptr + offs_m, delta, mask=offs_m < length)

    dq = tl.zeros((BLOCK_M, D), tl.float32)
    full = length // BLOCK_N * BLOCK_N
    for first in tl.range(full, length, BLOCK_N, num_stages=1):  # once or not at all
        offs_n = first + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, offs_n, length, row_stride, D)  # (BLOCK_N, D)
        v = load_rows(v_ptr, offs_n, length, row_stride, D)  # (BLOCK_N, D)
        dq = dq_step(q, dout, k, v, dq, lse, delta, i, first, length, slope)
    for first in range(0, full, BLOCK_N):
        k = load_full(k_ptr, kv_desc, first, row, column + H * D, row_stride, D, BLOCK_N)  # (BLOCK_N, D)
        v = load_full(v_ptr, kv_desc, first, row, column + 2 * H * D, row_stride, D, BLOCK_N)  # (BLOCK_N, D)
        dq = dq_step(q, dout, k, v, dq, lse, delta, i, first, None, slope)
    store_rows(dq_ptr, offs_m, length, row_stride, D, dq / D**0.5)


@triton.jit
def dkv_step(k, v, q, dout, dk, dv, lse, delta, j, slope):
    """(dk, dv) after a block of queries. j: the keys' positions, counted from its first row.

    Tiles are transposed, keys by queries, so that P^T and dS^T enter their products as they are.
    """
    scale: tl.constexpr = LOG2E / q.shape[1] ** 0.5
    s = tl.dot(k, tl.trans(q), input_precision="ieee") * scale  # (BLOCK_N, BLOCK_M)
    dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
    s += alibi(j[:, None], tl.arange(0, q.shape[0])[None, :], slope) - lse[None, :]
    p = tl.exp2(s)
    dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
    ds = p * (dp - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["B", "H", "total_tokens", "num_blocks"])
def dkv_kernel(
    dout_ptr,  # (total_tokens, H, D)
    qkv_ptr,  # (total_tokens, 3, H, D)
    q_desc,  # (total_tokens, 3 * H * D) in tiles of (BLOCK_M, D), or None
    dout_desc,  # (total_tokens, H * D), likewise
    lse_ptr,  # (H, total_tokens) fp32
    delta_ptr,  # (H, total_tokens) fp32
    dqkv_ptr,  # (total_tokens, 3, H, D): its k and v thirds are written
    cu_seqlens_ptr,  # (B + 1,) int32
    slopes_ptr,  # (H,) fp32, or None
    B,
    H,
    total_tokens,
    num_blocks,  # of the longest sequence
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,  # queries of one step
    BLOCK_N: tl.constexpr,  # keys of one program
):
    """dk and dv for BLOCK_N keys of one head. Grid as in forward_kernel.

    Scores take no mask: queries past the end add 0, since dout, dP and delta are 0 there; keys past it are not stored.
    """
    is_tail, h, block, start, length = locate(cu_seqlens_ptr, B, H, total_tokens, num_blocks)
    row_stride = 3 * H * D
    dk_ptr = dqkv_ptr + start * row_stride + (H + h) * D
    dv_ptr = dk_ptr + H * D
    if is_tail:
        zero_rows(dk_ptr, length, row_stride, D, BLOCK_N, block, num_blocks)
        zero_rows(dv_ptr, length, row_stride, D, BLOCK_N, block, num_blocks)
        return
    if block * BLOCK_N >= length:
        return

    q_ptr = qkv_ptr + start * row_stride + h * D
    k_ptr, v_ptr = q_ptr + H * D, q_ptr + 2 * H * D
    dout_ptr += (start * H + h) * D
    lse_ptr += h.to(tl.int64) * total_tokens + start
    delta_ptr += h.to(tl.int64) * total_tokens + start
    slope, row, column = load_slope(slopes_ptr, h), start.to(tl.int32), h * D

    offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = load_rows(k_ptr, offs_n, length, row_stride, D)  # (BLOCK_N, D)
    v = load_rows(v_ptr, offs_n, length, row_stride, D)  # (BLOCK_N, D)
    dk = tl.zeros((BLOCK_N, D), tl.float32)
    dv = tl.zeros((BLOCK_N, D), tl.float32)
    full = length // BLOCK_M * BLOCK_M
    for first in tl.range(full, length, BLOCK_M, num_stages=1):  # once or not at all
        offs_m = first + tl.arange(0, BLOCK_M)
        q = load_rows(q_ptr, offs_m, length, row_stride, D)  # (BLOCK_M, D)
        dout = load_rows(dout_ptr, offs_m, length, H * D, D)  # (BLOCK_M, D)
        lse = tl.load(lse_ptr + offs_m, mask=offs_m < length, other=0.0)
        delta = tl.load(delta_ptr + offs_m, mask=offs_m < length, other=0.0)
        dk, dv = dkv_step(k, v, q, dout, dk, dv, lse, delta, offs_n - first, slope)
    for first in range(0, full, BLOCK_M):
        offs_m = first + tl.arange(0, BLOCK_M)
        q = load_full(q_ptr, q_desc, first, row, column, row_stride, D, BLOCK_M)  # (BLOCK_M, D)
        dout = load_full(dout_ptr, dout_desc, first, row, column, H * D, D, BLOCK_M)  # (BLOCK_M, D)
        lse, delta = tl.load(lse_ptr + offs_m), tl.load(delta_ptr + offs_m)
        dk, dv = dkv_step(k, v, q, dout, dk, dv, lse, delta, offs_n - first, slope)
    store_rows(dk_ptr, offs_n, length, row_stride, D, dk / D**0.5)
    store_rows(dv_ptr, offs_n, length, row_stride, D, dv)


# Tiles that spill no registers, by tests/test_compile_kernels.py with Triton 3.6 and 3.9, but not timed. fp32 is for
# checks, not for speed.
LAUNCH = {  # (head size, bytes per element): (BLOCK_M, BLOCK_N, num_warps, num_stages)
    "forward": {
        (16, 2): (128, 64, 8, 2),
        (32, 2): (128, 64, 8, 2),
        (64, 2): (128, 32, 4, 3),
        (128, 2): (128, 64, 8, 2),
        (16, 4): (32, 16, 4, 1),
        (32, 4): (32, 16, 4, 1),
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
        (32, 4): (16, 32, 4, 1),
        (64, 4): (16, 32, 4, 1),
        (128, 4): (16, 32, 8, 1),
    },
}
# For Hopper the fastest of 106 variants on an H200 with Triton 3.6 (results/README.md, "attention_h200").
LAUNCH_HOPPER = {("forward", 64, 2): (64, 64, 4, 3), ("dq", 64, 2): (64, 64, 4, 3), ("dkv", 64, 2): (32, 64, 4, 3)}
# For GPUs with mma.sync, which keeps a tile's product in registers: those of LAUNCH would spill.
LAUNCH_MMA_SYNC = {
    ("forward", 16, 2): (64, 64, 4, 2),
    ("forward", 32, 2): (64, 64, 4, 2),
    ("forward", 128, 2): (64, 64, 8, 2),
    ("dq", 64, 2): (128, 32, 8, 2),
}
HEAD_SIZES = sorted({head_size for head_size, _ in LAUNCH["forward"]})


def launch_config(name, D, element_size, major):
    """Launch constants of a kernel. major: the GPU's major compute capability."""
    special = {9: LAUNCH_HOPPER, 10: {}}.get(major, LAUNCH_MMA_SYNC)
    values = special.get((name, D, element_size), LAUNCH[name][D, element_size])
    return dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), values))


def compute_capability(tensor):
    """The major number of the tensor's GPU; elsewhere, as in the interpreter, that of a GPU with warp groups."""
    return torch.cuda.get_device_properties(tensor.device).major if tensor.is_cuda else WARP_GROUP_MMA[0]


def takes_descriptors(element_size, major):
    """Whether the kernels load by TMA: it writes to shared memory, where wgmma and tcgen05 read; they take no fp32."""
    return element_size == 2 and major in WARP_GROUP_MMA


def tiles(tensor, rows, major):
    """The descriptor through which a kernel loads (rows, D) tiles of (total_tokens, ..., D), or None for pointers.

    Made by the CPU at each call, one in forward and three in backward, and passed by value, so CUDA graphs keep them.
    """
    if not takes_descriptors(tensor.element_size(), major):
        return None
    return TensorDescriptor.from_tensor(tensor.flatten(1), [rows, tensor.shape[-1]])


def launch(kernel, tensors, block, cfg, qkv, cu_seqlens, slopes, max_seqlen):
    """One program per head and block of rows of each sequence and of the tail. cfg: from launch_config."""
    total_tokens, _, H, D = qkv.shape
    B, num_blocks = len(cu_seqlens) - 1, max(1, triton.cdiv(max_seqlen, block))
    kernel[((B + 1) * num_blocks * H,)](*tensors, cu_seqlens, slopes, B, H, total_tokens, num_blocks, D, **cfg)


# The kernels as two PyTorch operators. Outputs start uninitialised: the kernels write every row.


@operator("flash_attention")
def flash_attention_op(qkv: Tensor, cu_seqlens: Tensor, slopes: Tensor | None, max_seqlen: int) -> tuple[Tensor, Tensor]:
    """(out, lse)"""
    total_tokens, _, H, D = qkv.shape
    out = torch.empty((total_tokens, H, D), dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty((H, total_tokens), dtype=torch.float32, device=qkv.device)
    major = compute_capability(qkv)
    cfg = launch_config("forward", D, qkv.element_size(), major)
    if total_tokens:
        tensors = qkv, tiles(qkv, cfg["BLOCK_N"], major), out, lse
        launch(forward_kernel, tensors, cfg["BLOCK_M"], cfg, qkv, cu_seqlens, slopes, max_seqlen)
    return out, lse


@operator("flash_attention_backward")
def flash_attention_backward_op(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, slopes: Tensor | None, max_seqlen: int
) -> Tensor:
    """dqkv"""
    dout = dout.contiguous()  # autograd passes any layout: sum() an expanded scalar
    dqkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    major, args = compute_capability(qkv), (qkv, cu_seqlens, slopes, max_seqlen)
    dq, dkv = (launch_config(name, qkv.shape[-1], qkv.element_size(), major) for name in ("dq", "dkv"))
    if len(qkv):
        tensors = dout, qkv, tiles(qkv, dq["BLOCK_N"], major), out, lse, delta, dqkv
        launch(dq_kernel, tensors, dq["BLOCK_M"], dq, *args)
        tensors = dout, qkv, tiles(qkv, dkv["BLOCK_M"], major), tiles(dout, dkv["BLOCK_M"], major), lse, delta, dqkv
        launch(dkv_kernel, tensors, dkv["BLOCK_N"], dkv, *args)
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
