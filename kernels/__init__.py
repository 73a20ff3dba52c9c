"""The operators with hand-written kernels, each with a plain PyTorch twin, and the choice between the two.

`set_backend` chooses once for the process. "auto" means Triton for tensors on a GPU that can run it, PyTorch elsewhere.

Read next: kernels/attention.py
"""

import os

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # as on macOS: the kernels can be read by Python, but not run

    class Missing:
        """Stands for triton and its language in decorators and annotations."""

        def __getattr__(self, name):
            return self

        def __call__(self, *args, **kwargs):
            return self

    triton = tl = Missing()

from kernels.attention import attention_reference, attention_triton, check_attention
from kernels.layernorm import check_layernorm, dropout_add_layernorm_reference, dropout_add_layernorm_triton

__all__ = [
    "attention",
    "attention_qkvpacked",
    "attention_reference",
    "dropout_add_layernorm",
    "dropout_add_layernorm_reference",
    "set_backend",
    "uses_triton",
]

BACKENDS = ("auto", "triton", "torch")
MIN_CAPABILITY = 8  # Ampere, compute capability 8.0: the first with bf16 matrix units

_backend = "auto"


def set_backend(name):
    """Choose what the functions below run on: "auto", "triton" or "torch".

    Raises: ValueError for another name, or for "triton" where it cannot run.
    """
    global _backend
    if name not in BACKENDS:
        raise ValueError(f"kernels={name!r}: must be one of {', '.join(BACKENDS)}")
    if name == "triton":
        if isinstance(triton, Missing_type):
            raise ValueError("kernels='triton': the triton package is not installed (pip install triton, or set 'auto')")
    _backend = name
