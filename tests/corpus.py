"""Shared by the tests of prepare_c4.py and common/sources.py: a working directory, texts, ways to run and to inspect."""

import csv
import io
import json
import os
import random
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest

import data
import prepare_c4
from tests.toy import SPECIAL

WORDS = [f"w{i}" for i in range(300)]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOCAB = [*SPECIAL, *WORDS, *LETTERS, *(f"##{letter}" for letter in LETTERS), "中", "é"]


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """Each test runs in an empty directory with a vocab.txt."""
    monkeypatch.chdir(tmp_path)
    for name in ("RAYON_NUM_THREADS", "TOKENIZERS_PARALLELISM"):  # prepare_c4.py sets them, and later tests must not see that
        monkeypatch.setenv(name, "1")
    write_vocab(VOCAB)


def write_vocab(entries, path="vocab.txt"):
    Path(path).write_text("".join(f"{entry}\n" for entry in entries), encoding="utf-8")


def write_files(files):
    for name, contents in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(contents)


def write_texts(path, texts):
    """One document per line."""
    Path(path).write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")


def frame(separator, *rows):
    """The bytes that pandas writes: cells that hold quotes, separators or line breaks are in quotes."""
    table = io.StringIO()
    csv.writer(table, delimiter=separator, lineterminator="\n").writerows(rows)
    return table.getvalue().encode()


def make_texts(count, seed=0):
    """Distinct texts of 1 to 30 words from the vocabulary."""
    rng = random.Random(seed)
    return list(dict.fromkeys(" ".join(rng.choices(WORDS, k=rng.randint(1, 30))) for _ in range(2 * count)))[:count]


def prepare(**options):
    """Run prepare_c4.py in this process, with vocab.txt unless it trains a tokenizer. Options that are None are left out."""
    options = {"tokenizer": None if options.get("train_tokenizer") else "vocab.txt", "workers": 1, "out": "out", **options}
    prepare_c4.main([f"--{name}={value}" for name, value in options.items() if value is not None])


def prepare_fails(capsys, **options):
    """The one error line of a command that is refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        prepare(**options)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and error.endswith("\n")
    return error


def stored(split="train", out="out"):
    """The tokens of each document of a split, in order."""
    shards = data.Samples(out, split, 128).shards
    return [shard.tokens[a:b].tolist() for shard in shards for a, b in zip(shard.offsets, shard.offsets[1:])]


def ids(text):
    return [VOCAB.index(word) for word in text.split()]


def texts_of(documents):
    return [" ".join(VOCAB[token] for token in document) for document in documents]


def files_of(out="out"):
    """{name: bytes} of a shard directory, except the report, which holds wall-clock times."""
    return {path.name: path.read_bytes() for path in Path(out).iterdir() if path.name != "report.json"}


def state_of(directory):
    """{path: (mtime, bytes)} of all files below."""
    files = [path for path in Path(directory).rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def text_report():
    return json.loads(Path("out/report.json").read_text())


def only_whole_files(out="out"):
    names = set(os.listdir(out))
    return {"tokenizer.json", "manifest.json", "report.json"} <= names and all(name.endswith((".json", ".bin")) for name in names)


def raise_interrupt(*_):
    raise KeyboardInterrupt


@contextmanager
def interrupted(number=signal.SIGINT):
    """The command inside ends as on this signal."""
    with pytest.raises(SystemExit) as stopped:
        yield
    assert stopped.value.code == 128 + number
