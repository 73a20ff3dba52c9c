"""Pretrain MosaicBERT, or the BERT it is compared with, on token shards.

    python train.py configs/smoke.py                                  # a laptop
    torchrun --nproc_per_node=8 train.py configs/base.py              # eight GPUs
    python train.py configs/base.py --micro_batch_tokens=32768        # any option can be overridden

The same command again goes on from the newest checkpoint in out_dir, with any number of processes.

Read next: model.py
"""

import dataclasses
import datetime
import math
import os
import platform
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist

import budget
import checkpoint
import convert_hf
import gpu_trace
import kernels
import watch
from config import UserError, command, load_config
from data import EVAL_SEED, MIXTURE_PERIOD, Samples, hash64, prefetch
from model import MAX_POSITIONS, MaskedLM, ModelConfig, matrix_flops

EVAL_MASK_PROB = 0.15  # as BERT was trained and evaluated, whatever rate this run trains with
GPU_MICRO_BATCH_TOKENS = 131072  # at most, unless asked: on an H100 more is no faster, and 184,320 ran out of memory
CPU_MICRO_BATCH_TOKENS = 8192  # small enough for activations to stay near the caches
TARGET_LOG_SECONDS = 10  # between log lines, with log_interval=0
MAX_SKIPPED_IN_A_ROW = 10  # updates that were not finite
GROUP_BYTES = 100e6  # of gradients that hosts sum at once; the last group, base's word embedding, has 94 MB in any case

# Dense bf16 matrix rate with fp32 accumulation, in FLOP/s, from NVIDIA's data sheets. The first name that the device's
# name contains counts; an unknown GPU gets no MFU rather than a wrong one.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100": 989.4e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
}


@dataclass
class TrainConfig(ModelConfig):
    # Data
    data_dir: str = "data/c4"  # directory of token shards, made by prepare_c4.py; or a mixture, dir:weight,dir:weight
    seq_length: int = 128  # tokens a sample has at most, [CLS] and [SEP] included
    chunk: bool = False  # cut documents into as many samples as they give, not one each
    mask_prob: float = 0.3  # share of tokens to predict
    final_mask_prob: float = 0.0  # mask_prob falls linearly to this by the last step; 0: it stays
    # Training
    out_dir: str = "out"  # log and checkpoints; the same command again resumes from it
    init_from: str = ""  # run, or directory or hub id in Hugging Face form, to take the first weights from
    seed: int = 17  # of weights, data order, masks and dropout
    max_steps: int = 70000  # optimizer steps; a budget, below, takes their place
    global_batch_size: int = 4096  # samples in a step, over all processes; a multiple of their number
    micro_batch_tokens: int = 0  # tokens a process handles at once, at most, BERT's padding too; 0: chosen from the memory
    lr: float = 5e-4  # peak learning rate
    schedule: Literal["linear", "wsd"] = "linear"  # decay from the end of the warm-up, or only at the end (wsd)
    warmup_fraction: float = 0.06  # share of max_steps in which the learning rate rises from 0
    decay_fraction: float = 0.2  # share of max_steps in which it falls at the end, for wsd
    final_lr_fraction: float = 0.0  # share of lr that it falls to
    beta1: float = 0.9  # AdamW: decay of the gradient's mean
    beta2: float = 0.98  # AdamW: decay of its mean square
    adam_eps: float = 1e-6  # AdamW: added to the root of the mean square
    weight_decay: float = 0.02  # AdamW, on every parameter; times the learning rate
    max_grad_norm: float = 0.0  # larger gradients are scaled down to this norm; 0: never, as in the original
    # Evaluation, log, checkpoints
    eval_interval: int = 2000  # steps between evaluations; 0: only after the last step
    eval_samples: int = 0  # held-out samples to evaluate on; 0: all
    log_interval: int = 0  # steps between log lines; 0: about every 10 seconds
    checkpoint_interval: int = 1000  # steps between checkpoints; one is always written after the last step
    keep_checkpoints: int = 2  # how many to keep
    on_save_error: Literal["stop", "continue"] = "stop"  # when a checkpoint cannot be written, as on a full disk
    # Cost
    price_per_gpu_hour: float = 0.0  # dollars for one GPU (or process); 0: unknown
    budget_minutes: float = 0.0  # minutes of training that max_steps is chosen for, by timing steps first; 0: none
    budget_dollars: float = 0.0  # the same in dollars, by price_per_gpu_hour; 0: none
    # How to run
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU where there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of matrix products and activations; weights are float32
    kernels: Literal["auto", "triton", "torch"] = "auto"  # auto: this project's Triton kernels on GPUs, else PyTorch
    compile: bool = False  # torch.compile the model
    profile: str = ""  # steps "a:b" to trace into out_dir, and to say how busy the GPU is in
    hang_timeout: int = 300  # seconds of one process without progress that end all; above any pass and save; 0: never
    eval_only: bool = False  # evaluate the newest checkpoint, and stop
    dry_run: bool = False  # check everything, print an estimate of memory, hours and price, and stop

    def check(self, world_size):
        """Raises: UserError for values that make no sense."""
        self.check_model()
        at_least = {
            "max_steps": 1, "global_batch_size": 1, "seq_length": 3, "micro_batch_tokens": 0, "eval_interval": 0,
            "eval_samples": 0, "log_interval": 0, "checkpoint_interval": 1, "keep_checkpoints": 1,
            "price_per_gpu_hour": 0, "weight_decay": 0, "seed": 0, "max_grad_norm": 0, "hang_timeout": 0,
        }  # fmt: skip
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)}: must be at least {least}")
        for name in ("lr", "adam_eps", "mask_prob"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name}={getattr(self, name)}: must be above 0")
        for name in ("lr", "mask_prob", "final_mask_prob", "warmup_fraction", "decay_fraction", "final_lr_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}={getattr(self, name)}: must be between 0 and 1")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: must be at least 0 and below 1")
        if self.schedule == "wsd" and self.warmup_fraction + self.decay_fraction > 1:
            raise UserError("warmup_fraction + decay_fraction is above 1 (they are shares of max_steps)")
        gpu_trace.first_and_last(self.profile)
        budget.check(self)
        if self.global_batch_size % world_size:
            raise UserError(f"global_batch_size={self.global_batch_size} is not a multiple of {world_size} processes")
        if 0 < self.micro_batch_tokens < self.seq_length:
            raise UserError(
                f"micro_batch_tokens={self.micro_batch_tokens} is less than seq_length={self.seq_length} "
                "(one sample must fit; 0 chooses for you)"
            )
        if self.model == "bert" and self.seq_length > MAX_POSITIONS:
            raise UserError(f"seq_length={self.seq_length}: BERT has {MAX_POSITIONS} positions (mosaicbert has no limit)")


