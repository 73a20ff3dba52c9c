"""Fine-tune on labelled files of your own, and label new texts with the result.

    python -m tools.finetune_own --checkpoint=out/base --train_file=a.csv --val_file=b.csv --text_columns=text \\
        --label_column=label --out=out/mine
    python -m tools.finetune_own --checkpoint=out/mine/model --predict_file=new.csv --out=out/predicted

OUT/glue.json gets the scores, OUT/predictions what the model says about the validation file, OUT/model the fine-tuned model
of the first seed, OUT/predictions.tsv the labels of --predict_file, with their texts. The index in both is the file's row,
counted from 0. The same command keeps the seeds that are finished, and starts the others over.

Read next: finetune_glue.py, whose parts this uses
"""

import dataclasses
import os
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import torch

from common.glue import Task
from common.hashes import same_text
from common.labelled import (
    COMMA,
    GROUPS,
    NUMBER,
    PLAIN,
    Examples,
    has_decimal_comma,
    in_ascii,
    is_missing,
    looks_grouped,
    odd_character,
    places,
    read_numbers,
    read_rows,
    to_examples,
    value_of,
    write_table,
)
from common.options import UserError, command, load_config
from common.processes import Process, pick_device
from common.tables import listed
from finetune_glue import (
    FineTuneConfig,
    Settings,
    fine_tune,
    load_classifier,
    load_pretrained,
    make_runs,
    predict,
    to_predictions,
)
from model import choose_kernels

RECIPES = {"mosaic": Settings(5e-5, 0.1, 32, 5, 1), "fast": Settings(1e-4, 0.1, 128, 3, 1)}
MAX_CLASSES = 20  # more different numbers than this are regression
FOR_TRAINING = (  # options that mean nothing with a --predict_file alone
    "label_column", "problem", "recipe", "seeds", "epochs", "lr", "batch_size", "warmup_fraction", "dropout", "max_length",
    "random_weights", "jobs", "dry_run",
)  # fmt: skip
RARE = 5  # labels with fewer rows are warned about
MARKS = re.compile("[\u0300-\u036f\ufe0e\ufe0f]")  # accents, and what makes a sign an emoji
QUOTES = " '\"\u2018\u2019\u201a\u201c\u201d\u201e\u00ab\u00bb"
LATIN_LOOK = str.maketrans("аеорсухіјѕ", "aeopcyxijs")  # Cyrillic letters, and the Latin ones that look the same


@dataclass
class OwnConfig(FineTuneConfig):
    # Your files: .csv, .tsv or .jsonl, also with .gz, .xz or .zst, or .parquet
    train_file: str = ""  # labelled texts to train on
    val_file: str = ""  # labelled texts to score on
    text_columns: str = ""  # column or key with the text; two, comma-separated, for pairs; empty: text, or the model's
    label_column: str = "label"  # column or key with the label
    trust_quotes: bool = False  # a .csv's quotes are right, even where a cell's lines look like rows
    problem: Literal["auto", "classification", "regression"] = "auto"  # auto: decided by the labels, and printed
    predict_file: str = ""  # texts to label, after training or with the OUT/model of an earlier command

    def check(self):
        super().check()
        if bool(self.train_file) != bool(self.val_file):
            raise UserError("give --train_file and --val_file together")
        if not self.train_file and not self.predict_file:
            raise UserError("give --train_file and --val_file, or --predict_file")
        for field in dataclasses.fields(self):
            if not self.train_file and field.name in FOR_TRAINING and getattr(self, field.name) != field.default:
                raise UserError(f"--{field.name}: needs --train_file (nothing is trained with --predict_file alone)")
        if len(self.text_columns.split(",")) > 2:
            hint = "commas separate them: rename one that has a comma in its name"
            raise UserError(f"text_columns={self.text_columns}: one column, or two for pairs ({hint})")
        if len(set(self.columns())) < len(self.columns()):
            raise UserError(f"text_columns={self.text_columns}: the same column twice (name two for pairs, or one)")
        if self.trust_quotes and ".csv" not in f"{self.train_file} {self.val_file} {self.predict_file}":
            raise UserError("trust_quotes: only for .csv files (save a .tsv with quotes as .csv)")
        if self.train_file and self.label_column in self.columns():
            raise UserError(f"label_column={self.label_column}: is a text column too (the model would read the label)")

    def columns(self):
        return tuple((self.text_columns or "text").split(","))


