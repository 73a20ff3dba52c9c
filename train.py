"""Pretrain MosaicBERT, or the BERT it is compared with, on token shards.

    python train.py configs/smoke.py                                  # a laptop
    torchrun --nproc_per_node=8 train.py configs/base.py              # eight GPUs
    python train.py configs/base.py --micro_batch_tokens=32768        # any option can be overridden

The same command again resumes from the newest checkpoint in out_dir, with any number of processes.

Read next: model.py
"""

import common  # noqa: F401, I001, first: it sets OMP_WAIT_POLICY, which torch reads on import, and checks the packages

import dataclasses
import datetime
import math
import os
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

import checkpoint
from checkpoint import Saver
from common import budget, estimate, processes, trace
from common.compiled import compiled
from common.cuda_graphs import GraphedStep
from common.meter import Meter
from common.options import UserError, command, load_config, require
from common.run_directory import RunDirectory, was_evaluated
from common.versions import versions
from data import EVAL_SEED, hash64, open_samples, prefetch
from model import MAX_POSITIONS, MaskedLM, ModelConfig, check_fp8, checkpoint_layers, choose_kernels, matrix_flops
from optim import make_optimizers

EVAL_MASK_PROB = 0.15  # as BERT was trained and evaluated, whatever rate this run trains with
TARGET_LOG_SECONDS = 10  # between log lines, with log_interval=0
MANY_EPOCHS, LARGE_FOR_CPU = 200, 20_000_000  # warn above so many epochs, and so many parameters on a CPU
MIN_TEXT_USED = 0.9  # say so if samples take a smaller share of the text
COVERAGE_SAMPLES = 2000  # from which that share is estimated
MAX_GRAPHED_TOKENS = 65536  # larger micro-batches keep the GPU busy without CUDA graphs
BUCKET_MB = 1000  # gradients per all-reduce. On one host overlapping them with backward costs more than it hides


