"""The race: recipes against each other, each with its own minutes on one GPU, scored on GLUE.

    python -m studies.race --runs="configs/base.py 8,16 --global_batch_size=512; configs/small.py 8" --seeds=17,18 \
        --data_dir=data/race --glue_dir=data/glue --out=out/race --gpus=2
    python -m studies.race --table=results/race                # the results, as the README shows them

Each run is pretrained alone on its GPU, with a schedule that decays within its minutes, and then fine-tuned there by
several jobs at a time (start nvidia-cuda-mps-control -d first). Every step is a command of train.py or finetune_glue.py,
printed and kept with its results, so that it can be run by itself. The same command again skips finished runs and resumes
the others. Several machines, or days, share the work: each with some of the --runs and --seeds, and --out carried along.

OUT/CONFIG_MINUTESmin_seedSEED holds a finished run's log.jsonl, glue.json, commands.txt and the fine-tuning logs,
runs.jsonl. Checkpoints stay in --work_dir until they are fine-tuned.

Read next: docs/results.md
"""

import glob
import itertools
import json
import math
import os
import queue
import re
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.files import write_text
from common.options import UserError, command, load_config, stoppable
from tools.figures import glue, reading
from train import TrainConfig

INTERVALS = ("--eval_interval=250", "--log_interval=50", "--checkpoint_interval=2000", "--keep_checkpoints=1")
COLUMNS = ("cola", "sst2", "mrpc", "stsb", "rte", "mnli", "qnli", "qqp")  # of the table
PLACES = {"data_dir", "out_dir", "checkpoint", "out", "jobs", "price_per_gpu_hour"}  # may differ from machine to machine
DRAWS = 20_000  # simulations behind the interval


@dataclass
class RaceConfig:
    # Where
    data_dir: str = "data/race"  # token shards, made by prepare_c4.py
    glue_dir: str = "data/glue"  # GLUE's TSV files
    out: str = "out/race"  # logs and scores: small files
    work_dir: str = "out/race_work"  # checkpoints until they are fine-tuned, 4 GB a GPU
    gpus: int = 1  # how many of this machine's GPUs to use; 0: the CPU
    # What
    runs: str = ""  # CONFIG MINUTES,MINUTES [--name=value, of train.py, or =N/min]; CONFIG ...
    seeds: str = "17,18"  # of pretraining, for each of the runs
    price_per_gpu_hour: float = 2.5  # dollars
    tasks: str = "cola:3,sst2:3,mrpc:3,stsb:3,rte:3"  # for finetune_glue.py; empty: pretrain only, to choose settings
    finetune: str = "--recipe=fast --jobs=8"  # more finetune_glue.py options
    # Results
    table: str = ""  # directory of finished runs: print its table, and who was how much faster


# ---------------------------------------------------------------------------------------------------------------------
# Running


@dataclass(frozen=True)
class Run:
    config: str  # path of the config file, which also names the run
    minutes: float
    options: tuple  # of train.py; they override the config's
    seed: int

    @property
    def name(self):
        return f"{Path(self.config).stem}_{self.minutes:g}min_seed{self.seed}"


def parse_runs(cfg):
    """The requested Runs, longest first. Raises: UserError, also for what train.py would refuse.

    An option "--warmup_steps=140/min" is 140 times the minutes, since a budget needs its warm-up in steps.
    """
    runs = {}
    for text in filter(str.strip, cfg.runs.split(";")):
        match = re.fullmatch(r"\s*(\S+)\s+([\d.,]+)((?:\s+--?\w\S*)*)\s*", text)
        try:
            config, options = match[1], tuple(match[3].split())
            found = [Run(config, float(m), options, int(s)) for m in match[2].split(",") for s in cfg.seeds.split(",")]
            if 0 in [run.minutes for run in found]:
                raise ValueError
        except (TypeError, ValueError):
            raise UserError(f"runs={text.strip()}, seeds={cfg.seeds}: expected CONFIG MINUTES [--name=value ...]") from None
        for run in found:
            if runs.setdefault(run.name, run) is not run:
                raise UserError(f"runs={cfg.runs}: {run.name} is there twice (copy the config under another name)")
            load_config(TrainConfig, pretrain_command(cfg, run)[1:]).check(1)
    if not runs:
        raise UserError('--runs: not given (such as "configs/base.py 10,20 --chunk=true; configs/bert_base.py 10")')
    return sorted(runs.values(), key=lambda run: -run.minutes)


