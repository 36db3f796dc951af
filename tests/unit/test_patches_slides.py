import errno
import json
import os
import weakref
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unicodedata import normalize

import numpy as np
import pyarrow as pa
import pytest
import shapely
from patch_files import CLASSES, config_of, put
from slide_files import box_mean, texture, write_tiff

from pistoseg import object_store, parquet, storage
from pistoseg.cli import main
from pistoseg.config import DataConfig, ScaleConfig, load_config
from pistoseg.errors import PistoSegError, RefusedError, UnavailableError
from pistoseg.outputs.pictures import sheet
from pistoseg.patches.annotations import read_annotations
from pistoseg.patches.check import _read_crop, check
from pistoseg.patches.crops import crops, ingest_slide
from pistoseg.patches.decode import decode_png
from pistoseg.patches.digest import training_digest, training_folder, validation_folder
from pistoseg.patches.manifest import in_shards, is_manifest, scan_slides, write_manifest
from pistoseg.patches.source import SlideSource, Window
from pistoseg.patches.windows import cut_windows
from pistoseg.slides.files import etag
from pistoseg.slides.source import SlideEntry, list_slides
from pistoseg.stages.slide_images import SlideOpener
from pistoseg.stages.windows import _matched, write_windows

HEADER = "slide,x,y,width,height,tumor,stroma,normal"
DATA = DataConfig(window=16, min_size=4)


def manifest(root, *rows, header=HEADER, name="windows.csv"):
    return put(root, name, "\n".join([header, *rows]).encode())


def feature(geometry, name=None, **properties):
    classification = {"classification": {"name": name, "color": [1, 2, 3]}} if name else {}
    return {
        "type": "Feature",
        "geometry": json.loads(shapely.to_geojson(geometry)),
        "properties": {"objectType": "annotation", **classification, **properties},
    }


def geojson(root, *features, name="a.geojson"):
    return put(root, name, json.dumps({"type": "FeatureCollection", "features": features}).encode())


def failing_for(file, read, error=None):
    """`read`, which raises the error, or one of the disk, where it is given the file."""

    def reading(asked, *arguments):
        if storage.name(str(asked)) == storage.name(str(file)):
            raise error or OSError(errno.EIO, os.strerror(errno.EIO), str(asked))
        return read(asked, *arguments)

    return reading


# --- manifests ---------------------------------------------------------------------------------------------------


def test_windows_of_a_manifest_are_grouped_by_slide_from_top_to_bottom_with_ids_that_count_up(tmp_path):
    uri = manifest(
        tmp_path,
        "b.svs,0,50,20,20,0,1,0,",
        "sub/a.svs,5,6,7,8,1,0,1,0.25",
        "b.svs,9,10,20,20,1,0,0,0.5",
        header=HEADER + ",mpp",
    )
    listing = scan_slides(uri, CLASSES)
    assert [(s.name, s.uri, s.mpp, s.first) for s in listing.slides] == [
        ("b.svs", str(tmp_path / "b.svs"), 0.5, 0),
        ("sub/a.svs", str(tmp_path / "sub" / "a.svs"), 0.25, 2),
    ]
    assert listing.slides[0].windows == (Window(9, 10, 20, 20, (1, 0, 0), 4), Window(0, 50, 20, 20, (0, 1, 0), 2))
    assert listing.slides[1].windows == (Window(5, 6, 7, 8, (1, 0, 1), 3),)
    assert listing.rejected == []


def test_slides_are_found_relative_to_a_manifest_in_object_storage(tmp_path):
    uri = f"memory://{tmp_path.name}/lists/windows.csv"
    rows = ["../slides/a.svs,0,0,9,9,1,0,0", "s3://bucket/b.svs,0,0,9,9,1,0,0", "/local/c.svs,0,0,9,9,1,0,0"]
    storage.write_bytes(uri, "\n".join([HEADER, *rows]).encode())
    assert sorted(slide.uri for slide in scan_slides(uri, CLASSES).slides) == [
        "/local/c.svs",
        f"memory://{tmp_path.name}/slides/a.svs",
        "s3://bucket/b.svs",
    ]


@pytest.mark.parametrize(
    ("column", "value", "flags"),
    [
        ("labels", "stroma;Tumor", (1, 1, 0)),
        ("labels", "tumor+normal", (1, 0, 1)),
        ("class", "NORMAL", (0, 0, 1)),
    ],
)
def test_labels_may_be_written_as_names(tmp_path, column, value, flags):
    uri = manifest(tmp_path, f"a.svs,0,0,9,9,{value}", header=f"slide,x,y,width,height,{column}")
    assert scan_slides(uri, CLASSES).slides[0].windows[0].labels == flags


def test_a_parquet_manifest_may_hold_lists_of_names(tmp_path):
    row = {"slide": "a.svs", "x": 1, "y": 2, "width": 3, "height": 4, "labels": ["tumor", "stroma"], "mpp": None}
    uri = storage.join(str(tmp_path), "windows.parquet")
    parquet.write(pa.Table.from_pylist([row]), uri)
    (slide,) = scan_slides(uri, CLASSES).slides
    assert slide.windows == (Window(1, 2, 3, 4, (1, 1, 0), 1),)
    assert slide.mpp is None


def test_every_wrong_row_is_rejected_with_its_number_and_column(tmp_path):
    good = "a.svs,0,0,9,9,1,0,0,"
    wrong = {
        ",0,0,9,9,1,0,0,": ("slide", "is empty"),
        "a.svs,-1,0,9,9,1,0,0,": ("x", "is -1, and must be at least 0"),
        "a.svs,0,1.5,9,9,1,0,0,": ("y", "is 1.5, and must be a whole number of px"),
        "a.svs,0,0,0,9,1,0,0,": ("width", "is 0, and must be at least 1"),
        "a.svs,0,0,9,nine,1,0,0,": ("height", "is 'nine', which is no number"),
        "a.svs,0,1,9,9,2,0,0,": ("tumor", "is 2, and a flag is 0 or 1"),
        "a.svs,0,2,9,9,1,0,0,-1": ("mpp", "is -1, and must be positive"),
        "a.svs,0,0,9,9,0,1,0,": ("label", "is the window of row 2 with another label; row 2 is used"),
        "a.svs,0,0,9,9,1,0,0, ": ("window", "repeats row 2"),
    }
    listing = scan_slides(manifest(tmp_path, good, *wrong, header=HEADER + ",mpp"), CLASSES)
    assert [len(slide.windows) for slide in listing.slides] == [1]
    found = [(item.name.split(" (")[0], item.field, item.reason) for item in listing.rejected]
    assert found == [(f"windows.csv row {row}", *fault) for row, fault in enumerate(wrong.values(), 3)]


