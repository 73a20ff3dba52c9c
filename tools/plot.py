"""Figures from logs: loss curves, GLUE scores, GLUE against cost, speed, and document lengths.

    python -m tools.plot --loss=out/base --x=gpu_hours --out=loss.svg
    python -m tools.plot --glue=results/mosaic/glue.json,results/fast/glue.json --labels=mosaic,fast --out=glue.svg
    python -m tools.plot --lengths=data/mine/report.json --out=lengths.svg
    python -m tools.plot --pareto='results/race/*/glue.json' --x=gpu_minutes --tasks=true --out=pareto.svg,pareto.png
    python -m tools.plot --loss='results/race/*/log.jsonl' --held_out=true --x=gpu_minutes --out=race_loss.svg
    python -m tools.plot --at_lengths='results/race/*/lengths.json' --out=race_lengths.svg
    python -m tools.plot --kernels=out/bench.json --out=kernels.svg
    python -m tools.plot --scaling=out/scaling.json,out/scaling_8.json --out=scaling.svg

Needs matplotlib. Curves differ in marker and line style as well as color, bars in hatching, so figures are readable in
grayscale. Equal inputs give equal bytes.

Read next: results/README.md, for the figures drawn so far
"""

import glob
import json
import math
import os
import sys
from dataclasses import dataclass
from typing import Literal

import numpy as np

from common.options import UserError, command, load_config
from common.run_directory import hours_of

# MosaicML's numbers (README of mosaicml/examples, benchmarks/bert, and the blog's figure): means over eight tasks, on
# eight A100-80GB at $2.50 a GPU-hour. The steps are read off the points' spacing, 70,000 for the last.
PUBLISHED_GPUS, PUBLISHED_PRICE, PUBLISHED_BATCH = 8, 2.50, 4096
PUBLISHED = {  # model: [(step, hours, GLUE)]
    "MosaicBERT-Base": [
        (3500, 0.49, 76.09), (10500, 1.45, 80.65), (17500, 2.41, 81.80), (24500, 3.37, 82.52), (31500, 4.35, 82.95),
        (42000, 5.79, 83.52), (49000, 6.75, 83.85), (56000, 7.71, 83.99), (63000, 8.69, 83.97), (70000, 9.65, 84.26),
    ],
    "BERT-Base": [
        (3500, 0.55, 72.58), (10500, 1.65, 79.88), (17500, 2.75, 80.97), (24500, 3.85, 81.60), (31500, 4.97, 82.14),
        (42000, 6.62, 82.84), (49000, 7.71, 83.02), (56000, 8.82, 83.11), (63000, 9.93, 83.09), (70000, 11.03, 83.51),
    ],
}  # fmt: skip
PUBLISHED_TASKS = {  # MosaicBERT-Base's last point by task, over five pretraining seeds (its model card)
    "mnli": 84.95, "qnli": 90.74, "qqp": 90.29, "rte": 81.36, "sst2": 92.46, "mrpc": 90.03, "cola": 55.11,
    "stsb": 89.27,
}  # fmt: skip

