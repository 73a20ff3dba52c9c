"""Shards, the order of samples, masking, and micro-batches."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import train
from common import vocabulary
from common.batch import IGNORED
from common.files import file_digest, whole_file, write_text
from common.options import UserError, hint_for
from tests.toy import ROOT, SPECIAL, VOCAB_SIZE, files_of, make_documents, make_shards, read_log, toy_argv


@pytest.fixture(scope="module")
def documents():
    return make_documents(300)


@pytest.fixture(scope="module")
def samples(tmp_path_factory, documents):
    return data.Samples(make_shards(tmp_path_factory.mktemp("data") / "shards", documents), "train", 32)


def sequences(batch):
    """The micro-batch's sequences as lists of ids, with the masked tokens restored."""
    tokens = batch.input_ids.clone()
    real = batch.labels != IGNORED
    tokens[batch.masked_positions[real]] = batch.labels[real].int()
    bounds = batch.cu_seqlens.tolist()
    return [tokens[a:b].tolist() for a, b in zip(bounds, bounds[1:]) if b > a]


def stream(samples, steps, micro_batch_tokens, world_size, seed=3, batch_size=24):
    """Everything the processes see in these steps, in sample order: (tokens, masked input) of each sample."""
    seen = []
    for step in steps:
        ranks = [
            samples.step_batches(step, batch_size, seed, 0.3, micro_batch_tokens, rank, world_size)
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


def test_chunks_cover_whole_documents(tmp_path_factory, documents):
    chunked = data.open_samples(make_shards(tmp_path_factory.mktemp("c") / "shards", documents), "train", 12, chunk=True)
    stored = documents[0::2] + documents[1::2]  # two shards
    expected = [document[i : i + 10].tolist() for document in stored for i in range(0, len(document), 10)]
    batch = chunked.micro_batch(np.arange(len(chunked)), np.zeros(len(chunked), int), 1, 0.3)
    assert [sequence[1:-1] for sequence in sequences(batch)] == expected


def test_batch_arrays(samples):
    (batch,) = samples.step_batches(0, 24, 1, 0.3, 10_000)
    assert len(batch.input_ids) % data.TOKEN_MULTIPLE == 0 and batch.input_ids.dtype == torch.int32
    assert (batch.input_ids[batch.num_tokens :] == 0).all()
    assert (len(batch.cu_seqlens) - 1) % data.SEQUENCE_MULTIPLE == 0 and batch.cu_seqlens.dtype == torch.int32
    assert batch.cu_seqlens[0] == 0 and batch.cu_seqlens[-1] == batch.num_tokens
    assert len(batch.labels) == len(batch.masked_positions) and len(batch.labels) % data.MASKED_MULTIPLE == 0
    assert (batch.labels[: batch.num_masked] != IGNORED).all() and (batch.labels[batch.num_masked :] == IGNORED).all()
    lengths = batch.cu_seqlens.diff()
    assert batch.sum_squared_lengths == (lengths.long() ** 2).sum() and batch.num_samples == 24 == (lengths > 0).sum()
    assert batch.max_seqlen >= lengths.max()
    per_window = batch.cu_seqlens[batch.windows.long()].diff()
    assert per_window.max() <= 128 and per_window.sum() == batch.num_tokens


def test_long_sequences_have_no_windows(tmp_path, documents):
    (batch,) = data.open_samples(make_shards(tmp_path / "shards", documents), "train", 129).step_batches(0, 24, 1, 0.3, 10_000)
    assert batch.windows is None


def test_every_world_size_and_micro_batch_sees_the_same(samples):
    expected = stream(samples, range(15), 10_000, 1)  # 300 documents in steps of 24: an epoch ends within step 12
    for world_size in (1, 2, 4, 8):
        for micro_batch_tokens in (32, 50, 100, 333):
            assert stream(samples, range(15), micro_batch_tokens, world_size) == expected


def test_resume_at_any_step_continues_the_stream(samples):
    whole = stream(samples, range(30), 100, 2)
    for step in (1, 11, 12, 13, 14, 29):  # an epoch ends within step 12
        assert stream(samples, range(step, 30), 100, 2) == whole[step * 24 :]


def test_an_epoch_is_a_permutation_and_epochs_differ(samples):
    n = len(samples)
    order, epochs = samples.order(np.arange(3 * n), seed=5)
    for epoch in range(3):
        assert sorted(order[epochs == epoch]) == list(range(n))
    assert (order[:n] != order[n : 2 * n]).mean() > 0.9
    assert (samples.order(np.arange(n), seed=6)[0] != order[:n]).mean() > 0.9


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 63, 64, 65, 1000])
def test_permute_is_a_bijection(n):
    assert sorted(data.permute(np.arange(n, dtype=np.uint64), n, data.hash64(1))) == list(range(n))


