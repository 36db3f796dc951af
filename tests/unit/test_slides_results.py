"""The folder of a slide's results: what is taken for a result, and what is left of killed processes."""

from __future__ import annotations

from pathlib import Path

import botocore.exceptions
import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

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
