"""Rows: of .csv and .tsv tables (in .tsv quotes are literal), of JSON objects, and of .parquet files.

A row is read whole, or has a fault that says why not. An open quote swallows no other row.
"""

import collections
import csv
import itertools
import json
import os
import re
from typing import NamedTuple

from common.lines import MAX_TEXT, Unreadable, open_bytes, read_error, read_errors, split_suffixes
from common.options import UserError

MAX_BATCH = 2**30  # bytes of Parquet rows that are decoded at once, at most
TABLES = {".csv": (",", True), ".tsv": ("\t", False)}  # separator, and whether quotes mean something
SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "vertical bar"}
EXCELS_LINE = re.compile(r'"?sep=([,;\t|])"?[,;|\s]*', re.IGNORECASE)  # before the names: what separates columns
LONG_ROW = 20  # lines
TWICE = object()  # in place of the values of a key that a JSON object has more than once

csv.field_size_limit(MAX_TEXT)  # the default rejects cells above 131,072 characters


class TableRow(NamedTuple):
    first: int  # line
    last: int
    cells: list  # of strings; none for a blank line, or with a fault
    fault: str  # why it is not a row, or ""
    suspect: bool  # whether its cells hold lines that look like rows, which an open quote has swallowed
    quoted: bool = False  # whether it begins a row with cells in a .csv's quotes, though here quotes mean nothing


class Table(NamedTuple):
    layout: tuple  # separator, and whether quotes mean something
    header: TableRow  # the first row
    columns: list  # indices of those wanted
    headless: bool  # whether the first row holds no names
    note: str  # what to say of a separator or of quotes that are not the suffix's, or ""
    lines: object  # iterator of all (number, text) pairs, but for EXCELS_LINE


def open_table(path, lines, columns, see, default_header=None):
    """The Table of (number, text) pairs, as from numbered_lines, or None without any row.

    see: a hint for columns that are not there. default_header: names of the columns if the first row is none.
    Raises: UserError.
    """
    own = TABLES[split_suffixes(path)[0]]
    layouts = [own] if default_header else [own, *((mark, True) for mark in SEPARATORS if (mark, True) != own)]
    lines, ahead = itertools.tee(lines)
    if excels := EXCELS_LINE.fullmatch(next(ahead, (1, ""))[1]):
        layouts = [way for way in layouts if way[0] == excels[1]] or layouts
        next(lines)
    lines, *copies = itertools.tee(lines, 1 + len(layouts))
    firsts = {}
    for layout, copy in zip(layouts, copies):
        firsts[layout] = next((row for row in table_rows(copy, *layout) if row.cells or row.fault), None)
    if not firsts[layouts[0]]:
        return None
    # The suffix's, unless only another gives the columns: spreadsheets write semicolons where one half is 0,5, pandas quotes.
    layout = next((way for way in layouts if set(columns) <= set(firsts[way].cells)), layouts[0])
    first = firsts[layout]
    where = f"{path}:{first.first}"
    if first.fault:
        raise UserError(f"{where}: {first.fault}{' (expected the names of the columns)' * (not first.fault.endswith(')'))}")
    headless = bool(default_header) and columns[0] not in first.cells and len(first.cells) == len(default_header)
    header = default_header if headless else first.cells
    found = f"a {SEPARATORS[layout[0]]} between columns" if layout[0] != own[0] else "the quotes of a .csv"
    note = "" if layout == own else f"{path}: read with {found}, as in its first line"
    return Table(layout, first, [column_of(header, name, where, see) for name in columns], headless, note, lines)


def rows_of(table, is_row=None):
    """The table_rows of a Table. Those that repeat the names of several columns, as in joined files, have a fault."""
    names = table.header.cells if not table.headless and len(table.header.cells) > 1 else None  # else a text may be it
    for row in table_rows(table.lines, *table.layout, is_row):
        again = row.cells == names and row.first != table.header.first
        yield TableRow(row.first, row.last, [], "the names of the columns again", False) if again else row


def column_of(header, name, where, see):
    """The index of a column. Raises: UserError unless there is exactly one."""
    if header.count(name) > 1:
        raise UserError(f"{where}: {header.count(name)} columns are named {name!r} (rename all but one)")
    if name not in header:
        found = [cell if cell == cell.strip() and cell.isprintable() else repr(cell) for cell in header]
        raise UserError(f"{where}: no column {name!r} (the first row has {listed(found)}; {column_hint(name, header, see)})")
    return header.index(name)


def column_hint(name, names, see):
    """`see`, and more if `name` is a part of one of `names`, as an option with commas was split."""
    part = "--text_columns" in see and any("," in other and name in other for other in names)
    return see + "; commas separate columns: rename the one that has a comma in its name" * part