def test_a_slide_with_two_pixel_sizes_is_refused_from_the_second_on(tmp_path):
    uri = manifest(tmp_path, "a.svs,0,0,9,9,1,0,0,0.5", "a.svs,9,0,9,9,1,0,0,0.25", header=HEADER + ",mpp")
    (rejection,) = scan_slides(uri, CLASSES).rejected
    assert (rejection.field, rejection.reason) == ("mpp", "is 0.25, and the same slide has 0.5 in another row")


@pytest.mark.parametrize(
    ("header", "row", "message"),
    [
        ("image,x,y,width,height,tumor,stroma,normal", "a.png,0,0,9,9,1,0,0", "is a table of windows of images"),
        ("x,y,width,height,tumor,stroma,normal", "0,0,9,9,1,0,0", "lacks the columns slide "),
        ("slide,x,y,tumor,stroma,normal", "a.svs,0,0,1,0,0", "lacks the columns width, height "),
        ("slide,x,y,width,height,tumor", "a.svs,0,0,9,9,1", "lacks the columns stroma, normal "),
        ("slide,mpp", "a.svs,1", "lacks the columns x, y, width, height, or annotations "),
        ("slide,x,y,width,height,labels,Labels", "a.svs,0,0,9,9,tumor,stroma", "column labels: is there twice"),
        ("slide,annotations,Slide", "a.svs,a.json,b.svs", "column slide: is there twice"),
        (
            "slide,x,y,width,height,labels",
            "a.svs,0,0,9,9,glass",
            "windows.csv row 2 .a.svs.: no class is called 'glass'",
        ),
    ],
)
def test_a_manifest_that_cannot_be_used_is_refused(tmp_path, header, row, message):
    with pytest.raises(PistoSegError, match=message):
        scan_slides(manifest(tmp_path, row, header=header), CLASSES)


@pytest.mark.parametrize("verb", [["data", "check"], ["train", "--workspace", "no/where", "--data"]])
def test_a_table_of_images_in_place_of_its_folder_is_told_from_a_manifest(tmp_path, monkeypatch, capsys, verb):
    monkeypatch.chdir(tmp_path)
    uri = manifest(tmp_path, "a.png,0,0,9,9,1,0,0", header="image,x,y,width,height,tumor,stroma,normal")
    assert main([*verb, uri]) == 2
    assert f"{uri}: columns: is a table of windows of images" in (said := capsys.readouterr().err)
    assert f"give its folder as --data: {tmp_path}" in said


def test_annotated_slides_are_listed_once_each_with_ids_to_spare(tmp_path):
    uri = manifest(tmp_path, "b.svs,b.geojson", "a.svs,sub/a.geojson", "b.svs,c.geojson", header="slide,annotations")
    listing = scan_slides(uri, CLASSES)
    assert [(s.name, s.annotations) for s in listing.slides] == [
        ("a.svs", str(tmp_path / "sub" / "a.geojson")),
        ("b.svs", str(tmp_path / "b.geojson")),
    ]
    assert listing.slides[1].first - listing.slides[0].first > 10**9
    assert [item.reason for item in listing.rejected] == ["is in row 2 already"]


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_written_manifest_reads_as_what_was_written(tmp_path, ending):
    windows = (Window(3, 4, 20, 21, (1, 0, 0)), Window(0, 9, 20, 21, (0, 1, 1)))
    slides = [
        SlideSource("a", str(tmp_path / "sub" / "a [1].svs"), 0.5, windows),
        SlideSource("b", "s3://bucket/b.svs", None, windows[:1]),
    ]
    uri = str(tmp_path / f"windows.{ending}")
    write_manifest(uri, slides, CLASSES)
    listing = scan_slides(uri, CLASSES)
    assert [(slide.name, slide.uri, slide.mpp) for slide in listing.slides] == [
        ("s3://bucket/b.svs", "s3://bucket/b.svs", None),
        ("sub/a [1].svs", str(tmp_path / "sub" / "a [1].svs"), 0.5),
    ]
    read = [[(w.x, w.y, w.width, w.height, w.labels) for w in slide.windows] for slide in listing.slides]
    wanted = [[(w.x, w.y, w.width, w.height, w.labels) for w in found] for found in (windows[:1], windows)]
    assert read == wanted


def test_shards_hold_a_bounded_number_of_windows_and_keep_their_ids():
    def slide(name, count, first):
        return SlideSource(name, name, windows=tuple(Window(i, 0, 9, 9, (1, 0, 0)) for i in range(count)), first=first)

    slides = [slide("a", 5, 0), slide("b", 2, 5), SlideSource("c", "c", annotations="c.json"), slide("d", 1, 7)]
    shards = [[(part.name, part.first, len(part.windows)) for part in shard] for shard in in_shards(slides, 3)]
    assert shards == [
        [("a", 0, 3)],
        [("a", 3, 2), ("b", 5, 1)],
        [("b", 6, 1)],
        [("c", 0, 0)],
        [("d", 7, 1)],
    ]


# --- annotations -------------------------------------------------------------------------------------------------


def test_polygons_are_united_by_class_with_their_holes_and_whatever_the_case_of_their_names(tmp_path):
    ring = shapely.Polygon([(0, 0), (100, 0), (100, 100), (0, 100)], [[(20, 20), (60, 20), (60, 60), (20, 60)]])
    islands = shapely.MultiPolygon([shapely.box(200, 0, 210, 10), shapely.box(300, 0, 320, 10)])
    uri = geojson(
        tmp_path,
        feature(ring, "Tumor"),
        feature(islands, "STROMA"),
        feature(shapely.box(205, 0, 215, 10), "stroma"),
        feature(shapely.box(20, 20, 60, 60), "Background"),
    )
    found = read_annotations(uri, CLASSES)
    areas = {tissue: area.area for tissue, area in found.areas.items()}
    assert areas == {0: 10_000 - 1_600, 1: 150 + 200, CLASSES.background_id: 1_600}
    assert not found.areas[0].contains(shapely.Point(40, 40))


