"""Fine-tune on GLUE. Your own labels: python -m tools.finetune_own; the GLUE server's zip: python -m tools.glue_submission.

    python finetune_glue.py --checkpoint=out/base --out=out/base_glue

Each (task, seed) pair is a run. Any number of processes, from --jobs or torchrun, share the runs out among themselves; the
same command resumes a killed suite.

Read next: common/glue.py, the tasks, or common/run_queue.py
"""

import common  # noqa: F401, I001, before anything that may be missing

import dataclasses
import functools
import glob
import hashlib
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

import checkpoint
import kernels
from common import run_queue
from common.batch import round_up
from common.cuda_graphs import GraphedStep
from common.encoded import encode
from common.files import file_digest, gigabytes, hash_of, read_json, write_text
from common.glue import GLUE_TASKS, Task, part_of, read_task
from common.hub import check_hub_id
from common.labelled import write_table
from common.metrics import METRICS, as_text, ci95
from common.options import UserError, command, load_config, require
from common.processes import Process, device_name, memory_of, pick_device
from common.run_directory import RunDirectory, pretraining_cost
from common.tables import listed
from common.versions import versions
from common.vocabulary import load_tokenizer
from model import MAX_POSITIONS, ModelConfig, SequenceClassifier, choose_kernels

ADAM = {"betas": (0.9, 0.98), "eps": 1e-6}
EVAL_TOKENS = 32768  # per batch when scoring
LONGEST = 8192  # tokens that --max_length may ask for
STEP_COST = 1000  # fixed cost of a step, in tokens: for the order of the runs and the ETA
LOG_SECONDS = 10


@dataclass
class FineTuneConfig:
    # Model and results
    checkpoint: str = ""  # run or step_* directory, or a directory or hub id in Hugging Face form
    out: str = ""  # result directory; the same command resumes in it
    # Training
    recipe: Literal["mosaic", "fast"] = "mosaic"  # settings per task: the original's, or quicker ones
    seeds: int = 0  # runs per task; 0: the recipe's
    epochs: int = 0  # 0: the recipe's
    lr: float = 0.0  # peak learning rate; 0: the recipe's
    batch_size: int = 0  # examples per step; 0: the recipe's
    warmup_fraction: float = -1.0  # share of the steps in which the learning rate rises; below 0: the recipe's
    dropout: float = -1.0  # on hidden states; below 0: the recipe's, or what the model was pretrained with
    max_length: int = 256  # tokens per example; of a pair the longer text is truncated first
    random_weights: bool = False  # start from random weights, to see what pretraining contributes
    skip_bad_lines: int = 0  # malformed lines to skip per file before failing
    # Machine
    jobs: int = 1  # runs that share the device
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU if there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of matrix products and activations; regression: float32
    kernels: Literal["auto", "triton", "torch"] = "auto"  # auto: Triton kernels on GPUs, else PyTorch
    dry_run: bool = False  # check all inputs, time some steps, print the plan, and stop

    def check(self):
        """Raises: UserError for values that make no sense."""
        for name, hint in (("checkpoint", "a run directory, such as out/base"), ("out", "a directory for results")):
            if not getattr(self, name):
                raise UserError(f"--{name}: not given ({hint})")
        require(self, "seeds epochs batch_size skip_bad_lines", lambda x: x >= 0, "must be at least 0")
        require(self, "jobs", lambda x: x >= 1, "must be at least 1")
        hint = "attention grows with its square"
        require(self, "max_length", lambda x: 5 <= x <= LONGEST, f"must be 5 to {LONGEST} ({hint})")
        require(self, "lr", lambda x: 0 <= x <= 1, "must be between 0 and 1")
        require(self, "warmup_fraction dropout", lambda x: x < 1, "must be below 1")
        if os.path.exists(os.path.join(self.out, "log.jsonl")):
            raise UserError(f"{self.out}: holds a pretraining run (choose another --out)")


@dataclass
class GlueConfig(FineTuneConfig):
    # GLUE
    tasks: str = "mnli,qnli,qqp,rte,sst2,mrpc,cola,stsb"  # comma-separated; sst2:1 sets the number of seeds of one task
    data_dir: str = ""  # GLUE's TSV files, TASK/train.tsv and TASK/dev.tsv; empty: nyu-mll/glue from the hub

    def check(self):
        super().check()
        for task in self.seeds_of_tasks():
            if task not in GLUE_TASKS:
                raise UserError(f"tasks={self.tasks}: no task {task!r} (there are {', '.join(GLUE_TASKS)})")

    def seeds_of_tasks(self):
        """{task: number of seeds, 0 for the recipe's}, in the order given. Raises: UserError."""
        counts = {}
        for part in self.tasks.split(","):
            task, colon, count = part.partition(":")
            if colon and not (count.isdecimal() and int(count)):
                raise UserError(f"tasks={self.tasks}: {part!r} is not TASK:SEEDS (such as sst2:1)")
            task = task.lower().replace("-", "")  # SST-2, as GLUE's folders are called
            counts[task] = int(count) if colon else self.seeds
        return counts


