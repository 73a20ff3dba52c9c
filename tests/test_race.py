"""The race: its commands, what it skips and keeps, and the arithmetic of its table and factor."""

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

from common.options import load_config
from studies import race
from studies.race import RaceConfig, Run
from tests.toy import ROOT, make_shards, train_environment
from tools import plot
from tools.figures import glue

TASKS = ("cola", "sst2", "mrpc", "stsb", "rte")
TOY = (
    "--hidden_size=32 --num_layers=2 --num_heads=2 --intermediate_size=48 --seq_length=32 --global_batch_size=16 "
    "--device=cpu --kernels=torch --compile=false --chunk=true --eval_interval=50 --log_interval=20"
)


def write_run(directory, model, minutes, seed, score, held_out=3.0, dollars=0.1):
    """A finished run's log.jsonl, glue.json and lengths.json; every task's first seed scores `score`, its others one more."""
    path = Path(directory) / Run(model, minutes, seed).name
    path.mkdir(parents=True)
    log = [{"event": "start", "config": {"model": model, "budget_minutes": minutes, "seed": seed}}]
    for step, rate in ((50, 4000.0), (100, 4400.0), (150, 4410.0)):
        cost = {"gpu_hours": minutes * step / 9000, "dollars": None if dollars is None else dollars * step / 150}
        log.append({"event": "train", "step": step, "loss": 7.0 - step / 50, "samples_per_second": rate, **cost})
    log += [{"event": "eval", "step": 75, "loss": 5.0}, {"event": "eval", "step": 150, "loss": held_out}]
    log.append({"event": "end", "step": 150, "seconds": 60 * minutes, "dollars": dollars})
    (path / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))
    tasks = {}
    for task in TASKS:
        scores = [score] if task == "sst2" else [score, score + 1, score + 1]
        tasks[task] = {"scores": scores, "score": float(np.mean(scores)), "score_ci95": None}
    pretraining = {"step": 150, "gpu_hours": minutes / 60, "dollars": dollars, "budget_minutes": minutes, "budget_dollars": 0}
    average = float(np.mean([task["score"] for task in tasks.values()]))
    about = {"model": model, "num_layers": 12, "recipe": "fast", "pretraining": pretraining}
    results = {"tasks": tasks, "average": average, **about}
    (path / "glue.json").write_text(json.dumps(results))
    lengths = {str(n): {"loss": held_out + n / 1000, "accuracy": 0.5, "num_masked": 100} for n in race.LENGTHS[model]}
    (path / "lengths.json").write_text(json.dumps({"model": model, "minutes": minutes, "seed": seed, "lengths": lengths}))
    return path


def write_race(directory, factor=1.0):
    """Both models at 2, 4 and 8 minutes; scores are straight lines over log2(minutes), MosaicBERT's 4 points higher."""
    for model, ahead in (("mosaicbert", 4.0), ("bert", 0.0)):
        for minutes in (2, 4, 8):
            for seed in (17, 18)[: 1 if minutes == 8 else 2]:
                score = 50 + ahead + 4 * factor * math.log2(minutes / 2) + (0.5 if seed == 18 else 0)
                write_run(directory, model, minutes, seed, score, held_out=4 - math.log2(minutes) / 2)
    return directory


def test_commands():
    cfg = RaceConfig(runs="2x1,0.5x17,8x17", models="bert")
    assert [run.name for run in race.parse_runs(cfg)] == ["bert_8min_seed17", "bert_2min_seed1", "bert_0.5min_seed17"]
    runs = race.parse_runs(RaceConfig())
    assert [run.minutes for run in runs] == [8] * 2 + [4] * 4 + [2] * 4  # longest first
    words = race.pretrain_command(RaceConfig(), Run("bert", 8, 17))
    assert words[0] == "train.py" and {"configs/bert_base.py", "--compile=true", "--budget_minutes=8", "--seed=17"} < set(words)
    assert "--recipe=fast" in race.finetune_command(RaceConfig(), Run("bert", 8, 17))
    assert "--seq_length=1024" in race.length_command(RaceConfig(), Run("mosaicbert", 8, 17), 1024)
    # A model's own options override those for both.
    own = race.pretrain_command(RaceConfig(bert="configs/bert_base.py --global_batch_size=1024"), Run("bert", 8, 17))
    assert own.index("--global_batch_size=512") < own.index("--global_batch_size=1024")


