"""Shards, the order of samples, masking, and micro-batches."""

import json

import numpy as np
import pytest
import torch

import data
from config import UserError
from toy import SPECIAL, VOCAB_SIZE, make_documents, make_shards


@pytest.fixture(scope="module")
def documents():
    return make_documents(300)


@pytest.fixture(scope="module")
def samples(tmp_path_factory, documents):
    return data.Samples(make_shards(tmp_path_factory.mktemp("data") / "shards", documents), "train", 32)


def sequences(batch):
    """The micro-batch as a list of lists, with the masked tokens put back."""
    tokens = batch.input_ids.clone()
    real = batch.labels != data.IGNORED
    tokens[batch.masked_positions[real]] = batch.labels[real].int()
    bounds = batch.cu_seqlens.tolist()
    return [tokens[a:b].tolist() for a, b in zip(bounds, bounds[1:]) if b > a]


def stream(samples, steps, micro_batch_tokens, world_size, seed=3, batch_size=24):
    """Everything the processes see in some steps, in the order of the samples: (tokens, masked input) of each."""
    seen = []
    for step in steps:
        ranks = [
            samples.train_step(step, batch_size, seed, 0.3, micro_batch_tokens, rank, world_size)
            for rank in range(world_size)
        ]
        assert len({len(batches) for batches in ranks}) == 1
        for micro_step in range(len(ranks[0])):
            for batches in ranks:
                batch = batches[micro_step]
                bounds = batch.cu_seqlens.tolist()
                inputs = [batch.input_ids[a:b].tolist() for a, b in zip(bounds, bounds[1:]) if b > a]
                seen += list(zip(sequences(batch), inputs))
    return seen


def test_a_sample_is_the_beginning_of_its_document(samples, documents):
    cls, sep = SPECIAL.index("[CLS]"), SPECIAL.index("[SEP]")
    stored = documents[0::2] + documents[1::2]  # two shards
    batch = samples.micro_batch(np.arange(len(samples)), np.zeros(len(samples), int), 1, 0.3)
    assert sequences(batch) == [[cls, *document[:30].tolist(), sep] for document in stored]


def test_chunks_are_whole_documents_cut_up(tmp_path_factory, documents):
    chunked = data.Samples(make_shards(tmp_path_factory.mktemp("c") / "shards", documents), "train", 12, chunk=True)
    expected = [document[i : i + 10].tolist() for document in documents[0::2] + documents[1::2] for i in range(0, len(document), 10)]
    batch = chunked.micro_batch(np.arange(len(chunked)), np.zeros(len(chunked), int), 1, 0.3)
    assert [sequence[1:-1] for sequence in sequences(batch)] == expected


def test_batch_arrays(samples):
    (batch,) = samples.train_step(0, 24, 1, 0.3, 10_000)
    assert len(batch.input_ids) % data.TOKEN_MULTIPLE == 0 and batch.input_ids.dtype == torch.int32
    assert (batch.input_ids[batch.num_tokens :] == 0).all()
    assert (len(batch.cu_seqlens) - 1) % data.SEQUENCE_MULTIPLE == 0 and batch.cu_seqlens.dtype == torch.int32
    assert batch.cu_seqlens[0] == 0 and batch.cu_seqlens[-1] == batch.num_tokens
    assert len(batch.labels) == len(batch.masked_positions) and len(batch.labels) % data.MASKED_MULTIPLE == 0
    assert (batch.labels[: batch.num_masked] != data.IGNORED).all() and (batch.labels[batch.num_masked :] == data.IGNORED).all()
    lengths = batch.cu_seqlens.diff()
    assert batch.sum_squared_lengths == (lengths.long() ** 2).sum() and batch.num_samples == 24 == (lengths > 0).sum()
    assert batch.max_seqlen >= lengths.max()
    per_window = batch.cu_seqlens[batch.windows.long()].diff()
    assert per_window.max() <= 128 and per_window.sum() == batch.num_tokens


def test_long_sequences_have_no_windows(tmp_path, documents):
    (batch,) = data.Samples(make_shards(tmp_path / "shards", documents), "train", 129).train_step(0, 24, 1, 0.3, 10_000)
    assert batch.windows is None


