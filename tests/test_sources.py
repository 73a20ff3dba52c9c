"""sources.py: what is read of each kind of file, the hub, and what cannot be read."""

import functools
import gzip
import io
import json
import lzma
import os
from collections import Counter
from pathlib import Path

import pytest

import data
import prepare_c4
import sources
from corpus import ids, make_texts, only_whole_files, prepare, prepare_fails, raise_interrupt
from corpus import stored, texts_of, workplace, write_files, write_texts  # noqa: F401

# ---------------------------------------------------------------------------------------------------------------------
# Sources


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
        ({"a.json": b'{"text": "w1"}\n{"text": "w2"}\n'}, "a.json", {"doc_sep": "file"}, ["w1", "w2"]),
        ({"a.txt.gz": gzip.compress(b"w1\nw2\n") + gzip.compress(b"w3\n")}, "a.txt.gz", {}, ["w1", "w2", "w3"]),
        ({"a.jsonl.xz": lzma.compress(b'{"text": "w1"}\n')}, "a.jsonl.xz", {}, ["w1"]),
        ({"A.TXT": b"w1\n"}, "A.TXT", {}, ["w1"]),
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
    if small:  # every document a batch of its own, every file a unit
        monkeypatch.setattr(prepare_c4, "BATCH_CHARS", 1)
        monkeypatch.setattr(prepare_c4, "UNIT_BYTES", 1)
    write_files(files)
    prepare(source=source, val_fraction=0, **options)
    assert stored() == [ids(text) for text in expected] and stored("val") == []
    assert only_whole_files() and data.verify("out") > 0


def test_a_byte_order_mark_and_line_ends_are_no_part_of_the_text():
    """BERT's tokenizers would drop them, but the hash that decides about holding out sees the text."""
    cfg = prepare_c4.PrepareConfig(doc_sep="file")
    write_files({"a.txt": b"\xef\xbb\xbfw1  w2 \r\nw3\n\xef\xbb\xbfw4\rw5\r\n", "b.txt.gz": gzip.compress(b"\xef\xbb\xbfw1\r\n")})
    assert list(sources.documents(*sources.pieces_of_file("a.txt", "file"), cfg, Counter())) == ["w1  w2 \nw3\n\ufeffw4\rw5"]
    assert list(sources.documents(*sources.pieces_of_file("b.txt.gz", "file"), cfg, Counter())) == ["w1"]


def test_a_file_name_with_brackets_is_no_pattern():
    write_files({"a[1].txt": b"w1\n", "d[2]/b.txt": b"w2\n", "a1.txt": b"w3\n"})
    prepare(source="a[1].txt,d[2]", val_fraction=0)
    assert texts_of(stored()) == ["w1", "w2"]


def test_half_a_surrogate_pair_is_no_traceback():
    """JSON may spell one, no UTF-8 can hold it: left out, replaced or refused, but the other documents are right."""
    write_files({"a.jsonl": b'{"text": "w1"}\n{"text": "\\ud800 w2"}\n{"text": "w3"}\n'})
    try:
        prepare(source="a.jsonl", val_fraction=0, skip_bad_lines=1)
    except SystemExit as stopped:
        assert stopped.code == 2
    else:
        assert [document for document in stored() if document[0] in ids("w1 w3")] == [ids("w1"), ids("w3")]


def test_the_standard_library(monkeypatch):
    """A small one: docstrings of what is not skipped, and pydoc's topics."""
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


# ---------------------------------------------------------------------------------------------------------------------
# C4, without the network


class RemoteFile(io.BytesIO):
    """A file on the hub that breaks off: once after each of `breaks` bytes, all told, by an error or "silently"."""

    def __init__(self, contents, breaks):
        super().__init__(contents)
        self.size, self.breaks = len(contents), breaks

    def read(self, count=-1):
        if self.breaks and self.tell() + count > self.breaks[0][0]:
            stop, how = self.breaks[0]
            data = super().read(max(0, stop - self.tell()))
            if not data:
                self.breaks.pop(0)
                if how != "silently":
                    raise ConnectionError("reset\nby peer")
            return data
        return super().read(count)