TASK_NAMES = {  # in the order of common.glue.GLUE_TASKS, whose file would import torch
    "mnli": "MNLI", "qnli": "QNLI", "qqp": "QQP", "rte": "RTE", "sst2": "SST-2", "mrpc": "MRPC", "cola": "CoLA",
    "stsb": "STS-B",
}  # fmt: skip
MODEL_NAMES = {"mosaicbert": "MosaicBERT", "bert": "BERT"}
SCALING_NAMES = {"base": "MosaicBERT-Base", "large": "MosaicBERT-Large", "bert": "BERT-Base, compiled"}
BENCH_WORDS = {  # in the names of studies.bench's rows and entries
    "full": ", no padding", "fill80": ", 80 % filled", "512": ", 512 tokens", "layernorm": "LayerNorm",
    "two": ", two gradients", "geglu": "GeGLU", "head": "head with its loss", "step": "whole step",
    "off": ", one choice left out", "large": ", Large", "varlen": "varlen_attn, no ALiBi", "flex": "FlexAttention",
    "sdpa": "SDPA", "cudnn": ", cuDNN", "efficient": ", memory-efficient", "default": ", default", "t1": ", tuned",
    "t2": ", tuned more", "eager": "not compiled", "liger": "Liger", "vocab": "vocabulary", "torch": "PyTorch",
    "bert": "transformers' BERT", "padded": ", padded", "fp8": "ours, FP8", "torchao": "torchao's FP8",
    "tensorwise": ", a scale per tensor", "rowwise": ", a scale per row",
}  # fmt: skip
X_LABELS = {"step": "steps", "tokens": "tokens", "dollars": "US dollars"}
COLORS = ("#1f4e79", "#d98c2b", "#8e3b63", "#6fc2a8")  # in grayscale 30, 60, 45 and 75 % bright
MARKERS, LINES, HATCHES = "os^D", ("-", "--", "-.", ":"), ("", "///", "...", "xxx")
GRAY = "#555555"  # published results


def style(i):
    """(color, marker, line, hatch) of the i-th label; the first 16 differ."""
    turned = (i + i // 4) % 4
    return COLORS[i % 4], MARKERS[turned], LINES[turned], HATCHES[turned]


@dataclass
class PlotConfig:
    # One of these: files, directories holding them, or patterns, comma-separated
    loss: str = ""  # log.jsonl of train.py: training and held-out loss
    glue: str = ""  # glue.json of finetune_glue.py or finetune_own: a bar for each task, with 95 % intervals
    kernels: str = ""  # JSON of studies.bench: a panel for each row, operators in ns a token, steps in samples/s
    pareto: str = ""  # glue.json: mean score against the cost of pretraining, with MosaicML's published points
    at_lengths: str = ""  # lengths.json of studies.race: held-out loss against text length
    scaling: str = ""  # JSON of studies.scaling: samples/s and MFU by number of GPUs, measured and predicted
    lengths: str = ""  # report.json of prepare_c4.py: histogram of document lengths
    # How
    x: Literal["auto", "step", "tokens", "gpu_hours", "gpu_minutes", "dollars"] = "auto"  # auto: step, for GLUE gpu_hours
    tasks: bool = False  # with --pareto: add a panel for each task
    held_out: bool = False  # with --loss: held-out losses only, one curve a run, runs of a model in one style
    labels: str = ""  # one for each file, comma-separated; files with equal labels form one curve
    out: str = "figure.svg"  # .svg, .png or .pdf files, comma-separated


# ---------------------------------------------------------------------------------------------------------------------
# Reading results. All raise UserError for anything else.


def find(patterns, name):
    """Paths of the files that comma-separated files, directories or patterns mean."""
    paths = []
    for pattern in patterns.split(","):
        found = sorted(glob.glob(pattern)) or [pattern] * os.path.exists(pattern)  # a name may hold brackets
        if not found:
            raise UserError(f"{pattern}: no such file (expected {name}, or a directory with it)")
        paths += [os.path.join(path, name) if os.path.isdir(path) else path for path in found]
    return paths


def read_result(path, what, interpret):
    """interpret(the JSON in a file); what: such as "glue.json of finetune_glue.py"."""
    try:
        with open(path, encoding="utf-8") as file:
            return interpret(json.load(file))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror} (expected a {what})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path}: not a {what}") from None


def read_glue(path):
    """A glue.json as a dictionary."""
    return read_result(path, "glue.json of finetune_glue.py", lambda r: {**r, "tasks": r["tasks"], "model": r["model"]})


def read_scaling(path):
    """The JSON of studies.scaling as a dictionary."""

    def interpret(results):
        [row["model"] for row in results["rows"]], results["device"], results["toy"]
        return results

    return read_result(path, "result of python -m studies.scaling", interpret)


