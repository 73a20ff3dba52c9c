"""Labelled text: the eight GLUE tasks and your own files. Settings, reading, metrics, and the GLUE server's zip.

Read next: finetune_glue.py, which trains on what this reads
"""

import csv
import hashlib
import json
import os
import zipfile
from collections import Counter
from dataclasses import dataclass

import numpy as np

from common.options import UserError
from common.files import whole_file
from common.sources import numbered_lines, skip_or_fail, split_suffixes

# ---------------------------------------------------------------------------------------------------------------------
# Tasks


@dataclass(frozen=True)
class Task:
    name: str
    text_columns: tuple  # one, or two for pairs
    label_column: str
    labels: tuple  # words in the order of their numbers; () for regression
    metrics: tuple  # names in METRICS; their mean is the score
    folder: str = ""  # of GLUE's TSV files
    hub_columns: tuple = ()  # where the hub's names differ from GLUE's own
    shown: tuple = ()  # further metrics that do not enter the score


YES_NO, ENTAILS = ("0", "1"), ("entailment", "not_entailment")  # in the hub's order
PAIR = ("sentence1", "sentence2")
GLUE_TASKS = {
    task.name: task
    for task in (
        Task("mnli", PAIR, "gold_label", ("entailment", "neutral", "contradiction"), ("accuracy",), "MNLI",
             ("premise", "hypothesis")),
        Task("qnli", ("question", "sentence"), "label", ENTAILS, ("accuracy",), "QNLI"),
        Task("qqp", ("question1", "question2"), "is_duplicate", YES_NO, ("accuracy", "f1"), "QQP"),
        Task("rte", PAIR, "label", ENTAILS, ("accuracy",), "RTE"),
        Task("sst2", ("sentence",), "label", YES_NO, ("accuracy",), "SST-2"),
        Task("mrpc", ("#1 String", "#2 String"), "Quality", YES_NO, ("accuracy", "f1"), "MRPC", PAIR),
        Task("cola", ("sentence",), "label", YES_NO, ("matthews",), "CoLA"),
        Task("stsb", PAIR, "score", (), ("spearman",), "STS-B", shown=("pearson",)),
    )
}  # fmt: skip
FROM_MNLI = ("rte", "mrpc", "stsb")  # small tasks that gain from starting at weights tuned on MNLI


@dataclass(frozen=True)
class Settings:
    lr: float  # peak
    weight_decay: float  # AdamW's, times the learning rate
    batch_size: int
    epochs: int
    num_seeds: int


# "mosaic": the original's (mosaicml/examples, benchmarks/bert, glue/finetuning_jobs.py). Its decoupled weight decay is
# given as AdamW's, divided by lr: 5e-6 / 5e-5 = 0.1; RTE's, 1e-5 / 1e-5 = 1, is ten times the others' there too.
# "fast": larger batches and fewer epochs where that costs nothing. STS-B keeps the original's settings: with batches of
# 64, 6e-5 and 6 epochs it lost 3.2 points (results/README.md), more than seeds differ by.
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
        "own": Settings(5e-5, 0.1, 32, 5, 1),
    },
    "fast": {
        "mnli": Settings(1e-4, 0.1, 128, 2, 1),
        "qnli": Settings(5e-5, 0.1, 128, 3, 1),
        "qqp": Settings(1e-4, 0.1, 128, 3, 1),
        "rte": Settings(2e-5, 0.1, 32, 3, 5),
        "sst2": Settings(6e-5, 0.1, 64, 2, 3),
        "mrpc": Settings(8e-5, 0.1, 32, 5, 5),
        "cola": Settings(7e-5, 0.1, 64, 6, 4),
        "stsb": Settings(3e-5, 0.1, 32, 10, 5),
        "own": Settings(1e-4, 0.1, 128, 3, 1),
    },
}
SEEDS = (19, 8364, 717, 10536, 90166)  # the original's; further ones count up from the last


def seeds(count):
    """The first `count` seeds, a list of ints."""
    return [*SEEDS, *range(SEEDS[-1] + 1, SEEDS[-1] + 1 + count)][:count]


# ---------------------------------------------------------------------------------------------------------------------
# Reading


