"""prepare_c4.py: interruption at any point, the held-out split, tokens, errors, and the report."""

import contextlib
import fcntl
import gzip
import json
import lzma
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, models

import data
import prepare_c4
from common import sources, vocabulary, workers
from common.files import file_digest
from tests.corpus import LETTERS, VOCAB, WORDS, files_of, ids, interrupted, make_texts, only_whole_files, prepare
from tests.corpus import prepare_fails, raise_interrupt, state_of, stored, text_report, texts_of, workplace, write_files, write_texts, write_vocab  # noqa: F401
from tests.ranks import descendants
from tests.toy import SPECIAL, make_tokenizer

# ---------------------------------------------------------------------------------------------------------------------
# Units, interruption


@pytest.fixture
def corpus(monkeypatch):
    """Options for a corpus of four units with at least two shards each."""
    monkeypatch.setattr(prepare_c4, "UNIT_BYTES", 1)
    for i in range(4):
        write_texts(f"{i}.txt", make_texts(30, seed=i))
    return {"source": "?.txt", "val_fraction": 0.2, "shard_tokens": 150}


def test_the_number_of_processes_does_not_matter(corpus):
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
def test_interrupted_at_any_point_it_resumes(corpus, monkeypatch, after):
    """Every file is renamed into place: stop before, or after, the first, second, ... rename."""
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
        with interrupted():
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
        with interrupted():
            prepare(**corpus)
    assert done == [0, 1] and not os.path.exists("out/manifest.json")
    prepare(**corpus)
    assert done == [0, 1, 1, 2, 3] and "1 of 4 units were already done" in capsys.readouterr().out
    prepare(**corpus, out="whole")
    assert files_of() == files_of("whole") and only_whole_files()
    reports = [json.loads(Path(out, "report.json").read_text()) for out in ("out", "whole")]
    assert all(reports[0][name] == reports[1][name] for name in list(reports[0])[:-2] if name != "seconds")


def test_a_trained_tokenizer_is_kept_by_a_resumed_run(corpus, monkeypatch):
    """Training is not deterministic, and finished units used the first tokenizer."""
    process_unit, made = prepare_c4.process_unit, []

    def fails_at_the_second(number, *arguments):
        made.append(Path("out/tokenizer.json").stat().st_mtime_ns)
        if len(made) == 2:
            raise KeyboardInterrupt
        return process_unit(number, *arguments)

    monkeypatch.setattr(prepare_c4, "process_unit", fails_at_the_second)
    with interrupted():
        prepare(**corpus, train_tokenizer=200)
    prepare(**corpus, train_tokenizer=200)
    assert len(made) == 5 and len(set(made)) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Several tasks, on any hosts


@pytest.mark.parametrize(
    "options", [{}, {"dedup": True, "val_docs": 7, "val_fraction": 0.0}, {"compare_tokenizer": "vocab.txt"}], ids=str
)
def test_tasks_and_a_join_give_the_bytes_of_one_run(corpus, options, monkeypatch, capsys):
    """Without the second pass over little text too; the number of tasks changes on the way; a task is run twice."""
    if not options:
        monkeypatch.setattr(prepare_c4, "HASHED_BYTES", 0)
    write_texts("4.txt", make_texts(30, seed=0))
    options = corpus | options
    prepare(**options, out="whole")
    for task in ("2/3", "2/3", "1/9", "4/4"):  # units 1 and 4, again, 0, 3
        prepare(**options, task=task)
        assert f"out: task {task} is done" in capsys.readouterr().out and not Path("out/manifest.json").exists()
    line = prepare_fails(capsys, **options, join=True)
    assert line == "error: out: 1 of 5 units of work are missing (wait for the tasks, or run them again: nothing is done twice)\n"
    prepare(**options, task="3/5")
    assert "the last one: now --join" in capsys.readouterr().out
    prepare(**options, join=True)
    assert files_of() == files_of("whole") and only_whole_files()
    for finished in ({"join": True}, {"task": "1/2"}):
        prepare(**options, **finished)
        assert "already finished" in capsys.readouterr().out


def test_tasks_at_once_some_killed(corpus):
    """Real processes that share nothing but the directory; a vocabulary that the first of them to finish has trained."""
    options = {**corpus, "dedup": True, "train_tokenizer": 300}
    running = [start("out", 1, **options, task=f"{i}/4") for i in (1, 2, 3, 4, 4)]
    for process in running[:2]:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(2)
        process.kill()
    assert [process.wait() for process in running[2:]] == [0, 0, 0]
    again = [start("out", 1, **options, task=f"{i}/2") for i in (1, 2)]
    assert [process.wait() for process in again] == [0, 0]
    for process in running + again:
        process.stderr.close()
    shutil.copy("out/tokenizer.json", "new.json")
    prepare(**options, join=True)
    prepare(**corpus, dedup=True, tokenizer="new.json", out="whole")
    assert only_whole_files() and files_without_options() == files_without_options("whole")


