"""prepare_c4.py: interruption at any point, the held-out split, tokens, what is refused, and the report."""

import gzip
import json
import lzma
import os
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
from tokenizers import Tokenizer

import data
import prepare_c4
from corpus import LETTERS, VOCAB, WORDS, files_of, ids, make_texts, only_whole_files, prepare, prepare_fails, raise_interrupt
from corpus import state_of, stored, text_report, texts_of, workplace, write_files, write_texts, write_vocab  # noqa: F401
from toy import SPECIAL, make_tokenizer

# ---------------------------------------------------------------------------------------------------------------------
# Units, interruption


@pytest.fixture
def corpus(monkeypatch):
    """Options for a corpus of four units of two shards and more."""
    monkeypatch.setattr(prepare_c4, "UNIT_BYTES", 1)
    for i in range(4):
        write_texts(f"{i}.txt", make_texts(30, seed=i))
    return {"source": "?.txt", "val_fraction": 0.2, "shard_tokens": 150}


def test_the_number_of_processes_does_not_matter(corpus, capsys):
    prepare(**corpus)
    prepare(**corpus, workers=2, out="two")
    assert files_of("two") == files_of() and only_whole_files("two")
    assert len({name[:11] for name in files_of() if name.startswith("train")}) == 4
    assert sorted(texts_of(stored() + stored("val"))) == sorted(text for i in range(4) for text in make_texts(30, seed=i))


def test_small_files_share_a_unit(corpus, monkeypatch):
    monkeypatch.setattr(prepare_c4, "UNIT_BYTES", sum(os.path.getsize(f"{i}.txt") for i in range(2)))
    prepare(**{**corpus, "shard_tokens": 10**6})
    train = [name for name in files_of() if name.startswith("train")]
    assert len(train) in (2, 3) and "train_00000_000.bin" in train
    monkeypatch.setattr(prepare_c4, "UNIT_BYTES", 1)
    prepare(**{**corpus, "shard_tokens": 10**6, "out": "apart"})
    assert (stored(), stored("val")) == (stored(out="apart"), stored("val", out="apart"))


@pytest.mark.parametrize("after", [False, True])
def test_interrupted_at_any_point_it_goes_on(corpus, monkeypatch, after):
    """Each file is renamed when it is whole: stop before, or after, the first, second, ... of these."""
    for i in range(2, 4):
        os.remove(f"{i}.txt")
    rename, left = os.replace, [-1]

    def stops_once(source, target):
        left[0] -= 1
        if left[0] == 0 and not after:
            raise KeyboardInterrupt
        rename(source, target)
        if left[0] == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stops_once)
    prepare(**corpus)
    expected, renamed = files_of(), -1 - left[0]
    assert renamed >= 4 + len(expected)  # plan, tokenizer, report, manifest, two units, and the shards
    for number in range(1, renamed + 1):
        out = f"out{number}"
        left[0] = number
        with pytest.raises(KeyboardInterrupt):
            prepare(**corpus, out=out)
        prepare(**corpus, out=out)
        assert files_of(out) == expected and only_whole_files(out)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_finished_units_are_not_done_again(corpus, monkeypatch, capsys, error):
    process_unit, write_shard, done, written = prepare_c4.process_unit, prepare_c4.write_shard, [], []

    def records(number, *arguments):
        done.append(number)
        return process_unit(number, *arguments)

    def fails_once(path, *arguments):
        written.append(path)
        if path.startswith("out/") and "_00001_001" in path and written.count(path) == 1:
            Path(f"{path}.tmp").write_text("half a shard")
            raise error
        return write_shard(path, *arguments)

    monkeypatch.setattr(prepare_c4, "process_unit", records)
    monkeypatch.setattr(prepare_c4, "write_shard", fails_once)
    if isinstance(error, OSError):
        assert "error: out: No space left on device" in prepare_fails(capsys, **corpus)
    else:
        with pytest.raises(KeyboardInterrupt):
            prepare(**corpus)
    assert done == [0, 1] and not os.path.exists("out/manifest.json")
    prepare(**corpus)
    assert done == [0, 1, 1, 2, 3] and "1 of 4 units were done before" in capsys.readouterr().out
    prepare(**corpus, out="whole")
    assert files_of() == files_of("whole") and only_whole_files()
    reports = [json.loads(Path(out, "report.json").read_text()) for out in ("out", "whole")]
    assert all(reports[0][name] == reports[1][name] for name in list(reports[0])[:-2] if name != "seconds")


