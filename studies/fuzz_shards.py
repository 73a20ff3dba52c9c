"""Mutate a shard many times and read it: python tests/fuzz_shards.py SHARD_DIRECTORY COUNT

Prints {"refused", "read", "rss_mb"}. Anything but an error of one line or a read that is right ends it.
"""

import json
import random
import struct
import sys
import warnings
from pathlib import Path


import numpy as np  # noqa: E402

import data
from common.options import UserError

EXTREMES = [0, 1, 2, 3, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]


def mutate(contents, rng):
    """A damaged version of a shard's bytes: its header most often, as there is most to go wrong."""
    contents = bytearray(contents)
    num_docs = struct.unpack_from("<Q", contents, 16)[0]
    offsets_end = data.HEADER.size + 8 * (num_docs + 1)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        kind = rng.randrange(7)
        if kind == 0:  # a field of the header
            place, width = rng.choice([(8, 4), (12, 4), (16, 8), (24, 8)])
            value = rng.choice([*EXTREMES, rng.getrandbits(64), num_docs + rng.choice([-1, 1])])
            contents[place : place + width] = (value % 2 ** (8 * width)).to_bytes(width, "little")
        elif kind == 1:  # an offset
            place = data.HEADER.size + 8 * rng.randrange(num_docs + 1)
            value = rng.choice([*EXTREMES, rng.getrandbits(64), rng.randrange(2000)])
            contents[place : place + 8] = (value % 2**64).to_bytes(8, "little")
        elif kind == 2:  # a token
            place = offsets_end + 2 * rng.randrange(max(1, (len(contents) - offsets_end) // 2))
            contents[place : place + 2] = rng.randrange(65536).to_bytes(2, "little")
        elif kind == 3:  # a bit
            place = rng.randrange(len(contents))
            contents[place] ^= 1 << rng.randrange(8)
        elif kind == 4:  # cut short
            del contents[rng.randrange(len(contents)) :]
        elif kind == 5:  # longer
            contents += rng.randbytes(rng.randrange(1, 100))
        else:  # both lengths, in agreement with the file's size
            docs = rng.randrange(0, max(1, (len(contents) - data.HEADER.size) // 8))
            tokens = max(0, len(contents) - data.HEADER.size - 8 * (docs + 1)) // 2
            struct.pack_into("<QQ", contents, 16, docs, tokens)
        if len(contents) < offsets_end + 2:
            break
    return bytes(contents)


def read_all(directory, chunk):
    """Every sample of the split, each token checked against what the file holds."""
    samples = data.Samples(directory, "train", 32, chunk)
    if len(samples) == 0:
        return
    numbers = np.arange(len(samples))
    batch = samples.micro_batch(numbers, np.zeros(len(numbers), np.int64), 1, 0.3)
    tokens, real = batch.input_ids.numpy().copy(), batch.labels.numpy() != data.IGNORED
    tokens[batch.masked_positions.numpy()[real]] = batch.labels.numpy()[real]
    assert tokens.min() >= 0 and tokens.max() < samples.vocab_size
    offsets, stored = samples.shards[0].arrays()
    length = int(offsets[1] - offsets[0])
    assert (tokens[1 : 1 + min(length, 30)] == stored[: min(length, 30)]).all()
    assert batch.num_tokens == sum(samples.locate(numbers)[2] + 2)


def main(directory, count):
    warnings.simplefilter("error")
    warnings.simplefilter("ignore", ResourceWarning)  # a shard's file is closed when the shard is no longer used
    path = Path(directory) / "train_00000.bin"
    contents, rng, counts = path.read_bytes(), random.Random(count), {"refused": 0, "read": 0}
    for i in range(count):
        mutated = mutate(contents, rng)
        path.write_bytes(mutated)
        try:
            read_all(directory, chunk=bool(i % 2))
            counts["read"] += 1
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            counts["refused"] += 1
        except BaseException:
            Path("/tmp/fuzz_failure.bin").write_bytes(mutated)
            raise
    path.write_bytes(contents)
    # Not getrusage's, which a child process begins with its parent's.
    peak_kb = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(json.dumps({**counts, "rss_mb": int(peak_kb) / 1000}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