@dataclass
class TrainConfig(ModelConfig):
    # Data
    data_dir: str = "data/c4"  # shard directory made by prepare_c4.py; or a mixture, dir:weight,dir:weight
    seq_length: int = 128  # tokens a sample has at most, [CLS] and [SEP] included
    chunk: bool = False  # split each document into consecutive samples, instead of keeping only the first
    mask_prob: float = 0.3  # share of tokens to predict
    final_mask_prob: float = 0.0  # mask_prob falls linearly to this by the last step; 0: constant
    whole_words: bool = False  # mask all tokens of a word or none, in training (WordPiece only)
    # Training
    out_dir: str = "out/run"  # log and checkpoints; the same command resumes from it
    init_from: str = ""  # run or step_* directory to take the first weights from
    seed: int = 17  # of weights, data order, masks and dropout
    max_steps: int = 70000  # optimizer steps; ignored with a budget, see below
    global_batch_size: int = 4096  # samples per step, over all processes; divisible by their number
    micro_batch_tokens: int = 0  # maximum tokens per micro-batch, BERT's padding included; 0: chosen to fit the memory
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the layers' matrices, see optim.py; adamw for the rest
    lr: float = 5e-4  # peak learning rate
    schedule: Literal["linear", "wsd"] = "linear"  # decay from the end of the warm-up, or only at the end (wsd)
    warmup_fraction: float = 0.06  # share of max_steps in which the learning rate rises from 0
    warmup_steps: int = 0  # warm-up in steps, overrides warmup_fraction; 0: warmup_fraction, or 200 with a budget
    final_lr_fraction: float = 0.0  # share of lr that it falls to
    weight_decay: float = 0.02  # each step scales every parameter by 1 - lr * weight_decay
    # Evaluation, log, checkpoints
    eval_interval: int = 2000  # steps between evaluations; 0: only after the last step
    eval_samples: int = 0  # held-out samples to evaluate on; 0: all
    log_interval: int = 0  # steps between log lines; 0: about every 10 seconds
    checkpoint_interval: int = 1000  # steps between checkpoints; one is always written after the last step
    keep_checkpoints: int = 2  # how many to keep
    # Cost
    price_per_gpu_hour: float = 0.0  # dollars for one GPU (or process); 0: unknown
    budget_minutes: float = 0.0  # minutes of training; the warm-up finds the max_steps that fit; 0: none
    budget_dollars: float = 0.0  # the same in dollars, by price_per_gpu_hour; 0: none
    dry_run: bool = False  # check everything, print an estimate of memory, hours and price, and stop
    # Hardware
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU where there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of matrix products and activations; weights are float32
    kernels: Literal["auto", "triton", "torch"] = "auto"  # auto: this project's Triton kernels on GPUs, else PyTorch
    compile: bool = False  # torch.compile the model
    fp8: bool = False  # most matrix products in 8 bits, on NVIDIA GPUs from Ada and Hopper on; MosaicBERT only
    activation_checkpointing: bool = False  # run each layer again in backward: less memory, a third more work, the same result
    # Rarely needed
    decay_fraction: float = 0.2  # share of max_steps in which the learning rate falls at the end, for wsd
    beta1: float = 0.9  # AdamW: decay of the gradient's mean
    beta2: float = 0.98  # AdamW: decay of its mean square
    adam_eps: float = 1e-6  # AdamW: added to the root of the mean square
    max_grad_norm: float = 0.0  # clip gradients to this norm; 0: never, as in the original
    on_save_error: Literal["stop", "continue"] = "stop"  # when a checkpoint cannot be written, e.g. on a full disk
    hang_timeout: int = 300  # abort all processes if one makes no progress for this many seconds; 0: never
    profile: str = ""  # steps "a:b" to trace into out_dir, and to report how busy the GPU is
    eval_only: bool = False  # evaluate the newest checkpoint, and stop

    def check(self, world_size):
        """Raises: UserError for values that make no sense."""
        self.check_model()
        require(self, "seq_length", lambda x: x >= 3, "must be at least 3")
        names = "max_steps global_batch_size checkpoint_interval keep_checkpoints"
        require(self, names, lambda x: x >= 1, "must be at least 1")
        names = "micro_batch_tokens eval_interval eval_samples log_interval warmup_steps price_per_gpu_hour weight_decay"
        require(self, f"{names} seed max_grad_norm hang_timeout", lambda x: x >= 0, "must be at least 0")
        require(self, "seed", lambda x: x < 2**63, "must be below 2^63")
        require(self, "lr adam_eps mask_prob", lambda x: x > 0, "must be above 0")
        names = "lr mask_prob final_mask_prob warmup_fraction decay_fraction final_lr_fraction"
        require(self, names, lambda x: 0 <= x <= 1, "must be between 0 and 1")
        require(self, "beta1 beta2", lambda x: 0 <= x < 1, "must be at least 0 and below 1")
        if not self.data_dir:
            raise UserError("data_dir: empty (a shard directory made by prepare_c4.py)")
        if not self.out_dir:
            raise UserError("out_dir: empty (the directory for log and checkpoints)")
        trace.first_and_last(self.profile)
        budget.check(self)
        if not budget.seconds_of(self, world_size):  # with a budget, max_steps is not known yet
            warmup = self.warmup_steps / self.max_steps or self.warmup_fraction
            if self.schedule == "wsd" and warmup + self.decay_fraction > 1:
                raise UserError("the warm-up and decay_fraction are more than max_steps together (shorten one of them)")
            require(self, "warmup_steps", lambda x: x <= self.max_steps, f"more than max_steps={self.max_steps}")
        if self.schedule == "linear" and self.decay_fraction != TrainConfig.decay_fraction:
            raise UserError("decay_fraction: means nothing with schedule=linear (only with wsd)")
        if self.global_batch_size % world_size:
            raise UserError(f"global_batch_size={self.global_batch_size} is not a multiple of {world_size} processes")
        if self.activation_checkpointing and self.compile:
            raise UserError("--activation_checkpointing and --compile: not both (leave one out)")
        if 0 < self.micro_batch_tokens < self.seq_length:
            small = f"micro_batch_tokens={self.micro_batch_tokens} is less than seq_length={self.seq_length}"
            raise UserError(f"{small} (one sample must fit; 0 chooses for you)")
        if self.model == "bert" and self.seq_length > MAX_POSITIONS:
            raise UserError(f"seq_length={self.seq_length}: BERT has {MAX_POSITIONS} positions (mosaicbert has no limit)")


