import json

import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image

from pistoseg.classes import TissueClass, TissueClasses
from pistoseg.errors import PistoSegError
from pistoseg.outputs.areas import count_classes, slide_areas
from pistoseg.outputs.mask_pyramid import majority, read_mask, write_mask
from pistoseg.outputs.overview import downsample_mask

CLASSES = TissueClasses((TissueClass("tumor", (200, 30, 30)), TissueClass("Stroma", (0, 150, 110))))


@pytest.fixture(scope="module")
def mask():
    rng = np.random.default_rng(0)
    mask = np.repeat(np.repeat(rng.integers(0, 3, (70, 41)), 9, 0), 13, 1).astype(np.uint8)[:-1, :-2]
    mask[:60] = 255
    return mask


@pytest.fixture(scope="module")
def pyramid(mask, tmp_path_factory):
    path = tmp_path_factory.mktemp("mask") / "mask.tif"
    write_mask(path, mask, CLASSES, 0.503, tile=128)
    assert [item.name for item in path.parent.iterdir()] == ["mask.tif"]
    return path


def test_openslide_sees_all_levels_in_the_classes_colours_at_the_right_mpp(mask, pyramid):
    slide = openslide.OpenSlide(pyramid)
    assert slide.level_count == 4
    assert slide.dimensions == mask.shape[::-1]
    assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.503, rel=1e-6)
    assert float(slide.properties["openslide.mpp-y"]) == pytest.approx(0.503, rel=1e-6)
    assert slide.level_downsamples == pytest.approx((1, 2, 4, 8), rel=0.02)
    level = mask
    for number, size in enumerate(slide.level_dimensions):
        seen = np.asarray(slide.read_region((0, 0), number, size).convert("RGB"))
        assert np.array_equal(seen, CLASSES.palette()[level])
        level = majority(level)


def test_tifffile_and_pillow_read_class_ids(mask, pyramid):
    with tifffile.TiffFile(pyramid) as file:
        assert np.array_equal(file.asarray(), mask)
        assert all(page.is_tiled and page.compression == tifffile.COMPRESSION.ADOBE_DEFLATE for page in file.pages)
        assert [page.subfiletype for page in file.pages] == [0, 1, 1, 1]
        assert file.pages[2].get_resolution("MICROMETER")[0] == pytest.approx(1 / (4 * 0.503), rel=1e-6)
        described = json.loads(file.pages[0].description)
    with Image.open(pyramid) as picture:
        assert picture.mode == "P"
        assert np.array_equal(np.asarray(picture), mask)
    assert described["classes"][1] == {"id": 1, "name": "Stroma", "color": [0, 150, 110]}
    assert (described["no_tissue"], described["not_looked_at"], described["mpp"]) == (2, 255, 0.503)


def test_levels_show_the_most_frequent_class():
    quads = np.array([[0, 0, 1, 2], [0, 1, 2, 2], [0, 1, 0, 1], [2, 1, 2, 3]], np.uint8)
    assert majority(quads).tolist() == [[0, 2], [1, 0]]
    rng = np.random.default_rng(1)
    mask = rng.integers(0, 5, (31, 44)).astype(np.uint8)
    padded = np.pad(mask, ((0, 1), (0, 0)), mode="edge")
    for y, x in np.ndindex(16, 22):
        four = padded[2 * y : 2 * y + 2, 2 * x : 2 * x + 2].ravel()
        most = np.bincount(four, minlength=5)
        assert most[majority(mask)[y, x]] == most.max()


def test_a_mask_smaller_than_a_tile_has_one_level(tmp_path):
    small = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert write_mask(tmp_path / "m.tif", small, CLASSES, 1.0) == [(3, 4)]
    assert np.array_equal(tifffile.imread(tmp_path / "m.tif"), small)
    assert openslide.OpenSlide(tmp_path / "m.tif").level_count == 1


