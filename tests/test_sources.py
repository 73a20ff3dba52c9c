"""common/sources.py: every file format, the hub, and what cannot be read."""

import functools
import gzip
import json
import logging
import lzma
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub import HfFileSystem, constants

import data
import prepare_c4
from common import remote, sources
from tests.corpus import VOCAB, ids, interrupted, make_texts, only_whole_files, prepare, prepare_fails, raise_interrupt
from tests.corpus import stored, text_report, texts_of, workplace, write_files, write_texts, write_vocab  # noqa: F401
from tests.hub import COMMIT, Hub
from tests.toy import make_tokenizer

JSON_LINES = b'{"text": "w1"}\n{"text": "w2"}\n'
PACKED = random.Random(0).randbytes(5000).hex().encode()  # text that does not compress well


def zstd(contents):
    """A Zstandard frame."""
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as file:
        file.write(contents)
    return sink.getvalue().to_pybytes()


def parquet(rows_a_group=None, **columns):
    """The bytes of a Parquet file."""
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink, row_group_size=rows_a_group)
    return sink.getvalue().to_pybytes()


# ---------------------------------------------------------------------------------------------------------------------
# File formats


@pytest.mark.parametrize(
    "files, source, options, expected",
    [
        ({"a.txt": b"w1 w2\n\nw3"}, "a.txt", {}, ["w1 w2", "w3"]),
        ({"a.txt": b"w1\nw2\n\n \n\nw3\nw4\n"}, "a.txt", {"doc_sep": "blank"}, ["w1 w2", "w3 w4"]),
        ({"a.txt": b"w1\r\nw2\r\n\r\nw3"}, "a.txt", {"doc_sep": "blank"}, ["w1 w2", "w3"]),
        ({"a.txt": b"w1\n\nw2\n", "b.txt": b"w3"}, "a.txt,b.txt", {"doc_sep": "file"}, ["w1 w2", "w3"]),
        ({"a.jsonl": b'{"text": "w1 w2"}\n\n{"id": 7, "text": "w3"}'}, "a.jsonl", {}, ["w1 w2", "w3"]),
        ({"a.jsonl": '{"text": "w1\u2028w2\x85 w3"}\n'.encode()}, "a.jsonl", {}, ["w1 w2 w3"]),
        ({"a.jsonl": b'\xef\xbb\xbf{"text": "w1\\nw2"}\r\n{"text": "w3"}\r\n'}, "a.jsonl", {}, ["w1 w2", "w3"]),
        ({"a.jsonl": b'{"text": 1, "body": "w1"}\n'}, "a.jsonl", {"text_key": "body"}, ["w1"]),
        ({"a.json": b'{"text": "w1"}\n{"text": "w2"}\n'}, "a.json", {}, ["w1", "w2"]),
        ({"a.txt.gz": gzip.compress(b"w1\nw2\n") + gzip.compress(b"w3\n")}, "a.txt.gz", {}, ["w1", "w2", "w3"]),
        ({"a.jsonl.xz": lzma.compress(b'{"text": "w1"}\n')}, "a.jsonl.xz", {}, ["w1"]),
        ({"A.TXT": b"w1\n"}, "A.TXT", {}, ["w1"]),
        ({"a.json": b'\n [{"text": "w1"},\n {"text": "w2 w3"}]\n'[1:]}, "a.json", {}, ["w1", "w2 w3"]),
        ({"a.json": b"[]", "b.txt": b"w1"}, "a.json,b.txt", {}, ["w1"]),
        ({"a.csv": b'\xef\xbb\xbfid,text\r\n1,"w1 w2\nw3"\r\n\r\n2,w4\r\n3,"w5 ""w6"""\r\n'}, "a.csv", {"tokenizer": "quote.txt"}, ["w1 w2 w3", "w4", 'w5 " w6 "']),
        ({"a.csv.gz": gzip.compress(b"body\nw1\nw2\n")}, "a.csv.gz", {"text_key": "body"}, ["w1", "w2"]),
        ({"a.tsv": b'text\tid\nw1 w2\t1\n\nw3\t"2\n'}, "a.tsv", {}, ["w1 w2", "w3"]),
        ({"a.parquet": parquet(text=["w1 w2", "w3"], id=[1, 2])}, "a.parquet", {}, ["w1 w2", "w3"]),
        ({"a.parquet": parquet(rows_a_group=2, body=[f"w{i}" for i in range(5)])}, "a.parquet", {"text_key": "body"}, ["w0", "w1", "w2", "w3", "w4"]),
        ({"a.txt.zst": zstd(b"w1\nw2\n") + zstd(b"w3\n")}, "a.txt.zst", {}, ["w1", "w2", "w3"]),
        ({"d/a.jsonl.zst": zstd(JSON_LINES), "d/b.csv": b"text\nw3\n", "d/c.parquet": parquet(text=["w4"])}, "d", {}, ["w1", "w2", "w3", "w4"]),
        ({"a.txt": b"w1 \x00 w2\nw\x003\n"}, "a.txt", {}, ["w1 w2", "w3"]),
        ({"a.csv": b"text\nw1 \x00 w2\n"}, "a.csv", {}, ["w1 w2"]),
        ({"a.jsonl": b'{"text": "w1 \\u0000 w2"}'}, "a.jsonl", {}, ["w1 w2"]),
        (
            {"d/b.txt": b"w2", "d/a/z.json.gz": gzip.compress(b'{"text": "w1"}'), "d/c.md": b"w4", "d/.h.txt": b"w5",
             "d/c.jsonl.xz": lzma.compress(b'{"text": "w3"}')},
            "d", {}, ["w1", "w2", "w3"],
        ),
        ({"d/b.txt": b"w2", "d/a.txt": b"w1", "d/c.md": b"w3"}, "d/*.txt", {}, ["w1", "w2"]),
        ({"d/e/b.txt": b"w2", "d/a.txt": b"w1"}, "d/**/*.txt", {}, ["w1", "w2"]),
        ({"d/b.txt": b"w2", "a.txt": b"w1", "c.txt": b"w3"}, "c.txt, d,,a.txt", {}, ["w3", "w2", "w1"]),
        ({"a.txt": b"w1\nw2\n", "b.txt": b"w3\nw4\n"}, "a.txt,b.txt", {"max_docs": 3}, ["w1", "w2", "w3"]),
        ({"a.txt": b"w1\nw2\n", "b.txt": b"w3\nw4\n"}, "a.txt,b.txt", {"max_docs": 2}, ["w1", "w2"]),
        ({"a.txt": b"w1\nw2\n"}, "a.txt", {"max_docs": 5}, ["w1", "w2"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("small", [False, True])
def test_sources(monkeypatch, files, source, options, expected, small):
    if small:  # one document per batch, one file per unit
        monkeypatch.setattr(prepare_c4, "BATCH_CHARS", 1)
        monkeypatch.setattr(prepare_c4, "UNIT_BYTES", 1)
    write_files(files)
    write_vocab([*VOCAB, '"'], "quote.txt")
    prepare(source=source, val_fraction=0, **options)
    assert stored() == [[len(VOCAB) if word == '"' else VOCAB.index(word) for word in text.split()] for text in expected]
    assert stored("val") == []
    assert only_whole_files() and data.verify("out") > 0


def test_a_byte_order_mark_and_line_ends_are_not_part_of_the_text():
    """BERT's tokenizers would drop them, but the hash that decides the split would not."""
    cfg = prepare_c4.PrepareConfig(doc_sep="file")
    write_files({"a.txt": b"\xef\xbb\xbfw1  w2 \r\nw3\n\xef\xbb\xbfw4\rw5\r\n", "b.txt.gz": gzip.compress(b"\xef\xbb\xbfw1\r\n")})
    assert list(sources.documents(*sources.file_segments("a.txt", "file"), cfg, Counter())) == ["w1  w2 \nw3\nw4\rw5"]
    assert list(sources.documents(*sources.file_segments("b.txt.gz", "file"), cfg, Counter())) == ["w1"]


def test_brackets_in_a_file_name_are_not_a_pattern():
    write_files({"a[1].txt": b"w1\n", "d[2]/b.txt": b"w2\n", "a1.txt": b"w3\n"})
    prepare(source="a[1].txt,d[2]", val_fraction=0)
    assert texts_of(stored()) == ["w1", "w2"]


def test_a_directory_of_save_to_disk_is_refused(capsys):
    """Its Arrow files were skipped, and its dataset_info.json was "not valid JSON"."""
    names = "dataset_dict.json train/data-00000-of-00001.arrow train/dataset_info.json train/state.json".split()
    write_files({f"saved/{name}": b"{" for name in names})
    error = prepare_fails(capsys, source="saved")
    assert error.startswith("error: saved/train: a datasets.save_to_disk directory: its Arrow files are not read (")
    assert "to_parquet" in error
    write_files({"other/a.arrow": b"x", "other/b/dataset_info.json": b'{"text": "w1"}\n'})
    prepare(source="other", val_fraction=0)
    assert texts_of(stored()) == ["w1"]


def test_half_a_surrogate_pair_is_skipped_or_refused():
    """JSON can spell one, UTF-8 cannot hold it. The other documents must be right."""
    write_files({"a.jsonl": b'{"text": "w1"}\n{"text": "\\ud800 w2"}\n{"text": "w3"}\n'})
    try:
        prepare(source="a.jsonl", val_fraction=0, skip_bad_lines=1)
    except SystemExit as stopped:
        assert stopped.code == 2
    else:
        assert [document for document in stored() if document[0] in ids("w1 w3")] == [ids("w1"), ids("w3")]


def test_the_standard_library(monkeypatch):
    """A small one: docstrings outside the skipped directories, and pydoc's topics."""
    long = "w1 w2 w3 w4 w5 w6 w7 w8 w9 w10 w11 w12 w13 w14"
    write_files(
        {
            "lib/m.py": f'"""{long} w20"""\nclass C:\n    """{long} w21"""\n    def f():\n        """Short."""\n'.encode(),
            "lib/p/n.py": f'async def f():\n    """{long} w22\n\n    w23"""\n'.encode(),
            "lib/p/same.py": f'"""{long} w20"""\n'.encode(),
            "lib/p/latin.py": f'# coding: latin-1\n"""{long} \xe9"""\n'.encode("latin-1"),
            "lib/p/broken.py": b"def\n",
            "lib/p/nul.py": b"\0",
            "lib/site-packages/m.py": f'"""{long} w30"""\n'.encode(),
            "lib/test/m.py": f'"""{long} w31"""\n'.encode(),
        }
    )
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: "lib")
    uncached = functools.cache(sources.stdlib_documents.__wrapped__)
    monkeypatch.setattr(sources, "stdlib_documents", uncached)
    texts = uncached()
    assert [text for text in texts if text.startswith("w1")] == [f"{long} {end}" for end in ("w20", "w21", "w22\n\nw23", "é")]
    assert len(texts) > 50 and texts == sorted(texts)
    prepare(source="stdlib", train_tokenizer=300, val_docs=4, max_docs=40)
    assert data.verify("out") == 2 and len(stored("val")) == 4 and len(stored()) == 36


def test_the_standard_library_of_this_python():
    texts = sources.stdlib_documents()
    assert len(texts) > 3000 and sum("Return" in text for text in texts) > 500
    assert not any("\ufeff" in text or text != text.strip("\n") for text in texts)


@pytest.mark.parametrize("ends", [b"\n", b"\r\n"])
def test_a_large_plain_file_is_divided_into_segments(monkeypatch, ends):
    """Every line is read once, wherever the boundaries fall, also empty lines and one longer than a segment."""
    lines = [b"w%d" % i + b" w7" * (i % 5) for i in range(200)] + [b"", b"", b"w9 " * 300, b"w1"]
    Path("a.txt").write_bytes(ends.join(lines))
    Path("a.jsonl").write_bytes(ends.join(b'{"text": "%s"}' % line for line in lines))
    cfg, expected = prepare_c4.PrepareConfig(), [line.decode() for line in lines]
    for step in (1, 2, 7, 64, 501, 10**6):
        monkeypatch.setattr(sources, "SEGMENT_BYTES", step)
        for name in ("a.txt", "a.jsonl"):
            segments = sources.list_segments(name)
            assert segments[-1].end == os.path.getsize(name) and len(segments) == -(-segments[-1].end // step)
            assert [text for segment in segments for text in sources.documents(segment, cfg, Counter())] == expected


def test_errors_in_a_segment_name_the_line_of_the_file(monkeypatch, capsys):
    monkeypatch.setattr(sources, "SEGMENT_BYTES", 50)
    for line in (1, 2, 17, 59, 60):
        lines = [b'{"text": "w%d"}' % i for i in range(60)]
        lines[line - 1] = b"{"
        Path("a.jsonl").write_bytes(b"\n".join(lines))
        error = prepare_fails(capsys, source="a.jsonl", val_fraction=0, out=f"out{line}")
        assert error.startswith(f"error: a.jsonl:{line}: not valid JSON")


def test_a_line_of_50_megabytes():
    """It is read, and tokenized only as far as needed."""
    with open("a.jsonl", "wb") as file:
        file.write(b'{"text": "w1 ' + b"w2 " * (50 * 2**20 // 3) + b'"}\n{"text": "w3"}\n')
    prepare(source="a.jsonl", val_fraction=0, max_doc_tokens=126)
    assert stored() == [ids("w1" + " w2" * 125), ids("w3")]
    assert text_report()["longest"][0]["characters"] == 3 + 50 * 2**20 // 3 * 3


@pytest.mark.parametrize(
    "name, contents",
    [("a.txt.gz", gzip.compress(b"w1\n")), ("a.parquet", parquet(text=["w1"])), ("a.txt", b"w1\n")],
    ids=["gz", "parquet", "txt"],  # gzip writes the time, and pytest-xdist wants the same names in all processes
)
def test_a_file_without_permission(capsys, name, contents):
    write_files({name: contents})
    os.chmod(name, 0)
    os.chmod(".", 0o777)
    user = os.geteuid()
    if user == 0:  # may read everything
        os.seteuid(65534)
    try:
        assert prepare_fails(capsys, source=name) == f"error: {name}: Permission denied\n"
    finally:
        os.seteuid(user)


@pytest.mark.parametrize(
    "files, options, says",
    [
        ({"b.csv": b"w1"}, {"source": "b.csv"}, "b.csv:1: no column 'text' (the first row has w1; see --text_key)"),
        ({"b.tsv": b"id\ttext\n1\n"}, {"source": "b.tsv"}, "b.tsv:2: 1 column, expected 2 (a tab or a line break in a text?; --skip_bad_lines=100 skips such lines)"),
        ({"b.csv": b"id,text\n1,w1,w2\n"}, {"source": "b.csv"}, "b.csv:2: 3 columns, expected 2 (is a comma outside quotes?; --skip_bad_lines=100 skips"),
        ({"b.csv": b'text\nw1\n"w2\nw3\n'}, {"source": "b.csv"}, "b.csv:3: unexpected end of data on line 4 (is a quote not closed?;"),
        ({"b.csv": b"text\nw1\nw\xff\n"}, {"source": "b.csv"}, "b.csv:3: not UTF-8: "),
        ({"b.txt": b"w1"}, {"source": "b.txt,stdlib", "text_key": "body"}, "text_key=body: --source=b.txt,stdlib has no keys or columns ("),
        ({"b.csv": b"text\nw1"}, {"source": "b.csv", "doc_sep": "file"}, "doc_sep=file: only for .txt, and --source=b.csv has none"),
        ({"b.csv": b""}, {"source": "b.csv"}, "b.csv: no text to train on"),
        ({"b.json": b'[{"text": "w1"}, {"tex": "w2"}]'}, {"source": "b.json"}, "b.json: record 2: no 'text' (keys: tex;"),
        ({"b.json": b'[{"text": "w1"},'}, {"source": "b.json"}, "b.json: not valid JSON: "),
        ({"b.parquet": b"w1"}, {"source": "b.parquet"}, "b.parquet: "),
        ({"b.parquet": parquet(text=["w1"] * 50)[:-20]}, {"source": "b.parquet"}, "b.parquet: "),
        ({"b.parquet": parquet(body=["w1"])}, {"source": "b.parquet"}, "b.parquet: no column 'text' (the first row has body; see --text_key)"),
        ({"b.parquet": parquet(text=[1, 2])}, {"source": "b.parquet"}, "b.parquet:1: 'text' is int (expected a string; see --text_key; --skip_bad_lines"),
        ({"b.parquet": parquet(text=["w1", None])}, {"source": "b.parquet"}, "b.parquet:2: 'text' is null (--skip_bad_lines=100 skips such lines)"),
        ({"b.txt.zst": zstd(b"w1\n" + PACKED)[:-9]}, {"source": "b.txt.zst"}, "b.txt.zst:1: Truncated compressed stream (truncated, or not a .zst"),
        ({"b.txt.zst": b"w1\nw2\n"}, {"source": "b.txt.zst"}, "b.txt.zst:1: ZSTD decompress failed"),
        ({"d/.hidden": b""}, {"source": "d"}, "d: has no file that can be read: 1 hidden (expected .txt, "),
    ],
)  # fmt: skip
def test_what_cannot_be_read(capsys, files, options, says):
    write_files(files)
    error = prepare_fails(capsys, val_fraction=0, **options)
    assert error.startswith(f"error: {says}") and len(error) < 300
    assert not list(Path().rglob("manifest.json"))


def test_rows_that_cannot_be_read_can_be_skipped():
    write_files({
        "a.csv": b'id,text\n1,w1\n2\n3,w2\n4,"w9"x\n5,w3\n', "b.parquet": parquet(text=["w4", None, "w5"]),
        "c.json": b'[{"text": "w6"}, 7, {"text": "w7"}]',
    })  # fmt: skip
    prepare(source="a.csv,b.parquet,c.json", val_fraction=0, skip_bad_lines=4)
    assert texts_of(stored()) == [f"w{i}" for i in range(1, 8)] and text_report()["bad_lines_skipped"] == 4


def test_skip_bad_lines_counts_all_units(monkeypatch, capsys):
    """With a higher number the run resumes."""
    monkeypatch.setattr(prepare_c4, "UNIT_BYTES", 1)
    monkeypatch.setattr(prepare_c4, "HASHED_BYTES", 0)
    for i in range(4):
        Path(f"{i}.jsonl").write_bytes(b'{"text": "w%d"}\n{\n' % i)
    error = prepare_fails(capsys, source="?.jsonl", val_fraction=0, skip_bad_lines=2)
    assert error.startswith("error: ?.jsonl: 3 bad lines, but --skip_bad_lines=2 (raise it,")
    prepare(source="?.jsonl", val_fraction=0, skip_bad_lines=4)
    assert "3 of 4 units were already done" in capsys.readouterr().out
    assert texts_of(stored()) == ["w0", "w1", "w2", "w3"] and text_report()["bad_lines_skipped"] == 4


# ---------------------------------------------------------------------------------------------------------------------
# A hub dataset: by the libraries of the hub, from a local server, or from a downloaded copy without a network

TEXTS = {
    "README.md": b"""---
configs:
- config_name: en
  data_files:
  - split: train
    path: en/train-*
  - split: validation
    path: en/val.jsonl
- config_name: rows
  data_files: rows/*.parquet
---
""",
    "en/train-0.jsonl": JSON_LINES,
    "en/train-1.jsonl": b'{"text": "w3"}',
    "en/val.jsonl": b'{"text": "w9"}',
    "rows/a.parquet": parquet(text=["w4"], id=[1]),
}


def prepare_with_hub(environment, **options):
    """Run prepare_c4.py as a user would."""
    argv = [f"--{name}={value}" for name, value in {"out": "out", "workers": 1, "val_fraction": 0, **options}.items()]
    environment = {**os.environ, "HF_HOME": os.path.abspath("home"), **environment}
    return subprocess.run([sys.executable, prepare_c4.__file__, *argv], env=environment, capture_output=True, text=True)


def downloaded(kind, repo, files):
    """Make the cache that huggingface_hub keeps of a downloaded repository."""
    root = f"hub/{kind}--{repo.replace('/', '--')}"
    write_files({f"{root}/refs/main": COMMIT.encode(), **{f"{root}/snapshots/{COMMIT}/{name}": text for name, text in files.items()}})


def check_english_texts(result):
    """The documents of configuration en, listed under their names on the hub."""
    assert result.returncode == 0 and stored() == [[6], [7], [8]], result.stderr
    names = ["en/train-0.jsonl", "en/train-1.jsonl"]
    expected = [[f"hf://datasets/someone/some.texts@{COMMIT}/{name}", 0, len(TEXTS[name]), ""] for name in names]
    assert json.loads(Path("out/manifest.json").read_text())["sources"] == expected


def check_refused(result, says):
    assert result.returncode == 2 and result.stderr.startswith(f"error: {says}") and result.stderr.count("\n") == 1


def test_a_dataset_of_the_hub():
    """Its README says which files belong to which configuration and split."""
    make_tokenizer("tokenizer.json")
    with Hub("someone/some.texts", TEXTS) as hub:
        environment = {"HF_ENDPOINT": hub.url, "NO_PROXY": "127.0.0.1"}
        check_english_texts(prepare_with_hub(environment, source="someone/some.texts:en", tokenizer="tokenizer.json"))
        result = prepare_with_hub(environment, source="someone/else", out="no")
        check_refused(result, "someone/else: cannot be read: RepositoryNotFoundError")


def test_a_dataset_and_a_tokenizer_of_the_hub_from_a_downloaded_copy():
    make_tokenizer("tokenizer.json")
    downloaded("datasets", "someone/some.texts", TEXTS)
    downloaded("models", "google-bert/bert-base-uncased", {"tokenizer.json": Path("tokenizer.json").read_bytes()})
    environment = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": os.path.abspath("hub")}
    check_english_texts(prepare_with_hub(environment, source="someone/some.texts:en"))
    result = prepare_with_hub(environment, source="someone/some.texts:rows", tokenizer="tokenizer.json", out="rows")
    assert result.returncode == 0 and stored(out="rows") == [[9]], result.stderr
    result = prepare_with_hub(environment, source="someone/some.texts:fr", out="no")
    check_refused(result, "someone/some.texts: cannot be read: ValueError: BuilderConfig 'fr' not found")
    result = prepare_with_hub(environment, source="someone/else", out="no")
    check_refused(result, "someone/else: cannot be read: LocalEntryNotFoundError")


def test_a_file_and_a_folder_of_the_hub_by_url():
    """At the branch's commit of today: what changes with it is its blob."""
    make_tokenizer("tokenizer.json")
    with Hub("someone/some.texts", TEXTS) as hub:
        environment = {"HF_ENDPOINT": hub.url, "NO_PROXY": "127.0.0.1"}
        for source, out in (("en/train-0.jsonl", "file"), ("en", "folder")):
            result = prepare_with_hub(environment, source=f"hf://datasets/someone/some.texts/{source}", tokenizer="tokenizer.json", out=out)
            assert result.returncode == 0, result.stderr
        assert stored(out="file") == [[6], [7]] and stored(out="folder") == [[6], [7], [8], [14]]


# ---------------------------------------------------------------------------------------------------------------------
# C4, from a local server


@pytest.fixture
def c4(monkeypatch):
    """(texts, hub, waits): a Hub with two training files and a validation file of C4, which are read 2,000 bytes at a time.

    texts: {file: its documents}. waits: seconds that huggingface_hub slept before its retries.
    """
    texts = {name: make_texts(1000, seed=i) for i, name in enumerate(["en/t0.json.gz", "en/t1.json.gz", "en/v0.json.gz"])}
    lines = {name: "".join(json.dumps({"text": text, "url": "w1"}) + "\n" for text in texts[name]) for name in texts}
    waits = []
    with Hub("allenai/c4", {name: gzip.compress(lines[name].encode(), mtime=0) for name in texts}) as hub:
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(time, "sleep", waits.append)
        monkeypatch.setattr(logging.getLogger("huggingface_hub"), "disabled", True)
        monkeypatch.setattr(sources, "C4_FILES", {"train": ("en/t%d.json.gz", 2), "val": ("en/v%d.json.gz", 1)})
        monkeypatch.setattr(remote, "READ_AHEAD", 2000)
        monkeypatch.setattr(prepare_c4, "UNIT_BYTES", 1)
        HfFileSystem.clear_instance_cache()
        yield texts, hub, waits
    HfFileSystem.clear_instance_cache()


def is_all_of_c4(texts):
    t0, t1, v0 = texts.values()
    return texts_of(stored()) == t0 + t1 and texts_of(stored("val")) == v0


def test_c4(c4):
    texts, hub, waits = c4
    prepare(source="c4")
    assert is_all_of_c4(texts) and set(hub.requests) == {"info", *texts} and not waits
    assert {"train_00000_000.bin", "train_00001_000.bin", "val_00002_000.bin"} < set(os.listdir("out"))
    manifest = json.loads(Path("out/manifest.json").read_text())
    assert [segment[0] for segment in manifest["sources"]] == [f"hf://datasets/allenai/c4@{COMMIT}/{name}" for name in texts]


def test_the_names_of_c4s_files():
    names = {name % i: split for split, (name, count) in sources.C4_FILES.items() for i in range(count)}
    assert len(names) == 1032 and list(names.values()).count("val") == 8
    assert "en/c4-train.00000-of-01024.json.gz" in names and "en/c4-validation.00007-of-00008.json.gz" in names


def test_c4_beside_other_files(c4):
    """Documents of a.txt are held out by hash, C4's by file."""
    texts = c4[0]
    write_texts("a.txt", make_texts(40, seed=9))
    prepare(source="a.txt,c4", val_docs=8)
    held_out = set(texts_of(stored("val")))
    assert set(texts["en/v0.json.gz"]) < held_out and len(held_out - set(texts["en/v0.json.gz"])) == 8
    assert held_out - set(texts["en/v0.json.gz"]) < set(make_texts(40, seed=9))


def test_a_broken_connection_loses_and_repeats_nothing(c4):
    texts, hub, waits = c4
    whole = None  # no fault
    faults = {"en/t0.json.gz": [503, 0, 1, whole, 4999, 500, whole], "en/t1.json.gz": [whole, whole, 0, 503, 700]}
    hub.faults.update(faults)
    prepare(source="c4")
    assert is_all_of_c4(texts) and not any(hub.faults.values())
    assert waits == [1, 2, 4, 1, 2, 1, 2, 4]  # each request has its own retries


def test_a_file_of_the_hub_that_cannot_be_read(c4, monkeypatch, capsys):
    texts, hub, waits = c4
    monkeypatch.setattr(prepare_c4, "SAMPLE_SEGMENTS", 1)
    hub.faults["en/t1.json.gz"] = [503] * 3 + [100] * 3
    error = prepare_fails(capsys, source="c4")
    assert error.startswith(f"error: hf://datasets/allenai/c4@{COMMIT}/en/t1.json.gz:1: cannot be read: RemoteProtocolError: ")
    assert "the same command resumes" in error and waits == [1, 2, 4, 8, 8]
    assert not os.path.exists("out/manifest.json")
    hub.requests.clear()
    prepare(source="c4")
    files = list(dict.fromkeys(hub.requests))
    assert files == ["en/t0.json.gz", "en/t1.json.gz", "en/v0.json.gz"]  # the first only for the estimate
    assert is_all_of_c4(texts)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_file_that_ends_too_early(monkeypatch, capsys, name):
    """As when a connection to the hub ends without an error. In a compressed file the decompressor notices."""
    write_files({name: b'{"text": "w1"}\n' * 9 if name == "a.jsonl" else b"text\n" + b"w1\n" * 9})
    real = prepare_c4.list_segments
    monkeypatch.setattr(prepare_c4, "list_segments", lambda *args: [segment._replace(end=segment.end + 1) for segment in real(*args)])
    size = os.path.getsize(name)
    assert f": ends after {size} of {size + 1} bytes (truncated" in prepare_fails(capsys, source=name, val_fraction=0)


def test_an_unknown_dataset_is_reported_without_waiting(c4, capsys):
    error = prepare_fails(capsys, source="someone/nothing")
    assert error.startswith("error: someone/nothing: cannot be read: RepositoryNotFoundError: ") and not c4[2]


def test_an_interrupted_or_finished_run_does_not_ask_the_hub_again(c4, monkeypatch, capsys):
    texts, hub, _ = c4
    with monkeypatch.context() as patch, interrupted():
        patch.setattr(prepare_c4, "write_shard", raise_interrupt)
        prepare(source="c4")
    monkeypatch.setattr(sources, "list_hub", None)
    prepare(source="c4")
    assert is_all_of_c4(texts)
    hub.requests.clear()
    prepare(source="c4")
    assert "nothing to do" in capsys.readouterr().out and not hub.requests


def test_ndjson_is_json_lines():
    assert sources.split_suffixes("data/A.NDJSON.gz") == (".jsonl", ".gz")
