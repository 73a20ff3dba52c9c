"""Single operators for studies/bench.py: attention, LayerNorm, GeGLU and the head with its loss.

An operator's inputs are those of a micro-batch of the base model, 131,072 tokens in bf16. Parameters are fp32 for our
kernels, as in training, and bf16 for peers. The floors below are counted by hand: tensors that must be read or written
once, or the operations of matrix products; dropout masks are drawn, not read.

Read next: studies/peers.py
"""

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels
from common.batch import round_up
from kernels.layernorm import DROPOUT_LEVELS
from model import LAYER_NORM_EPS, VOCAB_MULTIPLE, alibi_slopes
from studies import peers
from studies.bench_steps import first_batch
from studies.peers import NotMeasured, WrongNumbers

DROPOUT = 0.1
OUR_DROPOUT = round(DROPOUT * DROPOUT_LEVELS) / DROPOUT_LEVELS
FP8_ERROR = 0.15  # 1.5 times what the roundings add up to, 0.098 (tests/test_fp8.py): the largest error of many is wide
INPUT_SETS = 2  # each far larger than the 50 MB cache


@dataclass
class Entry:
    """One implementation of a row's workload."""

    make: object  # () -> a function of the row's inputs that returns one result, or several equal ones; may raise
    reference: object  # (keep, *inputs) -> the same in plain PyTorch; keep: dropout's factor per element, or None
    dropout_prob: float = 0.0  # the one it really has
    setting: str = "default"  # of torch.compile
    note: str = ""
    default: bool = True
    seconds: float = 2  # about how long it takes, compilation included
    fp32_parameters: bool = False
    prepare: object = None  # row's inputs -> this entry's, outside the timing
    largest_error: float = 0.0  # relative, allowed in any case


# ---------------------------------------------------------------------------------------------------------------------
# Checking and timing a row


def compare(bench, row, entries, make_inputs, floors, tokens, reveal=None, valid=None):
    """Check entries, then time forward, and forward with backward.

    make_inputs(): (inputs, gradients of the results); all inputs that require gradients get them.
    reveal(function, inputs): where dropout keeps, for one seed. floors: {"forward", "both"}, in seconds.
    valid: how many rows of results and gradients count; the rest is padding.
    """
    entries = bench.choose(row, entries)
    if not entries:
        return
    sets = [make_inputs() for _ in range(INPUT_SETS)]
    functions, inputs, errors = {}, {}, {}
    for name, entry in entries.items():

        def make_and_check(entry=entry):
            bench.check_time(entry.seconds)
            function = entry.make()
            own_sets = [inputs_for(entry, bench.dtype, *each) for each in sets]
            return function, own_sets, check(function, entry, own_sets[0], reveal, valid)

        made = bench.attempt(row, name, entry, make_and_check)
        if made:
            functions[name], inputs[name], errors[name] = made

    def forward(name):
        return lambda i: functions[name](*inputs[name][i % INPUT_SETS][0])

    def both(name):
        return lambda i: run(functions[name], *inputs[name][i % INPUT_SETS])

    times = {"forward": bench.time_interleaved({name: forward(name) for name in functions})}
    times["both"] = bench.time_interleaved({name: both(name) for name in functions})
    floors = {**floors, "backward": floors["both"] - floors["forward"]}
    for name in functions:
        seconds = {part: of_all[name] for part, of_all in times.items()}
        seconds["backward"] = seconds["both"] - seconds["forward"]
        values = {
            part: {
                "ms": 1e3 * seconds[part],
                "ns_per_token": 1e9 * seconds[part] / tokens,
                "ceiling_ns_per_token": 1e9 * floors[part] / tokens,
                "share_of_ceiling": floors[part] / seconds[part],
            }
            for part in ("forward", "backward", "both")
        }
        ratio = seconds["both"] / times["both"]["ours"] if "ours" in functions else None
        bench.record(row, name, {**values, "error": errors[name], "ours_faster": ratio}, entries[name].note)


def inputs_for(entry, dtype, inputs, douts):
    """The row's inputs in the form this entry takes. Those already in its dtype are shared."""
    if entry.prepare:
        return entry.prepare(inputs), douts
    if entry.fp32_parameters:
        return inputs, douts
    return [x.detach().to(dtype).requires_grad_() if x.requires_grad else x for x in inputs], douts


