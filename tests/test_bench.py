"""The benchmark at toy size: it runs to the end, refuses wrong numbers, and compares with honest peers."""

import contextlib
import itertools
import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import flex_attention

import kernels
from common.batch import Batch
from model import MaskedLM, ModelConfig, alibi_slopes
from studies import bench, bench_kernels, bench_steps, peers
from studies.peers import NotMeasured, WrongNumbers


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No compiler, and FlexAttention and varlen_attn without the GPU they ask for."""

    def varlen_attn(q, k, v, cu_seqlens, cu_seqlens_k, longest, longest_k):
        assert cu_seqlens is cu_seqlens_k and longest == longest_k
        sequence = torch.bucketize(torch.arange(len(q)), cu_seqlens[1:], right=True)
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=sequence[:, None] == sequence).transpose(0, 1)

    torch._dynamo.reset()
    monkeypatch.setattr(peers, "varlen_attn", varlen_attn)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)  # refuses gradients on a CPU
    monkeypatch.setattr(peers, "BACKEND", "eager")


def toy(**options):
    return bench.Bench(bench.BenchConfig(toy=True, seconds=0, **options), [])


def results(path):
    return json.loads(path.read_text())


def test_runs_to_its_end(tmp_path, capsys):
    out = tmp_path / "new" / "bench.json"
    only = "attention_fill80/varlen,attention_full/sdpa_cudnn,layernorm_two/compiled_t2,geglu/compiled_default"
    only += ",geglu/liger,head/compiled,step_off/torch_attention,step_fill80/ours_padded"
    only += ",step_fill80/padded_t2"
    bench.main(["--toy", f"--only={only}", f"--out={out}"])
    found = results(out)
    assert found["commit"] and found["versions"]["torch"] == torch.__version__ and only in found["command"]
    assert set(found["ceilings"]) == {"copy_bytes_per_second", "matrix_flops_per_second"}
    rows = {f"{row['row']}/{row['entry']}": row for row in found["rows"]}
    printed = capsys.readouterr().out
    assert not [name for name in rows if name not in printed]
    for name in (
        "attention_fill80/ours", "attention_fill80/varlen", "layernorm_two/ours", "layernorm_two/compiled_t2",
        "geglu/ours", "geglu/compiled_default", "head/ours", "head/compiled",
    ):  # fmt: skip
        both = rows[name]["both"]
        share = both["ceiling_ns_per_token"] / both["ns_per_token"]
        assert both["ms"] > 0 and both["share_of_ceiling"] == pytest.approx(share)
        assert rows[name]["error"] < 2e-5
    for name in ("step_off/torch_attention", "step_fill80/ours_padded", "step_fill80/padded_t2"):
        assert rows[name]["samples_per_second"] == pytest.approx(16 / rows[name]["ms"] * 1e3)
    for name, part in (("step_fill80/padded_t2", "ms"), ("head/compiled", "both")):
        mine, theirs = rows[f"{name.partition('/')[0]}/ours"][part], rows[name][part]
        mine, theirs = (x if part == "ms" else x["ms"] for x in (mine, theirs))
        assert rows[name]["ours_faster"] == pytest.approx(theirs / mine) and "x as fast" in printed
    assert not {"geglu/compiled_t1", "step_off/vocab_unpadded", "step_full/ours"} & rows.keys()
    assert "liger-kernel" in rows["geglu/liger"]["not_measured"]
    assert "backend" in rows["attention_full/sdpa_cudnn"]["not_measured"]


def test_limits_and_mistakes(tmp_path, capsys):
    out = tmp_path / "bench.json"
    bench.main(["--toy", "--only=geglu/liger,step_full/flex_t2", "--seconds=1", f"--out={out}"])
    rows = {row["row"]: row for row in results(out)["rows"]}
    assert "limit of 1 s" in rows["geglu"]["not_measured"] and "limit of 1 s" in rows["step_full"]["not_measured"]
    bench.main(["--list", f"--out={tmp_path / 'none.json'}"])
    listed = capsys.readouterr().out
    assert "* step_full/flex_t2" in listed and "  step_large/ours" in listed and not (tmp_path / "none.json").exists()
    for argv, says in (
        (["--toy", "--only=gelu"], "no such row: gelu"),
        (["--toy", "--micro_batch_tokens=100"], "at least 1024"),
        ([], "needs an NVIDIA GPU"),
    ):
        if argv or not torch.cuda.is_available():
            with pytest.raises(SystemExit) as stop:
                bench.main([*argv, f"--out={out}"])
            assert stop.value.code == 2 and says in capsys.readouterr().err


def test_a_row_that_breaks_ends_alone(tmp_path, monkeypatch):
    """Whatever happens to one row, the others are measured; the exit status says that something is missing."""
    calls = itertools.count()

    def broken(*_):
        raise torch.OutOfMemoryError("none left\nmore about it")

    def breaks_after_its_check(x, dropout_prob):
        return kernels.geglu_reference(x, dropout_prob) if next(calls) < 2 else broken()

    monkeypatch.setattr(kernels, "geglu", breaks_after_its_check)
    monkeypatch.setattr(bench_steps, "take_turn", broken)
    out = tmp_path / "bench.json"
    with pytest.raises(SystemExit) as stop:
        bench.main(["--toy", "--only=geglu/ours,head/ours,step_fill80/ours", f"--out={out}"])
    rows = {row["row"]: row for row in results(out)["rows"]}
    assert stop.value.code == 1 and rows["head"]["both"]
    assert rows["geglu"]["not_measured"] == rows["step_fill80"]["not_measured"] == "OutOfMemoryError: none left"


class BackwardWithAnotherMask(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return kernels.geglu_reference(x, 0.1)

    @staticmethod
    def backward(ctx, dout):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(kernels.geglu_reference(x, 0.1), x, dout)[0]


WRONG = {
    "no dropout": ("geglu", "geglu", lambda x, p: kernels.geglu_reference(x), "dropout drops 0.0000"),
    "halves swapped": ("geglu", "geglu", lambda x, p: kernels.geglu_reference(x.roll(x.shape[1] // 2, 1), p), "result"),
    "tanh": (
        "geglu", "geglu",
        lambda x, p: F.dropout(F.gelu(x.chunk(2, 1)[0], approximate="tanh") * x.chunk(2, 1)[1], p), "result",
    ),
    "another mask in backward": ("geglu", "geglu", lambda x, p: BackwardWithAnotherMask.apply(x), "gradient 1"),
    "residual twice": (
        "layernorm", "dropout_add_layernorm",
        lambda x, r, w, b, p, eps: kernels.dropout_add_layernorm_reference(x, 2 * r, w, b, p, eps), "result",
    ),
    "no gradient for the residual": (
        "layernorm", "dropout_add_layernorm",
        lambda x, r, w, b, p, eps: kernels.dropout_add_layernorm_reference(x, r.detach() + 0 * r, w, b, p, eps),
        "gradient 2",
    ),
    "slope's sign": (
        "attention_fill80", "attention_qkvpacked",
        lambda qkv, cu, n, slopes, _: kernels.attention_reference(*qkv.unbind(1), cu, n, -slopes), "result",
    ),
    "one sequence": (
        "attention_fill80", "attention_qkvpacked",
        lambda qkv, cu, n, slopes, _: kernels.attention_reference(
            *qkv.unbind(1), torch.tensor([0, cu[-1]], dtype=torch.int32), cu[-1], slopes
        ), "result",
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_kernels_are_refused(wrong, tmp_path, monkeypatch):
    """A wrong kernel is not timed but reported with the reason, and the benchmark exits with status 1."""
    row, function, replacement, says = WRONG[wrong]
    monkeypatch.setattr(kernels, function, replacement)
    out = tmp_path / "bench.json"
    with pytest.raises(SystemExit) as stop:
        bench.main(["--toy", f"--only={row}/ours", f"--out={out}"])
    (found,) = [record for record in results(out)["rows"] if record["row"] == row]
    assert stop.value.code == 1 and f"wrong numbers: {says}" in found["not_measured"] and "both" not in found


def test_the_rule_of_errors():
    """At most twice PyTorch's own error plus one unit in the last place, by largest and by rms error."""
    exact = torch.linspace(-1, 1, 1001)
    own = exact.bfloat16()
    assert bench_kernels.compare_numbers([own], [own], [exact]) < 2**-8
    ulp = torch.finfo(torch.bfloat16).eps
    one_off = exact.clone()
    one_off[500] += 3 * ulp
    for bad in (exact * (1 + 4 * ulp), one_off, exact * float("nan")):
        with pytest.raises(WrongNumbers):
            bench_kernels.compare_numbers([bad.bfloat16()], [own], [exact])
    with pytest.raises(WrongNumbers):
        bench_kernels.compare_numbers([exact * (1 + 1e-4)], [exact], [exact])
    assert bench_kernels.compare_numbers([one_off], [exact], [exact], valid=500) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Peers of whole steps


