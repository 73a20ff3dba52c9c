"""Figures from logs: loss curves, GLUE scores, GLUE against cost, speed, and document lengths.

    python -m tools.plot --loss=out/base --x=gpu_hours --out=loss.svg
    python -m tools.plot --glue=results/mosaic/glue.json,results/fast/glue.json --labels=mosaic,fast --out=glue.svg
    python -m tools.plot --lengths=data/mine/report.json --out=lengths.svg
    python -m tools.plot --pareto='results/race/*/glue.json' --x=gpu_minutes --tasks=true --out=pareto.svg,pareto.png
    python -m tools.plot --loss='results/race/*/log.jsonl' --held_out=true --x=gpu_minutes --out=race_loss.svg
    python -m tools.plot --at_lengths='results/race/*/lengths.json' --out=race_lengths.svg
    python -m tools.plot --kernels=out/bench.json --out=kernels.svg
    python -m tools.plot --scaling=out/scaling.json --out=scaling.svg

Needs matplotlib. Curves differ in marker and line style as well as color, bars in hatching, so figures are readable in
grayscale. Equal inputs give equal bytes.

Read next: results/README.md, for the figures drawn so far
"""

import glob
import json
import math
import os
from dataclasses import dataclass
from typing import Literal

import numpy as np

from common.options import UserError, command, load_config

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

TASK_NAMES = {  # in the order of finetune_glue.GLUE_TASKS, whose file would import torch
    "mnli": "MNLI", "qnli": "QNLI", "qqp": "QQP", "rte": "RTE", "sst2": "SST-2", "mrpc": "MRPC", "cola": "CoLA",
    "stsb": "STS-B",
}  # fmt: skip
MODEL_NAMES = {"mosaicbert": "MosaicBERT", "bert": "BERT"}
SCALING_NAMES = {"base": "MosaicBERT-Base", "large": "MosaicBERT-Large", "bert": "BERT-Base, compiled"}
X_LABELS = {
    "step": "steps", "tokens": "tokens", "gpu_hours": "GPU-hours", "gpu_minutes": "GPU-minutes", "dollars": "US dollars",
}  # fmt: skip
PER_GPU_HOUR = {"gpu_hours": 1, "gpu_minutes": 60}
STYLES = (  # color, marker, line, hatch; in grayscale the colors are 30, 60, 45 and 75 % bright
    ("#1f4e79", "o", "-", ""), ("#d98c2b", "s", "--", "///"), ("#8e3b63", "^", "-.", "..."), ("#6fc2a8", "D", ":", "xxx"),
)  # fmt: skip


@dataclass
class PlotConfig:
    # One of these: files, directories holding them, or patterns, comma-separated
    loss: str = ""  # log.jsonl of train.py: training and held-out loss
    glue: str = ""  # glue.json of finetune_glue.py: a bar for each task, with 95 % intervals
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
    title: str = ""  # of the figure
    out: str = "figure.svg"  # .svg, .png or .pdf files, comma-separated


# ---------------------------------------------------------------------------------------------------------------------
# Reading results


def find(patterns, name):
    """Paths of the files that comma-separated files, directories or patterns mean. Raises: UserError."""
    paths = []
    for pattern in patterns.split(","):
        found = sorted(glob.glob(pattern))
        if not found:
            raise UserError(f"{pattern}: no such file (expected {name}, or a directory with it)")
        paths += [os.path.join(path, name) if os.path.isdir(path) else path for path in found]
    return paths


def read_result(path, what, interpret):
    """interpret(the JSON in a file). Raises: UserError if it is not a `what`, such as "glue.json of finetune_glue.py"."""
    try:
        with open(path, encoding="utf-8") as file:
            return interpret(json.load(file))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror} (expected a {what})") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: not a {what}") from None


def read_glue(path):
    """A glue.json as a dictionary. Raises: UserError."""
    return read_result(path, "glue.json of finetune_glue.py", lambda r: {**r, "tasks": r["tasks"], "model": r["model"]})


def read_log(path):
    """The records of a log.jsonl. Raises: UserError."""
    records = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                records.append(json.loads(line))
                records[-1]["event"]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror} (expected a log.jsonl of train.py)") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}:{number}: not a log.jsonl of train.py") from None
    if not any(record["event"] == "train" for record in records):
        raise UserError(f"{path}: no training steps in this log")
    return records


def read_bench(path):
    """The JSON of studies.bench as a dictionary. Raises: UserError."""

    def interpret(results):
        [row["entry"] for row in results["rows"]], results["device"]
        return results

    return read_result(path, "result of python -m studies.bench", interpret)


