import json

import numpy as np
import pytest
import shapely
from scipy import ndimage

from pistoseg.classes import TissueClass, TissueClasses
from pistoseg.outputs import outlines
from pistoseg.outputs.regions import ToLevel0, write_regions

CLASSES = TissueClasses(tuple(TissueClass(name, (10 * i, 200, 3)) for i, name in enumerate(("tumor", "stroma", "fat"))))
SAME = ToLevel0(1.0, 1.0)


def blobs(height, width, seed=0, scale=9.0, empty=0.2):
    rng = np.random.default_rng(seed)
    noise = [ndimage.gaussian_filter(rng.standard_normal((height, width)), scale) for _ in range(3)]
    mask = np.argmax(noise, axis=0).astype(np.uint8)
    tissue = ndimage.gaussian_filter(rng.standard_normal((height, width)), 3 * scale)
    mask[tissue < np.quantile(tissue, empty)] = CLASSES.background_id
    mask[: height // 10] = 255
    return mask


def read(path):
    """(class name, polygon, properties) of every feature."""
    features = json.loads(path.read_text())["features"]
    return [(f["properties"]["classification"]["name"], shapely.geometry.shape(f["geometry"]), f) for f in features]


def write(path, mask, tolerance=0.0, min_area=0.0, **options):
    options = {"to_level0": SAME, "mpp": 1.0} | options
    report = write_regions(path, mask, CLASSES, tolerance=tolerance, min_area=min_area, **options)
    return report, read(path)


def areas(found):
    return {name: sum(p.area for n, p, _ in found if n == name) for name in CLASSES.names}


@pytest.mark.parametrize("values", [2, 3, 5])
def test_outlines_tile_any_mask_with_valid_polygons(values):
    rng = np.random.default_rng(values)
    for _ in range(60):
        band = rng.integers(0, values, rng.integers(1, 13, 2)).astype(np.uint8)
        regions = outlines.find_regions(band)
        polygons = outlines.trace(band, regions)
        expected = sum(ndimage.label(band == value)[1] for value in range(values))  # 4-connected by default
        assert len(polygons) == expected
        assert shapely.is_valid(polygons).all()
        assert shapely.coverage_is_valid(polygons)
        assert shapely.area(polygons).tolist() == regions.areas.tolist()
        y, x = np.indices(band.shape)
        inside = shapely.contains_xy(polygons[:, None], x.ravel() + 0.5, y.ravel() + 0.5)
        owner = inside.argmax(axis=0)
        assert (inside.sum(axis=0) == 1).all()
        assert (owner == regions.region[regions.at(np.arange(band.size))]).all()


def test_unsimplified_polygons_have_exactly_the_masks_areas_and_holes(tmp_path):
    mask = blobs(200, 260)
    mask[120:130, 100:110] = CLASSES.background_id
    report, found = write(tmp_path / "r.geojson", mask)
    assert areas(found) == {name: np.count_nonzero(mask == i) for i, name in enumerate(CLASSES.names)}
    assert report.area_um2 == areas(found)
    for number, name in enumerate(CLASSES.names):
        padded = np.pad(mask == number, 1)
        polygons = [p for n, p, _ in found if n == name]
        assert len(polygons) == ndimage.label(padded)[1]
        eight = np.ones((3, 3))
        assert sum(len(p.interiors) for p in polygons) == ndimage.label(~padded, eight)[1] - 1
    assert all(p.is_valid for _, p, _ in found)


@pytest.mark.parametrize("tolerance", [1.0, 3.0])
def test_simplified_polygons_keep_areas_within_one_percent_without_slivers_or_overlaps(tmp_path, tolerance):
    mask = blobs(500, 400)
    _, exact = write(tmp_path / "e.geojson", mask)
    report, found = write(tmp_path / "r.geojson", mask, tolerance, band_rows=130)
    for number, name in enumerate(CLASSES.names):
        assert areas(found)[name] == pytest.approx(np.count_nonzero(mask == number), rel=0.01)
    assert all(p.is_valid for _, p, _ in found)
    polygons = [p for _, p, _ in found]
    union = shapely.union_all(polygons)
    assert sum(p.area for p in polygons) == pytest.approx(union.area, rel=1e-9)  # no overlaps
    outside = shapely.union_all([p for _, p, _ in exact])
    assert len(shapely.get_parts(union)) == len(shapely.get_parts(outside))  # no gaps between neighbours either
    assert sum(len(p.interiors) for p in shapely.get_parts(union)) == sum(
        len(p.interiors) for p in shapely.get_parts(outside)
    )
    assert report.vertices < 0.5 * sum(shapely.get_num_coordinates(p) for _, p, _ in exact)
    distance = shapely.hausdorff_distance(union.boundary, outside.boundary)
    assert distance < 4 * tolerance


@pytest.mark.parametrize(
    ("seed", "scale", "taken"), [(24, 3.5, 4.0), (14, 3.5, 2.0), (2, 2.5, 1.0), (0, 1.5, 0.0), (195, 1.5, 4.0)]
)
def test_the_largest_tolerance_that_keeps_areas_is_taken(tmp_path, seed, scale, taken):
    rng = np.random.default_rng(seed)  # with 195, 2.0 and 1.0 would change an area too much, and 4.0 does not
    noise = [ndimage.gaussian_filter(rng.standard_normal((60, 60)), scale) for _ in range(3)]
    mask = np.argmax(noise, 0).astype(np.uint8)
    report, _ = write(tmp_path / "r.geojson", mask, tolerance=4.0)
    polygons = outlines.trace(mask, outlines.find_regions(mask))
    expected = shapely.coverage_simplify(polygons, taken, simplify_boundary=False)
    assert report.vertices == pytest.approx(shapely.get_num_coordinates(expected).sum(), rel=0.02)


@pytest.mark.parametrize("background", [3, 253, 254])
def test_any_value_may_stand_for_background(tmp_path, background):
    mask = blobs(150, 200)
    found, _ = write(tmp_path / "a.geojson", mask, tolerance=2.0)
    classes = TissueClasses(CLASSES.classes, background)
    other = np.where(mask == CLASSES.background_id, background, mask).astype(np.uint8)
    report = write_regions(tmp_path / "b.geojson", other, classes, to_level0=SAME, mpp=1.0, tolerance=2.0, min_area=0.0)
    assert (report.polygons, report.vertices, report.area_um2) == (found.polygons, found.vertices, found.area_um2)


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_the_height_of_bands_changes_nothing(tmp_path, rows):
    mask = blobs(120, 90, seed=3, scale=4.0)
    mask[14:110, 50] = 1  # one px wide, through most bands
    mask[64, 5:80] = 2
    for tolerance, min_area in ((0.0, 0.0), (0.0, 30.0), (2.0, 30.0)):
        whole_report, whole = write(tmp_path / "w.geojson", mask, tolerance, min_area, band_rows=120)
        report, found = write(tmp_path / "b.geojson", mask, tolerance, min_area, band_rows=rows)
        assert report.dropped_um2 == whole_report.dropped_um2
        for name in CLASSES.names:
            one, other = ([p for n, p, _ in features if n == name] for features in (whole, found))
            assert sorted(len(p.interiors) for p in one) == sorted(len(p.interiors) for p in other)
            assert sum(p.area for p in one) == pytest.approx(sum(p.area for p in other), rel=0.01)
            if not tolerance:
                assert shapely.union_all(one).equals(shapely.union_all(other))


def test_small_regions_and_pinholes_go_to_their_neighbours_and_are_accounted_for(tmp_path):
    mask = np.full((60, 60), CLASSES.background_id, np.uint8)
    mask[10:50, 10:50] = 0
    mask[20:22, 20:22] = 1  # a speck
    mask[30, 30] = CLASSES.background_id  # a pinhole
    mask[30:40, 40:48] = CLASSES.background_id  # a hole
    mask[2, 2:5] = 2  # debris
    report, found = write(tmp_path / "r.geojson", mask, min_area=10.0, mpp=0.5, band_rows=21)
    assert [(name, len(p.interiors)) for name, p, _ in found] == [("tumor", 1)]
    assert found[0][1].area == 40 * 40 - 80
    assert report.dropped_um2 == {"tumor": 0.0, "stroma": 1.0, "fat": 0.8, "no tissue": 0.2}
    assert json.loads((tmp_path / "r.geojson").read_text())["pistoseg"]["dropped_um2"] == report.dropped_um2


def specked(side):
    """Tumor with specks of stroma, side x side px each, of which they are 1 % and more."""
    mask = np.zeros((240, 240), np.uint8)
    for y in range(10, 240, 20):
        for x in range(10, 240, 20):
            mask[y : y + side, x : x + side] = 1
    return mask


@pytest.mark.parametrize(("side", "expected"), [(3, 25.0), (5, 25.0), (7, 25.0), (8, 50.0), (10, 100.0)])
@pytest.mark.parametrize("rows", [240, 13])
def test_the_smallest_region_is_chosen_so_that_classes_keep_their_area(tmp_path, side, expected, rows):
    path, mask = tmp_path / "r.geojson", specked(side)
    report, _ = write(path, mask, min_area=(25.0, 12.5, 6.25), mpp=0.5, band_rows=rows)
    assert report.min_area_um2 == expected / 4
    report, _ = write(path, mask, min_area=(100.0, 50.0, 25.0), band_rows=rows)
    assert report.min_area_um2 == expected
    assert report.area_um2["stroma"] == (144 * side**2 if side**2 >= expected else 0)  # the last is taken in any case
    chosen = path.read_text()
    write(path, mask, min_area=expected, band_rows=rows)
    assert path.read_text() == chosen


def test_gaps_that_are_closed_make_no_smaller_regions_objects(tmp_path):
    mask = specked(3)
    mask[mask == 1] = CLASSES.background_id
    assert write(tmp_path / "r.geojson", mask, min_area=(100.0, 50.0, 25.0))[0].min_area_um2 == 100.0


def test_small_regions_are_given_away_where_they_do_not_matter(tmp_path):
    mask = np.zeros((240, 240), np.uint8)
    mask[10:110, 10:110] = 1
    mask[200, 200] = mask[50, 50] = 2
    report, _ = write(tmp_path / "r.geojson", mask, min_area=(100.0, 25.0))
    assert report.min_area_um2 == 100.0  # two px are less than 0.01 % of the tissue
    report, _ = write(tmp_path / "r.geojson", np.zeros((0, 0), np.uint8), min_area=(100.0, 25.0))
    assert report.min_area_um2 == 100.0


def test_features_are_what_qupath_reads_in_level0_px(tmp_path):
    mask = np.full((20, 30), CLASSES.background_id, np.uint8)
    mask[5:15, 10:20] = 1
    _, found = write(tmp_path / "r.geojson", mask, to_level0=ToLevel0(4.02, 4.01, 1000.0, 250.5), mpp=2.0)
    ((_, polygon, feature),) = found
    assert feature["type"] == "Feature"
    assert feature["properties"] == {
        "objectType": "annotation",
        "classification": {"name": "stroma", "color": [10, 200, 3]},
        "measurements": {"area_um2": 400.0},
    }
    assert polygon.bounds == pytest.approx((1040.2, 270.55, 1080.4, 310.65))
    assert polygon.exterior.is_ccw


@pytest.mark.parametrize("value", [3, 255, 0])
def test_masks_of_one_value(tmp_path, value):
    _, found = write(tmp_path / "r.geojson", np.full((40, 50), value, np.uint8), 2.0, 10.0, band_rows=9)
    assert [p.area for _, p, _ in found] == ([2000.0] if value == 0 else [])


def test_an_empty_mask_and_one_px(tmp_path):
    assert write(tmp_path / "r.geojson", np.zeros((0, 0), np.uint8))[1] == []
    assert write(tmp_path / "r.geojson", np.zeros((1, 1), np.uint8))[1][0][1].area == 1.0


def test_a_region_meeting_itself_at_a_corner_is_valid(tmp_path):
    mask = np.full((6, 6), CLASSES.background_id, np.uint8)
    mask[1:5, 1:5] = 0
    mask[2:4, 2:4] = CLASSES.background_id
    mask[1, 1] = mask[4, 4] = CLASSES.background_id
    mask[2, 2] = 0
    mask[1, 2] = CLASSES.background_id
    for rows in (1, 2, 3, 6):
        _, found = write(tmp_path / "r.geojson", mask, band_rows=rows)
        assert all(p.is_valid for _, p, _ in found)
        assert areas(found)["tumor"] == np.count_nonzero(mask == 0)


def test_noise_is_outlined_in_bands_that_fit_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("pistoseg.outputs.bands.BAND_RUNS", 1000)
    mask = np.random.default_rng(0).integers(0, 4, (120, 120)).astype(np.uint8)
    report, found = write(tmp_path / "r.geojson", mask, 1.5)
    assert report.polygons == len(found) == sum(ndimage.label(mask == value)[1] for value in range(3))
    for number, name in enumerate(CLASSES.names):
        assert areas(found)[name] == pytest.approx(np.count_nonzero(mask == number), rel=0.01)
