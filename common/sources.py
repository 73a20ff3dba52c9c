"""Read text: local files, Hugging Face datasets, C4, and the English in Python's standard library.

A --source is a comma-separated list. It becomes segments: files, or byte ranges of large ones. A segment always yields
the same documents in the same order, so segments can be read in parallel, and again after a kill.

Read next: prepare_c4.py, which turns the documents into shards
"""

import ast
import collections
import csv
import functools
import glob
import gzip
import inspect
import io
import itertools
import json
import lzma
import os
import re
import sysconfig
import zlib
from typing import NamedTuple

from common.files import gigabytes
from common.options import UserError, similar

SEGMENT_BYTES = 64 * 2**20  # a plain file with a document per line is split into byte ranges of this size
READ_AHEAD = 2**24  # bytes per request to the hub
C4 = "allenai/c4"
C4_FILES = {"train": ("en/c4-train.%05d-of-01024.json.gz", 1024), "val": ("en/c4-validation.%05d-of-00008.json.gz", 8)}
FORMATS = (".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet")
COMPRESSIONS = (".gz", ".xz", ".zst")
EXPECTED = f"{', '.join(FORMATS)}; also {', '.join(COMPRESSIONS)}"
HUB_NAME = re.compile(r"(\w[\w.-]*/[\w.-]+?)(?::([\w.-]+))?")  # owner/name[:config]
MAX_TEXT = 2**27  # bytes of a line, a cell or a document: a small .gz can hold a line that fills any memory
MAX_ARRAY = 2**30  # characters of a .json that is a single array, which is read whole

MAGIC = {  # how files begin that are no text, whatever their names say
    b"%PDF-": "a PDF", b"PK\x03\x04": "a zip file, as .docx and .xlsx are", b"\xd0\xcf\x11\xe0": "an old Word or Excel file",
    b"{\\rtf": "an RTF file", b"\x1f\x8b": "a .gz file", b"\xfd7zXZ": "an .xz file", b"\x28\xb5\x2f\xfd": "a .zst file",
    b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\x89PNG": "a picture", b"\xff\xd8\xff": "a picture",
}  # fmt: skip

csv.field_size_limit(MAX_TEXT)  # the default rejects cells above 131,072 characters


class Segment(NamedTuple):
    """Bytes `start` to `end` of a file; the fields are also what manifest.json stores."""

    path: str  # local file, hf://datasets/OWNER/NAME@COMMIT/FILE, or stdlib
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
    seen = set()
    for segment in segments:
        key = os.path.realpath(segment.path), segment.start
        if key in seen:
            raise UserError(f"{segment.path}: listed twice in --source={source} (list it once)")
        seen.add(key)
    return segments


def list_files(part, out=""):
    """The files of a path, directory or glob, sorted. Prints what it skipped. Raises: UserError."""
    is_directory = os.path.isdir(part)
    pattern = os.path.join(glob.escape(part), "**", "*") if is_directory else part
    inside_out = os.path.realpath(out) + os.sep
    found = [part] if os.path.isfile(part) else sorted(glob.glob(pattern, recursive=True, include_hidden=is_directory))
    found = [path for path in found if not (out and os.path.realpath(path).startswith(inside_out))] or found
    paths, skipped = [], collections.Counter()
    for path in found:
        if os.path.isdir(path):
            skipped["directories"] += "**" not in pattern
        elif is_directory and f"{os.sep}." in path[len(part.rstrip(os.sep)) :]:
            skipped["hidden"] += 1
        elif is_directory and split_suffixes(path)[0] not in FORMATS:
            skipped[os.path.splitext(path)[1] or os.path.basename(path)] += 1
        else:
            paths.append(path)
    reasons = ", ".join(f"{count:,} {what}" for what, count in skipped.most_common(9) if count)
    if not paths and reasons:
        raise UserError(f"{part}: has no file that can be read: {reasons} (expected {EXPECTED})")
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


def check_format(name, where):
    """Raises: UserError, starting with `where`, for a file name that `documents` cannot read."""
    kind, compression = split_suffixes(name)
    if kind not in FORMATS or (kind == ".parquet" and compression):
        raise UserError(f"{where}: unknown file format (expected {EXPECTED})")


def split_suffixes(path):
    """(format, compression) of a file name, such as (".jsonl", ".gz") or (".txt", "")."""
    base, suffix = os.path.splitext(path.lower().replace(".ndjson", ".jsonl"))
    return (os.path.splitext(base)[1], suffix) if suffix in COMPRESSIONS else (suffix, "")