def pretrain_command(cfg, run):
    scaled = [re.sub(r"=([\d.]+)/min$", lambda m: f"={round(float(m[1]) * run.minutes)}", word) for word in run.options]
    usual = [word for word in INTERVALS if not any(own.startswith(word.partition("=")[0] + "=") for own in scaled)]
    words = [*usual, run.config, *scaled, f"--data_dir={cfg.data_dir}", f"--out_dir={cfg.work_dir}/{run.name}"]
    words += [f"--seed={run.seed}", f"--price_per_gpu_hour={cfg.price_per_gpu_hour:g}"]
    return ["train.py", *words, f"--budget_minutes={run.minutes:g}"]


def finetune_command(cfg, run):
    options = [f"--checkpoint={cfg.work_dir}/{run.name}", f"--data_dir={cfg.glue_dir}", f"--tasks={cfg.tasks}"]
    return ["finetune_glue.py", *options, *shlex.split(cfg.finetune), f"--out={cfg.work_dir}/{run.name}_glue"]


def finished(cfg, run, commands):
    """Whether OUT has what the commands make. Raises: RuntimeError if a config or options differed then."""
    kept = f"{cfg.out}/{run.name}"
    if not os.path.exists(f"{kept}/commands.txt"):
        return False
    earlier = [shlex.split(line)[1:] for line in Path(f"{kept}/commands.txt").read_text(encoding="utf-8").splitlines()]
    config = next(record["config"] for record in reading.read_log(f"{kept}/log.jsonl") if record["event"] == "start")
    wanted = vars(load_config(TrainConfig, commands[0][1:]))
    other = {name for name, value in wanted.items() if config.get(name) not in (value, None)}  # None: a budget's max_steps
    if len(earlier) == len(commands) == 2:
        other |= {word.lstrip("-").partition("=")[0] for word in {*earlier[1]} ^ {*commands[1]}}
    if other - PLACES:
        raise RuntimeError(f"{kept}: holds a run with different {', '.join(sorted(other - PLACES))} (choose another --out)")
    return len(earlier) >= len(commands)


class Driver:
    """A race in progress: a thread for each GPU. Raises: UserError for runs that make no sense."""

    def __init__(self, cfg):
        self.cfg, self.runs = cfg, parse_runs(cfg)
        self.begun, self.children, self.stopped = time.monotonic(), set(), False
        self.gpus = queue.SimpleQueue()  # those that are free
        for gpu in range(max(1, cfg.gpus)):
            self.gpus.put(gpu)

    def race(self):
        """Do all unfinished runs. Raises: UserError if some failed."""
        with stoppable(lambda: "the same command resumes"), ThreadPoolExecutor(self.gpus.qsize()) as pool:
            try:
                failed = [name for name in pool.map(self.attempt, self.runs) if name]
            finally:  # leave no child behind, even when interrupted
                self.stopped = True
                for child in list(self.children):
                    child.terminate()
        if failed:
            raise UserError(f"failed: {', '.join(failed)} (run the same command to try again)")

    def attempt(self, run):
        """Do a run, unless it is finished; returns its name if it failed, and the others go on."""
        commands = [pretrain_command(self.cfg, run), *([finetune_command(self.cfg, run)] if self.cfg.tasks else [])]
        gpu = self.gpus.get()
        try:
            if finished(self.cfg, run, commands):
                return self.say(f"{run.name}: finished")
            return self.one(run, commands, gpu)
        except (RuntimeError, OSError) as error:
            if not self.stopped:
                self.say(f"{run.name}: {error}")
            return run.name
        finally:
            self.gpus.put(gpu)

    def one(self, run, commands, gpu):
        """Pretrain and fine-tune; keep the small files, remove the rest."""
        cfg, work, kept = self.cfg, f"{self.cfg.work_dir}/{run.name}", f"{self.cfg.out}/{run.name}"
        for words, name in zip(commands, (run.name, f"{run.name}_glue")):
            self.call(words, name, gpu)
        os.makedirs(kept, exist_ok=True)
        if cfg.tasks:
            shutil.copy(f"{work}_glue/glue.json", kept)
            write_text(f"{kept}/runs.jsonl", all_logs(f"{work}_glue/runs"))
        shutil.copy(f"{work}/log.jsonl", kept)
        # Written last: it marks the run as finished.
        write_text(f"{kept}/commands.txt", "".join(f"{shlex.join(['python', *c])}\n" for c in commands))
        for path in (work, f"{work}_glue"):
            shutil.rmtree(path, ignore_errors=True)
        self.say(f"{run.name}: finished, held-out loss {read_run(kept)['held_out']:.3f}")

    def call(self, words, name, gpu):
        """Run a command on one GPU, its output in work_dir/NAME.txt. Raises: RuntimeError."""
        if self.stopped:
            raise RuntimeError("stopped")
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(self.cfg.gpus)))
        visible = visible.split(",")[gpu] if self.cfg.gpus else ""
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": visible, "PYTHONUNBUFFERED": "1"}
        self.say(f"{name}: {shlex.join(['python', *words])}")
        path = f"{self.cfg.work_dir}/{name}.txt"
        with open(path, "w", encoding="utf-8") as output:
            child = subprocess.Popen([sys.executable, *words], stdout=output, stderr=subprocess.STDOUT, env=environment)
        self.children.add(child)
        status = child.wait()
        self.children.remove(child)
        if status:
            output = Path(path).read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise RuntimeError(f"status {status}: {(output or ['no output'])[-1]} (see {path})")

    def say(self, text):
        print(f"{(time.monotonic() - self.begun) / 60:6.1f} min  {text}", flush=True)


