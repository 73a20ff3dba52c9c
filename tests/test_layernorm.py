"""kernels/layernorm.py: what the operator must do, and proof that these tests notice when it doesn't.

As in test_attention.py, the kernels run in Triton's interpreter where there is no GPU, and bf16 is tested on a GPU only.
"""

import pytest
import torch
import torch.nn.functional as F

import kernels
from kernels import dropout_add_layernorm, dropout_add_layernorm_reference, layernorm
from tests.conftest import Faulty, assert_close

pytestmark = pytest.mark.usefixtures("poison_empty")
NAMES = ("x", "residual", "weight", "bias", "x_bias")


def make_inputs(num_rows, C, dtype, device="cpu", residual=True, mean=10.0):
    """(dy, dnext, x, residual, weight, bias, x_bias). The mean of z is large compared with its deviation of 1.

    Without a residual, dnext, residual and x_bias are None.
    """
    dy, dnext, x, other = (torch.randn(num_rows, C, device=device) for _ in range(4))
    weight, bias, x_bias = torch.randn(3, C, device=device)
    if not residual:
        return dy.to(dtype), None, (x + mean).to(dtype), None, weight, bias, None
    return dy.to(dtype), dnext.to(dtype), x.to(dtype), (other + mean).to(dtype), weight, bias, x_bias


def run(function, dy, dnext, x, residual, weight, bias, x_bias, dropout_prob=0.0):
    """{"y", "dx", "dresidual", "dweight", "dbias", "dx_bias"}, those that exist, of one forward and backward pass."""
    inputs = dict(zip(NAMES, (x, residual, weight, bias, x_bias)))
    inputs = {name: t.detach().requires_grad_() for name, t in inputs.items() if t is not None}
    y, following = function(*(inputs.get(name) for name in NAMES[:4]), dropout_prob, 1e-12, inputs.get("x_bias"))
    assert torch.equal(y, following)
    outputs, gradients = ((y,), (dy,)) if dnext is None else ((y, following), (dy, dnext))
    gradients = torch.autograd.grad(outputs, list(inputs.values()), gradients)
    return {"y": y.detach(), **{f"d{name}": gradient for name, gradient in zip(inputs, gradients)}}


def unfused(x, residual, weight, bias, dropout_prob=0.0, eps=1e-12, x_bias=None):
    """PyTorch's computation in x's dtype without this operator: the yardstick for half precision."""
    z = x if x_bias is None else x + x_bias.to(x.dtype)
    z = z if residual is None else z + residual
    y = F.layer_norm(z, weight.shape, weight.to(x.dtype), bias.to(x.dtype), eps)
    return y, y


def double(tensors):
    return [None if t is None else t.double() for t in tensors]


def check(*inputs):
    got = run(dropout_add_layernorm, *inputs)
    own = run(unfused, *inputs)
    exact = run(dropout_add_layernorm_reference, *double(inputs))
    assert_close(got, own, exact)


# The reference


@pytest.mark.parametrize("residual", [True, False])
def test_reference_is_the_definition(residual):
    x, other, weight, bias, x_bias = double(make_inputs(3, 6, torch.float64, residual=residual)[2:])
    z = x + x_bias + other if residual else x
    variance, mean = torch.var_mean(z, -1, correction=0, keepdim=True)
    expected = (z - mean) / (variance + 1e-12).sqrt() * weight + bias
    got, following = dropout_add_layernorm_reference(x, other, weight, bias, x_bias=x_bias)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert got is following
    torch.autograd.gradcheck(
        lambda x, weight, bias, *more: dropout_add_layernorm_reference(
            x, more[0] if more else None, weight, bias, x_bias=more[1] if more else None
        )[0],
        [t.requires_grad_() for t in (x, weight, bias, other, x_bias) if t is not None],
    )


# The kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("num_rows, C", [(1, 768), (3, 1024), (50, 64), (41, 200), (300, 128), (3, 1100), (2, 8192), (5, 1)])
def test_matches_reference(num_rows, C, residual, dtype, device, triton_backend):
    if C == 1:
        # A row of one element has xhat 0 and rstd 1e6, gradients that only fp64 resolves; y is the bias.
        _, _, x, other, weight, bias, _ = make_inputs(num_rows, C, dtype, device, residual)
        y, _ = dropout_add_layernorm(x, other, weight, bias)
        assert torch.equal(y, bias.to(dtype).expand(num_rows, 1))
    else:
        check(*make_inputs(num_rows, C, dtype, device, residual))