def read_log(path):
    """The records of a log.jsonl. A last line that a kill or a full disk has cut is left out, and reported."""
    what = "log.jsonl of train.py"
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = file.readlines()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror} (expected a {what})") from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            record["event"]
        except (ValueError, KeyError, TypeError, RecursionError):
            if number < len(lines) or not records or line.endswith("\n"):
                raise UserError(f"{path}:{number}: not a {what}") from None
            print(f"warning: {path}:{number}: the last line was cut, and is left out", file=sys.stderr)
        else:
            records.append(record)
    if not any(record["event"] == "train" for record in records):
        raise UserError(f"{path}: no training steps in this log")
    return records


# ---------------------------------------------------------------------------------------------------------------------
# Labels and axes


def labels_for(cfg, paths, default):
    """A label for each path: from --labels, else default(path). Raises: UserError for too many."""
    labels = cfg.labels.split(",") if cfg.labels else [default(path) for path in paths]
    if len(labels) != len(paths):
        raise UserError(f"--labels: {len(labels)} given, and {len(paths)} needed ({', '.join(paths)[:200]})")
    if len(set(labels)) > 16:
        raise UserError(f"{len(set(labels))} labels, at most 16 can be told apart (give --labels)")
    return labels


def bert_last(paths, labels):
    """Both reordered, so that MosaicBERT looks the same in every figure with BERT in it."""
    return zip(*sorted(zip(paths, labels), key=lambda pair: pair[1].startswith(MODEL_NAMES["bert"])))


def file_label(path):
    """The file's name, or its directory's if every run calls the file so."""
    name = os.path.splitext(os.path.basename(path))[0]
    return os.path.basename(os.path.dirname(os.path.abspath(path))) if name in ("log", "report", "glue") else name


def model_of_log(path):
    start = next((record for record in read_log(path) if record["event"] == "start"), {"config": {}})
    return MODEL_NAMES.get(start["config"].get("model"), file_label(path))


def finish(axes, x, y, title="", log=0, grid="both"):
    """Name and grid the axes; log: the base of a logarithmic x axis."""
    if log:
        axes.set_xscale("log", base=log)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title)
    axes.grid(alpha=0.3, axis=grid)
    axes.set_axisbelow(True)


def legend_below(figure, axes):
    """A legend under the figure, in as many columns as fit; the figure grows where its labels need it."""
    handles, labels = axes.get_legend_handles_labels()
    inches = 0.7 + 0.075 * max(map(len, labels), default=0)  # of the longest label with its marker
    figure.set_figwidth(max(figure.get_figwidth(), inches))
    columns = min(int(figure.get_figwidth() / inches), len(labels))
    figure.set_figheight(figure.get_figheight() + 0.2 * math.ceil(len(labels) / columns))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize="small")


# ---------------------------------------------------------------------------------------------------------------------
# GLUE


def x_of(record, x, path):
    """A record's place on the x axis. Raises: UserError if unknown."""
    if x == "gpu_minutes":
        return 60 * x_of(record, "gpu_hours", path)
    if record.get(x) is None:
        raise UserError(f"{path}: holds no {x} (dollars need train.py --price_per_gpu_hour; try another --x)")
    return record[x]


def x_label(x, devices):
    """The x axis's name, by the names of the devices that trained."""
    if x in X_LABELS:
        return X_LABELS[x]
    hours = " and ".join(sorted({hours_of(device) for device in devices}, reverse=True))
    return hours.replace("hours", "minutes") if x == "gpu_minutes" else hours


def published_x(x, step, hours):
    gpu_hours = hours * PUBLISHED_GPUS
    costs = {"gpu_hours": gpu_hours, "gpu_minutes": 60 * gpu_hours, "dollars": gpu_hours * PUBLISHED_PRICE}
    return {"step": step, **costs}[x]


def seed_scores(results, tasks):
    """Mean score over `tasks` for each fine-tuning seed; a task with fewer seeds repeats its own."""
    scores = [results["tasks"][task]["scores"] for task in tasks]
    return [sum(of_task[i % len(of_task)] for of_task in scores) / len(scores) for i in range(max(map(len, scores)))]


