"""Fine-tune on GLUE, or on labelled files of your own.

    python finetune_glue.py --checkpoint=out/base --data_dir=data/glue --out=results/base
    python finetune_glue.py --checkpoint=out/base --train_file=a.csv --val_file=b.csv --text_columns=text \\
        --label_column=label --out=out/mine
    python finetune_glue.py --checkpoint=out/mine/model --predict_file=new.csv --out=out/predicted

Every (task, seed) pair is a run of its own, with one file in OUT/runs that is its log, its lock and its result. Any
number of processes, of --jobs or of torchrun's, take the next run that nobody holds; a killed suite goes on where it
was. Ranks on several hosts need a file system they share.

Read next: glue.py, for the tasks
"""

import dataclasses
import fcntl
import functools
import hashlib
import json
import math
import multiprocessing
import os
import threading
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

import checkpoint
from tools import convert_hf
import glue
import kernels
from common.options import UserError, command, load_config
from common.files import hash_of, write_text
from common.vocabulary import load_tokenizer
from data import round_up
from kernels import make_windows
from model import MAX_POSITIONS, ModelConfig, SequenceClassifier, model_config
from common.processes import Process, autocast, device_name, setup_device

WARMUP_FRACTION = 0.06
ADAM = {"betas": (0.9, 0.98), "eps": 1e-6}
EVAL_TOKENS = 32768  # of a batch when scoring
STEP_COST = 1000  # a step takes about as long as this many tokens, whatever its size: for the order of runs and the ETA
LOG_SECONDS = 10


@dataclass
class GlueConfig:
    # What
    checkpoint: str = ""  # run or step_* directory, or a directory or hub id in Hugging Face form
    tasks: str = ",".join(glue.GLUE_TASKS)  # of GLUE, comma-separated; sst2:1 gives a task its own number of seeds
    data_dir: str = ""  # GLUE's TSV files, TASK/train.tsv and TASK/dev.tsv; empty: nyu-mll/glue from the hub
    out: str = ""  # result directory; the same command again goes on in it
    # Your own data, instead of GLUE
    train_file: str = ""  # .csv, .tsv or .jsonl with labels
    val_file: str = ""  # the same, to score on
    text_columns: str = "text"  # one column or key with text, or two, comma-separated, for pairs
    label_column: str = "label"  # column or key with the label
    problem: Literal["auto", "classification", "regression"] = "auto"  # auto: by the labels, and printed
    predict_file: str = ""  # texts to label, with --train_file or with the checkpoint of an earlier own task
    # How
    recipe: Literal["mosaic", "fast"] = "mosaic"  # settings per task: the original's, or quick ones
    seeds: int = 0  # how many per task; 0: the recipe's number
    epochs: int = 0  # passes over the training data; 0: the recipe's
    lr: float = 0.0  # peak learning rate; 0: the recipe's
    batch_size: int = 0  # examples a step; 0: the recipe's
    max_length: int = 256  # tokens an example has at most; of pairs the longer text is cut
    random_weights: bool = False  # start from random weights, to see what pretraining gave
    skip_bad_lines: int = 0  # lines of a file with the wrong number of columns that may be left out
    submission: bool = False  # also write the GLUE server's zip, from the first seed
    jobs: int = 1  # runs that share the device at once
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU where there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of matrix products and activations; STS-B: float32
    kernels: Literal["auto", "triton", "torch"] = "auto"  # auto: this project's Triton kernels on GPUs, else PyTorch
    dry_run: bool = False  # check everything, print the plan and an estimate timed on this device, and stop

    def check(self):
        """Raises: UserError for values that make no sense."""
        for name, hint in (("checkpoint", "a run directory, such as out/base"), ("out", "a directory for results")):
            if not getattr(self, name):
                raise UserError(f"--{name}: not given ({hint})")
        for name, least in {"seeds": 0, "epochs": 0, "batch_size": 0, "skip_bad_lines": 0, "jobs": 1}.items():
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)}: must be at least {least}")
        if self.max_length < 5:
            raise UserError(f"max_length={self.max_length}: must be at least 5")
        if not 0 <= self.lr <= 1:
            raise UserError(f"lr={self.lr}: must be between 0 and 1")
        if bool(self.train_file) != bool(self.val_file):
            raise UserError("give --train_file and --val_file together")
        if len(self.text_columns.split(",")) > 2:
            raise UserError(f"text_columns={self.text_columns}: one, or two for pairs")
        tasks = self.seeds_of_tasks()
        for task in tasks:
            if task not in glue.GLUE_TASKS:
                raise UserError(f"tasks={self.tasks}: no task {task!r} (there are {', '.join(glue.GLUE_TASKS)})")
        if self.submission and (self.train_file or set(tasks) != set(glue.GLUE_TASKS)):
            raise UserError("--submission: the server takes all eight tasks together (leave --tasks out)")

    def seeds_of_tasks(self):
        """{task: its number of seeds, 0 for the recipe's}, in the order given. Raises: UserError."""
        counts = {}
        for part in self.tasks.split(","):
            task, colon, count = part.partition(":")
            if colon and not (count.isdecimal() and int(count)):
                raise UserError(f"tasks={self.tasks}: {part!r} is no TASK:SEEDS (such as sst2:1)")
            counts[task] = int(count) if colon else self.seeds
        return counts


