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
pure functions of (seed, epoch, sample, position): nothing is drawn from a stream, so a run may stop at any step and go
on with any number of processes without a state to store, and without reading anything it does not need.

    python data.py --verify=DIR   checks every digest and every token
    python data.py --bench=DIR    how fast one core makes micro-batches

Read next: prepare_c4.py, for how shards are made, or kernels/attention.py
"""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import struct
import time
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from config import UserError, command, load_config

MAGIC = b"MOSAICSH"
VERSION = 1
HEADER = struct.Struct("<8sIIQQ32s")

# Micro-batches are filled up to multiples of these, so that the GPU sees few shapes: tokens by [PAD] after the last
# sequence, masked positions by ignored rows, and sequences by empty ones.
TOKEN_MULTIPLE = 1024
MASKED_MULTIPLE = 256
SEQUENCE_MULTIPLE = 32

IGNORED = -100  # the label that F.cross_entropy skips
EVAL_SEED = 0  # evaluation masks are the same in every run, whatever its seed
SMALL_SHARD = 2**26  # tokens of a shard that are all checked when it is opened; of a larger one, when they are used


# ---------------------------------------------------------------------------------------------------------------------
# Shards on disk


def write_shard(path, documents, bytes_per_token, tokenizer_digest):
    """Write token arrays as one shard, under another name until it is whole.

    documents: list of 1-D integer arrays. tokenizer_digest: 32 bytes. Returns the manifest's entry for the file.
    """
    lengths = [len(document) for document in documents]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype("<u8")
    tokens = np.concatenate([*documents, np.empty(0, np.int64)]).astype(f"<u{bytes_per_token}")
    header = HEADER.pack(MAGIC, VERSION, bytes_per_token, len(documents), len(tokens), tokenizer_digest)
    digest = hashlib.sha256()
    # write(), not a memmap: on a full disk a store to mapped memory kills the process with SIGBUS. The number keeps a
    # process that outlived its killed parent for a moment from writing into the same file.
    partial = f"{path}.{os.getpid()}.tmp"
    try:
        with open(partial, "wb") as file:
            for part in (header, offsets, tokens):
                file.write(part)
                digest.update(part)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        with contextlib.suppress(OSError):
            os.remove(partial)  # on a full disk, make room for what was finished
        raise
    os.replace(partial, path)
    return {
        "file": os.path.basename(path),
        "num_docs": len(documents),
        "num_tokens": len(tokens),
        "bytes": HEADER.size + offsets.nbytes + tokens.nbytes,
        "sha256": digest.hexdigest(),
    }


def open_shard(path, tokenizer_digest, vocab_size):
    """(offsets, tokens) of a shard as read-only memory maps, after checking its size, header, and outer offsets.

    Raises: UserError naming the file when it is damaged or was made with another tokenizer.
    """
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
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
    # np.asarray: a plain array over the same mapping slices ten times faster than np.memmap's own class.
    offsets = np.asarray(np.memmap(path, "<u8", "r", HEADER.size, (num_docs + 1,)))
    tokens = np.empty(0, f"<u{bytes_per_token}")
    if num_tokens:  # an empty range cannot be mapped
        start = HEADER.size + 8 * (num_docs + 1)
        tokens = np.asarray(np.memmap(path, f"<u{bytes_per_token}", "r", start, (num_tokens,)))
    if offsets[0] != 0 or offsets[-1] != num_tokens:
        raise UserError(f"{path}: offsets do not cover the tokens (damaged; prepare again)")
    if 0 < num_tokens < SMALL_SHARD and tokens.max() >= vocab_size:
        raise UserError(f"{path}: token id {tokens.max()} outside the vocabulary of {vocab_size} (damaged shard)")
    return offsets, tokens


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
    masked_positions: "torch.Tensor"  # (num_rows,) int64: the rows to predict, then filling
    labels: "torch.Tensor"  # (num_rows,) int64: the original tokens, IGNORED for the filling
    num_samples: int
    num_tokens: int  # tokens in sequences, [CLS] and [SEP] included
    num_masked: int  # rows to predict
    sum_squared_lengths: int  # attention's work is proportional to it

    def to(self, device):
        """The same micro-batch on a device; from the CPU's pinned memory the copy is asynchronous."""
        if device.type == "cpu":
            return self
        tensors = {name: value for name, value in vars(self).items() if hasattr(value, "pin_memory")}
        moved = {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in tensors.items()}
        return MicroBatch(**{**vars(self), **moved})


