import numpy as np
import pyarrow as pa
import pytest

from pistoseg.patches.decode import encode_png
from pistoseg.patches.store import IMAGES_SCHEMA, WINDOWS_SCHEMA, PatchSet
from pistoseg.training.labelled import LabelledCrops, labelled_source

SIZE, REGIONS, GRID, CLASSES = 32, 4, 8, 8
LATTICE = [(x, y, 16, 16) for y in range(0, 65, 8) for x in range(0, 81, 8)]
IMAGES = [  # height, width and windows (x, y, width, height)
    (80, 96, LATTICE),
    (24, 60, [(0, 0, 60, 24)]),
    (88, 72, [(4, 8, 60, 72), (30, 30, 8, 8)]),
    (64, 64, [(20, 22, 16, 12)]),
    (12, 8, [(0, 0, 8, 12)]),
    (40, 40, [(0, 0, 20, 20), (10, 5, 20, 20), (3, 26, 9, 14), (31, 26, 9, 14)]),
]


def patch_set(images=IMAGES):
    """Images whose red is their number, green the row and blue the column; a window's flags are its number's bits."""
    rows, windows = [], []
    for number, (height, width, boxes) in enumerate(images):
        y, x = np.mgrid[:height, :width].astype(np.uint8)
        png = encode_png(np.dstack([np.full_like(y, number), y, x]))
        rows.append({"image": 10 * number, "width": width, "height": height, "png": png})
        for box in boxes:
            flags = [len(windows) >> bit & 1 for bit in range(CLASSES)]
            place = dict(zip(("x", "y", "width", "height"), box, strict=True))
            windows.append({"window": len(windows), "image": 10 * number, "labels": flags} | place)
    return PatchSet(pa.Table.from_pylist(rows, IMAGES_SCHEMA), pa.Table.from_pylist(windows, WINDOWS_SCHEMA))


def crops(images=IMAGES, seed=0, regions=REGIONS, **more):
    return LabelledCrops(labelled_source(patch_set(images), SIZE, regions, seed, **more))


def boxes(images=IMAGES):
    """(image number, x, y, width, height) of every window."""
    return [(number, *box) for number, (_, _, windows) in enumerate(images) for box in windows]


def windows_of(labels):
    """Numbers of the windows that a sample's labels belong to."""
    used = [row for row in labels if (row != 255).any()]
    assert (labels[len(used) :] == 255).all()
    return [int(row @ (1 << np.arange(CLASSES))) for row in used]


def same(first, second):
    return all(np.array_equal(*pair) for pair in zip(first, second, strict=True))


def test_regions_are_the_windows_in_the_crop_and_carry_their_labels():
    samples = crops()
    for index in range(3 * len(boxes())):
        image, regions, labels = samples.sample(0, index)
        assert image.shape == (SIZE, SIZE, 3)
        assert regions.shape == (SIZE, SIZE)
        assert labels.shape == (REGIONS, CLASSES)
        assert image.dtype == regions.dtype == labels.dtype == np.uint8
        number, top, left = image[0, 0].tolist()
        rows, columns = np.mgrid[top : top + SIZE, left : left + SIZE]
        expected = np.full((SIZE, SIZE), 255)
        for region, window in enumerate(windows_of(labels)):
            home, x, y, width, height = boxes()[window]
            assert home == number
            inside = (rows >= y) & (rows < y + height) & (columns >= x) & (columns < x + width)
            assert (expected[inside] == 255).all(), "windows overlap"
            if region:
                assert inside.sum() == width * height, "only a part of a further window"
            else:
                assert inside.sum() == min(width, SIZE) * min(height, SIZE)
            expected[inside] = region
        assert np.array_equal(regions, expected)


