"""GLUE: its tasks, their labels and metrics, and reading them from GLUE's own TSV files or from the hub."""

import os
from dataclasses import dataclass

import numpy as np

from common.labelled import Examples, read_rows, to_examples
from common.options import UserError


@dataclass(frozen=True)
class Task:
    name: str
    folder: str  # of GLUE's TSV files
    text_columns: tuple  # one, or two for pairs
    label_column: str
    labels: tuple  # words, in the order of their class numbers; () for regression
    metrics: tuple  # names in METRICS; their mean is the score
    hub_columns: tuple = ()  # where the hub renamed the text columns
    shown: tuple = ()  # further metrics, not part of the score
    scale: tuple = ()  # (mean, standard deviation) with which a regression's labels are standardized; (): they are not
    dev_splits: tuple = ("validation",)  # what the task is scored on


PAIR, YES_NO, ENTAILS = ("sentence1", "sentence2"), ("0", "1"), ("entailment", "not_entailment")  # in the hub's order
NLI = ("entailment", "neutral", "contradiction")
GLUE_TASKS = {
    task.name: task
    for task in (
        Task("mnli", "MNLI", PAIR, "gold_label", NLI, ("accuracy",), ("premise", "hypothesis"),
             dev_splits=("validation_matched", "validation_mismatched")),
        Task("qnli", "QNLI", ("question", "sentence"), "label", ENTAILS, ("accuracy",)),
        Task("qqp", "QQP", ("question1", "question2"), "is_duplicate", YES_NO, ("accuracy", "f1")),
        Task("rte", "RTE", PAIR, "label", ENTAILS, ("accuracy",)),
        Task("sst2", "SST-2", ("sentence",), "label", YES_NO, ("accuracy",)),
        Task("mrpc", "MRPC", ("#1 String", "#2 String"), "Quality", YES_NO, ("accuracy", "f1"), PAIR),
        Task("cola", "CoLA", ("sentence",), "label", YES_NO, ("matthews",)),
        Task("stsb", "STS-B", PAIR, "score", (), ("spearman",), shown=("pearson",)),
    )
}  # fmt: skip
COLA_COLUMNS = ["source", "label", "original_label", "sentence"]  # GLUE's own CoLA files have no header


def read_task(cfg, task):
    """{split: Examples} of a GLUE task: "train" and its dev splits. Raises: UserError."""
    return {split: read_split(task, split, cfg) for split in ("train", *task.dev_splits)}


def read_split(task, split, cfg):
    """The Examples of "train" or a dev split, from TSV files in cfg.data_dir or, without one, from the hub.

    Raises: UserError naming file and line.
    """
    if not cfg.data_dir:
        rows = load_hub(task.name, split)
        labels = np.array(rows["label"], np.int64 if task.labels else np.float64)
        return Examples(list(zip(*(rows[column] for column in task.hub_columns or task.text_columns))), labels)
    path = find_file(os.path.join(cfg.data_dir, task.folder), split)
    header = COLA_COLUMNS if task.name == "cola" else None
    return to_examples(read_rows(path, task.text_columns, task.label_column, cfg, header), path, task.labels)


def load_hub(name, split):
    """A split of nyu-mll/glue as a datasets.Dataset, from the hub or, offline, the cache of `datasets`."""
    try:
        import datasets

        return datasets.load_dataset("nyu-mll/glue", name, split=split)
    except Exception as error:  # network, hub and library each raise their own
        reason = f"{type(error).__name__}: {error}"[:200]
        raise UserError(f"nyu-mll/glue {name}: cannot be read: {reason} (or give --data_dir)") from None


def find_file(folder, split):
    """The path of a split's TSV file, plain or compressed, under GLUE's name or the hub's."""
    names = [split, split.replace("validation", "dev")]
    for name in [f"{name}.tsv{suffix}" for name in names for suffix in ("", ".gz", ".xz")]:
        if os.path.exists(os.path.join(folder, name)):
            return os.path.join(folder, name)
    raise UserError(f"{folder}: no {names[1]}.tsv (GLUE's layout is TASK/train.tsv and TASK/dev.tsv, also .gz or .xz)")
