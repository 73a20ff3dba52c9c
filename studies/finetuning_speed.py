"""How long the same fine-tuning takes here and with transformers' Trainer, in turn, on this machine.

    python -m studies.finetuning_speed --out=out/finetuning_speed          # 20 minutes on one CPU core

One epoch of a classifier on random words: the same weights, texts, batch size, float32 and threads, no dropout. Texts vary in
length as real ones do (log-normal). Trainer pads each batch to its longest text, in random order or sorted by length.
Tokenizing and scoring are left out on both sides. Writes OUT/speed.json: the seconds of each turn.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch

import checkpoint
from common.options import command, load_config
from common.processes import device_name, pick_device
from common.versions import versions
from model import MaskedLM, ModelConfig
from tests.toy import make_tokenizer
from tools import convert_hf, finetune_own

VOCAB_SIZE, HEADS = 8192, 6
LENGTHS = {"median": 40, "sigma": 0.8, "shortest": 4, "longest": 254}  # in words, which are tokens, beside [CLS] and [SEP]


@dataclass
class SpeedConfig:
    out: str = ""  # directory for the results
    model: str = "mosaicbert"
    hidden_size: int = 384
    num_layers: int = 6
    texts: int = 640
    batch_size: int = 32
    turns: int = 5
    threads: int = 1  # of PyTorch, on the CPU


def make_inputs(cfg):
    """(run, export, labelled file) with random weights and texts."""
    torch.manual_seed(0)
    out, width = Path(cfg.out), 4 * cfg.hidden_size
    run, words, rng = out / "run", [f"w{i}" for i in range(VOCAB_SIZE - 5)], np.random.default_rng(0)
    run.mkdir(parents=True)
    model_cfg = ModelConfig(cfg.model, cfg.hidden_size, cfg.num_layers, HEADS, width, hidden_dropout=0.0)
    make_tokenizer(run / "tokenizer.json", VOCAB_SIZE)
    about = json.dumps({**vars(model_cfg), "vocab_size": VOCAB_SIZE, "tokenizer_sha256": ""})
    texts = {"config.json": about, "tokenizer.json": (run / "tokenizer.json").read_text(), "state.json": '{"step": 1}'}
    checkpoint.save(str(run), 1, {"model.safetensors": checkpoint.weights_of(MaskedLM(model_cfg, VOCAB_SIZE))}, texts)
    convert_hf.main([f"--to_hf={run}", f"--out={out / 'exported'}"])
    lengths = rng.lognormal(np.log(LENGTHS["median"]), LENGTHS["sigma"], cfg.texts)
    lengths = lengths.round().astype(int).clip(LENGTHS["shortest"], LENGTHS["longest"])
    rows = [{"text": " ".join(rng.choice(words, n)), "label": ("no", "yes")[i % 2]} for i, n in enumerate(lengths)]
    for name, part in (("train", rows), ("val", rows[:2])):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return rows


def ours(cfg, turn):
    """Seconds of tools.finetune_own, by its own log."""
    out = f"{cfg.out}/ours_{turn}"
    data = [f"--train_file={cfg.out}/train.jsonl", f"--val_file={cfg.out}/val.jsonl", f"--batch_size={cfg.batch_size}"]
    finetune_own.main([f"--checkpoint={cfg.out}/run", f"--out={out}", "--epochs=1", "--seeds=1", *data])
    (log,) = Path(out, "runs").glob("*.jsonl")
    return [json.loads(line) for line in log.read_text().splitlines()][-1]["seconds"]


def theirs(cfg, rows, by_length):
    """Seconds of Trainer.train(), as Trainer says."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments

    tokenizer = AutoTokenizer.from_pretrained(f"{cfg.out}/exported", trust_remote_code=True)
    model = AutoModelForSequenceClassification.from_pretrained(f"{cfg.out}/exported", trust_remote_code=True, num_labels=2)
    tokens = tokenizer([row["text"] for row in rows], truncation=True, max_length=256)["input_ids"]
    data = [{"input_ids": ids, "labels": int(row["label"] == "yes")} for ids, row in zip(tokens, rows)]
    settings = TrainingArguments(
        f"{cfg.out}/theirs", learning_rate=5e-5, num_train_epochs=1, per_device_train_batch_size=cfg.batch_size,
        train_sampling_strategy="group_by_length" if by_length else "random", save_strategy="no", report_to="none",
    )  # fmt: skip
    trainer = Trainer(model, settings, DataCollatorWithPadding(tokenizer), data)
    return trainer.train().metrics["train_runtime"]


@command
def main(argv):
    cfg = load_config(SpeedConfig, argv)
    rows = make_inputs(cfg)
    torch.set_num_threads(cfg.threads)
    seconds = {"ours": [], "trainer": [], "trainer, by length": []}
    for turn in range(cfg.turns):
        for name, took in seconds.items():
            took.append(ours(cfg, turn) if name == "ours" else theirs(cfg, rows, "length" in name))
    lengths = [len(row["text"].split()) + 2 for row in rows]
    results = {
        "config": vars(cfg), "lengths": {"mean": float(np.mean(lengths)), "longest": max(lengths), **LENGTHS},
        "seconds": seconds, "device": device_name(pick_device("auto", "auto")[0]), **versions(),
    }  # fmt: skip
    Path(cfg.out, "speed.json").write_text(json.dumps(results, indent=1) + "\n")
    for name, took in seconds.items():
        ratio = median(took) / median(seconds["ours"])
        print(f"{name}: {median(took):.1f} s ({min(took):.1f} to {max(took):.1f}), {ratio:.2f} times ours")


if __name__ == "__main__":
    main()
