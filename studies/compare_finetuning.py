"""Compare fine-tuning with a plain transformers loop: the same BERT, settings and seeds.

    python -m studies.compare_finetuning --checkpoint=minilm --data_dir=data/glue --out=out/compare --jobs=4

The loop is what a user would write: AutoModelForSequenceClassification, batches padded to their longest text, a shuffling
DataLoader, AdamW, metrics from scikit-learn and scipy. Settings, seeds and precision are the `mosaic` recipe's. Prints both
means, and their difference with its 95 % interval (Welch), and writes them to OUT/compare.json.
"""

import json
import multiprocessing
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.glue import GLUE_TASKS, read_split
from common.options import command, load_config
from finetune_glue import RECIPES, first_seeds

ROOT = Path(__file__).parent.parent


@dataclass
class CompareConfig:
    checkpoint: str = ""  # directory in Hugging Face form: config.json, model.safetensors, tokenizer.json
    data_dir: str = ""  # GLUE's TSV files
    tasks: str = "mrpc,stsb"
    seeds: int = 5
    epochs: int = 0  # 0: the recipe's
    out: str = "out/compare"
    jobs: int = 1  # runs that share the device
    skip_bad_lines: int = 0  # malformed lines to skip per file


def plain_run(cfg, name, seed):
    """Scores of one task and seed: {metric: value}."""
    import torch
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import accuracy_score, f1_score
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup

    task, settings = GLUE_TASKS[name], RECIPES["mosaic"][name]
    train, dev = (read_split(task, split, cfg) for split in ("train", "validation"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(seed)
    if task.name == "stsb":
        torch.set_float32_matmul_precision("high")
    tokenizer = AutoTokenizer.from_pretrained(cfg.checkpoint)
    num_labels = max(1, len(task.labels))
    model = AutoModelForSequenceClassification.from_pretrained(cfg.checkpoint, num_labels=num_labels)
    model = model.float().to(device)

    def collate(examples):
        texts, labels = zip(*examples)
        columns = [list(column) for column in zip(*texts)]
        batch = tokenizer(*columns, padding="longest", truncation=True, max_length=256, return_tensors="pt")
        return batch, torch.tensor(labels)

    def scores(batch):
        bf16 = device.type == "cuda" and task.name != "stsb"
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return model(**batch.to(device)).logits.float()

    examples = list(zip(train.texts, train.labels.tolist()))
    loader = torch.utils.data.DataLoader(examples, settings.batch_size, shuffle=True, collate_fn=collate)
    steps = (cfg.epochs or settings.epochs) * len(loader)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.lr, betas=(0.9, 0.98), eps=1e-6, weight_decay=settings.weight_decay
    )
    schedule = get_linear_schedule_with_warmup(optimizer, round(0.06 * steps), steps)
    model.train()
    for _ in range(cfg.epochs or settings.epochs):
        for batch, labels in loader:
            output = scores(batch)
            if task.labels:
                loss = torch.nn.functional.cross_entropy(output, labels.to(device))
            else:
                loss = torch.nn.functional.mse_loss(output[:, 0], labels.float().to(device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    model.eval()
    examples = list(zip(dev.texts, dev.labels.tolist()))
    with torch.no_grad():
        loader = torch.utils.data.DataLoader(examples, 64, collate_fn=collate)
        output = torch.cat([scores(batch) for batch, _ in loader]).cpu().numpy()
    if task.labels:
        found = output.argmax(1)
        metrics = {"accuracy": accuracy_score(dev.labels, found), "f1": f1_score(dev.labels, found)}
    else:
        metrics = {"spearman": spearmanr(output[:, 0], dev.labels)[0], "pearson": pearsonr(output[:, 0], dev.labels)[0]}
    print(f"transformers {name}.seed{seed}: {metrics}", flush=True)
    return {metric: float(value) for metric, value in metrics.items()}


def difference(ours, theirs):
    """(ours - theirs, half its 95 % interval by Welch's t), in points."""
    from scipy.stats import ttest_ind

    low, high = ttest_ind(ours, theirs, equal_var=False).confidence_interval(0.95)
    return 100 * (np.mean(ours) - np.mean(theirs)), 100 * (high - low) / 2


@command
def main(argv):
    cfg = load_config(CompareConfig, argv)
    names, seeds = cfg.tasks.split(","), first_seeds(cfg.seeds)
    options = {name: getattr(cfg, name) for name in ("checkpoint", "data_dir", "tasks", "seeds", "jobs", "skip_bad_lines")}
    options |= {"epochs": cfg.epochs, "out": os.path.join(cfg.out, "ours")}
    flags = [f"--{name}={value}" for name, value in options.items()]
    if code := subprocess.run([sys.executable, str(ROOT / "finetune_glue.py"), *flags]).returncode:
        raise SystemExit(code)
    ours = json.loads(Path(cfg.out, "ours", "glue.json").read_text())["tasks"]
    pairs = [(cfg, name, seed) for name in names for seed in seeds]
    with multiprocessing.get_context("spawn").Pool(cfg.jobs) as pool:
        theirs = dict(zip([pair[1:] for pair in pairs], pool.starmap(plain_run, pairs, chunksize=1)))
    results = {}
    for name in names:
        for metric in theirs[name, seeds[0]]:
            here = ours[name]["metrics"][metric]["values"]
            there = [theirs[name, seed][metric] for seed in seeds]
            gap, interval = difference(here, there)
            results[f"{name} {metric}"] = {
                "ours": here, "transformers": there, "difference_points": gap, "ci95_points": interval,
            }  # fmt: skip
            means = f"ours {100 * np.mean(here):.2f}, transformers {100 * np.mean(there):.2f}"
            print(f"{name} {metric}: {means}, difference {gap:+.2f} +- {interval:.2f} points ({cfg.seeds} seeds)")
    Path(cfg.out, "compare.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
