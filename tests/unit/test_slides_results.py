"""The folder of a slide's results: what is taken for a result, and what is left of killed processes."""

from __future__ import annotations

import errno
import multiprocessing
import os
import tempfile
from pathlib import Path

import botocore.exceptions
import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from processes import STUCK_S

from pistoseg import storage
from pistoseg.errors import UnavailableError
from pistoseg.slides import results


@pytest.fixture
def bucket() -> str:
    fsspec.filesystem("memory").store.clear()
    return "memory://bucket"


@pytest.mark.parametrize("name", ["case1", "case [1]"])
def test_a_slide_removes_its_own_orphans_and_not_the_work_of_a_slide_whose_id_begins_like_its(
    tmp_path: Path, name: str
) -> None:
    target = tmp_path / "slides" / name
    orphan = tmp_path / "slides" / f".{name}.0123abcd.part"
    orphan.mkdir(parents=True)
    with results.published(f"{target}.2") as (other, _):
        with results.published(str(target)) as (folder, _):
            assert not orphan.exists()
            (folder / "areas.json").write_text("{}")
        (other / "areas.json").write_text("{}")
    assert sorted(item.name for item in target.parent.iterdir()) == [name, f"{name}.2"]


def test_an_output_that_is_a_file_is_no_defect(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with (
        pytest.raises(UnavailableError, match=r"can't be written \(.*folder that you may write to"),
        results.published(str(tmp_path / "out" / "a")),
    ):
        pass


def test_an_upload_that_the_storage_refuses_says_what_to_do(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def put_file(*_: object, **__: object) -> None:
        raise botocore.exceptions.NoCredentialsError

    monkeypatch.setattr(MemoryFileSystem, "put_file", put_file)
    with (
        pytest.raises(UnavailableError, match=r"no credentials.*AWS_PROFILE") as caught,
        results.published(f"{bucket}/slides/a") as (folder, _),
    ):
        (folder / "areas.json").write_text("{}")
    assert caught.value.file == f"{bucket}/slides/a/areas.json"


@pytest.mark.parametrize("text", [None, b'{"status": ', b"\xff\xfe\xfa", b"[]", b'{"format": "another"}'])
def test_a_slide_without_a_whole_record_is_to_be_done(tmp_path: Path, text: bytes | None) -> None:
    if text is not None:
        storage.write_bytes(f"{tmp_path}/slides/a/slide.json", text)
    assert results.read_record(str(tmp_path), "a") is None


def test_a_record_that_the_disk_does_not_give_is_not_taken_for_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_bytes(_: str) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(storage, "read_bytes", read_bytes)
    with pytest.raises(UnavailableError, match=r"cannot be read \(Input/output error\)") as caught:
        results.read_record(str(tmp_path), "a")
    assert caught.value.file == f"{tmp_path}/slides/a/slide.json"


def killed_while_working(folder: str, target: str) -> None:
    tempfile.tempdir = folder
    with results.published(target) as (result, _):
        (result / "mask.tif").write_bytes(b"half")
        os._exit(9)


def test_working_folders_of_killed_processes_are_removed_and_those_in_use_are_not(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with results.published(f"{bucket}/slides/a") as (first, _):
        (first / "areas.json").write_text("{}")
        context = multiprocessing.get_context("spawn")  # a fork may inherit a lock that another thread holds
        arguments = (str(tmp_path), f"{bucket}/slides/b")
        process = context.Process(target=killed_while_working, args=arguments, daemon=True)
        process.start()
        process.join(STUCK_S)
        assert process.exitcode == 9
        assert len(list(tmp_path.rglob("mask.tif"))) == 1
        with results.published(f"{bucket}/slides/c") as (second, _):
            assert set(tmp_path.rglob("result")) == {first, second}
    assert not list(tmp_path.rglob("result"))
    assert storage.exists(f"{bucket}/slides/a/areas.json")
