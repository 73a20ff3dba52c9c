"""Embeddings, LayerNorm and dropout as one operator: a plain PyTorch reference, and Triton kernels.

For each token, a row of C elements, with keep the dropout mask and p the probability of dropping:

    z    = words[id] + types[type]
    y    = xhat * weight + bias,   xhat = (z - mean(z)) * rstd        LayerNorm, as in layernorm.py
    out  = y * keep / (1 - p)

As there, out comes twice, and with dy = (dout + dnext) * keep / (1 - p) backward gives dz, dweight and dbias; then

    dwords[v] = sum of dz over the tokens with id v,   dtypes likewise

The sum over tokens is PyTorch's own gradient of an embedding: it sorts the ids, so its order is fixed. Where all types
are 0, dtypes[0] is the sum of dz over all rows, which the backward kernel makes with its other sums.

z is not saved but gathered again. Traffic a token: forward reads 4C bytes (some from the L2 cache: frequent words are
many) and writes 2C in bf16; backward reads 8C and writes 4C. PyTorch's separate operators move about 25C and 19C: at
3 TB/s and C = 768 that is some 10 ns a token more, 0.6 % of a training step on an H100.

Shapes: ids, types (num_rows,) int32 or int64; words (V, C), types (2, C), weight, bias (C,) fp32; out (num_rows, C) in
the dtype asked for, fp32, fp16 or bf16. Arithmetic is fp32.

Limits: C up to 8192, no second derivative. Tested: tests/test_embedding.py, by Triton's interpreter on a CPU and
compiled on a GPU.

Read next: tests/test_embedding.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import operator, tl, triton
from kernels.layernorm import (
    MAX_C,
    backward_programs,
    dropout_args,
    keep_mask,
    launch_config,
    part_of_rows,
    statistics,
    store_sums,
    through_layernorm,
)

PADDING = 0  # the id whose row of dwords stays 0


def embedding_layernorm_reference(ids, type_ids, words, types, weight, bias, dropout_prob=0.0, eps=1e-12, dtype=None):
    """The same function in plain PyTorch, for any device and dtype. Its dropout mask is another one, PyTorch's own."""
    z = F.embedding(ids, words, PADDING)
    z = z + (types[0] if type_ids is None else F.embedding(type_ids, types))
    out = F.dropout(F.layer_norm(z, weight.shape, weight, bias, eps).to(dtype or z.dtype), dropout_prob)
    return out, out


@triton.jit
def rows_of_tables(offs_r, num_rows, ids_ptr, type_ids_ptr, words_ptr, types_ptr, C: tl.constexpr):
    """Where the tokens' rows of words and of types begin, each (BLOCK_R, 1)."""
    word_id = tl.load(ids_ptr + offs_r, mask=offs_r < num_rows, other=0).to(tl.int64)
    type_id = offs_r * 0
    if type_ids_ptr is not None:
        type_id = tl.load(type_ids_ptr + offs_r, mask=offs_r < num_rows, other=0).to(tl.int32)
    return (words_ptr + word_id * C)[:, None], (types_ptr + type_id * C)[:, None]


@triton.jit(do_not_specialize=["num_rows", "threshold"])
def forward_kernel(
    ids_ptr,  # (num_rows,)
    type_ids_ptr,  # (num_rows,), or None for all 0
    words_ptr,  # (V, C) fp32
    types_ptr,  # (2, C) fp32
    weight_ptr,  # (C,) fp32
    bias_ptr,  # (C,) fp32
    seed_ptr,  # (1,) int64, or None for no dropout
    out_ptr,  # (num_rows, C): written
    mean_ptr,  # (num_rows,) fp32: written
    rstd_ptr,  # (num_rows,) fp32: written
    num_rows,
    threshold,
    keep_scale,
    eps,
    C: tl.constexpr,
    BLOCK_R: tl.constexpr,  # rows of one program
    BLOCK_C: tl.constexpr,  # columns of one part
):
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    word_ptrs, type_ptrs = rows_of_tables(offs_r, num_rows, ids_ptr, type_ids_ptr, words_ptr, types_ptr, C)
    PARTS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    parts = ()
    for i in tl.static_range(PARTS):
        offs, mask, offs_c, columns, first = part_of_rows(offs_r, num_rows, i, C, BLOCK_R, BLOCK_C)
        z = tl.load(word_ptrs + offs_c, mask=mask, other=0.0) + tl.load(type_ptrs + offs_c, mask=mask, other=0.0)
        parts = parts + (z,)
    mean, rstd = statistics(parts, eps, C, BLOCK_R, BLOCK_C)
    for i in tl.static_range(PARTS):
        offs, mask, offs_c, columns, first = part_of_rows(offs_r, num_rows, i, C, BLOCK_R, BLOCK_C)
        weight = tl.load(weight_ptr + offs_c, mask=columns, other=0.0)
        bias = tl.load(bias_ptr + offs_c, mask=columns, other=0.0)
        out = (parts[i] - mean[:, None]) * rstd[:, None] * weight + bias
        if seed_ptr is not None:
            out = tl.where(keep_mask(seed_ptr, first, threshold, BLOCK_R, BLOCK_C), out * keep_scale, 0.0)
        tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + offs_r, mean, mask=offs_r < num_rows)
    tl.store(rstd_ptr + offs_r, rstd, mask=offs_r < num_rows)