def test_the_first_trained_vocabulary_stays(corpus, monkeypatch):
    train = prepare_c4.train_tokenizer

    def slow(*arguments):
        text = train(*arguments)
        shutil.copytree("rival", "out", dirs_exist_ok=True)  # another task was faster
        return text.replace('"##a"', '"##z"', 1)

    prepare(**corpus, train_tokenizer=300, out="rival", task="1/2")
    shutil.copytree("rival", "out", ignore=lambda *_: ["tokenizer.json"])
    monkeypatch.setattr(prepare_c4, "train_tokenizer", slow)
    prepare(**corpus, train_tokenizer=300, task="2/2")
    prepare(**corpus, train_tokenizer=300, join=True)
    assert files_of()["tokenizer.json"] == Path("rival/tokenizer.json").read_bytes()


def files_without_options(out="out"):
    """files_of, but of the manifest only the shards: a vocabulary is trained, or given."""
    files = files_of(out)
    return files | {"manifest.json": json.loads(Path(out, "manifest.json").read_text())["shards"]}


def test_bad_tasks(corpus, monkeypatch, capsys):
    for task in ("0/4", "5/4", "1/0", "-1/4", "1", "1/4/4", "a/b", "/"):
        assert f"task={task}: not i/N with i from 1 to N" in prepare_fails(capsys, **corpus, task=task)
    assert "--task and --join exclude each other" in prepare_fails(capsys, **corpus, task="1/2", join=True)
    assert "out: 4 of 4 units of work are missing" in prepare_fails(capsys, **corpus, join=True) and not Path("out").exists()
    prepare(**corpus, task="1/2")
    before = state_of("out")
    other = {**corpus, "shard_tokens": 200}
    assert "out: holds shards that differ: shard_tokens was 150 and is 200 (" in prepare_fails(capsys, **other, task="2/2")
    assert "out: holds shards that differ: shard_tokens was 150 and is 200 (" in prepare_fails(capsys, **other, join=True)
    with monkeypatch.context() as patch:  # two tasks that began at the same moment: neither saw the other's plan
        read_plan, unseen = prepare_c4.read_plan, [(None, False)]
        patch.setattr(prepare_c4, "read_plan", lambda out: unseen.pop() if unseen else read_plan(out))
        assert "out: holds shards that differ: shard_tokens was 150 and is 200 (" in prepare_fails(capsys, **other, task="2/2")
    assert state_of("out") == before
    with monkeypatch.context() as patch, interrupted():  # before it wrote anything but hashes
        patch.setattr(prepare_c4, "val_threshold", raise_interrupt)
        prepare(**corpus, task="1/2", out="hashed")
    before = state_of("hashed")
    assert "hashed: holds shards that differ: shard_tokens was 150 and is 200 (" in prepare_fails(capsys, **other, task="2/2", out="hashed")
    assert state_of("hashed") == before
    lock = os.open("out", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_SH)  # as a live task holds it
    prepare(**corpus, task="2/2")
    assert "out: in use by a live run" in prepare_fails(capsys, **corpus, join=True)
    os.close(lock)
    write_files({"full/thesis.txt": b"mine"})
    assert "full: not empty" in prepare_fails(capsys, **corpus, task="1/2", out="full") and os.listdir("full") == ["thesis.txt"]


# ---------------------------------------------------------------------------------------------------------------------
# The same command again, and another one


def test_a_finished_run_has_nothing_to_do(corpus, capsys):
    prepare(**corpus)
    before = state_of("out")
    capsys.readouterr()
    prepare(**corpus)
    prepare(**corpus, workers=2)
    prepare(**corpus, out="./out/")
    assert capsys.readouterr().out.count("nothing to do") == 3 and state_of("out") == before


def test_texts_that_hardly_differ_are_duplicates(corpus, capsys):
    """Composed and decomposed letters, as from a PDF or a Mac, and blanks: the report had 1 duplicate instead of 3."""
    texts = ["w1 Größe", "w2 w3"]
    write_texts("a.txt", texts)
    write_texts("b.txt", [unicodedata.normalize("NFD", text) for text in texts])
    write_texts("c.txt", [f"{text} " for text in texts])
    prepare(source="a.txt,b.txt,c.txt", dedup=True, val_docs=1)
    assert (text_report()["documents"], text_report()["documents_duplicate"]) == (2, 4) and len(stored("val")) == 1


def test_a_slash_behind_a_directory_changes_nothing(corpus, capsys):
    write_files({"texts/a.txt": b"w1\nw2\n" * 20})
    for slash in ("", "/", "//"):
        prepare(**corpus | {"source": f"texts{slash}"})
    assert capsys.readouterr().out.count("nothing to do") == 2


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    "option, value",
    [
        ("val_fraction", 0.3), ("max_doc_tokens", 9), ("shard_tokens", 151), ("cased", True), ("doc_sep", "blank"),
        ("tokenizer", "other.txt"), ("source", "0.txt"), ("max_docs", 9), ("train_tokenizer", 200),
    ],
)  # fmt: skip
def test_another_option_is_refused(corpus, monkeypatch, capsys, finished, option, value):
    write_vocab(VOCAB, "other.txt")
    if finished:
        prepare(**corpus)
    else:
        with monkeypatch.context() as patch, interrupted():
            patch.setattr(prepare_c4, "write_shard", raise_interrupt)
            prepare(**corpus)
    before = state_of("out")
    error = prepare_fails(capsys, **{**corpus, option: value})
    was = {"cased": False, "doc_sep": "line", "tokenizer": "vocab.txt", **corpus}.get(option, 0)
    assert error.startswith("error: out: holds shards that differ: ") and f"{option} was {was!r} and is {value!r}" in error
    assert state_of("out") == before