# ---------------------------------------------------------------------------------------------------------------------
# Schedules. Steps are numbered from 1.


def decay_start(cfg):
    """The step after which the learning rate falls."""
    fraction = cfg.warmup_fraction if cfg.schedule == "linear" else 1 - cfg.decay_fraction
    return round(fraction * cfg.max_steps)


def lr_at(cfg, step):
    """Learning rate of a step: up linearly, (wsd: level,) down linearly. As in the original, 0 at step 1."""
    done = step - 1
    warmup, start = round(cfg.warmup_fraction * cfg.max_steps), decay_start(cfg)
    if done < warmup:
        return cfg.lr * done / warmup
    if done < start:
        return cfg.lr
    share_left = (cfg.max_steps - done) / (cfg.max_steps - start)
    return cfg.lr * (cfg.final_lr_fraction + (1 - cfg.final_lr_fraction) * share_left)


def mask_prob_at(cfg, step):
    """Share of tokens to predict in a step (a falling rate: Ankner et al. 2024, arXiv 2305.15096)."""
    if not cfg.final_mask_prob:
        return cfg.mask_prob
    return cfg.mask_prob + (cfg.final_mask_prob - cfg.mask_prob) * (step - 1) / max(1, cfg.max_steps - 1)


# ---------------------------------------------------------------------------------------------------------------------
# Processes and devices


@dataclass
class Process:
    """This process among those of the run; without torchrun, the only one."""

    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype

    def gather(self, values):
        """(world_size, len(values)) nested list: the numbers of each process, on all of them."""
        mine = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=self.device) for v in values])
        everyone = [mine]
        if self.world_size > 1:
            everyone = [torch.empty_like(mine) for _ in range(self.world_size)]
            dist.all_gather(everyone, mine)
        return to_host(torch.stack(everyone)).tolist()


def to_host(tensor):
    """`tensor` on the CPU, by way of pinned memory.

    A copy to other memory that waits for the GPU can hold up those of a checkpoint, in another thread.
    """
    copy = tensor.to("cpu", non_blocking=True)
    if tensor.device.type == "cuda":
        torch.cuda.current_stream(tensor.device).synchronize()
    return copy


def setup_device(cfg, model_cfg):
    """(device, dtype) of this process. Raises: UserError when the machine cannot do what the options ask."""
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: PyTorch sees no GPU here (use --device=cpu, or install PyTorch's CUDA build)")
    device = torch.device("cpu")
    if cfg.device != "cpu" and torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise UserError(f"{device}: there are {torch.cuda.device_count()} GPUs (lower --nproc_per_node)", True)
        torch.cuda.set_device(device)
    has_bf16 = device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 0)
    if cfg.dtype == "bfloat16" and not has_bf16:
        raise UserError(f"dtype=bfloat16: {torch.cuda.get_device_name(device)} has no bf16 (use --dtype=float32)")
    if cfg.dtype == "auto":
        dtype = torch.bfloat16 if device.type == "cuda" and has_bf16 else torch.float32
    else:
        dtype = getattr(torch, cfg.dtype)
    try:
        kernels.set_backend(cfg.kernels)
    except ValueError as error:
        raise UserError(error) from None
    head_size = model_cfg.hidden_size // model_cfg.num_heads
    if model_cfg.model == "mosaicbert" and kernels.uses_triton(device) and head_size not in (16, 32, 64, 128):
        raise UserError(f"head size {head_size}: the Triton kernels take 16, 32, 64, 128 (use --kernels=torch)")
    return device, dtype


def setup_processes(cfg):
    """Join the processes that torchrun started, if it did."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1 and "RANK" not in os.environ:
        hint = "start it with torchrun, or unset WORLD_SIZE"
        raise UserError(f"WORLD_SIZE={world_size} in the environment, and no RANK ({hint})")
    # Before PyTorch starts CUDA. Micro-batches differ in size, and memory that is kept for one would not do for another.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    device, dtype = setup_device(cfg, cfg)
    if world_size > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        # Our own watch, and what ends a process when Python stands still, come first, and say more.
        timeout = datetime.timedelta(seconds=cfg.hang_timeout + 2 * watch.STANDSTILL_SECONDS) if cfg.hang_timeout else None
        dist.init_process_group(backend, timeout=timeout, device_id=device if device.type == "cuda" else None)
    return Process(int(os.environ.get("RANK", 0)), world_size, device, dtype)


@contextmanager
def watched_process(cfg):
    """(Process, Watch) of this process, for as long as it trains; then its process group ends, however that went."""
    guard = watch.Watch(cfg.hang_timeout)
    try:
        process = setup_processes(cfg)
        guard.join(process.rank, process.world_size)
        yield process, guard
    except Exception as error:
        guard.lost(error)
        if dist.is_initialized():
            guard.fail(error)
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        guard.close()


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()


def peak_flops(device):
    """The device's bf16 matrix rate in FLOP/s, or None where it is not known."""
    name = device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None) if device.type == "cuda" else None