# ---------------------------------------------------------------------------------------------------------------------
# The pretrained model


@dataclass
class Pretrained:
    """A checkpoint's parts, weights on the CPU."""

    model_cfg: ModelConfig
    vocab_size: int
    tensors: dict  # {name: tensor}, masked-language-model head left out
    tokenizer_text: str
    tokenizer: object
    special: dict
    config: dict  # config.json of a checkpoint of this project
    digest: str


@functools.cache
def load_pretrained(path):
    """The Pretrained of a run or checkpoint directory, or of a directory or hub id in Hugging Face form."""
    config, tensors, tokenizer_text = convert_hf.read_model(path)
    model_cfg = model_config(config)
    encoder = {name: tensor for name, tensor in tensors.items() if name.startswith("bert.")}
    digest = hashlib.sha256(tokenizer_text.encode())
    for name, tensor in sorted(encoder.items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy())
    tokenizer, special = load_tokenizer(path, tokenizer_text)
    vocab_size = config["vocab_size"]
    return Pretrained(model_cfg, vocab_size, encoder, tokenizer_text, tokenizer, special, config, digest.hexdigest())


def make_classifier(pretrained, num_labels, seed, random_weights=False):
    """A SequenceClassifier with the pretrained encoder, and its pooler if there is one. The rest is new."""
    torch.manual_seed(seed)
    model = SequenceClassifier(pretrained.model_cfg, pretrained.vocab_size, num_labels)
    if not random_weights:
        weights = checkpoint.weights_of(model)
        new = {name: weights[name] for name in weights if name.startswith(("bert.pooler", "classifier"))}
        checkpoint.load_weights(model, {**new, **pretrained.tensors}, "checkpoint")
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Tokens


@dataclass
class Encoded:
    """Tokenized examples, end to end, without padding."""

    ids: np.ndarray  # (num_tokens,) int32
    types: np.ndarray  # (num_tokens,) int32: 1 in the second text and its [SEP]
    starts: np.ndarray  # (n,) int64
    lengths: np.ndarray  # (n,) int64
    labels: np.ndarray | None

    def batch(self, which, device):
        """(ids, cu_seqlens, max_seqlen, types, windows, labels) of examples `which` (int64 array), as one flat stream."""
        lengths = self.lengths[which]
        cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
        index = np.repeat(self.starts[which] - cu_seqlens[:-1], lengths) + np.arange(cu_seqlens[-1])
        multiple = 64 if len(index) < 2048 else 256  # whole tiles and few shapes: [PAD] after the last
        filling = np.zeros(round_up(len(index), multiple) - len(index), np.int32)
        ids, types = (torch.from_numpy(np.concatenate([x[index], filling])) for x in (self.ids, self.types))
        cu_seqlens = torch.from_numpy(cu_seqlens.astype(np.int32))
        labels = None if self.labels is None else torch.from_numpy(self.labels[which])
        max_seqlen = int(lengths.max())
        tensors = [ids, cu_seqlens, types, make_windows(lengths.tolist(), max_seqlen), labels]
        if device.type == "cuda":
            tensors = [None if x is None else x.pin_memory().to(device, non_blocking=True) for x in tensors]
        ids, cu_seqlens, types, windows, labels = tensors
        return ids, cu_seqlens, max_seqlen, types, windows, labels


