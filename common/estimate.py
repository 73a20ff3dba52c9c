"""Estimates before training: GPU memory, FLOP/s of known GPUs, and what --dry_run prints."""

import numpy as np
import torch

from common import budget
from common.files import gigabytes
from common.options import UserError
from common.processes import device_name, memory_of

GPU_MICRO_BATCH_TOKENS = 131072  # at most, unless asked for: on an H100 more is no faster, and 184,320 ran out of memory
CPU_MICRO_BATCH_TOKENS = 8192  # small enough for activations to stay near the caches

# Dense bf16 matrix rate with fp32 accumulation, in FLOP/s, from NVIDIA's data sheets. The first name found in the
# device's name counts; an unknown GPU gets no MFU rather than a wrong one.
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

# Shares of a GPU's peak that training reached, by matrix FLOPs without padding (model.matrix_flops), and the
# source: (part of the GPU's name, model, hidden_size, "fp8", "compile" or ""): (MFU, source). A100: what MosaicML published
# for eight, 1,032 and 903 samples/s each, taken as full samples of 128 tokens: 90.1 and 69.8 GFLOP.
MEASURED_MFU = {
    ("H200", "mosaicbert", 768, "fp8"): (0.581, "results/token_types_h200/seventeen_minutes.jsonl"),
    ("H200", "mosaicbert", 2048, "fp8"): (0.831, "results/xl_h200/fp8.txt"),
    ("H200", "mosaicbert", 768, ""): (0.48, "results/scaling_h200/scaling.json"),
    ("H200", "mosaicbert", 1024, ""): (0.527, "results/scaling_h200/scaling.json"),
    ("H200", "bert", 768, "compile"): (0.321, "results/scaling_h200/scaling.json"),
    ("H100", "mosaicbert", 768, ""): (0.464, "results/scaling_h100/scaling.json"),
    ("H100", "mosaicbert", 1024, ""): (0.495, "results/scaling_h100/scaling.json"),
    ("H100", "bert", 768, "compile"): (0.328, "results/race_settings/bert_512_5e-4.jsonl"),
    ("A100", "mosaicbert", 768, ""): (0.298, "published for the original's code"),
    ("A100", "bert", 768, ""): (0.202, "published for Hugging Face's BERT"),
}
# Shorter steps may wait for the host, which launches their kernels: then what follows from a GPU's peak is a bound. No step of
# 12 layers took less, even with CUDA graphs (results/recipe_h200/small_steps_first.json); smaller models were not measured.
SHORT_STEP = 0.025  # seconds
SAVED_BYTES_PER_SECOND = 0.38e9  # a checkpoint of 1.65 GB took 4.3 s on an H100's host (results/glue_h100/pretrain.jsonl)


def peak_flops(device):
    """The device's bf16 matrix rate in FLOP/s, or None where it is not known."""
    name = device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None) if device.type == "cuda" else None


def memory_bytes(cfg, dtype, fused, num_params, vocab_size, tokens):
    """About how much GPU memory a micro-batch of `tokens` takes, in bytes.

    Weights, gradients and AdamW's moments: 16 bytes a parameter, a copy of the weights in the compute dtype, and 12 more
    while a checkpoint is written. Kept for the backward pass, in values per token and layer: 8C (qkv, attention output,
    sums and results of two LayerNorms) and 3F (both halves of the GeGLU and its result). Without the fused kernels C and
    2.5F more, and the attention weights of H heads over seq_length keys, in float32 and again in the compute dtype.
    With --fp8 2C + F of them take one byte: the inputs of Wqkv, of gate and up, and of down.
    With --activation_checkpointing the layers keep C, their input; one of them has the rest, while it runs again, and as much
    in gradients. This part is arithmetic, not measured yet.
    The head holds its logits in the compute dtype, and without the fused kernels in float32 too, both with gradients.
    This gives 387 kB a token and 4.1 GB for base in bf16, 791 kB without the fused kernels. Measured on an H100: 793
    without them; with them 27.1 GB in all for micro-batches of 65,536 tokens, where this gives 27.8 plus 1.6 for the
    checkpoint.
    """
    bytes_per_value = dtype.itemsize
    layer = (8 * cfg.hidden_size + 3 * cfg.intermediate_size) * bytes_per_value
    if cfg.fp8:
        layer -= (2 * cfg.hidden_size + cfg.intermediate_size) * (bytes_per_value - 1)
    logit = bytes_per_value
    if cfg.model == "bert" or not fused:
        logit += bytes_per_value + 8
        layer += (cfg.hidden_size + 2.5 * cfg.intermediate_size) * bytes_per_value
        layer += cfg.num_heads * cfg.seq_length * (4 + bytes_per_value)
    layers = cfg.num_layers * layer
    if cfg.activation_checkpointing:
        layers = cfg.num_layers * cfg.hidden_size * bytes_per_value + 2 * layer
    return num_params * (28 + bytes_per_value) + tokens * (layers + cfg.mask_prob * vocab_size * logit)


