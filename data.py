"""Token shards, the order of samples, masking, and unpadded micro-batches.

A shard directory, made by prepare_c4.py, serves every sequence length:

    tokenizer.json   the tokenizer the documents went through
    manifest.json    the shards with their sizes and sha256
    report.json      what is in the corpus
    train_*.bin, val_*.bin

and a shard file is a header, then the documents' offsets, then their tokens without [CLS] and [SEP]:

    magic 8 bytes | version u32 | bytes per token u32 | num_docs u64 | num_tokens u64 | sha256 of tokenizer.json
    offsets u64 (num_docs + 1)  | tokens u16, or u32 for vocabularies above 65,536 (num_tokens)

A sample is [CLS] tokens [SEP], cut to `seq_length`. Which sample comes when, and which of its tokens are masked, are
pure functions of (seed, source, epoch, sample, position): nothing is drawn from a stream, so a run may stop at any step
and go on with any number of processes without a state to store, and without reading anything it does not need. Several
directories, the sources, can be mixed: their shares are exact in every MIXTURE_PERIOD samples.

Nothing here grows with the corpus but the number of open files: of offsets and tokens, what a batch needs is read. Where
documents are cut into chunks, the first sample of every INDEX_DOCS documents is found once, and kept beside the directory
as DIRECTORY.chunks/*.npy.

    python data.py --verify=DIR   checks every digest and every token
    python data.py --bench=DIR    how fast one core makes micro-batches

Read next: prepare_c4.py, for how shards are made, or kernels/attention.py
"""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import resource
import struct
import time
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from config import UserError, command, load_config

MAGIC = b"MOSAICSH"
VERSION = 1
HEADER = struct.Struct("<8sIIQQ32s")
OFFSET = np.dtype("<u8")

# Micro-batches are filled up to multiples of these, so that the GPU sees few shapes: tokens by [PAD] after the last
# sequence, masked positions by ignored rows, and sequences by empty ones.
TOKEN_MULTIPLE = 1024
MASKED_MULTIPLE = 256
SEQUENCE_MULTIPLE = 32

IGNORED = -100  # the label that F.cross_entropy skips
EVAL_SEED = 0  # evaluation masks are the same in every run, whatever its seed
SMALL_CORPUS = 2**26  # tokens of a directory that are all checked when it is opened; of a larger one, when they are used
MIXTURE_PERIOD = 10_000  # samples in which each source of a mixture has its share
MIXTURE_STREAM = 2**32  # tells the hashes that mix sources from those of order (2 * place) and masks (2 * place + 1)
INDEX_DOCS = 64  # documents whose samples are counted together in the index of chunks: 46 MB of index for C4
KEPT_INDEX_DOCS = 100_000  # documents of a directory for which the index is worth keeping


# ---------------------------------------------------------------------------------------------------------------------
# Shards on disk


def write_shard(path, documents, bytes_per_token, tokenizer_digest):
    """Write token arrays as one shard.

    documents: list of 1-D integer arrays. tokenizer_digest: 32 bytes. Returns the manifest's entry for the file.
    """
    lengths = [len(document) for document in documents]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype("<u8")
    tokens = np.concatenate([*documents, np.empty(0, np.int64)]).astype(f"<u{bytes_per_token}")
    header = HEADER.pack(MAGIC, VERSION, bytes_per_token, len(documents), len(tokens), tokenizer_digest)
    digest = hashlib.sha256()
    with whole_file(path) as file:
        # write(), not a memmap: on a full disk a store to mapped memory kills the process with SIGBUS.
        for part in (header, offsets, tokens):
            file.write(part)
            digest.update(part)
    return {
        "file": os.path.basename(path),
        "num_docs": len(documents),
        "num_tokens": len(tokens),
        "bytes": HEADER.size + offsets.nbytes + tokens.nbytes,
        "sha256": digest.hexdigest(),
    }


