"""kernels/cross_entropy.py: what the operator must do, and proof that these tests notice when it doesn't.

As in test_attention.py, the kernel runs in Triton's interpreter where there is no GPU, and bf16 is tested on a GPU only.
"""

import math

import pytest
import torch
import torch.nn.functional as F

import kernels
from kernels import cross_entropy, linear_cross_entropy, linear_cross_entropy_reference
from tests.conftest import Faulty, assert_close

pytestmark = pytest.mark.usefixtures("poison_empty")
SCALE = 0.37  # the incoming gradient


def make_inputs(num_rows, C, V, dtype, device="cpu"):
    """(hidden, weight, bias, labels), every third row ignored."""
    hidden, weight = torch.randn(num_rows, C, device=device).to(dtype), torch.randn(V, C, device=device) / C**0.5
    labels = torch.randint(V, (num_rows,), device=device)
    labels[::3] = -100
    return hidden, weight, torch.randn(V, device=device), labels


def run(function, hidden, weight, bias, labels, scale=SCALE):
    """{"loss", "dhidden", "dweight", "dbias"} of one forward and backward pass."""
    inputs = [t.detach().requires_grad_() for t in (hidden, weight, bias)]
    loss = function(*inputs, labels)
    gradients = torch.autograd.grad(loss * scale, inputs)
    return {"loss": loss.detach(), **dict(zip(("dhidden", "dweight", "dbias"), gradients))}


def unfused(hidden, weight, bias, labels):
    """PyTorch's computation under autocast: the yardstick for half precision."""
    logits = F.linear(hidden, weight.to(hidden.dtype), bias.to(hidden.dtype))
    return F.cross_entropy(logits.float(), labels, reduction="sum")


def check(hidden, weight, bias, labels):
    inputs = hidden, weight, bias
    got, own = run(linear_cross_entropy, *inputs, labels), run(unfused, *inputs, labels)
    assert got["loss"].dtype == got["dweight"].dtype == got["dbias"].dtype == torch.float32
    assert got["dhidden"].dtype == hidden.dtype
    assert_close(got, own, run(linear_cross_entropy_reference, *(t.double() for t in inputs), labels))


