import csv
import io
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pistoseg.classes import TissueClass, TissueClasses
from pistoseg.outputs import pictures
from pistoseg.outputs.areas import slide_areas
from pistoseg.outputs.overview import LEGEND, MARGIN, round_length, write_overview
from pistoseg.outputs.pictures import Panel, sheet
from pistoseg.outputs.summary import MAX_ROWS, SlideRow, sheet_of_overviews, write_summary

CLASSES = TissueClasses((TissueClass("tumor", (200, 30, 30)), TissueClass("stroma", (0, 150, 110))))


def areas(tumor, stroma):
    counts = np.zeros(256, np.int64)
    counts[:2] = tumor * 1_000_000, stroma * 1_000_000
    return slide_areas(counts, 1.0, CLASSES)


ROWS = [
    SlideRow("b", "s3://x/b.svs", "completed", seconds=3.5, mpp=0.25, width=9, height=8, tiles=4, areas=areas(3, 1)),
    SlideRow("a", "s3://x/a.svs", "failed", 'is no slide | text, "really"', attempts=2),
    SlideRow("c", "s3://x/c.svs", "completed", "has no tissue", areas=areas(0, 0)),
    SlideRow("d", "s3://x/d.svs", "skipped", areas=areas(1, 3)),
]


def test_the_summary_in_all_its_files(tmp_path):
    record = write_summary(str(tmp_path), ROWS, CLASSES, {"arguments": {"model": "m"}})
    table = pq.read_table(tmp_path / "summary.parquet").to_pylist()
    assert [(row["slide_id"], row["status"]) for row in table] == [
        ("a", "failed"),
        ("b", "completed"),
        ("c", "completed"),
        ("d", "skipped"),
    ]
    assert (table[1]["tumor_mm2"], table[1]["tumor_share"], table[1]["tumor_stroma_ratio"]) == (3.0, 0.75, 0.25)
    assert table[0]["tissue_mm2"] is None
    text = (tmp_path / "summary.csv").read_text("utf-8-sig")
    assert next(row["reason"] for row in csv.DictReader(io.StringIO(text))) == ROWS[1].reason
    assert json.loads((tmp_path / "run.json").read_text()) == record
    assert record["slides"] == {"completed": 2, "failed": 1, "skipped": 1}
    assert record["arguments"] == {"model": "m"}
    assert "torch" in record["versions"]
    assert record["cohort"]["tissue_mm2"] == 8.0
    assert record["cohort"]["classes"]["tumor"] == {"mm2": 4.0, "share": 0.5, "median_share": 0.5, "slides": 2}


def test_a_class_called_tissue_leaves_the_area_of_all_classes_in_its_column(tmp_path):
    classes = TissueClasses((TissueClass("tissue", (200, 30, 30)), TissueClass("fat", (0, 150, 110))))
    counts = np.zeros(256, np.int64)
    counts[:2] = 3_000_000, 1_000_000
    row = SlideRow("a", "a.svs", "completed", areas=slide_areas(counts, 1.0, classes))
    write_summary(str(tmp_path), [row], classes, {})
    (found,) = pq.read_table(tmp_path / "summary.parquet").to_pylist()
    names = ("tissue_mm2", "class_tissue_mm2", "fat_mm2", "tissue_share", "fat_share")
    assert [found[name] for name in names] == [4.0, 3.0, 1.0, 0.75, 0.25]


def test_the_readable_summary_names_failures_first(tmp_path):
    write_summary(str(tmp_path), ROWS, CLASSES, {})
    text = (tmp_path / "summary.md").read_text()
    assert "2 completed, 1 failed, 1 already done" in text
    assert text.index("## Failed") < text.index("is no slide \\| text") < text.index("## Slides") < text.index("| b ")
    assert "has no tissue" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in lines[-4:]}) == 1


def test_a_table_of_the_readable_summary_lists_no_more_slides_than_can_be_read(tmp_path):
    failed = [SlideRow(f"slide {number:03d}", "a.svs", "failed", "is no slide") for number in range(MAX_ROWS + 7)]
    areas = slide_areas(np.ones(256, np.int64), 1.0, CLASSES)
    done = [SlideRow(f"done {number:03d}", "a.svs", "completed", areas=areas) for number in range(MAX_ROWS + 3)]
    write_summary(str(tmp_path), failed + done, CLASSES, {})
    text = (tmp_path / "summary.md").read_text()
    assert (text.count("| slide 0"), text.count("| slide 5"), text.count("is no slide")) == (100, 0, MAX_ROWS)
    assert text.count("| done ") == MAX_ROWS
    assert text.index("7 more slides") < text.index("## Slides") < text.index("3 more slides")


