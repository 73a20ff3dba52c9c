"""What finetune_glue.py reads and computes: metrics against scikit-learn and SciPy, file layouts, refusals, the hub."""

import gzip
import lzma
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from common.glue import GLUE_TASKS, part_of, read_split, read_task
from common.metrics import METRICS, ci95
from common.options import UserError
from finetune_glue import RECIPES, SEEDS, GlueConfig, first_seeds
from studies import tuning_files

# The columns of GLUE's own files; MNLI's without the labels of single annotators.
MNLI = "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse"
STSB = "index genre filename year old_index source1 source2 sentence1 sentence2"
LAYOUTS = {
    "mnli": f"{MNLI} sentence1 sentence2 label1 gold_label",
    "qnli": "index question sentence label",
    "qqp": "id qid1 qid2 question1 question2 is_duplicate",
    "rte": "index sentence1 sentence2 label",
    "sst2": "sentence label",
    "mrpc": "Quality|#1 ID|#2 ID|#1 String|#2 String",
    "cola": "source label original_label sentence",
    "stsb": f"{STSB} score",
}
TEXTS = ['He said "go', "naïve – 東京", "a  b", "'' quoted ''", "x, y"]  # quotes are literal, spaces are kept
OPENERS = {"": open, ".gz": gzip.open, ".xz": lzma.open}


def write_lines(path, rows, newline="\n", bom=False):
    """TSV rows, compressed as the suffix says."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join("\t".join(row) + newline for row in rows)
    with OPENERS.get(path.suffix, open)(path, "wb") as file:
        file.write(text.encode("utf-8-sig" if bom else "utf-8"))
    return path


def write_split(data_dir, name, file, texts, labels=None, header=True, layouts=LAYOUTS, **form):
    """A split of a GLUE task in GLUE's own layout, its rows numbered from 100. labels: words; None for a test set."""
    task, layout = GLUE_TASKS[name], layouts[name]
    columns = layout.split("|" if "|" in layout else None)
    rows = [columns] if header else []
    for i, text in enumerate(texts):
        cells = {**dict(zip(task.text_columns, text)), "index": str(100 + i), "id": str(100 + i)}
        cells |= {} if labels is None else {task.label_column: labels[i]}
        rows.append([cells.get(column, f"{column}-{i}") for column in columns])
    return write_lines(Path(data_dir) / task.folder / file, rows, **form)


def some_examples(name, count=5, seed=0):
    """(texts, label words, their numbers) for a task."""
    task, rng = GLUE_TASKS[name], np.random.default_rng(seed)
    texts = [tuple(TEXTS[i] for i in rng.integers(0, len(TEXTS), len(task.text_columns))) for _ in range(count)]
    if not task.labels:
        words = [f"{value:.3f}" for value in rng.uniform(0, 5, count)]
        return texts, words, [float(word) for word in words]
    numbers = rng.integers(0, len(task.labels), count).tolist()
    return texts, [task.labels[number] for number in numbers], numbers


def settings(data_dir="", skip_bad_lines=0):
    return SimpleNamespace(data_dir=str(data_dir), skip_bad_lines=skip_bad_lines)


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


def cases(metric):
    """300 pairs of arrays of 2 to 50 values, full of ties; often one side is constant, or both."""
    rng = np.random.default_rng(list(metric.encode()))
    classes = {"f1": 2, "matthews": 2, "accuracy": 4, "macro_f1": 5}.get(metric)
    for _ in range(300):
        n = rng.integers(2, 51)
        if classes:
            pair = rng.integers(0, rng.integers(1, classes + 1, (2, 1)), (2, n))
            yield np.where(rng.random(n) < rng.random(), pair[0], pair[1]), pair[1]  # from unrelated to equal
        else:
            pair = rng.normal(size=(2, n)).round(rng.integers(0, 4)) * rng.integers(0, 9, (2, 1)) + 3
            yield pair[0], pair[1] + rng.integers(-1, 2) * pair[0]


def reference(metric):
    if metric in ("pearson", "spearman"):
        stats = pytest.importorskip("scipy.stats")
        return getattr(stats, f"{metric}r")
    metrics = pytest.importorskip("sklearn.metrics")
    return {
        "accuracy": metrics.accuracy_score,
        "f1": lambda labels, predictions: metrics.f1_score(labels, predictions, zero_division=0.0),
        "macro_f1": lambda labels, predictions: metrics.f1_score(labels, predictions, average="macro", zero_division=0.0),
        "matthews": metrics.matthews_corrcoef,
        "mean_error": metrics.mean_absolute_error,
    }[metric]


