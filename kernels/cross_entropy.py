"""The last matrix product of the masked-language-model head and its cross-entropy, as one operator.

For each row of hidden, with l its label:

    logits = hidden weight^T + bias                               (num_rows, V)
    loss   = sum over rows of log(sum_j exp(logits_j)) - logits_l

and with dloss the incoming gradient, a scalar:

    dlogits = softmax(logits) - onehot(l)                         0 in rows whose label is -100
    dhidden = dloss * dlogits weight,   dweight = dloss * dlogits^T hidden,   dbias = dloss * sum over rows of dlogits

Apart from dloss, forward has all that dlogits needs. So it writes dlogits over the logits, and backward applies dloss
where it touches its small operands anyway: only one (num_rows, V) tensor ever exists, in hidden's dtype. PyTorch holds
the logits, a float32 copy, its log-softmax and two gradients: 16 bytes more per element, 19 GB at 39,296 rows of 30,528.

dbias comes from the product that gives dweight, by a column of ones beside hidden:

    [dweight, dbias] = dloss * dlogits^T [hidden, 1]

It is summed in fp32 and rounded once, like dweight, and needs no pass of its own over dlogits.

All V columns count, those of a padded vocabulary too: they are trained to be improbable, as MosaicBERT's are. Arithmetic
is fp32, except for the matrix products, which are in hidden's dtype. The one-hot is subtracted before rounding.

The kernel goes over a row twice, for its sum of exponentials and for its gradient. A row is 61 KB in bf16, and the rows
in progress stay in the caches: memory sees one read and one write.

Limits: no second derivative.
Tested: tests/test_cross_entropy.py, by Triton's interpreter on a CPU and compiled on a GPU.

Source: Devlin et al. 2019, BERT, section 3.1; Milakov and Gimelshein 2018, Online normalizer calculation for softmax,
arXiv 1805.02867.

Read next: prepare_c4.py
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import DTYPES, operator, tl, triton, uses_triton

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))
LOWEST = tl.constexpr(-1e30)  # below any logit, and finite: a lane may see no logit at all
ONES = 8  # columns of ones beside hidden: one would do, but the matrix units like rows of a multiple of 16 bytes


def linear_cross_entropy_reference(hidden, weight, bias, labels):
    """The same function in plain PyTorch, for any device and dtype."""
    logits = F.linear(hidden, weight, bias)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="sum")


@triton.jit
def cross_entropy_kernel(
    logits_ptr,  # (num_rows, V): read, and overwritten by their gradient
    labels_ptr,  # (num_rows,) int64
    loss_ptr,  # (num_rows,) fp32: written
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,  # columns of one step
):
    """One row. Grid: (num_rows,)."""
    row = tl.program_id(0)
    row_ptr = logits_ptr + row.to(tl.int64) * V
    label = tl.load(labels_ptr + row).to(tl.int32)
    # Loaded before the first reduction over the program's threads: after it, one of them may overwrite this logit.
    label_logit = tl.load(row_ptr + label, mask=label >= 0, other=0.0).to(tl.float32)
    # Each lane takes 8 adjacent columns, and keeps its own maximum and sum of powers of 2.
    m = tl.full((BLOCK_V // 8,), LOWEST, tl.float32)
    s = tl.zeros((BLOCK_V // 8,), tl.float32)
    for start in range(0, V, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        x = tl.load(row_ptr + offs_v, mask=offs_v < V, other=float("-inf")).to(tl.float32)
        x = tl.reshape(x, (BLOCK_V // 8, 8))
        m_new = tl.maximum(m, tl.max(x, 1) * LOG2E)
        s = s * tl.exp2(m - m_new) + tl.sum(tl.exp2(x * LOG2E - m_new[:, None]), 1)
        m = m_new
    row_max = tl.max(m, 0)
    log_sum = row_max + tl.log2(tl.sum(s * tl.exp2(m - row_max), 0))  # log2 of the sum of exponentials
    tl.store(loss_ptr + row, tl.where(label >= 0, log_sum * LN2 - label_logit, 0.0))
    log_sum = tl.where(label >= 0, log_sum, float("inf"))  # makes the gradient 0
    for start in range(0, V, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        x = tl.load(row_ptr + offs_v, mask=offs_v < V, other=float("-inf")).to(tl.float32)
        dx = tl.exp2(x * LOG2E - log_sum) - tl.where(offs_v == label, 1.0, 0.0)
        tl.store(row_ptr + offs_v, dx.to(logits_ptr.dtype.element_ty), mask=offs_v < V)


# Measured on an H100 with 39,296 rows of 30,528 in bf16: 1.63 ms, 99 % of a copy's speed. 16,384 columns and 16 warps take
# 1.65, 8,192 and 16 take 2.19, and keeping the row in registers 1.76 at best.
BLOCK_V, WARPS = 32768, 32  # columns of one step, and the warps that share them


def launch_config(V):
    """Launch constants of the kernel. A small V gets fewer warps, with as many columns each."""
    block = min(BLOCK_V, max(BLOCK_V // WARPS, triton.next_power_of_2(V)))
    return {"V": V, "BLOCK_V": block, "num_warps": block * WARPS // BLOCK_V}


def cross_entropy_(logits, labels):
    """The loss of each row, (num_rows,) fp32. Its gradient overwrites the logits."""
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    cross_entropy_kernel[(len(logits),)](logits, labels, losses, **launch_config(logits.shape[1]))
    return losses


# Forward and backward as PyTorch operators.


@operator("linear_cross_entropy")
def linear_cross_entropy_op(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, dlogits), the latter without the factor dloss."""
    logits = F.linear(hidden, weight.to(hidden.dtype), bias.to(hidden.dtype))  # (num_rows, V)
    return cross_entropy_(logits, labels).sum(), logits


