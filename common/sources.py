"""Read text: your own files, datasets of the Hugging Face hub, C4, and the English that every Python ships.

A --source is a comma-separated list, and becomes pieces: a file, or a stretch of a large one. A piece gives the same
documents in the same order whenever it is read, so pieces are what is shared out, and what is done again after a kill.

Read next: prepare_c4.py, which makes shards of what this reads
"""

import ast
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
import time
import zlib
from typing import NamedTuple

from common.options import UserError

STRETCH_BYTES = 64 * 2**20  # of a plain file with a document a line, which is cut so that many processes can read it
READ_ATTEMPTS = 5  # at a read from the hub, waiting 1, 2, 4, ... seconds in between
READ_AHEAD = 2**24  # bytes that one request to the hub fetches
C4 = "allenai/c4"
C4_FILES = {"train": ("en/c4-train.%05d-of-01024.json.gz", 1024), "val": ("en/c4-validation.%05d-of-00008.json.gz", 8)}
KINDS = (".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet")
COMPRESSIONS = (".gz", ".xz", ".zst")
EXPECTED = f"{', '.join(KINDS)}; also {', '.join(COMPRESSIONS)}"
HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+?)(?::([\w.-]+))?")  # owner/name[:config]

csv.field_size_limit(2**31 - 1)  # the default refuses a cell of more than 131,072 characters


class Piece(NamedTuple):
    """What is read at once: the bytes from `start` to `end` of a file."""

    path: str  # a local file, hf://datasets/OWNER/NAME@COMMIT/FILE, or stdlib
    start: int
    end: int
    split: str  # "train" or "val" where the source decides; "": by a hash of each document

    @property
    def size(self):
        return self.end - self.start


# ---------------------------------------------------------------------------------------------------------------------
# What there is to read


def list_pieces(source, doc_sep="line", known=()):
    """Every Piece of a comma-separated --source, in order.

    known: pieces of an earlier run, from which those of the hub are taken: its files may have changed since, and need
    not be asked for. Raises: UserError.
    """
    pieces = []
    for part in filter(None, (part.strip() for part in source.split(","))):
        if part == "stdlib":
            pieces.append(Piece("stdlib", 0, sum(map(len, stdlib_documents())), ""))
        elif part == "c4":
            names = {name % i: split for split, (name, count) in C4_FILES.items() for i in range(count)}
            pieces += pieces_of_hub(C4, "", known, names)
        elif (hub := HUB_NAME.fullmatch(part)) and not os.path.exists(part) and split_suffixes(part)[0] not in KINDS:
            pieces += pieces_of_hub(hub[1], hub[2] or "", known)
        else:
            pieces += [piece for path in list_files(part) for piece in pieces_of_file(path, doc_sep)]
    seen = set()
    for piece in pieces:
        place = os.path.realpath(piece.path), piece.start
        if place in seen:
            raise UserError(f"{piece.path}: twice in --source={source} (name it once)")
        seen.add(place)
    return pieces


def list_files(part):
    """The files of a path, directory or glob, sorted."""
    inside = os.path.join(glob.escape(part), "**", "*")
    paths = sorted(glob.glob(inside if os.path.isdir(part) else part, recursive=True))
    paths = [part] if os.path.isfile(part) else [path for path in paths if os.path.isfile(path)]
    if os.path.isdir(part):  # of a directory take what can be read; of files and globs, everything
        paths = [path for path in paths if split_suffixes(path)[0] in KINDS]
    if not paths:
        raise UserError(f"{part}: no such source (c4, stdlib, owner/name on the hub, or files: {EXPECTED})")
    for path in paths:
        kind, compression = split_suffixes(path)
        if kind not in KINDS or (kind == ".parquet" and compression):
            raise UserError(f"{path}: unknown kind of file (expected {EXPECTED})")
    return paths


def split_suffixes(path):
    """("kind of file", "kind of compression"), such as (".jsonl", ".gz") or (".txt", "")."""
    base, suffix = os.path.splitext(path.lower())
    return (os.path.splitext(base)[1], suffix) if suffix in COMPRESSIONS else (suffix, "")


def pieces_of_file(path, doc_sep):
    size = os.path.getsize(path)
    kind, compression = split_suffixes(path)
    by_line = kind == ".jsonl" or (kind == ".txt" and doc_sep == "line")
    step = STRETCH_BYTES if by_line and not compression else max(size, 1)
    return [Piece(path, start, min(start + step, size), "") for start in range(0, max(size, 1), step)]


