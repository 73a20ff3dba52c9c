"""Labelled texts: rows of .csv, .tsv (where quotes are literal) and .jsonl files, also compressed.

Every row is kept, or named with its line; blank lines are not rows.
"""

import csv
import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from common.files import write_text
from common.options import UserError
from common.sources import numbered_lines, skip_or_fail, split_suffixes

LONG_ROW = 20  # lines; an open quote makes longer ones
NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", re.ASCII)  # float() also takes 1_0, nan and inf
NOT_UTF8 = "not UTF-8"


class Row(NamedTuple):
    index: int  # place among the file's rows, from 0; skipped rows count
    line: int  # that it begins on
    cells: list  # strings: the texts, then the label


@dataclass
class Examples:
    """texts: tuples of one or two strings. labels: (n,) int64 classes or float64 scores, or None. index: of their rows."""

    texts: list
    labels: np.ndarray | None = None
    index: list | None = None  # None: 0, 1, 2, ...

    def digest(self):
        """sha256 of texts and labels, in hexadecimal."""
        digest = hashlib.sha256(json.dumps(self.texts).encode("utf-8", "surrogatepass"))
        digest.update(b"" if self.labels is None else self.labels.tobytes())
        return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_rows(path, text_columns, label_column, cfg, default_header=None):
    """The Rows of a file. label_column: "" for none.

    cfg: has skip_bad_lines, how many bad rows to skip and report. default_header: column names of a table without a
    header. Raises: UserError naming file and line.
    """
    kind, _ = split_suffixes(path)
    if kind not in READERS:
        raise UserError(f"{path}: unknown suffix (expected .csv, .tsv or .jsonl, also with .gz or .xz)")
    bad = Counter()
    texts = dict(numbered_lines(path, cfg, bad))
    lines = [texts.get(number) for number in range(1, len(texts) + bad["bad lines"] + 1)]  # None: not UTF-8
    rows, columns = [], [*text_columns, *([label_column] if label_column else [])]
    for index, (number, cells) in enumerate(READERS[kind](path, lines, columns, len(text_columns), default_header)):
        if isinstance(cells, list):
            rows.append(Row(index, number, cells))
            continue
        fault = f"{path}:{number}: {cells}"
        if cells is not NOT_UTF8:  # which is counted already
            skip_or_fail(cfg, bad, f"{fault} (--skip_bad_lines=N skips up to N bad rows)")
        print(f"skipped {fault}", flush=True)
    if not rows:
        raise UserError(f"{path}: no examples (is the file empty?)")
    return rows


def table_rows(record_at, path, lines, columns, _, default_header):
    """Yield (line number, cells of `columns`, or the reason why there are none) of each row of a table.

    record_at(lines, i): (all cells or a reason, number of lines) of the row that begins at lines[i].
    """
    header, i, long_rows = None, 0, []
    while i < len(lines):
        number, (cells, count) = i + 1, record_at(lines, i)
        if header and isinstance(cells, list) and len(cells) not in (0, len(header)):
            cells = f"{len(cells)} columns, expected {len(header)}: is a separator outside quotes?"
        i += count if isinstance(cells, list) else 1  # of a bad row of several lines, the first one alone is lost
        if count > LONG_ROW and isinstance(cells, list):
            long_rows.append(number)
        if cells == []:
            continue
        if header is None:
            if isinstance(cells, str):
                raise UserError(f"{path}:{number}: {cells} (expected the names of the columns)")
            headless = default_header and columns[0] not in cells and len(cells) == len(default_header)
            header = default_header if headless else cells
            wanted = [position(header, name, f"{path}:{number}") for name in columns]
            if not headless:
                continue
        yield number, cells if isinstance(cells, str) else [cells[j] for j in wanted]
    if long_rows:
        more = f", and {len(long_rows) - 1} more" if len(long_rows) > 1 else ""
        print(f"warning: {path}:{long_rows[0]}: a row of over {LONG_ROW} lines{more} (is a quote not closed?)", flush=True)


