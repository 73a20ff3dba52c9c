"""Lines of text files, local or remote, plain or compressed; what is no text is named with its line."""

import collections
import functools
import gzip
import io
import itertools
import lzma
import os
import re
import zlib

from common.files import gigabytes
from common.options import UserError
from common.remote import is_remote, network_error, open_remote

COMPRESSIONS = (".gz", ".xz", ".zst")
MAX_TEXT = 2**27  # bytes of a line, a cell or a document: a small .gz can hold a line that fills any memory

NO_MARKS = re.compile(rb'[^",;\t|]+')  # what does not decide where cells and rows end

MAGIC = {  # how files begin that are no text, whatever their names say
    b"%PDF-": "a PDF", b"PK\x03\x04": "a zip file, as .docx and .xlsx are", b"\xd0\xcf\x11\xe0": "an old Word or Excel file",
    b"{\\rtf": "an RTF file", b"\x1f\x8b": "a .gz file", b"\xfd7zXZ": "an .xz file", b"\x28\xb5\x2f\xfd": "a .zst file",
    b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16",
    b"\x89PNG": "a picture", b"\xff\xd8\xff": "a picture",
}  # fmt: skip


def split_suffixes(path):
    """(format, compression) of a file name or URL, such as (".jsonl", ".gz") or (".txt", "")."""
    name = path.partition("?")[0] if is_remote(path) else path
    base, suffix = os.path.splitext(name.lower().replace(".ndjson", ".jsonl"))
    return (os.path.splitext(base)[1], suffix) if suffix in COMPRESSIONS else (suffix, "")


def open_bytes(path):
    """The raw bytes of a file."""
    return open_remote(path) if is_remote(path) else open(path, "rb")


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
    """Why a file that begins with these bytes is no text; None for text, which may have a stray zero."""
    kind = next((kind for magic, kind in MAGIC.items() if beginning.startswith(magic)), None)
    if not kind and 4 * beginning.count(0) < max(1, len(beginning)):
        return None
    even, odd = 0 in beginning[::2], 0 in beginning[1::2]
    kind = kind or ("a binary file" if even and odd else "UTF-16BE" if even else "UTF-16LE")
    hint = f"iconv -f {kind} -t UTF-8 converts it" if kind.startswith("UTF-") else "convert it, or leave it out"
    return f"looks like {kind}, not UTF-8 text ({hint})"


def not_utf8(line, error):
    """Why a line of bytes is no text, with a guess at what it is."""
    letters = sum(byte >= 128 for byte in line)
    guess = "Latin-1 or Windows-1252" if 4 * letters < len(line) else "an older encoding, as GBK or Windows-1251 are"
    return f"not UTF-8: {error.reason} ({guess}? convert it: iconv -f ENCODING -t UTF-8)"


class Unreadable(str):
    """A line with U+FFFD in place of what is no text; `reason` says why."""

    reason = ""


def numbered_lines(path, cfg, stats, start=0, end=None, keep=False, only=False):
    """(number, text) of each line, without line end, and without the byte-order marks that joined files have inside.

    Only \\n ends a line: JSON strings may hold Unicode's other separators. start, end: a byte range of an uncompressed
    file; lines belong to the range that they start in, and are numbered within it. A file that is no text counts as a
    single line that cannot be read, as does one with old Mac line ends, unless cfg.doc_sep is "file". keep: yield a line that
    cannot be read as Unreadable, neither counted nor named here, for a caller that refuses the row it is part of. only:
    whether there is nothing without this file.
    Raises: UserError with file and line.
    """
    lines = decoded_lines(path, cfg, stats, start, end, keep, only)
    beginning = list(itertools.islice(lines, 1))
    if beginning and "\r" in beginning[0][1] and not start and getattr(cfg, "doc_sep", "") != "file":
        beginning += itertools.islice(lines, 1)
        if len(beginning) == 1:
            also = "; or --doc_sep=file" * (split_suffixes(path)[0] == ".txt")
            hint = f"convert it: tr '\\r' '\\n' < FILE > NEW{also}"
            skip_or_fail(cfg, stats, f"{path}: a single line, with \\r inside: old Mac line ends ({hint})", needed=only)
            return
    yield from beginning
    yield from lines


def decoded_lines(path, cfg, stats, start, end, keep, only):
    _, compression = split_suffixes(path)
    end = None if compression else end
    number = 0
    try:
        with open_bytes(path) as raw, decompress(raw, compression) as file:
            if start:
                raw.seek(start - 1)
                collections.deque(rest_of_line(raw, end), 0)
            position = raw.tell()
            for number, line in enumerate(iter(functools.partial(file.readline, MAX_TEXT), b""), 1):
                if end is not None and position >= end:
                    break
                if number == 1 and not start and (reason := not_text(line[:4096])):
                    skip_or_fail(cfg, stats, f"{path}: {reason}", needed=only)
                    return
                position += len(line)
                reason = ""
                if len(line) == MAX_TEXT and not line.endswith(b"\n"):
                    line = marks(itertools.chain([line], rest_of_line(file, end)))
                    position, reason = raw.tell(), f"a line of more than {gigabytes(MAX_TEXT)} (split it)"
                if number % 16 == 0 or len(line) > 1000:
                    stats["segment bytes"] = raw.tell() - start
                try:
                    text = line.decode()
                except UnicodeDecodeError as error:
                    text, reason = line.decode(errors="replace"), reason or not_utf8(line, error)
                text = text.removeprefix("\ufeff").rstrip("\r\n")
                if reason and not keep:
                    skip_or_fail(cfg, stats, f"{location(path, number, start)}: {reason}")
                    continue
                if reason:
                    text = Unreadable(text)
                    text.reason = reason
                yield number, text
            if end is not None and position < end:
                raise EOFError(f"ends after {position:,} of {end:,} bytes")
    except UserError:
        raise
    except read_errors(path) as error:
        raise read_error(path, error, f"{path}:{number + 1}") from None


def rest_of_line(file, end):
    """Yield what is left of the line in small pieces, but not far beyond the position `end`."""
    while piece := file.readline(2**20):
        yield piece
        if piece.endswith(b"\n") or end is not None and file.tell() >= end:
            return


def marks(pieces):
    """A line too long to keep, without its text: by its quotes and separators a table's row still ends where it ends."""
    line = bytearray()
    for piece in pieces:
        line += NO_MARKS.sub(b"_", piece.rstrip(b"\r\n")) if len(line) < MAX_TEXT else b""
    return bytes(line)


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
    return (Exception,) if is_remote(path) else (OSError, EOFError, zlib.error, lzma.LZMAError)


def read_error(path, error, where):
    """The UserError for one of read_errors."""
    if is_remote(path):
        return network_error(where, error)
    if isinstance(error, OSError) and error.errno is not None:
        return UserError(f"{path}: {error.strerror}")
    return UserError(f"{where}: {error} (truncated, or not a {os.path.splitext(path)[1]} file)")


def skip_or_fail(cfg, stats, text, needed=False):
    """Count and name a line that cannot be read. Raises: UserError if needed, or if there are more than cfg.skip_bad_lines."""
    if needed:
        raise UserError(text)
    if stats["bad lines"] >= cfg.skip_bad_lines:
        reason = f"{text[:-1]}; " if text.endswith(")") else f"{text} ("
        reason += f"already skipped: {stats['bad lines']:,}; " if stats["bad lines"] else ""
        raise UserError(f"{reason}--skip_bad_lines={max(100, 2 * cfg.skip_bad_lines)} skips such lines)")
    stats["bad lines"] += 1
    stats[f"skipped {text}"] += 1
