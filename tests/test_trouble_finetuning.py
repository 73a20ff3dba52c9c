"""What went wrong for people who fine-tuned: guesses about labels, lost rows, late checks, results of another run."""

import csv
import json
import re
import shutil
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import checkpoint
import finetune_glue
from common.encoded import Encoded
from common.labelled import read_rows, to_examples
from common.options import UserError
from common.processes import Process
from common.run_directory import pretraining_cost
from finetune_glue import load_classifier, load_pretrained, make_classifier
from model import ModelConfig
from tests import toy
from tests.corpus import frame
from tests.test_finetune_glue import CPU, sentences, suite, write_glue
from tests.test_finetune_own import settings, write_labelled
from tests.toy import make_run
from tools.finetune_own import main, own_task, warn_of_points


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


def fails(command, argv, capfd):
    """The error of a command that ends in one line."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as status:
        command(argv)
    error = capfd.readouterr().err
    assert status.value.code == 2 and error.count("\n") - error.count("checkpoint skipped\n") == 1, error
    return error


# ---------------------------------------------------------------------------------------------------------------------
# Guesses about labels


def guess(tmp_path, labels, **options):
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + "".join(f't,"{label}"\n' for label in labels))
    return own_task(settings(train_file=str(path), **options), read_rows(str(path), ("text",), "label", settings()))


@pytest.mark.parametrize(
    "labels, says",
    [
        ([*(f"{i / 4}" for i in range(199)), "N/A"], ":201: label 'N/A' is not a number, as 199 of 200 labels are"),
        ([f"{i},5" for i in range(99)], ":2: label '0,5' has a decimal comma, as 99 of 99 labels do .write numbers"),
        (["N/A", "1,234", *(f"{i},5" for i in range(99))], ":4: label '0,5' has a decimal comma, as 100 of 101 labels do"),
        ([f"{i},500" for i in range(1, 99)], ":2: label '1,500' has separators between thousands, as 98 of 98 labels do"),
        ([f"{i},500.75" for i in range(1, 99)], ":2: label '1,500.75' has separators between thousands, as 98 of 98"),
        ([f"{i}.500,75" for i in range(1, 99)], ":2: label '1.500,75' has separators between thousands, as 98 of 98"),
        ([*(f"{i}" for i in range(99)), "1 000"], ":101: label '1 000' has separators between thousands, as 1 of 100"),
        (["950", *(f"{i}.500" for i in range(1, 99))], ":3: label '1.500' has separators between thousands, as 98 of 99"),
        ([*map(str, range(30)), "unknown"], ":32: label 'unknown'"),
        (["1.5", *(f"\u2212{i}.5" for i in range(30))], ":3: label '\u22120.5' has U\\+2212 MINUS SIGN, as 30 of 31 labels do .write"),
        ([*(f"{i}.5" for i in range(30)), "\u20131,234"], ":32: label '\u20131,234' has U\\+2013 EN DASH, as 1 of 31"),
        ([f"\uff11.{i}" for i in range(1, 30)], ":2: label '\uff11.1' has U\\+FF11 FULLWIDTH DIGIT ONE, as 29 of 29"),
        (["950", "800", "1.100", "2.250"] * 15, ":4: label '1.100' has separators between thousands, as 30 of 60 labels do"),
        (["1,000", "2,000", "950"] * 20, ":2: label '1,000' has separators between thousands, as 40 of 60 labels do"),
        (["1,0", "2,0"] * 30, ":2: label '1,0' has a decimal comma, as 60 of 60 labels do"),
        (["3,123", "0,000", *(f"{i},25" for i in range(58))], ":3: label '0,000' has a decimal comma, as 60 of 60 labels do"),
        (["\u0661\u066b\u0665", "\u0662\u066b\u0665"] * 9, ":2: label '\u0661\u066b\u0665' has U\\+0661 ARABIC-INDIC DIGIT ONE, as 9 of 18"),
    ],
)
def test_labels_that_contradict_each_other(tmp_path, labels, says):
    with pytest.raises(UserError, match=f"{says}.*--problem=classification takes all as words"):
        guess(tmp_path, labels)
    assert len(guess(tmp_path, labels, problem="classification").labels) == len(set(labels))


def test_decimal_commas_between_semicolons_and_in_the_validation_file(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text;label\n" + "".join(f"t;{i},5\n" for i in range(60)))
    rows = read_rows(str(path), ("text",), "label", settings())
    for problem, says in (("auto", ", as 60 of 60 labels do"), ("regression", r" \(write numbers with a point alone")):
        with pytest.raises(UserError, match=f"a.csv:2: label '0,5' has a decimal comma{says}"):
            own_task(settings(train_file=str(path), problem=problem), rows)
    with pytest.raises(UserError, match="b.csv:2: label '0,5' has a decimal comma"):
        to_examples(rows, "b.csv", ())


def test_points_that_may_separate_thousands(tmp_path, capsys):
    def read(labels):
        path = tmp_path / "b.csv"
        path.write_text("text,label\n" + "".join(f"t,{label}\n" for label in labels))
        rows = read_rows(str(path), ("text",), "label", settings())
        warn_of_points(path, rows)
        return to_examples(rows, str(path), ()).labels.tolist(), capsys.readouterr().out

    with pytest.raises(UserError, match="b.csv:3: label '-1.100' has separators between thousands .*1234.5 or 950.0"):
        read(["950", "-1.100"])  # whatever the training file or --problem says
    for labels in (["1.100", "2.345"], ["1.100", "1100", "950"], ["1.100", "99"]):
        numbers, printed = read(labels)
        assert numbers == list(map(float, labels)) and "b.csv: label '1.100' is read as 1.1 (if the point" in printed
    for labels in (["0.080", "0.140", "500"], ["950.0", "1.100"], ["1.100", "2.25"], ["950", "1100"]):
        assert read(labels) == (list(map(float, labels)), "")


def test_numbers_of_both_files_are_looked_at(pretrained, tmp_path, capsys):
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("text,kind\n" + "".join(f"t{i},{i % 9 + 1}.{i + 100}\n" for i in range(20)))
    main(own(pretrained, tmp_path, "--dry_run"))
    printed = capsys.readouterr().out
    assert all(f"{name}: label '1.100' is read as 1.1 (if the point" in printed for name in ("a.csv", "b.csv"))


@pytest.mark.parametrize(
    "labels, says",
    [
        (["1_0", "1_1"] * 9, "classification into 1_0, 1_1: the labels are words"),
        (list(map(str, range(30))), "regression: the labels are 30 different whole numbers (or --problem=classification)"),
        (["0.5", "1", "2"], "regression: the labels are 3 different numbers (or --problem=classification)"),
        (["0", "1"], "classification into 0, 1: the labels are 2 different whole numbers (or --problem=regression)"),
        (["nan", "inf"], "classification into inf, nan: the labels are words"),
    ],
)
def test_what_is_guessed_is_said_with_its_reason(tmp_path, capsys, labels, says):
    guess(tmp_path, labels)
    assert f"a.csv: {says}\n" in capsys.readouterr().out


def test_near_equal_and_rare_labels_are_warned_about(tmp_path, capsys):
    guess(tmp_path, ["1"] * 9 + ["1.0"] * 2 + ["2"] * 9)
    printed = capsys.readouterr().out
    assert "labels '1' and '1.0' (lines 11, 12) are different classes" in printed
    assert "the labels are 2 different whole numbers, spelled in 3 ways (or" in printed
    guess(tmp_path, ["pos"] * 9 + [" pos", "Pos"] + ["neg"] * 9)
    printed = capsys.readouterr().out
    assert "labels 'pos' and ' pos' (line 11) are" in printed and "labels 'pos' and 'Pos' (line 12) are" in printed
    assert "labels with fewer than 5 rows: ' pos' (line 11), 'Pos' (line 12) (too few to learn)" in printed
    guess(tmp_path, ["pos"] * 9 + ["NA"] * 9)
    assert "label 'NA' (lines 11, 12, 13 and 6 more) is taken as a class" in capsys.readouterr().out
    excels = "#N/A #DIV/0! #NAME? #NV #WERT! #BEZUG! #ZAHL! #ÜBERLAUF! #VALEUR! #NOMBRE! #NOM? #NUL! #N/D #¡VALOR! #¿NOMBRE? #¡DIV/0!"
    others = r"\N NaT . -- (blank) '' undefined k.A. n.a. #값!"
    for missing in (*excels.split(), *others.split(), "<NA>", "\u2013"):  # of Excel, pandas, databases and Word
        guess(tmp_path, ["pos"] * 9 + [missing] * 9)
        assert f"label {missing!r} (lines 11, 12, 13 and 6 more) is taken as a class" in capsys.readouterr().out
    for words in (["pos", "neg"], ["#wow!", "#5!"], ["1\u20132", "\u2013a"]):
        guess(tmp_path, words * 9)
        assert "warning" not in capsys.readouterr().out


def test_classes_with_another_minus_sign(tmp_path, capsys):
    task = guess(tmp_path, ["\u22121", "0", "1"] * 9)
    says = "label '\u22121' (lines 2, 5, 8 and 6 more) has U+2212 MINUS SIGN, as 1 of 3 classes do (if it means a number, write -1)"
    assert task.labels == ("0", "1", "\u22121") and f"a.csv: {says}\n" in capsys.readouterr().out
    rows = read_rows(str(tmp_path / "a.csv"), ("text",), "label", settings())
    with pytest.raises(UserError, match=r"a.csv:2: unknown label '\u22121', with U\+2212 MINUS SIGN \(expected one of -1, 0, 1\)"):
        to_examples(rows, "a.csv", ("-1", "0", "1"))
    with pytest.raises(UserError, match=r"a.csv:2: label '\u22121' has U\+2212 MINUS SIGN \(write numbers .* as -1234.5"):
        guess(tmp_path, ["\u22121", "0", "1"] * 9, problem="regression")


@pytest.mark.parametrize(
    "first, second, says",
    [
        ("negative", "negatve", "'negative' and 'negatve'"),
        ("negative", "negaitve", "'negative' and 'negaitve'"),
        ("negativ", "negative", "'negativ' and 'negative'"),
        ("very negative", "very negatife", "'very negative' and 'very negatife'"),
        ("pos", "pos\u200b", r"'pos' and 'pos\u200b'"),
        ("pos", "p\u043es", r"'pos' and 'p\u043es'"),
        ("caf\u00e9", "cafe\u0301", r"'café' and 'cafe\u0301'"),
        ("1", "\uff11", r"'1' and '\uff11'"),
        ("\u0130yi", "iyi", "'\u0130yi' and 'iyi'"),
        ("\u03cc\u03c7\u03b9", "\u039f\u03a7\u0399", "'\u03cc\u03c7\u03b9' and '\u039f\u03a7\u0399'"),
        ("pos", "pos.", "'pos' and 'pos.'"),
        ("nem", "NEM!", "'nem' and 'NEM!'"),
        ("1 %", "1%", "'1 %' and '1%'"),
        ("50-100", "50 - 100", "'50-100' and '50 - 100'"),
        ("\u2764", "\u2764\ufe0f", "'\u2764' and '\u2764\ufe0f'"),
        ("1", "'1", "'1' and \"'1\""),
        ("\uae0d\uc815", "\ubd80\uc815", ""),  # positive and negative, which have letters in common
        ("1" + "0" * 17, "1" + "0" * 16 + "1", ""),  # one float
        ("-1.0", "\uff0d\u0661", r"'-1.0' and '\uff0d\u0661'"),
        ("-1", "\u22121", "'-1' and '\u22121'"),
        ("class_a", "class_b", ""),
        ("group a, left", "group b, left", ""),
        ("typical", "atypical", ""),
        ("top10", "top20", ""),
        ("10001", "10011", ""),
        ("male", "mole", ""),
        ("positive", "negative", ""),
    ],
)
def test_misspelled_labels_are_named(tmp_path, capsys, first, second, says):
    guess(tmp_path, [first] * 10 + [second] * 10)
    printed = capsys.readouterr().out
    assert "warning" not in printed if not says else f"labels {says} (lines 12, 13, 14 and 7 more) are different" in printed


def test_many_misspelled_labels_are_a_few_lines(tmp_path, capsys):
    guess(tmp_path, [f"negative{'x' * i}" for i in range(20)] * 5)
    printed = capsys.readouterr().out
    assert printed.count("warning") == 6 and "14 more labels are spelled almost as another" in printed


def test_long_lists_end_after_a_label(tmp_path, capsys):
    labels = [f"{i} %, or more" for i in range(100, 120)]
    guess(tmp_path, [f"{i} % or so" for i in range(100, 120)] * 5)
    assert "114 % or so and 5 more: the labels are words\n" in capsys.readouterr().out
    rows = read_rows(str(tmp_path / "a.csv"), ("text",), "label", settings())
    with pytest.raises(UserError, match=r"\(expected one of 100 %, or more, .*, 111 %, or more and 8 more\)"):
        to_examples(rows, "a.csv", labels)


def test_labels_are_compared_exactly(tmp_path, capsys):
    """One float, but another number. Where only the spelling differs, a line says so."""
    huge, path = "1" + "0" * 17, tmp_path / "b.csv"
    path.write_text(f"text,label\na,{huge[:-1]}1\n")
    rows = read_rows(str(path), ("text",), "label", settings())
    with pytest.raises(UserError, match=f"b.csv:2: unknown label '{huge[:-1]}1' .expected one of 2, {huge}"):
        to_examples(rows, str(path), ("2", huge))
    path.write_text("text,label\na,007\nb,7\nc,1E2\nd,1.0\ne,1\n")
    rows = read_rows(str(path), ("text",), "label", settings())
    assert to_examples(rows, str(path), ("007", "1", "100", "1e" + "9" * 20)).labels.tolist() == [0, 0, 2, 1, 1]
    assert capsys.readouterr().out == f"{path}:3: label '7' is taken for '007', and 2 more are spelled otherwise\n"
    to_examples(rows[:1], str(path), ("007", "1"))
    assert capsys.readouterr().out == ""


def test_whole_numbers_are_counted_exactly(tmp_path, capsys):
    """Of 2^53 + 1 to 2^53 + 100, every other one is no float."""
    guess(tmp_path, [f"{2**53 + i}" for i in range(1, 101)])
    assert "the labels are 100 different whole numbers" in capsys.readouterr().out


def test_blanks_of_known_labels_are_shown(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\na,tak\n")
    rows = read_rows(str(tmp_path / "a.csv"), ("text",), "label", settings())
    with pytest.raises(UserError, match="unknown label 'tak' .expected one of ' nie', ' tak'"):
        to_examples(rows, "a.csv", (" nie", " tak"))


def test_results_of_something_else_are_refused(pretrained, tmp_path, files, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "glue.json").write_text('{"my": "glue"}')
    with pytest.raises(SystemExit) as stopped:
        main(own(pretrained, tmp_path))
    assert stopped.value.code == 2 and "out/glue.json: not written by finetune_glue.py (choose" in capsys.readouterr().err


def own(pretrained, tmp_path, *options, out="out"):
    """A toy fine-tuning of a.csv, scored on b.csv."""
    files = [f"--train_file={tmp_path}/a.csv", f"--val_file={tmp_path}/b.csv", "--epochs=1", "--label_column=kind"]
    return [f"--checkpoint={pretrained}", f"--out={tmp_path / out}", *files, *CPU, *options]


@pytest.fixture
def files(tmp_path):
    write_labelled(tmp_path / "a.csv", 40, 0)
    write_labelled(tmp_path / "b.csv", 10, 1)


def test_the_plan_is_printed_first(pretrained, tmp_path, files, capfd, monkeypatch):
    monkeypatch.setattr(finetune_glue, "train", lambda *_: (_ for _ in ()).throw(UserError("a step was taken")))
    with pytest.raises(SystemExit):
        main(own(pretrained, tmp_path, "--batch_size=1000", "--epochs=5", "--seeds=2", "--lr=1e-3"))
    printed = capfd.readouterr().out
    assert f"{tmp_path}/a.csv: no 20, yes 20\n" in printed and f"{tmp_path}/b.csv: no 5, yes 5\n" in printed
    assert "own: 40 examples, 5 epochs, 5 steps of 1000, peak lr 0.001, warm-up 6%, 2 seeds, from pretrained\n" in printed
    assert "batch_size=1000 is more than the 40 examples of own: an epoch is one step, 5 in all" in printed


def test_what_a_run_leaves_out_or_replaces_is_said(pretrained, tmp_path, files, capfd):
    """Texts in both files, the ends of long texts, what the score is, and earlier predictions."""
    with open(tmp_path / "b.csv", "a") as file:
        rows = (tmp_path / "a.csv").read_text().splitlines(keepends=True)[1:4]
        file.writelines(row.replace(" ", "  ", 1) for row in rows)  # a blank more makes no other text
    options = ["--max_length=12", "--seeds=1", f"--predict_file={tmp_path}/b.csv"]
    for replaced in ("", " (in place of those that were there)"):
        main(own(pretrained, tmp_path, *options))
        printed = capfd.readouterr().out
        assert f"{tmp_path}/b.csv: 3 of its 13 texts are in {tmp_path}/a.csv, too" in printed
        for name in ("own train", f"{tmp_path}/b.csv")[bool(replaced) :]:
            assert re.search(f"{name}: \\d+ of \\d\\d are longer than 12 tokens, and truncated \\(--max_length, in training\\)", printed), name
        assert (f"{tmp_path}/out: 1 of 1 run finished before: nothing is trained\n" in printed) == bool(replaced)
        assert "1 seed, from pretrained" in printed and "average of 1" not in printed
        assert "score: the mean of accuracy and macro_f1\n" in printed
        assert f"predictions.tsv: 13 predictions{replaced}\n" in printed


def test_runs_that_are_finished_are_said(pretrained, tmp_path, files, capfd):
    main(own(pretrained, tmp_path, "--seeds=1"))
    assert "finished before" not in capfd.readouterr().out
    main(own(pretrained, tmp_path, "--seeds=2"))
    assert f"{tmp_path}/out: 1 of 2 runs finished before: the others are trained\n" in capfd.readouterr().out


def test_words_that_the_model_does_not_know_are_counted(pretrained, tmp_path, files, capfd):
    """喜欢 and 差 were the same input, and nobody said so, in training, validation and prediction."""
    for name in "ab":
        text = (tmp_path / f"{name}.csv").read_text()
        (tmp_path / f"{name}.csv").write_text(f"{text}喜欢,no\n差,yes\n")
    main(own(pretrained, tmp_path, "--seeds=1", f"--predict_file={tmp_path}/b.csv"))
    printed = capfd.readouterr().out
    for name in ("own train", "own validation", f"{tmp_path}/b.csv"):
        assert f"{name}: 2 of " in printed, name
    assert printed.count("have words that are not in the vocabulary: the model sees [UNK]") == 3


def test_attention_that_cannot_fit_is_refused(pretrained, tmp_path, files, capfd, monkeypatch):
    """Two layers of two heads, and texts of 5,002 tokens: 4 * 2 * 2 * 5002^2 bytes = 400.3 MB."""
    monkeypatch.setattr(finetune_glue, "train", lambda *_: (_ for _ in ()).throw(UserError("training starts")))
    with open(tmp_path / "a.csv", "a") as file:
        file.write("w1 " * 5000 + ",yes\n")
    argv = own(pretrained, tmp_path, "--max_length=8192", "--batch_size=1")
    for memory, says in ((401e6, "training starts"), (400e6, "max_length=8192: texts of up to 5,002 tokens take 400.3 MB")):
        monkeypatch.setattr(finetune_glue, "memory_of", lambda device: memory)
        assert says in fails(main, argv, capfd)
    assert "max_length=100000: must be 5 to 8192" in fails(main, [*argv, "--max_length=100000"], capfd)


@pytest.mark.parametrize("length, sizes", [(512, [64, 16]), (2048, [16] * 5), (4096, [4] * 20), (8192, [1] * 80)])
def test_long_texts_are_scored_a_few_at_a_time(length, sizes):
    """Plain attention for n texts of this length takes n * length^2 numbers per head."""
    found, starts = [], np.arange(80) * length
    ids, labels = np.zeros(80 * length, np.int32), np.zeros(80, np.int64)
    encoded = Encoded(ids, ids, starts, np.full(80, length), labels, range(80))

    class Model:
        cfg = ModelConfig()

        def eval(self):
            pass

        def __call__(self, batch):
            found.append(len(batch.cu_seqlens) - 1)
            return torch.zeros(found[-1], 2)

    finetune_glue.predict(Model(), encoded, Process(0, 1, torch.device("cpu"), torch.float32))
    assert found == sizes


def test_contradicting_labels_are_counted(pretrained, tmp_path, files, capfd):
    with open(tmp_path / "a.csv", "a") as file:
        file.write("w1,yes\nw2,no\nw1,no\nw1,no\nw2,yes\nw3,no\nw3,no\n")
    main(own(pretrained, tmp_path, "--dry_run"))
    printed = capfd.readouterr().out
    assert f"warning: {tmp_path}/a.csv: 2 texts have contradicting labels, as 'w1' on lines 42, 44, 45 (" in printed
    with open(tmp_path / "a.csv", "a") as file:
        file.write("".join(f"{'nan ' * 20},{label}\n" for label in ("yes", "no", "no", "no")))
    main(own(pretrained, tmp_path, "--dry_run"))
    assert f"3 texts have contradicting labels, as '{'nan ' * 10}' on lines 49, 50, 51 and" in capfd.readouterr().out


def test_a_dry_run_writes_nothing(pretrained, tmp_path, files):
    main(own(pretrained, tmp_path, f"--predict_file={tmp_path}/b.csv", "--dry_run"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "b.csv"]


def test_a_replaced_classifier_is_said(pretrained, tmp_path, files, capfd):
    main(own(pretrained, tmp_path))
    assert "before" not in capfd.readouterr().out
    main(own(f"{tmp_path}/out/model", tmp_path, "--dry_run", out="next"))
    assert f"{tmp_path}/out/model: fine-tuned on labels no, yes before: that classifier is left" in capfd.readouterr().out


def test_a_class_of_the_validation_file_only(pretrained, tmp_path, files, capfd):
    text = (tmp_path / "b.csv").read_text()
    (tmp_path / "b.csv").write_text(text + "w1,perhaps\n")
    assert "b.csv:12: unknown label 'perhaps' (expected one of no, yes)" in fails(main, own(pretrained, tmp_path), capfd)


def test_regression_is_in_the_labels_unit(pretrained, tmp_path):
    """Prices of 200,000 to 470,000: predictions of the same size, also by the saved model, and errors in dollars."""
    for name, n, seed in (("a.csv", 400, 0), ("b.csv", 60, 1)):
        texts = [(f"w9{i % 2} {text}", 220_000 + 220_000 * (i % 2) + i) for i, text in enumerate(sentences(n, seed))]
        (tmp_path / name).write_text("text,kind\n" + "".join(f"{text},{price}\n" for text, price in texts))
    options = ["--lr=3e-3", "--epochs=4", f"--predict_file={tmp_path}/b.csv"]
    main(own(pretrained, tmp_path, *options))
    metrics = json.loads((tmp_path / "out/glue.json").read_text())["tasks"]["own"]["metrics"]
    assert metrics["mean_error"]["mean"] < 20_000 and metrics["pearson"]["mean"] > 0.95
    rows = [line.split("\t") for line in (tmp_path / "out/predictions.tsv").read_text().splitlines()[1:]]
    scored = [line.split("\t") for line in (tmp_path / "out/predictions/own.seed19.tsv").read_text().splitlines()[1:]]
    np.testing.assert_allclose([float(row[1]) for row in rows], [float(row[2]) for row in scored], rtol=1e-6)
    assert 0 < json.loads((tmp_path / "out/runs/own.seed19.jsonl").read_text().splitlines()[1])["loss"] < 2


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def test_an_open_quote_takes_one_row_with_it(tmp_path, capsys):
    path = tmp_path / "a.csv"
    path.write_text("text,label\na0,0\n" + '"a1,1\n' + "".join(f"a{i},{i}\n" for i in range(2, 50)))
    rows = read_rows(str(path), ("text",), "label", settings(skip_bad_lines=1))
    assert [row.index for row in rows] == [0, *range(2, 50)] and rows[1] == (2, 4, ["a2", "2"])
    assert f"skipped {path}:3: unexpected end of data on line 51 (is a quote not closed?)\n" == capsys.readouterr().out
    path.write_text(path.read_text() + 'b",50\n')  # all of them one row, but for their labels
    with pytest.raises(UserError, match="a.csv:3: one row up to line 52, though its lines are rows \\(is a quote not closed"):
        read_rows(str(path), ("text",), "label", settings())
    assert len(read_rows(str(path), ("text",), "label", settings(skip_bad_lines=1))) == 50
    capsys.readouterr()
    for third in ('"c",3,4', 'c",3,4'):  # closed by the next quote, in a row of too many columns
        path.write_text(f'text,label\n"a,1\nb,2\n{third}\nd,5\n')
        rows = read_rows(str(path), ("text",), "label", settings(skip_bad_lines=2))
        assert [row.cells for row in rows] == [["b", "2"], ["d", "5"]]
        assert re.fullmatch(r"skipped .*:2(: .*\nskipped .*:|, )4: .*\n", capsys.readouterr().out)


@pytest.mark.parametrize("label", ["label", ""])
@pytest.mark.parametrize("cell, says", [
    (b"Sch\xf6ne Arbeit.\nMit freundlichen Gruessen,\nIhr Team Koeln", ""), (b"Sch\xf6ne;Arbeit.\nIhr Team", ""),
    (b"Schoene Arbeit.\nMit freundlichen Gr\xfc\xdfen,\nIhr Team Koeln", "line 4: "),
    (b"Arbeit\n\0 mit vielen Gr\xfc\xdfen\n,", "line 4: "),
])  # fmt: skip
def test_a_row_with_a_line_that_is_not_utf8_is_skipped_whole(tmp_path, capsys, cell, says, label):
    """Its other lines were rows, and so were shifted the indices of the rows behind it."""
    path, rows = tmp_path / "m.csv", ["Erste Zeile gut,positiv", "Letzte Zeile gut,positiv", "Noch eine schlecht,negativ"]
    path.write_bytes("\n".join(["text,label", rows[0], '"{}",negativ', *rows[1:], ""]).encode().replace(b"{}", cell))
    found = read_rows(str(path), ("text",), label, settings(skip_bad_lines=1))
    assert [",".join(row.cells) for row in found] == [row if label else row.split(",")[0] for row in rows]
    assert [row.index for row in found] == [0, 2, 3]
    assert capsys.readouterr().out.startswith(f"skipped {path}:3: {says}not UTF-8: invalid start byte (Latin-1 or Windows")
    with pytest.raises(UserError, match=f"m.csv:3: {says}not UTF-8.*; --skip_bad_lines=1 skips it\\)$"):
        read_rows(str(path), ("text",), label, settings())


def test_a_tsv_row_in_quotes_with_a_line_that_is_not_utf8(tmp_path, capsys):
    """Quotes are literal, so each line is named: none of them is a row."""
    path = tmp_path / "a.tsv"
    path.write_bytes(b'text\tlabel\na\t1\n"b \xff\nb\nb"\t2\nc\t1\n')
    rows = read_rows(str(path), ("text",), "label", settings(skip_bad_lines=3))
    assert [row.cells for row in rows] == [["a", "1"], ["c", "1"]]
    assert re.match(r"skipped .*:3: not UTF-8: .*\nskipped .*:4, 5: quotes hold", capsys.readouterr().out)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
@pytest.mark.parametrize("first", ["sep={}", '"SEP={}"', "\ufeffsep={}\r", "sep={}{}"])
@pytest.mark.parametrize("mark, called", [(",", "comma"), (";", "semicolon"), ("\t", "tab"), ("|", "vertical bar")])
def test_excels_line_before_the_names(tmp_path, capsys, name, first, mark, called):
    """It was taken for the names. Where there is one column, it alone says what a comma means."""
    path, excels, other = tmp_path / name, first.format(mark, mark), ";" if mark == "," else ","
    path.write_text(f"{excels}\ntext{mark}label\na{mark}yes\nb{mark}no\n", encoding="utf-8")
    assert read_rows(str(path), ("text",), "label", settings()) == [(0, 3, ["a", "yes"]), (1, 4, ["b", "no"])]
    says = f"{path}: read with a {called} between columns, as in its first line\n"
    assert capsys.readouterr().out == ("" if (name, mark) in (("a.csv", ","), ("a.tsv", "\t")) else says)
    path.write_text(f"{excels}\ntext\na{other} b\n", encoding="utf-8")
    assert read_rows(str(path), ("text",), "", settings()) == [(0, 3, [f"a{other} b"])]


def test_excels_line_and_no_such_column(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("sep=;\nsatz,label\na,yes\n")
    with pytest.raises(UserError, match="a.csv:2: no column 'text' .the first row has satz,label; see"):
        read_rows(str(path), ("text",), "label", settings())
    path.write_text("sep=;\n")
    with pytest.raises(UserError, match="a.csv: no examples"):
        read_rows(str(path), ("text",), "label", settings())


@pytest.mark.parametrize("quoting", [csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
def test_a_tsv_all_in_quotes(tmp_path, capsys, quoting):
    """pandas and R write it. Its columns were not found, as their names have quotes, too."""
    path, cells = tmp_path / "a.tsv", ["plain", 'he said "no"', "two\nlines", "a\ttab", ""]
    with open(path, "w", newline="") as file:
        csv.writer(file, delimiter="\t", quoting=quoting, lineterminator="\n").writerows(
            [("text", "label"), *((cell, i) for i, cell in enumerate(cells))]
        )
    rows = read_rows(str(path), ("text",), "label", settings())
    assert [row.cells for row in rows] == [[cell, str(i)] for i, cell in enumerate(cells)]
    assert f"{path}: read with the quotes of a .csv, as in its first line\n" in capsys.readouterr().out


def test_a_tsv_all_in_quotes_but_for_its_names(tmp_path, capsys):
    path = tmp_path / "a.tsv"
    path.write_text('text\tlabel\n"a"\t"yes"\n"b"\tno\n"c"\t"no"\n')
    assert [row.cells[0] for row in read_rows(str(path), ("text",), "label", settings())] == ['"a"', '"b"', '"c"']
    assert "the model reads a .tsv's quotes: lines 2, 4 (save it as .csv)" in capsys.readouterr().out


TSV_CELLS = ("save", 'he said "no"', "a\nb\n\nc", "d\te", 'f, "g"\nh', "i")


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_quotes_of_a_csv_in_a_tsv(tmp_path, capsys, order):
    """pandas writes them. Halves of texts were labelled rows, and the reason was a comma of the text."""
    path, says = tmp_path / "a.tsv", "quotes hold a tab or a line break, but they are literal in .tsv (save it as .csv"
    table = [("text", "label"), *((cell, "yes") for cell in TSV_CELLS)]
    path.write_bytes(frame("\t", *([row[j] for j in order] for row in table)))
    with pytest.raises(UserError, match=f"a.tsv:4: {re.escape(says)}; also lines 5, 7, 8 and 2 more"):
        read_rows(str(path), ("text",), "label", settings())
    rows = read_rows(str(path), ("text",), "label", settings(skip_bad_lines=6))
    assert [row.cells[0] for row in rows] == ["save", '"he said ""no"""', "i"]
    printed = capsys.readouterr().out
    assert f"skipped {path}:4, 5, 7, 8, 9, 10: {says})\n" in printed
    warning = "cells in quotes, as a .csv has them, but the model reads a .tsv's quotes: line 3 (save it as .csv)"
    assert f"warning: {path}: {warning}\n" in printed
    read_rows(str(path), ("text",), "label", SimpleNamespace(skip_bad_lines=6))
    assert "warning" not in capsys.readouterr().out  # GLUE's own files have them


