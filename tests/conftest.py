"""Fixtures and helpers for all tests.

Without a GPU the Triton kernels run in Triton's interpreter, which must be enabled before triton is imported.
Marks: gpu (skipped without an NVIDIA GPU), slow (skipped unless -m names slow or gpu).
"""

import functools
import importlib
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).parent.parent
torch.set_num_threads(1)  # toy models are too small for more: with two threads the suite takes 8 minutes, not 5
with torch.device("meta"):  # on first use PyTorch collects the functions to override; do it before poison_empty patches them
    torch.empty(0)


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU")
    config.addinivalue_line("markers", "slow: takes long; runs only with -m slow")


def pytest_collection_modifyitems(config, items):
    chosen = config.option.markexpr
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        if "slow" in item.keywords and "slow" not in chosen and "gpu" not in chosen:
            item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))


@pytest.fixture(autouse=True)
def fresh():
    """The same random numbers for each test, and the backend that a process starts with."""
    import kernels

    torch.manual_seed(0)
    kernels.set_backend("auto")


@pytest.fixture
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def triton_backend():
    """The Triton kernels on any device, in the interpreter where there is no GPU."""
    import kernels  # after TRITON_INTERPRET is set

    kernels.set_backend("triton")
    yield
    kernels.set_backend("auto")


@pytest.fixture
def right_rounding(monkeypatch):
    """PyTorch's rounding in Triton's interpreter, whose own truncates to bf16 and loses FP8's carries: 1.99 becomes 1."""
    if torch.cuda.is_available():
        return
    from kernels.backend import tl  # after TRITON_INTERPRET is set

    interpreter = importlib.import_module("triton.runtime.interpreter")
    convert = interpreter._convert_float

    def converted(x, source, target, rounding):
        formats = {
            tl.bfloat16: (torch.bfloat16, np.uint16), tl.float8e4nv: (torch.float8_e4m3fn, np.uint8),
            tl.float8e5: (torch.float8_e5m2, np.uint8),
        }  # fmt: skip
        if source != tl.float32 or target not in formats:
            return convert(x, source, target, rounding)
        dtype, bits = formats[target]
        return torch.from_numpy(np.ascontiguousarray(x).view(np.float32)).to(dtype).view(torch.uint8).numpy().view(bits)

    monkeypatch.setattr(interpreter, "_convert_float", converted)


@pytest.fixture
def poison_empty(monkeypatch):
    """torch.empty called from kernels/ returns NaN, so that an element no kernel writes cannot pass."""

    def poisoned(make):
        @functools.wraps(make)
        def wrapper(*args, **kwargs):
            tensor = make(*args, **kwargs)
            caller = Path(sys._getframe(1).f_code.co_filename)
            if caller.parent == ROOT / "kernels" and tensor.is_floating_point():
                tensor.fill_(float("nan"))
            return tensor

        return wrapper

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


def assert_close(got, own, exact):
    """Assert that each tensor is about as close to the exact one as PyTorch's own, by largest and by rms error.

    got, own, exact: {name: tensor} from the kernel, from PyTorch in the same dtype, and from PyTorch in fp64 with the
    same inputs. If all are fp32, the error may be 1e-5 of the tensor's scale; otherwise twice PyTorch's error plus one
    unit in the last place at that scale.
    """
    single = all(tensor.dtype == torch.float32 for tensor in own.values())
    failed = []
    for name, want in exact.items():
        eps = torch.finfo(got[name].dtype).eps
        for kind, measure in (("max", lambda x: x.abs().max()), ("rms", lambda x: x.square().mean().sqrt())):
            error = measure(got[name].double() - want).item()
            own_error = measure(own[name].double() - want).item()
            scale = measure(want).item()
            bound = 1e-5 * scale if single else 2 * own_error + eps * scale
            print(f"{name:10s} {kind} error {error:.3e}  PyTorch's {own_error:.3e}  bound {bound:.3e}")
            if not error <= bound:  # also for NaN
                failed.append(f"{name}: {kind} error {error:.3e} is over {bound:.3e}")
    assert not failed, "; ".join(failed)


class Faulty:
    """A kernel whose list of arguments `fault` changes before the launch; what `fault` returns is called afterwards."""

    def __init__(self, kernel, fault):
        self.kernel, self.fault = kernel, fault

    def __getitem__(self, grid):
        def launch(*args, **cfg):
            finish = self.fault(args := list(args))
            self.kernel[grid](*args, **cfg)
            if finish:
                finish()

        return launch
