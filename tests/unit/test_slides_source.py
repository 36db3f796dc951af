"""What SOURCE may be, and what is said when it is something else."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unicodedata import normalize

import botocore.exceptions
import fsspec
import pyarrow as pa
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from s3fs.errors import translate_boto_error

from pistoseg import parquet, storage
from pistoseg.errors import PistoSegError, RefusedError, UnavailableError
from pistoseg.slides.files import etag, slide_files
from pistoseg.slides.results import published
from pistoseg.slides.source import SlideEntry, list_slides

EXPIRED = botocore.exceptions.ClientError({"Error": {"Code": "400", "Message": "Bad Request"}}, "HeadObject")


def fill(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return root


def found(source: str | Path) -> dict[str, str]:
    return {entry.slide_id: entry.uri for entry in list_slides(str(source))}


@pytest.fixture
def bucket() -> str:
    fsspec.filesystem("memory").store.clear()
    return "memory:///bucket"


def dicom(path: Path, series: str, size: int) -> None:
    """The part of a DICOM file that tells its series."""
    value = series.encode() + b"\0" * (len(series) % 2)
    tag = b"\x20\x00\x0e\x00UI" + len(value).to_bytes(2, "little") + value
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\0" * 128 + b"DICM" + tag + b"\0" * size)


def test_a_slide_a_folder_and_a_pattern(tmp_path: Path) -> None:
    root = fill(tmp_path, "a.svs", "deep/b.ome.tif", "deep/c.NDPI", "notes.txt", "deep/.hidden.svs", "thumbs.db")
    a, b, c = (str(root / name) for name in ("a.svs", "deep/b.ome.tif", "deep/c.NDPI"))
    assert list_slides(a) == [SlideEntry("a", a)]
    assert found(root) == {"a": a, "b": b, "c": c}
    assert found(root / "*.svs") == {"a": a}
    assert found(root / "**" / "*.tif") == {"b": b}
    assert found(root / "de*") == {"b": b, "c": c}
    assert found(root / "?.svs") == {"a": a}


def test_brackets_and_stars_in_names_are_names(tmp_path: Path) -> None:
    root = fill(tmp_path / "cohort [1]", "x [2].svs", "x 2.svs", "y*.svs", "yes.svs")
    assert found(root / "x [2].svs") == {"x _2_": str(root / "x [2].svs")}
    assert set(found(root / "x [?].svs").values()) == {str(root / "x [2].svs")}
    assert set(found(root / "y*.svs").values()) == {str(root / "y*.svs")}
    assert len(found(root)) == 4


def test_object_storage_has_prefixes(bucket: str) -> None:
    for name in ("cohort/TCGA-1.svs", "cohort/TCGA-2.svs", "cohort/other.svs", "cohort/deep/TCGA-3.svs"):
        storage.write_bytes(f"{bucket}/{name}", b"x")
    assert found(f"{bucket}/cohort/TCGA-") == {
        "TCGA-1": f"{bucket}/cohort/TCGA-1.svs",
        "TCGA-2": f"{bucket}/cohort/TCGA-2.svs",
    }
    assert len(found(f"{bucket}/cohort")) == 4
    assert set(found(f"{bucket}/cohort/**/TCGA*.svs")) == {"TCGA-1", "TCGA-2", "TCGA-3"}
    assert found(f"{bucket}/cohort/other.svs") == {"other": f"{bucket}/cohort/other.svs"}


def test_slides_of_one_name_get_ids_that_differ_and_stay(tmp_path: Path) -> None:
    root = fill(tmp_path / "here", "1/HE.svs", "2/HE.svs", "3/he.tif", "4/other.svs")
    ids = {Path(uri).parent.name: slide_id for slide_id, uri in found(root).items()}
    assert ids["4"] == "other"
    assert len({slide_id.casefold() for slide_id in ids.values()}) == 4
    assert ids["1"].startswith("HE-")
    moved = found(root.rename(tmp_path / "there"))
    assert {Path(uri).parent.name: slide_id for slide_id, uri in moved.items()} == ids


def test_ids_are_safe_as_folder_names(tmp_path: Path) -> None:
    root = fill(tmp_path, "a:b?c [x].svs", "...svs", "x" * 200 + ".svs", "图" * 82 + ".svs")
    ids = list(found(root))
    assert "a_b_c _x_" in ids
    assert all(0 < len(slide_id) <= 130 and not set(slide_id) & set('/\\:*?"<>|[]') for slide_id in ids)
    assert "图" * 76 in ids
    for slide_id in ids:  # with what a folder in work is called
        with published(str(tmp_path / "out" / f"{slide_id}-0123abcd")):
            pass


def test_names_that_are_not_utf8_are_slides_of_their_own_and_no_source(tmp_path: Path) -> None:
    latin = os.fsdecode(b"M\xfcller")
    for name in (f"{latin}/a.svs", "b/a.svs", f"{latin}.svs"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    ids = found(tmp_path)
    assert sorted(slide_id[:2] for slide_id in ids) == ["M_", "a-", "a-"]
    assert ids["M_ller"] == str(tmp_path / f"{latin}.svs")
    with pytest.raises(PistoSegError, match=r"M\\xfcller: name: is not UTF-8"):
        list_slides(str(tmp_path / latin))


def test_results_below_the_source_are_no_slides(tmp_path: Path, bucket: str) -> None:
    names = [f"maps/slides/a/{name}" for name in ("mask.tif", "overview.png", "areas.json", "slide.json")]
    root = fill(tmp_path, "a.svs", "mask.tif", "deep/overview.png", *names)
    slides = {"a": "a.svs", "mask": "mask.tif", "overview": "deep/overview.png"}
    assert found(root) == {name: str(root / place) for name, place in slides.items()}
    assert found(root / "**" / "*.tif") == {"mask": str(root / "mask.tif")}
    for name in ("cohort/a.svs", *(f"cohort/{name}" for name in names[:-1])):  # their upload was cut off
        storage.write_bytes(f"{bucket}/{name}", b"x")
    assert set(found(f"{bucket}/coh")) == {"a"}
    storage.write_bytes(f"{bucket}/m.csv", b"slide\ncohort\n")
    assert list(found(f"{bucket}/m.csv").values()) == [f"{bucket}/cohort/a.svs"]


def test_nothing_to_be_found_is_said(tmp_path: Path, bucket: str) -> None:
    fill(tmp_path, "readme.txt")
    for source, reason in [
        (tmp_path / "none", "does not exist"),
        (tmp_path / "*.svs", "does not exist or is empty"),
        (tmp_path, "holds no slide among 1 files"),
        (tmp_path / "readme.txt", "does not end like a slide"),
        (f"{bucket}/none", "does not exist"),
    ]:
        with pytest.raises(PistoSegError, match=reason) as caught:
            list_slides(str(source))
        assert caught.value.file == str(source)


def test_a_manifest_gives_ids_resolutions_and_masks(tmp_path: Path) -> None:
    fill(tmp_path, "deep/a.svs", "b.svs")
    (tmp_path / "m.csv").write_text(
        "\ufeffSlide;mpp;scanner;slide_id;tissue_mask\n"
        "deep/a.svs;0.5;x;case 1;masks/a.png\n"
        "\n"
        "b.svs;;y;;\n"
        "s3://bucket/b.svs;nan;z;;/m/c.png\n"
    )
    a, b, c = list_slides(str(tmp_path / "m.csv"))
    assert a == SlideEntry("case 1", str(tmp_path / "deep/a.svs"), 0.5, str(tmp_path / "masks/a.png"))
    assert (b.uri, b.mpp, b.tissue_mask) == (str(tmp_path / "b.svs"), None, None)
    assert (c.uri, c.mpp, c.tissue_mask) == ("s3://bucket/b.svs", None, "/m/c.png")
    assert b.slide_id != c.slide_id
    assert {b.slide_id[:2], c.slide_id[:2]} == {"b-"}


def test_paths_of_a_manifest_may_be_written_as_on_windows(tmp_path: Path) -> None:
    fill(tmp_path, "deep/a.svs")
    (tmp_path / "m.csv").write_text("slide,tissue_mask\ndeep\\a.svs,masks\\a.png\n")
    assert list_slides(str(tmp_path / "m.csv")) == [
        SlideEntry("a", str(tmp_path / "deep/a.svs"), None, str(tmp_path / "masks/a.png"))
    ]


def test_a_manifest_names_slides_and_masks_however_their_accents_are_written(tmp_path: Path) -> None:
    filed, typed = (normalize(form, "Präparate/é") for form in ("NFD", "NFC"))
    fill(tmp_path, f"{filed}.svs", f"{filed}.png", "b.svs")
    (tmp_path / "m.csv").write_text(f"slide,tissue_mask\n{typed}.svs,{typed}.png\nb.svs,\n{typed}2.svs,\n", "utf-8")
    first, second, third = list_slides(str(tmp_path / "m.csv"))
    assert (first.uri, first.tissue_mask) == (str(tmp_path / f"{filed}.svs"), str(tmp_path / f"{filed}.png"))
    assert second.uri == str(tmp_path / "b.svs")
    assert storage.name(third.uri) == normalize("NFC", "é2.svs")


def test_a_parquet_manifest_on_object_storage(bucket: str) -> None:
    table = pa.table({"slide": ["../a.svs", "b.svs"], "mpp": [0.25, None], "extra": [[1], [2]], "slide_id": [7, 8]})
    parquet.write(table, f"{bucket}/lists/m.parquet")
    assert list_slides(f"{bucket}/lists/m.parquet") == [
        SlideEntry("7", "memory:///bucket/a.svs", 0.25),
        SlideEntry("8", f"{bucket}/lists/b.svs"),
    ]


@pytest.mark.parametrize(
    ("text", "field", "reason"),
    [
        ("file,mpp\na.svs,1\n", "column slide", "has no column slide"),
        ("", "column slide", "has no column slide"),
        ("slide,mpp\n", None, "has no row"),
        ("slide,mpp\na.svs,0.5\n,0.5\n", "row 3, column slide", "is empty"),
        ("slide,mpp\na.svs,-0.5\n", "row 2, column mpp", "is -0.5, and a microscope's pixels have 0.01 to 100 um"),
        ("slide,mpp\na.svs,0\n", "row 2, column mpp", "is 0, and"),
        ("slide,mpp\na.svs,250\n", "row 2, column mpp", "is 250, and"),
        ("slide,mpp\na.svs,inf\n", "row 2, column mpp", "is inf, and"),
        ("slide,mpp\na.svs,20x\n", "row 2, column mpp", "is '20x', which is no number"),
        ("slide,slide_id\na.svs,x\nb.svs,X\n", "row 3, column slide_id", "X is in row 2 already"),
        ("slide\na.svs\nb.svs\na.svs\n", "row 4, column slide", "a.svs is in row 2 already"),
        ("slide,slide_id\na.svs,x/y\n", "row 2, column slide_id", "cannot name a folder"),
        ("slide,slide_id\na.svs,..\n", "row 2, column slide_id", "cannot name a folder"),
        ("slide,slide_id\na.svs,.\n", "row 2, column slide_id", "cannot name a folder"),
        (f"slide,slide_id\na.svs,{'ж' * 116}\n", "row 2, column slide_id", "has 232 bytes in UTF-8.*at most 230"),
        ("slide\na.svs,b.svs\n", "row 2", "more fields than the header"),
        ("slide,mpp,mpp\na.svs,1,2\n", "column mpp", "twice"),
    ],
)
def test_a_wrong_manifest_names_file_row_and_column(tmp_path: Path, text: str, field: str, reason: str) -> None:
    path = tmp_path / "m.csv"
    path.write_text(text)
    with pytest.raises(PistoSegError, match=reason) as caught:
        list_slides(str(path))
    assert (caught.value.file, caught.value.field) == (str(path), field)
    assert caught.value.remedy


def test_a_damaged_parquet_manifest_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(PistoSegError, match=r"m.parquet: is not a Parquet file"):
        list_slides(str(tmp_path / "m.parquet"))


def test_formats_of_several_files_are_one_slide(tmp_path: Path) -> None:
    fill(tmp_path, "m/a.mrxs", "m/a/Slidedat.ini", "m/a/Data0000.dat", "v/s.vms", "v/s.jpg", "v/s(1,0).jpg", "p/x.jpg")
    dicom(tmp_path / "case 7" / "0.dcm", "1.2.3", 10)
    dicom(tmp_path / "case 7" / "1.dcm", "1.2.3", 500)
    dicom(tmp_path / "case 7" / "2.dcm", "1.2.3", 100)
    assert found(tmp_path) == {
        "a": str(tmp_path / "m/a.mrxs"),
        "s": str(tmp_path / "v/s.vms"),
        "x": str(tmp_path / "p/x.jpg"),
        "case 7": str(tmp_path / "case 7/1.dcm"),
    }
    names = [Path(item).name for item in slide_files(str(tmp_path / "m/a.mrxs"))]
    assert names == ["a.mrxs", "Data0000.dat", "Slidedat.ini"]
    assert len(slide_files(str(tmp_path / "case 7/1.dcm"))) == 3
    dicom(tmp_path / "case 7" / "other.dcm", "1.2.4", 10)
    assert len(slide_files(str(tmp_path / "case 7/1.dcm"))) == 3
    assert len(found(tmp_path / "case 7")) == 2
    (tmp_path / "m.csv").write_text("slide\ncase 7\n")
    with pytest.raises(PistoSegError, match="holds 2 slides") as caught:
        list_slides(str(tmp_path / "m.csv"))
    assert caught.value.field == "row 2, column slide"
    (tmp_path / "case 7" / "other.dcm").unlink()
    assert found(tmp_path / "m.csv") == {"case 7": str(tmp_path / "case 7/1.dcm")}


def test_a_slide_whose_folder_can_not_be_listed_is_no_outage_for_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, "a.mrxs", "a/Slidedat.ini")
    scandir = os.scandir

    def failing(path: str) -> Any:
        if str(path) == str(tmp_path / "a"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)
    with pytest.raises(PistoSegError, match="can't be listed") as caught:
        etag(str(tmp_path / "a.mrxs"))
    assert not isinstance(caught.value, UnavailableError)


@pytest.mark.parametrize(("code", "kind"), [(errno.ESTALE, RefusedError), (errno.ELOOP, PistoSegError)])
def test_a_slide_of_which_the_disk_says_nothing_is_neither_bad_nor_an_outage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[PistoSegError]
) -> None:
    def info(_: str) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(storage, "info", info)
    with pytest.raises(PistoSegError, match=r"a\.svs: cannot be read") as caught:
        etag(str(tmp_path / "a.svs"))
    assert type(caught.value) is kind


def test_many_dicom_series_in_one_folder_are_told_apart_by_a_few_reads_of_each_file(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(20):
        dicom(tmp_path / "x.dcm", f"1.2.{number // 2}", 10 + number)
        storage.write_bytes(f"{bucket}/{number}.dcm", (tmp_path / "x.dcm").read_bytes())
    opened = []
    original = storage.open_file
    monkeypatch.setattr(storage, "open_file", lambda uri, *mode: opened.append(uri) or original(uri, *mode))
    slides = list_slides(bucket)
    with ThreadPoolExecutor(10) as pool:
        etags = list(pool.map(lambda entry: etag(entry.uri), slides))
    assert len(set(etags)) == 10
    assert len(opened) == 20 + 10  # each slide's own file is looked at once more
    dicom(tmp_path / "x.dcm", "1.2.9", 10)
    storage.write_bytes(f"{bucket}/0.dcm", (tmp_path / "x.dcm").read_bytes())
    assert [before == etag(entry.uri) for before, entry in zip(etags, slides, strict=True)].count(False) == 2


def test_etags_change_with_any_file_of_a_slide(tmp_path: Path, bucket: str) -> None:
    root = fill(tmp_path, "a.svs", "m.mrxs", "m/Data0000.dat")
    seen = [etag(str(root / "a.svs")), etag(str(root / "m.mrxs"))]
    assert seen == [etag(str(root / "a.svs")), etag(str(root / "m.mrxs"))]
    (root / "a.svs").write_bytes(b"other")
    assert etag(str(root / "a.svs")) != seen[0]
    same_size = root / "m" / "Data0000.dat"
    os.utime(same_size, ns=(1, same_size.stat().st_mtime_ns + 1))
    assert etag(str(root / "m.mrxs")) != seen[1]
    storage.write_bytes(f"{bucket}/a.svs", b"1")
    first = etag(f"{bucket}/a.svs")
    assert etag(f"{bucket}/a.svs") == first
    storage.write_bytes(f"{bucket}/a.svs", b"2")
    assert etag(f"{bucket}/a.svs") != first
    with pytest.raises(PistoSegError, match="does not exist"):
        etag(str(root / "none.svs"))
    with pytest.raises(PistoSegError, match="is a folder"):
        etag(str(root))


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (botocore.exceptions.NoCredentialsError(), "there are no credentials"),
        (translate_boto_error(EXPIRED), "mostly credentials that have expired"),
    ],
)
def test_a_storage_that_lets_nobody_in_is_no_fault_of_a_slide(
    bucket: str, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def info(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(MemoryFileSystem, "info", info)
    with pytest.raises(UnavailableError, match=reason) as caught:
        etag(f"{bucket}/a.svs")
    assert caught.value.file == f"{bucket}/a.svs"
