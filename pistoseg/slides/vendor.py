"""Slides that OpenSlide reads: every vendor's format and DICOM."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pistoseg.errors import PistoSegError
from pistoseg.slides.reader import CONVERT, COPY_AGAIN, SlideReader, read_magic

_BLOCK = 512
_DRIFT = 0.01
_CACHE_BYTES = 2**26


def detect_vendor(path: str) -> str | None:
    """OpenSlide's name of a file's format, or None where it knows none."""
    openslide = _openslide()
    try:
        vendor: str | None = openslide.OpenSlide.detect_format(path)
    except openslide.OpenSlideError:
        return None
    return vendor


def describe(path: str, name: str) -> tuple[list[tuple[int, int]], dict[str, str]]:
    """(width, height) of the levels that OpenSlide sees in a file, and its properties; errors call it `name`."""
    with _opened(path, name) as slide:
        return list(slide.level_dimensions), dict(slide.properties)


class OpenSlideReader(SlideReader):
    """A slide that OpenSlide has open; its handle may be used by several threads."""

    def __init__(self, path: str, mpp: float | None, name: str) -> None:
        self._path, self._slide = path, _opened(path, name)
        try:
            super().__init__(name, list(self._slide.level_dimensions), dict(self._slide.properties), mpp)
        except PistoSegError:
            self._slide.close()
            raise
        self._slide.set_cache(_openslide().OpenSlideCache(_CACHE_BYTES))
        # What OpenSlide takes for a level's downsample: the mean ratio of sides, seldom a whole number.
        self._ratios: tuple[float, ...] = self._slide.level_downsamples

    def close(self) -> None:
        """Close the file."""
        self._slide.close()

    def _read(self, x: int, y: int, width: int, height: int, level: int) -> NDArray[np.uint8]:
        ratio, shape = self._ratios[level], self.levels[level]
        if abs(ratio - round(ratio)) * max(shape.width, shape.height) < _DRIFT * ratio:
            return self._paint(x, y, width, height, level)
        # OpenSlide resamples where a corner falls between pixels of the level, and a corner in whole level-0 px often
        # does. Pixels must not depend on where a read starts, so corners are those of fixed blocks.
        out = np.empty((height, width, 3), np.uint8)
        for top in range(y - y % _BLOCK, y + height, _BLOCK):
            for left in range(x - x % _BLOCK, x + width, _BLOCK):
                block = self._paint(left, top, min(_BLOCK, shape.width - left), min(_BLOCK, shape.height - top), level)
                y0, y1 = max(top, y), min(top + _BLOCK, y + height)
                x0, x1 = max(left, x), min(left + _BLOCK, x + width)
                out[y0 - y : y1 - y, x0 - x : x1 - x] = block[y0 - top : y1 - top, x0 - left : x1 - left]
        return out

    def _paint(self, x: int, y: int, width: int, height: int, level: int) -> NDArray[np.uint8]:
        """Pixels from x, y of a level on, (height, width, 3) uint8."""
        import cv2

        ratio = self._ratios[level]
        corner = (round(x * ratio), round(y * ratio))
        try:
            pixels = np.asarray(self._slide.read_region(corner, level, (width, height)))
        except _openslide().OpenSlideError as error:
            read_magic(self._path, self.name)  # OpenSlide does not tell what the disk says from damage
            raise PistoSegError(
                f"cannot be read at level {level}, x {x}, y {y} px ({error})", file=self.name, remedy=COPY_AGAIN
            ) from error
        rgb: Any = cv2.cvtColor(pixels, cv2.COLOR_RGBA2RGB)
        alpha = pixels[..., 3:]
        if alpha.min() < 255:
            weight = alpha.astype(np.float32) / 255
            rgb = np.round(rgb * weight + 255 * (1 - weight)).astype(np.uint8)
        return rgb


def _opened(path: str, name: str) -> Any:
    openslide = _openslide()
    try:
        return openslide.OpenSlide(path)
    except openslide.OpenSlideError as error:
        read_magic(path, name)  # OpenSlide does not tell what the disk says from damage
        raise PistoSegError(
            f"OpenSlide cannot open it ({error})", file=name, remedy=f"{COPY_AGAIN}, or {CONVERT}"
        ) from error


def _openslide() -> Any:
    try:
        import openslide
    except (ImportError, OSError) as error:  # without its library, the module raises ModuleNotFoundError or OSError
        raise PistoSegError(
            f"OpenSlide cannot be loaded ({error})", remedy="pip install openslide-python openslide-bin"
        ) from error
    return openslide
