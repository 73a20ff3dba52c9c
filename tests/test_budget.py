"""A budget of minutes or dollars: the arithmetic with known times, trials that change nothing, and a plan that stays."""

import dataclasses
import json
import statistics

import pytest
import torch

import budget
import train
from tests.ranks import run_ranks
from test_train import data_dir, fails  # noqa: F401, a fixture
from tests.toy import ROOT, files_of, make_shards, read_log, toy_argv
from common.processes import Process
from train import TrainConfig

ALONE = Process(0, 1, torch.device("cpu"), torch.float32)


def weights(out, step):
    files = files_of(out / f"step_{step:08d}")
    return files["model.safetensors"], files["optimizer.safetensors"]


def seconds_of_run(cfg, costs):
    """A run of cfg.max_steps, step by step, with one thread that writes checkpoints."""
    now = written = 0.0
    for step in range(1, cfg.max_steps + 1):
        now += costs.step
        if train.is_eval_step(cfg, step):
            now += costs.evaluation
        if step == cfg.max_steps or step % cfg.checkpoint_interval == 0:
            now = max(now, written)
            written = now + costs.save
            now += budget.HELD_UP * costs.save if step < cfg.max_steps else 0
    return written


@pytest.mark.parametrize("minutes", [0.5, 2, 16, 600])
@pytest.mark.parametrize("eval_interval", [0, 1, 250, 2000])
@pytest.mark.parametrize("checkpoint_interval", [10, 275, 2000])
def test_as_many_steps_as_fit(minutes, eval_interval, checkpoint_interval):
    """MosaicBERT-Base on an H100 in steps of 512, its evaluation and its checkpoint: never over, less than 3 % under."""
    cfg = TrainConfig(budget_minutes=minutes, eval_interval=eval_interval, checkpoint_interval=checkpoint_interval)
    costs = budget.Costs(step=0.108, evaluation=0.9, save=4.3)
    steps = budget.steps_to_train(cfg, ALONE, costs)
    seconds, one_more = (seconds_of_run(dataclasses.replace(cfg, max_steps=n), costs) for n in (steps, steps + 1))
    assert seconds == pytest.approx(budget.total_seconds(steps, cfg, costs))
    assert seconds <= 0.99 * 60 * minutes < one_more
    if one_more - seconds < 0.01 * 60 * minutes:  # else a step, or another checkpoint, is a matter of percents
        assert 0.97 * 60 * minutes < seconds


def test_dollars_are_minutes_of_all_gpus():
    cfg = TrainConfig(budget_dollars=2, price_per_gpu_hour=2.5)
    assert budget.seconds_of(cfg, 1) == pytest.approx(0.8 * 3600) and budget.seconds_of(cfg, 8) == pytest.approx(360)
    assert budget.seconds_of(TrainConfig(budget_minutes=16), 8) == 960 and budget.seconds_of(TrainConfig(), 8) == 0


class Clock:
    """A machine on which the first steps compile, and the others slow down as it warms up."""

    def __init__(self, step_seconds):
        self.now, self.done, self.step_seconds, self.calls = 0.0, 0, step_seconds, []

    def __call__(self):
        return self.now

    def steps(self, count):
        self.calls.append(count)
        for _ in range(count):
            self.now += self.step_seconds(self.done, self.now)
            self.done += 1


def test_steps_are_timed_late(monkeypatch):
    """Neither compiling, nor the quick seconds while the GPU is cool, nor one stall get into the time of a step."""
    def seconds(done, now):
        if done == 4:
            return 40.0  # a shape that compiles late
        if done < 3:
            return 12.0
        return 0.1 if now > 85 else 0.05

    clock = Clock(seconds)
    monkeypatch.setattr(budget, "clock", clock)
    assert budget.time_steps(clock.steps, ALONE, 960, 3) == pytest.approx(0.1)
    steady = clock.now - 3 * 12 - 40
    assert budget.HEAT_SECONDS + budget.TIMED_SECONDS - 2 < steady < 2 * (budget.HEAT_SECONDS + budget.TIMED_SECONDS)
    # Of a short budget only a share goes by, and slow steps are not repeated often.
    clock = Clock(lambda done, now: 0.01)
    monkeypatch.setattr(budget, "clock", clock)
    assert budget.time_steps(clock.steps, ALONE, 6, 3) == pytest.approx(0.01)
    assert 0.5 < clock.now < 1.1
    clock = Clock(lambda done, now: 60.0)
    monkeypatch.setattr(budget, "clock", clock)
    assert budget.time_steps(clock.steps, ALONE, 3600, 3) == pytest.approx(60) and clock.done == 3 + 1 + budget.ROUNDS
    clock.done = 0
    assert budget.time_steps(clock.steps, ALONE, 600, 3) == pytest.approx(60) and clock.done == 3 + 1  # refused anyway


