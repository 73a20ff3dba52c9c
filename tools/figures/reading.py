"""Reading results for figures, and the names in them. All raise UserError for anything else."""

import glob
import json
import os
import sys

from common.options import UserError

TASK_NAMES = {  # in the order of common.glue.GLUE_TASKS, whose file would import torch
    "mnli": "MNLI", "qnli": "QNLI", "qqp": "QQP", "rte": "RTE", "sst2": "SST-2", "mrpc": "MRPC", "cola": "CoLA",
    "stsb": "STS-B",
}  # fmt: skip
MODEL_NAMES = {"mosaicbert": "MosaicBERT", "bert": "BERT"}
SCALING_NAMES = {"base": "MosaicBERT-Base", "large": "MosaicBERT-Large", "bert": "BERT-Base, compiled"}


def find(patterns, name):
    """Paths of the files that comma-separated files, directories or patterns mean."""
    paths = []
    for pattern in patterns.split(","):
        found = sorted(glob.glob(pattern)) or [pattern] * os.path.exists(pattern)  # a name may hold brackets
        if not found:
            raise UserError(f"{pattern}: no such file (expected {name}, or a directory with it)")
        paths += [os.path.join(path, name) if os.path.isdir(path) else path for path in found]
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