def test_both_models_get_the_same_but_for_what_is_documented():
    """Once configs are read, the commands differ in architecture, masking, attention dropout, compile, BERT's smaller batch
    and learning rate, and the steps in a quarter of the time."""
    import train

    cfg = RaceConfig()
    ours, theirs = (
        load_config(train.TrainConfig, race.pretrain_command(cfg, Run(model, 4, 17))[1:]) for model in race.LENGTHS
    )
    differing = {name for name, value in vars(ours).items() if getattr(theirs, name) != value}
    assert differing == {
        "model", "mask_prob", "attention_dropout", "compile", "out_dir", "global_batch_size", "lr", "warmup_steps"
    }  # fmt: skip
    assert [(cfg.global_batch_size, cfg.lr) for cfg in (ours, theirs)] == [(512, 5e-4), (256, 2.5e-4)]
    ours.check(1), theirs.check(1)


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
            written = write_run(f"{self.cfg.work_dir}/made/{len(self.calls)}", run.model, run.minutes, run.seed, 60.0)
            os.makedirs(out)
            os.rename(written / "log.jsonl", f"{out}/log.jsonl")
            os.makedirs(f"{out}_glue/runs")
            os.rename(written / "glue.json", f"{out}_glue/glue.json")
            Path(f"{out}_glue/runs/cola.seed19.jsonl").write_text('{"event": "end"}\n')
        return "step 150: held-out loss 2.3456, accuracy 45.6% of 49,380 masked tokens (always ...)\n"


def fake(tmp_path, **options):
    cfg = RaceConfig(out=str(tmp_path / "out"), work_dir=str(tmp_path / "work"), runs="2x1,2x17", **options)
    for path in (cfg.out, cfg.work_dir):
        os.makedirs(path, exist_ok=True)
    return cfg


def test_driver_keeps_small_files_and_skips_finished_runs(tmp_path, capsys):
    driver = Fake(fake(tmp_path))
    driver.race()
    names = [f"{model}_2min_seed{seed}" for model in ("mosaicbert", "bert") for seed in (1, 17)]
    assert [name for name, _ in driver.calls if name in names] == names
    assert sorted(name for name, _ in driver.calls if name.startswith("bert_2min_seed1_")) == [
        f"bert_2min_seed1_{part}" for part in ("128", "256", "512", "glue")
    ]
    for name in names:
        kept = tmp_path / "out" / name
        assert sorted(os.listdir(kept)) == ["commands.txt", "glue.json", "lengths.json", "log.jsonl", "runs.jsonl"]
        assert not (tmp_path / "work" / name).exists()
    commands = (tmp_path / "out" / "mosaicbert_2min_seed1" / "commands.txt").read_text().splitlines()
    assert len(commands) == 6 and all(command.startswith("python ") for command in commands)
    lengths = json.loads((tmp_path / "out" / "bert_2min_seed1" / "lengths.json").read_text())
    assert lengths["lengths"]["512"] == {"loss": 2.3456, "accuracy": 0.456, "num_masked": 49380}
    assert (tmp_path / "out" / "bert_2min_seed1" / "runs.jsonl").read_text() == '{"run": "cola.seed19", "event": "end"}\n'
    again = Fake(fake(tmp_path))
    again.race()
    assert again.calls == []
    capsys.readouterr()


def test_a_failure_stops_nothing_else_and_is_retried(tmp_path, capsys):
    cfg = fake(tmp_path)
    driver = Fake(cfg, fails=("mosaicbert_2min_seed1", "bert_2min_seed17_512"))
    with pytest.raises(race.UserError, match="failed: mosaicbert_2min_seed1, bert_2min_seed17"):
        driver.race()
    assert "status 2: error: as asked" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path / "work" / "bert_2min_seed17_glue")) == ["glue.json", "runs"]  # not thrown away
    # The run whose name is a prefix finished, and took nothing with it.
    assert (tmp_path / "out" / "bert_2min_seed1" / "commands.txt").exists()
    names = {name for name, _ in driver.calls}
    assert "bert_2min_seed1" in names and "mosaicbert_2min_seed17" in names


def test_each_gpu_takes_the_next_run(tmp_path, capsys):
    driver = Fake(fake(tmp_path, gpus=2, tasks=""))
    original = driver.call

    def slow(words, name, gpu):
        time.sleep(0.2)
        return original(words, name, gpu)

    driver.call = slow
    driver.race()
    assert {gpu for _, gpu in driver.calls} == {0, 1} and len(driver.calls) == 4
    assert sorted(os.listdir(tmp_path / "out" / "bert_2min_seed1")) == ["commands.txt", "log.jsonl"]
    capsys.readouterr()