@pytest.fixture
def work(tmp_path):
    """Two micro-batches of mixed lengths for a tiny model without dropout."""
    cfg = ModelConfig(hidden_size=48, num_layers=2, num_heads=3, intermediate_size=40, hidden_dropout=0.0)
    samples = bench_steps.Data(tmp_path, bench.TOY).samples("fill80", 32)
    return bench_steps.Work(cfg, samples, 16, 256, torch.device("cpu"), torch.float32)


PEERS = {"varlen": ("varlen", "default"), "flex": ("flex", "t2"), "padded": ("padded", "t1")}


@pytest.mark.parametrize("name", [*PEERS, "bert"])
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_peers_compute_the_model(work, name):
    """The same loss and gradients in fp32, and the same first step: gradients accumulate over micro-batches."""
    if name == "bert":
        pytest.importorskip("transformers")
        runner = peers.TransformersStep(work, setting="eager")
    else:
        runner = peers.PlainStep(work, *PEERS[name])
    assert bench_steps.check_gradients(work, runner) < 5e-6
    if name == "bert":
        return
    ours = bench_steps.Ours(work)
    if name == "varlen":  # it has no biases
        ours.model.bert.slopes.zero_()
    assert len(ours.batches) == 2 and len({len(inputs[0]) for inputs in runner.inputs}) <= 1
    for step in (0, 1) if name == "padded" else (0,):
        (loss, grad_norm), (want, want_norm) = runner.step(step), ours.step(step)
        torch.testing.assert_close(loss, want, rtol=1e-5, atol=0)
        if step == 0:
            torch.testing.assert_close(grad_norm, want_norm, rtol=1e-5, atol=0)
    for mine, theirs in zip(ours.parameters, runner.masters):
        torch.testing.assert_close(theirs, mine, rtol=0, atol=2e-4)  # AdamW's first steps are lr = 1e-3 times a sign


