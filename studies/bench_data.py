"""How fast data is prepared and read, and that reading does not slow down with the corpus. Run it on a quiet machine.

    python tests/bench_data.py --prepare='wikipedia-*.jsonl.xz' --tokenizer=vocab.txt --workers=2
    python tests/bench_data.py --scale=/tmp/c4_sized

--prepare times prepare_c4.py as a user runs it, and beside it the bare tokenizers library on the same text and cores.
--scale makes shards of C4's size there, in 2,048 files as prepare_c4.py --source=c4 would: the offset tables are real, the
tokens are holes of a sparse file, so it takes 3 GB of disk; and a corpus of one thousandth. It opens both and draws
random batches in fresh processes. Results are JSON lines.
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

ROOT = Path(__file__).resolve().parent.parent

import data
from common.options import UserError, command, load_config
from common.sources import documents, list_pieces
from tests.toy import make_tokenizer

C4_DOCS, C4_TOKENS, C4_SHARDS = 364_868_892, 156e9, 2048  # allenai/c4 en, training split; tokens of T5's vocabulary
SEQ_LENGTH, BATCH = 128, 1024
VOCAB_SIZE = 30_522


@dataclass
class BenchConfig:
    prepare: str = ""  # source to time prepare_c4.py on
    tokenizer: str = "google-bert/bert-base-uncased"  # for --prepare: tokenizer.json, vocab.txt or hub id
    text_key: str = "text"  # for --prepare
    max_doc_tokens: int = 0  # for --prepare: as there; the bare library takes all tokens
    workers: int = 2  # for --prepare: processor cores
    repeats: int = 3  # for --prepare: times each; the fastest counts
    scale: str = ""  # directory to make shards of C4's size in, which stays; 3 GB
    measure: str = ""  # shard directory that this process opens and draws batches from (--scale starts it)
    chunk: bool = False  # for --measure


def cpu():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def bench_prepare(cfg):
    environment = {**os.environ, "RAYON_NUM_THREADS": str(cfg.workers), "TOKENIZERS_PARALLELISM": "true"}
    seconds, tokens = {"bare": [], "prepare_c4.py": []}, 0
    for _ in range(cfg.repeats):
        result = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--workers=0"], env=environment, capture_output=True, text=True)
        if result.returncode:
            raise UserError(result.stderr.removeprefix("error: "))
        bare = json.loads(result.stdout)
        seconds["bare"].append(bare["seconds"])
        with tempfile.TemporaryDirectory() as out:
            argv = [f"--source={cfg.prepare}", f"--tokenizer={cfg.tokenizer}", f"--text_key={cfg.text_key}"]
            argv += [f"--max_doc_tokens={cfg.max_doc_tokens}"]
            argv += [f"--workers={cfg.workers}", f"--out={out}/shards"]
            start = time.perf_counter()
            subprocess.run([sys.executable, ROOT / "prepare_c4.py", *argv], check=True, stdout=subprocess.DEVNULL)
            seconds["prepare_c4.py"].append(time.perf_counter() - start)
            tokens = json.loads(Path(out, "shards", "report.json").read_text())["tokens"]
    if tokens != bare["tokens"] and not cfg.max_doc_tokens:
        raise UserError(f"{tokens} tokens, {bare['tokens']} by the bare library")
    best = {name: min(times) for name, times in seconds.items()}
    return {
        "bench": "prepare", "cpu": cpu(), "workers": cfg.workers, "tokens": tokens, "seconds": seconds,
        "ratio": best["prepare_c4.py"] / best["bare"], "tokens_per_second_per_core": tokens / best["prepare_c4.py"] / cfg.workers,
        "load_average": os.getloadavg()[0],
    }  # fmt: skip


def bench_bare(cfg):
    """encode_batch_fast alone: reading, and making the texts into strings, is not counted."""
    from tokenizers import Tokenizer

    from common.vocabulary import read_tokenizer

    cfg.doc_sep, cfg.skip_bad_lines = "line", 0
    tokenizer = Tokenizer.from_str(read_tokenizer(cfg.tokenizer))
    texts = [text for piece in list_pieces(cfg.prepare) for text in documents(piece, cfg, Counter()) if text.strip()]
    start, tokens = time.perf_counter(), 0
    for i in range(0, len(texts), 64):
        tokens += sum(map(len, tokenizer.encode_batch_fast(texts[i : i + 64], add_special_tokens=False)))
    return {"seconds": time.perf_counter() - start, "tokens": tokens}


def make_corpus(path, num_docs, num_tokens, num_shards):
    """Shards with true offset tables, log-normal document lengths, and tokens that are all 0, in holes of the file."""
    path.mkdir(parents=True)
    make_tokenizer(path / "tokenizer.json", VOCAB_SIZE)
    digest = hashlib.sha256((path / "tokenizer.json").read_bytes())
    rng, entries = np.random.default_rng(0), []
    mean = num_tokens / num_docs
    for i, split in [(i, "train") for i in range(num_shards)] + [(0, "val")]:
        count = num_docs // num_shards
        lengths = np.maximum(1, rng.lognormal(np.log(mean) - 0.5, 1.0, count)).astype(np.int64)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype("<u8")
        name = path / f"{split}_{i:05d}_000.bin"
        header = data.HEADER.pack(data.MAGIC, data.VERSION, 2, count, int(offsets[-1]), digest.digest())
        with open(name, "wb") as file:
            file.write(header)
            file.write(offsets)
            file.truncate(file.tell() + 2 * int(offsets[-1]))
        entries.append({
            "split": split, "file": name.name, "num_docs": count, "num_tokens": int(offsets[-1]),
            "bytes": name.stat().st_size, "sha256": hashlib.sha256(header + offsets.tobytes()[:4096]).hexdigest(),
        })  # fmt: skip
    manifest = {"format": 1, "tokenizer_sha256": digest.hexdigest(), "vocab_size": VOCAB_SIZE, "shards": entries}
    (path / "manifest.json").write_text(json.dumps(manifest))


def memory_mb(name):
    """VmRSS, RssAnon, VmHWM, ... of this process, in MB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1000