@pytest.mark.parametrize("dropout_prob", [0.0, 0.1])
def test_no_rows(dropout_prob, device, triton_backend):
    got = run(dropout_add_layernorm, *make_inputs(0, 768, torch.float16, device), dropout_prob)
    assert got["y"].shape == got["dx"].shape == got["dresidual"].shape == (0, 768)
    assert all((got[name] == 0).all() for name in ("dweight", "dbias", "dx_bias"))


def recover_mask(num_rows, C, dropout_prob, device):
    """(num_rows, C) bool, the kernel's own mask, True where kept.

    Dropout turns a row of ones into zeros and one positive value, and LayerNorm makes these negative and positive
    (or all 0, in a row of equal elements).
    """
    ones = torch.ones(num_rows, C, device=device)
    y, _ = dropout_add_layernorm(ones, None, ones[0], torch.zeros_like(ones[0]), dropout_prob)
    return y > 0


@pytest.mark.parametrize("C, dropout_prob", [(768, 0.1), (200, 0.1), (200, 0.5), (200, 0.9), (520, 0.1)])
def test_dropout_keeps_the_right_share(C, dropout_prob, device, triton_backend):
    keep = recover_mask(200, C, dropout_prob, device).double()
    # Five standard deviations of the mean of independent draws: over all elements, per column and per row.
    for dim in ((0, 1), 0, 1):
        share = keep.mean(dim)
        sigma = (dropout_prob * (1 - dropout_prob) * share.numel() / keep.numel()) ** 0.5
        assert ((share - (1 - dropout_prob)).abs() < 5 * sigma).all()


def test_dropout_draws_are_independent(device, triton_backend):
    """Columns, rows and seeds are uncorrelated, to within five standard deviations."""
    first, second = (recover_mask(128, 512, 0.5, device).double() - 0.5 for _ in range(2))
    bound = 5 * 0.25 / first.numel() ** 0.5
    pairs = [(first[:, shift:], first[:, : 512 - shift]) for shift in (1, 2, 3, 4, 5, 6, 7, 8, 64, 256)]
    pairs += [(first[shift:], first[: 128 - shift]) for shift in (1, 2, 4, 8, 64)]
    for a, b in [*pairs, (first, second)]:
        assert (a * b).mean().abs() < bound * (first.numel() / a.numel()) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("residual", [True, False])
def test_dropout_matches_formula(residual, dtype, device, triton_backend):
    """With the kernel's own mask, the formula gives the same y and gradients."""
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
        def call(x, residual, weight, bias, dropout_prob, eps, x_bias):
            x = x if x_bias is None else x + x_bias.to(x.dtype)
            return function(x * factor.to(x.dtype), residual, weight, bias, dropout_prob, eps)

        return call

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
    assert torch.equal(state, torch.get_rng_state())  # nothing is drawn without dropout


def test_deterministic(device, triton_backend):
    inputs = make_inputs(50, 200, torch.float16, device)
    first, second = run(dropout_add_layernorm, *inputs), run(dropout_add_layernorm, *inputs)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_any_layout_of_the_gradient(device, triton_backend):
    inputs = make_inputs(6, 64, torch.float32, device)[2:]
    ones = torch.ones(6, 64, device=device)
    expanded = torch.ones((), device=device).expand(6, 64)
    got, expected = (run(dropout_add_layernorm, dy, dy, *inputs) for dy in (expanded, ones))
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_either_result_may_be_unused(backend, device, triton_backend):
    """The same gradient through the first result, through the second, or half through each."""
    kernels.set_backend(backend)
    dy, _, *inputs = make_inputs(6, 64, torch.float32, device)

    def swapped(*args):
        return dropout_add_layernorm(*args)[::-1]

    first = run(dropout_add_layernorm, dy, None, *inputs)
    second = run(swapped, dy, None, *inputs)
    halves = run(dropout_add_layernorm, dy / 2, dy / 2, *inputs)
    assert all(torch.equal(first[name], second[name]) and torch.equal(first[name], halves[name]) for name in first)


