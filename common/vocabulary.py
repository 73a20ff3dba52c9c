"""Tokenizers: read or train one, and turn texts into token ids.

Read next: prepare_c4.py, which writes the ids to shards
"""

import collections
import itertools
import os
import re
import unicodedata

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from common.files import read_json
from common.options import UserError, similar

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PART_CHARS = 2**20  # longer texts are tokenized in parts: 50 MB at once would take gigabytes
WORD_CHARS = 2**20  # a part may end inside a word longer than this
MIN_ALPHABET = 1000  # characters that a new vocabulary covers, at least
ALPHABET_COVERAGE = 0.9999  # share of the text's characters to cover, as far as half the entries allow
# WordPiece turns words above 100 characters into [UNK]. A new vocabulary's tokenizer cuts them instead.
CUT_WORDS = pre_tokenizers.FixedLength(length=100)
# It does not learn from them if they are few, such as images in base64. In text without blanks, such as Thai or DNA, they
# are the text. Training then takes 60 bytes a character, so it reads at most UNSPACED_CHARS.
DROP_WORDS = pre_tokenizers.Split(Regex("^.{101,}$"), "removed")
UNSPACED_WORD, UNSPACED_SHARE, UNSPACED_CHARS = 32, 0.1, 50 * 10**6
SPACE = re.compile(r"[ \t\n\r]")  # where every BERT tokenizer splits; its normalizer removes \f and \x85
HUB_ID = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")  # [owner/]name
# Their tokenizers read a vocab.txt as BERT's does.
BERT_CLASSES = {"BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer", "PreTrainedTokenizer", "TokenizersBackend"}


# ---------------------------------------------------------------------------------------------------------------------
# Reading and training


def wordpiece(cased, vocab=None, strip_accents=None, split_chinese=True):
    """BERT's tokenizer, with a vocabulary {entry: id} or untrained. strip_accents: None is BERT's rule, unless cased."""
    tokenizer = Tokenizer(models.WordPiece(vocab or {}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(True, split_chinese, strip_accents, lowercase=not cased)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece("##")
    return tokenizer


def finish(tokenizer):
    """Register the special tokens, and put [CLS] and [SEP] around texts. The tokens must have ids by now."""
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    ids = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ids)


def train_tokenizer(texts, size, cased, strip_accents=False):
    """The contents of a tokenizer.json with a new WordPiece vocabulary of `size` entries; prints what came out.

    texts: a function that returns an iterator over the text; it is called twice. Training is not deterministic.
    """
    chars = unspaced = 0

    def counted():
        nonlocal chars, unspaced
        for part in (part for text in texts() for part in parts(text)):
            chars += len(part)
            unspaced += sum(len(word) for word in part.split() if len(word) > UNSPACED_WORD)
            yield part

    tokenizer = wordpiece(cased, strip_accents=strip_accents)
    words, alphabet = tokenizer.pre_tokenizer, alphabet_size(counted(), size)
    learn_long = unspaced > UNSPACED_SHARE * chars
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, CUT_WORDS if learn_long else DROP_WORDS])
    step = 1 + unspaced // UNSPACED_CHARS if learn_long else 1
    trainer = trainers.WordPieceTrainer(
        vocab_size=size, min_frequency=2, limit_alphabet=alphabet, special_tokens=SPECIAL_TOKENS, show_progress=False
    )
    all_parts = (part for text in texts() for part in parts(text))
    tokenizer.train_from_iterator(itertools.islice(all_parts, 0, None, step), trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, CUT_WORDS])
    finish(tokenizer)
    print(describe_vocabulary(tokenizer.get_vocab(), size))
    return tokenizer.to_str(pretty=True)