def test_what_has_no_class_of_the_config_is_counted_and_left_out(tmp_path):
    box = shapely.box(0, 0, 9, 9)
    uri = geojson(
        tmp_path,
        feature(box, "Tumour"),
        feature(box, "Tumour"),
        feature(box, "Fold"),
        feature(box),
        feature(shapely.Point(1, 1), "Tumor"),
        feature(shapely.LineString([(0, 0), (9, 9)]), "Tumor"),
        feature(box, "Tumor", objectType="cell"),
    )
    found = read_annotations(uri, CLASSES)
    assert found.areas == {}
    assert found.unknown == Counter({"Tumour": 2, "Fold": 1})
    assert (found.unclassified, found.other) == (1, 3)


def test_every_shape_of_a_qupath_export_is_read(tmp_path):
    derived = feature(shapely.box(0, 0, 2, 1))
    derived["properties"]["classification"] = {"names": ["Stroma", "Positive"]}
    bow_tie = shapely.Polygon([(0, 0), (10, 10), (10, 0), (0, 10)])
    one = feature(bow_tie, "Tumor")
    as_list = put(tmp_path, "list.json", json.dumps([derived, one]).encode())
    alone = put(tmp_path, "one.json", json.dumps(one).encode())
    assert {tissue: area.area for tissue, area in read_annotations(as_list, CLASSES).areas.items()} == {0: 50, 1: 2}
    assert {tissue: area.area for tissue, area in read_annotations(alone, CLASSES).areas.items()} == {0: 50}


def test_what_is_covered_twice_by_one_object_is_no_hole(tmp_path):
    crossing = shapely.MultiPolygon([shapely.box(0, 0, 10, 10), shapely.box(5, 5, 15, 15)])
    ring = shapely.Polygon(shapely.box(20, 0, 30, 10).exterior, [shapely.box(22, 2, 24, 4).exterior])
    stroke = shapely.Polygon([(0, 0), (10, 0), (10, 10), (-2, 10), (-2, -2), (5, -2), (5, 5), (0, 5)])
    uri = geojson(
        tmp_path,
        feature(shapely.MultiPolygon([*crossing.geoms, ring]), "Tumor"),
        feature(stroke, "Stroma"),
    )
    areas = {tissue: area.area for tissue, area in read_annotations(uri, CLASSES).areas.items()}
    assert areas == {0: 175 + 96, 1: 10 * 10 + 2 * 10 + 2 * 7}


def test_cells_are_left_out_however_the_version_of_qupath_names_them(tmp_path):
    def written(name, box, *, legacy=None, **properties):
        item = feature(shapely.box(*box), name, **properties)
        del item["properties"]["objectType"]
        return item | ({"id": legacy} if legacy else {})

    uri = geojson(
        tmp_path,
        written("Tumor", (0, 0, 9, 9), object_type="annotation"),
        written("Stroma", (1, 1, 2, 2), object_type="cell"),
        written("Tumor", (10, 0, 20, 9), legacy="PathAnnotationObject"),
        written("Tumor", (20, 0, 30, 9), legacy="PathTileObject"),
        written("Stroma", (1, 1, 2, 2), legacy="PathCellObject"),
        written("Stroma", (1, 1, 2, 2), legacy="PathDetectionObject"),
        written("Stroma", (1, 1, 2, 2), legacy="TMACoreObject"),
        written("Tumor", (30, 0, 40, 9), legacy="c2a4d7b0-8d0c-4a55-a2b0-5b0b6a7f1f10"),
        feature(shapely.box(1, 1, 2, 2), "Stroma", objectType="detection") | {"id": "PathAnnotationObject"},
    )
    found = read_annotations(uri, CLASSES)
    assert {tissue: area.area for tissue, area in found.areas.items()} == {0: 81 + 90 + 90 + 90}
    assert found.other == 5


def test_what_a_polygon_of_an_unknown_class_lies_on_counts_as_not_annotated(tmp_path):
    uri = geojson(
        tmp_path,
        feature(shapely.box(0, 0, 300, 100), "Tumor"),
        feature(shapely.box(120, 20, 180, 80), "Necrosis"),
        feature(shapely.box(140, 40, 160, 60), "Stroma"),
        feature(shapely.box(290, 90, 310, 110), "Ignore*"),
        feature(shapely.box(20, 20, 80, 80)),
        feature(shapely.box(0, 100, 100, 200), "Normal"),
        feature(shapely.box(0, 100, 100, 300), "Fold"),
    )
    found = read_annotations(uri, CLASSES)
    areas = {tissue: area.area for tissue, area in found.areas.items()}
    assert areas == {0: 30_000 - 3_600 - 100, 1: 400, 2: 10_000}
    cut = cut_windows(found, 300, 300, (1, 1), 3, DataConfig(window=100))
    assert labels_by_place(cut, 100) == {(0, 0): (1, 0, 0), (2, 0): (1, 0, 0), (0, 1): (0, 0, 1)}
    assert cut.partly == 1


def test_annotations_stay_that_a_larger_outline_of_an_unknown_class_frames(tmp_path):
    uri = geojson(
        tmp_path,
        feature(shapely.box(0, 0, 200, 200), "Region*"),
        feature(shapely.box(10, 10, 60, 60), "Tumor"),
        feature(shapely.box(20, 20, 30, 30), "Fold"),
        feature(shapely.box(60, 10, 90, 60), "Stroma"),
        feature(shapely.box(190, 10, 201, 60), "Stroma"),
        feature(shapely.box(100, 100, 110, 110), "Fold"),
        feature(shapely.box(300, 300, 310, 310), "Normal"),
        feature(shapely.box(290, 290, 320, 320), "Fold"),
        feature(shapely.box(400, 400, 410, 410), "Normal"),
        feature(shapely.box(400, 400, 405, 418), "Fold"),
    )
    areas = {tissue: area.area for tissue, area in read_annotations(uri, CLASSES).areas.items()}
    assert areas == {0: 2_500 - 100, 1: 1_500 + 550, 2: 100 + 50}


