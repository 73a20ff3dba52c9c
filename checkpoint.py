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
the step, the order of the data likewise. It is copied while training waits, and written while training goes on.

Read next: train.py
"""

import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file

from config import UserError
from data import file_digest, gigabytes, read_json, write_text

DIGESTS = "digests.json"
# In config.json. 1: no number there, and no count of skipped updates in state.json; read as none. 2: with both.
FORMAT = 2

# A run may be resumed with other values of these: they do not change its result. data_dir is compared by the digest of
# its shards, max_steps by what the schedule says.
FREE_FIELDS = {
    "data_dir", "out_dir", "max_steps", "micro_batch_tokens", "eval_interval", "log_interval", "checkpoint_interval",
    "keep_checkpoints", "price_per_gpu_hour", "device", "kernels", "compile", "profile", "eval_only", "dry_run",
    "on_save_error", "hang_timeout", "format",
}  # fmt: skip


class RunDirectory:
    """out_dir, for the one process that writes there, held against a second live run.

    on_save_error: "stop", or "continue" without the checkpoint or log line that could not be written.
    Raises: UserError.
    """

    def __init__(self, path, on_save_error="stop"):
        self.path, self.on_save_error, self.log_file, self.newest = path, on_save_error, None, None
        self.log_lock = threading.Lock()
        self.writer, self.saving = ThreadPoolExecutor(1, "checkpoint"), None
        try:
            os.makedirs(path, exist_ok=True)
            self.lock = os.open(path, os.O_RDONLY)
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go when the process ends
        except BlockingIOError:
            raise UserError(f"{path}: in use by a live run (choose another directory)") from None
        except OSError as error:
            raise UserError(f"{path}: {error.strerror} (choose another directory)") from None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """Let go of the directory, once the checkpoint that is being written is on disk."""
        self.writer.shutdown()
        os.close(self.lock)
        if self.log_file:
            self.log_file.close()

    def adopt(self, config, defaults, differing_schedule, tokenizer_text):
        """Find the newest checkpoint, and refuse if it is that of a run with another result.

        config: what config.json is to hold; a max_steps of None is filled in, if it is known. defaults: of options, for a
        run from before there was one.
        differing_schedule(earlier max_steps, step): whether max_steps matters.
        """
        self.config, self.tokenizer_text = config, tokenizer_text
        self.newest = newest(self.path)
        if not self.newest and steps(self.path):
            hint = "restore one, or remove them all to begin anew"
            raise UserError(f"{self.path}: no undamaged checkpoint is left of {len(steps(self.path))} ({hint})")
        if not self.newest and not os.path.exists(os.path.join(self.path, "config.json")):
            return
        earlier = {**defaults, **read_config(self.newest or self.path)}  # a checkpoint's is covered by its digests
        if "train_data" not in earlier:
            hint = f"train on from it with --init_from={self.path} and another --out_dir"
            raise UserError(f"{self.path}: holds a converted or fine-tuned model ({hint})")
        names = [name for name in config if name not in FREE_FIELDS and earlier.get(name) != config[name]]
        if config["max_steps"] is None:
            config["max_steps"] = earlier["max_steps"]  # chosen when the run began, and kept
        elif self.newest and differing_schedule(earlier["max_steps"], step_of(self.newest)):
            names.append("max_steps")  # and the schedule has begun to decay
        if names:
            differing = ", ".join(f"{name} was {short(earlier.get(name))} and is {short(config[name])}" for name in names)
            raise UserError(f"{self.path}: holds a run that differs: {differing} (choose another --out_dir)")

    def check_space(self, num_params, keep):
        """Raises: UserError when the disk cannot hold `keep` checkpoints and the next one."""
        needed = 12 * num_params * max(1, keep + 1 - len(steps(self.path)))  # bytes: weights and two moments, fp32
        free = shutil.disk_usage(self.path).free
        if free < needed:
            hint = "free some, choose another --out_dir, or lower --keep_checkpoints"
            text = f"{gigabytes(free, 2)} free, but checkpoints will take {gigabytes(needed, 2)} more"
            raise UserError(f"{self.path}: {text} ({hint})")

    def trial_save(self, model):
        """Seconds that a checkpoint will take to write, from a trial with a third of it: the weights without moments."""
        path = os.path.join(self.path, "trial")
        start = time.perf_counter()
        save(path, 0, {"model.safetensors": weights_of(model)}, {})
        seconds = time.perf_counter() - start
        shutil.rmtree(path)
        return 3 * seconds

    def read_log(self):
        """(line, record) of each whole line of log.jsonl."""
        path = os.path.join(self.path, "log.jsonl")
        if os.path.exists(path):
            with open(path, encoding="utf-8", errors="replace") as file:
                for line in file:
                    try:
                        record = json.loads(line)
                    except ValueError:  # half a line, of a full disk
                        continue
                    if isinstance(record, dict) and line.endswith("\n"):
                        yield line, record

    def evaluated(self, step):
        """Whether the log has this step's evaluation."""
        return any(record.get("event") == "eval" and record.get("step") == step for _, record in self.read_log())

    def begin(self, step):
        """Write the configuration, and open the log without the lines of steps that were lost with their process."""
        for name in os.listdir(self.path):
            path = os.path.join(self.path, name)  # of what was being written then
            if re.fullmatch(r"step_\d{8,}\.tmp", name):
                shutil.rmtree(path, ignore_errors=True)
            elif re.fullmatch(r"(tokenizer\.json|config\.json|log\.jsonl)\.\d+\.tmp", name):
                os.remove(path)
        write_text(os.path.join(self.path, "tokenizer.json"), self.tokenizer_text)
        write_text(os.path.join(self.path, "config.json"), json.dumps(self.config, indent=1))
        log_path = os.path.join(self.path, "log.jsonl")
        write_text(log_path, "".join(line for line, record in self.read_log() if record.get("step", 0) <= step))
        self.log_file = open(log_path, "ab", buffering=0)

    def log(self, event, **values):
        """Append one JSON object to log.jsonl. Raises: UserError, also when the last checkpoint was not written."""
        if (saving := self.saving) and saving.done():
            self.wait()
        line = (json.dumps({"event": event, **values}) + "\n").encode()
        with self.log_lock:  # the thread that writes checkpoints logs too
            end = os.path.getsize(self.log_file.name)
            try:
                if self.log_file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return
            except OSError as error:
                os.truncate(self.log_file.name, end)  # no half line
                hint = f"{gigabytes(len(line), 2)} needed; checkpoints are intact"
                fault = f"{self.log_file.name}: {error.strerror} ({hint})"
        self.failed(fault)

    def failed(self, fault):
        if self.on_save_error == "stop":
            raise UserError(fault)
        print(f"warning: {fault}: going on without", file=sys.stderr, flush=True)

    def save(self, state, model, optimizer, keep):
        """Copy a checkpoint, and have it written, and all but the newest `keep` removed, while training goes on.

        Raises: UserError when the one before could not be written.
        """
        self.wait()
        moments = optimizer.state_dict()["state"]
        names = [name for name, _ in model.named_parameters()]
        optimizer_tensors = {
            f"{moment}.{name}": moments[i][moment]
            for i, name in enumerate(names)
            for moment in ("exp_avg", "exp_avg_sq")
        }
        tensors = {"model.safetensors": weights_of(model), "optimizer.safetensors": optimizer_tensors}
        texts = {
            "state.json": json.dumps(state, indent=1),
            "config.json": json.dumps(self.config, indent=1),
            "tokenizer.json": self.tokenizer_text,
        }
        self.saving = self.writer.submit(self._write, state["step"], *snapshot(tensors), texts, keep)

    def _write(self, step, tensors, copied, texts, keep):
        start = time.perf_counter()
        try:
            os.fsync(self.log_file.fileno())
            with copied:
                contents = pack(tensors, texts)
            tensors.clear()  # room on the device again; the executor still holds the dictionary itself
            self.newest = write(self.path, step, contents)
        except (UserError, OSError) as error:  # OSError: of the log's fsync, where quotas and network disks fail
            return self.failed(error)
        remove_old(self.path, step, keep)
        self.log("checkpoint", step=step, path=self.newest, seconds=round(time.perf_counter() - start, 3))
        print(f"saved {self.newest}", flush=True)

    def wait(self):
        """Until the last checkpoint is on disk. Raises: UserError when it could not be written."""
        saving, self.saving = self.saving, None
        if saving:
            saving.result()


