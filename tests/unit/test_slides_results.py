"""The folder of a slide's results: what is taken for a result, and what is left of killed processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from pistoseg.slides import results


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
