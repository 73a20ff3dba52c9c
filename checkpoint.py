"""Checkpoints: what a run leaves in its directory, and loads from there.

    out_dir/config.json, tokenizer.json, log.jsonl
    out_dir/step_00001000/
        model.safetensors      the weights and nothing else: equal weights give equal bytes
        optimizer.safetensors  the optimizers' moments, under the weights' names
        state.json             step, the counters of the log, and the magnitudes that FP8's scales follow from
        config.json            every option of the run, and the size of its vocabulary
        tokenizer.json
        digests.json           size and sha256 of each file above

A checkpoint is complete or absent, and the digests of its files are checked before anything is used. There is no
pickle: reading a checkpoint runs no code. There is no random state either: dropout follows from seed, step, rank and
micro-step, the order of the data from seed and step. A checkpoint is copied while training waits, and written while it
continues.

Read next: kernels/attention.py, or common/run_directory.py, for the lock and the log, or common/watch.py, for what ends a run
early
"""

import hashlib
import json
import os
import re
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import fields

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from common.files import file_digest, gigabytes, read_json, sync, without_slash, write_file
from common.options import UserError, say, similar
from common.vocabulary import load_tokenizer
from model import LAYER_NORM_EPS, MaskedLM, ModelConfig

DIGESTS = "digests.json"
# In config.json. Format 1 lacks this key, and the counts of skipped updates in state.json; they default to 1 and 0.
# Formats 1 and 2 lack layer_norm_eps.
FORMAT = 3

# A run may be resumed with other values of these: they change no more than rounding and dropout masks. data_dir is compared
# by the digest of its shards, max_steps by what the schedule says.
FREE_FIELDS = {
    "data_dir", "out_dir", "max_steps", "micro_batch_tokens", "eval_interval", "log_interval", "checkpoint_interval",
    "keep_checkpoints", "price_per_gpu_hour", "device", "kernels", "compile", "profile", "eval_only", "dry_run",
    "on_save_error", "hang_timeout", "format", "activation_checkpointing",
}  # fmt: skip
TOKEN_TYPES = "bert.embeddings.token_type_embeddings.weight"
# Weights with a row or entry for each word of the vocabulary.
PER_WORD = ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.bias", "cls.predictions.bias")


# ---------------------------------------------------------------------------------------------------------------------
# Before a run


def check_resumable(out_dir, config, defaults, bends_schedule):
    """(path of the newest checkpoint in out_dir, config.json of its run); (None, {}) to start from nothing.

    Raises: UserError if the directory holds a run with another result. config: what config.json is to hold; None
    keeps the resumed run's value. defaults: values for options added since that run. bends_schedule(earlier max_steps,
    step): whether changing max_steps now would alter a decay that is under way.
    """
    found = newest(out_dir)
    if not found and steps(out_dir):
        hint = "restore one, or remove them all to start over"
        raise UserError(f"{out_dir}: none of its {len(steps(out_dir))} checkpoints is undamaged ({hint})")
    if not found and not os.path.exists(os.path.join(out_dir, "config.json")):
        # Token shards, fine-tuning's results, or somebody's log: a run writes its config.json first.
        for name in ("manifest.json", "tokenizer.json", "log.jsonl", "runs"):
            if os.path.exists(os.path.join(out_dir, name)):
                raise UserError(f"{out_dir}: holds {name} of something else than a run (choose another --out_dir)")
        return None, {}
    earlier = {**defaults, **read_config(found or out_dir)}  # a checkpoint's is covered by its digests
    if "train_data" not in earlier:
        hint = f"train from it with --init_from={out_dir} and another --out_dir"
        raise UserError(f"{out_dir}: holds a converted or fine-tuned model ({hint})")
    if found and earlier["max_steps"] is None:  # saved before a budget's plan, which may have been made since
        earlier["max_steps"] = read_config(out_dir).get("max_steps")
    given = {name: value for name, value in config.items() if value is not None}
    names = [n for n in given if n not in FREE_FIELDS and without_slash(earlier.get(n)) != without_slash(given[n])]
    if "train_data" in names and earlier["data_dir"] != given["data_dir"]:
        names.insert(0, "data_dir")
    if found and earlier["max_steps"] and bends_schedule(earlier["max_steps"], step_of(found)):
        names.append("max_steps")
    if names and not found:
        print(f"{out_dir}: no checkpoint of the run that was begun here with other options; starting over", flush=True)
        return None, {}
    if names:
        differing = ", ".join(f"{name} was {short(earlier.get(name))} and is {short(config[name])}" for name in names)
        hint = f"choose another --out_dir; --init_from={out_dir} would start from its weights"
        if "tokenizer_sha256" in names:  # --train_tokenizer makes another vocabulary each time
            hint += f"; to resume, prepare the text with --tokenizer={out_dir}/tokenizer.json"
        raise UserError(f"{out_dir}: holds a run that differs: {differing} ({hint})")
    return found, earlier


