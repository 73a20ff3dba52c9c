"""Users' mistakes: every bad file and option ends in a one-line error that names it, before any GPU is touched."""

import gzip
import importlib
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import common.processes
import finetune_glue
import tools.finetune_own
import train
from tests.toy import ROOT, make_documents, make_run, make_shards, make_tokenizer, reseal, toy_argv, train_environment

TEXT = "".join(f"w{i} w{i + 1} w{i + 2}\n" for i in range(50)).encode()
ROWS = "text\tlabel\n" + "".join(f"w{i} w{i + 1}\t{'yes' if i % 2 else 'no'}\n" for i in range(20))
VOCAB = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nw1\nw2\n"


def shard(change):
    """A function that makes a shard directory broken by change(contents, manifest)."""

    def make():
        make_shards("d", make_documents(30), shards=1)
        with open("d/train_00000.bin", "rb") as file:
            contents = bytearray(file.read())
        with open("d/manifest.json") as file:
            manifest = json.load(file)
        change(contents, manifest)
        with open("d/train_00000.bin", "wb") as file:
            file.write(contents)
        with open("d/manifest.json", "w") as file:
            json.dump(manifest, file)

    return make


def without(name):
    def make():
        make_shards("d", make_documents(30), shards=1)
        os.remove(f"d/{name}")

    return make


def replaced(name, contents):
    def make():
        make_shards("d", make_documents(30), shards=1)
        with open(f"d/{name}", "wb") as file:
            file.write(contents)

    return make


def put(offset, contents):
    return shard(lambda shard, _: shard.__setitem__(slice(offset, offset + len(contents)), contents))


def truncate_shard(shard, manifest):
    del shard[-1]


def no_documents(shard, manifest):
    manifest["shards"] = []


def unreadable():
    write("b.txt", TEXT)
    os.chmod("b.txt", 0)


def write(name, contents):
    os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
    with open(name, "wb") as file:
        file.write(contents)


def tokenizer_without(special):
    return lambda: make_tokenizer("t.json", special=[name for name in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if name != special])


def run_with(name, contents):
    """A function that makes a run whose checkpoint has other contents in one file, with matching digests."""

    def make():
        path = Path(make_run(Path("r"))) / "step_00000001"
        (path / name).write_bytes(contents)
        reseal(path)

    return make


PREPARE = "prepare_c4 --tokenizer=v.txt --out=out --workers=1 --val_docs=2 --source="
TRAIN = "train --out_dir=out --device=cpu --max_steps=1 --data_dir=d"
OWN = "tools.finetune_own --checkpoint=r --out=out --device=cpu --epochs=1 --seeds=1 --val_file=v.tsv --train_file="
GLUE = "finetune_glue --checkpoint=r --out=out --device=cpu --epochs=1 --seeds=1 --tasks=cola --data_dir=g"