@dataclass
class Shard:
    """A shard file, open. What is asked for is read, not mapped: mapped pages would count as the process's memory."""

    path: str
    file: "io.FileIO"
    num_docs: int
    num_tokens: int
    bytes_per_token: int

    def __post_init__(self):
        self.tokens_at = HEADER.size + 8 * (self.num_docs + 1)
        self.token_type = np.dtype(f"<u{self.bytes_per_token}")
        self.descriptor = self.file.fileno()

    def offsets(self, start, out):
        """Fill `out`, (n,) uint64: where documents from `start` on begin, and after the last one where that ends."""
        count = min(len(out), self.num_docs + 1 - start)
        self._read(out[:count], HEADER.size + 8 * start)
        out[count:] = out[count - 1]

    def tokens(self, start, out):
        """Fill `out`, (n,) of the shard's token type, with tokens from `start` on."""
        self._read(out, self.tokens_at + self.bytes_per_token * start)

    def _read(self, out, where):
        if os.preadv(self.descriptor, [out], where) < out.nbytes:
            raise UserError(f"{self.path}: shorter than when it was opened (damaged; prepare again)", True)

    def arrays(self):
        """(offsets, tokens), all of them, as read-only memory maps."""
        offsets = np.memmap(self.path, OFFSET, "r", HEADER.size, (self.num_docs + 1,))
        tokens = np.empty(0, self.token_type)
        if self.num_tokens:  # an empty range cannot be mapped
            tokens = np.memmap(self.path, self.token_type, "r", self.tokens_at, (self.num_tokens,))
        return np.asarray(offsets), np.asarray(tokens)

    def check(self, vocab_size):
        """Read every offset and token. Raises: UserError when they cannot be right."""
        offsets, tokens = self.arrays()
        if (offsets[1:] < offsets[:-1]).any():
            raise UserError(f"{self.path}: offsets do not cover the tokens in order (damaged; prepare again)")
        if self.num_tokens and (highest := tokens.max()) >= vocab_size:
            raise UserError(f"{self.path}: token id {highest} outside the vocabulary of {vocab_size} (damaged shard)")


def open_shard(path, tokenizer_digest, vocab_size, check_all=True):
    """A Shard, after checking its size, header, and outer offsets.

    Raises: UserError naming the file when it is damaged or was made with another tokenizer.
    """
    try:
        size = os.path.getsize(path)
        file = open(path, "rb", buffering=0)
        header = file.read(HEADER.size)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror} (a shard of the manifest is missing; prepare again)") from None
    if len(header) < HEADER.size or header[:8] != MAGIC:
        raise UserError(f"{path}: not a token shard (prepare the directory again with prepare_c4.py)")
    _, version, bytes_per_token, num_docs, num_tokens, digest = HEADER.unpack(header)
    if version != VERSION or bytes_per_token not in (2, 4):
        raise UserError(f"{path}: shard format {version}, {bytes_per_token} bytes a token (this code reads {VERSION})")
    expected = HEADER.size + 8 * (num_docs + 1) + bytes_per_token * num_tokens
    if size != expected:
        raise UserError(f"{path}: {size} bytes, but its header says {expected} (truncated or damaged; prepare again)")
    if digest != tokenizer_digest:
        raise UserError(f"{path}: made with another tokenizer than the tokenizer.json beside it (prepare again)")
    shard = Shard(path, file, num_docs, num_tokens, bytes_per_token)
    ends = np.empty((2, 1), OFFSET)
    shard.offsets(0, ends[0])
    shard.offsets(num_docs, ends[1])
    if ends[0] != 0 or ends[1] != num_tokens:
        raise UserError(f"{path}: offsets do not cover the tokens in order (damaged; prepare again)")
    if check_all:
        shard.check(vocab_size)
    if hasattr(os, "posix_fadvise"):  # samples come in random order: reading ahead would read 30 times as much
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
    return shard


def allow_open_files(count):
    """Have the system let this process keep so many more files open. Raises: UserError where it may not."""
    needed = count + len(os.listdir("/proc/self/fd")) + 256 if os.path.isdir("/proc/self/fd") else count + 512
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise UserError(f"{count} shards, but only {hard} files may be open (raise ulimit -n, or make larger shards)")
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


@contextlib.contextmanager
def whole_file(path):
    """Open a file to write bytes to, under another name until all of them are on disk.

    The other name holds the number of this process: one that outlives its killed parent for a moment may be writing too.
    """
    partial = f"{path}.{os.getpid()}.tmp"
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        with contextlib.suppress(OSError):
            os.remove(partial)  # on a full disk, make room for what was finished
        raise
    os.replace(partial, path)