def test_an_epoch_uses_every_window_once_and_goes_round_again():
    samples, count = crops(), len(boxes())
    assert len(samples) == count
    orders = []
    for epoch in (0, 5):
        used = [windows_of(samples.sample(epoch, index)[2])[0] for index in range(2 * count)]
        assert used == [samples.window(epoch, index) for index in range(2 * count)]
        orders += [used[:count], used[count:]]
    assert all(sorted(order) == list(range(count)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def test_samples_depend_on_seed_epoch_and_index_alone():
    first, second, other = crops(), crops(), crops(seed=1)
    addresses = [(epoch, index) for epoch in range(3) for index in range(40)]
    forwards = {address: first.sample(*address) for address in addresses}
    backwards = {address: second.sample(*address) for address in reversed(addresses)}
    assert all(same(forwards[address], backwards[address]) for address in addresses)
    assert not any(same(forwards[0, index], forwards[1, index]) for index in range(40))
    assert not all(same(forwards[0, index], other.sample(0, index)) for index in range(40))


def test_windows_that_fit_together_are_learned_together():
    images = IMAGES[:1]
    labels = [crops(images).sample(0, index)[2] for index in range(len(LATTICE))]
    counts = [len(windows_of(item)) for item in labels]
    assert np.mean(counts) > 2.8
    assert max(counts) == REGIONS
    few = [crops(images, regions=2).sample(0, index)[2] for index in range(len(LATTICE))]
    assert {len(windows_of(item)) for item in few} <= {1, 2}


def test_further_windows_are_chosen_at_random():
    window = 4 * 11 + 4  # amid the lattice
    samples = crops(IMAGES[:1])
    chosen = set()
    for epoch in range(30):
        used = [windows_of(samples.sample(epoch, index)[2]) for index in range(len(LATTICE))]
        chosen |= set(next(windows for windows in used if windows[0] == window)[1:])
    assert len(chosen) > 12


def test_a_lone_window_lies_anywhere_in_its_crop():
    samples = crops(IMAGES[3:4])
    corners = np.array([samples.sample(epoch, 0)[0][0, 0, 1:] for epoch in range(500)])
    assert np.unique(corners[:, 0]).tolist() == list(range(2, 22 + 1))  # 22 + 12 - 32 to 22
    assert np.unique(corners[:, 1]).tolist() == list(range(4, 20 + 1))


def test_a_crop_of_a_larger_window_lies_inside_of_it():
    samples = crops([(88, 72, [(4, 8, 60, 72)])])
    corners = []
    for epoch in range(600):
        image, regions, _ = samples.sample(epoch, 0)
        assert (regions == 0).all()
        corners.append(image[0, 0, 1:])
    assert np.unique(np.array(corners)[:, 0]).tolist() == list(range(8, 8 + 72 - SIZE + 1))
    assert np.unique(np.array(corners)[:, 1]).tolist() == list(range(4, 4 + 60 - SIZE + 1))


def test_small_images_are_mirrored_and_their_padding_belongs_to_no_window():
    image, regions, labels = crops(IMAGES[4:5]).sample(0, 0)
    y, x = np.mgrid[:12, :8].astype(np.uint8)
    whole = np.dstack([np.zeros_like(y), y, x])
    assert np.array_equal(image, np.pad(whole, ((0, 20), (0, 24), (0, 0)), mode="symmetric"))
    assert (regions[:12, :8] == 0).all()
    assert (regions == 0).sum() == 12 * 8
    assert ((regions == 0) | (regions == 255)).all()
    assert windows_of(labels) == [0]


def test_images_left_out_are_never_seen():
    keep = np.array([False, True, False, True, False, True])
    samples = crops(keep=keep)
    wanted = [window for window, (number, *_) in enumerate(boxes()) if keep[number]]
    drawn = [samples.sample(0, index) for index in range(len(wanted))]
    assert sorted(windows_of(labels)[0] for _, _, labels in drawn) == wanted
    assert {int(image[0, 0, 0]) for image, _, _ in drawn} == {1, 3, 5}


def test_leaving_out_every_image_is_an_error():
    with pytest.raises(ValueError, match="no labelled window"):
        labelled_source(patch_set(), SIZE, REGIONS, 0, keep=np.zeros(len(IMAGES), bool))


def places(cell, channels):
    """Maps of the row and column (px) of every cell's centre; the first channel is the image's number."""
    rows = []
    for number, (height, width, _) in enumerate(IMAGES):
        y, x = (np.mgrid[: height // cell, : width // cell] + 0.5) * cell
        stack = np.stack([np.full_like(y, number), y, x][-channels:]).astype(np.float16)
        rows.append({"grid_height": height // cell, "grid_width": width // cell, "maps": stack.tobytes()})
    return pa.Table.from_pylist(rows)


def test_maps_lie_where_the_image_lies():
    samples = crops(maps=[places(4, 3), places(2, 2)], grid=GRID)
    plain = crops()
    for index in range(3 * len(boxes())):
        image, regions, labels, maps = samples.sample(2, index)
        assert same((image, regions, labels), plain.sample(2, index))
        assert maps.shape == (5, GRID, GRID)
        assert maps.dtype == np.float16
        cells = image.reshape(GRID, SIZE // GRID, GRID, SIZE // GRID, 3).mean(axis=(1, 3), dtype=np.float64)
        number, y, x = np.moveaxis(cells, -1, 0) + np.array([0, 0.5, 0.5])[:, None, None]
        assert np.allclose(maps, np.stack([number, y, x, y, x]), atol=0.06)  # float16 near 100


def test_maps_of_a_coarser_grid_are_interpolated():
    stack = np.array([[[0.0, 1.0], [2.0, 5.0]]], np.float16)  # a 2 x 2 grid over 32 px
    table = pa.table({"grid_height": [2], "grid_width": [2], "maps": [stack.tobytes()]})
    *_, maps = crops([(32, 32, [(0, 0, 32, 32)])], maps=[table], grid=4).sample(0, 0)
    along = np.array([0, 0.25, 0.75, 1])  # cell centres at 4, 12, 20, 28 px; those of the stack at 8 and 24
    y, x = along[:, None], along[None]
    expected = x * (1 - y) + 2 * y + 3 * x * y
    assert np.allclose(maps[0], expected, atol=2e-3)