def position(header, name, where):
    """The index of a column. Raises: UserError unless there is exactly one."""
    if header.count(name) > 1:
        raise UserError(f"{where}: {header.count(name)} columns are named {name!r} (rename all but one)")
    if name not in header:
        hint = f"found: {', '.join(header)[:200]}"
        for separator, called in ((";", "semicolons"), ("\t", "tabs"), (",", "commas")):
            if len(header) == 1 and separator in header[0]:
                hint = f"are the columns separated by {called}? .csv takes commas, .tsv tabs"
        raise UserError(f"{where}: no column {name!r} ({hint})")
    return header.index(name)


def csv_record(lines, start):
    """One row, which may span lines inside quotes."""

    def rest():
        for i in range(start, len(lines)):
            if lines[i] is None:
                raise csv.Error(f"line {i + 1} is not UTF-8")
            yield f"{lines[i]}\n"

    if lines[start] is None:
        return NOT_UTF8, 1
    reader = csv.reader(rest(), strict=True)
    try:
        return next(reader), reader.line_num
    except csv.Error as error:
        return f"{error}: is a quote not closed?", 1


def tsv_record(lines, start):
    line = lines[start]
    return NOT_UTF8 if line is None else line.split("\t") if line.strip() else [], 1


def json_rows(path, lines, columns, num_texts, _):
    """Yield (line number, cells of `columns`, or the reason why there are none) of each JSON object, one per line."""
    for number, line in enumerate(lines, 1):
        if line is None:
            yield number, NOT_UTF8
        elif line.strip():
            yield number, json_cells(line, columns, num_texts)


def json_cells(line, columns, num_texts):
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"not valid JSON: {error}: expected one object per line"
    if not isinstance(record, dict) or not set(columns) <= set(record):
        return f"not an object with {', '.join(map(repr, columns))}"
    cells = [record[name] for name in columns]
    for i, (name, cell) in enumerate(zip(columns, cells)):
        if cell is None:
            return f"{name!r} is null"
        if not isinstance(cell, str if i < num_texts else (str, int, float)):
            return f"{name!r} is {type(cell).__name__}, expected a string{'' if i < num_texts else ' or a number'}"
    cells = [cell if isinstance(cell, str) else json.dumps(cell) for cell in cells]
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        return "half a surrogate pair, which is not Unicode text"
    return cells


TABLES = {".csv": csv_record, ".tsv": tsv_record}
READERS = {kind: partial(table_rows, record_at) for kind, record_at in TABLES.items()}
READERS |= {".jsonl": json_rows, ".json": json_rows}


# ---------------------------------------------------------------------------------------------------------------------
# Labels


def to_examples(rows, path, labels):
    """Examples of Rows. labels: the valid words, or () for numbers. Raises: UserError naming file and line."""
    values, numbers = [], {word: i for i, word in enumerate(labels)}
    for row in rows:
        cell = row.cells[-1]
        if labels and cell not in numbers:
            raise UserError(f"{path}:{row.line}: unknown label {cell!r} (expected one of {', '.join(labels)[:200]})")
        values.append(numbers[cell] if labels else to_number(cell, f"{path}:{row.line}"))
    texts, index = [tuple(row.cells[:-1]) for row in rows], [row.index for row in rows]
    return Examples(texts, np.array(values, np.int64 if labels else np.float64), index)


def to_number(cell, where):
    number = float(cell) if NUMBER.fullmatch(cell) else np.nan
    if not np.isfinite(number):  # 1e999 is not
        raise UserError(f"{where}: label {cell!r} is not a number")
    return number


def write_table(path, header, rows):
    """Write rows of cells as TSV; a tab, line break or backslash inside one becomes \\t, \\n, \\r or \\\\."""
    escapes = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})
    lines = ["\t".join(str(cell).translate(escapes) for cell in cells) + "\n" for cells in rows]
    write_text(path, "\t".join(header) + "\n" + "".join(lines))
