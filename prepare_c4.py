"""Turn text into token shards: C4, any dataset on the hub, your own files, or the English that every Python ships.

    python prepare_c4.py --source=c4 --max_doc_tokens=126 --out=data/c4
    python prepare_c4.py --source=books/,articles.jsonl.zst --train_tokenizer=32768 --out=data/mine

The source is divided into units of work, and each unit writes its own shards. So any number of processes can share the
units and the shards come out the same, and an interrupted run resumes with the units that are missing. A hash of its
text decides whether a document is held out for evaluation, so adding data never moves another one.

Read next: common/sources.py, for what can be read, or data.py, for the format of a shard
"""

import common  # noqa: F401, I001, before anything that may be missing

import contextlib
import functools
import glob
import hashlib
import heapq
import itertools
import json
import os
import re
import shutil
import signal
import time
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np

from common.files import file_digest, gigabytes, lock_directory, read_json, whole_file, write_once, write_text
from common.options import UserError, command, load_config
from common.sources import Segment, documents, list_segments
from common.vocabulary import (
    beginning,
    changed_characters,
    encode,
    letters,
    load_tokenizer,
    read_tokenizer,
    train_tokenizer,
    unknown_characters,
)
from common.workers import Progress, report_progress, run_jobs
from data import Samples, prefetch, verify, write_shard

MANY_ENOUGH = 100  # documents to hold out of a small corpus
UNIT_BYTES = 64 * 2**20  # a unit takes segments up to this size on disk, and at least one
HASHED_BYTES = 2**30  # of text, up to which all hashes are known before the split: it takes a few % of the time
BATCH_CHARS = 2**20  # text per call of the tokenizer
TOKENIZER_TRAIN_CHARS = 300 * 10**6  # text to train a tokenizer on, at most
COMPARE_CHARS = 10**6  # text per unit for --compare_tokenizer
SAMPLE_SEGMENTS, SAMPLE_CHARS = 4, 10**6  # text from which the size of the shards is estimated
FILL_LENGTHS = (128, 512)  # sequence lengths for which the report says how full samples are
NUM_LONGEST = 5  # longest documents listed in the report
NUM_SKIPPED, NUM_PRINTED = 1000, 20  # skipped lines listed in report.json, and files named when it is printed
MAX_UNKNOWN = 0.95  # share of unknown characters from which a tokenizer is refused
WARN_PERCENT = 1  # of characters unknown or changed
INSPECT_CHARS = 2**16  # text per batch whose normalization is compared with the original
NUM_EXAMPLES, EXAMPLE_CHARS = 3, 80  # beginnings of documents shown beside what their tokens decode to


@dataclass
class PrepareConfig:
    # Source
    source: str = ""  # comma-separated: c4, stdlib, hub datasets as owner/name[:config], files, directories, globs
    text_key: str = "text"  # JSON key or column that holds the text
    doc_sep: Literal["line", "blank", "file"] = "line"  # a .txt holds a document per line, per paragraph, or only one
    max_docs: int = 0  # stop after this many documents, read by one process; 0: all
    skip_bad_lines: int = 0  # unreadable lines to skip before it is an error
    dedup: bool = False  # keep only the first of equal documents; reads everything twice, 3 bytes of memory a document
    # Tokenizer
    tokenizer: str = "google-bert/bert-base-uncased"  # tokenizer.json or its directory, BERT vocab.txt, or hub id
    train_tokenizer: int = 0  # train a WordPiece vocabulary of this size on the training text first; 0: use --tokenizer
    cased: bool = False  # keep case, for a new vocabulary or a vocab.txt (there, accents too)
    strip_accents: bool = False  # a new vocabulary without accents, and without the vowel signs of many scripts
    compare_tokenizer: str = ""  # a second tokenizer; the report compares how many tokens each produces
    # Output
    out: str = ""  # shard directory
    val_fraction: float = 0.005  # share of documents held out, by a threshold on their hash (c4 has files for it); at least 1
    val_docs: int = 0  # hold out exactly this many instead, those with the smallest hashes; reads everything twice
    max_doc_tokens: int = 0  # truncate documents; 126 is all that 128-token training reads, 1/4 of C4; 0: off
    shard_tokens: int = 100_000_000  # approximate tokens per shard
    workers: int = os.cpu_count() or 1  # processor cores to use
    task: str = ""  # i/N: do share i, from 1 to N, of the work, beside other tasks on any host that sees `out`
    join: bool = False  # with every task done: write report and manifest

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
            raise UserError(f"train_tokenizer={self.train_tokenizer}: a vocabulary needs at least 100 entries (0: none)")
        if self.strip_accents and not self.train_tokenizer:
            raise UserError("strip_accents: only with --train_tokenizer (an existing vocabulary has its own rule)")
        if self.train_tokenizer and self.tokenizer != PrepareConfig.tokenizer:
            raise UserError("--train_tokenizer and --tokenizer exclude each other (one to compare: --compare_tokenizer)")
        if self.cased and not (self.train_tokenizer or ".txt" in (self.tokenizer[-4:], self.compare_tokenizer[-4:])):
            raise UserError("cased: only with --train_tokenizer or a vocab.txt (a tokenizer.json has its own rule)")
        task = re.fullmatch(r"(\d{1,9})/(\d{1,9})", self.task or "1/1")
        if not (task and 1 <= int(task[1]) <= int(task[2])):
            raise UserError(f"task={self.task}: not i/N with i from 1 to N (Slurm: --array=1-N, --task=$SLURM_ARRAY_TASK_ID/N)")
        if self.task and self.join:
            raise UserError("--task and --join exclude each other (join when every task has ended)")


