"""The last matrix product of the masked-language-model head and its cross-entropy as one operator.

For each row of hidden, with l its label:

    logits = hidden weight^T + bias                               (num_rows, V)
    loss   = sum over rows of log(sum_j exp(logits_j)) - logits_l

and with dloss the gradient that comes in, a single number:

    dlogits = softmax(logits) - onehot(l)                         0 in rows whose label is -100
    dhidden = dloss * dlogits weight,   dweight = dloss * dlogits^T hidden,   dbias = dloss * sum over rows of dlogits

dlogits without the factor dloss needs nothing that forward does not have. So forward writes it over the logits, and
backward scales only the three small results: of V values a row, one set exists at any time, in hidden's dtype. PyTorch
holds the logits, their float32 copy, its log-softmax and two gradients: 16 bytes a value more, 19 GB at 39,296 rows
of 30,528.

Shapes: hidden (num_rows, C) in fp32, fp16 or bf16; weight (V, C) and bias (V,) fp32; labels (num_rows,) int64, each
-100 or in 0..V-1; loss () fp32. All V columns count, a padded vocabulary's too: they are trained to be improbable, as
MosaicBERT's are. Arithmetic is fp32 but for the matrix products, of hidden's dtype. The one-hot is subtracted before
rounding. No second derivative.

Two kernels: one goes along each row for its sum of exponentials, one down the columns for the gradient, so that it can
sum the bias gradient on the way. They read the logits twice and write them once, as fast as memory allows. Measured on
an H100: going over a row twice in one kernel finds the row in the L2 cache, but the columns' sums then cost more than
that saves, by a pass of their own or by buffers in memory.

Tested: tests/test_cross_entropy.py, by Triton's interpreter on a CPU and compiled on a GPU.

Source: Devlin et al. 2019, BERT, section 3.1; Milakov and Gimelshein 2018, Online normalizer calculation for softmax,
arXiv 1805.02867.

Read next: tests/test_cross_entropy.py
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import tl, triton

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))
LOWEST = tl.constexpr(-1e30)  # below any score, and finite: a lane may see no score at all


def linear_cross_entropy_reference(hidden, weight, bias, labels):
    """The same function in plain PyTorch, for any device and dtype."""
    logits = F.linear(hidden, weight, bias)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="sum")


@triton.jit
def log_sum_kernel(
    logits_ptr,  # (num_rows, V)
    labels_ptr,  # (num_rows,) int64
    loss_ptr,  # (num_rows,) fp32: written
    log_sum_ptr,  # (num_rows,) fp32: written, log2 of the row's sum of exponentials; infinity if its label is -100
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,  # columns of one step
):
    row = tl.program_id(0)
    row_ptr = logits_ptr + row.to(tl.int64) * V
    # Each lane has 8 neighbouring columns, and a maximum and a sum of powers of 2 of its own.
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
    log_sum = row_max + tl.log2(tl.sum(s * tl.exp2(m - row_max), 0))
    label = tl.load(labels_ptr + row)
    score = tl.load(row_ptr + label, mask=label >= 0, other=0.0).to(tl.float32)
    tl.store(loss_ptr + row, tl.where(label >= 0, log_sum * LN2 - score, 0.0))
    tl.store(log_sum_ptr + row, tl.where(label >= 0, log_sum, float("inf")))


@triton.jit(do_not_specialize=["num_rows"])
def gradient_kernel(
    logits_ptr,  # (num_rows, V): read, and overwritten by its gradient
    labels_ptr,  # (num_rows,) int64
    log_sum_ptr,  # (num_rows,) fp32
    partial_ptr,  # (programs, V) fp32: written, each program's part of dbias
    num_rows,
    V: tl.constexpr,
    BLOCK_R: tl.constexpr,  # rows of one step
    BLOCK_V: tl.constexpr,  # columns of a program
):
    """Program (i, j) has the j-th block of columns and every num_programs(0)-th block of rows."""
    pid, programs = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, BLOCK_V)
    start = tl.program_id(1) * BLOCK_V
    total = tl.zeros((BLOCK_R, BLOCK_V), tl.float32)
    for block in range(pid * BLOCK_R, num_rows, programs * BLOCK_R):
        offs_r = block + tl.arange(0, BLOCK_R)
        rows = offs_r < num_rows
        label = tl.load(labels_ptr + offs_r, mask=rows, other=-100).to(tl.int32) - start  # (BLOCK_R,)
        log_sum = tl.load(log_sum_ptr + offs_r, mask=rows, other=float("inf"))  # (BLOCK_R,)
        mask = rows[:, None] & (start + columns < V)[None, :]
        ptrs = logits_ptr + offs_r.to(tl.int64)[:, None] * V + (start + columns)[None, :]
        x = tl.load(ptrs, mask=mask, other=float("-inf")).to(tl.float32)
        dx = tl.exp2(x * LOG2E - log_sum[:, None]) - tl.where(columns[None, :] == label[:, None], 1.0, 0.0)
        tl.store(ptrs, dx.to(logits_ptr.dtype.element_ty), mask=mask)
        total += dx  # 0 in rows that do not exist or do not count
    tl.store(partial_ptr + pid * V + start + columns, tl.sum(total, 0), mask=start + columns < V)


# Tiles have not been timed.
LOG_SUM = {"BLOCK_V": 2048, "num_warps": 4}
GRADIENT = {"BLOCK_R": 4, "BLOCK_V": 1024, "num_warps": 4}
PROGRAMS_PER_SM = 4  # of the gradient, all at work at once: its up to 128 registers a thread allow as many
PROGRAMS_ON_CPU = 8  # under the interpreter


def launch_config(V, name):
    """The constants of the "log_sum" or "gradient" kernel."""
    cfg = LOG_SUM if name == "log_sum" else GRADIENT
    return {"V": V, **cfg, "BLOCK_V": min(cfg["BLOCK_V"], max(8, triton.next_power_of_2(V)))}


def cross_entropy_(logits, labels):
    """(loss of each row, dbias): both fp32. The logits are overwritten by their gradients."""
    num_rows, V = logits.shape
    losses = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    log_sum = torch.empty_like(losses)
    log_sum_kernel[(num_rows,)](logits, labels, losses, log_sum, **launch_config(V, "log_sum"))
    cfg = launch_config(V, "gradient")
    programs, column_blocks = PROGRAMS_ON_CPU, triton.cdiv(V, cfg["BLOCK_V"])
    if logits.is_cuda:
        programs = PROGRAMS_PER_SM * torch.cuda.get_device_properties(logits.device).multi_processor_count
    programs = max(1, programs // column_blocks)
    partial = torch.empty((programs, V), dtype=torch.float32, device=logits.device)
    gradient_kernel[(programs, column_blocks)](logits, labels, log_sum, partial, num_rows, **cfg)
    return losses, partial.sum(0)


@torch.library.custom_op("mosaicbert::linear_cross_entropy", mutates_args=())
def linear_cross_entropy_op(
    hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, dlogits, dbias), the gradients without the factor dloss."""
    logits = F.linear(hidden, weight.to(hidden.dtype), bias.to(hidden.dtype))  # (num_rows, V)
    losses, dbias = cross_entropy_(logits, labels)
    return losses.sum(), logits, dbias