def test_a_class_has_no_area_where_polygons_of_unknown_classes_lie_on_all_of_it(tmp_path):
    halves = feature(shapely.box(-1, 0, 9, 5), "Fold"), feature(shapely.box(-1, 5, 9, 10), "Fold")
    uri = geojson(tmp_path, feature(shapely.box(0, 0, 9, 9), "Tumor"), *halves)
    found = read_annotations(uri, CLASSES)
    assert (found.areas, found.unknown) == ({}, Counter({"Fold": 2}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not valid JSON"),
        (b"\xff\xfe\x00", "is not valid JSON"),
        (b'{"type": "Topology"}', "is no GeoJSON with features"),
        (b"[1, 2]", "is no GeoJSON with features"),
        (b'[{"geometry": null, "properties": "x"}]', "properties of feature 1: are no object"),
        (b'[{"geometry": {"type": "Polygon", "coordinates": [[[0, 0]]]}}]', "geometry of feature 1: is broken"),
    ],
)
def test_broken_annotations_are_refused_by_name(tmp_path, content, message):
    uri = put(tmp_path, "a.geojson", content)
    with pytest.raises(PistoSegError, match=message) as caught:
        read_annotations(uri, CLASSES)
    assert caught.value.file == uri


@pytest.mark.parametrize("names", [5, "Tumor", {"Tumor": 1}])
def test_names_of_a_class_that_are_no_list_are_refused_by_name(tmp_path, names):
    uri = geojson(tmp_path, feature(shapely.box(0, 0, 2, 1), classification={"names": names}))
    with pytest.raises(PistoSegError, match=r"classification\.names of feature 1: is no list") as caught:
        read_annotations(uri, CLASSES)
    assert caught.value.file == uri


# --- windows -----------------------------------------------------------------------------------------------------