@triton.jit(do_not_specialize=["num_rows", "threshold"])
def backward_kernel(
    dout_ptr,  # (num_rows, C)
    dnext_ptr,  # (num_rows, C): the gradient of the second result, or None
    ids_ptr,  # (num_rows,)
    type_ids_ptr,  # (num_rows,), or None
    words_ptr,  # (V, C) fp32
    types_ptr,  # (2, C) fp32
    weight_ptr,  # (C,) fp32
    seed_ptr,  # (1,) int64, or None for no dropout
    mean_ptr,  # (num_rows,) fp32
    rstd_ptr,  # (num_rows,) fp32
    dembedding_ptr,  # (num_rows, C) fp32: written, dz
    partial_ptr,  # (3, programs, C) fp32: written, each program's part of dweight, dbias and the sum of dz
    num_rows,
    threshold,
    keep_scale,
    C: tl.constexpr,
    BLOCK_R: tl.constexpr,  # rows of one step
    BLOCK_C: tl.constexpr,
):
    """Each program takes every num_programs-th block of rows, as in layernorm.py."""
    PARTS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    sums = ()  # of each part of the columns: dweight, dbias and dz
    for _ in tl.static_range(3 * PARTS):
        sums = sums + (tl.zeros((BLOCK_R, BLOCK_C), tl.float32),)
    for block in range(tl.program_id(0) * BLOCK_R, num_rows, tl.num_programs(0) * BLOCK_R):
        offs_r = block + tl.arange(0, BLOCK_R)
        word_ptrs, type_ptrs = rows_of_tables(offs_r, num_rows, ids_ptr, type_ids_ptr, words_ptr, types_ptr, C)
        mean = tl.load(mean_ptr + offs_r, mask=offs_r < num_rows, other=0.0)  # (BLOCK_R,)
        rstd = tl.load(rstd_ptr + offs_r, mask=offs_r < num_rows, other=0.0)  # (BLOCK_R,)
        dys, xhats = (), ()
        for i in tl.static_range(PARTS):
            offs, mask, offs_c, columns, first = part_of_rows(offs_r, num_rows, i, C, BLOCK_R, BLOCK_C)
            dy = tl.load(dout_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            if dnext_ptr is not None:
                dy += tl.load(dnext_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            if seed_ptr is not None:
                dy = tl.where(keep_mask(seed_ptr, first, threshold, BLOCK_R, BLOCK_C), dy * keep_scale, 0.0)
            z = tl.load(word_ptrs + offs_c, mask=mask, other=0.0) + tl.load(type_ptrs + offs_c, mask=mask, other=0.0)
            dys, xhats = dys + (dy,), xhats + ((z - mean[:, None]) * rstd[:, None],)
        dzs = through_layernorm(dys, xhats, rstd, weight_ptr, C, BLOCK_R, BLOCK_C)

        new = ()
        for i in tl.static_range(PARTS):
            offs, mask, offs_c, columns, first = part_of_rows(offs_r, num_rows, i, C, BLOCK_R, BLOCK_C)
            tl.store(dembedding_ptr + offs, dzs[i], mask=mask)
            new = new + (sums[3 * i] + dys[i] * xhats[i], sums[3 * i + 1] + dys[i], sums[3 * i + 2] + dzs[i])
        sums = new
    store_sums(sums, partial_ptr, 3, C, BLOCK_C)


@operator("embedding_layernorm")
def embedding_op(
    ids: Tensor,
    type_ids: Tensor | None,
    words: Tensor,
    types: Tensor,
    weight: Tensor,
    bias: Tensor,
    seed: Tensor | None,
    dropout_prob: float,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, mean, rstd)"""
    out, mean, rstd = empty_outputs(ids, words, dtype)
    cfg = launch_config(words.shape[1])
    forward_kernel[(triton.cdiv(len(ids), cfg["BLOCK_R"]),)](
        *(ids, type_ids, words, types, weight, bias, seed, out, mean, rstd),
        *(len(ids), *dropout_args(dropout_prob), eps),
        **cfg,
    )
    return out, mean, rstd


@embedding_op.register_fake
def _(ids, type_ids, words, types, weight, bias, seed, dropout_prob, eps, dtype):
    return empty_outputs(ids, words, dtype)


def empty_outputs(ids, words, dtype):
    out = torch.empty((ids.shape[0], words.shape[1]), dtype=dtype, device=words.device)
    mean = torch.empty(ids.shape[0], dtype=torch.float32, device=words.device)
    return out, mean, torch.empty_like(mean)


@operator("embedding_layernorm_backward")
def embedding_backward_op(
    dout: Tensor,
    dnext: Tensor | None,
    ids: Tensor,
    type_ids: Tensor | None,
    words: Tensor,
    types: Tensor,
    weight: Tensor,
    seed: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dropout_prob: float,
) -> tuple[Tensor, Tensor]:
    """(dz, (3, C) dweight, dbias and the sum of dz over rows), fp32."""
    dout, dnext = dout.contiguous(), None if dnext is None else dnext.contiguous()
    dz = torch.empty(dout.shape, dtype=torch.float32, device=dout.device)
    programs = backward_programs(dout.device)
    partial = torch.empty((3, programs, words.shape[1]), dtype=torch.float32, device=dout.device)
    backward_kernel[(programs,)](
        *(dout, dnext, ids, type_ids, words, types, weight, seed, mean, rstd, dz, partial),
        *(len(ids), *dropout_args(dropout_prob)),
        **launch_config(words.shape[1]),
    )
    return dz, partial.sum(1)


@embedding_backward_op.register_fake
def _(dout, dnext, ids, type_ids, words, types, weight, seed, mean, rstd, dropout_prob):
    return weight.new_empty(dout.shape), weight.new_empty(3, words.shape[1])


class EmbeddingLayerNorm(torch.autograd.Function):
    """Returns one tensor twice, as layernorm.DropoutAddLayerNorm."""

    @staticmethod
    def forward(ctx, ids, type_ids, words, types, weight, bias, seed, dropout_prob, eps, dtype):
        out, mean, rstd = embedding_op(ids, type_ids, words, types, weight, bias, seed, dropout_prob, eps, dtype)
        ctx.dropout_prob = dropout_prob
        ctx.save_for_backward(ids, type_ids, words, types, weight, seed, mean, rstd)
        ctx.set_materialize_grads(False)
        return out, out.view_as(out)

    @staticmethod
    def backward(ctx, dout, dnext):
        if dout is None:
            dout, dnext = dnext, None
        ids, type_ids, words, types = ctx.saved_tensors[:4]
        dz, (dweight, dbias, dz_sum) = embedding_backward_op(dout, dnext, *ctx.saved_tensors, ctx.dropout_prob)
        dwords = torch.ops.aten.embedding_dense_backward(dz, ids, len(words), PADDING, False)
        if type_ids is None:
            dtypes = F.pad(dz_sum[None], (0, 0, 0, len(types) - 1))  # (2, C): all in the first row
        else:
            dtypes = torch.ops.aten.embedding_dense_backward(dz, type_ids, len(types), -1, False)
        return None, None, dwords, dtypes, dweight, dbias, None, None, None, None


def check_embedding_layernorm(ids, type_ids, words, types, weight, bias, dropout_prob):
    """Raises: ValueError for what neither the kernels nor the reference would understand."""
    if ids.dim() != 1 or (type_ids is not None and type_ids.shape != ids.shape):
        got = f"{tuple(ids.shape)} and {None if type_ids is None else tuple(type_ids.shape)}"
        raise ValueError(f"embedding_layernorm: ids and type_ids have shapes {got}; expected (num_rows,) for each")
    if not words.dim() == types.dim() == 2 or not weight.shape == bias.shape == types.shape[1:] == words.shape[1:]:
        got = ", ".join(str(tuple(t.shape)) for t in (words, types, weight, bias))
        raise ValueError(
            f"embedding_layernorm: words, types, weight, bias have shapes {got}; expected (V, C), (2, C), (C,), (C,)"
        )
    if not 0 <= dropout_prob < 1:
        raise ValueError(f"embedding_layernorm: dropout_prob={dropout_prob}; expected 0 <= dropout_prob < 1")


def embedding_layernorm_triton(ids, type_ids, words, types, weight, bias, dropout_prob=0.0, eps=1e-12, dtype=None):
    """The function by the kernels; differentiable in words, types, weight and bias.

    Raises: ValueError for inputs that only the reference takes.
    """
    parameters = words, types, weight, bias
    if any(t.dtype != torch.float32 or not t.is_contiguous() for t in parameters):
        raise ValueError("embedding_layernorm: the Triton kernels take contiguous parameters in float32")
    if words.shape[1] > MAX_C:
        raise ValueError(f"embedding_layernorm: the Triton kernels take rows of up to {MAX_C}, not {words.shape[1]}")
    seed = torch.randint(2**62, (1,), device=words.device) if dropout_prob > 0 else None
    ids, type_ids = ids.contiguous(), None if type_ids is None else type_ids.contiguous()
    dtype = dtype or words.dtype
    return EmbeddingLayerNorm.apply(ids, type_ids, words, types, weight, bias, seed, dropout_prob, eps, dtype)