def test_a_trained_tokenizer_is_kept_by_a_resumed_run(corpus, monkeypatch):
    """Training is not deterministic, and the finished units were made with the first one."""
    process_unit, made = prepare_c4.process_unit, []

    def fails_at_the_second(number, *arguments):
        made.append(Path("out/tokenizer.json").stat().st_mtime_ns)
        if len(made) == 2:
            raise KeyboardInterrupt
        return process_unit(number, *arguments)

    monkeypatch.setattr(prepare_c4, "process_unit", fails_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        prepare(**corpus, train_tokenizer=200)
    prepare(**corpus, train_tokenizer=200)
    assert len(made) == 5 and len(set(made)) == 1


# ---------------------------------------------------------------------------------------------------------------------
# The same command again, and another one


def test_again_there_is_nothing_to_do(corpus, capsys):
    prepare(**corpus)
    before = state_of("out")
    capsys.readouterr()
    prepare(**corpus)
    prepare(**corpus, workers=2)
    prepare(**corpus, out="./out/")
    assert capsys.readouterr().out.count("nothing to do") == 3 and state_of("out") == before


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    "option, value",
    [
        ("val_fraction", 0.3), ("max_doc_tokens", 9), ("shard_tokens", 151), ("cased", True), ("doc_sep", "blank"),
        ("tokenizer", "other.txt"), ("source", "0.txt"), ("max_docs", 9), ("text_key", "body"), ("train_tokenizer", 200),
    ],
)  # fmt: skip
def test_another_option_is_refused(corpus, monkeypatch, capsys, finished, option, value):
    write_vocab(VOCAB, "other.txt")
    if finished:
        prepare(**corpus)
    else:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(prepare_c4, "write_shard", raise_interrupt)
            prepare(**corpus)
    before = state_of("out")
    error = prepare_fails(capsys, **{**corpus, option: value})
    assert error.startswith("error: out: made with other ") and option in error and state_of("out") == before


@pytest.mark.parametrize("change", ["grown", "added", "removed"])
def test_other_source_files_are_refused(corpus, capsys, change):
    prepare(**corpus)
    before = state_of("out")
    if change == "grown":
        write_texts("3.txt", make_texts(31, seed=3))
    elif change == "added":
        write_texts("4.txt", ["w1"])
    else:
        os.remove("3.txt")
    assert prepare_fails(capsys, **corpus).startswith("error: out: made with other the source files")
    assert state_of("out") == before


# ---------------------------------------------------------------------------------------------------------------------
# The held-out split


def test_more_files_move_no_document_between_splits(corpus):
    prepare(**{**corpus, "source": "0.txt"})
    held_out, train = set(texts_of(stored("val"))), set(texts_of(stored()))
    assert held_out and train and held_out | train == set(make_texts(30, seed=0))
    for source in ("0.txt,1.txt", "3.txt,2.txt,1.txt,0.txt"):
        shutil.rmtree("out")
        prepare(**{**corpus, "source": source})
        assert held_out <= set(texts_of(stored("val"))) and train <= set(texts_of(stored()))