@pytest.mark.parametrize("metric", METRICS)
def test_metrics(metric):
    own, other, constant = METRICS[metric], reference(metric), 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of undefined values, which both make 0
        for predictions, labels in cases(metric):
            result = other(labels, predictions)
            want = np.nan_to_num(getattr(result, "statistic", result))
            assert type(own(predictions, labels)) is float
            assert own(predictions, labels) == pytest.approx(want, abs=1e-9), (predictions, labels)
            constant += len(np.unique(labels)) == 1 or len(np.unique(predictions)) == 1
    assert constant > 20


def test_ci95_is_students():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    for n in range(2, 60):
        values = rng.normal(80, 2, n).tolist()
        low, high = stats.t.interval(0.95, n - 1, loc=np.mean(values), scale=stats.sem(values))
        assert ci95(values) == pytest.approx((high - low) / 2, rel=1e-4 if n <= 31 else 0.05)
    assert ci95([80.0]) is None and ci95([80.0] * 5) == 0


def test_every_task_has_settings_and_metrics():
    assert GlueConfig.tasks == ",".join(GLUE_TASKS) and len(GLUE_TASKS) == 8
    for recipe in RECIPES.values():
        assert set(recipe) == set(GLUE_TASKS)
    for task in GLUE_TASKS.values():
        assert {*task.metrics, *task.shown} <= set(METRICS)
    assert first_seeds(3) == [19, 8364, 717] and len(set(first_seeds(12))) == 12 and first_seeds(12)[:5] == list(SEEDS)


# ---------------------------------------------------------------------------------------------------------------------
# GLUE's files


@pytest.mark.parametrize("name", GLUE_TASKS)
def test_official_layouts(tmp_path, name):
    task = GLUE_TASKS[name]
    texts, words, numbers = some_examples(name)
    header = name != "cola"  # GLUE's own CoLA has none
    splits = {"train": "train.tsv", **{split: split.replace("validation", "dev") + ".tsv" for split in task.dev_splits}}
    for split, file in splits.items():
        write_split(tmp_path, name, file, texts, words, header)
        examples = read_split(task, split, settings(tmp_path))
        assert examples.texts == texts and examples.labels.tolist() == numbers
        assert examples.labels.dtype == (np.int64 if task.labels else np.float64)


@pytest.mark.parametrize("name", ["cola", "mrpc", "mnli"])
@pytest.mark.parametrize("file", ["dev.tsv", "dev.tsv.gz", "dev.tsv.xz", "validation.tsv", "validation.tsv.gz"])
def test_names_and_compression(tmp_path, name, file):
    split = GLUE_TASKS[name].dev_splits[0]
    file = file.replace(".tsv", "_matched.tsv") if name == "mnli" else file
    texts, words, numbers = some_examples(name)
    write_split(tmp_path, name, file, texts, words)
    examples = read_split(GLUE_TASKS[name], split, settings(tmp_path))
    assert examples.texts == texts and examples.labels.tolist() == numbers


def test_only_mnli_may_lack_a_dev_file_and_only_the_mismatched_one(tmp_path):
    texts, words, _ = some_examples("mnli")
    for name in ("train", "dev_matched", "dev_mismatched"):
        write_split(tmp_path, "mnli", f"{name}.tsv.xz", texts, words)
    assert list(read_task(settings(tmp_path), GLUE_TASKS["mnli"])) == ["train", "validation_matched", "validation_mismatched"]
    (tmp_path / "MNLI" / "dev_mismatched.tsv.xz").unlink()
    assert list(read_task(settings(tmp_path), GLUE_TASKS["mnli"])) == ["train", "validation_matched"]
    (tmp_path / "MNLI" / "dev_matched.tsv.xz").unlink()
    with pytest.raises(UserError, match=r"MNLI: no dev_matched\.tsv"):
        read_task(settings(tmp_path), GLUE_TASKS["mnli"])
    write_split(tmp_path, "rte", "train.tsv", *some_examples("rte")[:2])
    with pytest.raises(UserError, match=r"RTE: no dev\.tsv"):
        read_task(settings(tmp_path), GLUE_TASKS["rte"])