@pytest.mark.parametrize("fault", ["alibi", "rows"])
def test_wrong_peers_are_refused(work, fault, monkeypatch):
    runner = peers.PlainStep(work, "padded", "default")
    if fault == "alibi":
        runner.slopes = -runner.slopes
    else:
        monkeypatch.setattr(peers, "filled_rows", lambda batch, rows: (batch.masked_positions + 1, batch.labels))
    with pytest.raises(WrongNumbers, match="gradients|loss"):
        bench_steps.check_gradients(work, runner)


@pytest.mark.parametrize("change", [None, bench_steps.fp32_layernorm, bench_steps.unpadded_vocabulary])
def test_ours_with_one_thing_off_computes_the_same(work, change):
    runner = bench_steps.Ours(work, change)
    assert bench_steps.check_gradients(work, runner) < 1e-6
    vocab = runner.model.bert.embeddings.word_embeddings.num_embeddings
    assert vocab == (500 if change is bench_steps.unpadded_vocabulary else 512)


def test_fp32_layernorm_keeps_the_residual_stream_in_fp32():
    network = MaskedLM(ModelConfig(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=48), 70)
    batch = Batch(torch.arange(8) + 5, torch.tensor([0, 8], dtype=torch.int32), 8, None)
    for change, dtype in ((contextlib.nullcontext, torch.bfloat16), (bench_steps.fp32_layernorm, torch.float32)):
        with change(), torch.autocast("cpu", torch.bfloat16):
            assert network.bert(batch).dtype == dtype


