"""A run's directory: its lock, its log, and its checkpoints.

    out_dir/config.json, tokenizer.json, log.jsonl
    out_dir/step_00001000/
        model.safetensors      the weights, and nothing else: equal weights give equal bytes
        optimizer.safetensors  AdamW's moments, under the weights' names
        state.json             step, and the counters of the log
        config.json            every option of the run, and the size of its vocabulary
        tokenizer.json
        digests.json           size and sha256 of each file above

A checkpoint is complete or absent, and the digests of its files are checked before anything is used. There is no
pickle: reading a checkpoint runs no code. There is no random state either: dropout depends on the seed and
the step, the order of the data likewise.

Read next: train.py
"""

import fcntl
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from config import UserError
from data import file_digest, read_json

DIGESTS = "digests.json"

# A run may be resumed with other values of these: they do not change its result. data_dir is compared by the digest of
# its shards, max_steps by what the schedule says.
FREE_FIELDS = {
    "data_dir", "out_dir", "max_steps", "micro_batch_tokens", "eval_interval", "log_interval", "checkpoint_interval",
    "keep_checkpoints", "price_per_gpu_hour", "device", "kernels", "compile", "profile", "eval_only", "dry_run",
}  # fmt: skip


class RunDirectory:
    """out_dir, for the one process that writes there, held against a second live run. Raises: UserError."""

    def __init__(self, path):
        self.path, self.log_file, self.newest = path, None, None
        try:
            os.makedirs(path, exist_ok=True)
            self.lock = os.open(path, os.O_RDONLY)
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go when the process ends
        except BlockingIOError:
            raise UserError(f"{path}: in use by a live run (choose another --out_dir)") from None
        except OSError as error:
            raise UserError(f"{path}: {error.strerror} (choose another --out_dir)") from None

    def close(self):
        os.close(self.lock)
        if self.log_file:
            self.log_file.close()

    def adopt(self, config, differing_schedule, tokenizer_text):
        """Find the newest checkpoint, and refuse if it is that of a run with another result.

        config: what config.json is to hold. differing_schedule(earlier max_steps, step): whether max_steps matters.
        """
        self.config, self.tokenizer_text = config, tokenizer_text
        self.newest = newest(self.path)
        if not os.path.exists(os.path.join(self.path, "config.json")):
            return
        earlier = read_config(self.path)
        if "max_steps" not in earlier:
            hint = f"train on from it with --init_from={self.path} and another --out_dir"
            raise UserError(f"{self.path}: holds a converted or fine-tuned model ({hint})")
        names = [name for name in config if name not in FREE_FIELDS and earlier.get(name) != config[name]]
        if self.newest and differing_schedule(earlier.get("max_steps"), step_of(self.newest)):
            names.append("max_steps")  # and the schedule has begun to decay
        if names:
            differing = ", ".join(f"{name} was {earlier.get(name)!r} and is {config[name]!r}" for name in names)
            raise UserError(f"{self.path}: holds a run that differs: {differing} (choose another --out_dir)")

    def begin(self, step):
        """Write the configuration, and open the log without the lines of steps that were lost with their process."""
        write_text(os.path.join(self.path, "tokenizer.json"), self.tokenizer_text)
        write_text(os.path.join(self.path, "config.json"), json.dumps(self.config, indent=1))
        log_path = os.path.join(self.path, "log.jsonl")
        kept = []
        if os.path.exists(log_path):
            with open(log_path, encoding="utf-8") as file:
                kept = [line for line in file if line.endswith("\n") and json.loads(line).get("step", 0) <= step]
        write_text(f"{log_path}.tmp", "".join(kept))
        os.replace(f"{log_path}.tmp", log_path)
        self.log_file = open(log_path, "a", encoding="utf-8")

    def log(self, event, **values):
        """Append one JSON object to log.jsonl."""
        self.log_file.write(json.dumps({"event": event, **values}) + "\n")
        self.log_file.flush()

    def save(self, state, model, optimizer, keep):
        """Write a checkpoint, remove all but the newest `keep`, and return its path."""
        start = time.perf_counter()
        moments = optimizer.state_dict()["state"]
        names = [name for name, _ in model.named_parameters()]
        optimizer_tensors = {
            f"{moment}.{name}": moments[i][moment] for i, name in enumerate(names) for moment in ("exp_avg", "exp_avg_sq")
        }
        os.fsync(self.log_file.fileno())
        self.newest = save(
            self.path,
            state["step"],
            tensors={"model.safetensors": weights_of(model), "optimizer.safetensors": optimizer_tensors},
            texts={
                "state.json": json.dumps(state, indent=1),
                "config.json": json.dumps(self.config, indent=1),
                "tokenizer.json": self.tokenizer_text,
            },
        )
        remove_old(self.path, keep)
        self.log("checkpoint", step=state["step"], path=self.newest, seconds=round(time.perf_counter() - start, 3))
        return self.newest


