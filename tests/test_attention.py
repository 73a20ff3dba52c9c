"""The attention kernels: what the operator must do, and proof that these tests notice when it doesn't.

Without a GPU the kernels run in Triton's interpreter, whose bf16 products are wrong: fp32 and fp16 there, bf16 on a GPU.
conftest.assert_close says how close is close enough.

Sequences of up to 128 tokens go to attention_window.py, unless max_seqlen allows longer ones.
"""

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

import kernels
from common.batch import WINDOW_MULTIPLE, pack
from kernels import attention, attention_flash, attention_qkvpacked, attention_reference, attention_window
from kernels.backend import tl, triton
from tests.conftest import ROOT, assert_close

pytestmark = [
    pytest.mark.usefixtures("poison_empty"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),  # from numpy, for the NaN and faults we put in
]

SLOPES_12 = [2.0**-k for k in range(1, 9)] + [2.0 ** -(k + 0.5) for k in range(4)]  # 1/2..1/256, 0.7071..0.0884
EDGE_LENGTHS = [0, 1, 2, 63, 64, 65, 127, 128, 129, 300, 0]  # around the kernels' blocks of 64 and 128
SHORT_LENGTHS = [0, 1, 2, 63, 0, 64, 65, 127, 128, 5, 33, 100, 0]  # in windows of 66, 64, 65, 127, 128, 38, 100
TAIL = 70  # rows past the last sequence
KINDS = ["flash", "alone", "windows"]  # attention_flash; attention_window with one sequence per window, and with several


def make_inputs(lengths, H, D, dtype, device="cpu", slopes=True, tail=TAIL, kind=None):
    """(qkv, dout, cu_seqlens, max_seqlen, slopes, windows). kind: one of KINDS, or None to leave it to the lengths."""
    max_seqlen = {None: max(lengths) + 3, "flash": max(*lengths, 129)}.get(kind, max(lengths))
    cu_seqlens, windows = pack(np.array(lengths), max_seqlen)
    windows = torch.from_numpy(windows).to(device) if kind == "windows" else None
    total_tokens = sum(lengths) + tail
    qkv = torch.randn(total_tokens, 3, H, D).to(device, dtype)
    dout = torch.randn(total_tokens, H, D).to(device, dtype)
    slopes = torch.tensor((SLOPES_12 * 2)[:H], device=device) if slopes else None
    return qkv, dout, torch.from_numpy(cu_seqlens).to(device), max_seqlen, slopes, windows


def run(function, qkv, dout, *args):
    """{"out", "dq", "dk", "dv"} of one forward and backward pass. function: like attention_qkvpacked."""
    qkv = qkv.detach().requires_grad_()
    out = function(qkv, *args)
    (dqkv,) = torch.autograd.grad(out, qkv, dout)
    dq, dk, dv = dqkv.unbind(1)
    return {"out": out.detach(), "dq": dq, "dk": dk, "dv": dv}


def reference_packed(qkv, cu_seqlens, max_seqlen, slopes, windows=None):
    return attention_reference(*qkv.unbind(1), cu_seqlens, max_seqlen, slopes)


def check(qkv, dout, cu_seqlens, *args):
    """The kernels agree with the reference, and the tail is 0."""
    args = cu_seqlens, *args
    got = run(attention_qkvpacked, qkv, dout, *args)
    own = run(reference_packed, qkv, dout, *args)
    exact = run(reference_packed, qkv.double(), dout.double(), *args)
    for tensor in got.values():
        assert (tensor[cu_seqlens[-1] :] == 0).all()
    assert_close(got, own, exact)


# The reference against the definition, and its gradient against finite differences


def naive(q, k, v, cu_seqlens, slopes):
    out = torch.zeros_like(q)
    for b in range(len(cu_seqlens) - 1):
        rows = slice(cu_seqlens[b], cu_seqlens[b + 1])
        for h in range(q.shape[1]):
            i = torch.arange(len(q[rows]))
            scores = q[rows, h] @ k[rows, h].T / q.shape[-1] ** 0.5 - slopes[h] * (i[:, None] - i[None, :]).abs()
            out[rows, h] = torch.softmax(scores, -1) @ v[rows, h]
    return out


def test_reference_is_the_definition():
    qkv, _, cu_seqlens, max_seqlen, slopes, _ = make_inputs([3, 0, 7, 3, 1, 12], H=12, D=24, dtype=torch.float64)
    expected = naive(*qkv.unbind(1), cu_seqlens, slopes)
    got = reference_packed(qkv, cu_seqlens, max_seqlen, slopes)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    got = reference_packed(qkv, cu_seqlens, max_seqlen, None)
    torch.testing.assert_close(got, naive(*qkv.unbind(1), cu_seqlens, slopes * 0), rtol=1e-12, atol=1e-12)


