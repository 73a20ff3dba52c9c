"""Figures from the logs: loss curves, GLUE task by task, GLUE against its cost, speed, and lengths of documents.

    python plot.py --loss=out/base --x=gpu_hours --out=loss.svg
    python plot.py --glue=results/mosaic/glue.json,results/fast/glue.json --labels=mosaic,fast --out=glue.svg
    python plot.py --lengths=data/mine/report.json --out=lengths.svg
    python plot.py --pareto='results/race/*/glue.json' --x=gpu_minutes --tasks=true --out=pareto.svg,pareto.png
    python plot.py --loss='results/race/*/log.jsonl' --held_out=true --x=gpu_minutes --out=race_loss.svg
    python plot.py --at_lengths='results/race/*/lengths.json' --out=race_lengths.svg
    python plot.py --kernels=out/bench.json --out=kernels.svg
    python plot.py --scaling=out/scaling.json --out=scaling.svg

Needs matplotlib. Curves differ in marker and line style as well as colour, bars in hatching, so that all can be read in
grey. Equal inputs give equal bytes.

Read next: results/README.md, for what has been drawn
"""

import glob
import json
import math
import os
from dataclasses import dataclass
from typing import Literal

import numpy as np

from common.options import UserError, command, load_config
from glue import GLUE_TASKS

# What MosaicML published (README of mosaicml/examples, benchmarks/bert, and the blog's figure): means over eight tasks
# on eight A100-80GB at $2.50 a GPU-hour. The steps are read off the points' spacing, 70,000 being the last.
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
PUBLISHED_TASKS = {  # MosaicBERT-Base's last point, five pretraining seeds, task by task (its model card)
    "mnli": 84.95, "qnli": 90.74, "qqp": 90.29, "rte": 81.36, "sst2": 92.46, "mrpc": 90.03, "cola": 55.11,
    "stsb": 89.27,
}  # fmt: skip

X_LABELS = {
    "step": "steps", "tokens": "tokens", "gpu_hours": "GPU-hours", "gpu_minutes": "GPU-minutes", "dollars": "US dollars",
}  # fmt: skip
DOLLAR_PARTS = {"gpu_hours": 1, "gpu_minutes": 60}  # of a GPU-hour
TASK_NAMES = {name: task.folder for name, task in GLUE_TASKS.items()}
MODEL_NAMES = {"mosaicbert": "MosaicBERT", "bert": "BERT"}
STYLES = (  # colour, marker, line, hatch; the colours' greys are 30, 60, 45 and 75 % bright
    ("#1f4e79", "o", "-", ""), ("#d98c2b", "s", "--", "///"), ("#8e3b63", "^", "-.", "..."), ("#6fc2a8", "D", ":", "xxx"),
)  # fmt: skip


@dataclass
class PlotConfig:
    # One of these: files, directories that hold them, or patterns, comma-separated
    loss: str = ""  # log.jsonl of train.py: training and held-out loss
    glue: str = ""  # glue.json of finetune_glue.py: a bar for each task, with 95 % intervals
    kernels: str = ""  # JSON of kernels.bench: a panel for each row, operators in ns a token, steps in samples/s
    pareto: str = ""  # glue.json: the mean score against the cost of pretraining, with MosaicML's published points
    at_lengths: str = ""  # lengths.json of race.py: held-out loss against the length of the pieces of text
    scaling: str = ""  # JSON of scaling.py: samples/s and MFU by the number of GPUs, measured and predicted
    lengths: str = ""  # report.json of prepare_c4.py: a histogram of the documents' lengths
    # How
    x: Literal["auto", "step", "tokens", "gpu_hours", "gpu_minutes", "dollars"] = "auto"  # auto: step, GLUE: gpu_hours
    tasks: bool = False  # with --pareto: a panel for each task, too
    held_out: bool = False  # with --loss: held-out losses alone, a curve for each run, the runs of a model alike
    labels: str = ""  # one for each file, comma-separated; files with the same label make one curve
    title: str = ""  # of the figure
    out: str = "figure.svg"  # .svg, .png or .pdf files, comma-separated


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
    """interpret(the JSON in a file). Raises: UserError where it is no `what`, as in "glue.json of finetune_glue.py"."""
    try:
        with open(path, encoding="utf-8") as file:
            return interpret(json.load(file))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror} (expected a {what})") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: not a {what}") from None


