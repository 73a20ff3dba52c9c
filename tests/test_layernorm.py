"""kernels/layernorm.py: what the operator must do, and proof that these tests notice when it does not.

As in test_attention.py the kernels run in Triton's interpreter where there is no GPU, and bf16 is left to a GPU.
"""

import sys

import pytest
import torch
import torch.nn.functional as F

import kernels
from conftest import assert_close
from kernels import dropout_add_layernorm, dropout_add_layernorm_reference

module = sys.modules["kernels.layernorm"]
pytestmark = pytest.mark.usefixtures("poison_empty")


def make_inputs(num_rows, C, dtype, device="cpu", residual=True, mean=10.0):
    """(dy, x, residual, weight, bias), with a mean of z that is large beside its deviation of 1."""
    dy, x, other = (torch.randn(num_rows, C, device=device) for _ in range(3))
    weight, bias = torch.randn(2, C, device=device)
    other = (other + mean).to(dtype) if residual else None
    return dy.to(dtype), (x if residual else x + mean).to(dtype), other, weight, bias


def run(function, dy, x, residual, weight, bias, *args):
    """{"y", "dx", "dresidual", "dweight", "dbias"} of one forward and backward pass; dresidual only if there is one."""
    inputs = {"x": x, "residual": residual, "weight": weight, "bias": bias}
    inputs = {name: t.detach().requires_grad_() for name, t in inputs.items() if t is not None}
    y = function(inputs["x"], inputs.get("residual"), inputs["weight"], inputs["bias"], *args)
    gradients = torch.autograd.grad(y, list(inputs.values()), dy)
    return {"y": y.detach(), **{f"d{name}": gradient for name, gradient in zip(inputs, gradients)}}


def unfused(x, residual, weight, bias):
    """What PyTorch does in x's dtype without this operator: the yardstick for half precision."""
    z = x if residual is None else x + residual
    return F.layer_norm(z, weight.shape, weight.to(x.dtype), bias.to(x.dtype), 1e-12)


def double(tensors):
    return [None if t is None else t.double() for t in tensors]


def check(*inputs):
    got = run(dropout_add_layernorm, *inputs)
    own = run(unfused, *inputs)
    exact = run(dropout_add_layernorm_reference, *double(inputs))
    assert_close(got, own, exact)


# The reference.


@pytest.mark.parametrize("residual", [True, False])
def test_reference_is_the_definition(residual):
    _, x, other, weight, bias = make_inputs(3, 6, torch.float64, residual=residual)
    weight, bias = weight.double(), bias.double()
    z = x + other if residual else x
    variance, mean = torch.var_mean(z, -1, correction=0, keepdim=True)
    expected = (z - mean) / (variance + 1e-12).sqrt() * weight + bias
    got = dropout_add_layernorm_reference(x, other, weight, bias)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    torch.autograd.gradcheck(
        lambda *args: dropout_add_layernorm_reference(args[0], args[1] if residual else None, *args[-2:]),
        [t.requires_grad_() for t in (x, other, weight, bias) if t is not None],
    )


# The kernels.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("num_rows, C", [(1, 768), (3, 1024), (50, 64), (41, 200), (1000, 128), (2, 8192), (5, 1)])
def test_matches_reference(num_rows, C, residual, dtype, device, triton_backend):
    if C == 1:
        # A row of one element has xhat 0 and rstd 1e6, which only fp64 shows; y is the bias.
        _, x, other, weight, bias = make_inputs(num_rows, C, dtype, device, residual)
        y = dropout_add_layernorm(x, other, weight, bias)
        assert torch.equal(y, bias.to(dtype).expand(num_rows, 1))
    else:
        check(*make_inputs(num_rows, C, dtype, device, residual))


@pytest.mark.parametrize("dropout_prob", [0.0, 0.1])
def test_no_rows(dropout_prob, device, triton_backend):
    got = run(dropout_add_layernorm, *make_inputs(0, 768, torch.float16, device), dropout_prob)
    assert got["y"].shape == got["dx"].shape == got["dresidual"].shape == (0, 768)
    assert (got["dweight"] == 0).all() and (got["dbias"] == 0).all()


