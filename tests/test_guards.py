"""Small changes of the code that no other test noticed, each caught here; and inputs that used to end in a traceback."""

import os
import shutil
from functools import partial

import numpy as np
import pytest
import torch

import checkpoint
import data
import train
from common import files
from common.batch import Batch
from common.processes import Process
from model import MaskedLM, ModelConfig, SequenceClassifier
from tests import faults
from tests.ranks import run_ranks
from tests.test_train import data_dir, fails  # noqa: F401, a fixture
from tests.toy import make_documents, make_shards, read_log, toy_argv


# ---------------------------------------------------------------------------------------------------------------------
# Guards


def test_each_period_of_a_mixture_has_an_order_of_its_own(tmp_path):
    a, b = make_shards(tmp_path / "a"), make_shards(tmp_path / "b", make_documents(47, seed=5))
    samples, _ = data.open_samples(f"{a}:0.5,{b}:0.5", "train", 32).order(np.arange(2 * data.MIXTURE_PERIOD), seed=4)
    of_b = samples >= 300
    assert 0.4 < (of_b[: data.MIXTURE_PERIOD] != of_b[data.MIXTURE_PERIOD :]).mean() < 0.6


def test_special_tokens_are_never_masked():
    """[UNK] too: nobody could guess it. And never as a random replacement of what was not chosen."""
    special = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}
    is_special = np.zeros(100, bool)
    is_special[list(special.values())] = True
    original = np.tile(np.array([2, 1, 1, 50, 60, 1, 4, 3], np.int32), 500)
    tokens = original.copy()
    keys = data.hash64(np.arange(500))
    positions, labels = data.mask_tokens(tokens, np.full(500, 8), keys, 0.9, special, is_special)
    assert set(labels.tolist()) == {50, 60} and 0.8 < len(positions) / 1000 < 1
    untouched = np.ones(len(tokens), bool)
    untouched[positions] = False
    assert (tokens[untouched] == original[untouched]).all()


def test_evaluation_masks_15_percent_whatever_training_does(data_dir, tmp_path):  # noqa: F811
    train.main(toy_argv(data_dir, tmp_path / "run", max_steps=1, mask_prob=0.8))
    tokens = sum(len(shard.tokens) for shard in data.Samples(data_dir, "val", 32).shards)
    assert 0.05 < read_log(tmp_path / "run", "eval")[0]["num_masked"] / tokens < 0.2


def test_dropout_has_a_seed_of_its_own_in_each_micro_step_step_and_rank(data_dir, monkeypatch):  # noqa: F811
    cfg = train.TrainConfig("mosaicbert", 32, 1, 2, 48, seq_length=32)
    network = MaskedLM(cfg, 100)
    batches = data.Samples(data_dir, "train", 32).step_batches(0, 16, 0, 0.3, 128)
    seeds = []
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    for step in (1, 2):
        for rank in (0, 1):
            process = Process(rank, 1, torch.device("cpu"), torch.float32)
            train.forward_backward(network, batches, torch.tensor(7.0), cfg, process, step)
    assert len(batches) > 1 and len(set(seeds)) == len(seeds) == 4 * len(batches)


@pytest.mark.parametrize("kind", ["mosaicbert", "bert"])
def test_the_classifier_has_dropout_before_it(kind, monkeypatch):
    network = SequenceClassifier(ModelConfig(kind, 32, 1, 2, 48, hidden_dropout=0.5), 70, 3)
    network.bert.eval()
    batch = Batch(torch.tensor([2, 9, 3]), torch.tensor([0, 3], dtype=torch.int32), 3, None)
    scores = torch.stack([network(batch) for _ in range(20)])
    assert scores.std(0).min() > 0
    network.eval()
    assert torch.equal(network(batch), network(batch))


def test_everything_is_on_disk_before_it_counts(data_dir, tmp_path, monkeypatch):  # noqa: F811
    """Each file of a checkpoint before its directory gets its name, the log before that, the name before the next step."""
    calls = []

    def note(name, path_of):
        real = getattr(os, name)

        def noting(*arguments, **options):
            calls.append((name, os.path.basename(path_of(*arguments))))
            return real(*arguments, **options)

        monkeypatch.setattr(os, name, noting)

    note("fsync", lambda descriptor: os.readlink(f"/proc/self/fd/{descriptor}"))
    note("rename", lambda source, target: target)
    note("replace", lambda source, target: target)
    train.main(toy_argv(data_dir, tmp_path / "run", max_steps=1))
    renamed = calls.index(("rename", "step_00000001"))
    before = {name for call, name in calls[:renamed] if call == "fsync"}
    written = {path.name for path in (tmp_path / "run" / "step_00000001").iterdir()}
    assert written | {"log.jsonl", "step_00000001.tmp"} <= before and ("fsync", "run") in calls[renamed:]
    assert calls.index(("fsync", "log.jsonl")) < calls.index(("fsync", "model.safetensors"))
    replaced = calls.index(("replace", "config.json"))
    assert any(call == "fsync" and name.startswith("config.json") for call, name in calls[:replaced])


def test_a_budget_removes_nothing_that_is_not_its_own(data_dir, tmp_path, monkeypatch):  # noqa: F811
    """Planning used to write a trial checkpoint into OUT/trial, and to remove that directory."""
    from common import budget

    monkeypatch.setattr(budget, "affordable_steps", lambda *_: 9)
    other = tmp_path / "run" / "trial"
    train.main(toy_argv(data_dir, other, max_steps=2))
    before = {path: path.read_bytes() for path in other.rglob("*") if path.is_file()}
    train.main(toy_argv(data_dir, tmp_path / "run", max_steps=70000, budget_minutes=10, warmup_steps=4))
    assert before and {path: path.read_bytes() for path in other.rglob("*") if path.is_file()} == before


