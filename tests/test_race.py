"""The race: its commands, what it skips and keeps, its table with parts of GLUE marked, the arithmetic of its factor."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from common.glue import GLUE_TASKS
from common.options import load_config
from studies import race
from studies.race import RaceConfig, Run
from tests.toy import ROOT, make_shards, train_environment
from tools import plot
from tools.figures import glue, reading
from train import TrainConfig

TASKS = ("cola", "sst2", "mrpc", "stsb", "rte")
THREE = "configs/small.py 4,8 --chunk=true; configs/base.py 10,20 --warmup_steps=140/min; configs/bert_base.py 10"
TOY = (
    "--hidden_size=32 --num_layers=2 --num_heads=2 --intermediate_size=48 --seq_length=32 --global_batch_size=16 "
    "--device=cpu --kernels=torch --compile=false --chunk=true --eval_interval=50 --log_interval=20"
)


def write_run(directory, name, minutes, seed, score, held_out=3.0, dollars=0.1, parts=None):
    """A finished run's log.jsonl and glue.json; every task's first seed scores `score`, its others one more.

    parts: {task: share of GLUE's rows that it was trained on}; with MNLI among them, three tasks start from its weights.
    """
    path = Path(directory) / Run(name, minutes, (), seed).name
    path.mkdir(parents=True)
    length = {"budget_minutes": minutes, "global_batch_size": 8, "price_per_gpu_hour": 3.0}
    log = [{"event": "start", "config": {"seed": seed, **length}}]
    for step, speed in ((50, 4000.0), (100, 4400.0), (150, 4410.0)):
        cost = {"gpu_hours": minutes * step / 9000, "dollars": None if dollars is None else dollars * step / 150}
        log.append({"event": "train", "step": step, "loss": 7.0 - step / 50, "samples_per_second": speed, **cost})
    log += [{"event": "eval", "step": 75, "loss": 5.0}, {"event": "eval", "step": 150, "loss": held_out}]
    log.append({"event": "end", "step": 150, "seconds": 60 * minutes, "dollars": dollars})
    (path / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))
    tasks = {}
    for task in (*TASKS, *(parts or ())):
        scores = [score] if task == "sst2" else [score, score + 1, score + 1]
        rows = round((parts or {}).get(task, 1) * GLUE_TASKS[task].rows[0])
        init = "mnli" if parts and "mnli" in parts and task in ("rte", "mrpc", "stsb") else "pretrained"
        tasks[task] = {"scores": scores, "score": float(np.mean(scores)), "score_ci95": None}
        tasks[task] |= {"train_examples": rows, "init": init}
    pretraining = {"step": 150, "gpu_hours": minutes / 60, "dollars": dollars, "budget_minutes": minutes}
    average = float(np.mean([task["score"] for task in tasks.values()]))
    about = {"model": "mosaicbert", "num_layers": 12, "recipe": "fast", "pretraining": pretraining}
    results = {"tasks": tasks, "average": average, **about}
    (path / "glue.json").write_text(json.dumps(results))
    return path


def write_race(directory, factor=1.0):
    """Both models at 2, 4 and 8 minutes; scores are straight lines over log2(minutes), MosaicBERT's 4 points higher."""
    for model, ahead in (("mosaicbert", 4.0), ("bert", 0.0)):
        for minutes in (2, 4, 8):
            for seed in (17, 18)[: 1 if minutes == 8 else 2]:
                score = 50 + ahead + 4 * factor * math.log2(minutes / 2) + (0.5 if seed == 18 else 0)
                write_run(directory, model, minutes, seed, score, held_out=4 - math.log2(minutes) / 2)
    return directory


def test_commands(capsys):
    runs = race.parse_runs(RaceConfig(runs=THREE, seeds="17,1"))
    names = "base_20", "base_10", "bert_base_10", "small_8", "small_4"  # longest first
    assert [run.name for run in runs] == [f"{name}min_seed{seed}" for name in names for seed in (17, 1)]
    base, _, ten, *_, small = [race.pretrain_command(RaceConfig(), run) for run in runs]
    assert base[0] == "train.py"
    assert {"configs/base.py", "--budget_minutes=20", "--seed=17", "--warmup_steps=2800"} < set(base)
    assert "--warmup_steps=1400" in ten and {"--chunk=true", "--budget_minutes=4", "--seed=1"} < set(small)
    assert "--recipe=fast" in race.finetune_command(RaceConfig(), runs[0])
    # A recipe's options override its config's, and those for all.
    capsys.readouterr()
    own = race.parse_runs(RaceConfig(runs="configs/base.py .5 --global_batch_size=512 --eval_interval=30/min", seeds="1"))[0]
    cfg = load_config(TrainConfig, race.pretrain_command(RaceConfig(), own)[1:])
    assert "given twice" not in capsys.readouterr().out
    assert (cfg.global_batch_size, cfg.eval_interval, cfg.log_interval, cfg.budget_minutes) == (512, 15, 50, 0.5)


class Fake(race.Driver):
    """Commands do not run: they are recorded, and leave the files that real ones would."""

    def __init__(self, cfg, fails=()):
        super().__init__(cfg)
        self.calls, self.fails = [], fails

    def call(self, words, name, gpu):
        self.calls.append((name, gpu))
        if name in self.fails:
            raise RuntimeError("status 2: error: as asked")
        out = next((word.removeprefix("--out_dir=") for word in words if word.startswith("--out_dir=")), None)
        if words[0] == "train.py" and "--eval_only" not in words:
            run = next(run for run in race.parse_runs(self.cfg) if run.name == name)
            made = f"{self.cfg.work_dir}/made/{len(self.calls)}"
            written = write_run(made, run.config, run.minutes, run.seed, 60.0)
            os.makedirs(out)
            start, *rest = (written / "log.jsonl").read_text().splitlines(keepends=True)
            config = vars(load_config(TrainConfig, words[1:]))
            config["max_steps"] = None if config["budget_minutes"] else config["max_steps"]
            Path(f"{out}/log.jsonl").write_text(json.dumps({"event": "start", "config": config}) + "\n" + "".join(rest))
            os.makedirs(f"{out}_glue/runs")
            os.rename(written / "glue.json", f"{out}_glue/glue.json")
            Path(f"{out}_glue/runs/cola.seed19.jsonl").write_text('{"event": "end"}\n')


def fake(tmp_path, runs="configs/base.py 2; configs/bert_base.py 2", **options):
    cfg = RaceConfig(out=str(tmp_path / "out"), work_dir=str(tmp_path / "work"), runs=runs, seeds="1,17", **options)
    for path in (cfg.out, cfg.work_dir):
        os.makedirs(path, exist_ok=True)
    return cfg


def test_driver_keeps_small_files_and_skips_finished_runs(tmp_path, capsys):
    driver = Fake(fake(tmp_path))
    driver.race()
    names = [f"{config}_2min_seed{seed}" for config in ("base", "bert_base") for seed in (1, 17)]
    assert [name for name, _ in driver.calls] == [call for name in names for call in (name, f"{name}_glue")]
    for name in names:
        kept = tmp_path / "out" / name
        assert sorted(os.listdir(kept)) == ["commands.txt", "glue.json", "log.jsonl", "runs.jsonl"]
        assert not (tmp_path / "work" / name).exists() and not (tmp_path / "work" / f"{name}_glue").exists()
    commands = (tmp_path / "out" / "base_2min_seed1" / "commands.txt").read_text().splitlines()
    assert [command.split()[:2] for command in commands] == [["python", "train.py"], ["python", "finetune_glue.py"]]
    logs = (tmp_path / "out" / "bert_base_2min_seed1" / "runs.jsonl").read_text()
    assert logs == '{"run": "cola.seed19", "event": "end"}\n'
    # What is finished is not run again: neither by the same command, nor by one with more in it, nor on another machine.
    os.rename(tmp_path / "out", tmp_path / "carried")
    again = Fake(RaceConfig(**{**vars(fake(tmp_path, "configs/base.py 2,4")), "out": str(tmp_path / "carried")}))
    again.race()
    assert [name for name, _ in again.calls if "glue" not in name] == ["base_4min_seed1", "base_4min_seed17"]
    capsys.readouterr()


def test_a_finished_run_with_other_options_is_no_result_of_these(tmp_path, capsys):
    """A changed config, other options or tasks are refused; other directories, prices and jobs are not, nor is less."""
    config = tmp_path / "my.py"
    config.write_text("lr = 1e-3")
    Fake(fake(tmp_path, f"{config} 2")).race()
    places = {"data_dir": "elsewhere", "glue_dir": "there", "price_per_gpu_hour": 4.0, "finetune": "--recipe=fast --jobs=2"}
    for options in (places, {"tasks": ""}):
        same = Fake(fake(tmp_path, f"{config} 2", **options))
        same.race()
        assert not same.calls
    for runs, options, name in (
        (f"{config} 2 --max_grad_norm=1", {}, "max_grad_norm"),
        (f"{config} 2", {"tasks": "cola:3"}, "tasks"), (f"{config} 2", {}, "lr"),
    ):  # fmt: skip
        if name == "lr":
            config.write_text("lr = 2e-3")
        other = Fake(fake(tmp_path, runs, **options))
        with pytest.raises(race.UserError, match="failed: my_2min_seed1, my_2min_seed17"):
            other.race()
        assert not other.calls and f"holds a run with different {name} (choose another --out)" in capsys.readouterr().out
    capsys.readouterr()


def test_a_failure_stops_nothing_else_and_is_retried(tmp_path, capsys):
    cfg = fake(tmp_path)
    driver = Fake(cfg, fails=("base_2min_seed1", "bert_base_2min_seed17_glue"))
    with pytest.raises(race.UserError, match="failed: base_2min_seed1, bert_base_2min_seed17"):
        driver.race()
    assert "status 2: error: as asked" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path / "work" / "bert_base_2min_seed17_glue")) == ["glue.json", "runs"]  # not thrown away
    # The run whose name is a prefix finished, and took nothing with it.
    assert (tmp_path / "out" / "bert_base_2min_seed1" / "commands.txt").exists()
    names = {name for name, _ in driver.calls}
    assert "bert_base_2min_seed1" in names and "base_2min_seed17" in names