def read_glue(path):
    """A glue.json as a dictionary. Raises: UserError."""

    def interpret(results):
        results["tasks"], results["model"]
        return results

    return read_result(path, "glue.json of finetune_glue.py", interpret)


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


def labels_for(cfg, paths, default):
    """A label for each path."""
    if not cfg.labels:
        return [default(path) for path in paths]
    labels = cfg.labels.split(",")
    if len(labels) != len(paths):
        raise UserError(f"--labels: {len(labels)} labels for {len(paths)} files ({', '.join(paths)[:200]})")
    return labels


def bert_last(paths, labels):
    """Both in another order, so that MosaicBERT looks the same in every figure that has BERT in it."""
    return zip(*sorted(zip(paths, labels), key=lambda pair: pair[1].startswith(MODEL_NAMES["bert"])))


def number_of(record, x, path):
    """What a record holds for the x axis. Raises: UserError where it is not known."""
    if x == "gpu_minutes":
        return 60 * number_of(record, "gpu_hours", path)
    if record.get(x) is None:
        raise UserError(f"{path}: holds no {x} (dollars need train.py --price_per_gpu_hour; try another --x)")
    return record[x]


def seed_scores(results, tasks):
    """Mean score over `tasks` for each fine-tuning seed; a task with fewer seeds gives them again from its first."""
    scores = [results["tasks"][task]["scores"] for task in tasks]
    return [sum(of_task[i % len(of_task)] for of_task in scores) / len(scores) for i in range(max(map(len, scores)))]


def curves(paths, labels, x, tasks):
    """{label: [(x, mean, lowest, highest)]}, one point for each pretraining length; pretraining seeds are averaged.

    Runs of one budget have one length, others those of equally many steps.
    The mean is that of all results; lowest and highest are those of single seeds, of pretraining and fine-tuning.
    """
    scores = {}
    for path, label in zip(paths, labels):
        results = read_glue(path)
        if not results["pretraining"]:
            raise UserError(f"{path}: says nothing of what pretraining cost (its checkpoint is not of train.py)")
        place = number_of(results["pretraining"], x, path)
        budgets = [results["pretraining"].get(name, 0) for name in ("budget_minutes", "budget_dollars")]
        length = (*budgets, 0 if any(budgets) else results["pretraining"]["step"])
        scores.setdefault(label, {}).setdefault(length, []).append((place, seed_scores(results, tasks)))
    points = {}
    for label, of_length in scores.items():
        points[label] = []
        for _, found in sorted(of_length.items()):
            means = [sum(seeds) / len(seeds) for _, seeds in found]
            singles = [score for _, seeds in found for score in seeds]
            place = sum(place for place, _ in found) / len(found)
            points[label].append((place, sum(means) / len(means), min(singles), max(singles)))
    return points


def draw_curves(axes, points):
    for (label, rows), (colour, marker, line, _) in zip(points.items(), STYLES):
        x, mean, low, high = zip(*rows)
        axes.plot(x, mean, color=colour, marker=marker, linestyle=line, label=label, zorder=3)
        axes.fill_between(x, low, high, color=colour, alpha=0.25, linewidth=0)
        axes.vlines(x, low, high, color=colour, linewidth=1)


def published_x(x, step, hours):
    gpu_hours = hours * PUBLISHED_GPUS
    places = {"gpu_hours": gpu_hours, "gpu_minutes": 60 * gpu_hours, "dollars": gpu_hours * PUBLISHED_PRICE}
    return {"step": step, **places}[x]


def price_of(paths):
    """Dollars of a GPU-hour, if it is the same in all results, else None."""
    costs = [read_glue(path)["pretraining"] or {} for path in paths]
    prices = {round(cost["dollars"] / cost["gpu_hours"], 4) if cost.get("dollars") else None for cost in costs}
    return prices.pop() if len(prices) == 1 else None