def labels_by_place(cut, size):
    return {(window.x // size, window.y // size): window.labels for window in cut.windows}


def test_windows_carry_the_classes_that_cover_two_percent_of_them_and_need_to_be_annotated_whole(tmp_path):
    uri = geojson(
        tmp_path,
        feature(shapely.box(0, 0, 300, 100), "tumor"),
        feature(shapely.box(101, 100, 400, 200), "stroma"),
        feature(shapely.box(0, 100, 101, 200), "normal"),
        feature(shapely.box(300, 0, 350, 100), "background"),
        feature(shapely.box(350, 0, 398.5, 100), "normal"),
    )
    data = DataConfig(window=100)
    cut = cut_windows(read_annotations(uri, CLASSES), 400, 250, (1.0, 1.0), 3, data)
    assert labels_by_place(cut, 100) == {
        (0, 0): (1, 0, 0),
        (1, 0): (1, 0, 0),
        (2, 0): (1, 0, 0),
        (3, 0): (0, 0, 1),  # half of it is glass, and 1.5 % of it is not annotated
        (0, 1): (0, 0, 1),
        (1, 1): (0, 1, 0),  # 1 % of it is normal
        (2, 1): (0, 1, 0),
        (3, 1): (0, 1, 0),
    }
    assert cut.overlap == 0
    strict = DataConfig(window=100, window_min_share=0.01)
    cut = cut_windows(read_annotations(uri, CLASSES), 400, 250, (1.0, 1.0), 3, strict)
    assert labels_by_place(cut, 100)[1, 1] == (0, 1, 1)
    assert (3, 0) not in labels_by_place(cut, 100)
    assert cut.partly == 1


def test_windows_over_a_hole_see_what_is_in_it(tmp_path):
    ring = shapely.Polygon(shapely.box(0, 0, 90, 90).exterior, [shapely.box(30, 30, 60, 60).exterior])
    hole = feature(shapely.box(30, 30, 60, 60), "stroma")
    data = DataConfig(window=30)
    with_hole = cut_windows(
        read_annotations(geojson(tmp_path, feature(ring, "tumor")), CLASSES), 90, 90, (1, 1), 3, data
    )
    assert set(labels_by_place(with_hole, 30)) == {(x, y) for x in range(3) for y in range(3)} - {(1, 1)}
    filled = cut_windows(
        read_annotations(geojson(tmp_path, feature(ring, "tumor"), hole), CLASSES), 90, 90, (1, 1), 3, data
    )
    assert labels_by_place(filled, 30)[1, 1] == (0, 1, 0)
    assert sum(sum(window.labels) == 1 for window in filled.windows) == 9


def test_annotations_over_each_other_are_measured_and_both_count(tmp_path):
    uri = geojson(tmp_path, feature(shapely.box(0, 0, 100, 50), "tumor"), feature(shapely.box(0, 0, 50, 50), "stroma"))
    cut = cut_windows(read_annotations(uri, CLASSES), 100, 50, (1, 1), 3, DataConfig(window=50))
    assert labels_by_place(cut, 50) == {(0, 0): (1, 1, 0), (1, 0): (1, 0, 0)}
    assert cut.overlap == pytest.approx(0.5)


def test_shares_equal_those_counted_on_pixels_at_every_scale_and_stride(tmp_path):
    rng = np.random.default_rng(3)
    blocks = rng.integers(0, 4, (13, 16))
    cells = [
        (k, shapely.box(10 * i, 10 * j, 10 * i + 10, 10 * j + 10)) for (j, i), k in np.ndenumerate(blocks) if k < 3
    ]
    uri = geojson(tmp_path, *(feature(cell, CLASSES.names[k]) for k, cell in cells))
    pixels = np.kron(blocks, np.ones((10, 10), int))
    data = DataConfig(window=20, window_stride=7, window_min_share=0.1999)  # no whole number of px
    cut = cut_windows(read_annotations(uri, CLASSES), 160, 130, (1.5, 1.25), 3, data)
    wanted = {}
    for y in range(0, 140, 7):
        for x in range(0, 140, 7):
            left, top = round(x * 1.5), round(y * 1.25)
            view = pixels[top : top + 25, left : left + 30]
            shares = np.bincount(view.ravel(), minlength=4) / 750
            inside = left + 30 <= 160 and top + 25 <= 130
            if inside and shares[3] < 0.1999 and (shares[:3] >= 0.1999).any():
                wanted[left, top] = tuple((shares[:3] >= 0.1999).astype(int))
    assert len(wanted) > 50
    assert {(w.x, w.y): w.labels for w in cut.windows} == wanted
    assert {(w.width, w.height) for w in cut.windows} == {(30, 25)}


# --- reading -----------------------------------------------------------------------------------------------------


def ingested(source, opener, data=DATA, **scale):
    """What a slide adds to the artifact: images, windows, rejected, notes."""
    images = []
    rows = ingest_slide(source, opener, CLASSES, data, ScaleConfig(**scale), images.append)
    return SimpleNamespace(images=images, **vars(rows))


def read(source, mpp, **scale):
    return ingested(source, SlideOpener(mpp), mpp=mpp, **scale)


def test_a_window_is_read_at_the_networks_pixel_size(tmp_path):
    image = texture(300, 400)
    slide = write_tiff(tmp_path / "a.tif", image, mpp=(0.5, 0.5))
    windows = (Window(100, 60, 80, 40, (1, 0, 0), 2), Window(0, 0, 50, 50, (0, 1, 1), 3))
    source = SlideSource("a.tif", str(slide), windows=windows, first=7)
    same, half = read(source, 0.5), read(source, 1.25)
    np.testing.assert_array_equal(decode_png(same.images[0]["png"]), image[60:100, 100:180])
    wanted = box_mean(image, 2.5, 2.5, 160, 120)[24:40, 40:72]
    assert np.abs(decode_png(half.images[0]["png"]) - wanted).max() <= 1.01
    assert [(row["image"], row["name"], row["width"], row["height"], row["mpp"]) for row in half.images] == [
        (7, "a.tif/100-60-80x40", 32, 16, 1.25),
        (8, "a.tif/0-0-50x50", 20, 20, 1.25),
    ]
    assert half.windows[1] == {
        "window": 8, "image": 8, "x": 0, "y": 0, "width": 20, "height": 20, "labels": [0, 1, 1],
    }  # fmt: skip
    fitted = read(source, 0.5, fit=64)
    assert decode_png(fitted.images[0]["png"]).shape == (64, 64, 3)


def test_the_manifests_pixel_size_is_believed_before_the_slides(tmp_path):
    slide = write_tiff(tmp_path / "a.tif", texture(200, 200), mpp=None)
    source = SlideSource("a.tif", str(slide), windows=(Window(0, 0, 100, 100, (1, 0, 0), 2),))
    (rejection,) = read(source, 0.5).rejected
    assert rejection.name == "row 2 (a.tif/0-0-100x100)"
    assert rejection.field == "mpp"
    with_mpp = SlideSource("a.tif", str(slide), 0.25, source.windows)
    assert read(with_mpp, 0.5).images[0]["width"] == 50


def test_windows_that_cannot_be_images_are_rejected_and_the_others_read(tmp_path):
    slide = write_tiff(tmp_path / "a.tif", texture(200, 200))
    boxes = [(0, 0, 100, 100), (150, 0, 51, 50), (0, 0, 3, 50), (100, 100, 100, 100)]
    windows = tuple(Window(*box, (1, 0, 0), row) for row, box in enumerate(boxes, 2))
    rows = read(SlideSource("a.tif", str(slide), windows=windows), 0.5)
    assert [row["image"] for row in rows.images] == [0, 3]
    assert [(item.name.split(" (")[0], item.field) for item in rows.rejected] == [
        ("row 3", "window"),
        ("row 4", "size"),
    ]


def test_a_slide_that_cannot_be_opened_rejects_each_of_its_windows_with_the_reason(tmp_path):
    put(tmp_path, "a.svs", b"no slide at all")
    windows = tuple(Window(9 * i, 0, 9, 9, (1, 0, 0), i + 2) for i in range(3))
    rows = read(SlideSource("a.svs", str(tmp_path / "a.svs"), windows=windows), 0.5)
    assert rows.images == rows.windows == []
    assert [item.name.split(" (")[0] for item in rows.rejected] == ["row 2", "row 3", "row 4"]
    assert all("is no slide" in item.reason for item in rows.rejected)


def test_a_slide_that_is_not_there_says_where_the_manifests_paths_start(tmp_path):
    uri = manifest(tmp_path, "slides/a.tif,0,0,50,50,1,0,0", "../b.tif,0,0,50,50,1,0,0", "/c.tif,0,0,50,50,1,0,0")
    rows = [read(source, 0.5) for source in scan_slides(uri, CLASSES).slides]
    remedies = {row.rejected[0].name: row.rejected[0].remedy for row in rows}
    start, end = "relative paths start at the manifest's folder", ": keep it there, or write absolute paths"
    assert remedies == {
        "row 2 (slides/a.tif/0-0-50x50)": f"{start} {tmp_path}/{end}",
        "row 3 (../b.tif/0-0-50x50)": start + end,
        "row 4 (/c.tif/0-0-50x50)": "check the path",
    }


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("disk", r"a.tif: cannot be read \(Input/output error\)"),
        ("variable", "PISTOSEG_DISK_GB: '200Gi' is not a number above 0.*set PISTOSEG_DISK_GB"),
        ("room", "the cache may have 0.*half of the free disk, or of PISTOSEG_DISK_GB"),
        ("rights", r"a.tif: AWS refuses access"),
    ],
)
def test_a_fault_of_the_machine_or_storage_rejects_no_window(tmp_path, monkeypatch, fault, says):
    write_tiff(tmp_path / "a.tif", texture(64, 64), mpp=(0.5, 0.5))
    uri = str(tmp_path / "a.tif")
    if fault == "disk":

        def refuse(file, *_):
            raise OSError(errno.EIO, os.strerror(errno.EIO), file)

        monkeypatch.setattr("pistoseg.slides.reader.open", refuse, raising=False)
    if fault == "variable":
        monkeypatch.setenv("PISTOSEG_DISK_GB", "200Gi")
    if fault in ("room", "rights"):
        uri = put(f"memory://{tmp_path.name}", "a.tif", (tmp_path / "a.tif").read_bytes())
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    if fault == "room":
        monkeypatch.setenv("PISTOSEG_DISK_GB", "1e-9")
    if fault == "rights":

        def deny(uri):
            raise object_store.explain(PermissionError("Access Denied"), uri)

        monkeypatch.setattr(storage, "file_size", deny)
    with pytest.raises(UnavailableError, match=says):
        read(SlideSource("a.tif", uri, windows=(Window(0, 0, 40, 40, (1, 0, 0), 2),)), 0.5)