def restore(path, state, model, optimizer, process):
    """Bring a checkpoint's weights, moments and counters to every process. Rank 0 reads; the others need no disk."""
    parameters = dict(model.named_parameters())
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in parameters.items()}
    if process.rank == 0:
        load_weights(model, read_tensors(path, "model.safetensors"), path)
        saved = read_tensors(path, "optimizer.safetensors")
        for name, (mean, square) in moments.items():
            mean.copy_(saved[f"exp_avg.{name}"])
            square.copy_(saved[f"exp_avg_sq.{name}"])
        state.update(read_json(os.path.join(path, "state.json"), "not a checkpoint of train.py"))
    if process.world_size > 1:
        counters = [state]
        dist.broadcast_object_list(counters, device=process.device)
        state.update(counters[0])
        for name, parameter in parameters.items():
            for tensor in (parameter.detach(), *moments[name]):
                dist.broadcast(tensor, src=0)
    step = torch.tensor(float(state["step"]))
    per_parameter = [{"step": step.clone(), "exp_avg": mean, "exp_avg_sq": square} for mean, square in moments.values()]
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": dict(enumerate(per_parameter)), "param_groups": groups})


def weights_of(model):
    """{name: tensor} of every parameter, tied ones once. Sorted by name, so equal weights are equal bytes in a file."""
    return {name: parameter.detach() for name, parameter in sorted(model.named_parameters())}


def load_weights(model, tensors, path):
    """Copy {name: tensor} into the model: every parameter must be there, with its shape, and nothing else.

    Second names of tied parameters may be there too. Raises: UserError naming `path` and what does not fit.
    """
    parameters = dict(model.named_parameters())
    second_names = model.state_dict().keys() - parameters.keys()
    missing = sorted(parameters.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - parameters.keys() - second_names)
    if missing or unexpected:
        wrong = f"missing {', '.join(missing[:3])}" if missing else f"unexpected {', '.join(unexpected[:3])}"
        raise UserError(f"{path}: {len(missing)} weights missing, {len(unexpected)} unexpected: {wrong}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != tensors[name].shape:
                shapes = f"{list(tensors[name].shape)}, expected {list(parameter.shape)}"
                raise UserError(f"{path}: {name} has shape {shapes}")
            parameter.copy_(tensors[name])


def versions():
    """What a run stands on: the commit of this code, and versions of what it uses."""
    here = os.path.dirname(os.path.abspath(__file__))

    def git(*arguments):
        try:
            result = subprocess.run(["git", "-C", here, *arguments], capture_output=True, text=True, check=False)
        except OSError:  # no git here
            return None
        return result.stdout.strip() if result.returncode == 0 else None

    packages = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    if "triton" in sys.modules:
        packages["triton"] = sys.modules["triton"].__version__
    changes = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": git("rev-parse", "HEAD"), "uncommitted_changes": bool(changes), "versions": packages}


def save(out_dir, step, tensors, texts):
    """Write a checkpoint and return its path.

    tensors: {file name: {name: tensor}}. texts: {file name: str}. The directory gets its name when every byte is on
    disk, so a kill or a full disk leaves no checkpoint rather than half of one.
    Raises: UserError when it cannot be written.
    """
    path = os.path.join(out_dir, f"step_{step:08d}")
    partial = f"{path}.tmp"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        os.makedirs(partial)
        for name, contents in tensors.items():
            save_file(contents, os.path.join(partial, name))
        for name, text in texts.items():
            write_text(os.path.join(partial, name), text)
        write_text(os.path.join(partial, DIGESTS), digests(partial))
        for name in [*os.listdir(partial), ""]:  # "" is the directory itself
            sync(os.path.join(partial, name))
        shutil.rmtree(path, ignore_errors=True)  # a damaged one of this step, or it would not be written again
        os.rename(partial, path)
        sync(out_dir)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"{path}: checkpoint not saved: {error} (earlier ones are intact; is the disk full?)") from None
    return path


