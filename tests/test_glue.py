"""glue.py: metrics against scikit-learn and SciPy, every file layout, every refusal, and the GLUE server's zip."""

import gzip
import json
import lzma
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import glue
from common.options import UserError

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
TEST_LAYOUTS = {
    "mnli": f"{MNLI} sentence1 sentence2",
    "qnli": "index question sentence",
    "qqp": "id question1 question2",
    "rte": "index sentence1 sentence2",
    "sst2": "index sentence",
    "mrpc": "index|#1 ID|#2 ID|#1 String|#2 String",
    "cola": "index sentence",
    "stsb": STSB,
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


def write_split(data_dir, name, file, texts, labels=None, header=True, **form):
    """A split of a GLUE task in GLUE's own layout. labels: words; None makes a test set, numbered from 100."""
    task = glue.GLUE_TASKS[name]
    layout = (TEST_LAYOUTS if labels is None else LAYOUTS)[name]
    columns = layout.split("|" if "|" in layout else None)
    rows = [columns] if header else []
    for i, text in enumerate(texts):
        cells = {**dict(zip(task.text_columns, text)), "index": str(100 + i), "id": str(100 + i)}
        cells |= {} if labels is None else {task.label_column: labels[i]}
        rows.append([cells.get(column, f"{column}-{i}") for column in columns])
    return write_lines(Path(data_dir) / task.folder / file, rows, **form)


def some_examples(name, count=5, seed=0):
    """(texts, label words, their numbers) for a task."""
    task, rng = glue.GLUE_TASKS[name], np.random.default_rng(seed)
    texts = [tuple(TEXTS[i] for i in rng.integers(0, len(TEXTS), len(task.text_columns))) for _ in range(count)]
    if not task.labels:
        words = [f"{value:.3f}" for value in rng.uniform(0, 5, count)]
        return texts, words, [float(word) for word in words]
    numbers = rng.integers(0, len(task.labels), count).tolist()
    return texts, [task.labels[number] for number in numbers], numbers


def settings(data_dir="", **values):
    own = {"text_columns": "text", "label_column": "label", "problem": "auto", "train_file": ""}
    return SimpleNamespace(**{"data_dir": str(data_dir), "skip_bad_lines": 0, **own, **values})


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


def cases(metric):
    """1,000 pairs of arrays of 2 to 50 values, full of ties; often one side is constant, or both."""
    rng = np.random.default_rng(list(metric.encode()))
    classes = {"f1": 2, "matthews": 2, "accuracy": 4, "macro_f1": 5}.get(metric)
    for _ in range(1000):
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
    }[metric]


@pytest.mark.parametrize("metric", glue.METRICS)
def test_metrics(metric):
    own, other, constant = glue.METRICS[metric], reference(metric), 0
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
        assert glue.ci95(values) == pytest.approx((high - low) / 2, rel=1e-4 if n <= 31 else 0.05)
    assert glue.ci95([80.0]) is None and glue.ci95([80.0] * 5) == 0


def test_every_task_has_settings_and_metrics():
    assert list(glue.GLUE_TASKS) == ["mnli", "qnli", "qqp", "rte", "sst2", "mrpc", "cola", "stsb"]
    for recipe in glue.RECIPES.values():
        assert set(recipe) == {*glue.GLUE_TASKS, "own"}
    for task in glue.GLUE_TASKS.values():
        assert {*task.metrics, *task.shown} <= set(glue.METRICS)
    assert glue.seeds(3) == [19, 8364, 717] and len(set(glue.seeds(12))) == 12 and glue.seeds(12)[:5] == list(glue.SEEDS)


# ---------------------------------------------------------------------------------------------------------------------
# GLUE's files