def test_reference_gradient():
    qkv, _, *args = make_inputs([2, 0, 1, 2], H=2, D=2, dtype=torch.float64, tail=1)
    torch.autograd.gradcheck(lambda qkv: reference_packed(qkv, *args), qkv.requires_grad_())


def test_reference_without_a_token():
    qkv, dout, *args = make_inputs([0, 0], H=2, D=4, dtype=torch.float32)
    assert all((tensor == 0).all() for tensor in run(reference_packed, qkv, dout, *args).values())


# The kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "lengths, H, D, slopes",
    [
        (EDGE_LENGTHS, 1, 64, True),
        ([129, 0, 64, 5], 2, 32, False),
        ([5, 1, 33], 12, 64, True),
        ([40], 16, 32, True),
        ([70], 2, 16, True),
        ([130], 1, 128, True),
    ],
)
def test_matches_reference(lengths, H, D, slopes, dtype, device, triton_backend):
    check(*make_inputs(lengths, H, D, dtype, device, slopes))


@pytest.mark.parametrize("lengths, slopes", [([512, 0, 5], True), ([700], False)])
def test_many_blocks_match_reference(lengths, slopes, device, triton_backend):
    check(*make_inputs(lengths, 1, 64, torch.float16, device, slopes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "kind, H, D, slopes",
    [("windows", 2, 16, True), ("windows", 1, 64, False), ("alone", 2, 32, True)],
)
@pytest.mark.parametrize("many_windows", [1, 10**6])  # a program takes all heads of a window, or one
def test_windows_match_reference(many_windows, kind, H, D, slopes, dtype, device, triton_backend, monkeypatch):
    monkeypatch.setattr(attention_window, "MANY_WINDOWS", many_windows)
    check(*make_inputs(SHORT_LENGTHS, H, D, dtype, device, slopes, kind=kind))


def test_windows_are_greedy():
    """Neighbours share a window while they fit, and empty windows follow."""

    def windows(lengths, max_seqlen=128):
        return pack(np.array(lengths, dtype=int), max_seqlen)[1]

    assert windows([100, 28, 1, 0, 127, 128, 5]).tolist() == [0, 2, 5, 6, 7] + [7] * (WINDOW_MULTIPLE - 4)
    assert windows([]).tolist() == [0] * (WINDOW_MULTIPLE + 1)
    assert windows([1] * 128 * 40).tolist()[:41] == list(range(0, 128 * 41, 128))
    assert windows([5], 129) is None


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_token(kind, device, triton_backend):
    qkv, dout, *args = make_inputs([0, 0], H=2, D=32, dtype=torch.float32, device=device, kind=kind)
    assert all((tensor == 0).all() for tensor in run(attention_qkvpacked, qkv, dout, *args).values())
    assert len(attention_qkvpacked(qkv[:0], *args)) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_neighbours_do_not_leak(kind, device, triton_backend):
    """A sequence's results keep their bits, whatever the other sequences and the tail contain.

    For attention_window these must be finite: its tiles hold neighbours' rows, with weights of 0.
    """
    qkv, dout, *args = make_inputs([40, 70, 33], H=2, D=32, dtype=torch.float16, device=device, kind=kind)
    expected = run(attention_qkvpacked, qkv, dout, *args)
    for value in (float("nan"), 6e4) if kind == "flash" else (6e4, -6e4):
        changed, changed_dout = qkv.clone(), dout.clone()
        for x in (changed, changed_dout):
            x[:40] = value
            x[110:] = value
        got = run(attention_qkvpacked, changed, changed_dout, *args)
        for name, tensor in expected.items():
            assert torch.equal(got[name][40:110], tensor[40:110]), name
            assert (got[name][143:] == 0).all(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # loaded through pointers, and through descriptors
@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 128, 129, 200])
def test_blocks_end_with_their_sequence(length, dtype, device, triton_backend):
    """NaN right before a sequence and right behind its last block, full or not, changes no bit of it."""
    qkv, dout, *args = make_inputs([3, length, 5], H=1, D=64, dtype=dtype, device=device, kind="flash")
    own = slice(3, 3 + length)
    expected = run(attention_qkvpacked, qkv, dout, *args)
    for x in (qkv, dout):
        x[: own.start] = x[own.stop :] = float("nan")
    got = run(attention_qkvpacked, qkv, dout, *args)
    assert all(torch.equal(got[name][own], tensor[own]) for name, tensor in expected.items())


