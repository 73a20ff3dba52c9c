"""Damage a shard many times and read it: python -m studies.fuzz_shards SHARD_DIRECTORY COUNT

Each damaged shard must end in an error of one line, or in a correct read; anything else ends the script. Prints
{"refused", "read", "anonymous_mb"}, the last of which is the most memory that was in use, without mapped files.
"""

import json
import os
import random
import struct
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np

import data
from common.batch import IGNORED
from common.options import UserError
from tests.toy import anonymous_mb

EXTREMES = [0, 1, 2, 3, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]
SEQ_LENGTH = 32


def mutate(contents, rng):
    """A damaged version of a shard's bytes. The header is hit most often, as most can go wrong there."""
    contents = bytearray(contents)
    num_docs = struct.unpack_from("<Q", contents, 16)[0]
    offsets_end = data.HEADER.size + 8 * (num_docs + 1)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        kind = rng.randrange(7)
        if kind == 0:  # a field of the header
            start, width = rng.choice([(8, 4), (12, 4), (16, 8), (24, 8)])
            value = rng.choice([*EXTREMES, rng.getrandbits(64), num_docs + rng.choice([-1, 1])])
            contents[start : start + width] = (value % 2 ** (8 * width)).to_bytes(width, "little")
        elif kind == 1:  # an offset
            start = data.HEADER.size + 8 * rng.randrange(num_docs + 1)
            value = rng.choice([*EXTREMES, rng.getrandbits(64), rng.randrange(2000)])
            contents[start : start + 8] = (value % 2**64).to_bytes(8, "little")
        elif kind == 2:  # a token
            start = offsets_end + 2 * rng.randrange(max(1, (len(contents) - offsets_end) // 2))
            contents[start : start + 2] = rng.randrange(65536).to_bytes(2, "little")
        elif kind == 3:  # a bit
            start = rng.randrange(len(contents))
            contents[start] ^= 1 << rng.randrange(8)
        elif kind == 4:  # truncated
            del contents[rng.randrange(len(contents)) :]
        elif kind == 5:  # longer
            contents += rng.randbytes(rng.randrange(1, 100))
        else:  # both counts, consistent with the file's size
            docs = rng.randrange(0, max(1, (len(contents) - data.HEADER.size) // 8))
            tokens = max(0, len(contents) - data.HEADER.size - 8 * (docs + 1)) // 2
            struct.pack_into("<QQ", contents, 16, docs, tokens)
        if len(contents) < offsets_end + 2:
            break
    return bytes(contents)


def read_all(directory, chunk):
    """Read every sample of the training split, and compare the first document with the file."""
    samples = data.Samples(directory, "train", SEQ_LENGTH, chunk)
    if len(samples) == 0:
        return
    numbers = np.arange(len(samples))
    batch = samples.micro_batch(numbers, np.zeros(len(numbers), np.int64), 1, 0.3)
    tokens, real = batch.input_ids.numpy().copy(), batch.labels.numpy() != IGNORED
    tokens[batch.masked_positions.numpy()[real]] = batch.labels.numpy()[real]
    assert tokens.min() >= 0 and tokens.max() < samples.vocab_size
    shard = samples.shards[0]
    length = min(int(shard.offsets[1] - shard.offsets[0]), SEQ_LENGTH - 2)
    assert (tokens[1 : 1 + length] == shard.tokens[:length]).all()
    assert batch.num_tokens == sum(samples.locate(numbers)[2] + 2)


def main(directory, count):
    warnings.simplefilter("error")
    warnings.simplefilter("ignore", ResourceWarning)
    path = Path(directory) / "train_00000.bin"
    contents, rng, counts, most = path.read_bytes(), random.Random(count), {"refused": 0, "read": 0}, 0.0

    def write(data):
        """As a new file: shortening one that is mapped would end this process with SIGBUS."""
        path.with_suffix(".tmp").write_bytes(data)
        os.replace(path.with_suffix(".tmp"), path)

    for i in range(count):
        mutated = mutate(contents, rng)
        write(mutated)
        try:
            read_all(directory, chunk=bool(i % 2))
            counts["read"] += 1
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            counts["refused"] += 1
        except BaseException:
            Path(tempfile.gettempdir(), "fuzz_failure.bin").write_bytes(mutated)
            raise
        most = max(most, anonymous_mb())
    write(contents)
    print(json.dumps({**counts, "anonymous_mb": most}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
