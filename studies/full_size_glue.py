"""GLUE folders at their official sizes, out of what rows there are: for timing only, scores mean nothing.

    python tests/full_size_glue.py --data_dir=data/glue --out=data/full_size_glue
    python finetune_glue.py --checkpoint=out/base --data_dir=data/full_size_glue --seeds=1 --dry_run --out=out/timing

Rows are repeated until a training file has as many as GLUE's; where there is none, the dev file's rows stand in. So
lengths are those of real text even where the whole file cannot be had.
"""

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path


import glue
from common.options import UserError, command, load_config

SIZES = {  # rows of GLUE's training files
    "mnli": 392_702, "qnli": 104_743, "qqp": 363_846, "rte": 2_490, "sst2": 67_349, "mrpc": 3_668, "cola": 8_551,
    "stsb": 5_749,
}  # fmt: skip


@dataclass
class FullSizeConfig:
    data_dir: str = ""  # GLUE's TSV files, as many as there are
    out: str = ""  # where to write the full-sized ones
    skip_bad_lines: int = 0  # of the files read


@command
def main(argv):
    cfg = load_config(FullSizeConfig, argv)
    for name, size in SIZES.items():
        task, folder = glue.GLUE_TASKS[name], Path(cfg.out, glue.GLUE_TASKS[name].folder)
        folder.mkdir(parents=True, exist_ok=True)
        splits = {split: rows_of(cfg, task, split) for split in ("train", *glue.dev_splits(task))}
        rows = splits["train"] or splits[glue.dev_splits(task)[0]]
        if not rows:
            raise UserError(f"{cfg.data_dir}/{task.folder}: neither a training nor a dev file")
        splits["train"] = itertools.islice(itertools.cycle(rows), size)
        for split, rows in splits.items():
            with open(folder / f"{split}.tsv", "w", encoding="utf-8") as file:
                for cells in [[*task.text_columns, task.label_column], *rows]:
                    file.write("\t".join(cells) + "\n")


def rows_of(cfg, task, split):
    """The texts and labels of a split, [] where it has no file."""
    try:
        path = glue.find_file(str(Path(cfg.data_dir, task.folder)), split)
    except UserError:
        return []
    headless = ["source", "label", "original_label", "sentence"] if task.name == "cola" else None
    return [cells for _, cells in glue.tsv_rows(path, [*task.text_columns, task.label_column], cfg, headless)]


if __name__ == "__main__":
    main()