def steps(out_dir):
    """The numbers of the checkpoints in a run directory, newest first, damaged or not."""
    names = os.listdir(out_dir) if os.path.isdir(out_dir) else []
    return sorted((int(name[5:]) for name in names if re.fullmatch(r"step_\d{8,}", name)), reverse=True)


def step_of(path):
    """The step a checkpoint directory was written after."""
    return int(os.path.basename(path)[len("step_") :])


def remove_old(out_dir, keep):
    """Remove all but the newest `keep` checkpoints."""
    for step in steps(out_dir)[keep:]:
        shutil.rmtree(os.path.join(out_dir, f"step_{step:08d}"), ignore_errors=True)


def newest(out_dir):
    """The path of the newest undamaged checkpoint of a run, or None; each damaged one is named on stderr."""
    for step in steps(out_dir):
        path = os.path.join(out_dir, f"step_{step:08d}")
        if fault := damage(path):
            print(f"warning: {fault}: checkpoint passed over", file=sys.stderr, flush=True)
        else:
            return path
    return None


def find(path):
    """The checkpoint meant by `path`, a checkpoint directory or a run directory. Raises: UserError."""
    if os.path.exists(os.path.join(path, DIGESTS)):
        if fault := damage(path):
            raise UserError(f"{fault} (take an earlier checkpoint)")
        return path
    found = newest(path)
    if found is None:
        raise UserError(f"{path}: no undamaged checkpoint here (expected a run directory or a step_* directory)")
    return found


def damage(path):
    """What is wrong with a checkpoint directory, as text naming the file, or None."""
    try:
        with open(os.path.join(path, DIGESTS), encoding="utf-8") as file:
            stored = file.read()
        if stored == digests(path):
            return None
        actual, stored = json.loads(digests(path)), json.loads(stored)
        for name in sorted(actual.keys() | stored.keys()):
            if actual.get(name) != stored.get(name):
                return f"{os.path.join(path, name)}: {'damaged' if name in actual else 'missing'}"
    except (OSError, ValueError, AttributeError):
        pass
    return f"{os.path.join(path, DIGESTS)}: damaged or missing"


def digests(path):
    """The text that digests.json must have for the files now in the directory."""
    names = sorted(name for name in os.listdir(path) if name != DIGESTS)
    files = {name: os.path.join(path, name) for name in names}
    entries = {name: {"bytes": os.path.getsize(file), "sha256": file_digest(file)} for name, file in files.items()}
    return json.dumps(entries, indent=1)


def read_config(path):
    return read_json(os.path.join(path, "config.json"), "not a checkpoint of this project")


def read_tensors(path, name):
    """{name: tensor} on the CPU. Raises: UserError."""
    try:
        return load_file(os.path.join(path, name))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{os.path.join(path, name)}: {error} (not a checkpoint of this project)") from None


def write_text(path, text):
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def sync(path):
    """Have the operating system put a file or directory on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