def recover_mask(num_rows, C, dropout_prob, device):
    """(num_rows, C) bool, the kernel's own mask, True where kept.

    From a row of ones dropout leaves zeros and one positive value, of which LayerNorm makes negative and positive
    ones (or zeros, in a row where all are alike).
    """
    ones = torch.ones(num_rows, C, device=device)
    y = dropout_add_layernorm(ones, None, ones[0], torch.zeros_like(ones[0]), dropout_prob)
    return y > 0


@pytest.mark.parametrize("C, dropout_prob", [(768, 0.1), (200, 0.1), (200, 0.5), (200, 0.9)])
def test_dropout_keeps_the_right_share(C, dropout_prob, device, triton_backend):
    keep = recover_mask(400, C, dropout_prob, device).double()
    # Five standard deviations of the mean of independent draws, over all elements, in each column and in each row.
    for dim in ((0, 1), 0, 1):
        share = keep.mean(dim)
        sigma = (dropout_prob * (1 - dropout_prob) * share.numel() / keep.numel()) ** 0.5
        assert ((share - (1 - dropout_prob)).abs() < 5 * sigma).all()


def test_dropout_draws_are_independent(device, triton_backend):
    """Neither columns, nor rows, nor seeds repeat each other: correlations stay within five standard deviations."""
    first, second = (recover_mask(256, 512, 0.5, device).double() - 0.5 for _ in range(2))
    bound = 5 * 0.25 / first.numel() ** 0.5
    pairs = [(first[:, shift:], first[:, : 512 - shift]) for shift in (1, 2, 3, 4, 5, 6, 7, 8, 64, 256)]
    pairs += [(first[shift:], first[: 256 - shift]) for shift in (1, 2, 4, 8, 64)]
    for a, b in [*pairs, (first, second)]:
        assert (a * b).mean().abs() < bound * (first.numel() / a.numel()) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("residual", [True, False])
def test_dropout_matches_formula(residual, dtype, device, triton_backend):
    """Given the kernel's mask, y and all gradients are those of the formula."""
    num_rows, C, dropout_prob = 37, 200, 0.1
    inputs = make_inputs(num_rows, C, dtype, device, residual)
    torch.manual_seed(5)
    keep = recover_mask(num_rows, C, dropout_prob, device)
    torch.manual_seed(5)
    got = run(dropout_add_layernorm, *inputs, dropout_prob)
    assert torch.equal(got["dx"] != 0, keep)
    threshold = round(dropout_prob * 65536)
    factor = keep * 65536 / (65536 - threshold)

    def formula(function):
        return lambda x, *rest: function(x * factor.to(x.dtype), *rest)

    own = run(formula(unfused), *inputs)
    exact = run(formula(dropout_add_layernorm_reference), *double(inputs))
    assert_close(got, own, exact)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_manual_seed_decides(backend, device, triton_backend):
    kernels.set_backend(backend)
    inputs = make_inputs(10, 64, torch.float32, device)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(run(dropout_add_layernorm, *inputs, 0.1))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert not torch.equal(results[0]["y"], results[2]["y"])
    state = torch.get_rng_state()
    run(dropout_add_layernorm, *inputs, 0.0)
    assert torch.equal(state, torch.get_rng_state())  # without dropout nothing is drawn


def test_deterministic(device, triton_backend):
    inputs = make_inputs(100, 200, torch.float16, device)
    first, second = run(dropout_add_layernorm, *inputs), run(dropout_add_layernorm, *inputs)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_any_layout_of_the_gradient(device, triton_backend):
    _, x, residual, weight, bias = make_inputs(6, 64, torch.float32, device)
    got = run(dropout_add_layernorm, torch.ones((), device=device).expand(6, 64), x, residual, weight, bias)
    expected = run(dropout_add_layernorm, torch.ones(6, 64, device=device), x, residual, weight, bias)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


class Faulty:
    """The real backward kernel, called with arguments changed by `fault(list of arguments)`."""

    def __init__(self, kernel, fault):
        self.kernel, self.fault = kernel, fault

    def __getitem__(self, grid):
        def launch(*args, **cfg):
            finish = self.fault(args := list(args))
            self.kernel[grid](*args, **cfg)
            finish()

        return launch


