"""Labelled texts: rows of .csv, .tsv (where quotes are literal), .jsonl and .parquet files.

Every row is kept, or named with its line; blank lines are not rows.
"""

import hashlib
import json
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from decimal import Context, Decimal
from typing import NamedTuple

import numpy as np

from common.files import write_text
from common.lines import numbered_lines, split_suffixes
from common.options import UserError
from common.tables import LONG_ROW, SEPARATORS, TABLES, listed, open_table, parquet_records, record_cells, rows_of

NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", re.ASCII)  # float() also takes 1_0, nan and inf
THOUSANDS = re.compile(r"\s*([+-]?[1-9]\d{0,2}(?:[,.'\u2019 \u00a0\u202f]\d{3})+)(?:[,.](\d+))?\s*", re.ASCII)  # 1,234.5
POINTED = re.compile(r"\s*[+-]?[1-9]\d{0,2}\.\d{3}\s*", re.ASCII)  # 1.100: 1100 to a German, 1.1 to others
COMMA, GROUPS = "a decimal comma", "separators between thousands"
PLAIN = "write numbers with a point alone, in ASCII, as -1234.5 or 950.0"
DASHES = "\u2212\u2010\u2011\u2012\u2013\u2014\ufe63\uff0d"  # that programs write for a minus sign
# In ASCII: dashes, a plus sign, point and comma of full width, and Arabic separators.
SIGNS = str.maketrans(DASHES + "\uff0b\uff0e\uff0c\u066b\u066c", "-" * len(DASHES) + "+.,.'")
# What others write where a value is missing, or Excel where it could not compute one.
MISSING = {"na", "n/a", "<na>", "nan", "nil", "none", "null", "-", "?", "#n/a", "\\n", "nat", ".", "--"}
MISSING |= {"(blank)", "''", '""', "undefined", "k.a.", "n.a."}
MISSING |= {"#ref!", "#value!", "#div/0!", "#name?", "#null!", "#num!", "#spill!", "#calc!"}
EXCELS_ERROR = re.compile(r"#([¡¿]?[^\W\d_]+(/0)?[!?]|[^\W\d_]/[^\W\d_]|NV)")  # in capitals, of any language: #WERT!, #¿NOMBRE?


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
    """The Rows of a file. label_column: "" for none. Prints what was skipped or looks like a mistake.

    cfg: has skip_bad_lines, how many bad rows to skip. default_header: column names of a table without a header.
    Raises: UserError naming file and line.
    """
    kind, compression = split_suffixes(path)
    if kind not in (*TABLES, ".jsonl", ".json", ".parquet") or kind == ".parquet" and compression:
        raise UserError(f"{path}: unknown suffix (expected .csv, .tsv or .jsonl, also with .gz, .xz or .zst, or .parquet)")
    columns = [*text_columns, *([label_column] if label_column else [])]
    see = f"see --text_columns{' and --label_column' * bool(label_column)}" if is_own(cfg) else "is it the right file?"
    rows, faults, blank = [], {}, []
    if kind in TABLES:
        found = read_table(path, columns, label_column, cfg, see, default_header)
    else:
        records = parquet_records(path, columns, see, Counter()) if kind == ".parquet" else read_lines(path, cfg)
        found = record_cells(records, columns, see, label_column)
    for number, cells in found:
        if cells == []:
            blank.append(number)
        elif fault := cells if isinstance(cells, str) else fault_of(cells, label_column):
            faults[number] = fault
        else:
            rows.append(Row(len(rows) + len(faults), number, cells))
    check_faults(path, rows, faults, cfg)
    if blank := [number for number in blank if number < rows[-1].line]:
        print(f"{path}: blank lines are not rows: {places(blank)}", flush=True)
    if empty := [row.line for row in rows if not all(map(str.strip, row.cells[: len(text_columns)]))]:
        print(f"warning: {path}: {len(empty):,} of {len(rows):,} rows have an empty text: {places(empty)}", flush=True)
    if is_own(cfg):  # GLUE is what it is
        warn_of_lost_texts(path, rows, len(text_columns))
    return rows


def is_own(cfg):
    """Whether these are options for a file of one's own, not for GLUE's."""
    return hasattr(cfg, "label_column")


def warn_of_lost_texts(path, rows, num_texts):
    """Report texts that say nothing, as "nan", and characters that an earlier program replaced by U+FFFD."""
    if found := [row for row in rows if any(map(is_missing, row.cells[:num_texts]))]:
        cell = next(filter(is_missing, found[0].cells))
        text = f"{len(found):,} of {len(rows):,} rows have a text like {cell!r}, as where it is missing"
        print(f"warning: {path}: {text}: {places([row.line for row in found])}", flush=True)
    if found := [row.line for row in rows if any("\ufffd" in cell for cell in row.cells)]:
        text = f"{len(found):,} of {len(rows):,} rows hold U+FFFD: {places(found)}: characters were lost before they came here"
        print(f"warning: {path}: {text} (export it again as UTF-8)", flush=True)


