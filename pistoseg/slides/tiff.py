"""TIFF, OME-TIFF and Aperio's SVS read from their pages, tile by tile or strip by strip; no level is loaded whole."""

from __future__ import annotations

import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from pistoseg.errors import PistoSegError
from pistoseg.slides.files import unreadable
from pistoseg.slides.reader import CONVERT, COPY_AGAIN, MAX_UNTILED_PIXELS, SlideReader

_CACHE_BYTES = 2**27
_RGB, _YCBCR, _GREY = 2, 6, 1
_JPEG = (6, 7)
_ASSOCIATED_ALPHA, _ALPHA = 1, 2
_UNITS = {1: "none", 2: "inch", 3: "centimeter", 4: "millimeter", 5: "micrometer"}
_PLAIN = (1, 5, 7, 33005)
"""Compressions in which Aperio's pixels are RGB once they are decoded: none, LZW, JPEG and JPEG 2000 of RGB."""
_YCBCR_2000 = 33003
"""Aperio's JPEG 2000 of YCbCr, whatever the photometric tag says."""
_DIRECTORY = "is truncated or damaged: its TIFF directory cannot be read"
_REMEDY = f"save it as 8-bit RGB: {CONVERT}"


def count_levels(path: str, name: str) -> int:
    """Levels of the largest image in a TIFF; errors call it `name`.

    Raises:
        UnavailableError: the disk or full memory keep it from being read.
        PistoSegError: it is damaged.
    """
    tiff = _opened(path, name)
    try:
        return len(_main_series(tiff, name).levels)
    finally:
        tiff.close()


def open_aperio(
    path: str, mpp: float | None, name: str, sizes: list[tuple[int, int]], properties: Mapping[str, str]
) -> TiffReader | None:
    """A slide of Aperio's (SVS) read from its pages, in a quarter of OpenSlide's processor time, or half of it for
    JPEG 2000, and with the same pixels; None where OpenSlide knows more of it than its pages say.

    Args:
        path, mpp, name: as of `open_slide`.
        sizes: (width, height) of the levels that OpenSlide sees.
        properties: that OpenSlide gives.
    """
    try:
        slide = TiffReader(path, mpp, name, properties)
    except PistoSegError:
        return None
    if [level[:2] for level in slide.levels] == sizes and slide.is_plain:
        return slide
    slide.close()
    return None


@dataclass(frozen=True)
class _Plane:
    """One or more samples of a level: a page, or a part of a page whose samples lie one after another.

    Args:
        page: tifffile's page.
        first: its first segment.
        samples: in a pixel of a segment.
        tile: (height, width) of a segment.
        across: segments beside each other.
    """

    page: Any
    first: int
    samples: int
    tile: tuple[int, int]
    across: int


