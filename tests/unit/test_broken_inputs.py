"""Broken files as users have them: each a clear error or a row of rejected.parquet, none a traceback."""

import errno
import io
import json
import os
import re
import struct
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pytest
import tifffile
from patch_files import CLASSES, encoded, mask_png, png_file, put, tissue
from PIL import Image

from pistoseg import storage
from pistoseg.config import DataConfig, ScaleConfig
from pistoseg.errors import PistoSegError, UnavailableError
from pistoseg.patches.check import check
from pistoseg.patches.decode import decode_mask, decode_rgb
from pistoseg.patches.layouts import find_split, scan_evaluation, scan_training
from pistoseg.patches.store import REJECTED_SCHEMA, ingest

RGB = tissue()


def png_header(width, height):
    """A PNG that claims a size and holds no pixels for it."""
    return png_file(width, height, 8, 2, b"\0" * 64)


def tiff(pixels, **options):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, **options)
    return buffer.getvalue()


def png16(rgb):
    import cv2

    return cv2.imencode(".png", rgb.astype(np.uint16) * 257)[1].tobytes()


def damaged(data, start, stop):
    return data[:start] + bytes(255 - b for b in data[start:stop]) + data[stop:]


PNG, JPEG, TIFF = encoded(RGB), encoded(RGB, "JPEG"), tiff(RGB)
GREY_ALPHA = np.dstack([RGB[..., 0], np.full(RGB.shape[:2], 255, np.uint8)])
FRAMES = [Image.fromarray(tissue(s)) for s in (1, 2)]