def test_permute_looks_random():
    """Over 4,096 keys, each of the 24 orders of 4 items is about equally frequent (chi-square, 23 degrees of freedom)."""
    orders = [tuple(data.permute(np.arange(4, dtype=np.uint64), 4, data.hash64(seed))) for seed in range(4096)]
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 24 and ((counts - 4096 / 24) ** 2 / (4096 / 24)).sum() < 60


def test_permute_needs_no_memory_for_a_huge_corpus():
    places = data.permute(np.arange(1000, dtype=np.uint64), 10**12, data.hash64(1))
    assert len(set(places.tolist())) == 1000 and places.max() < 10**12 and places.min() >= 0


def test_masking_rates():
    """15 % chosen; of these 80 % [MASK], 10 % random, 10 % unchanged: within 5 standard deviations for 200,000 tokens."""
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
    assert len(np.unique(replaced)) == VOCAB_SIZE - 1  # every token but [MASK], which is counted above
    again = original.copy()
    assert (data.mask_tokens(again, lengths, keys, 0.15, special, is_special)[0] == positions).all()
    assert (again == tokens).all()


def test_whole_words_are_masked_or_left_whole():
    """Each token with probability 15 %, as without; of the chosen ones 80 % [MASK] and 10 % unchanged, one by one."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 100, 4000)
    tokens = rng.integers(len(SPECIAL), VOCAB_SIZE, lengths.sum()).astype(np.int32)
    starts = np.cumsum(lengths) - lengths
    special, is_special = {name: i for i, name in enumerate(SPECIAL)}, np.arange(VOCAB_SIZE) < len(SPECIAL)
    tokens[starts], tokens[50::97] = special["[CLS]"], special["[UNK]"]
    continues = np.arange(VOCAB_SIZE) >= 50
    keys, original = data.hash64(1, np.arange(len(lengths))), tokens.copy()
    positions, labels = data.mask_tokens(tokens, lengths, keys, 0.15, special, is_special, continues)
    chosen = np.isin(np.arange(len(tokens)), positions)
    assert (labels == original[positions]).all() and not is_special[labels].any()
    word = np.cumsum(~continues[original])  # special tokens begin one too, and what follows them is a word of its own
    text = ~is_special[original]
    sizes, masked = np.bincount(word[text]), np.bincount(word[text], chosen[text])
    assert ((masked == 0) | (masked == sizes)).all() and sizes.max() > 5
    assert abs(chosen.sum() - 0.15 * text.sum()) < 5 * (0.15 * 0.85 * (sizes**2).sum()) ** 0.5
    now = tokens[positions]
    for count, rate in (((now == special["[MASK]"]).sum(), 0.801), ((now == labels).sum(), 0.101)):
        assert abs(count / len(now) - rate) < 5 * (rate * (1 - rate) / len(now)) ** 0.5
    follows = np.flatnonzero(chosen[1:] & chosen[:-1] & continues[original[1:]])
    both = (tokens[follows] == special["[MASK]"]) & (tokens[follows + 1] == special["[MASK]"])
    assert 0.6 < both.mean() < 0.68  # 0.8 * 0.8
    single = original.copy()  # words of one token are masked as they would be without
    same = data.mask_tokens(single, lengths, keys, 0.15, special, is_special)[0]
    alone = text & (sizes[word] == 1) & ~continues[original]
    assert (np.isin(np.arange(len(tokens)), same)[alone] == chosen[alone]).all()
    fewer = data.mask_tokens(original.copy(), lengths, keys, 0.1, special, is_special, continues)[0]
    assert set(fewer) < set(positions)


def test_masks_depend_on_seed_epoch_and_sample_alone(samples):
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
    fewer = samples.micro_batch(one, np.array([0]), 1, 0.2)  # a lower rate masks a subset
    assert set(fewer.masked_positions[: fewer.num_masked].tolist()) < set(alone.masked_positions[: alone.num_masked].tolist())


def test_split_evenly():
    """As few micro-batches as possible, none too long or empty, rounded up to the multiple, and of nearly equal size."""
    rng = np.random.default_rng(0)
    for _ in range(500):
        multiple = int(rng.choice([1, 2, 4]))
        lengths = rng.integers(2, 129, multiple * rng.integers(1, 15))
        limit = int(rng.integers(128, 1000))
        bounds = data.split_evenly(lengths, limit, multiple)
        totals = np.add.reduceat(lengths, bounds[:-1])
        fewest, room = 0, 0
        for length in lengths:  # greedy is optimal when the order is fixed
            fewest, room = (fewest + 1, limit - length) if length > room else (fewest, room - length)
        assert bounds[0] == 0 and bounds[-1] == len(lengths) and (np.diff(bounds) > 0).all()
        assert totals.max() <= limit and len(totals) == -(-fewest // multiple) * multiple
    equal = np.add.reduceat(full := np.full(4096, 128), data.split_evenly(full, 131072, 1)[:-1])
    assert equal.tolist() == [131072] * 4
    ragged = rng.integers(20, 129, 4096)
    totals = np.add.reduceat(ragged, data.split_evenly(ragged, 131072, 1)[:-1])
    assert totals.max() - totals.min() <= 256


@pytest.mark.parametrize("ranks, limit", [(2, 131072), (2, 65536), (8, 131072)])
def test_ranks_have_equally_many_tokens_in_each_micro_step(ranks, limit):
    """4,096 samples with lengths like C4's at 128 tokens: no micro-step has a rank more than 0.5 % above the mean."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        lengths = np.where(rng.random(4096) < 0.261, rng.integers(30, 129, 4096), 128)
        totals = np.add.reduceat(lengths, data.split_evenly(lengths, limit, ranks)[:-1]).reshape(-1, ranks)
        assert (totals.max(1) / totals.mean(1)).max() < 1.005