def write_text(path, text):
    """Write a text file, the whole of it or nothing."""
    with whole_file(path) as file:
        file.write(text.encode())


def gigabytes(num_bytes, digits=1):
    """As text: 1,234.5 GB or 0.3 MB."""
    return f"{num_bytes / 1e9:,.{digits}f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.{digits}f} MB"


def file_digest(path):
    """sha256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path, hint):
    """The JSON object in a file. Raises: UserError with `hint` when it is missing or not JSON."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror} ({hint})") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error} ({hint})") from None


def load_tokenizer(path, text=None):
    """A tokenizers.Tokenizer without truncation or padding, and the ids this project needs: {"[MASK]": 103, ...}.

    text: the contents of the file, where they are known. Raises: UserError when they are no tokenizer or lack one of
    BERT's special tokens.
    """
    if text is None and not os.path.isfile(path):
        raise UserError(f"{path}: no such tokenizer (expected a tokenizer.json)")
    try:
        tokenizer = Tokenizer.from_file(path) if text is None else Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{path}: not a tokenizer: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    special = {name: tokenizer.token_to_id(name) for name in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")}
    for name, token in special.items():
        if token is None:
            raise UserError(f"{path}: has no {name} token (a BERT-style vocabulary is needed)")
    return tokenizer, special


# ---------------------------------------------------------------------------------------------------------------------
# Counter-based random numbers: a hash of what the number is for


def mix(x):
    """A bijection of uint64 that looks random (the finalizer of splitmix64, Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash64(*values):
    """uint64 hash of integers and integer arrays, broadcast together; always an array, since scalars would warn."""
    state = np.zeros(1, np.uint64)
    for value in values:
        state = mix(state + np.asarray(value).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    return state


def permute(index, n, key):
    """Places `index` (uint64 array) of a pseudo-random permutation of range(n), without writing the permutation down.

    A Feistel network of six rounds permutes the next power of four above n; places that fall outside range(n) are
    sent through it again until they land inside ("cycle walking": at most 4 times on average).
    Source: Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002.
    """
    half = np.uint64(max(1, (int(n - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)

    def encipher(x):
        left, right = x >> half, x & low
        for round_number in range(6):
            left, right = right, left ^ (hash64(key, round_number, right) & low)
        return (left << half) | right

    place = encipher(index)
    while (outside := place >= n).any():
        place[outside] = encipher(place[outside])
    return place


# ---------------------------------------------------------------------------------------------------------------------
# Samples and micro-batches


@dataclass
class MicroBatch:
    """One flat token stream of whole sequences. The rows after the last sequence are [PAD]: filling, not data."""

    input_ids: "torch.Tensor"  # (total_tokens,) int32, with [MASK] where a token is to be predicted
    cu_seqlens: "torch.Tensor"  # (B + 1,) int32: where each sequence starts; the last ones may be empty
    max_seqlen: int  # no sequence is longer
    windows: "torch.Tensor | None"  # (W + 1,) int32: neighbours that attention takes together; None if they are long
    masked_positions: "torch.Tensor"  # (num_rows,) int64: the rows to predict, then filling
    labels: "torch.Tensor"  # (num_rows,) int64: the original tokens, IGNORED for the filling
    num_samples: int
    num_tokens: int  # tokens in sequences, [CLS] and [SEP] included
    num_masked: int  # rows to predict
    sum_squared_lengths: int  # attention's work is proportional to it

    def pinned_for(self, device):
        """The same micro-batch, for a GPU in pinned memory: its copy waits for nothing, and nothing waits for it."""
        return self if device.type == "cpu" else self._each(lambda tensor: tensor.pin_memory())

    def to(self, device):
        """The same micro-batch on a device; from pinned memory the copy is asynchronous."""
        return self if device.type == "cpu" else self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def _each(self, function):
        return MicroBatch(**{k: function(v) if hasattr(v, "pin_memory") else v for k, v in vars(self).items()})


class Source:
    """One split of one shard directory, at one sequence length: which tokens a sample has.

    chunk: False takes the first seq_length tokens of each document, as MosaicBERT did; True cuts each document into as
    many samples as it gives. Raises: UserError when the directory is missing or damaged.
    """

    def __init__(self, directory, split, seq_length, chunk=False):
        hint = f"no finished shard directory; make one: python prepare_c4.py --source=FILES --out={directory}"
        manifest = read_json(os.path.join(directory, "manifest.json"), hint)
        self.directory, self.split, self.chunk = directory, split, chunk
        self.per_sample = seq_length - 2  # without [CLS] and [SEP]
        self.tokenizer_path = os.path.join(directory, "tokenizer.json")
        self.tokenizer, self.special = load_tokenizer(self.tokenizer_path)
        self.tokenizer_sha256 = file_digest(self.tokenizer_path)
        vocab_size = self.tokenizer.get_vocab_size()
        try:
            entries = [entry for entry in manifest["shards"] if entry["split"] == split]
            self.digest = hash_of([entry["sha256"] for entry in entries])
            names = [entry["file"] for entry in entries]
            if any(name != os.path.basename(name) or not name for name in names):  # none leads out of the directory
                raise TypeError
            paths = [os.path.join(directory, name) for name in names]
            small = sum(entry["num_tokens"] for entry in entries) < SMALL_CORPUS
        except (KeyError, TypeError):
            raise UserError(f"{directory}/manifest.json: not a manifest of shards ({hint})") from None
        allow_open_files(len(paths))
        digest = bytes.fromhex(self.tokenizer_sha256)
        self.shards = [open_shard(path, digest, vocab_size, check_all=small) for path in paths]
        num_docs = [shard.num_docs for shard in self.shards]
        self.num_tokens = np.array([shard.num_tokens for shard in self.shards], np.int64)
        self.shard_starts = np.concatenate([[0], np.cumsum(num_docs)]).astype(np.int64)  # in documents
        if chunk:
            blocks = [-(-count // INDEX_DOCS) for count in num_docs]
            self.shard_blocks = np.concatenate([[0], np.cumsum(blocks)]).astype(np.int64)
            self.block_starts = self._open_index()  # in samples

    def __len__(self):
        return int(self.block_starts[-1] if self.chunk else self.shard_starts[-1])

    def _open_index(self):
        """The number of samples before each block of INDEX_DOCS documents, an int64 array over a file where it is large.

        A shard's last block may be shorter. The file's name holds the shards' digest, so that it cannot be another's.
        """
        count = int(self.shard_blocks[-1]) + 1
        where = f"{os.path.realpath(self.directory)}.chunks"
        path = os.path.join(where, f"{self.split}_{self.per_sample + 2}_{self.digest[:16]}.npy")
        if self.shard_starts[-1] < KEPT_INDEX_DOCS:
            return self._make_index()
        with contextlib.suppress(OSError, EOFError, ValueError):  # not there, or damaged
            index = np.load(path, mmap_mode="r")
            if index.shape == (count,) and index.dtype == np.int64 and index[0] == 0:
                return np.asarray(index)
        index = self._make_index()
        try:
            os.makedirs(where, exist_ok=True)
            with whole_file(path) as file:
                np.save(file, index)
            return np.asarray(np.load(path, mmap_mode="r"))
        except OSError:  # a place that may only be read: every process makes its own
            return index

    def _make_index(self):
        counts = [np.zeros(1, np.int64)]
        for shard in self.shards:
            offsets = np.empty(shard.num_docs + 1, OFFSET)
            shard.offsets(0, offsets)
            lengths = np.diff(offsets.astype(np.int64))
            if (lengths < 0).any():
                raise UserError(f"{shard.path}: offsets out of order (damaged; prepare again)")
            chunks = -(-lengths // self.per_sample)
            counts.append(fill(chunks, -(-len(chunks) // INDEX_DOCS) * INDEX_DOCS, 0).reshape(-1, INDEX_DOCS).sum(1))
        return np.cumsum(np.concatenate(counts))

    def locate(self, samples):
        """(shard, start, length) of each sample's tokens, int64 arrays."""
        if self.chunk:
            block = np.searchsorted(self.block_starts, samples, side="right") - 1
            shard = np.searchsorted(self.shard_blocks, block, side="right") - 1
            document = (block - self.shard_blocks[shard]) * INDEX_DOCS
            within = samples - self.block_starts[block]
        else:
            shard = np.searchsorted(self.shard_starts, samples, side="right") - 1
            document, within = samples - self.shard_starts[shard], np.zeros_like(samples)
        # One by one: of a large corpus, hardly two samples of a batch are in the same shard.
        count = INDEX_DOCS if self.chunk else 1
        offsets = np.empty((len(samples), count + 1), OFFSET)
        for row, s, d in zip(offsets, shard.tolist(), document.tolist()):
            self.shards[s].offsets(d, row)
        offsets = offsets.astype(np.int64)
        lengths = np.diff(offsets)
        before = np.cumsum(-(-lengths // self.per_sample), axis=1)  # samples up to each document's end
        place = (before <= within[:, None]).sum(1) if self.chunk else np.zeros_like(samples)
        wrong = (lengths < 0).any(1) | (offsets[:, -1] > self.num_tokens[shard]) | (place >= count)
        if wrong.any():
            path = self.shards[shard[wrong.argmax()]].path
            raise UserError(f"{path}: offsets out of order (damaged; prepare again)", True)
        rows = np.arange(len(samples))
        skipped = (within - np.where(place > 0, before[rows, place - 1], 0)) * self.per_sample
        return shard, offsets[rows, place] + skipped, np.minimum(lengths[rows, place] - skipped, self.per_sample)


class Samples:
    """The samples of one split of a shard directory, or of a mixture of several, at one sequence length.

    data_dir: directory of prepare_c4.py, or DIRECTORY:WEIGHT,DIRECTORY:WEIGHT; the weights are shares of the samples.
    split: "train", or "val", where weights do not count: every held-out sample comes once. seq_length: tokens a sample
    has at most, [CLS] and [SEP] included. chunk: see Source. padded: whether the model fills each sample up to seq_length,
    so that micro-batches are cut by that. Samples are numbered through the sources.
    Raises: UserError when a directory is missing, damaged or empty, or made with another tokenizer than the first.
    """

    def __init__(self, data_dir, split, seq_length, chunk=False, padded=False):
        directories, weights = parse_mixture(data_dir)
        self.sources = [Source(directory, split, seq_length, chunk) for directory in directories]
        first = self.sources[0]
        for source in self.sources:
            if source.tokenizer_sha256 != first.tokenizer_sha256:
                hint = f"prepare it with --tokenizer={first.tokenizer_path}"
                raise UserError(f"{source.tokenizer_path}: another tokenizer than that of {first.directory} ({hint})")
            if split == "train" and len(directories) > 1 and len(source) == 0:
                raise UserError(f"{source.directory}: no training samples (prepare more text)")
        self.special, self.tokenizer_path = first.special, first.tokenizer_path
        self.vocab_size, self.tokenizer_sha256 = first.tokenizer.get_vocab_size(), first.tokenizer_sha256
        with open(self.tokenizer_path, encoding="utf-8") as file:
            self.tokenizer_text = file.read()
        self.seq_length, self.padded = seq_length, padded
        self.shards = [shard for source in self.sources for shard in source.shards]
        self.token_type = self.shards[0].token_type if self.shards else np.dtype("<u2")
        self.source_shards = np.cumsum([0] + [len(source.shards) for source in self.sources])
        self.source_starts = np.cumsum([0] + [len(source) for source in self.sources])  # in samples
        self.quotas = mixture_quotas(data_dir, weights) if split == "train" else None
        self.digest = first.digest
        if len(self.sources) > 1:
            quotas = weights if self.quotas is None else self.quotas.tolist()
            self.digest = hash_of([f"{quota} {source.digest}" for quota, source in zip(quotas, self.sources)])
        self.is_special = np.zeros(self.vocab_size, bool)
        self.is_special[list(self.special.values())] = True

    def __len__(self):
        return int(self.source_starts[-1])

    def at(self, positions, seed):
        """(samples, epochs) at `positions` of the endless training sequence, each an int64 array like `positions`.

        Every epoch of a source is a permutation of its own, so the sequence has no start-up cost anywhere.
        """
        if self.quotas is None or len(self.sources) == 1:
            return permuted(positions, len(self), seed, 0)
        periods, slots = positions // MIXTURE_PERIOD, (positions % MIXTURE_PERIOD).astype(np.uint64)
        for period in np.unique(periods):
            here = periods == period
            slots[here] = permute(slots[here], MIXTURE_PERIOD, hash64(seed, MIXTURE_STREAM, period))
        slots, starts = slots.astype(np.int64), np.cumsum([0, *self.quotas])
        places = np.searchsorted(starts, slots, side="right") - 1
        samples, epochs = np.empty_like(positions), np.empty_like(positions)
        for place in np.unique(places):
            here = places == place
            of_source = periods[here] * self.quotas[place] + slots[here] - starts[place]
            number, epochs[here] = permuted(of_source, len(self.sources[place]), seed, place)
            samples[here] = self.source_starts[place] + number
        return samples, epochs

    def places(self, samples):
        """Each sample's source, as its place in the list."""
        return np.searchsorted(self.source_starts, samples, side="right") - 1

    def locate(self, samples):
        """(shard, start, length) of each sample's tokens, int64 arrays; [CLS] and [SEP] are not counted."""
        if len(self.sources) == 1:
            return self.sources[0].locate(samples)
        places = self.places(samples)
        found = np.empty((3, len(samples)), np.int64)
        for place in np.unique(places):
            here = places == place
            found[:, here] = self.sources[place].locate(samples[here] - self.source_starts[place])
            found[0, here] += self.source_shards[place]
        return tuple(found)

    def micro_batch(self, samples, epochs, seed, mask_prob, located=None):
        """The masked, unpadded MicroBatch of `samples` (int64 array, with their epochs). located: of locate, if known."""
        import torch  # here, since prepare_c4.py's processes, which need it not, start a second earlier without

        from kernels import make_windows

        shard, start, length = self.locate(samples) if located is None else located
        lengths = length + 2
        cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
        num_tokens = int(cu_seqlens[-1])
        stored = np.full(round_up(num_tokens, TOKEN_MULTIPLE), self.special["[PAD]"], self.token_type)
        stored[cu_seqlens[:-1]] = self.special["[CLS]"]
        stored[cu_seqlens[1:] - 1] = self.special["[SEP]"]
        for s, begin, to, count in zip(shard.tolist(), start.tolist(), (cu_seqlens + 1).tolist(), length.tolist()):
            self.shards[s].tokens(begin, stored[to : to + count])
        tokens = stored.astype(np.int32)
        if tokens.max() >= self.vocab_size:
            path = self.shards[shard[np.searchsorted(cu_seqlens, tokens.argmax(), side="right") - 1]].path
            raise UserError(f"{path}: token id {tokens.max()} outside the vocabulary of {self.vocab_size}", True)

        places = self.places(samples)
        sample_keys = hash64(seed, 2 * places + 1, epochs, samples - self.source_starts[places])
        positions, labels = mask_tokens(tokens[:num_tokens], lengths, sample_keys, mask_prob, self.special, self.is_special)
        num_rows = round_up(len(positions), MASKED_MULTIPLE)
        num_sequences = round_up(len(samples), SEQUENCE_MULTIPLE)
        return MicroBatch(
            input_ids=torch.from_numpy(tokens),
            cu_seqlens=torch.from_numpy(fill(cu_seqlens.astype(np.int32), num_sequences + 1, num_tokens)),
            max_seqlen=self.seq_length,
            windows=make_windows(lengths.tolist(), self.seq_length),
            masked_positions=torch.from_numpy(fill(positions, num_rows, 0)),
            labels=torch.from_numpy(fill(labels, num_rows, IGNORED)),
            num_samples=len(samples),
            num_tokens=num_tokens,
            num_masked=len(positions),
            sum_squared_lengths=int((lengths**2).sum()),
        )

    def parts(self, samples, micro_batch_tokens, rank, world_size, equal=True, located=None):
        """Slices of `samples`, one a micro-batch: this rank's, every world_size-th of them.

        The cut is made from the lengths of all samples, so every rank finds the same one. With `equal`, as gradient
        reduction needs, each rank has equally many.
        """
        _, _, length = self.locate(samples) if located is None else located
        bounds = self.bounds(length, micro_batch_tokens, world_size if equal else 1)
        return [slice(bounds[i], bounds[i + 1]) for i in range(rank, len(bounds) - 1, world_size)]

    def bounds(self, length, micro_batch_tokens, multiple):
        """Where samples with `length` tokens of text each are cut: see `cut`."""
        return cut(np.full_like(length, self.seq_length) if self.padded else length + 2, micro_batch_tokens, multiple)

    def of_step(self, step, global_batch_size, seed):
        """(samples, epochs) of training step `step`, counted from 0, over all processes."""
        return self.at(np.arange(step * global_batch_size, (step + 1) * global_batch_size), seed)

    def train_step(self, step, global_batch_size, seed, mask_prob, micro_batch_tokens, rank=0, world_size=1):
        """This rank's micro-batches of training step `step`, counted from 0, as a list."""
        samples, epochs = self.of_step(step, global_batch_size, seed)
        located = np.stack(self.locate(samples))
        parts = self.parts(samples, micro_batch_tokens, rank, world_size, located=located)
        return [self.micro_batch(samples[part], epochs[part], seed, mask_prob, located[:, part]) for part in parts]


def permuted(positions, n, seed, place):
    """(numbers, epochs): `positions` in a sequence that goes through range(n) in each epoch, in an order of its own."""
    epochs = positions // n
    numbers = np.empty_like(positions)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        index = (positions[here] % n).astype(np.uint64)
        numbers[here] = permute(index, n, hash64(seed, 2 * place, epoch)).astype(np.int64)
    return numbers, epochs


def parse_mixture(data_dir):
    """(directories, weights) of DIRECTORY or DIRECTORY:WEIGHT,DIRECTORY:WEIGHT. Raises: UserError."""
    if os.path.isdir(data_dir) or not ("," in data_dir or ":" in data_dir):
        return [data_dir], [1.0]
    directories, weights = [], []
    for part in data_dir.split(","):
        directory, _, weight = part.strip().rpartition(":")
        try:
            weights.append(float(weight))
        except ValueError:
            weights.append(0.0)
        if not directory or not 0 < weights[-1] < float("inf"):
            raise UserError(f"data_dir={data_dir}: {part.strip()!r} is no DIRECTORY:WEIGHT (such as a:0.7,b:0.3)")
        directories.append(directory)
    return directories, weights


def mixture_quotas(data_dir, weights):
    """Of MIXTURE_PERIOD samples, how many each source gives: its share, rounded so that all add up (largest remainder)."""
    exact = np.array(weights) / sum(weights) * MIXTURE_PERIOD
    quotas = np.floor(exact).astype(np.int64)
    quotas[np.argsort(quotas - exact, kind="stable")[: MIXTURE_PERIOD - quotas.sum()]] += 1
    if (quotas == 0).any():
        raise UserError(f"data_dir={data_dir}: a share below 1 of {MIXTURE_PERIOD} (leave the directory out)")
    return quotas


def cut(lengths, micro_batch_tokens, multiple):
    """Cut samples, in order, into the fewest micro-batches of nearly equal token counts: their bounds, a list of ints.

    No micro-batch has more than micro_batch_tokens tokens; their number is the next multiple of `multiple`, for which
    there must be samples enough.
    """
    ends = np.concatenate([[0], np.cumsum(lengths)])
    # Filled to the brim from the back, micro-batches are fewest, and begin at the earliest sample they may begin at.
    earliest = [len(lengths)]
    while earliest[-1] > 0:
        earliest.append(int(np.searchsorted(ends, ends[earliest[-1]] - micro_batch_tokens)))
    count = round_up(len(earliest) - 1, multiple)
    bounds = [0]
    for i in range(1, count):
        target = ends[-1] * i / count
        after = int(np.searchsorted(ends, target))
        nearest = after - 1 if target - ends[after - 1] < ends[after] - target else after
        # Within its limits: the rest must fit into what is left, this one into micro_batch_tokens; none is empty.
        low = max(earliest[min(count - i, len(earliest) - 1)], bounds[-1] + 1)
        high = int(np.searchsorted(ends, ends[bounds[-1]] + micro_batch_tokens, side="right")) - 1
        bounds.append(max(low, min(nearest, high, len(lengths) - (count - i))))
    return bounds + [len(lengths)]


def mask_tokens(tokens, lengths, sample_keys, mask_prob, special, is_special):
    """Choose tokens to predict, each with probability mask_prob, and hide them in place: 80 % become [MASK], 10 % a
    random token of the vocabulary, 10 % stay. Special tokens, [UNK] included, are never chosen.

    tokens: (num_tokens,) int32. lengths: of its sequences. sample_keys: (B,) uint64. Returns (positions, labels), int64.
    Source: Devlin et al. 2019, section 3.1; [UNK] as in transformers' DataCollatorForLanguageModeling.
    """
    position = np.arange(len(tokens)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    draw = mix(np.repeat(sample_keys, lengths) + position.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    chosen = draw < np.uint64(min(int(mask_prob * 2**64), 2**64 - 1))
    chosen &= ~is_special[tokens]
    positions = np.flatnonzero(chosen)
    labels = tokens[positions].astype(np.int64)
    draw = mix(draw[positions] + np.uint64(1))  # 32 bits decide what happens, the other 32 which random token
    action = draw >> np.uint64(32)
    random_token = ((draw & np.uint64(0xFFFFFFFF)) * np.uint64(len(is_special))) >> np.uint64(32)
    hidden = np.where(action < np.uint64(0.9 * 2**32), random_token.astype(np.int32), tokens[positions])
    tokens[positions] = np.where(action < np.uint64(0.8 * 2**32), np.int32(special["[MASK]"]), hidden)
    return positions, labels


def round_up(n, multiple):
    """The next multiple, and at least one of them."""
    return max(1, -(-n // multiple)) * multiple


def fill(array, length, value):
    return np.concatenate([array, np.full(length - len(array), value, array.dtype)])


def hash_of(strings):
    return hashlib.sha256("\n".join(strings).encode()).hexdigest()


def prefetch(function, arguments):
    """Yield function(a) for each of `arguments`, computing one ahead in a thread while the caller is busy."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        ahead = None
        for argument in arguments:
            following = pool.submit(function, argument)
            if ahead is not None:
                yield ahead.result()
            ahead = following
        if ahead is not None:
            yield ahead.result()


# ---------------------------------------------------------------------------------------------------------------------
# Command line


@dataclass
class DataConfig:
    verify: str = ""  # shard directory to check: every digest, offset and token
    bench: str = ""  # shard directory to time: tokens/s of micro-batches on one core
    seq_length: int = 128  # tokens a sample has at most, for --bench
    micro_batch_tokens: int = 131072  # tokens a micro-batch has at most, for --bench


def verify(data_dir):
    """Check every digest of a shard directory, and read every offset and token. Raises: UserError at the first fault."""
    hint = "not a finished shard directory"
    manifest = read_json(os.path.join(data_dir, "manifest.json"), hint)
    if file_digest(os.path.join(data_dir, "tokenizer.json")) != manifest.get("tokenizer_sha256"):
        raise UserError(f"{data_dir}/tokenizer.json: digest differs from the manifest's (damaged or replaced)")
    for split in ("train", "val"):
        samples = Samples(data_dir, split, seq_length=128)
        entries = [entry for entry in manifest["shards"] if entry["split"] == split]
        for entry, shard in zip(entries, samples.shards):
            if file_digest(shard.path) != entry["sha256"]:
                raise UserError(f"{shard.path}: digest differs from the manifest's (damaged; prepare again)")
            shard.check(samples.vocab_size)
    return len(manifest["shards"])


def bench(data_dir, seq_length, micro_batch_tokens, num_batches=20):
    """Tokens/s at which one thread makes masked micro-batches, the median of num_batches."""
    samples = Samples(data_dir, "train", seq_length, chunk=True)
    per_batch = micro_batch_tokens // seq_length
    rates = []
    for step in range(num_batches + 3):
        start = time.perf_counter()
        batches = samples.train_step(step, per_batch, seed=1, mask_prob=0.3, micro_batch_tokens=micro_batch_tokens)
        seconds = time.perf_counter() - start
        rates.append(sum(batch.num_tokens for batch in batches) / seconds)
    return float(np.median(rates[3:]))


@command
def main(argv):
    cfg = load_config(DataConfig, argv)
    if cfg.verify:
        print(f"{cfg.verify}: {verify(cfg.verify)} shards, all digests and tokens right")
    elif cfg.bench:
        rate = bench(cfg.bench, cfg.seq_length, cfg.micro_batch_tokens)
        print(f"{rate / 1e6:.1f} M tokens/s in micro-batches of at most {cfg.micro_batch_tokens:,} tokens")
    else:
        raise UserError("nothing to do (give --verify=DIR or --bench=DIR)")


if __name__ == "__main__":
    main()