def test_val_fraction_is_the_share_held_out():
    """Within 5 standard deviations; a larger share holds out the same documents and others; equal texts go together."""
    texts = make_texts(1000)
    write_texts("a.txt", texts + texts)
    smaller = set()
    for fraction in (0.02, 0.3):
        prepare(source="a.txt", val_fraction=fraction, out=f"out{fraction}")
        held_out = texts_of(stored("val", f"out{fraction}"))
        assert abs(len(held_out) / 2000 - fraction) < 5 * (fraction * (1 - fraction) / 1000) ** 0.5
        assert set(Counter(held_out).values()) == {2} and smaller < set(held_out)
        smaller = set(held_out)


def test_the_hash_never_changes():
    """Else a corpus that is prepared again with a later version trains on what was held out before."""
    assert prepare_c4.text_hash("w1 é 中") == 13285077951972536269


@pytest.mark.parametrize("max_docs", [0, 50])
def test_val_docs_is_a_number(corpus, max_docs):
    smaller = set()
    for number in (1, 7, 20):
        prepare(**corpus, val_docs=number, max_docs=max_docs, out=f"out{number}")
        held_out = texts_of(stored("val", f"out{number}"))
        assert len(held_out) == number and len(stored(out=f"out{number}")) == (max_docs or 120) - number
        assert smaller < set(held_out)
        smaller = set(held_out)


# ---------------------------------------------------------------------------------------------------------------------
# Tokens


LONG_TEXTS = [
    " ".join(WORDS),
    "abcdefghij" * 9 + " w1 w2",  # pieces of one long word
    "abcdefghij" * 50 + " w1 w2 w3 w4 w5 w6",  # over BERT's 100 characters a word: one [UNK]
    " ".join(["abcdefghij" * 50] * 60),
    " " * 3000 + "w1 w2" + "\t" * 3000 + " w3 w4" + "\u3000" * 500 + "w5 w6 w7",
    "\u200b" * 2000 + "w1" + "\u0301" * 1000 + " w2 w3 w4 w5 w6",  # characters that give no token
    "中文" * 300,  # no spaces, each a token
    "ÉCOLE e\u0301 naïve \U0001f600\U0001f600 ... w1 [MASK] w2 [SEP]w3" * 40,
    "a" * 200 + "\u00a0" + "b" * 200 + "\u2028w1 w2 w3 w4 w5 w6",
    "w1",
    "",
]