@dataclass
class Examples:
    """texts: tuples of one or two strings. labels: (n,) int64 classes or float64 scores, or None. index: for the zip."""

    texts: list
    labels: np.ndarray | None = None
    index: list | None = None

    def digest(self):
        """sha256 of everything, in hexadecimal."""
        digest = hashlib.sha256(json.dumps(self.texts).encode("utf-8", "surrogatepass"))
        digest.update(b"" if self.labels is None else self.labels.tobytes())
        return digest.hexdigest()


def dev_splits(task):
    """The splits a task is scored on."""
    return ("validation_matched", "validation_mismatched") if task.name == "mnli" else ("validation",)


def read_split(task, split, cfg):
    """The Examples of a GLUE task's "train", "validation" or "test" (MNLI's with _matched or _mismatched), from TSV
    files in cfg.data_dir, or from the hub where that is empty. Raises: UserError naming file and line."""
    if not cfg.data_dir:
        return read_hub(task, split)
    path = find_file(os.path.join(cfg.data_dir, task.folder), split)
    labelled = not split.startswith("test")
    index = "id" if task.name == "qqp" else "index"  # of the test sets, for the server
    wanted = [*task.text_columns, task.label_column if labelled else index]
    headless = ["source", "label", "original_label", "sentence"] if task.name == "cola" and labelled else None
    rows = tsv_rows(path, wanted, cfg, headless)
    return examples_of(rows, path, task.labels, labelled)


def find_file(folder, split):
    """The path of a split's TSV file, plain or compressed, under GLUE's name or the hub's."""
    names = [split, split.replace("validation", "dev")]
    for name in [f"{name}.tsv{suffix}" for name in names for suffix in ("", ".gz", ".xz")]:
        if os.path.exists(os.path.join(folder, name)):
            return os.path.join(folder, name)
    raise UserError(f"{folder}: no {names[1]}.tsv (GLUE's layout is TASK/train.tsv and TASK/dev.tsv, also .gz or .xz)")


def tsv_rows(path, columns, cfg, headless=None):
    """(line number, cells of `columns`) of each row of a TSV file. Quotes are literal; headless: names if there is no
    header, as in GLUE's own CoLA."""
    bad_lines, header, places = Counter(), None, None
    for number, line in numbered_lines(path, cfg, bad_lines):
        cells = line.split("\t")
        if header is None:
            header = headless if headless and columns[0] not in cells and len(cells) == len(headless) else cells
            missing = [name for name in columns if name not in header]
            if missing:
                raise UserError(f"{path}:{number}: no column {missing[0]!r} (found: {', '.join(header)[:200]})")
            places = [header.index(name) for name in columns]
            if header is cells:
                continue
        if len(cells) != len(header):
            text = f"{len(cells)} columns, expected {len(header)} (--skip_bad_lines=N leaves out up to N such lines)"
            skip_or_fail(cfg, bad_lines, f"{path}:{number}: {text}")
            continue
        yield number, [cells[place] for place in places]


def examples_of(rows, path, labels, labelled=True):
    """Examples out of (line number, [text..., label or index]). labels: the words there may be; () for numbers."""
    texts, last = [], []
    numbers = {word: i for i, word in enumerate(labels)}
    for number, (*text, cell) in rows:
        texts.append(tuple(text))
        if not labelled:
            last.append(cell)
        elif labels and cell not in numbers:
            raise UserError(f"{path}:{number}: unknown label {cell!r} (expected one of {', '.join(labels)[:200]})")
        else:
            last.append(numbers[cell] if labels else to_number(cell, f"{path}:{number}"))
    if not texts:
        raise UserError(f"{path}: no examples (is the file empty?)")
    if not labelled:
        return Examples(texts, index=last)
    return Examples(texts, np.array(last, np.int64 if labels else np.float64))


def to_number(cell, where):
    try:
        number = float(cell)
    except ValueError:
        number = np.nan
    if not np.isfinite(number):
        raise UserError(f"{where}: label {cell!r} is not a number")
    return number


def read_hub(task, split):
    """A split of nyu-mll/glue from the hub (or the cache of `datasets`, offline)."""
    try:
        import datasets

        rows = datasets.load_dataset("nyu-mll/glue", task.name, split=split)
    except Exception as error:  # whatever the network and the libraries between raise
        reason = f"{type(error).__name__}: {error}"[:200]
        raise UserError(f"nyu-mll/glue {task.name}: cannot be read: {reason} (or give --data_dir)") from None
    columns = task.hub_columns or task.text_columns
    texts = list(zip(*(rows[column] for column in columns)))
    if split.startswith("test") or task.name == "ax":
        return Examples(texts, index=[str(index) for index in rows["idx"]])
    return Examples(texts, np.array(rows["label"], np.int64 if task.labels else np.float64))


