"""The GLUE server's zip: official test layouts, row counts, label words, and the whole way from training to the zip."""

import json
import zipfile

import numpy as np
import pytest

from common.glue import GLUE_TASKS
from common.options import UserError
from finetune_glue import Worker
from tests.test_finetune_glue import CPU, sentences, suite, write_glue
from tests.test_glue import MNLI, STSB, mock_hub, settings, some_examples, write_lines, write_split
from tests.toy import make_run
from tools.glue_submission import SUBMISSION, main, read_test, task_of, to_words, write_submission

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
LINES = {  # of each file, header included
    "AX": 1105, "CoLA": 1064, "MNLI-m": 9797, "MNLI-mm": 9848, "MRPC": 1726, "QNLI": 5464, "QQP": 390966, "RTE": 3001,
    "SST-2": 1822, "STS-B": 1380, "WNLI": 147,
}  # fmt: skip


def test_submission(tmp_path):
    predictions = {}
    for file in sorted(LINES.keys() - {"WNLI"}):
        task, rows = task_of(file), SUBMISSION[file][2]
        scores = np.linspace(-1, 6, rows) if not task.labels else np.arange(rows) % len(task.labels)
        predictions[file] = [str(i) for i in range(rows)], to_words(task, scores)
    write_submission(str(tmp_path / "a.zip"), predictions)
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
    predictions = {file: (["0"], ["0", "1"]) for file in SUBMISSION}
    with pytest.raises(ValueError):
        write_submission(str(tmp_path / "a.zip"), predictions)
    assert not (tmp_path / "a.zip").exists()


@pytest.mark.parametrize("file", sorted(LINES.keys() - {"AX", "WNLI"}))
def test_official_layouts(tmp_path, monkeypatch, file):
    name, split, _ = SUBMISSION[file]
    monkeypatch.setitem(SUBMISSION, file, (name, split, 5))
    texts, *_ = some_examples(name, 5)
    write_split(tmp_path, name, f"{split}.tsv", texts, layouts=TEST_LAYOUTS)
    assert read_test(file, settings(tmp_path)) == (["100", "101", "102", "103", "104"], texts)


@pytest.mark.parametrize("file", ["CoLA", "MNLI-mm"])
def test_wrong_number_of_rows(tmp_path, file):
    (name, split, rows), (texts, *_) = SUBMISSION[file], some_examples(SUBMISSION[file][0], LINES[file])
    for count in (rows - 1, rows + 1):
        path = write_split(tmp_path, name, f"{split}.tsv", texts[:count], layouts=TEST_LAYOUTS)
        with pytest.raises(UserError, match=f"{file}: {count:,} test rows, GLUE has {rows:,}"):
            read_test(file, settings(tmp_path))
    path.unlink()
    with pytest.raises(UserError, match=rf"no {split}\.tsv"):
        read_test(file, settings(tmp_path))


@pytest.mark.parametrize("folder", ["diagnostic", "AX", ""])
def test_read_diagnostic(tmp_path, folder):
    rows = [["index", "sentence1", "sentence2"], *([str(i), f"a{i}", f"b{i}"] for i in range(LINES["AX"] - 1))]
    write_lines(tmp_path / folder / "diagnostic.tsv", rows)
    indices, texts = read_test("AX", settings(tmp_path))
    assert texts[7] == ("a7", "b7") and indices[7] == "7"
    write_lines(tmp_path / folder / "diagnostic.tsv", rows[:-1])
    with pytest.raises(UserError, match="AX: 1,103 test rows"):
        read_test("AX", settings(tmp_path))


@pytest.mark.parametrize("file", sorted(LINES.keys() - {"WNLI"}))
def test_hub(monkeypatch, file):
    name, split, _ = SUBMISSION[file]
    monkeypatch.setitem(SUBMISSION, file, (name, split, 3))
    texts, asked = mock_hub(monkeypatch, name, lambda i: -1)
    assert read_test(file, settings()) == (["7", "8", "9"], texts)
    assert asked == [("nyu-mll/glue", name, split)]


# ---------------------------------------------------------------------------------------------------------------------
# From training to the zip


def write_tests(path, rows):
    """Small test sets in GLUE's layout, of the given numbers of rows."""
    for file, count in rows.items():
        if file == "WNLI":
            continue
        task, split = task_of(file), SUBMISSION[file][1]
        lines = ["\t".join(["id" if file == "QQP" else "index", *task.text_columns])]
        for i, texts in enumerate(zip(*(sentences(count, seed) for seed in range(len(task.text_columns))))):
            lines.append("\t".join([str(i), *texts]))
        (path / task.folder).mkdir(exist_ok=True)
        (path / task.folder / ("diagnostic.tsv" if file == "AX" else f"{split}.tsv")).write_text("\n".join(lines) + "\n")


def read_zip(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name).decode().splitlines() for name in archive.namelist()}


def test_submission_from_training_to_zip(tmp_path, monkeypatch, capsys):
    rows = {file: 3 + i for i, file in enumerate(SUBMISSION)}  # GLUE's own are up to 390,965
    for file, (name, split, _) in list(SUBMISSION.items()):
        monkeypatch.setitem(SUBMISSION, file, (name, split, rows[file]))
    run, data = make_run(tmp_path / "run"), write_glue(tmp_path / "data")
    argv = [f"--checkpoint={run}", f"--data_dir={data}", "--epochs=1", "--seeds=1", *CPU]
    with pytest.raises(SystemExit):  # before hours of training
        main([*argv, f"--out={tmp_path}/out"])
    assert "no diagnostic.tsv" in capsys.readouterr().err and not (tmp_path / "out").exists()
    write_tests(tmp_path / "data", rows)
    main([*argv, f"--out={tmp_path}/out"])
    files = read_zip(tmp_path / "out/glue_submission.zip")
    assert set(files) == {f"{file}.tsv" for file in rows}
    for file, (_, _, count) in SUBMISSION.items():
        header, *lines = files[f"{file}.tsv"]
        assert header == "index\tprediction" and len(lines) == count
        assert [line.split("\t")[0] for line in lines] == [str(i) for i in range(count)]
        found, labels = {line.split("\t")[1] for line in lines}, ("0",) if file == "WNLI" else task_of(file).labels
        assert found <= set(labels) if labels else all(0 <= float(word) <= 5 for word in found)

    trained, train = [], Worker.run
    monkeypatch.setattr(Worker, "run", lambda worker, run, *a: (trained.append(run.name), train(worker, run, *a))[1])
    finished = suite(run, data, tmp_path / "plain")  # by finetune_glue.py, which keeps MNLI's weights alone
    trained.clear()
    main([*argv, "--seeds=2", f"--out={tmp_path}/plain"])
    assert sorted(trained) == sorted(f"{name}.seed19" for name in GLUE_TASKS if name != "mnli")
    assert read_zip(tmp_path / "plain/glue_submission.zip") == files
    again = json.loads((tmp_path / "plain/glue.json").read_text())
    assert {name: task["scores"] for name, task in again["tasks"].items()} == {
        name: task["scores"] for name, task in finished["tasks"].items()
    }


def test_all_tasks_or_none(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([f"--checkpoint={make_run(tmp_path / 'run')}", f"--out={tmp_path}/out", "--tasks=cola", *CPU])
    assert "all eight tasks" in capsys.readouterr().err
