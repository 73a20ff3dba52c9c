"""Whole training steps for studies/bench.py: ours, ours with one design choice undone, and its peers'.

A step is train.train_step: forward and backward of each micro-batch, gradients accumulated in fp32, and fused AdamW, on
4,096 samples of 128 tokens (1,024 of 512, 256 of 2,048), of which 30 % are masked. Samples are random tokens that go
through data.py, so micro-batches are those of training. Entries take turns of one untimed and two timed steps; between
turns weights and optimizer move to the CPU and memory is freed, so each entry has the GPU to itself.

Before that, the loss and all gradients on a few sequences, dropout off, are compared with the model in fp32: the error of
the gradients, taken as one vector, may be twice that of the PyTorch path in bf16 plus 2^-8. Peers must then start with
our loss and gradient norm, up to what dropout changes.

Rows
    step_full      all sequences have 128 tokens
    step_off       the same, with one design choice undone
    step_fill80    lengths that fill 80.5 % of 128 tokens; "padded" gives each sequence 128 rows of the stream
    step_512       sequences of 512 tokens
    step_2048      sequences of 2,048 tokens
    step_large     MosaicBERT-Large, 128 tokens
    step_large_512 MosaicBERT-Large, 512 tokens

Read next: studies/peers.py
"""

import contextlib
import copy
import dataclasses
import gc
import os
import statistics
import time
from functools import partial
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

import kernels
import model as model_file
import train
from common.estimate import peak_flops
from common.processes import Process
from common.trace import wait_for_gpu
from data import Samples
from model import MaskedLM, ModelConfig, matrix_flops
from studies import peers
from studies.peers import WrongNumbers
from tests.toy import SPECIAL, make_shards

TURNS = 3
TIMED_STEPS = 2  # per turn, after an untimed one
SHORT_SHARE = 0.415  # of samples, with 8 to 128 tokens: 0.585 + 0.415 * 68 / 128 = 80.5 %
MASK_PROB = 0.3
CHECKED_SAMPLES, CHECKED_TOKENS = 8, 4096  # at most
CONFIGS = {
    "base": ModelConfig(),
    "large": ModelConfig(hidden_size=1024, num_layers=24, num_heads=16, intermediate_size=4096),
}
MICRO_BATCH_TOKENS = {"base": 131072, "large": 49152}


# ---------------------------------------------------------------------------------------------------------------------
# Data


class Data:
    """Random tokens written as shards, and read back by data.Samples."""

    def __init__(self, directory, sizes):
        self.directory, self.sizes = directory, sizes

    def samples(self, kind, seq_length=128):
        """kind: "full"; "fill80"; "padded", fill80's samples padded to the full length with [PAD]."""
        path = os.path.join(self.directory, f"{kind}_{seq_length}")
        if not os.path.exists(path):
            make_shards(path, self.documents(kind, seq_length), [], shards=1, vocab_size=self.sizes.vocab)
        return Samples(path, "train", seq_length)

    def documents(self, kind, seq_length):
        rng = np.random.default_rng(0)
        count, longest = self.sizes.samples, seq_length - 2  # without [CLS] and [SEP]
        lengths = np.full(count, longest)
        if kind != "full":
            short = rng.random(count) < SHORT_SHARE
            lengths[short] = rng.integers(8, seq_length + 1, short.sum()) - 2
        documents = [rng.integers(len(SPECIAL), self.sizes.vocab, length) for length in lengths]
        if kind == "padded":
            documents = [np.pad(document, (0, longest - len(document))) for document in documents]
        return documents


def first_batch(samples, count):
    """The first `count` samples as one MicroBatch on the CPU."""
    return samples.step_batches(0, count, seed=1, mask_prob=MASK_PROB, micro_batch_tokens=2**40)[0]


