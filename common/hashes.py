"""64-bit hashes of all documents: which are held out for evaluation, and which occurred before.

Read next: prepare_c4.py, which keeps the hashes of each unit of work in a file
"""

import hashlib
import os
import unicodedata

import numpy as np

from common.files import whole_file
from common.options import UserError

NOTHING_HELD_OUT = "val_fraction=0 holds out nothing, and train.py needs held-out text (another --val_fraction, or --val_docs)"
MANY_ENOUGH = 100  # documents to hold out of a small corpus


def same_text(text):
    """The text with composed letters (NFC) and single blanks: equal for texts that a tokenizer can hardly tell apart."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def text_hash(text):
    """64-bit hash of same_text: decides the split and finds duplicates.

    Two of C4's 365 million documents collide with a probability of 0.4 %.
    """
    return content_hash(same_text(text).encode("utf-8", "surrogatepass"))


def content_hash(data):
    """The same of bytes."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def is_held_out(segment, hashed, threshold):
    return segment.split == "val" if segment.split else hashed < threshold


def hash_path(out, number):
    return os.path.join(out, ".work", f"hashes_{number:05d}.npz")


def save_hashes(out, number, hashes, by_hash):
    """by_hash: for each document whether its hash decides about the split."""
    with whole_file(hash_path(out, number)) as file:
        np.savez(file, hashes=np.array(hashes, np.uint64), by_hash=np.array(by_hash, bool))


def load_hashes(out, number):
    """(hashes, by_hash) of a unit."""
    with np.load(hash_path(out, number)) as saved:
        return saved["hashes"], saved["by_hash"]


def val_threshold(num_units, cfg):
    """Documents with a hash below this are held out. num_units: of units whose hashes are known, 0 or all.

    If they are known, the default share holds out at least one in 20 of the distinct texts, or MANY_ENOUGH where that is
    less: those with the smallest hashes. Another share does so where it comes to none. Raises: UserError if none would be
    left.
    """
    share, wanted = int(cfg.val_fraction * 2**64), cfg.val_docs or MANY_ENOUGH * (cfg.val_fraction > 0)
    enough = MANY_ENOUGH if cfg.val_fraction == type(cfg).val_fraction else 1
    smallest, threshold = np.empty(0, np.uint64), share
    for number in range(num_units):
        hashes, by_hash = load_hashes(cfg.out, number)
        smallest = np.unique(np.concatenate([smallest, hashes[by_hash]]))[:wanted]
    if cfg.val_docs:
        threshold = int(smallest[-1]) + 1 if len(smallest) else 0
    elif len(smallest) and (count := int((smallest < share).sum())) < enough:
        distinct = num_distinct(cfg.out, num_units)
        smallest = smallest[: max(1, distinct // 20)]
        if len(smallest) > count:
            threshold = int(smallest[-1]) + 1
            instead = f"held out instead: {len(smallest)}, with the smallest hashes"
            print(f"val_fraction={cfg.val_fraction} holds out {count or 'none'} of {distinct:,} distinct texts; {instead}")
    hashed = (load_hashes(cfg.out, number) for number in range(num_units))
    if len(smallest) and not any((hashes >= threshold).any() or not by_hash.all() for hashes, by_hash in hashed):
        distinct, option = num_distinct(cfg.out, num_units), "val_docs" if cfg.val_docs else "val_fraction"
        reason = f"{option}={getattr(cfg, option)} holds out all {distinct:,} distinct texts (lower it)"
        if distinct == 1:
            hint = "one is always held out; a line is a document unless --doc_sep says otherwise"
            reason = f"there is a single distinct text ({hint})"
        raise UserError(f"{cfg.source}: no text to train on: {reason}")
    return threshold


def num_distinct(out, num_units):
    """How many different documents there are."""
    documents = sum(len(load_hashes(out, number)[0]) for number in range(num_units))
    return documents - sum(map(len, find_duplicates(out, num_units)))


def find_duplicates(out, num_units):
    """For each unit, the indices of documents that occurred before, in the unit or an earlier one: a list of arrays.

    Sorts the hashes in 16 passes by their top bits: 2.5 bytes of memory a document, and 8 more a duplicate.
    """
    starts = np.cumsum([0] + [len(load_hashes(out, number)[0]) for number in range(num_units)])
    duplicates = [np.empty(0, np.int64)]
    for top_bits in range(16):
        hashes, indices = [], []
        for number in range(num_units):
            of_unit, _ = load_hashes(out, number)
            here = np.flatnonzero(of_unit >> np.uint64(60) == top_bits)
            hashes.append(of_unit[here])
            indices.append(here + starts[number])
        hashes, indices = np.concatenate(hashes), np.concatenate(indices)
        order = np.argsort(hashes, kind="stable")
        hashes = hashes[order]
        duplicates.append(indices[order[1:][hashes[1:] == hashes[:-1]]])
    duplicates = np.sort(np.concatenate(duplicates))
    bounds = np.searchsorted(duplicates, starts)
    return [duplicates[bounds[i] : bounds[i + 1]] - starts[i] for i in range(num_units)]
