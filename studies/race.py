"""The race: MosaicBERT-Base against BERT-Base with equal minutes on one GPU, scored on GLUE.

    python -m studies.race --data_dir=data/race --glue_dir=data/glue --out=out/race --gpus=2
    python -m studies.race --table=results/race                # the results, as the README shows them

Each run is pretrained alone on its GPU, with a schedule that decays within its minutes, and then fine-tuned there by
several jobs at a time (start nvidia-cuda-mps-control -d first). Every step is a command of train.py or finetune_glue.py,
printed and kept with its results, so that it can be run by itself. The same command again skips finished runs and resumes
the others; --runs picks some, so that several machines can share the work.

OUT/MODEL_MINUTESmin_seedSEED holds a run's log.jsonl, glue.json, lengths.json, commands.txt and the fine-tuning logs,
runs.jsonl. Checkpoints stay in --work_dir until they are fine-tuned.

Read next: results/README.md, for how the settings were chosen
"""

import glob
import json
import math
import os
import queue
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from common.budget import LEAST_WARMUP
from common.files import write_text
from common.options import UserError, command, load_config
from tools.figures import glue, reading

LENGTHS = {"mosaicbert": (128, 256, 512, 1024), "bert": (128, 256, 512)}  # BERT has 512 positions
WARMUP_STEPS = {"mosaicbert": 140, "bert": 250}  # per minute of budget: a quarter of an H100's steps in results/race
INTERVALS = ("--eval_interval=250", "--log_interval=50", "--checkpoint_interval=2000", "--keep_checkpoints=1")
PUBLISHED_FACTOR = 2.38  # MosaicML's blog: hours of BERT-Base over those of MosaicBERT-Base to 83.2 on GLUE
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
    runs: str = "8x17,4x17,4x18,2x17,2x18"  # MINUTESxSEED of pretraining, for each model
    models: str = "mosaicbert,bert"  # one or both
    both: str = "--chunk=true --global_batch_size=512"  # train.py options for both models
    mosaicbert: str = "configs/base.py"  # train.py options for one model; they override those for both
    bert: str = "configs/bert_base.py --compile=true --global_batch_size=256 --lr=2.5e-4"  # likewise
    price_per_gpu_hour: float = 2.5  # dollars
    tasks: str = "cola:3,mrpc:3,stsb:3,rte:3,sst2:1"  # for finetune_glue.py; empty: pretrain only, to choose settings
    finetune: str = "--recipe=fast --jobs=8"  # more finetune_glue.py options
    # Results
    table: str = ""  # directory of finished runs: print its table and the factor


# ---------------------------------------------------------------------------------------------------------------------
# Running. Batch and warm-up differ from the recipes, for both models alike: two minutes hold only some 130 steps of 4,096
# samples, and a warm-up of 6 %, 8 steps, is too short for a post-LN model to learn. So the batch is an eighth, and the
# warm-up a quarter of the time. MosaicBERT learns with that and BERT does not: BERT gets half that batch and half the peak
# learning rate, the best of those tried (results/README.md).


@dataclass(frozen=True)
class Run:
    model: str
    minutes: float
    seed: int

    @property
    def name(self):
        return f"{self.model}_{self.minutes:g}min_seed{self.seed}"


def parse_runs(cfg):
    """The requested Runs, longest first. Raises: UserError."""
    runs = []
    for model in cfg.models.split(","):
        if model not in LENGTHS:
            raise UserError(f"models={cfg.models}: no model {model!r} (known: {', '.join(LENGTHS)})")
        for part in cfg.runs.split(","):
            match = re.fullmatch(r"(\d+|\d*\.\d+)x(\d+)", part.strip())
            if not match or not float(match[1]):
                raise UserError(f"runs={cfg.runs}: {part!r} is not MINUTESxSEED (such as 8x17)")
            runs.append(Run(model, float(match[1]), int(match[2])))
    return sorted(runs, key=lambda run: -run.minutes)


def pretrain_command(cfg, run):
    options = [f"--data_dir={cfg.data_dir}", f"--out_dir={cfg.work_dir}/{run.name}", f"--seed={run.seed}"]
    options += [f"--budget_minutes={run.minutes:g}", f"--price_per_gpu_hour={cfg.price_per_gpu_hour:g}"]
    warmup = max(LEAST_WARMUP, round(WARMUP_STEPS[run.model] * run.minutes))
    return ["train.py", *INTERVALS, f"--warmup_steps={warmup}", *model_options(cfg, run), *options]


