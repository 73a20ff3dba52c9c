"""Figures from logs: loss curves, GLUE scores, GLUE against cost, speed, and document lengths.

    python -m tools.plot --loss=out/base --x=gpu_hours --out=loss.svg
    python -m tools.plot --glue=results/mosaic/glue.json,results/fast/glue.json --labels=mosaic,fast --out=glue.svg
    python -m tools.plot --lengths=data/mine/report.json --out=lengths.svg
    python -m tools.plot --pareto='results/race/*/glue.json' --x=gpu_minutes --held_out=true --out=pareto.svg,pareto.png
    python -m tools.plot --loss='results/race/*/log.jsonl' --held_out=true --x=gpu_minutes --out=race_loss.svg
    python -m tools.plot --kernels=out/bench.json --out=kernels.svg
    python -m tools.plot --scaling=out/scaling.json,out/scaling_8.json --out=scaling.svg

Needs matplotlib. Curves differ in marker and line style as well as color, bars in hatching, so figures are readable in
grayscale. Equal inputs give equal bytes.

Read next: results/README.md, for the figures drawn so far; tools/figures/, which draws them
"""

import os
from dataclasses import dataclass
from typing import Literal

from common.files import whole_file
from common.options import UserError, command, load_config
from tools.figures.glue import plot_glue, plot_pareto
from tools.figures.loss import plot_lengths, plot_loss
from tools.figures.speed import plot_kernels, plot_scaling


@dataclass
class PlotConfig:
    # One of these: files, directories holding them, or patterns, comma-separated
    loss: str = ""  # log.jsonl of train.py: training and held-out loss
    glue: str = ""  # glue.json of finetune_glue.py or finetune_own: a bar for each task, with 95 % intervals
    kernels: str = ""  # JSON of studies.bench: a panel for each row, operators in ns a token, steps in samples/s
    pareto: str = ""  # glue.json: mean score against the cost of pretraining, with MosaicML's published points
    scaling: str = ""  # JSON of studies.scaling: samples/s and MFU by number of GPUs, measured and predicted
    lengths: str = ""  # report.json of prepare_c4.py: histogram of document lengths
    # How
    x: Literal["auto", "step", "tokens", "gpu_hours", "gpu_minutes", "dollars"] = "auto"  # auto: step, for GLUE gpu_hours
    tasks: bool = False  # with --pareto: add a panel for each task
    held_out: bool = False  # with --loss: held-out losses only, one curve a run; with --pareto: add a panel for them
    labels: str = ""  # one for each file, comma-separated; files with equal labels form one curve
    out: str = "figure.svg"  # .svg, .png or .pdf files, comma-separated


@command
def main(argv):
    cfg = load_config(PlotConfig, argv)
    kinds = {
        "loss": plot_loss, "glue": plot_glue, "pareto": plot_pareto, "lengths": plot_lengths,
        "kernels": plot_kernels, "scaling": plot_scaling,
    }  # fmt: skip
    chosen = [draw for name, draw in kinds.items() if getattr(cfg, name)]
    if len(chosen) != 1:
        raise UserError(f"give one of {', '.join(f'--{name}' for name in kinds)}")
    if cfg.held_out and not (cfg.loss or cfg.pareto):
        raise UserError("--held_out: means nothing without --loss or --pareto")
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
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        undated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path[-4:])
        with whole_file(path) as file:
            figure.savefig(file, format=path[-3:], dpi=150, metadata=undated)
        print(path)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
