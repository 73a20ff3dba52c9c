"""A budget of minutes or dollars: the arithmetic with known times, a warm-up that measures, and a plan that stays."""

import dataclasses
import json
import re
import statistics
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import train
from common import budget, estimate
from common.processes import Process
from tests import faults
from tests.ranks import Ranks, run_ranks
from tests.test_train import data_dir, fails  # noqa: F401, a fixture
from tests.toy import ROOT, files_of, make_shards, read_log, toy_argv
from train import TrainConfig

ALONE = Process(0, 1, torch.device("cpu"), torch.float32)


def weights(out, step):
    files = files_of(out / f"step_{step:08d}")
    return files["model.safetensors"], files["optimizer.safetensors"]


def seconds_of_run(cfg, costs, first):
    """Steps first + 1 to cfg.max_steps, one by one, with one thread that writes checkpoints."""
    now = written = 0.0
    for step in range(first + 1, cfg.max_steps + 1):
        now += costs.step
        if train.is_eval_step(cfg, step):
            now += costs.evaluation
        if step == cfg.max_steps or step % cfg.checkpoint_interval == 0:
            now = max(now, written)
            written = now + costs.save
            now += budget.SAVE_OVERHEAD * costs.save if step < cfg.max_steps else 0
    return written


@pytest.mark.parametrize("minutes", [0.5, 2, 16, 600])
@pytest.mark.parametrize("eval_interval", [0, 1, 250, 2000])
@pytest.mark.parametrize("checkpoint_interval", [10, 275, 2000])
@pytest.mark.parametrize("first", [0, 200, 275])
def test_as_many_steps_as_fit(minutes, eval_interval, checkpoint_interval, first):
    """MosaicBERT-Base on an H100 in steps of 512, its evaluation and its checkpoint: never over, and not one step under."""
    cfg = TrainConfig(budget_minutes=minutes, eval_interval=eval_interval, checkpoint_interval=checkpoint_interval)
    costs = budget.Costs(step=0.108, evaluation=0.9, save=4.3)
    steps = budget.affordable_steps(cfg, costs, 60 * minutes, first)
    assert steps > first
    seconds, one_more = (seconds_of_run(dataclasses.replace(cfg, max_steps=n), costs, first) for n in (steps, steps + 1))
    assert seconds == pytest.approx(budget.training_seconds(cfg, costs, first, steps))
    assert seconds <= 60 * minutes < one_more


def test_nothing_fits():
    cfg, costs = TrainConfig(budget_minutes=1), budget.Costs(step=0.1, evaluation=0.9, save=4.3)
    assert [budget.affordable_steps(cfg, costs, seconds, 200) for seconds in (-5, 0, 5.2)] == [200] * 3
    assert budget.affordable_steps(cfg, costs, 5.3001, 200) == 201


def test_dollars_are_minutes_of_all_gpus():
    cfg = TrainConfig(budget_dollars=2, price_per_gpu_hour=2.5)
    assert budget.seconds_of(cfg, 1) == pytest.approx(0.8 * 3600) and budget.seconds_of(cfg, 8) == pytest.approx(360)
    assert budget.seconds_of(TrainConfig(budget_minutes=16), 8) == 960 and budget.seconds_of(TrainConfig(), 8) == 0


class Two:
    """Of two processes the first; the other is slower."""

    world_size = 2

    def say(self, text):
        pass

    def gather(self, values):
        return [values, [1.5 * value for value in values]]


def test_only_the_warm_half_of_the_warm_up_is_timed(monkeypatch):
    """Neither compiling, nor the first half, in which a GPU is cool, gets into the time of a step; an evaluation is scaled
    to all samples; the slower process counts."""
    cfg = TrainConfig(budget_minutes=2, max_steps=None, warmup_steps=100, eval_interval=0)
    state, evaluated, clock, logged = {"step": 0}, [], [0.0], {}
    planner = budget.Planner(cfg, state, Two())

    def evaluate(num_samples):
        evaluated.append(num_samples)
        clock[0] += num_samples / 1000 + (20 if len(evaluated) == 1 else 0)  # the first one compiles
        return {"loss": 1.0}

    monkeypatch.setattr(budget.time, "perf_counter", lambda: clock[0])
    saver = SimpleNamespace(wait=lambda: None, seconds=2.0)
    reports = []
    for step in range(1, 101):
        if planner.wants(step) or planner.saves(step) or step % 10 == 0:
            reports.append(step)
            slow = 1.0 if step == 1 else 0.05 if step <= 50 else 0.1
            count = step - (reports[-2] if len(reports) > 1 else 0)
            planner.add(step, SimpleNamespace(num_steps=count, seconds=count * slow), 30.0)
        if planner.saves(step):
            planner.time_rest(evaluate, 50_000, saver)
    assert reports[0] == 1 and 50 in reports and evaluated == [2 * budget.EVAL_SAMPLES] * 2
    run = SimpleNamespace(log=lambda event, **values: logged.update(values))
    steps = planner.plan(20.05, run)
    assert (logged["step_seconds"], logged["evaluation_seconds"], logged["save_seconds"]) == pytest.approx((0.15, 75, 3))
    assert steps == 100 + int((120 * 0.99 - 30.075 - 75 - 3) / 0.15) == logged["max_steps"]


