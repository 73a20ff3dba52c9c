"""Make a labelled task from token shards: is this text genuine, or were some of its words replaced?

    python -m tools.smoke_task --data_dir=data/smoke --out=data/smoke_task

writes train.tsv and val.tsv with the columns text and label: windows of 40 tokens, half of them "genuine", the other half
"replaced", with random tokens in 6 of the 40 positions. `make smoke` fine-tunes on it.

Read next: tools/finetune_own.py
"""

import os
from dataclasses import dataclass

import numpy as np

from common.options import UserError, command, load_config
from common.vocabulary import load_tokenizer
from data import Samples

WINDOW, REPLACED = 40, 6  # tokens


@dataclass
class SmokeTaskConfig:
    data_dir: str = "data/smoke"  # directory of token shards
    out: str = "data/smoke_task"  # directory for train.tsv and val.tsv
    examples: int = 8000  # per file, at most
    seed: int = 17  # decides which windows, and which words are replaced


def windows(data_dir, split):
    """(n, WINDOW) int64 array: every whole window of a split's documents."""
    samples = Samples(data_dir, split, WINDOW + 2, chunk=True)  # + [CLS] and [SEP]
    shard, start, length = samples.locate(np.arange(len(samples)))
    whole = length == WINDOW
    rows = [samples.shards[s].tokens[i : i + WINDOW] for s, i in zip(shard[whole].tolist(), start[whole].tolist())]
    return np.array(rows, np.int64).reshape(-1, WINDOW)


@command
def main(argv):
    cfg = load_config(SmokeTaskConfig, argv)
    tokenizer, special = load_tokenizer(os.path.join(cfg.data_dir, "tokenizer.json"))
    rng, seen = np.random.default_rng(cfg.seed), set()
    os.makedirs(cfg.out, exist_ok=True)
    for split in ("train", "val"):
        tokens = rng.permutation(windows(cfg.data_dir, split))[: cfg.examples]
        if len(tokens) < 2:
            raise UserError(f"{cfg.data_dir}: no {split} documents of {WINDOW} tokens (prepare more text)")
        replaced = np.arange(len(tokens)) % 2 == 1
        for i in np.flatnonzero(replaced):
            positions = rng.choice(WINDOW, REPLACED, replace=False)
            tokens[i, positions] = rng.integers(len(special), tokenizer.get_vocab_size(), REPLACED)
        texts = [" ".join(text.split()) for text in tokenizer.decode_batch(tokens.tolist())]
        rows = [(text, changed) for text, changed in zip(texts, replaced) if text not in seen]  # val: none of train's
        seen.update(texts)
        with open(os.path.join(cfg.out, f"{split}.tsv"), "w", encoding="utf-8") as file:
            file.write("text\tlabel\n")
            file.writelines(f"{text}\t{'replaced' if changed else 'genuine'}\n" for text, changed in rows)
        print(f"{cfg.out}/{split}.tsv: {len(rows):,} texts, half of them with {REPLACED} of {WINDOW} tokens replaced")


if __name__ == "__main__":
    main()
