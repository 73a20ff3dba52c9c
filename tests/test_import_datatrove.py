"""tools/import_datatrove.py: token files in datatrove's layout, made by hand and by datatrove itself."""

import gzip
import json
import os
import random
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

import data
from tests.corpus import LETTERS, VOCAB, files_of, ids, interrupted, make_texts, prepare, raise_interrupt, stored, texts_of, workplace, write_texts  # noqa: F401
from tests.toy import ROOT, make_tokenizer
from tools import import_datatrove

UNK, CLS, SEP = (VOCAB.index(name) for name in ("[UNK]", "[CLS]", "[SEP]"))


@pytest.fixture(autouse=True)
def tokenizer(workplace):  # noqa: F811
    """A tokenizer.json with VOCAB's ids."""
    write_texts("a.txt", ["w1"])
    prepare(source="a.txt", val_fraction=0, out="toy")
    os.rename("toy/tokenizer.json", "tokenizer.json")


def write_tokens(name, documents, kind="<u2", tokenizer="somewhere/tokenizer.json"):
    """A token file, its index and its metadata, as datatrove writes them."""
    Path(name).parent.mkdir(exist_ok=True)
    np.concatenate([*documents, []]).astype(kind).tofile(name)
    np.cumsum([len(document) for document in documents]).astype("<u8").tofile(f"{name}.index")
    count = sum(map(len, documents))
    Path(f"{name}.metadata").write_text(f"{tokenizer}|{np.dtype(kind).itemsize}\n{count}\n{count} T")


def imported(**options):
    options = {"source": "ds", "tokenizer": "tokenizer.json", "val_fraction": 0, "out": "out", **options}
    import_datatrove.main([f"--{name}={value}" for name, value in options.items()])


def refused(capsys, **options):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        imported(**options)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    return error


def test_special_tokens_at_the_ends_are_taken_off_and_counted(capsys):
    write_tokens("ds/00001_shuffled.ds", [[CLS, *ids("w1 w2"), SEP], [CLS, SEP], [*ids("w3"), UNK]])
    write_tokens("ds/00000_shuffled.ds", [[*ids("w4 w5"), SEP], [CLS, *ids("w6"), SEP, *ids("w7"), SEP]])
    imported()
    assert stored() == [ids("w4 w5"), [*ids("w6"), SEP, *ids("w7")], ids("w1 w2"), [*ids("w3"), UNK]]
    printed = capsys.readouterr().out
    assert "val_fraction=0 holds out nothing, and train.py needs" in printed
    assert "taken off the ends of documents, since training adds its own: 3 [CLS], 4 [SEP]\n" in printed
    assert "warning: special tokens inside documents" in printed and "the tokens of somewhere/tokenizer.json" in printed
    report = json.loads(Path("out/report.json").read_text())
    assert (report["documents"], report["documents_empty"], report["special_tokens_inside"], report["tokens"]) == (4, 1, 1, 9)
    assert data.verify("out") == 2 and set(os.listdir("out")) == {
        "tokenizer.json", "manifest.json", "report.json", "train_00000_000.bin", "train_00001_000.bin",
    }  # fmt: skip


def test_the_shards_are_those_of_the_text(capsys):
    """The held-out split, by a hash of the tokens, does not depend on the division into files; a rerun changes nothing."""
    texts = make_texts(300)
    tokens = [[CLS, *ids(text), SEP] for text in texts]
    write_tokens("ds/a.ds", tokens[:100])
    write_tokens("ds/b.ds", tokens[100:])
    write_tokens("one/c.ds", tokens)
    imported(val_fraction=0.1, shard_tokens=500)
    before = files_of()
    imported(val_fraction=0.1, shard_tokens=500)
    assert "nothing to do" in capsys.readouterr().out and files_of() == before
    imported(source="one", val_docs=30, out="again")
    imported(val_docs=30, out="both")
    assert texts_of(stored("val", "again")) == texts_of(stored("val", "both")) and len(stored("val", "both")) == 30
    assert sorted(texts_of(stored()) + texts_of(stored("val"))) == sorted(texts) and 5 < len(stored("val")) < 100
    assert "w" in refused(capsys, val_docs=31) and "val_docs was 0 and is 31" in refused(capsys, val_docs=31)


def test_an_interrupted_import_starts_again(monkeypatch):
    write_tokens("ds/a.ds", [ids(text) for text in make_texts(50)])
    imported(val_docs=5, out="whole")
    with monkeypatch.context() as patch, interrupted():
        patch.setattr(import_datatrove, "find_duplicates", raise_interrupt)
        imported(val_docs=5)
    assert os.path.exists("out/train_00000_000.bin") and not os.path.exists("out/manifest.json")
    imported(val_docs=5)
    assert files_of() == files_of("whole")