def all_logs(directory):
    """The fine-tuning logs as one text, with the run's name in each line."""
    logs = {path.stem: path.read_text(encoding="utf-8").splitlines() for path in sorted(Path(directory).glob("*.jsonl"))}
    return "".join(json.dumps({"run": name, **json.loads(line)}) + "\n" for name, lines in logs.items() for line in lines)


# ---------------------------------------------------------------------------------------------------------------------
# Results


def read_run(directory):
    """A finished run's label, minutes, seed, held-out loss, speed and cost, and its glue.json if it was fine-tuned."""
    records, path, named = reading.read_log(f"{directory}/log.jsonl"), f"{directory}/glue.json", reading.contestant(directory)
    config, end = next(record["config"] for record in records if record["event"] == "start"), records[-1]
    if not named or end["event"] != "end":
        raise UserError(f"{directory}/log.jsonl: not a finished run of race.py")
    label, minutes = named
    return {
        "label": label, "minutes": minutes, "seed": config["seed"], "dollars": end["dollars"],
        "step": end["step"], "seconds": end["seconds"],
        "samples_per_second": float(np.median([r["samples_per_second"] for r in records if r["event"] == "train"])),
        "held_out": [record["loss"] for record in records if record["event"] == "eval"][-1],
        "path": path, "glue": reading.read_glue(path) if os.path.exists(path) else None,
    }  # fmt: skip


def read_runs(directory):
    """Every finished run in a directory. Raises: UserError if there is none."""
    paths = sorted(os.path.dirname(path) for path in glob.glob(f"{glob.escape(directory)}/*/log.jsonl"))
    if not paths:
        raise UserError(f"{directory}: no finished runs of race.py here (expected CONFIG_MINUTESmin_seedSEED/log.jsonl)")
    return [read_run(path) for path in paths]


def mean_and_spread(values, digits=1):
    """The mean, with the standard deviation of single values if there are several, as text."""
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def marks_of(runs):
    """{task: "", or what part of its data the runs had} of the tasks that all runs were fine-tuned on. Raises: UserError."""
    marks = reading.marks({run["path"]: run["glue"] or {"tasks": {}} for run in runs})
    return {task: marks[task] for task in COLUMNS if task in marks}