# ---------------------------------------------------------------------------------------------------------------------
# Estimates


def memory_bytes(cfg, dtype, fused, num_params, vocab_size, tokens):
    """About how much GPU memory a micro-batch of `tokens` takes, in bytes.

    Weights, gradients and AdamW's moments: 16 bytes a parameter, a copy of the weights in the compute dtype, and 12 more
    while a checkpoint is written. Kept for the backward pass, in values a token and layer: 8C (qkv, attention output,
    sums and results of two LayerNorms) and 3F (both halves of the GeGLU and its result). Without the fused kernels C and
    2.5F more, and the attention weights of H heads towards seq_length keys, in float32 and again in the compute dtype.
    The head holds its logits in the compute dtype, and without the fused kernels in float32 too, both with gradients.
    This says 387 kB a token and 4.1 GB for base in bf16, 791 kB without the fused kernels. Measured on an H100: 793
    without them; with them 27.1 GB in all for micro-batches of 65,536 tokens, where this says 27.8 and the checkpoint's
    1.6.
    """
    bytes_per_value = dtype.itemsize
    layer = (8 * cfg.hidden_size + 3 * cfg.intermediate_size) * bytes_per_value
    logit = bytes_per_value
    if cfg.model == "bert" or not fused:
        logit += bytes_per_value + 8
        layer += (cfg.hidden_size + 2.5 * cfg.intermediate_size) * bytes_per_value
        layer += cfg.num_heads * cfg.seq_length * (4 + bytes_per_value)
    return num_params * (28 + bytes_per_value) + tokens * (cfg.num_layers * layer + cfg.mask_prob * vocab_size * logit)


def choose_micro_batch_tokens(cfg, process, num_params, vocab_size):
    """The most tokens that fit into the smallest GPU of the run, and are of use."""
    if cfg.micro_batch_tokens:
        return cfg.micro_batch_tokens
    most = CPU_MICRO_BATCH_TOKENS
    if process.device.type == "cuda":
        memory = torch.cuda.get_device_properties(process.device).total_memory
        memory = min(row[0] for row in process.gather([memory]))
        fused = kernels.uses_triton(process.device)
        most = fitting_tokens(cfg, process.dtype, fused, num_params, vocab_size, memory)
        if most < cfg.seq_length:
            raise UserError(f"{device_name(process.device)}: too little memory for this model (try a smaller one)")
    return useful_tokens(cfg, process, most)