def file_segments(path, doc_sep):
    size = os.path.getsize(path)
    kind, compression = split_suffixes(path)
    by_line = kind == ".jsonl" or (kind == ".txt" and doc_sep == "line")
    step = SEGMENT_BYTES if by_line and not compression else max(size, 1)
    return [Segment(path, start, min(start + step, size), "") for start in range(0, max(size, 1), step)]


def hub_segments(repo, config, known, names=None):
    """Files of a dataset on the hub at its current commit: `names`, {file: split}, or those of its train split."""
    earlier = [segment for segment in known if segment.path.startswith(f"hf://datasets/{repo}@")]
    if earlier and not config:  # segments don't say which configuration they belong to
        return earlier
    try:
        commit, names, sizes = list_hub(repo, config, names)
    except Exception as error:  # whatever the hub's libraries raise
        raise hub_error(repo, error, "not a local path either") from None
    for name in names:
        check_format(name, f"{repo}: {name}")
    return [Segment(f"hf://datasets/{repo}@{commit}/{name}", 0, sizes[name], split) for name, split in names.items()]


def list_hub(repo, config, names):
    """(commit, {file: split}, {file: bytes}) of a dataset on the hub, or of its local copy with HF_HUB_OFFLINE=1."""
    from huggingface_hub import HfApi, HfFileSystem, constants, snapshot_download

    if constants.HF_HUB_OFFLINE:
        root = snapshot_download(repo, repo_type="dataset", local_files_only=True)
        path, commit, revision, size_of = root, os.path.basename(root), None, os.path.getsize
    else:
        commit = revision = HfApi().dataset_info(repo).sha
        path, root, size_of = repo, f"hf://datasets/{repo}@{commit}", HfFileSystem().size
    if names is None:
        from datasets import load_dataset_builder

        files = load_dataset_builder(path, config or None, revision=revision).config.data_files
        if "train" not in files:
            raise ValueError(f"no split named train (found: {', '.join(files)})")
        names = {file.removeprefix(f"{root}/"): "" for file in files["train"]}
    return commit, names, {name: size_of(f"{root}/{name}") for name in names}


def hub_error(what, error, hint="the same command resumes"):
    """A UserError for anything that huggingface_hub, datasets, or the network below them raised."""
    reason = f"{type(error).__name__}: {error}".partition("\n\n")[0][:250]
    return UserError(f"{what}: cannot be read: {reason} ({hint}; HF_HUB_OFFLINE=1 reads a downloaded copy)")


# ---------------------------------------------------------------------------------------------------------------------
# Bytes and lines


def open_bytes(path):
    """The raw bytes of a local file, or of a hub file, which is streamed: nothing is written to disk."""
    if not path.startswith("hf://"):
        return open(path, "rb")
    from huggingface_hub import HfFileSystem, constants, hf_hub_download

    if constants.HF_HUB_OFFLINE:
        repo, _, rest = path.removeprefix("hf://datasets/").partition("@")
        commit, _, name = rest.partition("/")
        return open(hf_hub_download(repo, name, repo_type="dataset", revision=commit, local_files_only=True), "rb")
    # One request per READ_AHEAD bytes, each retried by the library for about half a minute.
    return io.BufferedReader(HfFileSystem().open(path, "rb", block_size=READ_AHEAD))


def decompress(file, compression):
    """A binary file with the decompressed contents of `file`."""
    if compression == ".gz":
        return gzip.GzipFile(fileobj=file)
    if compression == ".xz":
        return lzma.LZMAFile(file)
    if compression == ".zst":
        import pyarrow  # here and below: slow to import, and rarely needed

        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd"), 2**17)
    return file


def not_text(beginning):
    """What a file that begins with these bytes looks like; None for text, which may have a stray zero."""
    known = next((kind for magic, kind in MAGIC.items() if beginning.startswith(magic)), None)
    if known or 4 * beginning.count(0) < len(beginning):
        return known
    return "a binary file" if 0 in beginning[::2] and 0 in beginning[1::2] else "UTF-16"


