"""Turn text into token shards: C4, any dataset of the hub, your own files, or the English that every Python ships.

    python prepare_c4.py --source=c4 --max_doc_tokens=126 --out=data/c4
    python prepare_c4.py --source=books/,articles.jsonl.zst --train_tokenizer=32768 --out=data/mine

The work is cut into units, each some pieces of the source, and each unit makes shards of its own. So it takes as many
processes as there are units, the shards do not depend on how many, and a run that was interrupted goes on with the
units that are not done. A document is held out for evaluation by a hash of its text, so adding data never moves another.

Read next: sources.py, for what can be read, or data.py, for the shards' format
"""

import concurrent.futures
import datetime
import fcntl
import functools
import glob
import hashlib
import heapq
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np

from common.options import UserError, command, load_config
from common.files import file_digest, gigabytes, read_json, whole_file, write_text
from common.vocabulary import load_tokenizer
from data import prefetch, verify, write_shard
from common.sources import Piece, documents, list_pieces
from common.vocabulary import beginning, encode, read_tokenizer, train_tokenizer

UNIT_BYTES = 64 * 2**20  # small pieces are taken together up to this size on disk
BATCH_CHARS = 2**20  # of text that go to the tokenizer at once
TOKENIZER_TRAIN_CHARS = 300 * 10**6  # of text that a new tokenizer is made from, at most
COMPARE_CHARS = 10**6  # of text of each unit on which --compare_tokenizer is compared
SAMPLE_PIECES, SAMPLE_CHARS = 4, 10**6  # of text from which the size of the shards is estimated
REPORT_SECONDS = 10  # between lines of progress
FILL_LENGTHS = (128, 512)  # for which the report says how full samples are
NUM_LONGEST = 5  # documents that the report names


@dataclass
class PrepareConfig:
    # Source
    source: str = ""  # comma-separated: c4, stdlib, owner/name[:config] of the hub, files, directories, globs
    text_key: str = "text"  # which value of a JSON object, or which column, is the text
    doc_sep: Literal["line", "blank", "file"] = "line"  # of .txt: a document is a line, a paragraph, or the whole file
    max_docs: int = 0  # stop after so many documents, read by one process; 0: all
    skip_bad_lines: int = 0  # lines that may be left out because they cannot be read, before it is an error
    dedup: bool = False  # keep only the first of equal documents; reads all twice, in 3 bytes of memory a document
    # Tokenizer
    tokenizer: str = "google-bert/bert-base-uncased"  # tokenizer.json or a directory with one, BERT vocab.txt, or hub id
    train_tokenizer: int = 0  # make a WordPiece vocabulary of so many entries from the training text first; 0: do not
    cased: bool = False  # keep capitals and accents, for a vocab.txt or a new vocabulary
    compare_tokenizer: str = ""  # a second tokenizer: the report says how many tokens it would have taken
    # Output
    out: str = ""  # shard directory
    val_fraction: float = 0.005  # share of documents held out, by a threshold on their hash (c4 has files for it)
    val_docs: int = 0  # hold out so many documents instead, those of the smallest hashes; reads all twice
    max_doc_tokens: int = 0  # keep the first so many tokens of a document; 126 is all 128-token training reads, 1/4 of C4
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


FREE_OPTIONS = ("out", "workers", "skip_bad_lines")  # a run may go on with others: they change no shard


# ---------------------------------------------------------------------------------------------------------------------
# Before the work: the output directory, the tokenizer, the disk


def earlier_plan(out):
    """(options and sources of the run that made or began `out`, whether it finished), or (None, False)."""
    for path, finished in ((os.path.join(out, "manifest.json"), True), (work_path(out, "plan.json"), False)):
        if os.path.exists(path):
            earlier = read_json(path, "not a shard directory of prepare_c4.py; choose another --out")
            try:
                earlier["options"].items()
                return {**earlier, "sources": [Piece(*piece) for piece in earlier["sources"]]}, finished
            except (AttributeError, KeyError, TypeError):
                raise UserError(f"{path}: not written by prepare_c4.py (choose another --out)") from None
    return None, False