def restore(path, state, model, optimizer, process):
    """Bring a checkpoint's weights, moments and counters to every process. Rank 0 reads; the others need no disk."""
    parameters = dict(model.named_parameters())
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in parameters.items()}
    if process.rank == 0:
        load_weights(model, read_tensors(path, "model.safetensors"), path)
        saved = read_tensors(path, "optimizer.safetensors")
        expected = {f"exp_avg{part}.{name}": moments[name][i] for name in moments for i, part in enumerate(("", "_sq"))}
        if {name: t.shape for name, t in saved.items()} != {name: t.shape for name, t in expected.items()}:
            raise UserError(f"{path}/optimizer.safetensors: does not fit the model (take an earlier checkpoint)")
        for name, tensor in expected.items():
            tensor.copy_(saved[name])
        state.update(read_json(os.path.join(path, "state.json"), "not a checkpoint of train.py"))
    if process.world_size > 1:
        counters = [state]
        dist.broadcast_object_list(counters, device=process.device)
        state.update(counters[0])
        for name, parameter in parameters.items():
            for tensor in (parameter.detach(), *moments[name]):
                dist.broadcast(tensor, src=0)
    step = torch.tensor(float(state["step"] - state["skipped"]))  # AdamW does not count a skipped update
    per_parameter = [{"step": step.clone(), "exp_avg": mean, "exp_avg_sq": square} for mean, square in moments.values()]
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": dict(enumerate(per_parameter)), "param_groups": groups})