def encode(examples, pretrained, max_length):
    """Encoded: [CLS] text [SEP], or [CLS] text [SEP] second text [SEP], the longer one cut first."""
    limit = min(max_length, MAX_POSITIONS) if pretrained.model_cfg.model == "bert" else max_length
    cls, sep = pretrained.special["[CLS]"], pretrained.special["[SEP]"]
    ids, types, lengths = [], [], []
    for start in range(0, len(examples.texts), 10_000):  # the library's results take a hundred bytes a token
        columns = zip(*examples.texts[start : start + 10_000])
        encodings = [pretrained.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False) for texts in columns]
        for parts in zip(*encodings):
            first = parts[0].ids
            if len(parts) == 1:
                row = [cls, *first[: limit - 2], sep]
                second = 0
            else:
                keep = shares(len(first), len(parts[1].ids), limit - 3)
                row = [cls, *first[: keep[0]], sep, *parts[1].ids[: keep[1]], sep]
                second = keep[1] + 1
            ids.append(np.array(row, np.int32))
            types.append(np.arange(len(row)) >= len(row) - second)
            lengths.append(len(row))
    lengths = np.array(lengths)
    ends = np.cumsum(lengths)
    return Encoded(np.concatenate(ids), np.concatenate(types).astype(np.int32), ends - lengths, lengths, examples.labels)