@linear_cross_entropy_op.register_fake
def _(hidden, weight, bias, labels):
    return bias.new_empty(()), hidden.new_empty(hidden.shape[0], weight.shape[0])


@operator("linear_cross_entropy_backward")
def linear_cross_entropy_backward_op(
    dloss: Tensor, hidden: Tensor, weight: Tensor, dlogits: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dhidden, dweight, dbias)"""
    num_rows, C = hidden.shape
    dhidden = dlogits @ torch.mul(weight, dloss, out=torch.empty_like(weight, dtype=hidden.dtype))
    product = dlogits.T @ torch.cat((hidden, hidden.new_ones(num_rows, ONES)), 1)  # (V, C + ONES)
    dloss = dloss.reshape(1)  # a 1-D fp32 tensor promotes the results to fp32, a scalar would be cast to bf16
    return dhidden, product[:, :C] * dloss, product[:, C] * dloss


@linear_cross_entropy_backward_op.register_fake
def _(dloss, hidden, weight, dlogits):
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape), weight.new_empty(len(weight))


class LinearCrossEntropy(torch.autograd.Function):
    """loss, differentiable in hidden, weight and bias."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels):
        loss, dlogits = linear_cross_entropy_op(hidden, weight, bias, labels)
        ctx.save_for_backward(hidden, weight, dlogits)
        return loss

    @staticmethod
    def backward(ctx, dloss):
        return *linear_cross_entropy_backward_op(dloss, *ctx.saved_tensors), None


def linear_cross_entropy(hidden, weight, bias, labels):
    """Cross-entropy of hidden weight^T + bias and labels in nats, summed over rows: () fp32; differentiable.

    hidden: (num_rows, C) in fp32, fp16 or bf16, which is also the dtype of the matrix products.
    weight: (V, C) and bias: (V,), fp32. labels: (num_rows,) int64, each in 0..V-1, or -100 for a row that doesn't count.

    Raises: ValueError for wrong shapes or dtypes.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or labels.dtype != torch.int64 or not (
        hidden.shape[1] == weight.shape[1] and bias.shape == weight.shape[:1] and labels.shape == hidden.shape[:1]
    ):
        got = f"{tuple(hidden.shape)}, {tuple(weight.shape)}, {tuple(bias.shape)}, {tuple(labels.shape)}"
        raise ValueError(
            f"linear_cross_entropy: hidden, weight, bias, labels have shapes {got}, labels {labels.dtype}; "
            "expected (num_rows, C), (V, C), (V,), (num_rows,) int64"
        )
    if not uses_triton(hidden.device):
        return linear_cross_entropy_reference(hidden, weight, bias, labels)
    limit = "linear_cross_entropy: the Triton kernel takes"
    if hidden.dtype not in DTYPES:
        raise ValueError(f"{limit} hidden in float32, float16 or bfloat16, not {hidden.dtype}")
    if weight.dtype != torch.float32 or bias.dtype != torch.float32:
        raise ValueError(f"{limit} weight and bias in float32, not {weight.dtype} and {bias.dtype}")
    return LinearCrossEntropy.apply(hidden, weight, bias, labels)
