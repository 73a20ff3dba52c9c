"""Your own labelled files: every kind is read, refused by file and line, learned, and predicted."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

import checkpoint
from common.labelled import read_rows, to_examples
from common.options import UserError
from tests.test_exports import make_run as run_with_wordpiece
from tests.test_finetune_glue import CPU, sentences
from tests.test_glue import OPENERS
from tests.toy import make_run
from tools.convert_hf import ConvertConfig
from tools.finetune_own import OwnConfig, main, own_task
from tools.hf.card import model_card

settings = functools.partial(OwnConfig, checkpoint="run", out="out")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


OWN = {
    "csv": 'id,text,label\n1,"a, b",yes\n2,"two\nlines, ""quoted""",no\n\n3,plain,yes\n',
    "tsv": 'label\ttext\nyes\ta, b\nno\ttwo "lines\nyes\tplain\n',
    "jsonl": '{"text": "a, b", "label": "yes"}\n\n{"label": "no", "text": "two\\nlines"}\n'
    '{"text": "plain", "label": "yes"}\n',
}


@pytest.mark.parametrize("kind, second", [("csv", 'two\nlines, "quoted"'), ("tsv", 'two "lines'), ("jsonl", "two\nlines")])
@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_own_files(tmp_path, kind, second, suffix):
    path = str(tmp_path / f"a.{kind}{suffix}")
    with OPENERS[suffix](path, "wb") as file:
        file.write(OWN[kind].encode("utf-8-sig"))
    cfg = settings(train_file=path)
    rows = read_rows(path, ("text",), "label", cfg)
    assert [row.cells for row in rows] == [["a, b", "yes"], [second, "no"], ["plain", "yes"]]
    assert [row.index for row in rows] == [0, 1, 2]
    assert [row.line for row in rows] == {"csv": [2, 3, 6], "tsv": [2, 3, 4], "jsonl": [1, 3, 4]}[kind]
    assert [row.cells for row in read_rows(path, ("text",), "", cfg)] == [["a, b"], [second], ["plain"]]
    task = own_task(cfg, rows)
    assert task.name == "own" and task.labels == ("no", "yes") and task.metrics == ("accuracy", "macro_f1")
    assert to_examples(rows, path, task.labels).labels.tolist() == [1, 0, 1]


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
        (["0.5", "1", "x", "y"], "auto", False),
        (["1_0", "1_1", "2_0"], "auto", False),
        (["0", "1"], "regression", True),
        (["0.5", "1.5"], "classification", False),
    ],
)
def test_classification_or_regression(tmp_path, labels, problem, regression):
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + "".join(f"t,{label}\n" for label in labels))
    rows = read_rows(str(path), ("text",), "label", settings())
    task = own_task(settings(train_file=str(path), problem=problem), rows)
    assert task.labels == (() if regression else tuple(sorted(labels)))
    assert task.metrics == (("pearson", "spearman") if regression else ("accuracy", "macro_f1"))
    examples = to_examples(rows, str(path), task.labels)
    if regression:
        assert examples.labels.tolist() == [float(label) for label in labels]


