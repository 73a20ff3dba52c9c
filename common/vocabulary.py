"""Tokenizers: read one in any of its forms, train one, and turn texts into token ids.

Read next: prepare_c4.py, which puts the ids into shards
"""

import os
import re

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from common.options import UserError

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PART_CHARS = 2**20  # a longer text is tokenized in parts, or one of 50 MB would take gigabytes
MIN_ALPHABET = 1000  # characters that a new vocabulary has room for, at least
ALPHABET_COVERAGE = 0.9999  # share of a text's characters that a new vocabulary knows, if half its entries suffice
# WordPiece makes [UNK] of such words in any case, and training takes the square of their length: minutes for a million
# letters, as of a picture in base64.
LONG_WORD = Regex("^.{101,}$")
SPACE = re.compile(r"[ \t\n\r]")  # where every BERT tokenizer splits; its normalizer removes \f and \x85


# ---------------------------------------------------------------------------------------------------------------------
# Making and reading


def wordpiece(cased, vocab=None):
    """BERT's tokenizer with a vocabulary {entry: id}, or one yet to be trained."""
    tokenizer = Tokenizer(models.WordPiece(vocab or {}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=not cased)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece("##")
    return tokenizer


def finish(tokenizer):
    """Tell the tokenizer of its special tokens, once they have ids."""
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    ids = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ids)


def train_tokenizer(texts, size, cased):
    """The contents of a tokenizer.json with a new WordPiece vocabulary of `size` entries.

    texts: a function that gives an iterator over the text; it is gone through twice. Training is not deterministic:
    keep the result.
    """
    tokenizer = wordpiece(cased)
    words = tokenizer.pre_tokenizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.Split(LONG_WORD, "removed")])
    trainer = trainers.WordPieceTrainer(
        vocab_size=size, min_frequency=2, limit_alphabet=alphabet_size(texts(), size), special_tokens=SPECIAL_TOKENS,
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.pre_tokenizer = words
    finish(tokenizer)
    return tokenizer.to_str(pretty=True)


def alphabet_size(texts, size):
    """How many characters a vocabulary of `size` entries is to know: thousands for Chinese, else MIN_ALPHABET."""
    counts = np.zeros(0x110000, np.int64)
    for text in texts:
        characters = np.frombuffer(text.lower().encode("utf-32-le", "surrogatepass"), np.uint32)
        found, times = np.unique(characters, return_counts=True)
        counts[found] += times
    most_frequent = np.sort(counts)[::-1].cumsum()
    needed = int(np.searchsorted(most_frequent, ALPHABET_COVERAGE * most_frequent[-1])) + 1
    return max(MIN_ALPHABET, min(needed, size // 2))


def read_tokenizer(name, cased=False):
    """The contents of a tokenizer.json: of that file or directory, made from a BERT vocab.txt, or from the hub.

    Raises: UserError.
    """
    if os.path.isdir(name):  # of shards, a checkpoint or a model: nothing to ask the hub for
        name = os.path.join(name, "tokenizer.json")
    if name.endswith(".json"):
        load_tokenizer(name)
        with open(name, encoding="utf-8") as file:
            return file.read()
    if not name.endswith(".txt"):
        try:
            return Tokenizer.from_pretrained(name).to_str(pretty=True)
        except Exception as error:  # the library raises plain Exception
            reason = f"{error}".partition("\n")[0][:200]
            raise UserError(f"{name}: no such tokenizer: {reason} (a tokenizer.json, vocab.txt or hub id)") from None
    try:
        with open(name, encoding="utf-8", newline="\n") as file:
            entries = [line.rstrip("\r\n") for line in file]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{name}: {reason} (expected a vocabulary, one entry a line)") from None
    vocab = {entry: i for i, entry in enumerate(entries)}
    if len(vocab) < len(entries):
        line = next(i for i, entry in enumerate(entries) if vocab[entry] != i) + 1
        raise UserError(f"{name}:{line}: {entries[line - 1]!r} is there twice (an entry has one id)")
    for token in SPECIAL_TOKENS:
        if token not in vocab:
            raise UserError(f"{name}: has no {token} token (a BERT-style vocabulary is needed)")
    tokenizer = wordpiece(cased, vocab)
    finish(tokenizer)
    return tokenizer.to_str(pretty=True)


# ---------------------------------------------------------------------------------------------------------------------
# Using


def load_tokenizer(path, text=None):
    """A tokenizers.Tokenizer without truncation or padding, and the ids this project needs: {"[MASK]": 103, ...}.

    text: the contents of the file, where they are known. Raises: UserError when they are no tokenizer or lack one of
    BERT's special tokens.
    """
    if text is None and not os.path.isfile(path):
        raise UserError(f"{path}: no such tokenizer (expected a tokenizer.json)")
    try:
        tokenizer = Tokenizer.from_file(path) if text is None else Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{path}: not a tokenizer: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    special = {name: tokenizer.token_to_id(name) for name in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")}
    for name, token in special.items():
        if token is None:
            raise UserError(f"{path}: has no {name} token (a BERT-style vocabulary is needed)")
    return tokenizer, special


def encode(tokenizer, texts, max_doc_tokens=0):
    """(what of each text was read, its token ids, a list). With max_doc_tokens, at least that many ids if there are.

    Then only a beginning of each text is tokenized: cut at white space, where BERT's tokenizers split in any case, and
    longer if it did not give tokens enough. A token is one character at least, and 4 on average in English.
    """
    if not max_doc_tokens:
        return texts, encode_whole(tokenizer, texts)
    chars = 6 * max_doc_tokens + 64
    read = [beginning(text, chars) for text in texts]
    ids = encode_whole(tokenizer, read)
    for i, text in enumerate(texts):
        longer = chars
        while len(ids[i]) < max_doc_tokens and len(read[i]) < len(text):
            longer *= 4
            read[i] = beginning(text, longer)
            ids[i] = encode_whole(tokenizer, [read[i]])[0]
    return read, ids


def encode_whole(tokenizer, texts):
    """The token ids of each text, a list."""
    parts, owners = [], []
    for owner, text in enumerate(texts):
        while len(text) > PART_CHARS:
            part = beginning(text, PART_CHARS)
            parts.append(part)
            owners.append(owner)
            text = text[len(part) :]
        parts.append(text)
        owners.append(owner)
    ids = [[] for _ in texts]
    for owner, encoding in zip(owners, tokenizer.encode_batch_fast(parts, add_special_tokens=False)):
        ids[owner] = ids[owner] + encoding.ids if ids[owner] else encoding.ids
    return ids


def beginning(text, chars):
    """The text up to white space at or after `chars` characters."""
    space = SPACE.search(text, chars)
    return text[: space.start()] if space else text
