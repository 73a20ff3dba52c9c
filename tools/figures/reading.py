"""Reading results for figures, and the names in them. All raise UserError for anything else."""

import glob
import json
import os
import re
import sys

from common.glue import GLUE_TASKS, part_of
from common.options import UserError

TASK_NAMES = {task.name: task.folder for task in GLUE_TASKS.values()}
MODEL_NAMES = {"mosaicbert": "MosaicBERT", "bert": "BERT"}
SCALING_NAMES = {"base": "MosaicBERT-Base", "large": "MosaicBERT-Large", "bert": "BERT-Base, compiled"}


def find(patterns, name):
    """Paths of the files that comma-separated files, directories or patterns mean.

    A pattern takes the directories that hold `name` or, where none does, the files it matches.
    """
    paths = []
    for pattern in patterns.split(","):
        if os.path.exists(pattern):  # also a name with brackets
            found = [os.path.join(pattern, name) if os.path.isdir(pattern) else pattern]
        else:
            found = sorted(glob.glob(os.path.join(pattern, name))) or sorted(filter(os.path.isfile, glob.glob(pattern)))
        if not found:
            raise UserError(f"{pattern}: no such file (expected {name}, or a directory with it)")
        paths += found
    return paths


def read_result(path, what, interpret):
    """interpret(the JSON in a file); what: such as "glue.json of finetune_glue.py"."""
    try:
        with open(path, encoding="utf-8") as file:
            return interpret(json.load(file))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror} (expected a {what})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path}: not a {what}") from None


def read_glue(path):
    """A glue.json as a dictionary."""
    return read_result(path, "glue.json of finetune_glue.py", lambda r: {**r, "tasks": r["tasks"], "model": r["model"]})


def contestant(directory):
    """(label, minutes) in the name of a run of studies.race, such as fast_4min_seed17; None for another name."""
    match = re.fullmatch(r"(.+)_([\d.]+)min_seed\d+", os.path.basename(os.path.abspath(directory)))
    return match and (MODEL_NAMES.get(match[1], match[1]), float(match[2]))


def marks(found):
    """{task: "", or what part of its data the results are from, as "8 % of the training data"} of the tasks all results have.

    found: {path: a glue.json}. Raises: UserError if they had different parts, or if RTE, MRPC and STS-B started from MNLI's
    weights in some alone: such scores share no axis and no column.
    """
    common = {}
    for task in [task for task in TASK_NAMES if all(task in results["tasks"] for results in found.values())]:
        kinds = {}
        for path, results in found.items():
            result = results["tasks"][task]
            kinds.setdefault((part_of(task, result), result.get("init") == "mnli"), path)
        if len(kinds) > 1:
            said = [f"{path}: {TASK_NAMES[task]} with {part or 'all of the data'}{', from MNLI' * staged}"
                    for (part, staged), path in kinds.items()]  # fmt: skip
            raise UserError(f"{said[0]}; {said[1]} (compare them apart)")
        ((common[task], _),) = kinds
    return common


def marked(task, marks):
    """A task's name, with its mark."""
    return f"{TASK_NAMES[task]} ({marks[task]})" if marks[task] else TASK_NAMES[task]


def means(marks):
    """[(name, tasks)] of the means to show: over the tasks with all their data and, where some had a part, over all tasks."""
    complete = [task for task, mark in marks.items() if not mark]
    if len(complete) == len(marks):
        return [("mean", complete)] * bool(marks)
    partial = f"mean of all {len(marks)}, {len(marks) - len(complete)} on a part of the data"
    return [(f"mean of the {len(complete)} complete", complete)] * bool(complete) + [(partial, list(marks))]


def read_scaling(path):
    """The JSON of studies.scaling as a dictionary."""

    def interpret(results):
        [row["model"] for row in results["rows"]], results["device"], results["toy"]
        return results

    return read_result(path, "result of python -m studies.scaling", interpret)


def read_log(path):
    """The records of a log.jsonl. A last line that a kill or a full disk has cut is left out, and reported."""
    what = "log.jsonl of train.py"
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = file.readlines()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror} (expected a {what})") from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            record["event"]
        except (ValueError, KeyError, TypeError, RecursionError):
            if number < len(lines) or not records or line.endswith("\n"):
                raise UserError(f"{path}:{number}: not a {what}") from None
            print(f"warning: {path}:{number}: the last line was cut, and is left out", file=sys.stderr)
        else:
            records.append(record)
    if not any(record["event"] == "train" for record in records):
        raise UserError(f"{path}: no training steps in this log")
    return records