def fitting_tokens(cfg, dtype, fused, num_params, vocab_size, memory):
    """The most tokens of a micro-batch that fit into a GPU of `memory` bytes, leaving 10 % and 1 GB free."""
    fixed = memory_bytes(cfg, dtype, fused, num_params, vocab_size, 0)
    per_token = memory_bytes(cfg, dtype, fused, num_params, vocab_size, 1) - fixed
    return min(GPU_MICRO_BATCH_TOKENS, int((memory * 0.9 - 1e9 - fixed) / per_token) // 1024 * 1024)


def useful_tokens(cfg, process, most):
    """`most`, but at least one sample, and no more than a process has in a step."""
    return max(cfg.seq_length, min(most, cfg.global_batch_size * cfg.seq_length // process.world_size))


def choose_micro_batch_tokens(cfg, process, backend, num_params, vocab_size):
    """The most tokens that fit into the smallest GPU of the run, and are of use. Raises: UserError if none do."""
    if cfg.micro_batch_tokens:
        return cfg.micro_batch_tokens
    most = CPU_MICRO_BATCH_TOKENS
    if process.device.type == "cuda":
        memory = min(row[0] for row in process.gather([memory_of(process.device)]))
        most = fitting_tokens(cfg, process.dtype, backend == "triton", num_params, vocab_size, memory)
        if most < cfg.seq_length:
            hint = "try --activation_checkpointing=true, or a smaller one"
            raise UserError(f"{device_name(process.device)}: too little memory for this model ({hint})")
    return useful_tokens(cfg, process, most)


def duration(hours):
    """As text, in hours, minutes or seconds."""
    if hours >= 0.1:
        return f"{hours:,.2f} h"
    return f"{60 * hours:.1f} min" if hours >= 1 / 60 else f"{max(1, 3600 * hours):.0f} s"


def print_estimate(cfg, process, backend, num_params, samples, num_val, micro_batch_tokens, matrix_flops):
    """What --dry_run prints: size, data, memory, and hours and dollars, at some shares of a GPU's peak.

    samples: training Samples. matrix_flops(tokens, squared lengths, masked tokens): FLOPs of a forward and backward pass.
    """
    if process.rank > 0:
        return
    dtype, fused, fits = process.dtype, backend == "triton", {"": micro_batch_tokens}
    order, _ = samples.order(np.arange(min(len(samples), 20_000)), cfg.seed)
    lengths = samples.locate(order)[2] + 2.0
    flops = matrix_flops(lengths.mean(), (lengths**2).mean(), cfg.mask_prob * lengths.mean())  # of a sample
    if process.device.type == "cpu":  # no GPU here: estimate for an A100 or H100, and for an H200
        dtype, fused, fits = torch.bfloat16, cfg.kernels != "torch", {}
        for size in (80, 141):
            most = fitting_tokens(cfg, dtype, fused, num_params, samples.vocab_size, size * 1e9)
            where = f", in bfloat16 on a GPU of {size} GB{'' if most >= cfg.seq_length else ', which has too little'}"
            fits[where] = cfg.micro_batch_tokens or useful_tokens(cfg, process, most)

    def seen(num_steps):
        count = num_steps * cfg.global_batch_size
        return f"{num_steps:,} steps see {count * lengths.mean():.3g} tokens, {count / len(samples):.2f} epochs"

    def price(hours):
        return f", ${hours * process.world_size * cfg.price_per_gpu_hour:,.2f}" if cfg.price_per_gpu_hour else ""

    budgeted = budget.seconds_of(cfg, process.world_size)
    print(f"parameters  {num_params:,}")
    print(f"data        {len(samples):,} samples{'' if budgeted else '; ' + seen(cfg.max_steps)}")
    for source, share in samples.shares():
        epochs = "" if budgeted else f", {share * cfg.max_steps * cfg.global_batch_size / len(source):.2f} epochs"
        print(f"  {share:6.1%}    {source.directory}: {len(source):,} samples{epochs}")
    for where, tokens in fits.items():
        memory = memory_bytes(cfg, dtype, fused, num_params, samples.vocab_size, tokens)
        print(f"memory      about {gigabytes(memory)} for micro-batches of at most {tokens:,} tokens{where}")
    print(f"disk        about {gigabytes(12 * num_params * (cfg.keep_checkpoints + 1))} for checkpoints")
    here = {device_name(process.device): peak_flops(process.device)} if peak_flops(process.device) else {}
    others, shares = (("H100", "H200"), (0.4, 0.5, 0.6)) if cfg.fp8 else (("A100", "H100"), (0.3, 0.4, 0.5))
    gpus = here or {name: PEAK_FLOPS[name] for name in others}
    if budgeted:
        for gpu, peak in gpus.items():
            plan = expected_plan(cfg, process.world_size, gpu, peak, flops, num_val, num_params, seen)
            print(f"budget      {plan}{price(budgeted / 3600)}")
        return
    flops *= cfg.max_steps * cfg.global_batch_size
    print(f"work        {flops:.3g} FLOP in matrix products{'' if here else '; on this device not estimated, on others:'}")
    for gpu, peak in gpus.items():
        for mfu in shares:  # of the bf16 peak
            hours = flops / (peak * mfu) / 3600 / process.world_size
            time = f"{more_than(3600 * hours / cfg.max_steps)}{duration(hours)}"
            print(f"time        {time} on {process.world_size} x {gpu} at {mfu:.0%} MFU{price(hours)}")
    if more_than(3600 * hours / cfg.max_steps):  # of the fastest
        print(f"            (steps of less than {1000 * SHORT_STEP:.0f} ms may wait for the host, which launches their kernels)")


def more_than(seconds):
    """How exact a step's computed time is: "" or "more than "."""
    return "more than " if seconds < SHORT_STEP else ""


def expected_plan(cfg, world_size, gpu, peak, sample_flops, num_val, num_params, seen):
    """What a budget should buy on so many of these GPUs, by the share of `peak` FLOP/s that was measured before.

    sample_flops: of training on one sample; evaluating one of num_val takes a third of that. seen: see print_estimate.
    """
    where, seconds = f"{budget.text_of(cfg)} on {world_size} x {gpu}", budget.seconds_of(cfg, world_size)
    kind = "checkpointing" if cfg.activation_checkpointing else "fp8" if cfg.fp8 else "compile" if cfg.compile else ""
    for (name, *measured), (mfu, source) in MEASURED_MFU.items():
        if name in gpu and measured == [cfg.model, cfg.hidden_size, kind]:
            rate = peak * mfu * world_size
            step, evaluation = sample_flops * cfg.global_batch_size / rate, sample_flops * num_val / 3 / rate
            costs = budget.Costs(step, evaluation, 12 * num_params / SAVED_BYTES_PER_SECOND)
            steps = budget.affordable_steps(cfg, costs, seconds * (1 - budget.RESERVE))
            samples = steps * cfg.global_batch_size
            most = "at most " if more_than(step) else ""
            return f"{where} at {mfu:.1%} MFU ({source}): {most}{samples:,} samples; {seen(steps)}, {duration(seconds / 3600)}"
    return f"{where}: speed not measured yet, the run finds it in its warm-up; {duration(seconds / 3600)}"