def test_four_bytes_a_token():
    """Of a vocabulary above 65,536."""
    make_tokenizer("large.json", 70_000)
    first, last = (Tokenizer.from_file("large.json").token_to_id(name) for name in ("w0", "w69994"))
    write_tokens("ds/a.ds", [[first, last], [last]], "<u4")
    imported(tokenizer="large.json")
    assert stored() == [[first, last], [last]]


def damage(name, change):
    contents = Path(name).read_bytes()
    Path(name).write_bytes(change(contents))


@pytest.mark.parametrize(
    "harm, says",
    [
        (lambda: os.remove("ds/a.ds.index"), "ds/a.ds.index: not there, so nobody knows where documents end"),
        (lambda: damage("ds/a.ds", lambda old: old[:-2]), "ds/a.ds: its 6 bytes are not the 4 tokens of its index"),
        (lambda: damage("ds/a.ds.index", lambda old: old[:-1]), "ds/a.ds.index: 15 bytes, not 8 a document"),
        (lambda: damage("ds/a.ds.index", lambda old: old[8:] + old[:8]), "ds/a.ds: its 8 bytes are not the 3 tokens"),
        (lambda: damage("ds/a.ds", lambda old: b"\xff\xff" + old[2:]), f"ds/a.ds: token id 65,535, but --tokenizer has {len(VOCAB)} entries (is it datatrove's tokenizer? Theirs: somewhere/tokenizer.json)"),
        (lambda: write_tokens("ds/a.ds", [[9]], "<u4"), f"ds/a.ds: 4 bytes a token, unlike --tokenizer with {len(VOCAB)} entries ("),
        (lambda: write_tokens("ds/a.ds", [[CLS]]), "ds: no tokens to train on"),
        (lambda: [os.remove(f"ds/{name}") for name in os.listdir("ds")], "ds: no .ds file in it"),
    ],
)  # fmt: skip
def test_what_cannot_be_imported(capsys, harm, says):
    write_tokens("ds/a.ds", [ids("w1 w2 w3"), ids("w4")])
    harm()
    assert refused(capsys).startswith(f"error: {says}") and not os.path.exists("out/manifest.json")


def test_a_loss_mask_is_not_used_and_said(capsys):
    write_tokens("ds/a.ds", [ids("w1 w2 w3")])
    Path("ds/a.ds.loss").write_bytes(b"\1\0\1")
    imported()
    assert "ds/a.ds.loss: not used: " in capsys.readouterr().out and stored() == [ids("w1 w2 w3")]


@pytest.mark.slow
@pytest.mark.parametrize("eos", [None, "[SEP]"])
def test_what_datatrove_writes(eos):
    """With BERT's post-processor, or with its own end token."""
    pytest.importorskip("datatrove", reason="pip install -r requirements-slow.txt")
    from datatrove.data import Document
    from datatrove.pipeline.tokens import DocumentTokenizer

    tokenizer = Tokenizer.from_file("tokenizer.json")
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)])
    tokenizer.save("bert.json")
    texts = make_texts(50)
    for rank in (0, 1):
        step = DocumentTokenizer(os.path.abspath("ds"), "bert.json", eos_token=eos, seed=rank)
        for _ in step.run((Document(text, str(i)) for i, text in enumerate(texts) if i % 2 == rank), rank=rank) or ():
            pass
    assert len(list(Path("ds").glob("*.ds"))) == 2
    imported(tokenizer="bert.json")
    assert sorted(texts_of(stored())) == sorted(texts)


@pytest.mark.slow
def test_the_filters_of_the_docs():
    """The script of docs/data.md, on 200 good texts, 20 of them twice with another word, and 20 without any sentence."""
    for package in ("datatrove", "spacy", "nltk", "orjson"):
        pytest.importorskip(package, reason="pip install -r requirements-slow.txt")
    rng = random.Random(0)
    words = [f"word{letter}{other}" for letter in LETTERS for other in LETTERS] + ["the", "of", "to", "with"] * 20
    good = [" ".join(rng.choices(words, k=120)) + "." for _ in range(200)]
    near = [text.replace(text.split()[50], "another", 1) for text in good[:20]]
    rows = [json.dumps({"text": text}) + "\n" for text in [*good, *near, *["bad bad"] * 20]]
    Path("raw").mkdir()
    for i in (0, 1):
        Path(f"raw/{i}.jsonl").write_text("".join(rows[i::2]))
    page = (ROOT / "docs/data.md").read_text()
    code = page[page.index("    from datatrove.executor") : page.index("`raw` holds")]
    Path("filters.py").write_text(textwrap.dedent(code))
    result = subprocess.run([sys.executable, "filters.py"], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    kept = {json.loads(line)["text"] for path in Path("filtered").glob("*.gz") for line in gzip.open(path, "rt")}
    assert not any({*pair} <= kept for pair in zip(good, near)) and {good[0], near[0]} & kept and len(kept & {*good}) > 100
    assert kept <= {*good, *near}
    prepare(source="filtered/", train_tokenizer=1000, val_fraction=0)
    assert len(stored()) == len(kept)
