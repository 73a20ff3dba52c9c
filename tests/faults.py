"""Faults for ranks.py: each function, called in a rank before it starts, makes something go wrong later."""

import builtins
import ctypes
import dataclasses
import functools
import hashlib
import os
import resource
import shutil
import signal
import threading
import time
from pathlib import Path

import torch

import checkpoint
import train
from common import files, processes, watch


def together(*faults):
    for fault in faults:
        fault()


def at_steps(steps, act):
    """Have act(step, model) done in the forward passes of these steps; its result multiplies the loss."""
    now = [0]
    forward_backward, forward = train.forward_backward, train.MaskedLM.forward

    def noting(model, batches, num_masked, cfg, process, step):
        now[0] = step
        return forward_backward(model, batches, num_masked, cfg, process, step)

    def faulty(self, batch):
        factor = act(now[0], self) if now[0] in steps else None
        return forward(self, batch) * (1 if factor is None else factor)

    train.forward_backward, train.MaskedLM.forward = noting, faulty


def nan_at(steps, value=float("nan")):
    at_steps(steps, lambda step, model: value)


def hang_at(step):
    at_steps([step], lambda step, model: time.sleep(3600))


def freeze_at(step, notice_after):
    """Keep Python's lock for an hour; in the watch, notice after so many seconds beyond the hang_timeout."""
    watch.STANDSTILL_SECONDS = notice_after
    at_steps([step], lambda step, model: ctypes.PyDLL(None).sleep(3600))


def die_at(step):
    at_steps([step], lambda step, model: os.kill(os.getpid(), signal.SIGKILL))


def stop_at(step):
    """A signal comes in this step."""
    def act(step, model):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)  # until it is heard

    at_steps([step], act)


def raise_at(step, error):
    def act(step, model):
        raise error

    at_steps([step], act)


def small_buckets(megabytes):
    """All-reduce gradients in buckets of this size."""
    train.BUCKET_MB = megabytes


def another_option(**options):
    """Have this rank started with other options."""
    load_config = train.load_config
    train.load_config = lambda cls, argv: dataclasses.replace(load_config(cls, argv), **options)


def one_ulp_at(step):
    """Change the last bit of one parameter."""

    def change(step, model):
        with torch.no_grad():
            next(model.parameters()).view(torch.int32)[3, 1] ^= 1

    at_steps([step], change)


def slow_start(seconds):
    """Wait before the processes look for each other."""
    join = processes.join

    def slow(*arguments):
        print("starting slowly", flush=True)
        time.sleep(seconds)
        return join(*arguments)

    processes.join = slow


def slow_watch(seconds):
    """Look at the other processes this rarely."""
    watch.TICK = seconds


def slow_evaluation(seconds):
    """Make each evaluation batch take so long."""
    forward = train.MaskedLM.masked_logits

    def slow(self, batch):
        time.sleep(seconds)
        return forward(self, batch)

    train.MaskedLM.masked_logits = slow


def slow_write(seconds):
    """Make writing a checkpoint take so much longer."""
    write = checkpoint.write

    def slow(*contents):
        time.sleep(seconds)
        return write(*contents)

    checkpoint.write = slow


def note_weights(directory):
    """Write the sha256 of this rank's weights at each checkpoint: STEP.RANK."""
    compare = checkpoint.compare_parameters

    def noting(model, process, step):
        digest = hashlib.sha256()
        for parameter in model.parameters():
            digest.update(parameter.detach().numpy())
        Path(directory, f"{step}.{process.rank}").write_text(digest.hexdigest())
        compare(model, process, step)

    checkpoint.compare_parameters = noting


def small_files(num_bytes):
    """No file may grow beyond this, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


class HalfWriting:
    """A file whose write comes in two halves, with a point after each."""

    def __init__(self, file, point):
        self.file, self.point = file, point

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, data):
        name = os.path.basename(self.file.name)
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        self.point(f"half of {name}")
        self.file.write(data[len(data) // 2 :])
        self.file.flush()
        self.point(f"write of {name}")

    def __getattr__(self, name):
        return getattr(self.file, name)


def in_saves(reach):
    """Call reach(label) at every point inside a save: after each write, half write, fsync, rename and removal."""

    def point(label):
        if threading.current_thread().name.startswith("checkpoint"):
            reach(label)

    def after(function, name):
        @functools.wraps(function)
        def wrapper(target, *rest, **options):
            result = function(target, *rest, **options)
            named = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else str(rest[0] if name == "rename" else target)
            point(f"{name} of {os.path.basename(named)}")
            return result

        return wrapper

    def half_writing_open(path, mode="r", **options):
        file = builtins.open(path, mode, **options)
        return HalfWriting(file, point) if mode == "wb" else file

    files.open = half_writing_open
    os.fsync, os.rename, os.makedirs = after(os.fsync, "fsync"), after(os.rename, "rename"), after(os.makedirs, "makedirs")
    shutil.rmtree = after(shutil.rmtree, "rmtree")


def list_points(path):
    """Append every point's label to a file."""

    def note(label):
        with builtins.open(path, "a") as file:
            file.write(f"{label}\n")

    in_saves(note)


def kill_at_point(number, after_saves):
    """SIGKILL at the point of this number, counted from 0, of a save that comes after so many others."""
    seen = [0, -1]  # saves begun, points of this save

    def count(label):
        if label.startswith("rmtree") and label.endswith(".tmp"):  # a save begins
            seen[:] = [seen[0] + 1, -1]
        seen[1] += 1
        if seen == [after_saves + 1, number]:
            os.kill(os.getpid(), signal.SIGKILL)

    in_saves(count)