def check_same(out, plan, earlier):
    """Raises: UserError if the earlier plan would make other shards."""
    differing = [name for name in plan["options"] if earlier["options"].get(name) != plan["options"][name]]
    if earlier["sources"] != plan["sources"]:
        differing.append("source files")
    if differing:
        raise UserError(f"{out}: made with other {', '.join(differing)} (choose another --out, or remove it)")


def take_directory(out, plan, started):
    """Make or enter the shard directory, and hold it against a second live run until the returned lock is closed."""
    if not started and os.path.isdir(out) and os.listdir(out) not in ([], [".work"]):
        raise UserError(f"{out}: not empty, and not a shard directory (choose another --out)")
    os.makedirs(os.path.join(out, ".work"), exist_ok=True)
    lock = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go when the process ends
        if started:
            for directory in (out, os.path.join(out, ".work")):
                for leftover in glob.glob(os.path.join(glob.escape(directory), "*.tmp")):
                    os.remove(leftover)
        else:
            write_text(work_path(out, "plan.json"), json.dumps(plan))
        return lock
    except BaseException as error:
        os.close(lock)
        if isinstance(error, BlockingIOError):
            raise UserError(f"{out}: in use by a live run (choose another --out)") from None
        raise


def group_units(pieces, whole):
    """Consecutive pieces taken together up to UNIT_BYTES; all of them if `whole`."""
    units, size = [], 0
    for piece in pieces:
        if not units or (not whole and size + piece.size > UNIT_BYTES):
            units.append([])
            size = 0
        units[-1].append(piece)
        size += piece.size
    return units


def make_tokenizer(units, cfg, threshold, path):
    """Write the tokenizer to `path`. It is made once: training is not deterministic, so a resumed run keeps the file."""
    if cfg.train_tokenizer:
        texts = functools.partial(training_texts, units, cfg, threshold, TOKENIZER_TRAIN_CHARS)
        write_text(path, train_tokenizer(texts, cfg.train_tokenizer, cfg.cased))
    else:
        write_text(path, read_tokenizer(cfg.tokenizer, cfg.cased))


def training_texts(units, cfg, threshold, limit):
    """Documents that are not held out, about `limit` characters of them: from every piece its share, if there is more."""
    pieces = list(itertools.chain(*units))
    total, count = sum(piece.size for piece in pieces), 0
    if total > limit:  # on disk, so that there is more text at least; a few pieces are quicker to open than all
        pieces = spread(pieces, 64)
        total = sum(piece.size for piece in pieces)
    for piece in pieces:
        left = limit * piece.size / total if total > limit else limit
        for text in documents(piece, cfg, Counter()):
            if not is_held_out(piece, text_hash(text), threshold):
                yield text
                left -= len(text)
            count += 1
            if left <= 0 or count == cfg.max_docs:
                break
        if count == cfg.max_docs > 0:
            return


