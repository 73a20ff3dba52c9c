"""Tokenizers: read or train one, and turn texts into token ids.

Read next: prepare_c4.py, which writes the ids to shards
"""

import collections
import itertools
import json
import os
import re
import unicodedata

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from common.files import read_if_there
from common.hub import download
from common.options import UserError

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROBERTA_TOKENS = ["<pad>", "<unk>", "<s>", "</s>", "<mask>"]  # the same five; the code calls them by BERT's names
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
SPACE = re.compile(r"[ \t\n\r]")  # where every BERT tokenizer splits
REMOVED_SPACE = re.compile(r"[\v\f\x1c-\x1f\x85]")  # these are white space, too, but BERT's normalizer removes them
TOKENIZER_FILES = [  # the first that is there, and the settings beside it
    "tokenizer.json", "vocab.txt", "tokenizer_config.json", "config.json", "special_tokens_map.json", "added_tokens.json",
]  # fmt: skip
TOKENIZER_HINT = "a tokenizer.json or its directory, a vocab.txt, or a hub id; --train_tokenizer=30000 makes one from your text"
# transformers' classes: the first ones build the tokenizer from the vocabulary and these settings, whatever the rest of
# tokenizer.json says; the others take tokenizer.json as it is.
BERT_CLASSES = ("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer")
PLAIN_CLASSES = ("PreTrainedTokenizer", "TokenizersBackend")
ROBERTA_CLASS = "RobertaTokenizer"  # also builds its own, but only of byte-level BPE without a normalizer
BERT_SETTINGS = {"do_lower_case": True, "strip_accents": None, "tokenize_chinese_chars": True}


# ---------------------------------------------------------------------------------------------------------------------
# Training


