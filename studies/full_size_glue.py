"""Make GLUE folders of the official sizes from the rows at hand: for timing only, the scores mean nothing.

    python -m studies.full_size_glue --data_dir=data/glue --out=data/full_size_glue
    python finetune_glue.py --checkpoint=out/base --data_dir=data/full_size_glue --seeds=1 --dry_run --out=out/timing

Rows are repeated until a training file has as many as GLUE's; without a training file, the dev file's rows are. Lengths
are thus those of real text even if the whole file is not available.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path

from common.glue import COLA_COLUMNS, GLUE_TASKS, find_file
from common.labelled import read_rows
from common.options import UserError, command, load_config

SIZES = {  # rows of GLUE's training files
    "mnli": 392_702, "qnli": 104_743, "qqp": 363_846, "rte": 2_490, "sst2": 67_349, "mrpc": 3_668, "cola": 8_551,
    "stsb": 5_749,
}  # fmt: skip


@dataclass
class FullSizeConfig:
    data_dir: str = ""  # GLUE's TSV files; some may be missing
    out: str = ""  # directory for the full-sized ones
    skip_bad_lines: int = 0  # malformed lines to skip per file


@command
def main(argv):
    cfg = load_config(FullSizeConfig, argv)
    for name, size in SIZES.items():
        task, folder = GLUE_TASKS[name], Path(cfg.out, GLUE_TASKS[name].folder)
        folder.mkdir(parents=True, exist_ok=True)
        splits = {split: rows_of(cfg, task, split) for split in ("train", *task.dev_splits)}
        rows = splits["train"] or splits[task.dev_splits[0]]
        if not rows:
            raise UserError(f"{cfg.data_dir}/{task.folder}: neither a training nor a dev file")
        splits["train"] = itertools.islice(itertools.cycle(rows), size)
        for split, rows in splits.items():
            with open(folder / f"{split}.tsv", "w", encoding="utf-8") as file:
                for cells in [[*task.text_columns, task.label_column], *rows]:
                    file.write("\t".join(cells) + "\n")


def rows_of(cfg, task, split):
    """The texts and labels of a split; [] if it has no file."""
    try:
        path = find_file(str(Path(cfg.data_dir, task.folder)), split)
    except UserError:
        return []
    default_header = COLA_COLUMNS if task.name == "cola" else None
    return [row.cells for row in read_rows(path, task.text_columns, task.label_column, cfg, default_header)]


if __name__ == "__main__":
    main()
