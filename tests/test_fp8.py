"""FP8: the formats' rounding, the kernels that write them, scales, and the layers made of them.

As in test_attention.py, the kernels run in Triton's interpreter where there is no GPU.
"""

import importlib
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import checkpoint
import kernels
import train
from common import estimate
from common.batch import Batch
from common.options import UserError
from common.processes import Process
from kernels import fp8, fp8_feed_forward, fp8_linear
from kernels.fp8 import AMAX_SLOTS, E4M3, E5M2, Scaled, Scales, product, quantize
from model import MaskedLM, ModelConfig, check_fp8, checkpoint_layers
from tests.toy import TOY_SIZE, make_shards, toy_argv

geglu = importlib.import_module("kernels.geglu")  # `kernels.geglu` is the function
pytestmark = pytest.mark.usefixtures("triton_backend", "right_rounding", "poison_empty")
HALF_STEP = {E4M3: 2**-4, E5M2: 2**-3}  # largest relative rounding error


def scaled(scale, device):
    scale = torch.tensor(float(scale), device=device)
    return Scaled(scale, 1 / scale, torch.zeros(AMAX_SLOTS.value, dtype=torch.int32, device=device))


def amax(of_x):
    return of_x.slots.view(torch.float32).amax().item()


def rounded(x, scale, dtype):
    """What the kernels should write."""
    largest = torch.finfo(dtype).max
    return (x.float() * scale).clamp(-largest, largest).bfloat16().to(dtype)