@linear_cross_entropy_op.register_fake
def _(hidden, weight, bias, labels):
    return bias.new_empty(()), hidden.new_empty(hidden.shape[0], weight.shape[0]), torch.empty_like(bias)


def setup_context(ctx, inputs, output):
    hidden, weight, _, _ = inputs
    _, dlogits, dbias = output
    ctx.save_for_backward(hidden, weight, dlogits, dbias)
    ctx.set_materialize_grads(False)  # only the loss has a gradient


def backward(ctx, dloss, *_):
    hidden, weight, dlogits, dbias = ctx.saved_tensors
    dloss = dloss.reshape(1)  # of one dimension it makes the products fp32; of none, it would itself become bf16
    dhidden = (dlogits @ weight.to(hidden.dtype) * dloss).to(hidden.dtype)
    return dhidden, dlogits.T @ hidden * dloss, dbias * dloss, None


linear_cross_entropy_op.register_autograd(backward, setup_context=setup_context)


def check_linear_cross_entropy(hidden, weight, bias, labels):
    """Raises: ValueError for what neither the kernel nor the reference would understand."""
    got = f"{tuple(hidden.shape)}, {tuple(weight.shape)}, {tuple(bias.shape)}, {tuple(labels.shape)}"
    if hidden.dim() != 2 or weight.dim() != 2 or labels.dtype != torch.int64 or not (
        hidden.shape[1] == weight.shape[1] and bias.shape == weight.shape[:1] and labels.shape == hidden.shape[:1]
    ):
        raise ValueError(
            f"linear_cross_entropy: hidden, weight, bias, labels have shapes {got}, labels {labels.dtype}; "
            "expected (num_rows, C), (V, C), (V,), (num_rows,) int64"
        )


def linear_cross_entropy_triton(hidden, weight, bias, labels):
    """The function by the kernel; differentiable in hidden, weight and bias.

    Raises: ValueError for inputs that only the reference takes.
    """
    limit = "linear_cross_entropy: the Triton kernel takes"
    if hidden.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"{limit} hidden in float32, float16 or bfloat16, not {hidden.dtype}")
    if weight.dtype != torch.float32 or bias.dtype != torch.float32:
        raise ValueError(f"{limit} weight and bias in float32, not {weight.dtype} and {bias.dtype}")
    return linear_cross_entropy_op(hidden, weight, bias, labels)[0]
