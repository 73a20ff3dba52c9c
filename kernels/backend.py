"""What the operators run on, Triton or PyTorch, and what their files share.

`set_backend` chooses once for the process. "auto" means Triton on GPUs that can run it, PyTorch everywhere else.

Read next: kernels/attention.py
"""

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
        """Stands in for triton, so that the kernel files import without it. Their kernels cannot run."""

        def __getattr__(self, name):
            return self

        def __call__(self, *args, **kwargs):
            return self

    triton = tl = TensorDescriptor = Missing()

BACKENDS = ("auto", "triton", "torch")
MIN_CAPABILITY = 8  # major compute capability: Ampere, the first with bf16 matrix units
DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of the activations that the kernels take

_backend = "auto"


def can_run(device):
    """Whether `device` is a GPU that the kernels support."""
    device = torch.device(device)
    if not HAS_TRITON or device.type != "cuda" or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_properties(device).major >= MIN_CAPABILITY


def uses_triton(device):
    """Whether tensors on `device` go to the Triton kernels."""
    return can_run(device) if _backend == "auto" else _backend == "triton"


def set_backend(name):
    """Choose what all operators run on: "auto", "triton" or "torch".

    Raises: ValueError for any other name, and for "triton" where it cannot run.
    """
    global _backend
    if name not in BACKENDS:
        raise ValueError(f"kernels={name!r} is not one of {', '.join(BACKENDS)}")
    if name == "triton" and not HAS_TRITON:
        raise ValueError("kernels='triton' needs the triton package (pip install triton, or set kernels='auto')")
    if name == "triton" and not can_run("cuda") and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"kernels='triton' needs a GPU of compute capability {MIN_CAPABILITY}.0 or higher"
            " (set kernels='auto', or TRITON_INTERPRET=1 to try the kernels slowly on a CPU)"
        )
    _backend = name


def operator(name):
    """Decorator that makes a function a PyTorch operator, opaque to torch.compile. The result needs .register_fake.

    Inside an autograd.Function, which each of these needs around it, the plain function is called: PyTorch 2.13's
    dispatcher took 3 of the 18 ms a CPU needs to launch a 12-layer step. Where gradients are recorded the operator is
    called; it has no backward, so second derivatives raise an error. Tracing without Dynamo (make_fx, FakeTensorMode)
    does not see it.
    """

    def decorate(function):
        op = torch.library.custom_op(f"mosaicbert::{name}", mutates_args=())(function)

        def call(*args):
            dispatched = torch.compiler.is_compiling() or torch.is_grad_enabled()
            return op(*args) if dispatched else function(*args)

        call.register_fake = op.register_fake
        return call

    return decorate