def read_scaling(path):
    """The JSON of studies.scaling as a dictionary. Raises: UserError."""

    def interpret(results):
        [row["model"] for row in results["rows"]], results["models"], results["device"], results["toy"]
        return results

    return read_result(path, "result of python -m studies.scaling", interpret)


def read_report(path):
    """The length histogram of a report.json: {(shortest, longest): documents}. Raises: UserError."""

    def interpret(report):
        return {tuple(map(int, name.split("-"))): int(count) for name, count in report["lengths"].items()}

    return read_result(path, "report.json of prepare_c4.py", interpret)


def read_lengths(path):
    """(model, minutes of pretraining, [(length, held-out loss)]) of a lengths.json. Raises: UserError."""

    def interpret(result):
        losses = sorted((int(length), found["loss"]) for length, found in result["lengths"].items())
        return result["model"], result["minutes"], losses

    return read_result(path, "lengths.json of python -m studies.race", interpret)


# ---------------------------------------------------------------------------------------------------------------------
# Labels


def labels_for(cfg, paths, default):
    """A label for each path: from --labels, else default(path). Raises: UserError for too many."""
    labels = cfg.labels.split(",") if cfg.labels else [default(path) for path in paths]
    if len(labels) != len(paths):
        raise UserError(f"--labels: {len(labels)} labels for {len(paths)} files ({', '.join(paths)[:200]})")
    if len(set(labels)) > len(STYLES):
        raise UserError(f"{len(set(labels))} labels, at most {len(STYLES)} can be told apart (give --labels)")
    return labels


def bert_last(paths, labels):
    """Both reordered, so that MosaicBERT looks the same in every figure with BERT in it."""
    return zip(*sorted(zip(paths, labels), key=lambda pair: pair[1].startswith(MODEL_NAMES["bert"])))


def directory_name(path):
    return os.path.basename(os.path.dirname(os.path.abspath(path)))


def file_label(path):
    """The file's name, or its directory's if every run calls the file so."""
    name = os.path.splitext(os.path.basename(path))[0]
    return directory_name(path) if name in ("log", "report") else name


def model_of_log(path):
    start = next((record for record in read_log(path) if record["event"] == "start"), {"config": {}})
    return MODEL_NAMES.get(start["config"].get("model"), file_label(path))


# ---------------------------------------------------------------------------------------------------------------------
# GLUE


def x_of(record, x, path):
    """A record's place on the x axis. Raises: UserError if unknown."""
    if x == "gpu_minutes":
        return 60 * x_of(record, "gpu_hours", path)
    if record.get(x) is None:
        raise UserError(f"{path}: holds no {x} (dollars need train.py --price_per_gpu_hour; try another --x)")
    return record[x]


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


def draw_curves(axes, points):
    for (label, rows), (color, marker, line, _) in zip(points.items(), STYLES):
        x, mean, low, high = zip(*rows)
        axes.plot(x, mean, color=color, marker=marker, linestyle=line, label=label, zorder=3)
        axes.fill_between(x, low, high, color=color, alpha=0.25, linewidth=0)
        axes.vlines(x, low, high, color=color, linewidth=1)


def common_price(found):
    """Dollars per GPU-hour if all results have the same price, else None."""
    costs = [results["pretraining"] or {} for results in found]
    prices = {round(cost["dollars"] / cost["gpu_hours"], 4) if cost.get("dollars") else None for cost in costs}
    return prices.pop() if len(prices) == 1 else None


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
    price = common_price(found.values())
    panels = [common, *([task] for task in common if cfg.tasks)]
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    size = (4.0 * columns, 3.3 * rows) if len(panels) > 1 else (6.4, 4.4)
    figure, grid = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axes, tasks in zip(grid.flat, panels):
        draw_curves(axes, curves(paths, labels, x, tasks))
        if tasks is common:
            for (model, points), face in zip(PUBLISHED.items(), ("#555555", "none")):
                costs, scores = [published_x(x, step, hours) for step, hours, _ in points], [row[2] for row in points]
                label = f"{model}, published: 8 tasks, A100"
                axes.plot(costs, scores, "*", color="#555555", markerfacecolor=face, markersize=7, label=label)
            axes.set_title(f"mean of {len(common)} tasks" if len(panels) > 1 else cfg.title)
            if len(panels) == 1:
                axes.legend(fontsize="small", loc="lower right")
        else:
            step, hours, _ = PUBLISHED["MosaicBERT-Base"][-1]
            axes.plot(published_x(x, step, hours), PUBLISHED_TASKS[tasks[0]], "*", color="#555555", markersize=7)
            axes.set_title(TASK_NAMES[tasks[0]])
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel(f"{X_LABELS[x]} of pretraining")
        if tasks is common and x in PER_GPU_HOUR and price == PUBLISHED_PRICE:  # one dollar scale fits all points
            scale = price / PER_GPU_HOUR[x]
            top = axes.secondary_xaxis("top", functions=(lambda v: v * scale, lambda v: v / scale))
            top.set_xlabel(f"US dollars, at ${price:.2f} a GPU-hour")
            top.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_ylabel("score" if len(panels) > 1 else f"mean of {', '.join(TASK_NAMES[task] for task in common)}")
        axes.grid(alpha=0.3)
    for axes in grid.flat[len(panels) :]:
        axes.axis("off")
    if len(panels) > 1:
        figure.suptitle(cfg.title)
        figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize="small")
    return figure