def test_each_gpu_takes_the_next_run(tmp_path, capsys):
    driver = Fake(fake(tmp_path, gpus=2, tasks=""))
    original = driver.call

    def slow(words, name, gpu):
        time.sleep(0.2)
        return original(words, name, gpu)

    driver.call = slow
    driver.race()
    assert {gpu for _, gpu in driver.calls} == {0, 1} and len(driver.calls) == 4
    assert sorted(os.listdir(tmp_path / "out" / "bert_base_2min_seed1")) == ["commands.txt", "log.jsonl"]
    capsys.readouterr()


def test_table(tmp_path):
    write_run(tmp_path, "bert", 8, 17, 60.0, dollars=0.33)
    write_run(tmp_path, "mosaicbert", 2, 17, 50.0, held_out=3.0, dollars=None)
    write_run(tmp_path, "mosaicbert", 2, 18, 54.0, held_out=3.2, dollars=None)
    write_run(tmp_path, "fast", 2, 18, 60.0)
    assert race.table(race.read_runs(str(tmp_path))) == [
        "| model | minutes | price | seeds | CoLA | SST-2 | MRPC | STS-B | RTE | mean | held-out loss | samples/s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
        # six runs of CoLA: 50, 51, 51, 54, 55, 55; the means of three seeds over five tasks: 50, 50.8, 50.8, 54, 54.8, 54.8
        "| MosaicBERT | 2 | - | 2 | 52.7 ± 2.3 | 52.0 ± 2.8 | 52.7 ± 2.3 | 52.7 ± 2.3 | 52.7 ± 2.3 | 52.5 ± 2.2 | "
        "3.100 ± 0.141 | 4,400 |",
        "| fast | 2 | $0.100 | 1 | 60.7 ± 0.6 | 60.0 | 60.7 ± 0.6 | 60.7 ± 0.6 | 60.7 ± 0.6 | 60.5 ± 0.5 | 3.000 | 4,400 |",
        "| BERT | 8 | $0.330 | 1 | 60.7 ± 0.6 | 60.0 | 60.7 ± 0.6 | 60.7 ± 0.6 | 60.7 ± 0.6 | 60.5 ± 0.5 | 3.000 | 4,400 |",
    ]