@pytest.mark.parametrize("batch, limit, ranks, most", [(4096, 131072, 8, 0.01), (4096, 32768, 8, 0.018), (512, 65536, 8, 0.04)])
def test_ranks_have_equal_work_in_long_sequences(batch, limit, ranks, most):
    """Lengths up to 2,048, log-normal, about C4's: how much longer the slowest rank takes than the mean. Balanced by tokens
    alone, it is 2.1 %, 2.3 % and 7.5 %."""
    rng, slowest = np.random.default_rng(0), []
    for _ in range(30):
        lengths = rng.lognormal(5.5, 1.0, batch).astype(int).clip(10, 2046) + 2
        parts = data.split_evenly(lengths, limit, ranks)
        assert np.add.reduceat(lengths, parts[:-1]).max() <= limit
        work = np.add.reduceat(lengths * (data.ATTENTION_HALF + lengths), parts[:-1]).reshape(-1, ranks).sum(0)
        slowest.append(work.max() / work.mean() - 1)
    assert np.mean(slowest) < most


def test_ranks_have_equally_many_samples_if_the_model_pads(samples):
    path = samples.directory
    padded = data.open_samples(path, "train", 32, padded=True)
    everything = np.arange(24)
    for ranks, limit in ((3, 32 * 24), (2, 32 * 4)):
        parts = [padded.parts(everything, limit, rank, ranks) for rank in range(ranks)]
        assert {part.stop - part.start for part in sum(parts, [])} == {min(24 // ranks, limit // 32)}
        assert sorted(i for part in sum(parts, []) for i in range(part.start, part.stop)) == everything.tolist()
    assert len({part.stop - part.start for rank in range(3) for part in samples.parts(everything, 32 * 24, rank, 3)}) > 1


def test_a_file_is_written_completely_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "before")
    with pytest.raises(OSError, match="No space") as caught, whole_file(path) as file:
        file.write(b"half of what ca")
        raise OSError(28, "No space left on device")
    assert files_of(tmp_path) == {"a.txt": b"before"}
    assert caught.value.filename == path and hint_for(caught.value) == "free some space; rerun the same command"


def test_chunks_of_a_shard_that_has_changed_are_damage(tmp_path):
    """Its index, made when it was opened, promises more samples than its documents have now."""
    samples = data.Samples(make_shards(tmp_path / "shards"), "train", 10, chunk=True)
    samples.block_starts = samples.block_starts + np.arange(len(samples.block_starts)) * 1000
    with pytest.raises(UserError, match="offsets out of order"):
        samples.locate(np.array([len(samples) - 1]))


def test_prefetch_keeps_the_order_and_passes_on_errors():
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


def test_a_bad_token_in_a_large_corpus_is_found_when_read(tmp_path, monkeypatch):
    path = tmp_path / "shards"
    make_shards(path, shards=1)
    contents = bytearray((path / "train_00000.bin").read_bytes())
    contents[-1] = 255
    (path / "train_00000.bin").write_bytes(contents)
    with pytest.raises(UserError, match="outside the vocabulary"):
        data.open_samples(str(path), "train", 128)
    monkeypatch.setattr(data, "CHECKED_TOKENS", 0)
    samples = data.open_samples(str(path), "train", 128)
    with pytest.raises(UserError, match="train_00000.bin: token id .* outside the vocabulary"):
        samples.step_batches(0, len(samples), 1, 0.3, 10**6)


def test_a_large_vocabulary_uses_four_bytes_per_token(tmp_path):
    path = tmp_path / "train_00000.bin"
    entry = data.write_shard(path, [np.array([70_000, 1])], 4, bytes(32))
    shard = data.open_shard(path, bytes(32))
    assert shard.tokens.tolist() == [70_000, 1] and shard.offsets.tolist() == [0, 2] and entry["bytes"] == path.stat().st_size
    assert json.dumps(entry)


# ---------------------------------------------------------------------------------------------------------------------
# Mixtures


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Directories of 300 and 47 documents, and the Samples of each."""
    root = tmp_path_factory.mktemp("mixture")
    paths = [make_shards(root / "a"), make_shards(root / "b", make_documents(47, seed=5), make_documents(9, seed=6))]
    return paths, [data.open_samples(path, "train", 32) for path in paths]


def test_a_mixture_gives_each_source_its_share_and_its_own_order(two):
    (a, b), _ = two
    mixed = data.open_samples(f"{a}:7,{b}:3", "train", 32)
    assert len(mixed) == 347 and mixed.quotas == [7000, 3000]
    samples, epochs = mixed.order(np.arange(2 * data.MIXTURE_PERIOD), seed=4)
    of_b = samples >= 300
    for start in (0, data.MIXTURE_PERIOD):
        assert of_b[start : start + data.MIXTURE_PERIOD].sum() == 3000
    # Spread evenly, without a pattern.
    assert 0.25 < of_b[:1000].mean() < 0.35 and len(set(np.flatnonzero(of_b[:200]) % 10)) > 5
    for here, source, n in ((~of_b, 0, 300), (of_b, 1, 47)):
        per_epoch = np.bincount(epochs[here])
        assert (per_epoch[:-1] == n).all()  # every sample once per epoch
        for epoch in (0, 1, len(per_epoch) - 2):
            numbers = samples[here & (epochs == epoch)] - 300 * source
            assert sorted(numbers) == list(range(n))


def test_what_the_order_of_a_mixture_depends_on(two):
    """On the seed and the source's position in the list; the weights only count relative to each other."""
    (a, b), (only_a, _) = two
    mixed = data.open_samples(f"{a}:0.7,{b}:0.3", "train", 32)
    positions = np.arange(3000)
    order = mixed.order(positions, 4)[0]
    assert (order == data.open_samples(f" {a}:70, {b}:30", "train", 32).order(positions, 4)[0]).all()
    assert (mixed.order(positions[1234:1300], 4)[0] == order[1234:1300]).all()  # any position, without those before it
    assert (mixed.order(positions, 5)[0] != order).mean() > 0.9
    assert (data.open_samples(f"{b}:0.3,{a}:0.7", "train", 32).order(positions, 4)[0] != order).mean() > 0.9
    twice = data.Mixture([only_a, only_a], [1, 1])  # the same documents twice: different orders and masks
    first, second = (twice.micro_batch(np.array([number]), np.array([0]), 1, 0.5) for number in (7, 307))
    assert sequences(first) == sequences(second) and first.masked_positions.tolist() != second.masked_positions.tolist()


@pytest.mark.parametrize("chunk", [False, True])
def test_a_mixture_holds_the_samples_of_its_sources(two, chunk):
    paths, _ = two
    alone = [data.open_samples(path, "train", 12, chunk) for path in paths]
    mixed = data.open_samples(f"{paths[0]}:1,{paths[1]}:1", "train", 12, chunk)
    whole = [source.micro_batch(np.arange(len(source)), np.zeros(len(source), int), 1, 0.3) for source in alone]
    expected = [sequence for batch in whole for sequence in sequences(batch)]
    everything = np.random.default_rng(0).permutation(len(mixed))
    batch = mixed.micro_batch(everything, np.zeros(len(mixed), int), 1, 0.3)
    assert sequences(batch) == [expected[i] for i in everything]
    # The first source has the masks that it has by itself.
    one = [source.micro_batch(np.arange(50), np.zeros(50, int), 1, 0.3) for source in (alone[0], mixed)]
    assert one[0].input_ids.tolist() == one[1].input_ids.tolist()


def test_a_mixture_for_every_world_size_and_resume(two):
    (a, b), _ = two
    mixed = data.open_samples(f"{a}:0.7,{b}:0.3", "train", 32)
    expected = stream(mixed, range(20), 10_000, 1)
    for world_size, micro_batch_tokens in ((2, 100), (4, 50), (8, 333)):
        assert stream(mixed, range(20), micro_batch_tokens, world_size) == expected
    assert stream(mixed, range(13, 20), 100, 2) == expected[13 * 24 :]


def test_held_out_samples_of_a_mixture_come_once_each(two):
    (a, b), _ = two
    held_out = data.open_samples(f"{a}:0.9,{b}:0.1", "val", 32)
    assert len(held_out) == 49 and sorted(held_out.order(np.arange(49), 0)[0]) == list(range(49))


def test_bad_mixtures_are_refused(two, tmp_path):
    (a, b), _ = two
    other = make_shards(tmp_path / "other", vocab_size=VOCAB_SIZE + 1)
    empty = make_shards(tmp_path / "empty", [])
    for text, says in (
        (f"{a}:0.7,{b}", "is not DIRECTORY:WEIGHT"), (f"{a}:0.7,{b}:x", "is not DIRECTORY:WEIGHT"), (f"{a}:0,{b}:1", "is not"),
        (f"{a}:-1,{b}:1", "is not"), (f"{a}:nan,{b}:1", "is not"), (f"{a}:inf,{b}:1", "is not"), (f"{a}:1,", "'' is not"),
        (f"{a}:1,nowhere:1", "nowhere/manifest.json"), (f"{a}:1,{b}:1e-6", "a share below 1 of"),
        (f"{a}:1,{other}:1", "other/tokenizer.json: a different tokenizer from that of .*prepare it with --tokenizer="),
        (f"{a}:1,{empty}:1", "empty: no training samples"), (f"{a}:0.7,{b}:1,{a}/:0.3", "a/' is listed twice .list it once"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=says):
            data.open_samples(text, "train", 32)


def test_the_digest_of_a_mixture_depends_on_shares_order_and_data(two):
    (a, b), (only_a, _) = two
    texts = [f"{a}:1,{b}:1", f"{b}:1,{a}:1", f"{a}:2,{b}:1"]
    digests = {data.open_samples(text, "train", 32).digest for text in texts}
    digests.add(data.Mixture([only_a, only_a], [1, 1]).digest)
    assert len(digests | {only_a.digest}) == 5
    assert data.open_samples(f"{a}:0.5,{b}:0.5", "train", 32).digest in digests
    assert data.open_samples(f"{a}:1", "train", 32).digest == only_a.digest


def test_training_on_a_mixture_resumes_exactly(two, tmp_path, capsys):
    (a, b), _ = two
    options = {"max_steps": 8, "checkpoint_interval": 3, "keep_checkpoints": 9}
    for name in ("straight", "broken"):
        train.main(toy_argv(f"{a}:0.7,{b}:0.3", tmp_path / name, **options))
    for step in (6, 8):  # as if it had been killed after step 3
        shutil.rmtree(tmp_path / "broken" / f"step_{step:08d}")
    train.main(toy_argv(f"{a}:70,{b}:30", tmp_path / "broken", **options))
    last = [files_of(tmp_path / name / "step_00000008")["model.safetensors"] for name in ("straight", "broken")]
    assert last[0] == last[1]
    error = train_fails(capsys, f"{a}:0.6,{b}:0.4", tmp_path / "broken", **options)
    assert f"holds a run that differs: data_dir was '{a}:70,{b}:30' and is '{a}:0.6,{b}:0.4', train_data was" in error
    assert not re.search("[0-9a-f]{13}", error)
    capsys.readouterr()
    train.main([*toy_argv(f"{a}:0.6,{b}:0.4", tmp_path / "broken", **options), "--eval_only"])
    assert "held-out loss: over all held-out texts of the directories, whatever the weights" in capsys.readouterr().out
    train.main(toy_argv(f"{a}:0.7,{b}:0.3", tmp_path / "x", **options, dry_run=True))
    estimate = capsys.readouterr().out
    assert f"{a}: 300 samples, 0.30 epochs" in estimate and f"{b}: 47 samples, 0.82 epochs" in estimate


def wordpiece_tokenizer(path, vocab_size=VOCAB_SIZE):
    entries = [*SPECIAL, *(f"w{i}" if i % 3 else f"##{i}" for i in range(vocab_size - len(SPECIAL)))]
    tokenizer = vocabulary.wordpiece(cased=True, vocab={entry: i for i, entry in enumerate(entries)})
    vocabulary.finish(tokenizer)
    tokenizer.save(str(path))


def test_training_on_whole_words(two, tmp_path, monkeypatch, capsys):
    """Masks depend on the sample alone; a resume is exact; the held-out split is masked token by token as ever."""
    monkeypatch.setattr("tests.toy.make_tokenizer", wordpiece_tokenizer)
    shards = make_shards(tmp_path / "shards")
    for path in (shards, f"{shards}:1"):
        words = data.open_samples(path, "train", 32, chunk=True, whole_words=True)
        assert stream(words, range(3), 128, 1) == stream(words, range(3), 400, 2)
        batch = words.micro_batch(np.arange(100), np.zeros(100, int), 1, 0.3)
        masked = set(batch.masked_positions[: batch.num_masked].tolist())
        tokens = sum(sequences(batch), [])
        inside = [i for i, token in enumerate(tokens) if words.continues[token] and tokens[i - 1] >= len(SPECIAL)]
        assert len(inside) > 100 and all((i in masked) == (i - 1 in masked) for i in inside)
    for name, options in (("words", {"whole_words": True}), ("resumed", {"whole_words": True}), ("tokens", {})):
        train.main(toy_argv(shards, tmp_path / name, **options, keep_checkpoints=9))
    for step in (8, 10):
        shutil.rmtree(tmp_path / "resumed" / f"step_{step:08d}")
    train.main(toy_argv(shards, tmp_path / "resumed", whole_words=True, keep_checkpoints=9))
    weights = {
        name: files_of(tmp_path / name / "step_00000010")["model.safetensors"] for name in ("words", "resumed", "tokens")
    }
    assert weights["words"] == weights["resumed"] != weights["tokens"]
    counts = [[record["num_masked"] for record in read_log(tmp_path / name, "eval")] for name in ("words", "tokens")]
    assert counts[0] == counts[1]
    error = train_fails(capsys, shards, tmp_path / "words")
    assert "holds a run that differs: whole_words was True and is False" in error
    error = train_fails(capsys, two[0][0], tmp_path / "x", whole_words=True)
    assert "tokenizer.json: does not mark pieces inside words" in error and not (tmp_path / "x").exists()


def train_fails(capsys, *arguments, **options):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        train.main(toy_argv(*arguments, **options))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    return error


def test_training_resumes_only_with_the_same_tokenizer(two, tmp_path, capsys):
    (a, _), _ = two
    train.main(toy_argv(a, tmp_path / "run", max_steps=2))
    saved = json.loads((tmp_path / "run" / "step_00000002" / "config.json").read_text())
    digest = file_digest(Path(a) / "tokenizer.json")
    assert saved["tokenizer_sha256"] == digest == json.loads((Path(a) / "manifest.json").read_text())["tokenizer_sha256"]
    make_shards(tmp_path / "other", vocab_size=VOCAB_SIZE + 1)
    error = train_fails(capsys, tmp_path / "other", tmp_path / "run", max_steps=2)
    assert "tokenizer_sha256 was" in error
    assert error.endswith(f"; to resume, prepare the text with --tokenizer={tmp_path}/run/tokenizer.json)\n")
    assert file_digest(tmp_path / "run" / "tokenizer.json") == digest
    # Shards next to a tokenizer they were not made with.
    (tmp_path / "other" / "tokenizer.json").write_bytes((Path(a) / "tokenizer.json").read_bytes())
    error = train_fails(capsys, tmp_path / "other", tmp_path / "new", max_steps=2)
    assert "train_00000.bin: made with a different tokenizer" in error


# ---------------------------------------------------------------------------------------------------------------------
# Large corpora


@pytest.mark.parametrize("seq_length", [3, 12, 33])
def test_chunks_are_found_through_the_index(tmp_path, seq_length):
    path = make_shards(tmp_path / "shards", make_documents(500, longest=90), shards=3)
    samples = data.open_samples(path, "train", seq_length, chunk=True)
    longest, chunks = seq_length - 2, []
    for number, shard in enumerate(samples.shards):
        offsets = shard.offsets.tolist()
        for start, end in zip(offsets, offsets[1:]):
            chunks += [(number, chunk, min(longest, end - chunk)) for chunk in range(start, end, longest)]
    found = samples.locate(np.arange(len(samples)))
    assert list(zip(*(part.tolist() for part in found))) == chunks
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]  # nothing is left beside it


def test_more_shards_than_files_may_be_open(tmp_path):
    """Each map keeps a file open, so the soft limit is raised; an error if the hard limit does not allow that."""
    make_shards(tmp_path / "shards", make_documents(400), shards=200)
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (150, int(sys.argv[2]))); import data; "
        "print(len(data.Samples(sys.argv[1], 'train', 32)))"
    )
    for hard, says in ((4096, "400"), (300, "200 shards, but only 300 files may be open")):
        command = [sys.executable, "-c", code, str(tmp_path / "shards"), str(hard)]
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert says in result.stdout + result.stderr


