"""Pieces that the two kinds of attention kernels share: rows of one head, and the ALiBi bias.

Every program works on one head of some sequences; `offs` are rows counted from where its rows start.

Read next: kernels/attention_window.py
"""

import math

import torch

from kernels.backend import tl, triton

LOG2E = tl.constexpr(math.log2(math.e))  # exp(x) = exp2(x * LOG2E), and exp2 is what the hardware has
WARP_GROUP_MMA = (9, 10)  # compute capabilities, major, with wgmma or tcgen05; all others have mma.sync


@triton.jit
def row_ptrs(ptr, offs, row_stride, D: tl.constexpr):
    """(len(offs), D) pointers to whole rows of one head; 64-bit, as row number times stride outgrows 32 bits."""
    return ptr + offs.to(tl.int64)[:, None] * row_stride + tl.arange(0, D)[None, :]


@triton.jit
def load_rows(ptr, offs, length, row_stride, D: tl.constexpr):
    """(len(offs), D). Rows past the sequence read as 0: they are another sequence's, or nobody's."""
    return tl.load(row_ptrs(ptr, offs, row_stride, D), mask=offs[:, None] < length, other=0.0)


@triton.jit
def store_rows(ptr, offs, length, row_stride, D: tl.constexpr, tile):
    ptrs = row_ptrs(ptr, offs, row_stride, D)
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=offs[:, None] < length)


@triton.jit
def zero_rows(ptr, length, row_stride, D: tl.constexpr, BLOCK: tl.constexpr):
    """Write 0 to `length` rows: the programs of this head share them, each takes every num_programs-th block."""
    for first in range(tl.program_id(1) * BLOCK, length, tl.num_programs(1) * BLOCK):
        store_rows(ptr, first + tl.arange(0, BLOCK), length, row_stride, D, tl.zeros((BLOCK, D), tl.float32))


@triton.jit
def alibi(i, j, slope):
    """Bias of query position i towards key position j; i and j broadcast to a tile. slope: 0 for no bias."""
    return -slope * tl.abs(i - j).to(tl.float32)


@triton.jit
def load_slope(slopes_ptr, h):
    """The head's slope times LOG2E, like all scores here, since the kernels take exp2 where the formulas take exp."""
    if slopes_ptr is None:
        return 0.0
    else:
        return tl.load(slopes_ptr + h) * LOG2E


def compute_capability(tensor):
    """Its major number; of a GPU with warp groups for a tensor elsewhere, as in the interpreter."""
    return torch.cuda.get_device_properties(tensor.device).major if tensor.is_cuda else WARP_GROUP_MMA[0]
