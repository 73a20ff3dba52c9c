"""Faults for ranks.py. Each function is called in a rank before training, and makes something go wrong later."""

import builtins
import ctypes
import dataclasses
import functools
import hashlib
import os
import resource
import shutil
import signal
import sys
import threading
import time
import weakref
from pathlib import Path

import torch

import checkpoint
import train
from common import files, processes, watch


def together(*faults):
    """Several faults in one rank."""
    for fault in faults:
        fault()


def unread_output():
    """Nobody reads what this rank prints, as when Ctrl-C has ended the `tee` behind it."""
    reading, writing = os.pipe()
    os.close(reading)
    for number in (1, 2):
        os.dup2(writing, number)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))


def at_steps(steps, act):
    """Call act(step, model) in the forward passes of these steps; the loss is multiplied by what it returns, if not None."""
    current_step = [0]
    forward_backward, forward = train.forward_backward, train.MaskedLM.forward

    def note_step(model, batches, num_masked, cfg, process, step, *rest):
        current_step[0] = step
        return forward_backward(model, batches, num_masked, cfg, process, step, *rest)

    def faulty(self, batch):
        factor = act(current_step[0], self) if current_step[0] in steps else None
        return forward(self, batch) * (1 if factor is None else factor)

    train.forward_backward, train.MaskedLM.forward = note_step, faulty


def nan_at(steps, value=float("nan")):
    at_steps(steps, lambda step, model: value)


def hang_at(step):
    at_steps([step], lambda step, model: time.sleep(3600))


def freeze_at(step, notice_after):
    """Hold the GIL for an hour. The watchdog's timer fires `notice_after` seconds after hang_timeout."""
    watch.STANDSTILL_SECONDS = notice_after
    at_steps([step], lambda step, model: ctypes.PyDLL(None).sleep(3600))


def die_at(step):
    at_steps([step], lambda step, model: os.kill(os.getpid(), signal.SIGKILL))


def stop_at(step):
    """Send this process SIGTERM in this step."""

    def act(step, model):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)  # until the watchdog has seen it

    at_steps([step], act)


def raise_at(step, error):
    def act(step, model):
        raise error

    at_steps([step], act)


def small_buckets(megabytes):
    """All-reduce gradients in buckets of this size."""
    train.BUCKET_MB = megabytes


def another_option(**options):
    """Start this rank with different options."""
    load_config = train.load_config
    train.load_config = lambda cls, argv: dataclasses.replace(load_config(cls, argv), **options)


def one_ulp_at(step):
    """Flip the last bit of one weight."""

    def change(step, model):
        with torch.no_grad():
            next(model.parameters()).view(torch.int32)[3, 1] ^= 1

    at_steps([step], change)


def slow_start(seconds):
    """Wait before joining the process group."""
    join = processes.join

    def slow(*arguments):
        print("starting slowly", flush=True)
        time.sleep(seconds)
        return join(*arguments)

    processes.join = slow


def slow_watch(seconds):
    """Make the watchdog check the other processes only this often."""
    watch.TICK = seconds


def same_signal_within(seconds):
    """When a repeated SIGTERM counts as the same request."""
    watch.SAME_SECONDS[signal.SIGTERM] = seconds


def slow_evaluation(seconds):
    """Delay each evaluation batch by this much."""
    forward = train.MaskedLM.masked_logits

    def slow(self, batch):
        time.sleep(seconds)
        return forward(self, batch)

    train.MaskedLM.masked_logits = slow


def slow_write(seconds):
    """Delay each checkpoint write by this much."""
    write = checkpoint.write_checkpoint

    def slow(*contents):
        time.sleep(seconds)
        return write(*contents)

    checkpoint.write_checkpoint = slow


def note_end_of_ddp():
    """As the process group ends, print whether the DistributedDataParallel model was freed before."""
    wrap, destroy, models = train.wrap, processes.dist.destroy_process_group, []

    def noting(*arguments):
        model = wrap(*arguments)
        models.append(weakref.ref(model))
        return model

    def destroying():
        print("model freed first" if models[0]() is None else "model outlives its process group", flush=True)
        destroy()

    train.wrap, processes.dist.destroy_process_group = noting, destroying


def note_weights(directory):
    """At each checkpoint, write the sha256 of this rank's weights to the file STEP.RANK."""
    compare = checkpoint.compare_parameters

    def noting(model, process, step):
        digest = hashlib.sha256()
        for parameter in model.parameters():
            digest.update(parameter.detach().numpy())
        Path(directory, f"{step}.{process.rank}").write_text(digest.hexdigest())
        compare(model, process, step)

    checkpoint.compare_parameters = noting


def small_files(num_bytes):
    """Limit the size of every file, which acts like a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


class HalfWriting:
    """A file that writes everything in two halves, and calls point(label) after each."""

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
    """Call reach(label) at every point of a save: after each half write, write, fsync, mkdir, rename and removal."""

    def point(label):
        if threading.current_thread().name.startswith("checkpoint"):
            reach(label)

    def after(function, name):
        @functools.wraps(function)
        def wrapper(target, *rest, **options):
            result = function(target, *rest, **options)
            path = str(rest[0] if name == "rename" else target)
            if isinstance(target, int):
                path = os.readlink(f"/proc/self/fd/{target}")
            point(f"{name} of {os.path.basename(path)}")
            return result

        return wrapper

    def half_writing_open(path, mode="r", **options):
        file = builtins.open(path, mode, **options)
        return HalfWriting(file, point) if mode == "wb" else file

    files.open = half_writing_open
    os.fsync, os.rename, os.makedirs = after(os.fsync, "fsync"), after(os.rename, "rename"), after(os.makedirs, "makedirs")
    shutil.rmtree = after(shutil.rmtree, "rmtree")


def list_points(path):
    """Append the label of every point to a file."""

    def note(label):
        with builtins.open(path, "a") as file:
            file.write(f"{label}\n")

    in_saves(note)


def kill_at_point(number, after_saves):
    """SIGKILL at point `number`, counted from 0, of the save that follows `after_saves` others."""
    seen = [0, -1]  # saves begun, points passed in this save

    def count(label):
        if label.startswith("rmtree") and label.endswith(".tmp"):  # the first point of a save
            seen[:] = [seen[0] + 1, -1]
        seen[1] += 1
        if seen == [after_saves + 1, number]:
            os.kill(os.getpid(), signal.SIGKILL)

    in_saves(count)
