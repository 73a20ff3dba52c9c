"""FP8 layers: a Linear, and the feed-forward layer with GeGLU. Formats, scales and kernels: kernels/fp8.py.

Inputs and results are in the activations' dtype. What the products read is e4m3 in forward and e4m3 with e5m2 gradients in
backward; backward keeps the transposed inputs, at half bf16's bytes, and the product that GeGLU reads, in full. GeGLU
writes FP8 itself; the inputs and the gradients that come from elsewhere, C or 3C wide, are converted by a kernel of
their own, and so are the weights, in each micro-batch. The weights' gradients are sums over all tokens, so theirs are not
of the fast kind (see `product`).

Tested: tests/test_fp8.py, by Triton's interpreter on a CPU and compiled on a GPU.

Read next: kernels/cross_entropy.py
"""

import torch

from kernels.fp8 import E4M3, E5M2, product, quantize, quantize_and_sum
from kernels.geglu import geglu_backward_fp8, geglu_fp8

LINEAR = ("activation", "weight", "gradient")  # kinds of the tensors that fp8_linear scales: x, weight, dy
# And fp8_feed_forward: x, gate and up weight, GeGLU's result, down weight, dy, GeGLU's gradient.
FEED_FORWARD = ("activation", "weight", "activation", "weight", "gradient", "gradient")
ROWS = 16  # num_rows must be a multiple, and so must all widths: the matrix units' k


class Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, scaled):
        ctx.scaled, (of_x, of_weight, _) = scaled, scaled
        x8, x8_t = quantize(x, E4M3, of_x)
        weight8, weight8_t = quantize(weight, E4M3, of_weight)
        ctx.save_for_backward(x8_t, weight8_t)
        return product(x8, weight8, of_x, of_weight, x.dtype, bias=bias)

    @staticmethod
    def backward(ctx, dy):
        (x8_t, weight8_t), (of_x, of_weight, of_dy) = ctx.saved_tensors, ctx.scaled
        dy8, dy8_t, dbias = quantize_and_sum(dy.contiguous(), E5M2, of_dy)
        dx = product(dy8, weight8_t, of_dy, of_weight, dy.dtype)
        return dx, product(dy8_t, x8_t, of_dy, of_x, dy.dtype, fast=False), dbias, None


class FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gated_weight, weight, seed, dropout_prob, scaled):
        ctx.dropout_prob, ctx.scaled = dropout_prob, scaled
        of_x, of_gated, of_hidden, of_weight, _, _ = scaled
        x8, x8_t = quantize(x, E4M3, of_x)
        gated8, gated8_t = quantize(gated_weight, E4M3, of_gated)
        weight8, weight8_t = quantize(weight, E4M3, of_weight)
        gated = product(x8, gated8, of_x, of_gated, x.dtype)  # (num_rows, 2F)
        hidden8, hidden8_t = geglu_fp8(gated, seed, dropout_prob, of_hidden)
        ctx.save_for_backward(x8_t, gated8_t, gated, seed, hidden8_t, weight8_t)
        return product(hidden8, weight8, of_hidden, of_weight, x.dtype)

    @staticmethod
    def backward(ctx, dy):
        x8_t, gated8_t, gated, seed, hidden8_t, weight8_t = ctx.saved_tensors
        of_x, of_gated, of_hidden, of_weight, of_dy, of_dgated = ctx.scaled
        dy8, dy8_t = quantize(dy.contiguous(), E5M2, of_dy)
        dweight = product(dy8_t, hidden8_t, of_dy, of_hidden, dy.dtype, fast=False)
        dhidden = product(dy8, weight8_t, of_dy, of_weight, dy.dtype)  # (num_rows, F)
        dgated8, dgated8_t = geglu_backward_fp8(dhidden, gated, seed, ctx.dropout_prob, of_dgated)
        dx = product(dgated8, gated8_t, of_dgated, of_gated, dy.dtype)
        dgated_weight = product(dgated8_t, x8_t, of_dgated, of_x, dy.dtype, fast=False)
        return dx, dgated_weight, dweight, None, None, None


def check(x, *weights):
    """Raises: ValueError for sizes that FP8 products cannot take."""
    sizes = (*x.shape, *(size for weight in weights for size in weight.shape))
    if x.dim() != 2 or any(size % ROWS for size in sizes):
        shapes = " and ".join(str(tuple(t.shape)) for t in (x, *weights))
        raise ValueError(f"FP8 products take two-dimensional tensors whose sizes are multiples of {ROWS}, not {shapes}")


def fp8_linear(x, weight, bias, scaled):
    """x W^T + bias in FP8; differentiable. x: (num_rows, in), weight: (out, in) fp32, bias: (out,).

    scaled: a kernels.fp8.Scaled for each tensor in LINEAR. Raises: ValueError for sizes that are not multiples of 16.
    """
    check(x, weight)
    return Linear.apply(x, weight, bias, scaled)


def fp8_feed_forward(x, gated_weight, weight, dropout_prob, scaled):
    """geglu(x gated_weight^T) weight^T in FP8, with dropout on GeGLU's result; differentiable.

    x: (num_rows, C), gated_weight: (2F, C) fp32, weight: (C, F) fp32. scaled: a kernels.fp8.Scaled for each tensor in
    FEED_FORWARD. dropout_prob: torch.manual_seed decides what is dropped, as in kernels.geglu.

    Raises: ValueError for sizes that are not multiples of 16.
    """
    check(x, gated_weight, weight)
    seed = torch.randint(2**62, (1,), device=x.device) if dropout_prob > 0 else None
    return FeedForward.apply(x, gated_weight, weight, seed, dropout_prob, scaled)