@pytest.mark.parametrize(
    "name, contents, says",
    [
        ("a.csv", 'text\nb\nhe said "hi"\n"c" d\n', "a.csv:4: ',' expected after '\"'"),
        ("a.csv", "text\n\"a\nb\n", "a.csv:2: unexpected end of data on line 3"),
        ("a.tsv", "text\tlabel\nSome apples, and more    yes\nb\tno\n", "a.tsv:2: 1 column, expected 2 (a tab or a line break in"),
        ("a.tsv", "text\tlabel\nSome 1,200 apples    yes\nb\tno\n", "a.tsv:2: 1 column, expected 2 (a tab or a line break in"),
        ("a.tsv", "text\tlabel\nSome apples,yes\nb\tno\n", "a.tsv:2: a comma between columns, unlike the first line's tab"),
        ("a.csv", "text\na\rb\n", "a.csv:2: a lone carriage return (remove it; if it ends a line: tr '\\r' '\\n' < FILE > NEW; "),
        ("a.jsonl", '{"text": "first", "text": "second"}\n', "a.jsonl:1: 'text' is there more than once ("),
        ("a.csv", "text,label\ra,yes\rb,no\r", "a.csv: a single line, with \\r inside: old Mac line ends (convert it: tr"),
        ("a.jsonl", '{"text": "a"}\r{"text": "b"}\n', "a.jsonl: a single line, with \\r inside: old Mac line ends (convert it"),
    ],
)
def test_the_cause_is_the_right_one(tmp_path, name, contents, says):
    """There is no other separator where there is one column, and none in prose."""
    path = tmp_path / name
    path.write_bytes(contents.encode())
    with pytest.raises(UserError) as error:
        read_rows(str(path), ("text",), "", settings())
    assert says in str(error.value)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl"])
