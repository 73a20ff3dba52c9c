"""GLUE scores: a bar for each task, and the mean against the cost of pretraining, with MosaicML's published points."""

import math
import os
import textwrap

from common.glue import part_of
from common.options import UserError
from tools.figures.axes import GRAY, bert_last, draw_bars, file_label, finish, labels_for, legend_below, style, x_label, x_of
from tools.figures.reading import MODEL_NAMES, TASK_NAMES, contestant, find, marked, marks, means, read_glue, read_log

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
    are over single seeds, of pretraining and fine-tuning. Without tasks: held-out losses, from the log.jsonl beside a result.
    """
    scores = {}
    for path, label in zip(paths, labels):
        results = read_glue(path)
        if not results["pretraining"]:
            raise UserError(f"{path}: does not know what pretraining cost (its checkpoint is not from train.py)")
        place = x_of(results["pretraining"], x, path)
        budgets = [results["pretraining"].get(name, 0) for name in ("budget_minutes", "budget_dollars")]
        length = (*budgets, 0 if any(budgets) else results["pretraining"]["step"])
        singles = seed_scores(results, tasks) if tasks else [held_out_loss(os.path.join(os.path.dirname(path), "log.jsonl"))]
        scores.setdefault(label, {}).setdefault(length, []).append((place, singles))
    points = {}
    for label, by_length in scores.items():
        points[label] = []
        for _, found in sorted(by_length.items()):
            means = [sum(seeds) / len(seeds) for _, seeds in found]
            singles = [score for _, seeds in found for score in seeds]
            place = sum(place for place, _ in found) / len(found)
            points[label].append((place, sum(means) / len(means), min(singles), max(singles)))
    return points


def held_out_loss(path):
    """The last one in a log. Raises: UserError."""
    losses = [record["loss"] for record in read_log(path) if record["event"] == "eval"]
    if not losses or losses[-1] is None:
        raise UserError(f"{path}: holds no held-out loss (leave out --held_out)")
    return losses[-1]


def published_points(x, tasks):
    """{label: [(x, score)]} of MosaicML's models on these tasks; on fewer than all eight only the last point is known."""
    if not tasks:
        return {}
    curves = PUBLISHED
    if len(tasks) < len(TASK_NAMES):
        step, hours, _ = PUBLISHED["MosaicBERT-Base"][-1]
        curves = {"MosaicBERT-Base": [(step, hours, sum(PUBLISHED_TASKS[task] for task in tasks) / len(tasks))]}
    return {
        f"{model}, published: the same tasks, A100": [(published_x(x, step, hours), score) for step, hours, score in curve]
        for model, curve in curves.items()
    }


def plot_pareto(cfg, pyplot):
    """Mean score against the cost of pretraining; with --tasks a panel for each task, with --held_out one for the loss.

    Tasks on a part of GLUE's training data are marked, and part of a mean of their own alone.
    """
    x = "gpu_hours" if cfg.x == "auto" else cfg.x
    if x == "tokens":
        raise UserError("--x=tokens: not for --pareto (MosaicML published no tokens)")
    paths = find(cfg.pareto, "glue.json")
    found = {path: read_glue(path) for path in paths}
    recipes = {results.get("recipe") for results in found.values()}

    def label_of(path):
        results, named = found[path], contestant(os.path.dirname(path))
        label = named[0] if named else f"{MODEL_NAMES[results['model']]}, {results['num_layers']} layers"
        return f"{label}, {results.get('recipe')}" if len(recipes) > 1 else label

    paths, labels = bert_last(paths, labels_for(cfg, paths, label_of))
    common = marks(found)
    if not common:
        raise UserError("--pareto: no task that all results have")
    over = means(common)
    panels = [tasks for _, tasks in over] + [[task] for task in common if cfg.tasks] + [[]] * cfg.held_out
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
            label += ", all of the data" * any(common.values())
            axes.plot(*zip(*points), "*", color=GRAY, markerfacecolor=face, markersize=7, label=label)
        y = "score" if tasks else "held-out loss, 15 % masked (nats)"
        title = "\n".join(marked(task, common) for task in tasks)
        finish(axes, f"{x_label(x, devices)} of pretraining", y, title, log=10)
    for axes, (name, tasks) in zip(grid.flat, over):
        partial = [marked(task, common) for task in tasks if common[task]]
        name = name if len(over) > 1 else f"mean of {len(tasks)} tasks"
        axes.set_title("\n".join([name, *partial]) if len(panels) > 1 or partial else "")
        if len(panels) == 1:
            axes.set_ylabel(f"mean of {', '.join(TASK_NAMES[task] for task in tasks)}")
    for axes, tasks in zip(grid.flat, panels):
        if any(common[task] for task in tasks):  # marks make a title long
            axes.title.set_fontsize("small")
    if x_label(x, devices).startswith("GPU"):
        add_dollars(grid[0, 0], x, found.values())
    for axes in grid.flat[len(panels) :]:
        axes.axis("off")
    legend_below(figure, *grid.flat[: len(over)])
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


def group(name, result):
    """The name of a task's group of bars. A regression's score and a classification's are of different kinds: two groups."""
    if name != "own":
        return name
    scored = [metric for metric in result["metrics"] if metric != "mean_error"]
    return "own labels:\nmean of " + "\nand ".join(scored)


def plot_glue(cfg, pyplot):
    """A group of bars for each task, a bar for each result."""
    paths = find(cfg.glue, "glue.json")
    labels = labels_for(cfg, paths, file_label)
    results = [{group(name, task): task for name, task in read_glue(path)["tasks"].items()} for path in paths]
    names = list(dict.fromkeys([*(t for t in TASK_NAMES if any(t in r for r in results)), *(t for r in results for t in r)]))
    width = max(4.5, 1.5 + max(1.0, 0.42 * len(paths)) * len(names))  # inches: a bar is as wide as its number
    figure, axes = pyplot.subplots(figsize=(width, 4.0), layout="constrained")
    for i, (label, tasks) in enumerate(zip(labels, results)):
        parts = [f"{TASK_NAMES[name]}: {part}" for name in names if name in tasks and (part := part_of(name, tasks[name]))]
        label = textwrap.fill(f"{label} ({'; '.join(parts)})", int(14 * width)) if parts else label
        places = [place for place, name in enumerate(names) if name in tasks]
        scores = [tasks[names[place]]["score"] for place in places]
        spreads = [tasks[names[place]]["score_ci95"] for place in places]  # None for a single seed
        for center, score, spread in zip(draw_bars(axes, i, len(paths), places, scores, label), scores, spreads):
            if spread is not None:
                axes.errorbar(center, score, spread, color="black", capsize=3, linewidth=1)
            axes.annotate(f"{score:.1f}", (center, max(score, 0) + (spread or 0) + 1), ha="center", fontsize="small")
    finish(axes, "", "score (bars: 95 % interval over seeds)", grid="y")
    axes.set_xticks(range(len(names)), [TASK_NAMES.get(name, name) for name in names])
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.set_ylim(min(0, axes.get_ylim()[0]), max(107, axes.get_ylim()[1]))
    legend_below(figure, axes)
    return figure
