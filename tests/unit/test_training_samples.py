import numpy as np
import pyarrow as pa
import pytest

from pistoseg import parquet
from pistoseg.classes import IGNORE_ID
from pistoseg.patches.decode import encode_png
from pistoseg.training import samples
from pistoseg.training.samples import MaskedCrops, StoredMosaics, crop_rows, rare_class_weights

SIZE = 16
SHAPES = [(16, 16), (32, 32), (10, 40), (17, 9), (16, 24)]


def shared(shapes=SHAPES, weights=None, seed=0):
    """Images whose red is the image's number, green the row and blue the column; the mask is the row."""
    images, masks = [], []
    for number, (height, width) in enumerate(shapes):
        rows, columns = np.mgrid[:height, :width].astype(np.uint8)
        images.append(encode_png(np.dstack([np.full_like(rows, number), rows, columns])))
        masks.append(encode_png(rows))
    areas = np.array([height * width for height, width in shapes])
    return {
        "images": pa.table({"png": pa.array(images, pa.binary())}),
        "masks": pa.table({"png": pa.array(masks, pa.binary())}),
        "rows": crop_rows(areas, SIZE, weights),
        "patch_size": SIZE,
        "seed": seed,
    }


def same(first, second):
    return np.array_equal(first[0], second[0]) and np.array_equal(first[1], second[1])


def test_every_image_is_used_as_often_as_its_area_holds_a_crop():
    crops = MaskedCrops(shared())
    assert len(crops.rows) == 1 + 4 + 2 + 1 + 2
    for epoch in (0, 1, 7):
        used = [int(crops.sample(epoch, index)[0][0, 0, 0]) for index in range(len(crops.rows))]
        assert np.bincount(used).tolist() == [1, 4, 2, 1, 2]


def test_more_samples_than_crops_go_round_evenly():
    crops = MaskedCrops(shared())
    used = [int(crops.sample(0, index)[0][0, 0, 0]) for index in range(20)]
    assert np.bincount(used).tolist() == [2, 8, 4, 2, 4]
    assert used[:10] != used[10:]


def test_image_and_mask_are_cut_at_the_same_place():
    crops = MaskedCrops(shared())
    for index in range(10):
        image, mask = crops.sample(3, index)
        assert image.shape == (SIZE, SIZE, 3)
        assert mask.shape == (SIZE, SIZE)
        assert image.dtype == mask.dtype == np.uint8
        known = mask != IGNORE_ID
        assert np.array_equal(image[..., 1][known], mask[known])


def test_images_smaller_than_a_crop_are_padded_with_ignored_pixels():
    crops = MaskedCrops(shared([(10, 40), (17, 9)]))
    for index in range(3):
        image, mask = crops.sample(0, index)
        known = mask != IGNORE_ID
        if image[0, 0, 0] == 0:
            assert known[:10].all()
            assert not known[10:].any()
        else:
            assert known[:, :9].all()
            assert not known[:, 9:].any()


def test_samples_depend_on_seed_epoch_and_index_alone():
    first, second = MaskedCrops(shared()), MaskedCrops(shared())
    addresses = [(epoch, index) for epoch in range(3) for index in range(10)]
    forwards = {address: first.sample(*address) for address in addresses}
    backwards = {address: second.sample(*address) for address in reversed(addresses)}
    assert all(same(forwards[address], backwards[address]) for address in addresses)
    other = MaskedCrops(shared(seed=1))
    assert not all(same(forwards[0, index], other.sample(0, index)) for index in range(10))


def test_epochs_differ_in_order_and_places():
    crops = MaskedCrops(shared())
    orders = [[int(crops.sample(epoch, index)[0][0, 0, 0]) for index in range(10)] for epoch in range(4)]
    assert len({tuple(order) for order in orders}) > 1
    places = {tuple(crops.sample(epoch, index)[0][0, 0]) for epoch in range(6) for index in range(10)}
    assert len({place[1:] for place in places if place[0] == 1}) > 10


def test_crops_reach_every_corner():
    crops = MaskedCrops(shared([(18, 18)]))
    corners = {tuple(crops.sample(epoch, 0)[0][0, 0, 1:].tolist()) for epoch in range(200)}
    assert corners == {(row, column) for row in range(3) for column in range(3)}


def test_a_full_cache_still_gives_the_right_pixels(monkeypatch):
    expected = [MaskedCrops(shared()).sample(0, index) for index in range(10)]
    monkeypatch.setattr("pistoseg.training.samples.CACHE_BYTES", 1)
    crops = MaskedCrops(shared())
    for _ in range(2):
        assert all(same(crops.sample(0, index), expected[index]) for index in range(10))
    assert len(crops._cache) == 1