def short(value):
    """An option's value as text; of a sha256 the first twelve digits."""
    return value[:12] if re.fullmatch("[0-9a-f]{64}", str(value)) else repr(value)


# ---------------------------------------------------------------------------------------------------------------------
# Writing


class Saver:
    """Writes a run's checkpoints in a thread of its own, one at a time; does nothing where the run does not write.

    run: its RunDirectory. keep: how many to keep.
    """

    def __init__(self, run, keep):
        self.run, self.keep = run, keep
        self.thread, self.saving = ThreadPoolExecutor(1, "checkpoint"), None
        self.seconds = 0.0  # that the last checkpoint took
        self.begun = self.written = None  # steps of the last checkpoint that was begun, and of the last on disk

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.thread.shutdown()  # once the checkpoint being written is on disk

    def check_space(self, num_params):
        """Raises: UserError when the disk cannot hold the checkpoints to keep and the next one."""
        if not self.run.writes:
            return
        path = self.run.path
        needed = 12 * num_params * max(1, self.keep + 1 - len(steps(path)))  # bytes: weights and two moments, fp32
        free = shutil.disk_usage(path).free
        if free < needed:
            hint = "free some, choose another --out_dir, or lower --keep_checkpoints"
            text = f"{gigabytes(free, 2)} free, but checkpoints will take {gigabytes(needed, 2)} more"
            raise UserError(f"{path}: {text} ({hint})")

    def save(self, state, model, optimizers):
        """Copy a checkpoint now, and write it while training continues.

        Raises: UserError when the one before could not be written.
        """
        if not self.run.writes:
            return
        self.wait()
        tensors = {"model.safetensors": weights_of(model), "optimizer.safetensors": moments_of(model, optimizers)}
        if model.bert.fp8:
            state = {**state, "fp8_largest": model.bert.fp8.largest.tolist()}
        texts = {"state.json": json.dumps(state, indent=1), **self.run.texts}
        self.begun = state["step"]
        self.saving = self.thread.submit(self.write, state["step"], *snapshot(tensors), texts)

    def write(self, step, tensors, copied, texts):
        """In the thread: write what `save` copied, and remove all but the newest checkpoints."""
        start = time.perf_counter()
        try:
            self.run.sync_log()
            with copied:
                contents = serialize(tensors, texts)
            tensors.clear()  # frees device memory; the executor still holds the dictionary itself
            path = write_checkpoint(self.run.path, step, contents)
        except (UserError, OSError) as error:  # OSError: of the log's fsync, as on quotas and network disks
            return self.run.failed(error)
        remove_old(self.run.path, step, self.keep)
        self.seconds, self.written = time.perf_counter() - start, step
        self.run.log("checkpoint", step=step, path=path, seconds=round(self.seconds, 3))
        say(f"saved {path}")

    def check(self):
        """Raises: UserError when the last checkpoint could not be written."""
        if self.saving and self.saving.done():
            self.wait()

    def wait(self):
        """Until the last checkpoint is on disk. Raises: UserError when it could not be written."""
        saving, self.saving = self.saving, None
        if saving:
            saving.result()

    def finish(self):
        """Wait for the last checkpoint. Raises: UserError when it is not on disk, even with on_save_error="continue"."""
        self.wait()
        if self.written != self.begun:
            hint = "free some space; the same command resumes from the newest checkpoint"
            raise UserError(f"{self.run.path}: trained to step {self.begun}, but its checkpoint was not written ({hint})")