def not_utf8(line, error):
    """Why a line of bytes is no text, with a guess at what it is."""
    letters = sum(byte >= 128 for byte in line)
    guess = "Latin-1 or Windows-1252" if 4 * letters < len(line) else "an older encoding, as GBK or Windows-1251 are"
    return f"not UTF-8: {error.reason} ({guess}? convert it: iconv -f ENCODING -t UTF-8)"


def numbered_lines(path, cfg, stats, start=0, end=None):
    """(number, text) of each line, without line end and byte-order mark.

    Only \\n ends a line: JSON strings may hold Unicode's other separators. start, end: a byte range of an uncompressed
    file; lines belong to the range that they start in, and are numbered within it. A file that is no text counts as a
    single line that cannot be read. Raises: UserError with file and line.
    """
    _, compression = split_suffixes(path)
    end = None if compression else end
    number = 0
    try:
        with open_bytes(path) as raw, decompress(raw, compression) as file:
            if start:
                raw.seek(start - 1)
                skip_line(raw, end)
            position = raw.tell()
            for number, line in enumerate(iter(functools.partial(file.readline, MAX_TEXT), b""), 1):
                if end is not None and position >= end:
                    break
                if number == 1 and not start and (kind := not_text(line[:4096])):
                    hint = "iconv -f UTF-16 -t UTF-8 converts it" if kind == "UTF-16" else "convert it, or leave it out"
                    skip_or_fail(cfg, stats, f"{path}: looks like {kind}, not UTF-8 text ({hint})")
                    return
                position += len(line)
                if len(line) == MAX_TEXT and not line.endswith(b"\n"):
                    skip_line(file, end)
                    position = raw.tell()
                    where = location(path, number, start)
                    skip_or_fail(cfg, stats, f"{where}: a line of more than {gigabytes(MAX_TEXT)} (split it)")
                    continue
                if number % 16 == 0 or len(line) > 1000:
                    stats["segment bytes"] = raw.tell() - start
                try:
                    text = line.decode("utf-8-sig" if number == 1 and not start else "utf-8")
                except UnicodeDecodeError as error:
                    skip_or_fail(cfg, stats, f"{location(path, number, start)}: {not_utf8(line, error)}")
                    continue
                yield number, text.rstrip("\r\n")
            if end is not None and position < end:
                raise EOFError(f"ends after {position:,} of {end:,} bytes")
    except UserError:
        raise
    except read_errors(path) as error:
        raise read_error(path, error, f"{path}:{number + 1}") from None


def skip_line(file, end):
    """Read up to the end of the line in small pieces, but not far beyond the position `end`."""
    while (piece := file.readline(2**20)) and not piece.endswith(b"\n"):
        if end is not None and file.tell() >= end:
            return


def location(path, number, start):
    """FILE:LINE of line `number` of the byte range that begins at `start`."""
    if start:
        with open_bytes(path) as file:
            for position in range(0, start - 1, 2**20):
                number += file.read(min(2**20, start - 1 - position)).count(b"\n")
        number += 1  # for the line that the range starts in
    return f"{path}:{number}"


def read_errors(path):
    """The exceptions that a disk and the decompressors raise; over the network, anything."""
    return (Exception,) if path.startswith("hf://") else (OSError, EOFError, zlib.error, lzma.LZMAError)


def read_error(path, error, where):
    """The UserError for one of read_errors."""
    if path.startswith("hf://"):
        return hub_error(where, error)
    if isinstance(error, OSError) and error.errno is not None:
        return UserError(f"{path}: {error.strerror}")
    return UserError(f"{where}: {error} (truncated, or not a {os.path.splitext(path)[1]} file)")


def skip_or_fail(cfg, stats, text):
    """Count and name a line that cannot be read. Raises: UserError once there are more than cfg.skip_bad_lines."""
    if stats["bad lines"] >= cfg.skip_bad_lines:
        reason = f"{text[:-1]}; " if text.endswith(")") else f"{text} ("
        raise UserError(f"{reason}--skip_bad_lines={max(100, 2 * cfg.skip_bad_lines)} skips such lines)")
    stats["bad lines"] += 1
    stats[f"skipped {text}"] += 1


# ---------------------------------------------------------------------------------------------------------------------
# Documents