def read_own(path, text_columns, label_column, cfg):
    """(line number, [text..., label]) of a .csv, .tsv or .jsonl file; no label when label_column is empty."""
    columns = [*text_columns, *([label_column] if label_column else [])]
    kind, _ = split_suffixes(path)
    if kind == ".tsv":
        return list(tsv_rows(path, columns, cfg))
    if kind == ".csv":
        return list(csv_rows(path, columns, cfg))
    if kind in (".jsonl", ".json"):
        return list(json_rows(path, columns, cfg))
    raise UserError(f"{path}: unknown suffix (expected .csv, .tsv or .jsonl, also with .gz or .xz)")


def csv_rows(path, columns, cfg):
    bad_lines = Counter()
    reader = csv.reader((line + "\n" for _, line in numbered_lines(path, cfg, bad_lines)), strict=True)
    header = None
    try:
        for cells in reader:
            if header is None:
                header = cells
                missing = [name for name in columns if name not in header]
                if missing:
                    raise UserError(f"{path}:1: no column {missing[0]!r} (found: {', '.join(header)[:200]})")
            elif len(cells) == len(header):
                yield reader.line_num, [cells[header.index(name)] for name in columns]
            elif cells:
                text = f"{path}:{reader.line_num}: {len(cells)} columns, expected {len(header)}"
                skip_or_fail(cfg, bad_lines, f"{text} (is a comma outside quotes?)")
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: {error} (is a quote not closed?)") from None


def json_rows(path, columns, cfg):
    bad_lines = Counter()
    for number, line in numbered_lines(path, cfg, bad_lines):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            cells = [record[name] for name in columns]
        except (ValueError, RecursionError) as error:
            skip_or_fail(cfg, bad_lines, f"{path}:{number}: not valid JSON: {error} (expected one object a line)")
        except (KeyError, TypeError):
            skip_or_fail(cfg, bad_lines, f"{path}:{number}: not an object with {', '.join(map(repr, columns))}")
        else:
            if None in cells:
                skip_or_fail(cfg, bad_lines, f"{path}:{number}: {columns[cells.index(None)]!r} is null")
                continue
            yield number, [cell if isinstance(cell, str) else json.dumps(cell) for cell in cells]


def own_task(cfg):
    """The Task that cfg.train_file's labels make: classification if they are words or few whole numbers, else
    regression. cfg.problem decides otherwise."""
    columns = tuple(cfg.text_columns.split(","))
    rows = read_own(cfg.train_file, columns, cfg.label_column, cfg)
    for number, cells in rows:
        if not cells[-1].strip():
            raise UserError(f"{cfg.train_file}:{number}: the label is empty (label the row, or leave it out)")
    words = {cells[-1] for _, cells in rows}
    try:
        numbers = [float(word) for word in words]
        regression = len(words) > 20 or not all(number.is_integer() for number in numbers)
    except ValueError:
        regression = False
    if cfg.problem != "auto":
        regression = cfg.problem == "regression"
    if len(words) < 2:
        raise UserError(f"{cfg.train_file}: {len(words)} different labels in {cfg.label_column!r} (at least two)")
    if regression:
        return Task("own", columns, cfg.label_column, (), ("pearson", "spearman"))
    return Task("own", columns, cfg.label_column, tuple(sorted(words)), ("accuracy", "macro_f1"))


# ---------------------------------------------------------------------------------------------------------------------
# Metrics: of predictions and labels, two (n,) arrays. Class 1 is the positive one. 0 where nothing is defined.


def accuracy(predictions, labels):
    return float((predictions == labels).mean())


def f1(predictions, labels, positive=1):
    """2 TP / (2 TP + FP + FN)."""
    predicted, actual = predictions == positive, labels == positive
    total = predicted.sum() + actual.sum()
    return float(2 * (predicted & actual).sum() / total) if total else 0.0


def macro_f1(predictions, labels):
    """The mean of every class's F1, over the classes that occur."""
    return float(np.mean([f1(predictions, labels, label) for label in np.union1d(predictions, labels)]))