def curves(paths, labels, x, tasks):
    """{label: [(x, mean, lowest, highest)]}, one point for each pretraining length, averaged over pretraining seeds.

    Runs have the same length if they have the same budget or, without one, the same number of steps. lowest and highest
    are over single seeds, of pretraining and fine-tuning.
    """
    scores = {}
    for path, label in zip(paths, labels):
        results = read_glue(path)
        if not results["pretraining"]:
            raise UserError(f"{path}: does not know what pretraining cost (its checkpoint is not from train.py)")
        place = x_of(results["pretraining"], x, path)
        budgets = [results["pretraining"].get(name, 0) for name in ("budget_minutes", "budget_dollars")]
        length = (*budgets, 0 if any(budgets) else results["pretraining"]["step"])
        scores.setdefault(label, {}).setdefault(length, []).append((place, seed_scores(results, tasks)))
    points = {}
    for label, by_length in scores.items():
        points[label] = []
        for _, found in sorted(by_length.items()):
            means = [sum(seeds) / len(seeds) for _, seeds in found]
            singles = [score for _, seeds in found for score in seeds]
            place = sum(place for place, _ in found) / len(found)
            points[label].append((place, sum(means) / len(means), min(singles), max(singles)))
    return points


def published_points(x, tasks):
    """{label: [(x, score)]} of MosaicML's models on these tasks; on fewer than all eight only the last point is known."""
    if len(tasks) == len(TASK_NAMES):
        return {
            f"{model}, published: A100": [(published_x(x, step, hours), score) for step, hours, score in points]
            for model, points in PUBLISHED.items()
        }
    step, hours, _ = PUBLISHED["MosaicBERT-Base"][-1]
    score = sum(PUBLISHED_TASKS[task] for task in tasks) / len(tasks)
    return {"MosaicBERT-Base, published: the same tasks, A100": [(published_x(x, step, hours), score)]}


def plot_pareto(cfg, pyplot):
    """Mean score against the cost of pretraining; with --tasks a panel for each task, too."""
    x = "gpu_hours" if cfg.x == "auto" else cfg.x
    if x == "tokens":
        raise UserError("--x=tokens: not for --pareto (MosaicML published no tokens)")
    paths = find(cfg.pareto, "glue.json")
    found = {path: read_glue(path) for path in paths}
    recipes = {results.get("recipe") for results in found.values()}

    def label_of(path):
        results = found[path]
        label = f"{MODEL_NAMES[results['model']]}, {results['num_layers']} layers"
        return f"{label}, {results.get('recipe')}" if len(recipes) > 1 else label

    paths, labels = bert_last(paths, labels_for(cfg, paths, label_of))
    common = [task for task in TASK_NAMES if all(task in results["tasks"] for results in found.values())]
    if not common:
        raise UserError("--pareto: no task that all results have")
    panels = [common, *([task] for task in common if cfg.tasks)]
    devices = [(results["pretraining"] or {}).get("device") for results in found.values()]
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    size = (4.0 * columns, 3.3 * rows) if len(panels) > 1 else (6.4, 4.2)
    figure, grid = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axes, tasks in zip(grid.flat, panels):
        for i, (label, points) in enumerate(curves(paths, labels, x, tasks).items()):
            color, marker, line, _ = style(i)
            place, mean, low, high = zip(*points)
            axes.plot(place, mean, color=color, marker=marker, linestyle=line, label=label, zorder=3)
            axes.fill_between(place, low, high, color=color, alpha=0.25, linewidth=0)
            axes.vlines(place, low, high, color=color, linewidth=1)
        for (label, points), face in zip(published_points(x, tasks).items(), (GRAY, "none")):
            axes.plot(*zip(*points), "*", color=GRAY, markerfacecolor=face, markersize=7, label=label)
        finish(axes, f"{x_label(x, devices)} of pretraining", "score", ", ".join(TASK_NAMES[task] for task in tasks), log=10)
    grid[0, 0].set_title(f"mean of {len(common)} tasks" if len(panels) > 1 else "")
    if len(panels) == 1:
        grid[0, 0].set_ylabel(f"mean of {', '.join(TASK_NAMES[task] for task in common)}")
    if x_label(x, devices).startswith("GPU"):
        add_dollars(grid[0, 0], x, found.values())
    for axes in grid.flat[len(panels) :]:
        axes.axis("off")
    legend_below(figure, grid[0, 0])
    return figure


