"""GLUE files to choose settings with: the dev files are random parts of the training files, so the real ones choose nothing.

    python -m studies.tuning_files --glue_dir=data/glue --out=data/tuning
    python finetune_glue.py --checkpoint=out/mine --data_dir=data/tuning --tasks=cola,mrpc,stsb --out=out/tuned

MNLI's two dev files are equal.
"""

import os
import random
from dataclasses import dataclass

from common.files import whole_file
from common.glue import GLUE_TASKS, find_file
from common.lines import decompress, open_bytes, split_suffixes
from common.options import UserError, command, load_config


@dataclass
class TuningConfig:
    glue_dir: str = "data/glue"  # GLUE's TSV files, TASK/train.tsv
    out: str = "data/tuning"  # likewise, to be written
    most: int = 20_000  # rows to use of a training file, drawn at random
    share: float = 0.2  # of them for the dev file
    seed: int = 1


def cut(task, cfg):
    """Write a task's files; returns (training rows, dev rows)."""
    path = find_file(os.path.join(cfg.glue_dir, task.folder), "train")
    with open_bytes(path) as file:
        rows = decompress(file, split_suffixes(path)[1]).readlines()  # as bytes: no other line breaks
    rows[-1] = rows[-1].rstrip(b"\n") + b"\n"
    header = [] if task.name == "cola" else [rows.pop(0)]  # CoLA's have none
    random.Random(cfg.seed).shuffle(rows)
    rows = rows[: cfg.most]
    count = round(cfg.share * len(rows))
    for split, part in [("train", rows[count:]), *((split, rows[:count]) for split in task.dev_splits)]:
        folder = os.path.join(cfg.out, task.folder)
        os.makedirs(folder, exist_ok=True)
        with whole_file(os.path.join(folder, f"{split}.tsv")) as file:
            file.writelines(header + part)
    return len(rows) - count, count


@command
def main(argv):
    cfg = load_config(TuningConfig, argv)
    tasks = [task for task in GLUE_TASKS.values() if os.path.isdir(os.path.join(cfg.glue_dir, task.folder))]
    if not tasks:
        raise UserError(f"--glue_dir={cfg.glue_dir}: none of {', '.join(task.folder for task in GLUE_TASKS.values())} in it")
    if not 0 < cfg.share < 1 or os.path.realpath(cfg.out) == os.path.realpath(cfg.glue_dir):
        raise UserError("--share: must be above 0 and below 1, and --out another directory than --glue_dir")
    for task in tasks:
        train, dev = cut(task, cfg)
        print(f"{os.path.join(cfg.out, task.folder)}: {train:,} rows to train on, {dev:,} to score")


if __name__ == "__main__":
    main()
