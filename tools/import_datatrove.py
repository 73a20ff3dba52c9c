"""Make a shard directory of datatrove's token files, as prepare_c4.py makes it of text.

    python -m tools.import_datatrove --source=tokens/ --tokenizer=data/mine/tokenizer.json --out=data/filtered

A token file, NAME.ds, is the token ids of its documents, 2 or 4 bytes each; NAME.ds.index has the documents' ends, counted
in tokens, 8 bytes each. Special tokens at a document's ends are taken off, since training adds its own.
Source: datatrove/pipeline/tokens/tokenizer.py of github.com/huggingface/datatrove, 0.10.

Read next: docs/data.md, for what datatrove does before
"""

import os
from collections import Counter
from dataclasses import asdict, dataclass

import numpy as np

from common.files import file_digest, lock_directory, write_text
from common.hashes import NOTHING_HELD_OUT, content_hash, find_duplicates, load_hashes, save_hashes, val_threshold
from common.options import UserError, command, load_config, require
from common.sources import files_below
from common.vocabulary import load_tokenizer, read_tokenizer, special_names
from prepare_c4 import ShardWriter, bytes_per_token, check_same, enter_output, finish_output, read_plan

NUM_SHOWN, SHOWN_TOKENS = 3, 16  # beginnings of documents that are decoded and printed


@dataclass
class ImportConfig:
    source: str = ""  # directory of .ds files, each beside its .ds.index
    tokenizer: str = ""  # the one that datatrove had: tokenizer.json or its directory, BERT vocab.txt, or hub id
    out: str = ""  # shard directory
    val_fraction: float = 0.005  # share of documents held out, by a threshold on the hash of their tokens; at least 1
    val_docs: int = 0  # hold out exactly this many instead, those with the smallest hashes
    shard_tokens: int = 100_000_000  # approximate tokens per shard

    def check(self):
        for name in ("source", "tokenizer", "out"):
            if not getattr(self, name):
                raise UserError(f"--{name}: not given (--help lists the options)")
        require(self, "val_fraction", lambda x: 0 <= x < 1, "must be at least 0 and below 1")
        require(self, "val_docs", lambda x: x >= 0, "must not be negative")
        require(self, "shard_tokens", lambda x: x >= 1, "must be at least 1")


def open_tokens(path, tokenizer):
    """(tokens, ends) of a token file: (num_tokens,) uint16 or uint32, and (num_docs,) uint64. Raises: UserError."""
    size, index = os.path.getsize(path), f"{path}.index"
    if not os.path.exists(index):
        raise UserError(f"{index}: not there, so nobody knows where documents end (DocumentTokenizer(save_index=True))")
    if os.path.getsize(index) % 8:
        raise UserError(f"{index}: {os.path.getsize(index):,} bytes, not 8 a document (copy it again)")
    ends = np.fromfile(index, "<u8")
    num_tokens = int(ends[-1]) if len(ends) else 0
    width = size // max(1, num_tokens)
    if (ends[1:] < ends[:-1]).any() or size != width * num_tokens or num_tokens and width not in (2, 4):
        raise UserError(f"{path}: its {size:,} bytes are not the {num_tokens:,} tokens of its index (copy both again)")
    tokens = np.memmap(path, f"<u{width}", "r") if num_tokens else np.empty(0, "<u2")
    entries, hint = tokenizer.get_vocab_size(), f"is it datatrove's tokenizer? Theirs: {made_with(path)}"
    if num_tokens and width != bytes_per_token(tokenizer):
        raise UserError(f"{path}: {width} bytes a token, unlike --tokenizer with {entries:,} entries ({hint})")
    if num_tokens and (highest := tokens.max()) >= entries:
        raise UserError(f"{path}: token id {highest:,}, but --tokenizer has {entries:,} entries ({hint})")
    return tokens, ends


def made_with(path):
    """The tokenizer's name in NAME.ds.metadata, whose first line is NAME|BYTES."""
    try:
        with open(f"{path}.metadata", encoding="utf-8") as file:
            return file.readline().strip().rpartition("|")[0] or "not known"
    except (OSError, UnicodeDecodeError):
        return "not known"


def documents(path, tokenizer, special, counts):
    """The tokens of each document, without those of `special`, {id: name}, at its ends. Counts them, and those inside."""
    tokens, ends = open_tokens(path, tokenizer)
    is_special = np.zeros(tokenizer.get_vocab_size(), bool)
    is_special[list(special)] = True
    start = 0
    for end in ends.tolist():
        document, start = tokens[start:end], end
        found = is_special[document]
        kept = np.flatnonzero(~found)
        first, last = (kept[0], kept[-1] + 1) if len(kept) else (0, 0)
        counts.update(special[token] for token in [*document[:first].tolist(), *document[last:].tolist()])
        counts["special tokens inside"] += int(found[first:last].sum())
        if last:
            yield np.array(document[first:last])
        else:
            counts["documents empty"] += 1