def add_dollars(axes, x, found):
    """A scale in dollars above GPU time, if all runs had the price of the published ones."""
    per_hour = {"gpu_hours": 1, "gpu_minutes": 60}[x]
    costs = [results["pretraining"] for results in found]
    if any(round((cost["dollars"] or 0) / cost["gpu_hours"], 4) != PUBLISHED_PRICE for cost in costs):
        return
    scale = PUBLISHED_PRICE / per_hour
    top = axes.secondary_xaxis("top", functions=(lambda value: value * scale, lambda value: value / scale))
    top.set_xlabel(f"US dollars, at ${PUBLISHED_PRICE:.2f} a GPU-hour")
    top.xaxis.set_major_formatter(lambda value, _: f"{value:g}")


def draw_bars(axes, i, count, places, heights, label):
    """The i-th of `count` series of bars, side by side around whole numbers; returns their centers."""
    color, _, _, hatch = style(i)
    width = 0.8 / count
    centers = np.array(places) + (i - (count - 1) / 2) * width
    axes.bar(centers, heights, width * 0.92, color=color, hatch=hatch, edgecolor="white", label=label)
    return centers


def plot_glue(cfg, pyplot):
    """A group of bars for each task, a bar for each result."""
    paths = find(cfg.glue, "glue.json")
    labels = labels_for(cfg, paths, file_label)
    results = [read_glue(path)["tasks"] for path in paths]
    names = list(dict.fromkeys([*(t for t in TASK_NAMES if any(t in r for r in results)), *(t for r in results for t in r)]))
    width = max(4.5, 1.5 + max(1.0, 0.42 * len(paths)) * len(names))  # inches: a bar is as wide as its number
    figure, axes = pyplot.subplots(figsize=(width, 4.0), layout="constrained")
    for i, (label, tasks) in enumerate(zip(labels, results)):
        places = [place for place, name in enumerate(names) if name in tasks]
        scores = [tasks[names[place]]["score"] for place in places]
        spreads = [tasks[names[place]]["score_ci95"] for place in places]  # None for a single seed
        for center, score, spread in zip(draw_bars(axes, i, len(paths), places, scores, label), scores, spreads):
            if spread is not None:
                axes.errorbar(center, score, spread, color="black", capsize=3, linewidth=1)
            axes.annotate(f"{score:.1f}", (center, max(score, 0) + (spread or 0) + 1), ha="center", fontsize="small")
    finish(axes, "", "score (bars: 95 % interval over seeds)", grid="y")
    axes.set_xticks(range(len(names)), [TASK_NAMES.get(name, "own labels" if name == "own" else name) for name in names])
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.set_ylim(min(0, axes.get_ylim()[0]), max(107, axes.get_ylim()[1]))
    legend_below(figure, axes)
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# Loss


def plot_loss(cfg, pyplot):
    """Training loss as a line and held-out loss as markers; with --held_out a line for each run's held-out loss."""
    x = "step" if cfg.x == "auto" else cfg.x
    paths = find(cfg.loss, "log.jsonl")
    paths, labels = bert_last(paths, labels_for(cfg, paths, model_of_log if cfg.held_out else file_label))
    figure, axes = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
    order, devices = list(dict.fromkeys(labels)), []
    for i, (path, label) in enumerate(zip(paths, labels)):
        records, first = read_log(path), label not in labels[:i]  # once in the legend
        color, marker, line, _ = style(order.index(label))
        devices += [record.get("device") for record in records if record["event"] == "start"]
        train = [record for record in records if record["event"] == "train"]
        held_out = [record for record in records if record["event"] == "eval"]
        places = [x_of(record, x, path) for record in train]
        at = np.interp([record["step"] for record in held_out], [record["step"] for record in train], places)
        # None: not finite, or nothing was masked.
        losses, held = ([math.nan if r["loss"] is None else r["loss"] for r in part] for part in (train, held_out))
        if cfg.held_out:
            axes.plot(at, held, color=color, linestyle=line, linewidth=1, alpha=0.6)
            end = at[-1:], held[-1:]
            axes.plot(*end, color=color, linestyle=line, marker=marker, markersize=7, label=label if first else None)
        else:
            axes.plot(places, losses, color=color, linestyle=line, linewidth=1.2, label=label if first else None)
            name = f"{label}, held out (15 % masked)" if first else None
            axes.plot(at, held, marker, color=color, markeredgecolor="black", markersize=6, label=name)
    y = "held-out loss, 15 % masked (nats)" if cfg.held_out else "masked-language-model loss (nats)"
    finish(axes, x_label(x, devices), y)
    legend_below(figure, axes)
    return figure


