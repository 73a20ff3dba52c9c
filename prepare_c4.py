"""Turn text into token shards: C4, any dataset on the hub, your own files, or the English that every Python ships.

    python prepare_c4.py --source=c4 --max_doc_tokens=126 --out=data/c4
    python prepare_c4.py --source=books/,articles.jsonl.zst --train_tokenizer=32768 --out=data/mine

The source is divided into units of work, and each unit writes its own shards. So any number of processes can share the
units and the shards come out the same, and an interrupted run resumes with the units that are missing. A hash of its
text decides whether a document is held out for evaluation, so adding data moves no other one (of a small corpus: if
you name a --val_fraction).

Read next: common/sources.py, for what can be read, or data.py, for the format of a shard
"""

import common  # noqa: F401, I001, before anything that may be missing

import contextlib
import functools
import glob
import heapq
import itertools
import json
import os
import re
import shutil
import time
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np

from common import corpus_report
from common.corpus_report import FILL_LENGTHS, NUM_LONGEST, most_changed, no_text
from common.files import file_digest, gigabytes, lock_directory, read_json, whole_file, without_slash, write_once, write_text
from common.hashes import NOTHING_HELD_OUT, find_duplicates, hash_path, is_held_out, load_hashes, save_hashes, text_hash
from common.hashes import val_threshold
from common.lines import split_suffixes
from common.options import UserError, command, hint_for, load_config, require, stoppable
from common.sources import Segment, documents, list_segments, versions
from common.vocabulary import beginning, encode, is_blank, letters, load_tokenizer, read_tokenizer, special_names
from common.vocabulary import train_tokenizer, unknown_characters
from common.workers import Progress, report_progress, run_jobs
from data import Samples, prefetch, verify, write_shard

UNIT_BYTES = 64 * 2**20  # a unit takes segments up to this size on disk, and at least one
HASHED_BYTES = 2**30  # of text, up to which all hashes are known before the split: it takes a few % of the time
BATCH_CHARS = 2**20  # text per call of the tokenizer
TOKENIZER_TRAIN_CHARS = 300 * 10**6  # text to train a tokenizer on, at most
SAMPLE_SEGMENTS, SAMPLE_CHARS = 4, 10**6  # text from which the size of the shards is estimated
MAX_UNKNOWN = 0.95  # share of unknown characters from which a tokenizer is refused


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
    val_fraction: float = 0.005  # share of documents held out, by their hash (c4 has files); at least 1, by default 100 or 5 %
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
        require(self, "max_docs skip_bad_lines val_docs max_doc_tokens", lambda x: x >= 0, "must not be negative")
        require(self, "shard_tokens workers", lambda x: x >= 1, "must be at least 1")
        require(self, "val_fraction", lambda x: 0 <= x < 1, "must be at least 0 and below 1")
        require(self, "train_tokenizer", lambda x: x == 0 or x >= 100, "a vocabulary needs at least 100 entries (0: none)")
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


def check_used(cfg, segments):
    """Raises: UserError for an option that no file of the source uses."""
    kinds = {split_suffixes(segment.path)[0] for segment in segments}
    if cfg.text_key != PrepareConfig.text_key and not kinds - {".txt", ""}:
        raise UserError(f"text_key={cfg.text_key}: --source={cfg.source} has no keys or columns (.txt holds text alone)")
    if cfg.doc_sep != PrepareConfig.doc_sep and ".txt" not in kinds:
        raise UserError(f"doc_sep={cfg.doc_sep}: only for .txt, and --source={cfg.source} has none")


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
    before = {"strip_accents": bool(options.get("train_tokenizer")) and not options.get("cased"), **earlier["options"]}
    names = [name for name, value in options.items() if without_slash(before.get(name)) != without_slash(value)]
    differing = [f"{name} was {before.get(name)!r} and is {options[name]!r}" for name in names]
    changed = changed_files(earlier.get("modified", {}), plan["modified"])
    if earlier["sources"] != plan["sources"] or changed:
        differing.append(f"{changed[0]} was changed" if changed else "other source files")
    if differing:
        raise UserError(f"{out}: holds shards that differ: {', '.join(differing)} (choose another --out, or remove it)")


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
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(work_path(out, ""))
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