def test_json_labels_and_pairs(tmp_path):
    path = tmp_path / "a.jsonl"
    records = [{"a": "x", "b": "y", "c": i % 2 == 0} for i in range(4)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    rows = read_rows(str(path), ("a", "b"), "c", settings())
    assert rows[0] == (0, 1, ["x", "y", "true"])
    task = own_task(settings(train_file=str(path), text_columns="a,b", label_column="c"), rows)
    assert task.labels == ("false", "true") and task.text_columns == ("a", "b")


@pytest.mark.parametrize(
    "file, contents, place, says",
    [
        ("a.csv", "text,label\na,yes\n", ":1", "no column 'sentence'"),
        ("a.tsv", "text\tlabel\na\tyes\n", ":1", "no column 'sentence'"),
        ("a.jsonl", '{"sentence": "a", "label": 1}\n{"text": "a", "label": 1}\n', ":2",
         "no 'sentence' (keys: text, label; see --text_columns and --label_column; "),
        ("a.json", '[{"sentence": "a", "label": 1}]', ":1", "a list, not an object (expected one object per line; no row can be used)"),
        ("a.jsonl", '{"sentence": "a", "label": 1}\n{"sentence": \n', ":2", "not valid JSON"),
        ("a.jsonl", '"sentence"\n', ":1", "a str, not an object"),
        ("a.csv", 'sentence,label\na,yes\n"b,no\nc,yes\n', ":3", "quote not closed"),
        ("a.csv", "satz;label\na;yes\n", ":1", "no column 'sentence' (the first row has satz;label; see --text_columns and --"),
        ("a.csv", " sentence,sentence ,\u200blabel\na,b,yes\n".encode().decode("latin-1"), ":1",
         "the first row has ' sentence', 'sentence ', '\\u200blabel'; see"),
        ("a.csv", "sentence,label\na;yes\nb;no\n", ":2",
         "a semicolon between columns, unlike the first line's comma (use one of them in the whole file; no row can be used)"),
        ("a.csv", "sentence,label\na,yes\nb\tno\n", ":3", "a tab between columns, unlike the first line's comma"),
        ("a.csv", "sentence,sentence,label\na,b,yes\n", ":1", "2 columns are named 'sentence'"),
        ("a.jsonl", '{"sentence": {"en": "a"}, "label": 1}\n', ":1", "'sentence' is dict (expected a string; see"),
        ("a.jsonl", '{"sentence": "a", "label": [1]}\n', ":1", "'label' is list (expected a string or a number; see"),
        ("a.jsonl", '{"sentence": "a\\ud800", "label": 1}\n', ":1", "half a surrogate pair"),
        ("a.jsonl", '{"sentence": "a", "label": null}\n', ":1", "'label' is null (no row can be used)"),
        ("a.csv", "sentence,label\na,yes\nb, \nc,\nd,yes\ne,\n", ":3", "is empty (also lines 4, 6; --skip_bad_lines=3"),
        ("a.tsv", "sentence\tlabel\na\tyes\nb\0\tno\n", ":3", "a NUL character, which is not text"),
        ("a.csv", "", "", "no examples"),
        ("a.csv", "sentence,label\n", "", "no examples"),
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
        read_rows(str(path), ("sentence",), "label", settings())
    assert str(error.value).startswith(f"{path}{place}: ") and says in str(error.value)
    if says in ("not valid JSON", "3 columns, expected 2", "not UTF-8"):
        assert len(read_rows(str(path), ("sentence",), "label", settings(skip_bad_lines=1))) == 1


def test_wrong_own_labels(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('text,label\n"a\nb",yes\nc,no\n')
    rows = read_rows(str(path), ("text",), "label", settings())
    with pytest.raises(UserError) as error:  # the validation file of another task
        to_examples(rows, str(path), ("maybe", "yes"))
    assert str(error.value).startswith(f"{path}:4: unknown label 'no' (expected one of maybe, yes")
    assert rows[0].line == 2
    with pytest.raises(UserError) as error:
        to_examples(rows, str(path), ())
    assert str(error.value).startswith(f"{path}:2: label 'yes' is not a number")
    path.write_text("text,label\na,yes\nb,yes\n")
    with pytest.raises(UserError, match=r"a\.csv: the only label in 'label' is 'yes'"):
        own_task(settings(train_file=str(path)), read_rows(str(path), ("text",), "label", settings()))


def test_equal_numbers_are_the_same_label(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label\na,1\nb,2.0\nc, 2\n")
    rows = read_rows(str(path), ("text",), "label", settings())
    assert to_examples(rows, str(path), ("1.0", "2", "x")).labels.tolist() == [0, 1, 1]
    assert to_examples(rows, str(path), (" 2", "1", "2.0")).labels.tolist() == [1, 2, 0]  # spelled so, if there are several


# ---------------------------------------------------------------------------------------------------------------------
# Training and predicting


def write_labelled(path, n, seed):
    """Texts whose first word gives the label away."""
    rows = [("yes", f"w91 {text}") if i % 2 else ("no", f"w92 {text}") for i, text in enumerate(sentences(n, seed))]
    separator = {".csv": ",", ".tsv": "\t"}.get(path.suffix)
    if separator:
        lines = [f"text{separator}kind", *(f"{text}{separator}{label}" for label, text in rows)]
    else:
        lines = [json.dumps({"text": text, "kind": label}) for label, text in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_own_labels_are_learned_and_predicted(pretrained, tmp_path, suffix, capsys):
    train, val = write_labelled(tmp_path / f"train.{suffix}", 400, 0), write_labelled(tmp_path / f"val.{suffix}", 100, 1)
    out = tmp_path / "out"
    options = [f"--train_file={train}", f"--val_file={val}", "--label_column=kind", "--lr=3e-3", "--epochs=4"]
    main([f"--checkpoint={pretrained}", f"--out={out}", f"--predict_file={val}", *options, *CPU])
    own = json.loads((out / "glue.json").read_text())["tasks"]["own"]
    assert own["metrics"]["accuracy"]["mean"] > 0.95 and own["metrics"]["macro_f1"]["mean"] > 0.95
    assert own["majority_accuracy"] == 0.5
    assert "classification into no, yes" in capsys.readouterr().out
    main([f"--checkpoint={out}/model", f"--predict_file={val}", f"--out={tmp_path / 'p'}", *CPU])
    predicted = [line.split("\t")[1] for line in (tmp_path / "p/predictions.tsv").read_text().splitlines()[1:]]
    scored = [line.split("\t")[2] for line in (out / "predictions/own.seed19.tsv").read_text().splitlines()[1:]]
    assert predicted == scored
    assert (out / "predictions.tsv").read_bytes() == (tmp_path / "p/predictions.tsv").read_bytes()


@pytest.mark.parametrize("random", [False, True])
def test_a_model_says_what_it_was_tuned_from(tmp_path, random):
    hub = pytest.importorskip("huggingface_hub")
    run = run_with_wordpiece(tmp_path / "run", converted_from={"name": "someone/bert", "revision": None})
    train = write_labelled(tmp_path / "a.csv", 8, 0)
    options = [f"--train_file={train}", f"--val_file={train}", "--label_column=kind", "--epochs=1"]
    main([f"--checkpoint={run}", f"--out={tmp_path / 'out'}", *options, *CPU, *["--random_weights"] * random])
    model = f"{tmp_path}/out/model"
    config, _, _ = checkpoint.load(model)
    assert config["fine_tuned_from"] == (None if random else checkpoint.find(run))
    card = model_card(ConvertConfig(to_hf=model, out="exported"), config, ("no", "yes"), "text-classification")
    assert hub.ModelCard(card).data.base_model == (None if random else "someone/bert")
    assert f"| fine-tuned from | {'random weights' if random else checkpoint.find(run)} |" in card


def test_own_numbers_are_regression(pretrained, tmp_path, capsys):
    rows = ["text\tlabel", *(f"{text}\t{len(text) / 7}" for text in sentences(60, 0))]
    (tmp_path / "a.tsv").write_text("\n".join(rows) + "\n")
    options = [f"--train_file={tmp_path}/a.tsv", f"--val_file={tmp_path}/a.tsv", "--random_weights"]
    main([f"--checkpoint={pretrained}", f"--out={tmp_path}/out", *options, *CPU])
    own = json.loads((tmp_path / "out/glue.json").read_text())["tasks"]["own"]
    assert set(own["metrics"]) == {"pearson", "spearman", "mean_error"} and own["init"] == "random"
    assert "regression" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, reason",
    [
        ("--train_file=a.csv", "together"),
        ("", "give --train_file and --val_file, or --predict_file"),
        ("--predict_file=a.csv", "not fine-tuned"),
        ("--predict_file=a.csv --epochs=3", "--epochs: needs --train_file (nothing is trained with --predict_file alone)"),
        ("--predict_file=a.csv --max_length=64", "--max_length: needs --train_file"),
        ("--predict_file=a.csv --dry_run", "--dry_run: needs --train_file"),
        ("--predict_file=a.csv --jobs=2", "--jobs: needs --train_file"),
        ("--predict_file=a.csv --text_columns=a,b,c", "two for pairs"),
        ("--predict_file=a.csv --text_columns=a,a", "text_columns=a,a: the same column twice"),
        ("--predict_file=a.tsv --trust_quotes", "trust_quotes: only for .csv files (save a .tsv with quotes as .csv)"),
        ("--train_file=a.csv --val_file=a.csv --text_columns=label", "is a text column too"),
    ],
)
def test_mistakes_are_one_line(pretrained, tmp_path, capsys, options, reason):
    with pytest.raises(SystemExit) as status:
        main([f"--checkpoint={pretrained}", f"--out={tmp_path}/out", *options.split(), *CPU])
    error = capsys.readouterr().err
    assert status.value.code == 2 and error.count("\n") == 1 and reason in error, error


def test_a_failed_command_does_not_block_its_out(tmp_path, capsys, monkeypatch):
    """What it converted is not in the way of a command with another checkpoint, nor hides that there is none."""

    def convert(argv, **options):
        if "tools.convert_hf" not in argv:
            return run(argv, **options)
        if "--from_hf=google/nix" in argv:
            print("error: no such model", file=sys.stderr)
            return subprocess.CompletedProcess(argv, 2)
        Path(out).mkdir(exist_ok=True)
        make_run(Path(argv[-1].removeprefix("--out=")))
        return subprocess.CompletedProcess(argv, 0)

    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", convert)
    out, train = f"{tmp_path}/out", write_labelled(tmp_path / "a.csv", 8, 0)
    for name in ("exported", "other"):
        (tmp_path / name).mkdir()
    for name, reason in ((f"{tmp_path}/exported", "not fine-tuned, so it predicts nothing"), ("google/nix", "no such model")):
        with pytest.raises(SystemExit) as status:
            main([f"--checkpoint={name}", f"--predict_file={train}", f"--out={out}", *CPU])
        assert status.value.code == 2 and reason in capsys.readouterr().err
    options = [f"--train_file={train}", f"--val_file={train}", "--label_column=kind", "--epochs=1"]
    main([f"--checkpoint={tmp_path}/other", f"--out={out}", *options, *CPU])
    assert json.loads(Path(f"{out}/glue.json").read_text())["checkpoint"] == f"{tmp_path}/other"