@pytest.mark.parametrize("limit", [1, 5, 33, 126, 1000])
@pytest.mark.parametrize("cased", [False, True])
def test_max_doc_tokens_keeps_the_first_tokens(limit, cased):
    Path("a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in LONG_TEXTS))
    prepare(source="a.jsonl", val_fraction=0, cased=cased, out="whole")
    prepare(source="a.jsonl", val_fraction=0, cased=cased, max_doc_tokens=limit)
    whole = stored(out="whole")
    assert len(whole) == len(LONG_TEXTS) - 1 and whole[0] == ids(" ".join(WORDS)) and len(whole[6]) == 600
    assert stored() == [document[:limit] for document in whole]
    assert text_report()["tokens"] == sum(len(document[:limit]) for document in whole)


@pytest.mark.parametrize("separator", ["\x0c", "\x1c", "\x85"])
def test_max_doc_tokens_cuts_only_where_the_tokenizer_does(separator):
    """str.isspace takes these for white space; BERT's normalizer removes them, so that here is one long word."""
    write_texts("a.txt", ["a" * 70 + separator + "a" * 40])
    prepare(source="a.txt", val_fraction=0, max_doc_tokens=1)
    assert stored() == [[VOCAB.index("[UNK]")]]


def test_shard_tokens(corpus):
    write_texts("a.txt", make_texts(300))
    prepare(source="a.txt", val_fraction=0.3, out="one")
    prepare(source="a.txt", val_fraction=0.3, shard_tokens=100)
    for split in ("train", "val"):
        assert stored(split) == stored(split, "one")
        sizes = [int(offsets[-1]) for offsets, _ in data.Samples("out", split, 128).shards]
        assert len(sizes) > 5 and all(100 <= size < 130 for size in sizes[:-1]) and sizes[-1] > 0
    manifest = json.loads(Path("out/manifest.json").read_text())
    assert data.verify("out") == len(manifest["shards"]) == len(list(Path("out").glob("*.bin")))
    assert sum(entry["num_tokens"] for entry in manifest["shards"]) == text_report()["tokens"]
    assert sum(entry["num_docs"] for entry in manifest["shards"]) == text_report()["documents"] == 300


@pytest.mark.parametrize("size, width", [(2**16, 2), (2**16 + 1, 4)])
def test_a_large_vocabulary_takes_four_bytes_a_token(size, width):
    write_vocab(VOCAB + [f"x{i}" for i in range(size - len(VOCAB))])
    last = f"x{size - len(VOCAB) - 1}"
    write_texts("a.txt", [f"w1 {last} w2"])
    prepare(source="a.txt", val_fraction=0)
    assert stored() == [[VOCAB.index("w1"), size - 1, VOCAB.index("w2")]]
    assert data.Samples("out", "train", 128).shards[0][1].itemsize == width and text_report()["vocab_size"] == size


TOKENIZER_TEXTS = [
    "The quick brown fox", "École, NAÏVE; e\u0301\u00e9 Straße İstanbul", "中文字w1中 ひらがな 한국어", "w1,w2.w3!?(w4)[w5]-_w6$~`",
    "a [MASK] b [CLS][SEP] [PAD] [UNK] [mask]", "tab\there\r\nnew\u00a0line\u2028x\u3000y", "zero\u200bwidth soft\u00adhyphen \x00 \ufffd \x07",
    "x" * 100 + " " + "x" * 101, "\U0001f600 \u0661\u0662 1234567 3.14", "don't — “quoted” … ¿qué?", "", "   ", "w1w2 w1a aw1",
]  # fmt: skip


@pytest.mark.parametrize("cased", [False, True])
def test_a_vocabulary_tokenizes_as_transformers_does(tmp_path, cased):
    transformers = pytest.importorskip("transformers")
    characters = "".join(sorted({c for text in TOKENIZER_TEXTS for c in text + text.lower()} - set(LETTERS)))
    write_vocab(dict.fromkeys([*VOCAB, *characters.split(), *"".join(characters.split()), "the", "##ck", "Th", "qu", "##it"]))
    expected = transformers.BertTokenizerFast.from_pretrained(str(tmp_path), do_lower_case=not cased)
    Path("a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TOKENIZER_TEXTS))
    prepare(source="a.jsonl", val_fraction=0, cased=cased)
    whole = [expected(text, add_special_tokens=False).input_ids for text in TOKENIZER_TEXTS]
    assert stored() == [document for document in whole if document]
    tokenizer, _ = data.load_tokenizer("out/tokenizer.json")
    assert tokenizer.encode("w1 é", "w2").ids == expected("w1 é", "w2").input_ids
    assert tokenizer.encode("w1 é", "w2").type_ids == expected("w1 é", "w2").token_type_ids
    assert tokenizer.decode(ids("w1") + [VOCAB.index("##a")]) == "w1a"


def test_a_tokenizer_json_is_taken_as_it_is():
    """But for truncation and padding, which would be a second limit."""
    make_tokenizer("given.json")
    tokenizer = Tokenizer.from_file("given.json")
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=8)
    tokenizer.save("given.json")
    write_texts("a.txt", ["w1 w2 w3", "w94"])
    prepare(source="a.txt", val_fraction=0, tokenizer="given.json")
    assert stored() == [[6, 7, 8], [99]]
    assert Path("out/tokenizer.json").read_bytes() == Path("given.json").read_bytes()


@pytest.mark.parametrize("cased", [False, True])
def test_train_tokenizer(cased):
    rng = random.Random(0)
    words = ["".join(rng.choices(LETTERS, k=rng.randint(2, 9))) for _ in range(800)]
    words += [word.title() for word in words[:400]] + ["Été", "naïve"]
    texts = [" ".join(rng.choices(words, k=20)) for _ in range(1000)]
    write_texts("a.txt", texts)
    prepare(source="a.txt", train_tokenizer=600, cased=cased, val_docs=10, tokenizer=None)
    tokenizer, special = data.load_tokenizer("out/tokenizer.json")
    vocabulary = tokenizer.get_vocab()
    assert len(vocabulary) == tokenizer.get_vocab_size() == text_report()["vocab_size"] == 600
    assert sorted(vocabulary.values()) == list(range(600)) and list(special.values()) == list(range(5))
    learnt = set(vocabulary) - set(SPECIAL)
    assert any(entry != entry.lower() for entry in learnt) == any("é" in entry for entry in learnt) == cased
    assert text_report()["unknown_percent"] == 0
    decoded = sorted(tokenizer.decode(document) for document in stored() + stored("val"))
    plain = str.maketrans("éï", "ei")
    assert decoded == sorted(texts if cased else (text.lower().translate(plain) for text in texts))


def test_a_tokenizer_is_not_trained_on_what_is_held_out():
    """Each text has a character of its own, which the vocabulary knows if it was trained on the text."""
    texts = [f"{chr(0x4E00 + i)} w w w" for i in range(200)]
    write_texts("a.txt", texts)
    prepare(source="a.txt", train_tokenizer=1000, val_docs=30)
    unknown = data.load_tokenizer("out/tokenizer.json")[1]["[UNK]"]
    assert len(stored("val")) == 30 and all(document[0] == unknown for document in stored("val"))
    assert not any(unknown in document for document in stored())


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes, and the report


JSON_LINES = b'{"text": "w1"}\n{"text": "w2"}\n'
PACKED = random.Random(0).randbytes(5000).hex().encode()  # text that does not shrink to nothing


@pytest.mark.parametrize(
    "files, options, says",
    [
        ({}, {"source": None}, "--source: not given"),
        ({}, {"out": None}, "--out: not given"),
        ({}, {"source": "a.txt,no.txt"}, "no.txt: no such source"),
        ({}, {"source": "no/*.txt"}, "no/*.txt: no such source"),
        ({"b.tar": b"w1"}, {"source": "b.tar"}, "b.tar: unknown kind of file"),
        ({"b.parquet.gz": b"w1"}, {"source": "b.parquet.gz"}, "b.parquet.gz: unknown kind of file"),
        ({"b.gz": b"w1"}, {"source": "b.gz"}, "b.gz: unknown kind of file"),
        ({"d/b.md": b"w1"}, {"source": "d"}, "d: no such source"),
        ({"b.jsonl": JSON_LINES + b"w3\n"}, {"source": "b.jsonl"}, "b.jsonl:3: not valid JSON: "),
        ({"b.json": b'{\n "text": "w1"\n}\n'}, {"source": "b.json"}, "b.json:1: not valid JSON: "),
        ({"b.jsonl": JSON_LINES + b'["text"]\n'}, {"source": "b.jsonl"}, "b.jsonl:3: no 'text' (keys: none; see --text_key)"),
        ({"b.jsonl": b'{"a": 1, "b": 2}'}, {"source": "b.jsonl"}, "b.jsonl:1: no 'text' (keys: a, b; see --text_key)"),
        ({"b.jsonl": JSON_LINES}, {"source": "b.jsonl", "text_key": "body"}, "b.jsonl:1: no 'body' (keys: text;"),
        ({"b.jsonl": b'\n{"text": null}'}, {"source": "b.jsonl"}, "b.jsonl:2: 'text' is NoneType (expected a string)"),
        ({"b.txt": b"w1\nw\xe9\n"}, {"source": "b.txt"}, "b.txt:2: not UTF-8: "),
        ({"b.txt": "w1\n".encode("utf-16")}, {"source": "b.txt"}, "b.txt:1: not UTF-8: "),
        ({"b.txt": b""}, {"source": "b.txt"}, "b.txt: no text to train on"),
        ({"b.txt": b"\n \n\n"}, {"source": "b.txt"}, "b.txt: no text to train on"),
        ({}, {"source": "a.txt", "val_docs": 2}, "a.txt: no text to train on"),
        ({}, {"source": "a.txt", "val_fraction": 1e-9}, "a.txt: no document was held out"),
        ({"b.txt.gz": gzip.compress(b"w1\n" + PACKED)[:-9]}, {"source": "b.txt.gz"}, "b.txt.gz:2: Compressed file ended"),
        ({"b.txt.xz": lzma.compress(b"w1\n" + PACKED)[:-9]}, {"source": "b.txt.xz"}, "b.txt.xz:2: Compressed file ended"),
        ({"b.txt.gz": b"w1\nw2\n"}, {"source": "b.txt.gz"}, "b.txt.gz:1: Not a gzipped file"),
        ({"b.txt.xz": b"w1\nw2\n"}, {"source": "b.txt.xz"}, "b.txt.xz:1: Input format not supported"),
        ({"b.txt.gz": gzip.compress(PACKED)[:30] + bytes(999)}, {"source": "b.txt.gz"}, "b.txt.gz:1: Error -3 while"),
        ({}, {"tokenizer": "no.txt"}, "no.txt: "),
        ({}, {"tokenizer": "no.json"}, "no.json: no such tokenizer"),
        ({"v.txt": b"[PAD]\n[UNK]\n[CLS]\n[SEP]\nw1\n"}, {"tokenizer": "v.txt"}, "v.txt: has no [MASK] token"),
        ({"v.txt": b"\xff\n"}, {"tokenizer": "v.txt"}, "v.txt: 'utf-8' codec"),
        ({"v.txt": b"[PAD]\nw1\nw2\nw1\n"}, {"tokenizer": "v.txt"}, "v.txt:2: 'w1' is there twice"),
        ({"v.json": b"[PAD]"}, {"tokenizer": "v.json"}, "v.json: not a tokenizer: "),
        ({"v.json": b"{}"}, {"tokenizer": "v.json"}, "v.json: not a tokenizer: "),
        ({}, {"tokenizer": "unmasked.json"}, "unmasked.json: has no [MASK] token"),
        ({"out": b"w1"}, {}, "out: Not a directory"),
        ({"file": b"w1"}, {"out": "file/out"}, "file/out: Not a directory"),
        ({}, {"val_fraction": 1}, "val_fraction=1.0: must be"),
        ({}, {"val_fraction": -0.1}, "val_fraction=-0.1: must be"),
        ({}, {"val_fraction": "half"}, "--val_fraction: 'half' is not a number"),
        ({}, {"max_docs": -1}, "max_docs=-1: must not be negative"),
        ({}, {"skip_bad_lines": -1}, "skip_bad_lines=-1: must not"),
        ({}, {"val_docs": -1}, "val_docs=-1: must not"),
        ({}, {"max_doc_tokens": -1}, "max_doc_tokens=-1: must not"),
        ({}, {"shard_tokens": 0}, "shard_tokens=0: must be at least 1"),
        ({}, {"workers": 0}, "workers=0: must be at least 1"),
        ({}, {"train_tokenizer": 99}, "train_tokenizer=99: a vocabulary needs 100"),
        ({}, {"train_tokenizer": -1}, "train_tokenizer=-1: a vocabulary needs 100"),
        ({}, {"doc_sep": "page"}, "--doc_sep: 'page' is not one of line, blank, file"),
        ({}, {"sauce": "a.txt"}, "--sauce: unknown option (did you mean source?)"),
    ],
)  # fmt: skip
def test_refused(capsys, files, options, says):
    write_files({"a.txt": b"w1\nw2\n", **files})
    make_tokenizer("unmasked.json", special=SPECIAL[:-1])
    error = prepare_fails(capsys, **{"source": "a.txt", "val_fraction": 0, **options})
    assert error.startswith(f"error: {says}")
    assert not list(Path().rglob("manifest.json"))


@pytest.mark.parametrize("name", ["photo.jpg", "train_00000_000.bin", "tokenizer.json", "d/manifest.json"])
def test_a_foreign_directory_is_refused_and_untouched(capsys, name):
    write_files({"a.txt": b"w1\n", f"out/{name}": b"{}", "out/.hidden.tmp": b""})
    before = state_of("out")
    error = prepare_fails(capsys, source="a.txt", val_fraction=0)
    assert error.startswith("error: out: not empty, and not a shard directory") and state_of("out") == before


@pytest.mark.parametrize("contents", [b"{}", b"[]", b'{"options": [], "sources": []}', b"w1", b'{"options": {}}'])
@pytest.mark.parametrize("name", ["manifest.json", ".work/plan.json"])
def test_a_foreign_manifest_is_refused_and_untouched(capsys, name, contents):
    write_files({"a.txt": b"w1\n", f"out/{name}": contents, "out/notes.tmp": b"w1"})
    before = state_of("out")
    error = prepare_fails(capsys, source="a.txt", val_fraction=0)
    assert error.startswith("error: out") and state_of("out") == before


def test_skip_bad_lines(capsys):
    bad = [b"{", b"[]", b'{"tex": "w9"}', b'{"text": 5}', b'{"text": "\xff"}']
    write_files({"a.jsonl": b"\n".join([b'{"text": "w1"}', *bad, b'{"text": "w2"}', b""])})
    prepare(source="a.jsonl", val_fraction=0, skip_bad_lines=5)
    assert texts_of(stored()) == ["w1", "w2"] and text_report()["bad_lines_skipped"] == 5
    for number in range(5):
        error = prepare_fails(capsys, source="a.jsonl", val_fraction=0, skip_bad_lines=number, out=f"out{number}")
        assert error.startswith(f"error: a.jsonl:{2 + number}: ") and not os.path.exists(f"out{number}/manifest.json")


def test_report(capsys):
    words = " ".join(WORDS[:200])
    texts = ["w1", "w1 ? w2", "", "W3 w4 w5 w6xy", " ", words]
    Path("a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts) + "{\n")
    prepare(source="a.jsonl", skip_bad_lines=1, val_docs=1)
    report, printed = text_report(), capsys.readouterr().out
    (held_out,) = stored("val")
    assert sorted(map(len, [held_out, *stored()])) == [1, 3, 6, 200]
    expected = {
        "documents": 4, "documents_held_out": 1, "documents_empty": 2, "bad_lines_skipped": 1,
        "tokens": 210, "tokens_held_out": len(held_out), "vocab_size": len(VOCAB),
        "documents_duplicate": 0, "duplicates_removed": False, "bytes_per_token": round((len("w1w1 ? w2W3 w4 w5 w6xy") + len(words)) / 210, 4),
        "tokens_per_word": round(210 / 208, 4), "unknown_percent": round(100 / 210, 4),
        "fill_at_128": round((3 + 5 + 8 + 128) / (4 * 128), 4), "fill_at_512": round((3 + 5 + 8 + 202) / (4 * 512), 4),
        "lengths": {"1-1": 1, "2-3": 1, "4-7": 1, "128-255": 1}, "characters": sum(map(len, texts)) - 1,
    }  # fmt: skip
    assert {name: report[name] for name in expected} == expected
    assert set(report) - set(expected) == {"longest", "seconds", "tokens_per_second", "megabytes_per_second"}
    assert [(entry["characters"], entry["document"]) for entry in report["longest"]] == [(len(words), 4), (13, 3), (7, 2), (2, 1)]
    assert report["longest"][0] == {
        "characters": len(words), "file": "a.jsonl", "from_byte": 0, "document": 4, "text": words[:80]
    }  # fmt: skip
    assert all(name in printed for name in report)