def length_command(cfg, run, length):
    """Evaluate on the held-out texts, split into samples of at most `length` tokens; compiling would take longer."""
    options = [f"--data_dir={cfg.data_dir}", f"--init_from={cfg.work_dir}/{run.name}", f"--seq_length={length}"]
    options += [f"--out_dir={cfg.work_dir}/{run.name}_lengths", "--eval_only", "--micro_batch_tokens=32768"]
    return ["train.py", *model_options(cfg, run), *options, "--compile=false"]


def finetune_command(cfg, run):
    options = [f"--checkpoint={cfg.work_dir}/{run.name}", f"--data_dir={cfg.glue_dir}", f"--tasks={cfg.tasks}"]
    return ["finetune_glue.py", *options, *shlex.split(cfg.finetune), f"--out={cfg.work_dir}/{run.name}_glue"]


def model_options(cfg, run):
    return [*shlex.split(cfg.both), *shlex.split(getattr(cfg, run.model))]


class Driver:
    """A race in progress: a thread for each GPU."""

    def __init__(self, cfg):
        self.cfg, self.begun, self.children, self.stopped = cfg, time.monotonic(), set(), False
        self.gpus = queue.SimpleQueue()  # those that are free
        for gpu in range(max(1, cfg.gpus)):
            self.gpus.put(gpu)

    def race(self):
        """Do all unfinished runs. Raises: UserError if some failed."""
        previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        with ThreadPoolExecutor(self.gpus.qsize()) as pool:
            try:
                failed = [name for name in pool.map(self.attempt, parse_runs(self.cfg)) if name]
            finally:  # leave no child behind, even when interrupted
                self.stopped = True
                for child in list(self.children):
                    child.terminate()
                signal.signal(signal.SIGTERM, previous)
        if failed:
            raise UserError(f"failed: {', '.join(failed)} (run the same command to try again)")

    def attempt(self, run):
        """Do a run, unless it is finished; returns its name if it failed, and the others go on."""
        wanted = ("commands.txt", "glue.json") if self.cfg.tasks else ("commands.txt",)
        if all(os.path.exists(f"{self.cfg.out}/{run.name}/{name}") for name in wanted):
            return self.say(f"{run.name}: finished")
        gpu = self.gpus.get()
        try:
            return self.one(run, gpu)
        except (RuntimeError, OSError) as error:
            if not self.stopped:
                self.say(f"{run.name}: {error}")
            return run.name
        finally:
            self.gpus.put(gpu)

    def one(self, run, gpu):
        """Pretrain, fine-tune and evaluate; keep the small files, remove the rest."""
        cfg, work, kept = self.cfg, f"{self.cfg.work_dir}/{run.name}", f"{self.cfg.out}/{run.name}"
        commands = [pretrain_command(cfg, run)]
        self.call(commands[0], run.name, gpu)
        os.makedirs(kept, exist_ok=True)
        if cfg.tasks:
            commands.append(finetune_command(cfg, run))
            self.call(commands[1], f"{run.name}_glue", gpu)
            at_lengths = {}
            for length in LENGTHS[run.model]:
                commands.append(length_command(cfg, run, length))
                output = self.call(commands[-1], f"{run.name}_{length}", gpu)
                match = re.search(r"held-out loss ([\d.]+), accuracy ([\d.]+)% of ([\d,]+)", output)
                loss, percent, num_masked = (float(number.replace(",", "")) for number in match.groups())
                at_lengths[length] = {"loss": loss, "accuracy": percent / 100, "num_masked": int(num_masked)}
            result = {"model": run.model, "minutes": run.minutes, "seed": run.seed, "lengths": at_lengths}
            write_text(f"{kept}/lengths.json", json.dumps(result, indent=1))
            write_text(f"{kept}/runs.jsonl", all_logs(f"{work}_glue/runs"))
            shutil.copy(f"{work}_glue/glue.json", kept)
        shutil.copy(f"{work}/log.jsonl", kept)
        # Written last: it marks the run as finished.
        write_text(f"{kept}/commands.txt", "".join(f"{shlex.join(['python', *c])}\n" for c in commands))
        for path in (work, f"{work}_glue", f"{work}_lengths"):
            shutil.rmtree(path, ignore_errors=True)
        self.say(f"{run.name}: finished, {summary_of(read_run(kept))}")

    def call(self, words, name, gpu):
        """Run a command on one GPU; returns its output, kept in work_dir/NAME.txt. Raises: RuntimeError."""
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
        with open(path, encoding="utf-8", errors="replace") as output:
            text = output.read()
        if status:
            raise RuntimeError(f"status {status}: {(text.strip().splitlines() or ['no output'])[-1]} (see {path})")
        return text

    def say(self, text):
        print(f"{(time.monotonic() - self.begun) / 60:6.1f} min  {text}", flush=True)


