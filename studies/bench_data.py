"""How fast data is prepared and read, and whether reading slows down as the corpus grows. Run it on a quiet machine.

    python -m studies.bench_data --prepare='wikipedia-*.jsonl.xz' --tokenizer=vocab.txt --workers=2
    python -m studies.bench_data --scale=/tmp/c4_sized

--prepare times prepare_c4.py as a user runs it, next to the bare tokenizers library on the same text and cores.
--scale makes shards of C4's size, in 2,048 files as from --source=c4, and a corpus of a thousandth. The offsets are real,
the tokens are holes in sparse files, so it takes 3 GB of disk. Fresh processes open both and draw random batches.
Results are JSON lines.
"""

import hashlib
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import data
from common.options import UserError, command, load_config
from common.sources import documents, list_segments
from common.vocabulary import read_tokenizer
from tests.toy import anonymous_mb, make_tokenizer

ROOT = Path(__file__).resolve().parent.parent
C4_DOCS, C4_TOKENS, C4_SHARDS = 364_868_892, 156e9, 2048  # allenai/c4 en, training split; tokens of T5's vocabulary
BATCH = 1024  # samples per batch that --scale draws
VOCAB_SIZE = 30_522


@dataclass
class BenchConfig:
    # Preparing
    prepare: str = ""  # source to time prepare_c4.py on
    tokenizer: str = "google-bert/bert-base-uncased"  # tokenizer.json, vocab.txt or hub id
    text_key: str = "text"  # JSON key or column that holds the text
    max_doc_tokens: int = 0  # as in prepare_c4.py; the bare library produces all tokens
    workers: int = 2  # processor cores
    repeats: int = 3  # runs of each; the fastest counts
    # Reading
    seq_length: int = 128  # tokens per sample, at most
    scale: str = ""  # directory for shards of C4's size, which are kept; 3 GB
    # Started by the above
    bare: bool = False  # time the bare library, in this process
    measure: str = ""  # shard directory to open and draw batches from, in this process
    chunk: bool = False  # for --measure


def cpu_name():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def this_script(*argv, **environment):
    """The JSON that this script prints when run with other arguments, in a fresh process."""
    command_line = [sys.executable, "-m", "studies.bench_data", *argv]
    result = subprocess.run(command_line, env={**os.environ, **environment}, capture_output=True, text=True)
    if result.returncode:
        raise UserError(result.stderr.removeprefix("error: "))
    return json.loads(result.stdout)


# ---------------------------------------------------------------------------------------------------------------------
# Preparing


def bench_prepare(cfg):
    options = [f"--tokenizer={cfg.tokenizer}", f"--text_key={cfg.text_key}", f"--max_doc_tokens={cfg.max_doc_tokens}"]
    threads = {"RAYON_NUM_THREADS": str(cfg.workers), "TOKENIZERS_PARALLELISM": "true"}
    seconds, tokens = {"bare": [], "prepare_c4.py": []}, 0
    for _ in range(cfg.repeats):
        bare = this_script(f"--prepare={cfg.prepare}", "--bare", *options, **threads)
        seconds["bare"].append(bare["seconds"])
        with tempfile.TemporaryDirectory() as out:
            argv = [f"--source={cfg.prepare}", f"--workers={cfg.workers}", f"--out={out}/shards", *options]
            start = time.perf_counter()
            subprocess.run([sys.executable, ROOT / "prepare_c4.py", *argv], check=True, stdout=subprocess.DEVNULL)
            seconds["prepare_c4.py"].append(time.perf_counter() - start)
            tokens = json.loads(Path(out, "shards", "report.json").read_text())["tokens"]
    if tokens != bare["tokens"] and not cfg.max_doc_tokens:
        raise UserError(f"{tokens} tokens, but {bare['tokens']} by the bare library")
    best = {name: min(times) for name, times in seconds.items()}
    return {
        "bench": "prepare",
        "cpu": cpu_name(),
        "workers": cfg.workers,
        "tokens": tokens,
        "seconds": seconds,
        "ratio": best["prepare_c4.py"] / best["bare"],
        "tokens_per_second_per_core": tokens / best["prepare_c4.py"] / cfg.workers,
        "load_average": os.getloadavg()[0],
    }