def plot_pareto(cfg, pyplot):
    x = "gpu_hours" if cfg.x == "auto" else cfg.x
    if x == "tokens":
        raise UserError("--x=tokens: not for --pareto (MosaicML published no tokens)")
    paths = find(cfg.pareto, "glue.json")
    found = {path: read_glue(path) for path in paths}
    several = len({results.get("recipe") for results in found.values()}) > 1

    def label_of(path):
        return model_label(found[path]) + (f", {found[path].get('recipe')}" if several else "")

    labels = labels_for(cfg, paths, label_of)
    too_many(labels)
    paths, labels = bert_last(paths, labels)
    common = [task for task in GLUE_TASKS if all(task in results["tasks"] for results in found.values())]
    if not common:
        raise UserError("--pareto: no task that all results have")
    price = price_of(paths)
    panels = [common, *([task] for task in common if cfg.tasks)]
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    size = (4.0 * columns, 3.3 * rows) if len(panels) > 1 else (6.4, 4.4)
    figure, grid = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axes, tasks in zip(grid.flat, panels):
        draw_curves(axes, curves(paths, labels, x, tasks))
        if tasks is common:
            for (model, points), face in zip(PUBLISHED.items(), ("#555555", "none")):
                places, scores = [published_x(x, step, hours) for step, hours, _ in points], [row[2] for row in points]
                label = f"{model}, published: 8 tasks, A100"
                axes.plot(places, scores, "*", color="#555555", markerfacecolor=face, markersize=7, label=label)
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
        if tasks is common and x in DOLLAR_PARTS and price == PUBLISHED_PRICE:  # then one scale is right for both
            scale = price / DOLLAR_PARTS[x]
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
    paths = find(cfg.glue, "glue.json")
    labels = labels_for(cfg, paths, lambda path: os.path.basename(os.path.dirname(os.path.abspath(path))))
    too_many(labels)
    results = [read_glue(path)["tasks"] for path in paths]
    names = [task for task in [*GLUE_TASKS, "own"] if any(task in tasks for tasks in results)]
    figure, axes = pyplot.subplots(figsize=(1.5 + 1.0 * len(names), 4.0), layout="constrained")
    width = 0.8 / len(paths)
    for i, (label, tasks, (colour, *_, hatch)) in enumerate(zip(labels, results, STYLES)):
        for place, name in enumerate(names):
            if name not in tasks:
                continue
            score, spread = tasks[name]["score"], tasks[name]["score_ci95"]
            left = place + (i - (len(paths) - 1) / 2) * width
            axes.bar(left, score, width * 0.92, color=colour, hatch=hatch, edgecolor="white", label=label)
            if spread is not None:  # of one seed nothing is known
                axes.errorbar(left, score, spread, color="black", capsize=3, linewidth=1)
            axes.annotate(f"{score:.1f}", (left, score + (spread or 0) + 1), ha="center", fontsize="small")
            label = None  # in the legend once
    axes.set_xticks(range(len(names)), [TASK_NAMES.get(name, name) for name in names])
    axes.set_ylim(min(0, *axes.get_ylim()), 107)
    axes.set_ylabel("score (bars: 95 % interval over seeds)")
    axes.set_title(cfg.title)
    figure.legend(loc="outside lower center", ncols=len(paths))
    return figure


def plot_loss(cfg, pyplot):
    x = "step" if cfg.x == "auto" else cfg.x
    paths = find(cfg.loss, "log.jsonl")
    labels = labels_for(cfg, paths, model_of_log if cfg.held_out else log_label)
    too_many(labels)
    paths, labels = bert_last(paths, labels)
    figure, axes = pyplot.subplots(figsize=(6.4, 4.4), layout="constrained")
    styles = {}
    for path, label in zip(paths, labels):
        records = read_log(path)
        new = label not in styles
        colour, marker, line, _ = styles.setdefault(label, STYLES[len(styles) % len(STYLES)])
        train = [record for record in records if record["event"] == "train"]
        places = [number_of(record, x, path) for record in train]
        losses = [math.nan if record["loss"] is None else record["loss"] for record in train]  # of a skipped update
        if not cfg.held_out:
            axes.plot(places, losses, color=colour, linestyle=line, linewidth=1.2, label=label if new else None)
        held_out = [record for record in records if record["event"] == "eval"]
        at = np.interp([record["step"] for record in held_out], [record["step"] for record in train], places)
        losses, name = [record["loss"] for record in held_out], f"{label}, held out (15 % masked)" if new else None
        if cfg.held_out:
            axes.plot(at, losses, color=colour, linestyle=line, linewidth=1, alpha=0.6)
            end = at[-1:], losses[-1:]
            axes.plot(*end, color=colour, linestyle=line, marker=marker, markersize=7, label=label if new else None)
        else:
            axes.plot(at, losses, marker, color=colour, markeredgecolor="black", markersize=6, label=name)
    axes.set_xlabel(X_LABELS[x])
    axes.set_ylabel("held-out loss, 15 % masked (nats)" if cfg.held_out else "masked-language-model loss (nats)")
    axes.set_title(cfg.title)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def read_bench(path):
    """The JSON of kernels.bench as a dictionary. Raises: UserError."""

    def interpret(results):
        [row["entry"] for row in results["rows"]], results["device"]
        return results

    return read_result(path, "result of python -m kernels.bench", interpret)


