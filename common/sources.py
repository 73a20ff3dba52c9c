"""Read text: files here or on the network, datasets of the Hugging Face hub, C4, and the English of Python's standard library.

A --source is a comma-separated list. It becomes segments: files, or byte ranges of large ones. A segment always yields
the same documents in the same order, so segments can be read in parallel, and again after a kill.

Read next: common/tables.py, for rows and records, or prepare_c4.py, which turns the documents into shards
"""

import ast
import collections
import functools
import glob
import inspect
import itertools
import os
import re
import sysconfig
from typing import NamedTuple

from common.files import gigabytes, without_slash
from common.lines import COMPRESSIONS, MAX_TEXT, location, numbered_lines, skip_or_fail, split_suffixes
from common.options import UserError, similar
from common.remote import is_remote, list_hub, list_remote, network_error, size_and_version
from common.tables import TABLES, open_table, parquet_records, parse_json, record_cells, rows_of
from common.vocabulary import plain_blanks

SEGMENT_BYTES = 64 * 2**20  # a plain file with a document per line is split into byte ranges of this size
C4 = "allenai/c4"
C4_FILES = {"train": ("en/c4-train.%05d-of-01024.json.gz", 1024), "val": ("en/c4-validation.%05d-of-00008.json.gz", 8)}
FORMATS = (".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet")
EXPECTED = f"{', '.join(FORMATS)}; also {', '.join(COMPRESSIONS)}"
HUB_NAME = re.compile(r"(\w[\w.-]*/[\w.-]+?)(?::([\w.-]+))?")  # owner/name[:config]
PINNED = re.compile(r"hf://datasets/[^@]+@[0-9a-f]{40}/.+")  # a file of the hub at a commit, which never changes
MAX_WHOLE = 2**30  # characters of a .json that is a single array or object, which is read whole
SEE = "see --text_key"


class Segment(NamedTuple):
    """Bytes `start` to `end` of a file; the fields are also what manifest.json stores."""

    path: str  # local file, URL (on the hub hf://datasets/OWNER/NAME@COMMIT/FILE), or stdlib
    start: int
    end: int
    split: str  # "train" or "val" where the source decides; "": decided by a hash of each document

    @property
    def size(self):
        return self.end - self.start


# ---------------------------------------------------------------------------------------------------------------------
# From --source to segments


def list_segments(source, doc_sep="line", known=(), out=""):
    """All Segments of a comma-separated --source, in order.

    known: the segments of an earlier run. Its hub files are reused: they are pinned to a commit, and the hub need not be
    asked again. out: a directory whose files are no source, should it lie inside one. Raises: UserError.
    """
    segments = []
    if "," in source and os.path.exists(source):
        hint = "rename it, or write ? in its place, and /* behind a directory"
        raise UserError(f"{source}: a comma in a name, but commas separate sources ({hint})")
    for part in filter(None, (os.path.expanduser(part.strip()) for part in source.split(","))):
        if part == "stdlib":
            segments.append(Segment("stdlib", 0, sum(map(len, stdlib_documents())), ""))
        elif part == "c4":
            names = {name % i: split for split, (name, count) in C4_FILES.items() for i in range(count)}
            segments += hub_segments(C4, "", known, names)
        elif (hub := HUB_NAME.fullmatch(part)) and not os.path.exists(part) and split_suffixes(part)[0] not in FORMATS:
            segments += hub_segments(hub[1], hub[2] or "", known)
        else:
            segments += [segment for path in list_files(part, out) for segment in file_segments(path, doc_sep)]
    seen = {}
    for segment in segments:
        key = os.path.realpath(segment.path), segment.start
        if key in seen:
            other, path = sorted((seen[key], segment.path), key=os.path.islink)
            if os.path.islink(path):
                raise UserError(f"{path}: a link, to the same file as {other} (remove the link)")
            raise UserError(f"{path}: listed twice in --source={source} (list it once)")
        seen[key] = segment.path
    return segments