# ---------------------------------------------------------------------------------------------------------------------
# Schedules. Steps are numbered from 1. With a budget, max_steps is None until the end of the warm-up.


def warmup_of(cfg):
    """The number of steps in which the learning rate rises."""
    return cfg.warmup_steps or round(cfg.warmup_fraction * cfg.max_steps)


def decay_start(cfg):
    """The step after which the learning rate falls."""
    wsd = round((1 - cfg.decay_fraction) * cfg.max_steps)
    return warmup_of(cfg) if cfg.schedule == "linear" else max(warmup_of(cfg), wsd)


def lr_at(cfg, step):
    """Learning rate of a step: linear warm-up, constant (wsd only), linear decay. As in the original, 0 at step 1."""
    done = step - 1
    if done < warmup_of(cfg):
        return cfg.lr * done / warmup_of(cfg)
    if done < decay_start(cfg):
        return cfg.lr
    share_left = (cfg.max_steps - done) / (cfg.max_steps - decay_start(cfg))
    return cfg.lr * (cfg.final_lr_fraction + (1 - cfg.final_lr_fraction) * share_left)


def mask_prob_at(cfg, step):
    """Share of tokens to predict in a step (a falling rate: Ankner et al. 2024, arXiv 2305.15096).

    With a budget it falls after the warm-up, when max_steps is known.
    """
    start = cfg.warmup_steps if cfg.budget_minutes or cfg.budget_dollars else 0
    if not cfg.final_mask_prob or step - 1 <= start:  # start + 1 is prefetched before max_steps is planned
        return cfg.mask_prob
    return cfg.mask_prob + (cfg.final_mask_prob - cfg.mask_prob) * (step - 1 - start) / max(1, cfg.max_steps - 1 - start)


def bends_schedule(cfg, earlier_max_steps, step):
    """Whether changing earlier_max_steps to cfg.max_steps at `step` would alter a decay that is under way."""
    if cfg.eval_only or cfg.max_steps in (None, earlier_max_steps):
        return False
    earlier = dataclasses.replace(cfg, max_steps=earlier_max_steps)
    return bool(cfg.final_mask_prob) or step > min(decay_start(cfg), decay_start(earlier))


def is_eval_step(cfg, step):
    return step == cfg.max_steps or bool(cfg.eval_interval) and step % cfg.eval_interval == 0


# ---------------------------------------------------------------------------------------------------------------------
# One optimizer step


def add_gradients(model, process, batch, num_masked):
    """Forward and backward pass of a micro-batch; returns its share of the loss, on the device.

    num_masked: of the global batch, a tensor on the device. The loss is exact: the sum over all masked tokens of the
    global batch, divided by their number.
    """
    with process.autocast():
        share = model(batch) / num_masked
    with torch.autocast(process.device.type, enabled=False):  # forward_backward's is still on; backward keeps forward's dtypes
        (share * process.world_size).backward()  # DDP averages over processes, and we want the sum
    return share.detach()


def forward_backward(model, batches, num_masked, cfg, process, step, graphed=None):
    """Accumulate the gradients of this process's micro-batches; returns their share of the loss, on the device.

    graphed: what graph_gradients returned.
    """
    gradients = graphed or partial(add_gradients, model, process)
    loss = torch.zeros((), device=process.device)
    # The outermost autocast keeps the weights it has cast, so they are cast once a step; a captured graph holds its own casts.
    with nullcontext() if graphed else process.autocast():
        for micro_step, batch in enumerate(batches):
            # All dropout follows from this seed, so a resumed run draws what an unbroken one would have drawn.
            torch.manual_seed(int(hash64(cfg.seed, step, process.rank, micro_step)[0] >> np.uint64(1)))
            # DDP decides in forward whether the next backward all-reduces: only the last one should. Others ignore the flag.
            model.require_backward_grad_sync = micro_step == len(batches) - 1
            loss += gradients(batch.to(process.device), num_masked)
    return loss


