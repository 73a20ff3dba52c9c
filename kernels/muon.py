"""What Muon does to each element of a matrix, before and after it orthogonalizes: plain PyTorch, and Triton kernels.

With G the gradient, M the momentum, W the weights and U the orthogonalized update:

    look_ahead   M <- M + (1 - beta) (G - M),   N = G + beta (M - G), stored as bf16
    move         W <- shrink W - scale U

Where found_inf is 1, M and W keep their bits, whatever G holds, and N is 0. Nothing waits for the GPU.

Traffic per element: 18 bytes in look_ahead, 10 in move. PyTorch's own operators take some 50, in nine kernels.

Tested: tests/test_optim.py. Read next: optim.py
"""

import torch

from kernels.backend import tl, triton, uses_triton

BLOCK = 1024


def look_ahead_reference(gradient, momentum, ahead, found_inf, beta):
    new, skip = torch.lerp(momentum, gradient, 1 - beta), found_inf > 0
    momentum.copy_(torch.where(skip, momentum, new))
    ahead.copy_(torch.where(skip, 0.0, torch.lerp(gradient, new, beta)))


def move_reference(weight, update, found_inf, shrink, scale):
    weight.copy_(torch.where(found_inf > 0, weight, shrink * weight - scale * update.float()))


@triton.jit
def look_ahead_kernel(gradient_ptr, momentum_ptr, ahead_ptr, found_inf_ptr, numel, beta, rest, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask, skip = i < numel, tl.load(found_inf_ptr) > 0
    gradient, momentum = tl.load(gradient_ptr + i, mask), tl.load(momentum_ptr + i, mask)
    new = momentum + rest * (gradient - momentum)
    ahead = gradient + beta * (new - gradient)
    tl.store(momentum_ptr + i, tl.where(skip, momentum, new), mask)
    tl.store(ahead_ptr + i, tl.where(skip, 0.0, ahead).to(ahead_ptr.dtype.element_ty), mask)


@triton.jit
def move_kernel(weight_ptr, update_ptr, found_inf_ptr, numel, shrink, scale, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask, skip = i < numel, tl.load(found_inf_ptr) > 0
    weight, update = tl.load(weight_ptr + i, mask), tl.load(update_ptr + i, mask).to(tl.float32)
    tl.store(weight_ptr + i, tl.where(skip, weight, shrink * weight - scale * update), mask)


def look_ahead(gradient, momentum, ahead, found_inf, beta):
    """Update `momentum` and fill `ahead`; all three have one shape and are contiguous. gradient, momentum: fp32."""
    if not uses_triton(gradient.device):
        return look_ahead_reference(gradient, momentum, ahead, found_inf, beta)
    grid = (triton.cdiv(gradient.numel(), BLOCK),)
    look_ahead_kernel[grid](gradient.contiguous(), momentum, ahead, found_inf, gradient.numel(), beta, 1 - beta, BLOCK=BLOCK)


def move(weight, update, found_inf, shrink, scale):
    """Update `weight`, fp32; update has its shape, in any dtype, and both are contiguous."""
    if not uses_triton(weight.device):
        return move_reference(weight, update, found_inf, shrink, scale)
    grid = (triton.cdiv(weight.numel(), BLOCK),)
    move_kernel[grid](weight, update, found_inf, weight.numel(), shrink, scale, BLOCK=BLOCK)