@pytest.fixture
def plan_of_25(monkeypatch):
    """25 steps are what the budget buys, however slow the machine."""
    monkeypatch.setattr(budget, "affordable_steps", lambda *_: 25)


def budget_argv(data_dir, out, **options):  # noqa: F811
    return toy_argv(data_dir, out, **{"max_steps": 70000, "budget_minutes": 100, "warmup_steps": 8, **options})


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0, "model": "bert", "attention_dropout": 0.1}])
def test_planning_changes_nothing(data_dir, tmp_path, plan_of_25, capsys, options):  # noqa: F811
    """A run by a budget ends with the bytes of one with the same warm-up and max_steps given by hand, moments included."""
    train.main(budget_argv(data_dir, tmp_path / "budget", **options))
    printed = capsys.readouterr().out
    assert "planned after a warm-up of 8 steps" in printed and "a checkpoint" in printed and ": 25 steps" in printed
    train.main(toy_argv(data_dir, tmp_path / "hand", **{**options, "max_steps": 25, "warmup_steps": 8}))
    assert weights(tmp_path / "budget", 25) == weights(tmp_path / "hand", 25)
    logs = [[(r["loss"], r["grad_norm"], r["lr"]) for r in read_log(tmp_path / name)] for name in ("budget", "hand")]
    assert logs[0] == logs[1] and len(logs[0]) == 25 and logs[0][8][2] == 3e-3 > logs[0][9][2]
    (plan,) = read_log(tmp_path / "budget", "plan")
    assert plan["step"] == 8 and plan["max_steps"] == 25
    assert min(plan["step_seconds"], plan["evaluation_seconds"], plan["save_seconds"]) > 0
    config = json.loads((tmp_path / "budget" / "config.json").read_text())
    assert (config["max_steps"], config["warmup_steps"]) == (25, 8)


def test_the_masking_rate_falls_after_the_warm_up():
    cfg = TrainConfig(budget_minutes=1, warmup_steps=8, final_mask_prob=0.15, max_steps=None)
    assert [train.mask_prob_at(cfg, step) for step in (1, 8)] == [0.3, 0.3]
    assert train.mask_prob_at(cfg, 9) == 0.3  # made ahead, before the plan
    cfg.max_steps = 19
    assert [train.mask_prob_at(cfg, step) for step in (9, 14, 19)] == pytest.approx([0.3, 0.225, 0.15])


def test_two_processes_agree(data_dir, tmp_path):  # noqa: F811
    """The plan is the same in both, and again the bytes are those of the same max_steps given by hand."""
    argv = budget_argv(data_dir, tmp_path / "budget", budget_minutes=0.025, eval_interval=0)
    statuses, output = run_ranks(argv, 2, tmp_path / "ranks")
    assert statuses == [0, 0], output
    end, (plan,) = read_log(tmp_path / "budget", "end")[0], read_log(tmp_path / "budget", "plan")
    assert end["step"] == plan["max_steps"] > 8
    argv = toy_argv(data_dir, tmp_path / "hand", max_steps=end["step"], warmup_steps=8, eval_interval=0)
    statuses, output = run_ranks(argv, 2, tmp_path / "ranks2")
    assert statuses == [0, 0], output
    assert weights(tmp_path / "budget", end["step"]) == weights(tmp_path / "hand", end["step"])