@pytest.mark.parametrize("kind", KINDS)
def test_deterministic(kind, device, triton_backend):
    inputs = make_inputs([70, 50], H=2, D=32, dtype=torch.float16, device=device, kind=kind)
    first, second = run(attention_qkvpacked, *inputs), run(attention_qkvpacked, *inputs)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_packed_and_separate_agree(backend, device, triton_backend):
    kernels.set_backend(backend)
    inputs = make_inputs([20, 9], H=2, D=32, dtype=torch.float32, device=device)
    packed = run(attention_qkvpacked, *inputs)
    separate = run(lambda qkv, *args: attention(*qkv.unbind(1), *args), *inputs)
    assert all(torch.equal(packed[name], separate[name]) for name in packed)


def test_any_layout_of_the_gradient(device, triton_backend):
    """sum() passes an expanded scalar, a transposed result a transposed tensor."""
    qkv, _, *args = make_inputs([20, 9], H=2, D=32, dtype=torch.float32, device=device)
    qkv.requires_grad_()
    out = attention_qkvpacked(qkv, *args)
    weights = torch.randn_like(out).transpose(0, 1)
    for loss, dout in ((out.sum(), torch.ones_like(out)), ((out.transpose(0, 1) * weights).sum(), weights.mT.mT)):
        (got,) = torch.autograd.grad(loss, qkv, retain_graph=True)
        dout = dout if dout.shape == out.shape else dout.transpose(0, 1)
        (expected,) = torch.autograd.grad(out, qkv, dout.contiguous(), retain_graph=True)
        assert torch.equal(got, expected)


@triton.jit
def wrong_sign(i, j, slope):
    return slope * tl.abs(i - j).to(tl.float32)


@triton.jit
def causal_slope(i, j, slope):
    return slope * (j - i).to(tl.float32)


@triton.jit
def no_mask(scores, offs_n, length):
    return scores