# ---------------------------------------------------------------------------------------------------------------------
# Settings

FROM_MNLI = ("rte", "mrpc", "stsb")  # small tasks that gain from weights fine-tuned on MNLI


@dataclass(frozen=True)
class Settings:
    lr: float  # peak
    weight_decay: float  # AdamW's, which multiplies it by the learning rate
    batch_size: int
    epochs: int
    num_seeds: int
    warmup_fraction: float = 0.06
    dropout: float = -1.0  # below 0: as in pretraining


# "mosaic": the original's (mosaicml/examples, benchmarks/bert, glue/finetuning_jobs.py). It gives decoupled weight decay;
# AdamW's is that divided by lr: 5e-6 / 5e-5 = 0.1. RTE's 1e-5 / 1e-5 = 1 is ten times the others' there too.
# "fast": larger batches and fewer epochs where that costs nothing. STS-B keeps the original's batches, learning rate and
# epochs: batches of 64, lr 6e-5 and 6 epochs lost 3.2 points (results/README.md), more than the spread over seeds. The
# warm-up of a quarter, and the learning rates of CoLA, QNLI, QQP and SST-2, were chosen on parts of the training files
# (results/README.md, recipe_h200 and equal_minutes_h200), as models of fast.py learn less or nothing with 6 % and high rates.
# MNLI has 3e-5 because the training loss of one of them stayed where it was with 6e-5, the best on those parts.
RECIPES = {
    "mosaic": {
        "mnli": Settings(5e-5, 0.1, 48, 3, 1),
        "qnli": Settings(1e-5, 0.1, 16, 10, 1),
        "qqp": Settings(3e-5, 0.1, 16, 5, 1),
        "rte": Settings(1e-5, 1.0, 16, 3, 5),
        "sst2": Settings(3e-5, 0.1, 16, 3, 3),
        "mrpc": Settings(8e-5, 0.1, 32, 10, 5),
        "cola": Settings(5e-5, 0.1, 32, 10, 4),
        "stsb": Settings(3e-5, 0.1, 32, 10, 5),
    },
    "fast": {
        "mnli": Settings(3e-5, 0.1, 128, 2, 1, 0.25),
        "qnli": Settings(6e-5, 0.1, 128, 3, 1, 0.25),
        "qqp": Settings(3e-5, 0.1, 128, 3, 1, 0.25),
        "rte": Settings(2e-5, 0.1, 32, 3, 5),
        "sst2": Settings(6e-5, 0.1, 64, 2, 3, 0.25),
        "mrpc": Settings(8e-5, 0.1, 32, 5, 5, 0.25),
        "cola": Settings(3e-5, 0.1, 64, 6, 4, 0.25),
        "stsb": Settings(3e-5, 0.1, 32, 10, 5, 0.25),
    },
}
SEEDS = (19, 8364, 717, 10536, 90166)  # the original's; beyond them, count up from the last
MNLI_RUN = f"mnli.seed{SEEDS[0]}"  # whose weights FROM_MNLI start from


def first_seeds(count):
    """The first `count` seeds, a list of ints."""
    return [*SEEDS, *range(SEEDS[-1] + 1, SEEDS[-1] + 1 + count)][:count]


# ---------------------------------------------------------------------------------------------------------------------
# The pretrained model


@dataclass
class Pretrained:
    """What a checkpoint holds; weights on the CPU."""

    path: str  # of the step_* directory: a run that is still training writes later ones
    config: dict  # config.json
    model_cfg: ModelConfig
    tensors: dict  # {name: tensor} of the encoder, and its pooler if there is one
    tokenizer_text: str
    tokenizer: object
    special: dict  # {"[CLS]": id, ...}
    digest: str  # of tensors and tokenizer

    def encode(self, examples, max_length, name="texts"):
        """Encoded examples; BERT has no more than its positions."""
        limit = min(max_length, MAX_POSITIONS) if self.model_cfg.model == "bert" else max_length
        return encode(examples, self.tokenizer, limit, name, self.special["[UNK]"])


