"""Bidirectional ALiBi attention over packed sequences: the formula, a plain PyTorch reference, and the operator.

For each head, and for each sequence on its own, with q, k, v the (n, D) rows of its n tokens:

    S_ij = q_i . k_j / sqrt(D) - slope * |i - j|            scores; the second term is ALiBi
    P_ij = exp(S_ij - lse_i),  lse_i = log sum_j exp S_ij   softmax over the keys j
    out  = P v

and with dout the incoming gradient:

    dv    = P^T dout
    dP    = dout v^T
    delta = rowsum(P * dP) = rowsum(out * dout)             one number per query
    dS    = P * (dP - delta)
    dq    = dS k / sqrt(D)
    dk    = dS^T q / sqrt(D)

Sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1] of the stream. It may be empty. It must not be longer than
max_seqlen: the grid is sized for that without asking the device, and rows beyond it would stay unwritten. Rows past the
last sequence, the tail, come back as 0, and so do their gradients.

There are two implementations in Triton, neither of which writes anything of size n x n to memory: attention_flash.py for
any length, and attention_window.py, faster and for at most 128 tokens.

Limits: D = 16, 32, 64 or 128; no dropout on P, no gradient for the slopes, no second derivative.
Tested: tests/test_attention.py, by Triton's interpreter on a CPU and compiled on a GPU; tests/test_compile_kernels.py
inspects the machine code for sm_80 to sm_120.

Source: Press et al. 2022, ALiBi, arXiv 2108.12409, here with |i - j| since both sides are visible.

Read next: kernels/attention_flash.py
"""

import math

import torch

from kernels.attention_flash import HEAD_SIZES, FlashAttention
from kernels.attention_window import WindowAttention, fits_window
from kernels.backend import DTYPES, uses_triton


@torch.compiler.disable  # its loop over lengths would recompile for every batch
def attention_reference(q, k, v, cu_seqlens, max_seqlen, slopes):
    """`attention` in plain PyTorch, for any device, dtype and head size: the CPU path, and the yardstick of the tests.

    Sequences of equal length are computed together, as a batch of b sequences.
    """
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff()
    groups = [
        starts[lengths == n, None] + torch.arange(n, device=q.device)  # (b, n): their rows in the flat stream
        for n in lengths.unique().tolist()
    ]
    # One gather and one split for all groups: a gather per group would have backward fill a full-size buffer for each.
    order = torch.cat([rows.flatten() for rows in groups])
    split = [x[order].split([rows.numel() for rows in groups]) for x in (q, k, v)]
    outs = []
    for rows, *qkv in zip(groups, *split):
        qn, kn, vn = (x.unflatten(0, rows.shape).transpose(1, 2) for x in qkv)  # (b, H, n, D)
        scores = (qn @ kn.mT).to(torch.promote_types(q.dtype, torch.float32)) / math.sqrt(q.shape[-1])  # (b, H, n, n)
        if slopes is not None:
            position = torch.arange(rows.shape[1], device=q.device)
            scores = scores - slopes[:, None, None] * (position[:, None] - position).abs()
        out = scores.softmax(-1).to(q.dtype) @ vn
        outs.append(out.transpose(1, 2).flatten(0, 1))  # (b * n, H, D)
    return torch.zeros_like(q).index_copy(0, order, torch.cat(outs))


def check(q, k, v, cu_seqlens, slopes, windows):
    """Raises: ValueError for inputs that the backend in use cannot take."""
    if q.dim() != 3 or not q.shape == k.shape == v.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"attention: q, k, v have shapes {shapes}; expected (total_tokens, H, D) for each")
    for name, x, n in (("cu_seqlens", cu_seqlens, "B"), ("windows", windows, "W")):
        if x is not None and (x.dim() != 1 or x.shape[0] < 2 or x.dtype != torch.int32):
            got = f"{x.dtype} of shape {tuple(x.shape)}"
            raise ValueError(f"attention: {name} is {got}; expected int32 of shape ({n} + 1,), {n} at least 1")
    if slopes is not None and slopes.shape != q.shape[1:2]:
        raise ValueError(f"attention: slopes have shape {tuple(slopes.shape)}; expected ({q.shape[1]},), one per head")
    for name, x in (("k", k), ("v", v), ("cu_seqlens", cu_seqlens), ("slopes", slopes), ("windows", windows)):
        if x is not None and x.device != q.device:
            raise ValueError(f"attention: {name} is on {x.device} but q on {q.device}")
        if name in "kv" and x.dtype != q.dtype:
            raise ValueError(f"attention: {name} is {x.dtype} but q {q.dtype}")
    if not uses_triton(q.device):
        return
    limit = "attention: the Triton kernels take"
    if q.dtype not in DTYPES:
        raise ValueError(f"{limit} float32, float16 or bfloat16, not {q.dtype}")
    if q.shape[-1] not in HEAD_SIZES:
        raise ValueError(f"{limit} head sizes {HEAD_SIZES}, not {q.shape[-1]}")
    if slopes is not None and slopes.dtype != torch.float32:
        raise ValueError(f"{limit} slopes in float32, not {slopes.dtype}")


def attention_qkvpacked(qkv, cu_seqlens, max_seqlen, slopes, windows=None):
    """`attention` of q, k, v in one contiguous tensor, (total_tokens, 3, H, D); its gradient is one tensor too."""
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ValueError(f"attention: qkv has shape {tuple(qkv.shape)}; expected (total_tokens, 3, H, D)")
    q, k, v = qkv.unbind(1)
    check(q, k, v, cu_seqlens, slopes, windows)
    if not uses_triton(qkv.device):
        return attention_reference(q, k, v, cu_seqlens, max_seqlen, slopes)
    if not qkv.is_contiguous():
        raise ValueError("attention: the Triton kernels take contiguous qkv only; call .contiguous() on it")
    if fits_window(qkv, max_seqlen):
        return WindowAttention.apply(qkv, cu_seqlens, windows, slopes)
    return FlashAttention.apply(qkv, cu_seqlens, slopes, max_seqlen)


def attention(q, k, v, cu_seqlens, max_seqlen, slopes, windows=None):
    """softmax(q k^T / sqrt(D) - slope * |i - j|) v, in each sequence on its own; differentiable in q, k, v.

    q, k, v, and the result: (total_tokens, H, D) in fp32, fp16 or bf16. Products accumulate in fp32; softmax is fp32.
    cu_seqlens: (B + 1,) int32, starting with 0: see above. max_seqlen: no sequence is longer.
    slopes: (H,) fp32, or None for no bias.
    windows: (W + 1,) int32, from common.batch.pack: makes short sequences faster, with the same result.

    q, k, v are copied into one tensor, which attention_qkvpacked saves.
    Raises: ValueError for wrong shapes, dtypes or devices.
    """
    check(q, k, v, cu_seqlens, slopes, windows)
    return attention_qkvpacked(torch.stack((q, k, v), dim=1), cu_seqlens, max_seqlen, slopes, windows)