def plot_kernels(cfg, pyplot):
    """A panel for each row of the benchmark, a bar for each entry: operators first, whole steps below."""
    results = read_bench(cfg.kernels)
    rows = {}
    for record in results["rows"]:
        if "both" in record or "samples_per_second" in record:
            rows.setdefault(record["row"], []).append(record)
    if not rows:
        raise UserError(f"{cfg.kernels}: no operators and no steps were measured")
    names = sorted(rows, key=lambda name: "both" not in rows[name][0])  # stable: else as measured
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
    """Bars from the top in the order measured; forward and backward of an operator stand in one bar."""
    ours, peer = STYLES[0][0], STYLES[3][0]
    operator = "both" in records[0]
    for place, record in enumerate(records):
        colour = ours if record["entry"] == "ours" else peer
        if operator:
            forward, backward = (record[part]["ns_per_token"] for part in ("forward", "backward"))
            value = forward + backward
            axes.barh(place, forward, color=colour, edgecolor="white")
            axes.barh(place, backward, left=forward, color=colour, hatch="///", edgecolor="white")
        else:
            value = record["samples_per_second"]
            axes.barh(place, value, color=colour, edgecolor="white")
        axes.annotate(
            f" {value:,.1f}" if operator else f" {value:,.0f}", (value, place), va="center", fontsize="x-small"
        )
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
    """Samples/s and MFU (or efficiency, where no MFU is known) by GPUs, for both ways to set the batch.

    Full lines and markers are measured, dashed lines and empty markers predicted; grey is one GPU's rate times their
    number.
    """
    import scaling  # here, as it brings PyTorch

    results = scaling.read(cfg.scaling)
    if "predicted" not in results:
        raise UserError(f"{cfg.scaling}: no prediction (python scaling.py --predict={cfg.scaling} --out={cfg.scaling})")
    measured = [row for row in results["rows"] if "ms" in row and row["batch"] != "curve"]
    predicted = [row for row in results["predicted"] if row["measured_ms"] is None]
    lower = "mfu" if any(row["mfu"] for row in measured) else "efficiency"
    titles = {
        "global": f"{results['global_batch_size']:,} samples, shared",
        "per_gpu": f"{results['per_gpu']:,} samples on each GPU",
    }
    figure, grid = pyplot.subplots(2, 2, figsize=(9.6, 6.8), sharex=True, layout="constrained")
    models = [name for name in scaling.TITLES if any(row["model"] == name for row in measured)]
    for column, batch in zip(grid.T, titles):
        for model, (colour, marker, _, _) in zip(models, STYLES):
            label = scaling.TITLES[model]
            draw_scaling(column, measured, predicted, (model, batch), (lower, label, colour, marker))
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


def draw_scaling(column, measured, predicted, what, how):
    """One model with one way to set the batch, in the upper and the lower panel."""
    lower, label, colour, marker = how
    rows, more = (
        sorted((row for row in found if (row["model"], row["batch"]) == what), key=lambda row: row["gpus"])
        for found in (measured, predicted)
    )
    if not rows:
        return
    ideal = [rows[0]["samples_per_second"] * n for n in (1, max(row["gpus"] for row in [*rows, *more]))]
    column[0].plot([1, ideal[1] / ideal[0]], ideal, color="#bbbbbb", linewidth=0.8)
    more = [row for row in more if row["gpus"] > rows[-1]["gpus"]]
    for axes, key, factor in ((column[0], "samples_per_second", 1), (column[1], lower, 100)):
        # One GPU is measured beside each number of them: all those points are drawn, and the line takes the last.
        places = [(row["gpus"], factor * (row.get(key) or 1)) for row in rows]
        line = sorted(dict(places).items())
        axes.plot(*zip(*places), marker, color=colour)
        axes.plot(*zip(*line), "-", color=colour, marker=marker, label=label)
        dashed = [line[-1], *((row["gpus"], factor * row[key]) for row in more)]
        axes.plot(*zip(*dashed), "--", color=colour, linewidth=1)
        axes.plot(*zip(*dashed[1:]), marker, color=colour, markerfacecolor="white", markersize=4) if more else None