def test_evaluation_is_scaled_and_the_longest_process_counts(monkeypatch):
    clock, evaluated = Clock(None), []
    monkeypatch.setattr(budget, "clock", clock)

    class Two:
        world_size, device = 2, torch.device("cpu")

        def gather(self, values):
            return [values, [1.5 * values[0]]]  # the other process is slower

    def evaluate(samples):
        evaluated.append(samples)
        clock.now += samples / 1000 + (20 if len(evaluated) == 1 else 0)

    def trial_step(step, batches):
        assert batches == f"batches of {step}"
        clock.now += 0.01

    cfg = TrainConfig(budget_minutes=1)
    arguments = (trial_step, lambda step: f"batches of {step}", evaluate, 50_000, lambda: 4.0)
    costs = budget.measure(cfg, Two(), *arguments)
    assert evaluated == [2 * budget.TRIAL_EVAL_SAMPLES] * 2
    assert (costs.step, costs.evaluation, costs.save) == pytest.approx((0.015, 75, 6))
    budget.measure(TrainConfig(budget_minutes=1, eval_samples=300), Two(), *arguments)
    assert evaluated[-1] == 300


@pytest.fixture
def few_trials(monkeypatch):
    """As few trial steps as there can be, however slow the machine, and 25 steps as what the budget buys."""
    monkeypatch.setattr(budget, "HEAT_SHARE", 1e-9)
    monkeypatch.setattr(budget, "TIMED_SHARE", 1e-9)
    monkeypatch.setattr(budget, "steps_to_train", lambda *_: 25)
    return budget.FIRST_STEPS + 1 + budget.ROUNDS


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0, "model": "bert", "attention_dropout": 0.1}])
def test_trials_change_nothing(data_dir, tmp_path, few_trials, monkeypatch, capsys, options):  # noqa: F811
    """A run by a budget ends with the bytes of one with the same max_steps given by hand, moments included."""
    seen = []
    real = budget.measure

    def watching(cfg, process, trial_step, *rest):
        def step(number, batches):
            loss, grad_norm, _ = trial_step(number, batches)
            seen.append((number, loss.item(), grad_norm.item()))

        return real(cfg, process, step, *rest)

    monkeypatch.setattr(budget, "measure", watching)
    train.main(toy_argv(data_dir, tmp_path / "budget", **{**options, "max_steps": 70000, "budget_minutes": 100}))
    train.main(toy_argv(data_dir, tmp_path / "hand", **{**options, "max_steps": 25}))
    assert "budget of 100 minutes: 25 steps" in capsys.readouterr().out
    assert weights(tmp_path / "budget", 25) == weights(tmp_path / "hand", 25)
    logs = [[(r["loss"], r["grad_norm"], r["lr"]) for r in read_log(tmp_path / name)] for name in ("budget", "hand")]
    assert logs[0] == logs[1] and len(logs[0]) == 25
    # They were the run's own steps, on its first weights.
    assert [number for number, *_ in seen] == list(range(1, few_trials + 1))
    assert seen[0][1:] == pytest.approx((logs[0][0][0], logs[0][0][1]))
    assert not (tmp_path / "budget" / "trial").exists()
    assert json.loads((tmp_path / "budget" / "config.json").read_text())["max_steps"] == 25
    assert read_log(tmp_path / "budget", "start")[0]["config"]["max_steps"] == 25


