"""Checkpoints: directories that are complete or absent, of files whose digests are checked before anything is used.

    out_dir/step_00001000/
        model.safetensors      the weights, and nothing else: equal weights give equal bytes
        optimizer.safetensors  AdamW's moments, under the weights' names
        state.json             step, and the counters of the log
        config.json            every option of the run, and the size of its vocabulary
        tokenizer.json
        digests.json           size and sha256 of each file above

There is no pickle: reading a checkpoint runs no code. There is no random state either: dropout depends on the seed and
the step, the order of the data likewise.

Read next: train.py
"""

import json
import os
import re
import shutil
import sys

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from config import UserError
from data import file_digest, read_json

DIGESTS = "digests.json"


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