def update(model, optimizers, cfg, step, keep_memory=False, all_finite=None):
    """The optimizers' step from the gradients, which are then cleared; returns their norm, on the device.

    An update whose gradient is not finite is skipped, and leaves everything as it was. keep_memory: clear the gradients in
    place, since a CUDA graph adds to them. all_finite: from FP8, a bool on the device, False if an infinity was saturated,
    which the norm alone would not show.
    """
    grad_norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
    if all_finite is not None:
        grad_norm = torch.where(all_finite, grad_norm, math.inf)
    if cfg.max_grad_norm:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), cfg.max_grad_norm, grad_norm)
    # What GradScaler sets, and fused optimizers read: 1 means skip. The norm is that of the reduced gradient, so all
    # processes decide alike, and nothing waits for it.
    found_inf, lr = (~grad_norm.isfinite()).float(), lr_at(cfg, step)
    for optimizer in optimizers:
        optimizer.found_inf = found_inf
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    model.zero_grad(set_to_none=not keep_memory)
    return grad_norm


def train_step(model, optimizers, batches, cfg, process, step, asked_to_stop=False, graphed=None):
    """One optimizer step on all processes' micro-batches. graphed: see graph_gradients.

    Returns (this process's share of the loss, gradient norm, how many processes were asked to stop), on the device.
    """
    counts = [float(sum(batch.num_masked for batch in batches)), float(asked_to_stop)]
    # From pinned memory, or the host would wait for the GPU.
    counts = torch.tensor(counts, pin_memory=process.device.type == "cuda").to(process.device, non_blocking=True)
    num_masked, asked = process.all_reduce(counts).unbind()
    loss = forward_backward(model, batches, num_masked.clamp(min=1), cfg, process, step, graphed)
    fp8 = getattr(model, "module", model).bert.fp8  # the Scales of the model inside DDP, or None
    all_finite = fp8.update(process.all_reduce_max) if fp8 else None
    grad_norm = update(model, optimizers, cfg, step, graphed is not None, all_finite)
    return loss, grad_norm, asked


def graph_gradients(model, cfg, process, backend, micro_batch_tokens):
    """add_gradients as CUDA graphs, if launching its kernels from Python could be the bottleneck; else None.

    Not captured: BERT's attention, DDP's all-reduces, compiled code, which has graphs of its own, activation checkpointing,
    which restores random states, and FP8, which was not tried.
    """
    if backend != "triton" or process.device.type == "cpu" or process.world_size > 1 or cfg.model == "bert":
        return None
    if micro_batch_tokens > MAX_GRAPHED_TOKENS or cfg.compile or cfg.fp8 or cfg.activation_checkpointing:
        return None
    torch.cuda.set_stream(torch.cuda.Stream())  # the default stream cannot be captured
    return GraphedStep(partial(add_gradients, model, process))


def steps_after(step, cfg):
    """Yield the steps that follow `step`, up to cfg.max_steps, which a budget sets on the way."""
    while cfg.max_steps is None or step < cfg.max_steps:
        step += 1
        yield step


def make_batches(samples, cfg, process, micro_batch_tokens, step):
    """(step, this process's micro-batches of it)"""
    batches = samples.step_batches(
        step - 1, cfg.global_batch_size, cfg.seed, mask_prob_at(cfg, step), micro_batch_tokens, process.rank, process.world_size
    )
    return step, [batch.pinned_for(process.device) for batch in batches]


def samples_of(samples, cfg, micro_batch_tokens, world_size, step, ranks):
    """The numbers of the samples that these ranks process in a step, as a list: for the log of a skipped update."""
    chosen, _ = samples.of_step(step - 1, cfg.global_batch_size, cfg.seed)
    parts = (part for rank in ranks for part in samples.parts(chosen, micro_batch_tokens, rank, world_size))
    return [sample for part in parts for sample in chosen[part].tolist()]


