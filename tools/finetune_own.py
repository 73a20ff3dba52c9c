"""Fine-tune on labelled files of your own, and label new texts with the result.

    python -m tools.finetune_own --checkpoint=out/base --train_file=a.csv --val_file=b.csv --text_columns=text \\
        --label_column=label --out=out/mine
    python -m tools.finetune_own --checkpoint=out/mine/model --predict_file=new.csv --out=out/predicted

OUT/glue.json gets the scores, OUT/predictions what the model says about the validation file, OUT/model the fine-tuned model
of the first seed, OUT/predictions.tsv the labels of --predict_file. The same command resumes where it was killed.

Read next: finetune_glue.py, whose parts this uses
"""

import csv
import functools
import json
import os
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import torch

from common.files import write_text
from common.options import UserError, command, load_config
from common.processes import Process, pick_device
from common.sources import numbered_lines, skip_or_fail, split_suffixes
from finetune_glue import (
    Examples,
    FineTuneConfig,
    Settings,
    Task,
    encode,
    fine_tune,
    load_classifier,
    load_pretrained,
    make_runs,
    predict,
    to_examples,
    to_predictions,
    tsv_rows,
)
from model import choose_kernels

RECIPES = {"mosaic": Settings(5e-5, 0.1, 32, 5, 1), "fast": Settings(1e-4, 0.1, 128, 3, 1)}
MAX_CLASSES = 20  # more different numbers than this are regression


@dataclass
class OwnConfig(FineTuneConfig):
    # Your files: .csv, .tsv or .jsonl, also with .gz or .xz
    train_file: str = ""  # labelled texts to train on
    val_file: str = ""  # labelled texts to score on
    text_columns: str = "text"  # column or key with the text; two, comma-separated, for pairs
    label_column: str = "label"  # column or key with the label
    problem: Literal["auto", "classification", "regression"] = "auto"  # auto: decided by the labels, and printed
    predict_file: str = ""  # texts to label, after training or with the OUT/model of an earlier command

    def check(self):
        super().check()
        if bool(self.train_file) != bool(self.val_file):
            raise UserError("give --train_file and --val_file together")
        if not self.train_file and not self.predict_file:
            raise UserError("give --train_file and --val_file, or --predict_file")
        if len(self.text_columns.split(",")) > 2:
            raise UserError(f"text_columns={self.text_columns}: one column, or two for pairs")


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_rows(path, text_columns, label_column, cfg):
    """(line number, [text..., label]) of each row of a file; no label if label_column is empty. Raises: UserError."""
    columns = [*text_columns, *([label_column] if label_column else [])]
    kind, _ = split_suffixes(path)
    reader = {".tsv": tsv_rows, ".csv": csv_rows, ".jsonl": json_rows, ".json": json_rows}.get(kind)
    if reader is None:
        raise UserError(f"{path}: unknown suffix (expected .csv, .tsv or .jsonl, also with .gz or .xz)")
    return list(reader(path, columns, cfg))


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
                skip_or_fail(cfg, bad_lines, f"{text} (is there a comma outside quotes?)")
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
            skip_or_fail(cfg, bad_lines, f"{path}:{number}: not valid JSON: {error} (expected one object per line)")
        except (KeyError, TypeError):
            skip_or_fail(cfg, bad_lines, f"{path}:{number}: not an object with {', '.join(map(repr, columns))}")
        else:
            if None in cells:
                skip_or_fail(cfg, bad_lines, f"{path}:{number}: {columns[cells.index(None)]!r} is null")
                continue
            yield number, [cell if isinstance(cell, str) else json.dumps(cell) for cell in cells]


def own_task(cfg):
    """The Task in cfg.train_file: classification if its labels are words or few whole numbers, else regression.

    cfg.problem overrides that. Raises: UserError.
    """
    columns = tuple(cfg.text_columns.split(","))
    rows = read_rows(cfg.train_file, columns, cfg.label_column, cfg)
    for number, cells in rows:
        if not cells[-1].strip():
            raise UserError(f"{cfg.train_file}:{number}: the label is empty (label the row, or remove it)")
    words = {cells[-1] for _, cells in rows}
    try:
        numbers = [float(word) for word in words]
        regression = len(words) > MAX_CLASSES or not all(number.is_integer() for number in numbers)
    except ValueError:
        regression = False
    if cfg.problem != "auto":
        regression = cfg.problem == "regression"
    if len(words) < 2:
        raise UserError(f"{cfg.train_file}: {len(words)} different labels in {cfg.label_column!r} (at least two)")
    if regression:
        return Task("own", "", columns, cfg.label_column, (), ("pearson", "spearman"))
    return Task("own", "", columns, cfg.label_column, tuple(sorted(words)), ("accuracy", "macro_f1"))


def read_own(cfg, task):
    """{split: Examples} of the training and the validation file. Raises: UserError naming file and line."""
    paths = {"train": cfg.train_file, "validation": cfg.val_file}
    return {
        split: to_examples(read_rows(path, task.text_columns, task.label_column, cfg), path, task.labels)
        for split, path in paths.items()
    }


# ---------------------------------------------------------------------------------------------------------------------
# Training and predicting


def predict_own(cfg, path):
    """Label the texts of cfg.predict_file with a model that this tool saved; writes OUT/predictions.tsv."""
    fine_tuned = load_pretrained(path, cfg.out)
    saved = fine_tuned.config.get("task")
    if not saved:
        raise UserError(f"{path}: not fine-tuned, so it predicts nothing (give --train_file and --val_file)")
    task = Task("own", "", tuple(saved["text_columns"]), "", tuple(saved["labels"]), ())
    rows = read_rows(cfg.predict_file, task.text_columns, "", cfg)
    if not rows:
        raise UserError(f"{cfg.predict_file}: no texts (is the file empty?)")
    device, dtype = pick_device(cfg.device, cfg.dtype)
    choose_kernels(cfg.kernels, fine_tuned.model_cfg, device)
    encoded = encode(Examples([tuple(cells) for _, cells in rows]), fine_tuned, saved["max_length"])
    scores = predict(load_classifier(path).to(device), encoded, Process(0, 1, device, dtype))
    lines = ["index\tprediction" + ("\tprobability\n" if task.labels else "\n")]
    best = torch.from_numpy(scores).softmax(1).max(1).values.tolist()
    for index, (value, probability) in enumerate(zip(to_predictions(task, scores).tolist(), best)):
        lines.append(f"{index}\t{task.labels[value]}\t{probability:.4f}\n" if task.labels else f"{index}\t{value:.4f}\n")
    os.makedirs(cfg.out, exist_ok=True)
    target = os.path.join(cfg.out, "predictions.tsv")
    write_text(target, "".join(lines))
    print(f"{target}: {len(rows)} predictions")


@command
def main(argv):
    cfg = load_config(OwnConfig, argv)
    cfg.check()
    if not cfg.train_file:
        return predict_own(cfg, cfg.checkpoint)
    pretrained, task, model = load_pretrained(cfg.checkpoint, cfg.out), own_task(cfg), os.path.join(cfg.out, "model")
    plan = make_runs(cfg, pretrained, task, read_own(cfg, task), RECIPES[cfg.recipe], cfg.seeds, keep=model)
    print(f"classification into {', '.join(task.labels)[:200]}" if task.labels else "regression", flush=True)
    if fine_tune(cfg, pretrained, plan, functools.partial(read_own, cfg)) is None:
        return
    print(f"{model}: the fine-tuned model of the first seed")
    if cfg.predict_file:
        predict_own(cfg, model)


if __name__ == "__main__":
    main()