def measure(cfg):
    """Open a corpus, and draw batches from all over it. The first batches touch pages for the first time."""
    import torch  # noqa: F401  its memory is part of a training process's

    before, start = memory_mb("VmRSS"), time.perf_counter()
    samples = data.Samples(cfg.measure, "train", SEQ_LENGTH, cfg.chunk)
    opened = time.perf_counter() - start
    rates, seconds, cpu_seconds = [], [], []
    for step in range(60):
        start, cpu_start = time.perf_counter(), time.process_time()
        batches = samples.train_step(step, BATCH, 17, 0.3, BATCH * SEQ_LENGTH)
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
        rates.append(sum(batch.num_tokens for batch in batches) / seconds[-1])
    return {
        "bench": "scale", "cpu": cpu(), "chunk": cfg.chunk, "shards": len(samples.shards), "samples": len(samples),
        "gigabytes": sum(os.path.getsize(shard.path) for shard in samples.shards) / 1e9, "open_seconds": round(opened, 3),
        "batch_milliseconds": round(1e3 * float(np.median(seconds[10:])), 2), "tokens_per_second": round(float(np.median(rates[10:]))),
        "batch_cpu_milliseconds": round(1e3 * float(np.median(cpu_seconds[10:])), 2), "memory_mb": round(memory_mb("VmHWM")), "memory_mb_before": round(before), "anonymous_mb": round(memory_mb("RssAnon")),
        "load_average": os.getloadavg()[0],
    }  # fmt: skip


def bench_scale(cfg):
    whole, small = Path(cfg.scale, "whole"), Path(cfg.scale, "small")
    for path, share in ((whole, 1), (small, 1000)):
        if not (path / "manifest.json").exists():
            shutil.rmtree(path, ignore_errors=True)
            make_corpus(path, C4_DOCS // share, C4_TOKENS / share, max(2, C4_SHARDS // share))
    for chunk, path in itertools.product((False, True), (small, whole)):
        argv = [sys.executable, __file__, f"--measure={path}", f"--chunk={chunk}"]
        if chunk:  # makes and keeps the index; the next run finds it
            start = time.perf_counter()
            subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
            print(json.dumps({"bench": "index", "corpus": path.name, "first_run_seconds": round(time.perf_counter() - start, 2)}))
        print(subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip(), flush=True)


@command
def main(argv):
    cfg = load_config(BenchConfig, argv)
    if cfg.measure:
        print(json.dumps(measure(cfg)))
    elif cfg.scale:
        bench_scale(cfg)
    elif cfg.prepare:
        print(json.dumps(bench_bare(cfg) if cfg.workers == 0 else bench_prepare(cfg)))
    else:
        raise UserError("nothing to do (give --prepare=SOURCE or --scale=DIR)")


if __name__ == "__main__":
    main()