def test_joined_files_with_marks_inside(tmp_path, name):
    """cat a.csv b.csv, of two that Excel wrote."""
    part = {"a.csv": 'text\n"a, b"\n', "a.tsv": "text\na, b\n", "a.jsonl": '{"text": "a, b"}\n'}[name]
    (tmp_path / name).write_text(f"\ufeff{part}\ufeff{part.removeprefix('text' + chr(10))}", encoding="utf-8")
    assert [row.cells for row in read_rows(str(tmp_path / name), ("text",), "", settings())] == [["a, b"]] * 2


@pytest.mark.parametrize("name, mark", [("a.csv", ","), ("a.csv", ";"), ("a.tsv", "\t")])
def test_joined_files_with_their_names_inside(tmp_path, capsys, name, mark):
    """cat a.csv b.csv: a row with the label "label", and another class."""
    path = tmp_path / name
    path.write_text("\n\ufefftext,label\na,yes\n\ufefftext,label\nb,no\nlabel,text\n".replace(",", mark), encoding="utf-8")
    with pytest.raises(UserError, match=f"{name}:4: the names of the columns again .--skip_bad_lines=1 skips it"):
        read_rows(str(path), ("text",), "label", settings())
    rows = read_rows(str(path), ("text",), "label", settings(skip_bad_lines=1))
    assert [row.cells for row in rows] == [["a", "yes"], ["b", "no"], ["label", "text"]]
    (tmp_path / name).write_text("text\na\ntext\n")  # a text like any other
    assert [row.cells for row in read_rows(str(path), ("text",), "", settings())] == [["a"], ["text"]]
    path, mark = (path, mark) if mark != ";" else (path, ",")
    path.write_text(f"a{mark}yes\nb{mark}no\na{mark}yes\n")  # no names, but a row twice
    assert len(read_rows(str(path), ("text",), "", settings(), ("text", "label"))) == 3