def compare_parameters(model, process, step):
    """Have all processes stop if their parameters are not the same bits. Raises: UserError naming who differs."""
    # A sum of the bits as integers finds any single change; below 2^48 it passes through a float64 unharmed.
    bits = [parameter.detach().view(torch.int32).sum(dtype=torch.int64) for parameter in model.parameters()]
    sums = [row[0] for row in process.gather([torch.stack(bits).sum() % 2**48])]
    most = max(sums, key=sums.count)
    differing = [str(rank) for rank, value in enumerate(sums) if value != most]
    if differing:
        who = f"rank {differing[0]}" if len(differing) == 1 else f"ranks {', '.join(differing)}"
        hint = "a faulty GPU or memory? The same command goes on from the newest checkpoint"
        raise UserError(f"step {step}: the parameters of {who} differ from those of the other processes ({hint})")


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


def snapshot(tensors):
    """(copies, context): copies of {file name: {name: tensor}}, to be read inside the context by another thread.

    On a GPU the copies stay there, 12 bytes a parameter, for which choosing the micro-batch leaves room, and the context
    is a stream of its own, so that the GPU does not wait for the way to the CPU.
    Where memory is short after all, they go to the CPU at once, which on an H100 held base up for some seconds.
    """
    device = next(iter(next(iter(tensors.values())).values())).device
    try:
        copies = {file: {name: tensor.clone() for name, tensor in part.items()} for file, part in tensors.items()}
    except torch.OutOfMemoryError:
        return {file: {name: tensor.cpu() for name, tensor in part.items()} for file, part in tensors.items()}, nullcontext()
    if device.type != "cuda":
        return copies, nullcontext()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return copies, torch.cuda.stream(stream)


def pack(tensors, texts):
    """{file name: its bytes} of a checkpoint. tensors: {file name: {name: tensor}}. texts: {file name: str}."""
    packed = {name: safetensors_bytes(contents) for name, contents in tensors.items()}
    return {**packed, **{name: text.encode() for name, text in texts.items()}}


