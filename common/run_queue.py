"""A queue of runs that any number of processes work on, on one host or on several with a shared file system.

DIRECTORY/NAME.jsonl is a run's log, its lock and its result: a process locks the log of a free run, does the run, and the
log's last record, with the event "end", is the result. A killed run starts over; a finished one is not repeated.

A run has a `name`; its `identity`, a dictionary of everything that changes its result; its `cost`, in any unit; `after`, the
name of a run that has to finish first, or ""; and `artifact`, a path that it leaves besides its log, or "".
"""

import fcntl
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time

import torch

from common.options import UserError, stoppable

OUT_OF_MEMORY = 3  # exit status of a job that ran out of GPU memory


def log_path(directory, run):
    return os.path.join(directory, f"{run.name}.jsonl")


def result(directory, run):
    """The last record of a finished run, or None. Raises: UserError if its identity was different."""
    try:
        with open(log_path(directory, run), encoding="utf-8") as file:
            records = [json.loads(line) for line in file]
    except (OSError, ValueError):  # missing, or ends in half a line: in progress, or killed
        return None
    if not records or records[-1]["event"] != "end":
        return None
    earlier = records[0]["identity"]
    names = [name for name in earlier | run.identity if earlier.get(name) != run.identity.get(name)]
    if names:
        raise UserError(f"{log_path(directory, run)}: holds a run with different {', '.join(names)} (choose another --out)")
    if run.artifact and not os.path.exists(run.artifact):  # nobody asked for it then, or it has been removed
        return None
    return records[-1]


def claim(path):
    """A run's log, opened and locked, or None if a live process holds it. The lock ends with the process."""
    file = open(path, "a", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file
    except BlockingIOError:
        file.close()
        return None


def work(directory, runs, make_worker):
    """Do free runs, the first ones first, until all are finished, here or in other processes.

    make_worker(): an object whose run(run, log, say) does a run and returns a line about it; log: the opened file;
    say(text): prints progress.
    """
    started, worker = time.time(), None
    finished_before = {run.name for run in runs if result(directory, run)}

    def say(text):
        finished = [run for run in runs if result(directory, run)]
        fresh = sum(run.cost for run in finished if run.name not in finished_before)
        left = sum(run.cost for run in runs) - sum(run.cost for run in finished)
        eta = f", about {(time.time() - started) * left / fresh / 60:.1f} min left" if fresh and left else ""
        print(f"{text} | {len(finished)} of {len(runs)} runs{eta}", flush=True)

    while waiting := [run for run in runs if not result(directory, run)]:
        names, log = [run.name for run in waiting], None
        for run in waiting:
            if run.after not in names and (log := claim(log_path(directory, run))):
                break
        if log is None:
            time.sleep(0.5)
            continue
        with log:
            if result(directory, run):  # finished just before the claim
                continue
            log.truncate(0)
            try:
                worker = worker or make_worker()
                text = worker.run(run, log, say)
            except UserError as error:
                error.this_rank_only |= worker is not None  # the other ranks do other runs
                raise
            except torch.AcceleratorError as error:
                if "out of memory" in str(error):  # of memory that is not PyTorch's own, such as a kernel's
                    raise torch.OutOfMemoryError(str(error)) from None
                if not any(text in str(error) for text in ("illegal memory access", "previous error during capture")):
                    raise
                hint = "with MPS a killed process does that to others: restart nvidia-cuda-mps-control; the same command goes on"
                raise UserError(f"{run.name}: {str(error).splitlines()[0]} ({hint})", True) from None
        say(text)


def job(directory, runs, make_worker, jobs, errors):
    """`work` in one of several processes; what stops it goes to the parent."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()  # don't outlive a killed parent
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))
    try:
        work(directory, runs, make_worker)
    except torch.OutOfMemoryError:
        raise SystemExit(OUT_OF_MEMORY) from None
    except (UserError, OSError) as error:
        errors.put(error)
        raise SystemExit(2) from None


def finish(directory, runs, make_worker, jobs):
    """`work`, in as many processes as `jobs`. The first one that fails ends them all, unless it is for want of GPU memory:
    then the others go on, and do its runs too.

    Raises: its UserError or OSError; SystemExit if it printed a traceback; after Ctrl-C, KeyboardInterrupt with what is kept,
    and after SIGTERM, Terminated.
    """

    def kept():
        finished = sum(bool(result(directory, run)) for run in runs)
        return f"{finished} of {len(runs)} runs finished and kept; the others start again with the same command"

    os.makedirs(directory, exist_ok=True)
    with stoppable(kept):
        if jobs > 1:
            return work_in_processes(directory, runs, make_worker, jobs)
        try:
            return work(directory, runs, make_worker)
        except torch.OutOfMemoryError:
            raise out_of_memory() from None


def out_of_memory():
    return UserError("out of GPU memory (lower --batch_size or --max_length, or end what else uses the GPU)", True)


def work_in_processes(directory, runs, make_worker, jobs):
    context = multiprocessing.get_context("spawn")
    errors = context.SimpleQueue()
    processes = [context.Process(target=job, args=(directory, runs, make_worker, jobs, errors)) for _ in range(jobs)]
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which they inherit: Ctrl-C is for this process, in one line
    for process in processes:
        process.start()
    signal.signal(signal.SIGINT, handler)
    alive = list(processes)
    try:
        while alive:
            multiprocessing.connection.wait([process.sentinel for process in alive])
            for process in [process for process in alive if process.exitcode is not None]:
                process.join()
                alive.remove(process)
                if process.exitcode == OUT_OF_MEMORY:
                    print(f"out of GPU memory with {len(alive) + 1} jobs: one ends, and leaves its run to the others", flush=True)
                elif process.exitcode:
                    raise failure(process.exitcode, errors)
    finally:
        for process in processes:
            process.kill()
            process.join()
    if not all(result(directory, run) for run in runs):  # the last one had no memory, either
        raise out_of_memory()


def failure(status, errors):
    """The exception for a job that ended with this status."""
    if status == -signal.SIGTERM:  # sent to all, and it ended first
        signal.raise_signal(signal.SIGTERM)
    if status < 0 and errors.empty():  # a lost GPU may end a process that way, after it has said so
        return UserError(f"a process was killed by {signal.Signals(-status).name} (out of memory? try a lower --jobs)", True)
    return SystemExit(status) if errors.empty() else errors.get()
