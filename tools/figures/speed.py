"""Speed: studies.bench, a panel for each row; studies.scaling, against the number of GPUs."""

import math

from common.options import UserError
from tools.figures.axes import COLORS, GRAY, finish, legend_below, style
from tools.figures.glue import PUBLISHED, PUBLISHED_BATCH, PUBLISHED_GPUS
from tools.figures.reading import SCALING_NAMES, find, read_result, read_scaling

BENCH_WORDS = {  # in the names of studies.bench's rows and entries
    "full": ", no padding", "fill80": ", 80 % filled", "512": ", 512 tokens", "2048": ", 2,048 tokens",
    "layernorm": "LayerNorm", "two": ", two gradients", "geglu": "GeGLU", "head": "head with its loss", "step": "whole step",
    "off": ", one choice left out", "large": ", Large", "varlen": "varlen_attn, no ALiBi", "flex": "FlexAttention",
    "sdpa": "SDPA", "cudnn": ", cuDNN", "efficient": ", memory-efficient", "default": ", default", "t1": ", tuned",
    "t2": ", tuned more", "eager": "not compiled", "liger": "Liger", "vocab": "vocabulary", "torch": "PyTorch",
    "bert": "transformers' BERT", "padded": ", padded", "fp8": "ours, FP8", "torchao": "torchao's FP8",
    "tensorwise": ", a scale per tensor", "rowwise": ", a scale per row",
}  # fmt: skip


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