def sums_in_half_precision(args):
    partial = args[8]
    args[8] = partial.half()
    return lambda: partial.copy_(args[8])


def last_row_dropped(args):
    dz = args[6]
    args[9] -= 1
    return lambda: dz[-1].zero_()


@pytest.mark.parametrize("fault, noticed", [(sums_in_half_precision, "dweight"), (last_row_dropped, "dbias")])
def test_faults_are_noticed(fault, noticed, device, monkeypatch, triton_backend):
    inputs = make_inputs(60, 64, torch.float32, device)
    check(*inputs)
    monkeypatch.setattr(module, "backward_kernel", Faulty(module.backward_kernel, fault))
    with pytest.raises(AssertionError, match=noticed):
        check(*inputs)


def test_operator_contract(device, triton_backend):
    _, x, residual, weight, bias = (t.requires_grad_() for t in make_inputs(5, 64, torch.float32, device))
    seed = torch.tensor([3], device=device)
    for args in ((x, residual, weight, bias, seed, 0.1, 1e-12), (x, None, weight, bias, None, 0.0, 1e-12)):
        torch.library.opcheck(module.layernorm_op, args)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_compiled_equals_eager(backend, device, triton_backend):
    kernels.set_backend(backend)

    def function(*args):
        return dropout_add_layernorm(*args) * 2

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for num_rows, stance in ((10, "default"), (12, "default"), (15, "fail_on_recompile")):
        inputs = make_inputs(num_rows, 64, torch.float32, device)
        with torch.compiler.set_stance(stance):  # the second row count is the last that compiles anything
            torch.manual_seed(1)
            got = run(compiled, *inputs, 0.1)
        torch.manual_seed(1)
        expected = run(function, *inputs, 0.1)
        assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_errors_name_the_cause(device, triton_backend):
    _, x, residual, weight, bias = make_inputs(4, 16, torch.float32, device)
    cases = [
        ("expected .num_rows, C", (x[None], None, weight, bias)),
        ("residual is", (x, residual.half(), weight, bias)),
        ("residual is", (x, residual[:3], weight, bias)),
        ("weight and bias have shapes", (x, residual, weight[:8], bias)),
        ("must be where x is", (x, residual, weight.to("meta"), bias)),
        ("dropout_prob=1.0", (x, residual, weight, bias, 1.0)),
        ("float64", (x.double(), None, weight, bias)),
        ("weight and bias in float32", (x, residual, weight.half(), bias)),
        ("rows of 1 to 8192", (x.new_ones(1, 8193), None, x.new_ones(8193), x.new_ones(8193))),
        ("contiguous", (x.T.contiguous().T, residual, weight, bias)),
    ]
    for words, args in cases:
        with pytest.raises(ValueError, match=words):
            dropout_add_layernorm(*args)


# On a GPU alone.


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize(
    "num_rows, C", [(1, 768), (3, 768), (1000, 768), (50_000, 768), (8192, 1024), (999, 200), (1000, 64), (64, 8192)]
)
def test_on_gpu(num_rows, C, residual, dtype):
    check(*make_inputs(num_rows, C, dtype, "cuda", residual))


@pytest.mark.gpu
def test_repeats_are_bitwise_equal():
    inputs = make_inputs(8192, 768, torch.bfloat16, "cuda")
    torch.manual_seed(1)
    first = run(dropout_add_layernorm, *inputs, 0.1)
    for _ in range(100):
        torch.manual_seed(1)
        again = run(dropout_add_layernorm, *inputs, 0.1)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.gpu
def test_compiled_by_inductor():
    def function(*args):
        return dropout_add_layernorm(*args) * 2

    compiled = torch.compile(function, fullgraph=True)
    for num_rows in (1000, 77):
        inputs = make_inputs(num_rows, 768, torch.bfloat16, "cuda")
        got, expected = run(compiled, *inputs), run(function, *inputs)
        assert all(torch.equal(got[name], expected[name]) for name in expected)
    dropped = run(compiled, *inputs, 0.1)["dx"] == 0
    assert 0.09 < dropped.float().mean() < 0.11
