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
    rows: tuple = ()  # of GLUE's own files: training, dev


PAIR, YES_NO, ENTAILS = ("sentence1", "sentence2"), ("0", "1"), ("entailment", "not_entailment")  # in the hub's order
NLI = ("entailment", "neutral", "contradiction")
GLUE_TASKS = {
    task.name: task
    for task in (
        Task("mnli", "MNLI", PAIR, "gold_label", NLI, ("accuracy",), ("premise", "hypothesis"),
             dev_splits=("validation_matched", "validation_mismatched"), rows=(392_702, 19_647)),
        Task("qnli", "QNLI", ("question", "sentence"), "label", ENTAILS, ("accuracy",), rows=(104_743, 5_463)),
        Task("qqp", "QQP", ("question1", "question2"), "is_duplicate", YES_NO, ("accuracy", "f1"), rows=(363_846, 40_430)),
        Task("rte", "RTE", PAIR, "label", ENTAILS, ("accuracy",), rows=(2_490, 277)),
        Task("sst2", "SST-2", ("sentence",), "label", YES_NO, ("accuracy",), rows=(67_349, 872)),
        Task("mrpc", "MRPC", ("#1 String", "#2 String"), "Quality", YES_NO, ("accuracy", "f1"), PAIR, rows=(3_668, 408)),
        Task("cola", "CoLA", ("sentence",), "label", YES_NO, ("matthews",), rows=(8_551, 1_043)),
        Task("stsb", "STS-B", PAIR, "score", (), ("spearman",), shown=("pearson",), rows=(5_749, 1_500)),
    )
}  # fmt: skip
MATCHED = 9_815  # of MNLI's dev rows
COLA_COLUMNS = ["source", "label", "original_label", "sentence"]  # GLUE's own CoLA files have no header


def part_of(name, result):
    """What part of a task's data a score rests on: "8 % of the training data, 59 % of dev"; "" for all, to a percent.

    result: of the task in glue.json. Older ones lack dev_examples, which then count as all.
    """
    official, parts = GLUE_TASKS[name].rows if name in GLUE_TASKS else (), []
    for key, rows, data in zip(("train_examples", "dev_examples"), official, ("the training data", "dev")):
        percent = 100 * result.get(key, rows) / rows
        if name == "mnli" and data == "dev" and result.get(key) == MATCHED:
            parts.append("the matched half of dev")
        elif round(percent) != 100:
            parts.append(f"{f'{percent:.0f}' if percent >= 1 else 'under 1'} % of {data}")
    return ", ".join(parts)


def read_task(cfg, task):
    """{split: Examples} of a GLUE task: "train" and its dev splits, MNLI's second only if there. Raises: UserError."""
    splits = ["train", *task.dev_splits]
    if cfg.data_dir and task.name == "mnli" and not paths_of(os.path.join(cfg.data_dir, task.folder), splits[-1]):
        splits.pop()
    return {split: read_split(task, split, cfg) for split in splits}


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


def paths_of(folder, split):
    """The paths of a split's TSV file that exist, plain or compressed, under the hub's name or GLUE's: validation or dev."""
    names = [f"{name}.tsv{suffix}" for name in (split, split.replace("validation", "dev")) for suffix in ("", ".gz", ".xz")]
    return [path for path in (os.path.join(folder, name) for name in names) if os.path.exists(path)]


def find_file(folder, split):
    """The first of paths_of. Raises: UserError if there is none."""
    for path in paths_of(folder, split):
        return path
    name = split.replace("validation", "dev")
    raise UserError(f"{folder}: no {name}.tsv (GLUE's layout is TASK/train.tsv and TASK/dev.tsv, also .gz or .xz)")