def test_step_keeps_what_was_moved_away(work):
    """Moving a runner to the CPU between its turns loses nothing."""
    runner = peers.PlainStep(work, "padded", "default")
    runner.step(0)
    before = [master.clone() for master in runner.masters]
    runner.move("cpu")
    assert all(map(torch.equal, before, runner.masters)) and runner.optimizer.state[runner.masters[0]]["step"] == 1
    runner.step(1)
    assert not torch.equal(before[0], runner.masters[0])


# ---------------------------------------------------------------------------------------------------------------------
# Parts


def test_floors_by_hand():
    """Bytes and operations at 10 tokens, width 8, GLU width 12, 3 masked rows, 20 words; one of them per second."""
    run = toy()
    run.sizes = bench.Sizes(tokens=10, hidden=8, heads=2, width=12, masked=3)

    def floors(function, *arguments):
        found = []
        for ceilings in ((1, float("inf")), (float("inf"), 1)):
            run.results["ceilings"] = dict(zip(("copy_bytes_per_second", "matrix_flops_per_second"), ceilings))
            found.append(function(run, *arguments))
        return found

    # One sequence of 4 and one of 6 tokens. q, k, v in, out: 4 x 10 x 8 x 2 B. q k^T and P v: 2 x 2 x 8 x (16 + 36).
    moved, done = floors(bench_kernels.attention_floors, 10, 52)
    assert moved == {"forward": 640, "both": 640 + 1120} and done == {"forward": 1664, "both": 1664 + 4160}
    # x, residual in, sum, result out: 4 x 160 B. Backward: sum and gradients in, two out.
    assert floors(bench_kernels.layernorm_floors, 1)[0] == {"forward": 640, "both": 640 + 640}
    assert floors(bench_kernels.layernorm_floors, 2)[0] == {"forward": 640, "both": 640 + 800}
    assert floors(bench_kernels.geglu_floors)[0] == {"forward": 3 * 240, "both": 8 * 240}
    assert floors(bench_kernels.head_floors, 20)[1] == {"forward": 960, "both": 2880}


def test_lengths_fill_what_they_should(tmp_path):
    sizes = bench.Sizes(vocab=300)
    data = bench_steps.Data(tmp_path, sizes)
    batch = bench_steps.first_batch(data.samples("fill80"), sizes.samples)
    assert batch.num_tokens / (128 * sizes.samples) == pytest.approx(0.805, abs=0.005)
    assert batch.cu_seqlens[: sizes.samples + 1].diff().min() >= 8
    padded = bench_steps.first_batch(data.samples("padded"), sizes.samples)
    assert padded.num_tokens == 128 * sizes.samples and padded.num_masked == pytest.approx(batch.num_masked, rel=0.01)
    full = bench_steps.first_batch(data.samples("full", 512), 4)
    assert full.num_tokens == 4 * 512 and full.num_masked == pytest.approx(0.3 * 4 * 510, rel=0.1)


def test_byte_dropout():
    x = torch.ones(1000, 96, requires_grad=True)
    y = peers.byte_dropout(x, 0.1, x)
    dropped = (y == 0).float().mean().item()
    assert peers.dropped_share("t2", 0.1) == 26 / 256 and dropped == pytest.approx(26 / 256, abs=0.004)
    torch.testing.assert_close(y[y > 0], torch.full_like(y[y > 0], 256 / 230))
    y.sum().backward()
    assert torch.equal(x.grad, y)
    codes = peers.random_bytes(torch.empty(5000), 13)
    assert codes.shape == (5000, 13) and torch.bincount(codes.flatten().int(), minlength=256).min() > 150
    assert not torch.equal(codes, peers.random_bytes(torch.empty(5000), 13))
    assert peers.byte_dropout(x, 0.0, x) is x


