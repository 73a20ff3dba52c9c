"""scaling.py: the measurement at toy size, and errors for wrong options."""

import json

import pytest

from studies import scaling
from tests.ranks import Ranks


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The results of two toy processes."""
    directory = tmp_path_factory.mktemp("scaling")
    out = directory / "scaling.json"
    ranks = Ranks(["--toy", "--models=base", f"--out={out}"], 2, directory, script="studies.scaling")
    assert ranks.wait() == [0, 0], ranks.output()
    return out


def test_what_is_measured(measured):
    results = json.loads(measured.read_text())
    rows = {(row["batch"], row["gpus"], row["samples"]): row for row in results["rows"]}
    assert set(rows) == {("global", 1, 64), ("global", 2, 64), ("per_gpu", 1, 16), ("per_gpu", 2, 32)}
    for (batch, gpus, samples), row in rows.items():
        assert row["samples_per_second"] == pytest.approx(1e3 * samples / row["ms"])
        # Samples have 115 tokens on average, 30 to 128 each.
        assert 30 < row["tokens_per_second"] / row["samples_per_second"] < 128
        assert len(row["blocks_ms"]) == scaling.TURNS
        if gpus == 1:
            assert len(row["each_ms"]) == 2
        else:
            reference = rows[batch, 1, 64 if batch == "global" else 16]["tokens_per_second"]
            assert row["efficiency"] == pytest.approx(row["tokens_per_second"] / (2 * reference))
            assert row["communication_ms"] == pytest.approx(row["ms"] - row["without_reduction_ms"])
    # Kinds with the same batch have the same samples.
    assert rows["global", 1, 64]["tokens"] == rows["global", 2, 64]["tokens"]
    assert 2 * rows["per_gpu", 1, 16]["tokens"] == rows["per_gpu", 2, 32]["tokens"]
    assert "toy" in results["device"] and "| MosaicBERT-Base | 64 | 2 |" in scaling.table(results)


@pytest.mark.parametrize(
    "option, says",
    [
        ("--gpus=two", "expected numbers of GPUs"), ("--gpus=0", "expected numbers of GPUs"),
        ("--gpus=3 --global_batch_size=4096", "not a multiple of 3 GPUs"), ("--models=huge", "no 'huge'"),
        ("--models=", "no ''"),
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
