"""How many steps a budget buys: train.py --budget_minutes=16, or --budget_dollars=2 --price_per_gpu_hour=2.5.

What counts is the log's `seconds`: training since the first step, evaluations, and the wait for the last checkpoint.
Opening, compiling and what this file does come before, and do not count. At the start of a run its own steps are
carried out as trials that change nothing, and timed; max_steps then follows, and stays what it is when the run is
resumed. --dry_run plans by throughputs that were measured before.

Read next: train.py
"""

import bisect
import itertools
import math
import statistics
import time
from dataclasses import dataclass

import torch

from config import UserError
from data import prefetch

LEAST_STEPS = 20  # fewer train nothing
# Share of the budget that is not planned, since GPUs may slow down after the timing here, and the share of writing a
# checkpoint on the way that training is held up by, as it shares the machine with it (0.5 to 1.2 s of 4 to 9 in results/race).
# With both, six runs of 2 and 4 minutes ended 0.1 to 1.5 % early (results/budgets_h200).
RESERVE, HELD_UP = 0.01, 0.12
FIRST_STEPS, COMPILED_STEPS = 3, 10  # not timed: they compile.
# A GPU that warms up slows down, an H100 by 1 % in 10 s (results/glue_h100/pretrain.jsonl). So steps run for a while
# before they are timed, both for so many seconds, but at most for that share of the budget.
HEAT_SECONDS, HEAT_SHARE = 15.0, 0.1
TIMED_SECONDS, TIMED_SHARE = 8.0, 0.05
ROUNDS = 5  # of timed steps; their median counts, so that one late compilation does not
TRIAL_EVAL_SAMPLES = 8192  # for each process, at most

# Shares of a GPU's peak that training reached, by matrix FLOPs without padding (model.matrix_flops), and where that
# stands: (part of the GPU's name, model, hidden_size, compile): (MFU, source). A100: what MosaicML published for eight,
# 1,032 and 903 samples/s each, taken as full samples of 128 tokens: 90.1 and 69.8 GFLOP.
MEASURED_MFU = {
    ("H200", "mosaicbert", 768, False): (0.48, "results/scaling_h200/scaling.json"),
    ("H200", "mosaicbert", 1024, False): (0.527, "results/scaling_h200/scaling.json"),
    ("H200", "bert", 768, True): (0.321, "results/scaling_h200/scaling.json"),
    ("H100", "mosaicbert", 768, False): (0.464, "results/scaling_h100/scaling.json"),
    ("H100", "mosaicbert", 1024, False): (0.495, "results/scaling_h100/scaling.json"),
    ("H100", "bert", 768, True): (0.328, "results/race_settings/bert_512_5e-4.jsonl"),
    ("A100", "mosaicbert", 768, False): (0.298, "published for the original's code"),
    ("A100", "bert", 768, False): (0.202, "published for Hugging Face's BERT"),
}
SAVED_BYTES_PER_SECOND = 0.38e9  # a checkpoint of 1.65 GB took 4.3 s on an H100's host (results/glue_h100/pretrain.jsonl)

clock = time.perf_counter


@dataclass
class Costs:
    """Seconds of one step, of one whole evaluation, and of waiting for the last checkpoint."""

    step: float
    evaluation: float
    save: float


def check(cfg):
    """Raises: UserError for budgets that make no sense."""
    for name in ("budget_minutes", "budget_dollars"):
        if getattr(cfg, name) < 0:
            raise UserError(f"{name}={getattr(cfg, name)}: must be at least 0")
    if cfg.budget_minutes and cfg.budget_dollars:
        raise UserError("give --budget_minutes or --budget_dollars, not both")
    if cfg.budget_dollars and not cfg.price_per_gpu_hour:
        raise UserError(f"budget_dollars={cfg.budget_dollars}: needs the price (as --price_per_gpu_hour=2.5)")


def seconds_of(cfg, world_size):
    """The budget in seconds of training; 0: there is none, and max_steps says how long."""
    if cfg.budget_dollars:
        return 3600 * cfg.budget_dollars / (cfg.price_per_gpu_hour * world_size)
    return 60 * cfg.budget_minutes


def text_of(cfg):
    return f"${cfg.budget_dollars:,.2f}" if cfg.budget_dollars else f"{cfg.budget_minutes:g} minutes"


def total_seconds(num_steps, cfg, costs):
    """What a run of so many steps takes. Checkpoints are written while training goes on, somewhat slower, one at a time."""
    waited = written = 0.0
    for step in range(cfg.checkpoint_interval, num_steps, cfg.checkpoint_interval):
        evaluations = step // cfg.eval_interval if cfg.eval_interval else 0
        now = step * costs.step + evaluations * costs.evaluation + waited
        waited += max(0.0, written - now) + HELD_UP * costs.save
        written = max(now, written) + costs.save
    now = num_steps * costs.step + num_evaluations(num_steps, cfg) * costs.evaluation + waited
    return max(now, written) + costs.save


def num_evaluations(num_steps, cfg):
    return 1 + (num_steps - 1) // cfg.eval_interval if cfg.eval_interval else 1