def test_a_damaged_place_costs_only_the_windows_on_it_and_the_slide_is_opened_again():
    opened = []

    class View:
        width = height = 100
        scale_x = scale_y = 1.0

        def __init__(self):
            self.reader, self.works = self, True

        def read(self, x, y, width, height):
            self.works = self.works and x != 20  # as OpenSlide, which goes on failing after an error
            if not self.works:
                raise PistoSegError("tile 2 cannot be decoded", file="a.svs")
            return np.full((height, width, 3), x, np.uint8)

    @contextmanager
    def opener(uri, mpp):
        opened.append((uri, mpp))
        yield View()

    windows = tuple(Window(10 * i, 0, 10, 10, (1, 0, 0), i + 2) for i in range(5))
    source = SlideSource("a.svs", "s3://b/a.svs", 0.25, windows)
    rows = ingested(source, opener, mpp=0.5)
    assert [row["image"] for row in rows.images] == [0, 1, 3, 4]
    assert [decode_png(row["png"]).mean() for row in rows.images] == [0, 10, 30, 40]
    assert [(item.name, item.reason) for item in rows.rejected] == [
        ("row 4 (a.svs/20-0-10x10)", "a.svs tile 2 cannot be decoded")
    ]
    assert opened == [("s3://b/a.svs", 0.25)] * 2


def test_images_of_a_slide_are_handed_on_as_they_are_read():
    done = []

    class View:
        width = height = 100
        scale_x = scale_y = 1.0

        def __init__(self):
            self.reader = self

        def read(self, x, y, width, height):
            done.append("read")
            return np.zeros((height, width, 3), np.uint8)

    @contextmanager
    def opener(uri, mpp):
        yield View()

    source = SlideSource("a.svs", "a.svs", windows=tuple(Window(10 * i, 0, 10, 10, (1, 0, 0)) for i in range(3)))
    ingest_slide(source, opener, CLASSES, DATA, ScaleConfig(mpp=0.5), lambda row: done.append(row["image"]))
    assert done == ["read", 0, "read", 1, "read", 2]


def test_annotations_begin_where_the_scanned_part_of_a_slide_does(tmp_path):
    class View:
        width, height, bounds = 200, 200, (40, 60, 100, 100)
        scale_x = scale_y = 1.0

        def __init__(self):
            self.reader = self

        def read(self, x, y, width, height):
            return np.zeros((height, width, 3), np.uint8)

    @contextmanager
    def opener(uri, mpp):
        yield View()

    uri = geojson(tmp_path, feature(shapely.box(0, 0, 40, 20), "tumor"), feature(shapely.box(0, 20, 9, 29), "Fold"))
    source = SlideSource("a.mrxs", "a.mrxs", annotations=uri)
    rows = ingested(source, opener, DataConfig(window=20), mpp=0.5)
    assert [row["name"] for row in rows.images] == ["a.mrxs/40-60-20x20", "a.mrxs/60-60-20x20"]
    (note,) = rows.notes
    assert (note.windows, note.unknown) == (2, {"Fold": 1})


def test_annotations_that_cannot_be_read_reject_the_slide_and_are_named(tmp_path):
    slide = write_tiff(tmp_path / "a.tif", texture(64, 64))
    source = SlideSource("a.tif", str(slide), annotations=put(tmp_path, "a.geojson", b"{"))
    (rejection,) = read(source, 0.5).rejected
    assert rejection.name == "a.tif"
    assert f"{tmp_path / 'a.geojson'} is not valid JSON" in rejection.reason


def test_a_slide_finds_its_annotations_however_its_accents_are_written(tmp_path):
    annotations = put(tmp_path, f"qupath/{normalize('NFC', 'Präparat')}.geojson", b"{}")
    put(tmp_path, "qupath/other.geojson", b"{}")
    slide = str(tmp_path / f"{normalize('NFD', 'Präparat')}.svs")
    (source,), _ = _matched([SlideEntry("1", slide)], str(tmp_path / "qupath"))
    assert (source.uri, source.annotations) == (slide, annotations)


@pytest.mark.parametrize("names", [("A/1.svs", "B/1.svs"), ("3.svs", "3.ndpi")])
def test_a_geojson_named_like_two_slides_is_refused_with_both_and_their_ids(tmp_path, names):
    for name in names:
        put(tmp_path, f"slides/{name}")
    file = put(tmp_path, f"qupath/A/{names[0].removeprefix('A/').removesuffix('.svs')}.geojson", b"{}")
    entries = list_slides(str(tmp_path / "slides"))
    with pytest.raises(PistoSegError, match="are both named like it") as caught:
        _matched(entries, str(tmp_path / "qupath"))
    assert caught.value.file == file
    assert all(entry.uri in caught.value.reason for entry in entries)
    assert all(f"{entry.slide_id}.geojson" in caught.value.remedy for entry in entries)
    Path(file).rename(tmp_path / "qupath" / f"{entries[1].slide_id}.geojson")
    (source,), warnings = _matched(entries, str(tmp_path / "qupath"))
    assert source.uri == entries[1].uri
    assert warnings == [f"1 slides have no annotations: {entries[0].slide_id}"]


def test_annotations_named_like_a_slides_id_are_of_no_slide_with_such_a_file(tmp_path):
    folder = put(tmp_path, "qupath/1.geojson", b"{}").removesuffix("/1.geojson")
    entries = [SlideEntry("2", "/s/1.svs"), SlideEntry("1", "/s/x.svs"), SlideEntry("3", "/s/t/1.svs")]
    pairs, _ = _matched(entries, folder)
    assert [source.name for source in pairs] == ["1"]
    put(tmp_path, "qupath/1.svs.geojson", b"{}")
    pairs, _ = _matched(entries[:2], folder)
    assert [(source.name, storage.name(source.annotations)) for source in pairs] == [
        ("2", "1.svs.geojson"),
        ("1", "1.geojson"),
    ]


def test_a_manifest_finds_slides_and_annotations_however_their_accents_are_written(tmp_path):
    slide, annotations = (put(tmp_path, normalize("NFD", f"é/ü.{end}"), b"") for end in ("svs", "geojson"))
    uri = manifest(tmp_path, normalize("NFC", "é/ü.svs,é/ü.geojson"), header="slide,annotations")
    (source,) = scan_slides(uri, CLASSES).slides
    assert (source.name, source.uri, source.annotations) == (normalize("NFC", "é/ü.svs"), slide, annotations)


# --- the data set ------------------------------------------------------------------------------------------------