def list_files(part, out=""):
    """The files of a path, URL, directory or pattern, sorted. Prints what it skipped. Raises: UserError."""
    is_directory, found = list_remote(part) if is_remote(part) else list_local(without_slash(part))
    inside_out = os.path.realpath(out) + os.sep
    found = [path for path in found if not (out and os.path.realpath(path).startswith(inside_out))] or found
    arrow = {os.path.dirname(path) for path in found if is_directory and path.endswith(".arrow")}
    if saved := [path for path in arrow if os.path.join(path, "dataset_info.json") in found]:
        hint = 'load it, and ds.to_parquet("x.parquet") writes a file that is'
        raise UserError(f"{min(saved)}: a datasets.save_to_disk directory: its Arrow files are not read ({hint})")
    paths, skipped = [], collections.Counter()
    for path in found:
        if path.endswith("/") or os.path.isdir(path):
            skipped["directories"] += "**" not in part
        elif os.path.exists(path) and not os.path.isfile(path):  # reading a named pipe would wait for its writer
            skipped["pipes or devices"] += 1
        elif is_directory and f"{os.sep}." in path[len(part.rstrip(os.sep)) :]:
            skipped["hidden"] += 1
        elif is_directory and split_suffixes(path)[0] not in FORMATS:
            skipped[os.path.splitext(path)[1] or os.path.basename(path)] += 1
        else:
            paths.append(path)
    reasons = ", ".join(f"{count:,} {what}" for what, count in skipped.most_common(9) if count)
    if not paths and reasons:
        raise UserError(f"{part}: has no file that can be read: {reasons} (expected {EXPECTED})")
    if not paths and is_directory:
        raise UserError(f"{part}: an empty directory (expected {EXPECTED})")
    if not paths:
        nearest = similar(part)
        hint = f"did you mean {nearest}?" if nearest else "c4, stdlib, owner/name on the hub, or files"
        raise UserError(f"{part}: no such source ({hint}; formats: {EXPECTED})")
    for path in paths:
        check_format(path, path)
        try:
            path.encode()
        except UnicodeEncodeError:  # no report could hold it
            raise UserError(f"{path!a}: the file name is not UTF-8 (rename it)") from None
    if reasons:
        print(f"{part}: {len(paths):,} files to read; skipped {reasons}")
    return paths


def list_local(part):
    """(whether it is a directory, the paths in it) of a path or pattern."""
    if os.path.isdir(part):
        return True, files_below(part)
    return False, [part] if os.path.isfile(part) else sorted(glob.glob(part, recursive=True))


def files_below(directory):
    """All files of a directory, sorted. Links to directories are followed, and each directory is read once.

    Raises: UserError for a directory that cannot be read, which glob would leave out.
    """

    def refuse(error):
        raise UserError(f"{error.filename}: {error.strerror} (make it readable, or list the others in --source)")

    paths, seen = [], set()
    for parent, directories, names in os.walk(directory, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(parent)) in seen:
            directories.clear()
            continue
        seen.add(real)
        paths += [os.path.join(parent, name) for name in names]
    return sorted(paths)


def check_format(name, where):
    """Raises: UserError, starting with `where`, for a file name that `documents` cannot read."""
    kind, compression = split_suffixes(name)
    if kind not in FORMATS or (kind == ".parquet" and compression):
        raise UserError(f"{where}: unknown file format (expected {EXPECTED})")


def file_segments(path, doc_sep):
    size = size_and_version(path)[0] if is_remote(path) else os.path.getsize(path)
    kind, compression = split_suffixes(path)
    by_line = kind == ".jsonl" or (kind == ".txt" and doc_sep == "line")
    step = SEGMENT_BYTES if by_line and not compression and not is_remote(path) else max(size, 1)
    return [Segment(path, start, min(start + step, size), "") for start in range(0, max(size, 1), step)]


def hub_segments(repo, config, known, names=None):
    """Files of a dataset on the hub at its current commit: `names`, {file: split}, or those of its train split."""
    earlier = [segment for segment in known if segment.path.startswith(f"hf://datasets/{repo}@")]
    if earlier and not config:  # segments don't say which configuration they belong to
        return earlier
    try:
        commit, names, sizes = list_hub(repo, config, names)
    except Exception as error:  # whatever the hub's libraries raise
        raise network_error(repo, error, "not a local path either") from None
    for name in names:
        check_format(name, f"{repo}: {name}")
    return [Segment(f"hf://datasets/{repo}@{commit}/{name}", 0, sizes[name], split) for name, split in names.items()]


def versions(segments, again=False):
    """{path: what changes with a file}: for a local one nanoseconds (cheaper than a digest of everything, and no edit keeps
    them), for a remote one what its server tells. again: ask the servers, even for what is known."""
    paths = dict.fromkeys(segment.path for segment in segments)
    paths = [path for path in paths if path != "stdlib" and not PINNED.fullmatch(path)]
    return {path: size_and_version(path, again)[1] if is_remote(path) else os.stat(path).st_mtime_ns for path in paths}


# ---------------------------------------------------------------------------------------------------------------------
# Documents


def documents(segment, cfg, stats):
    """The texts of a Segment, in order, with plain_blanks.

    cfg: has text_key, doc_sep and skip_bad_lines. stats: a Counter that gets "bad lines", those skipped, and
    "segment bytes", how far the segment has been read. Raises: UserError with file and line.
    """
    kind, _ = split_suffixes(segment.path)
    if segment.path == "stdlib":
        texts = stdlib_segment(stats)
    elif kind in TABLES:
        texts = table_documents(segment, cfg, stats)
    else:
        texts = text_documents(segment, cfg, stats) if kind == ".txt" else record_documents(segment, cfg, stats)
    return map(plain_blanks, texts)


