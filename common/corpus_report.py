"""What a prepared corpus contains: counted while it is tokenized, and reported at the end."""

import itertools
import json
import re
import unicodedata
from collections import Counter

from common.options import UserError
from common.vocabulary import changed_characters, encode, hidden_characters, letters

FILL_LENGTHS = (128, 512)  # sequence lengths for which the report says how full samples are
NUM_LONGEST = 5  # longest documents listed in the report
NUM_SKIPPED, NUM_PRINTED = 1000, 20  # skipped lines listed in report.json, and files named when it is printed
WARN_PERCENT = 1  # of characters unknown or changed
INSPECT_CHARS = 2**15  # text per batch of 2^20 whose normalization is compared with the original
NUM_EXAMPLES, EXAMPLE_CHARS = 3, 80  # passages shown beside what their tokens decode to


def count_broken(stats, path, text):
    """Count a document with U+FFFD, which stands for a character that was lost earlier, and show where the first has it."""
    if "\ufffd" in text:
        if not stats["broken documents"]:
            start = max(0, text.index("\ufffd") - EXAMPLE_CHARS // 2)
            stats[f"broken in {path}: {text[start : start + EXAMPLE_CHARS]!r}"] += 1
        stats["broken documents"] += 1


def boundary(text, at):
    """The last white space up to `at`; if there is none within EXAMPLE_CHARS, where the letter at `at` begins."""
    space = max(text.rfind(space, max(0, at - EXAMPLE_CHARS), at + 1) for space in " \t\n\r")
    if space >= 0:
        return space
    while at > 0 and (unicodedata.category(text[at])[0] == "M" or "\u1160" <= text[at] <= "\u11ff"):
        at -= 1  # accents, vowel signs, and the later parts of a Korean syllable belong to what comes before
    return at


def passages(paths, texts):
    """A list of (path, passage), about INSPECT_CHARS of the texts, spread evenly over all of them; and how much text each
    character stands for: 1 if the texts have no more, for then all of them are in it.
    """
    total, sample, skip = sum(map(len, texts)), [], 0
    step = max(1, -(-total // INSPECT_CHARS))  # each text is cut into passages, and every step-th is taken
    for path, text in zip(paths, texts):
        last = (len(text) - 1) // EXAMPLE_CHARS
        for i in range(skip, last + 1, step):
            begin = boundary(text, i * EXAMPLE_CHARS)
            end = boundary(text, (i + 1) * EXAMPLE_CHARS) if i < last else len(text)
            if passage := text[begin:end].strip():
                sample.append((path, passage))
        skip = (skip - last - 1) % step
    return sample, total / max(1, sum(len(passage) for _, passage in sample)) if step > 1 else 1


def inspect_changes(stats, sample, weight, tokenizer, unknown):
    """Count the characters that normalization changes in what `passages` returns. Returns the most changed passages:

    how many characters are changed or unknown, how many are not ASCII, the passage, what its tokens decode to, its file.
    """
    found = []
    encodings = tokenizer.encode_batch([passage for _, passage in sample], add_special_tokens=False)
    for (path, passage), encoding in zip(sample, encodings):
        changed, hidden = changed_characters(tokenizer, passage), hidden_characters(encoding, unknown)
        stats["letters inspected"] += weight * letters(passage)
        stats["letters changed"] += weight * changed
        found.append((changed + hidden, sum(not character.isascii() for character in passage), passage, encoding.ids, path))
    return [(*counts, text, tokenizer.decode(ids, skip_special_tokens=False), path)
            for *counts, text, ids, path in most_changed(found)]  # fmt: skip


def most_changed(*examples):
    """NUM_EXAMPLES of them: the most changed one of each file, then the next ones; of equals, the least English."""
    ranked, rank_in_file = [], Counter()
    for example in sorted(itertools.chain(*examples), key=lambda example: (-example[0], -example[1])):
        ranked.append((rank_in_file[example[-1]], example))
        rank_in_file[example[-1]] += 1
    return [example for _, example in sorted(ranked, key=lambda pair: pair[0])[:NUM_EXAMPLES]]


def compare(stats, sample, weight, this, other):
    """Count the tokens that two tokenizers, each with its special tokens, make of the same `passages`."""
    texts = [passage for _, passage in sample]
    stats["compared words"] += weight * sum(len(text.split()) for text in texts)
    stats["compared bytes"] += weight * sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
    for name, (tokenizer, special) in (("this", this), ("other", other)):
        _, ids = encode(tokenizer, texts)
        stats[f"compared tokens {name}"] += weight * sum(map(len, ids))
        stats[f"compared unknown {name}"] += weight * sum(tokens.count(special["[UNK]"]) for tokens in ids)


def make_report(stats, longest, examples, cfg, vocab_size, seconds):
    """What the corpus contains, as plain numbers; the last three depend on the machine."""
    num_docs = stats["documents train"] + stats["documents val"]
    num_tokens = stats["tokens train"] + stats["tokens val"]
    bits = sorted(int(name.split("^")[1]) for name in stats if name.startswith("length"))
    report = {
        "documents": num_docs,
        "documents_held_out": stats["documents val"],
        "documents_empty": stats["empty documents"],
        "documents_broken": stats["broken documents"],
        "broken": names_of(stats, "broken in ")[:1],
        "documents_duplicate": stats["duplicates"],
        "duplicates_removed": cfg.dedup,
        "bad_lines_skipped": stats["bad lines"],
        "skipped": names_of(stats, "skipped "),
        "suspect": names_of(stats, "suspect "),
        "files_without_text": names_of(stats, "without text "),
        "tokens": num_tokens,
        "tokens_held_out": stats["tokens val"],
        "vocab_size": vocab_size,
        "tokens_per_word": round(stats["tokens read"] / max(1, stats["words read"]), 4),
        "bytes_per_token": round(stats["bytes read"] / max(1, stats["tokens read"]), 4),
        "unknown_percent": round(100 * stats["unknown tokens"] / num_tokens, 4),
        "unknown_characters_percent": round(100 * stats["unknown letters"] / max(1, stats["letters read"]), 4),
        "changed_characters_percent": round(100 * stats["letters changed"] / max(1, stats["letters inspected"]), 4),
        "decoded": [{"text": text, "tokens": decoded} for _, _, text, decoded, _ in examples],
        **{f"fill_at_{n}": round(stats[f"fill {n}"] / num_docs / n, 4) for n in FILL_LENGTHS},
        "lengths": {f"{2 ** (bit - 1)}-{2**bit - 1}": stats[f"length 2^{bit}"] for bit in bits},
        "longest": [
            {"characters": chars, "file": path, "from_byte": start, "document": number, "text": text}
            for chars, path, start, number, text in longest
        ],
    }
    if cfg.compare_tokenizer:
        report["compared"] = {"with": cfg.compare_tokenizer, "bytes": round(stats["compared bytes"])}
        for name in ("this", "other"):
            tokens = max(1, stats[f"compared tokens {name}"])
            report["compared"][name] = {
                "tokens_per_word": round(tokens / max(1, stats["compared words"]), 4),
                "bytes_per_token": round(stats["compared bytes"] / tokens, 4),
                "unknown_percent": round(100 * stats[f"compared unknown {name}"] / tokens, 4),
            }
    return report | {
        "characters": stats["characters"],
        "seconds": round(seconds, 2),
        "tokens_per_second": round(num_tokens / seconds),
        "megabytes_per_second": round(stats["characters"] / seconds / 1e6, 2),
    }


def names_of(stats, prefix):
    """What a Counter's names with this prefix say, NUM_SKIPPED of them at most."""
    return [name.removeprefix(prefix) for name in itertools.islice((n for n in stats if n.startswith(prefix)), NUM_SKIPPED)]


EXPLAINED = {
    "documents_held_out": "for evaluation",
    "documents_empty": "left out: they hold nothing but blanks",
    "documents_broken": "hold U+FFFD, in place of characters that were lost before they came here",
    "broken": "the first",
    "documents_duplicate": "texts that occurred before (--dedup=true removes them)",
    "tokens_held_out": "for evaluation",
    "unknown_percent": "of the tokens are [UNK]",
    "unknown_characters_percent": "of the characters other than blanks are hidden by [UNK]",
    "changed_characters_percent": "of the characters other than blanks are changed by normalization, beyond case",
    "fill_at_128": "share of a sample of 128 tokens that a document fills, on average",
    "fill_at_512": "the same of 512 tokens",
    "lengths": "how many documents have so many tokens",
    "suspect": "read, but look at it",
    "files_without_text": "gave no document",
    "longest": "the longest documents",
    "decoded": "a text, and what its tokens decode to",
    "compared": "this tokenizer, and the one of --compare_tokenizer",
}


def print_report(report, cfg):
    for name, value in report.items():
        if name == "skipped":
            value = by_file(value, report["bad_lines_skipped"])
        if isinstance(value, list) and len(value) > NUM_PRINTED:
            value = [*value[:NUM_PRINTED], f"and {len(value) - NUM_PRINTED:,} more, see report.json"]
        for number, item in enumerate(value if isinstance(value, list) else [value]):
            plain = isinstance(item, (int, float)) and not isinstance(item, bool)
            text = f"{item:,}" if plain else item if isinstance(item, str) else json.dumps(item, ensure_ascii=False)
            print(f"{name:26s} {text}{f'  ({EXPLAINED[name]})' if name in EXPLAINED and number == 0 else ''}")
    if report["documents_broken"]:
        text = f"{report['documents_broken']:,} documents hold U+FFFD (see broken): characters were lost before they came here"
        print(f"warning: {text} (export them again as UTF-8)")
    hint = "one for this text: --train_tokenizer"
    if cfg.train_tokenizer:
        hint = "a new vocabulary needs more entries, or more text"
    lost = "lose accents, vowel signs or other marks, or are removed as control characters"
    for name, reason in (
        ("unknown_characters_percent", f"are unknown to the tokenizer, and hidden by [UNK] (see decoded; {hint})"),
        ("changed_characters_percent", f"{lost} (see decoded)"),
    ):
        if report[name] >= WARN_PERCENT:
            print(f"warning: {report[name]:.1f} % of the characters other than blanks {reason}")


def by_file(skipped, count):
    """One text for each file with skipped lines. count: of all, of which `skipped` may name only the first."""
    files = {}
    for text in skipped:
        path, line, reason = re.fullmatch(r"(.+?): ?((?:record )?\d+)?(?:: )?(.*)", text).groups()
        files.setdefault(path, []).append(f"{line}: {reason}" if line else reason)
    lines = [f"{path}: {len(found):,} skipped, the first {found[0]}" for path, found in files.items()]
    return lines + ([f"and {count - len(skipped):,} more"] if count > len(skipped) else [])


def no_text(cfg, stats):
    """The UserError for a source that leaves nothing to train on."""
    kinds = {"documents val": "held out (see --val_fraction)", "empty documents": "empty", "bad lines": "skipped as unreadable"}
    found = [f"{stats[kind]:,} {text}" for kind, text in kinds.items() if stats[kind]]
    first = [f"the first was {text}" for text in names_of(stats, "skipped ")[:1]]
    return UserError(f"{cfg.source}: no text to train on: {', '.join([*found, *first]) or 'its files are empty'}")