def finish_output(out, plan, shards, tokenizer, report):
    """Write report.json and manifest.json, check every byte, and remove what only an unfinished directory needs.

    shards: the manifest's entries for them.
    """
    write_text(os.path.join(out, "report.json"), json.dumps(report, indent=1, ensure_ascii=False))
    about = {"tokenizer_sha256": file_digest(os.path.join(out, "tokenizer.json")), "vocab_size": tokenizer.get_vocab_size()}
    write_text(os.path.join(out, "manifest.json"), json.dumps({"format": 1, **about, **plan, "shards": shards}, indent=1))
    print(f"checking {gigabytes(sum(entry['bytes'] for entry in shards))} of shards", flush=True)
    verify(out)
    shutil.rmtree(work_path(out, ""))


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
            if not is_blank(text):
                yield segment, text
            else:
                stats["empty documents"] += 1
            count += 1
            if count == cfg.max_docs:
                unread = len({other.path for other in unit} - {other.path for other in unit[: unit.index(segment) + 1]})
                more = f"; {unread:,} file{'s' * (unread > 1)} not read" if unread else ""
                stats[f"stopped after {count:,} document{'s' * (count > 1)} (--max_docs), in {segment.path}{more}"] += 1
                return
        finished += segment.size
        stats["source bytes"], stats["segment bytes"] = finished, 0


def hash_unit(number, unit, cfg):
    """Save the hashes of a unit's documents: a pass of its own where they are needed first, or for little text.

    Returns the number of bad lines.
    """
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
    unknown_token = tokenizer.token_to_id(special_names(tokenizer)["[UNK]"])
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
    tokenizer, special = load_tokenizer(tokenizer_path, literal=True)
    other = load_tokenizer(work_path(cfg.out, "other.json"), literal=True) if cfg.compare_tokenizer else None
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
            corpus_report.count_broken(stats, segment.path, text)
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
        counts = {name: stats[f"{name} train"] + stats[f"{name} val"] for name in ("documents", "tokens")}
        counts |= {"characters": stats["characters"], "source bytes": source_bytes, "shard bytes": writer.num_bytes()}
        report_progress(counts)

    # The tokenizer runs in another thread, without the GIL.
    for splits, paths, texts, ids, source_bytes in prefetch(tokenize, batches()):
        sample, weight = corpus_report.passages(paths, texts)
        examples = most_changed(examples, corpus_report.inspect_changes(stats, sample, weight, tokenizer, special["[UNK]"]))
        if other:
            corpus_report.compare(stats, sample, weight, (tokenizer, special), other)
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
# The run


def given_tokenizers(cfg):
    """{path: contents} of the tokenizers to copy that the output doesn't have yet. Raises: UserError."""
    names = {
        os.path.join(cfg.out, "tokenizer.json"): "" if cfg.train_tokenizer else cfg.tokenizer,
        work_path(cfg.out, "other.json"): cfg.compare_tokenizer,
    }
    wanted = {path: name for path, name in names.items() if name and not os.path.exists(path)}
    return {path: read_tokenizer(name, cfg.cased) for path, name in wanted.items()}