def load_pretrained(path, out):
    """The Pretrained in a run or checkpoint directory. Weights in Hugging Face form are converted into OUT first."""
    marks = (checkpoint.DIGESTS, "log.jsonl", "glue.json")  # the last is of a fine-tuning, whose models lie inside
    ours = checkpoint.steps(path) or any(os.path.exists(os.path.join(path, f)) for f in marks)
    return read_pretrained(checkpoint.find(path if ours else convert(path, out)))


@functools.cache
def read_pretrained(path):
    config, tensors, tokenizer_text = checkpoint.load(path)
    tensors = {name: tensor for name, tensor in tensors.items() if name.startswith("bert.")}
    digest = hashlib.sha256(tokenizer_text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy())
    tokenizer, special = load_tokenizer(path, tokenizer_text)
    model_cfg = checkpoint.model_config(config)
    return Pretrained(path, config, model_cfg, tensors, tokenizer_text, tokenizer, special, digest.hexdigest())


def convert(path, out):
    """OUT/converted_*, a run directory made once from weights in Hugging Face form: a directory or hub id.

    Its name says from what, so that one of a failed command is not in the way of the next. Rank 0 converts, and the others
    wait for the checkpoint, which appears when it is complete.
    """
    parent = os.path.dirname(path)
    if os.path.exists(os.path.join(parent, checkpoint.DIGESTS)):
        raise UserError(f"{path}: a file of a checkpoint (give its directory, {parent})")
    if not os.path.exists(path):
        check_hub_id(path, "directory", "expected a run, or a model's directory")
    files = [path] if os.path.isfile(path) else sorted(filter(os.path.isfile, glob.glob(f"{glob.escape(path)}/*")))
    source = hash_of([*map(file_digest, files)] or [path])  # of a hub id, its name
    run, root = os.path.join(out, f"converted_{source[:12]}"), os.path.dirname(os.path.abspath(__file__))
    if int(os.environ.get("RANK", 0)) == 0 and not checkpoint.steps(run):
        print(f"{path}: converting it into {run}", flush=True)
        environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        argv = [sys.executable, "-m", "tools.convert_hf", f"--from_hf={path}", f"--out={run}"]
        if status := subprocess.run(argv, env=environment).returncode:
            raise SystemExit(status)
    while not checkpoint.steps(run):
        time.sleep(0.5)
    if not checkpoint.newest(run):
        raise UserError(f"{run}: damaged (remove it, and the same command converts {path} again)")
    return run


def make_classifier(pretrained, num_labels, seed, random_weights=False, dropout=-1.0):
    """A SequenceClassifier with the pretrained weights. The classifier, and a missing pooler, are random.

    dropout: on hidden states; below 0: as in pretraining.
    """
    torch.manual_seed(seed)
    pad_id, cfg = pretrained.special["[PAD]"], pretrained.model_cfg
    if dropout >= 0:
        cfg = dataclasses.replace(cfg, hidden_dropout=dropout)
    model = SequenceClassifier(cfg, pretrained.config["vocab_size"], num_labels, pad_id)
    if not random_weights:
        weights = checkpoint.weights_of(model)
        new = {name: weights[name] for name in weights if name.startswith(("bert.pooler", "classifier"))}
        checkpoint.load_weights(model, {**new, **pretrained.tensors}, "checkpoint")
    return model


def load_classifier(path):
    """A fine-tuned SequenceClassifier, as Worker.save wrote it."""
    config, tensors, tokenizer_text = checkpoint.load(path)
    num_labels, (_, special) = max(1, len(config["task"]["labels"])), load_tokenizer(path, tokenizer_text)
    model = SequenceClassifier(checkpoint.model_config(config), config["vocab_size"], num_labels, special["[PAD]"])
    checkpoint.load_weights(model, tensors, path)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# One run


@dataclass(frozen=True)
class Run:
    """One task with one seed. See common/run_queue.py."""

    task: Task
    seed: int
    settings: Settings
    init: str  # "pretrained", "mnli" or "random"
    after: str  # name of the run whose weights it starts from, or ""
    artifact: str  # directory to keep its weights in, or ""
    num_examples: int
    num_dev: int  # examples that it is scored on
    num_steps: int
    cost: float  # in tokens
    identity: dict  # everything that changes its result

    @property
    def name(self):
        return f"{self.task.name}.seed{self.seed}"


def lr_at(settings, num_steps, step):
    """Learning rate of a step, counted from 1: linear warm-up from 0, then linear decay to 0."""
    warmup = round(settings.warmup_fraction * num_steps)
    done = step - 1
    return settings.lr * (done / warmup if done < warmup else (num_steps - done) / (num_steps - warmup))


