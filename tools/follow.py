"""Send a run's log to TensorBoard, Weights & Biases, MLflow or Trackio, afterwards or while it trains.

    python -m tools.follow --log=out/mine/log.jsonl --to=tensorboard
    python -m tools.follow --log=out/mine/log.jsonl --to=wandb --live

It sends the options, and the figures of every train and eval record. Each call makes a new run of the tracker;
TensorBoard's replaces that of an earlier call.
"""

import importlib
import os
import time
from dataclasses import dataclass
from typing import Literal

from common.options import UserError, command, load_config
from common.run_directory import read_log

POLL_SECONDS = 10


@dataclass
class FollowConfig:
    log: str = ""  # log.jsonl of a run
    to: Literal["tensorboard", "wandb", "mlflow", "trackio"] = "tensorboard"  # its Python package must be installed
    live: bool = False  # keep on until the run has finished


def open_tracker(name, run, config):
    """log(figures, step=step) and finish() of a new run of the tracker. run: the directory of the log."""
    module = importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
    if name == "tensorboard":
        writer = module.SummaryWriter(os.path.join(run, "tensorboard"), purge_step=0)
        writer.add_text("config", "\n".join(f"    {option}: {value}" for option, value in config.items()))
        return lambda figures, step: [writer.add_scalar(*figure, step) for figure in figures.items()], writer.close
    if name == "mlflow":
        module.start_run(run_name=os.path.basename(run))
        module.log_params(config)
        return module.log_metrics, module.end_run
    module.init(project="mosaicbert", name=os.path.basename(run), config=config)
    return module.log, module.finish


def records(run, live):
    """Yield each train and eval record once: a resumed run repeats some steps, bit for bit."""
    event, seen = "", {"train": 0, "eval": 0}
    while True:
        for _, record in read_log(run):
            event = record["event"]
            if event in seen and record["step"] > seen[event]:
                seen[event] = record["step"]
                yield record
        if not live or event == "end":
            return
        time.sleep(POLL_SECONDS)


@command
def main(argv):
    cfg = load_config(FollowConfig, argv)
    run, step = os.path.dirname(os.path.abspath(cfg.log)), 0
    start = next((record for _, record in read_log(run)), None)
    if os.path.basename(cfg.log) != "log.jsonl" or not start:
        raise UserError(f"--log={cfg.log}: not the log.jsonl of a run")
    try:
        log, finish = open_tracker(cfg.to, run, start["config"])
    except Exception as error:  # whatever these libraries raise, such as that nobody is logged in
        raise UserError(f"--to={cfg.to}: {error} (pip install {cfg.to}, if it is missing; --debug shows where)") from error
    try:
        for record in records(run, cfg.live):
            event, step = record.pop("event"), record.pop("step")
            log({f"{event}/{name}": x for name, x in record.items() if isinstance(x, int | float)}, step=step)
    finally:
        finish()
    print(f"{cfg.log}: {cfg.to} has it up to step {step}")


if __name__ == "__main__":
    main()
