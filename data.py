"""Token shards, the order of samples, masking, and unpadded micro-batches.

A shard directory, made by prepare_c4.py, serves every sequence length:

    tokenizer.json   the tokenizer that the documents went through
    manifest.json    the shards with their sizes and sha256
    report.json      what is in the corpus
    train_*.bin, val_*.bin

A shard file is a header, the documents' offsets, and their tokens without [CLS] and [SEP]; it is read as an np.memmap:

    magic 8 bytes | version u32 | bytes per token u32 | num_docs u64 | num_tokens u64 | sha256 of tokenizer.json
    offsets u64 (num_docs + 1)  | tokens u16, or u32 for vocabularies above 65,536 (num_tokens)

A sample is [CLS] tokens [SEP], cut to `seq_length`. The sample order, and which tokens of a sample are masked, are
pure functions of (seed, source, epoch, sample, position). Nothing is drawn from a stream, so a run can stop at any step
and resume on any number of processes with no data state to save.

Read next: checkpoint.py, or prepare_c4.py for how shards are made
"""

import concurrent.futures
import hashlib
import mmap
import os
import struct
from dataclasses import dataclass

import numpy as np

from common.batch import IGNORED, Batch, pack, pad_to, round_up
from common.files import allow_open_files, file_digest, hash_of, read_json, whole_file
from common.options import UserError, similar
from common.vocabulary import continuations, load_tokenizer

MAGIC = b"MOSAICSH"
VERSION = 1
HEADER = struct.Struct("<8sIIQQ32s")  # 64 bytes

# Micro-batches are padded to multiples of these, so that the GPU sees few shapes: tokens by [PAD] after the last
# sequence, masked positions by ignored rows, and sequences by empty ones.
TOKEN_MULTIPLE = 1024
MASKED_MULTIPLE = 256
SEQUENCE_MULTIPLE = 32

# The length at which attention takes as long as the rest of the model, to cut batches into parts of equal work. For Base on
# an H100, before attention got faster: at 512 tokens it takes 12 x 24.6 ns of the 1.7 us per token. Half or twice this
# changes little.
ATTENTION_HALF = 2400

EVAL_SEED = 0  # evaluation masks are the same in every run, whatever its seed
CHECKED_TOKENS = 2**26  # up to this size every token is validated on open; larger corpora as they are read
INDEX_DOCS = 64  # documents per entry of the chunk index: 46 MB of index for C4


# ---------------------------------------------------------------------------------------------------------------------
# Shards on disk


def damaged(path, reason, this_rank_only=False):
    """The UserError for a damaged file of a shard directory."""
    hint = f"copy it again, or remove {os.path.dirname(path)} and prepare it again"
    hint += ", with --tokenizer=RUN/tokenizer.json to resume a run"  # --train_tokenizer would make another vocabulary
    return UserError(f"{path}: {reason} (damaged: {hint})", this_rank_only)


def read_manifest(directory):
    """The contents of a shard directory's manifest.json. Raises: UserError."""
    if os.path.isfile(directory):
        raise UserError(f"{directory}: a file (give its directory)")
    near = None if os.path.exists(directory) else similar(directory)
    hint = f"no finished shard directory; make one: python prepare_c4.py --source=FILES --out={directory}"
    return read_json(os.path.join(directory, "manifest.json"), f"did you mean {near}?" if near else hint)


def digest_of(path):
    """sha256 of a shard directory's file, in hexadecimal. Raises: UserError."""
    try:
        return file_digest(path)
    except OSError as error:
        raise damaged(path, error.strerror) from None


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
    """A shard file, mapped read-only."""

    path: str
    offsets: np.ndarray  # (num_docs + 1,) uint64: where each document starts, and the last one ends
    tokens: np.ndarray  # (num_tokens,) uint16 or uint32

    def check(self, vocab_size):
        """Read every offset and token. Raises: UserError when they cannot be right."""
        if (self.offsets[1:] < self.offsets[:-1]).any():
            raise damaged(self.path, "offsets do not cover the tokens in order")
        if len(self.tokens) and (highest := self.tokens.max()) >= vocab_size:
            raise damaged(self.path, f"token id {highest} outside the vocabulary of {vocab_size}")