def fitting_tokens(cfg, dtype, fused, num_params, vocab_size, memory):
    """The most tokens of a micro-batch that fit into a GPU of `memory` bytes, of which a tenth and 1 GB stay free."""
    fixed = memory_bytes(cfg, dtype, fused, num_params, vocab_size, 0)
    per_token = memory_bytes(cfg, dtype, fused, num_params, vocab_size, 1) - fixed
    return min(GPU_MICRO_BATCH_TOKENS, int((memory * 0.9 - 1e9 - fixed) / per_token) // 1024 * 1024)


def useful_tokens(cfg, process, most):
    """`most`, but at least one sample, and no more than a process has in a step."""
    return max(cfg.seq_length, min(most, cfg.global_batch_size * cfg.seq_length // process.world_size))


def print_estimate(cfg, process, num_params, train_samples, val_samples, micro_batch_tokens):
    """What --dry_run says: size, data, memory, and the hours and dollars at some shares of a GPU's peak.

    With a budget: how many steps it should buy, by the share that was measured before.
    """
    order, _ = train_samples.at(np.arange(min(len(train_samples), 20_000)), cfg.seed)
    lengths = train_samples.locate(order)[2] + 2
    tokens, squares = lengths.mean(), (lengths.astype(float) ** 2).mean()  # of a sample
    flops = matrix_flops(cfg, train_samples.vocab_size, tokens, squares, cfg.mask_prob * tokens)
    dtype, fused, where = process.dtype, kernels.uses_triton(process.device), ""
    if process.device.type == "cpu":  # someone who is about to rent one
        dtype, fused, where = torch.bfloat16, cfg.kernels != "torch", ", in bfloat16 on a GPU of 80 GB"
        most = fitting_tokens(cfg, dtype, fused, num_params, train_samples.vocab_size, 80e9)
        micro_batch_tokens = cfg.micro_batch_tokens or useful_tokens(cfg, process, most)
    memory = memory_bytes(cfg, dtype, fused, num_params, train_samples.vocab_size, micro_batch_tokens)

    def seen(num_steps):
        samples = num_steps * cfg.global_batch_size
        return f"{num_steps:,} steps see {samples * tokens:.3g} tokens, {samples / len(train_samples):.2f} epochs"

    def price(hours):
        return f", ${hours * process.world_size * cfg.price_per_gpu_hour:,.2f}" if cfg.price_per_gpu_hour else ""

    budgeted = budget.seconds_of(cfg, process.world_size)
    print(f"parameters  {num_params:,}")
    print(f"data        {len(train_samples):,} samples{'' if budgeted else '; ' + seen(cfg.max_steps)}")
    if len(train_samples.sources) > 1:
        for source, quota in zip(train_samples.sources, train_samples.quotas / MIXTURE_PERIOD):
            epochs = "" if budgeted else f", {quota * cfg.max_steps * cfg.global_batch_size / len(source):.2f} epochs"
            print(f"  {quota:6.1%}    {source.directory}: {len(source):,} samples{epochs}")
    print(f"memory      about {memory / 1e9:.1f} GB for micro-batches of at most {micro_batch_tokens:,} tokens{where}")
    print(f"disk        about {12e-9 * num_params * (cfg.keep_checkpoints + 1):.1f} GB for checkpoints")
    here = {device_name(process.device): peak_flops(process.device)} if peak_flops(process.device) else {}
    gpus = here or {"A100": PEAK_FLOPS["A100"], "H100": PEAK_FLOPS["H100"]}
    if budgeted:
        num_val = min(cfg.eval_samples or len(val_samples), len(val_samples))
        for name, peak in gpus.items():
            plan = budget.expected_text(cfg, process.world_size, name, peak, flops, num_val, num_params, seen)
            print(f"budget      {plan}{price(budgeted / 3600)}")
        return
    flops *= cfg.max_steps * cfg.global_batch_size
    print(f"work        {flops:.3g} FLOP in matrix products")
    for name, peak in gpus.items():
        for mfu in (0.3, 0.4, 0.5):
            hours = flops / (peak * mfu) / 3600 / process.world_size
            print(f"time        {hours:.2f} h on {process.world_size} x {name} at {mfu:.0%} MFU{price(hours)}")


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def evaluate(model, samples, cfg, process, micro_batch_tokens, guard):
    """Loss and accuracy over held-out samples with fixed masks, the work shared by all processes.

    Returns {"loss", "accuracy", "num_masked", "majority_accuracy"}; the last is the accuracy of always guessing the
    token that is masked most often. The same for any number of processes, up to the order of a sum. None when a process
    was asked to stop.
    """
    model.eval()
    count = min(cfg.eval_samples or len(samples), len(samples))
    order, epochs = samples.at(np.arange(count), EVAL_SEED)
    totals = torch.zeros(4, dtype=torch.float64, device=process.device)
    label_counts = torch.zeros(samples.vocab_size, dtype=torch.float64, device=process.device)

    def make(part):
        return samples.micro_batch(order[part], epochs[part], EVAL_SEED, EVAL_MASK_PROB).pinned_for(process.device)

    parts = samples.parts(order, micro_batch_tokens, process.rank, process.world_size, equal=False)
    for batch in prefetch(make, parts):
        if guard.signal:
            break
        guard.progress()
        batch = batch.to(process.device)
        with autocast(process):
            logits = model.masked_logits(
                batch.input_ids, batch.cu_seqlens, batch.max_seqlen, batch.masked_positions, batch.windows
            )
        logits, labels = logits[: batch.num_masked].float(), batch.labels[: batch.num_masked]
        totals[0] += torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        totals[1] += (logits.argmax(-1) == labels).sum()
        totals[2] += batch.num_masked
        label_counts.scatter_add_(0, labels, torch.ones_like(labels, dtype=torch.float64))  # bincount would wait
    totals[3] = guard.signal
    if process.world_size > 1:
        dist.all_reduce(totals)
        dist.all_reduce(label_counts)
    model.train()
    numbers = torch.cat([totals, label_counts.max()[None]])
    loss_sum, num_correct, num_masked, asked_to_stop, num_most_masked = to_host(numbers).tolist()
    if asked_to_stop:
        return None
    return {
        "loss": loss_sum / max(1, num_masked),
        "accuracy": num_correct / max(1, num_masked),
        "num_masked": int(num_masked),
        "majority_accuracy": num_most_masked / max(1, num_masked),
    }


def autocast(process):
    if process.dtype == torch.float32:
        return nullcontext()
    return torch.autocast(process.device.type, process.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# The training loop


@command
def main(argv):
    cfg = load_config(TrainConfig, argv)
    cfg.check(int(os.environ.get("WORLD_SIZE", 1)))
    samples = open_samples(cfg)
    with watched_process(cfg) as (process, guard):
        writes = process.rank == 0 and not cfg.dry_run
        with checkpoint.RunDirectory(cfg.out_dir, cfg.on_save_error) if writes else nullcontext() as run:
            try:
                train(cfg, process, run, guard, *samples)
            except torch.OutOfMemoryError:
                tried = cfg.micro_batch_tokens or "the value chosen from the GPU's memory"
                less = max(cfg.seq_length, (cfg.micro_batch_tokens or 65536) // 2)
                text = f"out of GPU memory with micro_batch_tokens={tried} (try --micro_batch_tokens={less})"
                raise UserError(text, this_rank_only=True) from None


def open_samples(cfg):
    """(training, held-out) samples. Raises: UserError where there are none."""
    padded = cfg.model == "bert"
    train_samples = Samples(cfg.data_dir, "train", cfg.seq_length, cfg.chunk, padded)
    val_samples = Samples(cfg.data_dir, "val", cfg.seq_length, cfg.chunk, padded)
    for samples, split in ((train_samples, "training"), (val_samples, "held-out")):
        if len(samples) == 0:
            raise UserError(f"{cfg.data_dir}: no {split} samples (prepare more text, or hold out another share)")
    return train_samples, val_samples


def train(cfg, process, run, guard, train_samples, val_samples):
    """The whole run. `run` is its directory on rank 0, None elsewhere; `guard` hears signals and watches for hangs."""
    device, rank, world_size = process.device, process.rank, process.world_size

    def say(text):
        if rank == 0:
            print(text, flush=True)

    compare_options(cfg, process, train_samples)

    # The model, made on the CPU, so that its first weights are the same on any device.
    vocab_size = train_samples.vocab_size
    torch.manual_seed(cfg.seed)
    raw_model = MaskedLM(cfg, vocab_size)
    num_params = sum(parameter.numel() for parameter in raw_model.parameters())
    started = None
    if cfg.init_from:
        started = convert_hf.start_from(raw_model, cfg.init_from, train_samples.tokenizer_path)
        say(started)
    raw_model.to(device)
    micro_batch_tokens = choose_micro_batch_tokens(cfg, process, num_params, vocab_size)
    if cfg.dry_run:
        if rank == 0:
            print_estimate(cfg, process, num_params, train_samples, val_samples, micro_batch_tokens)
        return

    optimizer = torch.optim.AdamW(
        raw_model.parameters(),  # all of them decay, biases and LayerNorm too, as in the original
        lr=cfg.lr,
        betas=(cfg.beta1, cfg.beta2),
        eps=cfg.adam_eps,
        weight_decay=cfg.weight_decay,
        fused=True,
    )

    # Go on from the newest checkpoint, if there is one and it is this run's.
    state = {"step": 0, "tokens": 0, "samples": 0, "seconds": 0.0}  # since the first step, resumes included
    state |= {"skipped": 0, "skipped_in_a_row": 0}  # updates that were not finite
    resumed_from, eval_missing, max_steps = None, False, None
    if rank == 0:
        defaults = dataclasses.asdict(TrainConfig())
        wanted = dataclasses.replace(cfg, max_steps=None) if budget.seconds_of(cfg, world_size) else cfg
        run.adopt(saved_config(wanted, train_samples), defaults, differing_schedule(cfg), train_samples.tokenizer_text)
        max_steps = run.config["max_steps"]  # None: the budget has yet to choose it
        if resumed_from := run.newest:
            step = checkpoint.step_of(resumed_from)
            evaluates = step == max_steps or is_eval_step(cfg, step)
            eval_missing = evaluates and not run.evaluated(step)  # it was asked to stop then
    if world_size > 1:
        found = [resumed_from, eval_missing, max_steps]
        dist.broadcast_object_list(found, device=device)
        resumed_from, eval_missing, max_steps = found
    cfg = dataclasses.replace(cfg, max_steps=max_steps or cfg.max_steps)
    if resumed_from:
        checkpoint.restore(resumed_from, state, raw_model, optimizer, process)
    elif world_size > 1:
        for parameter in raw_model.parameters():  # another kind of CPU may have rounded them differently
            dist.broadcast(parameter.detach(), src=0)

    backend = "triton" if kernels.uses_triton(device) else "torch"
    dtype = str(process.dtype).removeprefix("torch.")
    say(
        f"{cfg.model}, {num_params:,} parameters, on {world_size} x {device_name(device)}: {dtype}, {backend} kernels, "
        f"micro-batches of at most {micro_batch_tokens:,} tokens"
    )
    if resumed_from:
        say(f"resuming from {resumed_from}")
    if cfg.eval_only:
        if not (resumed_from or cfg.init_from):
            raise UserError(f"{cfg.out_dir}: no checkpoint to evaluate (train first, or give --init_from)")
        result = evaluate(raw_model, val_samples, cfg, process, micro_batch_tokens, guard)
        if result is None:
            guard.leave(process)
        say(eval_line(state["step"], result))
        return
    if max_steps and state["step"] >= max_steps and not eval_missing:
        say(f"{cfg.out_dir}: finished, {state['step']} of {max_steps} steps")
        return
    if rank == 0:
        run.check_space(num_params, cfg.keep_checkpoints)

    def evaluated(step):
        """Evaluate; False when a process was asked to stop before the end."""
        result = evaluate(raw_model, val_samples, cfg, process, micro_batch_tokens, guard)
        if result and rank == 0:
            say(eval_line(step, result))
            run.log("eval", step=step, **result)
        return result is not None

    def step_batches(step):
        batches = train_samples.train_step(
            step - 1, cfg.global_batch_size, cfg.seed, mask_prob_at(cfg, step), micro_batch_tokens, rank, world_size
        )
        return [batch.pinned_for(device) for batch in batches]

    def train_step(step, batches, trial=False):
        """One optimizer step: (loss, gradient norm, how many processes were asked to stop), on the device. A trial does
        all the work, and leaves the weights as they are."""
        num_masked, asked_to_stop = sum_counts(batches, guard.signal > 0, process)
        loss = forward_backward(model, batches, num_masked.clamp(min=1), cfg, process, step, gradient_sum)
        return loss, update(raw_model, optimizer, cfg, process, step, trial), asked_to_stop

    def budget_steps():
        """(max_steps for the budget, its Costs), from trials of steps, evaluation and saving."""

        def trial_evaluation(count):
            some = dataclasses.replace(cfg, eval_samples=count)
            evaluate(raw_model, val_samples, some, process, micro_batch_tokens, guard)

        begun = time.perf_counter()
        trial_save = (lambda: run.trial_save(raw_model)) if rank == 0 else (lambda: 0.0)
        costs = budget.measure(
            cfg, process, partial(train_step, trial=True), step_batches, trial_evaluation, len(val_samples), trial_save
        )
        optimizer.state.clear()  # the moments of the trials
        steps = budget.steps_to_train(cfg, process, costs)
        say(budget.planned_text(cfg, costs, steps, time.perf_counter() - begun))
        return steps, costs

    def samples_of(step, ranks):
        """The numbers of the training samples that these processes have in a step, as a list."""
        samples, _ = train_samples.of_step(step - 1, cfg.global_batch_size, cfg.seed)
        parts = [train_samples.parts(samples, micro_batch_tokens, r, world_size) for r in ranks]
        return [sample for part in sum(parts, []) for sample in samples[part].tolist()]

    model = compiled(raw_model) if cfg.compile else raw_model
    model.train()
    model.register_forward_hook(guard.progress)
    gradient_sum = GradientSum(raw_model) if world_size > 1 else None
    planned = None
    if not max_steps:
        steps, planned = budget_steps()
        cfg = dataclasses.replace(cfg, max_steps=steps)
    if rank == 0:
        run.config = saved_config(cfg, train_samples)
        run.begin(state["step"])
        run.log(
            "start",
            time=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            config=dataclasses.asdict(cfg),
            **checkpoint.versions(),
            device=device_name(device),
            num_params=num_params,
            world_size=world_size,
            kernels=backend,
            dtype=dtype,
            micro_batch_tokens=micro_batch_tokens,
            resumed_from=resumed_from,
            init=started,
            planned=planned and dataclasses.asdict(planned),  # seconds of a step, an evaluation, the last checkpoint
        )
    if eval_missing and not evaluated(state["step"]):
        guard.leave(process)

    # Losses and gradient norms stay on the device until a report is due: nothing else waits for it.
    history = []  # (loss, grad_norm) of each step since the last report
    local_tokens = local_flops = 0  # of this process, since then
    next_report = state["step"] + 1
    peak = peak_flops(device)
    loop_start = report_start = time.perf_counter()
    seconds_before = state["seconds"]
    guard.training = True

    steps = range(state["step"] + 1, cfg.max_steps + 1)
    profiled = gpu_trace.profiled(steps, cfg.profile, cfg.out_dir, rank, say)
    for step, batches in zip(profiled, prefetch(step_batches, steps)):
        guard.at(step)
        loss, grad_norm, asked_to_stop = train_step(step, batches)
        history += [loss, grad_norm]
        local_tokens += sum(batch.num_tokens for batch in batches)
        local_flops += sum(
            matrix_flops(cfg, vocab_size, batch.num_tokens, batch.sum_squared_lengths, batch.num_masked)
            for batch in batches
        )

        last = step == cfg.max_steps
        log_now = last or (step >= next_report if cfg.log_interval == 0 else step % cfg.log_interval == 0)
        stop = guard.all_stop(asked_to_stop)
        eval_now = is_eval_step(cfg, step) and not stop
        save_now = last or stop or step % cfg.checkpoint_interval == 0
        if not (log_now or eval_now or save_now):
            continue

        # One collective brings every process's losses and counts to all, so that all decide alike. It waits for the GPU,
        # which may be a step or two behind: the time is read after it.
        rows = process.gather([*history, local_tokens, local_flops, time.perf_counter() - report_start])
        num_steps, seconds = len(history) // 2, time.perf_counter() - report_start
        for text, record in skipped_updates(rows, step, state, samples_of):
            say(text)
            if rank == 0:
                run.log("skipped", **record)
        tokens, flops = sum(row[-3] for row in rows), sum(row[-2] for row in rows)
        state["step"] = step
        state["tokens"] += int(tokens)
        state["samples"] += num_steps * cfg.global_batch_size
        state["seconds"] = seconds_before + time.perf_counter() - loop_start
        next_report = step + max(1, int(TARGET_LOG_SECONDS * num_steps / rows[0][-1]))  # rank 0's clock: all report alike
        if rank == 0 and log_now:
            record = {
                "step": step,
                "loss": finite(sum(row[-5] for row in rows)),
                "lr": lr_at(cfg, step),
                "grad_norm": finite(rows[0][-4]),
                "skipped": state["skipped"],
                "tokens": state["tokens"],
                "samples": state["samples"],
                "seconds": round(state["seconds"], 3),
                "tokens_per_second": round(tokens / seconds, 1),
                "samples_per_second": round(num_steps * cfg.global_batch_size / seconds, 2),
                "mfu": flops / seconds / world_size / peak if peak else None,
                "mfu_6n": 6 * num_params * tokens / seconds / world_size / peak if peak else None,
                **cost(cfg, state, world_size),
                "memory_gb": torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None,
            }
            run.log("train", **record)
            say(progress_line(cfg, record, num_steps / seconds))
        if eval_now:
            stop = not evaluated(step)
        if save_now or stop:
            if world_size > 1:
                checkpoint.compare_parameters(raw_model, process, step)
            if rank == 0:
                state["seconds"] = seconds_before + time.perf_counter() - loop_start
                run.save(state, raw_model, optimizer, cfg.keep_checkpoints)
        if stop:
            if rank == 0:
                run.wait()
                run.log("stop", step=step)
                say(f"stopped after step {step}, as asked; the same command goes on")
            guard.leave(process)
        history, local_tokens, local_flops = [], 0, 0
        report_start = time.perf_counter()  # evaluation and saving do not count as training speed

    if rank == 0:
        run.wait()
        state["seconds"] = seconds_before + time.perf_counter() - loop_start
        run.log("end", step=state["step"], seconds=round(state["seconds"], 3), **cost(cfg, state, world_size))


# PyTorch 2.11 fuses sums along rows with sums along columns (LayerNorm's backward pass), and where the number of rows
# varies it puts their results together from slices without the parentheses they need: BERT on two GPUs ended with
# "shape '[1408, 768]' is invalid for input of size 0". 2.12 has the parentheses.
WITHOUT_FUSED_SUMS = {"triton.mix_order_reduction": False}


def compiled(model):
    """torch.compile(model), without what this version of it gets wrong.

    It is told that its inputs vary in size. Left to find out, it compiles BERT three times: for the first sizes, when
    another number of tokens is masked, and when there are other samples.
    """
    model = torch.compile(model, options=WITHOUT_FUSED_SUMS if torch.__version__ < "2.12" else {})
    model.register_forward_pre_hook(mark_sizes)
    return model


def mark_sizes(_, inputs):
    for tensor in inputs:
        if isinstance(tensor, torch.Tensor):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)


def gradient_groups(model, most_bytes):
    """Lists of the model's parameters, about in the order in which their gradients come. They are summed in this order, so
    that all processes sum the same ones at a time, and equal runs add up in equal order."""
    groups, num_bytes = [[]], 0
    for parameter in reversed(list(model.parameters())):
        size = parameter.numel() * parameter.element_size()
        if groups[-1] and num_bytes + size > most_bytes:
            groups.append([])
            num_bytes = 0
        groups[-1].append(parameter)
        num_bytes += size
    return groups


def start_sum(parameters):
    """Start to add up the gradients of these parameters over the processes; returns the work, whose wait() ends it.

    Vectors' gradients become parts of one tensor. NCCL takes 0.7 ms for the 90 of base apart, beside 1.8 ms for all else
    (results/README.md, scaling_h200).
    """
    # The longest, which may be as long as any vocabulary, comes last, so that the others stay aligned for AdamW.
    vectors = sorted((parameter for parameter in parameters if parameter.ndim == 1), key=len)
    gradients = [parameter.grad for parameter in parameters if parameter.ndim != 1]
    if vectors:
        gradients.append(torch.cat([vector.grad for vector in vectors]))
        for vector, part in zip(vectors, gradients[-1].split([len(vector) for vector in vectors])):
            vector.grad = part
    return dist.group.WORLD.allreduce_coalesced(gradients)


class GradientSum:
    """Sums the gradients over the processes, most of them where they are, as soon as the last gradient of a group has come.

    On several hosts one group after another is summed while the backward pass goes on to earlier layers. On one host all
    gradients are one group, after the backward pass: beside it a sum over NVLink can cost more than it takes alone
    (results/README.md, scaling_h200).
    Differs from MosaicBERT: its DistributedDataParallel clears, divides and copies gradients in buckets, beside the pass.
    """

    def __init__(self, model):
        hosts = [None] * dist.get_world_size()
        dist.all_gather_object(hosts, platform.node())
        self.groups = gradient_groups(model, GROUP_BYTES if len(set(hosts)) > 1 else math.inf)
        self.group_of = {parameter: number for number, group in enumerate(self.groups) for parameter in group}

    def start(self):
        """The next backward pass is the last one of this step."""
        self.missing = [len(group) for group in self.groups]  # gradients that have yet to come
        self.sums = []  # under way, of the first groups
        self.hooks = [parameter.register_post_accumulate_grad_hook(self.ready) for parameter in self.group_of]

    def ready(self, parameter):
        self.missing[self.group_of[parameter]] -= 1
        while len(self.sums) < len(self.groups) and self.missing[len(self.sums)] == 0:
            self.sums.append(start_sum(self.groups[len(self.sums)]))

    def wait(self):
        """Until all gradients are sums; on a GPU its stream waits, the host does not."""
        for hook in self.hooks:
            hook.remove()
        if len(self.sums) < len(self.groups):
            raise RuntimeError(f"gradients are missing: {sum(self.missing)} of {len(self.group_of)}")
        for each in self.sums:
            each.wait()
        self.sums.clear()  # they hold the gradients


def sum_counts(batches, asked_to_stop, process):
    """(masked tokens of the global batch, how many processes were asked to stop): 0-dim tensors on the device."""
    counts = [float(sum(batch.num_masked for batch in batches)), float(asked_to_stop)]
    # From pinned memory, or the host would wait for the GPU.
    counts = torch.tensor(counts, pin_memory=process.device.type == "cuda").to(process.device, non_blocking=True)
    if process.world_size > 1:
        dist.all_reduce(counts)
    return counts.unbind()


def forward_backward(model, batches, num_masked, cfg, process, step, gradient_sum=None):
    """Add up the gradients of this process's micro-batches; returns their share of the loss, on the device.

    num_masked: of the global batch, a tensor on the device. The loss is exact: a sum over all masked tokens of the
    global batch, divided by their number. gradient_sum: also add up the processes' gradients, in the last micro-step.
    """
    loss = torch.zeros((), device=process.device)
    with autocast(process):  # around all micro-steps, so that the weights are cast once
        for micro_step, batch in enumerate(batches):
            batch = batch.to(process.device)
            # All dropout follows from this seed, so a resumed run draws what the first one would have drawn.
            torch.manual_seed(int(hash64(cfg.seed, step, process.rank, micro_step)[0] >> np.uint64(1)))
            loss_sum = model(
                batch.input_ids,
                batch.cu_seqlens,
                batch.max_seqlen,
                batch.masked_positions,
                batch.labels,
                batch.windows,
            )
            share = loss_sum / num_masked
            if gradient_sum and micro_step == len(batches) - 1:
                gradient_sum.start()
            with torch.autocast(process.device.type, enabled=False):  # backward has the dtypes of forward
                share.backward()
            loss += share.detach()
    if gradient_sum:
        gradient_sum.wait()
    return loss


def update(model, optimizer, cfg, process, step, trial=False):
    """AdamW's step from the gradients, which are then cleared; returns their norm, on the device.

    AdamW skips an update whose gradient is not finite, and then leaves everything as it was. With `trial` the learning rate
    is 0, so that all the work is done, and only the moments change.
    """
    grad_norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
    if cfg.max_grad_norm:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), cfg.max_grad_norm, grad_norm)
    # The norm is that of the reduced gradient, so all processes do alike, and nothing waits for it.
    optimizer.found_inf = (~grad_norm.isfinite()).float()
    for group in optimizer.param_groups:
        group["lr"] = 0.0 if trial else lr_at(cfg, step)
    optimizer.step()
    optimizer.zero_grad()
    return grad_norm


def skipped_updates(rows, step, state, samples_of):
    """Yield (text, log record) for each step since the last report whose update was skipped, and count it in `state`.

    rows: of each process, the (loss, grad_norm) pairs of the steps up to `step`, then three other numbers.
    samples_of(step, ranks): the samples they had. Raises: UserError, in all processes alike, after too many in a row.
    """
    num_steps = (len(rows[0]) - 3) // 2
    for i in range(num_steps):
        this_step, grad_norm = step - num_steps + 1 + i, rows[0][2 * i + 1]
        if math.isfinite(grad_norm):
            state["skipped_in_a_row"] = 0
            continue
        state["skipped"] += 1
        state["skipped_in_a_row"] += 1
        losses = {rank: row[2 * i] for rank, row in enumerate(rows) if not math.isfinite(row[2 * i])}
        where = ", ".join(f"the loss {loss} on rank {rank}" for rank, loss in losses.items()) or "the loss finite"
        samples = samples_of(this_step, losses or range(len(rows)))
        shown = ", ".join(map(str, samples[:20])) + (f" and {len(samples) - 20} more" if len(samples) > 20 else "")
        text = f"step {this_step}: update skipped, the gradient norm is {grad_norm}, {where}; training samples {shown}"
        yield text, {"step": this_step, "ranks": list(losses), "samples": samples}
        if state["skipped_in_a_row"] > MAX_SKIPPED_IN_A_ROW:
            hint = "checkpoints are intact; try a lower --lr in another --out_dir"
            raise UserError(f"step {this_step}: {state['skipped_in_a_row']} updates in a row were not finite ({hint})")


def finite(value):
    """For the log: JSON has no NaN."""
    return value if math.isfinite(value) else None


def is_eval_step(cfg, step):
    return step == cfg.max_steps or bool(cfg.eval_interval) and step % cfg.eval_interval == 0


def saved_config(cfg, train_samples):
    """What config.json holds: every option, and what the data and the vocabulary are."""
    return {
        "format": checkpoint.FORMAT,
        **dataclasses.asdict(cfg),
        "vocab_size": train_samples.vocab_size,
        "tokenizer_sha256": train_samples.tokenizer_sha256,
        "train_data": train_samples.digest,
    }


def compare_options(cfg, process, train_samples):
    """Have all processes stop if they differ in options or data, as hosts may. Raises: UserError naming rank and option."""
    if process.world_size == 1:
        return
    configs = [None] * process.world_size
    dist.all_gather_object(configs, saved_config(cfg, train_samples))
    for rank, config in enumerate(configs):
        for name in sorted(config.keys() | configs[0].keys()):
            here, there = config.get(name), configs[0].get(name)
            if here != there and name not in ("data_dir", "out_dir", "init_from"):  # places; of data the digest counts
                hint = "all hosts need the same command, configuration and shards"
                raise UserError(f"rank {rank} has {name}={here}, rank 0 {name}={there} ({hint})")


def differing_schedule(cfg):
    """A function of (earlier max_steps, step): whether going on with cfg.max_steps would bend a schedule that fell."""

    def differs(earlier, step):
        before = dataclasses.replace(cfg, max_steps=earlier)
        decayed = bool(cfg.final_mask_prob) or step > min(decay_start(cfg), decay_start(before))
        return earlier != cfg.max_steps and decayed

    return differs


def cost(cfg, state, world_size):
    """GPU-hours and dollars so far, for the log; None where there is no price."""
    gpu_hours = state["seconds"] * world_size / 3600
    return {"gpu_hours": gpu_hours, "dollars": gpu_hours * cfg.price_per_gpu_hour if cfg.price_per_gpu_hour else None}


def progress_line(cfg, record, steps_per_second):
    """One readable line of a train record."""
    left = (cfg.max_steps - record["step"]) / steps_per_second
    parts = [
        f"step {record['step']}/{cfg.max_steps}",
        f"loss {record['loss']:.4f}" if record["loss"] is not None else "loss not finite",
        f"lr {record['lr']:.2e}",
        f"{record['tokens_per_second']:,.0f} tok/s",
        f"mfu {record['mfu']:.1%}" if record["mfu"] is not None else "mfu n/a",
        f"mem {record['memory_gb']:.1f} GB" if record["memory_gb"] is not None else "mem n/a",
        f"{datetime.timedelta(seconds=round(record['seconds']))} done, {datetime.timedelta(seconds=round(left))} left",
    ]
    if record["dollars"] is not None:
        total = record["dollars"] * (1 + left / max(record["seconds"], 1e-9))
        parts.append(f"${record['dollars']:.2f} of ${total:.2f}")
    return " | ".join(parts)


def eval_line(step, result):
    return (
        f"step {step}: held-out loss {result['loss']:.4f}, accuracy {result['accuracy']:.1%} of "
        f"{result['num_masked']:,} masked tokens (always guessing the most frequent: {result['majority_accuracy']:.1%})"
    )


if __name__ == "__main__":
    main()