@pytest.mark.parametrize("name, train, dev, says", [
    ("mnli", 392_702, 19_647, ""), ("mnli", 392_000, None, ""), ("own", 5, 5, ""),
    ("mnli", 31_914, 9_815, "8 % of the training data, the matched half of dev"), ("qnli", 9_999, 5_463, "10 % of the training data"),
    ("qqp", 363_846, 24_022, "59 % of dev"), ("rte", 20, 277, "under 1 % of the training data"),
    ("sst2", 134_698, 872, "200 % of the training data"),
])  # fmt: skip
def test_parts_of_glue(name, train, dev, says):
    assert part_of(name, {"train_examples": train} | ({} if dev is None else {"dev_examples": dev})) == says


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", [False, True])
@pytest.mark.parametrize("name, header", [("cola", True), ("cola", False), ("mrpc", True), ("sst2", True)])
def test_marks_and_line_ends(tmp_path, name, header, newline, bom):
    texts, words, numbers = some_examples(name)
    write_split(tmp_path, name, "train.tsv", texts, words, header, newline=newline, bom=bom)
    examples = read_split(GLUE_TASKS[name], "train", settings(tmp_path))
    assert examples.texts == texts and examples.labels.tolist() == numbers


def test_digest_tells_texts_and_labels(tmp_path):
    texts, words, _ = some_examples("rte")
    digests = set()
    for texts, words in ((texts, words), (texts[::-1], words), (texts, ["entailment"] * 5), (texts[:4], words[:4])):
        write_split(tmp_path, "rte", "train.tsv", texts, words)
        first, again = (read_split(GLUE_TASKS["rte"], "train", settings(tmp_path)).digest() for _ in range(2))
        assert first == again
        digests.add(first)
    assert len(digests) == 4


