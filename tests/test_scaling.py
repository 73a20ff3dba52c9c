"""scaling.py: the step-time model by hand, the measurement at toy size, and errors for wrong options."""

import json

import pytest
import torch

from studies import scaling, step_time
from tests.ranks import Ranks
from tests.toy import ROOT

LINK = {"gpus": 2, "bytes": 100 * 2**20, "groups": 4, "seconds": 0.0021 + 4 * 25e-6, "latency": 25e-6}
FACTS = {"groups": 2, "last_bytes": 20 * 2**20, "link": LINK}
NODES = {"per_node": 8, "node_gbits": 3200.0}


def step_ms(gpus, compute=0.1, hidden=2 / 3 * 0.1, imbalance=0.0, several=0.0, **nodes):
    return 1e3 * step_time.step_seconds(compute, FACTS, gpus, hidden, imbalance, several, **{**NODES, **nodes})


def test_the_model_of_the_step_time():
    """Two GPUs moved 100 MiB in 2.1 ms plus latencies. What follows from that, by hand."""
    assert step_time.reduction_seconds(LINK, 2, 2, 8, 3200) == pytest.approx((2.2e-3, 2.2e-3))
    # Eight pass 7/4 of the bytes where two pass one; the latency is that of a node.
    within = 1.75 * 2.1e-3 + 1e-4
    assert step_time.reduction_seconds(LINK, 2, 8, 8, 3200) == pytest.approx((within, within))
    # Two nodes with 8 Gbit/s each: 100 MiB at 0.8 GB/s, and one doubling of nodes, both ways, for each of two buckets.
    slow = LINK["bytes"] / 0.8e9 + 2 * (25e-6 + 20e-6)
    assert step_time.reduction_seconds(LINK, 2, 16, 8, 8) == pytest.approx((within, slow))
    # Within a node the all-reduce takes as long as alone; and the count's comes first.
    assert step_ms(1) == 100
    assert step_ms(2) == pytest.approx(100 + 2.2 + 0.025)
    assert step_ms(2, imbalance=0.01, several=0.002) == pytest.approx(101 + 2 + 2.2 + 0.025)
    # With a slow network, what the last backward pass does not hide is exposed: 2/3 of 100 ms, in two micro-steps.
    assert step_ms(16, hidden=0.1 / 3, node_gbits=8) == pytest.approx(100 + 1e3 * slow - 100 / 3 + 0.045)
    # Nothing hides the last bucket, a fifth of the gradient: with 80 Gbit/s that takes longer than within the node.
    slow = LINK["bytes"] / 8e9 + 2 * (25e-6 + 20e-6)
    assert step_ms(16, node_gbits=80) == pytest.approx(100 + max(1e3 * within, 1e3 * slow / 5) + 0.045)