@pytest.mark.parametrize("name", glue.GLUE_TASKS)
def test_official_layouts(tmp_path, name):
    task = glue.GLUE_TASKS[name]
    texts, words, numbers = some_examples(name)
    header = name != "cola"  # GLUE's own CoLA has none
    splits = {"train": "train.tsv", **{split: split.replace("validation", "dev") + ".tsv" for split in glue.dev_splits(task)}}
    for split, file in splits.items():
        write_split(tmp_path, name, file, texts, words, header)
        examples = glue.read_split(task, split, settings(tmp_path))
        assert examples.texts == texts and examples.labels.tolist() == numbers and examples.index is None
        assert examples.labels.dtype == (np.int64 if task.labels else np.float64)
    for split in glue.dev_splits(task):
        split = split.replace("validation", "test")
        write_split(tmp_path, name, f"{split}.tsv", texts)
        examples = glue.read_split(task, split, settings(tmp_path))
        assert examples.texts == texts and examples.labels is None and examples.index == ["100", "101", "102", "103", "104"]


@pytest.mark.parametrize("name", ["cola", "mrpc", "mnli"])
@pytest.mark.parametrize("file", ["dev.tsv", "dev.tsv.gz", "dev.tsv.xz", "validation.tsv", "validation.tsv.gz"])
def test_names_and_compression(tmp_path, name, file):
    split = glue.dev_splits(glue.GLUE_TASKS[name])[0]
    file = file.replace(".tsv", "_matched.tsv") if name == "mnli" else file
    texts, words, numbers = some_examples(name)
    write_split(tmp_path, name, file, texts, words)
    examples = glue.read_split(glue.GLUE_TASKS[name], split, settings(tmp_path))
    assert examples.texts == texts and examples.labels.tolist() == numbers


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", [False, True])
@pytest.mark.parametrize("name, header", [("cola", True), ("cola", False), ("mrpc", True), ("sst2", True)])
def test_marks_and_line_ends(tmp_path, name, header, newline, bom):
    texts, words, numbers = some_examples(name)
    write_split(tmp_path, name, "train.tsv", texts, words, header, newline=newline, bom=bom)
    examples = glue.read_split(glue.GLUE_TASKS[name], "train", settings(tmp_path))
    assert examples.texts == texts and examples.labels.tolist() == numbers


def test_digest_tells_texts_and_labels(tmp_path):
    texts, words, _ = some_examples("rte")
    digests = set()
    for texts, words in ((texts, words), (texts[::-1], words), (texts, ["entailment"] * 5), (texts[:4], words[:4])):
        write_split(tmp_path, "rte", "train.tsv", texts, words)
        first, again = (glue.read_split(glue.GLUE_TASKS["rte"], "train", settings(tmp_path)).digest() for _ in range(2))
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
    path = write_lines(tmp_path / glue.GLUE_TASKS[name].folder / "train.tsv", [])
    path.write_bytes(contents)
    with pytest.raises(UserError) as error:
        glue.read_split(glue.GLUE_TASKS[name], "train", settings(tmp_path))
    assert str(error.value).startswith(f"{path}{place}: ") and says in str(error.value)
    if case in ("short", "long", "short without header", "not UTF-8"):
        examples = glue.read_split(glue.GLUE_TASKS[name], "train", settings(tmp_path, skip_bad_lines=1))
        assert len(examples.texts) == len(examples.labels) == 1
    else:
        with pytest.raises(UserError):
            glue.read_split(glue.GLUE_TASKS[name], "train", settings(tmp_path, skip_bad_lines=1))


def test_bad_lines_are_counted_per_file(tmp_path):
    path = write_lines(tmp_path / "SST-2" / "train.tsv", [["sentence", "label"], ["a"], ["b", "1"], ["c"]])
    with pytest.raises(UserError, match=r"train\.tsv:4: 1 columns"):
        glue.read_split(glue.GLUE_TASKS["sst2"], "train", settings(tmp_path, skip_bad_lines=1))
    assert path.exists()
    assert glue.read_split(glue.GLUE_TASKS["sst2"], "train", settings(tmp_path, skip_bad_lines=2)).texts == [("b",)]


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(UserError, match=r"RTE: no dev\.tsv"):
        glue.read_split(glue.GLUE_TASKS["rte"], "validation", settings(tmp_path))
    (tmp_path / "RTE").mkdir()
    (tmp_path / "RTE" / "train.tsv.gz").write_bytes(b"not gzip")
    with pytest.raises(UserError, match=r"train\.tsv\.gz:1: .*not a \.gz file"):
        glue.read_split(glue.GLUE_TASKS["rte"], "train", settings(tmp_path))


