"""Turn text into token shards: C4, your own files, or the English that every Python ships.

    python prepare_c4.py --source=c4 --max_doc_tokens=126 --out=data/c4
    python prepare_c4.py --source=books/,articles.jsonl.gz --train_tokenizer=32768 --out=data/mine

The work is cut into units, each some source files, and each unit makes shards of its own. So it takes as many processes
as there are units, the shards do not depend on how many, and a run that was interrupted goes on with the units that are
not done. A document is held out for evaluation by a hash of its text, so adding data never moves another one.

Read next: data.py, for the shards' format
"""

import ast
import functools
import glob
import gzip
import hashlib
import heapq
import inspect
import itertools
import json
import lzma
import multiprocessing
import os
import shutil
import sys
import sysconfig
import time
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from config import UserError, command, load_config
from data import file_digest, load_tokenizer, prefetch, read_json, verify, write_shard

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
UNIT_BYTES = 64 * 2**20  # small source files are taken together up to this size on disk
BATCH_CHARS = 2**20  # of text that go to the tokenizer at once
TOKENIZER_TRAIN_CHARS = 300 * 10**6  # of text that a new tokenizer is made from, at most
READ_ATTEMPTS = 5  # at a file of the hub, waiting 1, 2, 4, ... seconds in between
C4_FILES = {"train": ("en/c4-train.%05d-of-01024.json.gz", 1024), "val": ("en/c4-validation.%05d-of-00008.json.gz", 8)}
OPENERS = {"": open, ".gz": gzip.open, ".xz": lzma.open}
SUFFIXES = (".txt", ".jsonl", ".json")
FILL_LENGTHS = (128, 512)  # for which the report says how full samples are