def checked_batch(samples):
    """What gradients are compared on. Plain PyTorch needs memory for each pair of tokens, so long samples are fewer."""
    return first_batch(samples, min(CHECKED_SAMPLES, CHECKED_TOKENS // samples.seq_length))


# ---------------------------------------------------------------------------------------------------------------------
# A step, ours


@dataclasses.dataclass
class Work:
    """The workload of a row."""

    cfg: ModelConfig
    samples: Samples
    count: int  # samples per step
    micro_batch_tokens: int
    device: torch.device
    dtype: torch.dtype

    def batches(self):
        return self.samples.step_batches(0, self.count, 1, MASK_PROB, self.micro_batch_tokens)

    def vocab_size(self):
        return self.samples.vocab_size

    def process(self):
        return Process(0, 1, self.device, self.dtype)

    def make_model(self, dropout=True):
        """A new model, always with the same weights."""
        torch.manual_seed(0)
        cfg = self.cfg if dropout else dataclasses.replace(self.cfg, hidden_dropout=0.0, attention_dropout=0.0)
        return MaskedLM(cfg, self.vocab_size()).to(self.device).train()


class Ours:
    """train.py's step. change: a context manager that wraps everything, or None."""

    error_factor, largest_error = 2, 0.0  # see check_gradients

    def __init__(self, work, change=None):
        self.work, self.change = work, change or contextlib.nullcontext
        with self.change():
            self.model = work.make_model()
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=peers.LEARNING_RATE, fused=True)
        self.batches = [batch.pinned_for(work.device) for batch in work.batches()]
        constant = {"lr": peers.LEARNING_RATE, "schedule": "wsd", "warmup_fraction": 0.0}
        self.cfg = train.TrainConfig(**vars(work.cfg), **constant)

    def step(self, number):
        """(loss, gradient norm), on the device."""
        with self.change():
            args = self.model, [self.optimizer], self.batches, self.cfg, self.work.process(), number + 1
            return train.train_step(*args)[:2]

    def for_check(self):
        """(reference in fp32, the model under test, its loss as a function of a MicroBatch), dropout off."""
        with self.change():
            model = self.work.make_model(dropout=False)

        def loss_of(batch):
            with self.change(), self.work.process().autocast():
                return model(batch.to(self.work.device))

        return model, model, loss_of

    def move(self, device):
        peers.move(self.parameters, self.optimizer, device)
        self.model.to(device)  # the buffers


class OursInFp8(Ours):
    """train.py's step with --fp8."""

    error_factor = peers.FP8_ERROR_FACTOR
    largest_error = 0.2  # in fp32 on a CPU, where PyTorch's own error is 0

    def __init__(self, work):
        super().__init__(work)
        self.model.bert.use_fp8()
        self.model.to(work.device)

    def for_check(self):
        reference, _, _ = super().for_check()
        model = copy.deepcopy(reference)
        model.bert.use_fp8()
        model.to(self.work.device)

        def loss_of(batch):
            with self.work.process().autocast():
                return model(batch.to(self.work.device))

        for _ in range(3):  # until the scales are right
            loss_of(checked_batch(self.work.samples)).backward()
            model.bert.fp8.update(lambda amax: amax)
        model.zero_grad()
        return reference, model, loss_of


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def check_gradients(work, runner):
    """The relative error of a runner's gradients against its reference in fp32, dropout off. Raises: WrongNumbers.

    It may be error_factor times that of the PyTorch path in the same dtype, and largest_error in any case.
    """
    reference, model, loss_of = runner.for_check()
    batch = checked_batch(work.samples)
    by_name = dict(model.named_parameters())
    checked = [by_name[name] for name, _ in reference.named_parameters()]

    def gradients(loss, parameters):
        """(loss, all gradients as one vector), both fp32."""
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        return loss.detach().float(), torch.cat([grad.float().flatten() for grad in found if grad is not None])

    def plain(dtype):
        with Process(0, 1, work.device, dtype).autocast():
            return reference(batch.to(work.device))

    got = gradients(loss_of(batch), checked)
    without_bias = isinstance(runner, peers.PlainStep) and runner.kind == "varlen"
    slopes = None if without_bias else getattr(reference.bert, "slopes", None)
    torch_path = mock.patch.object(kernels.backend, "_backend", "torch")
    with torch_path, mock.patch.object(reference.bert, "slopes", slopes, create=True):
        exact, own = (gradients(plain(dtype), list(reference.parameters())) for dtype in (torch.float32, work.dtype))
    for kind, g, o, e in zip(("loss", "gradients"), got, own, exact):
        error, own_error = (((x - e).norm() / e.norm()).item() for x in (g, o))
        bound = max(runner.error_factor * own_error + (1e-5 if work.dtype == torch.float32 else 2**-8), runner.largest_error)
        if not error <= bound:  # also for NaN
            raise WrongNumbers(f"{kind}: relative error {error:.2e} is over {bound:.2e}")
    return error


# ---------------------------------------------------------------------------------------------------------------------
# Our model with one design choice undone


def fp32_layernorm():
    """The residual stream and its LayerNorms in fp32, as under plain autocast."""
    normalize = kernels.dropout_add_layernorm

    def in_fp32(x, residual, *others, **named):
        if residual is not None:
            x, residual = x.float(), residual.float()
        return normalize(x, residual, *others, **named)

    return mock.patch.object(kernels, "dropout_add_layernorm", in_fp32)


def unpadded_vocabulary():
    return mock.patch.object(model_file, "VOCAB_MULTIPLE", 1)


def torch_attention():
    """SDPA with ALiBi as a dense bias; for full sequences only, which need no mask."""

    def attend(qkv, cu_seqlens, max_seqlen, slopes, *_, **__):
        lengths = torch.full((1,), max_seqlen)  # on the CPU: no sync
        bias = peers.alibi_bias(lengths, max_seqlen, slopes, qkv.dtype)
        full = len(qkv) // max_seqlen * max_seqlen  # the rest is padding
        out = peers.padded_attention(qkv[:full], bias, slopes)
        return F.pad(out, (0, 0, 0, 0, 0, len(qkv) - full))

    return mock.patch.object(kernels, "attention_qkvpacked", attend)


# ---------------------------------------------------------------------------------------------------------------------
# Rows


@dataclasses.dataclass
class StepEntry:
    make: object  # Work -> a runner: Ours, or one of studies/peers.py
    setting: str = "default"
    note: str = ""
    default: bool = True
    seconds: float = 15
    data: str = ""  # kind of samples, if not the row's


def peer(kind, setting, note, default=False, seconds=60):
    return StepEntry(partial(peers.PlainStep, kind=kind, setting=setting), setting, note, default, seconds)


def all_peers(fast=()):
    """Every peer; those named in `fast` run by default."""
    notes = {"varlen": "compiled, unpadded, no ALiBi", "flex": "compiled, unpadded", "padded": "compiled, dense ALiBi"}
    entries = {
        f"{kind}_{setting}": peer(kind, setting, notes[kind])
        for kind in ("flex", "varlen", "padded")
        for setting in ("t2", "t1", "default")
    }
    entries["padded_eager"] = peer("padded", "eager", "not compiled, dense ALiBi", seconds=20)
    for setting, seconds in (("default", 60), ("eager", 20)):
        make = partial(peers.TransformersStep, setting=setting)
        note = "transformers' BertForMaskedLM, padded, " + ("compiled" if setting == "default" else "not compiled")
        entries[f"bert_{setting}"] = StepEntry(make, setting, note, False, seconds)
    for recipe in ("tensorwise", "rowwise"):
        make = partial(peers.TorchaoStep, kind="varlen", setting="t2", recipe=recipe)
        entries[f"torchao_{recipe}"] = StepEntry(make, "t2", "varlen_t2 with torchao's FP8 training", False, 90)
    for name in fast:
        entries[name].default = True
    return entries


def rows(data):
    """{row: function(bench, row)}, in the table's order."""
    ours = {"ours": StepEntry(Ours), "fp8": StepEntry(OursInFp8, note="--fp8: most products in 8 bits", default=False)}
    changes = {
        "fp32_layernorm": (fp32_layernorm, "residual stream and LayerNorm in fp32"),
        "vocab_unpadded": (unpadded_vocabulary, "vocabulary of 30,522 instead of 30,528"),
        "torch_attention": (torch_attention, "SDPA with dense ALiBi"),
    }
    off = {name: StepEntry(partial(Ours, change=change), note=note) for name, (change, note) in changes.items()}
    padded = {"ours_padded": StepEntry(Ours, note="with padding as tokens", data="padded")}
    # The last four rows don't run by default. Large also takes longer to compile.
    same_model = {name: entry for name, entry in {**ours, **all_peers()}.items() if not name.startswith("bert")}
    longer = {name: dataclasses.replace(entry, default=False) for name, entry in same_model.items()}
    large = {name: dataclasses.replace(entry, seconds=2 * entry.seconds) for name, entry in longer.items()}
    row = partial(compare, data=data)
    return {
        "step_full": partial(row, entries={**ours, **all_peers(("flex_t2", "varlen_t2"))}),
        "step_off": partial(row, entries={"ours": ours["ours"], **off}),
        "step_fill80": partial(row, entries={**ours, **padded, **all_peers(("varlen_t2",))}, kind="fill80"),
        "step_512": partial(row, entries=longer, seq_length=512),
        "step_2048": partial(row, entries=longer, seq_length=2048),
        "step_large": partial(row, entries=large, size="large"),
        "step_large_512": partial(row, entries=large, size="large", seq_length=512),
    }


def compare(bench, row, data, entries, size="base", kind="full", seq_length=128):
    """Check the entries of one row, then time them in turns."""
    entries = bench.choose(row, entries)
    if not entries:
        return
    s, samples = bench.sizes, data.samples(kind, seq_length)
    cfg = CONFIGS[size] if not bench.cfg.toy else ModelConfig("mosaicbert", s.hidden, 2, s.heads, s.width)
    most = bench.cfg.micro_batch_tokens or (s.tokens if bench.cfg.toy else MICRO_BATCH_TOKENS[size])
    most = max(most, seq_length)  # at least one sample
    count = s.samples * 128 // samples.seq_length
    work = Work(cfg, samples, count, most, bench.device, bench.dtype)
    runners, results = {}, {}
    for name, entry in entries.items():
        its_work = dataclasses.replace(work, samples=data.samples(entry.data)) if entry.data else work

        def begin(entry=entry, its_work=its_work):
            return start(bench, entry, its_work, results.get("ours"))

        begun = bench.attempt(row, name, entry, begin)
        if begun:
            runners[name], results[name] = begun
            print(f"{row}/{name}: ready after {results[name]['setup']:.1f} s", flush=True)
        release(bench)
    for turn in range(1 if bench.cfg.toy else TURNS):
        if turn and bench.out_of_time():
            break
        for name, runner in list(runners.items()):
            if not bench.attempt(row, name, entries[name], lambda: take_turn(bench, runner, results[name], turn)):
                del runners[name]
    batches = work.batches()
    flops = sum(
        matrix_flops(cfg, work.vocab_size(), b.num_tokens, b.sum_squared_lengths, b.num_masked) for b in batches
    )
    for name, runner in runners.items():
        result = results[name]
        seconds = statistics.median(result["seconds"])
        mosaicbert = not isinstance(runner, peers.TransformersStep)  # whose FLOPs were counted
        peak = peak_flops(bench.device) if mosaicbert else None
        values = {
            "ms": 1e3 * seconds,
            "samples_per_second": count / seconds,
            "tokens_per_second": sum(batch.num_tokens for batch in batches) / seconds,
            "mfu": flops / seconds / peak if peak else None,
            "peak_gib": result["peak"] / 2**30,
            "micro_batch_tokens": runner.work.micro_batch_tokens,
            "error": result["error"],
            "ours_faster": seconds / statistics.median(results["ours"]["seconds"]) if "ours" in runners else None,
            "loss": result["loss"],
            "grad_norm": result["grad_norm"],
            "setup_seconds": round(result["setup"], 1),
            "steps_ms": [round(1e3 * s, 2) for s in result["seconds"]],
        }
        bench.record(row, name, values, entries[name].note)


def start(bench, entry, work, ours):
    """(runner, result so far) after the check and a first step. Micro-batches that run out of memory are halved.

    ours: our result so far, for peers to agree with, or None.
    """
    begun = time.perf_counter()
    while True:
        bench.check_time(entry.seconds)
        try:
            runner = entry.make(work)
            error = check_gradients(work, runner)
            loss, grad_norm = (x.item() for x in runner.step(0))
            break
        except torch.OutOfMemoryError:
            runner = None
            if work.micro_batch_tokens < 2 * work.samples.seq_length:
                raise
            work = dataclasses.replace(work, micro_batch_tokens=work.micro_batch_tokens // 2)
        release(bench)
    if ours and not isinstance(runner, Ours):
        bounds = {"loss": (loss, 0.01), "grad_norm": (grad_norm, 0.15)}  # dropout changes them by less than 0.1 % and 3 %
        if isinstance(runner, peers.TransformersStep):  # another model, equally untrained
            bounds = {"loss": (loss, 0.03)}
        for name, (value, bound) in bounds.items():
            if not abs(value / ours[name] - 1) <= bound:
                raise WrongNumbers(f"{name} {value:.4f} in the first step, where ours is {ours[name]:.4f}")
    runner.move("cpu")
    result = {"error": error, "loss": loss, "grad_norm": grad_norm, "seconds": [], "peak": 0}
    return runner, {**result, "setup": time.perf_counter() - begun}


def take_turn(bench, runner, result, turn):
    """An untimed step, then the timed ones. Returns True."""
    release(bench)
    runner.move(bench.device)
    cuda = bench.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    for i in range(2 if bench.cfg.toy else 1 + TIMED_STEPS):
        wait_for_gpu()
        begun = time.perf_counter()
        runner.step(1 + turn * (1 + TIMED_STEPS) + i)
        wait_for_gpu()
        if i > 0:
            result["seconds"].append(time.perf_counter() - begun)
    if cuda:
        result["peak"] = max(result["peak"], torch.cuda.max_memory_allocated())
    runner.move("cpu")
    return True


def release(bench):
    """Free the GPU memory that nothing uses."""
    if bench.device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