def test_names_of_two_lines_again(tmp_path):
    names = '"t\nu",text,label\n'
    (tmp_path / "a.csv").write_text(f"{names}a,b,yes\n{names}c,d,no\n")
    rows = read_rows(str(tmp_path / "a.csv"), ("text",), "label", settings(skip_bad_lines=1))
    assert rows == [(0, 3, ["b", "yes"]), (2, 6, ["d", "no"])]


def test_a_blank_before_quotes(tmp_path, capsys):
    """They become part of the text. In quotes themselves they are."""
    path = tmp_path / "a.csv"
    path.write_text('label,text\nneg, "great film"\npos," ""so"" it is"\npos," ""so"""\nneg, it is "so"\n "neg",a\n')
    rows = read_rows(str(path), ("text",), "label", settings())
    assert [row.cells[0] for row in rows] == [' "great film"', ' "so" it is', ' "so"', ' it is "so"', "a"]
    says = "blanks before cells in quotes, so the model reads both: lines 2, 6 (remove the blanks)"
    assert capsys.readouterr().out == f"warning: {path}: {says}\n"


def test_a_column_with_a_comma_in_its_name(pretrained, tmp_path, capfd):
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text('"How was it, really?",kind\na,yes\nb,no\n')
    error = fails(main, own(pretrained, tmp_path, "--text_columns=How was it, really?"), capfd)
    assert "no column 'How was it' (the first row has How was it, really?, kind; " in error
    assert "; commas separate columns: rename the one that has a comma in its name)" in error
    (tmp_path / "a.csv").write_text('"a, b",kind\na,yes\n')
    assert "has a comma" not in fails(main, own(pretrained, tmp_path, "--text_columns=text"), capfd)
    error = fails(main, own(pretrained, tmp_path, "--text_columns=So, how was it, really?"), capfd)
    assert "or two for pairs (commas separate them: rename one that has a comma in its name)" in error