def open_shard(path, tokenizer_digest):
    """A Shard, once its size, header and outer offsets are checked.

    Raises: UserError naming the file when it is damaged or was made with another tokenizer.
    """
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            header = file.read(HEADER.size)
    except OSError as error:
        raise damaged(path, error.strerror) from None
    if len(header) < HEADER.size or header[:8] != MAGIC:
        raise damaged(path, "not a token shard")
    _, version, bytes_per_token, num_docs, num_tokens, digest = HEADER.unpack(header)
    if version != VERSION or bytes_per_token not in (2, 4):
        raise UserError(f"{path}: shard format {version}, {bytes_per_token} bytes a token (this code reads {VERSION})")
    tokens_at = HEADER.size + 8 * (num_docs + 1)
    expected = tokens_at + bytes_per_token * num_tokens
    if size != expected:
        raise damaged(path, f"{size} bytes, but its header says {expected}")
    if digest != tokenizer_digest:
        raise damaged(path, "made with a different tokenizer from the tokenizer.json beside it")
    mapped = np.memmap(path, mode="r")  # one map a shard: each keeps a file open
    if hasattr(mmap, "MADV_RANDOM"):  # samples come in random order: reading ahead would read 30 times as much
        mapped.base.madvise(mmap.MADV_RANDOM)
    mapped = np.asarray(mapped)  # indexing a plain array is faster
    offsets, tokens = mapped[HEADER.size : tokens_at].view("<u8"), mapped[tokens_at:].view(f"<u{bytes_per_token}")
    if offsets[0] != 0 or offsets[-1] != num_tokens:
        raise damaged(path, "offsets do not cover the tokens in order")
    return Shard(path, offsets, tokens)


# ---------------------------------------------------------------------------------------------------------------------
# Counter-based random numbers: a hash of what the number is for


def mix(x):
    """A bijection of uint64 that looks random (the finalizer of splitmix64, Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash64(*values):
    """uint64 hash of integers and integer arrays, broadcast together. Always an array: scalars would warn of overflow."""
    state = np.zeros(1, np.uint64)
    for value in values:
        state = mix(state + np.asarray(value).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    return state


def permute(index, n, key):
    """Where a pseudo-random permutation of range(n) sends `index` (uint64 array), without storing the permutation.

    A Feistel network of six rounds permutes the next power of four above n; results outside range(n) go through it
    again until they land inside ("cycle walking": at most 4 times on average).
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


def shuffled(positions, n, seed, source=0):
    """(numbers, epochs) at `positions` of an endless sequence that visits range(n) in a new order every epoch."""
    epochs = positions // n
    numbers = np.empty_like(positions)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        index = (positions[here] % n).astype(np.uint64)
        numbers[here] = permute(index, n, hash64(seed, 2 * source, epoch)).astype(np.int64)
    return numbers, epochs


# ---------------------------------------------------------------------------------------------------------------------
# Masking, and cutting a batch into micro-batches