def same_bits(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("shape", [(64, 64), (48, 80), (208, 16)])
def test_quantize(dtype, shape, device):
    x = torch.randn(shape, device=device) * torch.exp2(torch.randint(-20, 20, shape, device=device))
    x[0, 0], x[1, 1], x[2, 2] = math.inf, -(2.0**30), math.nan
    of_x = scaled(0.5, device)
    q, q_t = quantize(x, dtype, of_x)
    assert q[2, 2].float().isnan() and q_t[2, 2].float().isnan()
    q[2, 2], q_t[2, 2], x[2, 2] = 0, 0, 0  # NaN has several encodings
    assert same_bits(q, rounded(x, 0.5, dtype)) and same_bits(q_t, q.t())
    assert q.float().abs().max() == torch.finfo(dtype).max  # saturated, not infinite


def test_quantize_finds_the_amax_of_all_calls(device):
    x = torch.randn(128, 128, device=device)
    of_x = scaled(1, device)
    quantize(x, E4M3, of_x)
    quantize(x / 2, E4M3, of_x)
    assert amax(of_x) == x.abs().max().item()


@pytest.mark.parametrize("dropout_prob", [0.0, 0.3])
def test_geglu_writes_what_quantize_would(dropout_prob, device):
    """1,024 columns: then both tilings draw the same mask."""
    x, dout = 2 * torch.randn(80, 2048, device=device), torch.randn(80, 1024, device=device)
    seed = torch.tensor([1234], device=device) if dropout_prob else None
    of_out, of_dx = scaled(4, device), scaled(8, device)
    out, out_t = geglu.geglu_fp8(x, seed, dropout_prob, of_out)
    dx, dx_t = geglu.geglu_backward_fp8(dout, x, seed, dropout_prob, of_dx)
    exact_out = geglu.geglu_op(x, seed, dropout_prob)
    exact_dx = geglu.geglu_backward_op(dout, x, seed, dropout_prob)
    assert same_bits(out, rounded(exact_out, 4, E4M3)) and same_bits(out_t, out.t())
    assert same_bits(dx, rounded(exact_dx, 8, E5M2)) and same_bits(dx_t, dx.t())
    assert amax(of_out) == exact_out.abs().max().item() and amax(of_dx) == exact_dx.abs().max().item()


def test_geglu_of_a_width_that_no_tile_divides(device):
    x, dout, seed = torch.randn(16, 160, device=device), torch.ones(16, 80, device=device), torch.tensor([5], device=device)
    out, out_t = geglu.geglu_fp8(x, seed, 0.5, scaled(16, device))
    dx, dx_t = geglu.geglu_backward_fp8(dout, x, seed, 0.5, scaled(16, device))
    assert same_bits(out_t, out.t()) and same_bits(dx_t, dx.t())
    kept, dropped = F.gelu(x[:, :80]) * x[:, 80:] * 2, out.float() == 0
    assert 0.4 < dropped.float().mean() < 0.6
    assert torch.allclose(out.float() / 16, torch.where(dropped, 0, kept), rtol=2**-4, atol=2**-13)
    # The same mask in backward: elements that both gradients left at 0 are those that were dropped.
    assert torch.equal((dx[:, :80].float() == 0) & (dx[:, 80:].float() == 0), dropped)


def bound(a, b, dtype_a, dtype_b):
    """The largest error that rounding both operands can cause in a @ b.T."""
    relative = (1 + HALF_STEP[dtype_a]) * (1 + HALF_STEP[dtype_b]) - 1
    return a.abs() @ b.abs().t() * relative + 1e-2


def gradients(function, inputs, dy):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    y = function(*inputs)
    return y.detach(), *torch.autograd.grad(y, inputs, dy)


def test_linear_is_within_the_formats_rounding(device):
    x, weight, bias = (torch.randn(shape, device=device) for shape in ((96, 64), (48, 64), (48,)))
    dy = torch.randn(96, 48, device=device)
    of = [scaled(32, device) for _ in kernels.LINEAR]
    got = gradients(lambda *args: fp8_linear(*args, of), (x, weight, bias), dy)
    want = gradients(F.linear, (x, weight, bias), dy)
    limits = bound(x, weight, E4M3, E4M3), bound(dy, weight.t(), E5M2, E4M3), bound(dy.t(), x.t(), E5M2, E4M3)
    for ours, theirs, limit in zip(got, want, limits):
        assert ((ours - theirs).abs() <= limit).all()
        error = (ours - theirs).norm() / theirs.norm()
        assert 0.01 < error < 0.08  # e4m3 rounds by 2.6 % of a number on average (root mean square), e5m2 by 5.2 %
    assert torch.allclose(got[3], want[3], atol=1e-4)


def plain_feed_forward(x, gated, down):
    gate, value = F.linear(x, gated).chunk(2, -1)
    return F.linear(F.gelu(gate) * value, down)


def test_feed_forward_is_as_exact_as_fp8_allows(device):
    x, gated, weight = (torch.randn(shape, device=device) for shape in ((96, 64), (96, 64), (64, 48)))
    gated, weight, dy = gated / 8, weight / 7, torch.randn(96, 64, device=device)

    of = [scaled(2.0**4, device) for _ in kernels.FEED_FORWARD]
    got = gradients(lambda *args: fp8_feed_forward(*args, 0.0, of), (x, gated, weight), dy)
    want = gradients(plain_feed_forward, (x, gated, weight), dy)
    for ours, theirs in zip(got, want):
        assert 0.01 < (ours - theirs).norm() / theirs.norm() < 0.15
    assert all(amax(each) > 0 for each in of)


def test_sizes_that_do_not_fit():
    x = torch.randn(40, 32)
    with pytest.raises(ValueError, match="multiples of 16, not .40, 32. and .32, 32."):
        fp8_linear(x, torch.randn(32, 32), torch.randn(32), [scaled(1, "cpu")] * 3)


def see(scales, value):
    scales.slots.view(torch.float32)[..., 3] = value


def test_scales_follow_the_largest_magnitude():
    scales = Scales(2, ("activation", "gradient"))
    assert scales.scale.tolist() == [[8, 2.0**20]] * 2
    see(scales, 1.0)
    assert scales.update(lambda t: t)
    assert scales.scale.tolist() == [[64, 512]] * 2  # the powers of two at or below 448 / 4 and 57344 / 64
    assert scales.inverse[..., 0].tolist() == [[1 / 64, 1 / 512]] * 2
    assert not scales.slots.any()


def test_scales_lie_where_cublas_wants_them():
    """At multiples of 16 bytes; the CPU's product takes any address."""
    for layer in range(2):
        assert all(each.inverse.data_ptr() % 16 == 0 for each in Scales(2, ("activation",) * 3).of_layer(layer))


def test_a_spike_is_forgotten_and_an_infinity_ignored():
    scales = Scales(1, ("activation",))
    see(scales, 1.0)
    scales.update(lambda t: t)
    see(scales, 1000.0)
    scales.update(lambda t: t)
    assert scales.scale.item() == 2**-4  # 112 / 1000, rounded down to a power of two
    see(scales, math.inf)
    assert not scales.update(lambda t: t)
    assert scales.scale.item() == 2**-4
    for _ in range(70):
        see(scales, 1.0)
        scales.update(lambda t: t)
    assert scales.scale.item() == 64


def test_a_tensor_of_zeros_keeps_its_scale():
    scales = Scales(1, ("gradient",))
    scales.update(lambda t: t)
    assert scales.scale.item() == 2**20


def test_restored_scales_are_the_same():
    scales, again = Scales(2, ("activation", "gradient")), Scales(2, ("activation", "gradient"))
    see(scales, 0.1)
    scales.update(lambda t: t)
    see(again, 7.0)  # forgotten
    again.restore(scales.largest.tolist())
    assert again.inverse[..., 0].tolist() == (1 / again.scale).tolist()
    for name in ("largest", "scale", "inverse", "slots"):
        assert torch.equal(getattr(scales, name), getattr(again, name))


def toy_model_and_batch(device, hidden_dropout=0.0):
    """3 sequences of 16 tokens, 16 of which are masked."""
    network = MaskedLM(ModelConfig(**TOY_SIZE, hidden_dropout=hidden_dropout), 100).to(device)
    ids, masked = torch.randint(5, 100, (48,), device=device), torch.arange(0, 48, 3, device=device)
    starts = torch.tensor([0, 16, 32, 48], dtype=torch.int32, device=device)
    return network, Batch(ids, starts, 16, None, masked_positions=masked, labels=ids[masked])


def test_model_in_fp8_has_nearly_the_same_loss_and_gradients(device):
    network, batch = toy_model_and_batch(device)
    wanted = network(batch), *torch.autograd.grad(network(batch) / 16, list(network.parameters()), allow_unused=True)
    network.bert.use_fp8()
    network.to(device)
    for _ in range(2):  # the first step finds the scales
        got = network(batch), *torch.autograd.grad(network(batch) / 16, list(network.parameters()), allow_unused=True)
        assert network.bert.fp8.update(lambda t: t)
    assert (network.bert.fp8.largest > 0).all()
    names = ["loss", *(name for name, _ in network.named_parameters())]
    for name, ours, exact in zip(names, got, wanted):
        if exact is not None:
            assert (ours - exact).norm() < 0.12 * exact.norm(), name
    assert got[0] != wanted[0] and network.eval()(batch) == wanted[0]  # FP8 trains, and does not evaluate


def test_activation_checkpointing_changes_no_bit(device):
    """Nor an amax: a layer that runs again sees the same magnitudes."""
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        network, batch = toy_model_and_batch(device, hidden_dropout=0.1)
        network.bert.use_fp8()
        network.to(device)
        if checkpointed:
            checkpoint_layers(network)
        torch.manual_seed(1)
        loss = network(batch)
        loss.backward()
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        results.append([loss, *gradients, network.bert.fp8.slots.amax(-1)])
    assert all(map(torch.equal, *results))


class InDDP(torch.nn.Module):
    """A model inside DistributedDataParallel, without the other processes."""

    def __init__(self, module, **_):
        super().__init__()
        self.module = module

    def forward(self, batch):
        return self.module(batch)


def test_the_pass_that_orders_ddps_buckets_leaves_no_magnitude(device, monkeypatch):
    network, batch = toy_model_and_batch(device)
    network.bert.use_fp8()
    network.to(device)
    monkeypatch.setattr(train, "DistributedDataParallel", InDDP)
    passes, process = [], Process(0, 2, torch.device(device), torch.float32)
    network.register_forward_hook(lambda *_: passes.append(network.bert.fp8.slots.any().item()))
    samples = SimpleNamespace(micro_batch=lambda *_: batch)
    assert train.wrap(network, train.TrainConfig(fp8=True), process, samples).module is network
    assert passes == [True] and not network.bert.fp8.slots.any()


def test_an_infinity_that_fp8_saturates_skips_the_update(device):
    network, batch = toy_model_and_batch(device)
    network.bert.use_fp8()
    network.to(device)
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    cfg = train.TrainConfig(warmup_steps=1, lr=1.0)
    for value, skipped in ((1.0, False), (math.inf, True)):
        before = network.cls.predictions.transform.dense.weight.clone()
        network(batch).backward()
        network.bert.fp8.slots[0, 2, 0] = torch.tensor(value).view(torch.int32)
        grad_norm = train.update(network, [optimizer], cfg, 2, all_finite=network.bert.fp8.update(lambda t: t))
        assert grad_norm.isfinite() != skipped
        assert torch.equal(before, network.cls.predictions.transform.dense.weight) == skipped


@pytest.mark.parametrize(
    "options, backend, says",
    [
        ({"model": "bert"}, "triton", "only MosaicBERT"),
        ({}, "torch", "compute capability 8.9 or higher"),
        ({"compile": True}, "triton", "not both"),
        ({"intermediate_size": 40}, "triton", "intermediate_size=40 is not a multiple of 16"),
    ],
)
def test_where_fp8_cannot_run(options, backend, says):
    with pytest.raises(UserError, match=says):
        check_fp8(train.TrainConfig(**options), backend, "cpu")


def test_gpu_without_fp8(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(UserError, match="this GPU, of compute capability 8.6, has no FP8"):
        check_fp8(train.TrainConfig(), "triton", "cuda")


def test_estimate_for_a_gpu_elsewhere(tmp_path, capsys):
    """On a machine without a GPU, from base.py's size and a speed that was measured."""
    data = make_shards(tmp_path / "data")
    argv = ["configs/base.py", f"--data_dir={data}", f"--out_dir={tmp_path / 'run'}", "--num_layers=1", "--fp8"]
    train.main([*argv, "--budget_minutes=16", "--dry_run"])
    assert "on 1 x H200 at 58.1% MFU (results/token_types_h200/seventeen_minutes.jsonl): " in capsys.readouterr().out
    train.main([*argv, "--dry_run"])
    assert "on 1 x H100 at 60% MFU" in (printed := capsys.readouterr().out) and "A100" not in printed  # which has no FP8
    with pytest.raises(SystemExit):
        train.main([*argv, "--dry_run", "--model=bert"])
    assert capsys.readouterr().err.startswith("error: --fp8: not for --model=bert")


def test_estimate_knows_what_fp8_saves():
    sizes = [estimate.memory_bytes(train.TrainConfig(fp8=fp8), torch.bfloat16, True, 0, 30522, 1) for fp8 in (False, True)]
    assert sizes[0] - sizes[1] == 12 * (2 * 768 + 3072)  # bytes a token


@pytest.mark.slow
def test_resuming_in_fp8_changes_no_bit(tmp_path, monkeypatch):
    """Three steps, and one more from their second; on a GPU in bf16."""
    data_dir, device = make_shards(tmp_path / "data"), "cuda" if torch.cuda.is_available() else "cpu"
    options = dict(kernels="triton", device=device, fp8=True, global_batch_size=4, checkpoint_interval=2, eval_interval=0)

    def run(max_steps):
        train.main(toy_argv(data_dir, tmp_path / "out", **options, schedule="wsd", warmup_steps=1, max_steps=max_steps))
        path = tmp_path / "out" / f"step_{max_steps:08d}"
        files = [(path / f"{name}.safetensors").read_bytes() for name in ("model", "optimizer")]
        return [*files, checkpoint.read_json(path / "state.json", "")["fp8_largest"]]

    whole = run(3)
    for file in (tmp_path / "out" / "step_00000003").iterdir():
        file.unlink()
    (tmp_path / "out" / "step_00000003").rmdir()
    assert run(3) == whole
    assert np.array(whole[-1]).min() > 0


# Of the size that trains: only these tests' tiles are full, and only a GPU orders its atomic operations differently.


def base_layer_inputs():
    """x (4096, 768) and dy in bf16, and the fp32 weights of a layer of Base."""
    x, dy = (torch.randn(4096, 768, device="cuda").bfloat16() for _ in range(2))
    shapes = ((2304, 768), (2304,), (6144, 768), (768, 3072))
    return x, dy * 1e-3, [torch.randn(shape, device="cuda") * 0.03 for shape in shapes]


@pytest.mark.gpu
def test_base_layers_are_within_the_formats_rounding():
    x, dy, (weight, bias, gated, down) = base_layer_inputs()
    of_linear, of_ffn = [scaled(2.0**k, "cuda") for k in (3, 8, 14)], [scaled(2.0**k, "cuda") for k in (3, 8, 3, 8, 14, 14)]
    dqkv = dy.repeat(1, 3)
    got = gradients(lambda *args: fp8_linear(*args, of_linear), (x, weight, bias), dqkv)
    want = gradients(F.linear, (x.float(), weight, bias), dqkv.float())
    got += gradients(lambda *args: fp8_feed_forward(*args, 0.0, of_ffn), (x, gated, down), dy)
    want += gradients(plain_feed_forward, (x.float(), gated, down), dy.float())
    a, g = 0.026, 0.052  # root mean square errors of e4m3 and e5m2, which add up as independent ones do
    hidden = math.hypot(a, a, a, a)  # of GeGLU's result: two products' errors, before it is rounded itself
    dgated = math.hypot(g, a, hidden, g)
    expected = [math.hypot(a, a), math.hypot(g, a), math.hypot(g, a), 0.002]
    expected += [math.hypot(hidden, a, a), math.hypot(dgated, a), math.hypot(dgated, a), math.hypot(hidden, a, g)]
    for ours, exact, error in zip(got, want, expected, strict=True):
        assert (ours.float() - exact).norm() < 1.15 * error * exact.norm()


@pytest.mark.gpu
def test_base_tiles_are_transposed_right():
    x, _, _ = base_layer_inputs()
    for dtype in (E4M3, E5M2):
        q, q_t = quantize(x, dtype, scaled(4, "cuda"))
        assert same_bits(q, rounded(x, 4, dtype)) and same_bits(q_t, q.t())
    seed, wide = torch.tensor([7], device="cuda"), torch.randn(4096, 6144, device="cuda").bfloat16()
    for q, q_t in (
        geglu.geglu_fp8(wide, seed, 0.1, scaled(16, "cuda")),
        geglu.geglu_backward_fp8(wide[:, :3072].contiguous(), wide, seed, 0.1, scaled(16, "cuda")),
    ):
        assert same_bits(q_t, q.t())


@pytest.mark.gpu
def test_100_repeats_are_bitwise_equal():
    x, dy, (weight, bias, gated, down) = base_layer_inputs()

    def numbers():
        torch.manual_seed(1)
        of_linear, of_ffn = [scaled(8, "cuda") for _ in kernels.LINEAR], [scaled(8, "cuda") for _ in kernels.FEED_FORWARD]
        results = gradients(lambda *args: fp8_linear(*args, of_linear), (x, weight, bias), dy.repeat(1, 3))
        results += gradients(lambda *args: fp8_feed_forward(*args, 0.1, of_ffn), (x, gated, down), dy)
        return [*results, *(each.slots.amax() for each in (*of_linear, *of_ffn))]

    first = numbers()
    for _ in range(100):
        assert all(torch.equal(*pair) for pair in zip(first, numbers(), strict=True))


@pytest.mark.gpu
def test_a_gradient_beyond_the_format_saturates():
    x, dy, (weight, bias, _, _) = base_layer_inputs()
    of = [scaled(8, "cuda"), scaled(256, "cuda"), scaled(2.0**40, "cuda")]
    dx, dweight, _ = gradients(lambda *args: fp8_linear(*args, of), (x, weight, bias), dy.repeat(1, 3))[1:]
    assert dx.isfinite().all() and dweight.isfinite().all()
    assert amax(of[2]) == dy.abs().max().item()


def test_sums_over_tokens_are_not_of_the_fast_kind(device, monkeypatch):
    """Over 131,072 tokens fast sums lose as much as rounding to FP8 does: tests below, on a GPU."""
    calls = []
    layers = importlib.import_module("kernels.fp8_layers")
    monkeypatch.setattr(layers, "product", lambda a, b, *args, **kw: calls.append((a.shape[1], kw)) or product(a, b, *args, **kw))
    x, gated, weight = (torch.randn(shape, device=device) for shape in ((112, 64), (96, 64), (64, 48)))
    gradients(lambda *a: fp8_linear(*a, [scaled(8, device)] * 3), (x, gated, gated[:, 0]), torch.randn(112, 96, device=device))
    gradients(lambda *a: fp8_feed_forward(*a, 0.0, [scaled(8, device)] * 6), (x, gated, weight), torch.randn(112, 64, device=device))
    assert sorted(depth for depth, kw in calls if kw.get("fast") is False) == [112, 112, 112]  # rows: the tokens
    assert sorted(depth for depth, kw in calls if kw.get("fast") is None) == [48, 64, 64, 64, 96, 96]


@pytest.mark.gpu
def test_weight_gradients_of_many_tokens_are_exact_sums():
    """Of 131,072 products that are exact in fp32, to bf16's rounding of the result."""
    a, b = torch.randn(256, 131072, device="cuda").to(E5M2), torch.randn(512, 131072, device="cuda").to(E4M3)
    exact = a.double() @ b.double().t()
    one = scaled(1, "cuda")
    errors = [(product(a, b, one, one, torch.float32, fast).double() - exact).norm() / exact.norm() for fast in (False, True)]
    assert errors[0] < 0.003 < errors[1]
