"""kernels/embedding.py: what the operator must do, and proof that these tests notice when it does not.

As in test_attention.py the kernels run in Triton's interpreter where there is no GPU, and bf16 is left to a GPU.
"""

import sys

import pytest
import torch
import torch.nn.functional as F

import kernels
from conftest import Faulty, assert_close
from kernels import embedding_layernorm, embedding_layernorm_reference

module = sys.modules["kernels.embedding"]
pytestmark = pytest.mark.usefixtures("poison_empty")
NAMES = ("words", "types", "weight", "bias")


def make_inputs(num_rows, C, V=50, device="cpu", with_types=True):
    """(ids, type_ids, words, types, weight, bias), with a mean of z that is large beside its deviation."""
    ids = torch.randint(V, (num_rows,), device=device, dtype=torch.int32)
    ids[::5] = 0
    type_ids = torch.randint(2, (num_rows,), device=device) if with_types else None
    words, types = torch.randn(V, C, device=device) + 5, torch.randn(2, C, device=device)
    return ids, type_ids, words, types, *torch.randn(2, C, device=device)


def run(function, ids, type_ids, *rest, dropout_prob=0.0, dtype=None, gradients=None):
    """{"out", "dwords", "dtypes", "dweight", "dbias"} of one forward and backward pass, with both results used."""
    inputs = [t.detach().requires_grad_() for t in rest]
    out, following = function(ids, type_ids, *inputs, dropout_prob, 1e-12, dtype)
    assert torch.equal(out, following)
    dout, dnext = gradients if gradients is not None else make_gradients(out)
    results = torch.autograd.grad((out, following), inputs, (dout.to(out.dtype), dnext.to(out.dtype)))
    return {"out": out.detach(), **{f"d{name}": result for name, result in zip(NAMES, results)}}


def make_gradients(out):
    generator = torch.Generator(out.device).manual_seed(3)
    return torch.randn(2, *out.shape, generator=generator, device=out.device)


def unfused(ids, type_ids, words, types, weight, bias, dropout_prob, eps, dtype):
    """What PyTorch does in dtype without this operator: the yardstick for half precision."""
    z = F.embedding(ids, words, 0) + (types[0] if type_ids is None else F.embedding(type_ids, types))
    z = z.to(dtype or z.dtype)
    out = F.layer_norm(z, weight.shape, weight.to(z.dtype), bias.to(z.dtype), eps)
    return out, out


def check(ids, type_ids, *rest, dtype=None):
    got, own = (run(f, ids, type_ids, *rest, dtype=dtype) for f in (embedding_layernorm, unfused))
    assert got["out"].dtype == (dtype or torch.float32)
    rounded = make_gradients(got["out"]).to(got["out"].dtype).double()
    exact = run(embedding_layernorm_reference, ids, type_ids, *(t.double() for t in rest), gradients=rounded)
    assert (got["dwords"][0] == 0).all()  # [PAD]
    assert_close(got, own, exact)


@pytest.mark.parametrize("with_types", [True, False])
def test_reference_is_the_definition(with_types):
    ids, type_ids, *rest = make_inputs(9, 6, V=7, with_types=with_types)
    words, types, weight, bias = (t.double() for t in rest)
    z = words[ids] + (types[type_ids] if with_types else types[0])
    variance, mean = torch.var_mean(z, -1, correction=0, keepdim=True)
    expected = (z - mean) / (variance + 1e-12).sqrt() * weight + bias
    got, following = embedding_layernorm_reference(ids, type_ids, words, types, weight, bias)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert got is following


@pytest.mark.parametrize("dtype", [None, torch.float16])
@pytest.mark.parametrize("with_types", [True, False])
@pytest.mark.parametrize("num_rows, C", [(1, 768), (30, 64), (21, 200), (9, 1024)])
def test_matches_reference(num_rows, C, with_types, dtype, device, triton_backend):
    check(*make_inputs(num_rows, C, device=device, with_types=with_types), dtype=dtype)


def test_no_rows(device, triton_backend):
    got = run(embedding_layernorm, *make_inputs(0, 64, device=device), dropout_prob=0.1)
    assert got["out"].shape == (0, 64) and all((got[f"d{name}"] == 0).all() for name in NAMES)