def sums_in_half_precision(args):
    partial = args[9]
    args[9] = partial.half()
    return lambda: partial.copy_(args[9])


def last_row_dropped(args):
    dz = args[7]
    args[10] -= 1
    return lambda: dz[-1].zero_()


def second_gradient_dropped(args):
    args[1] = None
    return lambda: None


@pytest.mark.parametrize(
    "fault, noticed",
    [(sums_in_half_precision, "dweight"), (last_row_dropped, "dbias"), (second_gradient_dropped, "dresidual")],
)
def test_faults_are_noticed(fault, noticed, device, monkeypatch, triton_backend):
    inputs = make_inputs(60, 64, torch.float32, device)
    check(*inputs)
    monkeypatch.setattr(layernorm, "backward_kernel", Faulty(layernorm.backward_kernel, fault))
    with pytest.raises(AssertionError, match=noticed):
        check(*inputs)


def test_operator_contract(device, triton_backend):
    dy, dnext, x, residual, weight, bias, x_bias = make_inputs(5, 64, torch.float32, device)
    for seed, other, following in ((torch.tensor([3], device=device), x_bias, dnext), (None, None, None)):
        p, has = 0.1 if seed is not None else 0.0, other is not None
        ops, statistics = torch.ops.mosaicbert, torch.randn(2, 5, device=device)
        args = x, other, residual if has else None, weight, bias, seed, p, 1e-12
        torch.library.opcheck(ops.dropout_add_layernorm, args)
        args = dy, following, x, weight, seed, *statistics, p, has, has
        torch.library.opcheck(ops.dropout_add_layernorm_backward, args)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_compiled_equals_eager(backend, device, triton_backend):
    kernels.set_backend(backend)

    def function(*args):
        y, following = dropout_add_layernorm(*args)
        return y * 2, following + following

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for num_rows, stance in ((10, "default"), (12, "default"), (15, "fail_on_recompile")):
        inputs = make_inputs(num_rows, 64, torch.float32, device)
        with torch.compiler.set_stance(stance):  # nothing compiles after the second row count
            torch.manual_seed(1)
            got = run(compiled, *inputs, 0.1)
        torch.manual_seed(1)
        expected = run(function, *inputs, 0.1)
        assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_errors_name_the_cause(device, triton_backend):
    _, _, x, residual, weight, bias, _ = make_inputs(4, 16, torch.float32, device)
    cases = [
        ("expected .num_rows, C", (x[None], None, weight, bias)),
        ("residual is", (x, residual.half(), weight, bias)),
        ("residual is", (x, residual[:3], weight, bias)),
        ("weight and biases have shapes", (x, residual, weight[:8], bias)),
        ("weight and biases have shapes", (x, residual, weight, bias, 0.0, 1e-12, bias[:8])),
        ("must be where x is", (x, residual, weight.to("meta"), bias)),
        ("dropout_prob=1.0", (x, residual, weight, bias, 1.0)),
        ("float64", (x.double(), None, weight, bias)),
        ("weight and biases in float32", (x, residual, weight.half(), bias)),
        ("rows of 1 to 8192", (x.new_ones(1, 8193), None, x.new_ones(8193), x.new_ones(8193))),
        ("contiguous", (x.T.contiguous().T, residual, weight, bias)),
    ]
    for words, args in cases:
        with pytest.raises(ValueError, match=words):
            dropout_add_layernorm(*args)


# On a GPU only


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
        y, following = dropout_add_layernorm(*args)
        return y * 2, following + following

    compiled = torch.compile(function, fullgraph=True)
    for num_rows in (1000, 77):
        inputs = make_inputs(num_rows, 768, torch.bfloat16, "cuda")
        got, expected = run(compiled, *inputs), run(function, *inputs)
        assert all(torch.equal(got[name], expected[name]) for name in expected)
    dropped = run(compiled, *inputs, 0.1)["dx"] == 0
    assert 0.09 < dropped.float().mean() < 0.11