# (case, files, command, what the message must name). Files are {name: bytes}, or a function that makes them.
FILES = [
    ("a line that is not JSON", {"b.jsonl": b'{"text": "w1"}\n{"text": "w2"\n'}, PREPARE + "b.jsonl", "b.jsonl:2"),
    ("JSON that is not an object", {"b.jsonl": b"[1, 2]\n"}, PREPARE + "b.jsonl", "b.jsonl:1"),
    ("JSON nested too deeply", {"b.jsonl": b"[" * 100_000 + b"\n"}, PREPARE + "b.jsonl", "b.jsonl:1"),
    ("a missing key", {"b.jsonl": b'{"body": "w1"}\n'}, PREPARE + "b.jsonl", "b.jsonl:1"),
    ("text that is a number", {"b.jsonl": b'{"text": 5}\n'}, PREPARE + "b.jsonl", "b.jsonl:1"),
    ("text that is null", {"b.jsonl": b'{"text": null}\n'}, PREPARE + "b.jsonl", "b.jsonl:1"),
    ("JSON over several lines", {"b.jsonl": b'{\n"text": "w1"\n}\n'}, PREPARE + "b.jsonl", "b.jsonl:1"),
    ("half a surrogate pair", {"b.jsonl": b'{"text": "\\ud800"}\n'}, PREPARE + "b.jsonl", "b.jsonl:1"),
    ("bad UTF-8", {"b.txt": TEXT + b"\xff\n"}, PREPARE + "b.txt", "b.txt:51"),
    ("UTF-16", {"b.txt": TEXT.decode().encode("utf-16")}, PREPARE + "b.txt", "b.txt: looks like UTF-16"),
    ("Latin-1", {"b.txt": TEXT + "w\u00e9".encode("latin-1")}, PREPARE + "b.txt", "b.txt:51"),
    ("an empty file", {"b.txt": b""}, PREPARE + "b.txt", "b.txt"),
    ("only white space", {"b.txt": b" \n\t\n"}, PREPARE + "b.txt", "b.txt"),
    ("one document, all held out", {"b.txt": b"w1\n"}, PREPARE + "b.txt", "b.txt"),
    ("truncated gzip", {"b.txt.gz": gzip.compress(os.urandom(3000).hex().encode())[:-9]}, PREPARE + "b.txt.gz", "b.txt.gz:"),
    ("gzip with a flipped byte", {"b.txt.gz": gzip.compress(TEXT)[:40] + b"\0\0\0" + gzip.compress(TEXT)[43:]}, PREPARE + "b.txt.gz", "b.txt.gz:"),
    ("a .gz that is not gzip", {"b.txt.gz": TEXT}, PREPARE + "b.txt.gz", "b.txt.gz:1"),
    ("truncated xz", {"b.txt.xz": lzma.compress(os.urandom(3000).hex().encode())[:-20]}, PREPARE + "b.txt.xz", "b.txt.xz:"),
    ("a .xz that is not xz", {"b.txt.xz": TEXT}, PREPARE + "b.txt.xz", "b.txt.xz:1"),
    ("an unknown suffix", {"b.docx": TEXT}, PREPARE + "b.docx", "b.docx"),
    ("a directory without text files", {"e/b.jpg": b"x"}, PREPARE + "e", "e: "),
    ("no such file", {}, PREPARE + "b.txt", "b.txt"),
    ("another directory in the way", {"out/x": b""}, PREPARE + "a.txt", "out"),
    ("a file in the way", {"out": b""}, PREPARE + "a.txt", "out"),
    ("a vocabulary without [MASK]", {"v.txt": VOCAB.replace("[MASK]\n", "").encode()}, PREPARE + "a.txt", "v.txt"),
    ("a vocabulary with a duplicate entry", {"v.txt": (VOCAB + "w1\n").encode()}, PREPARE + "a.txt", "v.txt:6"),
    ("a vocabulary that is not text", {"v.txt": b"\x80\x81\n"}, PREPARE + "a.txt", "v.txt"),
    ("a tokenizer that is not JSON", {"t.json": b"{"}, PREPARE + "a.txt --tokenizer=t.json", "t.json"),
    ("a tokenizer that is other JSON", {"t.json": b"[]"}, PREPARE + "a.txt --tokenizer=t.json", "t.json"),
    ("a tokenizer without [CLS]", tokenizer_without("[CLS]"), PREPARE + "a.txt --tokenizer=t.json", "t.json"),
    ("no shards", {}, TRAIN, "d/manifest.json"),
    ("no manifest", without("manifest.json"), TRAIN, "d/manifest.json"),
    ("a manifest that is not JSON", replaced("manifest.json", b"{"), TRAIN, "d/manifest.json"),
    ("a manifest that is not text", replaced("manifest.json", b"\xff\xfe"), TRAIN, "d/manifest.json"),
    ("a manifest that is a list", replaced("manifest.json", b"[]"), TRAIN, "d/manifest.json"),
    ("a manifest of something else", replaced("manifest.json", b'{"shards": [{}]}'), TRAIN, "d/manifest.json"),
    ("no tokenizer", without("tokenizer.json"), TRAIN, "d/tokenizer.json"),
    ("another tokenizer", lambda: (make_shards("d"), make_tokenizer("d/tokenizer.json", 90)), TRAIN, "d/train_00000.bin"),
    ("a missing shard", without("train_00000.bin"), TRAIN, "d/train_00000.bin"),
    ("an empty shard", replaced("train_00000.bin", b""), TRAIN, "d/train_00000.bin"),
    ("a shard of another format", replaced("train_00000.bin", b"hello" * 100), TRAIN, "d/train_00000.bin"),
    ("a truncated shard", shard(truncate_shard), TRAIN, "d/train_00000.bin"),
    ("a shard of format 7", put(8, b"\7"), TRAIN, "d/train_00000.bin"),
    ("a shard with 3 bytes a token", put(12, b"\3"), TRAIN, "d/train_00000.bin"),
    ("a shard with 2^63 documents", put(23, b"\x80"), TRAIN, "d/train_00000.bin"),
    ("offsets out of order", put(64 + 16, b"\xff\xff"), TRAIN, "d/train_00000.bin"),
    ("a token outside the vocabulary", put(64 + 31 * 8, b"\xff\xff"), TRAIN, "d/train_00000.bin"),
    ("no training documents", shard(no_documents), TRAIN, "d: no training samples"),
    ("a label file that is missing", {}, OWN + "b.tsv", "b.tsv"),
    ("an empty label file", {"b.tsv": b""}, OWN + "b.tsv", "b.tsv"),
    ("a header alone", {"b.tsv": b"text\tlabel\n"}, OWN + "b.tsv", "b.tsv"),
    ("no label column", {"b.tsv": b"text\tclass\nw1\tyes\n"}, OWN + "b.tsv", "b.tsv"),
    ("a row too short", {"b.tsv": ROWS.encode() + b"w1\n"}, OWN + "b.tsv", "b.tsv:22"),
    ("a row too long", {"b.tsv": ROWS.encode() + b"w1\tyes\tno\n"}, OWN + "b.tsv", "b.tsv:22"),
    ("an empty label", {"b.tsv": ROWS.encode() + b"w1\t\n"}, OWN + "b.tsv", "b.tsv:22"),
    ("a label that is null", {"b.jsonl": b'{"text": "w1", "label": null}\n'}, OWN + "b.jsonl", "b.jsonl:1: 'label'"),
    ("a text that is null", {"b.jsonl": b'{"text": null, "label": "yes"}\n'}, OWN + "b.jsonl", "b.jsonl:1: 'text'"),
    ("labels that are not text", {"b.tsv": ROWS.encode() + b"\xff\tyes\n"}, OWN + "b.tsv", "b.tsv"),
    ("one class", {"b.tsv": ROWS.replace("yes", "no").encode()}, OWN + "b.tsv", "b.tsv"),
    ("a label that only the held-out file has", {"b.tsv": ROWS.encode(), "v.tsv": ROWS.replace("yes", "perhaps").encode()}, OWN + "b.tsv", "v.tsv"),
    ("labels in a .jsonl that is not JSON", {"b.jsonl": b"text,label\n"}, OWN + "b.jsonl", "b.jsonl:1"),
    ("labels in a file of an unknown kind", {"b.parquet": b"PAR1"}, OWN + "b.parquet", "b.parquet"),
    ("no GLUE directory", {}, GLUE, "g/CoLA"),
    ("a GLUE file with a wrong label", {"g/CoLA/train.tsv": b"a\tmaybe\t\tw1\n", "g/CoLA/dev.tsv": b"a\t1\t\tw1\n"}, GLUE, "g/CoLA/train.tsv:1"),
    ("a GLUE file with too few columns", {"g/CoLA/train.tsv": b"w1 w2\n", "g/CoLA/dev.tsv": b"a\t1\t\tw1\n"}, GLUE, "g/CoLA/train.tsv:1"),
    ("no checkpoint", {"e/x": b""}, "tools.fill_mask --text=w1 --checkpoint=e", "e"),
    ("weights that are a pickle", run_with("model.safetensors", b"\x80\x02cos\nsystem\n"), "tools.fill_mask --text=w1 --checkpoint=r", "r/step_00000001"),
    ("weights with a huge header", run_with("model.safetensors", b"\xff" * 8 + b"{}"), "tools.fill_mask --text=w1 --checkpoint=r", "r/step_00000001"),
    ("a configuration that is not JSON", run_with("config.json", b"{"), "tools.fill_mask --text=w1 --checkpoint=r", "r/step_00000001/config.json"),
    ("a configuration of something else", run_with("config.json", b"{}"), "tools.fill_mask --text=w1 --checkpoint=r", "r/step_00000001"),
    ("a tokenizer that is none, in a checkpoint", run_with("tokenizer.json", b"\xff"), "tools.fill_mask --text=w1 --checkpoint=r", "r"),
    ("no file of texts", {}, "tools.fill_mask --checkpoint=r --out=o.npy --embed=b.txt", "b.txt"),
    ("texts that are not UTF-8", {"b.txt": b"\xff\n"}, "tools.fill_mask --checkpoint=r --out=o.npy --embed=b.txt", "b.txt"),
    ("a damaged shard to verify", put(64 + 31 * 8 + 3, b"\1"), "tools.verify --data_dir=d", "d/train_00000.bin"),
]  # fmt: skip