# These don't change the shards, so a run may resume with other values.
FREE_OPTIONS = ("out", "workers", "skip_bad_lines", "task", "join")


# ---------------------------------------------------------------------------------------------------------------------
# The output directory. Files below .work exist only until it is finished.


def work_path(out, name):
    return os.path.join(out, ".work", name)


def unit_path(out, number):
    return work_path(out, f"unit_{number:05d}.json")


def missing_units(out, units):
    return [number for number in range(len(units)) if not os.path.exists(unit_path(out, number))]


def hash_path(out, number):
    return work_path(out, f"hashes_{number:05d}.npz")


def read_plan(out):
    """(plan, finished) of the run that wrote `out`, or (None, False). A plan is {"options": ..., "sources": Segments}."""
    for path, finished in ((os.path.join(out, "manifest.json"), True), (work_path(out, "plan.json"), False)):
        if os.path.exists(path):
            plan = read_json(path, "not a shard directory of prepare_c4.py; choose another --out")
            try:
                plan["options"].items(), plan.get("modified", {}).items()
                return {**plan, "sources": [Segment(*segment) for segment in plan["sources"]]}, finished
            except (AttributeError, KeyError, TypeError):
                raise UserError(f"{path}: not written by prepare_c4.py (choose another --out)") from None
    return None, False


def check_same(out, plan, earlier):
    """Raises: UserError if the earlier run makes other shards."""
    options = plan["options"]
    # Before there was --strip_accents, an uncased new vocabulary implied it.
    before = {"strip_accents": bool(options["train_tokenizer"]) and not options["cased"], **earlier["options"]}
    names = [name for name, value in options.items() if before.get(name) != value]
    differing = [f"{name} was {before.get(name)!r} and is {options[name]!r}" for name in names]
    changed = changed_files(earlier.get("modified", {}), plan["modified"])
    if earlier["sources"] != plan["sources"] or changed:
        differing.append(f"{changed[0]} was changed" if changed else "other source files")
    if differing:
        raise UserError(f"{out}: holds shards that differ: {', '.join(differing)} (choose another --out, or remove it)")


def modification_times(segments):
    """{path: nanoseconds} of the local files: cheaper than a digest of everything, and no edit keeps them."""
    paths = dict.fromkeys(segment.path for segment in segments)
    return {path: os.stat(path).st_mtime_ns for path in paths if path != "stdlib" and not path.startswith("hf://")}


def changed_files(before, after):
    return [path for path, time_ns in before.items() if after.get(path, time_ns) != time_ns]


def enter_output(out, plan, resumed, task):
    """Clear up after the earlier run, or write the plan into an empty directory. Raises: UserError."""
    plan_path = work_path(out, "plan.json")
    # Another task may be at the same point. Its plan comes before its other files, so look for them in this order.
    if task and (os.listdir(out) in ([], [".work"]) or os.path.exists(plan_path)):
        os.makedirs(work_path(out, ""), exist_ok=True)
        write_once(plan_path, json.dumps(plan))
        check_same(out, plan, read_plan(out)[0])
        return
    if resumed:
        for directory in (out, work_path(out, "")):
            for leftover in glob.glob(os.path.join(glob.escape(directory), "*.tmp")):
                os.remove(leftover)
        return
    if os.listdir(out) not in ([], [".work"]):
        raise UserError(f"{out}: not empty, and not a shard directory (choose another --out)")
    shutil.rmtree(work_path(out, ""), ignore_errors=True)
    os.makedirs(work_path(out, ""))
    write_text(plan_path, json.dumps(plan))


def check_disk(out, estimate):
    """Raises: UserError if shards of `estimate` bytes don't fit on the disk."""
    written = sum(os.path.getsize(path) for path in glob.glob(os.path.join(glob.escape(out), "*.bin")))
    free = shutil.disk_usage(out).free
    print(f"about {gigabytes(estimate)} of shards; {gigabytes(free)} are free")
    if estimate - written > free:
        needed = f"about {gigabytes(estimate - written)} more are needed, {gigabytes(free)} are free"
        raise UserError(f"{out}: {needed} (choose another --out, or truncate documents with --max_doc_tokens)")


# ---------------------------------------------------------------------------------------------------------------------
# Units of work, and their documents


def group_units(segments, whole):
    """Lists of consecutive segments, up to UNIT_BYTES each; a single one if `whole`."""
    units, size = [], 0
    for segment in segments:
        if not units or (not whole and size + segment.size > UNIT_BYTES):
            units.append([])
            size = 0
        units[-1].append(segment)
        size += segment.size
    return units


def share_of(cfg, count):
    """The numbers, below `count`, of the units that are this task's; of all units without --task."""
    i, n = map(int, (cfg.task or "1/1").split("/"))
    return range(i - 1, count, n)