def prepare(cfg, plan, units, given):
    """Fill the output directory, from wherever an earlier run stopped. given: given_tokenizers."""
    start, own = time.perf_counter(), share_of(cfg, len(units))
    has_split = any(segment.split for segment in plan["sources"])
    if not (cfg.val_fraction or cfg.val_docs or has_split):
        print(NOTHING_HELD_OUT)
    out, tokenizer_path = cfg.out, os.path.join(cfg.out, "tokenizer.json")
    unit_bytes = [sum(segment.size for segment in unit) for unit in units]
    little = (cfg.max_docs or sum(unit_bytes) <= HASHED_BYTES) and not has_split
    hashed_first = cfg.val_docs or little  # the split depends on all hashes
    if hashed_first or cfg.dedup:  # a task needs everybody's hashes, and makes the missing ones after its own
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
    threshold = val_threshold(len(units) if hashed_first else 0, cfg)
    for path, text in given.items():
        write_once(path, text)
    if not os.path.exists(tokenizer_path):  # a resumed run keeps it, as training a tokenizer is not deterministic
        texts = functools.partial(training_texts, units, cfg, threshold, TOKENIZER_TRAIN_CHARS)
        write_once(tokenizer_path, train_tokenizer(texts, cfg.train_tokenizer, cfg.cased, cfg.strip_accents))
    tokenizer, _ = load_tokenizer(tokenizer_path, literal=True)
    done = [number for number in range(len(units)) if os.path.exists(unit_path(out, number))]
    estimate, unknown = inspect_sample(units, cfg, tokenizer)
    if unknown > MAX_UNKNOWN and not done:
        for path in (tokenizer_path, work_path(out, "other.json")):  # the command can be repeated with others
            with contextlib.suppress(FileNotFoundError):  # another task came to the same end
                os.remove(path)
        hint = "choose another --tokenizer, or make one of the text's own pieces: --train_tokenizer=8192"
        if cfg.train_tokenizer:
            hint = "a new vocabulary needs more entries, or more text; or choose an existing --tokenizer"
        reason = f"{unknown:.0%} of the characters other than blanks are unknown to the tokenizer, and become [UNK]"
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
    if changed := changed_files(plan["modified"], versions(plan["sources"], again=True)):
        raise UserError(f"{changed[0]}: was changed while it was read (remove {out}, and start again)")
    if not stats["documents train"]:
        raise no_text(cfg, stats)
    if not stats["documents val"] and (cfg.val_fraction or cfg.val_docs):
        some = max(1, min(100, stats["documents train"] // 20))
        raise UserError(f"{cfg.source}: no document was held out (try --val_docs={some} and a new --out)")
    stats["duplicates"] = sum(map(len, find_duplicates(out, len(units))))
    longest = heapq.nlargest(NUM_LONGEST, itertools.chain(*(result["longest"] for result in results)))
    examples = most_changed(*(result.get("examples", ()) for result in results))
    report = corpus_report.make_report(stats, longest, examples, cfg, tokenizer.get_vocab_size(), time.perf_counter() - start)
    finish_output(out, plan, [entry for result in results for entry in result["shards"]], tokenizer, report)
    corpus_report.print_report(report, cfg)
    for text in corpus_report.names_of(stats, "stopped "):
        print(f"stopped {text}")
    print(f"{out}: finished (after copying it: python -m tools.verify {out})")


@command
def main(argv):
    cfg = load_config(PrepareConfig, argv)
    cfg.check()
    earlier, finished = read_plan(cfg.out)
    segments = list_segments(cfg.source, cfg.doc_sep, earlier["sources"] if earlier else (), cfg.out)
    check_used(cfg, segments)
    options = {name: value for name, value in asdict(cfg).items() if name not in FREE_OPTIONS}
    plan = {"options": options, "sources": segments, "modified": versions(segments)}
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

    def kept():
        done = len(units) - len(missing_units(cfg.out, units))
        return f"the same command goes on from {done} of {len(units)} units of work"

    try:
        with stoppable(kept):
            enter_output(cfg.out, plan, earlier is not None, cfg.task)
            prepare(cfg, plan, units, given)
    except OSError as error:
        hint = hint_for(error, "finished units are kept; the same command resumes")
        raise UserError(f"{error.filename or cfg.out}: {error.strerror or error} ({hint})") from None
    finally:
        os.close(lock)


if __name__ == "__main__":
    main()