def wrap(model, cfg, process, samples):
    """`model` as it is trained: compiled if asked for, and under DistributedDataParallel in a run of several processes."""
    if cfg.compile:
        model = compiled(model)
    if process.world_size > 1:
        model = DistributedDataParallel(model, bucket_cap_mb=BUCKET_MB, gradient_as_bucket_view=True)
        model.broadcast_buffers = False  # they are constants (as an argument it is deprecated)
        # After its first backward pass DDP rearranges its buckets, which changes the order of sums and so their last
        # bits. Trigger it here; otherwise a resumed run would differ from an unbroken one.
        first = np.zeros(1, np.int64)
        batch = samples.micro_batch(first, first, cfg.seed, cfg.mask_prob).to(process.device)
        with process.autocast():
            loss = model(batch)
        loss.backward()
        model.zero_grad()
        if cfg.fp8:
            model.module.bert.fp8.slots.zero_()  # what it saw in this pass
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def evaluate(model, samples, process, micro_batch_tokens, watchdog, num_samples):
    """Loss and accuracy over num_samples held-out samples, in a fixed order with fixed masks; all processes share the work.

    Returns {"loss", "accuracy", "num_masked", "majority_accuracy"}; the last is the accuracy of always guessing the
    token that is masked most often. The same for any number of processes, up to the order of a sum. None when a process
    was asked to stop.
    """
    model.eval()
    order, epochs = samples.order(np.arange(num_samples), EVAL_SEED)
    parts = samples.parts(order, micro_batch_tokens, process.rank, process.world_size, equal=False)
    batches = ((order[part], epochs[part], EVAL_SEED, EVAL_MASK_PROB) for part in parts)
    totals = torch.zeros(4, dtype=torch.float64, device=process.device)
    label_counts = torch.zeros(samples.vocab_size, dtype=torch.float64, device=process.device)
    for batch in prefetch(lambda arguments: samples.micro_batch(*arguments).pinned_for(process.device), batches):
        if watchdog.signal:
            break
        watchdog.progress()
        batch = batch.to(process.device)
        with process.autocast():
            logits = model.masked_logits(batch)
        logits, labels = logits[: batch.num_masked].float(), batch.labels[: batch.num_masked]
        totals[0] += torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        totals[1] += (logits.argmax(-1) == labels).sum()
        totals[2] += batch.num_masked
        label_counts.scatter_add_(0, labels, torch.ones_like(labels, dtype=torch.float64))  # bincount would synchronize with the GPU
    totals[3] = watchdog.signal
    process.all_reduce(totals)
    process.all_reduce(label_counts)
    model.train()
    numbers = torch.cat([totals, label_counts.max()[None]])
    loss_sum, num_correct, num_masked, asked_to_stop, num_most_masked = processes.to_host(numbers).tolist()
    if asked_to_stop:
        return None
    shares = (total / num_masked if num_masked else None for total in (loss_sum, num_correct, num_most_masked))
    loss, accuracy, majority_accuracy = shares
    return {"loss": loss, "accuracy": accuracy, "num_masked": int(num_masked), "majority_accuracy": majority_accuracy}


def eval_line(step, result):
    if not result["num_masked"]:
        return f"step {step}: no held-out loss, as nothing is masked (too little text: prepare_c4.py --val_docs; or all [UNK])"
    return (
        f"step {step}: held-out loss {result['loss']:.4f}, accuracy {result['accuracy']:.1%} of "
        f"{result['num_masked']:,} masked tokens (always guessing the most frequent: {result['majority_accuracy']:.1%})"
    )


# ---------------------------------------------------------------------------------------------------------------------
# The run


def saved_config(cfg, samples):
    """What config.json holds: every option, and what the data and the vocabulary are."""
    return {
        "format": checkpoint.FORMAT,
        **dataclasses.asdict(cfg),
        "vocab_size": samples.vocab_size,
        "tokenizer_sha256": samples.tokenizer_sha256,
        "train_data": samples.digest,
    }


