"""Run jobs in several processes, with a progress line now and then.

Read next: prepare_c4.py, whose units of work are such jobs
"""

import concurrent.futures
import datetime
import math
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter

from common.files import gigabytes
from common.options import UserError

REPORT_SECONDS = 10  # between progress lines


class Progress:
    """Totals over all processes, in shared memory. Whichever process finds REPORT_SECONDS elapsed prints them."""

    NAMES = ("documents", "tokens", "characters", "source bytes", "shard bytes")

    def __init__(self, source_bytes, estimate=0):
        """source_bytes: to read in all. estimate: bytes to write in all, approximately; 0: unknown."""
        self.source_bytes, self.estimate, self.start = source_bytes, estimate, time.monotonic()
        spawn = multiprocessing.get_context("spawn")
        self.totals = spawn.Array("d", len(self.NAMES))
        self.printed = spawn.Value("d", self.start)  # when the last line was
        self.counted = Counter()  # of this process's current job, already in the totals

    def update(self, counts):
        """counts: {name: number} of this process's current job so far."""
        with self.totals.get_lock():
            for i, name in enumerate(self.NAMES):
                self.totals[i] += counts.get(name, 0) - self.counted[name]
            now = time.monotonic()
            if now - self.printed.value > REPORT_SECONDS:
                self.printed.value = now
                print(self.line(now - self.start), flush=True)
        self.counted = Counter(counts)

    def line(self, seconds):
        """Such as: 12,345 documents, 5.3 M tokens, 1.35 M tokens/s, 6.3 MB/s; 34 % of 1.2 GB read, 0:03:12 left; ..."""
        documents, tokens, characters, source, written = self.totals
        parts = [f"{documents:,.0f} documents"]
        if tokens:
            parts[0] += f", {tokens / 1e6:.1f} M tokens, {tokens / seconds / 1e6:.2f} M tokens/s"
            parts[0] += f", {characters / seconds / 1e6:.1f} MB/s"
        if source and self.source_bytes:
            left = datetime.timedelta(seconds=max(1, math.ceil(seconds * (self.source_bytes / source - 1))))
            parts.append(f"{source / self.source_bytes:.0%} of {gigabytes(self.source_bytes)} read, {left} left")
        if self.estimate:
            parts.append(f"{gigabytes(written)} of about {gigabytes(self.estimate)} written")
        return "; ".join(parts)


progress = None  # this process's; a worker inherits the shared memory when it starts


def report_progress(counts):
    """counts: {name: number} of this process's current job so far, with names of Progress.NAMES."""
    progress.update(counts)


def run_jobs(work, jobs, workers, shared_progress, check):
    """Call work(*job) for each of the jobs, in up to `workers` processes, and check(result) in this one.

    work: a function that can be pickled; it may call report_progress. With one worker it runs in this process.
    Raises: the first exception of any process or of `check`; the other workers are killed.
    """
    global progress
    if min(workers, len(jobs)) <= 1:
        progress = shared_progress
        for job in jobs:
            check(run_job(work, job))
        return
    spawn = multiprocessing.get_context("spawn")  # a forked process would inherit locks that other threads hold
    with concurrent.futures.ProcessPoolExecutor(min(workers, len(jobs)), spawn, start_worker, (shared_progress,)) as pool:
        futures = [pool.submit(run_job, work, job) for job in jobs]
        try:
            for future in concurrent.futures.as_completed(futures):
                check(future.result())
        except concurrent.futures.process.BrokenProcessPool:
            time.sleep(0.5)  # if SIGTERM was sent to all, it ends this process here
            hint = "out of memory? Try fewer --workers; the same command resumes"
            raise UserError(f"a worker process was killed ({hint})") from None
        except BaseException:
            for child in multiprocessing.active_children():
                child.terminate()
            raise


def run_job(work, job):
    progress.counted = Counter()
    return work(*job)


def start_worker(shared_progress):
    global progress
    progress = shared_progress
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent ends the workers
    threading.Thread(target=exit_with_parent, daemon=True).start()


def exit_with_parent():
    """A parent that was killed can't end its workers."""
    multiprocessing.parent_process().join()
    os._exit(1)
