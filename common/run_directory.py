"""The directory that a run writes, locked so that only one run does: config.json, tokenizer.json and log.jsonl."""

import errno
import json
import os
import re
import shutil
import sys
import threading

from common.files import gigabytes, lock_directory, read_json, write_text
from common.options import UserError, say


class RunDirectory:
    """out_dir. writes: whether this is the process that writes there; in the others every method is a no-op.

    on_save_error: "stop", or "continue" without a checkpoint or log line that could not be written.
    Raises: UserError, also when another live run holds the directory.
    """

    def __init__(self, path, on_save_error="stop", writes=True):
        self.path, self.on_save_error, self.writes, self.log_file = path, on_save_error, writes, None
        self.log_lock = threading.Lock()
        self.texts = {}  # {file name: contents} of config.json and tokenizer.json
        self.made = writes and not os.path.exists(path)
        self.lock = lock_directory(path) if writes else None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.lock is not None:
            os.close(self.lock)
        if self.log_file:
            self.log_file.close()
        if self.made and os.path.isdir(self.path) and not os.listdir(self.path):  # a mistake ended the run before it began
            os.rmdir(self.path)

    def begin(self, step, config, tokenizer_text):
        """Write config.json and tokenizer.json, and open the log without the lines of steps that a crash lost."""
        if not self.writes:
            return
        for name in os.listdir(self.path):
            path = os.path.join(self.path, name)  # what a killed process was writing
            if re.fullmatch(r"step_\d{8,}\.tmp", name):
                shutil.rmtree(path, ignore_errors=True)
            elif re.fullmatch(r"(tokenizer\.json|config\.json|log\.jsonl)\.\d+\.tmp", name):
                os.remove(path)
        self.write_config(config)
        self.write("tokenizer.json", tokenizer_text)
        log_path = os.path.join(self.path, "log.jsonl")
        write_text(log_path, "".join(line for line, record in read_log(self.path) if record.get("step", 0) <= step))
        self.log_file = open(log_path, "ab", buffering=0)

    def write_config(self, config):
        self.write("config.json", json.dumps(config, indent=1))

    def write(self, name, text):
        """Write a file that every checkpoint will hold too."""
        if self.writes:
            self.texts[name] = text
            write_text(os.path.join(self.path, name), text)

    def log(self, event, **values):
        """Append one JSON object to log.jsonl. Raises: UserError."""
        if not self.writes:
            return
        line = (json.dumps({"event": event, **values}) + "\n").encode()
        with self.log_lock:  # the thread that writes checkpoints logs too
            end = os.fstat(self.log_file.fileno()).st_size
            try:
                if not os.path.exists(self.log_file.name):
                    raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
                if self.log_file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return
            except OSError as error:
                self.log_file.truncate(end)  # no half line
                hint = f"{gigabytes(len(line), 2)} needed; checkpoints are intact"
                fault = f"{self.log_file.name}: {error.strerror} ({hint})"
        self.failed(fault)

    def sync_log(self):
        """Wait until the log is on disk."""
        os.fsync(self.log_file.fileno())

    def failed(self, fault):
        """Report what could not be written. Raises: UserError, unless the run is to continue without it."""
        if self.on_save_error == "stop":
            raise UserError(fault)
        say(f"warning: {fault}: continuing without", sys.stderr)


def read_log(out_dir):
    """Yield (line, record) for each whole line of log.jsonl."""
    path = os.path.join(out_dir, "log.jsonl")
    if os.path.exists(path):
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    record = json.loads(line)
                except ValueError:  # half a line, from a full disk
                    continue
                if isinstance(record, dict) and line.endswith("\n"):
                    yield line, record


def was_evaluated(out_dir, step):
    """Whether the log has this step's evaluation."""
    return any(record.get("event") == "eval" and record.get("step") == step for _, record in read_log(out_dir))


def pretraining_cost(path):
    """Steps, seconds, hours of all processes and dollars behind a checkpoint of train.py; None for weights from elsewhere."""
    starts = [record for _, record in read_log(os.path.dirname(path)) if record.get("event") == "start"]
    if not starts or not os.path.exists(os.path.join(path, "state.json")):
        return None
    state, start = read_json(os.path.join(path, "state.json"), "not a checkpoint of train.py"), starts[-1]
    gpu_hours = state.get("gpu_seconds", state["seconds"] * start["world_size"]) / 3600
    price = start["config"]["price_per_gpu_hour"]
    budget = {name: start["config"].get(name, 0) for name in ("budget_minutes", "budget_dollars")}
    dollars = gpu_hours * price if price else None
    return {**state, "gpu_hours": gpu_hours, "dollars": dollars, **budget, "device": start["device"]}


def hours_of(device):
    """What the log's gpu_hours are, by the name of the device: "GPU-hours", or "CPU-hours" of processes that had no GPU."""
    return "CPU-hours" if re.match("x86|i.86|amd64|intel|arm|aarch|ppc|riscv", device or "", re.I) else "GPU-hours"