def pieces_of_hub(repo, config, known, names=None):
    """The training files of a dataset on the hub, at its present commit; or `names`, {file: split}."""
    prefix = f"hf://datasets/{repo}@"
    if config:  # pieces do not tell configurations apart
        known = ()
    if again := [piece for piece in known if piece.path.startswith(prefix)]:
        return again
    commit, names, sizes = patiently(lambda: list_hub(repo, config, names), repo, "no such file here either; ")
    for name in names:
        if split_suffixes(name)[0] not in KINDS:
            raise UserError(f"{repo}: {name}: unknown kind of file (expected {EXPECTED})")
    return [Piece(f"{prefix}{commit}/{name}", 0, sizes[name], split) for name, split in names.items()]


def list_hub(repo, config, names):
    """(commit, {file: split}, {file: bytes}) of a dataset, from the hub or, with HF_HUB_OFFLINE=1, its local copy."""
    from huggingface_hub import HfApi, constants, snapshot_download

    if constants.HF_HUB_OFFLINE:
        path = snapshot_download(repo, repo_type="dataset", local_files_only=True)
        commit, root = os.path.basename(path), path
    else:
        path, commit = repo, HfApi().dataset_info(repo).sha
        root = f"hf://datasets/{repo}@{commit}"
    if names is None:
        from datasets import load_dataset_builder

        revision = None if path == root else commit
        files = load_dataset_builder(path, config or None, revision=revision).config.data_files
        if "train" not in files:
            raise ValueError(f"no split named train (found: {', '.join(files)})")
        names = {file.removeprefix(f"{root}/"): "" for file in files["train"]}
    if path == root:
        sizes = {name: os.path.getsize(os.path.join(root, name)) for name in names}
    else:
        infos = HfApi().get_paths_info(repo, list(names), revision=commit, repo_type="dataset")
        sizes = {info.path: info.size for info in infos}
    return commit, names, sizes


# ---------------------------------------------------------------------------------------------------------------------
# Bytes


def patiently(action, what, also=""):
    """What action() returns, tried READ_ATTEMPTS times where waiting may help. Raises: UserError naming `what`."""
    for attempt in itertools.count(1):
        try:
            return action()
        except Exception as error:  # whatever the network and the libraries between raise
            status = getattr(getattr(error, "response", None), "status_code", None)
            hopeless = isinstance(error, (FileNotFoundError, ValueError, ImportError)) or status in (401, 403, 404)
            if hopeless or attempt == READ_ATTEMPTS:
                reason = f"{type(error).__name__}: {error}".partition("\n\n")[0][:250]
                tried = "" if hopeless else f"{attempt} attempts; the same command goes on where this stopped; "
                hint = f"{also}{tried}with HF_HUB_OFFLINE=1 it must have been downloaded before"
                raise UserError(f"{what}: cannot be read: {reason} ({hint})") from None
            time.sleep(2 ** (attempt - 1))


class HubFile(io.RawIOBase):
    """A file on the hub. A read that fails is tried again from the byte where it stopped, so nothing comes twice."""

    def __init__(self, path):
        self.path, self.position, self.file = path, 0, None

    def readable(self):
        return True

    def seekable(self):
        return True

    def tell(self):
        return self.position

    def seek(self, offset, whence=io.SEEK_SET):
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position}
        self.position = offset + (base[whence] if whence in base else patiently(self._open, self.path).size)
        return self.position

    def readinto(self, buffer):
        data = patiently(lambda: self._read(len(buffer)), self.path)
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)

    def _open(self):
        if self.file is None:
            self.file = open_remote(self.path)
        return self.file

    def _read(self, count):
        try:
            file = self._open()
            file.seek(self.position)
            data = file.read(min(count, file.size - self.position))
            if not data and self.position < file.size:
                raise EOFError(f"connection closed after {self.position} of {file.size} bytes")
            return data
        except Exception:
            self.file = None
            raise


def open_remote(path):
    from huggingface_hub import HfFileSystem

    return HfFileSystem().open(path.removeprefix("hf://"), "rb", block_size=READ_AHEAD)


def open_bytes(path):
    """The bytes of a local file, or of one of the hub, as they are stored."""
    if not path.startswith("hf://"):
        return open(path, "rb")
    from huggingface_hub import constants, hf_hub_download

    if constants.HF_HUB_OFFLINE:
        repo, _, rest = path.removeprefix("hf://datasets/").partition("@")
        commit, _, name = rest.partition("/")
        where = {"revision": commit, "repo_type": "dataset", "local_files_only": True}
        return open(patiently(lambda: hf_hub_download(repo, name, **where), path), "rb")
    return io.BufferedReader(HubFile(path), 2**20)