def weights_of(model):
    """{name: tensor} of every parameter, tied ones once. Sorted by name, so equal weights are equal bytes in a file."""
    return {name: parameter.detach() for name, parameter in sorted(model.named_parameters())}


def moments_of(model, optimizers):
    """{"exp_avg.NAME": tensor, ...}: the state of the optimizers, but for AdamW's step, which state.json tells."""
    return {
        f"{key}.{name}": value
        for name, parameter in model.named_parameters()
        for optimizer in optimizers
        for key, value in optimizer.state.get(parameter, {}).items()
        if key != "step"
    }


def snapshot(tensors):
    """(copies, context): copies of {file name: {name: tensor}}, to be read inside the context by another thread.

    On a GPU the copies stay there, 12 bytes a parameter, for which the choice of the micro-batch leaves room; the context
    is a stream of its own, so that training does not wait for the transfer. If memory is short, they are copied to
    the CPU synchronously instead, which stalled base on an H100 for several seconds.
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


def serialize(tensors, texts):
    """{file name: its bytes} of a checkpoint. tensors: {file name: {name: tensor}}. texts: {file name: str}."""
    packed = {name: safetensors_bytes(contents) for name, contents in tensors.items()}
    return {**packed, **{name: text.encode() for name, text in texts.items()}}


def safetensors_bytes(tensors):
    """The safetensors file of {name: float32 tensor}, as a uint8 array: the same bytes as the library's `save`.

    The library holds the GIL while it copies, which would stall the training that continues meanwhile.
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
        # NumPy's copy: PyTorch's would start a second thread pool, and with two pools on a CPU the training one sleeps
        # between operators from then on: a small model's steps took up to 40 % longer. And cpu(), as
        # numpy(force=True) holds the GIL while it waits for the GPU.
        values[start:stop] = tensor.detach().cpu().numpy().reshape(-1)
    return packed


def save(out_dir, step, tensors, texts):
    """Write a checkpoint of what `serialize` takes, and return its path. Raises: UserError when it cannot be written."""
    return write_checkpoint(out_dir, step, serialize(tensors, texts))


def write_checkpoint(out_dir, step, contents):
    """Write a checkpoint and return its path. contents: {file name: its bytes}.

    The directory is renamed into place once every byte is on disk, so a kill or a full disk leaves no checkpoint rather
    than half of one. Then it is read back, and its digests compared.
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
        shutil.rmtree(path, ignore_errors=True)  # one of this step is damaged: a valid one would have been resumed from
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


def remove_old(out_dir, step, keep):
    """Keep the newest `keep` checkpoints up to `step`; remove older ones, and later ones, which must be damaged."""
    numbers = steps(out_dir)
    for number in [n for n in numbers if n > step] + [n for n in numbers if n <= step][keep:]:
        shutil.rmtree(os.path.join(out_dir, f"step_{number:08d}"), ignore_errors=True)


# ---------------------------------------------------------------------------------------------------------------------
# Finding and checking


def steps(out_dir):
    """The numbers of the checkpoints in a run directory, newest first, damaged or not."""
    names = os.listdir(out_dir) if os.path.isdir(out_dir) else []
    return sorted((int(name[5:]) for name in names if re.fullmatch(r"step_\d{8,}", name)), reverse=True)


def step_of(path):
    """The step a checkpoint directory was written after."""
    return int(os.path.basename(path)[len("step_") :])


def newest(out_dir):
    """The path of the newest undamaged checkpoint of a run, or None; damaged ones are reported on stderr."""
    for step in steps(out_dir):
        path = os.path.join(out_dir, f"step_{step:08d}")
        if fault := damage(path):
            print(f"warning: {fault}: checkpoint skipped", file=sys.stderr, flush=True)
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
        if os.path.isfile(path):
            raise UserError(f"{path}: a file (give its directory, or that of its run)")
        if steps(path):  # `newest` has named what is wrong with each
            raise UserError(f"{path}: every checkpoint here is damaged (restore one from a copy, or remove them all)")
        if os.path.exists(os.path.join(path, "log.jsonl")):
            raise UserError(f"{path}: a run that has no checkpoint yet (wait for its first, every --checkpoint_interval steps)")
        there = "no checkpoint here" if os.path.isdir(path) else "no such directory"
        if near := run_inside(path) if os.path.isdir(path) else similar(path):
            raise UserError(f"{path}: {there} (did you mean {near}?)")
        hint = f"expected a run or step_* directory; weights of other origin: python -m tools.convert_hf --from_hf={path} --out=RUN"
        raise UserError(f"{path}: {there} ({hint})")
    return found


def run_inside(path):
    """The newest run in a directory, such as the model in a fine-tuning's results; None without one."""
    inside = [os.path.join(path, name) for name in os.listdir(path)]
    return max(filter(steps, inside), key=os.path.getmtime, default=None)


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