OPTIONS = [
    ("--lr=0", "lr=0"), ("--lr=fast", "fast"), ("--lr=nan", "nan"), ("--lr=inf", "inf"), ("--lr", "--lr"), ("--lr=2", "lr=2"),
    ("--seed=-1", "seed=-1"), ("--seed=1.5", "1.5"), ("--max_steps=0", "max_steps=0"), ("--max_steps=1e400", "max_steps"),
    ("--mask_prob=0", "mask_prob=0"), ("--mask_prob=1.01", "mask_prob=1.01"), ("--warmup_fraction=-0.1", "warmup_fraction"),
    ("--schedule=cosine", "linear, wsd"), ("--decay_fraction=0.9", "only with wsd"),
    ("--schedule=wsd --warmup_fraction=0.9", "the warm-up and decay_fraction"),
    ("--global_batch_size=0", "global_batch_size=0"), ("--micro_batch_tokens=8", "seq_length=32"), ("--seq_length=2", "seq_length=2"),
    ("--num_heads=3", "num_heads=3"), ("--hidden_size=-8", "hidden_size"), ("--beta1=1", "beta1=1"), ("--adam_eps=0", "adam_eps=0"),
    ("--keep_checkpoints=0", "keep_checkpoints=0"), ("--checkpoint_interval=0", "checkpoint_interval=0"),
    ("--max_grad_norm=-1", "max_grad_norm=-1"), ("--hang_timeout=-1", "hang_timeout=-1"), ("--on_save_error=ignore", "stop, continue"),
    ("--model=roberta", "mosaicbert, bert"), ("--model=bert --seq_length=600", "512 positions"), ("--compile=maybe", "true or false"),
    ("--learning_rate=1", "unknown option"), ("--max_step=3", "did you mean max_steps"), ("--data_dir=nowhere", "nowhere"),
    ("nowhere.py", "nowhere.py"), ("c.py", "c.py:2"), ("d.py", "d.py:1"), ("e.py", "e.py:1: lr"), ("f.py", "f.py:3"), ("c.py d.py", "d.py"),
    ("--device=tpu", "auto, cpu, cuda"), ("--dtype=float16", "auto, float32, bfloat16"),
]  # fmt: skip

