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
sys.path.insert(0, str(ROOT))
torch.set_num_threads(2)


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