# ---------------------------------------------------------------------------------------------------------------------
# Labels


def own_task(cfg, rows):
    """The Task of the training file's rows, after a line on what was guessed and warnings. Raises: UserError."""
    path = cfg.train_file
    words = sorted({row.cells[-1] for row in rows})
    if len(words) < 2:
        raise UserError(f"{path}: the only label in {cfg.label_column!r} is {words[0]!r} (at least two are needed)")
    regression, why = guess(cfg, rows)
    if not regression:
        print(f"{path}: classification into {listed(words)}: {why}", flush=True)
        warn_about(path, rows)
        return Task("own", "", cfg.columns(), cfg.label_column, tuple(words), ("accuracy", "macro_f1"))
    labels = to_examples(rows, path, ()).labels
    if (labels == labels[0]).all():
        raise UserError(f"{path}: every label in {cfg.label_column!r} is {labels[0]:g} (at least two are needed)")
    print(f"{path}: regression: {why}", flush=True)
    scale = float(labels.mean()), float(labels.std())
    return Task("own", "", cfg.columns(), cfg.label_column, (), ("pearson", "spearman"), shown=("mean_error",), scale=scale)


def guess(cfg, rows):
    """(whether the labels are a regression's, why). Raises: UserError for labels that contradict each other."""
    if cfg.problem != "auto":
        return cfg.problem == "regression", f"--problem={cfg.problem}"
    read = read_numbers([row.cells[-1] for row in rows])
    numbers = [number for number, _ in read if number is not None]
    cells = [row.cells[-1] for row, (number, _) in zip(rows, read) if number is not None]
    exact = {value_of(cell) if NUMBER.fullmatch(cell) else number for cell, number in zip(cells, numbers)}
    different, whole = len(exact), all(number.is_integer() for number in numbers)
    if len(numbers) <= len(rows) / 2:
        return False, "the labels are words"
    few, way_out = whole and different <= MAX_CLASSES, "--problem=classification takes all as words"
    for spelling in dict.fromkeys([COMMA, GROUPS, *(other for _, other in read if other and not few)]):
        if found := [row for row, (_, other) in zip(rows, read) if other == spelling]:
            count = sum(has_decimal_comma(row.cells[-1]) for row in rows) if spelling == COMMA else len(found)
            text = f"label {found[0].cells[-1]!r} has {spelling}, as {count} of {len(rows)} labels do"
            raise UserError(f"{cfg.train_file}:{found[0].line}: {text} ({PLAIN}; {way_out})")
    if few and all(NUMBER.fullmatch(row.cells[-1]) for row in rows):
        spelled = f", spelled in {words} ways" if (words := len({row.cells[-1] for row in rows})) > different else ""
        return False, f"the labels are {different} different whole numbers{spelled} (or --problem=regression)"
    if few:
        return False, "the labels are words"
    for row, (number, _) in zip(rows, read):
        if number is None:
            text = f"label {row.cells[-1]!r} is not a number, as {len(numbers)} of {len(rows)} labels are"
            raise UserError(f"{cfg.train_file}:{row.line}: {text} (correct it, or remove the row; {way_out})")
    return True, f"the labels are {different} different {'whole ' * whole}numbers (or --problem=classification)"


def warn_about(path, rows):
    """Report classes that may be mistakes: spelled almost as another, like a missing label, or with few rows."""
    lines, alike = {}, []
    for row in rows:
        lines.setdefault(row.cells[-1], []).append(row.line)
    seen = {}  # what a spelling has in common with others: the most frequent label with it
    for word in sorted(lines, key=lambda word: -len(lines[word])):
        first = next((seen[key] for key in spellings(word) if key in seen and look_alike(seen[key], word)), word)
        for key in spellings(word):
            seen.setdefault(key, word)
        if first != word:
            alike.append(f"labels {shown(first)} and {shown(word)} ({places(lines[word])}) are different classes")
    for text in alike[:RARE]:
        print(f"warning: {path}: {text} (if they mean the same, correct the file)", flush=True)
    if len(alike) > RARE:
        print(f"warning: {path}: {len(alike) - RARE} more labels are spelled almost as another", flush=True)
    for word in lines:
        if is_missing(word):
            text = f"label {word!r} ({places(lines[word])}) is taken as a class (if it means no label, remove these rows)"
            print(f"warning: {path}: {text}", flush=True)
    if odd := [word for word in lines if odd_character(word)]:
        text = f"({places(lines[odd[0]])}) has {odd_character(odd[0])}, as {len(odd)} of {len(lines)} classes do"
        print(f"warning: {path}: label {odd[0]!r} {text} (if it means a number, write {in_ascii(odd[0])})", flush=True)
    rare = [f"{word!r} ({places(found)})" for word, found in lines.items() if len(found) < RARE]
    if rare:
        more = f" and {len(rare) - 5} more" if len(rare) > 5 else ""
        text = f"labels with fewer than {RARE} rows: {', '.join(rare[:5])}{more} (too few to learn)"
        print(f"warning: {path}: {text}", flush=True)