def listed(words):
    """Words in a row: as many as 200 characters hold, and how many more there are."""
    words = list(words)
    fit = max(1, sum(size <= 200 for size in itertools.accumulate(len(word) + 2 for word in words)))
    return ", ".join(words[:fit])[:200] + f" and {len(words) - fit:,} more" * (len(words) > fit)


def table_rows(lines, separator, quotes, is_row=None):
    """Yield the TableRows of (number, text) pairs. All have as many cells as the first, or a fault.

    The lines after one whose quote is not closed are read again, so it swallows none of them. A row with an Unreadable line
    has a fault as a whole: its other lines are no rows. quotes: whether cells in double quotes may hold separators and line
    breaks. is_row(text): whether a line in such a cell is surely a row; a suspect row has a fault then. Where there is one
    column, a row is suspect if it is long, and most are one line.

    Python's csv, not pyarrow's: that one takes an unclosed quote, or text after a closing one, without an error, and
    refuses rows longer than its block.
    """
    if not quotes:
        yield from literal_rows(lines, separator)
        return
    lines, again, row, columns = iter(lines), collections.deque(), [], 0  # lines to read again, lines of this row
    count = single = 0  # rows, and those of one line

    def row_lines():
        while pair := again.popleft() if again else next(lines, None):
            row.append(pair)
            yield f"{pair[1]}\n"

    def records():
        return csv.reader(row_lines(), delimiter=separator, strict=True)

    def may_be_row(text):
        prose = f"{separator} " in text or text.endswith(separator) and cells[-1]  # as "Well, yes" and "Dear Ms. Li,"
        return text.count(separator) == columns - 1 and not prose

    reader = records()
    while True:
        row.clear()
        fault = ""
        try:
            cells = next(reader, None)
        except csv.Error as error:
            there = f" on line {row[-1][0]}" if len(row) > 1 else ""
            cells, fault = [], f"{error}{there} (is a quote not closed?)"
            if f"{error}".startswith("new-line"):
                fault = f"a lone carriage return{there} (remove it; if it ends a line: tr '\\r' '\\n' < FILE > NEW)"
        if cells is None:
            return
        columns = columns or len(cells)
        if cells and len(cells) != columns:
            fault = f"{wrong_width(cells, columns)} (is a {SEPARATORS[separator]} outside quotes?)"
        count, single = count + 1, single + (len(row) == 1)
        several = len(row) > 1 and not fault
        inside = [line for cell in cells for line in cell.split("\n")] if several and columns > 1 else []
        rows_inside = sum(map(is_row or may_be_row, inside))
        # A quote that closes what it did not open stands in a line that is a row, too.
        suspect = 0 < len(row) - 1 <= 2 * rows_inside and row[-1][1].count(separator) >= columns - 1
        suspect |= several and columns == 1 and len(row) > LONG_ROW and 2 * single > count
        if suspect and is_row:
            fault = f"one row up to line {row[-1][0]}, though its lines are rows (is a quote not closed?"
            fault += " if the quotes are right: --trust_quotes=true)"
        broken, fault = bool(fault), unreadable(row[:1] if fault else row) or fault
        yield TableRow(row[0][0], row[-1][0], [] if fault else cells, fault, suspect)
        if broken:
            again.extendleft(reversed(row[1:]))
            reader = records()


def unreadable(row):
    """Why a row of (number, text) pairs cannot be read, or ""."""
    for number, text in row:
        if isinstance(text, Unreadable):
            return text.reason if number == row[0][0] else f"line {number}: {text.reason}"
    return ""


def literal_rows(lines, separator):
    """table_rows where quotes mean nothing. A line break or tab that a cell in quotes was to hold is named as the fault."""
    lines, ahead, columns, left = iter(lines), collections.deque(), 0, 0  # left: lines of such a row that is broken
    while pair := ahead.popleft() if ahead else next(lines, None):
        number, text = pair
        cells = text.split(separator) if text.strip() else []
        columns, fault, quoted = columns or len(cells), "", False
        if cells and len(cells) != columns:
            fault = f"{wrong_width(cells, columns)} (a tab or a line break in a text?)"
        if cells and not left and '"' in text:
            ahead.extend(itertools.islice(lines, max(0, LONG_ROW - len(ahead))))
            meant = lines_in_quotes([text, *(other for _, other in ahead)], separator, columns)
            quoted, left = meant > 0, meant if meant > 1 or fault else 0
        if left:
            left -= 1
            if cells and columns > 1:
                fault = "quotes hold a tab or a line break, but they are literal in .tsv (save it as .csv)"
        fault = unreadable([pair]) or fault
        yield TableRow(number, number, [] if fault else cells, fault, False, quoted)


