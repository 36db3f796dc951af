import math
import struct

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from patch_files import CLASSES, encoded, png_file, put, tissue
from PIL import Image

from pistoseg import parquet, storage
from pistoseg.classes import TissueClass, TissueClasses
from pistoseg.config import DataConfig, ScaleConfig
from pistoseg.errors import PistoSegError
from pistoseg.patches.background import background_mask
from pistoseg.patches.decode import decode_ids, decode_mask, decode_png, encode_mask, encode_png, pixel_hash
from pistoseg.patches.source import SlideSource, SourceImage, Window, count_unread
from pistoseg.patches.store import IMAGES_SCHEMA, WINDOWS_SCHEMA, PatchSet, image_row, ingest, window_row


def source(uri, *windows, name="x.png"):
    return SourceImage(name, uri, windows, index=5, first_window=70)


def read(uri, *windows, **scale):
    return ingest(source(uri, *windows), DataConfig(min_size=1), ScaleConfig(**scale))


def patch_set(root, images, windows):
    parquet.write(pa.Table.from_pylist(images, IMAGES_SCHEMA), storage.join(root, "images", "part-0.parquet"))
    parquet.write(pa.Table.from_pylist(windows, WINDOWS_SCHEMA), storage.join(root, "windows", "part-0.parquet"))
    return PatchSet.open(root)


def numbered(count):
    """Rows of as many images and their windows; the first two classes take turns, every third image has both."""
    images = [image_row(i, f"{i}.png", np.full((4, 5, 3), i, np.uint8), ScaleConfig()) for i in range(count)]
    flags = [[1, 1, 0] if i % 3 == 2 else [int(i % 2 == 0), int(i % 2), 0] for i in range(count)]
    return images, [window_row(10 + i, i, (1, 0, 4, 4), flags[i]) for i in range(count)]


def test_images_are_those_that_were_held_and_only_the_wanted_ones_are_read(tmp_path):
    images, windows = numbered(20)
    for part, start in (("part-0", 0), ("part-1", 7), ("part-2", 7), ("part-3", 16)):  # part-1 is empty
        rows = images[start : {"part-0": 7, "part-1": 7, "part-2": 16, "part-3": 20}[part]]
        table = pa.Table.from_pylist(rows, IMAGES_SCHEMA)
        parquet.write(table, str(tmp_path / "images" / f"{part}.parquet"), row_group_size=4)
    parquet.write(pa.Table.from_pylist(windows, WINDOWS_SCHEMA), str(tmp_path / "windows" / "part-0.parquet"))
    held, found = PatchSet.open(str(tmp_path), hold=True), PatchSet.open(str(tmp_path))
    assert found.table.column_names == [name for name in IMAGES_SCHEMA.names if name != "png"]
    assert np.array_equal(found.allowed(0), held.allowed(0))
    for wanted in (range(20), [19, 0, 7, 6, 6, 16], [11], []):
        for position, one, other in zip(wanted, held.images(wanted), found.images(wanted), strict=True):
            assert (one == position).all()
            assert np.array_equal(one, other)
    both = [list(item.single_tissue()) for item in (held, found)]
    assert [(int(pixels[0, 0, 0]), tissue) for pixels, tissue in both[0]] == [
        (i, i % 2) for i in range(20) if i % 3 != 2
    ]
    for (one, first), (other, second) in zip(*both, strict=True):
        assert first == second
        assert np.array_equal(one, other)

    (tmp_path / "images" / "part-0.parquet").unlink()
    damaged = tmp_path / "images" / "part-2.parquet"
    pixels = pq.read_metadata(damaged).row_group(0).column(IMAGES_SCHEMA.get_field_index("png"))
    with damaged.open("r+b") as file:
        file.seek(pixels.data_page_offset)
        file.write(bytes(100))
    assert [image[0, 0, 0] for image in found.images([11, 15, 16])] == [11, 15, 16]
    with pytest.raises(OSError, match="part-0"):
        found.image(6)
    with pytest.raises((OSError, pa.ArrowInvalid)):
        found.image(7)