def test_every_world_size_and_micro_batch_sees_the_same(samples):
    expected = stream(samples, range(20), 10_000, 1)
    for world_size in (1, 2, 4, 8):
        for micro_batch_tokens in (32, 50, 100, 333):
            assert stream(samples, range(20), micro_batch_tokens, world_size) == expected


def test_resume_at_any_step_continues_the_stream(samples):
    whole = stream(samples, range(30), 100, 2)
    for step in (1, 11, 12, 13, 14, 29):  # 300 documents in steps of 24: an epoch ends within step 12
        assert stream(samples, range(step, 30), 100, 2) == whole[step * 24 :]


def test_an_epoch_is_a_permutation_and_epochs_differ(samples):
    n = len(samples)
    order, epochs = samples.at(np.arange(3 * n), seed=5)
    for epoch in range(3):
        assert sorted(order[epochs == epoch]) == list(range(n))
    assert (order[:n] != order[n : 2 * n]).mean() > 0.9
    assert (samples.at(np.arange(n), seed=6)[0] != order[:n]).mean() > 0.9


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 63, 64, 65, 1000])
def test_permute_is_a_bijection(n):
    assert sorted(data.permute(np.arange(n, dtype=np.uint64), n, data.hash64(1))) == list(range(n))


def test_permute_looks_random():
    """Of 4,096 orders of 4 places each of the 24 comes about equally often (chi-square, 23 degrees of freedom)."""
    orders = [tuple(data.permute(np.arange(4, dtype=np.uint64), 4, data.hash64(seed))) for seed in range(4096)]
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 24 and ((counts - 4096 / 24) ** 2 / (4096 / 24)).sum() < 60


def test_permute_needs_no_memory_for_a_huge_corpus():
    places = data.permute(np.arange(1000, dtype=np.uint64), 10**12, data.hash64(1))
    assert len(set(places.tolist())) == 1000 and places.max() < 10**12 and places.min() >= 0


def test_masking_rates():
    """15 % chosen; of them 80 % [MASK], 10 % random, 10 % as they were: within 5 standard deviations of 200,000 draws."""
    rng = np.random.default_rng(0)
    lengths = np.full(2000, 100)
    original = rng.integers(0, VOCAB_SIZE, lengths.sum()).astype(np.int32)
    tokens = original.copy()
    is_special = np.arange(VOCAB_SIZE) < len(SPECIAL)
    special = {name: i for i, name in enumerate(SPECIAL)}
    keys = data.hash64(1, np.arange(2000))
    positions, labels = data.mask_tokens(tokens, lengths, keys, 0.15, special, is_special)

    def close(count, total, rate):
        return abs(count / total - rate) < 5 * (rate * (1 - rate) / total) ** 0.5

    assert (labels == original[positions]).all() and not is_special[labels].any()
    untouched = np.setdiff1d(np.arange(len(tokens)), positions)
    assert (tokens[untouched] == original[untouched]).all()
    assert close(len(positions), (~is_special[original]).sum(), 0.15)
    now = tokens[positions]
    assert close((now == special["[MASK]"]).sum(), len(now), 0.8 + 0.1 / VOCAB_SIZE)
    assert close((now == labels).sum(), len(now), 0.1 + 0.1 / VOCAB_SIZE)
    replaced = now[(now != special["[MASK]"]) & (now != labels)]
    assert len(np.unique(replaced)) == VOCAB_SIZE - 1  # any token of the vocabulary but [MASK], which counts above
    again = original.copy()
    assert (data.mask_tokens(again, lengths, keys, 0.15, special, is_special)[0] == positions).all() and (again == tokens).all()


def test_masks_are_fresh_every_epoch_and_depend_on_nothing_else(samples):
    one = np.array([7])
    alone = samples.micro_batch(one, np.array([0]), 1, 0.5)
    (length,) = samples.locate(one)[2] + 2
    together = samples.micro_batch(np.array([3, 7]), np.array([0, 0]), 1, 0.5)
    start = int(together.cu_seqlens[1])
    assert (together.input_ids[start : start + length] == alone.input_ids[:length]).all()
    later = samples.micro_batch(one, np.array([1]), 1, 0.5)
    other_seed = samples.micro_batch(one, np.array([0]), 2, 0.5)
    for batch in (later, other_seed):
        assert batch.masked_positions.tolist() != alone.masked_positions.tolist()
    fewer = samples.micro_batch(one, np.array([0]), 1, 0.2)  # a falling rate masks a subset
    assert set(fewer.masked_positions[: fewer.num_masked].tolist()) < set(alone.masked_positions[: alone.num_masked].tolist())