BROKEN_FILES = {
    "empty": (b"", "empty"),
    "text": (b"this is no image\n", "not a PNG, JPEG or TIFF"),
    "html error page": (b"<html>404</html>", "not a PNG, JPEG or TIFF"),
    "zeros": (bytes(4096), "not a PNG, JPEG or TIFF"),
    "png cut in its pixels": (PNG[: len(PNG) // 2], "truncated"),
    "png cut in its header": (PNG[:20], "truncated"),
    "png signature only": (PNG[:8], "truncated"),
    "png with damaged pixels": (damaged(PNG, 100, 300), "damaged"),
    "png with a damaged header": (damaged(PNG, 12, 30), "damaged"),
    "jpeg cut in its pixels": (JPEG[: len(JPEG) // 2], "truncated"),
    "jpeg cut in its header": (JPEG[:30], "truncated"),
    "jpeg signature only": (b"\xff\xd8", "truncated"),
    "tiff cut in its pixels": (TIFF[: len(TIFF) // 2], "truncated"),
    "tiff signature only": (b"II*\0", "truncated"),
    "tiff with a directory outside": (b"II*\0" + struct.pack("<I", 2**31) + bytes(64), "truncated"),
    "1x1": (encoded(RGB[:1, :1]), "smaller than 16"),
    "15 px high": (encoded(RGB[:15]), "smaller than 16"),
    "20,000x20,000": (png_header(20_000, 20_000), "20000x20000"),
    "60,000x60,000": (png_header(60_000, 60_000), "60000x60000"),
    "claims more pixels than it has": (png_header(400, 400), "truncated"),
    "16-bit rgb png": (png16(RGB), "16-bit"),
    "16-bit grey png": (png16(RGB[..., 0]), "16-bit"),
    "16-bit rgb tiff": (tiff(RGB.astype(np.uint16), photometric="rgb"), "16-bit"),
    "16-bit grey tiff": (tiff(RGB[..., 0].astype(np.uint16)), "16-bit"),
    "float grey tiff": (tiff(RGB[..., 0].astype(np.float32)), "floating-point"),
    "float rgb tiff": (tiff(RGB.astype(np.float32), photometric="rgb"), "float|unknown"),
    "signed tiff": (tiff((RGB[..., 0] // 2).astype(np.int8)), "signed"),
    "cmyk jpeg": (encoded(RGB, "JPEG", "CMYK"), "CMYK"),
    "cmyk tiff": (encoded(RGB, "TIFF", "CMYK"), "CMYK"),
    "lab tiff": (encoded(Image.new("LAB", (40, 32)), "TIFF"), "LAB"),
    "tiff of two pages": (encoded(FRAMES[0], "TIFF", save_all=True, append_images=FRAMES[1:]), "2 pages"),
    "animated png": (encoded(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:]), "2 pages or frames"),
    "bmp called png": (encoded(RGB, "BMP"), "not a PNG, JPEG or TIFF"),
    "gif called png": (encoded(RGB, "GIF", "P"), "not a PNG, JPEG or TIFF"),
    "webp called png": (b"RIFF\x24\0\0\0WEBPVP8 ", "not a PNG, JPEG or TIFF"),
}


@pytest.mark.parametrize("kind", BROKEN_FILES)
def test_a_broken_image_is_rejected_with_its_name_a_reason_and_a_remedy(tmp_path, kind):
    data, says = BROKEN_FILES[kind]
    put(tmp_path, "broken-[1, 0, 0].png", data)
    (source,) = scan_training(str(tmp_path), CLASSES, DataConfig()).images
    image, windows, (rejection,) = ingest(source, DataConfig(), ScaleConfig())
    assert image is None
    assert windows == []
    assert rejection.name == "broken-[1, 0, 0].png"
    with pytest.raises(PistoSegError, match=says):
        decode_rgb(data, "x", DataConfig().max_pixels, 16)
    assert rejection.reason
    assert rejection.remedy


GOOD_FILES = {
    "rgb png": (PNG, 0),
    "rgb tiff": (TIFF, 0),
    "deflated tiff": (encoded(RGB, "TIFF", compression="tiff_deflate"), 0),
    "bigtiff": (tiff(RGB, bigtiff=True), 0),
    "big-endian tiff": (tiff(RGB, byteorder=">"), 0),
    "png called jpg": (PNG, 0),
    "opaque alpha": (encoded(RGB, "PNG", "RGBA"), 0),
    "grey tiff with alpha": (tiff(GREY_ALPHA, photometric="minisblack", extrasamples=["unassalpha"]), None),
    "grey tiff with associated alpha": (tiff(GREY_ALPHA, photometric="minisblack", extrasamples=["assocalpha"]), None),
    "jpeg": (encoded(RGB // 8 + 100, "JPEG", quality=95, subsampling=0), None),
}


@pytest.mark.parametrize("kind", GOOD_FILES)
def test_eight_bit_images_of_every_kind_are_read(kind):
    data, difference = GOOD_FILES[kind]
    pixels = decode_rgb(data, "x")
    assert (pixels.shape, pixels.dtype) == (RGB.shape, np.uint8)
    if difference is not None:
        assert np.array_equal(pixels, RGB)


def test_grey_palette_and_bilevel_images_become_rgb():
    grey = RGB[..., 0]
    assert np.array_equal(decode_rgb(encoded(grey), "x"), np.repeat(grey[..., None], 3, 2))
    palette = Image.fromarray(RGB).quantize(16)
    assert np.array_equal(decode_rgb(encoded(palette), "x"), np.array(palette.convert("RGB")))
    assert set(np.unique(decode_rgb(encoded(Image.fromarray(grey > 128)), "x"))) == {0, 255}


def test_transparent_pixels_are_white():
    rgba = np.dstack([RGB, np.full(RGB.shape[:2], 255, np.uint8)])
    rgba[:4, :4, 3] = 0
    pixels = decode_rgb(encoded(rgba), "x")
    assert (pixels[:4, :4] == 255).all()
    assert np.array_equal(pixels[4:], RGB[4:])
    half = np.full((20, 20, 2), 128, np.uint8)
    half[..., 0] = 100
    for kind, grey in (("assocalpha", 100), ("unassalpha", 50)):  # what of the 100 is seen
        pixels = decode_rgb(tiff(half, photometric="minisblack", extrasamples=[kind]), "x")
        assert (pixels == grey + 255 - 128).all()
    palette = Image.new("P", (20, 20), 0)
    palette.putpalette([10, 20, 30])
    assert (decode_rgb(encoded(palette, transparency=0), "x") == 255).all()


@pytest.mark.parametrize("kind", ["JPEG", "TIFF", "PNG"])
def test_an_image_with_an_orientation_is_turned_upright(kind):
    flat = np.zeros((32, 48, 3), np.uint8)
    flat[:, :24] = 250
    exif = Image.Exif()
    exif[274] = 6  # to be turned clockwise
    pixels = decode_rgb(encoded(flat, kind, exif=exif), "x")
    assert pixels.shape == (48, 32, 3)
    assert pixels[2, 2, 0] > 240
    assert pixels[45, 2, 0] < 10


BROKEN_MASKS = {
    "another size": (mask_png(32, 41), "41x32"),
    "turned": (mask_png(40, 32), "32x40"),
    "foreign values": (mask_png(value=9), "values 9"),
    "many foreign values": (encoded(RGB[..., 0]), "and [0-9]+ more"),
    "foreign colours": (encoded(np.full((32, 40, 3), 17, np.uint8)), "#111111"),
    "jpeg": (encoded(RGB, "JPEG"), "JPEG"),
    "16-bit": (png16(np.zeros((32, 40))), "16-bit"),
    "transparent": (encoded(np.zeros((32, 40, 4), np.uint8)), "transparent"),
    "grey with alpha": (encoded(Image.new("LA", (40, 32))), "mode LA"),
    "float": (tiff(np.zeros((32, 40), np.float32)), "floating-point"),
    "truncated": (encoded(RGB)[:300], "truncated"),
    "empty": (b"", "empty"),
    "text": (b"mask", "not a PNG"),
    "huge": (png_header(20_000, 20_000), "20000x20000"),
}


@pytest.mark.parametrize("kind", BROKEN_MASKS)
def test_a_broken_mask_is_refused_with_its_name_a_reason_and_a_remedy(kind):
    data, says = BROKEN_MASKS[kind]
    with pytest.raises(PistoSegError, match=says) as caught:
        decode_mask(data, "m.png", CLASSES, (32, 40))
    assert caught.value.file == "m.png"
    assert caught.value.remedy


def empty_folder(root):
    (root / "data").mkdir()
    return root / "data"


def no_folder(root):
    return root / "nowhere"


def a_file(root):
    return put(root, "a.png")


def only_text(root):
    put(root, "data/readme.txt", b"hi")
    return root / "data"


def only_hidden(root):
    put(root, "data/.x[100].png")
    return root / "data"


def only_bad_labels(root):
    put(root, "data/x[10].png")
    return root / "data"


def only_other_formats(root):
    put(root, "data/x[100].bmp")
    return root / "data"


def folder_linked_to_itself(root):
    (root / "data").mkdir()
    os.symlink(root / "data", root / "data" / "again")
    return root / "data"


def link_to_itself(root):
    os.symlink(root / "data", root / "data")
    return root / "data"


@pytest.mark.parametrize(
    "make",
    [
        empty_folder,
        no_folder,
        a_file,
        only_text,
        only_hidden,
        only_bad_labels,
        only_other_formats,
        folder_linked_to_itself,
        link_to_itself,
    ],
)
def test_a_folder_that_holds_no_data_set_is_a_clear_error(tmp_path, make):
    uri = str(make(tmp_path))
    with pytest.raises(PistoSegError) as caught:
        scan_training(find_split(uri, "training") or uri, CLASSES, DataConfig())
    assert caught.value.remedy
    with pytest.raises(PistoSegError):
        scan_evaluation(uri)


def test_links_that_cannot_be_followed_are_rejected_and_loops_end(tmp_path):
    put(tmp_path, "good-[1, 0, 0].png")
    os.symlink(tmp_path / "loop-[1, 0, 0].png", tmp_path / "loop-[1, 0, 0].png")
    os.symlink(tmp_path / "gone", tmp_path / "dangling-[1, 0, 0].png")
    os.symlink(tmp_path, tmp_path / "parent")
    listing = scan_training(str(tmp_path), CLASSES, DataConfig())
    results = {source.name: ingest(source, DataConfig(), ScaleConfig()) for source in listing.images}
    assert sorted(results) == ["dangling-[1, 0, 0].png", "good-[1, 0, 0].png", "loop-[1, 0, 0].png"]
    assert [name for name, (image, _, _) in results.items() if image] == ["good-[1, 0, 0].png"]
    assert "cannot be read" in results["loop-[1, 0, 0].png"][2][0].reason


LATIN = os.fsdecode("Gewebe ä".encode("latin-1"))


def test_a_name_that_is_not_utf8_is_rejected_and_can_be_written_as_such(tmp_path):
    for name in (f"{LATIN}-[1, 0, 0].png", f"{LATIN}/a-[1, 0, 0].png", "Gewebe ä-[1, 0, 0].png"):
        put(tmp_path, name)
    listing = scan_training(str(tmp_path), CLASSES, DataConfig())
    assert [image.name for image in listing.images] == ["Gewebe ä-[1, 0, 0].png"]
    rows = pa.Table.from_pylist([asdict(rejection) for rejection in listing.rejected], REJECTED_SCHEMA).to_pylist()
    names = [(row["name"], row["field"]) for row in rows]
    assert sorted(names) == [("Gewebe \\xe4-[1, 0, 0].png", "name"), ("Gewebe \\xe4/a-[1, 0, 0].png", "name")]
    assert all("UTF-8" in row["remedy"] for row in rows)


@pytest.mark.parametrize("folder", ["img", "mask"])
def test_a_mask_or_its_image_whose_name_is_not_utf8_is_a_problem(tmp_path, folder):
    put(tmp_path, "train/a-[1, 0, 0].png")
    for name in ("img/a.png", "mask/a.png", f"{folder}/{LATIN}.png"):
        put(tmp_path, f"val/{name}", mask_png() if name.startswith("mask") else None)
    with pytest.raises(PistoSegError, match=r"Gewebe \\xe4.png: name: is not UTF-8"):
        scan_evaluation(str(tmp_path))
    report = check(str(tmp_path), CLASSES, DataConfig(), workers=2)
    assert any(r"Gewebe \xe4.png" in problem for problem in report.problems)
    assert report.to_text().encode()


def test_a_report_names_a_folder_and_a_table_that_are_not_utf8(tmp_path):
    uri = str(tmp_path / LATIN)
    put(uri, "train/a-[1, 0, 0].png")
    put(uri, f"train/{LATIN}.csv", b"image,x,y,width,height\n")
    (problem,) = check(uri, CLASSES, DataConfig(), workers=1, out=str(tmp_path / "out")).problems
    assert "lacks the columns" in problem
    report = json.loads((tmp_path / "out/report.json").read_text("utf-8"))
    assert (report["data"], report["problems"]) == (uri, [problem])
    assert r"Gewebe \xe4.csv: columns: lacks" in (tmp_path / "out/report.txt").read_text("utf-8")


def test_a_folder_called_like_an_image_is_no_image(tmp_path):
    (tmp_path / "dir-[1, 0, 0].png").mkdir()
    put(tmp_path, "good-[1, 0, 0].png")
    assert [image.name for image in scan_training(str(tmp_path), CLASSES, DataConfig()).images] == [
        "good-[1, 0, 0].png"
    ]


def test_two_evaluation_images_of_one_name_are_a_clear_error(tmp_path):
    put(tmp_path, "img/a.png")
    put(tmp_path, "img/a.jpg")
    put(tmp_path, "mask/a.png", mask_png())
    with pytest.raises(PistoSegError, match="same name"):
        scan_evaluation(str(tmp_path))


def test_a_data_set_of_broken_files_is_reported_whole(tmp_path):
    for kind, (data, _) in BROKEN_FILES.items():
        put(tmp_path, f"train/{kind.replace('/', '-')}-[1, 0, 0].png", data)
    for kind, (data, _) in BROKEN_MASKS.items():
        put(tmp_path, f"val/img/{kind}.png")
        put(tmp_path, f"val/mask/{kind}.png", data)
    report = check(str(tmp_path), CLASSES, DataConfig(), workers=2, out=str(tmp_path / "out"))
    assert len(report.rejected) == len(BROKEN_FILES)
    assert len(report.splits["validation"].bad) == len(BROKEN_MASKS)
    assert not report.ok
    assert all(rejection.reason and rejection.remedy for rejection in report.rejected)


def refuse(monkeypatch, name, number):
    """Let a disk not give the files of a name."""
    read_bytes = storage.read_bytes

    def failing(uri):
        if storage.name(uri) == name:
            raise OSError(number, os.strerror(number), uri)
        return read_bytes(uri)

    monkeypatch.setattr(storage, "read_bytes", failing)


@pytest.mark.parametrize("reason", ["EACCES", "EIO", "EMFILE", "ESTALE"])
def test_a_file_that_the_disk_does_not_give_ends_the_stage_and_is_not_rejected(tmp_path, monkeypatch, reason):
    uri, number = put(tmp_path, "a-[1, 0, 0].png"), getattr(errno, reason)
    (image,) = scan_training(str(tmp_path), CLASSES, DataConfig()).images
    refuse(monkeypatch, image.name, number)
    with pytest.raises(UnavailableError, match=re.escape(os.strerror(number))) as caught:
        ingest(image, DataConfig(), ScaleConfig())
    assert caught.value.file == uri
    assert caught.value.remedy


@pytest.mark.parametrize("name", ["a-[1, 0, 0].png", "v.png"])
def test_the_check_names_a_file_that_the_disk_does_not_give_and_goes_on_with_the_other_images(
    tmp_path, monkeypatch, name
):
    training = [put(tmp_path, f"train/{name}-[1, 0, 0].png") for name in "ab"]
    put(tmp_path, "val/img/v.png")
    put(tmp_path, "val/mask/v.png", mask_png())
    refuse(monkeypatch, name, errno.EACCES)
    report = check(str(tmp_path), CLASSES, DataConfig(), workers=2)
    assert not report.ok
    assert any(name in problem and "Permission denied" in problem for problem in report.problems)
    refused = name != "v.png"
    assert (report.images, report.splits["validation"].scored) == (len(training) - refused, refused)
    assert not report.rejected
