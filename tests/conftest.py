"""What all tests share.

Without a GPU the Triton kernels run in Triton's interpreter, which must be asked for before triton is imported.
Marks: gpu (needs an NVIDIA GPU, else skipped), slow (only with `-m slow`, or another -m that names it).
"""

import functools
import os
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).parent.parent
torch.set_num_threads(1)  # toy models are too small to share: the suite takes 5 minutes, with two threads 8
with torch.device("meta"):  # PyTorch notes once what to replace here; it must not be what poison_empty has replaced
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
def seed():
    torch.manual_seed(0)


@pytest.fixture
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def triton_backend():
    """The kernels on any device, by the interpreter where there is no GPU."""
    import kernels

    kernels.set_backend("triton")
    yield
    kernels.set_backend("auto")


@pytest.fixture
def poison_empty(monkeypatch):
    """What kernels/ asks for uninitialised comes as NaN, so that an element that no kernel writes cannot pass."""

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
    """Each tensor is about as near to the exact one as PyTorch's own, by its largest error and by its rms error.

    got, own, exact: {name: tensor} of the kernel, of PyTorch in the same dtype, and of PyTorch in fp64 from the same
    inputs. All fp32: the error may be 1e-5 of the tensor's scale. Otherwise it may be twice PyTorch's, plus one unit in
    the last place at that scale.
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
    """A real kernel, called with arguments changed by `fault(list of them)`; what that returns is called afterwards."""

    def __init__(self, kernel, fault):
        self.kernel, self.fault = kernel, fault

    def __getitem__(self, grid):
        def launch(*args, **cfg):
            finish = self.fault(args := list(args))
            self.kernel[grid](*args, **cfg)
            if finish:
                finish()

        return launch
