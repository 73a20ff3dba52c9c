"""Compare models with different vocabularies: bits per byte of the same masked words.

    python -m tools.bits_per_byte --checkpoints=out/own,out/bert --files=held_out.jsonl

Losses per token are not comparable across vocabularies. Here every model reads the same passages with the same
whole words masked: each token of a masked word becomes [MASK], and the model pays for all of them. The score is the sum
of -log2 p over the UTF-8 bytes of the masked words. A hash of the text, which is composed (NFC), chooses the words.

Read next: checkpoint.py, for the models it reads
"""

import math
import re
import sys
import unicodedata
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

import checkpoint
import kernels
from common.batch import Batch, pack
from common.hashes import text_hash
from common.options import UserError, command, load_config
from common.sources import documents, list_segments
from common.vocabulary import is_blank, load_tokenizer
from data import hash64
from model import MAX_POSITIONS

BATCH_PASSAGES = 64
MARKS = "".join(c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c)[0] == "M")  # accents, vowel signs
WORD = re.compile(rf"[\w{MARKS}]+")  # letters with their marks, digits and underscores: masked as a whole


@dataclass
class BitsConfig:
    checkpoints: str = ""  # comma-separated runs or step_* directories
    files: str = ""  # text that no model was trained on: files, directories, globs, as for prepare_c4.py --source
    text_key: str = "text"  # JSON key or column that holds the text
    doc_sep: Literal["line", "blank", "file"] = "line"  # a .txt holds a document per line, per paragraph, or only one
    words: int = 64  # words per passage
    max_tokens: int = 128  # passages that take any model more tokens, with [CLS] and [SEP], are left out for all
    mask_prob: float = 0.15  # share of words to mask
    skip_bad_lines: int = 0  # unreadable lines to skip before it is an error
    split: str = ""  # comma-separated words to show as each tokenizer splits them


class Reader:
    """A model with its tokenizer, and its score so far."""

    def __init__(self, path, device):
        self.path, self.device, self.bits, self.tokens = path, device, 0.0, 0
        config, tensors, tokenizer_text = checkpoint.load(path)
        self.tokenizer, self.special = load_tokenizer(path, tokenizer_text, literal=True)
        self.model = checkpoint.make_masked_lm(config, tensors, path).to(device)

    def read(self, text, words):
        """(ids, owners, unfit) of [CLS] text [SEP]: token ids, the index of each token's word or -1, words to leave out.

        Unfit words have no token of their own, share a token with other text, or are hidden by [UNK].
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
    def score(self, passages):
        """Add the bits of the masked tokens. passages: a list of (ids, masked), each two arrays of one length."""
        lengths = np.array([len(ids) for ids, _ in passages])
        cu_seqlens, _ = pack(lengths, int(lengths.max()))
        ids = torch.from_numpy(np.concatenate([ids for ids, _ in passages])).int()
        rows = torch.from_numpy(np.flatnonzero(np.concatenate([masked for _, masked in passages])))
        batch = Batch(
            input_ids=ids.index_fill(0, rows, self.special["[MASK]"]),
            cu_seqlens=torch.from_numpy(cu_seqlens),
            max_seqlen=int(lengths.max()),
            windows=None,
            masked_positions=rows,
            labels=ids[rows].long(),
        ).to(self.device)
        logits = self.model.masked_logits(batch)[:, : self.model.vocab_size]
        self.bits += F.cross_entropy(logits.float(), batch.labels, reduction="sum").item() / math.log(2)
        self.tokens += len(rows)


def text_passages(cfg, stats):
    """(text, [(start, end) of each word]) with cfg.words words each. stats counts the rest: a document's last words."""
    for segment in list_segments(cfg.files, cfg.doc_sep):
        for text in documents(segment, cfg, stats):
            if is_blank(text):  # no document for prepare_c4.py either
                continue
            text = unicodedata.normalize("NFC", text)
            words = [match.span() for match in WORD.finditer(text)]
            stats["documents"] += 1
            stats["words read"] += len(words)
            stats["short documents"] += len(words) < cfg.words
            stats["words outside"] += len(words) % cfg.words
            for i in range(0, len(words) - cfg.words + 1, cfg.words):
                start, end = words[i][0], words[i + cfg.words - 1][1]
                yield text[start:end], [(a - start, b - start) for a, b in words[i : i + cfg.words]]


def choose_words(text, count, mask_prob):
    """Indices of the words to mask among a passage's `count`, by a hash of the text and the index."""
    return np.flatnonzero(hash64(text_hash(text), np.arange(count)) < np.uint64(mask_prob * 2**64)).tolist()


def compare(cfg, readers):
    """Score every reader on the same words. Returns counts: words, bytes, passages, and what was left out."""
    counts, waiting = Counter(), []

    def flush():
        for i, reader in enumerate(readers):
            if waiting:
                reader.score([of_readers[i] for of_readers in waiting])
        waiting.clear()

    for text, words in text_passages(cfg, counts):
        read = [reader.read(text, words) for reader in readers]
        if max(len(ids) for ids, _, _ in read) > cfg.max_tokens:
            counts["passages left out"] += 1
            continue
        chosen = choose_words(text, len(words), cfg.mask_prob)
        fit = [word for word in chosen if not any(word in unfit for _, _, unfit in read)]
        counts["words left out"] += len(chosen) - len(fit)
        if not fit:
            counts["passages without"] += 1
            continue
        counts["passages"] += 1
        counts["words"] += len(fit)
        counts["bytes"] += sum(len(text[words[word][0] : words[word][1]].encode()) for word in fit)
        waiting.append([(ids, np.isin(owners, fit)) for ids, owners, _ in read])
        if len(waiting) == BATCH_PASSAGES:
            flush()
    flush()
    return counts


@command
def main(argv):
    cfg = load_config(BitsConfig, argv)
    for name in ("checkpoints", "files"):
        if not getattr(cfg, name):
            raise UserError(f"--{name}: not given (--help lists the options)")
    if not cfg.split.isprintable():
        raise UserError(f"split={cfg.split!a}: has characters that are not text, such as bytes outside UTF-8")
    if cfg.words < 1 or not 0 < cfg.mask_prob < 1:
        raise UserError(f"words={cfg.words}, mask_prob={cfg.mask_prob}: must be at least 1, and between 0 and 1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kernels.set_backend("torch")  # float32 and any head size; speed doesn't matter here
    readers = [Reader(path.strip(), device) for path in cfg.checkpoints.split(",")]
    for reader in readers:
        if reader.model.cfg.model == "bert" and cfg.max_tokens > MAX_POSITIONS:
            raise UserError(f"max_tokens={cfg.max_tokens}: {reader.path} is a BERT with {MAX_POSITIONS} positions")
    counts = compare(cfg, readers)
    if not counts["words"]:
        hint = f"try --words={cfg.words // 4}" if cfg.words >= 4 else "words are what blanks and punctuation separate"
        raise UserError(f"{cfg.files}: no passage of {cfg.words} words that all models can read ({hint})")
    short, unscored = counts["short documents"], counts["passages without"]
    print(
        f"{counts['documents']:,} documents, {counts['words read']:,} words: {counts['words outside']:,} fill no passage "
        f"({short:,} documents have fewer than {cfg.words}), {unscored:,} passages have no word to score"
    )
    print(
        f"{counts['words']:,} masked words, {counts['bytes']:,} bytes, in {counts['passages']:,} passages of {cfg.words} words "
        f"({counts['words left out']:,} words and {counts['passages left out']:,} passages left out, {counts['bad lines']:,} bad lines skipped)"
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
