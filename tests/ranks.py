"""Processes of a run for the tests, forked from a server that has imported train already: a start takes tens of
milliseconds, not seconds. A fault is a function that a rank calls before it starts training, to break something."""

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

ROOT = Path(__file__).resolve().parent.parent


@functools.cache
def context():
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "toy", "ranks", "torch._dynamo"])
    return context


def rank_main(argv, rank, world_size, port, output, fault, script):
    """One rank: `script`.main(argv) with what torchrun would put into the environment; prints go to a file."""
    sys.stdout = sys.stderr = open(output, "w", buffering=1)
    os.dup2(sys.stdout.fileno(), 1)
    os.dup2(sys.stdout.fileno(), 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), OMP_NUM_THREADS="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), CUDA_VISIBLE_DEVICES="")
    import torch

    faulthandler.enable()
    torch.set_num_threads(1)
    if fault:
        fault()
    importlib.import_module(script).main(argv)


class Ranks:
    """A started run of several processes. faults: {rank: function to call first}."""

    def __init__(self, argv, world_size, directory, faults=None, script="train"):
        Path(directory).mkdir(parents=True, exist_ok=True)
        with contextlib.closing(socket.socket()) as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.outputs = [Path(directory) / f"rank{rank}.txt" for rank in range(world_size)]
        for output in self.outputs:
            output.write_text("")
        self.processes = [
            context().Process(
                target=rank_main, args=(argv, rank, world_size, port, output, (faults or {}).get(rank), script), daemon=True
            )
            for rank, output in enumerate(self.outputs)
        ]
        for process in self.processes:
            process.start()

    def wait(self, timeout=120):
        """Exit statuses, once all have ended; -6 for a process that hung, and then shows where in its output."""
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
        for rank in range(len(self.processes)) if ranks is None else ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.processes[rank].pid, number)

    def output(self):
        return "".join(path.read_text() for path in self.outputs if path.exists())


def run_ranks(argv, world_size, directory, faults=None, timeout=120):
    """The exit statuses and the output of a run."""
    ranks = Ranks(argv, world_size, directory, faults)
    return ranks.wait(timeout), ranks.output()
