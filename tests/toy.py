"""Toy shards, runs and checkpoints for tests and studies: small, with something to learn, made from nothing."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

import checkpoint
from common import run_directory
from data import write_shard
from model import MaskedLM, ModelConfig

ROOT = Path(__file__).resolve().parent.parent
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCAB_SIZE = 100


def make_tokenizer(path, vocab_size=VOCAB_SIZE, special=SPECIAL):
    vocab = {word: i for i, word in enumerate([*special, *(f"w{i}" for i in range(vocab_size - len(special)))])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(path))


def make_documents(count, longest=60, seed=0, shortest=1, vocab_size=VOCAB_SIZE):
    """Counting sequences, w5 w6 w7 ..., with random starts: a masked token follows from its neighbours.

    Lengths are `shortest` to `longest` - 1 tokens.
    """
    rng = np.random.default_rng(seed)
    lengths, starts = rng.integers(shortest, longest, count), rng.integers(0, vocab_size - 5, count)
    return [5 + (start + np.arange(n)) % (vocab_size - 5) for start, n in zip(starts, lengths)]


def make_shards(path, documents=None, val_documents=None, shards=2, vocab_size=VOCAB_SIZE):
    """A finished shard directory, as prepare_c4.py would leave it; returns its path."""
    path = Path(path)
    path.mkdir(parents=True)
    make_tokenizer(path / "tokenizer.json", vocab_size)
    digest = hashlib.sha256((path / "tokenizer.json").read_bytes())
    documents = make_documents(300) if documents is None else documents
    val_documents = make_documents(40, seed=1) if val_documents is None else val_documents
    entries = []
    for split, docs, count in (("train", documents, shards), ("val", val_documents, 1)):
        for i in range(count):
            name = path / f"{split}_{i:05d}.bin"
            entries.append({"split": split, **write_shard(name, docs[i::count], 2, digest.digest())})
    manifest = {"format": 1, "tokenizer_sha256": digest.hexdigest(), "vocab_size": vocab_size, "shards": entries}
    (path / "manifest.json").write_text(json.dumps(manifest))
    (path / "report.json").write_text("{}")
    return str(path)


TOY_SIZE = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 48}
TOY_OPTIONS = {
    **TOY_SIZE, "seq_length": 32, "global_batch_size": 16, "max_steps": 10, "lr": 3e-3, "eval_interval": 5,
    "checkpoint_interval": 4, "log_interval": 1, "device": "cpu", "kernels": "torch",
}  # fmt: skip


def flags(options):
    """A dictionary of options as command-line arguments."""
    return [f"--{name}={value}" for name, value in options.items()]


def toy_argv(data_dir, out_dir, **options):
    """Command-line arguments of a toy run."""
    return flags({**TOY_OPTIONS, "data_dir": data_dir, "out_dir": out_dir, **options})


def run_train(argv, processes=1, **environment):
    """train.py as a user starts it. Returns the CompletedProcess, whatever its exit status."""
    return subprocess.run(train_command(argv, processes), env=train_environment(**environment), capture_output=True, text=True)


def train_command(argv, processes=1):
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*launcher, str(ROOT / "train.py"), *argv]


def train_environment(**environment):
    threads = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **threads, **environment}


def start_train(argv, gpus, output):
    """train.py, started with a process for each of `gpus`, numbers of GPUs, or on CPUs; its output goes into a file."""
    here = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(1 + max(gpus))))).split(",")
    visible = ",".join(here[gpu] for gpu in gpus) if torch.cuda.is_available() else ""
    with open(output, "w", encoding="utf-8") as file:
        environment = train_environment(CUDA_VISIBLE_DEVICES=visible)
        return subprocess.Popen(train_command(argv, len(gpus)), env=environment, stdout=file, stderr=file, cwd=ROOT)


def read_log(out_dir, event="train"):
    """A run's records of one event; none if it has not begun to log."""
    return [record for _, record in run_directory.read_log(out_dir) if record["event"] == event]


def files_of(directory):
    """{name: bytes} of a checkpoint, without the files that hold wall-clock times."""
    timed = ("state.json", "digests.json")
    return {path.name: path.read_bytes() for path in Path(directory).iterdir() if path.name not in timed}


def make_run(path, model="mosaicbert", scale=1.0, vocab_size=VOCAB_SIZE, **size):
    """A run directory with one checkpoint of random weights, whose matrices are scaled up by `scale`. size: else TOY_SIZE."""
    path.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    cfg = ModelConfig(model, **{**TOY_SIZE, **size}, hidden_dropout=0.0)
    make_tokenizer(path / "tokenizer.json", vocab_size)
    text = (path / "tokenizer.json").read_text()
    config = json.dumps({**vars(cfg), "vocab_size": vocab_size, "tokenizer_sha256": "", "price_per_gpu_hour": 2.0})
    weights = checkpoint.weights_of(MaskedLM(cfg, vocab_size))
    weights = {name: weight * scale if weight.ndim == 2 else weight for name, weight in weights.items()}
    texts = {"config.json": config, "tokenizer.json": text, "state.json": json.dumps({"step": 1, "seconds": 7200.0})}
    checkpoint.save(str(path), 1, {"model.safetensors": weights}, texts)
    start = {"event": "start", "world_size": 2, "device": "toy", "config": {"price_per_gpu_hour": 2.0}}
    (path / "log.jsonl").write_text(json.dumps(start) + "\n")
    return str(path)


def reseal(path):
    """Recompute a checkpoint's digests after its files were changed, as an attacker would."""
    files = {file.name: file.read_bytes() for file in Path(path).iterdir() if file.name != checkpoint.DIGESTS}
    entries = {name: checkpoint.digest_entry(len(b), hashlib.sha256(b).hexdigest()) for name, b in files.items()}
    (Path(path) / checkpoint.DIGESTS).write_text(checkpoint.digests_text(entries))


def anonymous_mb():
    """Memory of this process in MB, without mapped files, whose pages are page cache."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024 / 1e6