def describe_vocabulary(vocab, size):
    """One line: how many entries a new vocabulary has, and why not `size`."""
    single = sum(len(entry.removeprefix("##")) == 1 for entry in vocab)
    text = f"trained a vocabulary of {len(vocab):,} entries, {single:,} of them single characters"
    if len(vocab) > size:
        return f"{text}: more than the {size:,} asked for, as every character gets one, and another one inside words"
    if len(vocab) < size:
        return f"{text}: fewer than the {size:,} asked for, as the text has no more pieces that occur twice"
    return text


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


def read_tokenizer(name, cased=False, beside=False):
    """The contents of a tokenizer.json. name: such a file, its directory, a BERT vocab.txt, or a hub id.

    beside: follow the tokenizer_config.json beside a vocab.txt, and refuse one that contradicts a tokenizer.json.
    Raises: UserError.
    """
    if os.path.isdir(name):  # shards, a checkpoint or a model
        name = os.path.join(name, "tokenizer.json")
    if name.endswith(".json"):
        tokenizer, _ = load_tokenizer(name)
        if beside:
            check_settings(name, tokenizer)
        with open(name, encoding="utf-8") as file:
            return file.read()
    if not name.endswith(".txt"):
        if not HUB_ID.fullmatch(name):
            near = similar(name)
            hint = f"did you mean {near}?" if near else "a tokenizer.json or its directory, a vocab.txt, or a hub id"
            raise UserError(f"{name}: no such tokenizer ({hint})")
        return hub_tokenizer(name)
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
    tokenizer = wordpiece(vocab=vocab, **(bert_settings(name, cased, vocab) if beside else {"cased": cased}))
    finish(tokenizer)
    return tokenizer.to_str(pretty=True)


def hub_tokenizer(name):
    """The contents of a tokenizer.json of the hub: the newest, or without a connection the copy downloaded before."""
    from huggingface_hub import HfApi, hf_hub_download

    reason = ""
    try:
        HfApi().model_info(name, timeout=10)  # one request; a download would retry for half a minute
    except Exception as error:  # whatever the hub's library and the network below it raise
        reason = f"{type(error).__name__}: {error}"
    try:
        path = hf_hub_download(name, "tokenizer.json", local_files_only=bool(reason))
        return Tokenizer.from_file(path).to_str(pretty=True)
    except Exception as error:
        reason = (reason or f"{type(error).__name__}: {error}").partition("\n")[0][:200]
        hint = "--tokenizer=FILE takes a tokenizer.json or vocab.txt; --train_tokenizer=30000 makes one from your text"
        raise UserError(f"{name}: no such file, and cannot be read from the hub: {reason} ({hint})") from None


def settings_beside(name):
    """The path and contents of the tokenizer_config.json beside a tokenizer's file, {} if there is none."""
    path = os.path.join(os.path.dirname(name), "tokenizer_config.json")
    settings = read_json(path, "fix or remove it") if os.path.exists(path) else {}
    return path, {setting: value for setting, value in settings.items() if value is not None}


def bert_settings(name, cased, vocab):
    """The arguments of `wordpiece` for a vocab.txt: from the tokenizer_config.json beside it, else `cased`.

    Raises: UserError for settings that this project does not follow.
    """
    path, settings = settings_beside(name)
    lowercase = settings.get("do_lower_case", not cased)
    added = [entry["content"] for entry in settings.get("added_tokens_decoder", {}).values()]
    added_path = os.path.join(os.path.dirname(name), "added_tokens.json")
    if os.path.exists(added_path):
        added += read_json(added_path, "fix or remove it")
    missing = [entry for entry in added if entry not in vocab]
    if missing:
        raise UserError(f"{name}: has no {missing[0]!r}, a token that the files beside it add (give a tokenizer.json)")
    if settings.get("tokenizer_class", "BertTokenizer").removesuffix("Fast") not in BERT_CLASSES:
        reason = f"tokenizer_class is {settings['tokenizer_class']}"
        raise UserError(f"{path}: {reason} (of a vocab.txt, only BERT's tokenizer is supported)")
    if not settings.get("do_basic_tokenize", True):
        raise UserError(f"{path}: do_basic_tokenize is false (not supported; give a tokenizer.json)")
    if cased and lowercase:
        raise UserError(f"{path}: says do_lower_case, but --cased=true was given (leave it out, or change the file)")
    return {
        "cased": not lowercase,
        "strip_accents": settings.get("strip_accents"),
        "split_chinese": settings.get("tokenize_chinese_chars", True),
    }