def test_the_digest_follows_the_manifest_the_slides_and_the_annotations(tmp_path):
    slide = write_tiff(tmp_path / "a.tif", texture(64, 64))
    header = "slide,x,y,width,height,gland,stroma"
    uri = manifest(tmp_path, "a.tif,0,0,32,32,1,0", "b.tif,0,0,32,32,0,1", header=header)

    def digest(**data):
        return training_digest(config_of(uri, **data), etag)

    first = digest()
    assert digest() == digest(window=100) == first
    manifest(tmp_path, "a.tif,0,0,32,32,1,0", "b.tif,0,0,32,32,1,0", header=header)
    second = digest()
    Path(slide).write_bytes(Path(slide).read_bytes() + b" ")
    third = digest()
    write_tiff(tmp_path / "b.tif", texture(64, 64))
    fourth = digest()
    manifest(tmp_path, "a.tif,a.geojson", header="slide,annotations")
    geojson(tmp_path, feature(shapely.box(0, 0, 9, 9), "gland"))
    fifth, sixth = digest(), digest(window=100)
    geojson(tmp_path, feature(shapely.box(0, 0, 99, 9), "gland"))
    assert len({first, second, third, fourth, fifth, sixth, digest()}) == 7


def test_a_manifest_is_training_data_without_validation_images(tmp_path):
    uri = manifest(tmp_path, "a.svs,0,0,9,9,1,0", header="slide,x,y,width,height,gland,stroma")
    assert is_manifest(uri)
    assert not is_manifest(str(tmp_path))
    assert training_folder(config_of(uri)) == uri
    assert validation_folder(config_of(uri)) is None
    put(tmp_path, "val/img/a.png")
    assert validation_folder(config_of(uri, validation=tmp_path / "val")) == str(tmp_path / "val")


def test_a_manifest_is_checked_window_by_window(tmp_path):
    image = texture(200, 200)
    image[:, 100:] = image[:, :100]
    write_tiff(tmp_path / "a.tif", image)
    put(tmp_path, "broken.svs", b"text")
    uri = manifest(
        tmp_path,
        "a.tif,0,0,50,50,1,0,0",
        "a.tif,100,0,50,50,0,1,0",
        "a.tif,0,60,50,50,0,0,1",
        "a.tif,0,60,50,50,0,0,1",
        "a.tif,190,0,50,50,0,0,1",
        "broken.svs,0,0,50,50,1,1,0",
    )
    report = check(
        uri, CLASSES, DataConfig(max_rejected=0.9), workers=2, out=str(tmp_path / "out"), opener=SlideOpener(0.5)
    )
    assert (report.layout, report.images, report.windows) == ("slides", 3, 3)
    assert report.combinations == {"tumor": 1, "stroma": 1, "normal": 1}
    assert report.sizes == {"50x50": 3}
    assert report.duplicates == [["a.tif/0-0-50x50", "a.tif/100-0-50x50"]]
    assert report.conflicts == report.duplicates
    assert {item.name.split(" (")[0].removeprefix("windows.csv ") for item in report.rejected} == {
        "row 5",
        "row 6",
        "row 7",
    }
    assert len(report.pictures) == 3


def test_sheets_name_the_slide_of_a_window_and_the_file_of_an_image(tmp_path, monkeypatch):
    titles = []

    def noted(rows, *args, **kwargs):
        titles.extend(panel.title for row in rows for panel in row)
        return sheet(rows, *args, **kwargs)

    monkeypatch.setattr("pistoseg.patches.check.sheet", noted)
    (tmp_path / "slides").mkdir()
    write_tiff(tmp_path / "slides" / "a.tif", texture(64, 64))
    uri = manifest(tmp_path, "slides/a.tif,4,0,50,50,1,0,0")
    check(uri, CLASSES, DataConfig(), out=str(tmp_path / "out"), opener=SlideOpener(0.5))
    put(tmp_path, "data/training/b[1, 0, 0].png")
    check(str(tmp_path / "data"), CLASSES, DataConfig(), out=str(tmp_path / "out"))
    assert titles == ["a/4-0-50x50", "b[1, 0, 0].png"]


def test_of_a_checked_window_the_pixels_are_not_kept_but_read_again(tmp_path):
    write_tiff(tmp_path / "a.tif", texture(64, 64))
    source = SlideSource("a.tif", str(tmp_path / "a.tif"), 0.5, (Window(0, 0, 50, 40, (1, 0, 0)),))
    (crop,) = crops(source, SlideOpener(0.5), CLASSES, DATA)
    pixels, kept = crop.pixels.copy(), weakref.ref(crop.pixels)
    read = _read_crop(source, crop, SlideOpener(0.5), CLASSES, DATA, None)
    del crop
    assert kept() is None
    assert np.array_equal(read.load(), pixels)


def test_windows_of_annotated_slides_are_written_as_a_manifest(tmp_path):
    config = load_config("glas", overrides=["scale={mpp: 1.0}", "data.window=50"])
    (tmp_path / "slides").mkdir()
    for name in ("a", "b", "c"):
        write_tiff(tmp_path / "slides" / f"{name}.tif", texture(256, 256))
    put(tmp_path, "slides/d.svs", b"text")
    box = shapely.box(0, 0, 220, 110)
    geojson(tmp_path / "qupath", feature(box, "Gland"), feature(box, "Fold"), name="a.geojson")
    geojson(tmp_path / "qupath", feature(box, "stroma"), name="B.TIF.geojson")
    geojson(tmp_path / "qupath", feature(box, "stroma"), name="d.geojson")
    geojson(tmp_path / "qupath", feature(box, "stroma"), name="other.geojson")
    out = str(tmp_path / "windows.parquet")
    report = write_windows(str(tmp_path / "slides"), str(tmp_path / "qupath"), out, config)
    listing = scan_slides(out, config.classes.tissue())
    assert {
        slide.name: [(w.x, w.y, w.width, w.height, w.labels) for w in slide.windows] for slide in listing.slides
    } == {
        "slides/a.tif": [(0, 0, 100, 100, (1, 0)), (100, 0, 100, 100, (1, 0))],
        "slides/b.tif": [(0, 0, 100, 100, (0, 1)), (100, 0, 100, 100, (0, 1))],
    }
    assert report.by_class == report.single_tissue == {"gland": 2, "stroma": 2}
    assert [storage.name(item.name) for item in report.rejected] == ["d.svs"]
    text = "\n".join(report.warnings)
    assert "1 slides have no annotations: c" in text
    assert "1 GeoJSON files belong to no slide: other.geojson" in text
    assert "1 polygons are of 'Fold', which is no class of the config, in 1 slides, e.g. a: left out with what " in text
    assert "they lie on; name them gland or stroma or background in QuPath" in text
    assert report.to_text().endswith("not fit for use as it is")