def test_dropout(device, triton_backend):
    """The right share is dropped; what stays is scaled; backward drops the same; the seed decides."""
    inputs = make_inputs(100, 200, device=device)
    torch.manual_seed(1)
    got, plain = run(embedding_layernorm, *inputs, dropout_prob=0.1), run(embedding_layernorm, *inputs)
    keep = got["out"] != 0
    assert abs(keep.double().mean() - 0.9) < 5 * (0.09 / keep.numel()) ** 0.5
    scale = 65536 / (65536 - round(0.1 * 65536))
    torch.testing.assert_close(got["out"], torch.where(keep, plain["out"] * scale, 0.0))
    masked = make_gradients(got["out"]) * keep * scale
    expected = run(embedding_layernorm, *inputs, gradients=masked)
    for name in NAMES:
        torch.testing.assert_close(got[f"d{name}"], expected[f"d{name}"], rtol=1e-4, atol=1e-4)
    torch.manual_seed(1)
    again = run(embedding_layernorm, *inputs, dropout_prob=0.1)
    assert all(torch.equal(got[name], again[name]) for name in got)
    assert not torch.equal(run(embedding_layernorm, *inputs, dropout_prob=0.1)["out"], got["out"])


def second_gradient_dropped(args):
    args[1] = None


def types_forgotten(args):
    args[3] = None


def last_row_left_out(args):
    args[10][-1] = 0
    args[12] -= 1


@pytest.mark.parametrize(
    "fault, noticed", [(second_gradient_dropped, "dwords"), (types_forgotten, "dweight"), (last_row_left_out, "dbias")]
)
def test_faults_are_noticed(fault, noticed, device, monkeypatch, triton_backend):
    inputs = make_inputs(33, 64, device=device)
    check(*inputs)
    monkeypatch.setattr(module, "backward_kernel", Faulty(module.backward_kernel, fault))
    with pytest.raises(AssertionError, match=noticed):
        check(*inputs)


def test_operator_contract(device, triton_backend):
    ids, type_ids, words, types, weight, bias = make_inputs(6, 64, device=device)
    dout, mean, rstd = torch.randn(6, 64, device=device), *torch.randn(2, 6, device=device)
    for kind, seed, p in ((type_ids, torch.tensor([3], device=device), 0.1), (None, None, 0.0)):
        args = (ids, kind, words, types, weight)
        torch.library.opcheck(torch.ops.mosaicbert.embedding_layernorm, (*args, bias, seed, p, 1e-12, torch.float16))
        torch.library.opcheck(torch.ops.mosaicbert.embedding_layernorm_backward, (dout, None, *args, seed, mean, rstd, p))


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("with_types", [True, False])
def test_compiled_equals_eager(with_types, backend, device, triton_backend):
    kernels.set_backend(backend)
    compiled = torch.compile(embedding_layernorm, backend="aot_eager", fullgraph=True)
    for num_rows, stance in ((10, "default"), (12, "default"), (15, "fail_on_recompile")):
        inputs = make_inputs(num_rows, 64, device=device, with_types=with_types)
        with torch.compiler.set_stance(stance):  # the second row count is the last that compiles anything
            torch.manual_seed(1)
            got = run(compiled, *inputs, dropout_prob=0.1)
        torch.manual_seed(1)
        expected = run(embedding_layernorm, *inputs, dropout_prob=0.1)
        assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_errors_name_the_cause(device, triton_backend):
    ids, type_ids, words, types, weight, bias = make_inputs(4, 16, device=device)
    cases = [
        ("ids and type_ids have shapes", (ids[None], None, words, types, weight, bias)),
        ("ids and type_ids have shapes", (ids, type_ids[:2], words, types, weight, bias)),
        ("weight, bias have shapes", (ids, None, words, types[:, :8], weight, bias)),
        ("dropout_prob=1.0", (ids, None, words, types, weight, bias, 1.0)),
        ("float32", (ids, None, words.half(), types, weight, bias)),
        ("rows of up to 8192", (ids, None, *(words.new_ones(2, 8193),) * 2, *(words.new_ones(8193),) * 2)),
    ]
    for words_, args in cases:
        with pytest.raises(ValueError, match=words_):
            embedding_layernorm(*args)


# On a GPU alone.


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, None])
@pytest.mark.parametrize("with_types", [True, False])
@pytest.mark.parametrize("num_rows, C", [(1000, 768), (50_000, 768), (8192, 1024), (999, 200)])
def test_on_gpu(num_rows, C, with_types, dtype, triton_backend):
    check(*make_inputs(num_rows, C, V=5000, device="cuda", with_types=with_types), dtype=dtype)


@pytest.mark.gpu
def test_repeats_are_bitwise_equal(triton_backend):
    inputs = make_inputs(8192, 768, V=5000, device="cuda", with_types=False)
    torch.manual_seed(1)
    first = run(embedding_layernorm, *inputs, dropout_prob=0.1, dtype=torch.bfloat16)
    for _ in range(100):
        torch.manual_seed(1)
        again = run(embedding_layernorm, *inputs, dropout_prob=0.1, dtype=torch.bfloat16)
        assert all(torch.equal(first[name], again[name]) for name in first)
