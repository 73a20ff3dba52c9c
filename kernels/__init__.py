"""The operators with hand-written kernels, each with a plain PyTorch twin, and the choice between the two.

`set_backend` chooses once for the process. "auto" means Triton for tensors on a GPU that can run it, PyTorch elsewhere.

Read next: kernels/attention.py
"""

import functools
import os

import torch

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    HAS_TRITON = True
except ImportError:  # as on macOS
    HAS_TRITON = False

    class Missing:
        """Stands for triton and its language, so that Python can read the kernels. They cannot run."""

        def __getattr__(self, name):
            return self

        def __call__(self, *args, **kwargs):
            return self

    triton = tl = TensorDescriptor = Missing()


def operator(name):
    """Makes the decorated function a PyTorch operator for torch.compile, to which it stays opaque.

    Within an autograd.Function, which every such function needs around it, it is called as it is: going through PyTorch
    2.13's dispatcher took 3 of the 18 ms in which a CPU got through a step of 12 layers with kernels that did nothing.
    Where gradients are recorded it is the operator again, which has none, so that second derivatives end in an error.
    It needs .register_fake. Tracing without Dynamo (make_fx, FakeTensorMode) does not know it.
    """

    def decorate(function):
        op = torch.library.custom_op(f"mosaicbert::{name}", mutates_args=())(function)

        @functools.wraps(function)
        def call(*args):
            dispatched = torch.compiler.is_compiling() or torch.is_grad_enabled()
            return op(*args) if dispatched else function(*args)

        call.register_fake = op.register_fake
        return call

    return decorate


# After triton, tl and operator, which these take from here.
from kernels.attention import (  # noqa: E402
    Attention,
    attention_reference,
    check_attention,
    check_attention_triton,
)
from kernels.attention_window import WindowAttention, fits_window, make_windows  # noqa: E402
from kernels.cross_entropy import (  # noqa: E402
    check_linear_cross_entropy,
    linear_cross_entropy_reference,
    linear_cross_entropy_triton,
)
from kernels.embedding import (  # noqa: E402
    check_embedding_layernorm,
    embedding_layernorm_reference,
    embedding_layernorm_triton,
)
from kernels.geglu import check_geglu, geglu_reference, geglu_triton  # noqa: E402
from kernels.layernorm import (  # noqa: E402
    check_layernorm,
    dropout_add_layernorm_reference,
    dropout_add_layernorm_triton,
)

__all__ = [
    "attention",
    "attention_qkvpacked",
    "attention_reference",
    "dropout_add_layernorm",
    "dropout_add_layernorm_reference",
    "embedding_layernorm",
    "embedding_layernorm_reference",
    "geglu",
    "geglu_reference",
    "linear_cross_entropy",
    "linear_cross_entropy_reference",
    "make_windows",
    "set_backend",
    "uses_triton",
]

BACKENDS = ("auto", "triton", "torch")
MIN_CAPABILITY = 8  # major number: Ampere, the first with bf16 matrix units

_backend = "auto"


def set_backend(name):
    """Choose what the functions below run on: "auto", "triton" or "torch".

    Raises: ValueError for another name, and for "triton" where it cannot run.
    """
    global _backend
    if name not in BACKENDS:
        raise ValueError(f"kernels={name!r} is none of {', '.join(BACKENDS)}")
    if name == "triton" and not HAS_TRITON:
        raise ValueError("kernels='triton' needs the triton package (pip install triton, or set kernels='auto')")
    if name == "triton" and not can_run("cuda") and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"kernels='triton' needs a GPU of compute capability {MIN_CAPABILITY}.0 or more"
            " (set kernels='auto', or TRITON_INTERPRET=1 to try the kernels slowly on a CPU)"
        )
    _backend = name


def uses_triton(device):
    """Whether tensors on this device go to the Triton kernels."""
    if _backend == "auto":
        return can_run(device)
    return _backend == "triton"


def can_run(device):
    """Whether the device is a GPU that the kernels are made for."""
    device = torch.device(device)
    if not HAS_TRITON or device.type != "cuda" or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_properties(device).major >= MIN_CAPABILITY