def table(runs):
    """The results as lines of Markdown: a row for each recipe and its minutes, over pretraining and fine-tuning seeds.

    ± is the standard deviation of single runs; of a mean, that of single seeds' means over the tasks.
    """
    marks = marks_of(runs)
    columns = [(reading.marked(task, marks), [task]) for task in marks] + reading.means(marks)
    names = ["model", "minutes", "price", "seeds", *(name for name, _ in columns), "held-out loss", "samples/s"]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for minutes, label in sorted({(run["minutes"], run["label"]) for run in runs}):
        group = [run for run in runs if (run["minutes"], run["label"]) == (minutes, label)]
        scores = [[score for run in group for score in glue.seed_scores(run["glue"], tasks)] for _, tasks in columns]
        price = f"${np.mean([run['dollars'] for run in group]):.3f}" if all(run["dollars"] for run in group) else "-"
        cells = [label, f"{minutes:g}", price, f"{len(group)}", *map(mean_and_spread, scores)]
        cells += [mean_and_spread([run["held_out"] for run in group], 3)]
        cells += [f"{np.mean([run['samples_per_second'] for run in group]):,.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def minutes_to_reach(points, target):
    """Minutes at which a curve through (minutes, score) points, linear in log(minutes), first reaches a score.

    The first point's minutes, an upper limit, if that point is high enough; infinity if no point is.
    """
    if points[0][1] >= target:
        return points[0][0]
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if y1 >= target:
            return math.exp(math.log(x0) + (target - y0) / (y1 - y0) * math.log(x1 / x0))
    return math.inf


def factor(ours, theirs):
    """How many times as fast one recipe reaches the score of the other's longest run, with a 95 % interval.

    ours, theirs: [(minutes, [a pretraining seed's score, ...]), ...] by minutes. Returns a dictionary. limit: the largest
    factor that our shortest run can show. sd: standard deviation between pretraining seeds, pooled over the points with
    several (df degrees of freedom). The interval comes from redrawing every point from Student's t with sd / sqrt(its number
    of runs). sd, low and high are None if nothing was run twice.
    """
    their_minutes, last = theirs[-1]
    groups = [values for _, values in ours + theirs]
    df = sum(len(values) - 1 for values in groups)
    sd = math.sqrt(sum(np.var(v) * len(v) for v in groups) / df) if df else None
    minutes = minutes_to_reach([(x, np.mean(v)) for x, v in ours], np.mean(last))
    result = {"score": float(np.mean(last)), "minutes": minutes, "their_minutes": their_minutes, "sd": sd, "df": df}
    result |= {"factor": their_minutes / minutes, "limit": their_minutes / ours[0][0], "low": None, "high": None}
    if df:
        rng = np.random.default_rng(0)
        noise = [rng.standard_t(df, DRAWS) * sd / math.sqrt(len(v)) for _, v in [*ours, (0, last)]]
        drawn = np.stack([np.mean(v) + n for (_, v), n in zip(ours, noise)], 1)
        targets = np.mean(last) + noise[-1]
        budgets = [x for x, _ in ours]
        factors = [their_minutes / minutes_to_reach(list(zip(budgets, row)), t) for row, t in zip(drawn.tolist(), targets)]
        result["low"], result["high"] = (float(np.quantile(factors, q)) for q in (0.025, 0.975))
    return result


def factor_text(us, them, result):
    """The result of `factor` as a sentence."""
    text, limit = f"{us} reached {them}'s {result['their_minutes']:g}-minute score ({result['score']:.1f})", result["limit"]
    if result["factor"] >= limit:
        text += f" within its shortest run, {result['minutes']:g} minutes: at least {limit:.1f} times as fast"
    else:
        text += f" in {result['minutes']:.1f} minutes: {result['factor']:.2f} times as fast"
    if result["low"] is None:
        return f"{text}."
    low = f"{result['low']:.2f}" if result["low"] else "never"
    high = f"{result['high']:.2f}" if result["high"] < limit else f"more than {limit:g}"
    return f"{text} (95 % interval {low} to {high})."


def factors(runs):
    """{(label, label): factor} of each pair of recipes, first the one that ended higher, by the mean of complete tasks."""
    curves, means = {}, reading.means(marks_of(runs))
    for run in runs if means else ():
        score = float(np.mean([run["glue"]["tasks"][task]["score"] for task in means[0][1]]))
        curves.setdefault(run["label"], {}).setdefault(run["minutes"], []).append(score)
    curves = {label: sorted(points.items()) for label, points in curves.items()}
    best_first = sorted(curves, key=lambda label: -np.mean(curves[label][-1][1]))
    return {(us, them): factor(curves[us], curves[them]) for us, them in itertools.combinations(best_first, 2)}


def results_text(directory):
    """The lines that the README shows: the table, and how much faster each recipe was than those that ended lower."""
    runs = read_runs(directory)
    sentences = [factor_text(*pair, result) for pair, result in factors(runs).items()]
    return [*table(runs), *(line for sentence in sentences for line in ("", sentence))]


@command
def main(argv):
    cfg = load_config(RaceConfig, argv)
    if cfg.table:
        return print("\n".join(results_text(cfg.table)))
    driver = Driver(cfg)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not 0 <= cfg.gpus <= (len(visible.split(",")) if visible else cfg.gpus):
        raise UserError(f"gpus={cfg.gpus}: must be at least 0, and no more than CUDA_VISIBLE_DEVICES={visible}")
    for path in (cfg.data_dir, *([cfg.glue_dir] if cfg.tasks else [])):
        if not os.path.isdir(path):
            raise UserError(f"{path}: no such directory (give --data_dir and --glue_dir)")
    for path in (cfg.out, cfg.work_dir):
        os.makedirs(path, exist_ok=True)
    try:
        driver.race()
    finally:  # show what there is, even after a failure
        if glob.glob(f"{glob.escape(cfg.out)}/*/log.jsonl"):
            print("\n".join(results_text(cfg.out)), flush=True)


if __name__ == "__main__":
    main()