def test_a_trial_does_the_work_of_an_update():
    """AdamW runs over every parameter and moment, though no weight changes: an update that is skipped costs nothing."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    before = [parameter.detach().clone() for parameter in layer.parameters()]
    for trial in (True, False):
        layer(torch.randn(5, 4)).sum().backward()
        train.update(layer, optimizer, TrainConfig(), ALONE, 1000, trial)
        for parameter, value in zip(layer.parameters(), before):
            assert optimizer.state[parameter]["exp_avg_sq"].all() and torch.equal(parameter, value) == trial


def test_a_trial_that_trained_would_be_seen(data_dir, tmp_path, few_trials, monkeypatch):  # noqa: F811
    """The test above can fail: with trials that update, the bytes differ."""
    update = train.update
    monkeypatch.setattr(train, "update", lambda *arguments: update(*arguments[:5]))
    train.main(toy_argv(data_dir, tmp_path / "budget", max_steps=70000, budget_minutes=100))
    monkeypatch.undo()
    train.main(toy_argv(data_dir, tmp_path / "hand", max_steps=25))
    assert weights(tmp_path / "budget", 25) != weights(tmp_path / "hand", 25)


def known_times():
    """In each of several processes: a clock of its own, slower in the second, and a checkpoint of known cost."""
    import os

    ticks = iter(range(10**9))
    tick = 0.02 * (1 + int(os.environ["RANK"]))
    budget.clock = lambda: tick * next(ticks)
    train.checkpoint.RunDirectory.trial_save = lambda run, model: 0.1


def test_two_processes_agree(data_dir, tmp_path):  # noqa: F811
    """The slower clock counts for both; and again the bytes are those of the same max_steps given by hand."""
    faults = {0: known_times, 1: known_times}
    argv = toy_argv(data_dir, tmp_path / "budget", max_steps=70000, budget_minutes=0.02, eval_interval=0)
    statuses, output = run_ranks(argv, 2, tmp_path / "ranks", faults)
    assert statuses == [0, 0], output
    # A look at the slower clock takes 0.04 s, whatever lies between: a step, an evaluation.
    steps = read_log(tmp_path / "budget", "end")[0]["step"]
    assert steps == int((1.2 * 0.99 - 0.04 - 0.1 - 6 * 0.12 * 0.1) / 0.04)  # six checkpoints on the way
    assert f"{steps} steps of 0.04 s, 1 x 0.04 s of evaluation, 0.1 s for the last checkpoint: " in output
    argv = toy_argv(data_dir, tmp_path / "hand", max_steps=steps, eval_interval=0)
    statuses, output = run_ranks(argv, 2, tmp_path / "ranks2")
    assert statuses == [0, 0], output
    assert weights(tmp_path / "budget", steps) == weights(tmp_path / "hand", steps)


def test_a_resume_keeps_the_plan(data_dir, tmp_path, few_trials, monkeypatch, capsys):  # noqa: F811
    argv = toy_argv(data_dir, tmp_path / "run", max_steps=70000, budget_minutes=0.01)
    monkeypatch.setattr(budget, "steps_to_train", lambda *_: 22)
    train.main(argv)
    straight = weights(tmp_path / "run", 22)
    monkeypatch.setattr(budget, "measure", None)  # from here on, timing is an error
    train.main(argv)
    assert "finished, 22 of 22 steps" in capsys.readouterr().out
    for lost in (["00000022"], ["00000022", "00000020"]):  # the last checkpoint; then all, as if killed before the first
        for step in lost:
            train.checkpoint.shutil.rmtree(tmp_path / "run" / f"step_{step}")
        train.main(argv)
        assert weights(tmp_path / "run", 22) == straight
    first, *resumed = [record["planned"] for record in read_log(tmp_path / "run", "start")]
    assert set(first) == {"step", "evaluation", "save"} and min(first.values()) > 0 and resumed == [None, None]
    # Another price of the same dollars' GPU, or other intervals, change nothing.
    train.main([*argv, "--price_per_gpu_hour=2", "--eval_interval=0"])
    train.main([*argv, "--eval_only"])
    line = fails([*argv[:-1], "--budget_minutes=0.02"], capsys)
    assert "budget_minutes was 0.01 and is 0.02" in line and "max_steps" not in line
    assert "budget_minutes was 0.01 and is 0.0" in fails(toy_argv(data_dir, tmp_path / "run", max_steps=22), capsys)
    train.main(toy_argv(data_dir, tmp_path / "hand", max_steps=22))
    assert "budget_minutes was 0.0 and is 0.01" in fails([*argv, f"--out_dir={tmp_path / 'hand'}"], capsys)


@pytest.mark.parametrize(
    "options, says",
    [
        ("--budget_minutes=1 --budget_dollars=1 --price_per_gpu_hour=1", "budget_minutes or --budget_dollars, not both"),
        ("--budget_dollars=1", "needs the price"), ("--budget_minutes=-1", "budget_minutes=-1.0: must be at least 0"),
        ("--budget_minutes=long", "not a number"), ("--budget_minutes=0.001", "0.001 minutes buy"),
    ],
)  # fmt: skip
def test_mistakes_end_in_one_line(data_dir, tmp_path, capsys, monkeypatch, options, says):  # noqa: F811
    monkeypatch.setattr(budget, "measure", lambda *_: budget.Costs(0.01, 0.2, 0.1))
    line = fails([*toy_argv(data_dir, tmp_path / "out"), *options.split()], capsys)
    assert says in line and not (tmp_path / "out" / "log.jsonl").exists()
    if "buy" in says:
        assert "0 steps here, at least 20" in line and "a step takes 0.01 s, evaluating 0.2 s, saving 0.1 s" in line


def test_dry_run_plans_by_what_was_measured(tmp_path, capsys):
    """On a machine without a GPU: H100 and A100; each number follows from the share of the peak and its source."""
    data = make_shards(tmp_path / "shards")
    argv = ["configs/base.py", f"--data_dir={data}", f"--out_dir={tmp_path / 'run'}", "--budget_minutes=16", "--device=cpu"]
    train.main([*argv, "--price_per_gpu_hour=2.5", "--dry_run"])
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if "H100" in line)
    assert line.startswith("budget      16 minutes on 1 x H100 at 46.4% MFU (results/scaling_h100/scaling.json): ")
    assert line.endswith("epochs, 0.267 h, $0.67") and "steps see" in line
    assert "GB for micro-batches of at most 131,072 tokens, in bfloat16 on a GPU of 80 GB" in printed  # as if on one
    assert "A100 at 29.8% MFU (published" in printed and "70,000" not in printed and not (tmp_path / "run").exists()
    train.main([*argv, "--hidden_size=384", "--dry_run"])
    assert "16 minutes on 1 x H100: speed not measured yet" in capsys.readouterr().out


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
    steps = int(budget.expected_text(cfg, *place, "{} steps".format).split(" samples; ")[1].split()[0])
    assert steps == pytest.approx(end["step"], rel=0.03)