WRONG = {  # case: (task, bytes of train.tsv, what the message ends its place with, what it says)
    "columns": ("rte", b"index\tsentence1\tlabel\n", ":1", "no column 'sentence2'"),
    "label": ("rte", b"index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n1\ta\tb\tmaybe\n", ":3", "'maybe'"),
    "cola label": ("cola", b"gj04\t1\t\tfine\ngj04\t2\t\tworse\n", ":2", "'2'"),
    "short": ("rte", b"index\tsentence1\tsentence2\tlabel\n0\ta\tentailment\n1\ta\tb\tentailment\n", ":2", "3 columns"),
    "long": ("sst2", b"sentence\tlabel\na\t1\nb\tc\t1\n", ":3", "3 columns, expected 2"),
    "short without header": ("cola", b"gj04\t1\t\tfine\ngj04\t1\n", ":2", "2 columns"),
    "empty": ("rte", b"", "", "no examples"),
    "header only": ("rte", b"index\tsentence1\tsentence2\tlabel\n", "", "no examples"),
    "not UTF-8": ("sst2", b"sentence\tlabel\nfine\t1\n\xff\xfe\t0\n", ":3", "not UTF-8"),
    "score": ("stsb", b"sentence1\tsentence2\tscore\na\tb\t4.5\na\tb\thigh\n", ":3", "'high' is not a number"),
    "nan": ("stsb", b"sentence1\tsentence2\tscore\na\tb\tnan\n", ":2", "'nan' is not a number"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files(tmp_path, case):
    name, contents, place, says = WRONG[case]
    path = write_lines(tmp_path / GLUE_TASKS[name].folder / "train.tsv", [])
    path.write_bytes(contents)
    with pytest.raises(UserError) as error:
        read_split(GLUE_TASKS[name], "train", settings(tmp_path))
    assert str(error.value).startswith(f"{path}{place}: ") and says in str(error.value)
    if case in ("short", "long", "short without header", "not UTF-8"):
        examples = read_split(GLUE_TASKS[name], "train", settings(tmp_path, skip_bad_lines=1))
        assert len(examples.texts) == len(examples.labels) == 1
    else:
        with pytest.raises(UserError):
            read_split(GLUE_TASKS[name], "train", settings(tmp_path, skip_bad_lines=1))


def test_bad_lines_are_counted_per_file(tmp_path):
    path = write_lines(tmp_path / "SST-2" / "train.tsv", [["sentence", "label"], ["a"], ["b", "1"], ["c"]])
    with pytest.raises(UserError, match=r"train\.tsv:2: 1 column,.*also line 4"):
        read_split(GLUE_TASKS["sst2"], "train", settings(tmp_path, skip_bad_lines=1))
    assert path.exists()
    assert read_split(GLUE_TASKS["sst2"], "train", settings(tmp_path, skip_bad_lines=2)).texts == [("b",)]


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(UserError, match=r"RTE: no dev\.tsv"):
        read_split(GLUE_TASKS["rte"], "validation", settings(tmp_path))
    (tmp_path / "RTE").mkdir()
    (tmp_path / "RTE" / "train.tsv.gz").write_bytes(b"not gzip")
    with pytest.raises(UserError, match=r"train\.tsv\.gz:1: .*not a \.gz file"):
        read_split(GLUE_TASKS["rte"], "train", settings(tmp_path))


# ---------------------------------------------------------------------------------------------------------------------
# The hub


HUB = {  # nyu-mll/glue's columns
    "mnli": ("premise", "hypothesis"), "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"), "rte": ("sentence1", "sentence2"), "sst2": ("sentence",),
    "mrpc": ("sentence1", "sentence2"), "cola": ("sentence",), "stsb": ("sentence1", "sentence2"),
    "ax": ("premise", "hypothesis"),
}  # fmt: skip


def mock_hub(monkeypatch, name, label, count=3):
    """Let `datasets` hold `count` rows of a task, and return (their texts, a list of what was asked for)."""
    datasets = pytest.importorskip("datasets")
    columns = {column: [f"{column} {i}" for i in range(count)] for column in HUB[name]}
    rows = {**columns, "label": [label(i) for i in range(count)], "idx": [7 + i for i in range(count)]}
    asked = []

    def load_dataset(path, config, split):
        asked.append((path, config, split))
        return datasets.Dataset.from_dict(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return list(zip(*columns.values())), asked


@pytest.mark.parametrize("name", GLUE_TASKS)
def test_hub(monkeypatch, name):
    task = GLUE_TASKS[name]
    labels = [0, 1, 1] if task.labels else [0.5, 5.0, 2.25]
    texts, asked = mock_hub(monkeypatch, name, labels.__getitem__)
    for split in ("train", *task.dev_splits):
        examples = read_split(task, split, settings())
        assert examples.texts == texts and examples.labels.tolist() == labels
        assert examples.labels.dtype == (np.int64 if task.labels else np.float64)
        assert asked[-1] == ("nyu-mll/glue", name, split)
        examples.digest()


def test_hub_out_of_reach(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load_dataset(*arguments, **options):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match="nyu-mll/glue rte: .*no network.*--data_dir"):
        read_split(GLUE_TASKS["rte"], "train", settings())


def test_files_to_tune_on_are_parts_of_the_training_files(tmp_path, capsys):
    """CoLA has no header, MRPC is compressed and has one; \u0085 ends no row, nor does a missing last line break lose one."""
    cola = [f"src\t{i % 2}\t\ttext \u0085 {i}" for i in range(50)]
    mrpc = [f"{i % 2}\t{i}\t{i}\tone {i}\ttwo {i}" for i in range(40)]
    head = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"
    for folder in ("CoLA", "MRPC"):
        (tmp_path / "glue" / folder).mkdir(parents=True)
    (tmp_path / "glue" / "CoLA" / "train.tsv").write_text("\n".join(cola))
    (tmp_path / "glue" / "MRPC" / "train.tsv.gz").write_bytes(gzip.compress("\n".join([head, *mrpc, ""]).encode()))
    tuning_files.main([f"--glue_dir={tmp_path / 'glue'}", f"--out={tmp_path / 'tuning'}", "--most=40", "--share=0.25"])
    assert "CoLA: 30 rows to train on, 10 to score" in capsys.readouterr().out
    for folder, rows, header in (("CoLA", cola, []), ("MRPC", mrpc, [head])):
        found = [(tmp_path / "tuning" / folder / f"{s}.tsv").read_text().split("\n") for s in ("train", "validation")]
        assert all(lines[: len(header)] == header and lines.pop() == "" for lines in found)
        train, dev = ([*lines[len(header) :]] for lines in found)
        assert len(train) == 30 and len(dev) == 10 and not set(train) & set(dev) and {*train, *dev} <= set(rows)
    tasks = read_task(SimpleNamespace(data_dir=str(tmp_path / "tuning"), skip_bad_lines=0), GLUE_TASKS["mrpc"])
    assert [len(tasks[split].texts) for split in ("train", "validation")] == [30, 10]