def resume(cfg, process, samples, model, optimizers):
    """Load the newest checkpoint in out_dir, if there is one and it is this run's.

    Returns (cfg, with max_steps None if a budget has yet to be planned; state, what state.json holds; the checkpoint's
    path or None; whether its evaluation is missing).
    """
    state = {"step": 0, "tokens": 0, "samples": 0, "seconds": 0.0}  # since the first step, resumes included
    state |= {"skipped": 0, "skipped_in_a_row": 0}  # updates that were not finite
    found, eval_missing = None, False
    # A run keeps the warm-up that it began with, and a budget's plan, whatever max_steps is now. None: not decided yet.
    budgeted = budget.seconds_of(cfg, process.world_size)
    cfg = dataclasses.replace(cfg, max_steps=None if budgeted else cfg.max_steps, warmup_steps=cfg.warmup_steps or None)
    if process.rank == 0:
        config, defaults = saved_config(cfg, samples), dataclasses.asdict(TrainConfig())
        if cfg.eval_only:  # any evaluation of that model
            names = [field.name for field in dataclasses.fields(ModelConfig)]
            config = {name: config[name] for name in (*names, "vocab_size", "tokenizer_sha256")}
        found, earlier = checkpoint.check_resumable(cfg.out_dir, config, defaults, partial(bends_schedule, cfg))
        if found or (budgeted and earlier):  # a budget's plan may exist before the first checkpoint
            as_begun = dataclasses.replace(cfg, max_steps=earlier["max_steps"], warmup_steps=earlier["warmup_steps"])
            cfg.warmup_steps = warmup_of(as_begun)
            cfg.max_steps = cfg.max_steps or earlier["max_steps"]
        if found:
            step = checkpoint.step_of(found)
            eval_missing = is_eval_step(cfg, step) and not was_evaluated(cfg.out_dir, step)  # a signal came first
    cfg, found, eval_missing = process.broadcast((cfg, found, eval_missing))
    if cfg.warmup_steps is None:
        cfg.warmup_steps = warmup_of(cfg) if cfg.max_steps else budget.WARMUP_STEPS
    if found:
        checkpoint.restore(found, state, model, optimizers, process)
    # Seconds times processes, summed over resumes on different numbers of them. Old checkpoints did not count it.
    state.setdefault("gpu_seconds", state["seconds"] * process.world_size)
    return cfg, state, found, eval_missing


