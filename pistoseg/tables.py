"""Tables that users write: CSV with any usual separator, or Parquet."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Any

from pistoseg import storage
from pistoseg.classes import folded
from pistoseg.errors import PistoSegError

Row = dict[str, Any]
"""Values by folded column name (`pistoseg.classes.folded`); of a CSV file, text."""


def refuse_extra_fields(row: Row) -> None:
    """Raise `PistoSegError` for a row that has more fields than there are columns."""
    if None in row:
        raise PistoSegError("has more fields than the header", field="columns", remedy="quote values that hold commas")


def open_table(uri: str) -> tuple[list[str], Iterator[tuple[int, Row]]]:
    """Read the columns of a table; its rows come one after the other.

    Args:
        uri: CSV, or Parquet by its ending.
    Returns:
        Folded column names, and rows with their numbers: the line of a CSV file, whose header is line 1, or the row
        of a Parquet file, counted from 1. A row with more fields than columns keeps them under None. Blank rows, which
        spreadsheets leave below a table, are left out.
    Raises:
        PistoSegError: the table cannot be read; also while rows are read.
    """
    return _open_parquet(uri) if uri.lower().endswith(".parquet") else _open_csv(uri)


def _open_csv(uri: str) -> tuple[list[str], Iterator[tuple[int, Row]]]:
    try:
        text = storage.read_bytes(uri).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PistoSegError(f"is not UTF-8 text ({error})", file=uri, remedy="save it as CSV UTF-8") from error
    except OSError as error:
        raise PistoSegError(f"cannot be read ({error})", file=uri, remedy="check the path and its rights") from error
    first_line = text.partition("\n")[0]
    delimiter = max(",;\t", key=first_line.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    lines = _lines(reader, uri)
    header = [folded(column) for column in next(lines, [])]

    def rows() -> Iterator[tuple[int, Row]]:
        for values in lines:
            if not any(value.strip() for value in values):
                continue
            row: Row = dict.fromkeys(header)
            row.update(zip(header, values, strict=False))
            if len(values) > len(header):
                row[None] = values[len(header) :]  # type: ignore[index]
            yield reader.line_num, row

    return header, rows()


def _lines(reader: Any, uri: str) -> Iterator[list[str]]:
    """What a `csv.reader` gives; `PistoSegError` where it is not valid."""
    try:
        yield from reader
    except csv.Error as error:
        raise PistoSegError(
            f"is not valid CSV ({error})", file=uri, field=f"row {reader.line_num}", remedy="save it again as CSV"
        ) from error


def _open_parquet(uri: str) -> tuple[list[str], Iterator[tuple[int, Row]]]:
    try:
        table = storage.read_parquet(uri)
    except Exception as error:  # pyarrow raises many kinds on damaged files
        raise PistoSegError(
            f"is not a Parquet file that can be read ({error})", file=uri, remedy="write it again"
        ) from error
    header = [folded(column) for column in table.column_names]

    def rows() -> Iterator[tuple[int, Row]]:
        number = 0
        for batch in table.rename_columns(header).to_batches():
            for row in batch.to_pylist():
                number += 1
                if any(value is not None for value in row.values()):
                    yield number, row

    return header, rows()