def test_flex_blocks():
    """Sequences of 128 need no mask; a long one next to short ones shares blocks with them."""
    slopes = alibi_slopes(2)
    for lengths, whole in (([128] * 4, 4), ([300, 20, 64, 128], 5)):
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
        total = int(cu_seqlens[-1])
        batch = Batch(torch.zeros(total), cu_seqlens, 300, None)
        mask = peers.flex_layout(batch)
        assert int(mask.full_kv_num_blocks.sum()) == whole
        qkv = torch.randn(total, 3, 2, 16)
        want = kernels.attention_reference(*qkv.unbind(1), cu_seqlens, 300, slopes)
        torch.testing.assert_close(peers.flex_attention(qkv, mask, slopes), want, rtol=1e-4, atol=1e-5)


def test_settings_of_the_compiler(monkeypatch):
    """t1 patches things that this PyTorch has, and restores them."""
    from torch._inductor import config, lowering

    before = lowering.pointwise_cat, config.triton.mix_order_reduction_split_size
    monkeypatch.setattr(peers, "BACKEND", "inductor")
    with peers.compiling("t1"):
        assert lowering.pointwise_cat is not before[0] and config.triton.mix_order_reduction_split_size == 32
    with peers.compiling("default"):
        assert lowering.pointwise_cat is before[0]
    assert (lowering.pointwise_cat, config.triton.mix_order_reduction_split_size) == before


def test_missing_packages_are_said(work, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "liger_kernel", None)
    with pytest.raises(NotMeasured, match="liger-kernel"):
        peers.liger("liger_geglu")
    torchao = partial(peers.TorchaoStep, kind="varlen", recipe="rowwise")
    for name, peer in (("transformers", peers.TransformersStep), ("torchao", torchao)):
        monkeypatch.setitem(__import__("sys").modules, name, None)
        with pytest.raises(ImportError, match=name):  # which bench.py reports
            peer(work, setting="eager")


def test_fp8_without_a_gpu_is_not_measured():
    with pytest.raises(NotMeasured, match="need a GPU"):
        bench_kernels.in_fp8(torch.device("cpu"), kernels.LINEAR, None)


def test_fp8_beside_bf16(monkeypatch, triton_backend, right_rounding):
    """Both rows in Triton's interpreter, in bf16; and numbers that FP8 doesn't explain are refused."""
    monkeypatch.setattr(kernels, "geglu", lambda x: kernels.geglu_reference(x))  # the interpreter rounds bf16 downwards
    run = toy(only="wqkv/fp8,feed_forward/fp8,feed_forward/compiled")
    run.dtype, run.sizes = torch.bfloat16, bench.Sizes(tokens=64, hidden=32, width=48)
    run.results["ceilings"] = {"copy_bytes_per_second": 1e9, "matrix_flops_per_second": 1e9}
    for row in ("wqkv", "feed_forward"):
        getattr(bench_kernels, row)(run, row)
    found = {f"{row['row']}/{row['entry']}": row for row in run.results["rows"]}
    assert set(found) == {"wqkv/ours", "wqkv/fp8", "feed_forward/ours", "feed_forward/fp8", "feed_forward/compiled"}
    assert all(row["both"]["ms"] > 0 for row in found.values()) and 0.02 < found["feed_forward/fp8"]["error"] < 0.12
    monkeypatch.setattr(bench_kernels, "FP8_ERROR", 0.01)
    bench_kernels.wqkv(run, "wqkv")
    assert "wrong numbers" in run.results["rows"][-2]["not_measured"] + run.results["rows"][-1].get("not_measured", "")