def test_table(tmp_path):
    write_run(tmp_path, "bert", 8, 17, 60.0, dollars=0.33)
    write_run(tmp_path, "mosaicbert", 2, 17, 50.0, held_out=3.0, dollars=None)
    write_run(tmp_path, "mosaicbert", 2, 18, 54.0, held_out=3.2, dollars=None)
    assert race.table(str(tmp_path)) == [
        "| model | minutes | price | seeds | CoLA | SST-2 | MRPC | STS-B | RTE | mean | held-out loss | samples/s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
        # six runs of CoLA: 50, 51, 51, 54, 55, 55; the means of three seeds over five tasks: 50, 50.8, 50.8, 54, 54.8, 54.8
        "| MosaicBERT | 2 | - | 2 | 52.7 ± 2.3 | 52.0 ± 2.8 | 52.7 ± 2.3 | 52.7 ± 2.3 | 52.7 ± 2.3 | 52.5 ± 2.2 | "
        "3.100 ± 0.141 | 4,400 |",
        "| BERT | 8 | $0.330 | 1 | 60.7 ± 0.6 | 60.0 | 60.7 ± 0.6 | 60.7 ± 0.6 | 60.7 ± 0.6 | 60.5 ± 0.5 | 3.000 | 4,400 |",
    ]


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
    result = race.factor(runs)
    # MosaicBERT's point at 4 minutes is the mean of 58 and 58.5, plus the seeds' 0.53; BERT's last is 58 + 0.53.
    assert result["minutes"] == pytest.approx(2 * 2 ** (3.75 / 4)) and result["factor"] == pytest.approx(4 / 2 ** (3.75 / 4))
    assert result["sd"] == pytest.approx(0.5 / math.sqrt(2)) and result["df"] == 4 and result["limit"] == 4
    # Half the width in scores: t(4 df, 97.5 %) = 2.776 times sd of a difference of a pair's mean and a single run, in
    # points; 4 points are a factor of two. The interpolation mixes two points, so only nearly.
    width = 2.776 * result["sd"] * math.sqrt(1 + 1 / 2) / 4
    assert math.log2(result["high"] / result["factor"]) == pytest.approx(width, rel=0.15)
    assert math.log2(result["factor"] / result["low"]) == pytest.approx(width, rel=0.15)
    assert race.factor(runs) == result  # the same draws
    text = race.factor_text(result)
    assert "8-minute score (58.5) in 3.8 minutes: 2.09 times sooner (95 % interval" in text and "2.38" in text
    # Far ahead: only a limit is known. Far behind: never.
    assert "within its shortest run, 2 minutes: at least 4.0 times sooner" in race.factor_text(
        race.factor(race.read_runs(write_race(tmp_path / "b", factor=0.1)))
    )
    behind = [{**run, "model": {"bert": "mosaicbert", "mosaicbert": "bert"}[run["model"]]} for run in runs]
    assert "did not reach BERT's 8-minute score (62.5)" in race.factor_text(race.factor(behind))
    single = race.factor([run for run in runs if run["seed"] == 17])
    assert single["low"] is None and "interval" not in race.factor_text(single)


def test_figures(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    directory = write_race(tmp_path / "race")
    wanted = {
        f"--pareto={directory}/*/glue.json": ["US dollars, at $2.50", "MosaicBERT, 12 layers"],
        f"--loss={directory}/*/log.jsonl --held_out=true": ["held-out loss, 15 % masked", "MosaicBERT"],
        f"--at_lengths={directory}/*/lengths.json": ["1024", "8 min"],
    }
    for path in directory.glob("*/glue.json"):  # a price of 2.50
        results = json.loads(path.read_text())
        results["pretraining"]["dollars"] = 2.5 * results["pretraining"]["gpu_hours"]
        path.write_text(json.dumps(results))
    for options, words in wanted.items():
        out = tmp_path / "figure.svg"
        plot.main([*options.split(), *(["--x=gpu_minutes"] if "lengths" not in options else []), f"--out={out}"])
        assert not [word for word in words if word not in out.read_text()]
    bad = tmp_path / "lengths.json"
    bad.write_text('{"model": 3}')
    for argv in ([f"--at_lengths={bad}"], [f"--at_lengths={tmp_path}/race"]):
        with pytest.raises(SystemExit):
            plot.main(argv)
        assert capsys.readouterr().err.count("\n") == 1


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
        (["--runs=8"], "'8' is not MINUTESxSEED"), (["--runs=0x17"], "is not MINUTESxSEED"), (["--models=gpt"], "no model 'gpt'"),
        (["--data_dir=nowhere"], "nowhere: no such directory"), (["--gpus=-1"], "must be at least 0"),
        (["--table=nowhere"], "nowhere: no finished runs"),
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

    data, labels = make_shards(tmp_path / "shards"), write_glue(tmp_path / "glue", TASKS)
    argv = [sys.executable, "-m", "studies.race", f"--data_dir={data}", f"--glue_dir={labels}", f"--out={tmp_path}/race"]
    argv += ["--gpus=0", f"--work_dir={tmp_path}/work", "--runs=0.1x17,0.05x1,0.05x17", "--both=", f"--mosaicbert=configs/base.py {TOY}"]
    argv += [f"--bert=configs/bert_base.py {TOY}", "--finetune=--epochs=1 --device=cpu --kernels=torch"]
    first = subprocess.Popen(argv, cwd=ROOT, env=train_environment(), stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "race" / "mosaicbert_0.1min_seed17" / "commands.txt").exists():
        assert first.poll() is None
        time.sleep(0.1)
    time.sleep(5)  # into the next run
    first.send_signal(signal.SIGTERM)
    assert first.wait(60) == 128 + signal.SIGTERM
    second = subprocess.run(argv, cwd=ROOT, env=train_environment(), capture_output=True, text=True)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "mosaicbert_0.1min_seed17: finished" in second.stdout.splitlines()[0]
    assert len(list((tmp_path / "race").glob("*/lengths.json"))) == 6
    assert "BERT's 0.1-minute score" in second.stdout.splitlines()[-1]
    assert not [path for path in (tmp_path / "work").iterdir() if path.is_dir()]
