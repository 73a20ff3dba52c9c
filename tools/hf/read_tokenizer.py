"""Read the tokenizer of a model in Hugging Face form, with all the settings that lie beside it, as transformers does."""

import json
import os
import re

from tokenizers import AddedToken, Tokenizer, normalizers

from common.files import read_json
from common.options import UserError, similar
from common.vocabulary import SPECIAL_TOKENS, finish, read_tokenizer, wordpiece

# transformers' classes: the first two build the tokenizer from the vocabulary and their settings, whatever the rest of
# tokenizer.json says; the others take tokenizer.json as it is.
BERT_CLASSES = ("BertTokenizer", "BertTokenizerFast")
PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
TOKENIZER_FILES = [
    "tokenizer.json", "vocab.txt", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json", "config.json",
]  # fmt: skip


def download(name, revision, files):
    """Download some files of a hub repository; returns the local directory."""
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not os.path.isdir(os.path.dirname(name))  # as in out/smok
    if near := similar(name):
        raise UserError(f"{name}: no such directory (did you mean {near}?)")
    if not is_hub_id:
        raise UserError(f"{name}: no such directory (expected a directory in Hugging Face form, or a hub id)")
    try:
        from huggingface_hub import snapshot_download  # comes with datasets

        return snapshot_download(name, revision=revision or None, allow_patterns=files)
    except Exception as error:  # network, authentication, HTTP and library errors have no common base class
        reason = f"{type(error).__name__}: {error}"[:200]
        raise UserError(f"{name}: no such directory, and the download from the hub failed: {reason}") from None


def read_if_there(directory, name):
    path = os.path.join(directory, name)
    return read_json(path, "is it complete?") if os.path.exists(path) else {}


def find_tokenizer(source):
    """The contents of tokenizer.json: the same tokens as transformers' AutoTokenizer gives for that directory.

    source: a directory, a tokenizer.json or vocab.txt, or a hub id. The settings beside the file are applied to it.
    Raises: UserError, also for a setting that this project does not support.
    """
    if not os.path.exists(source):
        source = download(source, "", TOKENIZER_FILES)
    directory = source if os.path.isdir(source) else os.path.dirname(source)
    if os.path.isdir(source):
        files = [os.path.join(source, name) for name in ("tokenizer.json", "vocab.txt")]
        source = next(filter(os.path.exists, files), None)
    if source is None:
        raise UserError(f"{directory}: no tokenizer here (give --tokenizer; MosaicBERT's is google-bert/bert-base-uncased)")
    text = read_tokenizer(source)
    about, path = read_if_there(directory, "tokenizer_config.json"), os.path.join(directory, "tokenizer_config.json")
    extra = read_if_there(directory, "special_tokens_map.json") if "added_tokens_decoder" not in about else {}
    hf = read_if_there(directory, "config.json")
    is_bert = hf.get("model_type") == "bert" or source.endswith(".txt")
    kind = about.get("tokenizer_class") or hf.get("tokenizer_class") or (BERT_CLASSES if is_bert else PLAIN_CLASSES)[0]
    if kind not in BERT_CLASSES + PLAIN_CLASSES or "auto_map" in about:
        kind = about.get("auto_map") or kind
        raise UserError(f"{path}: tokenizer_class is {kind!r} (only {BERT_CLASSES[0]} and {PLAIN_CLASSES[0]} are supported)")
    for token in SPECIAL_TOKENS:
        name = f"{token[1:-1].lower()}_token"
        given = (about | extra).get(name) or token
        given = given.get("content") if isinstance(given, dict) else given
        if given != token:
            raise UserError(f"{path}: {name} is {given!r} (only {token!r} is supported)")
    tokenizer, before = Tokenizer.from_str(text), Tokenizer.from_str(text).to_str()
    if kind in BERT_CLASSES or source.endswith(".txt"):
        tokenizer = as_bert_tokenizer(tokenizer, about, source, path)
    add_tokens(tokenizer, json.loads(text), about, extra, read_if_there(directory, "added_tokens.json"), path)
    return text if tokenizer.to_str() == before else tokenizer.to_str(pretty=True)


def as_bert_tokenizer(tokenizer, about, source, path):
    """What BertTokenizer makes of a tokenizer and the settings in tokenizer_config.json, which win. Prints what changes."""
    settings = {"do_lower_case": True, "strip_accents": None, "tokenize_chinese_chars": True}
    for name, default in settings.items():
        settings[name] = about.get(name, default)
        if not isinstance(settings[name], bool) and (settings[name] is not None or name != "strip_accents"):
            raise UserError(f"{path}: {name} is {settings[name]!r} (expected true or false)")
    old = json.loads(tokenizer.to_str())
    if old["model"].get("type") not in ("WordPiece", "WordLevel"):
        raise UserError(f"{source}: a {old['model'].get('type')} model (BertTokenizer needs WordPiece)")
    lower, strip, chinese = settings.values()
    bert = wordpiece(not lower, old["model"]["vocab"])
    bert.normalizer = normalizers.BertNormalizer(lowercase=lower, strip_accents=strip, handle_chinese_chars=chinese)
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
