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

The kernel goes over each row twice: for the maximum and the sum of exponentials, kept by each lane for itself, then
for the gradient. The second time the row comes from the L2 cache, so memory traffic is one read and one write.

dbias: each program adds up its rows' gradients in a buffer of its own, V floats that stay in the cache, and PyTorch
then sums those in a fixed order. Summing dlogits by columns afterwards would read all of it again.

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
LOWEST = tl.constexpr(-1e30)  # below any score, and finite: a lane may have minus infinities alone


def linear_cross_entropy_reference(hidden, weight, bias, labels):
    """The same function in plain PyTorch, for any device and dtype."""
    logits = F.linear(hidden, weight, bias)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="sum")


@triton.jit(do_not_specialize=["num_rows"])
def cross_entropy_kernel(
    logits_ptr,  # (num_rows, V): read, and overwritten by its gradient
    labels_ptr,  # (num_rows,) int64
    loss_ptr,  # (num_rows,) fp32: written
    dbias_ptr,  # (programs, V) fp32, zeros: each program's rows of gradients are added; or None
    num_rows,
    V: tl.constexpr,
    BLOCK_R: tl.constexpr,  # rows a program handles at once
    BLOCK_V: tl.constexpr,  # columns of one step
    STAGES: tl.constexpr,  # steps whose loads are under way at once
):
    pid, programs = tl.program_id(0), tl.num_programs(0)
    for block in range(pid * BLOCK_R, num_rows, programs * BLOCK_R):
        offs_r = block + tl.arange(0, BLOCK_R)
        rows = offs_r < num_rows
        label = tl.load(labels_ptr + offs_r, mask=rows, other=-100)  # (BLOCK_R,)
        row_ptrs = logits_ptr + offs_r.to(tl.int64) * V
        counts = label >= 0
        # Read before the barriers of the sums below, after which another thread may overwrite it.
        label_score = tl.load(row_ptrs + label, mask=counts, other=0.0).to(tl.float32) * LOG2E

        # Scores in units of ln 2. Each lane has 8 neighbouring columns, and a maximum and a sum of its own.
        m = tl.full((BLOCK_R, BLOCK_V // 8), LOWEST, tl.float32)
        s = tl.zeros((BLOCK_R, BLOCK_V // 8), tl.float32)
        for start in tl.range(0, V, BLOCK_V, num_stages=STAGES):
            offs_v = start + tl.arange(0, BLOCK_V)
            mask = rows[:, None] & (offs_v < V)[None, :]
            x = tl.load(row_ptrs[:, None] + offs_v[None, :], mask=mask, other=float("-inf")).to(tl.float32) * LOG2E
            x = tl.reshape(x, (BLOCK_R, BLOCK_V // 8, 8))
            m_new = tl.maximum(m, tl.max(x, 2))
            s = s * tl.exp2(m - m_new) + tl.sum(tl.exp2(x - m_new[:, :, None]), 2)
            m = m_new
        row_max = tl.max(m, 1)  # (BLOCK_R,)
        total = tl.sum(s * tl.exp2(m - row_max[:, None]), 1)
        log_sum = row_max + tl.log2(tl.where(rows, total, 1.0))
        tl.store(loss_ptr + offs_r, tl.where(counts, (log_sum - label_score) * LN2, 0.0), mask=rows)

        for start in tl.range(0, V, BLOCK_V, num_stages=STAGES):
            offs_v = start + tl.arange(0, BLOCK_V)
            mask = rows[:, None] & (offs_v < V)[None, :]
            ptrs = row_ptrs[:, None] + offs_v[None, :]
            x = tl.load(ptrs, mask=mask, other=float("-inf")).to(tl.float32) * LOG2E
            dx = tl.exp2(x - log_sum[:, None]) - tl.where(offs_v[None, :] == label[:, None], 1.0, 0.0)
            dx = tl.where(counts[:, None], dx, 0.0)
            tl.store(ptrs, dx.to(logits_ptr.dtype.element_ty), mask=mask)
            if dbias_ptr is not None:
                sum_ptrs = dbias_ptr + pid * V + offs_v
                tl.store(sum_ptrs, tl.load(sum_ptrs, mask=offs_v < V, other=0.0) + tl.sum(dx, 0), mask=offs_v < V)


CONFIG = {"BLOCK_R": 2, "BLOCK_V": 4096, "STAGES": 1, "num_warps": 16}
PROGRAMS_PER_SM = 1
PROGRAMS_ON_CPU = 4  # under the interpreter


def launch_config(V):
    return {"V": V, **CONFIG, "BLOCK_V": min(CONFIG["BLOCK_V"], max(8, triton.next_power_of_2(V)))}


def cross_entropy_(logits, labels):
    """(loss of each row, dbias): both fp32. The logits are overwritten by their gradients."""
    num_rows, V = logits.shape
    programs = PROGRAMS_ON_CPU
    if logits.is_cuda:
        programs = PROGRAMS_PER_SM * torch.cuda.get_device_properties(logits.device).multi_processor_count
    losses = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    dbias = torch.zeros((programs, V), dtype=torch.float32, device=logits.device)
    cross_entropy_kernel[(programs,)](logits, labels, losses, dbias, num_rows, **launch_config(V))
    return losses, dbias.sum(0)


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