class TiffReader(SlideReader):
    """A TIFF whose segments are read with `pread` and decoded outside of any lock, so that threads run side by side.

    Args:
        path, mpp, name: as of `open_slide`.
        properties: named as OpenSlide does; by default what the TIFF's own tags say.
    """

    def __init__(self, path: str, mpp: float | None, name: str, properties: Mapping[str, str] | None = None) -> None:
        self._tiff = _opened(path, name)
        self._file = -1
        try:
            with _reading(name, _DIRECTORY):
                series = _main_series(self._tiff, name)
                self._planes = [_planes_of(level, name) for level in _usable(series.levels)]
                sizes = [(p[0].page.imagewidth, p[0].page.imagelength) for p in self._planes]
                if properties is None:
                    properties = _properties(self._tiff, self._planes[0][0].page)
                super().__init__(name, sizes, properties, mpp)
                self._file = os.open(path, os.O_RDONLY)
        except PistoSegError:
            self.close()
            raise
        self._lock = threading.Lock()
        self._cache: OrderedDict[tuple[int, int, int], NDArray[np.uint8]] = OrderedDict()
        self._cached = 0
        self._turns: dict[tuple[int, int, int], threading.Lock] = {}

    @property
    def is_plain(self) -> bool:
        """Whether every segment is there and nothing of its colours depends on who wrote the file."""
        pages = [plane.page for planes in self._planes for plane in planes]
        return all(page.keyframe.compression in _PLAIN and min(page.databytecounts, default=0) > 0 for page in pages)

    def close(self) -> None:
        """Close the file."""
        self._tiff.close()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _read(self, x: int, y: int, width: int, height: int, level: int) -> NDArray[np.uint8]:
        planes = self._planes[level]
        out = np.empty((height, width, sum(plane.samples for plane in planes)), np.uint8)
        channel = 0
        for number, plane in enumerate(planes):
            rows, columns = plane.tile
            channels = slice(channel, channel + plane.samples)
            channel += plane.samples
            for j in range(y // rows, (y + height - 1) // rows + 1):
                for i in range(x // columns, (x + width - 1) // columns + 1):
                    segment = self._segment(level, number, plane.first + j * plane.across + i)
                    top, left = j * rows, i * columns
                    y0, y1 = max(top, y), min(top + rows, y + height)
                    x0, x1 = max(left, x), min(left + columns, x + width)
                    part = segment[y0 - top : y1 - top, x0 - left : x1 - left]
                    out[y0 - y : y1 - y, x0 - x : x1 - x, channels] = part
        return _over_white(out, planes[0].page.keyframe.extrasamples) if out.shape[2] == 4 else out

    def _segment(self, level: int, number: int, index: int) -> NDArray[np.uint8]:
        """A decoded tile or strip, (height, width, samples)."""
        key = (level, number, index)
        with self._lock:
            if key in self._cache:
                return self._kept(key)
            turn = self._turns.setdefault(key, threading.Lock())
        with turn:  # a strip may be a whole level: of the threads that want it, one decodes it
            with self._lock:
                if key in self._cache:
                    return self._kept(key)
            try:
                segment = self._decode(self._planes[level][number], index, level)
                with self._lock:
                    self._keep(key, segment)
            finally:
                self._turns.pop(key, None)
        return segment

    def _kept(self, key: tuple[int, int, int]) -> NDArray[np.uint8]:
        self._cache.move_to_end(key)
        return self._cache[key]

    def _keep(self, key: tuple[int, int, int], segment: NDArray[np.uint8]) -> None:
        if key not in self._cache:
            self._cache[key] = segment
            self._cached += segment.nbytes
        while self._cached > _CACHE_BYTES and len(self._cache) > 1:
            self._cached -= self._cache.popitem(last=False)[1].nbytes

    def _decode(self, plane: _Plane, index: int, level: int) -> NDArray[np.uint8]:
        page = plane.page
        place = f"tile {index} of level {level}"
        try:
            offset, length = page.dataoffsets[index], page.databytecounts[index]
        except IndexError as error:
            raise PistoSegError(f"has no {place}", file=self.name, remedy=COPY_AGAIN) from error
        if not length:  # a sparse file: nothing was scanned here
            return np.full((*plane.tile, plane.samples), 255, np.uint8)
        with _reading(self.name, f"{place} cannot be read"):
            data = os.pread(self._file, length, offset)
        if len(data) < length:
            raise PistoSegError(f"is truncated: {place} lies beyond its end", file=self.name, remedy=COPY_AGAIN)
        options = {"jpegtables": page.jpegtables, "jpegheader": page.keyframe.jpegheader} if _is_jpeg(page) else {}
        with _reading(self.name, f"{place} cannot be decoded"):
            decoded = page.keyframe.decode(data, index, _fullsize=page.keyframe.is_tiled, **options)[0]
            return np.asarray(decoded[0], np.uint8)


def _opened(path: str, name: str) -> Any:
    import tifffile

    with _reading(name, _DIRECTORY):
        return tifffile.TiffFile(path)


@contextmanager
def _reading(name: str, damage: str) -> Iterator[None]:
    """Tell what the disk and memory do not give from damage: tifffile and codecs raise anything on damaged bytes."""
    try:
        yield
    except PistoSegError:
        raise
    except Exception as error:
        # Offsets that make no sense are invalid arguments.
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)):
            raise unreadable(name, error) from error
        raise PistoSegError(f"{damage} ({_detail(error)})", file=name, remedy=COPY_AGAIN) from error


def _main_series(tiff: Any, name: str) -> Any:
    """The image of most pixels: scanners add labels and macro pictures."""
    with _reading(name, _DIRECTORY):  # there may be no series at all
        series = [item for item in tiff.series if item.levels and item.keyframe is not None]
        return max(series, key=lambda item: item.keyframe.imagewidth * item.keyframe.imagelength)


def _usable(levels: list[Any]) -> Iterator[Any]:
    """The levels in descending size; one that is not smaller than the one before is another picture."""
    width = None
    for level in levels:
        if width is None or level.keyframe.imagewidth < width:
            width = level.keyframe.imagewidth
            yield level