class Samples:
    """The samples of one split of a shard directory, at one sequence length.

    data_dir: directory of prepare_c4.py. split: "train" or "val". seq_length: tokens a sample has at most, [CLS] and
    [SEP] included. chunk: False takes the first seq_length tokens of each document, as MosaicBERT did; True cuts each
    document into as many samples as it gives.
    Raises: UserError when the directory is missing, damaged or empty.
    """

    def __init__(self, data_dir, split, seq_length, chunk=False):
        hint = f"no finished shard directory; make one: python prepare_c4.py --source=FILES --out={data_dir}"
        manifest = read_json(os.path.join(data_dir, "manifest.json"), hint)
        tokenizer_path = os.path.join(data_dir, "tokenizer.json")
        tokenizer, self.special = load_tokenizer(tokenizer_path)
        self.vocab_size = tokenizer.get_vocab_size()
        with open(tokenizer_path, encoding="utf-8") as file:
            self.tokenizer_text = file.read()
        self.tokenizer_sha256 = file_digest(tokenizer_path)
        self.data_dir, self.seq_length, self.chunk = data_dir, seq_length, chunk
        try:
            entries = [entry for entry in manifest["shards"] if entry["split"] == split]
            self.digest = hash_of([entry["sha256"] for entry in entries])
            self.paths = [os.path.join(data_dir, os.path.basename(entry["file"])) for entry in entries]
        except (KeyError, TypeError):
            raise UserError(f"{data_dir}/manifest.json: not a manifest of shards ({hint})") from None
        digest = bytes.fromhex(self.tokenizer_sha256)
        self.shards = [open_shard(path, digest, self.vocab_size) for path in self.paths]
        # With chunk, sample_starts[d] is the first sample of document d; without, sample and document are one.
        self.sample_starts = [self._count_chunks(offsets) if chunk else None for offsets, _ in self.shards]
        counts = [
            int(starts[-1]) if chunk else len(offsets) - 1
            for (offsets, _), starts in zip(self.shards, self.sample_starts)
        ]
        self.shard_starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self.is_special = np.zeros(self.vocab_size, bool)
        self.is_special[list(self.special.values())] = True

    def __len__(self):
        return int(self.shard_starts[-1])

    def _count_chunks(self, offsets):
        per_sample = self.seq_length - 2
        num_chunks = (np.diff(offsets).astype(np.int64) + per_sample - 1) // per_sample
        return np.concatenate([[0], np.cumsum(num_chunks)])

    def at(self, positions, seed):
        """(samples, epochs) at `positions` of the endless training sequence, each an int64 array like `positions`.

        Every epoch is a permutation of its own, so the sequence has no start-up cost anywhere.
        """
        epochs = positions // len(self)
        samples = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            index = (positions[here] % len(self)).astype(np.uint64)
            samples[here] = permute(index, len(self), hash64(seed, 0, epoch)).astype(np.int64)
        return samples, epochs

    def locate(self, samples):
        """(shard, start, length) of each sample's tokens, int64 arrays; [CLS] and [SEP] are not counted."""
        shard = np.searchsorted(self.shard_starts, samples, side="right") - 1
        start, length = np.empty_like(samples), np.empty_like(samples)
        per_sample = self.seq_length - 2
        for number in np.unique(shard):
            here = shard == number
            document = samples[here] - self.shard_starts[number]
            skipped = 0
            if self.chunk:
                first = self.sample_starts[number]
                sample, document = document, np.searchsorted(first, document, side="right") - 1
                skipped = (sample - first[document]) * per_sample
            offsets = self.shards[number][0]
            begin, end = offsets[document].astype(np.int64), offsets[document + 1].astype(np.int64)
            if (begin > end).any() or (end > len(self.shards[number][1])).any():
                raise UserError(f"{self.paths[number]}: offsets out of order (damaged; prepare again)", True)
            start[here] = begin + skipped
            length[here] = np.minimum(end - begin - skipped, per_sample)
        return shard, start, length

    def micro_batch(self, samples, epochs, seed, mask_prob):
        """The masked, unpadded MicroBatch of `samples` (int64 array, with their epochs)."""
        import torch  # here, since prepare_c4.py's processes, which need it not, start a second earlier without

        shard, start, length = self.locate(samples)
        lengths = length + 2
        cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
        num_tokens = int(cu_seqlens[-1])
        tokens = np.full(round_up(num_tokens, TOKEN_MULTIPLE), self.special["[PAD]"], np.int32)
        tokens[cu_seqlens[:-1]] = self.special["[CLS]"]
        tokens[cu_seqlens[1:] - 1] = self.special["[SEP]"]
        for s, begin, end, to in zip(shard.tolist(), start.tolist(), (start + length).tolist(), cu_seqlens.tolist()):
            tokens[to + 1 : to + 1 + end - begin] = self.shards[s][1][begin:end]
        if tokens.max() >= self.vocab_size:
            path = self.paths[shard[np.searchsorted(cu_seqlens, tokens.argmax(), side="right") - 1]]
            raise UserError(f"{path}: token id {tokens.max()} outside the vocabulary of {self.vocab_size}", True)

        sample_keys = hash64(seed, 1, epochs, samples)
        positions, labels = mask_tokens(tokens[:num_tokens], lengths, sample_keys, mask_prob, self.special, self.is_special)
        num_rows = round_up(len(positions), MASKED_MULTIPLE)
        num_sequences = round_up(len(samples), SEQUENCE_MULTIPLE)
        return MicroBatch(
            input_ids=torch.from_numpy(tokens),
            cu_seqlens=torch.from_numpy(fill(cu_seqlens.astype(np.int32), num_sequences + 1, num_tokens)),
            max_seqlen=self.seq_length,
            masked_positions=torch.from_numpy(fill(positions, num_rows, 0)),
            labels=torch.from_numpy(fill(labels, num_rows, IGNORED)),
            num_samples=len(samples),
            num_tokens=num_tokens,
            num_masked=len(positions),
            sum_squared_lengths=int((lengths**2).sum()),
        )

    def parts(self, samples, micro_batch_tokens, rank, world_size, equal=True):
        """Slices of `samples`, one a micro-batch: this rank's, every world_size-th of them.

        The cut is made from the lengths of all samples, so every rank finds the same one. With `equal`, as gradient
        reduction needs, each rank has equally many.
        """
        bounds = cut(self.locate(samples)[2] + 2, micro_batch_tokens, world_size if equal else 1)
        return [slice(bounds[i], bounds[i + 1]) for i in range(rank, len(bounds) - 1, world_size)]

    def train_step(self, step, global_batch_size, seed, mask_prob, micro_batch_tokens, rank=0, world_size=1):
        """This rank's micro-batches of training step `step`, counted from 0, as a list."""
        positions = np.arange(step * global_batch_size, (step + 1) * global_batch_size)
        samples, epochs = self.at(positions, seed)
        parts = self.parts(samples, micro_batch_tokens, rank, world_size)
        return [self.micro_batch(samples[part], epochs[part], seed, mask_prob) for part in parts]


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
        for entry, path, (offsets, tokens) in zip(entries, samples.paths, samples.shards):
            if file_digest(path) != entry["sha256"]:
                raise UserError(f"{path}: digest differs from the manifest's (damaged; prepare again)")
            if (offsets[1:] < offsets[:-1]).any():
                raise UserError(f"{path}: offsets out of order (prepare again)")
            if len(tokens) and tokens.max() >= samples.vocab_size:
                raise UserError(f"{path}: token id {tokens.max()} outside the vocabulary of {samples.vocab_size}")
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