def test_quotes_can_be_trusted(tmp_path, capsys):
    """A quoted table inside a cell looks like rows."""
    path, table = tmp_path / "a.csv", "x,1\ny,2\nz,1"
    path.write_text(f'text,label\n"{table}",1\nb,2\nc,1\n')
    with pytest.raises(UserError, match="a.csv:2: one row up to line 4, .* if the quotes are right: --trust_quotes=true"):
        read_rows(str(path), ("text",), "label", settings())
    rows = read_rows(str(path), ("text",), "label", settings(trust_quotes=True))
    assert [row.cells for row in rows] == [[table, "1"], ["b", "2"], ["c", "1"]] and capsys.readouterr().out == ""


def test_parquet(tmp_path):
    """As .jsonl: a number is a label, null is no text."""
    pyarrow = pytest.importorskip("pyarrow")
    path = tmp_path / "a.parquet"
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table({"label": [1, 2, 3], "text": ["a", None, "c"]}), path)
    with pytest.raises(UserError, match="a.parquet:2: 'text' is null"):
        read_rows(str(path), ("text",), "label", settings())
    rows = read_rows(str(path), ("text",), "label", settings(skip_bad_lines=1))
    assert rows == [(0, 1, ["a", "1"]), (2, 3, ["c", "3"])]


