"""fill_mask.py on a toy checkpoint: guesses, vectors, and errors."""

import errno
import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoint import load_model
from common.batch import Batch
from common.vocabulary import load_tokenizer
from tests.toy import make_run, reseal
from tools import fill_mask


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("fill") / "run", scale=6.0)


def test_guesses_are_the_models(run_dir, capsys):
    fill_mask.main([f"--checkpoint={run_dir}", "--text=w18 w19 w20 [MASK] w22 [MASK] w24"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("([MASK] 1 of 2)") and lines[6].endswith("([MASK] 2 of 2)") and len(lines) == 12
    probabilities = [float(line.split()[0].rstrip("%")) for line in lines[1:6]]
    assert probabilities == sorted(probabilities, reverse=True) and 0 < sum(probabilities) <= 100.1
    model, (tokenizer, special) = load_model(run_dir), load_tokenizer(f"{run_dir}/tokenizer.json")
    ids = torch.tensor([[special["[CLS]"], *tokenizer.encode("w18 w19 w20 [MASK] w22 [MASK] w24").ids, special["[SEP]"]]])
    best = model.logits(ids, torch.ones_like(ids))[0, 4].argmax().item()
    assert lines[1].split()[1] == tokenizer.id_to_token(best)


def test_words_outside_the_vocabulary_are_named(run_dir, tmp_path, capsys):
    fill_mask.main([f"--checkpoint={run_dir}", "--text=w18 Paris [MASK] caf\u00e9"])
    assert capsys.readouterr().out.splitlines()[0] == "not in the vocabulary, so the model sees [UNK]: Paris, caf\u00e9"
    (tmp_path / "texts.txt").write_text("w1\nParis w2\n")
    fill_mask.main([f"--checkpoint={run_dir}", f"--embed={tmp_path / 'texts.txt'}", f"--out={tmp_path / 'v.npy'}"])
    assert capsys.readouterr().out.startswith("1 of 2 texts have words that are not in the vocabulary")


def test_characters_that_were_lost_before_are_said(run_dir, tmp_path, capsys):
    """Tokenizers drop U+FFFD, or do not know it."""
    lost = "characters were lost before they came here"
    fill_mask.main([f"--checkpoint={run_dir}", "--text=w18 M\ufffdll [MASK]"])
    assert capsys.readouterr().out.startswith(f"warning: --text: holds U+FFFD: {lost} (type it again)\n")
    (tmp_path / "texts.txt").write_text("w1\nnan\nw2\ufffd\n")
    fill_mask.main([f"--checkpoint={run_dir}", f"--embed={tmp_path / 'texts.txt'}", f"--out={tmp_path / 'v.npy'}"])
    says = f"warning: {tmp_path / 'texts.txt'}: 1 of 3 rows hold U+FFFD: line 3: {lost} (export it again as UTF-8)"
    assert capsys.readouterr().out.splitlines()[0] == says
    fill_mask.main([f"--checkpoint={run_dir}", "--text=w18 [MASK]"])
    assert "warning" not in capsys.readouterr().out


def test_vectors_are_means_of_hidden_states(run_dir, tmp_path, monkeypatch):
    texts = ["w1 w2 w3", "", "w50 " * 70, "w9"]
    (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n")
    arguments = [f"--checkpoint={run_dir}", f"--embed={tmp_path}/texts.txt", f"--out={tmp_path}/v.npy"]
    fill_mask.main(arguments)
    vectors = np.load(tmp_path / "v.npy")
    assert vectors.shape == (4, 32) and vectors.dtype == np.float32
    model, (tokenizer, special) = load_model(run_dir), load_tokenizer(f"{run_dir}/tokenizer.json")
    for text, vector in zip(texts, vectors):
        ids = torch.tensor([special["[CLS]"], *tokenizer.encode(text).ids, special["[SEP]"]])
        with torch.no_grad():
            hidden = model.bert(Batch(ids, torch.tensor([0, len(ids)], dtype=torch.int32), len(ids), windows=None))
        np.testing.assert_allclose(vector, hidden.mean(0).numpy(), rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(fill_mask, "BATCH_TOKENS", 4)  # the batches make no difference
    fill_mask.main(arguments)
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), vectors, rtol=1e-4, atol=1e-5)
    fill_mask.main([*arguments, "--normalize=true"])
    unit = np.load(tmp_path / "v.npy")
    np.testing.assert_allclose(unit, vectors / np.linalg.norm(vectors, axis=1, keepdims=True), rtol=1e-4, atol=1e-5)


def test_long_texts_are_truncated_and_counted(run_dir, tmp_path, capsys, monkeypatch):
    """Attention's memory grows with the square of the length: a line of 100,000 words asked for 7 TB."""
    monkeypatch.setattr(fill_mask, "LONGEST", 16)
    (tmp_path / "texts.txt").write_text("w1 w2\n" + "w3 " * 100 + "\n" + "w3 " * 14 + "\n" + "w3 " * 14 + "\n")
    fill_mask.main([f"--checkpoint={run_dir}", f"--embed={tmp_path}/texts.txt", f"--out={tmp_path}/v.npy"])
    assert capsys.readouterr().out.splitlines()[:-1] == ["1 of 4 texts is longer than 16 tokens, and truncated"]
    vectors = np.load(tmp_path / "v.npy")
    np.testing.assert_allclose(vectors[1:3], vectors[[3, 3]], rtol=1e-4, atol=1e-5)
    fill_mask.main([f"--checkpoint={run_dir}", "--text=[MASK] " + "w1 " * 50])
    assert "1 of 1 texts is longer than 16 tokens" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        fill_mask.main([f"--checkpoint={run_dir}", "--text=" + "w1 " * 5000 + "[MASK]"])
    error = capsys.readouterr().err
    assert "no [MASK] in the 16 tokens of 'w1 " in error and len(error) < 400


def test_texts_longer_than_in_training_are_said(tmp_path, capsys):
    run, step = make_run(tmp_path / "run"), tmp_path / "run/step_00000001"
    config = json.loads((step / "config.json").read_text())
    (tmp_path / "texts.txt").write_text("w1\n" + "w2 " * 70 + "\n" + "w2 " * 80 + "\n")
    for trained in ({"seq_length": 64}, {"task": {"max_length": 64}}):
        (step / "config.json").write_text(json.dumps(config | trained))
        reseal(step)
        fill_mask.main([f"--checkpoint={run}", f"--embed={tmp_path}/texts.txt", f"--out={tmp_path}/v.npy"])
        assert "2 of 3 texts are longer than the 64 tokens that the model was trained on\n" in capsys.readouterr().out


def test_compressed_texts(run_dir, tmp_path):
    vectors = []
    for name, data in (("a.txt", b"\xef\xbb\xbfw1\nw2 w3\n"), ("b.txt.gz", gzip.compress(b"w1\r\nw2 w3"))):
        (tmp_path / name).write_bytes(data)
        fill_mask.main([f"--checkpoint={run_dir}", f"--embed={tmp_path / name}", f"--out={tmp_path}/v.npy"])
        vectors.append(np.load(tmp_path / "v.npy"))
    np.testing.assert_array_equal(*vectors)


def test_a_blank_first_line_is_text(run_dir, tmp_path):
    """It looked like UTF-16: a quarter of its no bytes are zeros."""
    (tmp_path / "a.txt").write_bytes(b"\nw1\n")
    fill_mask.main([f"--checkpoint={run_dir}", f"--embed={tmp_path}/a.txt", f"--out={tmp_path}/v.npy"])
    assert np.load(tmp_path / "v.npy").shape == (2, 32)


def test_out_is_checked_before_any_work(run_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fill_mask, "embed", None)
    (tmp_path / "a.txt").write_text("w1\n")
    for out, says in (("v.txt", "not a .npy file"), ("no/v.npy", "No such directory"), ("d.npy", "a directory")):
        (tmp_path / "d.npy").mkdir(exist_ok=True)
        with pytest.raises(SystemExit):
            fill_mask.main([f"--checkpoint={run_dir}", f"--embed={tmp_path}/a.txt", f"--out={tmp_path / out}"])
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1
    assert sorted(path.name for path in Path(tmp_path).iterdir()) == ["a.txt", "d.npy"]


def test_a_full_disk_leaves_the_earlier_vectors(run_dir, tmp_path, capsys, monkeypatch):
    """The message was "None", and the earlier file was cut off."""
    (tmp_path / "a.txt").write_text("w1\n")
    argv = [f"--checkpoint={run_dir}", f"--embed={tmp_path}/a.txt", f"--out={tmp_path}/v.npy"]
    fill_mask.main(argv)
    before = (tmp_path / "v.npy").read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("common.files.os.fsync", full)
    with pytest.raises(SystemExit):
        fill_mask.main(argv)
    assert f"error: {tmp_path}/v.npy: No space left on device (free some space" in capsys.readouterr().err
    assert (tmp_path / "v.npy").read_bytes() == before and sorted(os.listdir(tmp_path)) == ["a.txt", "v.npy"]


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--text=a [MASK]"], "--checkpoint"),
        (["--checkpoint=nowhere", "--text=a [MASK]"], "nowhere: no such directory"),
        (["--checkpoint=RUN"], "either --text or --embed"),
        (["--checkpoint=RUN", "--text=a [MASK]", "--embed=TEXT"], "either --text or --embed"),
        (["--checkpoint=RUN", "--text=a [MASK]", "--out=x.npy"], "--out: means nothing with --text"),
        (["--checkpoint=RUN", "--text=a [MASK]", "--normalize=true"], "--normalize: means nothing with --text"),
        (["--checkpoint=RUN", "--text=no mask"], "no [MASK]"),
        (["--checkpoint=RUN", "--text=caf\udce9 [MASK]"], "--text: not UTF-8 (is it the terminal's encoding?)"),
        (["--checkpoint=RUN", "--embed=nowhere.txt", "--out=x.npy"], "nowhere.txt: No such file"),
        (["--checkpoint=RUN", "--embed=BINARY", "--out=x.npy"], "not UTF-8"),
        (["--checkpoint=RUN", "--embed=UTF16", "--out=x.npy"], "looks like UTF-16LE, not UTF-8 text (iconv -f UTF-16LE -t UTF-8"),
        (["--checkpoint=RUN", "--embed=PDF", "--out=x.npy"], "looks like a PDF, not UTF-8 text"),
        (["--checkpoint=RUN", "--embed=ZIPPED", "--out=x.npy"], "looks like a .gz file, not UTF-8 text"),
        (["--checkpoint=RUN", "--embed=LATIN", "--out=x.npy"], "LATIN:2: not UTF-8: "),
        (["--checkpoint=RUN", "--embed=a.csv", "--out=x.npy"], "a.csv: a .csv file (expected plain text, one text a line"),
        (["--checkpoint=RUN", "--embed=EMPTY", "--out=x.npy"], "empty"),
        (["--checkpoint=RUN", "--embed=BREAK", "--out=x.npy"], "BREAK: has no text, only blank lines"),
        (["--checkpoint=RUN", "--embed=BLANK", "--out=x.npy"], "BLANK: has no text, only blank lines"),
        (["--checkpoint=RUN", "--embed=TEXT"], "--out"),
        (["--checkpoint=RUN", "--embed=TEXT", "--out=/nowhere/x.npy"], "/nowhere/x.npy: No such"),
    ],
)
def test_mistakes(run_dir, tmp_path, capsys, arguments, says):
    files = {
        "BINARY": b"\xff\xfe\n", "EMPTY": b"", "TEXT": b"w1\n", "UTF16": "w1".encode("utf-16-le"), "PDF": b"%PDF-1.4\n",
        "ZIPPED": gzip.compress(b"w1"), "LATIN": b"w1 w2 w3\ncaf\xe9\n",
        "BREAK": b"\n", "BLANK": b"\xef\xbb\xbf\n\n  \n\t\n",
    }  # fmt: skip
    for name, contents in files.items():
        (tmp_path / name).write_bytes(contents)
        arguments = [argument.replace(name, str(tmp_path / name)) for argument in arguments]
    arguments = [argument.replace("RUN", run_dir) for argument in arguments]
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        fill_mask.main(arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and says in error
