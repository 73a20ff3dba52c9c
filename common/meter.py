"""What a training run reports: a line and a log record every few seconds, and each update that was skipped."""

import datetime
import math
import time

import torch

from common.estimate import peak_flops
from common.options import UserError

MAX_SKIPPED_IN_A_ROW = 10  # updates that were not finite


class Meter:
    """Measures a run: in `state` since its first step, as checkpoints keep it, and its speed since `begin`.

    flops(tokens, squared lengths, masked tokens): of a micro-batch, forward and backward. Losses and gradient norms stay
    on the device until `gather`, so that nothing waits for them.
    """

    def __init__(self, cfg, state, process, num_params, flops):
        self.cfg, self.state, self.process, self.num_params, self.flops_of = cfg, state, process, num_params, flops
        self.started_at = time.perf_counter() - state["seconds"]
        self.first = None  # the first record: the time left does not count the step that compiled
        self.begin()

    def begin(self):
        """Measure the speed from here on."""
        self.losses, self.grad_norms = [], []
        self.masked, self.tokens, self.flops, self.start = 0, 0, 0, time.perf_counter()

    def add(self, batches, loss, grad_norm):
        """Count a step of this process's micro-batches."""
        self.losses.append(loss)
        self.grad_norms.append(grad_norm)
        self.masked = sum(batch.num_masked for batch in batches)  # of the last step
        self.tokens += sum(batch.num_tokens for batch in batches)
        self.flops += sum(self.flops_of(batch.num_tokens, batch.sum_squared_lengths, batch.num_masked) for batch in batches)

    def gather(self, step):
        """Bring all processes' figures, up to `step`, to all of them, so that they decide alike. Waits for the GPU."""
        n = self.num_steps = len(self.losses)
        counts = [self.masked, self.tokens, self.flops, time.perf_counter() - self.start]
        rows = self.process.gather([*self.losses, *self.grad_norms, *counts])
        self.seconds = time.perf_counter() - self.start  # the GPU may have been a step or two behind
        self.losses, self.grad_norms = [row[:n] for row in rows], rows[0][n : 2 * n]  # losses: each rank's share of each step
        self.masked, self.tokens, self.flops = (int(sum(row[2 * n + i] for row in rows)) for i in range(3))
        self.steps_per_second = n / rows[0][-1]  # by rank 0's clock, the same in all processes
        self.state["step"] = step
        self.state["tokens"] += self.tokens
        self.state["samples"] += n * self.cfg.global_batch_size
        self.count_time()

    def count_time(self):
        """Bring the seconds in `state` up to now."""
        seconds = time.perf_counter() - self.started_at
        self.state["gpu_seconds"] += (seconds - self.state["seconds"]) * self.process.world_size
        self.state["seconds"] = seconds

    def cost(self):
        """GPU-hours and dollars so far; None where there is no price."""
        gpu_hours, price = self.state["gpu_seconds"] / 3600, self.cfg.price_per_gpu_hour
        return {"gpu_hours": gpu_hours, "dollars": gpu_hours * price if price else None}

    def report_skipped(self, samples_of, log):
        """Print and log each update that was skipped since `begin`. samples_of(step, ranks): the samples they had.

        Raises: UserError, in all processes alike, after too many in a row.
        """
        state = self.state
        for i, grad_norm in enumerate(self.grad_norms):
            if math.isfinite(grad_norm):
                state["skipped_in_a_row"] = 0
                continue
            state["skipped"] += 1
            state["skipped_in_a_row"] += 1
            step = state["step"] - self.num_steps + 1 + i
            losses = {rank: shares[i] for rank, shares in enumerate(self.losses) if not math.isfinite(shares[i])}
            where = ", ".join(f"the loss {loss} on rank {rank}" for rank, loss in losses.items()) or "the loss finite"
            samples = samples_of(step, losses or range(len(self.losses)))
            shown = ", ".join(map(str, samples[:20])) + (f" and {len(samples) - 20} more" if len(samples) > 20 else "")
            text = f"update skipped, the gradient norm is {grad_norm}, {where}; training samples {shown}"
            self.process.say(f"step {step}: {text}")
            log("skipped", step=step, ranks=list(losses), samples=samples)
            if state["skipped_in_a_row"] > MAX_SKIPPED_IN_A_ROW:
                hint = "checkpoints are intact; try a lower --lr in another --out_dir"
                raise UserError(f"step {step}: {state['skipped_in_a_row']} updates in a row were not finite ({hint})")

    def record(self, lr):
        """The log's train record, of the last step and of the speed since `begin`."""
        state, device = self.state, self.process.device
        peak, rate = peak_flops(device), 1 / self.seconds / self.process.world_size
        return {
            "step": state["step"],
            "loss": finite(sum(shares[-1] for shares in self.losses)) if self.masked else None,
            "lr": lr,
            "grad_norm": finite(self.grad_norms[-1]),
            "skipped": state["skipped"],
            "tokens": state["tokens"],
            "samples": state["samples"],
            "seconds": round(state["seconds"], 3),
            "tokens_per_second": round(self.tokens / self.seconds, 1),
            "samples_per_second": round(self.num_steps * self.cfg.global_batch_size / self.seconds, 2),
            "mfu": self.flops * rate / peak if peak else None,
            "mfu_6n": 6 * self.num_params * self.tokens * rate / peak if peak else None,
            **self.cost(),
            "memory_gb": torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None,
        }

    def line(self, record):
        """A record as a readable line. The time left follows from the average since the first record."""
        no_loss = "loss not finite" if self.masked else "no loss: nothing is masked"
        parts = [
            f"step {record['step']}/{self.cfg.max_steps or '?'}",
            f"loss {record['loss']:.4f}" if record["loss"] is not None else no_loss,
            f"lr {record['lr']:.2e}",
            f"{record['tokens_per_second']:,.0f} tok/s",
        ]
        if record["memory_gb"] is not None:  # on a GPU
            parts.append(f"mfu {record['mfu']:.1%}" if record["mfu"] is not None else "mfu unknown for this GPU")
            parts.append(f"mem {record['memory_gb']:.1f} GB")
        parts.append(f"{datetime.timedelta(seconds=round(record['seconds']))} done")
        self.first = self.first or record
        if self.cfg.max_steps:
            steps, seconds = (record[key] - self.first[key] for key in ("step", "seconds"))
            left = (self.cfg.max_steps - record["step"]) * (seconds / steps if steps else 1 / self.steps_per_second)
            parts[-1] += f", {datetime.timedelta(seconds=round(left))} left"
            if record["dollars"] is not None:
                total = record["dollars"] * (1 + left / max(record["seconds"], 1e-9))
                parts.append(f"${record['dollars']:.2f} of ${total:.2f}")
        return " | ".join(parts)


def finite(value):
    """For the log: JSON has no NaN."""
    return value if math.isfinite(value) else None