@pytest.mark.parametrize("change", ["grown", "added", "removed"])
def test_other_source_files_are_refused(corpus, capsys, change):
    prepare(**corpus)
    before = state_of("out")
    says = "3.txt was changed" if change == "grown" else "other source files"
    if change == "grown":
        write_texts("3.txt", make_texts(31, seed=3))
    elif change == "added":
        write_texts("4.txt", ["w1"])
    else:
        os.remove("3.txt")
    assert prepare_fails(capsys, **corpus).startswith(f"error: out: holds shards that differ: {says} (")
    assert state_of("out") == before


def test_a_file_fixed_before_anything_was_made_is_accepted(capsys):
    """The user fixes the file that the error names, and repeats the command."""
    write_files({"1.txt": b"\n".join(text.encode() for text in make_texts(30)), "2.csv": b"id;body\n1;w1\n"})
    options = {"source": "?.txt,2.csv", "train_tokenizer": 100, "val_fraction": 0.2}
    assert prepare_fails(capsys, **options).startswith("error: 2.csv:1: no column 'text'")
    write_files({"2.csv": b"id,text\n1,w1\n"})
    prepare(**options)
    assert stored("val") and len(stored()) + len(stored("val")) == 31


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
    """Within 5 standard deviations. A larger share holds out the same documents and more; equal texts stay together."""
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
    """Otherwise a later version would train on what an earlier one held out."""
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


def test_texts_without_a_visible_character_are_blank(corpus):
    """They took the places of held-out ones."""
    write_texts("zz.txt", ["\u200b" * k for k in range(1, 60)] + [" \ufeff\u3000"])
    prepare(**{**corpus, "source": "zz.txt," + corpus["source"]}, val_docs=5)
    report = text_report()
    assert report["documents_held_out"] == 5 and report["documents_empty"] == 60 and report["documents"] == 120


def test_carriage_returns_inside_lines_are_said(corpus):
    """Old Mac line ends with a line feed somewhere made a few long documents of many."""
    Path("mac.txt").write_bytes(b"".join(b"w1 w2 %d\r" % i for i in range(60)) + b"w3\nw4\r\nw5\n")
    prepare(**{**corpus, "source": "mac.txt," + corpus["source"]})
    (suspect,) = text_report()["suspect"]
    assert suspect.startswith("mac.txt: carriage returns inside 1 line (old Mac line ends? tr ")


# ---------------------------------------------------------------------------------------------------------------------
# Tokens


