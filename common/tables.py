"""Rows of .csv and .tsv files. A row that cannot be read costs one line: those after it are read again."""

import collections
import csv
from typing import NamedTuple

MAX_CELL = 2**27  # characters: a small .gz can hold a cell that fills any memory
NAMES = {",": "comma", ";": "semicolon", "\t": "tab", "|": "vertical bar"}

csv.field_size_limit(MAX_CELL)  # the default rejects cells above 131,072 characters


class TableRow(NamedTuple):
    first: int  # line
    last: int
    cells: list  # of strings; none for a blank line, or with a fault
    fault: str  # why it cannot be read, or ""
    suspect: bool  # whether at least half of the lines between first and last look like rows that an open quote swallowed


def table_rows(lines, separator=",", quotes=True, is_row=None):
    """Yield the TableRows of (number, text) pairs. All rows have as many cells as the first, or a fault.

    text: without the line end; None for a line that could not be read. quotes: whether a cell in double quotes may hold
    separators and line breaks. is_row(text): whether a line in such a cell is surely a row; a suspect row is a fault then.

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

    def reader():
        if quotes:
            return csv.reader(row_lines(), delimiter=separator, strict=True)
        return (line[:-1].split(separator) if line.strip() else [] for line in row_lines())

    records = reader()
    while True:
        row.clear()
        fault = ""
        try:
            cells = next(records, None)
        except csv.Error as error:
            upto = f", up to line {row[-1][0]}" if len(row) > 1 else ""
            cells, fault = [], f"{error}{upto}: is a quote not closed?" if row[0][1] is not None else f"{error}"
        if cells is None:
            return
        columns = columns or len(cells)
        if cells and len(cells) != columns:
            fault = f"{len(cells)} columns, expected {columns}: is a {NAMES[separator]} outside quotes?"
        inside = [is_row(text) if is_row else text.count(separator) == columns - 1 > 0 for _, text in row[1:-1] if not fault]
        suspect = 2 * sum(inside) >= len(inside) > 0
        if suspect and is_row:
            fault = f"one row up to line {row[-1][0]}, though its lines are rows: is a quote not closed?"
        yield TableRow(row[0][0], row[-1][0], [] if fault else cells, fault, suspect)
        if fault:
            again.extendleft(reversed(row[1:]))
            records = reader()