def packed(ids, bits):
    """Rows of (H, W) values below 2**bits as bytes, the first pixel in the highest bits; W * bits fills bytes."""
    return np.packbits(np.unpackbits(ids[..., None], axis=2)[..., -bits:].reshape(len(ids), -1), axis=1)


def grey_png(ids, bits):
    """A grey PNG of 1, 2, 4 or 8 bits, which Pillow does not write."""
    rows = packed(ids, bits)
    return png_file(ids.shape[1], ids.shape[0], bits, 0, b"".join(b"\0" + row.tobytes() for row in rows))


def grey_tiff(ids, bits):
    """A grey TIFF of one strip."""
    pixels = packed(ids, bits).tobytes()
    tags = {256: ids.shape[1], 257: len(ids), 258: bits, 259: 1, 262: 1, 273: 0, 277: 1, 278: len(ids)}
    tags |= {273: 8 + 2 + 12 * (len(tags) + 1) + 4, 279: len(pixels)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + pixels


def test_an_image_at_its_own_scale_is_kept_to_the_pixel(tmp_path):
    image, windows, rejected = read(put(tmp_path, "x.png", seed=3), Window.whole((1, 0, 0)))
    assert np.array_equal(decode_png(image["png"]), tissue(3))
    assert image["sha256"] == pixel_hash(tissue(3))
    assert (image["image"], image["width"], image["height"]) == (5, 40, 32)
    assert math.isnan(image["mpp"])
    assert windows == [{"window": 70, "image": 5, "x": 0, "y": 0, "width": 40, "height": 32, "labels": [1, 0, 0]}]
    assert rejected == []


@pytest.mark.parametrize("factor", [0.1, 0.37, 1.9])
def test_windows_are_scaled_with_their_image_and_stay_inside_it(tmp_path, factor):
    places = [Window(x, y, 3, 3, (1, 0, 0)) for x in (0, 20, 37) for y in (0, 29)]
    image, windows, _ = read(put(tmp_path, "x.png"), *places, resize=factor)
    assert (image["height"], image["width"]) == (round(32 * factor), round(40 * factor))
    for window in windows:
        assert window["width"] >= 1
        assert window["height"] >= 1
        assert window["x"] + window["width"] <= image["width"]
        assert window["y"] + window["height"] <= image["height"]


def test_neighbouring_windows_neither_overlap_nor_gap_after_scaling(tmp_path):
    places = [Window(x, 0, 8, 32, (1, 0, 0)) for x in range(0, 40, 8)]
    image, windows, _ = read(put(tmp_path, "x.png"), *places, resize=0.73)
    ends = [window["x"] + window["width"] for window in windows]
    assert [window["x"] for window in windows[1:]] == ends[:-1]
    assert ends[-1] == image["width"]


def test_fit_brings_every_image_to_one_size(tmp_path):
    image, windows, _ = read(put(tmp_path, "x.png"), Window.whole((1, 0, 0)), fit=24)
    assert (image["height"], image["width"]) == (24, 24)
    assert (windows[0]["height"], windows[0]["width"]) == (24, 24)


def test_mpp_gives_the_factor(tmp_path):
    image, _, _ = read(put(tmp_path, "x.png"), Window.whole((1, 0, 0)), mpp=0.5, source_mpp=0.25)
    assert (image["width"], image["mpp"]) == (20, 0.5)


def test_a_window_outside_its_image_is_rejected_and_no_other_window_changes_its_id(tmp_path):
    inside = Window(0, 0, 20, 20, (1, 0, 0), row=2)
    outside = Window(30, 0, 20, 20, (1, 0, 0), row=3)
    _, windows, rejected = read(put(tmp_path, "x.png"), outside, inside)
    assert [window["window"] for window in windows] == [71]
    assert "row 3" in rejected[0].name
    assert "40x32" in rejected[0].reason


def test_an_image_that_grows_beyond_the_limit_is_rejected(tmp_path):
    uri = put(tmp_path, "x.png")
    image, _, rejected = ingest(
        source(uri, Window.whole((1, 0, 0))), DataConfig(max_pixels=2000), ScaleConfig(resize=16)
    )
    assert image is None
    assert "640x512" in rejected[0].reason


def test_pixels_may_be_what_all_windows_over_them_allow(tmp_path):
    root = str(tmp_path)
    places = [
        Window(0, 0, 20, 32, (1, 1, 0)),
        Window(10, 0, 20, 32, (0, 1, 1)),
        Window(0, 0, 4, 4, (0, 0, 1)),
    ]
    image, windows, _ = read(put(root, "x.png"), *places)
    allowed = patch_set(root, [image], windows).allowed(0)
    assert allowed.shape == (3, 32, 40)
    assert allowed[:, 10, 5].tolist() == [True, True, False]
    assert allowed[:, 10, 15].tolist() == [False, True, False]
    assert allowed[:, 0, 0].tolist() == [True, True, True], "labels that contradict each other: any of them"
    assert not allowed[:, 10, 35].any(), "no window: nothing is known"


def test_single_tissue_windows_come_with_their_pixels_and_class(tmp_path):
    root = str(tmp_path)
    places = [Window(0, 0, 16, 16, (0, 1, 0)), Window(16, 0, 16, 16, (1, 1, 0)), Window(0, 16, 8, 16, (0, 0, 1))]
    image, windows, _ = read(put(root, "x.png"), *places)
    found = list(patch_set(root, [image], windows).single_tissue())
    assert [label for _, label in found] == [1, 2]
    assert np.array_equal(found[0][0], tissue()[:16, :16])
    assert np.array_equal(found[1][0], tissue()[16:, :8])


def test_an_artifact_without_images_says_that_all_were_rejected(tmp_path):
    with pytest.raises(PistoSegError, match="every training image was rejected"):
        patch_set(str(tmp_path), [], [])


def test_masks_survive_encoding_in_the_colours_of_their_classes():
    mask = np.array([[0, 1, 2], [3, 255, 0]], np.uint8)
    data = encode_mask(mask, CLASSES)
    assert np.array_equal(decode_mask(data, "m.png", CLASSES), mask)
    assert np.array_equal(decode_ids(data), mask)


def test_masks_in_the_colours_of_the_classes_are_read():
    colors = np.array([[(0, 64, 128), (243, 152, 0)], [(255, 255, 255), (64, 128, 0)]], np.uint8)
    assert decode_mask(encoded(colors), "m.png", CLASSES).tolist() == [[0, 2], [3, 1]]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("write", [grey_png, grey_tiff])
def test_the_ids_of_a_grey_mask_are_read_whatever_its_depth(write, bits):
    ids = np.arange(16, dtype=np.uint8).reshape(2, 8) % min(2**bits, 4)
    assert np.array_equal(decode_mask(write(ids, bits), "m", CLASSES), ids)


def test_a_value_that_is_no_class_is_named_as_the_file_has_it():
    with pytest.raises(PistoSegError, match="has the values 15,"):
        decode_mask(grey_png(np.full((2, 8), 15, np.uint8), 4), "m", CLASSES)


def test_the_same_pixels_give_the_same_bytes():
    assert encode_png(tissue(1)) == encode_png(tissue(1).copy())
    assert pixel_hash(tissue(1)) != pixel_hash(tissue(1).reshape(40, 32, 3))


def test_background_is_bright_and_larger_than_a_speck():
    image = np.full((60, 60, 3), 120, np.uint8)
    image[:20, :20] = 240
    image[5, 5] = 0
    image[40:45, 40:45] = 240
    mask = background_mask(image, grey=200, min_area=50)
    assert mask[0, 0]
    assert not mask[5, 5], "a dark speck in the background is tissue"
    assert not mask[42, 42], "25 px are a gap in the tissue"
    assert mask.sum() == 399
    assert background_mask(image, grey=200, min_area=0).sum() == 399 + 25
    assert not background_mask(np.zeros((8, 8, 3), np.uint8)).any()


def test_what_can_not_be_read_at_all_is_counted_by_its_name(tmp_path):
    window, box = Window.whole((1, 0, 0)), Window(0, 0, 50, 50, (1, 0, 0), row=2)
    broken = put(tmp_path, "x.png", b"text")
    _, _, rejected = read(broken, window)
    _, _, outside = ingest(source(put(tmp_path, "y.png"), box, window, name="y.png"), DataConfig(), ScaleConfig())
    names = [rejection.name for rejection in rejected + outside]
    found = [source(broken, window), source("", box, name="y.png"), SlideSource("a.svs", "")]
    assert count_unread(found, names) == 1
    assert count_unread(found, [*names, "a.svs"]) == 2
    assert count_unread(found, ["windows.csv row 2 (a.svs)"]) == 0


VOC = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128)]