def test_cut():
    """The fewest micro-batches possible, none too long or empty, a multiple asked for, and nearly equal."""
    rng = np.random.default_rng(0)
    for _ in range(500):
        multiple = int(rng.choice([1, 2, 4]))
        lengths = rng.integers(2, 129, multiple * rng.integers(1, 15))
        limit = int(rng.integers(128, 1000))
        bounds = data.cut(lengths, limit, multiple)
        totals = np.add.reduceat(lengths, bounds[:-1])
        fewest, room = 0, 0
        for length in lengths:  # greedy is optimal for cuts in order
            fewest, room = (fewest + 1, limit - length) if length > room else (fewest, room - length)
        assert bounds[0] == 0 and bounds[-1] == len(lengths) and (np.diff(bounds) > 0).all()
        assert totals.max() <= limit and len(totals) == -(-fewest // multiple) * multiple
    equal = np.add.reduceat(full := np.full(4096, 128), data.cut(full, 131072, 1)[:-1])
    assert equal.tolist() == [131072] * 4
    ragged = rng.integers(20, 129, 4096)
    totals = np.add.reduceat(ragged, data.cut(ragged, 131072, 1)[:-1])
    assert totals.max() - totals.min() <= 256


def test_prefetch_keeps_order_and_errors():
    assert list(data.prefetch(lambda x: x * x, range(5))) == [0, 1, 4, 9, 16]
    assert list(data.prefetch(lambda x: x, [])) == []
    with pytest.raises(ZeroDivisionError):
        list(data.prefetch(lambda x: 1 / x, [1, 0]))


def test_verify_finds_every_flipped_bit_and_truncation(tmp_path):
    path = tmp_path / "shards"
    make_shards(path, make_documents(20), shards=1)
    assert data.verify(str(path)) == 2
    rng = np.random.default_rng(0)
    for name in ("train_00000.bin", "tokenizer.json"):
        original = (path / name).read_bytes()
        for i in range(60):
            damaged = bytearray(original)
            if i % 2:
                del damaged[rng.integers(len(damaged)) :]
            else:
                damaged[rng.integers(len(damaged))] ^= 1 << rng.integers(8)
            (path / name).write_bytes(damaged)
            with pytest.raises(UserError):
                data.verify(str(path))
        (path / name).write_bytes(original)
    assert data.verify(str(path)) == 2


def test_a_bad_token_in_a_large_shard_is_found_when_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "shards"
    make_shards(path, shards=1)
    contents = bytearray((path / "train_00000.bin").read_bytes())
    contents[-1] = 255
    (path / "train_00000.bin").write_bytes(contents)
    with pytest.raises(UserError, match="outside the vocabulary"):
        data.Samples(str(path), "train", 128)
    monkeypatch.setattr(data, "SMALL_SHARD", 0)
    samples = data.Samples(str(path), "train", 128)
    with pytest.raises(UserError, match="train_00000.bin: token id .* outside the vocabulary"):
        samples.train_step(0, len(samples), 1, 0.3, 10**6)


def test_command_line(tmp_path, capsys):
    path = make_shards(tmp_path / "shards")
    data.main([f"--verify={path}"])
    assert "3 shards" in capsys.readouterr().out
    data.main([f"--bench={path}", "--seq_length=32", "--micro_batch_tokens=2048"])
    assert "M tokens/s" in capsys.readouterr().out
    for argv in ([], ["--verify=nowhere"], ["--bench=nowhere"]):
        with pytest.raises(SystemExit) as stopped:
            data.main(argv)
        assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_wide_vocabulary_uses_four_bytes(tmp_path):
    path = tmp_path / "train_00000.bin"
    entry = data.write_shard(path, [np.array([70_000, 1])], 4, bytes(32))
    offsets, tokens = data.open_shard(path, bytes(32), 80_000)
    assert tokens.tolist() == [70_000, 1] and offsets.tolist() == [0, 2] and entry["bytes"] == path.stat().st_size
    assert json.dumps(entry)