def plot_glue(cfg, pyplot):
    """A group of bars for each task, a bar for each result."""
    paths = find(cfg.glue, "glue.json")
    labels = labels_for(cfg, paths, directory_name)
    results = [read_glue(path)["tasks"] for path in paths]
    names = [task for task in [*TASK_NAMES, "own"] if any(task in tasks for tasks in results)]
    figure, axes = pyplot.subplots(figsize=(1.5 + 1.0 * len(names), 4.0), layout="constrained")
    width = 0.8 / len(paths)
    for i, (label, tasks, (color, *_, hatch)) in enumerate(zip(labels, results, STYLES)):
        for place, name in enumerate(names):
            if name not in tasks:
                continue
            score, spread = tasks[name]["score"], tasks[name]["score_ci95"]
            left = place + (i - (len(paths) - 1) / 2) * width
            axes.bar(left, score, width * 0.92, color=color, hatch=hatch, edgecolor="white", label=label)
            if spread is not None:  # None for a single seed
                axes.errorbar(left, score, spread, color="black", capsize=3, linewidth=1)
            axes.annotate(f"{score:.1f}", (left, score + (spread or 0) + 1), ha="center", fontsize="small")
            label = None  # once in the legend
    axes.set_xticks(range(len(names)), [TASK_NAMES.get(name, name) for name in names])
    axes.set_ylim(min(0, *axes.get_ylim()), 107)
    axes.set_ylabel("score (bars: 95 % interval over seeds)")
    axes.set_title(cfg.title)
    figure.legend(loc="outside lower center", ncols=len(paths))
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# Loss


def plot_loss(cfg, pyplot):
    """Training loss as a line and held-out loss as markers; with --held_out a line for each run's held-out loss."""
    x = "step" if cfg.x == "auto" else cfg.x
    paths = find(cfg.loss, "log.jsonl")
    paths, labels = bert_last(paths, labels_for(cfg, paths, model_of_log if cfg.held_out else file_label))
    figure, axes = pyplot.subplots(figsize=(6.4, 4.4), layout="constrained")
    styles = {}
    for path, label in zip(paths, labels):
        records = read_log(path)
        new = label not in styles
        color, marker, line, _ = styles.setdefault(label, STYLES[len(styles) % len(STYLES)])
        train = [record for record in records if record["event"] == "train"]
        places = [x_of(record, x, path) for record in train]
        losses = [math.nan if record["loss"] is None else record["loss"] for record in train]  # None: not finite
        if not cfg.held_out:
            axes.plot(places, losses, color=color, linestyle=line, linewidth=1.2, label=label if new else None)
        held_out = [record for record in records if record["event"] == "eval"]
        at = np.interp([record["step"] for record in held_out], [record["step"] for record in train], places)
        losses, name = [record["loss"] for record in held_out], f"{label}, held out (15 % masked)" if new else None
        if cfg.held_out:
            axes.plot(at, losses, color=color, linestyle=line, linewidth=1, alpha=0.6)
            end = at[-1:], losses[-1:]
            axes.plot(*end, color=color, linestyle=line, marker=marker, markersize=7, label=label if new else None)
        else:
            axes.plot(at, losses, marker, color=color, markeredgecolor="black", markersize=6, label=name)
    axes.set_xlabel(X_LABELS[x])
    axes.set_ylabel("held-out loss, 15 % masked (nats)" if cfg.held_out else "masked-language-model loss (nats)")
    axes.set_title(cfg.title)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def plot_at_lengths(cfg, pyplot):
    """Held-out loss against length, a line for each model and budget, averaged over seeds."""
    groups = {}
    for path in find(cfg.at_lengths, "lengths.json"):
        model, minutes, losses = read_lengths(path)
        groups.setdefault((model, minutes), []).append(losses)
    figure, axes = pyplot.subplots(figsize=(6.4, 4.4), layout="constrained")
    styles = dict(zip(sorted({model for model, _ in groups}, reverse=True), STYLES))
    for (model, minutes), seeds in sorted(groups.items(), reverse=True):
        color, marker, line, _ = styles[model]
        lengths = [length for length, _ in seeds[0]]
        means = np.mean([[loss for _, loss in losses] for losses in seeds], 0)
        label = MODEL_NAMES[model] if minutes == max(m for other, m in groups if other == model) else None  # once
        axes.plot(lengths, means, color=color, marker=marker, linestyle=line, label=label)
        beside = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "fontsize": "small"}
        axes.annotate(f"{minutes:g} min", (lengths[-1], means[-1]), **beside)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("tokens in a piece of text, at most")
    axes.set_ylabel("held-out loss, 15 % masked (nats)")
    axes.set_title(cfg.title)
    axes.margins(x=0.12)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# Speed


