"""Compare models with different vocabularies: bits per byte of the same masked words.

    python bits_per_byte.py --checkpoints=out/own,out/bert --files=held_out.jsonl

A loss per token says nothing across vocabularies, as the tokens differ. Here every model reads the same stretches of
text with the same whole words masked, every token of a masked word becoming [MASK], and is charged for all of a word's
tokens: the sum of -log2 p, over the words' bytes in UTF-8. Which words are masked follows from a hash of the text alone.

Read next: README.md, "A vocabulary of your own"
"""

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from tools import convert_hf
import kernels
from common.options import UserError, command, load_config
from common.vocabulary import load_tokenizer
from data import hash64
from model import MAX_POSITIONS, make_masked_lm
from prepare_c4 import text_hash
from common.sources import documents, list_pieces

STRETCHES_AT_ONCE = 64
WORD = re.compile(r"\w+")  # of letters, digits and underscores: what is masked as a whole


@dataclass
class BitsConfig:
    checkpoints: str = ""  # runs, step_* directories, or models in Hugging Face form, comma-separated
    files: str = ""  # text that no model was trained on: files, directories, globs, as for prepare_c4.py --source
    text_key: str = "text"  # which value of a JSON object, or which column, is the text
    doc_sep: Literal["line", "blank", "file"] = "line"  # of .txt: a document is a line, a paragraph, or the whole file
    words: int = 64  # words in a stretch of text that a model reads at once
    max_tokens: int = 128  # stretches that take a model more tokens, [CLS] and [SEP] included, are left out for all
    mask_prob: float = 0.15  # share of words to mask
    skip_bad_lines: int = 0  # lines that may be left out because they cannot be read
    split: str = ""  # words to show as each tokenizer splits them, comma-separated


class Reader:
    """A model with its tokenizer, and what it has been charged."""

    def __init__(self, path, device):
        self.path, self.device, self.bits, self.tokens = path, device, 0.0, 0
        config, tensors, tokenizer_text = convert_hf.read_model(path)
        self.tokenizer, self.special = load_tokenizer(path, tokenizer_text)
        self.model = make_masked_lm(config, tensors, path).to(device)

    def read(self, text, words):
        """(ids, owners, unfit) of [CLS] text [SEP]: token ids; for each, the number of its word or -1; words to leave out.

        Unfit are words that have no token of their own, that share one with other text, or that an [UNK] hides.
        """
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        ids = np.array([self.special["[CLS]"], *encoding.ids, self.special["[SEP]"]])
        begins, ends = np.array([(0, 0), *encoding.offsets, (0, 0)]).T
        word_begins, word_ends = np.array(words).T
        last = np.maximum(np.searchsorted(word_begins, ends, side="left") - 1, 0)  # the last word that a token touches
        touches = (ends > begins) & (begins < word_ends[last])
        owners = np.where(touches, last, -1)
        shared = touches & ((begins < word_begins[last]) | (ends > word_ends[last]) | (ids == self.special["[UNK]"]))
        return ids, owners, set(owners[shared].tolist()) | (set(range(len(words))) - set(owners.tolist()))

    @torch.no_grad()
    def charge(self, batch):
        """Add the bits of masked tokens. batch: [(ids, masked)] of equally many stretches, arrays of one length each."""
        lengths = torch.tensor([len(ids) for ids, _ in batch], device=self.device)
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        ids = torch.tensor(np.concatenate([ids for ids, _ in batch]), device=self.device)
        rows = torch.tensor(np.flatnonzero(np.concatenate([masked for _, masked in batch])), device=self.device)
        inputs = ids.index_fill(0, rows, self.special["[MASK]"])
        logits = self.model.masked_logits(inputs, cu_seqlens, int(lengths.max()), rows)[:, : self.model.vocab_size]
        self.bits += torch.nn.functional.cross_entropy(logits.float(), ids[rows], reduction="sum").item() / math.log(2)
        self.tokens += len(rows)


def stretches(cfg):
    """(text, [(start, end) of each word]) of cfg.words words each; what is left at a document's end is left out."""
    for piece in list_pieces(cfg.files, cfg.doc_sep):
        for text in documents(piece, cfg, Counter()):
            words = [match.span() for match in WORD.finditer(text)]
            for i in range(0, len(words) - cfg.words + 1, cfg.words):
                start, end = words[i][0], words[i + cfg.words - 1][1]
                yield text[start:end], [(a - start, b - start) for a, b in words[i : i + cfg.words]]


def chosen_words(text, count, mask_prob):
    """The numbers of the words to mask of a stretch's `count`: a hash of the text and of the number decides."""
    return np.flatnonzero(hash64(text_hash(text), np.arange(count)) < np.uint64(mask_prob * 2**64)).tolist()


def compare(cfg, readers):
    """Charge every reader for the same words. Returns counts: words, bytes, stretches, and what was left out."""
    counts, waiting = Counter(), []

    def flush():
        for i, reader in enumerate(readers):
            if waiting:
                reader.charge([of_readers[i] for of_readers in waiting])
        waiting.clear()

    for text, words in stretches(cfg):
        read = [reader.read(text, words) for reader in readers]
        if max(len(ids) for ids, _, _ in read) > cfg.max_tokens:
            counts["stretches left out"] += 1
            continue
        chosen = chosen_words(text, len(words), cfg.mask_prob)
        fit = [word for word in chosen if not any(word in unfit for _, _, unfit in read)]
        counts["words left out"] += len(chosen) - len(fit)
        if not fit:
            continue
        counts["stretches"] += 1
        counts["words"] += len(fit)
        counts["bytes"] += sum(len(text[words[word][0] : words[word][1]].encode()) for word in fit)
        waiting.append([(ids, np.isin(owners, fit)) for ids, owners, _ in read])
        if len(waiting) == STRETCHES_AT_ONCE:
            flush()
    flush()
    return counts


@command
def main(argv):
    cfg = load_config(BitsConfig, argv)
    for name in ("checkpoints", "files"):
        if not getattr(cfg, name):
            raise UserError(f"--{name}: not given (--help lists the options)")
    if cfg.words < 1 or not 0 < cfg.mask_prob < 1:
        raise UserError(f"words={cfg.words}, mask_prob={cfg.mask_prob}: at least 1, and between 0 and 1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kernels.set_backend("torch")  # float32 and any head size; the kernels' speed is not needed here
    readers = [Reader(path.strip(), device) for path in cfg.checkpoints.split(",")]
    for reader in readers:
        if reader.model.cfg.model == "bert" and cfg.max_tokens > MAX_POSITIONS:
            raise UserError(f"max_tokens={cfg.max_tokens}: {reader.path} is a BERT of {MAX_POSITIONS} positions")
    counts = compare(cfg, readers)
    if not counts["words"]:
        raise UserError(f"{cfg.files}: no stretch of {cfg.words} words that all models can read (try --words=16)")
    print(
        f"{counts['words']:,} masked words, {counts['bytes']:,} bytes, in {counts['stretches']:,} stretches of {cfg.words} words "
        f"({counts['words left out']:,} words and {counts['stretches left out']:,} stretches left out)"
    )
    for reader in readers:
        print(
            f"{reader.bits / counts['bytes']:.3f} bits per byte, {reader.bits / counts['words']:.2f} bits and "
            f"{reader.tokens / counts['words']:.2f} tokens a word: {reader.path}"
        )
        for word in filter(None, cfg.split.split(",")):
            print(f"    {word}: {' '.join(reader.tokenizer.encode(word, add_special_tokens=False).tokens)}")


if __name__ == "__main__":
    main()
