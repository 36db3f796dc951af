"""Tables that users write: CSV with any usual separator, or Parquet."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pistoseg import parquet, storage
from pistoseg.classes import folded
from pistoseg.errors import PistoSegError, UnavailableError

if TYPE_CHECKING:
    import pyarrow as pa

_SAID = re.compile(r'(?i)"?sep=([,;\t|])"?[,;\t|]*')
"""The line above a CSV file's header by which Excel is told what separates its columns."""
_PATHS = {"image", "slide"}
"""Columns of which every table has one."""
Row = dict[str, Any]
"""Values by folded column name (`pistoseg.classes.folded`); of a CSV file, text."""


def refuse_extra_fields(row: Row) -> None:
    """Raise `PistoSegError` for a row that has more fields than there are columns."""
    if None in row:
        raise PistoSegError("has more fields than the header", field="columns", remedy="quote values that hold commas")


def refuse_repeated(uri: str, header: list[str], columns: Iterable[str]) -> None:
    """Raise `PistoSegError` where a table has one of some columns twice: it is unclear which one is meant.

    Args:
        uri: of the table.
        header: its folded column names.
        columns: that are read, in any case.
    """
    for column in columns:
        if header.count(folded(column)) > 1:
            raise PistoSegError("is there twice", file=uri, field=f"column {column}", remedy="remove one of them")


def read_header(uri: str) -> list[str]:
    """The folded column names of a table, as `open_table` gives them; no row of a Parquet file is read."""
    if not uri.lower().endswith(".parquet"):
        return open_table(uri)[0]
    import pyarrow.parquet as pq

    with _readable_parquet(uri), storage.open_file(uri) as file:
        return [folded(column) for column in pq.read_schema(file).names]


def open_table(uri: str, paths: str | None = None) -> tuple[list[str], Iterator[tuple[int, Row]]]:
    """Read the columns of a table; its rows come one after the other.

    Args:
        uri: CSV, or Parquet by its ending, whose columns of bytes are taken as UTF-8 text.
        paths: folded name of a column of paths, if it has one.
    Returns:
        Folded column names, and rows with their numbers: the line of a CSV file, whose header is line 1, or the row
        of a Parquet file, counted from 1. A row with more fields than columns keeps them under None. Blank rows, which
        spreadsheets leave below a table, are left out.
    Raises:
        PistoSegError: the table cannot be read, or `paths` holds no text; also while rows are read.
    """
    return _open_parquet(uri, paths) if uri.lower().endswith(".parquet") else _open_csv(uri)


def _open_csv(uri: str) -> tuple[list[str], Iterator[tuple[int, Row]]]:
    try:
        text = storage.read_bytes(uri).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PistoSegError(f"is not UTF-8 text ({error})", file=uri, remedy="save it as CSV UTF-8") from error
    except OSError as error:
        raise _not_given(error, uri) from error
    file = io.StringIO(text, newline="")
    first_line = file.readline().rstrip("\r\n")
    file.seek(0)
    said = _SAID.fullmatch(first_line)
    delimiter = said.group(1) if said else _delimiter(first_line)
    reader = csv.reader(file, delimiter=delimiter)
    lines = _lines(reader, uri)
    if said:
        next(lines)
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


def _delimiter(header: str) -> str:
    """What separates the columns: what gives one of paths, as names of classes may hold commas, else what is most."""

    def names_paths(delimiter: str) -> bool:
        try:
            columns = next(csv.reader([header], delimiter=delimiter), [])
        except csv.Error:  # a field is too long
            return False
        return not _PATHS.isdisjoint(map(folded, columns))

    return max(",;\t", key=lambda delimiter: (names_paths(delimiter), header.count(delimiter)))


def _lines(reader: Any, uri: str) -> Iterator[list[str]]:
    """What a `csv.reader` gives; `PistoSegError` where it is not valid."""
    try:
        yield from reader
    except csv.Error as error:
        raise PistoSegError(
            f"is not valid CSV ({error})", file=uri, field=f"row {reader.line_num}", remedy="save it again as CSV"
        ) from error


def _open_parquet(uri: str, paths: str | None) -> tuple[list[str], Iterator[tuple[int, Row]]]:
    import pyarrow as pa

    with _readable_parquet(uri):
        table = parquet.read(uri)
    header = [folded(column) for column in table.column_names]
    table = pa.Table.from_arrays([_as_text(column) for column in table.columns], names=header)
    if paths in header:
        _refuse_content(uri, paths, table.field(header.index(paths)).type)

    def rows() -> Iterator[tuple[int, Row]]:
        number = 0
        for batch in table.to_batches():
            for row in batch.to_pylist():
                number += 1
                if any(value is not None for value in row.values()):
                    yield number, row

    return header, rows()


@contextmanager
def _readable_parquet(uri: str) -> Iterator[None]:
    """Say that a Parquet file is none where it can't be read."""
    try:
        yield
    except PistoSegError:
        raise
    except Exception as error:  # pyarrow raises many kinds on damaged files, OSError without a number among them
        if isinstance(error, OSError) and error.errno:
            raise _not_given(error, uri) from error
        raise PistoSegError(
            f"is not a Parquet file that can be read ({error})", file=uri, remedy="write it again"
        ) from error


def _not_given(error: OSError, uri: str) -> PistoSegError:
    """The error about a table that is not there or, which says nothing about what it holds, can't be read."""
    kind = PistoSegError if storage.is_no_file(error) else UnavailableError
    reason = f"cannot be read ({error.strerror or error})"
    return kind(reason, file=uri, remedy="check the path and its rights")


def _as_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column of bytes as text, as some programs write it; any other, and bytes that are no UTF-8, as it is."""
    import pyarrow as pa

    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        return column
    try:
        return column.cast(pa.large_string() if pa.types.is_large_binary(column.type) else pa.string())
    except pa.ArrowInvalid:
        return column


def _refuse_content(uri: str, name: str, kind: pa.DataType) -> None:
    """Raise `PistoSegError` where a column of paths holds the files themselves, which no message should repeat."""
    import pyarrow as pa

    if pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        raise PistoSegError(
            f"is of type {kind}, and paths are text", file=uri, field=f"column {name}", remedy="write paths into it"
        )