def unit_documents(unit, cfg, stats):
    """(segment, text) of every document of a unit that is not blank. Counts "source bytes" and "empty documents"."""
    finished = count = 0
    for segment in unit:
        for text in documents(segment, cfg, stats):
            stats["source bytes"] = finished + stats["segment bytes"]
            if text.strip():
                yield segment, text
            else:
                stats["empty documents"] += 1
            count += 1
            if count == cfg.max_docs:
                return
        finished += segment.size
        stats["source bytes"], stats["segment bytes"] = finished, 0


def text_hash(text):
    """64-bit content hash: decides the split and finds duplicates.

    Two of C4's 365 million documents collide with a probability of 0.4 %.
    """
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def is_held_out(segment, hashed, threshold):
    return segment.split == "val" if segment.split else hashed < threshold


# ---------------------------------------------------------------------------------------------------------------------
# Hashes of all documents, to hold some out and to find duplicates; where needed, or for little text, in a pass of its own


def hash_unit(number, unit, cfg):
    """Save the hashes of a unit's documents. Returns the number of bad lines."""
    hashes, by_hash, stats = [], [], Counter()
    if os.path.exists(hash_path(cfg.out, number)):  # another task has meanwhile
        return 0
    for segment, text in unit_documents(unit, cfg, stats):
        hashes.append(text_hash(text))
        by_hash.append(not segment.split)
        if len(hashes) % 1000 == 0:
            report_progress({"documents": len(hashes), "source bytes": stats["source bytes"]})
    save_hashes(cfg.out, number, hashes, by_hash)
    return stats["bad lines"]


def save_hashes(out, number, hashes, by_hash):
    """by_hash: for each document whether its hash decides about the split."""
    with whole_file(hash_path(out, number)) as file:
        np.savez(file, hashes=np.array(hashes, np.uint64), by_hash=np.array(by_hash, bool))


def load_hashes(out, number):
    """(hashes, by_hash) of a unit."""
    with np.load(hash_path(out, number)) as saved:
        return saved["hashes"], saved["by_hash"]


