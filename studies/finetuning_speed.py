"""What the same fine-tuning costs here and with transformers' Trainer, in turn, on one CPU core.

    python -m studies.finetuning_speed --out=out/finetuning_speed          # 6 minutes

One epoch of a classifier on random words: the same weights, texts, batch size, learning rate and float32, no dropout. Texts
vary in length as real ones do (log-normal). Trainer pads each batch to its longest text, with the texts in random order, or
sorted by length among some hundred neighbours (group_by_length). Reading, tokenizing and scoring are left out on both sides.
Seconds are those of the process on its core, so that other work on the machine changes little. Writes OUT/speed.json.
"""

import io
import json
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch

from common.glue import Task
from common.labelled import Examples
from common.options import command, load_config
from common.versions import versions
from finetune_glue import FineTuneConfig, Settings, Worker, load_pretrained, make_runs, train
from tests.toy import make_run
from tools import convert_hf

VOCAB_SIZE = 8192
MEDIAN, SIGMA, SHORTEST, LONGEST = 40, 0.8, 4, 254  # of the lengths, in words, which are tokens, beside [CLS] and [SEP]
LR = 5e-5


@dataclass
class SpeedConfig:
    out: str = ""  # directory for the results
    hidden_size: int = 256
    num_layers: int = 4
    num_heads: int = 4
    texts: int = 1280
    batch_size: int = 32
    turns: int = 3


def make_model(cfg):
    """OUT/run, a MosaicBERT with random weights, and OUT/exported."""
    size = {"hidden_size": cfg.hidden_size, "num_layers": cfg.num_layers, "num_heads": cfg.num_heads}
    run = make_run(Path(cfg.out, "run"), vocab_size=VOCAB_SIZE, **size, intermediate_size=4 * cfg.hidden_size)
    convert_hf.main([f"--to_hf={run}", f"--out={cfg.out}/exported"])


def make_examples(cfg):
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(np.log(MEDIAN), SIGMA, cfg.texts).round().astype(int).clip(SHORTEST, LONGEST)
    texts = [(" ".join(f"w{i}" for i in rng.integers(0, VOCAB_SIZE - 5, n)),) for n in lengths]
    return Examples(texts, rng.integers(0, 2, cfg.texts))


def ours(cfg, examples):
    """A function that trains one epoch as tools.finetune_own does."""
    options = FineTuneConfig(checkpoint=f"{cfg.out}/run", out=f"{cfg.out}/ours", device="cpu", dtype="float32")
    task = Task("own", "", ("text",), "label", ("no", "yes"), ("accuracy",))
    splits, settings = {"train": examples}, Settings(LR, 0.0, cfg.batch_size, 1, 1)
    (run,) = make_runs(options, load_pretrained(options.checkpoint, options.out), task, splits, settings, 1)
    worker = Worker(options, {task: splits}.get)
    model, data = worker.classifier(run), worker.encoded(run)["train"]
    return lambda: train(run, model, data, worker.process, io.StringIO(), print)


def theirs(cfg, examples, by_length):
    """A function that trains one epoch with Trainer."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding
    from transformers import Trainer, TrainingArguments

    start, options = f"{cfg.out}/exported", {"trust_remote_code": True}
    tokenizer = AutoTokenizer.from_pretrained(start, **options)
    ids = tokenizer([text for (text,) in examples.texts], truncation=True, max_length=256)["input_ids"]
    data = [{"input_ids": row, "labels": int(label)} for row, label in zip(ids, examples.labels)]
    settings = TrainingArguments(
        f"{cfg.out}/theirs", learning_rate=LR, num_train_epochs=1, per_device_train_batch_size=cfg.batch_size, use_cpu=True,
        train_sampling_strategy="group_by_length" if by_length else "random", save_strategy="no", report_to="none",
    )  # fmt: skip
    model = AutoModelForSequenceClassification.from_pretrained(start, num_labels=2, **options)
    return Trainer(model, settings, DataCollatorWithPadding(tokenizer), data).train


@command
def main(argv):
    cfg = load_config(SpeedConfig, argv)
    torch.set_num_threads(1)
    make_model(cfg)
    examples = make_examples(cfg)
    seconds = {"ours": [], "trainer": [], "trainer, by length": []}
    for _ in range(cfg.turns):
        for name, took in seconds.items():
            epoch = ours(cfg, examples) if name == "ours" else theirs(cfg, examples, "length" in name)
            start = time.process_time()
            epoch()
            took.append(round(time.process_time() - start, 2))
    import transformers

    lengths = [2 + len(text.split()) for (text,) in examples.texts]
    about = {"mean_length": round(float(np.mean(lengths)), 1), "longest": max(lengths), **versions()}
    about["versions"]["transformers"] = transformers.__version__
    config = {name: value for name, value in vars(cfg).items() if name != "out"}
    Path(cfg.out, "speed.json").write_text(json.dumps({"config": config, **about, "seconds": seconds}, indent=1) + "\n")
    for name, took in seconds.items():
        ratio = median(took) / median(seconds["ours"])
        print(f"{name}: {median(took):.1f} s ({min(took):.1f} to {max(took):.1f}), {ratio:.2f} times ours")


if __name__ == "__main__":
    main()