def matthews(predictions, labels):
    """Matthews' correlation of two binary variables: Pearson's, of 0s and 1s."""
    return pearson(predictions, labels)


def pearson(predictions, labels):
    """Pearson's correlation; 0 when one side is constant (GLUE's own would be NaN)."""
    x, y = np.asarray(predictions, np.float64), np.asarray(labels, np.float64)
    if (x == x[0]).all() or (y == y[0]).all():
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    return float((x / np.linalg.norm(x)) @ (y / np.linalg.norm(y)))


def spearman(predictions, labels):
    """Pearson's correlation of the ranks, ties given their mean rank."""
    return pearson(ranks(predictions), ranks(labels))


def ranks(values):
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[group]


METRICS = {
    "accuracy": accuracy, "f1": f1, "macro_f1": macro_f1, "matthews": matthews, "pearson": pearson,
    "spearman": spearman,
}  # fmt: skip

# Quantiles 0.975 of Student's t for 1 to 30 degrees of freedom; beyond, the normal distribution's 1.96.
T_975 = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010, 2.1788, 2.1604, 2.1448,
    2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860, 2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484,
    2.0452, 2.0423,
)  # fmt: skip


def ci95(values):
    """Half the width of the 95 % interval of the mean by Student's t; None for a single value."""
    n = len(values)
    if n < 2:
        return None
    return (T_975[n - 2] if n <= len(T_975) + 1 else 1.96) * float(np.std(values, ddof=1)) / n**0.5


# ---------------------------------------------------------------------------------------------------------------------
# The GLUE server's zip

# file: (task, split, rows of the official test set). WNLI is not trained on: its test rows all get the majority class
# of the training set, "0", as BERT's authors did; it has no test file to read.
SUBMISSION = {
    "AX": ("ax", "test", 1104),
    "CoLA": ("cola", "test", 1063),
    "MNLI-m": ("mnli", "test_matched", 9796),
    "MNLI-mm": ("mnli", "test_mismatched", 9847),
    "MRPC": ("mrpc", "test", 1725),
    "QNLI": ("qnli", "test", 5463),
    "QQP": ("qqp", "test", 390965),
    "RTE": ("rte", "test", 3000),
    "SST-2": ("sst2", "test", 1821),
    "STS-B": ("stsb", "test", 1379),
    "WNLI": ("wnli", "test", 146),
}
AX = Task("ax", PAIR, "label", GLUE_TASKS["mnli"].labels, (), "diagnostic", ("premise", "hypothesis"))


def read_test(file, cfg):
    """The Examples of one of SUBMISSION's test sets but WNLI's. Raises: UserError, also for a wrong number of rows."""
    name, split, rows = SUBMISSION[file]
    if name == "ax" and cfg.data_dir:
        folders = [os.path.join(cfg.data_dir, name) for name in ("diagnostic", "AX", "")]
        folder = next((f for f in folders if os.path.exists(os.path.join(f, "diagnostic.tsv"))), folders[0])
        path = find_file(folder, "diagnostic")
        examples = examples_of(tsv_rows(path, [*PAIR, "index"], cfg), path, (), labelled=False)
    else:
        examples = read_split(AX if name == "ax" else GLUE_TASKS[name], split, cfg)
    if len(examples.texts) != rows:
        raise UserError(f"{file}: {len(examples.texts):,} test rows, GLUE's has {rows:,} (the server takes those only)")
    return examples


def write_submission(path, predictions):
    """Write the zip. predictions: {file of SUBMISSION: (indices, words or numbers)}, all but WNLI's, in any order."""
    predictions = {**predictions, "WNLI": (range(SUBMISSION["WNLI"][2]), ["0"] * SUBMISSION["WNLI"][2])}
    with whole_file(path) as zipped, zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in SUBMISSION:
            lines = [f"{index}\t{prediction}\n" for index, prediction in zip(*predictions[file], strict=True)]
            archive.writestr(f"{file}.tsv", "index\tprediction\n" + "".join(lines))


def as_words(task, outputs):
    """Predictions as the server takes them: label words, or numbers within STS-B's 0 to 5. outputs: (n,) array."""
    if task.labels:
        return [task.labels[int(label)] for label in outputs]
    return [f"{min(5.0, max(0.0, value)):.3f}" for value in outputs]