def _planes_of(level: Any, name: str) -> list[_Plane]:
    """Where the red, green and blue of a level are.

    Raises:
        PistoSegError: it is no 8-bit RGB, has several focal planes or times, or is too large without tiles.
    """
    page = level.keyframe
    tile = _checked_tile(page, name)
    others = [f"{axis}: {n}" for axis, n in zip(level.axes, level.shape, strict=True) if axis not in "YXSC" and n > 1]
    if others:
        raise PistoSegError(
            f"has several planes ({', '.join(others)})", file=name, remedy="save the one that matters as its own file"
        )
    across = -(-page.imagewidth // tile[1])
    each = across * -(-page.imagelength // tile[0])
    pages, samples = [item for item in level.pages if item is not None], page.samplesperpixel
    if len(pages) == 1 and samples in (3, 4) and page.photometric in (_RGB, _YCBCR):
        if page.planarconfig == 1:
            return [_Plane(pages[0], 0, samples, tile, across)]
        return [_Plane(pages[0], number * each, 1, tile, across) for number in range(samples)]
    if len(pages) == 3 and samples == 1 and page.photometric == _GREY:
        return [_Plane(item, 0, 1, tile, across) for item in pages]
    kind = getattr(page.photometric, "name", page.photometric)
    raise PistoSegError(
        f"has {len(pages)} pages of {samples} samples ({kind}), and RGB is needed", file=name, remedy=_REMEDY
    )


def _checked_tile(page: Any, name: str) -> tuple[int, int]:
    """Height and width of a page's tiles or strips, once it is sure that they can be read piece by piece."""
    if page.dtype != np.uint8:
        raise PistoSegError(f"has {page.dtype} samples, and 8-bit ones are needed", file=name, remedy=_REMEDY)
    # Aperio says by its compression that pixels are YCbCr; OME-TIFFs use the same one for any.
    aperio = page.compression == _YCBCR_2000 and page.photometric != _GREY and not page.parent.is_ome
    ycbcr = page.photometric == _YCBCR or aperio
    if ycbcr and not _is_jpeg(page):  # tifffile leaves such colours as they are
        raise PistoSegError("has YCbCr pixels without JPEG compression", file=name, remedy=_REMEDY)
    if page.is_tiled:
        tile = (page.tilelength, page.tilewidth)
        pixels = tile[0] * tile[1]
    else:
        tile = (min(page.rowsperstrip, page.imagelength), page.imagewidth)
        pixels = page.imagelength * page.imagewidth
    if pixels > MAX_UNTILED_PIXELS:
        raise PistoSegError(
            f"is {page.imagewidth}x{page.imagelength} px in {'tiles' if page.is_tiled else 'strips'} of "
            f"{tile[1]}x{tile[0]} px, which cannot be read piece by piece; up to {MAX_UNTILED_PIXELS:,} px can",
            file=name,
            field="tiles",
            remedy=CONVERT,
        )
    return tile


def _properties(tiff: Any, page: Any) -> dict[str, str]:
    """Resolution of a TIFF, named as OpenSlide and OME-XML name it."""
    found = {"openslide.vendor": "ome-tiff" if tiff.is_ome else "tiff"}
    for axis in "XY":
        value = page.keyframe.tags.valueof(f"{axis}Resolution")
        if value and value[0] and value[1]:
            found[f"tiff.{axis}Resolution"] = repr(value[0] / value[1])
    unit = page.keyframe.tags.valueof("ResolutionUnit")
    found["tiff.ResolutionUnit"] = _UNITS.get(2 if unit is None else int(unit), "none")  # 1 is falsy in tifffile
    if tiff.is_ome:
        found |= _ome_properties(tiff.ome_metadata or "", page.imagewidth, page.imagelength)
    return found


def _ome_properties(xml: str, width: int, height: int) -> dict[str, str]:
    """PhysicalSizeX etc. of the image of that size."""
    try:
        pixels = [item for item in ElementTree.fromstring(xml).iter() if item.tag.endswith("}Pixels")]
    except ElementTree.ParseError:
        return {}
    for item in pixels:
        if (item.get("SizeX"), item.get("SizeY")) == (str(width), str(height)):
            return {f"ome.{key}": value for key, value in item.attrib.items() if key.startswith("PhysicalSize")}
    return {}


def _is_jpeg(page: Any) -> bool:
    return page.keyframe.compression in _JPEG


def _over_white(pixels: NDArray[np.uint8], extra: tuple[int, ...]) -> NDArray[np.uint8]:
    """The first three of four samples, over white where the fourth is an alpha channel by the tag ExtraSamples."""
    rgb, alpha = pixels[..., :3], pixels[..., 3:]
    kind = extra[0] if extra else None
    if kind == _ASSOCIATED_ALPHA:  # which the colours are multiplied by already
        return np.minimum(rgb + (255 - alpha.astype(np.uint16)), 255).astype(np.uint8)
    if kind != _ALPHA:
        return np.ascontiguousarray(rgb)
    weight = alpha.astype(np.float32) / 255
    return np.round(rgb * weight + 255 * (1 - weight)).astype(np.uint8)


def _detail(error: Exception) -> str:
    return str(error).strip().rstrip(".").partition("\n")[0] or type(error).__name__