def test_weights_decay_also_where_nothing_is_learnt(data_dir, tmp_path):  # noqa: F811
    """AdamW's decay is on every parameter, LayerNorm too, and times the learning rate."""
    argv = toy_argv(data_dir, tmp_path / "run", max_steps=3, weight_decay=100, warmup_fraction=0, lr=1e-3, eval_interval=0)
    train.main([*argv, "--model=bert"])
    rates = [record["lr"] for record in read_log(tmp_path / "run")]
    tensors = checkpoint.read_tensors(tmp_path / "run" / "step_00000003", "model.safetensors")
    torch.manual_seed(17)
    first = MaskedLM(ModelConfig("bert", 32, 2, 2, 48), 100).bert.embeddings.position_embeddings.weight[500]
    unused = tensors["bert.embeddings.position_embeddings.weight"][500]
    torch.testing.assert_close(unused, first.detach() * float(np.prod([1 - 100 * rate for rate in rates])))


def test_clipping_uses_the_norm_that_the_log_shows(data_dir, tmp_path):  # noqa: F811
    """A clipped gradient moves AdamW's mean by (1 - beta1) * gradient * limit / norm."""
    for name, limit in (("free", 0), ("clipped", 0.01)):
        train.main(toy_argv(data_dir, tmp_path / name, max_steps=1, max_grad_norm=limit, eval_interval=0))
    norm = read_log(tmp_path / "free")[0]["grad_norm"]
    assert read_log(tmp_path / "clipped")[0]["grad_norm"] == norm > 0.01
    moments = [checkpoint.read_tensors(tmp_path / name / "step_00000001", "optimizer.safetensors") for name in ("free", "clipped")]
    for name in moments[0]:
        if name.startswith("exp_avg."):
            torch.testing.assert_close(moments[1][name], moments[0][name] * 0.01 / norm, rtol=1e-4, atol=1e-9)


def test_the_last_layer_drops_only_what_nobody_reads():
    torch.manual_seed(0)
    network = MaskedLM(ModelConfig("mosaicbert", 32, 2, 2, 48, hidden_dropout=0.0), 70)
    ids = torch.randint(5, 70, (12,))
    batch = Batch(ids, torch.tensor([0, 5, 12], dtype=torch.int32), 7, None, None, torch.tensor([3, 8]), torch.tensor([7, 9]))
    logits = network.masked_logits(batch)
    whole = network.cls.predictions(network.bert(batch))
    torch.testing.assert_close(logits, whole[[3, 8]], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(network(batch), -whole[[3, 8]].log_softmax(-1)[[0, 1], [7, 9]].sum())


# ---------------------------------------------------------------------------------------------------------------------
# One line instead of a traceback


@pytest.mark.parametrize(
    "option, says",
    [
        ("--seed=18446744073709551616", "must be below 2^63"), ("--hidden_size=1e9", "at most 65536"),
        ("--num_layers=1e9", "at most 4096"), ("--out_dir=a\0b", "is not a string"), ("--data_dir=a\0b", "is not a string"),
    ],
)  # fmt: skip
def test_huge_and_strange_options(data_dir, tmp_path, capsys, option, says):  # noqa: F811
    assert says in fails([*toy_argv(data_dir, tmp_path / "run"), option], capsys)


def test_huge_weights_of_a_mixture(tmp_path):
    a, b = make_shards(tmp_path / "a"), make_shards(tmp_path / "b")
    assert data.open_samples(f"{a}:1e308,{b}:1e308", "train", 32).quotas == [5000, 5000]


@pytest.mark.parametrize("contents", ["[]", "3", "null", "[" * 100_000, "{", '"text"'])
def test_json_that_is_no_object(tmp_path, contents, capsys):
    path = make_shards(tmp_path / "shards")
    (tmp_path / "shards" / "manifest.json").write_text(contents)
    with pytest.raises(files.UserError, match="manifest.json: "):
        data.verify(path)
    assert "manifest.json: " in fails(toy_argv(path, tmp_path / "run"), capsys)
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "config.json").write_text(contents)
    assert "config.json: " in fails(toy_argv(make_shards(tmp_path / "good"), tmp_path / "run"), capsys)


def test_an_empty_batch_is_refused():
    network = MaskedLM(ModelConfig("mosaicbert", 32, 1, 2, 48), 70)
    with pytest.raises(ValueError, match=r"\(0, 4\); expected \(B, T\), not empty"):
        network.logits(torch.zeros(0, 4, dtype=torch.long), torch.zeros(0, 4, dtype=torch.long))


def test_evaluating_nothing_leaves_nothing(data_dir, tmp_path, capsys):  # noqa: F811
    assert "no checkpoint to evaluate" in fails([*toy_argv(data_dir, tmp_path / "rnu"), "--eval_only"], capsys)
    assert not (tmp_path / "rnu").exists()


def lose_directory(out):
    """Have the run's directory vanish in step 3."""
    faults.at_steps([3], lambda step, model: shutil.rmtree(out) if os.path.exists(out) else None)


def test_a_directory_that_vanishes_does_not_stop_training(data_dir, tmp_path):  # noqa: F811
    out = tmp_path / "run"
    argv = toy_argv(data_dir, out, on_save_error="continue", eval_interval=0, max_steps=6, checkpoint_interval=100)
    statuses, output = run_ranks(argv, 1, tmp_path / "ranks", {0: partial(lose_directory, str(out))})
    assert "step 6/6" in output and "log.jsonl: No such file or directory" in output and "Traceback" not in output, output
    assert statuses == [2 if "was not written" in output else 0]