PARTS = {"mnli": 0.0813, "qnli": 0.0955, "qqp": 0.114}


def test_tasks_on_a_part_of_the_data_are_marked_and_kept_out_of_the_first_mean(tmp_path):
    for name, score in (("fast", 60.0), ("base", 50.0)):
        path = write_run(tmp_path, name, 5, 17, score, parts=PARTS)
        results = json.loads((path / "glue.json").read_text())
        results["tasks"]["mnli"]["scores"] = [90.0]
        (path / "glue.json").write_text(json.dumps(results))
    header, _, base, fast = race.table(race.read_runs(str(tmp_path)))
    names = ["MNLI (8 % of the training data)", "QNLI (10 % of the training data)", "QQP (11 % of the training data)"]
    names += ["mean of the 5 complete", "mean of all 8, 3 on a part of the data"]
    assert header.split(" | ")[4:-2] == ["CoLA", "SST-2", "MRPC", "STS-B", "RTE", *names]
    # MNLI's 90 is in the mean of all alone: seeds (7 * 60 + 90) / 8 and (60 + 6 * 61 + 90) / 8
    assert fast.split(" | ")[9:14] == ["90.0", "60.7 ± 0.6", "60.7 ± 0.6", "60.5 ± 0.5", "64.2 ± 0.4"]  # 64.25
    (result,) = race.factors(race.read_runs(str(tmp_path))).values()
    assert result["score"] == pytest.approx(50.533, abs=0.001)
    assert base.startswith("| base | 5 |")


