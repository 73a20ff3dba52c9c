"""Runs of one or more processes for the tests, without the seconds of a torchrun start.

Processes are forked from a server that has already imported train, so one starts in tens of milliseconds. A fault is a
function from faults.py that a rank calls before it starts training.
"""

import contextlib
import faulthandler
import functools
import importlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path

import torch

from tests.toy import ROOT


@functools.cache
def context():
    os.environ["PYTHONPATH"] = str(ROOT)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults", "tests.ranks", "torch._dynamo"])  # faults imports train
    return context


def rank_main(argv, rank, world_size, port, output, fault, script, gpus):
    """One rank: `script`.main(argv) in the environment that torchrun would set, with its output in a file."""
    sys.stdout = sys.stderr = open(output, "w", buffering=1)
    os.dup2(sys.stdout.fileno(), 1)
    os.dup2(sys.stdout.fileno(), 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), OMP_NUM_THREADS="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), CUDA_VISIBLE_DEVICES=gpus)
    faulthandler.enable()
    torch.set_num_threads(1)
    if fault:
        fault()
    importlib.import_module(script).main(argv)


class Ranks:
    """A run of `world_size` processes, started. faults: {rank: function to call before training}. gpus: which they see."""

    def __init__(self, argv, world_size, directory, faults=None, script="train", gpus=""):
        Path(directory).mkdir(parents=True, exist_ok=True)
        with contextlib.closing(socket.socket()) as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.outputs = [Path(directory) / f"rank{rank}.txt" for rank in range(world_size)]
        for output in self.outputs:
            output.write_text("")
        self.processes = [
            context().Process(
                target=rank_main,
                args=(argv, rank, world_size, port, output, (faults or {}).get(rank), script, gpus),
                daemon=True,
            )
            for rank, output in enumerate(self.outputs)
        ]
        for process in self.processes:
            process.start()

    def wait(self, timeout=120):
        """Every rank's exit status. A rank still alive after `timeout` seconds gets SIGABRT (-6) and dumps its stacks."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0, end - time.monotonic()))
            if process.is_alive():
                os.kill(process.pid, signal.SIGABRT)
                process.join()
        return [process.exitcode for process in self.processes]

    def alive(self):
        return any(process.is_alive() for process in self.processes)

    def signal(self, number, ranks=None):
        """Send a signal to these ranks, by default all."""
        for rank in range(len(self.processes)) if ranks is None else ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.processes[rank].pid, number)

    def output(self):
        """Everything printed so far, rank by rank."""
        return "".join(path.read_text() for path in self.outputs if path.exists())


def run_ranks(argv, world_size, directory, faults=None, timeout=120):
    """Run to the end: (every rank's exit status, everything printed)."""
    ranks = Ranks(argv, world_size, directory, faults)
    return ranks.wait(timeout), ranks.output()


def descendants(pid):
    """The pids of a live process's children, their children, and so on."""
    found = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            found += map(int, Path(f"/proc/{pid}/task/{thread}/children").read_text().split())
    return found + [pid for child in found for pid in descendants(child)]