def all_logs(directory):
    """The fine-tuning logs as one text, with the run's name in each line."""
    lines = []
    for path in sorted(glob.glob(f"{glob.escape(directory)}/*.jsonl")):
        name = os.path.basename(path).removesuffix(".jsonl")
        with open(path, encoding="utf-8") as file:
            lines += [json.dumps({"run": name, **json.loads(line)}) + "\n" for line in file]
    return "".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Results


def read_run(directory):
    """A finished run's model, minutes, seed, held-out loss, speed and cost, and its glue.json if it was fine-tuned."""
    records = reading.read_log(f"{directory}/log.jsonl")
    config = next(record["config"] for record in records if record["event"] == "start")
    if not config.get("budget_minutes") or records[-1]["event"] != "end":
        raise UserError(f"{directory}/log.jsonl: not a finished run of race.py")
    path = f"{directory}/glue.json"
    return {
        "model": config["model"],
        "minutes": config["budget_minutes"],
        "seed": config["seed"],
        "held_out": [record["loss"] for record in records if record["event"] == "eval"][-1],
        "samples_per_second": float(np.median([r["samples_per_second"] for r in records if r["event"] == "train"])),
        **{name: records[-1][name] for name in ("step", "seconds", "dollars")},
        "glue": reading.read_glue(path) if os.path.exists(path) else None,
    }


def read_runs(directory):
    """Every finished run in a directory. Raises: UserError if there is none."""
    paths = sorted(os.path.dirname(path) for path in glob.glob(f"{glob.escape(directory)}/*/log.jsonl"))
    if not paths:
        raise UserError(f"{directory}: no finished runs of race.py here (expected MODEL_MINUTESmin_seedSEED/log.jsonl)")
    return [read_run(path) for path in paths]


def summary_of(run):
    score = f"; GLUE {run['glue']['average']:.2f}" if run["glue"] else ""
    return f"{run['step']} steps in {run['seconds']:.0f} s, held-out loss {run['held_out']:.3f}{score}"