def plot_at_lengths(cfg, pyplot):
    """Held-out loss against length, a line for each model and budget, averaged over seeds."""

    def interpret(result):
        losses = sorted((int(length), found["loss"]) for length, found in result["lengths"].items())
        return MODEL_NAMES[result["model"]], result["minutes"], losses

    groups = {}
    for path in find(cfg.at_lengths, "lengths.json"):
        model, minutes, losses = read_result(path, "lengths.json of python -m studies.race", interpret)
        groups.setdefault((model, minutes), []).append(losses)
    figure, axes = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
    models = sorted({model for model, _ in groups}, reverse=True)
    for (model, minutes), seeds in sorted(groups.items(), reverse=True):
        color, marker, line, _ = style(models.index(model))
        lengths = [length for length, _ in seeds[0]]
        means = np.mean([[loss for _, loss in losses] for losses in seeds], 0)
        label = model if minutes == max(m for other, m in groups if other == model) else None  # once
        axes.plot(lengths, means, color=color, marker=marker, linestyle=line, label=label)
        beside = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "fontsize": "small"}
        axes.annotate(f"{minutes:g} min", (lengths[-1], means[-1]), **beside)
    finish(axes, "tokens in a piece of text, at most", "held-out loss, 15 % masked (nats)", log=2)
    axes.margins(x=0.12)
    legend_below(figure, axes)
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# Speed


def bench_name(name):
    """A row's or entry's name in words: "FlexAttention, tuned more" for flex_t2."""
    return " ".join(BENCH_WORDS.get(word, word) for word in name.split("_")).replace(" ,", ",").lstrip(", ")


def plot_kernels(cfg, pyplot):
    """A panel for each row of the benchmark, a bar for each entry: operators first, whole steps below.

    An operator's bar stacks forward and backward. Entries that were not measured have the reason in place of a bar.
    """

    def interpret(results):
        rows = {}
        for record in results["rows"]:
            measured = "both" in record or "samples_per_second" in record
            if measured or "not_measured" in record:
                rows.setdefault(record["row"], []).append({"entry": "", **record})
        return results["device"], {name: row for name, row in rows.items() if not all("not_measured" in r for r in row)}

    rows = {}
    for path in find(cfg.kernels, "bench.json"):
        device, found = read_result(path, "result of python -m studies.bench", interpret)
        rows |= found
    if not rows:
        raise UserError(f"{path}: no operators and no steps were measured")
    names = sorted(rows, key=lambda name: not any("both" in r for r in rows[name]))  # stable: else in the order measured
    columns = min(3, math.ceil(len(names) ** 0.5))
    lines = [names[i : i + columns] for i in range(0, len(names), columns)]
    heights = [max(len(rows[name]) for name in line) + 2.2 for line in lines]
    figure, grid = pyplot.subplots(
        len(lines), columns, figsize=(5.2 * columns, 0.27 * sum(heights) + 0.5), squeeze=False, layout="constrained",
        height_ratios=heights,
    )  # fmt: skip
    for axes in grid.flat[len(names) :]:
        axes.axis("off")
    for axes, name in zip(grid.flat, names):
        records = sorted(rows[name], key=lambda record: "not_measured" in record)
        operator = "both" in records[0]
        for place, record in enumerate(records):
            color, value = COLORS[0 if record["entry"] in ("ours", "fp8") else 3], 0
            text = f" not measured: {record.get('not_measured')}"
            if "not_measured" not in record:
                parts = [record[part]["ns_per_token"] for part in ("forward", "backward")] if operator else []
                for part, hatch in zip(parts or [record["samples_per_second"]], ("", "///")):
                    axes.barh(place, part, left=value, color=color, hatch=hatch, edgecolor="white")
                    value += part
                text = f" {value:,.1f}" if operator else f" {value:,.0f}"
            axes.annotate(text, (value, place), va="center", fontsize="x-small")
        if operator:
            axes.axvline(records[0]["both"]["ceiling_ns_per_token"], color="black", linestyle="--", linewidth=1)
        x = "ns a token: forward, then backward (hatched); dashed: limit" if operator else "samples/s"
        axes.set_xlabel(x, fontsize="x-small")
        axes.set_yticks(range(len(records)), [bench_name(record["entry"]) for record in records], fontsize="small")
        axes.tick_params(axis="x", labelsize="small")
        axes.set_ylim(len(records) - 0.4, -0.6)
        axes.margins(x=0.15)
        axes.set_title(bench_name(name), fontsize="medium")
    figure.suptitle(device)
    return figure