def mask_tokens(tokens, lengths, sample_keys, mask_prob, special, is_special, continues=None):
    """Choose tokens to predict, each with probability mask_prob, and hide them in place: 80 % become [MASK], 10 % a
    random token of the vocabulary, 10 % stay. Special tokens, [UNK] included, are never chosen.

    tokens: (num_tokens,) int32. lengths: of its sequences. sample_keys: (B,) uint64. continues: (vocab_size,) bool, the
    entries that continue a word; a word is then chosen as a whole. Returns (positions, labels), int64.
    Source: Devlin et al. 2019, section 3.1; [UNK] as in transformers' DataCollatorForLanguageModeling.
    """
    position = np.arange(len(tokens)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    draw = mix(np.repeat(sample_keys, lengths) + position.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    chosen = draw < np.uint64(min(int(mask_prob * 2**64), 2**64 - 1))
    if continues is not None:  # by its first token, so each token still has probability mask_prob. [CLS] ends earlier words
        chosen = chosen[np.maximum.accumulate(np.where(continues[tokens], 0, np.arange(len(tokens))))]
    chosen &= ~is_special[tokens]
    positions = np.flatnonzero(chosen)
    labels = tokens[positions].astype(np.int64)
    draw = mix(draw[positions] + np.uint64(1))  # the upper 32 bits pick the action, the lower 32 the random token
    action = draw >> np.uint64(32)
    random_token = ((draw & np.uint64(0xFFFFFFFF)) * np.uint64(len(is_special))) >> np.uint64(32)
    hidden = np.where(action < np.uint64(0.9 * 2**32), random_token.astype(np.int32), tokens[positions])
    tokens[positions] = np.where(action < np.uint64(0.8 * 2**32), np.int32(special["[MASK]"]), hidden)
    return positions, labels


def split_evenly(lengths, micro_batch_tokens, multiple):
    """Cut samples, in order, into the fewest micro-batches of nearly equal work: their bounds, a list of ints.

    No micro-batch has more than micro_batch_tokens tokens. Their number is rounded up to `multiple`; there must be at
    least that many samples. A sample of n tokens is n (ATTENTION_HALF + n) of work, since attention's grows with n^2.
    """
    ends = np.concatenate([[0], np.cumsum(lengths)])
    work = np.concatenate([[0], np.cumsum(lengths * (ATTENTION_HALF + lengths))])  # integers: the same on every machine
    # Filling micro-batches from the back gives the fewest, and the earliest sample that each may begin at.
    earliest = [len(lengths)]
    while earliest[-1] > 0:
        earliest.append(int(np.searchsorted(ends, ends[earliest[-1]] - micro_batch_tokens)))
    count = round_up(len(earliest) - 1, multiple)
    bounds = [0]
    for i in range(1, count):
        target = work[-1] * i / count
        after = int(np.searchsorted(work, target))
        nearest = after - 1 if target - work[after - 1] < work[after] - target else after
        # Limits: the rest must fit into the micro-batches left, this one into micro_batch_tokens; none is empty.
        low = max(earliest[min(count - i, len(earliest) - 1)], bounds[-1] + 1)
        high = int(np.searchsorted(ends, ends[bounds[-1]] + micro_batch_tokens, side="right")) - 1
        bounds.append(max(low, min(nearest, high, len(lengths) - (count - i))))
    return bounds + [len(lengths)]


# ---------------------------------------------------------------------------------------------------------------------
# Samples and micro-batches


@dataclass
class MicroBatch(Batch):
    """Some samples with tokens to predict; its counts leave out the padding."""

    num_samples: int = 0
    num_tokens: int = 0  # in sequences, [CLS] and [SEP] included
    num_masked: int = 0  # rows to predict
    sum_squared_lengths: int = 0  # the work of attention is proportional to it


class Samples:
    """The samples of one split of a shard directory at one sequence length.

    split: "train" or "val". seq_length: tokens a sample has at most, [CLS] and [SEP] included. chunk: False takes the
    first seq_length tokens of each document, as MosaicBERT did; True splits each document into consecutive
    samples. padded: whether the model pads each sample to seq_length, so that micro-batches are cut accordingly.
    whole_words: mask all tokens of a word or none.
    Raises: UserError when the directory is missing or damaged, or its tokenizer does not mark what continues a word.
    """

    total_weight = 1.0  # of a mixture, as given

    def __init__(self, directory, split, seq_length, chunk=False, padded=False, whole_words=False):
        manifest = read_manifest(directory)
        self.directory, self.split, self.seq_length, self.chunk, self.padded = directory, split, seq_length, chunk, padded
        self.tokenizer_path = os.path.join(directory, "tokenizer.json")
        self.tokenizer_sha256 = digest_of(self.tokenizer_path)
        tokenizer, self.special = load_tokenizer(self.tokenizer_path)
        self.vocab_size = tokenizer.get_vocab_size()
        with open(self.tokenizer_path, encoding="utf-8") as file:
            self.tokenizer_text = file.read()
        self.is_special = np.zeros(self.vocab_size, bool)
        self.is_special[list(self.special.values())] = True
        self.continues = continuations(tokenizer, self.tokenizer_path) if whole_words else None
        try:
            entries = [entry for entry in manifest["shards"] if entry["split"] == split]
            self.digest = hash_of([entry["sha256"] for entry in entries])
            names = [entry["file"] for entry in entries]
            if any(name != os.path.basename(name) or not name for name in names):  # none may leave the directory
                raise TypeError
            small = sum(entry["num_tokens"] for entry in entries) < CHECKED_TOKENS
        except (KeyError, TypeError):
            raise damaged(f"{directory}/manifest.json", "not a manifest of shards") from None
        allow_open_files(len(names))
        tokenizer_digest = bytes.fromhex(self.tokenizer_sha256)
        self.shards = [open_shard(os.path.join(directory, name), tokenizer_digest) for name in names]
        if small:
            for shard in self.shards:
                shard.check(self.vocab_size)
        self.num_tokens = np.array([len(shard.tokens) for shard in self.shards])
        num_docs = [len(shard.offsets) - 1 for shard in self.shards]
        self.shard_starts = np.concatenate([[0], np.cumsum(num_docs)]).astype(np.int64)  # in documents
        if chunk:
            blocks = [-(-count // INDEX_DOCS) for count in num_docs]
            self.shard_blocks = np.concatenate([[0], np.cumsum(blocks)]).astype(np.int64)
            self.block_starts = self.make_index()  # in samples

    def __len__(self):
        return int(self.block_starts[-1] if self.chunk else self.shard_starts[-1])

    def order(self, positions, seed):
        """(samples, epochs) at `positions` of the endless training sequence, each an int64 array like `positions`."""
        return shuffled(positions, len(self), seed)

    def source_of(self, samples):
        """(number of each sample's source, number of the sample within it): for mixtures, see below."""
        return np.zeros_like(samples), samples

    def shares(self):
        """(Samples, share) of each source of a mixture."""
        return []

    def locate(self, samples):
        """(shard, start, length) of each sample's tokens, int64 arrays; [CLS] and [SEP] don't count."""
        if self.chunk:
            return self.locate_chunks(samples)
        shard = np.searchsorted(self.shard_starts, samples, side="right") - 1
        start, end = self.read_offsets(shard, samples - self.shard_starts[shard], 2).T
        return shard, start, np.minimum(end - start, self.seq_length - 2)

    def locate_chunks(self, samples):
        """locate with chunk=True: find a sample's block of INDEX_DOCS documents, then its document, and how far into it."""
        longest, rows = self.seq_length - 2, np.arange(len(samples))
        block = np.searchsorted(self.block_starts, samples, side="right") - 1
        shard = np.searchsorted(self.shard_blocks, block, side="right") - 1
        offsets = self.read_offsets(shard, (block - self.shard_blocks[shard]) * INDEX_DOCS, INDEX_DOCS + 1)
        lengths, number = np.diff(offsets), samples - self.block_starts[block]  # in the block
        ends = np.cumsum(-(-lengths // longest), axis=1)  # samples up to each document's end
        place = (ends <= number[:, None]).sum(1)  # of the sample's document
        if (wrong := place == INDEX_DOCS).any():  # the shard was another when the index was made
            raise damaged(self.shards[shard[wrong.argmax()]].path, "offsets out of order", True)
        skipped = (number - np.where(place > 0, ends[rows, place - 1], 0)) * longest
        return shard, offsets[rows, place] + skipped, np.minimum(lengths[rows, place] - skipped, longest)

    def read_offsets(self, shard, document, count):
        """(n, count) int64: offsets from each document on; past a shard's end, its last one repeats. Raises: UserError."""
        offsets = np.empty((len(shard), count), np.int64)
        for row, s, d in zip(offsets, shard.tolist(), document.tolist()):
            found = self.shards[s].offsets[d : d + count]
            row[: len(found)] = found
            row[len(found) :] = row[len(found) - 1]
        wrong = (np.diff(offsets) < 0).any(1) | (offsets[:, -1] > self.num_tokens[shard])
        if wrong.any():
            raise damaged(self.shards[shard[wrong.argmax()]].path, "offsets out of order", True)
        return offsets

    def make_index(self):
        """The number of samples before each block of INDEX_DOCS documents, int64. Every process makes it, in seconds for C4."""
        counts = [np.zeros(1, np.int64)]
        for shard in self.shards:
            lengths = np.diff(shard.offsets.astype(np.int64))
            if (lengths < 0).any():
                raise damaged(shard.path, "offsets out of order")
            chunks = -(-lengths // (self.seq_length - 2))
            counts.append(pad_to(chunks, -(-len(chunks) // INDEX_DOCS) * INDEX_DOCS, 0).reshape(-1, INDEX_DOCS).sum(1))
        return np.cumsum(np.concatenate(counts))

    def micro_batch(self, samples, epochs, seed, mask_prob, located=None):
        """The masked, unpadded MicroBatch of `samples` (int64 array) in their epochs. located: self.locate(samples)."""
        import torch  # here: prepare_c4.py's processes don't need it, and start a second faster without

        shard, start, length = self.locate(samples) if located is None else located
        lengths = length + 2
        cu_seqlens, windows = pack(lengths, self.seq_length, SEQUENCE_MULTIPLE)
        starts, num_tokens = np.cumsum(lengths) - lengths, int(lengths.sum())
        stored = np.full(round_up(num_tokens, TOKEN_MULTIPLE), self.special["[PAD]"], np.uint32)
        stored[starts] = self.special["[CLS]"]
        stored[starts + length + 1] = self.special["[SEP]"]
        for s, begin, to, count in zip(shard.tolist(), start.tolist(), (starts + 1).tolist(), length.tolist()):
            stored[to : to + count] = self.shards[s].tokens[begin : begin + count]
        if stored.max() >= self.vocab_size:
            path = self.shards[shard[np.searchsorted(starts, stored.argmax(), side="right") - 1]].path
            raise damaged(path, f"token id {stored.max()} outside the vocabulary of {self.vocab_size}", True)
        tokens = stored.view(np.int32)

        source, number = self.source_of(samples)
        sample_keys = hash64(seed, 2 * source + 1, epochs, number)
        positions, labels = mask_tokens(
            tokens[:num_tokens], lengths, sample_keys, mask_prob, self.special, self.is_special, self.continues
        )
        num_rows = round_up(len(positions), MASKED_MULTIPLE)
        return MicroBatch(
            input_ids=torch.from_numpy(tokens),
            cu_seqlens=torch.from_numpy(cu_seqlens),
            max_seqlen=self.seq_length,
            windows=None if windows is None else torch.from_numpy(windows),
            masked_positions=torch.from_numpy(pad_to(positions, num_rows, 0)),
            labels=torch.from_numpy(pad_to(labels, num_rows, IGNORED)),
            num_samples=len(samples),
            num_tokens=num_tokens,
            num_masked=len(positions),
            sum_squared_lengths=int((lengths**2).sum()),
        )

    def parts(self, samples, micro_batch_tokens, rank, world_size, equal=True, located=None):
        """Slices of `samples`, one a micro-batch: this rank's, every world_size-th of them.

        The cut depends on the lengths of all samples, so every rank finds the same one. equal: as gradient reduction
        needs, each rank gets the same number.
        """
        _, _, length = self.locate(samples) if located is None else located
        lengths = np.full_like(length, self.seq_length) if self.padded else length + 2
        bounds = split_evenly(lengths, micro_batch_tokens, world_size if equal else 1)
        return [slice(bounds[i], bounds[i + 1]) for i in range(rank, len(bounds) - 1, world_size)]

    def of_step(self, step, global_batch_size, seed):
        """(samples, epochs) of training step `step`, counted from 0, over all processes."""
        return self.order(np.arange(step * global_batch_size, (step + 1) * global_batch_size), seed)

    def step_batches(self, step, global_batch_size, seed, mask_prob, micro_batch_tokens, rank=0, world_size=1):
        """This rank's micro-batches of training step `step`, counted from 0, as a list."""
        samples, epochs = self.of_step(step, global_batch_size, seed)
        located = np.stack(self.locate(samples))
        parts = self.parts(samples, micro_batch_tokens, rank, world_size, located=located)
        return [self.micro_batch(samples[part], epochs[part], seed, mask_prob, located[:, part]) for part in parts]


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


def verify(data_dir):
    """Check every digest of a shard directory, and read every offset and token; returns the number of shards.

    Raises: UserError at the first fault.
    """
    manifest = read_manifest(data_dir)
    if digest_of(os.path.join(data_dir, "tokenizer.json")) != manifest.get("tokenizer_sha256"):
        raise damaged(f"{data_dir}/tokenizer.json", "digest differs from the manifest's")
    for split in ("train", "val"):
        samples = Samples(data_dir, split, seq_length=128)
        entries = [entry for entry in manifest["shards"] if entry["split"] == split]
        for entry, shard in zip(entries, samples.shards):
            if file_digest(shard.path) != entry["sha256"]:
                raise damaged(shard.path, "digest differs from the manifest's")
            shard.check(samples.vocab_size)
    return len(manifest["shards"])


# ---------------------------------------------------------------------------------------------------------------------
# Mixtures of several directories. With a single one, nothing below is used but open_samples.

MIXTURE_PERIOD = 10_000  # samples in which each source of a mixture has its exact share
MIXTURE_STREAM = 2**32  # separates the hashes that mix sources from those of order (2 * source) and masks (2 * source + 1)


def open_samples(data_dir, split, seq_length, chunk=False, padded=False, whole_words=False):
    """The Samples of DIRECTORY, or the Mixture of DIRECTORY:WEIGHT,DIRECTORY:WEIGHT. Raises: UserError."""
    if os.path.isdir(data_dir) or not ("," in data_dir or ":" in data_dir):
        return Samples(data_dir, split, seq_length, chunk, padded, whole_words)
    directories, weights = [], []
    for part in data_dir.split(","):
        directory, _, weight = part.strip().rpartition(":")
        try:
            weights.append(float(weight))
        except ValueError:
            weights.append(0.0)
        if not directory or not 0 < weights[-1] < float("inf"):
            raise UserError(f"data_dir={data_dir}: {part.strip()!r} is not DIRECTORY:WEIGHT (e.g. a:0.7,b:0.3)")
        if os.path.realpath(directory) in map(os.path.realpath, directories):
            raise UserError(f"data_dir={data_dir}: {directory!r} is listed twice (list it once, with the sum of its weights)")
        directories.append(directory)
    sources = [Samples(directory, split, seq_length, chunk, padded, whole_words) for directory in directories]
    return Mixture(sources, weights) if len(sources) > 1 else sources[0]


class Mixture(Samples):
    """Several Samples as one, numbered one after the other; of a training split, `weights` are their shares.

    Held-out splits ignore weights and use every sample once.
    Raises: UserError where tokenizers differ or a source has no training samples.
    """

    def __init__(self, sources, weights):
        first = sources[0]
        vars(self).update(vars(first))  # sequence length, tokenizer and special tokens are the same for all
        for source in sources:
            if source.tokenizer_sha256 != first.tokenizer_sha256:
                hint = f"prepare it with --tokenizer={first.tokenizer_path}"
                raise UserError(f"{source.tokenizer_path}: a different tokenizer from that of {first.directory} ({hint})")
            if self.split == "train" and len(source) == 0:
                raise UserError(f"{source.directory}: no training samples (prepare more text)")
        self.sources, self.weights, self.total_weight = sources, weights, sum(weights)
        self.shards = [shard for source in sources for shard in source.shards]
        self.source_shards = np.cumsum([0] + [len(source.shards) for source in sources])
        self.source_starts = np.cumsum([0] + [len(source) for source in sources])  # in samples
        if self.split == "train":
            self.weights = self.quotas = self.make_quotas(np.array(weights)).tolist()
        self.digest = hash_of([f"{weight} {source.digest}" for weight, source in zip(self.weights, sources)])

    def __len__(self):
        return int(self.source_starts[-1])

    def make_quotas(self, weights):
        """Of MIXTURE_PERIOD samples, how many each source gives: rounded so that they add up (largest remainder)."""
        weights = weights / weights.max()  # or the sum of some that are huge would be infinite
        exact = weights / weights.sum() * MIXTURE_PERIOD
        quotas = np.floor(exact).astype(np.int64)
        quotas[np.argsort(quotas - exact, kind="stable")[: MIXTURE_PERIOD - quotas.sum()]] += 1
        if (quotas == 0).any():
            directory = self.sources[quotas.argmin()].directory
            raise UserError(f"{directory}: a share below 1 of {MIXTURE_PERIOD} (leave the directory out)")
        return quotas

    def order(self, positions, seed):
        """Every period of the sequence shuffles its sources' slots; a slot takes the source's next sample."""
        if self.split != "train":
            return shuffled(positions, len(self), seed)
        periods, slots = positions // MIXTURE_PERIOD, (positions % MIXTURE_PERIOD).astype(np.uint64)
        for period in np.unique(periods):
            here = periods == period
            slots[here] = permute(slots[here], MIXTURE_PERIOD, hash64(seed, MIXTURE_STREAM, period))
        slots, starts = slots.astype(np.int64), np.cumsum([0, *self.quotas])
        sources = np.searchsorted(starts, slots, side="right") - 1
        samples, epochs = np.empty_like(positions), np.empty_like(positions)
        for source in np.unique(sources):
            here = sources == source
            of_source = periods[here] * self.quotas[source] + slots[here] - starts[source]
            number, epochs[here] = shuffled(of_source, len(self.sources[source]), seed, source)
            samples[here] = self.source_starts[source] + number
        return samples, epochs

    def source_of(self, samples):
        sources = np.searchsorted(self.source_starts, samples, side="right") - 1
        return sources, samples - self.source_starts[sources]

    def shares(self):
        return [(source, quota / MIXTURE_PERIOD) for source, quota in zip(self.sources, self.quotas)]

    def locate(self, samples):
        sources, numbers = self.source_of(samples)
        found = np.empty((3, len(samples)), np.int64)
        for source in np.unique(sources):
            here = sources == source
            found[:, here] = self.sources[source].locate(numbers[here])
            found[0, here] += self.source_shards[source]
        return tuple(found)