def lines_in_quotes(texts, separator, columns):
    """How many of these lines a program wrote as one row with cells in quotes; 0: none, as quotes in a text are no reason.

    Such a cell has quotes inside, each written twice, or separators, or line breaks, or all cells of a row are in quotes.
    Lines that are whole rows are never one.
    """
    reader = csv.reader((f"{text}\n" for text in texts), delimiter=separator, strict=True)
    try:
        meant = next(reader)
    except csv.Error:
        return 0
    lines = texts[: reader.line_num]
    if len(lines) == 1:
        literal = lines[0].split(separator)
        reason = len(literal) != columns or any('"' in cell for cell in set(meant) - set(literal))
        reason |= columns > 1 and all(cell != text for cell, text in zip(meant, literal))
    else:
        reason = sum(text.count(separator) for text in lines) == columns - 1
    return len(lines) if len(meant) == columns and reason else 0


def wrong_width(cells, columns):
    return f"{len(cells)} column{'s' * (len(cells) > 1)}, expected {columns}"


def json_object(pairs):
    """The dict of (key, value) pairs, with TWICE. Alone, a dict keeps the last value."""
    record = dict(pairs)
    if len(record) < len(pairs):
        counts = collections.Counter(key for key, _ in pairs)
        record.update((key, TWICE) for key in record if counts[key] > 1)
    return record


DECODER = json.JSONDecoder(object_pairs_hook=json_object)


def parse_json(text):
    """Raises: ValueError that says what is wrong."""
    try:
        return DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON: {error} (expected one object per line)") from None


def record_cells(records, columns, see, label_column=""):
    """Yield (number, values of `columns` as strings, or the reason why there are none) of (number, JSON object) pairs.

    An object may be the text of one; a blank text has no values. label_column: one that may also hold a number. see: a
    hint for columns that are not there.
    """
    for number, record in records:
        try:
            if isinstance(record, Unreadable):
                raise ValueError(record.reason)
            if isinstance(number, str) and isinstance(record, list):  # in a list that is the whole file
                kind = "string" if isinstance(record[0], str) else type(record[0]).__name__
                raise ValueError(f'a {kind}, not an object (expected {{"{columns[0]}": ...}} for each text)')
            blank = isinstance(record, str) and not record.strip()
            record = parse_json(record) if isinstance(record, str) and not blank else record
            yield number, [] if blank else cells_of(record, columns, see, label_column)
        except ValueError as error:
            yield number, str(error)


def cells_of(record, columns, see, label_column):
    if not isinstance(record, dict):
        raise ValueError(f"a {type(record).__name__}, not an object (expected one object per line)")
    if missing := [name for name in columns if name not in record]:
        hint = column_hint(missing[0], record, see)
        raise ValueError(f"no {', '.join(map(repr, missing))} (keys: {listed(record) or 'none'}; {hint})")
    cells = []
    for name in columns:
        cell, number = record[name], " or a number" * (name == label_column)
        if cell is None:
            raise ValueError(f"{name!r} is null")
        if cell is TWICE:
            raise ValueError(f"{name!r} is there more than once")
        if not isinstance(cell, (str, int, float) if number else str):
            raise ValueError(f"{name!r} is {type(cell).__name__} (expected a string{number}; {see})")
        cells.append(cell if isinstance(cell, str) else json.dumps(cell))
        try:
            cells[-1].encode()
        except UnicodeEncodeError:
            raise ValueError(f"{name!r} has half a surrogate pair (not Unicode text)") from None
    return cells


def parquet_records(path, columns, see, stats):
    """Yield (number, {column: value}) of each row of a .parquet file. stats: as of numbered_lines. Raises: UserError.

    A cell may be as large as its whole column chunk, and a dictionary stores one once for many rows. So a batch has as few
    rows as fit into MAX_BATCH if each were that large, and a thousand at most.
    """
    import pyarrow  # slow to import, and rarely needed
    from pyarrow import parquet

    try:
        with open_bytes(path) as raw:
            size, number = raw.seek(0, os.SEEK_END), 0
            file = parquet.ParquetFile(raw)
            for name in columns:
                column_of(file.schema_arrow.names, name, path, see)
            leaves = [i for i, leaf in enumerate(file.schema) if leaf.path in columns]
            groups = list(map(file.metadata.row_group, range(file.metadata.num_row_groups)))
            largest = max((group.column(i).total_uncompressed_size for group in groups for i in leaves), default=0)
            for batch in file.iter_batches(min(1000, max(1, MAX_BATCH // max(1, largest))), columns=columns):
                for number, record in enumerate(batch.to_pylist(), number + 1):
                    yield number, record
                stats["segment bytes"] = size * number // file.metadata.num_rows
    except UserError:
        raise
    except (*read_errors(path), UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise read_error(path, error, path) from None
