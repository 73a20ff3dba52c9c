"""Tokenizers: read or train one, and turn texts into token ids.

Read next: prepare_c4.py, which writes the ids to shards
"""

import os
import re

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from common.options import UserError

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PART_CHARS = 2**20  # longer texts are tokenized in parts: 50 MB at once would take gigabytes
MIN_ALPHABET = 1000  # characters that a new vocabulary covers, at least
ALPHABET_COVERAGE = 0.9999  # share of the text's characters to cover, as far as half the entries allow
# WordPiece turns such words into [UNK] anyway, and training is quadratic in their length: minutes for a million letters,
# such as an image in base64.
LONG_WORD = Regex("^.{101,}$")
SPACE = re.compile(r"[ \t\n\r]")  # where every BERT tokenizer splits; its normalizer removes \f and \x85


# ---------------------------------------------------------------------------------------------------------------------
# Reading and training


def wordpiece(cased, vocab=None):
    """BERT's tokenizer, with a vocabulary {entry: id} or untrained."""
    tokenizer = Tokenizer(models.WordPiece(vocab or {}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=not cased)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece("##")
    return tokenizer


def finish(tokenizer):
    """Register the special tokens, and put [CLS] and [SEP] around texts. The tokens must have ids by now."""
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    ids = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ids)


def train_tokenizer(texts, size, cased):
    """The contents of a tokenizer.json with a new WordPiece vocabulary of `size` entries.

    texts: a function that returns an iterator over the text; it is called twice. Training is not deterministic.
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
    """How many characters a vocabulary of `size` entries should cover: thousands for Chinese, else MIN_ALPHABET."""
    counts = np.zeros(0x110000, np.int64)
    for text in texts:
        characters = np.frombuffer(text.lower().encode("utf-32-le", "surrogatepass"), np.uint32)
        found, times = np.unique(characters, return_counts=True)
        counts[found] += times
    most_frequent = np.sort(counts)[::-1].cumsum()
    needed = int(np.searchsorted(most_frequent, ALPHABET_COVERAGE * most_frequent[-1])) + 1
    return max(MIN_ALPHABET, min(needed, size // 2))


def read_tokenizer(name, cased=False):
    """The contents of a tokenizer.json. name: such a file, its directory, a BERT vocab.txt, or a hub id.

    Raises: UserError.
    """
    if os.path.isdir(name):  # shards, a checkpoint or a model
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
        raise UserError(f"{name}: {reason} (expected a vocabulary, one entry per line)") from None
    vocab = {entry: i for i, entry in enumerate(entries)}
    if len(vocab) < len(entries):
        line = next(i for i, entry in enumerate(entries) if vocab[entry] != i) + 1
        raise UserError(f"{name}:{line}: {entries[line - 1]!r} is listed twice (an entry has one id)")
    for token in SPECIAL_TOKENS:
        if token not in vocab:
            raise UserError(f"{name}: has no {token} token (a BERT-style vocabulary is needed)")
    tokenizer = wordpiece(cased, vocab)
    finish(tokenizer)
    return tokenizer.to_str(pretty=True)


# ---------------------------------------------------------------------------------------------------------------------
# Using


def load_tokenizer(path, text=None):
    """(tokenizers.Tokenizer without truncation or padding, ids of the special tokens: {"[MASK]": 103, ...}).

    text: the contents of the file, if already read. Raises: UserError for anything but a tokenizer with BERT's special
    tokens.
    """
    if text is None and not os.path.isfile(path):
        raise UserError(f"{path}: no such tokenizer (expected a tokenizer.json)")
    try:
        tokenizer = Tokenizer.from_file(path) if text is None else Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{path}: not a tokenizer: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    special = {name: tokenizer.token_to_id(name) for name in SPECIAL_TOKENS}
    for name, token in special.items():
        if token is None:
            raise UserError(f"{path}: has no {name} token (a BERT-style vocabulary is needed)")
    return tokenizer, special


def encode(tokenizer, texts, max_doc_tokens=0):
    """(the part of each text that was read, its token ids): two lists.

    With max_doc_tokens only the beginning of a text is read, enough for that many ids. It ends at white space, where
    BERT's tokenizers split anyway, and grows until it yields enough tokens: one takes 4 characters on average in English.
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
    """A list of token ids for each text."""
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
    """The text up to the first white space at or after `chars` characters."""
    space = SPACE.search(text, chars)
    return text[: space.start()] if space else text
