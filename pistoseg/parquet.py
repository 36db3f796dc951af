"""Tables in Parquet files on any file system, written whole or not at all."""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from pistoseg import storage
from pistoseg.errors import PistoSegError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

_FORMAT: dict[str, Any] = {"compression": "zstd", "write_statistics": False}
"""Statistics of a column of images are whole images, several to a row group, and nothing reads them."""


def read(uri: str, columns: list[str] | None = None) -> pa.Table:
    """A Parquet file, or all `.parquet` files of a folder in the order of their names, as one table."""
    import pyarrow as pa

    return pa.concat_tables(read_parts(uri, columns).values())


def read_parts(uri: str, columns: list[str] | None = None) -> dict[str, pa.Table]:
    """The same file by file: tables by their URIs."""
    import pyarrow.parquet as pq

    files = [item for item in storage.list_files(uri) if item.endswith(".parquet")] if storage.is_dir(uri) else [uri]
    if not files:
        raise PistoSegError("has no Parquet files", file=uri)
    tables = {}
    for item in files:
        with storage.open_file(item) as file:
            tables[item] = pq.read_table(file, columns=columns)
    return tables


def values(uri: str, column: str, rows: Iterable[int]) -> Iterator[Any]:
    """Values of one column of one file; of row groups only those that hold the rows are read, one after the other."""
    import pyarrow.parquet as pq

    with storage.open_parts(uri) as file, pq.ParquetFile(file) as table:
        ends = _ends(table)
        held: dict[int, pa.ChunkedArray] = {}
        for row in rows:
            group = bisect_right(ends, row)
            if group not in held:
                held = {group: table.read_row_group(group, columns=[column])[column]}
            yield held[group][row - ends[group]].as_py()  # counted from its end


def read_around(uri: str, row: int, columns: list[str]) -> tuple[int, pa.Table]:
    """The row group of one file that a row is in, and the number of its first row."""
    import pyarrow.parquet as pq

    with storage.open_parts(uri) as file, pq.ParquetFile(file) as table:
        ends = _ends(table)
        group = bisect_right(ends, row)
        rows = table.read_row_group(group, columns=columns)
    return ends[group] - rows.num_rows, rows


def _ends(table: pq.ParquetFile) -> list[int]:
    """Behind which row each row group ends."""
    return list(accumulate(table.metadata.row_group(number).num_rows for number in range(table.num_row_groups)))


def write(table: pa.Table, uri: str, row_group_size: int = 256) -> None:
    """Write a table whole or not at all, zstd-compressed."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=row_group_size, **_FORMAT)
    storage.write_bytes(uri, sink.getvalue().to_pybytes())


@contextmanager
def writing_rows(uri: str, schema: pa.Schema, row_group_size: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Write a table row by row: what `write` writes, with one row group of rows in memory.

    The block gets a function that takes a row. The file appears, whole, when the block ends, and not after an error.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = io.BytesIO()  # which gives its bytes away without a copy
    rows: list[dict[str, Any]] = []
    with pq.ParquetWriter(sink, schema, **_FORMAT) as writer:

        def flush() -> None:
            writer.write_table(pa.Table.from_pylist(rows, schema))
            rows.clear()

        def add(row: dict[str, Any]) -> None:
            rows.append(row)
            if len(rows) == row_group_size:
                flush()

        yield add
        if rows:
            flush()
    storage.write_bytes(uri, sink.getvalue())