def unpack(file, compression, path):
    """What a compressed file holds, as a binary file."""
    if compression == ".gz":
        return gzip.GzipFile(fileobj=file)
    if compression == ".xz":
        return lzma.LZMAFile(file)
    if compression == ".zst":
        try:
            import pyarrow

            return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd"), 2**17)
        except (ImportError, NotImplementedError):  # pyarrow may be built without it
            raise UserError(f"{path}: .zst files need pyarrow with Zstandard (pip install pyarrow)") from None
    return file


# ---------------------------------------------------------------------------------------------------------------------
# Documents


def documents(piece, cfg, stats):
    """The texts of a Piece, in order.

    cfg: text_key, doc_sep and skip_bad_lines. stats: a Counter; lines left out are counted under "bad lines", and
    "piece bytes" says how much of the piece has been read. Raises: UserError naming file and line.
    """
    kind, _ = split_suffixes(piece.path)
    if piece.path == "stdlib":
        return counted(stdlib_documents(), stats)
    if kind == ".parquet":
        return parquet_documents(piece, cfg, stats)
    if kind in (".csv", ".tsv"):
        return table_documents(piece, cfg, stats, kind)
    if kind == ".txt":
        return text_documents(piece, cfg, stats)
    return json_documents(piece, cfg, stats, kind)


@functools.cache
def stdlib_documents():
    """English from the standard library: docstrings of its modules, classes and functions, and pydoc's topics."""
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


def counted(texts, stats):
    for text in texts:
        stats["piece bytes"] += len(text)
        yield text


def text_documents(piece, cfg, stats):
    paragraph = []
    for _, line in numbered_lines(piece.path, cfg, stats, piece.start, piece.end):
        if cfg.doc_sep == "line":
            yield line
        elif cfg.doc_sep == "blank" and not line.strip():
            yield "\n".join(paragraph)
            paragraph = []
        else:
            paragraph.append(line)
    if paragraph:
        yield "\n".join(paragraph)


def json_documents(piece, cfg, stats, kind):
    """One object a line; a .json file may also be one array of objects, which is then read whole."""
    lines = numbered_lines(piece.path, cfg, stats, piece.start, piece.end)
    first = next(lines, None)
    if kind == ".json" and first and first[1].lstrip().startswith("["):
        yield from array_documents("\n".join([first[1], *(line for _, line in lines)]), piece, cfg, stats)
        return
    for number, line in itertools.chain([first] if first else [], lines):
        if not line.strip():
            continue
        try:
            text = text_of(parse_json(line), cfg.text_key)
        except ValueError as error:
            skip_or_fail(cfg, stats, f"{place(piece.path, number, piece.start)}: {error}")
        else:
            yield text


def array_documents(contents, piece, cfg, stats):
    path, size = piece.path, piece.size
    try:
        records = parse_json(contents)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    for number, record in enumerate(records, 1):
        try:
            text = text_of(record, cfg.text_key)
        except ValueError as error:
            skip_or_fail(cfg, stats, f"{path}: record {number}: {error}")
        else:
            stats["piece bytes"] = size * number // len(records)
            yield text


def parse_json(text):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON: {error} (expected one object a line)") from None


def text_of(record, text_key):
    """The text in a JSON object. Raises: ValueError saying what is wrong with it."""
    if not isinstance(record, dict) or text_key not in record:
        keys = ", ".join(list(record)[:5]) if isinstance(record, dict) else "none"
        raise ValueError(f"no {text_key!r} (keys: {keys}; see --text_key)")
    text = record[text_key]
    if not isinstance(text, str):
        raise ValueError(f"{text_key!r} is {type(text).__name__} (expected a string)")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{text_key!r} holds half a surrogate pair (no text can be made of it)") from None
    return text