@pytest.mark.parametrize("parts, says", [
    ({**PARTS, "qqp": 0.06}, "QQP with 6 % of the training data"),
    ({}, "RTE with all of the data"),  # the others' started from MNLI's weights
])  # fmt: skip
def test_unlike_scores_share_no_table_and_no_figure(tmp_path, capsys, parts, says):
    write_run(tmp_path, "fast", 5, 17, 60.0, parts=PARTS)
    write_run(tmp_path, "base", 5, 17, 50.0, parts=parts)
    for main, options in ((race.main, [f"--table={tmp_path}"]), (plot.main, [f"--pareto={tmp_path}/*/glue.json"])):
        with pytest.raises(SystemExit):
            main(options)
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and says in error and "(compare them apart)" in error


def test_figure_with_parts_of_the_data(tmp_path):
    """The five complete tasks in one panel, all eight in another whose title says which had a part, and stars in both."""
    from matplotlib import pyplot

    for minutes in (5, 10):
        for name, score in (("fast", 60.0), ("base", 50.0), ("bert_base", 40.0)):
            write_run(tmp_path, name, minutes, 17, score + minutes, held_out=4 - minutes / 10, parts=PARTS)
    figure = plot.plot_pareto(plot.PlotConfig(pareto=f"{tmp_path}/*/glue.json", held_out=True, tasks=True), pyplot)
    five, eight, *tasks, loss = figure.axes[: 2 + 8 + 1]
    assert five.get_title() == "mean of the 5 complete"
    assert eight.get_title().splitlines() == [
        "mean of all 8, 3 on a part of the data", "MNLI (8 % of the training data)", "QNLI (10 % of the training data)",
        "QQP (11 % of the training data)",
    ]  # fmt: skip
    assert {axes.get_title() for axes in tasks} >= {"RTE", "MNLI (8 % of the training data)"}
    labels = five.get_legend_handles_labels()[1]
    assert labels[:3] == ["base", "fast", "bert_base"]
    assert labels[3].endswith("published: the same tasks, A100, all of the data")
    assert loss.get_ylabel().startswith("held-out loss") and list(loss.get_lines()[0].get_ydata()) == [3.5, 3.0]
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(texts) == len(set(texts)) == 5 and [len(axes.get_lines()) for axes in (five, eight, loss)] == [4, 5, 3]
    pyplot.close(figure)


def test_minutes_to_reach():
    points = [(2, 50.0), (4, 54.0), (8, 60.0)]
    assert race.minutes_to_reach(points, 52) == pytest.approx(2 * math.sqrt(2))  # linear in the logarithm
    assert race.minutes_to_reach(points, 54) == pytest.approx(4) and race.minutes_to_reach(points, 60) == pytest.approx(8)
    assert race.minutes_to_reach(points, 50) == 2 and race.minutes_to_reach(points, 10) == 2
    assert race.minutes_to_reach(points, 60.1) == math.inf
    assert race.minutes_to_reach([(2, 50.0), (4, 49.0), (8, 51.0)], 50.5) == pytest.approx(4 * 2**0.75)