def test_a_resume_keeps_the_plan(data_dir, tmp_path, monkeypatch, plan_of_25, capsys):  # noqa: F811
    argv = budget_argv(data_dir, tmp_path / "run", budget_minutes=10, checkpoint_interval=10, keep_checkpoints=9)
    train.main(argv)
    straight = weights(tmp_path / "run", 25)
    monkeypatch.setattr(budget, "affordable_steps", lambda *_: 30)  # from here on, planning again would be seen
    train.main(argv)
    assert "finished, 25 of 25 steps" in capsys.readouterr().out
    # Without the last checkpoint; with that of half the warm-up alone; and without any, as if killed before the first.
    for lost in ([25], [25, 20, 10], [25, 20, 10, 4]):
        for step in lost:
            train.checkpoint.shutil.rmtree(tmp_path / "run" / f"step_{step:08d}")
        train.main(argv)
        assert weights(tmp_path / "run", 25) == straight
    # Another price of the same dollars' GPU, or other intervals, change nothing.
    train.main([*argv, "--price_per_gpu_hour=2", "--eval_interval=0"])
    train.main([*argv, "--eval_only"])
    line = fails([*argv, "--budget_minutes=20"], capsys)
    assert "budget_minutes was 10" in line and "and is 20" in line and "max_steps" not in line
    by_hand = toy_argv(data_dir, tmp_path / "run", max_steps=25, warmup_steps=8)
    assert "budget_minutes was 10" in fails(by_hand, capsys)
    train.main(toy_argv(data_dir, tmp_path / "hand", max_steps=22))
    assert "budget_minutes was 0.0 and is 10" in fails([*argv, f"--out_dir={tmp_path / 'hand'}"], capsys)


def test_a_plan_of_earlier_code_is_kept(data_dir, tmp_path, plan_of_25, capsys):  # noqa: F811
    """Budgets used to be planned before the first step, with a warm-up by its share of max_steps."""
    argv = toy_argv(data_dir, tmp_path / "run", max_steps=12)
    train.main(argv)
    from tests.toy import reseal

    for path in [tmp_path / "run", *(tmp_path / "run").glob("step_*")]:
        config = json.loads((path / "config.json").read_text())
        del config["warmup_steps"]
        (path / "config.json").write_text(json.dumps({**config, "budget_minutes": 10.0}))
        if path.name.startswith("step_"):
            reseal(path)
    straight = weights(tmp_path / "run", 12)
    train.checkpoint.shutil.rmtree(tmp_path / "run" / "step_00000012")
    train.main([*argv, "--max_steps=70000", "--budget_minutes=10"])
    assert weights(tmp_path / "run", 12) == straight and not read_log(tmp_path / "run", "plan")


@pytest.mark.parametrize("step", [2, 6])
def test_killed_in_the_warm_up(data_dir, tmp_path, step):  # noqa: F811
    """Before or after the half that is timed: the same command resumes, finishes the measurement, and plans."""
    argv = budget_argv(data_dir, tmp_path / "run", budget_minutes=0.08)
    ranks = Ranks(argv, 1, tmp_path / "ranks", {0: partial(faults.stop_at, step)})
    assert ranks.wait() == [143], ranks.output()
    assert not read_log(tmp_path / "run", "plan") and read_log(tmp_path / "run", "stop")[0]["step"] in (step, step + 1)
    statuses, output = run_ranks(argv, 1, tmp_path / "again")
    (plan,) = read_log(tmp_path / "run", "plan")
    assert statuses == [0] and read_log(tmp_path / "run", "end")[0]["step"] == plan["max_steps"] > 8, output


@pytest.mark.parametrize(
    "options, says",
    [
        ("--budget_minutes=1 --budget_dollars=1 --price_per_gpu_hour=1", "budget_minutes or --budget_dollars, not both"),
        ("--budget_dollars=1", "needs the price"), ("--budget_dollars=1 --schedule=wsd --decay_fraction=1", "needs the price"),
        ("--budget_minutes=-1", "budget_minutes=-1.0: must be at least 0"),
        ("--budget_minutes=long", "not a number"), ("--budget_minutes=1 --warmup_steps=3", "a budget needs 4"),
        ("--warmup_steps=11", "more than max_steps=10"),
    ],
)  # fmt: skip
def test_mistakes_end_in_one_line(data_dir, tmp_path, capsys, options, says):  # noqa: F811
    assert says in fails([*toy_argv(data_dir, tmp_path / "out"), *options.split()], capsys)
    assert not (tmp_path / "out" / "log.jsonl").exists()


def test_a_budget_that_the_warm_up_spends(data_dir, tmp_path, capsys, monkeypatch):  # noqa: F811
    assert "0.0001 minutes: spent after 1 steps of a warm-up of 8" in fails(
        budget_argv(data_dir, tmp_path / "a", budget_minutes=0.0001), capsys
    )
    monkeypatch.setattr(budget, "affordable_steps", lambda *_: 8)
    line = fails(budget_argv(data_dir, tmp_path / "b"), capsys)
    assert "the warm-up of 8 steps took" in line and "too little is left: a step takes" in line and "--warmup_steps" in line


