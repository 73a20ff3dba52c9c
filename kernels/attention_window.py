"""Attention over sequences of up to 128 tokens: a window of whole sequences in one tile, and nothing twice.

The formulas are those of kernels/attention.py, for tokens i and j of one window:

    S_ij = q_i . k_j / sqrt(D) - slope * |i - j|  if i and j belong to one sequence, else -inf
    P    = softmax(S) by rows
    out  = P v

    dv    = P^T dout
    dP    = dout v^T
    delta = rowsum(P * dP)
    dS    = P * (dP - delta)
    dq    = dS k / sqrt(D)
    dk    = dS^T q / sqrt(D)

At this length memory bounds attention: at D = 64 forward does 64 operations a byte that it must move and backward 91,
where an H100 could do 200 and more. So the kernels move what they must and no more: forward reads q, k, v and writes
out; backward, one kernel, reads q, k, v, dout and writes dq, dk, dv. All keys of a query are in the tile. Its softmax
therefore needs no running maximum, and backward nothing that forward found out: it makes P again, and sums delta from P
and dP, where flash attention needs out and the softmax denominators. No two programs write one element: no atomic
additions, and equal inputs give equal bits.

A sequence of 20 tokens would fill a sixth of its tile. So neighbours share one: `windows` (W + 1,) int32 says that
window w is the sequences windows[w] to windows[w + 1], at most BLOCK tokens together. make_windows chooses them on the
CPU, where the lengths are known. Without windows, each sequence is one. Rows past the last sequence become 0.

Limits: bf16 and fp16, HEAD_SIZES, GPUs with WARP_GROUP_MMA; kernels/attention.py does the rest. A NaN or infinity in
one sequence reaches the others of its window, as 0 * NaN is NaN.
Tested: tests/test_attention.py, by Triton's interpreter on a CPU and compiled on a GPU; tests/test_compile_kernels.py
inspects the machine code.

Source: Dao 2023, arXiv 2307.08691, section 2.3, for the gradient; packing short sequences side by side: Krell et al.
2021, arXiv 2107.02027.

Read next: tests/test_attention.py
"""

import torch
from torch import Tensor

from kernels import tl, triton
from kernels.attention import (
    LOG2E,
    WARP_GROUP_MMA,
    alibi,
    compute_capability,
    load_rows,
    load_slope,
    store_rows,
    zero_rows,
)

BLOCK = 128  # tokens of a window, and rows and columns of its tile
WINDOW_MULTIPLE = 32  # windows are filled up by empty ones, so that there are few shapes

HEAD_SIZES = (16, 32, 64)  # of 2-byte elements
# No spilled registers, and two programs of forward fit an SM of sm_90 at once: found with tests/test_compile_kernels.py,
# Triton 3.6 and 3.9. Not timed yet.
LAUNCH = {"forward": {"num_warps": 8}, "backward": {"num_warps": 8}}


