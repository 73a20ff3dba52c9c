"""How many steps a budget buys: train.py --budget_minutes=16, or --budget_dollars=2 --price_per_gpu_hour=2.5.

The warm-up is the measurement. Its length in steps is known beforehand (--warmup_steps), and so is its learning rate.
In its first half the GPU gets warm; halfway, an evaluation and a checkpoint are timed; the second half gives the time
of a step. Then max_steps is fixed, and with it the rest of the schedule. A resume keeps it.

What counts is the log's `seconds`: training since the first step, evaluations, and the wait for the last checkpoint.
Start-up does not count, but compiling does.
"""

import bisect
import math
import time
from dataclasses import dataclass

from common.options import UserError, require

WARMUP_STEPS = 200  # unless --warmup_steps says otherwise
MIN_WARMUP = 4
# Share of the budget that stays unplanned, since GPUs may slow down after the measurement; and the fraction of a
# checkpoint's write time that is lost to slower training (0.5 to 1.2 s of 4 to 9 in results/race).
RESERVE, SAVE_OVERHEAD = 0.01, 0.12
EVAL_SAMPLES = 8192  # per process, at most, in the timed evaluation


@dataclass
class Costs:
    """Seconds of one step, of one whole evaluation, and of writing one checkpoint."""

    step: float
    evaluation: float
    save: float


def check(cfg):
    """Raises: UserError for budgets that make no sense."""
    require(cfg, "budget_minutes budget_dollars", lambda x: x >= 0, "must be at least 0")
    if cfg.budget_minutes and cfg.budget_dollars:
        raise UserError("give --budget_minutes or --budget_dollars, not both")
    if cfg.budget_dollars and not cfg.price_per_gpu_hour:
        raise UserError(f"budget_dollars={cfg.budget_dollars}: needs the price (e.g. --price_per_gpu_hour=2.5)")
    if 0 < cfg.warmup_steps < MIN_WARMUP and (cfg.budget_minutes or cfg.budget_dollars):
        raise UserError(f"warmup_steps={cfg.warmup_steps}: a budget needs {MIN_WARMUP}, in which it times steps")


def seconds_of(cfg, world_size):
    """The budget in seconds of training; 0: there is none, and max_steps says how long."""
    if cfg.budget_dollars:
        return 3600 * cfg.budget_dollars / (cfg.price_per_gpu_hour * world_size)
    return 60 * cfg.budget_minutes


def text_of(cfg):
    return f"${cfg.budget_dollars:,.2f}" if cfg.budget_dollars else f"{cfg.budget_minutes:g} minutes"


def training_seconds(cfg, costs, first, last):
    """What steps first + 1 to last take, with their evaluations and checkpoints, until the last checkpoint is written.

    Checkpoints are written one at a time, while training goes on somewhat slower.
    """
    def evaluations(step):
        return step // cfg.eval_interval - first // cfg.eval_interval if cfg.eval_interval else 0

    waited = written = 0.0
    for step in range(first - first % cfg.checkpoint_interval + cfg.checkpoint_interval, last, cfg.checkpoint_interval):
        now = (step - first) * costs.step + evaluations(step) * costs.evaluation + waited
        waited += max(0.0, written - now) + SAVE_OVERHEAD * costs.save
        written = max(now, written) + costs.save
    now = (last - first) * costs.step + (evaluations(last - 1) + 1) * costs.evaluation + waited
    return max(now, written) + costs.save


def affordable_steps(cfg, costs, seconds, first=0):
    """The last step that fits into so many seconds after step `first`, evaluations and last checkpoint included."""
    steps = range(first + 1, first + 2 + max(0, math.ceil(seconds / costs.step)))
    return first + bisect.bisect_right(steps, seconds, key=lambda last: training_seconds(cfg, costs, first, last))


class Planner:
    """Finds max_steps for a budget in the warm-up; does nothing where cfg.max_steps is known.

    What is measured is kept in state["measured"], and so in checkpoints.
    """

    def __init__(self, cfg, state, process):
        self.cfg, self.process = cfg, process
        self.half, self.end = cfg.warmup_steps // 2, cfg.warmup_steps
        self.first = state["step"] + 1  # of this process: it compiles
        if cfg.max_steps is None:
            self.measured = state.setdefault("measured", {"steps": 0, "seconds": 0.0})
            process.say(f"budget of {text_of(cfg)}: planned after a warm-up of {self.end} steps (--warmup_steps), which is timed")

    def saves(self, step):
        """Whether this is the step whose checkpoint is timed."""
        return self.cfg.max_steps is None and step >= self.half and "save" not in self.measured

    def ends(self, step):
        """Whether this is the last step of the warm-up."""
        return self.cfg.max_steps is None and step >= self.end

    def wants(self, step):
        """Whether a report is needed after this step: at the end, and after the one that compiled."""
        return self.cfg.max_steps is None and step in (self.first, self.end)

    def add(self, step, report, spent):
        """Count a report's steps, if they are in the half of the warm-up that is timed.

        spent: seconds of training so far. Raises: UserError, on all processes, when the budget is already spent.
        """
        if self.cfg.max_steps is not None:
            return
        if "save" in self.measured and (step > self.first or self.ends(step) and not self.measured["steps"]):
            self.measured["steps"] += report.num_steps
            self.measured["seconds"] += report.seconds
        if max(row[0] for row in self.process.gather([spent])) > seconds_of(self.cfg, self.process.world_size):
            text = f"{text_of(self.cfg)}: spent after {step} steps of a warm-up of {self.end}"
            hint = "a larger budget, fewer --warmup_steps, or a smaller --global_batch_size; with another --out_dir"
            raise UserError(f"{text} ({hint})")

    def time_rest(self, evaluate, num_val, saver):
        """Time an evaluation and the checkpoint that was just begun. evaluate(n): on n held-out samples, of num_val."""
        saver.wait()
        some = min(num_val, EVAL_SAMPLES * self.process.world_size)
        evaluate(some)  # compiles
        start = time.perf_counter()
        if evaluate(some):  # and no signal cut it short
            self.measured |= {"evaluation": (time.perf_counter() - start) * num_val / some, "save": saver.seconds}

    def plan(self, spent, run):
        """max_steps, the same on all processes. spent: seconds of training so far. Raises: UserError."""
        measured = self.measured
        mine = [measured["seconds"] / measured["steps"], measured["evaluation"], measured["save"], spent]
        *costs, spent = (max(column) for column in zip(*self.process.gather(mine)))
        costs = Costs(*costs)
        left = seconds_of(self.cfg, self.process.world_size) * (1 - RESERVE) - spent
        max_steps = affordable_steps(self.cfg, costs, left, self.end)
        each = f"a step takes {costs.step:.4g} s, an evaluation {costs.evaluation:.3g} s, a checkpoint {costs.save:.3g} s"
        if max_steps <= self.end:
            hint = "a larger budget, fewer --warmup_steps, a smaller --global_batch_size, or fewer --eval_samples"
            text = f"{text_of(self.cfg)}: the warm-up of {self.end} steps took {spent:.1f} s of it, and too little is left"
            raise UserError(f"{text}: {each} ({hint})")
        self.process.say(f"budget of {text_of(self.cfg)}: {each}: {max_steps:,} steps")
        run.log("plan", step=self.end, max_steps=max_steps, **{f"{name}_seconds": value for name, value in vars(costs).items()})
        return max_steps