def digest_entry(num_bytes, sha256):
    return {"bytes": num_bytes, "sha256": sha256}


def digests_text(entries):
    """The text that digests.json must have for these {file name: digest_entry}."""
    return json.dumps(dict(sorted(entries.items())), indent=1)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_config(path):
    """A run's or checkpoint's config.json, a dictionary. Raises: UserError."""
    file = os.path.join(path, "config.json")
    config = read_json(file, "not a checkpoint of this project")
    if "vocab_size" not in config:
        raise UserError(f"{file}: not a configuration of this project")
    return config


def read_tensors(path, name):
    """{name: tensor} on the CPU. Raises: UserError."""
    try:
        return load_file(os.path.join(path, name))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{os.path.join(path, name)}: {error} (not a checkpoint of this project)") from None


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


def restore(path, state, model, optimizers, process):
    """Load a checkpoint's weights, moments and counters in every process. Rank 0 reads; the others need no disk."""
    moments = moments_of(model, optimizers)
    if process.rank == 0:
        load_weights(model, read_tensors(path, "model.safetensors"), path)
        saved = read_tensors(path, "optimizer.safetensors")
        if {name: t.shape for name, t in saved.items()} != {name: t.shape for name, t in moments.items()}:
            raise UserError(f"{path}/optimizer.safetensors: does not fit the model (take an earlier checkpoint)")
        for name, tensor in moments.items():
            tensor.copy_(saved[name])
        state.update(read_json(os.path.join(path, "state.json"), "not a checkpoint of train.py"))
    state.update(process.broadcast(state))
    if model.bert.fp8 and "fp8_largest" in state:  # --eval_only may load a run without
        model.bert.fp8.restore(state["fp8_largest"])
    for tensor in (*weights_of(model).values(), *moments.values()):
        process.broadcast_tensor(tensor)
    for optimizer in optimizers:
        for of_parameter in optimizer.state.values():
            if "step" in of_parameter:
                of_parameter["step"].fill_(state["step"] - state["skipped"])  # AdamW does not count a skipped update


def compare_parameters(model, process, step):
    """Raises: UserError, on all processes, naming the ranks whose parameters are not bit for bit the others'."""
    # A sum of the bits as integers finds any single change; below 2^48 it passes through a float64 unharmed.
    bits = [parameter.detach().view(torch.int32).sum(dtype=torch.int64) for parameter in model.parameters()]
    sums = [row[0] for row in process.gather([torch.stack(bits).sum() % 2**48])]
    most = max(sums, key=sums.count)
    differing = [str(rank) for rank, value in enumerate(sums) if value != most]
    if differing:
        who = f"rank {differing[0]}" if len(differing) == 1 else f"ranks {', '.join(differing)}"
        hint = "a faulty GPU or memory? The same command resumes from the newest checkpoint"
        raise UserError(f"step {step}: the parameters of {who} differ from those of the other processes ({hint})")


