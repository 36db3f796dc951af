"""Opening a slide of any kind, and reading pixels of its levels.

OpenSlide reads every vendor's format and DICOM. TIFF and OME-TIFF of no vendor, and Aperio's, are read tile by tile
from their pages: OpenSlide sees neither strips nor the pyramid of an OME-TIFF, knows fewer compressions, takes several
times the processor time for the others, and blurs their lower levels. PNG and JPEG are held in memory.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from pistoseg.errors import PistoSegError
from pistoseg.patches.source import require_utf8
from pistoseg.slides.files import VENDORS, extension, unreadable
from pistoseg.slides.resolution import resolve_mpp

CONVERT = "convert it with `vips tiffsave IN OUT.tif --tile --pyramid --compression jpeg`"
COPY_AGAIN = "copy it again from its source"
MAX_UNTILED_PIXELS = 150_000_000
"""Largest picture, TIFF without tiles or single TIFF tile that is decoded in one piece: 450 MB."""
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PICTURE_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")


class Level(NamedTuple):
    """A level of a slide's pyramid.

    Args:
        width: px of this level.
        height: px of this level.
        downsample: level-0 px per px of this level.
    """

    width: int
    height: int
    downsample: float


class SlideReader(ABC):
    """An open slide; a context manager. Reads may come from several threads.

    Args:
        name: what errors call the file.
        sizes: (width, height) of each level, the largest first.
        properties: metadata, named as OpenSlide does.
        mpp: given by the user, um/px, or None.

    Attributes:
        name: as above.
        width, height: level-0 px.
        levels: `Level` of each level.
        mpp_x, mpp_y: micrometres per level-0 px.
        mpp_source: where they come from, see `Resolution`.
        properties: as above.
    """

    def __init__(
        self, name: str, sizes: list[tuple[int, int]], properties: Mapping[str, str], mpp: float | None
    ) -> None:
        self.name = name
        self.width, self.height = sizes[0]
        self.levels = [Level(*size, _downsample(sizes[0], size)) for size in sizes]
        self.properties = dict(properties)
        self.mpp_x, self.mpp_y, self.mpp_source = resolve_mpp(self.properties, mpp, name)

    @property
    def vendor(self) -> str:
        """OpenSlide's name of the format, `tiff`, `ome-tiff`, `png` or `jpeg`."""
        return self.properties.get("openslide.vendor", "")

    @property
    def bounds(self) -> tuple[int, int, int, int] | None:
        """x, y, width and height of the part that was scanned, level-0 px; None where the slide does not say.

        PistoSeg's coordinates are those of the whole level 0. QuPath instead puts (0, 0) at x, y of these bounds unless
        a slide is opened with `--no-crop`, so what QuPath is to show must be moved by -x, -y.
        """
        try:
            x, y, width, height = (
                int(self.properties[f"openslide.bounds-{part}"]) for part in ("x", "y", "width", "height")
            )
        except (KeyError, ValueError):
            return None
        return x, y, width, height

    def read_region(self, x: int, y: int, width: int, height: int, level: int = 0) -> NDArray[np.uint8]:
        """Pixels of one level; what lies outside of the slide or is transparent is white.

        Args:
            x, y: top left corner, level-0 px; rounded to the nearest pixel of the level.
            width, height: px of the level.
            level: 0 is the largest.
        Returns:
            (height, width, 3) uint8 RGB.
        Raises:
            PistoSegError: the file cannot be read there.
        """
        shape = self.levels[level]
        left, top = round(x / shape.downsample), round(y / shape.downsample)
        x0, x1 = max(left, 0), min(left + width, shape.width)
        y0, y1 = max(top, 0), min(top + height, shape.height)
        if x0 >= x1 or y0 >= y1:
            return np.full((height, width, 3), 255, np.uint8)
        pixels = self._read(x0, y0, x1 - x0, y1 - y0, level)
        if pixels.shape[:2] == (height, width):
            return pixels
        canvas = np.full((height, width, 3), 255, np.uint8)
        canvas[y0 - top : y1 - top, x0 - left : x1 - left] = pixels
        return canvas

    @abstractmethod
    def _read(self, x: int, y: int, width: int, height: int, level: int) -> NDArray[np.uint8]:
        """Pixels inside of a level, all arguments in its own px; (height, width, 3) uint8."""

    @abstractmethod
    def close(self) -> None:
        """Close the file; nothing can be read any more."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_slide(path: str | Path, mpp: float | None = None, name: str | None = None) -> SlideReader:
    """Open a slide on this machine.

    Args:
        path: of a file; of a DICOM series or MIRAX slide, of the file that OpenSlide wants.
        mpp: micrometres per level-0 px where the user knows better than the file.
        name: what errors call it, e.g. the URI that a cached file came from; its path by default.
    Raises:
        UnavailableError: the disk, its rights or full memory keep it from being read.
        PistoSegError: missing, empty, damaged, of an unknown kind, too large to be read piece by piece, without a
            resolution, or of a name that is not UTF-8.
    """
    file, name = str(path), name or str(path)
    require_utf8(file)  # a summary takes no other name
    magic = read_magic(file, name)
    from pistoseg.slides.vendor import OpenSlideReader, describe, detect_vendor

    vendor = detect_vendor(file)
    if vendor is None and magic.startswith(_PICTURE_MAGIC) and extension(file) not in VENDORS:
        from pistoseg.slides.picture import PictureReader

        return PictureReader(file, mpp, name)
    if magic.startswith(_TIFF_MAGIC) and vendor in (None, "generic-tiff", "aperio"):
        from pistoseg.slides import tiff

        if vendor == "aperio":
            slide = tiff.open_aperio(file, mpp, name, *describe(file, name))
            if slide:
                return slide
        elif vendor is None or tiff.count_levels(file, name) >= _openslide_levels(file, name):
            return tiff.TiffReader(file, mpp, name)
    if vendor is None:
        raise _unknown(file, name, magic)
    return OpenSlideReader(file, mpp, name)


def _openslide_levels(file: str, name: str) -> int:
    """Levels of a TIFF of no vendor that OpenSlide can read: none where it has not the compression."""
    from pistoseg.slides.vendor import describe

    try:
        return len(describe(file, name)[0])
    except PistoSegError:
        return 0


def _unknown(file: str, name: str, magic: bytes) -> PistoSegError:
    if extension(file) == ".mrxs":  # the file itself is a small JPEG, the slide is in a folder
        folder = Path(file).with_suffix("").name
        return PistoSegError(
            f"is no slide without the folder {folder} and the Slidedat.ini in it",
            file=name,
            remedy="copy the folder to where the file is",
        )
    return PistoSegError(
        f"is no slide: neither OpenSlide knows it, nor is it a TIFF, PNG or JPEG (it starts with {magic[:8]!r})",
        file=name,
        remedy=f"{COPY_AGAIN}, or {CONVERT}",
    )


def read_magic(file: str, name: str) -> bytes:
    """The first bytes of a file, by which its format is known; errors call it `name`.

    Raises:
        UnavailableError: the disk or its rights keep it from being read.
        PistoSegError: it is missing, empty or a folder.
    """
    try:
        with open(file, "rb") as stream:
            magic = stream.read(16)
    except IsADirectoryError as error:
        raise PistoSegError("is a folder, not a slide", file=name, remedy="name a file in it") from error
    except OSError as error:
        raise unreadable(name, error) from error
    if not magic:
        raise PistoSegError("is empty (0 bytes)", file=name, remedy=COPY_AGAIN)
    return magic


def _downsample(full: tuple[int, int], size: tuple[int, int]) -> float:
    """Level-0 px per px of a level of that size.

    Levels drop or fill up the last odd row and column, so the ratio of sizes is a little off: 2.0005 instead of 2. The
    whole number that explains both sides, a power of 2 if there is one, is what the scanner did.
    """
    ratios = (full[0] / size[0], full[1] / size[1])
    mean = sum(ratios) / 2
    for whole in (2 ** round(math.log2(mean)), round(mean)):
        if all(abs(side * ratio / whole - side) < 1 for side, ratio in zip(size, ratios, strict=True)):
            return float(whole)
    return mean