def test_a_long_text_in_quotes(tmp_path, capsys):
    """An e-mail with commas is no row, though its lines may have two cells; one of many lines is named."""
    path, letter = tmp_path / "a.csv", "Dear Ms. Li, hello\nNow, then\n" * 15
    path.write_text(f'text,label\n"Hi, all\nbye",no\n"{letter}",yes\nshort,yes\n')
    rows = read_rows(str(path), ("text",), "label", settings())
    assert [row.cells for row in rows] == [["Hi, all\nbye", "no"], [letter, "yes"], ["short", "yes"]]
    assert f"warning: {path}: one row holds lines 4 to 34 (is a quote not closed?)\n" == capsys.readouterr().out
    path.write_text("text,label\n" + '"Berlin, 5\nBonn, 6\nUlm, 7",1\n' * 3)
    assert len(read_rows(str(path), ("text",), "label", settings())) == 3
    path.write_text('id,text\n1,"Sehr geehrte Frau Li,\nvielen Dank"\n2,"Hallo, Li\nBis bald, Anna"\n')
    assert len(read_rows(str(path), ("text",), "", settings())) == 2
    path.write_text('label,text\nyes,"a\nb"\nno,"c\nd"\nno,e\n')  # first lines with all columns and a label
    assert [len(read_rows(str(path), ("text",), column, settings())) for column in ("label", "")] == [3, 3]
    assert capsys.readouterr().out == ""


def test_a_label_in_two_lines(tmp_path, capsys):
    """Also beside a row without a label, which made every line with other columns look like a row."""
    path = tmp_path / "a.csv"
    path.write_text('text,label\na,"pos\nitive"\nb,\nc,neg\n"d\ne",neg\n')
    rows = read_rows(str(path), ("text",), "label", settings(skip_bad_lines=1))
    assert [row.cells for row in rows] == [["a", "pos\nitive"], ["c", "neg"], ["d\ne", "neg"]]
    assert capsys.readouterr().out == f"skipped {path}:4: the label is empty\n"


@pytest.mark.parametrize(
    "name, separator, called", [("a.csv", ";", "semicolon"), ("a.csv", "\t", "tab"), ("a.tsv", ",", "comma")]
)
def test_columns_between_other_separators(tmp_path, capsys, name, separator, called):
    path = tmp_path / name
    path.write_text(separator.join(("text", "label")) + f'\n"a{separator} ""b""\nc"{separator}yes\nd{separator}no\n')
    rows = read_rows(str(path), ("text",), "label", settings())
    assert [row.cells for row in rows] == [[f'a{separator} "b"\nc', "yes"], ["d", "no"]]
    assert f"read with a {called} between columns, as in its first line\n" in capsys.readouterr().out


def test_blank_lines_and_empty_texts_are_said(tmp_path, capsys):
    path = tmp_path / "a.csv"
    path.write_text("text,id\na,1\n\n\n,2\n ,3\nb,4\n\n")
    assert len(read_rows(str(path), ("text",), "", settings())) == 4
    blank, empty = capsys.readouterr().out.splitlines()
    assert blank == f"{path}: blank lines are not rows: lines 3, 4"
    assert empty == f"warning: {path}: 2 of 4 rows have an empty text: lines 5, 6"


def test_texts_that_were_lost_before_are_said(tmp_path, capsys):
    path = tmp_path / "a.csv"
    path.write_text("text,also,label\na nan, b,M\ufffdll\nb,NaN ,c\nm\ufffde,b,c\n-,#NAME?,c\n")
    read_rows(str(path), ("text", "also"), "", settings())
    missing, broken = capsys.readouterr().out.splitlines()
    assert missing == f"warning: {path}: 2 of 4 rows have a text like 'NaN ', as where it is missing: lines 3, 5"
    assert broken.startswith(f"warning: {path}: 1 of 4 rows hold U+FFFD: line 4: characters were lost before they came here (")
    read_rows(str(path), ("text",), "label", settings())
    missing, broken = capsys.readouterr().out.splitlines()
    assert "1 of 4 rows have a text like '-'" in missing and "2 of 4 rows hold U+FFFD: lines 2, 4" in broken