def documents(segment, cfg, stats):
    """The texts of a Segment, in order.

    cfg: has text_key, doc_sep and skip_bad_lines. stats: a Counter that gets "bad lines", those skipped, and
    "segment bytes", how far the segment has been read. Raises: UserError with file and line.
    """
    if segment.path == "stdlib":
        return stdlib_segment(stats)
    kind, _ = split_suffixes(segment.path)
    if kind == ".parquet":
        return parquet_documents(segment, cfg, stats)
    if kind in (".csv", ".tsv"):
        return table_documents(segment, cfg, stats)
    if kind == ".txt":
        return text_documents(segment, cfg, stats)
    return json_documents(segment, cfg, stats)


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
    if cfg.doc_sep != "file" and not segment.start:
        beginning = list(itertools.islice(lines, 2))
        if len(beginning) == 1 and "\r" in beginning[0][1]:
            hint = "convert it: tr '\\r' '\\n' < FILE > NEW; or --doc_sep=file"
            skip_or_fail(cfg, stats, f"{segment.path}: a single line, with \\r inside: old Mac line ends ({hint})")
            return
        lines = itertools.chain(beginning, lines)
    if cfg.doc_sep == "line":
        yield from (line for _, line in lines)
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


def json_documents(segment, cfg, stats):
    """One JSON object per line. A .json file may also hold a single array of objects; that is read whole."""
    path = segment.path
    lines = numbered_lines(path, cfg, stats, segment.start, segment.end)
    if split_suffixes(path)[0] == ".json":
        number, first = next(lines, (1, ""))
        if first.lstrip().startswith("["):
            parts, size = [first], len(first)
            for _, line in lines:
                parts.append(line)
                size += len(line) + 1
                if size > MAX_ARRAY:
                    reason = f"an array of more than {gigabytes(MAX_ARRAY)} (write one object per line, .jsonl)"
                    raise UserError(f"{path}: {reason}")
            yield from array_documents("\n".join(parts), segment, cfg, stats)
            return
        lines = itertools.chain([(number, first)], lines)
    for number, line in lines:
        if not line.strip():
            continue
        try:
            text = text_of(parse_json(line), cfg.text_key)
        except ValueError as error:
            skip_or_fail(cfg, stats, f"{location(path, number, segment.start)}: {error}")
        else:
            yield text


def array_documents(contents, segment, cfg, stats):
    try:
        records = parse_json(contents)
    except ValueError as error:
        raise UserError(f"{segment.path}: {error}") from None
    for number, record in enumerate(records, 1):
        try:
            text = text_of(record, cfg.text_key)
        except ValueError as error:
            skip_or_fail(cfg, stats, f"{segment.path}: record {number}: {error}")
        else:
            stats["segment bytes"] = segment.size * number // len(records)
            yield text


def parse_json(text):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON: {error} (expected one object per line)") from None


def text_of(record, text_key):
    """The text in a JSON object. Raises: ValueError that says why there is none."""
    if not isinstance(record, dict) or text_key not in record:
        keys = ", ".join(list(record)[:5])[:200] if isinstance(record, dict) else "none"
        raise ValueError(f"no {text_key!r} (keys: {keys}; see --text_key)")
    text = record[text_key]
    if not isinstance(text, str):
        raise ValueError(f"{text_key!r} is {type(text).__name__} (expected a string)")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{text_key!r} has half a surrogate pair (not Unicode text)") from None
    return text


def table_documents(segment, cfg, stats):
    """One column of a .csv or .tsv. The first row names the columns."""
    path, column = segment.path, None
    lines = numbered_lines(path, cfg, stats, 0, segment.end)
    for row in table_rows(lines, *TABLES[split_suffixes(path)[0]]):
        where = f"{path}:{row.first}"
        if row.suspect:
            stats[f"suspect {where}: a cell holds the next lines, to {row.last} (is a quote not closed?)"] += 1
        if row.fault:
            skip_or_fail(cfg, stats, f"{where}: {row.fault}")
        elif row.cells and column is None:
            column = column_of(row.cells, cfg.text_key, where)
        elif row.cells:
            yield row.cells[column]


TABLES = {".csv": (",", True), ".tsv": ("\t", False)}  # separator, and whether quotes mean something
SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "vertical bar"}


class TableRow(NamedTuple):
    first: int  # line
    last: int
    cells: list  # of strings; none for a blank line, or with a fault
    fault: str  # why it is not a row, or ""
    suspect: bool  # whether its cells hold lines that look like rows, which an open quote has swallowed