def check_settings(name, tokenizer):
    """Raises: UserError if the tokenizer_config.json beside a tokenizer.json contradicts it; transformers follows either."""
    path, settings = settings_beside(name)
    normalizer = tokenizer.normalizer
    if not isinstance(normalizer, normalizers.BertNormalizer):
        return
    strip_accents = normalizer.strip_accents if normalizer.strip_accents is not None else normalizer.lowercase
    for setting, value in (
        ("do_lower_case", normalizer.lowercase),
        ("strip_accents", strip_accents),
        ("tokenize_chinese_chars", normalizer.handle_chinese_chars),
    ):
        if settings.get(setting) not in (None, value):
            raise UserError(f"{path}: {setting} is {settings[setting]}, but {name} does otherwise (change one of them)")


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
    ids, size = sorted(tokenizer.get_vocab().values()), tokenizer.get_vocab_size()
    if ids != list(range(size)):
        reason = f"its {size:,} entries have ids up to {ids[-1]:,}, or share some"
        raise UserError(f"{path}: {reason} (they must be 0 to {size - 1:,}, each once)")
    return tokenizer, special


def continuations(tokenizer, path):
    """(vocab_size,) bool: which entries continue a word, as WordPiece's ##ing does. path: of the tokenizer, for the error.

    Raises: UserError for a tokenizer that marks the beginnings of words or none (byte-level BPE, Unigram, whole words).
    """
    prefix = getattr(tokenizer.model, "continuing_subword_prefix", None)
    if not prefix:
        raise UserError(f"{path}: does not mark pieces inside words, as WordPiece does by ## (leave out whole_words)")
    return np.array([tokenizer.id_to_token(i).startswith(prefix) for i in range(tokenizer.get_vocab_size())])


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
    owned = [(owner, part) for owner, text in enumerate(texts) for part in parts(text)]
    ids = [[] for _ in texts]
    encodings = tokenizer.encode_batch_fast([part for _, part in owned], add_special_tokens=False)
    for (owner, _), encoding in zip(owned, encodings):
        ids[owner] = ids[owner] + encoding.ids if ids[owner] else encoding.ids
    return ids


def parts(text):
    """The text in parts of about PART_CHARS that end at white space."""
    while len(text) > PART_CHARS:
        part = beginning(text, PART_CHARS)
        yield part
        text = text[len(part) :]
    yield text


def beginning(text, chars):
    """The text up to the first white space at or after `chars` characters, but at most WORD_CHARS more."""
    space = SPACE.search(text, chars, chars + WORD_CHARS)
    return text[: space.start() if space else chars + WORD_CHARS]


# ---------------------------------------------------------------------------------------------------------------------
# What a tokenizer loses


def letters(text):
    """How many characters a text has without white space."""
    return sum(map(len, text.split()))


def unknown_characters(tokenizer, text, unknown):
    """How many characters of a text are hidden by tokens with the id `unknown`."""
    encodings = tokenizer.encode_batch(list(parts(text)), add_special_tokens=False)
    return sum(
        end - begin
        for encoding in encodings
        for token, (begin, end) in zip(encoding.ids, encoding.offsets)
        if token == unknown
    )


def changed_characters(tokenizer, text):
    """How many characters normalization removes or replaces. Case, white space and composition (NFC) don't count."""
    if tokenizer.normalizer is None:
        return 0
    before, after = (
        collections.Counter(unicodedata.normalize("NFC", "".join(version.split()).casefold()))
        for version in (text, tokenizer.normalizer.normalize_str(text))
    )
    return (before - after).total()