def print_warnings(cfg, process, num_params, samples):
    """Say what is likely to be a mistake, and what to do instead."""
    if cfg.max_steps and (epochs := cfg.max_steps * cfg.global_batch_size / len(samples)) > MANY_EPOCHS:
        fewer = max(1, MANY_EPOCHS * len(samples) // cfg.global_batch_size)
        hint = f"try --max_steps={fewer}, a --budget_minutes, a smaller --global_batch_size, or more text"
        process.say(f"warning: {cfg.max_steps:,} steps are {epochs:,.0f} epochs of {len(samples):,} samples ({hint})")
    elif cfg.global_batch_size > len(samples):
        text = f"global_batch_size={cfg.global_batch_size:,} is more than all {len(samples):,} samples: a step repeats some"
        process.say(f"warning: {text} (try a smaller one, or more text)")
    if process.device.type == "cpu" and num_params > LARGE_FOR_CPU:
        hint = "configs/small.py is made for one; --dry_run estimates the time on a GPU"
        process.say(f"warning: {num_params:,} parameters on a CPU: a step may take minutes ({hint})")
    if not math.isclose(samples.total_weight, 1):
        used = ", ".join(f"{source.directory} {share:.1%}" for source, share in samples.shares())
        process.say(f"--data_dir: weights add up to {samples.total_weight:g}, not 1: the shares are {used}")
    if cfg.chunk or process.rank > 0:
        return
    for source in [source for source, _ in samples.shares()] or [samples]:  # which part of its text do samples take?
        order, _ = source.order(np.arange(min(len(source), COVERAGE_SAMPLES)), cfg.seed)
        used = source.locate(order)[2].mean() * len(source) / max(1, source.num_tokens.sum())
        if used < MIN_TEXT_USED:
            first = f"the first {cfg.seq_length - 2} tokens of each document, about {used:.0%} of all"
            process.say(f"{source.directory}: samples are {first} (--chunk=true takes the rest, too)")


def train(cfg, process, watchdog, run, saver, train_samples, val_samples):
    """The whole run. run, saver: its RunDirectory and the Saver of its checkpoints, which write on rank 0 alone."""
    device, world_size, say = process.device, process.world_size, process.say
    backend = choose_kernels(cfg.kernels, cfg, device, process.dtype)
    vocab_size = train_samples.vocab_size
    if cfg.fp8:
        check_fp8(cfg, "" if cfg.dry_run and device.type == "cpu" else backend, device)  # an estimate needs no GPU
    process.check_equal(saved_config(cfg, train_samples), except_for=("data_dir", "out_dir", "init_from"))  # paths
    num_val = min(cfg.eval_samples or len(val_samples), len(val_samples))

    # The model, made on the CPU, so that its first weights are the same on any device.
    torch.manual_seed(cfg.seed)
    raw_model = MaskedLM(cfg, vocab_size, train_samples.special["[PAD]"])
    num_params = sum(p.numel() for p in raw_model.parameters())
    flops = partial(matrix_flops, cfg, vocab_size)
    if cfg.fp8:
        raw_model.bert.use_fp8()
    if cfg.activation_checkpointing:
        checkpoint_layers(raw_model)
    raw_model.to(device)
    micro_batch_tokens = estimate.choose_micro_batch_tokens(cfg, process, backend, num_params, vocab_size)
    optimizers = make_optimizers(raw_model, cfg)
    if budget.seconds_of(cfg, world_size) and cfg.max_steps != TrainConfig.max_steps:
        say(f"max_steps={cfg.max_steps:,} does not count: the budget decides")

    # The weights: of the newest checkpoint, of another run, or random. `planned`: cfg with the schedule that this gives.
    planned, state, resumed_from, eval_missing = resume(cfg, process, train_samples, raw_model, optimizers)
    started = None
    if cfg.init_from and not resumed_from:
        started = checkpoint.start_from(raw_model, cfg.init_from, train_samples.tokenizer_text)
        say(started)
    if cfg.dry_run:
        print_warnings(planned, process, num_params, train_samples)
        estimate.print_estimate(cfg, process, backend, num_params, train_samples, num_val, micro_batch_tokens, flops)
        return
    cfg = planned

    dtype = str(process.dtype).removeprefix("torch.")
    name = processes.device_name(device)
    also = " and FP8 (mfu is of the bfloat16 peak)" if cfg.fp8 else ""
    say(
        f"{cfg.model}, {num_params:,} parameters, on {world_size} x {name}: {dtype}{also}, {backend} kernels, "
        f"micro-batches of at most {micro_batch_tokens:,} tokens"
    )
    if resumed_from:
        say(f"resuming from {resumed_from}")
    elif os.path.exists(os.path.join(cfg.out_dir, "log.jsonl")):
        say(f"{cfg.out_dir}: holds no checkpoint, so the run and its log begin again")
    if train_samples.shares():
        say("held-out loss: over all held-out texts of the directories, whatever the weights")
    evaluate_on = partial(evaluate, raw_model, val_samples, process, micro_batch_tokens, watchdog)  # (num_samples)

    def run_evaluation(step):
        """Evaluate and report; False if a process was asked to stop."""
        if result := evaluate_on(num_val):
            say(eval_line(step, result))
            run.log("eval", step=step, **result)
        return result is not None

    if cfg.eval_only:
        if not (resumed_from or cfg.init_from):
            raise UserError(f"{cfg.out_dir}: no checkpoint to evaluate (train first, or give --init_from)")
        if not run_evaluation(state["step"]):
            watchdog.leave(process)
        return
    if cfg.max_steps and state["step"] >= cfg.max_steps and not eval_missing:
        hint = f"to train on, give --init_from={cfg.out_dir} and another --out_dir"
        say(f"{cfg.out_dir}: finished, {state['step']} of {cfg.max_steps} steps ({hint})")
        return

    print_warnings(cfg, process, num_params, train_samples)
    model = wrap(raw_model, cfg, process, train_samples)
    model.train()
    graphed = graph_gradients(model, cfg, process, backend, micro_batch_tokens)
    model.register_forward_hook(watchdog.progress)
    saver.check_space(num_params)
    say(f"log and checkpoints: {cfg.out_dir}")
    run.begin(state["step"], saved_config(cfg, train_samples), train_samples.tokenizer_text)
    run.log(
        "start", time=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), config=dataclasses.asdict(cfg),
        **versions(), device=name, num_params=num_params, world_size=world_size, kernels=backend, dtype=dtype,
        micro_batch_tokens=micro_batch_tokens, resumed_from=resumed_from, init=started,
    )  # fmt: skip
    if eval_missing and not run_evaluation(state["step"]):
        watchdog.leave(process)

    planner = budget.Planner(cfg, state, process)
    tracer = trace.Tracer(cfg.profile if process.rank == 0 else "", cfg.out_dir, say)
    next_batches = partial(make_batches, train_samples, cfg, process, micro_batch_tokens)
    meter = Meter(cfg, state, process, num_params, flops)
    next_report = state["step"] + 1
    watchdog.training = True
    # Without a budget the planner does nothing. The watchdog's answer is one step late, so that the host need not wait for the
    # GPU; saver.check raises if the last checkpoint could not be written.
    for step, batches in prefetch(next_batches, steps_after(state["step"], cfg)):
        watchdog.at(step)
        tracer.at(step)
        loss, grad_norm, asked = train_step(model, optimizers, batches, cfg, process, step, watchdog.signal > 0, graphed)
        meter.add(batches, loss, grad_norm)

        last = step == cfg.max_steps
        stop = watchdog.all_stop(asked)
        log_now = last or (step >= next_report if cfg.log_interval == 0 else step % cfg.log_interval == 0)
        eval_now = is_eval_step(cfg, step) and not stop
        save_now = last or stop or step % cfg.checkpoint_interval == 0 or planner.saves(step)
        if not (log_now or eval_now or save_now or planner.wants(step)):
            continue

        meter.gather(step)
        meter.report_skipped(partial(samples_of, train_samples, cfg, micro_batch_tokens, world_size), run.log)
        next_report = step + max(1, int(TARGET_LOG_SECONDS * meter.steps_per_second))
        saver.check()
        if log_now:
            record = meter.record(lr_at(cfg, step))
            run.log("train", **record)
            say(meter.line(record))
        if eval_now:
            stop = not run_evaluation(step)
        planner.add(step, meter, state["seconds"])
        if planner.ends(step):
            cfg.max_steps = planner.plan(state["seconds"], run)
            run.write_config(saved_config(cfg, train_samples))
        watchdog.saving = last or stop  # from here on a second SIGTERM would only lose the checkpoint
        if save_now or stop:
            checkpoint.compare_parameters(raw_model, process, step)
            meter.count_time()
            saver.save(state, raw_model, optimizers)
        if planner.saves(step) and not stop:
            planner.time_rest(evaluate_on, num_val, saver)
        if stop:
            saver.wait()
            run.log("stop", step=step)
            say(f"stopped after step {step} on request; the same command resumes")
            watchdog.leave(process)
        meter.begin()  # evaluation and saving do not count as training speed

    tracer.finish()
    saver.finish()
    meter.count_time()
    run.log("end", step=state["step"], seconds=round(state["seconds"], 3), **meter.cost())