def test_a_run_without_slides_or_areas_is_summarised(tmp_path):
    assert write_summary(str(tmp_path), [], CLASSES, {})["cohort"]["classes"]["tumor"]["mm2"] == 0
    record = write_summary(str(tmp_path), [ROWS[1]], CLASSES, {})
    assert record["slides"]["failed"] == 1
    assert pq.read_table(tmp_path / "summary.parquet").schema.field("tumor_mm2").type == "double"


@pytest.mark.parametrize("shape", [(300, 200), (90, 400), (60, 30)])
def test_an_overview_shows_the_slide_and_the_map_in_the_classes_colours(tmp_path, shape):
    thumbnail = np.full((*shape, 3), 240, np.uint8)
    mask = np.full(shape, CLASSES.background_id, np.uint8)
    mask[shape[0] // 4 : shape[0] // 2] = 0
    mask[shape[0] // 2 : -1] = 1
    write_overview(
        tmp_path / "o.png", thumbnail, mask, CLASSES, areas(3, 1), 8.0, title="Präparat " * 30, note="a note"
    )
    with Image.open(tmp_path / "o.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))[:, : -LEGEND - MARGIN].reshape(-1, 3)
    fills = [(240 * 0.55 + np.array(tissue.color) * 0.45).round() for tissue in CLASSES.classes]
    for color in ((240, 240, 240), *fills, (200, 30, 30), (0, 150, 110)):
        assert (np.abs(pixels - np.array(color)).max(axis=1) <= 1).sum() > 100


@pytest.mark.parametrize(
    ("longest", "length", "label"),
    [(1999, 1000, "1 mm"), (2000, 2000, "2 mm"), (740, 500, "0.5 mm"), (9, 5, "0.005 mm")],
)
def test_scale_bars_have_round_lengths(longest, length, label):
    assert round_length(longest) == (length, label)


@pytest.mark.parametrize(
    ("count", "name", "lines"), [(4, "class", 1), (30, "class", 5), (4, "a rather long name" * 5, 2)]
)
def test_the_legend_of_a_sheet_names_every_class_within_the_picture(count, name, lines):
    classes = TissueClasses(tuple(TissueClass(f"{name} {k}", (200, 0, 8 * k)) for k in range(count)))
    pixels = sheet([[Panel("a", np.zeros((224, 224, 3), np.uint8))]], classes)
    assert pixels.shape == (16 + 8 + 224 + 16 * lines + 3 * 8, 2 * (224 + 2 * 8), 3)
    squares = [(pixels == tissue.color).all(2).sum() for tissue in classes.classes]
    assert squares == [11 * 11] * count


def test_a_sheet_colours_no_more_of_a_large_image_than_it_shows(monkeypatch):
    coloured, colour = [], pictures.overlay

    def overlay(image, mask, classes):
        coloured.append((image.shape, mask.shape))
        return colour(image, mask, classes)

    monkeypatch.setattr(pictures, "overlay", overlay)
    image, mask = np.full((3000, 1500, 3), 200, np.uint8), np.zeros((3000, 1500), np.uint8)
    image[1500:], mask[1500:] = 20, 1
    large, small = (sheet([[Panel("a", image[::k, ::k], mask[::k, ::k])]], CLASSES) for k in (1, 30))
    assert coloured == [((896, 448, 3), (896, 448)), ((100, 50, 3), (100, 50))]
    assert large.shape == small.shape
    np.testing.assert_array_equal(large[30:130], small[30:130])  # both halves, away from the line between them
    np.testing.assert_array_equal(large[145:240], small[145:240])


def test_overviews_share_a_sheet():
    colors = [(i * 8, 0, 0) for i in range(30)]
    overviews = [np.full((500, 1000, 3), color, np.uint8) for color in colors]
    with Image.open(io.BytesIO(sheet_of_overviews(overviews))) as sheet:
        assert sheet.size == (1280, 12 * 320)
        assert len(sheet.getcolors(10000)) == 24
    with Image.open(io.BytesIO(sheet_of_overviews(overviews[3:4]))) as sheet:
        assert sheet.getpixel((5, 5)) == colors[3]