def bench_bare(cfg):
    """encode_batch_fast alone: reading the file and decoding the text don't count."""
    from tokenizers import Tokenizer

    cfg.doc_sep, cfg.skip_bad_lines = "line", 0
    tokenizer = Tokenizer.from_str(read_tokenizer(cfg.tokenizer))
    segments = list_segments(cfg.prepare)
    texts = [text for segment in segments for text in documents(segment, cfg, Counter()) if text.strip()]
    start, tokens = time.perf_counter(), 0
    for i in range(0, len(texts), 64):
        tokens += sum(map(len, tokenizer.encode_batch_fast(texts[i : i + 64], add_special_tokens=False)))
    return {"seconds": time.perf_counter() - start, "tokens": tokens}


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def time_batches(samples, steps=60, warm_up=10):
    """(tokens/s, seconds a batch): medians over the steps after the warm-up."""
    rows = []
    for step in range(steps):
        start = time.perf_counter()
        (batch,) = samples.step_batches(step, BATCH, 17, 0.3, BATCH * samples.seq_length)
        seconds = time.perf_counter() - start
        rows.append((batch.num_tokens / seconds, seconds))
    return np.median(rows[warm_up:], axis=0).tolist()


def measure(cfg):
    """Open a corpus, and draw batches from all over it. The first ones read pages that are not yet in memory."""
    import torch  # noqa: F401  counts as memory before, as in training

    before, start = anonymous_mb(), time.perf_counter()
    samples = data.Samples(cfg.measure, "train", cfg.seq_length, cfg.chunk)
    opened = time.perf_counter() - start
    rate, seconds = time_batches(samples)
    return {
        "bench": "scale",
        "cpu": cpu_name(),
        "chunk": cfg.chunk,
        "shards": len(samples.shards),
        "samples": len(samples),
        "gigabytes": sum(os.path.getsize(shard.path) for shard in samples.shards) / 1e9,
        "open_seconds": round(opened, 3),
        "batch_milliseconds": round(1e3 * seconds, 2),
        "tokens_per_second": round(rate),
        "anonymous_mb": round(anonymous_mb()),
        "anonymous_mb_before": round(before),
        "load_average": os.getloadavg()[0],
    }


def make_corpus(path, num_docs, num_tokens, num_shards):
    """Shards with real offsets, log-normal document lengths, and tokens that are all 0, in holes of the files."""
    path.mkdir(parents=True)
    make_tokenizer(path / "tokenizer.json", VOCAB_SIZE)
    digest = hashlib.sha256((path / "tokenizer.json").read_bytes())
    rng, entries = np.random.default_rng(0), []
    mean = num_tokens / num_docs
    for i, split in [(i, "train") for i in range(num_shards)] + [(0, "val")]:
        count = num_docs // num_shards
        lengths = np.maximum(1, rng.lognormal(np.log(mean) - 0.5, 1.0, count)).astype(np.int64)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype("<u8")
        shard = path / f"{split}_{i:05d}_000.bin"
        header = data.HEADER.pack(data.MAGIC, data.VERSION, 2, count, int(offsets[-1]), digest.digest())
        with open(shard, "wb") as file:
            file.write(header)
            file.write(offsets)
            file.truncate(file.tell() + 2 * int(offsets[-1]))
        entries.append({
            "split": split,
            "file": shard.name,
            "num_docs": count,
            "num_tokens": int(offsets[-1]),
            "bytes": shard.stat().st_size,
            "sha256": hashlib.sha256(header + offsets.tobytes()[:4096]).hexdigest(),
        })  # fmt: skip
    manifest = {"format": 1, "tokenizer_sha256": digest.hexdigest(), "vocab_size": VOCAB_SIZE, "shards": entries}
    (path / "manifest.json").write_text(json.dumps(manifest))


def bench_scale(cfg):
    whole, small = Path(cfg.scale, "whole"), Path(cfg.scale, "small")
    for path, share in ((whole, 1), (small, 1000)):
        if not (path / "manifest.json").exists():
            shutil.rmtree(path, ignore_errors=True)
            make_corpus(path, C4_DOCS // share, C4_TOKENS / share, max(2, C4_SHARDS // share))
    for chunk, path in itertools.product((False, True), (small, whole)):
        result = this_script(f"--measure={path}", f"--chunk={chunk}", f"--seq_length={cfg.seq_length}")
        print(json.dumps(result), flush=True)


@command
def main(argv):
    cfg = load_config(BenchConfig, argv)
    if cfg.measure:
        print(json.dumps(measure(cfg)))
    elif cfg.scale:
        bench_scale(cfg)
    elif cfg.prepare:
        print(json.dumps(bench_bare(cfg) if cfg.bare else bench_prepare(cfg)))
    else:
        raise UserError("nothing to do (give --prepare=SOURCE or --scale=DIR)")


if __name__ == "__main__":
    main()