# ---------------------------------------------------------------------------------------------------------------------
# The hub


HUB = {  # nyu-mll/glue's columns
    "mnli": ("premise", "hypothesis"), "ax": ("premise", "hypothesis"), "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"), "rte": ("sentence1", "sentence2"), "sst2": ("sentence",),
    "mrpc": ("sentence1", "sentence2"), "cola": ("sentence",), "stsb": ("sentence1", "sentence2"),
}  # fmt: skip


@pytest.mark.parametrize("name", HUB)
def test_hub(monkeypatch, name):
    datasets = pytest.importorskip("datasets")
    task = glue.AX if name == "ax" else glue.GLUE_TASKS[name]
    columns = {column: [f"{column} {i}" for i in range(3)] for column in HUB[name]}
    asked = []

    def load_dataset(path, config, split):
        asked.append((path, config, split))
        labels = [-1] * 3 if split.startswith("test") else [0, 1, 1] if task.labels else [0.5, 5.0, 2.25]
        return datasets.Dataset.from_dict({**columns, "label": labels, "idx": [7, 8, 9]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    texts = list(zip(*columns.values()))
    for split in () if name == "ax" else ("train", *glue.dev_splits(task)):
        examples = glue.read_split(task, split, settings())
        assert examples.texts == texts and examples.labels.tolist() == ([0, 1, 1] if task.labels else [0.5, 5.0, 2.25])
        assert examples.labels.dtype == (np.int64 if task.labels else np.float64)
        assert asked[-1] == ("nyu-mll/glue", name, split)
        examples.digest()
    split = "test_mismatched" if name == "mnli" else "test"
    examples = glue.read_split(task, split, settings())
    assert examples.texts == texts and examples.labels is None and examples.index == ["7", "8", "9"]
    assert asked[-1] == ("nyu-mll/glue", name, split)


def test_hub_out_of_reach(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load_dataset(*arguments, **options):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match="nyu-mll/glue rte: .*no network.*--data_dir"):
        glue.read_split(glue.GLUE_TASKS["rte"], "train", settings())


# ---------------------------------------------------------------------------------------------------------------------
# Your own files


OWN = {
    "csv": 'id,text,label\n1,"a, b",yes\n2,"two\nlines, ""quoted""",no\n\n3,plain,yes\n',
    "tsv": 'label\ttext\nyes\ta, b\nno\ttwo "lines\nyes\tplain\n',
    "jsonl": '{"text": "a, b", "label": "yes"}\n\n{"label": "no", "text": "two\\nlines"}\n{"text": "plain", "label": "yes"}\n',
}


@pytest.mark.parametrize("kind, second", [("csv", 'two\nlines, "quoted"'), ("tsv", 'two "lines'), ("jsonl", "two\nlines")])
@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_own_files(tmp_path, kind, second, suffix):
    path = str(tmp_path / f"a.{kind}{suffix}")
    with OPENERS[suffix](path, "wb") as file:
        file.write(OWN[kind].encode("utf-8-sig"))
    cfg = settings(train_file=path)
    rows = glue.read_own(path, ("text",), "label", cfg)
    assert [cells for _, cells in rows] == [["a, b", "yes"], [second, "no"], ["plain", "yes"]]
    last = OWN[kind].count("\n")
    assert [number for number, _ in rows][0] in (1, 2) and rows[-1][0] == last
    assert [cells for _, cells in glue.read_own(path, ("text",), "", cfg)] == [["a, b"], [second], ["plain"]]
    task = glue.own_task(cfg)
    assert task.name == "own" and task.labels == ("no", "yes") and task.metrics == ("accuracy", "macro_f1")
    assert glue.examples_of(rows, path, task.labels).labels.tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    "labels, problem, regression",
    [
        (["a", "b"], "auto", False),
        (["0", "1", "2"], "auto", False),
        (["1.0", "2.0"], "auto", False),
        ([str(i) for i in range(20)], "auto", False),
        ([str(i) for i in range(21)], "auto", True),
        (["0.5", "1", "2"], "auto", True),
        ([f"word{i}" for i in range(30)], "auto", False),
        (["0.5", "1", "x"], "auto", False),
        (["0", "1"], "regression", True),
        (["0.5", "1.5"], "classification", False),
    ],
)
def test_classification_or_regression(tmp_path, labels, problem, regression):
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + "".join(f"t,{label}\n" for label in labels))
    task = glue.own_task(settings(train_file=str(path), problem=problem))
    assert task.labels == (() if regression else tuple(sorted(labels)))
    assert task.metrics == (("pearson", "spearman") if regression else ("accuracy", "macro_f1"))
    examples = glue.examples_of(glue.read_own(str(path), ("text",), "label", settings()), str(path), task.labels)
    if regression:
        assert examples.labels.tolist() == [float(label) for label in labels]