def test_factor(tmp_path):
    """MosaicBERT is 4 points ahead and both gain 4 per doubling: half the time. One seed is 0.5 better than the other."""
    runs = race.read_runs(write_race(tmp_path / "a"))
    ((pair, result),) = race.factors(runs).items()
    assert pair == ("MosaicBERT", "BERT")
    # MosaicBERT's point at 4 minutes is the mean of 58 and 58.5, plus the seeds' 0.53; BERT's last is 58 + 0.53.
    assert result["minutes"] == pytest.approx(2 * 2 ** (3.75 / 4)) and result["factor"] == pytest.approx(4 / 2 ** (3.75 / 4))
    assert result["sd"] == pytest.approx(0.5 / math.sqrt(2)) and result["df"] == 4 and result["limit"] == 4
    # Half the width in scores: t(4 df, 97.5 %) = 2.776 times sd of a difference of a pair's mean and a single run, in
    # points; 4 points are a factor of two. The interpolation mixes two points, so only nearly.
    width = 2.776 * result["sd"] * math.sqrt(1 + 1 / 2) / 4
    assert math.log2(result["high"] / result["factor"]) == pytest.approx(width, rel=0.15)
    assert math.log2(result["factor"] / result["low"]) == pytest.approx(width, rel=0.15)
    assert race.factors(runs)[pair] == result  # the same draws
    text = race.factor_text(*pair, result)
    assert "MosaicBERT reached BERT's 8-minute score (58.5) in 3.8 minutes: 2.09 times as fast (95 % interval" in text
    # Far ahead: only a limit is known.
    (text,) = race.results_text(write_race(tmp_path / "b", factor=0.1))[-1:]
    assert "within its shortest run, 2 minutes: at least 4.0 times as fast" in text
    (single,) = race.factors([run for run in runs if run["seed"] == 17]).values()
    assert single["low"] is None and "interval" not in race.factor_text(*pair, single)


def test_factors_of_three_recipes_with_minutes_of_their_own(tmp_path):
    """Each against each that ended lower; one that ends lower in less time makes the other less than once as fast."""
    for name, scores in (("fast", {4: 50, 8: 58}), ("base", {10: 50, 20: 60}), ("bert_base", {10: 44, 20: 48})):
        for minutes, score in scores.items():
            write_run(tmp_path, name, minutes, 17, score)
    lines = race.results_text(str(tmp_path))
    assert [line for line in lines if "reached" in line] == [
        "base reached fast's 8-minute score (58.5) in 17.4 minutes: 0.46 times as fast.",
        "base reached bert_base's 20-minute score (48.5) within its shortest run, 10 minutes: at least 2.0 times as fast.",
        "fast reached bert_base's 20-minute score (48.5) within its shortest run, 4 minutes: at least 5.0 times as fast.",
    ]
    assert [line.split(" | ")[:2] for line in lines[2:8]] == [
        ["| fast", "4"], ["| fast", "8"], ["| base", "10"], ["| bert_base", "10"], ["| base", "20"], ["| bert_base", "20"]
    ]  # fmt: skip