def batches(encoded, settings, seed, device):
    """Yield every training batch. Differs from MosaicBERT: shuffled each epoch; it kept the order of the files."""
    for epoch in range(settings.epochs):
        order = np.random.default_rng([seed, epoch]).permutation(len(encoded.lengths))
        for start in range(0, len(order), settings.batch_size):
            yield encoded.batch(order[start : start + settings.batch_size], device)


def holds_squares(model_cfg, device):
    """Whether attention holds n x n numbers for a text of n tokens: MosaicBERT's in PyTorch. BERT reads at most 512."""
    return model_cfg.model != "bert" and not kernels.uses_triton(device)


class Steps:
    """The optimizer steps of one run, on GPUs as CUDA graphs."""

    def __init__(self, model, settings, process):
        self.model, self.process, self.lr = model, process, settings.lr
        # Attention in PyTorch copies the lengths to the host, which a graph cannot.
        use_graphs = process.device.type == "cuda" and not holds_squares(model.cfg, process.device)
        self.graphed = GraphedStep(self.step) if use_graphs else None
        # Fewer shapes: bert pads to max_seqlen; to the kernels it is a bound.
        self.seqlen_multiple = 32 if model.cfg.model == "bert" else 128
        if use_graphs:
            self.lr = torch.zeros((), device=process.device)  # graphs read its value at replay
        self.optimizer = torch.optim.AdamW(
            model.parameters(), self.lr, weight_decay=settings.weight_decay, fused=True, capturable=use_graphs, **ADAM
        )

    def __call__(self, lr, batch):
        """One step; returns the batch's mean loss, on the device."""
        if self.graphed:
            self.lr.fill_(lr)
            return self.graphed(dataclasses.replace(batch, max_seqlen=round_up(batch.max_seqlen, self.seqlen_multiple)))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return self.step(batch)

    def step(self, batch):
        with self.process.autocast():
            scores = self.model(batch)
        scores = scores.float()
        if scores.shape[1] == 1:
            loss = F.mse_loss(scores[:, 0], batch.labels.float())
        else:
            loss = F.cross_entropy(scores, batch.labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def write_record(log, event, **values):
    log.write(json.dumps({"event": event, **values}) + "\n")
    log.flush()


def train(run, model, encoded, process, log, say):
    """Every step of a run; logs the mean loss of every 100 steps or 10 seconds. Raises: UserError if it is not finite."""
    if run.task.scale:
        mean, deviation = run.task.scale
        encoded = dataclasses.replace(encoded, labels=(encoded.labels - mean) / deviation)
    train_step = Steps(model, run.settings, process)
    model.train()
    reported, losses = time.perf_counter(), []  # losses since the last record, on the device
    for step, batch in enumerate(batches(encoded, run.settings, run.seed, process.device), 1):
        lr = lr_at(run.settings, run.num_steps, step)
        losses.append(train_step(lr, batch))
        slow = time.perf_counter() - reported > LOG_SECONDS
        if len(losses) < 100 and step < run.num_steps and not slow:
            continue
        loss = torch.stack(losses).mean().item()
        if not math.isfinite(loss):
            raise UserError(f"{run.name}: loss is {loss} at step {step} (try a lower --lr)")
        write_record(log, "train", step=step, loss=loss, lr=lr)
        if slow:
            say(f"{run.name}: step {step} of {run.num_steps}, loss {loss:.4f}")
            reported = time.perf_counter()
        losses = []
    if run.task.scale:
        with torch.no_grad():  # from here on the model predicts in the labels' unit
            model.classifier.weight.mul_(deviation)
            model.classifier.bias.mul_(deviation).add_(mean)


@torch.no_grad()
def predict(model, encoded, process):
    """(n, num_labels) float32 array of scores. Batches hold examples of similar length."""
    model.eval()
    order = np.argsort(encoded.lengths, kind="stable")
    scores = []
    longest = int(encoded.lengths.max())
    batch_size = max(1, EVAL_TOKENS // longest)
    if holds_squares(model.cfg, process.device):  # 3 * 12 heads * 4 bytes * LONGEST^2 = 10 GB for these
        batch_size = max(1, min(batch_size, LONGEST**2 // longest**2))
    for start in range(0, len(order), batch_size):
        with process.autocast():
            scores.append(model(encoded.batch(order[start : start + batch_size], process.device)).float())
    return torch.cat(scores).cpu().numpy()[np.argsort(order)]


def to_predictions(task, scores):
    """(n,) array: the likeliest classes, or the numbers of a regression."""
    return scores.argmax(1) if task.labels else scores[:, 0].astype(np.float64)


def write_predictions(path, task, predictions, encoded):
    columns = encoded.labels.tolist(), predictions.tolist()
    if task.labels:
        columns = [[task.labels[value] for value in column] for column in columns]
    write_table(path, ("index", "label", "prediction"), zip(encoded.index, *columns))


class Worker:
    """What a process keeps between runs: device, pretrained weights, last task's tokens. read(task): {split: Examples}"""

    def __init__(self, cfg, read):
        self.cfg, self.read = cfg, read
        self.pretrained = load_pretrained(cfg.checkpoint, cfg.out)
        device, self.dtype = pick_device(cfg.device, cfg.dtype)
        choose_kernels(cfg.kernels, self.pretrained.model_cfg, device)
        if device.type == "cuda":
            torch.cuda.set_stream(torch.cuda.Stream())  # the default stream cannot be captured
        self.process = Process(0, 1, device, self.dtype)
        self.task = self.data = None

    def encoded(self, run):
        """{split: Encoded} of a run's task. Raises: UserError if its training cannot fit into memory."""
        if self.task != (task := run.task):
            examples = self.read(task)
            limit, name = self.cfg.max_length, task.name
            self.data = {split: self.pretrained.encode(part, limit, f"{name} {split}") for split, part in examples.items()}
            self.task = task
            start, longest = self.pretrained.config, int(self.data["train"].lengths.max())
            trained = start.get("seq_length", longest)  # unknown of converted weights
            if start["model"] == "bert" and longest > trained and not start.get("init_from") and run.init != "random":
                text = f"BERT's positions from {trained + 1} to {longest} were never trained"
                print(f"warning: {name}: {text} (--max_length={trained} stays within the trained ones)", flush=True)
        self.check_memory(self.data["train"].lengths, run.settings.batch_size)
        return self.data

    def check_memory(self, lengths, batch_size):
        """Raises: UserError if the n x n numbers that attention saves per text, head and layer surely do not fit."""
        model_cfg, device = self.pretrained.model_cfg, self.process.device
        if not holds_squares(model_cfg, device):
            return
        squares = np.square(lengths, dtype=np.float64)
        pairs = max(squares.max(), squares.mean() * min(batch_size, len(lengths)))  # no less in the largest batch
        needed = 4 * model_cfg.num_layers * model_cfg.num_heads * pairs
        if (memory := memory_of(device)) < needed:
            sizes = f"{gigabytes(needed)} for attention, and there are {gigabytes(memory)}"
            hint = "lower --max_length or --batch_size"
            raise UserError(f"max_length={self.cfg.max_length}: texts of up to {lengths.max():,} tokens take {sizes} ({hint})")

    def classifier(self, run):
        """The model of a run before its first step."""
        self.set_precision(run.task)
        mnli = os.path.join(self.cfg.out, "mnli")
        start = load_pretrained(mnli, self.cfg.out) if run.init == "mnli" else self.pretrained
        model = make_classifier(start, max(1, len(run.task.labels)), run.seed, run.init == "random", run.settings.dropout)
        return model.to(self.process.device)

    def set_precision(self, task):
        """Regression in float32, as STS-B in the original, with TF32 products, which Composer allows
        (mosaicml/composer#1275)."""
        self.process.dtype = self.dtype if task.labels else torch.float32
        torch.set_float32_matmul_precision("highest" if task.labels else "high")

    def run(self, run, log, say):
        """Train and score, with records in `log`; returns the scores in one line."""
        data, model = self.encoded(run), self.classifier(run)
        write_record(
            log, "start", identity=run.identity, **versions(), device=device_name(self.process.device),
            dtype=str(self.process.dtype).removeprefix("torch."), jobs=self.cfg.jobs, num_steps=run.num_steps,
        )  # fmt: skip
        start, metrics = time.perf_counter(), {}
        train(run, model, data["train"], self.process, log, say)
        for split in (split for split in run.task.dev_splits if split in data):
            predictions = to_predictions(run.task, predict(model, data[split], self.process))
            suffix = split.removeprefix("validation")  # "", "_matched" or "_mismatched"
            for name in (*run.task.metrics, *run.task.shown):
                metrics[name + suffix] = METRICS[name](predictions, data[split].labels)
            several = run.task.labels and split == run.task.dev_splits[0] and len(np.unique(data[split].labels)) > 1
            if several and len(np.unique(predictions)) == 1:
                hint = "it has not learned; try a longer warm-up, or another --lr"
                print(f"warning: {run.name}: predicts {run.task.labels[predictions[0]]!r} for every example ({hint})", flush=True)
            file = f"{run.task.name}{suffix.replace('_matched', '')}.seed{run.seed}.tsv"
            write_predictions(os.path.join(self.cfg.out, "predictions", file), run.task, predictions, data[split])
        if run.artifact:
            self.save(run, model)
        labels = data[run.task.dev_splits[0]].labels
        majority = float(np.unique(labels, return_counts=True)[1].max() / len(labels)) if run.task.labels else None
        seconds = time.perf_counter() - start
        write_record(log, "end", metrics=metrics, majority_accuracy=majority, seconds=round(seconds, 3))
        scores = ", ".join(as_text(name, value) for name, value in metrics.items())
        return f"{run.name}: {scores} in {seconds:.1f} s"

    def save(self, run, model):
        """Write the weights as a checkpoint, with what it takes to predict with them."""
        task = {"labels": run.task.labels, "text_columns": run.task.text_columns, "max_length": self.cfg.max_length}
        start = self.pretrained
        paths = {"pretrained": start.path, "mnli": os.path.join(self.cfg.out, "mnli"), "random": None}
        config = {
            "format": checkpoint.FORMAT, **vars(start.model_cfg), "vocab_size": start.config["vocab_size"],
            "tokenizer_sha256": start.config.get("tokenizer_sha256"), "task": task, "fine_tuned_from": paths[run.init],
        }  # fmt: skip
        if run.init != "random" and "converted_from" in start.config:
            config["converted_from"] = start.config["converted_from"]
        texts = {"config.json": json.dumps(config, indent=1), "tokenizer.json": start.tokenizer_text}
        os.makedirs(run.artifact, exist_ok=True)
        checkpoint.save(run.artifact, run.num_steps, {"model.safetensors": checkpoint.weights_of(model)}, texts)


# ---------------------------------------------------------------------------------------------------------------------
# All runs


def make_plan(cfg, pretrained):
    """Every Run of cfg.tasks: MNLI's first, which others wait for, then the longest first. Reads every file once."""
    counts, plan = cfg.seeds_of_tasks(), []
    for name, num_seeds in counts.items():
        task, settings = GLUE_TASKS[name], RECIPES[cfg.recipe][name]
        init = "mnli" if "mnli" in counts and name in FROM_MNLI else "pretrained"
        keep = os.path.join(cfg.out, "mnli") if name == "mnli" else ""
        plan += make_runs(cfg, pretrained, task, read_task(cfg, task), settings, num_seeds, init, keep)
    return sorted(plan, key=lambda run: (run.name != MNLI_RUN, -run.cost))


def make_runs(cfg, pretrained, task, examples, settings, num_seeds, init="pretrained", keep=""):
    """The Runs of one task, one per seed. num_seeds: 0 for the settings'. keep: directory for the first seed's weights."""
    given = {"lr": cfg.lr, "batch_size": cfg.batch_size, "epochs": cfg.epochs, "num_seeds": num_seeds}
    given = {name: value for name, value in given.items() if value}
    given |= {name: value for name in ("warmup_fraction", "dropout") if (value := getattr(cfg, name)) >= 0}
    settings = dataclasses.replace(settings, **given)
    init = "random" if cfg.random_weights else init
    texts = examples["train"].texts
    num_steps = settings.epochs * math.ceil(len(texts) / settings.batch_size)
    tokens = settings.epochs * sum(2 + sum(map(len, text)) / 4 for text in texts)  # about four characters per token
    identity = {
        "task": task.name, "init": init, **dataclasses.asdict(settings), "max_length": cfg.max_length,
        "checkpoint": pretrained.digest, "data": hash_of([part.digest() for part in examples.values()]),
    }  # fmt: skip
    del identity["num_seeds"]
    if cfg.dtype != "auto":
        identity["dtype"] = cfg.dtype
    if task.name not in GLUE_TASKS:  # whose classes may be renamed
        identity |= {"labels": list(task.labels), "scale": list(task.scale)}
    return [
        Run(
            task=task,
            seed=seed,
            settings=settings,
            init=init,
            after=MNLI_RUN if init == "mnli" else "",
            artifact=keep if seed == SEEDS[0] else "",
            num_examples=len(texts),
            num_dev=sum(len(part.texts) for split, part in examples.items() if split != "train"),
            num_steps=num_steps,
            cost=tokens + STEP_COST * num_steps,
            identity={**identity, "seed": seed},
        )
        for seed in first_seeds(settings.num_seeds)
    ]


def fine_tune(cfg, pretrained, plan, read):
    """Finish every run of the plan, then write OUT/glue.json and print the table. read(task): {split: Examples}.

    Returns what glue.json holds; None after a dry run, and on ranks other than 0.
    """
    rank, earlier = int(os.environ.get("RANK", 0)), earlier_results(cfg, pretrained, plan)
    if rank == 0:
        if before := pretrained.config.get("task"):
            into = f"on labels {listed(before['labels'])}" if before["labels"] else "on numbers"
            print(f"{cfg.checkpoint}: fine-tuned {into} before: that classifier is left out, and a new one is trained", flush=True)
        print_plan(plan)
    runs = os.path.join(cfg.out, "runs")
    finished = [run for run in plan if run_queue.result(runs, run)]
    check_kept(finished)
    if cfg.dry_run:
        return print_estimate(plan, Worker(cfg, read))
    with RunDirectory(cfg.out, writes=rank == 0):  # refuses a second live suite
        os.makedirs(os.path.join(cfg.out, "predictions"), exist_ok=True)
        if rank == 0 and finished:
            rest = "the others are trained" if len(finished) < len(plan) else "nothing is trained"
            print(f"{cfg.out}: {len(finished)} of {plural(len(plan), 'run')} finished before: {rest}", flush=True)
        pinned = dataclasses.replace(cfg, checkpoint=pretrained.path)  # the same for every worker
        run_queue.finish(runs, plan, functools.partial(Worker, pinned, read), cfg.jobs)
        if rank > 0:
            return None
        results = summarize(cfg, plan, pretrained, earlier)
        write_text(os.path.join(cfg.out, "glue.json"), json.dumps(results, indent=1))
        print_table(results)
        return results


def check_kept(finished):
    """Raises: UserError if the weights that a finished run left are damaged."""
    for run in finished:
        if run.artifact and not checkpoint.newest(run.artifact):
            hint = "restore it from a copy; or remove it, and the same command trains it again"
            raise UserError(f"{run.artifact}: the fine-tuned model is damaged ({hint})")


def print_plan(plan):
    """What each task is trained with."""
    for run in {run.task: run for run in plan}.values():
        settings, seeds = run.settings, sum(other.task == run.task for other in plan)
        part = part_of(run.task.name, {"train_examples": run.num_examples, "dev_examples": run.num_dev})
        print(
            f"{run.task.name}: {run.num_examples:,} examples{f' ({part})' if part else ''}, "
            f"{plural(settings.epochs, 'epoch')}, "
            f"{plural(run.num_steps, 'step')} of {settings.batch_size}, peak lr {settings.lr:g}, "
            f"warm-up {settings.warmup_fraction:.0%}{f', dropout {settings.dropout:g}' if settings.dropout >= 0 else ''}, "
            f"{plural(seeds, 'seed')}, from {run.init}",
            flush=True,
        )
        if settings.batch_size > run.num_examples:
            text = f"batch_size={settings.batch_size} is more than the {run.num_examples:,} examples of {run.task.name}"
            print(f"warning: {text}: an epoch is one step, {run.num_steps} in all (lower --batch_size)", flush=True)


def plural(count, what):
    return f"{count:,} {what}{'s' * (count > 1)}"


# ---------------------------------------------------------------------------------------------------------------------
# The table


def summarize(cfg, plan, pretrained, earlier):
    """What glue.json holds: this plan's tasks, and those of earlier commands in the same directory."""
    tasks = earlier.get("tasks", {})
    for name in {run.task.name for run in plan}:
        runs = [run for run in plan if run.task.name == name]  # in the order of their seeds
        ends = [run_queue.result(os.path.join(cfg.out, "runs"), run) for run in runs]
        metrics = {}
        for metric in ends[0]["metrics"]:
            values = [end["metrics"][metric] for end in ends]
            metrics[metric] = {"values": values, "mean": float(np.mean(values)), "ci95": ci95(values)}
        scored = [metric for metric in metrics if metric not in runs[0].task.shown]
        per_seed = [100 * float(np.mean(column)) for column in zip(*(metrics[metric]["values"] for metric in scored))]
        tasks[name] = {
            "metrics": metrics,
            "scores": per_seed,
            "score": float(np.mean(per_seed)),
            "score_ci95": ci95(per_seed),
            "majority_accuracy": ends[0]["majority_accuracy"],
            "seeds": [run.seed for run in runs],
            "seconds": round(sum(end["seconds"] for end in ends), 3),
            "train_examples": runs[0].num_examples,
            "dev_examples": runs[0].num_dev,
            "official_examples": runs[0].task.rows,
            "init": runs[0].init,
            "settings": dataclasses.asdict(runs[0].settings),
        }
    tasks = {name: tasks[name] for name in dict.fromkeys([*GLUE_TASKS, *tasks]) if name in tasks}
    return {
        "tasks": tasks,
        "average": float(np.mean([task["score"] for task in tasks.values()])),
        "complete": set(tasks) == set(GLUE_TASKS),
        "checkpoint": cfg.checkpoint,
        **shared_options(cfg, pretrained),
        "model": pretrained.model_cfg.model,
        "num_layers": pretrained.model_cfg.num_layers,
        "pretraining": pretraining_cost(pretrained.path),
    }


def shared_options(cfg, pretrained):
    """What all tasks in one --out have in common, or their average would mean nothing."""
    names = ("recipe", "epochs", "lr", "batch_size", "max_length", "random_weights", "dtype")
    return {"checkpoint_sha256": pretrained.digest, **{name: getattr(cfg, name) for name in names}}


def earlier_results(cfg, pretrained, plan):
    """What OUT/glue.json holds, {} if there is none. Raises: UserError if its tasks had other options or another start."""
    path = os.path.join(cfg.out, "glue.json")
    if not os.path.exists(path):
        return {}
    earlier, options = read_json(path, "not written by finetune_glue.py"), shared_options(cfg, pretrained)
    if not isinstance(earlier.get("tasks"), dict):
        raise UserError(f"{path}: not written by finetune_glue.py (choose another --out)")
    names = [name for name in options if earlier.get(name, options[name]) != options[name]]  # missing: older code
    starts = {task["init"] for name, task in earlier["tasks"].items() if name in FROM_MNLI}
    if len(starts | {run.init for run in plan if run.task.name in FROM_MNLI}) > 1:
        names.append("starts of RTE, MRPC or STS-B, with and without mnli among the --tasks")
    if names:
        raise UserError(f"{path}: holds results with different {', '.join(names)} (choose another --out)")
    return earlier


def print_table(results):
    print(f"\n{'task':6} {'score':>6} {'95 %':>6}  {'seeds':5}  {'start':10}  metrics")
    parts = 0
    for name, task in results["tasks"].items():
        interval = f"{task['score_ci95']:.2f}" if task["score_ci95"] is not None else "-"
        metrics = ", ".join(as_text(metric, value["mean"]) for metric, value in task["metrics"].items())
        if task["majority_accuracy"]:
            metrics += f" (always the most frequent label: accuracy {100 * task['majority_accuracy']:.2f})"
        if part := part_of(name, task):
            metrics, parts = f"{metrics}; {part}", parts + 1
        print(f"{name:6} {task['score']:6.2f} {interval:>6}  {len(task['seeds']):5}  {task['init']:10}  {metrics}")
    if len(results["tasks"]) > 1:
        partial = f", {parts} of them from a part of GLUE's data" if parts else ""
        print(f"average of {len(results['tasks'])} tasks{partial}: {results['average']:.2f}")


def print_estimate(plan, worker):
    """How long the plan will take: some steps of each task are timed on this device."""
    total, device = 0.0, worker.process.device
    for run in {run.task: run for run in plan}.values():  # any seed will do
        data, model = worker.encoded(run)["train"], worker.classifier(dataclasses.replace(run, init="random"))
        train_step, times = Steps(model, run.settings, worker.process), []
        for batch in batches(data, run.settings, run.seed, device):
            start = time.perf_counter()
            train_step(0.0, batch).item()
            times.append(time.perf_counter() - start)
            if len(times) == 200 or (len(times) > 2 and sum(times) > 5):  # enough to have captured most shapes
                break
        ms = 1000 * float(np.median(times[1:] or times))
        minutes = sum(other.num_steps for other in plan if other.task == run.task) * ms / 60_000
        total += minutes
        print(f"{run.task.name}: {ms:.1f} ms/step, {minutes:.1f} minutes", flush=True)
    steps = sum(run.num_steps for run in plan)
    print(f"in all {steps:,} steps, {total:.1f} min on one {device_name(device)}, without scoring")


@command
def main(argv):
    cfg = load_config(GlueConfig, argv)
    cfg.check()
    pretrained = load_pretrained(cfg.checkpoint, cfg.out)
    fine_tune(cfg, pretrained, make_plan(cfg, pretrained), functools.partial(read_task, cfg))


if __name__ == "__main__":
    main()