def essence(word):
    """What labels have in common that a person would take for the same: "1" and "1.0", "pos" and " Pos.", with any accents."""
    bare = (c for c in unicodedata.normalize("NFKD", word) if unicodedata.category(c) != "Cf" and not MARKS.match(c))
    visible = unicodedata.normalize("NFKC", "".join(bare)).strip(QUOTES)  # and without zero widths
    if NUMBER.fullmatch(in_ascii(visible)):
        return value_of(in_ascii(visible))
    return " ".join(visible.strip(QUOTES + ".!?").casefold().translate(LATIN_LOOK).split())


def spellings(word):
    """A label's essence, also without blanks, and those with one of its letters left out, which a misspelled label shares with
    the right one.

    The first letter is never left out: it tells typical from atypical.
    """
    whole = essence(word)
    if not isinstance(whole, str):
        return [whole]
    short = range(1, len(whole)) if 5 <= len(whole) <= 50 else ()
    return [whole, whole.replace(" ", ""), *(whole[:i] + whole[i + 1 :] for i in short)]


def look_alike(first, second):
    """Whether labels that share one of their `spellings` may be meant as the same: for words of five letters or more."""
    a, b = essence(first), essence(second)
    if a == b or a.replace(" ", "") == b.replace(" ", ""):
        return True
    if a[:-1] == b[:-1] or re.findall(r"\d", a) != re.findall(r"\d", b):  # class_a and class_b, top10 and top20
        return False
    a, b = (re.findall(r"[^\W\d_]+", text) for text in (a, b))
    return len(a) != len(b) or all(min(len(x), len(y)) >= 5 for x, y in zip(a, b) if x != y)


def shown(word):
    """A label in quotes; escaped if it has letters that look like others."""
    odd = re.search("[a-z]", word, re.IGNORECASE) and word.casefold().translate(LATIN_LOOK) != word.casefold()
    return ascii(word) if odd or unicodedata.normalize("NFKC", word) != word else repr(word)


def print_labels(path, examples, task):
    """How many examples each class has, or the range of a regression's labels."""
    if task.labels:
        counts = Counter(examples.labels.tolist())
        texts = [f"{word} {counts[i]:,}" for i, word in enumerate(task.labels)]
        more = f" and {len(texts) - MAX_CLASSES} more labels" if len(texts) > MAX_CLASSES else ""
        print(f"{path}: {', '.join(texts[:MAX_CLASSES])}{more}", flush=True)
    else:
        x = examples.labels
        spread = f"from {x.min():g} to {x.max():g}, mean {x.mean():g}, standard deviation {x.std():g}"
        print(f"{path}: {len(x):,} labels {spread}", flush=True)


def warn_of_points(path, rows):
    """Say how numbers like 1.100 are read, if there are no others with a point."""
    if label := looks_grouped([row.cells[-1] for row in rows]):
        text = f"label {label!r} is read as {float(label):g} (if the point separates thousands, write it without)"
        print(f"warning: {path}: {text}", flush=True)


def warn_of_contradictions(path, rows):
    """Report texts that have different labels in different rows."""
    first, contradicting = {}, {}
    for row in rows:
        *texts, label = row.cells
        texts = tuple(map(same_text, texts))
        earlier = first.setdefault(texts, row)
        if label != earlier.cells[-1]:
            contradicting.setdefault(texts, [earlier.line]).append(row.line)
    if contradicting:
        found = f"{len(contradicting):,} texts have" if len(contradicting) > 1 else "a text has"
        texts, lines = max(contradicting.items(), key=lambda item: len(item[1]))
        example = f"{' / '.join(texts)[:40]!r} on {places(lines)}"
        print(f"warning: {path}: {found} contradicting labels, as {example} (correct them, or the score suffers)", flush=True)


