"""Every kind of slide opens and gives its pixels; every broken one gives a reason."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image
from slide_files import halved, per_cm, texture, write_ome, write_scn, write_svs, write_tiff

from pistoseg.errors import PistoSegError, UnavailableError
from pistoseg.slides import reader as reader_module
from pistoseg.slides.reader import SlideReader, open_slide
from pistoseg.slides.tiff import TiffReader
from pistoseg.slides.vendor import OpenSlideReader

IMAGE = texture(391, 523)


def openslide_reader(path: Path) -> OpenSlideReader:
    return OpenSlideReader(str(path), None, str(path))


@pytest.mark.parametrize("open_it", [open_slide, openslide_reader])
def test_a_tiled_pyramid_is_read_at_every_level(tmp_path: Path, open_it: Callable[[Path], SlideReader]) -> None:
    with open_it(write_tiff(tmp_path / "a.tif", IMAGE, levels=3)) as slide:
        assert isinstance(slide, TiffReader if open_it is open_slide else OpenSlideReader)
        assert [tuple(level) for level in slide.levels] == [(523, 391, 1.0), (261, 195, 2.0), (130, 97, 4.0)]
        assert (slide.mpp_x, slide.mpp_y) == pytest.approx((0.5, 0.5))
        assert slide.mpp_source == "tiff-tags"
        assert np.array_equal(slide.read_region(40, 30, 200, 100), IMAGE[30:130, 40:240])
        second = slide.read_region(80, 60, 150, 100, level=1)
        # OpenSlide takes 2.004 for this level's downsample: its corners seldom fall on pixels, and it then blurs.
        off = 0 if open_it is open_slide else 3
        assert np.abs(second.astype(int) - halved(IMAGE)[30:130, 40:190]).mean() <= off


def test_openslide_gives_the_same_pixels_however_a_level_is_cut(tmp_path: Path) -> None:
    with openslide_reader(write_tiff(tmp_path / "a.tif", texture(1301, 1203), levels=2)) as slide:
        assert slide._ratios[1] % 1
        whole = slide.read_region(0, 0, 601, 650, level=1)
        for x, y in ((0, 0), (37, 211), (500, 490), (222, 511)):
            part = slide.read_region(2 * x, 2 * y, 100, 120, level=1)
            assert np.array_equal(part, whole[y : y + 120, x : x + 100])


def test_what_lies_outside_is_white(tmp_path: Path) -> None:
    paths = [write_tiff(tmp_path / "a.tif", IMAGE), write_ome(tmp_path / "a.ome.tif", IMAGE)]
    Image.fromarray(IMAGE).save(tmp_path / "a.png")
    for path in (*paths, tmp_path / "a.png"):
        with open_slide(path, mpp=0.5) as slide:
            region = slide.read_region(500, -10, 50, 30)
            assert np.array_equal(region[10:, :23], IMAGE[:20, 500:])
            assert (region[:10] == 255).all()
            assert (region[:, 23:] == 255).all()
            assert (slide.read_region(600, 0, 5, 5) == 255).all()


def test_an_ome_tiff_with_sub_ifds_has_all_its_levels(tmp_path: Path) -> None:
    metadata = {"PhysicalSizeX": 250.0, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 0.5, "PhysicalSizeYUnit": "µm"}
    path = write_ome(tmp_path / "a.ome.tif", IMAGE, levels=3, metadata=metadata)
    assert openslide.OpenSlide(path).level_count == 1
    with open_slide(path) as slide:
        assert isinstance(slide, TiffReader)
        assert slide.vendor == "ome-tiff"
        assert (slide.mpp_x, slide.mpp_y, slide.mpp_source) == (0.25, 0.5, "ome")
        assert [level.downsample for level in slide.levels] == [1, 2, 4]
        assert np.array_equal(slide.read_region(80, 60, 150, 100, level=1), halved(IMAGE)[30:130, 40:190])


@pytest.mark.parametrize(
    "options",
    [
        {"tile": None, "rowsperstrip": 7},
        {"tile": None, "rowsperstrip": 391, "compression": None},
        {"planarconfig": "separate"},
        {"planarconfig": "separate", "tile": None, "rowsperstrip": 50},
        {"compression": "lzw", "predictor": True, "tile": None},
        {"compression": "zstd"},
    ],
)
def test_tiffs_of_any_layout_give_their_pixels(tmp_path: Path, options: dict) -> None:
    image = np.ascontiguousarray(IMAGE.transpose(2, 0, 1)) if "planarconfig" in options else IMAGE
    path = tmp_path / "a.tif"
    options = {"tile": (128, 128), "photometric": "rgb", "metadata": None} | options
    tifffile.imwrite(path, image, resolution=(20000, 20000), resolutionunit="CENTIMETER", **options)
    with open_slide(path) as slide:
        assert slide.mpp_x == 0.5
        assert np.array_equal(slide.read_region(0, 0, 523, 391), IMAGE)
        assert np.array_equal(slide.read_region(101, 77, 300, 200), IMAGE[77:277, 101:401])


@pytest.mark.parametrize("compression", ["webp", "jpeg2000", "jpegxl"])
def test_tiled_tiffs_of_compressions_that_openslide_has_not_are_read_at_every_level(
    tmp_path: Path, compression: str
) -> None:
    options = {"compression": compression, "compressionargs": {"lossless": True} if compression == "webp" else None}
    path = write_tiff(tmp_path / "a.tif", IMAGE, levels=2, **options)
    assert openslide.OpenSlide.detect_format(path) == "generic-tiff"
    with open_slide(path) as slide:
        assert [level.downsample for level in slide.levels] == [1, 2]
        assert np.array_equal(slide.read_region(101, 77, 300, 200), IMAGE[77:277, 101:401])
        assert np.array_equal(slide.read_region(80, 60, 150, 100, level=1), halved(IMAGE)[30:130, 40:190])


@pytest.mark.parametrize("ome", [False, True])
def test_a_compression_that_is_aperios_for_ycbcr_is_any_jpeg_2000_in_an_ome_tiff(tmp_path: Path, ome: bool) -> None:
    path = tmp_path / ("a.ome.tif" if ome else "a.tif")
    options = {"compression": "jpeg2000", "tile": (64, 64), "photometric": "rgb"}
    tifffile.imwrite(path, IMAGE, ome=ome, metadata={"axes": "YXS"} if ome else None, **options)
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tiff.pages[0].tags["Compression"].overwrite(33003)
    if not ome:
        with pytest.raises(PistoSegError, match="has YCbCr pixels"):
            open_slide(path)
        return
    with open_slide(path, mpp=1.0) as slide:
        assert np.array_equal(slide.read_region(101, 77, 300, 200), IMAGE[77:277, 101:401])


def test_rgb_in_three_channels_and_jpeg_are_read(tmp_path: Path) -> None:
    planes = np.ascontiguousarray(IMAGE.transpose(2, 0, 1))
    tifffile.imwrite(tmp_path / "c.ome.tif", planes, ome=True, photometric="minisblack", metadata={"axes": "CYX"})
    with open_slide(tmp_path / "c.ome.tif", mpp=1.0) as slide:
        assert np.array_equal(slide.read_region(101, 77, 300, 200), IMAGE[77:277, 101:401])
    jpeg = write_tiff(tmp_path / "j.tif", IMAGE, compression="jpeg", compressionargs={"level": 95})
    truth = tifffile.imread(jpeg)
    with TiffReader(str(jpeg), None, "j") as slide:
        assert np.array_equal(slide.read_region(101, 77, 300, 200), truth[77:277, 101:401])


def test_transparent_pixels_are_white(tmp_path: Path) -> None:
    rgba = np.dstack([IMAGE, np.full(IMAGE.shape[:2], 255, np.uint8)])
    rgba[:100, :, 3] = 0
    tifffile.imwrite(
        tmp_path / "a.tif", rgba, photometric="rgb", extrasamples=["unassalpha"], tile=(64, 64), metadata=None
    )
    with TiffReader(str(tmp_path / "a.tif"), 0.5, "a") as slide:
        region = slide.read_region(0, 90, 523, 20)
    assert (region[:10] == 255).all()
    assert np.array_equal(region[10:], IMAGE[100:110])


@pytest.mark.parametrize("options", [{}, {"planarconfig": "separate"}])
@pytest.mark.parametrize(
    ("extra", "fourth", "expected"),
    [
        ("unspecified", 0, IMAGE),
        ("unspecified", 200, IMAGE),
        ("unassalpha", 51, np.round(IMAGE * 0.2 + 204.0)),
        ("assocalpha", 51, np.minimum(IMAGE + 204.0, 255)),
        ("assocalpha", 0, np.full_like(IMAGE, 255)),
    ],
)
def test_the_fourth_sample_is_what_the_file_says(
    tmp_path: Path, extra: str, fourth: int, expected: np.ndarray, options: dict
) -> None:
    pixels = np.dstack([IMAGE, np.full(IMAGE.shape[:2], fourth, np.uint8)])
    if options:
        pixels = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, pixels, photometric="rgb", extrasamples=[extra], tile=(64, 64), metadata=None, **options)
    with open_slide(path, mpp=0.5) as slide:
        region = slide.read_region(0, 0, 523, 391)
        assert (region.shape, region.dtype) == (IMAGE.shape, np.uint8)
        assert np.abs(region - expected).max() <= 1
        assert np.array_equal(slide.read_region(100, 50, 80, 90), region[50:140, 100:180])


def test_threads_read_the_same_pixels(tmp_path: Path) -> None:
    corners = [(x, y) for x in range(0, 423, 47) for y in range(0, 291, 31)]
    for open_it in (open_slide, openslide_reader):
        with open_it(write_tiff(tmp_path / "a.tif", IMAGE)) as slide, ThreadPoolExecutor(8) as pool:
            parts = list(pool.map(lambda corner, s=slide: s.read_region(*corner, 100, 100), corners))
        for (x, y), part in zip(corners, parts, strict=True):
            assert np.array_equal(part, IMAGE[y : y + 100, x : x + 100])


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_strip_is_decoded_by_one_of_the_threads_that_want_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: bool
) -> None:
    decode, calls, second = TiffReader._decode, [], threading.Event()

    def counted(*arguments: Any) -> np.ndarray:
        calls.append(arguments)
        if len(calls) > 1:
            second.set()
        elif interrupted:
            raise KeyboardInterrupt
        second.wait(0.2)  # for others to begin it as well, if they can
        return decode(*arguments)

    monkeypatch.setattr(TiffReader, "_decode", counted)
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(path, IMAGE, photometric="rgb", rowsperstrip=len(IMAGE), **per_cm((0.5, 0.5)))
    with open_slide(path) as slide, ThreadPoolExecutor(4) as pool:
        parts = [pool.submit(slide.read_region, 10 * number, 0, 50, 50) for number in range(4)]
        failed = [part for part in parts if part.exception()]
    assert len(calls) == 1 + interrupted == 1 + len(failed)
    for number, part in enumerate(parts):
        if part not in failed:
            assert np.array_equal(part.result(), IMAGE[:50, 10 * number : 10 * number + 50])


def test_a_tiff_whose_resolution_has_no_unit_says_no_pixel_size(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    for options in ({"resolutionunit": "NONE"}, {"imagej": True, "metadata": {"unit": "mm"}}):
        tifffile.imwrite(path, IMAGE, resolution=(2000, 2000), photometric="rgb", **options)
        with pytest.raises(PistoSegError, match="neither a believable pixel size nor an objective power"):
            open_slide(path)
    tifffile.imwrite(path, IMAGE, resolution=(2000, 2000), resolutionunit="INCH", photometric="rgb")
    with open_slide(path) as slide:
        assert (slide.mpp_x, slide.mpp_source) == (12.7, "tiff-tags")


def test_pictures_need_a_resolution(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg"):
        Image.fromarray(IMAGE).save(tmp_path / name, dpi=(72, 72))
        with pytest.raises(PistoSegError, match=rf"{name}: mpp: .*column mpp"):
            open_slide(tmp_path / name)
    with open_slide(tmp_path / "a.png", mpp=0.5) as slide:
        assert (slide.mpp_x, slide.mpp_source, slide.vendor) == (0.5, "given", "png")
        assert np.array_equal(slide.read_region(5, 6, 100, 50), IMAGE[6:56, 5:105])


def test_broken_files_say_what_is_wrong(tmp_path: Path) -> None:
    whole = write_tiff(tmp_path / "whole.tif", IMAGE).read_bytes()
    for ending in ("png", "jpg"):
        Image.fromarray(IMAGE).save(tmp_path / f"whole.{ending}")
    contents = {
        "zero.svs": (b"", "is empty"),
        "text.ndpi": (b"not a slide at all, just words", "is no slide"),
        "cut.tif": (whole[:200], "truncated or damaged"),
        "cut.png": ((tmp_path / "whole.png").read_bytes()[:5000], "truncated"),
        "header.svs": (b"II*\0\x08\0\0\0", "truncated or damaged"),
        "mirax.mrxs": ((tmp_path / "whole.jpg").read_bytes(), "without the folder mirax"),
        "renamed.svs": ((tmp_path / "whole.jpg").read_bytes(), "is no slide"),
    }
    for name, (data, reason) in contents.items():
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(PistoSegError, match=reason) as caught:
            open_slide(path, mpp=0.5)
        assert caught.value.file == str(path)
        assert caught.value.remedy
    with pytest.raises(PistoSegError, match="does not exist"):
        open_slide(tmp_path / "none.svs")
    with pytest.raises(PistoSegError, match="is a folder"):
        open_slide(tmp_path)
    with pytest.raises(PistoSegError, match=r"s3://b/zero\.svs"):
        open_slide(tmp_path / "zero.svs", name="s3://b/zero.svs")


@pytest.mark.parametrize("open_it", [open_slide, openslide_reader])
def test_a_damaged_or_missing_tile_is_an_error_when_it_is_read(
    tmp_path: Path, open_it: Callable[[Path], SlideReader]
) -> None:
    def read(path: Path) -> np.ndarray:
        with open_it(path) as slide:
            assert np.array_equal(slide.read_region(0, 0, 100, 100), IMAGE[:100, :100])
            return slide.read_region(300, 280, 100, 100)

    path = write_tiff(tmp_path / "a.tif", IMAGE)
    with tifffile.TiffFile(path) as tiff:
        offset, length = tiff.pages[0].dataoffsets[12], tiff.pages[0].databytecounts[12]
        assert tiff.pages[0].dataoffsets[0] > tiff.pages[0].offset, "a cut file keeps its directory"
    data = path.read_bytes()
    assert np.array_equal(read(path), IMAGE[280:380, 300:400])
    (tmp_path / "damaged.tif").write_bytes(data[:offset] + b"\x55" * length + data[offset + length :])
    with pytest.raises(PistoSegError, match=r"damaged.tif: .*(cannot be decoded|cannot be read at level 0)"):
        read(tmp_path / "damaged.tif")
    (tmp_path / "short.tif").write_bytes(data[:offset])
    with pytest.raises(PistoSegError, match=r"short.tif: .*(is truncated|OpenSlide cannot open it \(.*Short read)"):
        read(tmp_path / "short.tif")


@pytest.mark.parametrize(
    ("open_it", "fault"),
    [(open_slide, errno.EMFILE), (open_slide, None), (openslide_reader, errno.ESTALE)],
)
def test_what_the_disk_or_memory_does_not_give_is_not_taken_for_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, open_it: Callable[[Path], SlideReader], fault: int | None
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(fault, os.strerror(fault)) if fault else MemoryError

    def unread(*_: object) -> None:
        raise openslide.OpenSlideError("Cannot read raw tile")

    path = write_tiff(tmp_path / "a.tif", IMAGE)
    says = rf"a\.tif: cannot be read.*{os.strerror(fault) if fault else 'memory is full'}"
    with open_it(path) as slide, monkeypatch.context() as patch:
        if open_it is openslide_reader:
            patch.setattr(openslide.OpenSlide, "read_region", unread)
            patch.setattr(openslide, "OpenSlide", unread)
            patch.setattr(reader_module, "open", refuse, raising=False)
        else:
            patch.setattr(os, "pread", refuse)
        with pytest.raises(UnavailableError, match=says):
            slide.read_region(0, 0, 50, 50)
        patch.setattr(tifffile, "TiffFile", refuse)
        with pytest.raises(UnavailableError, match=says):
            open_it(path)


def test_a_tile_without_memory_for_it_is_not_taken_for_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise MemoryError

    with TiffReader(str(write_tiff(tmp_path / "a.tif", IMAGE)), None, "s3://b/a.tif") as slide:
        monkeypatch.setattr(slide._planes[0][0].page.keyframe, "decode", refuse)
        with pytest.raises(UnavailableError, match=r"s3://b/a\.tif: cannot be read: memory is full.*more memory"):
            slide.read_region(0, 0, 50, 50)


def test_other_pixels_than_8_bit_rgb_are_refused(tmp_path: Path) -> None:
    grey = IMAGE[..., 0]
    cases = {
        "deep.tif": (IMAGE.astype(np.uint16), {"photometric": "rgb", "tile": (128, 128)}, "uint16 samples"),
        "grey.tif": (grey, {"photometric": "minisblack"}, "RGB is needed"),
        "stack.ome.tif": (np.stack([IMAGE] * 4), {"photometric": "rgb", "metadata": {"axes": "ZYXS"}}, "Z: 4"),
    }
    for name, (pixels, options, reason) in cases.items():
        tifffile.imwrite(tmp_path / name, pixels, **options)
        with pytest.raises(PistoSegError, match=reason):
            open_slide(tmp_path / name, mpp=0.5)


def test_a_large_slide_without_tiles_is_refused_and_one_with_tiles_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("tiff", "picture"):
        monkeypatch.setattr(f"pistoseg.slides.{module}.MAX_UNTILED_PIXELS", 100_000)
    assert reader_module.MAX_UNTILED_PIXELS < 2**28
    write_tiff(tmp_path / "strips.tif", IMAGE, tile=None, rowsperstrip=16)
    write_ome(tmp_path / "tiles.ome.tif", IMAGE)
    Image.fromarray(IMAGE).save(tmp_path / "a.png")
    for name in ("strips.tif", "a.png"):
        with pytest.raises(PistoSegError, match=r"523x391 px.*vips tiffsave"):
            open_slide(tmp_path / name, mpp=0.5)
    with open_slide(tmp_path / "tiles.ome.tif", mpp=0.5) as slide:
        assert np.array_equal(slide.read_region(300, 300, 100, 50), IMAGE[300:350, 300:400])


def test_sparse_tiles_are_white(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", IMAGE)
    with tifffile.TiffFile(path, mode="r+") as tiff:
        counts = list(tiff.pages[0].databytecounts)
        counts[0] = 0
        tiff.pages[0].tags["TileByteCounts"].overwrite(counts)
    for slide in (openslide_reader(path), open_slide(path)):
        with slide:
            region = slide.read_region(0, 0, 200, 100)
            assert (region[:, :128] == 255).all()
            assert np.array_equal(region[:, 128:], IMAGE[:100, 128:200])


def test_bounds_are_those_that_openslide_gives(tmp_path: Path) -> None:
    with open_slide(write_tiff(tmp_path / "a.tif", IMAGE)) as slide:
        assert slide.bounds is None
    with open_slide(write_scn(tmp_path / "a.scn", IMAGE, (1000, 800), (200, 150))) as slide:
        assert (slide.width, slide.height) == (1000, 800)
        assert slide.bounds == (200, 150, IMAGE.shape[1], IMAGE.shape[0])
        assert (slide.mpp_x, slide.mpp_y, slide.mpp_source) == (0.5, 0.5, "vendor")
        assert np.array_equal(slide.read_region(200, 150, 64, 64), IMAGE[:64, :64])
        assert (slide.read_region(0, 0, 200, 150) == 255).all()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"photometric": "ycbcr", "subsampling": (2, 2)},
        {"compression": "jpeg2000", "compressionargs": {"level": 80}},
        {"compression": "lzw"},
    ],
)
def test_aperio_slides_are_read_from_their_pages_with_the_pixels_that_openslide_gives(
    tmp_path: Path, options: dict
) -> None:
    path = write_svs(tmp_path / "a.svs", texture(392, 524), **options)
    if options.get("compression") == "jpeg2000":  # tifffile writes it under another number than Aperio
        with tifffile.TiffFile(path, mode="r+") as tiff:
            for number in (0, 2):
                tiff.pages[number].tags["Compression"].overwrite(33005)
    with open_slide(path) as slide, openslide_reader(path) as beside:
        assert isinstance(slide, TiffReader)
        assert slide.levels == beside.levels == [(524, 392, 1.0), (262, 196, 2.0)]
        assert slide.properties == beside.properties
        assert (slide.vendor, slide.mpp_x, slide.mpp_source) == ("aperio", 0.5, "vendor")
        for level, size in enumerate(((524, 392), (262, 196))):
            pixels = slide.read_region(0, 0, *size, level)
            assert np.array_equal(pixels, beside.read_region(0, 0, *size, level))
            assert pixels.std() > 10


def test_openslide_reads_what_the_pages_of_an_aperio_slide_do_not_say(tmp_path: Path) -> None:
    image = texture(392, 524)
    colours = write_svs(tmp_path / "colours.svs", image, compression="jpeg2000", compressionargs={"level": 80})
    sparse = write_svs(tmp_path / "sparse.svs", image)
    with tifffile.TiffFile(colours, mode="r+") as tiff:
        for number in (0, 2):
            tiff.pages[number].tags["Compression"].overwrite(33003)  # JPEG 2000 of YCbCr
    with tifffile.TiffFile(sparse, mode="r+") as tiff:  # a tile of a lower level, which OpenSlide makes of the others
        tiff.pages[2].tags["TileByteCounts"].overwrite([0, *tiff.pages[2].databytecounts[1:]])
    for path in (colours, sparse):
        with open_slide(path) as slide:
            assert isinstance(slide, OpenSlideReader)
            assert slide.read_region(0, 0, 262, 196, level=1).std() > 10
    with pytest.raises(PistoSegError, match="is no pixel size"):
        open_slide(sparse, mpp=1e4)


def test_real_slides_open_and_the_one_without_resolution_says_so(real_data: Path) -> None:
    with open_slide(real_data / "slides" / "cmu-1-small-region.svs") as slide:
        assert (slide.width, slide.height, slide.vendor) == (2220, 2967, "aperio")
        assert (slide.mpp_x, slide.mpp_y, slide.mpp_source) == (0.499, 0.499, "vendor")
        assert slide.read_region(0, 0, 300, 200).shape == (200, 300, 3)
        with openslide_reader(real_data / "slides" / "cmu-1-small-region.svs") as beside:
            assert np.array_equal(slide.read_region(0, 0, 2220, 2967), beside.read_region(0, 0, 2220, 2967))
    silent = real_data / "slides" / "tcga-cr-7395-01a-01-ts1.svs"
    with pytest.raises(PistoSegError, match=r"ts1.svs: mpp: .*column mpp of a manifest"):
        open_slide(silent)
    with open_slide(silent, mpp=0.5) as slide:
        assert (slide.mpp_x, slide.mpp_source) == (0.5, "given")
        assert [level.downsample for level in slide.levels] == [1, 2]
        assert isinstance(slide, TiffReader)
