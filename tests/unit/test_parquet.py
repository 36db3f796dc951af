import os

import pyarrow as pa
import pytest

from pistoseg import parquet, storage
from pistoseg.errors import PistoSegError


def test_tables_are_read_whole_from_a_folder_in_the_order_of_names(tmp_path):
    for number in (1, 0):
        table = pa.table({"n": [number * 2, number * 2 + 1], "other": ["a", "b"]})
        parquet.write(table, storage.join(str(tmp_path), "parts", f"part-{number:05d}.parquet"))
    folder = storage.join(str(tmp_path), "parts")
    assert parquet.read(folder)["n"].to_pylist() == [0, 1, 2, 3]
    assert parquet.read(folder, columns=["other"]).column_names == ["other"]
    assert parquet.read(storage.join(folder, "part-00001.parquet"))["n"].to_pylist() == [2, 3]
    storage.write_bytes(storage.join(str(tmp_path), "empty", "x.txt"), b"")
    with pytest.raises(PistoSegError, match="no Parquet files"):
        parquet.read(storage.join(str(tmp_path), "empty"))


@pytest.mark.parametrize("root", ["local", "memory://rows"])
@pytest.mark.parametrize("count", [0, 5, 6])
def test_rows_that_come_one_by_one_make_a_file_that_appears_when_all_are_there(root, count, tmp_path):
    uri = storage.join(root if "://" in root else str(tmp_path), f"{count}", "part.parquet")
    schema = pa.schema([("n", pa.int64()), ("png", pa.binary())])
    rows = [{"n": number, "png": bytes([number])} for number in range(count)]
    with parquet.writing_rows(uri, schema, row_group_size=3) as add:
        for row in rows:
            add(row)
        assert not storage.exists(uri)
    assert parquet.read(uri) == pa.Table.from_pylist(rows, schema)


def test_a_table_of_small_images_takes_hardly_more_room_than_they_do(tmp_path):
    images = [os.urandom(4000) for _ in range(64)]
    table, uri = pa.table({"png": images}), str(tmp_path / "part.parquet")
    parquet.write(table, uri, row_group_size=8)
    assert storage.file_size(uri) < 1.1 * 64 * 4000
    with parquet.writing_rows(uri, table.schema, row_group_size=8) as add:
        for image in images:
            add({"png": image})
    assert storage.file_size(uri) < 1.1 * 64 * 4000


def test_rows_of_a_block_that_fails_are_not_written(tmp_path):
    uri = str(tmp_path / "part.parquet")
    with pytest.raises(ZeroDivisionError), parquet.writing_rows(uri, pa.schema([("n", pa.int64())]), 1) as add:
        add({"n": 1 / 0})
    assert not list(tmp_path.iterdir())