@triton.jit
def mask_from_the_start(scores, offs, first, end):  # tokens also see the sequences before their own
    return tl.where(offs[None, :] < end[:, None], scores, float("-inf"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a compiled kernel keeps the helpers it was compiled with")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "kind, helper, fault",
    [
        ("flash", "alibi", wrong_sign),
        ("flash", "alibi", causal_slope),
        ("flash", "mask_keys", no_mask),
        ("windows", "alibi", wrong_sign),
        ("windows", "alibi", causal_slope),
        ("windows", "mask_others", mask_from_the_start),
    ],
)
def test_faults_are_noticed(kind, helper, fault, dtype, monkeypatch, triton_backend):
    inputs = make_inputs([40, 21], H=2, D=32, dtype=dtype, kind=kind)
    check(*inputs)
    monkeypatch.setattr(attention_flash if kind == "flash" else attention_window, helper, fault)
    with pytest.raises(AssertionError, match="error"):
        check(*inputs)


def test_operator_contract(device, triton_backend):
    """torch.library's own checks: schema, fake outputs, dynamic shapes under AOTAutograd."""
    # No tail: lse is neither read nor written there, and NaN never compares equal.
    inputs = make_inputs([10, 5], 2, 16, torch.float32, device, tail=0, kind="windows")
    qkv, _, cu_seqlens, max_seqlen, slopes, windows = inputs
    qkv = qkv.detach()
    torch.library.opcheck(torch.ops.mosaicbert.flash_attention, (qkv, cu_seqlens, slopes, max_seqlen))
    torch.library.opcheck(torch.ops.mosaicbert.flash_attention, (qkv, cu_seqlens, None, max_seqlen))
    if attention_window.fits_window(qkv, max_seqlen):  # in the interpreter: on a GPU fp32 does not fit
        torch.library.opcheck(torch.ops.mosaicbert.window_attention, (qkv, cu_seqlens, windows, slopes))
        torch.library.opcheck(torch.ops.mosaicbert.window_attention, (qkv, cu_seqlens, None, None))


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_equals_eager(kind, device, triton_backend):
    """One graph, backward included. After two token counts nothing recompiles."""

    def function(qkv, *args):
        return attention_qkvpacked(qkv * 2, *args) + 1

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for lengths, stance in (([20, 9], "default"), ([30, 4, 5], "default"), ([3, 25, 7, 1], "fail_on_recompile")):
        inputs = make_inputs(lengths, H=2, D=32, dtype=torch.float16, device=device, kind=kind)
        inputs = *inputs[:3], max(inputs[3], 64), *inputs[4:]  # constant, as in training
        with torch.compiler.set_stance(stance):
            got = run(compiled, *inputs)
        expected = run(function, *inputs)
        assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_compiled_reference(device):
    """The same results, though reading the lengths breaks the graph."""
    inputs = make_inputs([5, 3, 0], H=2, D=32, dtype=torch.float32, device=device)
    got, expected = run(torch.compile(reference_packed, backend="aot_eager"), *inputs), run(reference_packed, *inputs)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_without_the_triton_package():
    """As on macOS: everything imports, and the PyTorch path works."""
    program = """
        import sys
        sys.modules["triton"] = None  # makes `import triton` raise ImportError
        import kernels, torch
        qkv, x = torch.ones(5, 3, 2, 8, requires_grad=True), torch.ones(5, 16, requires_grad=True)
        out = kernels.attention_qkvpacked(qkv, torch.tensor([0, 5], dtype=torch.int32), 5, torch.ones(2))
        y, _ = kernels.dropout_add_layernorm(x, out.flatten(1), x[0], x[1], 0.1)
        y.sum().backward()
        assert not kernels.uses_triton("cuda")
        try:
            kernels.set_backend("triton")
        except ValueError as error:
            print(error)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "pip install triton" in result.stdout, result.stderr


def test_errors_name_the_cause(device, triton_backend):
    qkv, _, cu_seqlens, max_seqlen, slopes, _ = make_inputs([4], H=2, D=16, dtype=torch.float32, device=device)
    args, windows = (qkv, cu_seqlens, max_seqlen, slopes), torch.tensor([0, 1], dtype=torch.int32)
    q, k, v = qkv.unbind(1)
    cases = [
        ("shapes", lambda: attention(q, k[:3], v, cu_seqlens, max_seqlen, slopes)),
        ("expected .total_tokens, 3, H, D", lambda: attention_qkvpacked(q, cu_seqlens, max_seqlen, slopes)),
        ("expected int32", lambda: attention_qkvpacked(qkv, cu_seqlens.long(), max_seqlen, slopes)),
        ("B at least 1", lambda: attention_qkvpacked(qkv, cu_seqlens[:1], max_seqlen, slopes)),
        ("one per head", lambda: attention_qkvpacked(qkv, cu_seqlens, max_seqlen, slopes[:1])),
        ("but q", lambda: attention(q, k.half(), v, cu_seqlens, max_seqlen, slopes)),
        ("on meta", lambda: attention_qkvpacked(qkv, cu_seqlens.to("meta"), max_seqlen, slopes)),
        ("float64", lambda: attention_qkvpacked(qkv.double(), cu_seqlens, max_seqlen, slopes)),
        ("not 12", lambda: attention_qkvpacked(qkv[..., :12], cu_seqlens, max_seqlen, slopes)),
        ("contiguous", lambda: attention_qkvpacked(qkv.mT.contiguous().mT, cu_seqlens, max_seqlen, slopes)),
        ("slopes in float32", lambda: attention_qkvpacked(qkv, cu_seqlens, max_seqlen, slopes.double())),
        ("windows is torch.int64", lambda: attention_qkvpacked(*args, windows.long().to(device))),
        ("W at least 1", lambda: attention_qkvpacked(*args, windows[:1].to(device))),
        ("windows is on meta", lambda: attention_qkvpacked(*args, windows.to("meta"))),
    ]
    for words, call in cases:
        with pytest.raises(ValueError, match=words):
            call()


def test_backends(device, monkeypatch):
    assert kernels.uses_triton("cuda") == torch.cuda.is_available()  # if the GPU has compute capability 8.0 or higher
    assert not kernels.uses_triton("cpu")
    with pytest.raises(ValueError, match="'cuda' is not one of auto, triton, torch"):
        kernels.set_backend("cuda")
    monkeypatch.setattr(kernels.backend, "can_run", lambda device: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="needs a GPU .* TRITON_INTERPRET=1"):
        kernels.set_backend("triton")


# On a GPU only

GPU_LENGTHS = [*EDGE_LENGTHS, 511, 512, 1000, 128, 100, 77, 5, 1000, 511, 30] * 2  # about 9,800 tokens
GPU_SHORT = [*SHORT_LENGTHS, 128, 100, 77, 5, 3, 2, 8, 30, 128, 90, 38, 1] * 5  # about 6,000 tokens


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("H, D", [(12, 64), (16, 64), (12, 32), (16, 32), (4, 128), (2, 16)])
@pytest.mark.parametrize("slopes", [True, False])
def test_on_gpu(H, D, dtype, slopes):
    check(*make_inputs(GPU_LENGTHS, H, D, dtype, "cuda", slopes))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("H, D", [(12, 64), (16, 64), (12, 32), (2, 16), (2, 128)])
@pytest.mark.parametrize("slopes", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("many_windows", [1, 10**6])
def test_short_on_gpu(many_windows, kind, H, D, dtype, slopes, monkeypatch):
    monkeypatch.setattr(attention_window, "MANY_WINDOWS", many_windows)
    check(*make_inputs(GPU_SHORT, H, D, dtype, "cuda", slopes, kind=kind))


@pytest.mark.gpu
def test_gpu_takes_windows():
    """The tests above do reach attention_window on GPUs that it supports."""
    qkv = torch.empty(1, 3, 12, 64, dtype=torch.bfloat16, device="cuda")
    hopper = torch.cuda.get_device_capability()[0] == 9
    assert attention_window.fits_window(qkv, 128) == hopper
    assert not attention_window.fits_window(qkv.float(), 128) and not attention_window.fits_window(qkv, 129)


@pytest.mark.gpu
@pytest.mark.parametrize("H, D", [(12, 64), (16, 32)])
@pytest.mark.parametrize("kind", KINDS)
def test_repeats_are_bitwise_equal(kind, H, D):
    inputs = make_inputs(GPU_LENGTHS if kind == "flash" else GPU_SHORT, H, D, torch.bfloat16, "cuda", kind=kind)
    first = run(attention_qkvpacked, *inputs)
    for _ in range(100):
        again = run(attention_qkvpacked, *inputs)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_graphs_read_the_inputs_of_their_replay(kind):
    """A graph keeps the descriptors of its capture, but not the data."""
    lengths = GPU_LENGTHS if kind == "flash" else GPU_SHORT
    qkv, dout, *args = make_inputs(lengths, 12, 64, torch.bfloat16, "cuda", kind=kind)
    run(attention_qkvpacked, qkv, dout, *args)  # compiles, which a capture cannot
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(attention_qkvpacked, qkv, dout, *args)
    for x in (qkv, dout):
        x.normal_()
    graph.replay()
    expected = run(attention_qkvpacked, qkv, dout, *args)
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


@pytest.mark.gpu
def test_neighbours_do_not_leak_on_gpu():
    qkv, dout, *args = make_inputs([1000, 300, 129], 12, 64, torch.bfloat16, "cuda")
    expected = run(attention_qkvpacked, qkv, dout, *args)
    for x in (qkv, dout):
        x[:1000] = float("nan")
        x[1300:] = float("nan")
    got = run(attention_qkvpacked, qkv, dout, *args)
    assert all(torch.equal(got[name][1000:1300], tensor[1000:1300]) for name, tensor in expected.items())


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_by_inductor(kind):
    """One graph, backward included, for other lengths and token counts too."""

    def function(qkv, *args):
        return attention_qkvpacked(qkv, *args) * 2

    compiled = torch.compile(function, fullgraph=True)
    for lengths in (GPU_LENGTHS if kind == "flash" else GPU_SHORT, [100, 30, 70]):
        inputs = make_inputs(lengths, 12, 64, torch.bfloat16, "cuda", kind=kind)
        got, expected = run(compiled, *inputs), run(function, *inputs)
        assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.gpu
@pytest.mark.parametrize("max_seqlen", [128, 129])  # attention_window; attention_flash
def test_row_addresses_beyond_32_bits(max_seqlen):
    """The last of 1.1 million rows of 3 * 12 * 64 elements starts past element 2^31."""
    lengths = [128, 1_000_000 - 256, 128]
    total_tokens = sum(lengths)
    qkv = torch.zeros(total_tokens, 3, 12, 64, dtype=torch.bfloat16, device="cuda")
    ends = torch.cat([torch.arange(128), torch.arange(total_tokens - 128, total_tokens)]).cuda()
    qkv[ends] = torch.randn(256, 3, 12, 64, dtype=torch.bfloat16, device="cuda")
    small, dout, cu_seqlens, _, slopes, _ = make_inputs([128, 128], 12, 64, torch.bfloat16, "cuda", tail=0)
    expected = run(attention_qkvpacked, qkv[ends], dout, cu_seqlens, max_seqlen, slopes)
    # The rows in between are a million sequences of one token: a long grid, but a cheap one.
    starts = [0, *range(128, total_tokens - 127), total_tokens]
    big_dout = torch.zeros(total_tokens, 12, 64, dtype=torch.bfloat16, device="cuda")
    big_dout[ends] = dout
    got = run(attention_qkvpacked, qkv, big_dout, torch.tensor(starts, dtype=torch.int32).cuda(), max_seqlen, slopes)
    assert all(torch.equal(got[name][ends], tensor) for name, tensor in expected.items())
