"""Loss by step or cost; and how long the documents of a corpus are."""

import math

import numpy as np

from tools.figures.axes import (
    bert_last,
    draw_bars,
    file_label,
    finish,
    labels_for,
    legend_below,
    race_label,
    style,
    x_label,
    x_of,
)
from tools.figures.reading import find, read_log, read_result


def plot_loss(cfg, pyplot):
    """Training loss as a line and held-out loss as markers; with --held_out a line for each run's held-out loss."""
    x = "step" if cfg.x == "auto" else cfg.x
    paths = find(cfg.loss, "log.jsonl")
    paths, labels = bert_last(paths, labels_for(cfg, paths, race_label if cfg.held_out else file_label))
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