@pytest.fixture
def hub(monkeypatch):
    """A hub with two training files and a validation file of C4, as (texts, breaks, opened, waits).

    breaks: {file: [(bytes after which reading fails, how)]}. opened: names of files, in order. waits: seconds slept.
    """
    texts = {name: make_texts(200, seed=i) for i, name in enumerate(["en/t0.json.gz", "en/t1.json.gz", "en/v0.json.gz"])}
    lines = {name: "".join(json.dumps({"text": text, "url": "w1"}) + "\n" for text in texts[name]) for name in texts}
    files = {name: gzip.compress(lines[name].encode(), mtime=0) for name in texts}
    breaks, opened, waits = {name: [] for name in texts}, [], []

    def list_hub(repo, config, names):
        assert (repo, config) == ("allenai/c4", "")
        return "abc123", names, {name: len(files[name]) for name in names}

    def open_remote(path):
        name = path.removeprefix("hf://datasets/allenai/c4@abc123/")
        opened.append(name)
        if breaks[name] and breaks[name][0] == "at once":
            breaks[name].pop(0)
            raise ConnectionError("no route\nto host")
        return RemoteFile(files[name], breaks[name])

    monkeypatch.setattr(sources, "list_hub", list_hub)
    monkeypatch.setattr(sources, "open_remote", open_remote)
    monkeypatch.setattr(sources.time, "sleep", waits.append)
    monkeypatch.setattr(sources, "C4_FILES", {"train": ("en/t%d.json.gz", 2), "val": ("en/v%d.json.gz", 1)})
    monkeypatch.setattr(prepare_c4, "UNIT_BYTES", 1)
    return texts, breaks, opened, waits


def is_all_of_c4(texts):
    t0, t1, v0 = texts.values()
    return texts_of(stored()) == t0 + t1 and texts_of(stored("val")) == v0


def test_c4(hub):
    texts, _, opened, waits = hub
    prepare(source="c4")
    assert is_all_of_c4(texts) and set(opened) == set(texts) and not waits
    assert {"train_00000_000.bin", "train_00001_000.bin", "val_00002_000.bin"} < set(os.listdir("out"))
    manifest = json.loads(Path("out/manifest.json").read_text())
    assert [piece[0] for piece in manifest["sources"]] == [f"hf://datasets/allenai/c4@abc123/{name}" for name in texts]


def test_c4s_own_names():
    names = {name % i: split for split, (name, count) in sources.C4_FILES.items() for i in range(count)}
    assert len(names) == 1032 and list(names.values()).count("val") == 8
    assert "en/c4-train.00000-of-01024.json.gz" in names and "en/c4-validation.00007-of-00008.json.gz" in names


def test_c4_beside_other_files(hub):
    """The files' share is held out by hash, C4's by file."""
    texts = hub[0]
    write_texts("a.txt", make_texts(40, seed=9))
    prepare(source="a.txt,c4", val_docs=8)
    held_out = set(texts_of(stored("val")))
    assert set(texts["en/v0.json.gz"]) < held_out and len(held_out - set(texts["en/v0.json.gz"])) == 8
    assert held_out - set(texts["en/v0.json.gz"]) < set(make_texts(40, seed=9))


def test_a_broken_connection_loses_and_doubles_nothing(hub):
    texts, breaks, opened, waits = hub
    breaks.update({
        "en/t0.json.gz": ["at once", "at once", (0, "reset"), (3000, "reset"), (3000, "silently"), (3001, "reset")],
        "en/t1.json.gz": [(1, "silently"), (2, "reset")] + [(300 * i, "reset") for i in range(12)],
    })  # fmt: skip
    prepare(source="c4")
    assert is_all_of_c4(texts) and not any(breaks.values()) and len(opened) > 20
    assert waits[:3] == [1, 2, 4] and max(waits) <= 4  # after some bytes, counting starts anew


def test_a_file_of_the_hub_that_cannot_be_read(hub, monkeypatch, capsys):
    texts, breaks, opened, waits = hub
    monkeypatch.setattr(prepare_c4, "SAMPLE_PIECES", 1)
    breaks["en/t1.json.gz"] = [(100, "reset")] * 4 + ["at once"]
    error = prepare_fails(capsys, source="c4")
    assert error.startswith("error: hf://datasets/allenai/c4@abc123/en/t1.json.gz: cannot be read: ConnectionError: no route")
    assert "5 attempts; the same command goes on" in error and waits == [1, 2, 4, 8]
    assert not os.path.exists("out/manifest.json")
    opened.clear()
    prepare(source="c4")
    assert opened == ["en/t0.json.gz", "en/t1.json.gz", "en/v0.json.gz"]  # the first only for the estimate
    assert is_all_of_c4(texts)


def test_what_waiting_does_not_mend_is_said_at_once(hub, monkeypatch, capsys):
    def missing(*_):
        raise FileNotFoundError("no such dataset")

    monkeypatch.setattr(sources, "list_hub", missing)
    error = prepare_fails(capsys, source="someone/nothing")
    assert error.startswith("error: someone/nothing: cannot be read: FileNotFoundError: no such dataset") and not hub[3]


def test_a_finished_or_begun_run_does_not_ask_the_hub_again(hub, monkeypatch, capsys):
    texts = hub[0]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare_c4, "write_shard", raise_interrupt)
        prepare(source="c4")
    monkeypatch.setattr(sources, "list_hub", None)
    prepare(source="c4")
    assert is_all_of_c4(texts)
    prepare(source="c4")
    assert "nothing to do" in capsys.readouterr().out
