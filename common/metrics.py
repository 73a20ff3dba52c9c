"""Metrics of predictions and labels, two (n,) arrays. Class 1 is the positive one. Undefined values are 0."""

import numpy as np


def accuracy(predictions, labels):
    return float((predictions == labels).mean())


def f1(predictions, labels, positive=1):
    """2 TP / (2 TP + FP + FN)."""
    predicted, actual = predictions == positive, labels == positive
    total = predicted.sum() + actual.sum()
    return float(2 * (predicted & actual).sum() / total) if total else 0.0


def macro_f1(predictions, labels):
    """The mean F1 over the classes that occur."""
    return float(np.mean([f1(predictions, labels, label) for label in np.union1d(predictions, labels)]))


def pearson(predictions, labels):
    """Pearson's correlation; 0 if one side is constant (GLUE's own code gives NaN)."""
    x, y = np.asarray(predictions, np.float64), np.asarray(labels, np.float64)
    if (x == x[0]).all() or (y == y[0]).all():
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    return float((x / np.linalg.norm(x)) @ (y / np.linalg.norm(y)))


def spearman(predictions, labels):
    """Pearson's correlation of the ranks; ties get their mean rank."""
    return pearson(ranks(predictions), ranks(labels))


def ranks(values):
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[group]


def mean_error(predictions, labels):
    """The mean absolute error, in the labels' unit."""
    return float(np.abs(predictions - labels).mean())


METRICS = {
    "accuracy": accuracy, "f1": f1, "macro_f1": macro_f1, "pearson": pearson, "spearman": spearman,
    "matthews": pearson,  # for two classes, numbered 0 and 1, they are the same
    "mean_error": mean_error,
}  # fmt: skip


def as_text(name, value):
    """A metric's name and value, in percent; errors in their unit."""
    if name == "mean_error":
        return f"{name} {value:,.0f}" if value >= 1000 else f"{name} {value:.4g}"
    return f"{name} {100 * value:.2f}"


# 0.975 quantiles of Student's t for 1 to 30 degrees of freedom; beyond them, the normal distribution's 1.96.
T_975 = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010, 2.1788, 2.1604, 2.1448,
    2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860, 2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484,
    2.0452, 2.0423,
)  # fmt: skip


def ci95(values):
    """Half the width of the mean's 95 % confidence interval, by Student's t; None for a single value."""
    n = len(values)
    if n < 2:
        return None
    return (T_975[n - 2] if n <= len(T_975) + 1 else 1.96) * float(np.std(values, ddof=1)) / n**0.5