def test_dry_run_plans_by_what_was_measured(tmp_path, capsys):
    """On a machine without a GPU: H100 and A100; each number follows from the share of the peak and its source."""
    data = make_shards(tmp_path / "shards")
    argv = ["configs/base.py", f"--data_dir={data}", f"--out_dir={tmp_path / 'run'}", "--budget_minutes=16", "--device=cpu"]
    train.main([*argv, "--price_per_gpu_hour=2.5", "--dry_run"])
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if "H100" in line)
    assert line.startswith("budget      16 minutes on 1 x H100 at 46.4% MFU (results/scaling_h100/scaling.json): ")
    assert line.endswith("epochs, 0.27 h, $0.67") and "steps see" in line
    assert "GB for micro-batches of at most 131,072 tokens, in bfloat16 on a GPU of 80 GB" in printed  # as if on one
    assert "in bfloat16 on a GPU of 141 GB" in printed
    assert "A100 at 29.8% MFU (published" in printed and "70,000" not in printed and not (tmp_path / "run").exists()
    train.main([*argv, "--hidden_size=384", "--dry_run"])
    assert "16 minutes on 1 x H100: speed not measured yet" in capsys.readouterr().out


def test_the_time_of_short_steps_is_a_bound(tmp_path, capsys):
    """It was 3 seconds for 70,000 steps of configs/small.py."""
    argv = [f"--data_dir={make_shards(tmp_path / 'shards')}", f"--out_dir={tmp_path / 'run'}", "--device=cpu", "--dry_run"]
    train.main(["configs/small.py", *argv, "--price_per_gpu_hour=2"])
    printed = capsys.readouterr().out
    assert printed.count("time        more than ") == 6 and "time        more than 1 s on 1 x A100 at 30% MFU, $" in printed
    assert printed.endswith("(steps of less than 25 ms may wait for the host, which launches their kernels)\n")
    train.main(["configs/base.py", *argv])
    assert "more than" not in (printed := capsys.readouterr().out) and "steps of less" not in printed and "time        " in printed
    for samples, bound in ((4096, ""), (32, "at most ")):
        train.main(["configs/base.py", *argv, f"--global_batch_size={samples}", "--budget_minutes=16"])
        assert re.search(rf"H100 at 46.4% MFU \(\S+\): {bound}\d[\d,]* samples", capsys.readouterr().out)


def test_max_steps_beside_a_budget_is_said_not_to_count(tmp_path, capsys):
    argv = ["configs/base.py", f"--data_dir={make_shards(tmp_path / 'shards')}", "--num_layers=1", "--budget_minutes=1", "--dry_run"]
    train.main([*argv, "--max_steps=300"])
    assert "max_steps=300 does not count: the budget decides" in capsys.readouterr().out
    train.main(argv)
    assert "does not count" not in capsys.readouterr().out


def test_short_times_are_not_zero_hours():
    assert [estimate.duration(hours) for hours in (1234.5, 0.1, 0.05, 0.001, 0)] == ["1,234.50 h", "0.10 h", "3.0 min", "4 s", "1 s"]


def test_expected_steps_are_those_of_the_measured_run():
    """The run behind BERT's figure: two minutes on an H100, 1,059 steps, within 3 % of the budget."""
    with open(ROOT / "results/race_settings/bert_512_5e-4.jsonl") as file:
        records = [json.loads(line) for line in file]
    start, end = records[0], records[-1]
    cfg = TrainConfig(**start["config"])
    seconds = 60 * cfg.budget_minutes
    assert end["event"] == "end" and abs(end["seconds"] / seconds - 1) < 0.03
    rates = [record["tokens"] / record["samples"] for record in records if record["event"] == "train"]
    tokens = statistics.median(rates)  # of a sample
    flops = train.matrix_flops(cfg, 30_522, tokens, tokens**2, cfg.mask_prob * tokens)
    place = (1, start["device"], 989.4e12, flops, 2700, start["num_params"])
    steps = int(estimate.expected_plan(cfg, *place, "{} steps".format).split(" samples; ")[1].split()[0])
    assert steps == pytest.approx(end["step"], rel=0.03)


def test_a_dry_run_finds_another_run_in_its_directory(tmp_path, capsys):
    """It checks what the real start would check; and it warns of too many epochs as that does."""
    data, out = make_shards(tmp_path / "shards"), tmp_path / "run"
    train.main(toy_argv(data, out, max_steps=4))
    with pytest.raises(SystemExit):
        train.main([*toy_argv(data, out, max_steps=4, lr=1e-3), "--dry_run"])
    assert "holds a run that differs: lr was 0.003 and is 0.001" in capsys.readouterr().err
    train.main([*toy_argv(data, tmp_path / "new", max_steps=10_000), "--dry_run"])
    assert "warning: 10,000 steps are" in capsys.readouterr().out and not (tmp_path / "new").exists()