def plot_kernels(cfg, pyplot):
    """A panel for each row of the benchmark, a bar for each entry: operators first, whole steps below."""
    results = read_bench(cfg.kernels)
    rows = {}
    for record in results["rows"]:
        if "both" in record or "samples_per_second" in record:
            rows.setdefault(record["row"], []).append(record)
    if not rows:
        raise UserError(f"{cfg.kernels}: no operators and no steps were measured")
    names = sorted(rows, key=lambda name: "both" not in rows[name][0])  # stable: otherwise in the order measured
    columns = min(3, len(names))
    lines = [names[i : i + columns] for i in range(0, len(names), columns)]
    heights = [max(len(rows[name]) for name in line) + 2.2 for line in lines]
    figure, grid = pyplot.subplots(
        len(lines), columns, figsize=(4.6 * columns, 0.27 * sum(heights) + 0.5), squeeze=False, layout="constrained",
        height_ratios=heights,
    )  # fmt: skip
    for axes in grid.flat[len(names) :]:
        axes.axis("off")
    for axes, name in zip(grid.flat, names):
        draw_row(axes, rows[name])
        axes.set_title(name, fontsize="medium")
    figure.suptitle(cfg.title or results["device"])
    return figure


def draw_row(axes, records):
    """Bars from the top, in the order measured; an operator's bar stacks forward and backward."""
    ours, peer = STYLES[0][0], STYLES[3][0]
    operator = "both" in records[0]
    for place, record in enumerate(records):
        color = ours if record["entry"] == "ours" else peer
        if operator:
            forward, backward = (record[part]["ns_per_token"] for part in ("forward", "backward"))
            value = forward + backward
            axes.barh(place, forward, color=color, edgecolor="white")
            axes.barh(place, backward, left=forward, color=color, hatch="///", edgecolor="white")
        else:
            value = record["samples_per_second"]
            axes.barh(place, value, color=color, edgecolor="white")
        text = f" {value:,.1f}" if operator else f" {value:,.0f}"
        axes.annotate(text, (value, place), va="center", fontsize="x-small")
    if operator:
        axes.axvline(records[0]["both"]["ceiling_ns_per_token"], color="black", linestyle="--", linewidth=1)
        axes.set_xlabel("ns a token: forward, then backward (hatched); dashed: ceiling", fontsize="x-small")
    else:
        axes.set_xlabel("samples/s", fontsize="x-small")
    axes.set_yticks(range(len(records)), [record["entry"] for record in records], fontsize="small")
    axes.tick_params(axis="x", labelsize="small")
    axes.invert_yaxis()
    axes.margins(x=0.15)