def wordpiece(cased, vocab=None, strip_accents=None, split_chinese=True):
    """BERT's tokenizer, with a vocabulary {entry: id} or untrained. strip_accents: None is BERT's rule, unless cased."""
    tokenizer = Tokenizer(models.WordPiece(vocab or {}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(True, split_chinese, strip_accents, lowercase=not cased)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece("##")
    return tokenizer


def special_names(tokenizer):
    """{"[MASK]": the tokenizer's own name for it, ...}: RoBERTa's where it has those and not all of BERT's."""
    vocab = tokenizer.get_vocab().keys()
    roberta = vocab >= {*ROBERTA_TOKENS} and not vocab >= {*SPECIAL_TOKENS}
    return dict(zip(SPECIAL_TOKENS, ROBERTA_TOKENS if roberta else SPECIAL_TOKENS))


def finish(tokenizer):
    """Register the special tokens, and put them around texts. The tokens must have ids by now."""
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}  # with their settings
    tokenizer.add_special_tokens([name for name in special_names(tokenizer).values() if name not in known])
    join_texts(tokenizer)


def join_texts(tokenizer):
    """Put [CLS] and [SEP] around a text, and around two as BERT does, or as RoBERTa where the tokens are its own."""
    names = special_names(tokenizer)
    cls, sep = names["[CLS]"], names["[SEP]"]
    pair = f"{cls} $A {sep} $B:1 {sep}:1" if sep == "[SEP]" else f"{cls} $A {sep} {sep} $B {sep}"
    ids = [(name, tokenizer.token_to_id(name)) for name in (cls, sep)]
    tokenizer.post_processor = processors.TemplateProcessing(f"{cls} $A {sep}", pair, ids)


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
    # BERT's normalizer takes a composed letter and its two characters, as from a PDF or a Mac, for different ones.
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), tokenizer.normalizer])
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
        characters = np.frombuffer(unicodedata.normalize("NFC", text).lower().encode("utf-32-le", "surrogatepass"), np.uint32)
        found, times = np.unique(characters, return_counts=True)
        counts[found] += times
    most_frequent = np.sort(counts)[::-1].cumsum()
    needed = int(np.searchsorted(most_frequent, ALPHABET_COVERAGE * most_frequent[-1])) + 1
    return max(MIN_ALPHABET, min(needed, size // 2))


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_tokenizer(name, cased=False):
    """The contents of a tokenizer.json that gives the tokens of transformers' AutoTokenizer.

    name: a tokenizer.json, a BERT vocab.txt, a directory with one of them (shards, a checkpoint or a model), or a hub id.
    cased: of a vocab.txt, unless the files beside it say so.
    Raises: UserError, also for a setting that this project does not support.
    """
    path = name if os.path.exists(name) else download(name, TOKENIZER_FILES, "tokenizer", TOKENIZER_HINT)
    if os.path.isdir(path):
        directory, files = path, [os.path.join(path, file) for file in TOKENIZER_FILES[:2]]
        path = next(filter(os.path.exists, files), None)
        if path is None:
            raise UserError(f"{directory}: no tokenizer here (give --tokenizer; MosaicBERT's is google-bert/bert-base-uncased)")
    if bare := path.endswith(".txt"):
        text = read_vocabulary(path)
    else:
        load_tokenizer(path)
        with open(path, encoding="utf-8") as file:
            text = file.read()
    settings = os.path.join(os.path.dirname(path), "tokenizer_config.json")
    about, model, extra, added = (read_if_there(os.path.join(os.path.dirname(path), file)) for file in TOKENIZER_FILES[2:])
    if "added_tokens_decoder" in about:  # then transformers reads neither of these
        extra = added = {}
    tokenizer, before = Tokenizer.from_str(text), Tokenizer.from_str(text).to_str()
    is_bert = check_settings(settings, about, model, extra, bare, tokenizer)
    if bare and cased and about.get("do_lower_case"):
        raise UserError(f"{settings}: says do_lower_case, but --cased=true was given (leave it out, or change the file)")
    if is_bert:
        tokenizer = as_bert_tokenizer(tokenizer, about, path, settings, lowercase=not (bare and cased))
    add_tokens(tokenizer, json.loads(text), about, extra, added, settings)
    return text if tokenizer.to_str() == before else tokenizer.to_str(pretty=True)


def read_vocabulary(path):
    """The contents of a tokenizer.json with the entries of a vocab.txt."""
    try:
        with open(path, encoding="utf-8", newline="\n") as file:
            entries = [line.rstrip("\r\n") for line in file]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: {reason} (expected a vocabulary, one entry per line)") from None
    vocab = {entry: i for i, entry in enumerate(entries)}
    if len(vocab) < len(entries):
        line = next(i for i, entry in enumerate(entries) if vocab[entry] != i) + 1
        raise UserError(f"{path}:{line}: {entries[line - 1]!r} is listed twice (an entry has one id)")
    for token in SPECIAL_TOKENS:
        if token not in vocab:
            raise UserError(f"{path}: has no {token} token (a BERT-style vocabulary is needed)")
    tokenizer = wordpiece(cased=False, vocab=vocab)
    finish(tokenizer)
    return tokenizer.to_str(pretty=True)


def check_settings(path, about, model, extra, bare, tokenizer):
    """Whether transformers builds BERT's tokenizer from the vocabulary and its settings; else it takes tokenizer.json as it is.

    about, model, extra: the contents of tokenizer_config.json (at `path`), config.json and special_tokens_map.json.
    Raises: UserError for what is neither.
    """
    is_bert = bare or model.get("model_type") == "bert" or bool(not model and BERT_SETTINGS.keys() & about.keys())
    default = BERT_CLASSES[0] if is_bert else ROBERTA_CLASS if model.get("model_type") == "roberta" else PLAIN_CLASSES[0]
    named = about.get("tokenizer_class") or model.get("tokenizer_class") or default
    kind = f"{named}".removesuffix("Fast")
    if kind not in (*BERT_CLASSES, *PLAIN_CLASSES, ROBERTA_CLASS) or "auto_map" in about:
        supported = f"only {BERT_CLASSES[0]}, {ROBERTA_CLASS} and {PLAIN_CLASSES[0]}Fast are supported"
        raise UserError(f"{path}: tokenizer_class is {about.get('auto_map') or named!r} ({supported})")
    if not about.get("do_basic_tokenize", True):
        raise UserError(f"{path}: do_basic_tokenize is false (not supported; give a tokenizer.json)")
    if kind == ROBERTA_CLASS:
        contents, space = json.loads(tokenizer.to_str()), bool(about.get("add_prefix_space"))
        split = {"type": "ByteLevel", "add_prefix_space": space, "use_regex": True}
        if contents["normalizer"] or not split.items() <= (contents["pre_tokenizer"] or {}).items():
            wants = f"byte-level BPE with add_prefix_space {space}, and no normalizer"
            raise UserError(f"{path}: {ROBERTA_CLASS} would not be what tokenizer.json is (it wants {wants})")
    for role, token in special_names(tokenizer).items():
        name = f"{role[1:-1].lower()}_token"
        given = (about | extra).get(name) or token
        given = given.get("content") if isinstance(given, dict) else given
        if given != token:
            raise UserError(f"{path}: {name} is {given!r} (only {token!r} is supported)")
    return bare or kind in BERT_CLASSES


def as_bert_tokenizer(tokenizer, about, source, path, lowercase):
    """What BertTokenizer makes of a tokenizer and the settings in tokenizer_config.json, which win. Prints what changes.

    lowercase: where these say nothing.
    """
    settings = {**BERT_SETTINGS, "do_lower_case": lowercase}
    for name, default in settings.items():
        settings[name] = default if about.get(name) is None else about[name]
        if not isinstance(settings[name], bool) and (settings[name] is not None or name != "strip_accents"):
            raise UserError(f"{path}: {name} is {settings[name]!r} (expected true or false)")
    old = json.loads(tokenizer.to_str())
    if old["model"].get("type") not in ("WordPiece", "WordLevel"):
        raise UserError(f"{source}: a {old['model'].get('type')} model (BertTokenizer needs WordPiece)")
    lower, strip, chinese = settings.values()
    bert = wordpiece(not lower, old["model"]["vocab"], strip, chinese)
    finish(bert)
    new = json.loads(bert.to_str())
    changed = [part for part in ("normalizer", "pre_tokenizer", "model") if old[part] != new[part]]
    if not changed and "added_tokens_decoder" not in about:  # which also replaces tokenizer.json's list
        return tokenizer
    if changed and source.endswith(".json"):
        print(f"{source}: {' and '.join(changed)} set as BertTokenizer has them: {json.dumps(settings)[1:-1]}")
    return bert


def add_tokens(tokenizer, contents, about, extra, added, path):
    """Add the tokens that files beside the vocabulary list, in the order of their ids. Raises: UserError.

    contents: of tokenizer.json. about: of tokenizer_config.json. extra: of special_tokens_map.json. added: of
    added_tokens.json. With added_tokens_decoder transformers reads neither of the last two.
    """
    try:
        if "added_tokens_decoder" in about:
            tokens = {int(number): token for number, token in about["added_tokens_decoder"].items()}
        else:
            tokens = {number: {"content": token, "normalized": True, "special": False} for token, number in added.items()}
            tokens |= {token["id"]: token for token in contents.get("added_tokens", [])}
        fields = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
        for number, token in sorted(tokens.items()):
            token = {name: token[name] for name in fields if name in token}
            tokenizer.add_tokens([AddedToken(**token)])
            if tokenizer.token_to_id(token["content"]) != number:
                found = tokenizer.token_to_id(token["content"])
                raise UserError(f"{path}: added token {token['content']!r} has id {number}, but would get {found}")
        for name in ("additional_special_tokens", "extra_special_tokens"):
            listed = (about | extra).get(name) or []
            for token in listed.values() if isinstance(listed, dict) else listed:
                token = token["content"] if isinstance(token, dict) else token
                if token not in {known["content"] for known in tokens.values()}:
                    tokenizer.add_special_tokens([token])
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: added tokens cannot be read: {type(error).__name__}: {error}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Using


def load_tokenizer(path, text=None, literal=False):
    """(tokenizers.Tokenizer without truncation or padding, ids of the special tokens: {"[MASK]": 103, ...}).

    text: the contents of the file, if already read. literal: "[MASK]" in a text is text, not the special token. Raises:
    UserError for anything but a tokenizer with BERT's special tokens, or RoBERTa's.
    """
    if text is None and not os.path.isfile(path):
        raise UserError(f"{path}: no such tokenizer (expected a tokenizer.json)")
    try:
        tokenizer = Tokenizer.from_file(path) if text is None else Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{path}: not a tokenizer: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = literal
    special = {name: tokenizer.token_to_id(own) for name, own in special_names(tokenizer).items()}
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


def is_blank(text):
    """Whether a text has nothing to read: white space, and characters without a shape, such as U+200B and U+FEFF."""
    return not any(c.isprintable() and not c.isspace() for c in text)


def plain_blanks(text):
    """The text with blanks for REMOVED_SPACE, such as the form feeds of pdftotext, which keep words apart."""
    return REMOVED_SPACE.sub(" ", text)  # takes a hundredth of the tokenizer's time; str.translate a tenth


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
    return sum(hidden_characters(encoding, unknown) for encoding in encodings)


def hidden_characters(encoding, unknown):
    """The same of a text that is encoded already."""
    return sum(end - begin for token, (begin, end) in zip(encoding.ids, encoding.offsets) if token == unknown)


def changed_characters(tokenizer, text):
    """How many characters normalization removes or replaces. Case, white space and composition (NFC) don't count."""
    if tokenizer.normalizer is None:
        return 0
    before, after = (
        collections.Counter(unicodedata.normalize("NFC", "".join(version.split()).casefold()))
        for version in (text, tokenizer.normalizer.normalize_str(text))
    )
    return (before - after).total()
