"""Fine-tune on all of GLUE, and write the zip that the GLUE server scores.

    python -m tools.glue_submission --checkpoint=out/base --data_dir=data/glue --out=results/base

Takes the options of finetune_glue.py and does what that does; it also resumes what finetune_glue.py began in OUT. The models
of the first seeds stay in OUT/TASK, 0.5 GB each for base, and label the test sets for OUT/glue_submission.zip. With
--data_dir, the test sets are TASK/test.tsv (MNLI: test_matched.tsv, test_mismatched.tsv) and diagnostic/diagnostic.tsv.

Read next: finetune_glue.py, whose parts this uses
"""

import functools
import os
import zipfile
from dataclasses import dataclass, replace

from common.files import whole_file
from common.glue import GLUE_TASKS, NLI, PAIR, Task, find_file, load_hub, read_task
from common.labelled import Examples, read_rows
from common.options import UserError, command, load_config
from finetune_glue import SEEDS, GlueConfig, Worker, fine_tune, load_classifier, load_pretrained, make_plan, predict
from finetune_glue import to_predictions

# file in the zip: (task, split, rows of the official test set). Nothing is trained on WNLI: its test rows all get the
# training set's majority class, "0", as in BERT's paper, so no file is read for it.
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
AX = Task("ax", "diagnostic", PAIR, "", NLI, (), ("premise", "hypothesis"))  # labelled by MNLI's model


@dataclass
class SubmissionConfig(GlueConfig):
    def check(self):
        super().check()
        if set(self.seeds_of_tasks()) != set(GLUE_TASKS):
            raise UserError(f"tasks={self.tasks}: the server takes all eight tasks together (leave --tasks out)")


def task_of(file):
    return AX if file == "AX" else GLUE_TASKS[SUBMISSION[file][0]]


def read_test(file, cfg):
    """(indices, texts) of one of SUBMISSION's test sets. Raises: UserError, also for a wrong number of rows."""
    task, (_, split, expected) = task_of(file), SUBMISSION[file]
    if not cfg.data_dir:
        rows = load_hub(task.name, split)
        texts = list(zip(*(rows[column] for column in task.hub_columns or task.text_columns)))
        indices = [str(index) for index in rows["idx"]]
    else:
        folder = os.path.join(cfg.data_dir, task.folder)
        if file == "AX":
            folders = [folder, os.path.join(cfg.data_dir, "AX"), cfg.data_dir]
            split = "diagnostic"
            folder = next((f for f in folders if os.path.exists(os.path.join(f, "diagnostic.tsv"))), folder)
        rows = read_rows(find_file(folder, split), task.text_columns, "id" if file == "QQP" else "index", cfg)
        texts, indices = [tuple(row.cells[:-1]) for row in rows], [row.cells[-1] for row in rows]
    if len(texts) != expected:
        raise UserError(f"{file}: {len(texts):,} test rows, GLUE has {expected:,} (the server takes no others)")
    return indices, texts


def to_words(task, predictions):
    """Predictions as the server takes them: label words, or numbers within STS-B's 0 to 5. predictions: (n,) array."""
    if task.labels:
        return [task.labels[int(label)] for label in predictions]
    return [f"{min(5.0, max(0.0, value)):.3f}" for value in predictions]


def write_submission(path, predictions):
    """Write the zip. predictions: {file of SUBMISSION: (indices, words)} of all but WNLI, in any order."""
    num_wnli = SUBMISSION["WNLI"][2]
    predictions = {**predictions, "WNLI": (range(num_wnli), ["0"] * num_wnli)}
    with whole_file(path) as zipped, zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in SUBMISSION:
            lines = [f"{index}\t{prediction}\n" for index, prediction in zip(*predictions[file], strict=True)]
            archive.writestr(f"{file}.tsv", "index\tprediction\n" + "".join(lines))


@command
def main(argv):
    cfg = load_config(SubmissionConfig, argv)
    cfg.check()
    tests = {file: read_test(file, cfg) for file in SUBMISSION if file != "WNLI"}  # first: training takes hours
    pretrained, plan = load_pretrained(cfg.checkpoint, cfg.out), []
    for run in make_plan(cfg, pretrained):
        keep = os.path.join(cfg.out, run.task.name) if run.seed == SEEDS[0] else ""
        plan.append(replace(run, artifact=keep))
    read = functools.partial(read_task, cfg)
    if fine_tune(cfg, pretrained, plan, read) is None:
        return
    worker, predictions = Worker(cfg, read), {}
    for file, (indices, texts) in tests.items():
        task = task_of(file)
        directory = os.path.join(cfg.out, "mnli" if file == "AX" else task.name)
        worker.set_precision(task)
        encoded = pretrained.encode(Examples(texts), cfg.max_length, file)
        scores = predict(load_classifier(directory).to(worker.process.device), encoded, worker.process)
        predictions[file] = indices, to_words(task, to_predictions(task, scores))
    path = os.path.join(cfg.out, "glue_submission.zip")
    write_submission(path, predictions)
    print(f"{path}: from the first seed; WNLI is the majority class")


if __name__ == "__main__":
    main()