def safetensors_bytes(tensors):
    """The safetensors file of {name: float32 tensor}, as a uint8 array with the very bytes of the library's `save`.

    The library holds Python's lock for as long as it copies, and so would stop the training that goes on meanwhile.
    """
    header, end = {}, 0
    for name, tensor in sorted(tensors.items()):
        if tensor.dtype != torch.float32:
            raise ValueError(f"{name}: a checkpoint holds float32, not {tensor.dtype}")
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    packed = np.empty(8 + len(text) + end, np.uint8)
    packed[: 8 + len(text)] = np.frombuffer(len(text).to_bytes(8, "little") + text, np.uint8)
    values = packed[8 + len(text) :].view(np.float32)
    for name, tensor in tensors.items():
        start, stop = (offset // 4 for offset in header[name]["data_offsets"])
        # NumPy's copy: PyTorch's would start a pool of threads for this thread, and with two pools on a CPU the one that
        # trains sleeps after each operator instead of waiting awake, for good: a small model's steps took up to 40 % longer.
        # And cpu(): numpy(force=True) holds Python's lock while it waits for the GPU.
        values[start:stop] = tensor.detach().cpu().numpy().reshape(-1)
    return packed


def save(out_dir, step, tensors, texts):
    """Write a checkpoint of what `pack` takes, and return its path. Raises: UserError when it cannot be written."""
    return write(out_dir, step, pack(tensors, texts))


def write(out_dir, step, contents):
    """Write a checkpoint and return its path. contents: {file name: its bytes}.

    The directory gets its name when every byte is on disk, so a kill or a full disk leaves no checkpoint rather than
    half of one. Then it is read again, and must have the digests of what was to be written.
    Raises: UserError when it cannot be written.
    """
    path = os.path.join(out_dir, f"step_{step:08d}")
    partial = f"{path}.tmp"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        os.makedirs(partial)
        entries = {name: digest_entry(len(data), hashlib.sha256(data).hexdigest()) for name, data in contents.items()}
        for name, data in {**contents, DIGESTS: digests_text(entries).encode()}.items():
            write_file(os.path.join(partial, name), data)
        sync(partial)
        shutil.rmtree(path, ignore_errors=True)  # a damaged one of this step, or it would not be written again
        os.rename(partial, path)
        sync(out_dir)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        needed, free = sum(map(len, contents.values())), shutil.disk_usage(out_dir).free
        hint = f"{gigabytes(needed, 2)} needed, {gigabytes(free, 2)} free; earlier ones are intact"
        raise UserError(f"{path}: checkpoint not saved: {error.strerror} ({hint})") from None
    if fault := damage(path):
        raise UserError(f"{fault}, though just written (is the disk sound? Earlier checkpoints are intact)")
    return path


def steps(out_dir):
    """The numbers of the checkpoints in a run directory, newest first, damaged or not."""
    names = os.listdir(out_dir) if os.path.isdir(out_dir) else []
    return sorted((int(name[5:]) for name in names if re.fullmatch(r"step_\d{8,}", name)), reverse=True)


def step_of(path):
    """The step a checkpoint directory was written after."""
    return int(os.path.basename(path)[len("step_") :])


def remove_old(out_dir, step, keep):
    """Remove all but the newest `keep` checkpoints up to `step`, and any later, which must be damaged."""
    numbers = steps(out_dir)
    for number in [n for n in numbers if n > step] + [n for n in numbers if n <= step][keep:]:
        shutil.rmtree(os.path.join(out_dir, f"step_{number:08d}"), ignore_errors=True)


def newest(out_dir):
    """The path of the newest undamaged checkpoint of a run, or None; each damaged one is named on stderr."""
    for step in steps(out_dir):
        path = os.path.join(out_dir, f"step_{step:08d}")
        if fault := damage(path):
            print(f"warning: {fault}: checkpoint passed over", file=sys.stderr, flush=True)
        else:
            return readable(path)
    return None


def find(path):
    """The checkpoint meant by `path`, a checkpoint directory or a run directory. Raises: UserError."""
    if os.path.exists(os.path.join(path, DIGESTS)):
        if fault := damage(path):
            raise UserError(f"{fault} (take an earlier checkpoint)")
        return readable(path)
    found = newest(path)
    if found is None:
        raise UserError(f"{path}: no undamaged checkpoint here (expected a run directory or a step_* directory)")
    return found


def readable(path):
    """`path`, an undamaged checkpoint. Raises: UserError when a newer version of this code wrote it."""
    found = read_config(path).get("format", 1)
    if found not in range(1, FORMAT + 1):
        raise UserError(f"{path}: checkpoint format {found!r}, and this code reads 1 to {FORMAT} (use newer code)")
    return path


def damage(path):
    """What is wrong with a checkpoint directory, as text naming the file, or None."""
    try:
        with open(os.path.join(path, DIGESTS), encoding="utf-8") as file:
            stored = file.read()
        files = {name: os.path.join(path, name) for name in os.listdir(path) if name != DIGESTS}
        if strange := [file for file in files.values() if not os.path.isfile(file)]:
            return f"{strange[0]}: not a file"
        actual = {name: digest_entry(os.path.getsize(file), file_digest(file)) for name, file in files.items()}
        if stored == digests_text(actual):
            return None
        stored = json.loads(stored)
        for name in sorted(actual.keys() | stored.keys()):
            if actual.get(name) != stored.get(name):
                return f"{os.path.join(path, name)}: {'damaged' if name in actual else 'missing'}"
    except (OSError, ValueError, AttributeError, RecursionError):
        pass
    return f"{os.path.join(path, DIGESTS)}: damaged or missing"


def short(value):
    """An option's value as text; of a sha256 the first twelve digits."""
    return value[:12] if re.fullmatch("[0-9a-f]{64}", str(value)) else repr(value)


def digest_entry(num_bytes, sha256):
    return {"bytes": num_bytes, "sha256": sha256}


def digests_text(entries):
    """The text that digests.json must have for these {file name: digest_entry}."""
    return json.dumps(dict(sorted(entries.items())), indent=1)


def read_config(path):
    """A run's or checkpoint's config.json, a dictionary. Raises: UserError."""
    file = os.path.join(path, "config.json")
    config = read_json(file, "not a checkpoint of this project")
    if not isinstance(config, dict) or "vocab_size" not in config:
        raise UserError(f"{file}: not a configuration of this project")
    return config


def read_tensors(path, name):
    """{name: tensor} on the CPU. Raises: UserError."""
    try:
        return load_file(os.path.join(path, name))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{os.path.join(path, name)}: {error} (not a checkpoint of this project)") from None


def write_file(path, data):
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync(path):
    """Have the operating system put a directory on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