def test_json_labels_and_pairs(tmp_path):
    path = tmp_path / "a.jsonl"
    records = [{"a": "x", "b": "y", "c": i % 2 == 0} for i in range(4)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    task = glue.own_task(settings(train_file=str(path), text_columns="a,b", label_column="c"))
    assert task.labels == ("false", "true") and task.text_columns == ("a", "b")
    rows = glue.read_own(str(path), ("a", "b"), "c", settings())
    assert rows[0] == (1, ["x", "y", "true"])


@pytest.mark.parametrize(
    "file, contents, place, says",
    [
        ("a.csv", "text,label\na,yes\n", ":1", "no column 'sentence'"),
        ("a.tsv", "text\tlabel\na\tyes\n", ":1", "no column 'sentence'"),
        ("a.jsonl", '{"sentence": "a", "label": 1}\n{"text": "a", "label": 1}\n', ":2", "not an object with 'sentence'"),
        ("a.jsonl", '{"sentence": "a", "label": 1}\n{"sentence": \n', ":2", "not valid JSON"),
        ("a.jsonl", '"sentence"\n', ":1", "not an object"),
        ("a.csv", 'sentence,label\na,yes\n"b,no\nc,yes\n', ":4", "quote not closed"),
        ("a.csv", "sentence,label\na,yes\nb, c,no\n", ":3", "3 columns, expected 2"),
        ("a.csv", "sentence,label\na,yes\n\xff,no\n", ":3", "not UTF-8"),
        ("a.txt", "sentence\n", "", "unknown suffix"),
        ("a.csv", None, "", "No such file"),
    ],
)
def test_wrong_own_files(tmp_path, file, contents, place, says):
    path = tmp_path / file
    if contents is not None:
        path.write_bytes(contents.encode("latin-1"))
    with pytest.raises(UserError) as error:
        glue.read_own(str(path), ("sentence",), "label", settings())
    assert str(error.value).startswith(f"{path}{place}: ") and says in str(error.value)
    if says in ("not valid JSON", "3 columns, expected 2", "not UTF-8"):
        assert len(glue.read_own(str(path), ("sentence",), "label", settings(skip_bad_lines=1))) == 1


def test_wrong_own_labels(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('text,label\n"a\nb",yes\nc,no\n')
    rows = glue.read_own(str(path), ("text",), "label", settings())
    with pytest.raises(UserError) as error:  # the validation file of another task
        glue.examples_of(rows, str(path), ("maybe", "yes"))
    assert str(error.value).startswith(f"{path}:4: unknown label 'no' (expected one of maybe, yes")
    with pytest.raises(UserError) as error:
        glue.examples_of(rows, str(path), ())
    assert str(error.value).startswith(f"{path}:3: label 'yes' is not a number")
    for contents in ("text,label\na,yes\nb,yes\n", "text,label\n", ""):
        path.write_text(contents)
        with pytest.raises(UserError, match=r"a\.csv: [01] different labels in 'label'"):
            glue.own_task(settings(train_file=str(path)))


# ---------------------------------------------------------------------------------------------------------------------
# The server's zip


LINES = {  # of each file, header included
    "AX": 1105, "CoLA": 1064, "MNLI-m": 9797, "MNLI-mm": 9848, "MRPC": 1726, "QNLI": 5464, "QQP": 390966, "RTE": 3001,
    "SST-2": 1822, "STS-B": 1380, "WNLI": 147,
}  # fmt: skip


def test_submission(tmp_path):
    predictions = {}
    for file in sorted(LINES.keys() - {"WNLI"}):
        name, _, rows = glue.SUBMISSION[file]
        task = glue.AX if name == "ax" else glue.GLUE_TASKS[name]
        scores = np.linspace(-1, 6, rows) if not task.labels else np.arange(rows) % len(task.labels)
        predictions[file] = [str(i) for i in range(rows)], glue.as_words(task, scores)
    glue.write_submission(str(tmp_path / "a.zip"), predictions)
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]
    entails, yes_no = {"entailment", "not_entailment"}, {"0", "1"}
    three = {"entailment", "neutral", "contradiction"}
    words = {"AX": three, "MNLI-m": three, "MNLI-mm": three, "QNLI": entails, "RTE": entails, "WNLI": {"0"}}
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert sorted(archive.namelist()) == sorted(f"{file}.tsv" for file in LINES)
        for file, count in LINES.items():
            text = archive.read(f"{file}.tsv").decode()
            lines = text.split("\n")
            assert lines.pop() == "" and lines[0] == "index\tprediction" and len(lines) == count
            rows = [line.split("\t") for line in lines[1:]]
            assert [index for index, _ in rows] == [str(i) for i in range(count - 1)]
            found = {prediction for _, prediction in rows}
            if file == "STS-B":
                values = [float(prediction) for _, prediction in rows]
                assert min(values) == 0 and max(values) == 5 and values == sorted(values) and len(found) > 900
            else:
                assert found == words.get(file, yes_no)


def test_submission_of_unequal_lengths(tmp_path):
    predictions = {file: (["0"], ["0", "1"]) for file in glue.SUBMISSION}
    with pytest.raises(ValueError):
        glue.write_submission(str(tmp_path / "a.zip"), predictions)
    assert not (tmp_path / "a.zip").exists()


@pytest.mark.parametrize("file, name, split", [("CoLA", "cola", "test"), ("RTE", "rte", "test"), ("MNLI-mm", "mnli", "test_mismatched")])
def test_read_test(tmp_path, file, name, split):
    rows = LINES[file] - 1
    texts, *_ = some_examples(name, rows)
    path = write_split(tmp_path, name, f"{split}.tsv", texts)
    examples = glue.read_test(file, settings(tmp_path))
    assert examples.texts == texts and examples.index[0] == "100" and len(examples.index) == rows
    for count in (rows - 1, rows + 1):
        write_split(tmp_path, name, f"{split}.tsv", (texts + texts)[:count])
        with pytest.raises(UserError, match=f"{file}: {count:,} test rows, GLUE's has {rows:,}"):
            glue.read_test(file, settings(tmp_path))
    path.unlink()
    with pytest.raises(UserError, match=rf"no {split}\.tsv"):
        glue.read_test(file, settings(tmp_path))


@pytest.mark.parametrize("folder", ["diagnostic", "AX", ""])
def test_read_diagnostic(tmp_path, folder):
    rows = [["index", "sentence1", "sentence2"], *([str(i), f"a{i}", f"b{i}"] for i in range(LINES["AX"] - 1))]
    write_lines(tmp_path / folder / "diagnostic.tsv", rows)
    examples = glue.read_test("AX", settings(tmp_path))
    assert examples.texts[7] == ("a7", "b7") and examples.index[7] == "7"
    write_lines(tmp_path / folder / "diagnostic.tsv", rows[:-1])
    with pytest.raises(UserError, match="AX: 1,103 test rows"):
        glue.read_test("AX", settings(tmp_path))