@dataclass
class PrepareConfig:
    # Source
    source: str = ""  # comma-separated: c4, stdlib, or files, directories and globs of .txt, .jsonl, .json (also .gz, .xz)
    text_key: str = "text"  # of a JSON line: which value is the text
    doc_sep: Literal["line", "blank", "file"] = "line"  # of .txt: a document is a line, a paragraph, or the whole file
    max_docs: int = 0  # stop after so many documents, read by one process; 0: all
    skip_bad_lines: int = 0  # lines a unit may have that cannot be read, before it is an error
    # Tokenizer
    tokenizer: str = "google-bert/bert-base-uncased"  # tokenizer.json, BERT vocab.txt, or hub id
    train_tokenizer: int = 0  # make a WordPiece vocabulary of so many entries from the training text first; 0: do not
    cased: bool = False  # keep capitals and accents, for a vocab.txt or a new vocabulary
    # Output
    out: str = ""  # shard directory
    val_fraction: float = 0.005  # share of documents held out, by a threshold on their hash (c4 has files for it)
    val_docs: int = 0  # hold out so many documents instead, those of the smallest hashes
    max_doc_tokens: int = 0  # keep the first so many tokens of a document; 126 is all that 128-token training reads
    shard_tokens: int = 100_000_000  # tokens in a shard, about
    workers: int = os.cpu_count() or 1  # processor cores to use

    def check(self):
        """Raises: UserError for values that make no sense."""
        for name in ("source", "out"):
            if not getattr(self, name):
                raise UserError(f"--{name}: not given (--help lists the options)")
        for name in ("max_docs", "skip_bad_lines", "val_docs", "max_doc_tokens"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)}: must not be negative")
        for name in ("shard_tokens", "workers"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: must be at least 1")
        if not 0 <= self.val_fraction < 1:
            raise UserError(f"val_fraction={self.val_fraction}: must be at least 0 and below 1")
        if self.train_tokenizer and self.train_tokenizer < 100:
            raise UserError(f"train_tokenizer={self.train_tokenizer}: a vocabulary needs 100 entries at least (0: none)")


# ---------------------------------------------------------------------------------------------------------------------
# Sources. A piece of a source is a (kind, name) pair: ("file", path), ("stdlib", ""), or ("c4 train", file on the hub).


def list_pieces(source):
    """Every piece of a comma-separated --source, in order, with its size in bytes: [[kind, name, size], ...]."""
    pieces = []
    for part in filter(None, (part.strip() for part in source.split(","))):
        if part == "stdlib":
            pieces.append(["stdlib", "", 0])
        elif part == "c4":
            pieces += [[f"c4 {split}", name % i, UNIT_BYTES] for split, (name, n) in C4_FILES.items() for i in range(n)]
        else:
            inside = os.path.join(glob.escape(part), "**", "*")
            paths = sorted(glob.glob(inside if os.path.isdir(part) else part, recursive=True))
            paths = [part] if os.path.isfile(part) else [path for path in paths if os.path.isfile(path)]
            if os.path.isdir(part):  # of a directory take what can be read; of files and globs, everything
                paths = [path for path in paths if split_suffixes(path)[0] in SUFFIXES]
            if not paths:
                raise UserError(f"{part}: no such source (c4, stdlib, or {', '.join(SUFFIXES)} files, also .gz or .xz)")
            for path in paths:
                if split_suffixes(path)[0] not in SUFFIXES:
                    raise UserError(f"{path}: unknown kind of file (expected {', '.join(SUFFIXES)}, also .gz or .xz)")
                pieces.append(["file", path, os.path.getsize(path)])
    return pieces


def split_suffixes(path):
    """("kind of file", "kind of compression"), such as (".jsonl", ".gz") or (".txt", "")."""
    base, suffix = os.path.splitext(path.lower())
    return (os.path.splitext(base)[1], suffix) if suffix in (".gz", ".xz") else (suffix, "")


def group_units(pieces, whole):
    """Consecutive pieces taken together up to UNIT_BYTES; all of them if `whole`."""
    units, size = [], 0
    for piece in pieces:
        if not units or (not whole and size + piece[2] > UNIT_BYTES):
            units.append([])
            size = 0
        units[-1].append(piece)
        size += piece[2]
    return units


def documents(kind, name, cfg, bad_lines):
    """The texts of a piece, in order. bad_lines: a Counter of skipped lines under "bad lines".

    Raises: UserError naming file and line.
    """
    if kind == "stdlib":
        return iter(stdlib_documents())
    if kind.startswith("c4"):
        return c4_documents(name)
    return file_documents(name, cfg, bad_lines)


@functools.cache
def stdlib_documents():
    """English from the standard library: docstrings of its modules, classes and functions, and pydoc's topics."""
    from pydoc_data.topics import topics

    root = sysconfig.get_path("stdlib")
    skipped = ("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "pydoc_data")
    texts = {inspect.cleandoc(text) for text in topics.values()}
    for directory, subdirectories, files in os.walk(root):
        subdirectories[:] = sorted(name for name in subdirectories if name not in skipped)
        for file in sorted(name for name in files if name.endswith(".py")):
            with open(os.path.join(directory, file), "rb") as source:
                try:
                    tree = ast.parse(source.read())
                except (SyntaxError, ValueError):
                    continue
            for node in ast.walk(tree):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                    texts.add(ast.get_docstring(node) or "")
    return sorted(text for text in texts if len(text) >= 40 and len(text.split()) >= 6)


def c4_documents(name):
    """The texts of one of C4's files, streamed from the hub; after a failed read, from where it was."""
    from datasets import load_dataset

    done = 0
    for attempt in range(READ_ATTEMPTS):
        try:
            stream = load_dataset("allenai/c4", data_files={"train": name}, split="train", streaming=True)
            for row in stream.skip(done) if done else stream:
                yield row["text"]
                done += 1
            return
        except Exception as error:  # whatever the network and the libraries between raise
            if attempt == READ_ATTEMPTS - 1:
                reason = f"{type(error).__name__}: {error}"[:200]
                hint = f"{READ_ATTEMPTS} attempts; the same command goes on where this stopped"
                raise UserError(f"allenai/c4 {name}: cannot be read: {reason} ({hint})") from None
            time.sleep(2**attempt)


def file_documents(path, cfg, bad_lines):
    """The texts of a .txt, .jsonl or .json file, plain or compressed. A byte-order mark and CRs at line ends go."""
    kind, _ = split_suffixes(path)
    paragraph = []
    for number, line in numbered_lines(path, cfg, bad_lines):
        if kind != ".txt":
            if not line.strip():
                continue
            try:
                text = json_text(line, cfg.text_key)
            except ValueError as error:
                skip_or_fail(cfg, bad_lines, f"{path}:{number}: {error}")
            else:
                yield text
        elif cfg.doc_sep == "line":
            yield line
        elif cfg.doc_sep == "blank" and not line.strip():
            yield "\n".join(paragraph)
            paragraph = []
        else:
            paragraph.append(line)
    if paragraph:
        yield "\n".join(paragraph)


def json_text(line, text_key):
    """The text in a line of JSON. Raises: ValueError saying what is wrong with the line."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON: {error} (expected one object a line)") from None
    if not isinstance(record, dict) or text_key not in record:
        keys = ", ".join(list(record)[:5]) if isinstance(record, dict) else "none"
        raise ValueError(f"no {text_key!r} (keys: {keys}; see --text_key)")
    text = record[text_key]
    if not isinstance(text, str):
        raise ValueError(f"{text_key!r} is {type(text).__name__} (expected a string)")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{text_key!r} holds half a surrogate pair (no text can be made of it)") from None
    return text


def numbered_lines(path, cfg, bad_lines):
    """(number, text) of each line; lines end at \\n alone, as JSON strings may hold other separators."""
    _, compression = split_suffixes(path)
    number = 0
    try:
        with OPENERS[compression](path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    skip_or_fail(cfg, bad_lines, f"{path}:{number}: not UTF-8: {error.reason} (convert the file first)")
                    continue
                yield number, text.rstrip("\r\n")
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise UserError(f"{path}:{number + 1}: {error} (truncated, or not a {compression} file)") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None


def skip_or_fail(cfg, bad_lines, text):
    if bad_lines["bad lines"] >= cfg.skip_bad_lines:
        raise UserError(text)
    bad_lines["bad lines"] += 1


def text_hash(text):
    """64 bits that decide whether a document is held out."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def all_documents(units, cfg):
    """(kind, text) of every document of every unit."""
    count = 0
    for kind, name, _ in itertools.chain(*units):
        for text in documents(kind, name, cfg, Counter()):
            yield kind, text
            count += 1
            if count == cfg.max_docs:
                return


def val_threshold(units, cfg):
    """Documents whose hash is below this are held out."""
    if not cfg.val_docs:
        return int(cfg.val_fraction * 2**64)
    hashes = (text_hash(text) for kind, text in all_documents(units, cfg) if not kind.startswith("c4") and text.strip())
    return max(heapq.nsmallest(cfg.val_docs, set(hashes)), default=-1) + 1


def is_held_out(kind, text, threshold):
    return kind == "c4 val" if kind.startswith("c4") else text_hash(text) < threshold


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers


def wordpiece(cased, vocab=None):
    """BERT's tokenizer with a vocabulary {entry: id}, or one yet to be trained."""
    tokenizer = Tokenizer(models.WordPiece(vocab or {}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=not cased)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece("##")
    return tokenizer


def finish(tokenizer):
    """Tell the tokenizer of its special tokens, once they have ids."""
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    ids = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ids)


def make_tokenizer(units, cfg, threshold, path):
    """Write the tokenizer to `path`. It is made once: training is not deterministic, so a resumed run keeps the file."""
    if not cfg.train_tokenizer:
        return write_atomically(path, read_tokenizer(cfg.tokenizer, cfg.cased))
    tokenizer = wordpiece(cfg.cased)
    texts = (text for kind, text in all_documents(units, cfg) if not is_held_out(kind, text, threshold))
    trainer = trainers.WordPieceTrainer(
        vocab_size=cfg.train_tokenizer, min_frequency=2, limit_alphabet=1000, special_tokens=SPECIAL_TOKENS,
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(first_chars(texts, TOKENIZER_TRAIN_CHARS), trainer)
    finish(tokenizer)
    write_atomically(path, tokenizer.to_str(pretty=True))


def read_tokenizer(name, cased=False):
    """The contents of a tokenizer.json: of that file, or made from a BERT vocab.txt, or from the hub. Raises: UserError."""
    if name.endswith(".json"):
        load_tokenizer(name)
        with open(name, encoding="utf-8") as file:
            return file.read()
    if not name.endswith(".txt"):
        try:
            return Tokenizer.from_pretrained(name).to_str(pretty=True)
        except Exception as error:  # the library raises plain Exception
            reason = f"{error}".partition("\n")[0][:200]
            raise UserError(f"{name}: no such tokenizer: {reason} (a tokenizer.json, vocab.txt or hub id)") from None
    try:
        with open(name, encoding="utf-8", newline="\n") as file:
            entries = [line.rstrip("\r\n") for line in file]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{name}: {error} (expected a vocabulary, one entry a line)") from None
    vocab = {entry: i for i, entry in enumerate(entries)}
    if len(vocab) < len(entries):
        line = next(i for i, entry in enumerate(entries) if vocab[entry] != i) + 1
        raise UserError(f"{name}:{line}: {entries[line - 1]!r} is there twice (an entry has one id)")
    for token in SPECIAL_TOKENS:
        if token not in vocab:
            raise UserError(f"{name}: has no {token} token (a BERT-style vocabulary is needed)")
    tokenizer = wordpiece(cased, vocab)
    finish(tokenizer)
    return tokenizer.to_str(pretty=True)


def first_chars(texts, limit):
    """Texts until their lengths add up to `limit`."""
    for text in texts:
        yield text
        limit -= len(text)
        if limit <= 0:
            return


def encode(tokenizer, texts, max_doc_tokens):
    """(what of each text was read, its Encoding). With max_doc_tokens, encodings of at least that many if there are.

    Then only a beginning of each text is tokenized: cut at white space, where BERT's tokenizers split in any case, and
    longer if it did not give tokens enough. A token is one character at least, and 4 on average in English.
    """
    chars = 6 * max_doc_tokens + 64
    read = [beginning(text, chars) for text in texts] if max_doc_tokens else texts
    encodings = tokenizer.encode_batch_fast(read, add_special_tokens=False)
    if max_doc_tokens:
        for i, text in enumerate(texts):
            longer = chars
            while len(encodings[i]) < max_doc_tokens and len(read[i]) < len(text):
                longer *= 4
                read[i] = beginning(text, longer)
                encodings[i] = tokenizer.encode(read[i], add_special_tokens=False)
    return read, encodings


def beginning(text, chars):
    """The text up to white space at or after `chars` characters: such as BERT's normalizer keeps, unlike \\f or \\x85."""
    while chars < len(text) and text[chars] not in " \t\n\r":
        chars += 1
    return text[:chars]


# ---------------------------------------------------------------------------------------------------------------------
# Units


def process_unit(number, unit, cfg, threshold):
    """Write the shards of a unit; returns {"shards": manifest entries, "stats": counts}.

    stats: a flat dict of counts, so that those of units add up; "length 2^k train" counts documents by bits of length.
    """
    tokenizer, special = load_tokenizer(os.path.join(cfg.out, "tokenizer.json"))
    digest = bytes.fromhex(file_digest(os.path.join(cfg.out, "tokenizer.json")))
    bytes_per_token = 2 if tokenizer.get_vocab_size() <= 2**16 else 4
    pending, pending_tokens = {"train": [], "val": []}, Counter()
    shards, stats, start, said = [], Counter(), time.perf_counter(), time.perf_counter()

    def flush(split):
        if not pending[split]:
            return
        index = sum(entry["split"] == split for entry in shards)
        path = os.path.join(cfg.out, f"{split}_{number:05d}_{index:03d}.bin")
        shards.append({"split": split, **write_shard(path, pending[split], bytes_per_token, digest)})
        pending[split], pending_tokens[split] = [], 0

    def tokenize(batch):
        splits, texts = zip(*batch)
        return splits, *encode(tokenizer, list(texts), cfg.max_doc_tokens)

    # One thread reads and unpacks, one waits for the tokenizer, which is not Python, and this one stores.
    reader = batched_documents(unit, cfg, threshold, stats)
    batches = iter(prefetch(lambda _: next(reader, None), itertools.repeat(None)).__next__, None)
    try:
        for splits, texts, encodings in prefetch(tokenize, batches):
            for split, text, encoding in zip(splits, texts, encodings):
                tokens = np.array(encoding.ids, np.uint16 if bytes_per_token == 2 else np.uint32)
                stats["tokens read"] += len(tokens)
                stats["words read"] += len(text.split())
                tokens = tokens[: cfg.max_doc_tokens or None]
                if len(tokens) == 0:
                    stats["empty documents"] += 1
                    continue
                stats[f"documents {split}"] += 1
                stats[f"tokens {split}"] += len(tokens)
                stats["unknown tokens"] += int((tokens == special["[UNK]"]).sum())
                stats[f"length 2^{len(tokens).bit_length()}"] += 1
                for length in FILL_LENGTHS:
                    stats[f"fill {length}"] += min(len(tokens) + 2, length)
                pending[split].append(tokens)
                pending_tokens[split] += len(tokens)
                if pending_tokens[split] >= cfg.shard_tokens:
                    flush(split)
            if time.perf_counter() - said > 10:
                said = time.perf_counter()
                rate = (stats["tokens train"] + stats["tokens val"]) / (said - start)
                print(f"unit {number}: {stats['documents train']:,} documents, {rate / 1e6:.2f} M tokens/s", file=sys.stderr)
        for split in pending:
            flush(split)
    except OSError as error:
        raise UserError(f"{cfg.out}: {error.strerror} (finished units are kept; the same command goes on)") from None
    result = {"shards": shards, "stats": dict(stats)}
    write_atomically(unit_path(cfg.out, number), json.dumps(result))
    return result


def batched_documents(unit, cfg, threshold, stats):
    """Lists of (split, text) of about BATCH_CHARS each."""
    batch, chars, count = [], 0, 0
    for kind, name, _ in unit:
        for text in documents(kind, name, cfg, stats):
            batch.append(("val" if is_held_out(kind, text, threshold) else "train", text))
            stats["characters"] += len(text)
            chars += len(text)
            count += 1
            if count == cfg.max_docs:
                break
            if chars >= BATCH_CHARS:
                yield batch
                batch, chars = [], 0
        if cfg.max_docs and count >= cfg.max_docs:
            break
    if batch:
        yield batch


def unit_path(out, number):
    return os.path.join(out, ".work", f"unit_{number:05d}.json")


def process_all(units, cfg, threshold):
    """Results of all units, in order; those already done are read, the others made by cfg.workers processes."""
    results = {}
    for number in range(len(units)):
        if os.path.exists(unit_path(cfg.out, number)):
            results[number] = read_json(unit_path(cfg.out, number), "remove the file to do the unit again")
    left = [number for number in range(len(units)) if number not in results]
    if results:
        print(f"{len(results)} of {len(units)} units were done before")
    processes = max(1, min(cfg.workers, len(left)))
    # With few units, the tokenizer's own threads use the cores of processes that are not there, or done.
    threads = cfg.workers if len(left) < 2 * cfg.workers else 1
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    if processes == 1:
        for number in left:
            results[number] = process_unit(number, units[number], cfg, threshold)
    else:
        # spawn: a forked process would inherit the locks of the tokenizer's threads.
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            futures = {number: pool.submit(process_unit, number, units[number], cfg, threshold) for number in left}
            try:
                for number, future in futures.items():
                    results[number] = future.result()
                    print(f"unit {number + 1} of {len(units)} done", file=sys.stderr)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    return [results[number] for number in range(len(units))]


# ---------------------------------------------------------------------------------------------------------------------
# The whole


@command
def main(argv):
    cfg = load_config(PrepareConfig, argv)
    cfg.check()
    start = time.perf_counter()
    pieces = list_pieces(cfg.source)
    units = group_units(pieces, whole=cfg.max_docs > 0)
    options = {name: value for name, value in asdict(cfg).items() if name not in ("out", "workers")}
    plan = {"options": options, "sources": pieces}
    if adopt_directory(cfg.out, plan):
        print(f"{cfg.out}: finished before, nothing to do")
        return
    tokenizer_path = os.path.join(cfg.out, "tokenizer.json")
    threshold = val_threshold(units, cfg)
    if not os.path.exists(tokenizer_path):
        make_tokenizer(units, cfg, threshold, tokenizer_path)
    tokenizer, _ = load_tokenizer(tokenizer_path)

    results = process_all(units, cfg, threshold)
    stats = sum((Counter(result["stats"]) for result in results), Counter())
    if not stats["documents train"]:
        raise UserError(f"{cfg.source}: no text to train on (all documents are empty, or held out: see --val_fraction)")
    if not stats["documents val"] and (cfg.val_fraction or cfg.val_docs):
        raise UserError(f"{cfg.source}: no document was held out (try --val_docs=100 and a new --out)")
    report = make_report(stats, tokenizer.get_vocab_size(), time.perf_counter() - start)
    write_atomically(os.path.join(cfg.out, "report.json"), json.dumps(report, indent=1))
    manifest = {
        "format": 1,
        "tokenizer_sha256": file_digest(tokenizer_path),
        "vocab_size": tokenizer.get_vocab_size(),
        **plan,
        "shards": [entry for result in results for entry in result["shards"]],
    }
    write_atomically(os.path.join(cfg.out, "manifest.json"), json.dumps(manifest, indent=1))
    verify(cfg.out)
    shutil.rmtree(os.path.join(cfg.out, ".work"))
    for name, value in report.items():
        print(f"{name:22s} {value:,}" if isinstance(value, (int, float)) else f"{name:22s} {json.dumps(value)}")


def adopt_directory(out, plan):
    """Make or continue the shard directory; True if it is finished. Raises: UserError if it holds something else."""
    finished, started = os.path.join(out, "manifest.json"), os.path.join(out, ".work", "plan.json")
    try:
        for path in (finished, started):
            if os.path.exists(path):
                earlier = read_json(path, "not a shard directory of prepare_c4.py; choose another --out")
                if not (isinstance(earlier, dict) and isinstance(earlier.get("options"), dict) and "sources" in earlier):
                    raise UserError(f"{path}: not written by prepare_c4.py (choose another --out)")
                differing = [name for name in plan["options"] if earlier["options"].get(name) != plan["options"][name]]
                if earlier["sources"] != plan["sources"]:
                    differing.append("the source files")
                if differing:
                    raise UserError(f"{out}: made with other {', '.join(differing)} (choose another --out, or remove it)")
                if path == finished:
                    shutil.rmtree(os.path.dirname(started), ignore_errors=True)
                    return True
                for leftover in glob.glob(os.path.join(glob.escape(out), "*.tmp")):
                    os.remove(leftover)
                return False
        if os.path.isdir(out) and os.listdir(out) not in ([], [".work"]):
            raise UserError(f"{out}: not empty, and not a shard directory (choose another --out)")
        os.makedirs(os.path.dirname(started), exist_ok=True)
        write_atomically(started, json.dumps(plan))
        return False
    except OSError as error:
        raise UserError(f"{out}: {error.strerror} (choose another --out)") from None


def make_report(stats, vocab_size, seconds):
    """What is in the corpus: plain numbers, of which the last three depend on the machine."""
    num_docs = stats["documents train"] + stats["documents val"]
    num_tokens = stats["tokens train"] + stats["tokens val"]
    bits = sorted(int(name.split("^")[1]) for name in stats if name.startswith("length"))
    return {
        "documents": num_docs,
        "documents_held_out": stats["documents val"],
        "documents_empty": stats["empty documents"],
        "bad_lines_skipped": stats["bad lines"],
        "tokens": num_tokens,
        "tokens_held_out": stats["tokens val"],
        "vocab_size": vocab_size,
        "tokens_per_word": round(stats["tokens read"] / max(1, stats["words read"]), 4),
        "unknown_percent": round(100 * stats["unknown tokens"] / num_tokens, 4),
        **{f"fill_at_{n}": round(stats[f"fill {n}"] / num_docs / n, 4) for n in FILL_LENGTHS},
        "lengths": {f"{2 ** (bit - 1)}-{2**bit - 1}": stats[f"length 2^{bit}"] for bit in bits},
        "characters": stats["characters"],
        "seconds": round(seconds, 2),
        "tokens_per_second": round(num_tokens / seconds),
        "megabytes_per_second": round(stats["characters"] / seconds / 1e6, 2),
    }


def write_atomically(path, text):
    """Write a text file under another name, and rename it when it is on disk."""
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)


if __name__ == "__main__":
    main()
