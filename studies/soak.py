"""Does a long run grow? Train a small model for 20,000 steps, with evaluations and checkpoints, and watch the process.

    python -m studies.soak [STEPS]

Prints anonymous memory, open files and threads 40 times along the way. Fails if memory grows by 2 % after the first tenth
of the run, or if the number of files or threads changes. Mapped shard pages are page cache, so they do not count.
"""

import contextlib
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

import train
from tests.toy import anonymous_mb, make_shards, read_log, toy_argv


def measure():
    """(anonymous resident memory in MB, open files, threads) of this process."""
    return anonymous_mb(), len(os.listdir("/proc/self/fd")), threading.active_count()


def main(max_steps):
    torch.set_num_threads(1)
    rows, train_step = [], train.train_step

    def watched(model, optimizers, batches, cfg, process, step, *rest):
        if step % max(1, max_steps // 40) == 0:
            rows.append((step, *measure()))
            print("step {:6d}  {:7.1f} MB  {:3d} files  {:2d} threads".format(*rows[-1]), file=sys.__stdout__, flush=True)
        return train_step(model, optimizers, batches, cfg, process, step, *rest)

    train.train_step = watched
    with tempfile.TemporaryDirectory() as scratch:
        data, out, start = make_shards(Path(scratch) / "data"), Path(scratch) / "run", time.monotonic()
        interval = min(250, max_steps // 20)  # the checkpoint thread must exist after a tenth of the run
        options = {"max_steps": max_steps, "log_interval": 10, "eval_interval": interval, "checkpoint_interval": interval}
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            train.main(toy_argv(data, out, **options))
        seconds, logged = time.monotonic() - start, len(read_log(out))
        assert logged == max_steps // 10
    settled = [row for row in rows if row[0] >= max_steps // 10]
    growth = settled[-1][1] / settled[0][1] - 1
    print(f"{max_steps:,} steps in {seconds:.0f} s: memory {100 * growth:+.2f} %, files {settled[0][2]} to {settled[-1][2]}, "
          f"threads {settled[0][3]} to {settled[-1][3]}, log lines {logged:,}")  # fmt: skip
    assert growth < 0.02 and settled[0][2] == settled[-1][2] and settled[0][3] == settled[-1][3]


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20_000)
