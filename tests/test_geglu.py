"""kernels/geglu.py: what the operator must do, and proof that these tests notice when it doesn't.

As in test_attention.py, the kernels run in Triton's interpreter where there is no GPU, and bf16 is tested on a GPU only.
"""

import math
import sys

import pytest
import torch

from kernels import geglu, geglu_reference
from kernels.backend import tl, triton
from tests.conftest import assert_close

module = sys.modules["kernels.geglu"]  # `kernels.geglu` is the function
pytestmark = pytest.mark.usefixtures("poison_empty")


def make_inputs(num_rows, width, dtype, device="cpu"):
    """(dout, x); width is F."""
    dout, x = torch.randn(num_rows, width, device=device), 2 * torch.randn(num_rows, 2 * width, device=device)
    return dout.to(dtype), x.to(dtype)


def run(function, dout, x, *args):
    """{"out", "dx"} of one forward and backward pass."""
    x = x.detach().requires_grad_()
    out = function(x, *args)
    (dx,) = torch.autograd.grad(out, x, dout)
    return {"out": out.detach(), "dx": dx}


def check(dout, x):
    assert_close(run(geglu, dout, x), run(geglu_reference, dout, x), run(geglu_reference, dout.double(), x.double()))


def test_reference_is_the_definition():
    x = torch.randn(3, 10, dtype=torch.float64, requires_grad=True)
    gate, value = x[:, :5], x[:, 5:]
    expected = gate * (1 + torch.erf(gate / math.sqrt(2))) / 2 * value
    torch.testing.assert_close(geglu_reference(x), expected, rtol=1e-12, atol=1e-12)
    torch.autograd.gradcheck(geglu_reference, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("num_rows, width", [(1, 1), (3, 40), (5, 1032), (7, 3072)])
def test_matches_reference(num_rows, width, dtype, device, triton_backend):
    check(*make_inputs(num_rows, width, dtype, device))


def test_far_from_zero(device, triton_backend):
    """gelu is exactly 0 far below zero and the identity far above, never NaN."""
    gate = torch.tensor([[-1e4, -50.0, 50.0, 1e4]], device=device)
    out = geglu(torch.cat([gate, torch.ones_like(gate)], -1))
    assert torch.equal(out, gate.clamp(min=0))


def test_upper_tail_is_exact(device, triton_backend):
    """Phi(-a) and a Phi(-a), to the 5e-8 of the docstring plus fp32's rounding."""
    a = torch.linspace(0, 12, 4801, device=device)
    got = torch.empty_like(a)
    tails_kernel[(triton.cdiv(len(a), 256),)](a, got, len(a), 256)
    exact = torch.special.erfc(a.double() / math.sqrt(2)) / 2
    error = (got.double() - exact).abs()
    print(f"largest error of Phi {error.max():.1e}, of a Phi {(a * error).max():.1e}")
    assert error.max() < 1e-7 and (a * error).max() < 1e-7
    assert (got.diff() <= 0).all() and got[-1] < 1e-30


@triton.jit
def tails_kernel(a_ptr, out_ptr, count, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, module.upper_tail(tl.load(a_ptr + offs, mask=offs < count)), mask=offs < count)


@triton.jit
def tanh_approximation(a):
    """Phi(-a) of the usual approximation of gelu."""
    return tl.sigmoid(-2 * 0.7978845608028654 * (a + 0.044715 * a * a * a))


@triton.jit
def halved(a):
    return 0.5 * tl.exp2(-1.1511 * a - 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a compiled kernel keeps the functions it was compiled with")
@pytest.mark.parametrize("fault", [tanh_approximation, halved])
def test_faults_are_noticed(fault, device, monkeypatch, triton_backend):
    monkeypatch.setattr(module, "upper_tail", fault)
    with pytest.raises(AssertionError):
        check(*make_inputs(7, 3072, torch.float32, device))


@pytest.mark.parametrize("dropout_prob", [0.1, 0.5])
def test_dropout(dropout_prob, device, triton_backend):
    """The right share is dropped, evenly; the rest is scaled; backward uses the same mask."""
    dout, x = make_inputs(24, 1024, torch.float32, device)
    torch.manual_seed(1)
    got, plain = run(geglu, dout, x, dropout_prob), run(geglu, dout, x)
    keep = got["out"] != 0
    deviation = math.sqrt(dropout_prob * (1 - dropout_prob))
    assert abs(keep.double().mean() - (1 - dropout_prob)) < 5 * deviation / math.sqrt(keep.numel())
    for axis in (0, 1):  # 6, since there are 1,024 columns
        assert (keep.double().mean(axis) - (1 - dropout_prob)).abs().max() < 6 * deviation / math.sqrt(keep.shape[axis])
    scale = 65536 / (65536 - round(dropout_prob * 65536))
    torch.testing.assert_close(got["out"], torch.where(keep, plain["out"] * scale, 0.0))
    both = torch.cat([keep, keep], -1)
    torch.testing.assert_close(got["dx"], torch.where(both, plain["dx"] * scale, 0.0))
    torch.manual_seed(1)
    assert torch.equal(geglu(x, dropout_prob), got["out"])
    assert not torch.equal(geglu(x, dropout_prob), got["out"])


def test_no_rows(device, triton_backend):
    got = run(geglu, *make_inputs(0, 8, torch.float32, device), 0.1)
    assert got["out"].shape == (0, 8) and got["dx"].shape == (0, 16)


def test_any_layout_of_the_gradient(device, triton_backend):
    _, x = make_inputs(4, 16, torch.float32, device)
    expected = run(geglu, torch.ones(4, 16, device=device), x)
    got = run(geglu, torch.ones((), device=device).expand(4, 16), x)
    assert torch.equal(got["dx"], expected["dx"])


def test_operator_contract(device, triton_backend):
    x, dout = torch.randn(4, 32, device=device), torch.randn(4, 16, device=device)
    for seed in (None, torch.tensor([5], device=device)):
        args = seed, 0.1 if seed is not None else 0.0
        torch.library.opcheck(torch.ops.mosaicbert.geglu, (x, *args))
        torch.library.opcheck(torch.ops.mosaicbert.geglu_backward, (dout, x, *args))


@pytest.mark.parametrize(
    "x, dropout_prob, says",
    [
        (torch.zeros(3, 5), 0.0, "shape"),
        (torch.zeros(4), 0.0, "shape"),
        (torch.zeros(2, 4), 1.0, "dropout_prob=1.0"),
        (torch.zeros(2, 4, dtype=torch.float64), 0.0, "float64"),
        (torch.zeros(4, 4).T[:, :2], 0.0, "contiguous"),
    ],
)
def test_errors_name_the_cause(x, dropout_prob, says, device, triton_backend):
    with pytest.raises(ValueError, match=says):
        geglu(x.to(device), dropout_prob)


def test_compiled_equals_eager(device, triton_backend):
    compiled = torch.compile(geglu, backend="aot_eager", fullgraph=True)
    for num_rows, stance in ((10, "default"), (12, "default"), (15, "fail_on_recompile")):
        inputs = make_inputs(num_rows, 16, torch.float16, device)
        with torch.compiler.set_stance(stance):  # nothing compiles after the second row count
            got = run(compiled, *inputs)
        expected = run(geglu, *inputs)
        assert all(torch.equal(got[name], expected[name]) for name in expected)


# On a GPU only


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("num_rows, width", [(1000, 3072), (333, 4096), (20_000, 3072), (77, 100)])
def test_on_gpu(num_rows, width, dtype, triton_backend):
    check(*make_inputs(num_rows, width, dtype, "cuda"))


@pytest.mark.gpu
def test_repeats_are_bitwise_equal(triton_backend):
    inputs = make_inputs(4096, 3072, torch.bfloat16, "cuda")
    torch.manual_seed(1)
    first = run(geglu, *inputs, 0.1)
    for _ in range(100):
        torch.manual_seed(1)
        again = run(geglu, *inputs, 0.1)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.gpu
def test_compiled_by_inductor(triton_backend):
    compiled = torch.compile(geglu, fullgraph=True)
    for num_rows in (1000, 77):
        inputs = make_inputs(num_rows, 3072, torch.bfloat16, "cuda")
        got, expected = run(compiled, *inputs), run(geglu, *inputs)
        assert all(torch.equal(got[name], expected[name]) for name in expected)