def spread(items, count):
    """`count` of the items at equal distances, or all of them."""
    return [items[i * len(items) // count] for i in range(count)] if len(items) > count else items


def estimate_bytes(units, cfg, tokenizer):
    """About how many bytes of shards there will be, from the beginnings of some pieces."""
    pieces = list(itertools.chain(*units))
    source = shards = count = 0
    width = bytes_per_token(tokenizer)
    chosen = spread(pieces, SAMPLE_PIECES)
    for piece in chosen:
        stats, texts, chars = Counter(), [], 0
        for text in documents(piece, cfg, stats):
            texts.append(text)
            chars += len(text)
            if chars >= SAMPLE_CHARS // len(chosen):
                break
        else:
            stats["piece bytes"] = piece.size
        read, ids = encode(tokenizer, [beginning(text, SAMPLE_CHARS) for text in texts], cfg.max_doc_tokens)
        for text, part, tokens in zip(texts, read, ids):
            longer = 1 if cfg.max_doc_tokens else len(text) / max(1, len(part))
            shards += 8 + width * min(longer * len(tokens), cfg.max_doc_tokens or np.inf)
        source += stats["piece bytes"]
        count += len(texts)
    whole = shards * sum(piece.size for piece in pieces) / max(1, source)
    return int(min(whole, shards / max(1, count) * (cfg.max_docs or np.inf)))


def check_disk(out, estimate):
    """Raises: UserError when the estimated shards do not fit on the disk."""
    written = sum(os.path.getsize(path) for path in glob.glob(os.path.join(glob.escape(out), "*.bin")))
    free = shutil.disk_usage(out).free
    print(f"about {gigabytes(estimate)} of shards; {gigabytes(free)} are free")
    if estimate - written > free:
        hint = "choose another --out, or keep less of each document with --max_doc_tokens"
        raise UserError(
            f"{out}: about {gigabytes(estimate - written)} are still to be written, but {gigabytes(free)} are free ({hint})"
        )


def bytes_per_token(tokenizer):
    return 2 if tokenizer.get_vocab_size() <= 2**16 else 4


# ---------------------------------------------------------------------------------------------------------------------
# Hashes: which documents are held out, and which were there before


def text_hash(text):
    """64 bits that stand for a document: whether it is held out, whether it was there before.

    Of 365 million different documents two have the same hash with a probability of 0.4 %.
    """
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def is_held_out(piece, number, threshold):
    return piece.split == "val" if piece.split else number < threshold


def unit_documents(unit, cfg, stats):
    """(piece, text) of every document of a unit that is not blank. Counts in `stats` the source's bytes read."""
    finished = count = 0
    for piece in unit:
        for text in documents(piece, cfg, stats):
            stats["source bytes"] = finished + stats["piece bytes"]
            if text.strip():
                yield piece, text
            else:
                stats["empty documents"] += 1
            count += 1
            if count == cfg.max_docs:
                return
        finished += piece.size
        stats["source bytes"], stats["piece bytes"] = finished, 0


def hash_unit(number, unit, cfg, progress):
    """Write the hashes of a unit's documents, and whether they decide about holding out. Returns the lines left out."""
    hashes, by_hash, stats, told = [], [], Counter(), Counter()
    for piece, text in unit_documents(unit, cfg, stats):
        hashes.append(text_hash(text))
        by_hash.append(not piece.split)
        if len(hashes) % 1000 == 0:
            tell(progress, told, {"documents": len(hashes), "source bytes": stats["source bytes"]})
    save_hashes(cfg.out, number, hashes, by_hash)
    return stats["bad lines"]


def save_hashes(out, number, hashes, by_hash):
    with whole_file(hash_path(out, number)) as file:
        np.savez(file, hashes=np.array(hashes, np.uint64), by_hash=np.array(by_hash, bool))


def hashes_of(out, number):
    with np.load(hash_path(out, number)) as saved:
        return saved["hashes"]


def val_threshold(num_units, cfg):
    """Documents whose hash is below this are held out."""
    if not cfg.val_docs:
        return int(cfg.val_fraction * 2**64)
    smallest = np.empty(0, np.uint64)
    for number in range(num_units):
        with np.load(hash_path(cfg.out, number)) as saved:
            smallest = np.unique(np.concatenate([smallest, saved["hashes"][saved["by_hash"]]]))[: cfg.val_docs]
    return int(smallest[-1]) + 1 if len(smallest) else 0


def repeated_documents(out, num_units):
    """For each unit, which of its documents were there before, in it or in an earlier unit: a list of index arrays.

    One sixteenth of the hashes is looked at at a time: 2.5 bytes of memory a document, and 8 more a repeated one.
    """
    starts = np.cumsum([0] + [len(hashes_of(out, number)) for number in range(num_units)])
    repeated = [np.empty(0, np.int64)]
    for part in range(16):
        found, places = [], []
        for number in range(num_units):
            of_unit = hashes_of(out, number)
            here = np.flatnonzero(of_unit >> np.uint64(60) == part)
            found.append(of_unit[here])
            places.append(here + starts[number])
        found, places = np.concatenate(found), np.concatenate(places)
        order = np.argsort(found, kind="stable")
        found = found[order]
        repeated.append(places[order[1:][found[1:] == found[:-1]]])
    repeated = np.sort(np.concatenate(repeated))
    bounds = np.searchsorted(repeated, starts)
    return [repeated[bounds[i] : bounds[i + 1]] - starts[i] for i in range(num_units)]


# ---------------------------------------------------------------------------------------------------------------------
# Units


def process_unit(number, unit, cfg, progress, threshold):
    """Write the shards of a unit, and then what they are and hold. Returns the lines left out.

    Counts are kept in a flat dict, so that those of units add up; "length 2^k" counts documents by bits of length.
    """
    tokenizer_path = os.path.join(cfg.out, "tokenizer.json")
    tokenizer, special = load_tokenizer(tokenizer_path)
    other, other_special = load_tokenizer(work_path(cfg.out, "other.json")) if cfg.compare_tokenizer else (None, None)
    digest = bytes.fromhex(file_digest(tokenizer_path))
    width = bytes_per_token(tokenizer)
    pending, pending_tokens = {"train": [], "val": []}, Counter()
    shards, stats, told, longest, hashes, by_hash = [], Counter(), Counter(), [], [], []

    def flush(split):
        if not pending[split]:
            return
        index = sum(entry["split"] == split for entry in shards)
        path = os.path.join(cfg.out, f"{split}_{number:05d}_{index:03d}.bin")
        shards.append({"split": split, **write_shard(path, pending[split], width, digest)})
        stats["shard bytes"] += shards[-1]["bytes"]
        pending[split], pending_tokens[split] = [], 0

    def batches():
        """Lists of (split, text) of about BATCH_CHARS each."""
        batch, chars, before, of_piece = [], 0, dropped(cfg, number), Counter()
        for piece, text in unit_documents(unit, cfg, stats):
            hashes.append(text_hash(text))
            by_hash.append(not piece.split)
            of_piece[piece] += 1
            if len(hashes) - 1 in before:
                continue
            batch.append(("val" if is_held_out(piece, hashes[-1], threshold) else "train", text))
            stats["characters"] += len(text)
            chars += len(text)
            if len(longest) < NUM_LONGEST or len(text) > longest[0][0]:
                entry = (len(text), piece.path, piece.start, of_piece[piece], text[:80])
                (heapq.heappush if len(longest) < NUM_LONGEST else heapq.heappushpop)(longest, entry)
            if chars >= BATCH_CHARS:
                yield batch
                batch, chars = [], 0
        if batch:
            yield batch

    def tokenize(batch):
        splits, texts = zip(*batch)
        return splits, *encode(tokenizer, list(texts), cfg.max_doc_tokens)

    # One thread reads and unpacks, one waits for the tokenizer, which is not Python, and this one stores.
    reader = batches()
    ahead = iter(prefetch(lambda _: next(reader, None), itertools.repeat(None)).__next__, None)
    try:
        for splits, texts, ids in prefetch(tokenize, ahead):
            if other and stats["compared characters"] < COMPARE_CHARS:
                compare(stats, texts, ids, special, other, other_special)
            for split, text, tokens in zip(splits, texts, ids):
                tokens = np.array(tokens, np.uint16 if width == 2 else np.uint32)
                stats["tokens read"] += len(tokens)
                stats["words read"] += len(text.split())
                stats["bytes read"] += len(text.encode("utf-8", "surrogatepass"))
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
            tell(progress, told, {
                "documents": stats["documents train"] + stats["documents val"],
                "tokens": stats["tokens train"] + stats["tokens val"],
                **{name: stats[name] for name in ("characters", "source bytes", "shard bytes")},
            })  # fmt: skip
        for split in pending:
            flush(split)
        if not os.path.exists(hash_path(cfg.out, number)):
            save_hashes(cfg.out, number, hashes, by_hash)
        result = {"shards": shards, "stats": dict(stats), "longest": longest}
        write_text(unit_path(cfg.out, number), json.dumps(result))
    except OSError as error:
        raise UserError(f"{cfg.out}: {error.strerror} (finished units are kept; the same command goes on)") from None
    return stats["bad lines"]


def dropped(cfg, number):
    """The set of the unit's documents to leave out, as indices."""
    return set(np.load(work_path(cfg.out, f"dropped_{number:05d}.npy")).tolist()) if cfg.dedup else ()


def compare(stats, texts, ids, special, other, other_special):
    """Count what the two tokenizers make of the same texts."""
    other_ids = encode(other, texts)[1]
    stats["compared characters"] += sum(map(len, texts))
    stats["compared words"] += sum(len(text.split()) for text in texts)
    stats["compared bytes"] += sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
    for name, of_texts, unknown in (("this", ids, special["[UNK]"]), ("other", other_ids, other_special["[UNK]"])):
        stats[f"compared tokens {name}"] += sum(map(len, of_texts))
        stats[f"compared unknown {name}"] += sum(tokens.count(unknown) for tokens in of_texts)


class Progress:
    """What all processes have done, in shared memory. Whoever finds that REPORT_SECONDS have passed prints it."""

    NAMES = ("documents", "tokens", "characters", "source bytes", "shard bytes")

    def __init__(self, source_bytes, estimate=0):
        self.source_bytes, self.estimate, self.start = source_bytes, estimate, time.monotonic()
        self.shared = multiprocessing.get_context("spawn").Array("d", len(self.NAMES) + 2)
        self.shared[-2] = self.start  # when a line was printed last
        self.shared[-1] = False  # whether to stop: another process has failed

    def add(self, counts):
        with self.shared.get_lock():
            for i, name in enumerate(self.NAMES):
                self.shared[i] += counts.get(name, 0)
            now = time.monotonic()
            print_now = now - self.shared[-2] > REPORT_SECONDS
            if print_now:
                self.shared[-2] = now
        if self.shared[-1]:
            raise UserError("stopped, since another process has failed")
        if print_now:
            print(self.line(now - self.start), flush=True)

    def line(self, seconds):
        """Such as: 12,345 documents, 5.3 M tokens, 1.35 M tokens/s, 6.3 MB/s; 34 % of 1.2 GB read, 0:03:12 left; ..."""
        documents, tokens, characters, source, written = self.shared[: len(self.NAMES)]
        parts = [f"{documents:,.0f} documents"]
        if tokens:
            parts[0] += f", {tokens / 1e6:.1f} M tokens, {tokens / seconds / 1e6:.2f} M tokens/s"
            parts[0] += f", {characters / seconds / 1e6:.1f} MB/s"
        if source and self.source_bytes:
            left = datetime.timedelta(seconds=round(seconds * max(0, self.source_bytes / source - 1)))
            parts.append(f"{source / self.source_bytes:.0%} of {gigabytes(self.source_bytes)} read, {left} left")
        if self.estimate:
            parts.append(f"{gigabytes(written)} of about {gigabytes(self.estimate)} written")
        return "; ".join(parts)

    def stop(self):
        self.shared[-1] = True


def tell(progress, told, counts):
    """Add to the progress what `counts` has grown by since the last time."""
    progress = progress or worker_progress
    progress.add({name: count - told[name] for name, count in counts.items()})
    told.update({name: count - told[name] for name, count in counts.items()})


worker_progress = None  # of this process, if it is a worker: shared memory is inherited, not sent


def start_worker(progress, parent):
    global worker_progress
    worker_progress = progress
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when to stop
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()


def end_with(parent):
    """End this process when its parent is gone, killed without a chance to say so."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def run_units(work, path_of, units, cfg, progress, *arguments):
    """Have work(number, unit, cfg, progress, *arguments) done by cfg.workers processes, where path_of is not there yet.

    Raises: UserError, the first of any process; the others stop.
    """
    left = [number for number in range(len(units)) if not os.path.exists(path_of(cfg.out, number))]
    processes = max(1, min(cfg.workers, len(left)))
    # With few units, the tokenizer's own threads use the cores of processes that are not there, or done.
    threads = cfg.workers if len(left) < 2 * cfg.workers else 1
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    bad_lines = 0
    if processes == 1:
        for number in left:
            bad_lines += work(number, units[number], cfg, progress, *arguments)
            check_bad_lines(cfg, bad_lines)
        return
    # spawn: a forked process would inherit the locks of the tokenizer's threads.
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, spawn, start_worker, (progress, os.getpid())) as pool:
        futures = [pool.submit(work, number, units[number], cfg, None, *arguments) for number in left]
        try:
            for future in concurrent.futures.as_completed(futures):
                bad_lines += future.result()
                check_bad_lines(cfg, bad_lines)
        except concurrent.futures.process.BrokenProcessPool:
            hint = "out of memory? try fewer --workers; the same command goes on"
            raise UserError(f"{cfg.out}: a worker process was killed ({hint})") from None
        except BaseException:
            progress.stop()
            pool.shutdown(cancel_futures=True)
            raise


def check_bad_lines(cfg, count):
    if count > cfg.skip_bad_lines:
        text = f"{count} lines cannot be read, --skip_bad_lines={cfg.skip_bad_lines} may be left out"
        raise UserError(f"{cfg.source}: {text} (with a higher number the same command goes on)")


# ---------------------------------------------------------------------------------------------------------------------
# The whole


@command
def main(argv):
    cfg = load_config(PrepareConfig, argv)
    cfg.check()
    earlier, finished = earlier_plan(cfg.out)
    pieces = list_pieces(cfg.source, cfg.doc_sep, earlier["sources"] if earlier else ())
    options = {name: value for name, value in asdict(cfg).items() if name not in FREE_OPTIONS}
    plan = {"options": options, "sources": pieces}
    if earlier and os.listdir(cfg.out) == [".work"] and os.listdir(work_path(cfg.out, "")) == ["plan.json"]:
        earlier = None  # it failed before there was anything to keep
    if earlier:
        check_same(cfg.out, plan, earlier)
    if finished:
        shutil.rmtree(os.path.join(cfg.out, ".work"), ignore_errors=True)
        print(f"{cfg.out}: finished before, nothing to do")
        return
    try:
        lock = take_directory(cfg.out, plan, started=earlier is not None)
    except OSError as error:
        raise UserError(f"{cfg.out}: {error.strerror} (choose another --out)") from None
    try:
        prepare(cfg, plan, group_units(pieces, whole=cfg.max_docs > 0))
    except OSError as error:
        raise UserError(f"{cfg.out}: {error.strerror or error} (the same command goes on)") from None
    finally:
        os.close(lock)


def prepare(cfg, plan, units):
    """Everything from an empty or half-filled directory to a finished one."""
    start = time.perf_counter()
    source_bytes = [sum(piece.size for piece in unit) for unit in units]
    tokenizer_path = os.path.join(cfg.out, "tokenizer.json")
    if cfg.val_docs or cfg.dedup:
        run_units(hash_unit, hash_path, units, cfg, Progress(sum(source_bytes)))
    threshold = val_threshold(len(units), cfg)
    if not os.path.exists(tokenizer_path):
        make_tokenizer(units, cfg, threshold, tokenizer_path)
    if cfg.compare_tokenizer and not os.path.exists(work_path(cfg.out, "other.json")):
        write_text(work_path(cfg.out, "other.json"), read_tokenizer(cfg.compare_tokenizer, cfg.cased))
    tokenizer, _ = load_tokenizer(tokenizer_path)
    estimate = estimate_bytes(units, cfg, tokenizer)
    check_disk(cfg.out, estimate)
    if cfg.dedup:
        for number, indices in enumerate(repeated_documents(cfg.out, len(units))):
            np.save(work_path(cfg.out, f"dropped_{number:05d}.npy"), indices)

    before = [number for number in range(len(units)) if os.path.exists(unit_path(cfg.out, number))]
    if before:
        print(f"{len(before)} of {len(units)} units were done before")
    left = sum(source_bytes) - sum(source_bytes[number] for number in before)
    run_units(process_unit, unit_path, units, cfg, Progress(left, estimate), threshold)
    hint = "remove the file to do the unit again"
    results = [read_json(unit_path(cfg.out, number), hint) for number in range(len(units))]
    stats = sum((Counter(result["stats"]) for result in results), Counter())
    check_bad_lines(cfg, stats["bad lines"])
    if not stats["documents train"]:
        raise UserError(f"{cfg.source}: no text to train on (all documents are empty, or held out: see --val_fraction)")
    if not stats["documents val"] and (cfg.val_fraction or cfg.val_docs):
        raise UserError(f"{cfg.source}: no document was held out (try --val_docs=100 and a new --out)")
    stats["duplicates"] = sum(map(len, repeated_documents(cfg.out, len(units))))
    longest = heapq.nlargest(NUM_LONGEST, itertools.chain(*(result["longest"] for result in results)))
    report = make_report(stats, longest, cfg, tokenizer.get_vocab_size(), time.perf_counter() - start)
    write_text(os.path.join(cfg.out, "report.json"), json.dumps(report, indent=1, ensure_ascii=False))
    manifest = {
        "format": 1,
        "tokenizer_sha256": file_digest(tokenizer_path),
        "vocab_size": tokenizer.get_vocab_size(),
        **plan,
        "shards": [entry for result in results for entry in result["shards"]],
    }
    write_text(os.path.join(cfg.out, "manifest.json"), json.dumps(manifest, indent=1))
    verify(cfg.out)
    shutil.rmtree(os.path.join(cfg.out, ".work"))
    print_report(report)


def make_report(stats, longest, cfg, vocab_size, seconds):
    """What is in the corpus: plain numbers, of which the last three depend on the machine."""
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
        "tokens": num_tokens,
        "tokens_held_out": stats["tokens val"],
        "vocab_size": vocab_size,
        "tokens_per_word": round(stats["tokens read"] / max(1, stats["words read"]), 4),
        "bytes_per_token": round(stats["bytes read"] / max(1, stats["tokens read"]), 4),
        "unknown_percent": round(100 * stats["unknown tokens"] / num_tokens, 4),
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


def print_report(report):
    for name, value in report.items():
        if name == "longest":
            for entry in value:
                where = f"{entry['file']}, document {entry['document']}"
                where += f" from byte {entry['from_byte']:,}" if entry["from_byte"] else ""
                text = " ".join(entry["text"].split())
                print(f"{'longest':22s} {entry['characters']:,} characters: {where}: {text[:50]}")
        elif name == "compared":
            for column in value["this"]:
                print(f"{column:22s} {value['this'][column]:,} here, {value['other'][column]:,} with {value['with']}")
        else:
            plain = isinstance(value, (int, float)) and not isinstance(value, bool)
            print(f"{name:22s} {value:,}" if plain else f"{name:22s} {json.dumps(value)}")


def work_path(out, name):
    """A file that is there only until the directory is finished."""
    return os.path.join(out, ".work", name)


def unit_path(out, number):
    return work_path(out, f"unit_{number:05d}.json")


def hash_path(out, number):
    return work_path(out, f"hashes_{number:05d}.npz")


if __name__ == "__main__":
    main()
