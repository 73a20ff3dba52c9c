"""Attention for sequences of up to 128 tokens: whole sequences in one tile. Formulas and shapes: kernels/attention.py.

At this length attention is memory-bound: at D = 64 forward does 64 operations per byte it must move and backward 91,
where an H100 could do 200 and more. So the kernels move what they must and nothing twice: forward reads q, k, v and
writes out; backward, a single kernel, reads q, k, v, dout and writes dq, dk, dv. All keys of a query are in its tile, so
softmax needs no running maximum, and backward needs nothing from forward: it recomputes P, and sums delta from P and dP,
where flash attention needs out and the softmax denominators. No two programs write the same element: no atomics, and
equal inputs give equal bits.

A sequence of 20 tokens would fill a sixth of its tile, so neighbours share one: `windows` (W + 1,) int32 says that window
w holds sequences windows[w] to windows[w + 1], at most BLOCK tokens together. common/batch.py's `pack` chooses them on
the CPU, where the lengths are known. Tokens of different sequences get a score of -inf. Without windows, each sequence
is one.

Limits: bf16 and fp16, HEAD_SIZES, Hopper GPUs; attention_flash.py does the rest. A NaN or infinity in one row reaches
the sequences of its window, and those less than BLOCK rows before it: 0 * NaN is NaN.

Source: Dao 2023, arXiv 2307.08691, section 2.3, for the gradient; packing short sequences side by side: Krell et al.
2021, arXiv 2107.02027.

Read next: kernels/layernorm.py
"""

import torch
from torch import Tensor

from common.batch import WINDOW as BLOCK
from kernels.attention_flash import LOG2E, alibi, compute_capability, load_slope, store_rows, zero_rows
from kernels.backend import TensorDescriptor, operator, tl, triton

HEAD_SIZES = (16, 32, 64)  # of 2-byte elements
MANY_WINDOWS = 264  # two per SM of an H100
# The fastest of 26 variants without spills on an H100 with Triton 3.6 (results/kernel_variants_h100.txt): 2.3 + 5.1 ns
# per token for 12 heads of 64 and full windows; memory traffic alone takes 5.6. With one program per head, each waiting
# for its loads: 2.7 + 7.3; attention_flash.py as it was then: 2.3 + 7.8.
LAUNCH = {"forward": {"STAGES": 3, "num_warps": 8}, "backward": {"STAGES": 2, "num_warps": 8}}


def fits_window(qkv, max_seqlen):
    """Whether these kernels take the inputs."""
    if max_seqlen > BLOCK or qkv.shape[-1] not in HEAD_SIZES:
        return False
    if not qkv.is_cuda:  # the interpreter has no registers to run out of
        return True
    # Other GPUs have no TMA, or too few registers for backward's tile; sm_100 spills some and was not tried.
    return qkv.element_size() == 2 and compute_capability(qkv) == 9


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
    """(first, end), each (BLOCK,): where each row's own sequence starts and ends. Rows past the window count as one."""
    first = tl.zeros((BLOCK,), tl.int32)
    end = tl.full((BLOCK,), BLOCK, tl.int32)
    for i in range(b + 1, b_end + 1):
        border = (tl.load(cu_seqlens_ptr + i) - start).to(tl.int32)
        first = tl.where(offs < border, first, border)
        end = tl.where(offs < border, tl.minimum(end, border), end)
    return first, end


@triton.jit
def mask_others(scores, offs, first, end):
    """Scores with -inf for keys of other sequences."""
    own = (offs[None, :] >= first[:, None]) & (offs[None, :] < end[:, None])
    return tl.where(own, scores, float("-inf"))


@triton.jit
def exponentials(q, k, offs, first, end, slope, D: tl.constexpr):
    """exp(S - row maximum), (BLOCK, BLOCK), and its row sums, (BLOCK,): the quotient is P. slope: from load_slope."""
    scale = LOG2E / D**0.5
    position = offs.to(tl.float32)  # converted here, not once per element of the tile
    s = tl.dot(q, tl.trans(k), input_precision="ieee") + alibi(position[:, None], position[None, :], slope / scale)
    s = mask_others(s, offs, first, end)
    e = tl.exp2(s * scale - (tl.max(s, 1) * scale)[:, None])  # finite: each row sees itself
    return e, tl.sum(e, 1)