def test_reference_is_the_definition():
    hidden, weight, bias, labels = make_inputs(7, 5, 11, torch.float64)
    weight, bias = weight.double(), bias.double()
    logits = hidden @ weight.T + bias
    expected = sum(logits[i].exp().sum().log() - logits[i, l] for i, l in enumerate(labels) if l != -100)
    torch.testing.assert_close(linear_cross_entropy_reference(hidden, weight, bias, labels), expected)
    torch.autograd.gradcheck(
        lambda *args: linear_cross_entropy_reference(*args, labels), [t.requires_grad_() for t in (hidden, weight, bias)]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("num_rows, C, V", [(1, 16, 70), (2, 16, 8), (37, 24, 1000), (9, 16, 4200), (12, 32, 8200)])
def test_matches_reference(num_rows, C, V, dtype, device, triton_backend):
    check(*make_inputs(num_rows, C, V, dtype, device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_extreme_scores(dtype, device, triton_backend):
    """Logits of up to +-30,000, with certain and hopeless labels: nothing overflows, and the gradient is exact."""
    V = 100
    weight, bias = torch.eye(V, device=device), torch.zeros(V, device=device)
    hidden = torch.zeros(5, V, device=device)
    hidden[0, 3], hidden[1, 3], hidden[2], hidden[3, :50] = 30000, 30000, -30000, 30000
    labels = torch.tensor([3, 4, 5, 6, 7], device=device)
    hidden = hidden.to(dtype)
    got = run(linear_cross_entropy, hidden, weight, bias, labels, scale=1.0)
    expected = run(linear_cross_entropy_reference, hidden.double(), weight.double(), bias.double(), labels, scale=1.0)
    for name in got:
        torch.testing.assert_close(got[name].double(), expected[name], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(got["loss"].item(), 30000 + 2 * math.log(V) + math.log(50), rtol=1e-6, atol=0.0)


def test_ignored_rows_do_not_count(device, triton_backend):
    hidden, weight, bias, labels = make_inputs(30, 16, 200, torch.float32, device)
    ignored = labels == -100
    got = run(linear_cross_entropy, hidden, weight, bias, labels)
    assert (got["dhidden"][ignored] == 0).all() and (got["dhidden"][~ignored] != 0).any(1).all()
    elsewhere = torch.where(ignored[:, None], 1e4, hidden)
    again = run(linear_cross_entropy, elsewhere, weight, bias, labels)
    assert all(torch.equal(got[name], again[name]) for name in got)
    nothing = run(linear_cross_entropy, hidden, weight, bias, torch.full_like(labels, -100))
    assert all((value == 0).all() for value in nothing.values())


def test_padded_vocabulary_counts(device, triton_backend):
    """The sum of exponentials includes all columns, as in PyTorch's cross-entropy of the same logits."""
    hidden, weight, bias, labels = make_inputs(8, 16, 128, torch.float32, device)
    whole = linear_cross_entropy(hidden, weight, bias, labels.clamp(max=99))
    part = linear_cross_entropy(hidden, weight[:100], bias[:100], labels.clamp(max=99))
    assert whole > part + 0.1
    torch.testing.assert_close(whole, unfused(hidden, weight, bias, labels.clamp(max=99)))


def test_gradient_scales_exactly(device, triton_backend):
    """Forward computes the gradient without the factor: a power of two must scale it to the last bit."""
    inputs = make_inputs(20, 16, 300, torch.float32, device)
    once, scaled = run(linear_cross_entropy, *inputs, scale=1.0), run(linear_cross_entropy, *inputs, scale=2.0**-18)
    assert all(torch.equal(once[name] * 2.0**-18, scaled[name]) for name in ("dhidden", "dweight", "dbias"))


def test_no_rows(device, triton_backend):
    got = run(linear_cross_entropy, *make_inputs(0, 16, 70, torch.float32, device))
    assert got["dhidden"].shape == (0, 16) and all((value == 0).all() for value in got.values())


def neighbouring_labels(args):
    args[1] = torch.where(args[1] > 0, args[1] - 1, args[1])
    return lambda: None


def gradient_in_half_precision(args):
    logits = args[0]
    args[0] = logits.half()
    return lambda: logits.copy_(args[0])


def last_row_ignored(args):
    args[1] = torch.cat((args[1][:-1], torch.full_like(args[1][-1:], -100)))
    return lambda: None


@pytest.mark.parametrize(
    "fault, noticed",
    [
        (neighbouring_labels, "loss"),
        (neighbouring_labels, "dbias"),
        (gradient_in_half_precision, "dweight"),
        (gradient_in_half_precision, "dbias"),
        (last_row_ignored, "dhidden"),
    ],
)
def test_faults_are_noticed(fault, noticed, device, monkeypatch, triton_backend):
    inputs = make_inputs(20, 16, 300, torch.float32, device)
    check(*inputs)
    monkeypatch.setattr(cross_entropy, "cross_entropy_kernel", Faulty(cross_entropy.cross_entropy_kernel, fault))
    with pytest.raises(AssertionError, match=noticed):
        check(*inputs)


def test_operator_contract(device, triton_backend):
    """torch.library's own checks: schema, fake outputs, dynamic shapes under AOTAutograd."""
    *inputs, labels = make_inputs(6, 16, 70, torch.float32, device)
    hidden, weight, bias = (t.detach() for t in inputs)
    dloss, dlogits = torch.tensor(2.0, device=device), torch.randn(6, 70, device=device)
    for h, w in ((hidden, weight), (hidden.T.contiguous().T, weight.T.contiguous().T)):  # any strides
        torch.library.opcheck(torch.ops.mosaicbert.linear_cross_entropy, (h, w, bias, labels))
        torch.library.opcheck(torch.ops.mosaicbert.linear_cross_entropy_backward, (dloss, h, w, dlogits))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_compiled_equals_eager(backend, device, triton_backend):
    kernels.set_backend(backend)
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    for num_rows, stance in ((10, "default"), (12, "default"), (15, "fail_on_recompile")):
        inputs = make_inputs(num_rows, 16, 300, torch.float32, device)
        with torch.compiler.set_stance(stance):  # nothing compiles after the second row count
            got = run(compiled, *inputs)
        expected = run(linear_cross_entropy, *inputs)
        assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_errors_name_the_cause(device, triton_backend):
    hidden, weight, bias, labels = make_inputs(4, 16, 70, torch.float32, device)
    cases = [
        ("have shapes", (hidden[None], weight, bias, labels)),
        ("have shapes", (hidden, weight[:, :8], bias, labels)),
        ("have shapes", (hidden, weight, bias[:8], labels)),
        ("have shapes", (hidden, weight, bias, labels[:2])),
        ("int32", (hidden, weight, bias, labels.int())),
        ("float64", (hidden.double(), weight, bias, labels)),
        ("weight and bias in float32", (hidden, weight.half(), bias, labels)),
    ]
    for words, args in cases:
        with pytest.raises(ValueError, match=words):
            linear_cross_entropy(*args)


# On a GPU only


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("num_rows, C, V", [(1000, 768, 30528), (5000, 768, 30528), (77, 1024, 30528), (300, 64, 999)])
def test_on_gpu(num_rows, C, V, dtype, triton_backend):
    check(*make_inputs(num_rows, C, V, dtype, "cuda"))


@pytest.mark.gpu
def test_repeats_are_bitwise_equal(triton_backend):
    inputs = make_inputs(4096, 768, 30528, torch.bfloat16, "cuda")
    first = run(linear_cross_entropy, *inputs)
    for _ in range(100):
        again = run(linear_cross_entropy, *inputs)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.gpu
def test_compiled_by_inductor(triton_backend):
    compiled = torch.compile(linear_cross_entropy, fullgraph=True)
    for num_rows in (1000, 77):
        inputs = make_inputs(num_rows, 768, 30528, torch.bfloat16, "cuda")
        got, expected = run(compiled, *inputs), run(linear_cross_entropy, *inputs)
        assert_close(got, expected, {name: value.double() for name, value in expected.items()})


@pytest.mark.gpu
def test_memory_is_one_set_of_logits(triton_backend):
    """Besides inputs and results, a pass holds num_rows * V elements in bf16 and little more."""
    inputs = make_inputs(16384, 768, 30528, torch.bfloat16, "cuda")
    run(linear_cross_entropy, *inputs)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(linear_cross_entropy, *inputs)
    assert torch.cuda.max_memory_allocated() - before < 1.5 * 16384 * 30528 * 2