CONFIGS = {
    "c.py": "seed = 1\nlr = = 2\n", "d.py": "for i in range(3): pass\n", "e.py": "lr = [5]\n", "f.py": "_a = 1\n\n_b = _a / 0\n",
}  # fmt: skip


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """An empty working directory, and a failure if a device is set up."""
    monkeypatch.chdir(tmp_path)
    for name in ("set_device", "init", "current_device", "get_device_capability"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: pytest.fail("a GPU was touched"))
    for module in (common.processes, finetune_glue, tools.finetune_own):
        monkeypatch.setattr(module, "pick_device", lambda *_: pytest.fail("a device was set up"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def make_files(files):
    """What a correct command needs, and these files."""
    write("a.txt", TEXT)
    write("v.txt", VOCAB.encode())
    write("v.tsv", ROWS.encode())
    if callable(files):
        files()
    else:
        for name, contents in files.items():
            write(name, contents)
    if not os.path.exists("r"):
        make_run(Path("r"))


def one_line(err, names):
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert names in err and "Traceback" not in err, err
    assert len(err) <= 300, len(err)


@pytest.mark.parametrize("files, command, names", [row[1:] for row in FILES], ids=[row[0] for row in FILES])
def test_bad_files(capsys, files, command, names):
    make_files(files)
    script, *argv = command.split()
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(script).main(argv)
    assert stopped.value.code == 2
    one_line(capsys.readouterr().err, names)


def prepare_options():
    make_shards("d", make_documents(30))
    for name, text in CONFIGS.items():
        write(name, text.encode())


@pytest.mark.parametrize("options, names", OPTIONS)
def test_bad_options(capsys, options, names):
    prepare_options()
    with pytest.raises(SystemExit) as stopped:
        train.main([*toy_argv("d", "out"), *options.split()])
    assert stopped.value.code == 2
    one_line(capsys.readouterr().err, names)
    assert not os.path.exists("out/log.jsonl")


def as_a_process(argv, names):
    environment = train_environment(PYTHONPATH=str(ROOT))
    result = subprocess.run([sys.executable, "-m", *argv], capture_output=True, text=True, env=environment)
    assert result.returncode == 2, result.stderr
    one_line(result.stderr, names)


PROCESSES = ["bad UTF-8", "truncated gzip", "a truncated shard", "a row too short", "weights that are a pickle"]


@pytest.mark.slow
@pytest.mark.parametrize("what", PROCESSES)
def test_bad_files_as_a_process(what):
    (files, command, names) = next(row[1:] for row in FILES if row[0] == what)
    make_files(files)
    script, *argv = command.split()
    as_a_process([script, *argv], names)


@pytest.mark.slow
@pytest.mark.parametrize("options, names", OPTIONS[::9])
def test_bad_options_as_a_process(options, names):
    prepare_options()
    as_a_process(["train", *toy_argv("d", "out"), *options.split()], names)


def test_the_tables_are_long_enough():
    assert len(FILES) >= 40 and len(OPTIONS) >= 25 and len(PROCESSES) >= 5 and len(OPTIONS[::9]) >= 5
    assert len({row[0] for row in FILES}) == len(FILES) and len(dict(OPTIONS)) == len(OPTIONS)
