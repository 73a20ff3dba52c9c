"""What figures share: styles that differ in grayscale too, labels, axes, legends."""

import math
import os

import numpy as np

from common.options import UserError
from common.run_directory import hours_of
from tools.figures.reading import contestant

X_LABELS = {"step": "steps", "tokens": "tokens", "dollars": "US dollars"}
COLORS = ("#1f4e79", "#d98c2b", "#8e3b63", "#6fc2a8")  # in grayscale 30, 60, 45 and 75 % bright
MARKERS, LINES, HATCHES = "os^D", ("-", "--", "-.", ":"), ("", "///", "...", "xxx")
GRAY = "#555555"  # published results


def style(i):
    """(color, marker, line, hatch) of the i-th label; the first 16 differ."""
    turned = (i + i // 4) % 4
    return COLORS[i % 4], MARKERS[turned], LINES[turned], HATCHES[turned]


def labels_for(cfg, paths, default):
    """A label for each path: from --labels, else default(path). Raises: UserError for too many."""
    labels = cfg.labels.split(",") if cfg.labels else [default(path) for path in paths]
    if len(labels) != len(paths):
        raise UserError(f"--labels: {len(labels)} given, and {len(paths)} needed ({', '.join(paths)[:200]})")
    if len(set(labels)) > 16:
        hint = "plot fewer, or give --labels, equal ones for one curve"
        raise UserError(f"{len(set(labels))} labels, at most 16 can be told apart ({hint})")
    return labels


def bert_last(paths, labels):
    """Both reordered, so that MosaicBERT looks the same in every figure with BERT in it."""
    return zip(*sorted(zip(paths, labels), key=lambda pair: pair[1].lower().startswith("bert")))


def file_label(path):
    """The file's name, or its directory's if every run calls the file so."""
    name = os.path.splitext(os.path.basename(path))[0]
    return os.path.basename(os.path.dirname(os.path.abspath(path))) if name in ("log", "report", "glue") else name


def race_label(path):
    """Of a run of studies.race, its config, so that equal ones form one curve; else as file_label."""
    return named[0] if (named := contestant(os.path.dirname(path))) else file_label(path)


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


def finish(axes, x, y, title="", log=0, grid="both"):
    """Name and grid the axes; log: the base of a logarithmic x axis."""
    from matplotlib.ticker import LogFormatter

    if log:
        axes.set_xscale("log", base=log)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(LogFormatter(log))  # on an axis of one decade; not as 2 x 10^0
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title)
    axes.grid(alpha=0.3, axis=grid)
    axes.set_axisbelow(True)


def legend_below(figure, *panels):
    """A legend of the panels under the figure, in as many columns as fit; the figure grows where its labels need it."""
    named = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            named.setdefault(label, handle)
    labels, handles = list(named), list(named.values())
    lines = [label.split("\n") for label in labels]
    inches = 0.7 + 0.075 * max((len(line) for label in lines for line in label), default=0)  # of the longest with its marker
    figure.set_figwidth(max(figure.get_figwidth(), inches))
    columns = min(int(figure.get_figwidth() / inches), len(labels))
    figure.set_figheight(figure.get_figheight() + 0.2 * math.ceil(len(labels) / columns) * max(map(len, lines), default=0))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize="small")


def draw_bars(axes, i, count, places, heights, label):
    """The i-th of `count` series of bars, side by side around whole numbers; returns their centers."""
    color, _, _, hatch = style(i)
    width = 0.8 / count
    centers = np.array(places) + (i - (count - 1) / 2) * width
    axes.bar(centers, heights, width * 0.92, color=color, hatch=hatch, edgecolor="white", label=label)
    return centers