def test_imbalance_of_rows():
    """Two micro-steps of two GPUs: both wait for 3 + 4 rows, the means are 2.5 + 4."""
    assert step_time.imbalance(torch.tensor([[2.0, 3.0], [4.0, 4.0]]).numpy()) == pytest.approx(7 / 6.5 - 1)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The results of two toy processes."""
    directory = tmp_path_factory.mktemp("scaling")
    out = directory / "scaling.json"
    ranks = Ranks(["--toy", "--models=base", f"--out={out}"], 2, directory, script="studies.scaling")
    assert ranks.wait() == [0, 0], ranks.output()
    return out


def test_what_is_measured(measured, tmp_path, capsys):
    results = json.loads(measured.read_text())
    rows = {(row["batch"], row["gpus"], row["samples"]): row for row in results["rows"]}
    assert set(rows) == {
        ("global", 1, 64), ("global", 2, 64), ("per_gpu", 1, 16), ("per_gpu", 2, 32), ("curve", 1, 32), ("curve", 1, 8),
    }  # fmt: skip
    for (batch, gpus, samples), row in rows.items():
        assert row["samples_per_second"] == pytest.approx(1e3 * samples / row["ms"])
        # Samples have 115 tokens on average, 30 to 128 each.
        assert 30 < row["tokens_per_second"] / row["samples_per_second"] < 128
        assert len(row["blocks_ms"]) == (1 if (batch, samples) == ("curve", 8) else scaling.TURNS)
        if gpus == 1:
            assert len(row["each_ms"]) == 2
        else:
            reference = rows[batch, 1, 64 if batch == "global" else 16]["tokens_per_second"]
            assert row["efficiency"] == pytest.approx(row["tokens_per_second"] / (2 * reference))
            assert row["communication_ms"] == pytest.approx(row["ms"] - row["without_reduction_ms"])
    # Kinds with the same batch have the same samples.
    assert rows["global", 1, 64]["tokens"] == rows["global", 2, 64]["tokens"] == 2 * rows["curve", 1, 32]["tokens"]
    assert 2 * rows["per_gpu", 1, 16]["tokens"] == rows["per_gpu", 2, 32]["tokens"]
    facts = results["models"]["base 2"]
    link = facts["link"]
    cfg = scaling.train_config(scaling.ScalingConfig(toy=True), "base")
    num_params = sum(parameter.numel() for parameter in scaling.MaskedLM(cfg, 500).parameters())
    assert link["gpus"] == 2 and link["bytes"] == 4 * num_params and link["seconds"] > 0
    assert facts["groups"] == link["groups"] == 1 and facts["last_bytes"] == link["bytes"]  # below train.BUCKET_MB

    predicted = tmp_path / "predicted.json"
    scaling.main([f"--predict={measured}", f"--out={predicted}", "--gpus_per_node=4"])
    printed = capsys.readouterr().out
    assert "toy" in results["device"] and "Predicted, not measured: nodes of 4 GPUs" in printed
    assert printed.count("ms predicted") == 2 and "| MosaicBERT-Base | 64 | 8 |" in printed
    rows = json.loads(predicted.read_text())["predicted"]
    assert {(row["batch"], row["gpus"]) for row in rows if row["measured_ms"] is None} == {
        ("global", 4), ("global", 8), *(("per_gpu", 2**i) for i in range(2, 10)),
    }  # fmt: skip


@pytest.mark.parametrize(
    "option, says",
    [
        ("--gpus=two", "expected numbers of GPUs"), ("--gpus=0", "expected numbers of GPUs"),
        ("--gpus=3 --global_batch_size=4096", "not a multiple of 3 GPUs"), ("--models=huge", "no 'huge'"),
        ("--models=,", "empty"), ("--predict=nowhere.json", "nowhere.json: No such file"),
        (f"--predict={ROOT}/README.md", "not a result of python -m studies.scaling"),
        (f"--predict={ROOT}/results/scaling_h100/scaling.json", "from an older version"),
    ],
)  # fmt: skip
def test_mistakes_end_in_one_line(capsys, option, says):
    with pytest.raises(SystemExit) as stopped:
        scaling.main(option.split())
    captured = capsys.readouterr()
    assert stopped.value.code == 2 and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert says in captured.err


@pytest.mark.slow
def test_the_whole_command(tmp_path, capfd):
    """It runs torchrun for each model, prints the tables, and writes the file."""
    out = tmp_path / "scaling.json"
    scaling.main(["--toy", "--models=base,large", f"--out={out}"])
    printed = capfd.readouterr().out
    assert "4 GPUs: not measured, this machine has 2" in printed and "| MosaicBERT-Large | 16 a GPU | 2 |" in printed
    assert {row["model"] for row in json.loads(out.read_text())["rows"]} == {"base", "large"}


@pytest.mark.slow
def test_several_processes_against_one_and_a_kill(tmp_path):
    """studies/gpu_scaling.py at toy size: samples, masks, 100 losses, and a run of two killed and resumed with one."""
    from studies import gpu_scaling

    gpu_scaling.main(["--toy", f"--out={tmp_path}/checked"])
    results = json.loads((tmp_path / "checked.json").read_text())
    assert results["samples_and_masks_equal"] and results["processes"] == [2, 1]
    assert results["last_loss"] < results["first_loss"] - 0.5