def affordable_steps(cfg, costs, seconds):
    """The most steps that fit into so many seconds, evaluations and last checkpoint included; 0: none do."""
    most = range(1, 2 + math.ceil(seconds / costs.step))
    return bisect.bisect_right(most, seconds * (1 - RESERVE), key=lambda steps: total_seconds(steps, cfg, costs))


def steps_to_train(cfg, process, costs):
    """max_steps for the budget, the same in all processes if `costs` are. Raises: UserError when there are too few."""
    seconds = seconds_of(cfg, process.world_size)
    steps = affordable_steps(cfg, costs, seconds)
    if steps < LEAST_STEPS:
        each = f"a step takes {costs.step:.3g} s, evaluating {costs.evaluation:.3g} s, saving {costs.save:.3g} s"
        hint = "a larger budget, a smaller --global_batch_size, or fewer --eval_samples"
        raise UserError(f"{text_of(cfg)} buy {steps} steps here, at least {LEAST_STEPS} are needed: {each} ({hint})")
    return steps


# ---------------------------------------------------------------------------------------------------------------------
# Timing


def measure(cfg, process, trial_step, step_batches, evaluate, num_val_samples, trial_save):
    """The Costs of this run, the same in all processes: of each time the longest counts.

    trial_step(step, its batches): a step that changes nothing. evaluate(samples): evaluation of so many held-out
    samples. trial_save(): seconds to write a checkpoint.
    """
    seconds = seconds_of(cfg, process.world_size)
    steps, batches = itertools.count(1), prefetch(step_batches, itertools.count(1))

    def of_steps(count):
        for _ in range(count):
            trial_step(next(steps), next(batches))

    step = time_steps(of_steps, process, seconds, FIRST_STEPS if not cfg.compile else COMPILED_STEPS)
    batches.close()
    count = min(cfg.eval_samples or num_val_samples, num_val_samples)
    some = min(count, TRIAL_EVAL_SAMPLES * process.world_size)
    timed(lambda: evaluate(some), process)  # compiles
    evaluation = timed(lambda: evaluate(some), process) * count / some
    return Costs(step, evaluation, longest(trial_save(), process))


def time_steps(of_steps, process, budget_seconds, first):
    """Seconds of a step: warm up, then time late and long enough. of_steps(n): carry out n of them."""
    timed(lambda: of_steps(first), process)
    heat, one, count = min(HEAT_SECONDS, HEAT_SHARE * budget_seconds), math.inf, 1
    while heat > 0:
        one = min(one, timed(lambda: of_steps(count), process) / count)
        heat -= count * one  # not the time that went by: a GPU that waits for a compilation stays cool
        count = max(1, min(2 * count, round(heat / one)))
    if one * LEAST_STEPS > budget_seconds:
        return one  # too few fit in any case
    count = max(1, round(min(TIMED_SECONDS, TIMED_SHARE * budget_seconds) / ROUNDS / one))
    return statistics.median(timed(lambda: of_steps(count), process) / count for _ in range(ROUNDS))


def timed(work, process):
    """Seconds that `work` took, in the process where it took longest."""
    start = clock()
    work()
    if process.device.type == "cuda":
        torch.cuda.synchronize(process.device)
    return longest(clock() - start, process)


def longest(seconds, process):
    return max(row[0] for row in process.gather([seconds]))


def planned_text(cfg, costs, num_steps, seconds):
    """What the run says when it has planned itself, for `seconds`."""
    return (
        f"budget of {text_of(cfg)}: {num_steps:,} steps of {costs.step:.4g} s, {num_evaluations(num_steps, cfg)} x "
        f"{costs.evaluation:.3g} s of evaluation, {costs.save:.3g} s for the last checkpoint: "
        f"{total_seconds(num_steps, cfg, costs):.1f} s (timing that took {seconds:.0f} s, which do not count)"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Before there is a GPU


def expected_text(cfg, world_size, gpu, peak, sample_flops, num_val, num_params, seen):
    """What --dry_run says of the budget on so many of these GPUs.

    peak: FLOP/s of one. sample_flops: of training on one sample; evaluating one of num_val takes a third of that.
    seen(steps): what so many steps see, as text.
    """
    where = f"{text_of(cfg)} on {world_size} x {gpu}"
    for (name, model, hidden_size, compiled), (mfu, source) in MEASURED_MFU.items():
        if name in gpu and (model, hidden_size, compiled) == (cfg.model, cfg.hidden_size, cfg.compile):
            rate = peak * mfu * world_size
            step, evaluation = sample_flops * cfg.global_batch_size / rate, sample_flops * num_val / 3 / rate
            seconds = seconds_of(cfg, world_size)
            steps = affordable_steps(cfg, Costs(step, evaluation, 12 * num_params / SAVED_BYTES_PER_SECOND), seconds)
            samples = steps * cfg.global_batch_size
            return f"{where} at {mfu:.1%} MFU ({source}): {samples:,} samples; {seen(steps)}, {seconds / 3600:.3g} h"
    return f"{where}: speed not measured yet, a run times its own steps first; {seconds_of(cfg, world_size) / 3600:.3g} h"