def is_missing(cell):
    cell = cell.strip()
    return cell.casefold().translate(SIGNS) in MISSING or (cell == cell.upper() and bool(EXCELS_ERROR.fullmatch(cell)))


def fault_of(cells, label_column):
    """Why a row with these cells is not used, or ""."""
    if any("\0" in cell for cell in cells):
        return "a NUL character, which is not text"
    return "the label is empty" if label_column and not cells[-1].strip() else ""


def check_faults(path, rows, faults, cfg):
    """Report {line: fault} of all bad rows. Raises: UserError if there are more than cfg.skip_bad_lines, or no others."""
    if not rows and not faults:
        raise UserError(f"{path}: no examples (is the file empty?)")
    if len(faults) > cfg.skip_bad_lines or not rows:
        (first, fault), *others = faults.items()
        more = f"also {places([number for number, _ in others])}; " if others else ""
        hint = f"--skip_bad_lines={len(faults)} skips {'them' if others else 'it'}"
        reason = f"{fault[:-1]}; " if fault.endswith(")") else f"{fault} ("
        raise UserError(f"{path}:{first}: {reason}{more + hint if rows else 'no row can be used'})")
    for fault in dict.fromkeys(faults.values()):
        numbers = [number for number, other in faults.items() if other == fault]
        print(f"skipped {path}:{', '.join(map(str, numbers))}: {fault}", flush=True)


def places(lines):
    """Up to three line numbers, as text."""
    more = f" and {len(lines) - 3:,} more" if len(lines) > 3 else ""
    return f"line{'s' * (len(lines) > 1)} {', '.join(map(str, lines[:3]))}{more}"


def read_lines(path, cfg):
    """All (number, text) of a file's lines."""
    return list(numbered_lines(path, cfg, Counter(), keep=True, only=True))


def read_table(path, columns, label_column, cfg, see, default_header):
    """Yield (line number, cells of `columns`, or the reason why there are none) of each row of a table."""
    lines = read_lines(path, cfg)
    table = open_table(path, lines, columns, see, default_header)
    if not table:
        return
    table = table._replace(lines=list(table.lines))  # to be read twice
    if table.note:
        print(table.note, flush=True)
    width, trusted = len(table.header.cells), getattr(cfg, "trust_quotes", False)
    rows, (mark, quotes) = list(rows_of(table)), table.layout
    if label_column and not trusted and any(row.last > row.first for row in rows):
        rows = list(rows_of(table, row_test(rows, mark, width, table.columns[-1])))
    texts = dict(table.lines)
    for row in rows:
        if table.headless or row.first != table.header.first:
            other = other_separator(texts[row.first], mark, width) if row.fault and row.first == row.last else ""
            yield row.first, other or row.fault or [row.cells[j] for j in table.columns if row.cells]
    odd = [row for row in rows if not row.fault and not trusted and (row.suspect or row.last - row.first >= LONG_ROW)]
    odd = [f"lines {row.first} to {row.last}" for row in odd]
    if odd:
        more = f", and {len(odd) - 1:,} more such rows" if len(odd) > 1 else ""
        print(f"warning: {path}: one row holds {odd[0]} (is a quote not closed?){more}", flush=True)
    quoted = [row.first for row in rows if row.quoted and not row.fault]
    if quoted and is_own(cfg):  # GLUE's own files have such cells, and are read so by everybody
        text = f"cells in quotes, as a .csv has them, but the model reads a .tsv's quotes: {places(quoted)}"
        print(f"warning: {path}: {text} (save it as .csv)", flush=True)
    spaced = [row.first for row in rows if quotes and has_spaced_quotes(row.cells, mark + texts[row.first], mark)]
    if spaced and is_own(cfg):
        text = f"blanks before cells in quotes, so the model reads both: {places(spaced)}"
        print(f"warning: {path}: {text} (remove the blanks)", flush=True)


def has_spaced_quotes(cells, text, mark):
    """Whether a .csv's line has a cell like ` "a"`, with the quotes as they are: a cell in quotes has its own doubled."""
    return any(re.fullmatch(r'\s+".*"\s*', cell) and mark + cell in text for cell in cells)


def other_separator(text, own, columns):
    """What is wrong with a row that has all columns if another character separates them, or "". Prose has commas, too."""
    for mark, name in SEPARATORS.items() if columns > 1 else ():
        prose = re.search(rf"{re.escape(mark)}\s|\d{re.escape(mark)}\d", text)
        if mark != own and own not in text and text.count(mark) == columns - 1 and not prose:
            return f"a {name} between columns, unlike the first line's {SEPARATORS[own]} (use one of them in the whole file)"
    return ""