LONG_TEXTS = [
    " ".join(WORDS),
    "abcdefghij" * 9 + " w1 w2",  # one long word in many tokens
    "abcdefghij" * 50 + " w1 w2 w3 w4 w5 w6",  # over BERT's 100 characters a word: one [UNK]
    " ".join(["abcdefghij" * 50] * 60),
    " " * 3000 + "w1 w2" + "\t" * 3000 + " w3 w4" + "\u3000" * 500 + "w5 w6 w7",
    "\u200b" * 2000 + "w1" + "\u0301" * 1000 + " w2 w3 w4 w5 w6",  # characters without a token
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
    """White space for str.isspace, but BERT's normalizer removes it, so this is one long word."""
    tokenizer, special = vocabulary.load_tokenizer("vocab", vocabulary.read_tokenizer("vocab.txt"))
    assert vocabulary.encode(tokenizer, ["a" * 70 + separator + "a" * 40], 1)[1] == [[special["[UNK]"]]]


def test_shard_tokens(corpus):
    write_texts("a.txt", make_texts(300))
    prepare(source="a.txt", val_fraction=0.3, out="one")
    prepare(source="a.txt", val_fraction=0.3, shard_tokens=100)
    for split in ("train", "val"):
        assert stored(split) == stored(split, "one")
        sizes = [len(shard.tokens) for shard in data.Samples("out", split, 128).shards]
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
    assert data.Samples("out", "train", 128).shards[0].tokens.itemsize == width and text_report()["vocab_size"] == size


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
    options = {"do_lower_case": not cased, "split_special_tokens": True}  # names of special tokens in a text are text
    expected = transformers.BertTokenizerFast.from_pretrained(str(tmp_path), **options)
    Path("a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TOKENIZER_TEXTS))
    prepare(source="a.jsonl", val_fraction=0, cased=cased)
    whole = [expected(text, add_special_tokens=False).input_ids for text in TOKENIZER_TEXTS]
    assert stored() == [document for document in whole if document]
    tokenizer, _ = vocabulary.load_tokenizer("out/tokenizer.json")
    assert tokenizer.encode("w1 é", "w2").ids == expected("w1 é", "w2").input_ids
    assert tokenizer.encode("w1 é", "w2").type_ids == expected("w1 é", "w2").token_type_ids
    assert tokenizer.decode(ids("w1") + [VOCAB.index("##a")]) == "w1a"


def test_a_tokenizer_json_is_copied_unchanged():
    """Its truncation and padding are ignored: they would be a second limit."""
    make_tokenizer("given.json")
    tokenizer = Tokenizer.from_file("given.json")
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=8)
    tokenizer.save("given.json")
    write_texts("a.txt", ["w1 w2 w3", "w94"])
    prepare(source="a.txt", val_fraction=0, tokenizer="given.json")
    assert stored() == [[6, 7, 8], [99]]
    assert Path("out/tokenizer.json").read_bytes() == Path("given.json").read_bytes()
    prepare(source="a.txt", val_fraction=0, tokenizer="out", out="of_a_directory")  # as of other shards, or a checkpoint
    assert files_of("of_a_directory")["tokenizer.json"] == files_of()["tokenizer.json"]


@pytest.mark.parametrize("cased", [False, True])
def test_train_tokenizer(cased):
    rng = random.Random(0)
    words = ["".join(rng.choices(LETTERS, k=rng.randint(2, 9))) for _ in range(800)]
    words += [word.title() for word in words[:400]] + ["Été", "naïve"]
    texts = [" ".join(rng.choices(words, k=20)) for _ in range(1000)]
    write_texts("a.txt", texts)
    prepare(source="a.txt", train_tokenizer=600, cased=cased, val_docs=10, tokenizer=None)
    tokenizer, special = vocabulary.load_tokenizer("out/tokenizer.json")
    vocab = tokenizer.get_vocab()
    assert len(vocab) == tokenizer.get_vocab_size() == text_report()["vocab_size"] == 600
    assert sorted(vocab.values()) == list(range(600)) and list(special.values()) == list(range(5))
    learnt = set(vocab) - set(SPECIAL)
    assert any(entry != entry.lower() for entry in learnt) == cased and any("é" in entry for entry in learnt)
    assert text_report()["unknown_percent"] == text_report()["changed_characters_percent"] == 0
    decoded = sorted(tokenizer.decode(document) for document in stored() + stored("val"))
    assert decoded == sorted(texts if cased else (text.lower() for text in texts))


def test_a_tokenizer_is_not_trained_on_what_is_held_out():
    """Each text has a character of its own, which is in the vocabulary only if it was trained on that text."""
    texts = [f"{chr(0x4E00 + i)} w w w" for i in range(200)]
    write_texts("a.txt", texts)
    prepare(source="a.txt", train_tokenizer=1000, val_docs=30)
    unknown = vocabulary.load_tokenizer("out/tokenizer.json")[1]["[UNK]"]
    assert len(stored("val")) == 30 and all(document[0] == unknown for document in stored("val"))
    assert not any(unknown in document for document in stored())


@pytest.mark.parametrize("texts, length", [(60, 300_000), (6000, 30_000)])
def test_huge_words_take_no_time(texts, length):
    """Training is quadratic in their length: a minute. They are cut, and learned from if they are most of the text."""
    write_texts("a.txt", [*make_texts(texts), "q" * length, "z" * 100])
    prepare(source="a.txt", train_tokenizer=200, val_fraction=0, tokenizer=None)
    tokenizer, _ = vocabulary.load_tokenizer("out/tokenizer.json")
    of_q, of_z = (tokenizer.encode(letter * 250, add_special_tokens=False).tokens for letter in "qz")
    assert "[UNK]" not in of_z
    if texts == 60:
        assert len(of_q) < 50 and "[UNK]" not in of_q
    else:
        assert of_q == ["[UNK]"] * 3
    assert "Removed" not in Path("out/tokenizer.json").read_text()


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes, and the report


JSON_LINES = b'{"text": "w1"}\n{"text": "w2"}\n'
PACKED = random.Random(0).randbytes(5000).hex().encode()  # text that does not compress well


@pytest.mark.parametrize(
    "files, options, says",
    [
        ({}, {"source": None}, "--source: not given"),
        ({}, {"out": None}, "--out: not given"),
        ({}, {"source": "a.txt,no.txt"}, "no.txt: no such source"),
        ({}, {"source": "no/*.txt"}, "no/*.txt: no such source"),
        ({"b.tar": b"w1"}, {"source": "b.tar"}, "b.tar: unknown file format"),
        ({"d/b.txt": b"w1"}, {"source": "d/b.txt,d"}, "d/b.txt: listed twice in --source=d/b.txt,d"),
        ({}, {"source": "stdlib,stdlib"}, "stdlib: listed twice in --source=stdlib,stdlib"),
        ({"a,b.txt": b"w1"}, {"source": "a,b.txt"}, "a,b.txt: a comma in a name, but commas separate sources"),
        ({"Letters, 1820/a.txt": b"w1"}, {"source": "Letters, 1820"}, "Letters, 1820: a comma in a name, but commas separate"),
        ({"b.parquet.gz": b"w1"}, {"source": "b.parquet.gz"}, "b.parquet.gz: unknown file format"),
        ({"b.gz": b"w1"}, {"source": "b.gz"}, "b.gz: unknown file format"),
        ({"d/b.md": b"w1"}, {"source": "d"}, "d: has no file that can be read: 1 .md (expected .txt, "),
        ({"b.jsonl": JSON_LINES + b"w3\n"}, {"source": "b.jsonl"}, "b.jsonl:3: not valid JSON: "),
        ({"b.jsonl": b'{\n "text": "w1"\n}\n'}, {"source": "b.jsonl"}, "b.jsonl:1: not valid JSON: "),
        ({"b.json": b'{"text": "w1"\n' + JSON_LINES}, {"source": "b.json"}, "b.json:1: not valid JSON: "),
        ({"b.jsonl": JSON_LINES + b'["text"]\n'}, {"source": "b.jsonl"}, "b.jsonl:3: a list, not an object (expected one object per line;"),
        ({"b.jsonl": b'{"a": 1, "b": 2}'}, {"source": "b.jsonl"}, "b.jsonl:1: no 'text' (keys: a, b; see --text_key;"),
        ({"b.jsonl": JSON_LINES}, {"source": "b.jsonl", "text_key": "body"}, "b.jsonl:1: no 'body' (keys: text;"),
        ({"b.jsonl": b'\n{"text": null}'}, {"source": "b.jsonl"}, "b.jsonl:2: 'text' is null ("),
        ({"b.txt": b"w1\nw\xe9\n"}, {"source": "b.txt"}, "b.txt:2: not UTF-8: "),
        ({"b.txt": "w1\n".encode("utf-16")}, {"source": "b.txt"}, "b.txt: looks like UTF-16, not UTF-8 text (iconv"),
        ({"b.txt": b""}, {"source": "b.txt"}, "b.txt: no text to train on"),
        ({"b.txt": b"\n \n\n"}, {"source": "b.txt"}, "b.txt: no text to train on"),
        ({}, {"source": "a.txt", "val_docs": 2}, "a.txt: no text to train on"),
        ({"b.txt.gz": gzip.compress(b"w1\n" + PACKED)[:-9]}, {"source": "b.txt.gz"}, "b.txt.gz:2: Compressed file ended"),
        ({"b.txt.xz": lzma.compress(b"w1\n" + PACKED)[:-9]}, {"source": "b.txt.xz"}, "b.txt.xz:2: Compressed file ended"),
        ({"b.txt.gz": b"w1\nw2\n"}, {"source": "b.txt.gz"}, "b.txt.gz:1: Not a gzipped file"),
        ({"b.txt.xz": b"w1\nw2\n"}, {"source": "b.txt.xz"}, "b.txt.xz:1: Input format not supported"),
        ({"b.txt.gz": gzip.compress(PACKED)[:30] + bytes(999)}, {"source": "b.txt.gz"}, "b.txt.gz:1: Error -3 while"),
        ({}, {"tokenizer": "no.txt"}, "no.txt: "),
        ({}, {"tokenizer": "no.json"}, "no.json: no such tokenizer"),
        ({"v.txt": b"[PAD]\n[UNK]\n[CLS]\n[SEP]\nw1\n"}, {"tokenizer": "v.txt"}, "v.txt: has no [MASK] token"),
        ({"v.txt": b"\xff\n"}, {"tokenizer": "v.txt"}, "v.txt: 'utf-8' codec"),
        ({"v.txt": b"[PAD]\nw1\nw2\nw1\n"}, {"tokenizer": "v.txt"}, "v.txt:2: 'w1' is listed twice"),
        ({"v.json": b"[PAD]"}, {"tokenizer": "v.json"}, "v.json: not a tokenizer: "),
        ({"v.json": b"{}"}, {"tokenizer": "v.json"}, "v.json: not a tokenizer: "),
        ({}, {"tokenizer": "unmasked.json"}, "unmasked.json: has no [MASK] token"),
        ({"out": b"w1"}, {}, "out: File exists"),
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
        ({}, {"train_tokenizer": 99}, "train_tokenizer=99: a vocabulary needs at least 100"),
        ({}, {"train_tokenizer": -1}, "train_tokenizer=-1: a vocabulary needs at least 100"),
        ({}, {"train_tokenizer": 500, "tokenizer": "vocab.txt"}, "--train_tokenizer and --tokenizer exclude each other"),
        ({}, {"cased": True, "tokenizer": "unmasked.json"}, "cased: only with --train_tokenizer or a vocab.txt (a tok"),
        ({}, {"cased": True, "tokenizer": None}, "cased: only with --train_tokenizer or a vocab.txt (a tok"),
        ({"toks/v.txt": b""}, {"tokenizer": "./tokz"}, "./tokz: no such tokenizer (did you mean ./toks?)"),
        ({}, {"tokenizer": "/typo/v1"}, "/typo/v1: no such tokenizer (a tokenizer.json or its directory, a vocab.txt, or a"),
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


def test_a_read_only_output_is_called_so(capsys):
    """The .work in it was called a file."""
    write_files({"a.txt": b"w1\n"})
    os.makedirs("out/.work")
    os.chmod(".", 0o777)
    os.chmod("out", 0o555)
    user = os.geteuid()
    if user == 0:  # may write everywhere
        os.seteuid(65534)
    try:
        error = prepare_fails(capsys, source="a.txt", val_fraction=0)
        assert error == "error: out/.work/: Permission denied (choose another path, or change its permissions)\n"
    finally:
        os.seteuid(user)


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
        "documents": 4, "documents_held_out": 1, "documents_empty": 2, "bad_lines_skipped": 1, "suspect": [],
        "files_without_text": [], "documents_broken": 0, "broken": [],
        "skipped": ["a.jsonl:7: not valid JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1) (expected one object per line)"],
        "unknown_characters_percent": round(100 / (17 + len(words.replace(" ", ""))), 4), "changed_characters_percent": 0,
        "decoded": [{"text": "w1 ? w2", "tokens": "w1 [UNK] w2"}, {"text": "w1", "tokens": "w1"}, {"text": "W3 w4 w5 w6xy", "tokens": "w3 w4 w5 w6xy"}],
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
    assert all(name in printed for name, value in report.items() if value != [])


def test_duplicates_are_counted_or_removed(corpus):
    """Equal documents within a file and across files are counted; --dedup keeps the first of them."""
    texts = make_texts(100)
    for i in range(4):
        write_texts(f"{i}.txt", [*texts[20 * i : 20 * i + 40], *texts[20 * i : 20 * i + 3], "", f"w{i} w{i}"])
    options = {**corpus, "val_docs": 5}
    prepare(**options)
    assert (text_report()["documents"], text_report()["documents_duplicate"]) == (4 * 44, 4 * 44 - 104)
    prepare(**options, dedup=True, out="once")
    report = json.loads(Path("once/report.json").read_text())
    first = list(dict.fromkeys(texts_of(stored() + stored("val"))))
    kept = texts_of(stored(out="once")), texts_of(stored("val", out="once"))
    assert sorted(kept[0] + kept[1]) == sorted(first) and len(kept[1]) == 5
    assert kept[0] == [text for text in dict.fromkeys(texts_of(stored())) if text not in kept[1]]
    assert (report["documents"], report["documents_duplicate"], report["duplicates_removed"]) == (104, 4 * 44 - 104, True)
    prepare(**options, dedup=True, workers=2, out="two")
    assert files_of("two") == files_of("once")


def test_compare_tokenizer(capsys):
    """A vocabulary without whole words next to one that has them."""
    write_vocab([*SPECIAL, *LETTERS, *(f"##{letter}" for letter in LETTERS), *"0123456789", *(f"##{i}" for i in range(10))], "small.txt")
    write_texts("a.txt", ["w1 w22 w7", "w300 w4 \u4e2d\u00e9?"])
    prepare(source="a.txt", val_fraction=0, compare_tokenizer="small.txt", max_doc_tokens=3)
    compared = text_report()["compared"]
    assert (compared["with"], compared["bytes"]) == ("small.txt", 23)
    # Here w300 and e (for \u00e9) are several tokens or unknown; there each letter is a token, and \u4e2d and ? are unknown.
    assert compared["other"] == {
        "tokens_per_word": round(16 / 6, 4), "bytes_per_token": round(23 / 16, 4), "unknown_percent": round(100 * 2 / 16, 4),
    }  # fmt: skip
    assert compared["this"]["tokens_per_word"] < 1.5 and text_report()["tokens"] == 6
    assert "tokens_per_word" in capsys.readouterr().out and not os.path.exists("out/.work")


@pytest.mark.parametrize("task", [{}, {"task": "1/1"}], ids=str)
def test_a_second_tokenizer_that_is_not_there_is_said_before_any_work(capsys, task):
    """It was said after training a tokenizer, and the directory could not be used again."""
    write_texts("a.txt", make_texts(100))
    options = {"source": "a.txt", "train_tokenizer": 200, "val_docs": 5, "compare_tokenizer": "vocab.txt"}
    error = prepare_fails(capsys, **options | {"compare_tokenizer": "/typo"}, **task)
    assert error.startswith("error: /typo: no such tokenizer (") and not os.path.exists("out")
    prepare(**options, **task)
    prepare(**options, join=True)
    assert text_report()["compared"]["with"] == "vocab.txt"


def test_a_text_in_parts_has_the_same_tokens(monkeypatch):
    tokenizer = Tokenizer.from_str(vocabulary.read_tokenizer("vocab.txt"))
    texts = [*LONG_TEXTS, " w1  w2\t\tw3\n", "w1"]
    expected = [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
    for chars in (1, 2, 5, 100, 3001):
        monkeypatch.setattr(vocabulary, "PART_CHARS", chars)
        assert vocabulary.encode(tokenizer, texts)[1] == expected


def test_a_new_vocabulary_covers_the_characters_of_any_script():
    """3,000 Chinese characters; and an English text in which such are rare."""
    rng = random.Random(0)
    chinese = ["".join(chr(0x4E00 + min(2999, int(rng.expovariate(1 / 600)))) for _ in range(50)) for _ in range(3000)]
    assert 2500 < vocabulary.alphabet_size(chinese, 8000) < 3000
    assert vocabulary.alphabet_size(chinese, 4000) == 2000  # the other half is for words
    rare = ["the cat sat " * 1000 + "".join(map(chr, range(0x4E00, 0x4E00 + 3000)))] + ["the cat sat " * 10**4] * 300
    assert vocabulary.alphabet_size(rare, 30_000) == vocabulary.MIN_ALPHABET
    write_texts("a.txt", chinese)
    prepare(source="a.txt", train_tokenizer=8000, val_docs=30, tokenizer=None)
    assert text_report()["unknown_percent"] < 0.05


def test_a_new_vocabulary_is_trained_on_all_sources():
    """With more text than is needed, each file gives its share."""
    for i, letter in enumerate("abc"):
        write_texts(f"{i}.txt", [f"{letter * n} " * 20 for n in range(2, 40)])
    units = prepare_c4.group_units(sources.list_segments("0.txt,1.txt,2.txt"), whole=False)
    cfg = prepare_c4.PrepareConfig()
    texts = list(prepare_c4.training_texts(units, cfg, 0, 9000))
    counts = Counter("".join(texts))
    assert all(2500 < counts[letter] < 5000 for letter in "abc") and sum(map(len, texts)) < 14_000
    assert len(list(prepare_c4.training_texts(units, cfg, 0, 10**6))) == 3 * 38


@pytest.mark.parametrize("missing", SPECIAL)
@pytest.mark.parametrize("name", ["given.json", "given.txt"])
def test_a_tokenizer_without_a_special_token_is_refused(capsys, missing, name):
    write_texts("a.txt", ["w1"])
    rest = [token for token in SPECIAL if token != missing]
    if name.endswith(".txt"):
        write_vocab([*rest, *WORDS], name)
    else:
        tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*rest, "w1"])}, unk_token="w1"))
        tokenizer.save(name)
    assert prepare_fails(capsys, source="a.txt", tokenizer=name).startswith(f"error: {name}: has no {missing} token")