@pytest.mark.parametrize(
    "name, lines",
    [
        ("a.csv", ["text,label", "a,1", "b,1,1", "c,1", "\xff,1", "d,1", "\xff,1"]),
        ("a.tsv", ["text\tlabel", "a\t1", "b", "c\t1", "\xff\t1", "d\t1", "\xff\t1"]),
        ("a.jsonl", ["", '{"text": "a", "label": 1}', "{", '{"text": "c", "label": 1}', '"\xff"',
                     '{"text": "d", "label": 1}', '"\xff"']),
    ],
)  # fmt: skip
def test_every_row_is_kept_or_named_and_counted(tmp_path, capsys, name, lines):
    (tmp_path / name).write_bytes("".join(line + "\n" for line in lines).encode("latin-1"))
    rows = read_rows(str(tmp_path / name), ("text",), "label", settings(skip_bad_lines=3))
    assert rows == [(0, 2, ["a", "1"]), (2, 4, ["c", "1"]), (4, 6, ["d", "1"])]
    printed = capsys.readouterr().out.splitlines()
    skipped = [line.partition(": ")[0] for line in printed if line.startswith("skipped")]
    assert skipped == [f"skipped {tmp_path / name}:3", f"skipped {tmp_path / name}:5, 7"]
    with pytest.raises(UserError):
        read_rows(str(tmp_path / name), ("text",), "label", settings(skip_bad_lines=2))


@pytest.mark.parametrize(
    "name, contents, says",
    [
        ("a.csv", "text,label\na,1\n".encode("utf-16"), ": looks like UTF-16, not UTF-8 text (iconv -f UTF-16 -t UTF-8 converts it)"),
        ("a.csv", b"PK\x03\x04\0\0", ": looks like a zip file, as .docx and .xlsx are, not UTF-8 text (convert it, or leave it out)"),
        ("a.jsonl", '{"text": "a", "label": 1}\n'.encode("utf-16-be"), ": looks like UTF-16BE, not UTF-8 text (iconv -f UTF-16BE -t UTF-8 converts it)"),
        ("a.csv", "gr\u00f6\u00dfe,text,label\n1,a,1\n".encode("latin-1"), ":1: not UTF-8: invalid start byte (Latin-1 or Windows-1252? convert it: iconv -f ENCODING -t UTF-8)"),
    ],
)  # fmt: skip
def test_skipping_is_offered_only_where_it_helps(tmp_path, name, contents, says):
    """--skip_bad_lines=100 skipped the whole file, or the names of its columns, and the next error was another."""
    (tmp_path / name).write_bytes(contents)
    for lines in (0, 100):
        with pytest.raises(UserError) as error:
            read_rows(str(tmp_path / name), ("text",), "label", settings(skip_bad_lines=lines))
        assert str(error.value) == f"{tmp_path / name}{says}"


def test_predictions_are_of_the_files_rows(pretrained, tmp_path, capsys):
    labels = ["a\tb", "c\nd"]
    for name, n in (("a.jsonl", 12), ("b.jsonl", 6)):
        records = [{"text": f"w{i}\tw2", "kind": labels[i % 2]} for i in range(n)]
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "new.jsonl").write_text('{"text": "w1\\tw2"}\n{"text": null}\n{"text": "w3\\n\\\\w4"}\n')
    options = [f"--train_file={tmp_path}/a.jsonl", f"--val_file={tmp_path}/b.jsonl", f"--predict_file={tmp_path}/new.jsonl"]
    main(own(pretrained, tmp_path, *options, "--skip_bad_lines=1"))
    header, *lines = [line.split("\t") for line in (tmp_path / "out/predictions.tsv").read_text().splitlines()]
    assert header == ["index", "prediction", "probability", "text"]
    assert [line[0] for line in lines] == ["0", "2"] and {line[1] for line in lines} <= {"a\\tb", "c\\nd"}
    assert [line[3] for line in lines] == ["w1\\tw2", "w3\\n\\\\w4"]
    assert "skipped" in capsys.readouterr().out
    lines = (tmp_path / "out/predictions/own.seed19.tsv").read_text().splitlines()
    assert [line.split("\t")[:2] for line in lines[1:3]] == [["0", "a\\tb"], ["1", "c\\nd"]]


# ---------------------------------------------------------------------------------------------------------------------
# Checks before any training


@pytest.mark.parametrize(
    "contents, says",
    [
        (None, "new.jsonl: No such file"),
        ('{"text": "\\ud800"}\n', "new.jsonl:1: 'text' has half a surrogate pair"),
        ('{"text": {"a": "b"}}\n', "new.jsonl:1: 'text' is dict (expected a string"),
        ('{"texts": "a"}\n', "new.jsonl:1: no 'text' (keys: texts; see"),
        ("", "new.jsonl: no examples"),
    ],
)
def test_the_file_to_label_is_read_before_training(pretrained, tmp_path, files, capfd, contents, says):
    if contents is not None:
        (tmp_path / "new.jsonl").write_text(contents)
    argv = own(pretrained, tmp_path, f"--predict_file={tmp_path}/new.jsonl")
    assert says in fails(main, argv, capfd) and not (tmp_path / "out").exists()


def test_columns_of_the_file_to_label(pretrained, tmp_path, files, capfd):
    main(own(pretrained, tmp_path))
    (tmp_path / "new.csv").write_text("text,body\nw91 w1,w92 w1\n")
    model = [f"--checkpoint={tmp_path}/out/model", f"--predict_file={tmp_path}/new.csv", *CPU]
    texts = {}
    for columns in ("text", "body"):
        main([*model, f"--out={tmp_path}/{columns}", f"--text_columns={columns}"])
        header, row = (line.split("\t") for line in (tmp_path / columns / "predictions.tsv").read_text().splitlines())
        texts[header[3]] = row[3]
    assert texts == {"text": "w91 w1", "body": "w92 w1"}
    error = fails(main, [*model, f"--out={tmp_path}/p", "--text_columns=text,body"], capfd)
    assert "text_columns=text,body: the model was trained on text" in error


@pytest.mark.parametrize(
    "path, says",
    [
        ("RUN/step_00000001/model.safetensors", r"a file of a checkpoint \(give its directory, .*/step_00000001\)"),
        ("OUT/smok", r"out/smok: no such directory \(did you mean .*/out/smoke\?\)"),
        ("OUT/nothing/at/all", "no such directory"),
        ("OUT/smoke", "a run that has no checkpoint yet"),
        ("OUT/labels/model", r"every checkpoint here is damaged \(restore one from a copy, or remove them all\)"),
        ("OUT/labels", r"no checkpoint here \(did you mean .*/out/labels/model\?\)"),
    ],
)
def test_a_checkpoint_that_is_none(pretrained, tmp_path, capfd, path, says):
    (tmp_path / "out/smoke").mkdir(parents=True)
    (tmp_path / "out/smoke/log.jsonl").write_text("")  # a run before its first checkpoint
    (tmp_path / "out/labels/model/step_00000010").mkdir(parents=True)
    (tmp_path / "out/labels/glue.json").write_text("{}")
    path = path.replace("RUN", pretrained).replace("OUT", str(tmp_path / "out"))
    argv = [f"--checkpoint={path}", f"--out={tmp_path}/glue", "--tasks=cola", *CPU]
    error = fails(finetune_glue.main, argv, capfd).splitlines(keepends=True)[-1]
    assert re.search(says, error), error