def results_of(function, inputs, douts):
    """As many results as there are gradients: a single result is read several times."""
    results = function(*inputs)
    return results if isinstance(results, tuple) else (results,) * len(douts)


def run(function, inputs, douts):
    """The gradients of one forward and backward pass."""
    return torch.autograd.grad(results_of(function, inputs, douts), differentiable(inputs), douts)


def differentiable(inputs):
    return [x for x in inputs if x.requires_grad]


def numbers_of(function, inputs, douts):
    """[result, gradient of each input that has one]. Functions get copies, which they may overwrite."""
    inputs = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
    results = results_of(function, inputs, douts)
    return [results[0].detach(), *torch.autograd.grad(results, differentiable(inputs), douts)]


def check(function, entry, inputs_and_douts, reveal, valid=None):
    """The largest relative rms error among result and gradients, against fp32. Raises: WrongNumbers."""
    inputs, douts = inputs_and_douts
    keep = None
    if entry.dropout_prob:
        kept = reveal(function, inputs)
        share, sigma = 1 - kept.float().mean().item(), math.sqrt(entry.dropout_prob / kept.numel())
        if abs(share - entry.dropout_prob) > 6 * sigma:
            raise WrongNumbers(f"dropout drops {share:.4f} instead of {entry.dropout_prob:.4f}")
        keep = kept / (1 - entry.dropout_prob)
    torch.manual_seed(1)
    got = numbers_of(function, inputs, douts)
    reference = partial(entry.reference, keep)
    own = numbers_of(reference, inputs, douts)
    single = [x.detach().float().requires_grad_() if x.requires_grad else x for x in inputs]
    exact = numbers_of(reference, single, [dout.float() for dout in douts])
    return compare_numbers(got, own, exact, valid, entry.largest_error)


def compare_numbers(got, own, exact, valid=None, largest_error=0.0):
    """The tests' rule: largest and rms error at most twice PyTorch's own, plus one unit in the last place."""
    worst = 0.0
    for i, (g, o, e) in enumerate(zip(got, own, exact, strict=True)):
        if valid is not None and len(e) > valid:
            g, o, e = g[:valid], o[:valid], e[:valid]
        eps = 1e-5 if g.dtype == torch.float32 else torch.finfo(g.dtype).eps
        name = f"gradient {i}" if i else "result"
        for kind, measure in (("largest", lambda x: x.abs().max()), ("rms", lambda x: x.square().mean().sqrt())):
            error, own_error, scale = (measure(x).item() for x in (g.float() - e, o.float() - e, e))
            bound = max(2 * own_error + eps * scale, largest_error * scale)
            if not error <= bound:  # also for NaN
                raise WrongNumbers(f"{name}: {kind} error {error:.2e} is over {bound:.2e}")
        worst = max(worst, error / max(scale, 1e-30))
    return worst


def in_bf16(bench, function):
    """`function` under autocast, as in training: fp32 weights are cast in each call."""

    def cast(*inputs):
        with torch.autocast(bench.device.type, bench.dtype, enabled=bench.dtype != torch.float32):
            return function(*inputs)

    return cast


# ---------------------------------------------------------------------------------------------------------------------
# Attention


def attention_floors(bench, tokens, sum_squared_lengths):
    """Forward reads q, k, v and writes out; backward reads q, k, v, dout and writes dq, dk, dv: 4 and 7 rows.

    Two products forward, five backward, each of 2 D operations per pair of tokens and head.
    """
    row, product = 2 * bench.sizes.hidden * tokens, 2 * bench.sizes.hidden * sum_squared_lengths
    forward = bench.floor(4 * row, 2 * product)
    return {"forward": forward, "both": forward + bench.floor(7 * row, 5 * product)}