def attention(q, k, v, cu_seqlens, max_seqlen, slopes, windows=None):
    """softmax(q k^T / sqrt(D) - slope * |i - j|) v in each sequence on its own; differentiable in q, k, v.

    q, k, v, result: (total_tokens, H, D). cu_seqlens: (B + 1,) int32, sequence b is rows cu_seqlens[b] to
    cu_seqlens[b + 1]; empty ones are allowed, none may be longer than max_seqlen. slopes: (H,) fp32, or None for no
    bias. windows: what make_windows says of these sequences, on the same device: short ones are faster with it, and
    the result is the same. Rows past the last sequence are 0. For the kernels q, k, v are copied into one tensor;
    attention_qkvpacked saves that.
    """
    check_attention(q, k, v, cu_seqlens, slopes, windows)
    if uses_triton(q.device):
        return run_attention(torch.stack((q, k, v), dim=1), cu_seqlens, max_seqlen, slopes, windows)
    return attention_reference(q, k, v, cu_seqlens, max_seqlen, slopes)


def attention_qkvpacked(qkv, cu_seqlens, max_seqlen, slopes, windows=None):
    """attention of qkv (total_tokens, 3, H, D), contiguous; its gradient is one tensor of the same shape."""
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ValueError(f"attention: qkv has shape {tuple(qkv.shape)}; expected (total_tokens, 3, H, D)")
    q, k, v = qkv.unbind(1)
    check_attention(q, k, v, cu_seqlens, slopes, windows)
    if uses_triton(qkv.device):
        return run_attention(qkv, cu_seqlens, max_seqlen, slopes, windows)
    return attention_reference(q, k, v, cu_seqlens, max_seqlen, slopes)


def run_attention(qkv, cu_seqlens, max_seqlen, slopes, windows):
    """By the kernels: of windows where these fit, else of any length. Raises: ValueError for what neither takes."""
    check_attention_triton(qkv, slopes)
    if fits_window(qkv, max_seqlen):
        return WindowAttention.apply(qkv, cu_seqlens, windows, slopes)
    return Attention.apply(qkv, cu_seqlens, slopes, max_seqlen)


def dropout_add_layernorm(x, residual, weight, bias, dropout_prob=0.0, eps=1e-12, x_bias=None):
    """LayerNorm(dropout(x + x_bias) + residual) * weight + bias by rows, with fp32 statistics, in x's dtype.

    Returns it twice: with the second for the next residual, backward gets both gradients and adds them itself.
    Differentiable. x: (num_rows, C). residual: like x, or None. weight, bias: (C,) fp32. x_bias: likewise, or None.
    torch.manual_seed decides the dropout mask.
    """
    check_layernorm(x, residual, weight, bias, dropout_prob, x_bias)
    run = dropout_add_layernorm_triton if uses_triton(x.device) else dropout_add_layernorm_reference
    return run(x, residual, weight, bias, dropout_prob, eps, x_bias)


def embedding_layernorm(ids, type_ids, words, types, weight, bias, dropout_prob=0.0, eps=1e-12, dtype=None):
    """dropout(LayerNorm(words[ids] + types[type_ids])), (num_rows, C), twice as above; differentiable.

    ids: (num_rows,) integers; 0 is [PAD], whose row of words gets no gradient. type_ids: likewise, or None for all 0.
    words: (V, C), types: (2, C), weight, bias: (C,), fp32. dtype: of the result; None for that of words.
    torch.manual_seed decides the dropout mask.
    """
    check_embedding_layernorm(ids, type_ids, words, types, weight, bias, dropout_prob)
    run = embedding_layernorm_triton if uses_triton(words.device) else embedding_layernorm_reference
    return run(ids, type_ids, words, types, weight, bias, dropout_prob, eps, dtype)


def geglu(x, dropout_prob=0.0):
    """dropout(gelu(gate) * value) for the halves of x: (num_rows, 2F) to (num_rows, F); exact gelu; differentiable.

    torch.manual_seed decides the dropout mask.
    """
    check_geglu(x, dropout_prob)
    return geglu_triton(x, dropout_prob) if uses_triton(x.device) else geglu_reference(x, dropout_prob)


def linear_cross_entropy(hidden, weight, bias, labels):
    """Sum over rows of the cross-entropy in nats, fp32, of hidden weight^T + bias and labels; -100 does not count.

    Differentiable. hidden: (num_rows, C). weight: (V, C) and bias: (V,), fp32. labels: (num_rows,) int64. The products
    are of hidden's dtype.
    """
    check_linear_cross_entropy(hidden, weight, bias, labels)
    run = linear_cross_entropy_triton if uses_triton(hidden.device) else linear_cross_entropy_reference
    return run(hidden, weight, bias, labels)