def model_config(config):
    """The ModelConfig in a checkpoint's config.json, a dictionary. Raises: UserError."""
    config = {"layer_norm_eps": LAYER_NORM_EPS, **config}  # of formats 1 and 2
    if missing := [field.name for field in fields(ModelConfig) if field.name not in config]:
        raise UserError(f"config.json: has no {', '.join(missing)} (not a checkpoint of this project)")
    return ModelConfig(**{field.name: config[field.name] for field in fields(ModelConfig)})


def load(path):
    """(config, {name: tensor}, tokenizer_text) of a run directory or a step_* checkpoint directory.

    If nothing has trained the second token type, it is the same as the first. Raises: UserError when there is no undamaged
    checkpoint.
    """
    path = find(path)
    with open(os.path.join(path, "tokenizer.json"), encoding="utf-8", errors="replace") as file:
        config, tensors, tokenizer_text = read_config(path), read_tensors(path, "model.safetensors"), file.read()
    # Differs from MosaicBERT: it fine-tunes pairs with random numbers here. In pretraining the first type's vector, part of
    # every token, may become as long as a word's; without it a second text is read worse (results/README.md#token_types_h200).
    types = tensors.get(TOKEN_TYPES, ())
    if len(types) == 2 and not types[1].any():
        types[1] = types[0]
    return config, tensors, tokenizer_text


def without_classifier(tensors):
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(("bert.pooler.", "classifier."))}


def make_masked_lm(config, tensors, path, encoder_only=False):
    """The MaskedLM of what `load` returns, in eval mode; a pooler or classifier is left out.

    encoder_only: the masked-language-model head may be missing, and is random then. Raises: UserError.
    """
    model = MaskedLM(model_config(config), config["vocab_size"])
    tensors = without_classifier(tensors)
    if not any(name.startswith("cls.") for name in tensors):
        if not encoder_only:
            raise UserError(f"{path}: has no masked-language-model head (train.py --init_from gives it one)")
        tensors |= {name: weight for name, weight in weights_of(model).items() if name.startswith("cls.")}
    load_weights(model, tensors, path)
    return model.eval()


def load_model(path, device="cpu"):
    """The MaskedLM of a run directory or a step_* checkpoint directory, in eval mode.

    Raises: UserError when there is no undamaged checkpoint.
    """
    config, tensors, _ = load(path)
    return make_masked_lm(config, tensors, path).to(device)


def start_from(model, path, tokenizer_text):
    """Give a new MaskedLM the weights of another run, to train with the tokenizer whose file holds `tokenizer_text`.

    Entries of a new vocabulary get the embedding of the same word in the old one. New entries, and a missing head, keep
    their random weights; a pooler or classifier is left out. Returns what was done, as text. Raises: UserError.
    """
    config, tensors, old_text = load(path)
    for name, value in vars(model_config(config)).items():
        if "dropout" not in name and value != getattr(model.cfg, name):
            raise UserError(f"{path}: {name} is {value}, but this run has {getattr(model.cfg, name)} (set --{name}={value})")
    types = tensors.get(TOKEN_TYPES, ())
    if len(types) == 2 and torch.equal(*types):
        types[1] = 0  # never trained, see load
    fresh = {name: weight.cpu() for name, weight in weights_of(model).items()}
    done = f"started from {path}"
    tensors = without_classifier(tensors)
    if tokenizer_text != old_text:
        old, new = (load_tokenizer(path, text)[0].get_vocab() for text in (old_text, tokenizer_text))
        both = [word for word in new if word in old]
        here, there = [new[word] for word in both], [old[word] for word in both]
        for name in tensors.keys() & set(PER_WORD):
            mixed = fresh[name].clone()
            mixed[here] = tensors[name][there]
            tensors[name] = mixed
        done += f", a new vocabulary: {len(both):,} of its {len(new):,} entries were in the old one"
    if not any(name.startswith("cls.") for name in tensors):
        tensors |= {name: weight for name, weight in fresh.items() if name.startswith("cls.")}
        done += ", with a new masked-language-model head"
    load_weights(model, tensors, path)
    return done