def table_rows(lines, separator, quotes, is_row=None):
    """Yield the TableRows of (number, text) pairs, as from numbered_lines. All have as many cells as the first, or a fault.

    The lines after one whose quote is not closed are read again, so it swallows none of them. text: None for a line that
    could not be read. quotes: whether cells in double quotes may hold separators and line breaks. is_row(text): whether a
    line in such a cell is surely a row; a suspect row has a fault then.

    Python's csv, not pyarrow's: that one takes an unclosed quote, or text after a closing one, without an error, and
    refuses rows longer than its block.
    """
    lines, again, row, columns = iter(lines), collections.deque(), [], 0  # lines to read again, lines of this row

    def row_lines():
        while pair := again.popleft() if again else next(lines, None):
            row.append(pair)
            if pair[1] is None:
                raise csv.Error("not UTF-8")
            yield f"{pair[1]}\n"

    def records():
        if quotes:
            return csv.reader(row_lines(), delimiter=separator, strict=True)
        return (line[:-1].split(separator) if line.strip() else [] for line in row_lines())

    reader = records()
    while True:
        row.clear()
        fault = ""
        try:
            cells = next(reader, None)
        except csv.Error as error:
            upto = f", up to line {row[-1][0]}" if len(row) > 1 else ""
            cells, fault = [], f"{error}{upto} (is a quote not closed?)" if row[0][1] is not None else f"{error}"
        if cells is None:
            return
        columns = columns or len(cells)
        if cells and len(cells) != columns:
            fault = f"{len(cells)} column{'s' * (len(cells) > 1)}, expected {columns} (is a {SEPARATORS[separator]} outside quotes?)"
        several = len(row) > 1 and columns > 1 and not fault
        inside = [line for cell in cells for line in cell.split("\n")] if several else []
        rows_inside = sum(is_row(line) if is_row else line.count(separator) == columns - 1 for line in inside)
        suspect = 0 < len(row) - 1 <= 2 * rows_inside
        if suspect and is_row:
            fault = f"one row up to line {row[-1][0]}, though its lines are rows (is a quote not closed?)"
        yield TableRow(row[0][0], row[-1][0], [] if fault else cells, fault, suspect)
        if fault:
            again.extendleft(reversed(row[1:]))
            reader = records()


def column_of(names, text_key, where):
    """The index of the text column. Raises: UserError."""
    if text_key not in names:
        marks = [mark for mark in (";", "\t", "|", ",") if len(names) == 1 and mark in names[0]]
        hint = "see --text_key"
        if marks:
            convert = f"csv.writer(sys.stdout).writerows(csv.reader(sys.stdin, delimiter={marks[0]!r}))"
            hint = f"are columns separated by {marks[0]!r}? .csv takes commas, .tsv tabs"
            hint += f'; to convert: python -c "import csv, sys; {convert}" < FILE > NEW.csv'
        raise UserError(f"{where}: no column {text_key!r} (found: {', '.join(names)[:200]}; {hint})")
    return names.index(text_key)


def parquet_documents(segment, cfg, stats):
    """One column of a Parquet file, up to a thousand rows at a time.

    A cell may be as large as its whole column chunk, and a dictionary stores one once for many rows. So a batch has as few
    rows as fit into MAX_ARRAY if each were that large.
    """
    import pyarrow
    from pyarrow import parquet

    path, key = segment.path, cfg.text_key
    try:
        with open_bytes(path) as raw:
            file, number = parquet.ParquetFile(raw), 0
            kind = file.schema_arrow.types[column_of(file.schema_arrow.names, key, path)]
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise UserError(f"{path}: {key!r} is {kind} (expected strings; see --text_key)")
            column = next(i for i, leaf in enumerate(file.schema) if leaf.path == key)
            groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
            largest = max((group.column(column).total_uncompressed_size for group in groups), default=0)
            rows = min(1000, max(1, MAX_ARRAY // max(1, largest)))
            for batch in file.iter_batches(rows, columns=[key]):
                for number, text in enumerate(batch.column(0).to_pylist(), number + 1):
                    if text is None:
                        skip_or_fail(cfg, stats, f"{path}:{number}: {key!r} is null")
                    elif len(text) > MAX_TEXT:
                        skip_or_fail(cfg, stats, f"{path}:{number}: a cell of more than {gigabytes(MAX_TEXT)} (split it)")
                    else:
                        yield text
                stats["segment bytes"] = segment.size * number // file.metadata.num_rows
    except UserError:
        raise
    except (*read_errors(path), UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise read_error(path, error, path) from None
