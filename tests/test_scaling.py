"""scaling.py: its rows, errors for wrong options, and the whole at toy size."""

import json

import pytest

from studies import scaling


def test_rows(monkeypatch):
    """Medians of a log's lines, means over GPUs that train alone, and what several reach of that."""
    rates = {(64, 1): [(10, 20, 30), (20, 30, 40)], (64, 2): [(44, 44, 50)], (16, 1): [(10,)] * 2, (32, 2): [(15,)]}

    def run(cfg, name, samples, groups, data):
        records = [
            [{"samples_per_second": x, "tokens_per_second": 100 * x, "mfu": None, "memory_gb": None} for x in found]
            for found in rates[samples, max(map(len, groups))]
        ]
        assert len(records) == len(groups)
        return [({"device": "a GPU"}, of_run) for of_run in records]

    monkeypatch.setattr(scaling, "run", run)
    device, rows = scaling.measure(scaling.ScalingConfig(global_batch_size=64, per_gpu=16), "base", 2, "data")
    found = [(row["batch"], row["gpus"], row["samples"], row["samples_per_second"], row.get("efficiency")) for row in rows]
    assert device == "a GPU" and found == [
        ("global", 1, 64, 25, None), ("global", 2, 64, 44, 0.88), ("per_gpu", 1, 16, 10, None), ("per_gpu", 2, 32, 15, 0.75),
    ]  # fmt: skip
    assert "| MosaicBERT-Base | 16 a GPU | 2 | 15 | 1,500 | n/a | 75.0 % | 2,133.3 |" in scaling.table({"rows": rows})


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
    """It trains, prints the table, and writes the file."""
    out = tmp_path / "scaling.json"
    scaling.main(["--toy", "--models=large", f"--out={out}"])
    printed = capfd.readouterr().out
    assert "4 GPUs: not measured, this machine has 2" in printed and "| MosaicBERT-Large | 16 a GPU | 2 |" in printed
    for row in json.loads(out.read_text())["rows"]:
        assert row["samples_per_second"] == pytest.approx(1e3 * row["samples"] / row["ms"])
        assert 30 < row["tokens_per_second"] / row["samples_per_second"] < 128  # 115 on average


@pytest.mark.slow
def test_several_processes_against_one_and_a_kill(tmp_path):
    """studies/gpu_scaling.py at toy size: tokens, 100 losses, and a run of two killed and resumed with one."""
    from studies import gpu_scaling

    gpu_scaling.main(["--toy", f"--out={tmp_path}/checked"])
    results = json.loads((tmp_path / "checked.json").read_text())
    assert results["tokens_equal"] and results["processes"] == [2, 1]
    assert results["last_loss"] < results["first_loss"] - 0.5