# Both kernels load whole tiles through descriptors (TMA): rows past the window are a neighbour's and masked, or past the
# tensor and 0. While a program works on one head, the next heads' tiles are being loaded: an SM has registers for one
# program, which would otherwise wait for every load.


@triton.jit(do_not_specialize=["W", "B", "total_tokens", "heads"])
def forward_kernel(
    qkv_desc,  # (total_tokens, 3 * H * D), in tiles of (BLOCK, D)
    out_ptr,  # (total_tokens, H, D): written
    cu_seqlens_ptr,  # (B + 1,) int32
    windows_ptr,  # (W + 1,) int32, or None for one sequence each
    slopes_ptr,  # (H,) fp32, or None for no bias
    W,
    B,
    H: tl.constexpr,
    total_tokens,
    heads,  # of one program; H is a multiple
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,  # heads in flight: one is computed, the others' tiles are being loaded
):
    """out for some heads of one window, or of the tail, where it is 0. Grid: ((W + 1) * H / heads,)."""
    w, h0 = tl.program_id(0) // (H // heads), tl.program_id(0) % (H // heads) * heads
    C = H * D
    if w == W:
        end = tl.load(cu_seqlens_ptr + B)
        for h in range(h0, h0 + heads):
            zero_rows(out_ptr + end.to(tl.int64) * C + h * D, total_tokens - end, C, D, BLOCK)
        return
    b, b_end, start, length = locate_window(windows_ptr, cu_seqlens_ptr, w)
    if length <= 0:
        return

    row, offs = start.to(tl.int32), tl.arange(0, BLOCK)
    first, end = locate_sequences(cu_seqlens_ptr, b, b_end, start, offs, BLOCK)
    for h in tl.range(h0, h0 + heads, num_stages=STAGES, disable_licm=True):
        q = qkv_desc.load([row, h * D])  # (BLOCK, D)
        k = qkv_desc.load([row, h * D + C])  # (BLOCK, D)
        v = qkv_desc.load([row, h * D + 2 * C])  # (BLOCK, D)
        e, total = exponentials(q, k, offs, first, end, load_slope(slopes_ptr, h), D)
        out = tl.dot(e.to(v.dtype), v, input_precision="ieee") / total[:, None]
        store_rows(out_ptr + start * C + h * D, offs, length, C, D, out)