def plot_scaling(cfg, pyplot):
    """Samples/s, and MFU (or efficiency, if the GPU's peak is unknown), against GPUs, for a shared batch and one per GPU.

    Of several files the first that measured a number of GPUs counts. Gray: perfect scaling from one GPU's rate. Results of
    earlier code also predict more GPUs than were measured: dashed lines and empty markers.
    """
    files = [read_scaling(path) for path in find(cfg.scaling, "scaling.json")]
    results = files[0]
    measured = {}  # {(model, batch): {GPUs: row}}
    for results_of_file in files:
        found = {}
        for row in results_of_file["rows"]:  # a single GPU is measured beside each number of GPUs: the last one counts
            if "ms" in row and row["batch"] != "curve":
                found.setdefault((row["model"], row["batch"]), {})[row["gpus"]] = row
        for key, rows in found.items():
            measured[key] = {**rows, **measured.get(key, {})}
    predicted = {key: [] for key in measured}
    for row in results.get("predicted", []):
        key = row["model"], row["batch"]
        if key in measured and row["gpus"] > max(measured[key]):
            predicted[key].append(row)
    lower = "mfu" if any(row["mfu"] for rows in measured.values() for row in rows.values()) else "efficiency"
    shared, each = results["global_batch_size"], results["per_gpu"]
    titles = {"global": f"{shared:,} samples, shared", "per_gpu": f"{each:,} samples on each GPU"}
    figure, grid = pyplot.subplots(2, 2, figsize=(9.6, 6.4), sharex=True, layout="constrained")
    for (upper, below), (batch, title) in zip(grid.T, titles.items()):
        for i, model in enumerate(model for model in SCALING_NAMES if any(model == name for name, _ in measured)):
            if (model, batch) in measured:
                rows = [row for _, row in sorted(measured[model, batch].items())]
                draw_scaling(upper, below, rows, predicted[model, batch], lower, SCALING_NAMES[model], *style(i)[:2])
        finish(upper, "", "samples/s", title)
        finish(below, "GPUs", "MFU (%)" if lower == "mfu" else "efficiency (%)", log=2)
        upper.set_yscale("log")
        below.set_ylim(0, 1.05 * below.get_ylim()[1])
    for (name, points), face in zip(PUBLISHED.items(), (GRAY, "none")):
        step, hours, _ = points[-1]
        rate, label = step * PUBLISHED_BATCH / hours / 3600, f"{name}, published: A100, with evaluation"
        grid[0, 0].plot(PUBLISHED_GPUS, rate, "*", color=GRAY, markerfacecolor=face, markersize=9, label=label)
    lines = "solid: measured, dashed: predicted" if any(predicted.values()) else "lines: measured"
    figure.suptitle(f"{results['device']}; {lines}, gray: perfect")
    legend_below(figure, grid[0, 0])
    return figure