def plot_scaling(cfg, pyplot):
    """Samples/s, and MFU (or efficiency, if the GPU's peak is unknown), against GPUs, for a shared batch and one per GPU.

    Solid lines and filled markers are measured, dashed lines and empty markers predicted. Gray: perfect scaling from one
    GPU's rate.
    """
    results = read_scaling(cfg.scaling)
    if "predicted" not in results:
        hint = f"python -m studies.scaling --predict={cfg.scaling} --out={cfg.scaling}"
        raise UserError(f"{cfg.scaling}: no prediction ({hint})")
    measured = [row for row in results["rows"] if "ms" in row and row["batch"] != "curve"]
    predicted = [row for row in results["predicted"] if row["measured_ms"] is None]
    lower = "mfu" if any(row["mfu"] for row in measured) else "efficiency"
    titles = {
        "global": f"{results['global_batch_size']:,} samples, shared",
        "per_gpu": f"{results['per_gpu']:,} samples on each GPU",
    }
    figure, grid = pyplot.subplots(2, 2, figsize=(9.6, 6.8), sharex=True, layout="constrained")
    models = [name for name in SCALING_NAMES if any(row["model"] == name for row in measured)]
    for column, batch in zip(grid.T, titles):
        for model, style in zip(models, STYLES):
            here, more = (
                sorted((row for row in rows if (row["model"], row["batch"]) == (model, batch)), key=lambda row: row["gpus"])
                for rows in (measured, predicted)
            )
            if here:
                draw_scaling(column, here, more, lower, SCALING_NAMES[model], style)
        if batch == "global":
            for (name, points), face in zip(PUBLISHED.items(), ("#555555", "none")):
                step, hours, _ = points[-1]
                rate, label = step * PUBLISHED_BATCH / hours / 3600, f"{name}, published: A100, with evaluation"
                column[0].plot(PUBLISHED_GPUS, rate, "*", color="#555555", markerfacecolor=face, markersize=9, label=label)
        column[0].set_yscale("log")
        column[0].set_ylabel("samples/s")
        column[1].set_ylabel("MFU (%)" if lower == "mfu" else "efficiency (%)")
        column[1].set_ylim(0, 1.05 * column[1].get_ylim()[1])
        column[1].set_xscale("log", base=2)
        column[1].xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        column[1].set_xlabel("GPUs")
        column[0].set_title(titles[batch], fontsize="medium")
        for axes in column:
            axes.grid(alpha=0.3)
    figure.suptitle(cfg.title or f"{results['device']}; measured full, predicted dashed")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize="small")
    return figure


def draw_scaling(column, measured, predicted, lower, label, style):
    """One model's rows with one kind of batch, in the upper and the lower panel of a column."""
    color, marker, _, _ = style
    ideal = [measured[0]["samples_per_second"] * n for n in (1, max(row["gpus"] for row in [*measured, *predicted]))]
    column[0].plot([1, ideal[1] / ideal[0]], ideal, color="#bbbbbb", linewidth=0.8)
    predicted = [row for row in predicted if row["gpus"] > measured[-1]["gpus"]]
    for axes, key, factor in ((column[0], "samples_per_second", 1), (column[1], lower, 100)):
        # A single GPU is measured once beside each number of GPUs: the line goes through the last of those points.
        points = [(row["gpus"], factor * (row.get(key) or 1)) for row in measured]
        line = sorted(dict(points).items())
        axes.plot(*zip(*points), marker, color=color)
        axes.plot(*zip(*line), "-", color=color, marker=marker, label=label)
        dashed = [line[-1], *((row["gpus"], factor * row[key]) for row in predicted)]
        axes.plot(*zip(*dashed), "--", color=color, linewidth=1)
        if predicted:
            axes.plot(*zip(*dashed[1:]), marker, color=color, markerfacecolor="white", markersize=4)


# ---------------------------------------------------------------------------------------------------------------------
# Documents


def plot_lengths(cfg, pyplot):
    """The share of documents in each doubling of length, a bar for each corpus."""
    paths = find(cfg.lengths, "report.json")
    labels = labels_for(cfg, paths, file_label)
    reports = [read_report(path) for path in paths]
    ends = [end for report in reports for bounds in report for end in bounds]
    powers = range(min(ends).bit_length() - 1, max(ends).bit_length())  # no gaps
    bins = [(2**power, 2 ** (power + 1) - 1) for power in powers]
    figure, axes = pyplot.subplots(figsize=(2.4 + 0.5 * len(bins), 4.0), layout="constrained")
    width = 0.8 / len(paths)
    for i, (label, report, (color, *_, hatch)) in enumerate(zip(labels, reports, STYLES)):
        total = sum(report.values())
        left = np.arange(len(bins)) + (i - (len(paths) - 1) / 2) * width
        shares = [100 * report.get(bounds, 0) / total for bounds in bins]
        label = f"{label}: {total:,} documents"
        axes.bar(left, shares, width * 0.92, color=color, hatch=hatch, edgecolor="white", label=label)
    axes.set_xticks(range(len(bins)), [f"{low:,}" for low, _ in bins], rotation=45, ha="right", rotation_mode="anchor")
    axes.set_xlabel("tokens in a document, from this number to twice it")
    axes.set_ylabel("% of documents")
    axes.set_title(cfg.title)
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=min(2, len(paths)))
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
