"""Labelled texts as tokens, and batches of them.

Read next: finetune_glue.py
"""

from dataclasses import dataclass

import numpy as np
import torch

from common.batch import Batch, pack, round_up
from common.vocabulary import join_texts, plain_blanks


@dataclass
class Encoded:
    """Tokenized examples, end to end, without padding."""

    ids: np.ndarray  # (num_tokens,) int32
    types: np.ndarray  # (num_tokens,) int32: 1 in the second text and its [SEP]
    starts: np.ndarray  # (n,) int64
    lengths: np.ndarray  # (n,) int64
    labels: np.ndarray | None
    index: list | range  # of their rows in the file

    def batch(self, which, device):
        """The Batch of examples `which`, an int64 array."""
        lengths = self.lengths[which]
        cu_seqlens, windows = pack(lengths, int(lengths.max()))
        index = np.repeat(self.starts[which] - cu_seqlens[:-1], lengths) + np.arange(cu_seqlens[-1])
        multiple = 64 if len(index) < 2048 else 256  # whole tiles, and few shapes
        padding = np.zeros(round_up(len(index), multiple) - len(index), np.int32)  # belongs to no example: any id
        batch = Batch(
            input_ids=torch.from_numpy(np.concatenate([self.ids[index], padding])),
            cu_seqlens=torch.from_numpy(cu_seqlens),
            max_seqlen=int(lengths.max()),
            windows=None if windows is None else torch.from_numpy(windows),
            token_type_ids=torch.from_numpy(np.concatenate([self.types[index], padding])),
            labels=None if self.labels is None else torch.from_numpy(self.labels[which]),
        )
        return batch.pinned_for(device).to(device)


def encode(examples, tokenizer, limit, name, unknown):
    """Encoded examples: [CLS] text [SEP], or two texts joined by join_texts; the longer text is truncated first.

    name: of the examples, to report how many were truncated to `limit` tokens, and how many hold `unknown`, [UNK]'s id.
    """
    join_texts(tokenizer)
    tokenizer.enable_truncation(limit, strategy="longest_first")
    ids, types, truncated, with_unknown = [], [], 0, 0
    for start in range(0, len(examples.texts), 10_000):  # the library's results take a hundred bytes per token
        texts = [tuple(map(plain_blanks, text)) for text in examples.texts[start : start + 10_000]]
        texts = [text if len(text) == 2 else text[0] for text in texts]
        for encoding in tokenizer.encode_batch_fast(texts):
            ids.append(np.array(encoding.ids, np.int32))
            types.append(np.array(encoding.type_ids, np.int32))
            truncated += bool(encoding.overflowing)
            with_unknown += unknown in encoding.ids
    if truncated:
        are = f"{truncated:,} of {len(ids):,} {'is' if truncated == 1 else 'are'}"
        print(f"{name}: {are} longer than {limit} tokens, and truncated (--max_length, in training)", flush=True)
    if with_unknown:
        have = f"{with_unknown:,} of {len(ids):,} {'has' if with_unknown == 1 else 'have'}"
        print(f"{name}: {have} words that are not in the vocabulary: the model sees [UNK]", flush=True)
    lengths = np.array([len(row) for row in ids])
    starts, index = np.cumsum(lengths) - lengths, range(len(ids)) if examples.index is None else examples.index
    return Encoded(np.concatenate(ids), np.concatenate(types), starts, lengths, examples.labels, index)