def palette_mask(ids, colors):
    image = Image.fromarray(ids, mode="P")
    image.putpalette([value for color in colors for value in color])
    return image


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("method", [Image.Quantize.MEDIANCUT, Image.Quantize.MAXCOVERAGE, Image.Quantize.FASTOCTREE])
@pytest.mark.parametrize("shown", [(0, 1, 2, 3), (2, 0), (3,)])
def test_a_palette_of_the_classes_colours_in_any_order_is_read_by_its_colours(kind, method, shown):
    ids = np.resize(np.array(shown, np.uint8), (16, 12))
    quantized = Image.fromarray(CLASSES.palette()[ids]).quantize(method=method)
    assert quantized.mode == "P"
    assert np.array_equal(decode_mask(encoded(quantized, kind), "m", CLASSES), ids)


def test_what_is_unknown_stays_so_in_a_palette_of_the_classes_colours():
    colors = CLASSES.palette()[[3, 0, 1, 2]].tolist() + [[255, 255, 255]] * 252
    ids = np.array([[0, 1, 2, 3, 255]], np.uint8)
    assert decode_mask(encoded(palette_mask(ids, colors)), "m", CLASSES).tolist() == [[3, 0, 1, 2, 255]]


@pytest.mark.parametrize("shown", [(0, 1, 2, 3, 255), (1, 2), (0,), (1,), (255,)])
@pytest.mark.parametrize(
    "colors", [VOC, [(value,) * 3 for value in range(256)], CLASSES.palette().tolist(), [(0, 0, 0)] * 256]
)
def test_palettes_that_mean_nothing_leave_ids_as_they_are_whichever_of_them_a_mask_shows(shown, colors):
    names = [TissueClass("tumor", (128, 0, 0)), TissueClass("stroma", (0, 128, 0)), TissueClass("normal", (1, 2, 3))]
    ids = np.resize(np.array(shown, np.uint8), (4, 5))
    padded = [*colors, *[(255, 255, 255)] * (256 - len(colors))]
    for classes in (CLASSES, TissueClasses(tuple(names), background_color=(0, 0, 0))):
        assert np.array_equal(decode_mask(encoded(palette_mask(ids, padded)), "m", classes), ids)


def test_black_alone_is_no_palette_but_the_backgrounds_other_colour_is():
    on_black, on_white = (TissueClasses(CLASSES.classes, background_color=(value,) * 3) for value in (0, 255))
    zeros = np.zeros((4, 5), np.uint8)
    assert (decode_mask(encoded(palette_mask(zeros, [(0, 0, 0)])), "m", on_black) == 0).all()
    white = Image.fromarray(np.full((4, 5, 3), 255, np.uint8)).quantize()
    assert (decode_mask(encoded(white), "m", on_white) == on_white.background_id).all()
    ids = np.array([[0, 1, 2]], np.uint8)
    assert np.array_equal(decode_mask(encoded(palette_mask(ids, [(255, 255, 255)] * 256)), "m", on_white), ids)