@pytest.mark.parametrize(
    ("fault", "says"), [("disk", "a.tif cannot be read (Input/output error)"), ("rights", "a.geojson refuses access")]
)
def test_a_slide_that_is_not_given_is_listed_and_the_windows_of_the_others_are_written(
    tmp_path, monkeypatch, fault, says
):
    config = load_config("glas", overrides=["scale={mpp: 1.0}", "data.window=50"])
    for name in ("a", "b"):
        write_tiff(tmp_path / f"{name}.tif", texture(256, 256))
        geojson(tmp_path / "qupath", feature(shapely.box(0, 0, 220, 110), "Gland"), name=f"{name}.geojson")
    if fault == "disk":
        monkeypatch.setattr("pistoseg.slides.reader.open", failing_for(tmp_path / "a.tif", open), raising=False)
    else:
        refused = RefusedError("refuses access", file=str(tmp_path / "qupath/a.geojson"), remedy="check its rights")
        whole = failing_for(tmp_path / "qupath/a.geojson", storage.read_bytes, refused)
        monkeypatch.setattr(storage, "read_bytes", whole)
    out = str(tmp_path / "windows.csv")
    (rejection,) = write_windows(str(tmp_path), str(tmp_path / "qupath"), out, config).rejected
    assert f"{storage.name(rejection.name)} {rejection.reason}" == says
    assert "rights" in rejection.remedy
    assert [slide.name for slide in scan_slides(out, config.classes.tissue()).slides] == ["b.tif"]


def test_a_storage_that_is_away_writes_no_manifest_of_the_slides_that_were_read(tmp_path, monkeypatch):
    config = load_config("glas", overrides=["scale={mpp: 1.0}", "data.window=50"])
    folder = f"memory://{tmp_path.name}"
    for name in ("a", "b"):
        write_tiff(tmp_path / f"{name}.tif", texture(256, 256))
        geojson(folder, feature(shapely.box(0, 0, 220, 110), "Gland"), name=f"{name}.geojson")
    away = UnavailableError("does not answer", file=f"{folder}/b.geojson")
    monkeypatch.setattr(storage, "read_bytes", failing_for(f"{folder}/b.geojson", storage.read_bytes, away))
    with pytest.raises(UnavailableError, match="does not answer"):
        write_windows(str(tmp_path), folder, str(tmp_path / "windows.csv"), config)
    assert not (tmp_path / "windows.csv").exists()


def test_a_class_without_any_window_is_said_and_warnings_are_counted_at_the_end(tmp_path):
    write_tiff(tmp_path / "a.tif", texture(256, 256))
    box = shapely.box(0, 0, 200, 200)
    uri = geojson(tmp_path, feature(box, "gland"), feature(box, "Strom"), name="whatever.geojson")
    config = load_config("glas", overrides=["scale={mpp: 1.0}", "data.window=50"])
    report = write_windows(str(tmp_path / "a.tif"), uri, str(tmp_path / "w.csv"), config)
    (unknown, unseen) = report.warnings
    assert "in 1 slides, e.g. a: left out with what they lie on; did you mean stroma?; " in unknown
    assert unseen == "no window shows stroma: no model could learn it"
    assert report.to_text().endswith("fit for use, 2 warnings")


def test_where_no_window_can_be_cut_the_remedy_is_that_of_the_first_slide_that_failed(tmp_path):
    write_tiff(tmp_path / "a.tif", texture(256, 256))
    uri = put(tmp_path, "whatever.geojson", b"{")
    with pytest.raises(PistoSegError, match="is not valid JSON") as caught:
        write_windows(str(tmp_path / "a.tif"), uri, str(tmp_path / "w.csv"), load_config("glas"))
    assert "File > Export objects as GeoJSON" in caught.value.remedy


def test_annotations_that_give_no_window_are_an_error_that_says_why(tmp_path):
    write_tiff(tmp_path / "a.tif", texture(256, 256))
    uri = geojson(tmp_path, feature(shapely.box(0, 0, 200, 200), "Tumour"), name="whatever.geojson")
    config = load_config("glas")
    with pytest.raises(PistoSegError, match="no window could be cut") as caught:
        write_windows(str(tmp_path / "a.tif"), uri, str(tmp_path / "w.csv"), config)
    assert "'Tumour', which is no class" in str(caught.value)
    with pytest.raises(PistoSegError, match=r"scale.mpp: is not set"):
        write_windows(str(tmp_path / "a.tif"), uri, "w.csv", load_config("wsss4luad"))
    with pytest.raises(PistoSegError, match="named like one of the 1 slides"):
        write_windows(str(tmp_path / "a.tif"), str(tmp_path), "w.csv", config)


def test_the_verbs_write_and_check_a_manifest(tmp_path, capsys):
    write_tiff(tmp_path / "a.tif", texture(256, 256))
    put(tmp_path, "b.svs", b"text")
    whole = feature(shapely.box(0, 0, 256, 256), "gland")
    geojson(tmp_path / "qupath", whole, name="a.geojson")
    scale = ["--preset", "glas", "--set", "scale={mpp: 1.0}"]
    out = str(tmp_path / "windows.csv")
    command = ["data", "windows", "--slides", str(tmp_path), "--annotations", str(tmp_path / "qupath"), "--out", out]
    assert main([*command, *scale, "--size", "32", "--stride", "16"]) == 0
    assert len(scan_slides(out, load_config("glas").classes.tissue()).slides[0].windows) == 49
    assert main(["data", "check", out, *scale]) == 1
    printed = capsys.readouterr().out
    assert "49 images, 49 labelled windows, layout slides" in printed
    assert "PROBLEM: no image shows 'stroma' alone" in printed
    geojson(tmp_path / "qupath", whole, name="b.geojson")
    assert main([*command, *scale, "--size", "32"]) == 1
    assert "b.svs" in capsys.readouterr().out
    assert main([*command, *scale, "--min-share", "0.7"]) == 2
    assert "data.window_min_share" in capsys.readouterr().err