def mean_and_spread(values, digits=1):
    """The mean, with the standard deviation of single values if there are several, as text."""
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def table(directory):
    """The results as lines of Markdown: a row for each model and budget, over pretraining and fine-tuning seeds.

    ± is the standard deviation of single runs; in the column "mean", of single seeds' means over the tasks.
    """
    runs = read_runs(directory)
    tasks = [task for task in ("cola", "sst2", "mrpc", "stsb", "rte") if all(task in tasks_of(run) for run in runs)]
    names = [reading.TASK_NAMES[task] for task in tasks] + ["mean"] * bool(tasks)
    lines = ["| " + " | ".join(["model", "minutes", "price", "seeds", *names, "held-out loss", "samples/s"]) + " |"]
    lines.append("|---" * (len(names) + 6) + "|")
    for model, minutes in sorted({(run["model"], run["minutes"]) for run in runs}, key=lambda key: (key[1], key[0])):
        group = [run for run in runs if (run["model"], run["minutes"]) == (model, minutes)]
        scores = [[score for run in group for score in tasks_of(run)[task]["scores"]] for task in tasks]
        if tasks:
            scores.append([score for run in group for score in glue.seed_scores(run["glue"], tasks)])
        cells = [reading.MODEL_NAMES[model], f"{minutes:g}", price_of(group), f"{len(group)}", *map(mean_and_spread, scores)]
        cells += [mean_and_spread([run["held_out"] for run in group], 3)]
        cells += [f"{np.mean([run['samples_per_second'] for run in group]):,.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def tasks_of(run):
    return run["glue"]["tasks"] if run["glue"] else {}


def price_of(group):
    dollars = [run["dollars"] for run in group]
    return "-" if None in dollars else f"${np.mean(dollars):.3f}"


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


def factor(runs):
    """How much sooner MosaicBERT reaches the score of BERT's longest run, with a 95 % interval.

    Returns {"score", "minutes", "bert_minutes", "factor", "low", "high", "limit", "sd", "df"}. limit: the largest factor
    that the shortest run can show. sd: standard deviation between pretraining seeds, pooled over the budgets with several
    (df degrees of freedom). The interval comes from redrawing every point from Student's t with sd / sqrt(its number of
    runs). sd, low and high are None if nothing was run twice.
    """
    scores = {}
    for run in runs:
        scores.setdefault(run["model"], {}).setdefault(run["minutes"], []).append(run["glue"]["average"])
    ours, theirs = ([(minutes, v) for minutes, v in sorted(scores[model].items())] for model in ("mosaicbert", "bert"))
    bert_minutes, last = theirs[-1]
    groups = [values for _, values in ours + theirs]
    df = sum(len(values) - 1 for values in groups)
    sd = math.sqrt(sum(np.var(v) * len(v) for v in groups) / df) if df else None
    minutes = minutes_to_reach([(x, np.mean(v)) for x, v in ours], np.mean(last))
    result = {"score": float(np.mean(last)), "minutes": minutes, "bert_minutes": bert_minutes, "sd": sd, "df": df}
    result |= {"factor": bert_minutes / minutes, "limit": bert_minutes / ours[0][0], "low": None, "high": None}
    if df:
        rng = np.random.default_rng(0)
        noise = [rng.standard_t(df, DRAWS) * sd / math.sqrt(len(v)) for _, v in [*ours, (0, last)]]
        drawn = np.stack([np.mean(v) + n for (_, v), n in zip(ours, noise)], 1)
        targets = np.mean(last) + noise[-1]
        budgets = [x for x, _ in ours]
        factors = [bert_minutes / minutes_to_reach(list(zip(budgets, row)), t) for row, t in zip(drawn.tolist(), targets)]
        result["low"], result["high"] = (float(np.quantile(factors, q)) for q in (0.025, 0.975))
    return result


def factor_text(result):
    """The result of `factor` as a sentence."""
    bert, limit = f"BERT's {result['bert_minutes']:g}-minute score ({result['score']:.1f})", result["limit"]
    if math.isinf(result["minutes"]):
        text = f"MosaicBERT did not reach {bert} within its own longest run"
    elif result["factor"] >= limit:
        shortest = f"within its shortest run, {result['minutes']:g} minutes"
        text = f"MosaicBERT reached {bert} {shortest}: at least {limit:.1f} times sooner"
    else:
        text = f"MosaicBERT reached {bert} in {result['minutes']:.1f} minutes: {result['factor']:.2f} times sooner"
    if result["low"] is not None:
        low = f"{result['low']:.2f}" if result["low"] else "never"
        high = f"{result['high']:.2f}" if result["high"] < limit else f"more than {limit:g}"
        text += f" (95 % interval {low} to {high})"
    return f"{text}. Published, on eight tasks and C4: {PUBLISHED_FACTOR}."


def results_text(directory):
    """The lines that the README shows: the table, and the factor if both models were fine-tuned."""
    lines, runs = table(directory), [run for run in read_runs(directory) if run["glue"]]
    if {run["model"] for run in runs} == set(LENGTHS):
        lines += ["", factor_text(factor(runs))]
    return lines


@command
def main(argv):
    cfg = load_config(RaceConfig, argv)
    if cfg.table:
        return print("\n".join(results_text(cfg.table)))
    parse_runs(cfg)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not 0 <= cfg.gpus <= (len(visible.split(",")) if visible else cfg.gpus):
        raise UserError(f"gpus={cfg.gpus}: must be at least 0, and no more than CUDA_VISIBLE_DEVICES={visible}")
    for path in (cfg.data_dir, *([cfg.glue_dir] if cfg.tasks else [])):
        if not os.path.isdir(path):
            raise UserError(f"{path}: no such directory (give --data_dir and --glue_dir)")
    for path in (cfg.out, cfg.work_dir):
        os.makedirs(path, exist_ok=True)
    try:
        Driver(cfg).race()
    finally:  # show what there is, even after a failure
        if glob.glob(f"{glob.escape(cfg.out)}/*/log.jsonl"):
            print("\n".join(results_text(cfg.out)), flush=True)


if __name__ == "__main__":
    main()