def shares(first, second, room):
    """How many tokens of two texts to keep in `room`, the longer one cut first, as in the tokenizers library."""
    if first + second <= room:
        return first, second
    if first > second:
        second = min(second, room // 2)
        return room - second, second
    first = min(first, room // 2)
    return first, room - first


# ---------------------------------------------------------------------------------------------------------------------
# The plan


@dataclass(frozen=True)
class Run:
    """One task with one seed."""

    task: glue.Task
    seed: int
    first_seed: bool  # its weights are kept, where anything needs them
    init: str  # "pretrained", "mnli" or "random"
    settings: glue.Settings
    num_examples: int
    num_steps: int
    cost: float  # in tokens
    identity: tuple  # (name, value) pairs of all that changes its result

    @property
    def name(self):
        return f"{self.task.name}.seed{self.seed}"


def read_examples(cfg, task):
    """{split: Examples} of a task: "train" and what it is scored on. Raises: UserError."""
    if task.name != "own":
        return {split: glue.read_split(task, split, cfg) for split in ("train", *glue.dev_splits(task))}
    rows = {"train": cfg.train_file, "validation": cfg.val_file}
    return {
        split: glue.examples_of(glue.read_own(path, task.text_columns, task.label_column, cfg), path, task.labels)
        for split, path in rows.items()
    }


def make_plan(cfg, pretrained):
    """The list of Runs, those that others wait for and long ones first, after every file has been read once."""
    counts = {"own": cfg.seeds} if cfg.train_file else cfg.seeds_of_tasks()
    tasks = [glue.own_task(cfg)] if cfg.train_file else [glue.GLUE_TASKS[name] for name in counts]
    names = [task.name for task in tasks]
    plan = []
    for task in tasks:
        examples = read_examples(cfg, task)
        settings = glue.RECIPES[cfg.recipe][task.name]
        given = {"lr": cfg.lr, "batch_size": cfg.batch_size, "epochs": cfg.epochs, "num_seeds": counts[task.name]}
        settings = dataclasses.replace(settings, **{name: value for name, value in given.items() if value})
        init = "mnli" if "mnli" in names and task.name in glue.FROM_MNLI else "pretrained"
        init = "random" if cfg.random_weights else init
        texts = examples["train"].texts
        num_steps = settings.epochs * math.ceil(len(texts) / settings.batch_size)
        tokens = settings.epochs * sum(2 + sum(map(len, text)) / 4 for text in texts)  # about four characters a token
        for i, seed in enumerate(glue.seeds(settings.num_seeds)):
            identity = {
                "task": task.name, "seed": seed, "init": init, **dataclasses.asdict(settings),
                "max_length": cfg.max_length, "checkpoint": pretrained.digest,
                "data": hash_of([part.digest() for part in examples.values()]), "submission": cfg.submission,
            }  # fmt: skip
            del identity["num_seeds"]
            cost = tokens + STEP_COST * num_steps
            plan.append(Run(task, seed, i == 0, init, settings, len(texts), num_steps, cost, tuple(identity.items())))
    return sorted(plan, key=lambda run: (not (run.task.name == "mnli" and run.first_seed), -run.cost))


def log_path(cfg, run):
    return os.path.join(cfg.out, "runs", f"{run.name}.jsonl")


def result(cfg, run):
    """The last record of a finished run, or None. Raises: UserError when it is that of a run with other settings."""
    try:
        with open(log_path(cfg, run), encoding="utf-8") as file:
            records = [json.loads(line) for line in file]
    except (OSError, ValueError):  # not there, or a line half written: the run is under way, or was killed
        return None
    if not records or records[-1]["event"] != "end":
        return None
    names = [name for name, value in run.identity if records[0]["identity"].get(name) != value]
    if names:
        raise UserError(f"{log_path(cfg, run)}: holds a run with another {', '.join(names)} (choose another --out)")
    return records[-1]


# ---------------------------------------------------------------------------------------------------------------------
# One run


def lr_at(settings, num_steps, step):
    """Learning rate of a step, counted from 1: up linearly from 0, then down to 0."""
    warmup = round(WARMUP_FRACTION * num_steps)
    done = step - 1
    return settings.lr * (done / warmup if done < warmup else (num_steps - done) / (num_steps - warmup))


def batches(run, encoded, device):
    """Every training batch of the run. Differs from MosaicBERT: shuffled, each epoch anew; it kept the files' order."""
    for epoch in range(run.settings.epochs):
        order = np.random.default_rng([run.seed, epoch]).permutation(len(encoded.lengths))
        for start in range(0, len(order), run.settings.batch_size):
            yield encoded.batch(order[start : start + run.settings.batch_size], device)


class Steps:
    """The optimizer steps of one run. On a GPU each shape of batch becomes a CUDA graph when it comes the second time.

    A step of a small batch is some 700 kernels of a few microseconds: on an H100, 6.6 ms of work for 32 pairs of MRPC,
    but 53 ms to launch one by one from Python. A graph is launched as a whole.
    """

    def __init__(self, model, settings, process):
        self.model, self.process, self.lr = model, process, settings.lr
        on_gpu, bert = process.device.type == "cuda", model.cfg.model == "bert"
        self.use_graphs = on_gpu and (bert or kernels.uses_triton(process.device))  # plain attention reads lengths back
        if self.use_graphs:
            self.lr = torch.zeros((), device=process.device)  # a graph reads it anew each time
            self.seqlen_multiple = 32 if bert else 128  # bert pads to it; for the kernels it is an upper limit
            self.graphs, self.pool = {}, torch.cuda.graph_pool_handle()
        self.optimizer = torch.optim.AdamW(
            model.parameters(), self.lr, weight_decay=settings.weight_decay, fused=True, capturable=self.use_graphs, **ADAM
        )

    def __call__(self, lr, batch):
        """One step; returns the mean loss of the batch, on the device."""
        if not self.use_graphs:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            return self.step(batch)
        self.lr.fill_(lr)
        batch = [round_up(x, self.seqlen_multiple) if isinstance(x, int) else x for x in batch]
        shape = tuple(x.shape if torch.is_tensor(x) else x for x in batch)
        if shape not in self.graphs:
            self.graphs[shape] = None  # this step warms up whatever the capture must not do
            return self.step(batch)
        if self.graphs[shape] is None:
            inputs, graph = [x.clone() if torch.is_tensor(x) else x for x in batch], torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, self.pool, torch.cuda.current_stream()):  # recorded, not carried out
                loss = self.step(inputs)
            self.graphs[shape] = graph, inputs, loss
        graph, inputs, loss = self.graphs[shape]
        for to, x in zip(inputs, batch):
            if torch.is_tensor(x):
                to.copy_(x)
        graph.replay()
        return loss.clone()  # the next graph may write where this one did

    def step(self, batch):
        *inputs, labels = batch
        with autocast(self.process):
            scores = self.model(*inputs)
        scores = scores[: len(labels)].float()
        if scores.shape[1] == 1:
            loss = F.mse_loss(scores[:, 0], labels.float())
        else:
            loss = F.cross_entropy(scores, labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


@torch.no_grad()
def predict(model, encoded, process):
    """(n, num_labels) float32 array of scores; examples of like length go together."""
    model.eval()
    order = np.argsort(encoded.lengths, kind="stable")
    scores = []
    at_once = max(1, EVAL_TOKENS // int(encoded.lengths.max()))
    for start in range(0, len(order), at_once):
        *inputs, _ = encoded.batch(order[start : start + at_once], process.device)
        with autocast(process):
            scores.append(model(*inputs).float())
    result = torch.cat(scores).cpu().numpy()
    return result[np.argsort(order)]


def outputs(task, scores):
    """(n,) array: the likeliest classes, or the numbers."""
    return scores.argmax(1) if task.labels else scores[:, 0].astype(np.float64)


class Worker:
    """What a process keeps from run to run: the device, the pretrained weights, and the data of the last task."""

    def __init__(self, cfg):
        self.cfg = cfg
        self.pretrained = load_pretrained(cfg.checkpoint)
        device, self.dtype = setup_device(cfg, self.pretrained.model_cfg)
        if device.type == "cuda":
            torch.cuda.set_stream(torch.cuda.Stream())  # the default one cannot be captured
        self.process = Process(0, 1, device, self.dtype)
        self.task = self.data = None

    def encoded(self, task):
        """{split: Encoded} of a task."""
        if self.task != task:
            examples = read_examples(self.cfg, task)
            self.data = {split: self.encode(part) for split, part in examples.items()}
            self.task = task
        return self.data

    def encode(self, examples):
        return encode(examples, self.pretrained, self.cfg.max_length)

    def classifier(self, run):
        start = load_pretrained(os.path.join(self.cfg.out, "mnli")) if run.init == "mnli" else self.pretrained
        model = make_classifier(start, max(1, len(run.task.labels)), run.seed, run.init == "random")
        # As the original, STS-B in float32; and its products in TF32, which Composer allows (mosaicml/composer#1275).
        self.process.dtype = torch.float32 if run.task.name == "stsb" else self.dtype
        torch.set_float32_matmul_precision("high" if run.task.name == "stsb" else "highest")
        return model.to(self.process.device)

    def run(self, run, log, say):
        """Train and score; `log` gets a record at the start, at times, and at the end."""

        def write(event, **values):
            log.write(json.dumps({"event": event, **values}) + "\n")
            log.flush()

        data, model = self.encoded(run.task), self.classifier(run)
        device = self.process.device
        write(
            "start", identity=dict(run.identity), **checkpoint.versions(), device=device_name(device),
            dtype=str(self.process.dtype).removeprefix("torch."), jobs=self.cfg.jobs, num_steps=run.num_steps,
        )  # fmt: skip
        start = reported = time.perf_counter()
        train_step = Steps(model, run.settings, self.process)
        model.train()
        losses = []  # since the last report, on the device
        for step, batch in enumerate(batches(run, data["train"], device), 1):
            lr = lr_at(run.settings, run.num_steps, step)
            losses.append(train_step(lr, batch))
            if len(losses) == 100 or step == run.num_steps or time.perf_counter() - reported > LOG_SECONDS:
                loss = torch.stack(losses).mean().item()
                if not math.isfinite(loss):
                    raise UserError(f"{run.name}: loss is {loss} at step {step} (try a lower --lr)")
                write("train", step=step, loss=loss, lr=lr)
                if time.perf_counter() - reported > LOG_SECONDS:
                    say(f"{run.name}: step {step} of {run.num_steps}, loss {loss:.4f}")
                    reported = time.perf_counter()
                losses = []

        metrics = {}
        for split in glue.dev_splits(run.task):
            predictions, labels = outputs(run.task, predict(model, data[split], self.process)), data[split].labels
            suffix = split.removeprefix("validation")  # "", "_matched" or "_mismatched"
            for name in (*run.task.metrics, *run.task.shown):
                metrics[name + suffix] = glue.METRICS[name](predictions, labels)
            file = f"{run.task.name}{suffix.replace('_matched', '')}.seed{run.seed}.tsv"
            self.write_predictions(file, run.task, predictions, labels)
        if self.cfg.submission and run.first_seed:
            self.write_test_predictions(run.task, model)
        if run.first_seed and run.task.name in ("mnli", "own"):
            self.save(run, model)
        labels = data[glue.dev_splits(run.task)[0]].labels
        majority = float(np.unique(labels, return_counts=True)[1].max() / len(labels)) if run.task.labels else None
        write("end", metrics=metrics, majority_accuracy=majority, seconds=round(time.perf_counter() - start, 3))

    def write_predictions(self, file, task, predictions, labels):
        lines = ["index\tlabel\tprediction\n"]
        for index, pair in enumerate(zip(labels.tolist(), predictions.tolist())):
            label, prediction = [task.labels[value] for value in pair] if task.labels else pair
            lines.append(f"{index}\t{label}\t{prediction}\n")
        write_text(os.path.join(self.cfg.out, "predictions", file), "".join(lines))

    def write_test_predictions(self, task, model):
        """What the zip needs from this task, kept until all tasks are done."""
        names = {task.name, "ax"} if task.name == "mnli" else {task.name}
        for file in [file for file, (name, *_) in glue.SUBMISSION.items() if name in names]:
            examples = glue.read_test(file, self.cfg)
            predictions = outputs(task, predict(model, self.encode(examples), self.process))
            rows = [examples.index, glue.as_words(task, predictions)]
            write_text(os.path.join(self.cfg.out, "predictions", f"{file}.test.json"), json.dumps(rows))

    def save(self, run, model):
        """Keep the weights: MNLI's in OUT/mnli, for other tasks to start from; an own task's in OUT/model."""
        task = {"labels": run.task.labels, "text_columns": run.task.text_columns, "max_length": self.cfg.max_length}
        config = {
            "format": checkpoint.FORMAT, **dataclasses.asdict(self.pretrained.model_cfg), "vocab_size": self.pretrained.vocab_size,
            "tokenizer_sha256": self.pretrained.config.get("tokenizer_sha256"), "task": task,
        }  # fmt: skip
        directory = os.path.join(self.cfg.out, "mnli" if run.task.name == "mnli" else "model")
        os.makedirs(directory, exist_ok=True)
        texts = {"config.json": json.dumps(config, indent=1), "tokenizer.json": self.pretrained.tokenizer_text}
        checkpoint.save(directory, run.num_steps, {"model.safetensors": checkpoint.weights_of(model)}, texts)


# ---------------------------------------------------------------------------------------------------------------------
# All runs


def claim(path):
    """The log of a run, opened and locked, or None when a live process holds it. The lock ends with the process."""
    file = open(path, "a", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file
    except BlockingIOError:
        file.close()
        return None


def work(cfg, plan):
    """Take runs that nobody holds until all are finished, whoever finishes them."""
    if cfg.jobs > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // cfg.jobs))
    started, worker = time.time(), None
    found = {run.name for run in plan if result(cfg, run)}

    def say(text):
        finished = [run for run in plan if result(cfg, run)]
        fresh = sum(run.cost for run in finished if run.name not in found)
        left = sum(run.cost for run in plan) - sum(run.cost for run in finished)
        eta = f", about {(time.time() - started) * left / fresh / 60:.1f} min left" if fresh and left else ""
        print(f"{text} | {len(finished)} of {len(plan)} runs{eta}", flush=True)

    while waiting := [run for run in plan if not result(cfg, run)]:
        mnli_waits = any(run.task.name == "mnli" and run.first_seed for run in waiting)
        log = None
        for run in waiting:
            if not (run.init == "mnli" and mnli_waits) and (log := claim(log_path(cfg, run))):
                break
        if log is None:
            time.sleep(0.5)
            continue
        with log:
            if result(cfg, run):  # finished between the look and the claim
                continue
            log.truncate(0)
            worker = worker or Worker(cfg)
            worker.run(run, log, say)
        end = result(cfg, run)
        scores = ", ".join(f"{name} {100 * value:.2f}" for name, value in end["metrics"].items())
        say(f"{run.name}: {scores} in {end['seconds']:.1f} s")


def guarded_work(cfg, plan):
    """work, as main of a process: a UserError becomes one line, and exit status 2."""

    @command
    def main(argv):
        try:
            work(cfg, plan)
        except torch.OutOfMemoryError:
            raise UserError(f"out of GPU memory with jobs={cfg.jobs} (lower --jobs or --batch_size)", True) from None

    if parent := multiprocessing.parent_process():  # do not live on when it is killed
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    main([])


def work_in_processes(cfg, plan):
    """cfg.jobs processes that do the work. Raises: SystemExit with the first bad status, when the others are stopped."""
    context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
    processes = [context.Process(target=guarded_work, args=(cfg, plan), daemon=True) for _ in range(cfg.jobs)]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        failed = [process.exitcode for process in processes if process.exitcode]
        if failed:
            for process in processes:
                process.terminate()
            if failed[0] < 0:
                raise UserError(f"a process was killed by signal {-failed[0]} (out of memory? try a lower --jobs)", True)
            raise SystemExit(failed[0])
        time.sleep(0.2)


def earlier_tasks(cfg, pretrained):
    """The tasks of an earlier command in the same directory, from the same weights and recipe: {name: result}."""
    try:
        with open(os.path.join(cfg.out, "glue.json"), encoding="utf-8") as file:
            earlier = json.load(file)
        same = (earlier["checkpoint_sha256"], earlier["recipe"]) == (pretrained.digest, cfg.recipe)
        return earlier["tasks"] if same else {}
    except (OSError, ValueError, KeyError):
        return {}


def summary(cfg, plan, pretrained):
    """What glue.json holds."""
    tasks = earlier_tasks(cfg, pretrained)
    for name in [*glue.GLUE_TASKS, "own"]:
        runs = sorted((run for run in plan if run.task.name == name), key=lambda run: not run.first_seed)
        if not runs:
            continue
        ends = [result(cfg, run) for run in runs]
        metrics = {}
        for metric in ends[0]["metrics"]:
            values = [end["metrics"][metric] for end in ends]
            metrics[metric] = {"values": values, "mean": float(np.mean(values)), "ci95": glue.ci95(values)}
        scored = [metric for metric in metrics if metric not in runs[0].task.shown]
        per_seed = [100 * float(np.mean(column)) for column in zip(*(metrics[metric]["values"] for metric in scored))]
        tasks[name] = {
            "metrics": metrics,
            "scores": per_seed,
            "score": float(np.mean(per_seed)),
            "score_ci95": glue.ci95(per_seed),
            "majority_accuracy": ends[0]["majority_accuracy"],
            "seeds": [run.seed for run in runs],
            "seconds": round(sum(end["seconds"] for end in ends), 3),
            "train_examples": runs[0].num_examples,
            "init": runs[0].init,
            "settings": dataclasses.asdict(runs[0].settings),
        }
    tasks = {name: tasks[name] for name in [*glue.GLUE_TASKS, "own"] if name in tasks}
    return {
        "tasks": tasks,
        "average": float(np.mean([task["score"] for task in tasks.values()])),
        "complete": set(tasks) == set(glue.GLUE_TASKS),
        "recipe": cfg.recipe,
        "checkpoint": cfg.checkpoint,
        "checkpoint_sha256": pretrained.digest,
        "model": pretrained.model_cfg.model,
        "num_layers": pretrained.model_cfg.num_layers,
        "pretraining": pretraining_cost(cfg.checkpoint),
    }


def pretraining_cost(path):
    """Steps, seconds, GPU-hours and dollars behind a checkpoint of train.py, or None of one from elsewhere."""
    try:
        path = checkpoint.find(path)
        with open(os.path.join(path, "state.json"), encoding="utf-8") as file:
            state = json.load(file)
        with open(os.path.join(os.path.dirname(path), "log.jsonl"), encoding="utf-8") as file:
            start = json.loads(file.readline())
        gpu_hours = state["seconds"] * start["world_size"] / 3600
        price = start["config"]["price_per_gpu_hour"]
        dollars = gpu_hours * price if price else None
        budget = {name: start["config"].get(name, 0) for name in ("budget_minutes", "budget_dollars")}
        return {**state, "gpu_hours": gpu_hours, "dollars": dollars, **budget, "device": start["device"]}
    except (OSError, ValueError, KeyError, UserError):
        return None


def print_table(results):
    print(f"\n{'task':6} {'score':>6} {'95 %':>6}  {'seeds':5}  {'start':10}  metrics")
    for name, task in results["tasks"].items():
        interval = f"{task['score_ci95']:.2f}" if task["score_ci95"] is not None else "-"
        metrics = ", ".join(f"{metric} {100 * value['mean']:.2f}" for metric, value in task["metrics"].items())
        if task["majority_accuracy"]:
            metrics += f" (always the most frequent label: accuracy {100 * task['majority_accuracy']:.2f})"
        print(f"{name:6} {task['score']:6.2f} {interval:>6}  {len(task['seeds']):5}  {task['init']:10}  {metrics}")
    print(f"average of {len(results['tasks'])} tasks: {results['average']:.2f}")


def print_estimate(cfg, plan):
    """The plan, and how long it takes by steps timed on this device."""
    worker, total, steps = Worker(cfg), 0.0, 0
    print(f"{'task':6} {'examples':>9} {'steps':>8} {'seeds':>5} {'ms/step':>8} {'minutes':>8}  start")
    for run in [run for run in plan if run.first_seed]:
        data, model = worker.encoded(run.task)["train"], worker.classifier(dataclasses.replace(run, init="random"))
        train_step, times = Steps(model, run.settings, worker.process), []
        for batch in batches(run, data, worker.process.device):
            start = time.perf_counter()
            train_step(0.0, batch).item()
            times.append(time.perf_counter() - start)
            if len(times) == 200 or (len(times) > 2 and sum(times) > 5):  # enough for most shapes to be captured
                break
        count = sum(other.task == run.task for other in plan)
        ms = 1000 * float(np.median(times[1:] or times))
        minutes = count * run.num_steps * ms / 60_000
        total, steps = total + minutes, steps + count * run.num_steps
        row = f"{run.task.name:6} {run.num_examples:9,} {run.num_steps:8,} {count:5} {ms:8.1f} {minutes:8.1f}"
        print(f"{row}  {run.init}", flush=True)
    print(f"in all {steps:,} steps, {total:.1f} min on one {device_name(worker.process.device)} (scoring not counted)")


@command
def main(argv):
    cfg = load_config(GlueConfig, argv)
    cfg.check()
    pretrained = load_pretrained(cfg.checkpoint)
    if cfg.predict_file and not cfg.train_file:
        return predict_own(cfg, cfg.checkpoint)
    plan = make_plan(cfg, pretrained)
    if cfg.train_file:
        labels = plan[0].task.labels
        print(f"classification into {', '.join(labels)[:200]}" if labels else "regression", flush=True)
    if cfg.dry_run:
        return print_estimate(cfg, plan)
    rank = int(os.environ.get("RANK", 0))
    if os.path.exists(os.path.join(cfg.out, "log.jsonl")):
        raise UserError(f"{cfg.out}: holds a pretraining run (choose another --out)")
    with checkpoint.RunDirectory(cfg.out) if rank == 0 else nullcontext():  # refuses a second live suite
        for name in ("runs", "predictions"):
            os.makedirs(os.path.join(cfg.out, name), exist_ok=True)
        if cfg.jobs > 1:
            work_in_processes(cfg, plan)
        else:
            guarded_work(cfg, plan)
        if rank > 0:
            return
        results = summary(cfg, plan, pretrained)
        write_text(os.path.join(cfg.out, "glue.json"), json.dumps(results, indent=1))
        print_table(results)
        if cfg.submission:
            predictions = {}
            for file in glue.SUBMISSION.keys() - {"WNLI"}:
                with open(os.path.join(cfg.out, "predictions", f"{file}.test.json"), encoding="utf-8") as rows:
                    predictions[file] = json.load(rows)
            glue.write_submission(os.path.join(cfg.out, "glue_submission.zip"), predictions)
            print(f"{cfg.out}/glue_submission.zip: from the first seed; WNLI is the majority class")
        if cfg.train_file:
            print(f"{cfg.out}/model: the fine-tuned model of the first seed")
        if cfg.predict_file:
            predict_own(cfg, os.path.join(cfg.out, "model"))


def predict_own(cfg, path):
    """Label the texts of cfg.predict_file with a model that this script saved; writes OUT/predictions.tsv."""
    fine_tuned = load_pretrained(path)
    saved = fine_tuned.config.get("task")
    if not saved:
        raise UserError(f"{path}: not fine-tuned here, so there is nothing to predict (give --train_file and --val_file)")
    task = glue.Task("own", tuple(saved["text_columns"]), "", tuple(saved["labels"]), ())
    rows = glue.read_own(cfg.predict_file, task.text_columns, "", cfg)
    if not rows:
        raise UserError(f"{cfg.predict_file}: no texts (is the file empty?)")
    device, dtype = setup_device(cfg, fine_tuned.model_cfg)
    model = SequenceClassifier(fine_tuned.model_cfg, fine_tuned.vocab_size, max(1, len(task.labels)))
    found = checkpoint.find(path)
    checkpoint.load_weights(model, checkpoint.read_tensors(found, "model.safetensors"), found)
    encoded = encode(glue.Examples([tuple(cells) for _, cells in rows]), fine_tuned, saved["max_length"])
    scores = predict(model.to(device), encoded, Process(0, 1, device, dtype))
    lines = ["index\tprediction" + ("\tprobability\n" if task.labels else "\n")]
    best = torch.from_numpy(scores).softmax(1).max(1).values.tolist()
    for index, (output, probability) in enumerate(zip(outputs(task, scores).tolist(), best)):
        lines.append(f"{index}\t{task.labels[output]}\t{probability:.4f}\n" if task.labels else f"{index}\t{output:.4f}\n")
    os.makedirs(cfg.out, exist_ok=True)
    target = os.path.join(cfg.out, "predictions.tsv")
    write_text(target, "".join(lines))
    print(f"{target}: {len(rows)} predictions")


if __name__ == "__main__":
    main()