def attention(bench, row, samples, default=True):
    """ALiBi attention on one micro-batch with as many samples as fit if all are full. samples: () -> data.Samples."""
    samples = samples()
    s, device, size = bench.sizes, bench.device, samples.seq_length
    slopes = alibi_slopes(s.heads).to(device)
    host = first_batch(samples, max(1, s.tokens // size))
    batch, flat = host.to(device), peers.unpadded([host], device)[0]

    def inputs():
        qkv = torch.randn(len(batch.input_ids), 3, s.heads, s.hidden // s.heads, device=device).to(bench.dtype)
        return [qkv.requires_grad_()], [torch.randn_like(qkv[:, 0])]

    def reference(keep, qkv, slopes=slopes):
        return kernels.attention_reference(*qkv.unbind(1), batch.cu_seqlens, batch.max_seqlen, slopes)

    def ours(qkv):
        return kernels.attention_qkvpacked(qkv, batch.cu_seqlens, batch.max_seqlen, slopes, batch.windows)

    def varlen():
        return lambda qkv: peers.varlen_attention(qkv, peers.varlen_layout(flat), slopes)

    def flex():
        mask, attend = peers.flex_layout(flat), peers.compiled(peers.flex_attention)
        return lambda qkv: attend(qkv, mask, slopes)

    def dense(backend):
        """With padding and unpadding, if there is anything to pad."""
        lengths = batch.cu_seqlens[: batch.num_samples + 1].diff()
        bias = peers.alibi_bias(lengths, size, slopes, bench.dtype)
        rows = (torch.arange(size, device=device) < lengths[:, None]).flatten().nonzero()[:, 0]  # of the padded stream

        def attend(qkv):
            with sdpa_kernel(backend):
                if len(rows) == len(qkv):
                    return peers.padded_attention(qkv, bias, slopes)
                stream = qkv.new_zeros(len(lengths) * size, *qkv.shape[1:]).index_copy(0, rows, qkv[: len(rows)])
                out = peers.padded_attention(stream, bias, slopes)[rows]
                return F.pad(out, (0, 0, 0, 0, 0, len(qkv) - len(rows)))

        return attend

    entries = {
        "ours": Entry(lambda: ours, reference),
        "varlen": Entry(varlen, partial(reference, slopes=None), note="varlen_attn, without ALiBi"),
        "flex": Entry(flex, reference, seconds=15, note="FlexAttention, mask prebuilt"),
        "sdpa_cudnn": Entry(lambda: dense(SDPBackend.CUDNN_ATTENTION), reference, note="dense ALiBi, padded"),
        "sdpa_efficient": Entry(lambda: dense(SDPBackend.EFFICIENT_ATTENTION), reference, note="dense ALiBi, padded"),
    }
    entries = {name: replace(entry, default=default) for name, entry in entries.items()}
    floors = attention_floors(bench, batch.num_tokens, batch.sum_squared_lengths)
    compare(bench, row, entries, inputs, floors, batch.num_tokens, valid=batch.num_tokens)


# ---------------------------------------------------------------------------------------------------------------------
# Dropout, residual and LayerNorm; GeGLU


def compiled_entries(make, reference):
    """One entry per setting of torch.compile, for a function with dropout."""
    return {
        f"compiled_{setting}": Entry(
            partial(make, setting), reference, peers.dropped_share(setting, DROPOUT), setting, seconds=6
        )
        for setting in ("default", "t1", "t2")
    }


def layernorm_floors(bench, num_gradients):
    """Forward reads x and residual, and writes their sum and the result. Backward reads that sum and the incoming
    gradients, and writes those of x and residual."""
    row = 2 * bench.sizes.hidden * bench.sizes.tokens
    return {"forward": bench.floor(4 * row), "both": bench.floor(4 * row) + bench.floor((3 + num_gradients) * row)}


def layernorm(bench, row, num_gradients):
    """num_gradients: how often the result is read. In the model twice: by a matrix product and as the next residual.

    Autograd adds two gradients in a kernel of its own, unless the operator takes both, as ours does, or the whole model
    is compiled.
    """
    s, device = bench.sizes, bench.device

    def inputs():
        activations = [torch.randn(s.tokens, s.hidden, device=device).to(bench.dtype) for _ in range(2)]
        weights = [torch.randn(s.hidden, device=device).to(bench.dtype).float() for _ in range(2)]
        douts = [torch.randn_like(activations[0]) for _ in range(num_gradients)]
        return [x.requires_grad_() for x in (*activations, *weights)], douts

    def reference(keep, x, residual, weight, bias):
        z = (x.float() * keep).to(x.dtype) + residual
        return F.layer_norm(z, (s.hidden,), weight.to(z.dtype), bias.to(z.dtype), LAYER_NORM_EPS)

    def reveal(function, inputs):
        """In rows of equal numbers, those kept are above the mean."""
        torch.manual_seed(1)
        x, residual, weight, bias = inputs
        probe = (torch.ones_like(x), torch.zeros_like(x), torch.ones_like(weight), torch.zeros_like(bias))
        results = function(*(value.requires_grad_() for value in probe))
        return (results[0] if isinstance(results, tuple) else results).detach() >= 0

    def ours(*inputs):
        results = kernels.dropout_add_layernorm(*inputs, DROPOUT, LAYER_NORM_EPS)
        return results[0] if num_gradients == 1 else results

    def peer(setting):
        normalize = peers.compiled(peers.dropout_add_layernorm)
        return lambda *inputs: normalize(*inputs, DROPOUT, setting)

    def liger():
        normalize = peers.liger("liger_layer_norm")
        return lambda x, residual, *weights: normalize(F.dropout(x, DROPOUT) + residual, *weights, LAYER_NORM_EPS)

    entries = {
        "ours": Entry(lambda: ours, reference, OUR_DROPOUT, fp32_parameters=True),
        **compiled_entries(peer, reference),
        "liger": Entry(liger, reference, DROPOUT, note="dropout and sum by PyTorch"),
    }
    compare(bench, row, entries, inputs, layernorm_floors(bench, num_gradients), s.tokens, reveal)


def geglu_floors(bench):
    """Forward reads both halves and writes one; backward reads three and writes two."""
    half = 2 * bench.sizes.width * bench.sizes.tokens
    return {"forward": bench.floor(3 * half), "both": bench.floor(8 * half)}


def geglu(bench, row):
    s, device = bench.sizes, bench.device

    def inputs():
        x = torch.randn(s.tokens, 2 * s.width, device=device).to(bench.dtype)
        return [x.requires_grad_()], [torch.randn(s.tokens, s.width, device=device).to(bench.dtype)]

    def reference(keep, x):
        gate, value = x.chunk(2, dim=-1)
        return (F.gelu(gate).float() * value.float() * keep).to(x.dtype)

    def liger_reference(keep, gate, value):
        return F.gelu(gate, approximate="tanh") * value

    def halves(inputs):
        return [half.detach().contiguous().requires_grad_() for half in inputs[0].chunk(2, dim=-1)]

    def reveal(function, inputs):
        torch.manual_seed(1)
        return function(torch.ones_like(inputs[0]).requires_grad_()).detach() != 0

    def peer(setting):
        gate = peers.compiled(peers.geglu)
        return lambda x: gate(x, DROPOUT, setting)

    entries = {
        "ours": Entry(lambda: lambda x: kernels.geglu(x, DROPOUT), reference, OUR_DROPOUT),
        **compiled_entries(peer, reference),
        "liger": Entry(
            lambda: peers.liger("liger_geglu"), liger_reference, note="tanh, no dropout, two tensors", prepare=halves
        ),
    }
    compare(bench, row, entries, inputs, geglu_floors(bench), s.tokens, reveal)


# ---------------------------------------------------------------------------------------------------------------------
# The layers that --fp8 has in 8 bits, without dropout: Wqkv, and the feed-forward layer between its LayerNorms. Ceilings are
# those of bf16.


def in_fp8(device, kinds, function):
    """`function` with a Scaled for each of `kinds` as its last argument; the first step's scales suit the inputs below."""
    if not kernels.uses_triton(device):
        raise NotMeasured("the kernels need a GPU")
    scaled = kernels.Scales(1, kinds).to(device).of_layer(0)
    return lambda *inputs: function(*inputs, scaled)


def layer_inputs(bench, *shapes):
    """Hidden states of about 1, fp32 weights of about 0.02, and a gradient of about 1e-4 of the result."""
    s = bench.sizes
    x = torch.randn(s.tokens, s.hidden, device=bench.device).to(bench.dtype)
    weights = [(0.02 * torch.randn(shape, device=bench.device)).to(bench.dtype).float() for shape in shapes]
    dout = 1e-4 * torch.randn(s.tokens, shapes[-1][0], device=bench.device)
    return [each.requires_grad_() for each in (x, *weights)], [dout.to(bench.dtype)]


def fp8_row(bench, row, plain, ours, fp8, kinds, shapes, values):
    """values: of all weights; each is multiplied once forward and twice backward."""

    def reference(keep, x, *weights):
        return plain(x, *(weight.to(x.dtype) for weight in weights))

    entries = {
        "ours": Entry(lambda: in_bf16(bench, ours), reference, fp32_parameters=True),
        "fp8": Entry(
            lambda: in_fp8(bench.device, kinds, fp8), reference, note="casts included", fp32_parameters=True,
            largest_error=FP8_ERROR,
        ),
        "compiled": Entry(lambda: peers.compiled(plain), reference, setting="t1", seconds=6),
    }  # fmt: skip
    floors = {part: bench.floor(flops=2 * times * values * bench.sizes.tokens) for part, times in (("forward", 1), ("both", 3))}
    compare(bench, row, entries, partial(layer_inputs, bench, *shapes), floors, bench.sizes.tokens)


def wqkv(bench, row):
    C = bench.sizes.hidden
    shapes = (3 * C, C), (3 * C,)
    fp8_row(bench, row, F.linear, F.linear, kernels.fp8_linear, kernels.LINEAR, shapes, 3 * C * C)


def feed_forward(bench, row):
    C, width = bench.sizes.hidden, bench.sizes.width

    def plain(x, gated, down):
        return F.linear(peers.geglu(F.linear(x, gated), 0.0), down)

    def ours(x, gated, down):
        return F.linear(kernels.geglu(F.linear(x, gated)), down)

    def fp8(x, gated, down, scaled):
        return kernels.fp8_feed_forward(x, gated, down, 0.0, scaled)

    fp8_row(bench, row, plain, ours, fp8, kernels.FEED_FORWARD, ((2 * width, C), (C, width)), 3 * C * width)


# ---------------------------------------------------------------------------------------------------------------------
# The head's matrix and cross-entropy. Times are per token of the micro-batch.


def head_floors(bench, vocab):
    """Three products of the hidden states, the embedding matrix and the logits or their gradient."""
    product = 2 * bench.sizes.masked * vocab * bench.sizes.hidden
    return {"forward": bench.floor(flops=product), "both": bench.floor(flops=3 * product)}


def head(bench, row):
    s, device = bench.sizes, bench.device
    vocab = round_up(s.vocab, VOCAB_MULTIPLE)

    def inputs():
        hidden = torch.randn(s.masked, s.hidden, device=device).to(bench.dtype)
        parameters = [0.02 * torch.randn(shape, device=device) for shape in ((vocab, s.hidden), (vocab,))]
        parameters = [parameter.to(bench.dtype).float() for parameter in parameters]
        labels = torch.randint(s.vocab, (s.masked,), device=device)
        return [*(x.requires_grad_() for x in (hidden, *parameters)), labels], [torch.ones((), device=device)]

    def reference(keep, hidden, weight, bias, labels):
        return peers.linear_cross_entropy(hidden, weight.to(hidden.dtype), bias.to(hidden.dtype), labels)

    def liger():
        loss = peers.liger("liger_fused_linear_cross_entropy")
        return lambda hidden, weight, bias, labels: loss(hidden, weight, labels, bias, reduction="sum")

    entries = {
        "ours": Entry(lambda: in_bf16(bench, kernels.linear_cross_entropy), reference, fp32_parameters=True),
        "compiled": Entry(lambda: peers.compiled(peers.linear_cross_entropy), reference, seconds=6),
        "liger": Entry(liger, reference, note="in chunks of rows"),
    }
    compare(bench, row, entries, inputs, head_floors(bench, vocab), s.tokens)


def rows(data):
    """{row: function(bench, row)}, in the table's order."""
    return {
        "attention_full": partial(attention, samples=partial(data.samples, "full")),
        "attention_fill80": partial(attention, samples=partial(data.samples, "fill80")),
        "attention_512": partial(attention, samples=partial(data.samples, "full", 512)),
        "attention_2048": partial(attention, samples=partial(data.samples, "full", 2048), default=False),
        "layernorm": partial(layernorm, num_gradients=1),
        "layernorm_two": partial(layernorm, num_gradients=2),
        "geglu": geglu,
        "wqkv": wqkv,
        "feed_forward": feed_forward,
        "head": head,
    }
