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

from config import UserError

GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of the trace's events


def first_and_last(option):
    """(a, b) of "a:b", or None for "". Raises: UserError."""
    if not option:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", option)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"profile={option}: expected a:b, the first and the last step to trace (as --profile=20:22)")
    return int(match[1]), int(match[2])


def profiled(steps, option, out_dir, rank, say):
    """Yield `steps`; on rank 0 those from a to b are traced into out_dir."""
    first, last = first_and_last(option) or (None, None)
    profiler = None
    for step in steps:
        if profiler and step > last:
            finish(profiler, start, option, out_dir, say)
            profiler = None
        if rank == 0 and step == first:
            activity = torch.profiler.ProfilerActivity
            profiler = torch.profiler.profile(activities=[activity.CUDA if torch.cuda.is_available() else activity.CPU])
            profiler.start()
            wait_for_gpu()
            start = time.perf_counter()
        yield step
    if profiler:
        finish(profiler, start, option, out_dir, say)


def wait_for_gpu():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def finish(profiler, start, option, out_dir, say):
    """Write the trace, and say how busy the GPU was since `start`."""
    wait_for_gpu()
    seconds = time.perf_counter() - start
    profiler.stop()
    path = os.path.join(out_dir, f"trace_{option.replace(':', '_')}.json.gz")
    profiler.export_chrome_trace(path)
    with gzip.open(path, "rt") as file:
        busy = busy_seconds(json.load(file)["traceEvents"])
    share = f"the GPU was busy {busy / seconds:.1%} of {seconds:.3f} s" if busy else f"{seconds:.3f} s, no GPU at work"
    say(f"steps {option}: {share}; trace in {path}")


def busy_seconds(events):
    """Seconds covered by at least one kernel, copy or fill among the events of a trace, whose times are in us."""
    intervals = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("ph") == "X" and e.get("cat") in GPU_WORK)
    busy, end = 0.0, float("-inf")
    for start, stop in intervals:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return busy / 1e6
