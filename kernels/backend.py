"""Which implementation the operators run on, and what their files share: Triton, and the wrapper for torch.compile.

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