def read_report(path):
    """How many documents of which length a report.json tells of: {(shortest, longest): documents}. Raises: UserError."""

    def interpret(report):
        return {tuple(map(int, name.split("-"))): int(count) for name, count in report["lengths"].items()}

    return read_result(path, "report.json of prepare_c4.py", interpret)


def plot_lengths(cfg, pyplot):
    """The share of documents in each doubling of length, a bar for each corpus."""
    paths = find(cfg.lengths, "report.json")
    labels = labels_for(cfg, paths, log_label)
    too_many(labels)
    reports = [read_report(path) for path in paths]
    ends = [end for report in reports for bounds in report for end in bounds]
    powers = range(min(ends).bit_length() - 1, max(ends).bit_length())  # also those that no document has
    bins = [(2**power, 2 ** (power + 1) - 1) for power in powers]
    figure, axes = pyplot.subplots(figsize=(2.4 + 0.5 * len(bins), 4.0), layout="constrained")
    width = 0.8 / len(paths)
    for i, (label, report, (colour, *_, hatch)) in enumerate(zip(labels, reports, STYLES)):
        total = sum(report.values())
        places = np.arange(len(bins)) + (i - (len(paths) - 1) / 2) * width
        shares = [100 * report.get(bounds, 0) / total for bounds in bins]
        label = f"{label}: {total:,} documents"
        axes.bar(places, shares, width * 0.92, color=colour, hatch=hatch, edgecolor="white", label=label)
    axes.set_xticks(range(len(bins)), [f"{low:,}" for low, _ in bins], rotation=45, ha="right", rotation_mode="anchor")
    axes.set_xlabel("tokens in a document, from this number to twice it")
    axes.set_ylabel("% of documents")
    axes.set_title(cfg.title)
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=min(2, len(paths)))
    return figure


def read_lengths(path):
    """A lengths.json as a dictionary. Raises: UserError."""

    def interpret(result):
        places = sorted((int(length), found["loss"]) for length, found in result["lengths"].items())
        return {"model": result["model"], "minutes": result["minutes"], "places": places}

    return read_result(path, "lengths.json of race.py", interpret)


def plot_at_lengths(cfg, pyplot):
    """Held-out loss against length, a line for each model and budget; the mean of its seeds."""
    groups = {}
    for path in find(cfg.at_lengths, "lengths.json"):
        result = read_lengths(path)
        groups.setdefault((result["model"], result["minutes"]), []).append(result["places"])
    figure, axes = pyplot.subplots(figsize=(6.4, 4.4), layout="constrained")
    styles = dict(zip(sorted({model for model, _ in groups}, reverse=True), STYLES))
    for (model, minutes), seeds in sorted(groups.items(), reverse=True):
        colour, marker, line, _ = styles[model]
        lengths = [length for length, _ in seeds[0]]
        means = np.mean([[loss for _, loss in places] for places in seeds], 0)
        label = MODEL_NAMES[model] if minutes == max(m for other, m in groups if other == model) else None  # once
        axes.plot(lengths, means, color=colour, marker=marker, linestyle=line, label=label)
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


def model_of_log(path):
    start = next((record for record in read_log(path) if record["event"] == "start"), {"config": {}})
    return MODEL_NAMES.get(start["config"].get("model"), log_label(path))


def log_label(path):
    name = os.path.splitext(os.path.basename(path))[0]
    return os.path.basename(os.path.dirname(os.path.abspath(path))) if name in ("log", "report") else name


def model_label(results):
    return f"{MODEL_NAMES[results['model']]}, {results['num_layers']} layers"


def too_many(labels):
    if len(set(labels)) > len(STYLES):
        raise UserError(f"{len(set(labels))} labels, at most {len(STYLES)} can be told apart (give --labels)")


@command
def main(argv):
    cfg = load_config(PlotConfig, argv)
    kinds = {
        "loss": plot_loss, "glue": plot_glue, "pareto": plot_pareto, "lengths": plot_lengths, "kernels": plot_kernels,
        "at_lengths": plot_at_lengths,
        "scaling": plot_scaling,
    }  # fmt: skip
    asked = [draw for name, draw in kinds.items() if getattr(cfg, name)]
    if len(asked) != 1:
        raise UserError("give one of --loss, --glue, --pareto, --at_lengths, --lengths, --kernels and --scaling")
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

    figure = asked[0](cfg, pyplot)
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