READ_AT_RANDOM = """
import json, sys
import torch
import data

def memory():
    fields = dict(line.split(":") for line in open("/proc/self/status"))
    return [int(fields[name].split()[0]) / 1000 for name in ("RssAnon", "RssFile", "RssShmem")]  # MB

def train(directory, steps):
    samples = data.open_samples(directory, "train", 128)
    for _ in data.prefetch(lambda step: samples.step_batches(step, 512, 1, 0.3, 16384), range(steps)):
        pass
    return samples

train(sys.argv[1], 2)  # allocations that happen once
before = memory()
samples = train(sys.argv[2], 100)
print(json.dumps([after - earlier for after, earlier in zip(memory(), before)]))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc/self/status")
def test_reading_shards_at_random_takes_no_memory_of_its_own(tmp_path):
    """80 MB of shards, 51,200 samples: pages are mapped from the page cache, and neither they nor samples are kept."""
    documents = np.random.default_rng(0).integers(5, VOCAB_SIZE, (80_000, 500), dtype=np.uint16)
    paths = [make_shards(tmp_path / "small"), make_shards(tmp_path / "large", list(documents), shards=8)]
    command = [sys.executable, "-c", READ_AT_RANDOM, *paths]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    anonymous, of_files, of_tmpfs = json.loads(result.stdout)
    assert of_files + of_tmpfs > 60  # MB: most of it was read, through the maps
    assert anonymous < 10


@pytest.mark.parametrize("offset", [2**40, 2**64 - 1])
def test_offsets_out_of_order_are_found_when_read(tmp_path, offset):
    for chunk in (False, True):
        path = tmp_path / f"shards{chunk}"
        make_shards(path, shards=1)
        samples = data.open_samples(str(path), "train", 32, chunk)
        contents = bytearray((path / "train_00000.bin").read_bytes())
        contents[data.HEADER.size + 8 * 7 : data.HEADER.size + 8 * 8] = offset.to_bytes(8, "little")
        (path / "train_00000.bin").write_bytes(contents)  # in place, so the open map sees it
        with pytest.raises(UserError, match="train_00000.bin: offsets out of order"):
            samples.step_batches(0, len(samples), 1, 0.3, 10**6)
        if chunk:
            with pytest.raises(UserError, match="train_00000.bin: offsets"):
                data.open_samples(str(path), "train", 32, chunk)