@command
def main(argv):
    cfg = load_config(TrainConfig, argv)
    cfg.check(int(os.environ.get("WORLD_SIZE", 1)))
    padded = cfg.model == "bert"
    splits = (("train", cfg.whole_words), ("val", False))  # held-out losses stay comparable
    samples = [open_samples(cfg.data_dir, split, cfg.seq_length, cfg.chunk, padded, words) for split, words in splits]
    for part, split in zip(samples, ("training", "held-out")):
        if len(part) == 0:
            raise UserError(f"{cfg.data_dir}: no {split} samples (prepare more text, or change --val_fraction)")
    with processes.joined(cfg.device, cfg.dtype, cfg.hang_timeout) as (process, watchdog):
        writes = process.rank == 0 and not (cfg.dry_run or cfg.eval_only)
        with RunDirectory(cfg.out_dir, cfg.on_save_error, writes) as run, Saver(run, cfg.keep_checkpoints) as saver:
            try:
                train(cfg, process, watchdog, run, saver, *samples)
            except torch.OutOfMemoryError:
                tried = cfg.micro_batch_tokens or "the value chosen from the GPU's memory"
                less = max(cfg.seq_length, (cfg.micro_batch_tokens or 65536) // 2)
                text = f"out of GPU memory with micro_batch_tokens={tried} (try --micro_batch_tokens={less})"
                raise UserError(text, this_rank_only=True) from None
            except RuntimeError as error:
                if "can't allocate memory" not in str(error):
                    raise
                raise UserError("out of memory (try a smaller model, or a lower --micro_batch_tokens)", this_rank_only=True) from None


if __name__ == "__main__":
    main()