def test_weights_multiply_the_uses_and_carry_fractions_over():
    areas = np.array([SIZE**2] * 4)
    assert crop_rows(areas, SIZE).tolist() == [0, 1, 2, 3]
    assert crop_rows(areas, SIZE, np.array([1.0, 2.0, 1.0, 3.0])).tolist() == [0, 1, 1, 2, 3, 3, 3]
    half = crop_rows(areas, SIZE, np.full(4, 1.5))
    assert len(half) == 6
    assert set(half.tolist()) == {0, 1, 2, 3}


def test_images_with_a_rare_class_weigh_the_square_root_of_its_rarity():
    labels = np.array([[1, 0]] * 8 + [[1, 1]] * 1 + [[0, 1]] * 1, np.uint8)  # 9 and 2 of 10
    weights = rare_class_weights(labels)
    assert weights[:8] == pytest.approx(1.0)
    assert weights[8:] == pytest.approx((9 / 2) ** 0.5)
    assert np.isfinite(rare_class_weights(np.array([[1, 0], [1, 0]], np.uint8))).all()


@pytest.fixture
def stored(tmp_path):
    """Ten 4 px mosaics in parts of 4 and groups of 2: the image shows the number, the mask its rest of 3."""
    for part, start in enumerate(range(0, 10, 4)):
        numbers = range(start, min(start + 4, 10))
        table = pa.table(
            {
                "index": list(numbers),
                "image": [encode_png(np.full((4, 4, 3), 20 + number, np.uint8)) for number in numbers],
                "mask": [encode_png(np.full((4, 4), number % 3, np.uint8)) for number in numbers],
            }
        )
        parquet.write(table, str(tmp_path / f"part-{part:05d}.parquet"), row_group_size=2)
    (tmp_path / "notes.txt").write_text("not a part")
    return {"folder": str(tmp_path), "count": 10, "part_size": 4, "per_epoch": 6, "seed": 5}


def numbers_of(mosaics, places):
    """Numbers of the mosaics at (epoch, index)."""
    return [int(mosaics.sample(epoch, index)[0][0, 0, 0]) - 20 for epoch, index in places]


@pytest.mark.parametrize("together", [2, 4, 32])
def test_stored_mosaics_come_all_before_any_comes_again_in_another_order_each_time(stored, monkeypatch, together):
    monkeypatch.setattr(samples, "MOSAICS_TOGETHER", together)
    mosaics = StoredMosaics(stored)
    places = [(epoch, index) for epoch in range(5) for index in range(6)]
    for place in places:
        image, mask = mosaics.sample(*place)
        assert image.shape == (4, 4, 3)
        assert (mask == (int(image[0, 0, 0]) - 20) % 3).all()
    numbers = numbers_of(mosaics, places)
    turns = [tuple(numbers[start : start + 10]) for start in (0, 10, 20)]
    assert all(sorted(turn) == list(range(10)) for turn in turns)
    assert len({*turns, tuple(range(10))}) == 4
    if together == 2:
        assert all(turn[place] // 2 == turn[place + 1] // 2 for turn in turns for place in range(0, 10, 2))
    others = [StoredMosaics(stored | {"seed": seed}) for seed in (5, 6)]
    assert [numbers_of(other, places) == numbers for other in others] == [True, False]


def test_stored_mosaics_can_be_asked_in_any_order(stored):
    mosaics = StoredMosaics(stored)
    places = [(epoch, index) for epoch in range(3) for index in range(6)]
    expected = dict(zip(places, numbers_of(mosaics, places), strict=True))
    for place in reversed(places):
        assert numbers_of(mosaics, [place]) == [expected[place]]


def test_of_stored_mosaics_no_more_is_read_than_lies_together(stored, monkeypatch):
    monkeypatch.setattr(samples, "MOSAICS_TOGETHER", 2)
    read = []
    around = parquet.read_around
    monkeypatch.setattr(parquet, "read_around", lambda *given: read.append(around(*given)) or read[-1])
    numbers_of(StoredMosaics(stored), [(0, index) for index in range(6)] + [(1, index) for index in range(4)])
    assert [rows.num_rows for _, rows in read] == [2] * 5


def test_pixels_that_a_mask_is_unsure_of_are_ignored():
    given = shared(shapes=[(16, 16)])
    cells = np.array([[255, 100], [128, 0]], np.uint8)
    columns = {"confidence": [cells.tobytes()], "grid_height": [2], "grid_width": [2]}
    for name, values in columns.items():
        given["masks"] = given["masks"].append_column(name, pa.array(values))
    _, everything = MaskedCrops(given).sample(0, 0)
    assert (everything != IGNORE_ID).all()
    _, mask = MaskedCrops(given | {"min_confidence": 0.45}).sample(0, 0)
    assert (mask[:4, :4] == everything[:4, :4]).all()
    assert (mask[:4, 12:] == IGNORE_ID).all(), "100 of 255 is less than 0.45"
    assert (mask[12:, :4] == everything[12:, :4]).all()
    assert (mask[12:, 12:] == IGNORE_ID).all()