def test_a_mask_is_read_as_it_was_written_without_tiles_that_were_not_looked_at(mask, tmp_path):
    mask = mask.copy()
    mask[:, :200] = 255
    write_mask(tmp_path / "mask.tif", mask, CLASSES, 0.5, tile=128)
    found = np.full_like(mask, 255)
    corners = set()
    for y, x, ids in read_mask(tmp_path / "mask.tif", mask.shape):
        found[y : y + len(ids), x : x + ids.shape[1]] = ids
        corners.add((y, x))
    np.testing.assert_array_equal(found, mask)
    assert not {x for _, x in corners} & {0}
    assert {x for _, x in corners} >= {128, 512}


def test_what_is_no_such_mask_or_damaged_is_not_read(mask, pyramid, tmp_path):
    other, cut, plain = (tmp_path / name for name in ("a.tif", "b.tif", "c.tif"))
    tifffile.imwrite(other, mask)
    cut.write_bytes(pyramid.read_bytes()[: pyramid.stat().st_size // 4])
    plain.write_bytes(b"mask")
    for path in (other, cut, plain):
        with pytest.raises(PistoSegError, match=f"{path}: (is another mask|can't be read)"):
            list(read_mask(path, mask.shape))
    with pytest.raises(PistoSegError, match="another mask"):
        list(read_mask(pyramid, (mask.shape[0], mask.shape[1] + 1)))


def test_large_masks_are_bigtiffs(tmp_path, monkeypatch, mask):
    monkeypatch.setattr("pistoseg.outputs.mask_pyramid.BIGTIFF_BYTES", 1000)
    write_mask(tmp_path / "m.tif", mask, CLASSES, 1.0)
    with tifffile.TiffFile(tmp_path / "m.tif") as file:
        assert file.is_bigtiff
    assert openslide.OpenSlide(tmp_path / "m.tif").dimensions == mask.shape[::-1]


def test_a_smaller_mask_shows_the_middle_of_each_square():
    mask = np.random.default_rng(0).integers(0, 9, (95, 61)).astype(np.uint8)
    small = downsample_mask(mask, 10)
    assert small.shape == (10, 7)
    assert np.array_equal(small[:9, :6], mask[5::10, 5::10][:9, :6])
    assert np.array_equal(downsample_mask(mask, 1), mask)
    assert downsample_mask(mask, 2.5).shape == (38, 25)


def test_counts_equal_numpys(mask):
    assert count_classes(mask).tolist() == np.bincount(mask.ravel(), minlength=256).tolist()
    assert count_classes(np.zeros((0, 5), np.uint8)).sum() == 0


def test_areas_of_a_slide():
    counts = np.zeros(256, np.int64)
    counts[[0, 1, 2, 255]] = 3_000_000, 1_000_000, 500_000, 2_000_000
    areas = slide_areas(counts, 2.0, CLASSES)
    assert areas["tissue_mm2"] == 16.0
    assert areas["tissue_um2"] == 16e6
    assert areas["classes"]["tumor"] == {"pixels": 3_000_000, "um2": 12e6, "mm2": 12.0, "share": 0.75}
    assert (areas["no_tissue_mm2"], areas["not_looked_at_mm2"]) == (2.0, 8.0)
    assert areas["tumor_stroma_ratio"] == 0.25
    assert "tumor: tumor; stroma: Stroma" in areas["tumor_stroma_ratio_definition"]


@pytest.mark.parametrize(
    ("names", "ratio"),
    [
        (("Tumour", "STROMA", "other"), 0.6),
        (("Tumor epithelial tissue", "Tumor-associated stroma", "Normal tissue"), 0.6),
        (("Normal", "stroma", "tumor-infiltrating lymphocytes"), None),
        (("tumor", "non-tumor", "gland"), None),
    ],
)
def test_the_ratio_needs_classes_of_tumor_and_stroma(names, ratio):
    counts = np.zeros(256, np.int64)
    counts[:3] = 40, 60, 1000
    classes = TissueClasses(tuple(TissueClass(name, (0, 0, 0)) for name in names))
    assert slide_areas(counts, 1.0, classes)["tumor_stroma_ratio"] == ratio


def test_a_slide_without_tissue_has_areas_of_zero():
    areas = slide_areas(np.zeros(256, np.int64), 0.5, CLASSES)
    assert areas["tissue_mm2"] == 0
    assert areas["classes"]["tumor"]["share"] == 0
    assert areas["tumor_stroma_ratio"] is None