def row_test(rows, separator, columns, position):
    """A function that says whether a line is surely a row: it has all columns, and a label that rows of one line have."""
    known = {*[row.cells[position] for row in rows if row.cells and row.first == row.last][1:]} - {""}  # [0] is the header
    numbers = bool(known) and all(map(NUMBER.fullmatch, known))

    def is_row(text):
        cells = text.split(separator)
        label = cells[position] if len(cells) == columns else ""
        return label in known or bool(numbers and NUMBER.fullmatch(label) and label == label.strip())  # not as in "Berlin, 5"

    return is_row


# ---------------------------------------------------------------------------------------------------------------------
# Labels


def to_examples(rows, path, labels):
    """Examples of Rows. labels: the valid words, or () for numbers. Raises: UserError naming file and line.

    A number is also valid in another spelling, as 1.0 is for 1; a line says so.
    """
    texts, index = [tuple(row.cells[:-1]) for row in rows], [row.index for row in rows]
    if not labels:
        read = read_numbers([row.cells[-1] for row in rows])
        values = [to_number(row.cells[-1], *number, f"{path}:{row.line}") for row, number in zip(rows, read)]
        return Examples(texts, np.array(values, np.float64), index)
    values, numbers, respelled = [], {word: i for i, word in enumerate(labels)}, []
    by_value = {value_of(word): word for word in labels if NUMBER.fullmatch(word)}
    for row in rows:
        cell = row.cells[-1]
        if cell not in numbers and by_value and NUMBER.fullmatch(cell):
            cell = by_value.get(value_of(cell), cell)
            respelled.append((row, cell))
        if cell not in numbers:
            odd = f", with {name}" if (name := odd_character(cell)) else ""
            known = listed(word if word == word.strip() else repr(word) for word in labels)
            raise UserError(f"{path}:{row.line}: unknown label {cell!r}{odd} (expected one of {known})")
        values.append(numbers[cell])
    if respelled:
        (row, word), *others = respelled
        more = f", and {len(others):,} more are spelled otherwise" if others else ""
        print(f"{path}:{row.line}: label {row.cells[-1]!r} is taken for {word!r}{more}", flush=True)
    return Examples(texts, np.array(values, np.int64), index)


def value_of(cell):
    """What a NUMBER is exactly; what equals nothing for an exponent of twenty digits."""
    return Decimal(cell, Context(traps=[]))


def to_number(cell, number, spelling, where):
    if spelling:
        raise UserError(f"{where}: label {cell!r} has {spelling} ({PLAIN})")
    if number is None or not np.isfinite(number):  # 1e999 is not
        raise UserError(f"{where}: label {cell!r} is not a number")
    return number


def read_numbers(cells):
    """read_number of each of a column's cells. Points as in 1.100 separate thousands if 950 is there, and no 1100."""
    whole = [abs(float(cell)) for cell in cells if NUMBER.fullmatch(cell) and "." not in cell]
    if not looks_grouped(cells) or not 100 <= max(whole, default=0) < 1000:
        return [read_number(cell) for cell in cells]
    return [(float(cell.replace(".", "")), GROUPS) if POINTED.fullmatch(cell) else read_number(cell) for cell in cells]


def looks_grouped(cells):
    """The first number with a point, as 1.100, if the points of all may separate thousands; else None."""
    points = [cell for cell in cells if "." in cell and NUMBER.fullmatch(cell)]
    return points[0] if points and all(map(POINTED.fullmatch, points)) else None


def read_number(cell):
    """(the number that a person sees in a cell or None, why it is no NUMBER: COMMA, GROUPS, its odd_character or "")."""
    if NUMBER.fullmatch(cell):
        return float(cell), ""
    if match := THOUSANDS.fullmatch(cell):
        return float(re.sub(r"[^\d+-]", "", match[1]) + "." + (match[2] or "0")), GROUPS
    if has_decimal_comma(cell):
        return float(cell.replace(",", ".")), COMMA
    odd = odd_character(cell)
    return (read_number(in_ascii(cell))[0], odd) if odd else (None, "")


def has_decimal_comma(cell):
    """Whether a comma can be the point of a number, as in 0,5 and also in 1,234."""
    return "," in cell and bool(NUMBER.fullmatch(cell.replace(",", ".")))


def odd_character(cell):
    """The first character outside ASCII, as "U+2212 MINUS SIGN", of a cell that would be a number without such; else ""."""
    plain = in_ascii(cell)
    if plain == cell or read_number(plain)[0] is None:
        return ""
    odd = next(c for c, other in zip(cell, plain) if c != other)
    return f"U+{ord(odd):04X} {unicodedata.name(odd)}"


def in_ascii(cell):
    """A cell with the digits of any script, and SIGNS, in ASCII."""
    return "".join(f"{unicodedata.decimal(c, c)}" for c in cell).translate(SIGNS)


def write_table(path, header, rows):
    """Write rows of cells as TSV; a tab, line break or backslash inside one becomes \\t, \\n, \\r or \\\\."""
    escapes = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})
    lines = ["\t".join(str(cell).translate(escapes) for cell in cells) + "\n" for cells in rows]
    write_text(path, "\t".join(header) + "\n" + "".join(lines))