def write_shards(cfg, paths, tokenizer, digest):
    """(the manifest's entries, Counter, first documents) of the token files; each gives a shard or more."""
    added = tokenizer.get_added_tokens_decoder().items()
    unknown = special_names(tokenizer)["[UNK]"]
    special = {token: entry.content for token, entry in added if entry.special and entry.content != unknown}
    for number, path in enumerate(paths):
        hashes = list(map(content_hash, documents(path, tokenizer, special, Counter())))
        save_hashes(cfg.out, number, hashes, [True] * len(hashes))
    if not any(len(load_hashes(cfg.out, number)[0]) for number in range(len(paths))):
        raise UserError(f"{cfg.source}: no tokens to train on (its files are empty)")
    threshold, entries, counts, shown = val_threshold(len(paths), cfg), [], Counter(), []
    for number, path in enumerate(paths):
        writer = ShardWriter(number, cfg, tokenizer, digest)
        hashes, _ = load_hashes(cfg.out, number)
        for hashed, document in zip(hashes.tolist(), documents(path, tokenizer, special, counts)):
            split = "val" if hashed < threshold else "train"
            writer.add(split, document)
            counts[f"documents {split}"] += 1
            counts[f"tokens {split}"] += len(document)
            if len(shown) < NUM_SHOWN:
                shown.append(tokenizer.decode(document[:SHOWN_TOKENS].tolist()))
        writer.flush("train")
        writer.flush("val")
        entries += writer.entries
    counts["duplicates"] = sum(map(len, find_duplicates(cfg.out, len(paths))))
    removed = [f"{counts[name]:,} {name}" for name in special.values() if counts[name]]
    print(f"taken off the ends of documents, since training adds its own: {', '.join(removed) or 'nothing'}")
    return entries, counts, shown


def write_output(cfg, plan, paths, tokenizer, text):
    """Everything in the output directory. text: the contents of tokenizer.json."""
    tokenizer_path = os.path.join(cfg.out, "tokenizer.json")
    write_text(tokenizer_path, text)
    entries, counts, shown = write_shards(cfg, paths, tokenizer, bytes.fromhex(file_digest(tokenizer_path)))
    report = {
        "documents": counts["documents train"] + counts["documents val"],
        "documents_held_out": counts["documents val"],
        "documents_empty": counts["documents empty"],
        "documents_duplicate": counts["duplicates"],
        "special_tokens_inside": counts["special tokens inside"],
        "tokens": counts["tokens train"] + counts["tokens val"],
        "tokens_held_out": counts["tokens val"],
        "decoded": shown,
    }
    finish_output(cfg.out, plan, entries, tokenizer, report)
    for name, value in report.items():
        print(f"{name:26s} {value if name == 'decoded' else f'{value:,}'}")
    if counts["special tokens inside"]:
        print('warning: special tokens inside documents: datatrove reads them where a text spells them, as in "[SEP]"')
    print(f"{cfg.out}: finished, the tokens of {made_with(paths[0])} (after copying it: python -m tools.verify {cfg.out})")


@command
def main(argv):
    cfg = load_config(ImportConfig, argv)
    cfg.check()
    paths = [path for path in files_below(cfg.source) if path.endswith(".ds")] if os.path.isdir(cfg.source) else []
    if not paths:
        raise UserError(f"{cfg.source}: no .ds file in it (expected datatrove's token files)")
    text = read_tokenizer(cfg.tokenizer)
    tokenizer, _ = load_tokenizer(cfg.tokenizer, text)
    for path in paths:
        open_tokens(path, tokenizer)  # what is wrong with any is said before any work
        if os.path.exists(f"{path}.loss"):
            print(f"{path}.loss: not used: which tokens are predicted is drawn in training")
    segments = [(path, 0, os.path.getsize(path), "") for path in paths]
    options = {name: value for name, value in asdict(cfg).items() if name != "out"}
    plan = {"options": options, "sources": segments, "modified": {path: os.stat(path).st_mtime_ns for path in paths}}
    earlier, finished = read_plan(cfg.out)
    if earlier:
        check_same(cfg.out, plan, earlier)
    if finished:
        print(f"{cfg.out}: already finished, nothing to do (python -m tools.verify {cfg.out} checks every byte)")
        return
    if not (cfg.val_fraction or cfg.val_docs):
        print(NOTHING_HELD_OUT)
    lock = lock_directory(cfg.out)
    try:
        enter_output(cfg.out, plan, earlier is not None, "")
        write_output(cfg, plan, paths, tokenizer, text)
    finally:
        os.close(lock)


if __name__ == "__main__":
    main()