def val_threshold(num_units, cfg):
    """Documents with a hash below this are held out. num_units: of units whose hashes are known, 0 or all.

    If they are known and none is below the share, one in 20 of the distinct texts is held out, those with the smallest
    hashes, but at least one and at most MANY_ENOUGH. Raises: UserError if none would be left.
    """
    share, wanted = int(cfg.val_fraction * 2**64), cfg.val_docs or MANY_ENOUGH * (cfg.val_fraction > 0)
    smallest, threshold = np.empty(0, np.uint64), share
    for number in range(num_units):
        hashes, by_hash = load_hashes(cfg.out, number)
        smallest = np.unique(np.concatenate([smallest, hashes[by_hash]]))[:wanted]
    if cfg.val_docs:
        threshold = int(smallest[-1]) + 1 if len(smallest) else 0
    elif len(smallest) and smallest[0] >= share:
        distinct = num_distinct(cfg.out, num_units)
        smallest = smallest[: max(1, distinct // 20)]
        threshold = int(smallest[-1]) + 1
        instead = f"held out instead: {len(smallest)}, with the smallest hashes"
        print(f"val_fraction={cfg.val_fraction} holds out none of {distinct:,} distinct texts; {instead}")
    hashed = (load_hashes(cfg.out, number) for number in range(num_units))
    if len(smallest) and not any((hashes >= threshold).any() or not by_hash.all() for hashes, by_hash in hashed):
        distinct, option = num_distinct(cfg.out, num_units), "val_docs" if cfg.val_docs else "val_fraction"
        reason = f"{option}={getattr(cfg, option)} holds out all {distinct:,} distinct texts (lower it)"
        if distinct == 1:
            hint = "one is always held out; a line is a document unless --doc_sep says otherwise"
            reason = f"there is a single distinct text ({hint})"
        raise UserError(f"{cfg.source}: no text to train on: {reason}")
    return threshold


def num_distinct(out, num_units):
    """How many different documents there are."""
    documents = sum(len(load_hashes(out, number)[0]) for number in range(num_units))
    return documents - sum(map(len, find_duplicates(out, num_units)))


def find_duplicates(out, num_units):
    """For each unit, the indices of documents that occurred before, in the unit or an earlier one: a list of arrays.

    Sorts the hashes in 16 passes by their top bits: 2.5 bytes of memory a document, and 8 more a duplicate.
    """
    starts = np.cumsum([0] + [len(load_hashes(out, number)[0]) for number in range(num_units)])
    duplicates = [np.empty(0, np.int64)]
    for top_bits in range(16):
        hashes, indices = [], []
        for number in range(num_units):
            of_unit, _ = load_hashes(out, number)
            here = np.flatnonzero(of_unit >> np.uint64(60) == top_bits)
            hashes.append(of_unit[here])
            indices.append(here + starts[number])
        hashes, indices = np.concatenate(hashes), np.concatenate(indices)
        order = np.argsort(hashes, kind="stable")
        hashes = hashes[order]
        duplicates.append(indices[order[1:][hashes[1:] == hashes[:-1]]])
    duplicates = np.sort(np.concatenate(duplicates))
    bounds = np.searchsorted(duplicates, starts)
    return [duplicates[bounds[i] : bounds[i + 1]] - starts[i] for i in range(num_units)]


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer, and an estimate of the shards' size


def training_texts(units, cfg, threshold, limit):
    """Documents of the training split. If there is more text than `limit` characters, each segment gives its share."""
    segments = list(itertools.chain(*units))
    total, count = sum(segment.size for segment in segments), 0
    if total > limit:  # bytes on disk, compressed or not: a lower bound of the characters
        segments = spread(segments, 64)  # opening all of C4's files would take longer than reading some
        total = sum(segment.size for segment in segments)
    for segment in segments:
        left = limit * segment.size / total if total > limit else limit
        for text in documents(segment, cfg, Counter()):
            if not is_held_out(segment, text_hash(text), threshold):
                yield text
                left -= len(text)
            count += 1
            if left <= 0 or count == cfg.max_docs:
                break
        if count == cfg.max_docs > 0:
            return


def spread(items, count):
    """`count` evenly spaced items, or all of them."""
    return [items[i * len(items) // count] for i in range(count)] if len(items) > count else items


def inspect_sample(units, cfg, tokenizer):
    """(approximate size of all shards, share of unknown characters), extrapolated from the beginnings of some segments."""
    segments = list(itertools.chain(*units))
    chosen = spread(segments, SAMPLE_SEGMENTS)
    unknown_token = tokenizer.token_to_id("[UNK]")
    source = shards = count = known = unknown = 0
    for segment in chosen:
        stats, texts, chars = Counter(), [], 0
        for text in documents(segment, cfg, stats):
            texts.append(text)
            chars += len(text)
            if chars >= SAMPLE_CHARS // len(chosen):
                break
        else:
            stats["segment bytes"] = segment.size
        read, ids = encode(tokenizer, [beginning(text, SAMPLE_CHARS) for text in texts], cfg.max_doc_tokens)
        for text, part, tokens in zip(texts, read, ids):
            num_tokens = len(tokens) * len(text) / max(1, len(part))  # of a huge text only the beginning was tokenized
            if cfg.max_doc_tokens:
                num_tokens = min(len(tokens), cfg.max_doc_tokens)
            shards += 8 + bytes_per_token(tokenizer) * num_tokens
            hidden = unknown_characters(tokenizer, part, unknown_token) if unknown_token in tokens else 0
            unknown += hidden
            known += letters(part) - hidden
        source += stats["segment bytes"]
        count += len(texts)
    everything = shards * sum(segment.size for segment in segments) / max(1, source)
    estimate = int(min(everything, shards / max(1, count) * (cfg.max_docs or np.inf)))
    return estimate, unknown / max(1, known + unknown)


def bytes_per_token(tokenizer):
    return 2 if tokenizer.get_vocab_size() <= 2**16 else 4


# ---------------------------------------------------------------------------------------------------------------------
# Tokenize, and write shards


class ShardWriter:
    """Writes the documents of unit `number`: a shard whenever a split has shard_tokens tokens, and the rest at the end."""

    def __init__(self, number, cfg, tokenizer, tokenizer_digest):
        self.number, self.cfg, self.tokenizer_digest = number, cfg, tokenizer_digest
        self.bytes_per_token = bytes_per_token(tokenizer)
        self.entries = []  # of the manifest
        self.documents, self.num_tokens = {"train": [], "val": []}, Counter()

    def add(self, split, tokens):
        self.documents[split].append(np.array(tokens, f"<u{self.bytes_per_token}"))
        self.num_tokens[split] += len(tokens)
        if self.num_tokens[split] >= self.cfg.shard_tokens:
            self.flush(split)

    def flush(self, split):
        if self.documents[split]:
            index = sum(entry["split"] == split for entry in self.entries)
            path = os.path.join(self.cfg.out, f"{split}_{self.number:05d}_{index:03d}.bin")
            entry = write_shard(path, self.documents[split], self.bytes_per_token, self.tokenizer_digest)
            self.entries.append({"split": split, **entry})
            self.documents[split], self.num_tokens[split] = [], 0

    def num_bytes(self):
        return sum(entry["bytes"] for entry in self.entries)


def process_unit(number, unit, cfg, threshold):
    """Write the shards of a unit, then unit_path: its shards, statistics, examples. Returns the number of bad lines.

    Statistics are a flat Counter, so that they add up over units; "length 2^k" counts documents of k bits of length.
    """
    tokenizer_path = os.path.join(cfg.out, "tokenizer.json")
    tokenizer, special = load_tokenizer(tokenizer_path)
    other = load_tokenizer(work_path(cfg.out, "other.json")) if cfg.compare_tokenizer else None
    writer = ShardWriter(number, cfg, tokenizer, bytes.fromhex(file_digest(tokenizer_path)))
    duplicates = set(np.load(work_path(cfg.out, f"dropped_{number:05d}.npy")).tolist()) if cfg.dedup else ()
    hashes, by_hash, longest, examples, stats = [], [], [], [], Counter()

    def batches():
        """(list of (split, path, text), bytes of the source read): about BATCH_CHARS of text each."""
        batch, chars, of_segment = [], 0, Counter()
        for segment, text in unit_documents(unit, cfg, stats):
            hashes.append(text_hash(text))
            by_hash.append(not segment.split)
            of_segment[segment] += 1
            if len(hashes) - 1 in duplicates:
                continue
            batch.append(("val" if is_held_out(segment, hashes[-1], threshold) else "train", segment.path, text))
            stats["characters"] += len(text)
            chars += len(text)
            if len(longest) < NUM_LONGEST or len(text) > longest[0][0]:
                entry = (len(text), segment.path, segment.start, of_segment[segment], text[:80])
                (heapq.heappush if len(longest) < NUM_LONGEST else heapq.heappushpop)(longest, entry)
            if chars >= BATCH_CHARS:
                yield batch, stats["source bytes"]
                batch, chars = [], 0
        if batch:
            yield batch, stats["source bytes"]
        for segment in unit if not cfg.max_docs else ():
            if segment.start == 0 and not of_segment[segment]:
                stats[f"without text {segment.path}"] += 1

    def tokenize(item):
        batch, source_bytes = item
        splits, paths, texts = zip(*batch)
        return splits, paths, *encode(tokenizer, list(texts), cfg.max_doc_tokens), source_bytes

    def say_progress(source_bytes):
        report_progress({
            "documents": stats["documents train"] + stats["documents val"],
            "tokens": stats["tokens train"] + stats["tokens val"],
            "characters": stats["characters"],
            "source bytes": source_bytes,
            "shard bytes": writer.num_bytes(),
        })  # fmt: skip

    # The tokenizer runs in another thread, without the GIL.
    for splits, paths, texts, ids, source_bytes in prefetch(tokenize, batches()):
        if other and stats["compared characters"] < COMPARE_CHARS:
            compare(stats, texts, ids, special, *other)
        examples = most_changed(examples, inspect_changes(stats, paths, texts, tokenizer, special["[UNK]"]))
        for split, text, tokens in zip(splits, texts, ids):
            stats["tokens read"] += len(tokens)
            words = text.split()
            stats["words read"] += len(words)
            stats["letters read"] += sum(map(len, words))
            if special["[UNK]"] in tokens:
                stats["unknown letters"] += unknown_characters(tokenizer, text, special["[UNK]"])
            stats["bytes read"] += len(text.encode("utf-8", "surrogatepass"))
            tokens = tokens[: cfg.max_doc_tokens or None]
            if not tokens:
                stats["empty documents"] += 1
                continue
            writer.add(split, tokens)
            stats[f"documents {split}"] += 1
            stats[f"tokens {split}"] += len(tokens)
            stats["unknown tokens"] += tokens.count(special["[UNK]"])
            stats[f"length 2^{len(tokens).bit_length()}"] += 1
            for length in FILL_LENGTHS:
                stats[f"fill {length}"] += min(len(tokens) + 2, length)
        say_progress(source_bytes)
    writer.flush("train")
    writer.flush("val")
    say_progress(stats["source bytes"])
    if not os.path.exists(hash_path(cfg.out, number)):
        save_hashes(cfg.out, number, hashes, by_hash)
    result = {"shards": writer.entries, "stats": dict(stats), "longest": longest, "examples": examples}
    write_text(unit_path(cfg.out, number), json.dumps(result))
    return stats["bad lines"]


def inspect_changes(stats, paths, texts, tokenizer, unknown):
    """Count the characters that normalization changes, in about INSPECT_CHARS of the texts; yields an example of each.

    An example is (how many characters of it were changed or are unknown, how many are not ASCII, the original, what its
    tokens decode to, its file).
    """
    chars, step = 0, -(-sum(map(len, texts)) // INSPECT_CHARS)
    for path, text in zip(paths[::step], texts[::step]):
        text = text[: INSPECT_CHARS - chars]
        chars += len(text)
        stats["letters inspected"] += letters(text)
        stats["letters changed"] += changed_characters(tokenizer, text)
        line = text[:EXAMPLE_CHARS]
        differing = changed_characters(tokenizer, line) + unknown_characters(tokenizer, line, unknown)
        ids = tokenizer.encode(line, add_special_tokens=False).ids
        not_ascii = sum(not character.isascii() for character in line)
        yield differing, not_ascii, line, tokenizer.decode(ids, skip_special_tokens=False), path
        if chars >= INSPECT_CHARS:
            return


def most_changed(*examples):
    """NUM_EXAMPLES of them: the most changed one of each file, then the next ones; of equals, the least English."""
    ranked, rank_in_file = [], Counter()
    for example in sorted(itertools.chain(*examples), key=lambda example: (-example[0], -example[1])):
        ranked.append((rank_in_file[example[-1]], example))
        rank_in_file[example[-1]] += 1
    return [example for _, example in sorted(ranked, key=lambda pair: pair[0])[:NUM_EXAMPLES]]


def compare(stats, texts, ids, special, other, other_special):
    """Count the tokens that both tokenizers make of the same texts."""
    _, other_ids = encode(other, texts)
    stats["compared characters"] += sum(map(len, texts))
    stats["compared words"] += sum(len(text.split()) for text in texts)
    stats["compared bytes"] += sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
    for name, of_texts, unknown in (("this", ids, special["[UNK]"]), ("other", other_ids, other_special["[UNK]"])):
        stats[f"compared tokens {name}"] += sum(map(len, of_texts))
        stats[f"compared unknown {name}"] += sum(tokens.count(unknown) for tokens in of_texts)


def run_units(work, path_of, numbers, units, cfg, progress, *arguments):
    """Run work(number, unit, cfg, *arguments) for those of the units whose file, path_of(out, number), is missing."""
    jobs = [(number, units[number], cfg, *arguments) for number in numbers if not os.path.exists(path_of(cfg.out, number))]
    # With few units, the tokenizer's own threads use the cores that get no process.
    threads = cfg.workers if len(jobs) < 2 * cfg.workers else 1
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    bad_lines = 0

    def check(count):
        nonlocal bad_lines
        bad_lines += count
        check_bad_lines(cfg, bad_lines)

    run_jobs(work, jobs, cfg.workers, progress, check)


def check_bad_lines(cfg, count):
    if count > cfg.skip_bad_lines:
        reason = f"{count} bad lines, but --skip_bad_lines={cfg.skip_bad_lines}"
        raise UserError(f"{cfg.source}: {reason} (raise it, and the same command resumes)")


# ---------------------------------------------------------------------------------------------------------------------
# The report


def make_report(stats, longest, examples, cfg, vocab_size, seconds):
    """What the corpus contains, as plain numbers; the last three depend on the machine."""
    num_docs = stats["documents train"] + stats["documents val"]
    num_tokens = stats["tokens train"] + stats["tokens val"]
    bits = sorted(int(name.split("^")[1]) for name in stats if name.startswith("length"))
    report = {
        "documents": num_docs,
        "documents_held_out": stats["documents val"],
        "documents_empty": stats["empty documents"],
        "documents_duplicate": stats["duplicates"],
        "duplicates_removed": cfg.dedup,
        "bad_lines_skipped": stats["bad lines"],
        "skipped": names_of(stats, "skipped "),
        "suspect": names_of(stats, "suspect "),
        "files_without_text": names_of(stats, "without text "),
        "tokens": num_tokens,
        "tokens_held_out": stats["tokens val"],
        "vocab_size": vocab_size,
        "tokens_per_word": round(stats["tokens read"] / max(1, stats["words read"]), 4),
        "bytes_per_token": round(stats["bytes read"] / max(1, stats["tokens read"]), 4),
        "unknown_percent": round(100 * stats["unknown tokens"] / num_tokens, 4),
        "unknown_characters_percent": round(100 * stats["unknown letters"] / max(1, stats["letters read"]), 4),
        "changed_characters_percent": round(100 * stats["letters changed"] / max(1, stats["letters inspected"]), 4),
        "decoded": [{"text": text, "tokens": decoded} for _, _, text, decoded, _ in examples],
        **{f"fill_at_{n}": round(stats[f"fill {n}"] / num_docs / n, 4) for n in FILL_LENGTHS},
        "lengths": {f"{2 ** (bit - 1)}-{2**bit - 1}": stats[f"length 2^{bit}"] for bit in bits},
        "longest": [
            {"characters": chars, "file": path, "from_byte": start, "document": number, "text": text}
            for chars, path, start, number, text in longest
        ],
    }
    if cfg.compare_tokenizer:
        report["compared"] = {"with": cfg.compare_tokenizer, "bytes": stats["compared bytes"]}
        for name in ("this", "other"):
            tokens = max(1, stats[f"compared tokens {name}"])
            report["compared"][name] = {
                "tokens_per_word": round(tokens / max(1, stats["compared words"]), 4),
                "bytes_per_token": round(stats["compared bytes"] / tokens, 4),
                "unknown_percent": round(100 * stats[f"compared unknown {name}"] / tokens, 4),
            }
    return report | {
        "characters": stats["characters"],
        "seconds": round(seconds, 2),
        "tokens_per_second": round(num_tokens / seconds),
        "megabytes_per_second": round(stats["characters"] / seconds / 1e6, 2),
    }


def names_of(stats, prefix):
    """What a Counter's names with this prefix say, NUM_SKIPPED of them at most."""
    return [name.removeprefix(prefix) for name in itertools.islice((n for n in stats if n.startswith(prefix)), NUM_SKIPPED)]


EXPLAINED = {
    "documents_held_out": "for evaluation",
    "documents_empty": "left out: they hold nothing but blanks",
    "documents_duplicate": "texts that occurred before (--dedup=true removes them)",
    "tokens_held_out": "for evaluation",
    "unknown_percent": "of the tokens are [UNK]",
    "unknown_characters_percent": "of the characters are hidden by [UNK]",
    "changed_characters_percent": "of the characters are changed by the tokenizer's normalization, beyond case",
    "fill_at_128": "share of a sample of 128 tokens that a document fills, on average",
    "fill_at_512": "the same of 512 tokens",
    "lengths": "how many documents have so many tokens",
    "suspect": "read, but look at it",
    "files_without_text": "gave no document",
    "longest": "the longest documents",
    "decoded": "a text, and what its tokens decode to",
    "compared": "this tokenizer, and the one of --compare_tokenizer",
}


def print_report(report, cfg):
    for name, value in report.items():
        if name == "skipped":
            value = by_file(value, report["bad_lines_skipped"])
        if isinstance(value, list) and len(value) > NUM_PRINTED:
            value = [*value[:NUM_PRINTED], f"and {len(value) - NUM_PRINTED:,} more, see report.json"]
        for number, item in enumerate(value if isinstance(value, list) else [value]):
            plain = isinstance(item, (int, float)) and not isinstance(item, bool)
            text = f"{item:,}" if plain else item if isinstance(item, str) else json.dumps(item, ensure_ascii=False)
            print(f"{name:26s} {text}{f'  ({EXPLAINED[name]})' if name in EXPLAINED and number == 0 else ''}")
    hint = "one for this text: --train_tokenizer"
    if cfg.train_tokenizer:
        hint = "a new vocabulary needs more entries, or more text"
    for name, reason in (
        ("unknown_characters_percent", f"are unknown to the tokenizer, and hidden by [UNK] (see decoded; {hint})"),
        ("changed_characters_percent", "lose accents, vowel signs or other marks (see decoded)"),
    ):
        if report[name] >= WARN_PERCENT:
            print(f"warning: {report[name]:.1f} % of the characters {reason}")


def by_file(skipped, count):
    """One text for each file with skipped lines. count: of all, of which `skipped` may name only the first."""
    files = {}
    for text in skipped:
        path, line, reason = re.fullmatch(r"(.+?): ?((?:record )?\d+)?(?:: )?(.*)", text).groups()
        files.setdefault(path, []).append(f"{line}: {reason}" if line else reason)
    lines = [f"{path}: {len(found):,} skipped, the first {found[0]}" for path, found in files.items()]
    return lines + ([f"and {count - len(skipped):,} more"] if count > len(skipped) else [])


def no_text(cfg, stats):
    """The UserError for a source that leaves nothing to train on."""
    kinds = {"documents val": "held out (see --val_fraction)", "empty documents": "empty", "bad lines": "skipped as unreadable"}
    found = [f"{stats[kind]:,} {text}" for kind, text in kinds.items() if stats[kind]]
    first = [f"the first was {text}" for text in names_of(stats, "skipped ")[:1]]
    return UserError(f"{cfg.source}: no text to train on: {', '.join([*found, *first]) or 'its files are empty'}")


# ---------------------------------------------------------------------------------------------------------------------
# The run


def given_tokenizers(cfg):
    """{path: contents} of the tokenizers to copy that the output doesn't have yet. Raises: UserError."""
    names = {
        os.path.join(cfg.out, "tokenizer.json"): "" if cfg.train_tokenizer else cfg.tokenizer,
        work_path(cfg.out, "other.json"): cfg.compare_tokenizer,
    }
    wanted = {path: name for path, name in names.items() if name and not os.path.exists(path)}
    return {path: read_tokenizer(name, cfg.cased, beside=True) for path, name in wanted.items()}


def prepare(cfg, plan, units, given):
    """Fill the output directory, from wherever an earlier run stopped. given: given_tokenizers."""
    start, own = time.perf_counter(), share_of(cfg, len(units))
    out, tokenizer_path = cfg.out, os.path.join(cfg.out, "tokenizer.json")
    unit_bytes = [sum(segment.size for segment in unit) for unit in units]
    little = cfg.max_docs or sum(unit_bytes) <= HASHED_BYTES
    little = little and not any(segment.split for segment in plan["sources"])
    hashed = bool(cfg.val_docs or cfg.dedup or little)
    if hashed:  # a task needs everybody's hashes: it does what is still missing after its own share
        first_own = sorted(range(len(units)), key=lambda number: number not in own)
        run_units(hash_unit, hash_path, first_own, units, cfg, Progress(sum(unit_bytes)))
        if not any(len(load_hashes(out, number)[0]) for number in range(len(units))):
            stats = Counter()
            for _ in itertools.chain.from_iterable(unit_documents(unit, cfg, stats) for unit in units):
                pass
            raise no_text(cfg, stats)
    if cfg.dedup:
        for number, indices in enumerate(find_duplicates(out, len(units))):
            with whole_file(work_path(out, f"dropped_{number:05d}.npy")) as file:
                np.save(file, indices)
    threshold = val_threshold(len(units) if cfg.val_docs or little else 0, cfg)
    for path, text in given.items():
        write_once(path, text)
    if not os.path.exists(tokenizer_path):  # a resumed run keeps it, as training a tokenizer is not deterministic
        texts = functools.partial(training_texts, units, cfg, threshold, TOKENIZER_TRAIN_CHARS)
        write_once(tokenizer_path, train_tokenizer(texts, cfg.train_tokenizer, cfg.cased, cfg.strip_accents))
    tokenizer, _ = load_tokenizer(tokenizer_path)
    done = [number for number in range(len(units)) if os.path.exists(unit_path(out, number))]
    estimate, unknown = inspect_sample(units, cfg, tokenizer)
    if unknown > MAX_UNKNOWN and not done:
        for path in (tokenizer_path, work_path(out, "other.json")):  # the command can be repeated with others
            with contextlib.suppress(FileNotFoundError):  # another task came to the same end
                os.remove(path)
        hint = "choose another --tokenizer, or make one of the text's own pieces: --train_tokenizer=8192"
        if cfg.train_tokenizer:
            hint = "a new vocabulary needs more entries, or more text; or choose an existing --tokenizer"
        reason = f"{unknown:.0%} of the characters are unknown to the tokenizer, and become [UNK]"
        raise UserError(f"{cfg.source}: {reason} ({hint})")
    check_disk(out, estimate)

    if done:
        print(f"{len(done)} of {len(units)} units were already done")
    left = sum(unit_bytes[number] for number in own if number not in done)
    estimate = estimate * sum(unit_bytes[number] for number in own) / max(1, sum(unit_bytes))
    run_units(process_unit, unit_path, own, units, cfg, Progress(left, estimate), threshold)
    if cfg.task:
        missing = len(missing_units(out, units))
        rest = f"{missing} of {len(units)} units are left to other tasks" if missing else "the last one: now --join"
        print(f"{out}: task {cfg.task} is done ({rest})")
        return

    results = [read_json(unit_path(out, number), "remove the file to redo the unit") for number in range(len(units))]
    stats = sum((Counter(result["stats"]) for result in results), Counter())
    check_bad_lines(cfg, stats["bad lines"])
    if changed := changed_files(plan["modified"], modification_times(plan["sources"])):
        raise UserError(f"{changed[0]}: was changed while it was read (remove {out}, and start again)")
    if not stats["documents train"]:
        raise no_text(cfg, stats)
    if not stats["documents val"] and (cfg.val_fraction or cfg.val_docs):
        some = max(1, min(100, stats["documents train"] // 20))
        raise UserError(f"{cfg.source}: no document was held out (try --val_docs={some} and a new --out)")
    stats["duplicates"] = sum(map(len, find_duplicates(out, len(units))))
    longest = heapq.nlargest(NUM_LONGEST, itertools.chain(*(result["longest"] for result in results)))
    examples = most_changed(*(result.get("examples", ()) for result in results))
    report = make_report(stats, longest, examples, cfg, tokenizer.get_vocab_size(), time.perf_counter() - start)
    write_text(os.path.join(out, "report.json"), json.dumps(report, indent=1, ensure_ascii=False))
    manifest = {
        "format": 1,
        "tokenizer_sha256": file_digest(tokenizer_path),
        "vocab_size": tokenizer.get_vocab_size(),
        **plan,
        "shards": [entry for result in results for entry in result["shards"]],
    }
    write_text(os.path.join(out, "manifest.json"), json.dumps(manifest, indent=1))
    print(f"checking {gigabytes(sum(entry['bytes'] for entry in manifest['shards']))} of shards", flush=True)
    verify(out)
    shutil.rmtree(work_path(out, ""))
    print_report(report, cfg)
    print(f"{out}: finished (after copying it: python -m tools.verify {out})")


@command
def main(argv):
    cfg = load_config(PrepareConfig, argv)
    cfg.check()
    earlier, finished = read_plan(cfg.out)
    segments = list_segments(cfg.source, cfg.doc_sep, earlier["sources"] if earlier else (), cfg.out)
    options = {name: value for name, value in asdict(cfg).items() if name not in FREE_OPTIONS}
    plan = {"options": options, "sources": segments, "modified": modification_times(segments)}
    if earlier:
        try:
            check_same(cfg.out, plan, earlier)
        except UserError:
            names = [*os.listdir(cfg.out), *([] if finished else os.listdir(work_path(cfg.out, "")))]
            if any(name not in (".work", "plan.json") and not name.startswith("hashes_") for name in names):
                raise
            earlier = None  # it failed before it made anything but hashes
    if finished:
        for split in ("train", "val"):
            Samples(cfg.out, split, seq_length=128)  # raises UserError if a file is missing, or of another size
        shutil.rmtree(work_path(cfg.out, ""), ignore_errors=True)
        print(f"{cfg.out}: already finished, nothing to do (python -m tools.verify {cfg.out} checks every byte)")
        return
    units = group_units(segments, whole=cfg.max_docs > 0)
    if cfg.join and (missing := missing_units(cfg.out, units)):
        hint = "wait for the tasks, or run them again: nothing is done twice"
        raise UserError(f"{cfg.out}: {len(missing)} of {len(units)} units of work are missing ({hint})")
    given = given_tokenizers(cfg)  # what is wrong with them is said before any work
    lock = lock_directory(cfg.out, shared=bool(cfg.task))
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        enter_output(cfg.out, plan, earlier is not None, cfg.task)
        prepare(cfg, plan, units, given)
    except KeyboardInterrupt:
        done = len(units) - len(missing_units(cfg.out, units))
        raise KeyboardInterrupt(f"the same command goes on from {done} of {len(units)} units of work") from None
    except OSError as error:
        raise UserError(f"{cfg.out}: {error.strerror} (finished units are kept; the same command resumes)") from None
    finally:
        signal.signal(signal.SIGTERM, previous)
        os.close(lock)


if __name__ == "__main__":
    main()