@functools.cache
def stdlib_documents():
    """English from the standard library: docstrings of modules, classes and functions, and the topics of pydoc."""
    from pydoc_data.topics import topics

    root = sysconfig.get_path("stdlib")
    skipped = ("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "pydoc_data")
    texts = {inspect.cleandoc(text) for text in topics.values()}
    for directory, subdirectories, files in os.walk(root):
        subdirectories[:] = sorted(name for name in subdirectories if name not in skipped)
        for file in sorted(name for name in files if name.endswith(".py")):
            with open(os.path.join(directory, file), "rb") as source:
                try:
                    tree = ast.parse(source.read())
                except (SyntaxError, ValueError):
                    continue
            for node in ast.walk(tree):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                    texts.add(ast.get_docstring(node) or "")
    return sorted(text for text in texts if len(text) >= 40 and len(text.split()) >= 6)


def stdlib_segment(stats):
    for text in stdlib_documents():
        stats["segment bytes"] += len(text)
        yield text


def text_documents(segment, cfg, stats):
    lines = numbered_lines(segment.path, cfg, stats, segment.start, segment.end)
    if cfg.doc_sep == "line":
        inside = 0
        for _, line in lines:
            inside += "\r" in line
            yield line
        if inside:
            lines = f"{inside:,} line{'s' * (inside > 1)}"
            text = f"carriage returns inside {lines} (old Mac line ends? tr '\\r' '\\n' < FILE > NEW)"
            stats[f"suspect {segment.path}: {text}"] += 1
        return
    paragraph, first, size = [], 1, 0
    for number, line in lines:
        if cfg.doc_sep == "blank" and not line.strip():
            yield "\n".join(paragraph)
            paragraph, first, size = [], number + 1, 0
            continue
        paragraph.append(line)
        size += len(line) + 1
        if size > MAX_TEXT:
            paragraph = []
            if size - len(line) - 1 <= MAX_TEXT:
                reason = f"a document of more than {gigabytes(MAX_TEXT)} (try another --doc_sep)"
                skip_or_fail(cfg, stats, f"{segment.path}:{first}: {reason}")
    if paragraph:
        yield "\n".join(paragraph)


def record_documents(segment, cfg, stats):
    """JSON objects, one per line, in a single array, or one over several lines, or the rows of a Parquet file."""
    path, kind = segment.path, split_suffixes(segment.path)[0]
    if kind == ".parquet":
        records = parquet_records(path, [cfg.text_key], SEE, stats)
    else:
        records = numbered_lines(path, cfg, stats, segment.start, segment.end)
    if kind == ".json":
        records = lines_or_whole(segment, records, stats)
    for number, cells in record_cells(records, [cfg.text_key], SEE):
        if isinstance(cells, list) and len("".join(cells)) > MAX_TEXT:
            cells = f"a text of more than {gigabytes(MAX_TEXT)} (split it)"
        if isinstance(cells, str):
            skip_or_fail(cfg, stats, f"{location(path, number, segment.start)}: {cells}")
        elif cells:
            yield cells[0]


def lines_or_whole(segment, lines, stats):
    """The (number, text) pairs of a .json, or ("record number", object) of the array or object over several lines that is
    all of it, and is read whole."""
    number, first = next(lines, (1, ""))
    opens, ends = first.lstrip()[:1], first.rstrip()[-1:]
    if opens != "[" and not (opens == "{" and ends in "{[,"):
        yield from itertools.chain([(number, first)], lines)
        return
    parts, size = [first], len(first)
    for _, line in lines:
        parts.append(line)
        size += len(line) + 1
        if size > MAX_WHOLE:
            reason = f"a list or object of more than {gigabytes(MAX_WHOLE)} (write one object per line, .jsonl)"
            raise UserError(f"{segment.path}: {reason}")
    try:
        records = parse_json("\n".join(parts))
    except ValueError as error:
        raise UserError(f"{segment.path}: {error}") from None
    records = records if isinstance(records, list) else [records]
    for number, record in enumerate(records, 1):
        stats["segment bytes"] = segment.size * number // len(records)
        yield f" record {number}", record if isinstance(record, dict) else [record]


def table_documents(segment, cfg, stats):
    """One column of a .csv or .tsv. The first row names the columns."""
    path = segment.path
    table = open_table(path, numbered_lines(path, cfg, stats, 0, segment.end, keep=True), [cfg.text_key], SEE)
    quoted = False
    for row in rows_of(table) if table else ():
        where = f"{path}:{row.first}"
        if row.suspect:
            stats[f"suspect {where}: a cell holds the next lines, to {row.last} (is a quote not closed?)"] += 1
        if row.quoted and not row.fault and not quoted:
            quoted = True
            stats[f"suspect {where}: a cell in quotes, as a .csv has them; a .tsv's are part of the text (save it as .csv)"] += 1
        if row.fault:
            skip_or_fail(cfg, stats, f"{where}: {row.fault}")
        elif row.cells and row.first != table.header.first:
            yield row.cells[table.columns[0]]
    if table and table.note:
        stats[f"suspect {table.note}"] += 1