def table_documents(piece, cfg, stats, kind):
    """A column of a .csv, or of a .tsv, where quotes are literal. The first line names the columns."""
    path, number, header = piece.path, 0, None

    def lines():
        nonlocal number
        for number, line in numbered_lines(path, cfg, stats):
            yield f"{line}\n"

    if kind == ".csv":
        rows = csv.reader(lines(), strict=True)
    else:
        rows = (line[:-1].split("\t") if line.strip() else [] for line in lines())
    while True:
        try:
            cells = next(rows, None)
        except csv.Error as error:
            skip_or_fail(cfg, stats, f"{path}:{number}: {error} (is a quote not closed?)")
            continue
        if cells is None:
            return
        if header is None:
            header = cells
            if cfg.text_key not in header:
                found = ", ".join(header)[:200]
                raise UserError(f"{path}:{number}: no column {cfg.text_key!r} (found: {found}; see --text_key)")
        elif len(cells) == len(header):
            yield cells[header.index(cfg.text_key)]
        elif cells:
            sign = "comma" if kind == ".csv" else "tab"
            text = f"{len(cells)} columns, expected {len(header)} (is a {sign} outside quotes?)"
            skip_or_fail(cfg, stats, f"{path}:{number}: {text}")


def parquet_documents(piece, cfg, stats):
    """A column of a Parquet file, a thousand rows at a time."""
    path = piece.path
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{path}: .parquet files need pyarrow (pip install pyarrow)") from None
    try:
        with open_bytes(path) as raw:
            file, number = parquet.ParquetFile(raw), 0
            if cfg.text_key not in file.schema_arrow.names:
                found = ", ".join(file.schema_arrow.names)[:200]
                raise UserError(f"{path}: no column {cfg.text_key!r} (found: {found}; see --text_key)")
            kind = file.schema_arrow.field(cfg.text_key).type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise UserError(f"{path}: {cfg.text_key!r} is {kind} (expected strings; see --text_key)")
            for batch in file.iter_batches(1000, columns=[cfg.text_key]):
                for number, value in enumerate(batch.column(0), number + 1):
                    try:
                        text = value.as_py()
                    except UnicodeDecodeError as error:
                        skip_or_fail(cfg, stats, f"{path}:{number}: not UTF-8: {error.reason} (row {number})")
                        continue
                    if text is None:
                        skip_or_fail(cfg, stats, f"{path}:{number}: {cfg.text_key!r} is null (row {number})")
                        continue
                    yield text
                stats["piece bytes"] = piece.size * number // file.metadata.num_rows
    except OSError as error:
        if error.errno is None:
            raise UserError(f"{path}: {error} (damaged, or not a Parquet file)") from None
        raise UserError(f"{path}: {error.strerror}") from None
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: {error} (damaged, or not a Parquet file)") from None


def numbered_lines(path, cfg, stats, start=0, end=None):
    """(number, text) of each line, without its end and a byte-order mark.

    Lines end at \\n alone, as JSON strings may hold other separators. start, end: bytes of a plain file; a line belongs
    to the stretch in which it begins, and is numbered from there (see place). Raises: UserError naming file and line.
    """
    _, compression = split_suffixes(path)
    number = 0
    try:
        with open_bytes(path) as raw, unpack(raw, compression, path) as file:
            if start:
                raw.seek(start - 1)
                raw.readline()
            begins = raw.tell()
            for number, line in enumerate(file, 1):
                if not compression:
                    if end is not None and begins >= end:
                        break
                    begins += len(line)
                if number % 16 == 0 or len(line) > 1000:
                    stats["piece bytes"] = raw.tell() - start
                try:
                    text = line.decode("utf-8-sig" if number == 1 and not start else "utf-8")
                except UnicodeDecodeError as error:
                    where = place(path, number, start)
                    skip_or_fail(cfg, stats, f"{where}: not UTF-8: {error.reason} (convert the file first)")
                    continue
                yield number, text.rstrip("\r\n")
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        if getattr(error, "errno", None) is None:
            hint = f"truncated, or not a {compression} file" if compression else "damaged"
            raise UserError(f"{path}:{number + 1}: {error} ({hint})") from None
        raise UserError(f"{path}: {error.strerror}") from None


def place(path, number, start):
    """FILE:LINE of a line that is number `number` of the stretch that starts at byte `start`."""
    if start:
        with open_bytes(path) as file:
            for position in range(0, start - 1, 2**20):
                number += file.read(min(2**20, start - 1 - position)).count(b"\n")
        number += 1  # the line that the stretch starts in
    return f"{path}:{number}"


def skip_or_fail(cfg, stats, text):
    """Count a line that cannot be read, or raise a UserError if there have been too many."""
    if stats["bad lines"] >= cfg.skip_bad_lines:
        raise UserError(text)
    stats["bad lines"] += 1