def make_windows(lengths, max_seqlen):
    """The windows of sequences with these lengths (a list or array of ints), greedily: (W + 1,) int32, on the CPU.

    None where sequences may be longer than a window.
    """
    if max_seqlen > BLOCK:
        return None
    bounds, num_tokens = [0], 0
    for b, length in enumerate(lengths):
        if num_tokens + length > BLOCK:
            bounds.append(b)
            num_tokens = 0
        num_tokens += length
    num_windows = -(-len(bounds) // WINDOW_MULTIPLE) * WINDOW_MULTIPLE
    return torch.tensor(bounds + [len(lengths)] * (num_windows + 1 - len(bounds)), dtype=torch.int32)


def fits_window(qkv, max_seqlen):
    """Whether the kernels below take these inputs."""
    if max_seqlen > BLOCK or qkv.shape[-1] not in HEAD_SIZES:
        return False
    if not qkv.is_cuda:  # the interpreter has no registers to run out of
        return True
    # With mma.sync, as on sm_80, 86, 89 and 120, backward's tile does not fit the registers.
    return qkv.element_size() == 2 and compute_capability(qkv) in WARP_GROUP_MMA


# Pieces of the kernels. A program works on one head of one window, and rows count from the window's start.


@triton.jit
def locate_window(windows_ptr, cu_seqlens_ptr, w):
    """(first sequence, one past the last, first row, number of rows) of window w."""
    if windows_ptr is None:
        b, b_end = w, w + 1
    else:
        b, b_end = tl.load(windows_ptr + w), tl.load(windows_ptr + w + 1)
    start = tl.load(cu_seqlens_ptr + b)
    return b, b_end, start.to(tl.int64), tl.load(cu_seqlens_ptr + b_end) - start


@triton.jit
def locate_sequences(cu_seqlens_ptr, b, b_end, start, offs, BLOCK: tl.constexpr):
    """(first, end), each (BLOCK,): the rows of each row's own sequence. Those past the window count as one more."""
    first = tl.zeros((BLOCK,), tl.int32)
    end = tl.full((BLOCK,), BLOCK, tl.int32)
    for i in range(b + 1, b_end + 1):
        border = (tl.load(cu_seqlens_ptr + i) - start).to(tl.int32)
        first = tl.where(offs < border, first, border)
        end = tl.where(offs < border, tl.minimum(end, border), end)
    return first, end


@triton.jit
def mask_others(scores, offs, first, end):
    """Keys of other sequences get no weight."""
    own = (offs[None, :] >= first[:, None]) & (offs[None, :] < end[:, None])
    return tl.where(own, scores, float("-inf"))


@triton.jit
def exponentials(q, k, offs, first, end, slope, D: tl.constexpr):
    """(BLOCK, BLOCK) exp(S - row maximum), and (BLOCK,) its row sums: their quotient is P."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * (LOG2E / D**0.5)
    # Converted here, not element by element; and each side by itself, which takes 40 registers less than the vector.
    bias = alibi(offs[:, None].to(tl.float32), offs[None, :].to(tl.float32), slope)
    s = mask_others(s + bias, offs, first, end)
    e = tl.exp2(s - tl.max(s, 1)[:, None])  # finite: every row has itself
    return e, tl.sum(e, 1)


@triton.jit(do_not_specialize=["W", "B", "H", "total_tokens"])
def forward_kernel(
    qkv_ptr,  # (total_tokens, 3, H, D)
    out_ptr,  # (total_tokens, H, D): written
    cu_seqlens_ptr,  # (B + 1,) int32
    windows_ptr,  # (W + 1,) int32, or None for one sequence each
    slopes_ptr,  # (H,) fp32, or None for no bias
    W,
    B,
    H,
    total_tokens,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out for one head of one window, or zeros for one head of the tail. Grid: ((W + 1) * H,)."""
    w, h = tl.program_id(0) // H, tl.program_id(0) % H
    row_stride = 3 * H * D
    if w == W:
        end = tl.load(cu_seqlens_ptr + B)
        zero_rows(out_ptr + (end.to(tl.int64) * H + h) * D, total_tokens - end, H * D, D, BLOCK)
        return
    b, b_end, start, length = locate_window(windows_ptr, cu_seqlens_ptr, w)
    if length <= 0:
        return

    q_ptr = qkv_ptr + start * row_stride + h * D
    offs = tl.arange(0, BLOCK)
    q = load_rows(q_ptr, offs, length, row_stride, D)  # (BLOCK, D)
    k = load_rows(q_ptr + H * D, offs, length, row_stride, D)  # (BLOCK, D)
    v = load_rows(q_ptr + 2 * H * D, offs, length, row_stride, D)  # (BLOCK, D)
    first, end = locate_sequences(cu_seqlens_ptr, b, b_end, start, offs, BLOCK)
    e, total = exponentials(q, k, offs, first, end, load_slope(slopes_ptr, h), D)
    out = tl.dot(e.to(v.dtype), v, input_precision="ieee") / total[:, None]
    store_rows(out_ptr + (start * H + h) * D, offs, length, H * D, D, out)


@triton.jit(do_not_specialize=["W", "B", "H", "total_tokens"])
def backward_kernel(
    dout_ptr,  # (total_tokens, H, D)
    qkv_ptr,  # (total_tokens, 3, H, D)
    dqkv_ptr,  # (total_tokens, 3, H, D): written
    cu_seqlens_ptr,  # (B + 1,) int32
    windows_ptr,  # (W + 1,) int32, or None
    slopes_ptr,  # (H,) fp32, or None
    W,
    B,
    H,
    total_tokens,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dq, dk, dv for one head of one window, or zeros for one head of the tail. Grid: ((W + 1) * H,)."""
    w, h = tl.program_id(0) // H, tl.program_id(0) % H
    row_stride = 3 * H * D
    if w == W:
        end = tl.load(cu_seqlens_ptr + B)
        dq_ptr = dqkv_ptr + end.to(tl.int64) * row_stride + h * D
        for part in tl.static_range(3):
            zero_rows(dq_ptr + part * H * D, total_tokens - end, row_stride, D, BLOCK)
        return
    b, b_end, start, length = locate_window(windows_ptr, cu_seqlens_ptr, w)
    if length <= 0:
        return

    q_ptr = qkv_ptr + start * row_stride + h * D
    dq_ptr = dqkv_ptr + start * row_stride + h * D
    offs = tl.arange(0, BLOCK)
    q = load_rows(q_ptr, offs, length, row_stride, D)  # (BLOCK, D)
    k = load_rows(q_ptr + H * D, offs, length, row_stride, D)  # (BLOCK, D)
    dout = load_rows(dout_ptr + (start * H + h) * D, offs, length, H * D, D)  # (BLOCK, D)
    v = load_rows(q_ptr + 2 * H * D, offs, length, row_stride, D)  # (BLOCK, D)
    first, end = locate_sequences(cu_seqlens_ptr, b, b_end, start, offs, BLOCK)
    e, total = exponentials(q, k, offs, first, end, load_slope(slopes_ptr, h), D)
    p = e / total[:, None]  # (BLOCK, BLOCK)
    # Each result is stored as soon as it is there, which frees its registers.
    dv = tl.dot(tl.trans(p.to(dout.dtype)), dout, input_precision="ieee")
    store_rows(dq_ptr + 2 * H * D, offs, length, row_stride, D, dv)
    dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
    delta = tl.sum(p * dp, 1)
    ds = (p * (dp - delta[:, None])).to(q.dtype)
    dq = tl.dot(ds, k, input_precision="ieee")
    store_rows(dq_ptr, offs, length, row_stride, D, dq / D**0.5)
    dk = tl.dot(tl.trans(ds), q, input_precision="ieee")
    store_rows(dq_ptr + H * D, offs, length, row_stride, D, dk / D**0.5)


def launch(kernel, options, tensors, qkv, cu_seqlens, windows, slopes):
    """A program for each head of each window, and of the tail."""
    total_tokens, _, H, D = qkv.shape
    B = len(cu_seqlens) - 1
    W = B if windows is None else len(windows) - 1
    kernel[((W + 1) * H,)](*tensors, cu_seqlens, windows, slopes, W, B, H, total_tokens, D, BLOCK, **options)


# The kernels as two PyTorch operators, opaque to torch.compile. Outputs are not initialised: kernels write every row.


@torch.library.custom_op("mosaicbert::window_attention", mutates_args=())
def window_attention_op(qkv: Tensor, cu_seqlens: Tensor, windows: Tensor | None, slopes: Tensor | None) -> Tensor:
    """out"""
    total_tokens, _, H, D = qkv.shape
    out = torch.empty((total_tokens, H, D), dtype=qkv.dtype, device=qkv.device)
    launch(forward_kernel, LAUNCH["forward"], (qkv, out), qkv, cu_seqlens, windows, slopes)
    return out


@torch.library.custom_op("mosaicbert::window_attention_backward", mutates_args=())
def window_attention_backward_op(
    dout: Tensor, qkv: Tensor, cu_seqlens: Tensor, windows: Tensor | None, slopes: Tensor | None
) -> Tensor:
    """dqkv"""
    dout = dout.contiguous()  # autograd may hand over any layout: sum() gives an expanded scalar
    dqkv = torch.empty_like(qkv)
    launch(backward_kernel, LAUNCH["backward"], (dout, qkv, dqkv), qkv, cu_seqlens, windows, slopes)
    return dqkv


@window_attention_op.register_fake
def _(qkv, cu_seqlens, windows, slopes):
    total_tokens, _, H, D = qkv.shape
    return qkv.new_empty(total_tokens, H, D)


@window_attention_backward_op.register_fake
def _(dout, qkv, cu_seqlens, windows, slopes):
    return torch.empty_like(qkv)


def setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def backward(ctx, dout):
    return window_attention_backward_op(dout, *ctx.saved_tensors), None, None, None


window_attention_op.register_autograd(backward, setup_context=setup_context)
