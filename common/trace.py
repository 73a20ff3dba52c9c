"""A trace of some training steps, and the share of their time in which the GPU was busy: train.py --profile=a:b.

The trace holds what the GPU ran and the calls that launched it, in the format of https://ui.perfetto.dev and
chrome://tracing. (PyTorch's operators are left out: noting them slows the CPU down so much that the GPU waits for it.)
The steps a to b are traced with all that comes between them: loading, logging, evaluation, checkpoints. The trace starts
and ends with an empty queue, so trace several steps.

Read next: kernels/__init__.py
"""

import gzip
import json
import os
import re
import time

import torch

from common.options import UserError

GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of the trace's events


def first_and_last(option):
    """(a, b) of "a:b", or None for "". Raises: UserError."""
    if not option:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", option)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"profile={option}: expected a:b, the first and the last step to trace (e.g. --profile=20:22)")
    return int(match[1]), int(match[2])


class Tracer:
    """Traces the steps a to b of option "a:b" into out_dir; say(text) reports the result."""

    def __init__(self, option, out_dir, say):
        self.first, self.last = first_and_last(option) or (0, 0)
        self.path, self.say, self.profiler = os.path.join(out_dir, f"trace_{self.first}_{self.last}.json.gz"), say, None
        self.traced = False

    def at(self, step):
        """`step` is about to begin."""
        if self.profiler and step > self.last:
            self.finish()
        if step == self.first:
            activity = torch.profiler.ProfilerActivity
            self.profiler = torch.profiler.profile(activities=[activity.CUDA if torch.cuda.is_available() else activity.CPU])
            self.profiler.start()
            wait_for_gpu()
            self.start = time.perf_counter()

    def finish(self):
        """Write the trace, if one was begun, and say how busy the GPU was."""
        profiler, self.profiler = self.profiler, None
        if not profiler:
            if self.first and not self.traced:
                self.say(f"steps {self.first}:{self.last}: not traced, this process did not run step {self.first}")
            return
        self.traced = True
        wait_for_gpu()
        seconds = time.perf_counter() - self.start
        profiler.stop()
        profiler.export_chrome_trace(self.path)
        with gzip.open(self.path, "rt") as file:
            busy = busy_seconds(json.load(file)["traceEvents"])
        share = f"the GPU was busy {busy / seconds:.1%} of {seconds:.3f} s" if busy else f"{seconds:.3f} s, no GPU at work"
        self.say(f"steps {self.first}:{self.last}: {share}; trace in {self.path}")


def wait_for_gpu():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def busy_seconds(events):
    """Seconds covered by at least one kernel, copy or fill among the events of a trace, whose times are in us."""
    intervals = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("ph") == "X" and e.get("cat") in GPU_WORK)
    busy, end = 0.0, float("-inf")
    for start, stop in intervals:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return busy / 1e6