# ---------------------------------------------------------------------------------------------------------------------
# Disk, progress, other processes


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
@pytest.mark.parametrize("max_doc_tokens", [0, 5])
def test_the_estimated_size_of_the_shards(monkeypatch, suffix, max_doc_tokens):
    """Within 10 %, from a fifth of the text."""
    pack = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}[suffix]
    for i in range(8):
        Path(f"{i}.txt{suffix}").write_bytes(pack("\n".join(make_texts(1000, seed=i)).encode()))
    monkeypatch.setattr(prepare_c4, "SAMPLE_CHARS", 60_000 if not suffix else 10**6)
    prepare(source=f"?.txt{suffix}", val_fraction=0, max_doc_tokens=max_doc_tokens)
    cfg = prepare_c4.PrepareConfig(max_doc_tokens=max_doc_tokens)
    units = prepare_c4.group_units(sources.list_segments(f"?.txt{suffix}"), whole=False)
    estimate, _ = prepare_c4.inspect_sample(units, cfg, vocabulary.load_tokenizer("out/tokenizer.json")[0])
    actual = sum(path.stat().st_size for path in Path("out").glob("*.bin"))
    assert abs(estimate / actual - 1) < 0.1


def test_a_disk_that_is_too_small_is_refused_at_the_start(corpus, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(prepare_c4.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        error = prepare_fails(capsys, **corpus)
    assert "MB more are needed, 0.0 MB are free (choose another --out, or truncate documents with" in error
    assert not list(Path("out").glob("*.bin"))
    prepare(**corpus)
    assert only_whole_files()


def test_a_full_disk_ends_in_one_line_and_keeps_finished_units(monkeypatch, capsys):
    """A limit on file sizes stands in for the disk: the second, larger unit does not fit."""
    monkeypatch.setattr(prepare_c4, "UNIT_BYTES", 1)
    write_texts("0.txt", make_texts(30))
    write_texts("1.txt", make_texts(3000, seed=1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
    try:
        error = prepare_fails(capsys, source="?.txt", val_fraction=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error == "error: out/train_00001_000.bin: File too large (finished units are kept; the same command resumes)\n"
    assert sorted(path.name for path in Path("out").rglob("*.*")) == [
        ".work", "hashes_00000.npz", "hashes_00001.npz", "plan.json", "tokenizer.json", "train_00000_000.bin", "unit_00000.json"
    ]  # fmt: skip
    prepare(source="?.txt", val_fraction=0)
    assert "1 of 2 units were already done" in capsys.readouterr().out
    prepare(source="?.txt", val_fraction=0, out="whole")
    assert files_of() == files_of("whole")


def test_progress(corpus, monkeypatch, capsys):
    monkeypatch.setattr(workers, "REPORT_SECONDS", -1)
    monkeypatch.setattr(prepare_c4, "BATCH_CHARS", 500)
    prepare(**corpus)
    lines = [line for line in capsys.readouterr().out.splitlines() if "; " in line and "% of" in line]
    pattern = (
        r"([\d,]+) documents, [\d.]+ M tokens, [\d.]+ M tokens/s, [\d.]+ MB/s; (\d+)% of 0.0 MB read, \d:\d\d:\d\d left; "
        r"0.0 MB of about 0.0 MB written"
    )
    found = [re.fullmatch(pattern, line) for line in lines]
    assert len(lines) > 8 and all(found) and (found[-1][1], found[-1][2]) == ("120", "100")
    shares = [int(match[2]) for match in found]
    assert shares == sorted(shares) and shares[0] < 50


def test_a_second_live_run_is_refused(corpus, capsys):
    with interrupted(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_c4, "write_shard", raise_interrupt)
        prepare(**corpus)
    lock = os.open("out", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert prepare_fails(capsys, **corpus) == "error: out: in use by a live run (choose another directory)\n"
    os.close(lock)
    prepare(**corpus)


def test_a_failing_worker_stops_the_others(corpus, capsys):
    """One line names the fault, whichever process it occurs in; finished units are kept."""
    write_texts("4.txt", ["w1"])
    Path("3.txt").write_bytes(b"\xff\n")
    error = prepare_fails(capsys, **corpus, workers=3)
    assert error.startswith("error: 3.txt:1: not UTF-8: invalid start byte (an older encoding")
    assert error.endswith("? convert it: iconv -f ENCODING -t UTF-8; --skip_bad_lines=100 skips such lines)\n")
    write_texts("3.txt", make_texts(30, seed=3))


def start(out, workers, **options):
    """Start prepare_c4.py as a user would, in a process group of its own."""
    tokenizer = {} if "train_tokenizer" in options else {"tokenizer": "vocab.txt"}
    options = {**tokenizer, "out": out, "workers": workers, **options}
    code = "import prepare_c4, sys; prepare_c4.UNIT_BYTES = 1; prepare_c4.main(sys.argv[1:])"
    argv = [sys.executable, "-c", code, *(f"--{name}={value}" for name, value in options.items())]
    environment = {**os.environ, "PYTHONPATH": str(Path(prepare_c4.__file__).parent)}
    return subprocess.Popen(argv, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)


@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("whole_group", [True, False])
def test_killed_at_random_and_resumed(kills, whole_group):
    """SIGKILL at random moments, to all processes or only the parent; the bytes are those of an undisturbed run.

    If a directory is finished before there were enough kills, the next one is begun.
    """
    for i in range(24):
        write_texts(f"{i:02d}.txt", make_texts(150, seed=i))
    options = {"source": "*.txt", "val_docs": 20, "dedup": True, "shard_tokens": 1000}
    begun = time.monotonic()
    assert start("whole", 2, **options).wait() == 0
    seconds = time.monotonic() - begun
    expected, rng, number, killed = files_of("whole"), random.Random(kills), 0, 0
    while killed < kills:
        process = start(f"out{number}", 2, **options)
        try:
            process.wait(rng.uniform(0.3, 1.0) * seconds)
        except subprocess.TimeoutExpired:
            (os.killpg if whole_group else os.kill)(process.pid, signal.SIGKILL)
            process.wait()
            killed += 1
        else:
            assert process.returncode == 0, process.stderr.read()
            assert files_of(f"out{number}") == expected and only_whole_files(f"out{number}")
            number += 1
        process.stderr.close()
        for path in Path(f"out{number}").glob("*.bin"):  # no shard is half-written
            digest = bytes.fromhex(file_digest(f"out{number}/tokenizer.json"))
            data.open_shard(str(path), digest)
    assert start(f"out{number}", 8, **options).wait() == 0
    assert files_of(f"out{number}") == expected and only_whole_files(f"out{number}")


def test_eight_workers_give_the_same_bytes(corpus):
    for i in range(4, 10):
        write_texts(f"{i}.txt", make_texts(30, seed=i))
    prepare(**corpus)
    for workers in (2, 8):
        assert start(f"out{workers}", workers, **corpus).wait() == 0
        assert files_of(f"out{workers}") == files_of()


def test_workers_exit_when_their_parent_is_killed(corpus):
    """Otherwise they would wait for work forever."""
    for i in range(10, 60):
        write_texts(f"{i}.txt", make_texts(2000, seed=i))
    process = start("out", 2, **{**corpus, "source": "*.txt"})
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not list(Path().glob("out/*.bin")):
        assert process.poll() is None
        time.sleep(0.02)
    workers = children.read_text().split()
    process.kill()
    process.wait()
    process.stderr.close()
    deadline = time.monotonic() + 60
    while any(os.path.exists(f"/proc/{worker}") for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert len(workers) >= 2


@pytest.mark.parametrize("workers_first", [True, False])
def test_sigterm_ends_preparing_with_143(corpus, workers_first):
    """`timeout` sends it to all processes, in any order; it was taken for a lack of memory, or as Ctrl-C."""
    for i in range(10, 60):
        write_texts(f"{i}.txt", make_texts(2000, seed=i))
    process = start("out", 2, **{**corpus, "source": "*.txt"})
    while not list(Path().glob("out/*.bin")):
        assert process.poll() is None
        time.sleep(0.02)
    for pid in descendants(process.pid) if workers_first else ():
        os.kill(pid, signal.SIGTERM)
    time.sleep(0.1)
    process.terminate()
    error = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 143 and error.startswith("stopped; the same command goes on from "), error


def test_preparing_does_not_import_torch():
    """It would cost each worker a second and some hundred megabytes."""
    code = "import sys, prepare_c4; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(prepare_c4.__file__).parent).returncode == 0