@pytest.mark.parametrize("script", ["own", "glue"])
def test_a_damaged_model_is_not_called_finished(pretrained, tmp_path, files, capfd, script):
    """It was, and what predicted with it or started from it failed later."""
    argv, command, model = own(pretrained, tmp_path), main, tmp_path / "out/model"
    if script == "glue":
        data, command, model = write_glue(tmp_path / "data", ("mnli",)), finetune_glue.main, tmp_path / "out/mnli"
        argv = [f"--checkpoint={pretrained}", f"--data_dir={data}", f"--out={tmp_path}/out", "--tasks=mnli", "--epochs=1", *CPU]
    command(argv)
    (step,) = model.iterdir()
    whole = (step / "model.safetensors").read_bytes()
    (step / "model.safetensors").write_bytes(whole[:100])
    hint = "(restore it from a copy; or remove it, and the same command trains it again)"
    assert f"error: {model}: the fine-tuned model is damaged {hint}" in fails(command, argv, capfd)
    shutil.rmtree(step)
    assert hint in fails(command, argv, capfd)
    shutil.rmtree(model)
    command(argv)
    assert (model / step.name / "model.safetensors").read_bytes() == whole


# ---------------------------------------------------------------------------------------------------------------------
# Results that are not this run's


def test_renamed_labels(pretrained, tmp_path, files, capfd):
    main(own(pretrained, tmp_path))
    for name in ("a.csv", "b.csv"):
        path = tmp_path / name
        path.write_text(path.read_text().replace(",no\n", ",never\n"))
    assert "different labels" in fails(main, own(pretrained, tmp_path), capfd)
    assert "no\t" in (tmp_path / "out/predictions/own.seed19.tsv").read_text()


@pytest.mark.parametrize(
    "option, name",
    [("--lr=1e-3", "lr"), ("--epochs=2", "epochs"), ("--max_length=9", "max_length"), ("--random_weights", "random_weights"),
     ("--dtype=bfloat16", "dtype"), ("--batch_size=3", "batch_size"), ("--recipe=fast", "recipe")],
)  # fmt: skip
def test_one_average_is_of_one_kind_of_run(pretrained, tmp_path, option, name, capfd):
    """Also where the two commands have no task in common."""
    data, out = write_glue(tmp_path / "data", ("cola", "rte")), tmp_path / "out"
    suite(pretrained, data, out, "--tasks=cola", "--seeds=1")
    argv = [f"--checkpoint={pretrained}", f"--data_dir={data}", f"--out={out}", "--epochs=1", "--seeds=1", *CPU]
    error = fails(finetune_glue.main, [*argv, "--tasks=rte", option], capfd)
    assert f"holds results with different {name} (choose another --out)" in error
    assert set(suite(pretrained, data, out, "--tasks=rte", "--seeds=1")["tasks"]) == {"cola", "rte"}


def test_one_average_has_one_start(pretrained, tmp_path, capfd):
    data, out = write_glue(tmp_path / "data", ("mnli", "rte", "mrpc")), tmp_path / "out"
    suite(pretrained, data, out, "--tasks=rte", "--seeds=1")
    argv = [f"--checkpoint={pretrained}", f"--data_dir={data}", f"--out={out}", "--epochs=1", "--seeds=1", *CPU]
    error = fails(finetune_glue.main, [*argv, "--tasks=mnli,mrpc"], capfd)
    assert "holds results with different starts of RTE, MRPC or STS-B" in error
    assert set(suite(pretrained, data, out, "--tasks=mnli", "--seeds=1")["tasks"]) == {"mnli", "rte"}


def test_results_of_earlier_code_are_kept(pretrained, tmp_path):
    data, out = write_glue(tmp_path / "data", ("cola", "rte")), tmp_path / "out"
    first = suite(pretrained, data, out, "--tasks=cola")
    earlier = {name: value for name, value in first.items() if name not in ("lr", "epochs", "max_length", "dtype")}
    (out / "glue.json").write_text(json.dumps(earlier))
    assert suite(pretrained, data, out, "--tasks=rte")["tasks"]["cola"] == first["tasks"]["cola"]


def test_a_run_that_still_trains_is_looked_up_once(tmp_path, monkeypatch):
    run, data = make_run(tmp_path / "run"), write_glue(tmp_path / "data", ("cola",))
    plan = finetune_glue.make_plan

    def as_training_continues(*arguments):
        first = tmp_path / "run/step_00000001"
        shutil.copytree(first, tmp_path / "run/step_00000002")
        toy.reseal(tmp_path / "run/step_00000002")
        return plan(*arguments)

    read = []
    original = finetune_glue.read_pretrained
    monkeypatch.setattr(finetune_glue, "make_plan", as_training_continues)
    monkeypatch.setattr(finetune_glue, "read_pretrained", lambda path: read.append(path) or original(path))
    suite(run, data, tmp_path / "out", "--tasks=cola")
    assert checkpoint.steps(run) == [2, 1] and set(read) == {f"{run}/step_00000001"}


# ---------------------------------------------------------------------------------------------------------------------
# [PAD], and what pretraining cost


def test_the_padding_embedding_is_that_of_pad(tmp_path, monkeypatch):
    special = ["[UNK]", "[CLS]", "[PAD]", "[SEP]", "[MASK]"]
    monkeypatch.setattr(toy, "make_tokenizer", partial(toy.make_tokenizer, special=special))
    start = load_pretrained(make_run(tmp_path / "run"), "")
    model = make_classifier(start, 2, seed=0)
    assert model.bert.embeddings.word_embeddings.padding_idx == 2
    config = json.dumps({**start.config, "task": {"labels": ["a", "b"]}})
    texts = {"config.json": config, "tokenizer.json": start.tokenizer_text}
    (tmp_path / "model").mkdir()
    checkpoint.save(str(tmp_path / "model"), 1, {"model.safetensors": checkpoint.weights_of(model)}, texts)
    assert load_classifier(str(tmp_path / "model")).bert.embeddings.word_embeddings.padding_idx == 2


def test_cost_counts_the_gpus_of_each_second(tmp_path):
    path = tmp_path / "run/step_00000001"
    run = make_run(tmp_path / "run")
    assert pretraining_cost(str(path))["gpu_hours"] == 4.0  # 7,200 s of two processes, by earlier code
    (path / "state.json").write_text(json.dumps({"step": 1, "seconds": 7200.0, "gpu_seconds": 10_800.0}))
    start = json.loads((tmp_path / "run/log.jsonl").read_text())
    start["config"]["price_per_gpu_hour"] = 3.0
    with open(tmp_path / "run/log.jsonl", "a") as log:
        log.write(json.dumps({**start, "world_size": 1}) + "\n")
    cost = pretraining_cost(str(path))
    assert (cost["gpu_hours"], cost["dollars"]) == (3.0, 9.0) and run