def test_figures(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    directory = write_race(tmp_path / "race")
    wanted = {
        f"--pareto={directory}/*/glue.json": ["US dollars, at $2.50", ">MosaicBERT<", ">BERT<"],
        f"--loss={directory}/*/log.jsonl --held_out=true": ["held-out loss, 15 % masked", "MosaicBERT"],
    }
    monkeypatch.chdir(ROOT)
    for path in directory.glob("*/glue.json"):  # a price of 2.50
        results = json.loads(path.read_text())
        results["pretraining"]["dollars"] = 2.5 * results["pretraining"]["gpu_hours"]
        path.write_text(json.dumps(results))
    for options, words in wanted.items():
        out = tmp_path / "figure.svg"
        plot.main([*options.split(), "--x=gpu_minutes", f"--out={out}"])
        assert not [word for word in words if word not in out.read_text()]


def test_seeds_of_one_budget_are_one_point(tmp_path):
    """They differ by a few steps: each run times its own."""
    paths = [write_run(tmp_path, "bert", 4, seed, score) / "glue.json" for seed, score in ((17, 50.0), (18, 52.0))]
    results = json.loads(paths[1].read_text())
    results["pretraining"]["step"] = 149
    paths[1].write_text(json.dumps(results))
    assert len(glue.curves(map(str, paths), ["x", "x"], "gpu_minutes", ["cola"])["x"]) == 1


def test_logs_with_and_without_a_plan_read_alike(tmp_path):
    """Logs used to have a budget's max_steps in "start"; now it is null there, and "plan" has it."""
    path = write_run(tmp_path, "bert", 4, 17, 50.0)
    start, *rest = map(json.loads, (path / "log.jsonl").read_text().splitlines())
    found = []
    for max_steps, plan in ((150, []), (None, [{"event": "plan", "step": 20, "max_steps": 150, "step_seconds": 1.6}])):
        start["config"]["max_steps"] = max_steps
        (path / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in [start, *plan, *rest]))
        found.append(race.read_run(path))
    assert found[0] == found[1] and (found[0]["minutes"], found[0]["step"], found[0]["seconds"]) == (4, 150, 240)


@pytest.mark.parametrize(
    "options, says",
    [
        ([], "--runs: not given"), (["--runs=configs/base.py"], "runs=configs/base.py, seeds=17,18: expected CONFIG MINUTES"),
        *((["--runs=configs/base.py " + rest], "expected CONFIG MINUTES") for rest in ("4,x", "4 chunk", "4,0", "4@5")),
        (["--runs=configs/base.py 4", "--seeds=a"], "seeds=a: expected CONFIG MINUTES"),
        (["--runs=configs/base.py 4; configs/base.py 4 --lr=1"], "base_4min_seed17 is there twice"),
        (["--runs=configs/none.py 4"], "configs/none.py: No such file"),
        (["--runs=configs/base.py 4 --chnk=true"], "did you mean chunk"),
        (["--runs=configs/base.py 4 --warmup_steps=0.5/min"], "a budget needs 4"),
        (["--runs=configs/base.py 4", "--data_dir=nowhere"], "nowhere: no such directory"),
        (["--runs=configs/base.py 4", "--gpus=-1"], "must be at least 0"), (["--table=nowhere"], "nowhere: no finished runs"),
    ],
)  # fmt: skip
def test_mistakes_end_in_one_line(capsys, monkeypatch, options, says):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stopped:
        race.main(options)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and says in error


@pytest.mark.slow
def test_whole_race_at_toy_size(tmp_path):
    """Every command as on a GPU, on tiny models; stopped once in the middle, then resumed."""
    from tests.test_finetune_glue import write_glue

    data, labels = make_shards(tmp_path / "shards"), write_glue(tmp_path / "glue", (*TASKS, "mnli"))
    argv = [sys.executable, "-m", "studies.race", f"--data_dir={data}", f"--glue_dir={labels}", f"--out={tmp_path}/race"]
    runs = f"configs/base.py 0.1,0.05 --warmup_steps=200/min {TOY}; configs/bert_base.py 0.05 --warmup_steps=10 {TOY}"
    argv += ["--gpus=0", f"--work_dir={tmp_path}/work", f"--runs={runs}", "--tasks=cola,sst2,mrpc,stsb,rte,mnli"]
    argv += ["--finetune=--epochs=1 --seeds=1 --device=cpu --kernels=torch"]
    first = subprocess.Popen(argv, cwd=ROOT, env=train_environment(), stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "race" / "base_0.1min_seed17" / "commands.txt").exists():
        assert first.poll() is None
        time.sleep(0.1)
    time.sleep(5)  # into the next run
    first.send_signal(signal.SIGTERM)
    assert first.wait(60) == 128 + signal.SIGTERM
    second = subprocess.run(argv, cwd=ROOT, env=train_environment(), capture_output=True, text=True)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "base_0.1min_seed17: finished" in second.stdout.splitlines()[0]
    assert len(list((tmp_path / "race").glob("*/glue.json"))) == 6
    assert "MNLI (under 1 % of the training data, under 1 % of dev)" in second.stdout and "times as fast" in second.stdout
    assert not [path for path in (tmp_path / "work").iterdir() if path.is_dir()]