def warn_of_overlap(paths, examples):
    """Report texts to score on that are trained on, too. paths, examples: by split."""
    known = {tuple(map(same_text, texts)) for texts in examples["train"].texts}
    both = sum(tuple(map(same_text, texts)) in known for texts in examples["validation"].texts)
    if both:
        text = f"{both:,} of its {len(examples['validation'].texts):,} texts are in {paths['train']}, too"
        print(f"warning: {paths['validation']}: {text} (so the score is not of new texts alone)", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Training and predicting


def predict_own(cfg, path, rows=None):
    """Label the texts of cfg.predict_file with a model that this tool saved; writes OUT/predictions.tsv.

    rows: of the file, if already read.
    """
    fine_tuned = load_pretrained(path, cfg.out)
    saved = fine_tuned.config.get("task")
    if not saved:
        hint = "give the OUT/model of an earlier training; an export loses its classifier when it is read back"
        raise UserError(f"{path}: not fine-tuned, so it predicts nothing ({hint})")
    columns = cfg.columns() if cfg.text_columns else tuple(saved["text_columns"])
    if len(columns) != len(saved["text_columns"]):
        raise UserError(f"text_columns={cfg.text_columns}: the model was trained on {', '.join(saved['text_columns'])}")
    task = Task("own", "", columns, "", tuple(saved["labels"]), ())
    rows = rows or read_rows(cfg.predict_file, columns, "", cfg)
    device, dtype = pick_device(cfg.device, cfg.dtype)
    dtype = dtype if task.labels else torch.float32  # as in training
    choose_kernels(cfg.kernels, fine_tuned.model_cfg, device)
    texts = Examples([tuple(row.cells) for row in rows])
    encoded = fine_tuned.encode(texts, saved["max_length"], cfg.predict_file)
    os.makedirs(cfg.out, exist_ok=True)  # an error before the work
    scores = predict(load_classifier(path).to(device), encoded, Process(0, 1, device, dtype))
    best = torch.from_numpy(scores).softmax(1).max(1).values.tolist()
    lines = []
    for row, value, probability in zip(rows, to_predictions(task, scores).tolist(), best):
        answer = (task.labels[value], f"{probability:.4f}") if task.labels else (value,)
        lines.append((row.index, *answer, *row.cells))
    target = os.path.join(cfg.out, "predictions.tsv")
    replaced = " (in place of those that were there)" * os.path.exists(target)
    write_table(target, ("index", "prediction", *["probability"] * bool(task.labels), *columns), lines)
    print(f"{target}: {len(rows):,} prediction{'s' * (len(rows) > 1)}{replaced}")


@command
def main(argv):
    cfg = load_config(OwnConfig, argv)
    cfg.check()
    if not cfg.train_file:
        return predict_own(cfg, cfg.checkpoint)
    paths = {"train": cfg.train_file, "validation": cfg.val_file}
    rows = {split: read_rows(path, cfg.columns(), cfg.label_column, cfg) for split, path in paths.items()}
    to_label = read_rows(cfg.predict_file, cfg.columns(), "", cfg) if cfg.predict_file else None
    task = own_task(cfg, rows["train"])
    examples = {split: to_examples(rows[split], path, task.labels) for split, path in paths.items()}
    for split, path in paths.items():
        print_labels(path, examples[split], task)
        if not task.labels:
            warn_of_points(path, rows[split])
    if task.labels:
        warn_of_contradictions(paths["train"], rows["train"])
    warn_of_overlap(paths, examples)
    pretrained, model = load_pretrained(cfg.checkpoint, cfg.out), os.path.join(cfg.out, "model")
    plan = make_runs(cfg, pretrained, task, examples, RECIPES[cfg.recipe], cfg.seeds, keep=model)
    if fine_tune(cfg, pretrained, plan, {task: examples}.get) is None:
        return
    print(f"score: the mean of {' and '.join(task.metrics)}\n{model}: the fine-tuned model of the first seed")
    if cfg.predict_file:
        predict_own(cfg, model, to_label)


if __name__ == "__main__":
    main()