@triton.jit(do_not_specialize=["W", "B", "total_tokens", "heads"])
def backward_kernel(
    dout_desc,  # (total_tokens, H * D), in tiles of (BLOCK, D)
    qkv_desc,  # (total_tokens, 3 * H * D), likewise
    dqkv_ptr,  # (total_tokens, 3, H, D): written
    cu_seqlens_ptr,  # (B + 1,) int32
    windows_ptr,  # (W + 1,) int32, or None
    slopes_ptr,  # (H,) fp32, or None
    W,
    B,
    H: tl.constexpr,
    total_tokens,
    heads,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dq, dk, dv for some heads of one window, or of the tail. Grid as in forward_kernel."""
    w, h0 = tl.program_id(0) // (H // heads), tl.program_id(0) % (H // heads) * heads
    C = H * D
    if w == W:
        end = tl.load(cu_seqlens_ptr + B)
        for h in range(h0, h0 + heads):
            dq_ptr = dqkv_ptr + end.to(tl.int64) * 3 * C + h * D
            for part in tl.static_range(3):
                zero_rows(dq_ptr + part * C, total_tokens - end, 3 * C, D, BLOCK)
        return
    b, b_end, start, length = locate_window(windows_ptr, cu_seqlens_ptr, w)
    if length <= 0:
        return

    row, offs = start.to(tl.int32), tl.arange(0, BLOCK)
    first, end = locate_sequences(cu_seqlens_ptr, b, b_end, start, offs, BLOCK)
    for h in tl.range(h0, h0 + heads, num_stages=STAGES, disable_licm=True):
        q = qkv_desc.load([row, h * D])  # (BLOCK, D)
        k = qkv_desc.load([row, h * D + C])  # (BLOCK, D)
        dout = dout_desc.load([row, h * D])  # (BLOCK, D)
        v = qkv_desc.load([row, h * D + 2 * C])  # (BLOCK, D)
        dq_ptr = dqkv_ptr + start * 3 * C + h * D
        e, total = exponentials(q, k, offs, first, end, load_slope(slopes_ptr, h), D)
        p = e / total[:, None]  # (BLOCK, BLOCK)
        # Each result is stored as soon as it is computed, which frees its registers.
        dv = tl.dot(tl.trans(p.to(q.dtype)), dout, input_precision="ieee")
        store_rows(dq_ptr + 2 * C, offs, length, 3 * C, D, dv)
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        ds = (p * (dp - tl.sum(p * dp, 1)[:, None])).to(q.dtype)
        dq = tl.dot(ds, k, input_precision="ieee")
        store_rows(dq_ptr, offs, length, 3 * C, D, dq / D**0.5)
        dk = tl.dot(tl.trans(ds), q, input_precision="ieee")
        store_rows(dq_ptr + C, offs, length, 3 * C, D, dk / D**0.5)


def tiles(tensor):
    """The descriptor through which the kernels load (BLOCK, D) tiles of (total_tokens, ..., D)."""
    return TensorDescriptor.from_tensor(tensor.flatten(1), [BLOCK, tensor.shape[-1]])


def launch(kernel, name, tensors, qkv, cu_seqlens, windows, slopes):
    """One program per window and one for the tail; one per head of each where that would leave SMs idle."""
    total_tokens, _, H, D = qkv.shape
    B = len(cu_seqlens) - 1
    W = B if windows is None else len(windows) - 1
    heads = H if W >= MANY_WINDOWS else 1
    sizes = W, B, H, total_tokens, heads, D, BLOCK
    kernel[((W + 1) * (H // heads),)](*tensors, cu_seqlens, windows, slopes, *sizes, **LAUNCH[name])


# The kernels as two PyTorch operators. Outputs start uninitialised: the kernels write every row.


@operator("window_attention")
def window_attention_op(qkv: Tensor, cu_seqlens: Tensor, windows: Tensor | None, slopes: Tensor | None) -> Tensor:
    """out"""
    total_tokens, _, H, D = qkv.shape
    out = torch.empty((total_tokens, H, D), dtype=qkv.dtype, device=qkv.device)
    if total_tokens:
        launch(forward_kernel, "forward", (tiles(qkv), out), qkv, cu_seqlens, windows, slopes)
    return out


@operator("window_attention_backward")
def window_attention_backward_op(
    dout: Tensor, qkv: Tensor, cu_seqlens: Tensor, windows: Tensor | None, slopes: Tensor | None
) -> Tensor:
    """dqkv"""
    dout = dout.contiguous()  # autograd passes any layout: sum() an expanded scalar
    dqkv = torch.empty_like(qkv)
    if len(qkv):
        launch(backward_kernel, "backward", (tiles(dout), tiles(qkv), dqkv), qkv, cu_seqlens, windows, slopes)
    return dqkv


@window_attention_op.register_fake
def _(qkv, cu_seqlens, windows, slopes):
    total_tokens, _, H, D = qkv.shape
    return qkv.new_empty(total_tokens, H, D)


@window_attention_backward_op.register_fake
def _(dout, qkv, cu_seqlens, windows, slopes):
    return torch.empty_like(qkv)


class WindowAttention(torch.autograd.Function):
    """out, differentiable in qkv."""

    @staticmethod
    def forward(ctx, qkv, cu_seqlens, windows, slopes):
        ctx.save_for_backward(qkv, cu_seqlens, windows, slopes)
        return window_attention_op(qkv, cu_seqlens, windows, slopes)

    @staticmethod
    def backward(ctx, dout):
        return window_attention_backward_op(dout, *ctx.saved_tensors), None, None, None