def draw_scaling(upper, below, measured, predicted, lower, label, color, marker):
    """One model's rows with one kind of batch, sorted by GPUs, in both panels of a column."""
    first, most = measured[0], [*measured, *predicted][-1]["gpus"]
    rate = first["samples_per_second"] / first["gpus"]
    upper.plot([1, most], [rate, rate * most], color="#bbbbbb", linewidth=0.8)
    for axes, key, factor in ((upper, "samples_per_second", 1), (below, lower, 100)):
        points = [(row["gpus"], factor * (row.get(key) or 1)) for row in measured]  # one GPU has no efficiency: it is 1
        axes.plot(*zip(*points), "-", color=color, marker=marker, label=label)
        if predicted:
            dashed = [points[-1], *((row["gpus"], factor * row[key]) for row in predicted)]
            axes.plot(*zip(*dashed), "--", color=color, linewidth=1)
            axes.plot(*zip(*dashed[1:]), marker, color=color, markerfacecolor="white", markersize=4)


# ---------------------------------------------------------------------------------------------------------------------
# Documents


def plot_lengths(cfg, pyplot):
    """The share of documents in each doubling of length, a bar for each corpus."""

    def interpret(report):
        return {tuple(map(int, name.split("-"))): int(count) for name, count in report["lengths"].items()}

    paths = find(cfg.lengths, "report.json")
    labels = labels_for(cfg, paths, file_label)
    reports = [read_result(path, "report.json of prepare_c4.py", interpret) for path in paths]
    ends = [end for report in reports for bounds in report for end in bounds]
    powers = range(min(ends).bit_length() - 1, max(ends).bit_length())  # no gaps
    bins = [(2**power, 2 ** (power + 1) - 1) for power in powers]
    figure, axes = pyplot.subplots(figsize=(max(4.5, 2.4 + 0.5 * len(bins)), 4.0), layout="constrained")
    for i, (label, report) in enumerate(zip(labels, reports)):
        total = sum(report.values())
        shares = [100 * report.get(bounds, 0) / total for bounds in bins]
        draw_bars(axes, i, len(paths), range(len(bins)), shares, f"{label}: {total:,} documents")
    finish(axes, "tokens in a document, from this number to twice it", "% of documents", grid="y")
    axes.set_xticks(range(len(bins)), [f"{low:,}" for low, _ in bins], rotation=45, ha="right", rotation_mode="anchor")
    legend_below(figure, axes)
    return figure


@command
def main(argv):
    cfg = load_config(PlotConfig, argv)
    kinds = {
        "loss": plot_loss, "glue": plot_glue, "pareto": plot_pareto, "at_lengths": plot_at_lengths,
        "lengths": plot_lengths, "kernels": plot_kernels, "scaling": plot_scaling,
    }  # fmt: skip
    chosen = [draw for name, draw in kinds.items() if getattr(cfg, name)]
    if len(chosen) != 1:
        raise UserError(f"give one of {', '.join(f'--{name}' for name in kinds)}")
    if cfg.tasks and not cfg.pareto:
        raise UserError("--tasks: means nothing without --pareto")
    for path in cfg.out.split(","):
        if not path.endswith((".svg", ".png", ".pdf")):
            raise UserError(f"{path}: unknown suffix (expected .svg, .png or .pdf)")
    try:
        import matplotlib
    except ImportError:
        raise UserError("plot.py needs matplotlib (pip install matplotlib)") from None
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "plot.py", "svg.fonttype": "none", "hatch.linewidth": 0.6})
    from matplotlib import pyplot

    figure = chosen[0](cfg, pyplot)
    for path in cfg.out.split(","):
        try:
            os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
            undated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path[-4:])
            figure.savefig(path, dpi=150, metadata=undated)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
        print(path)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
