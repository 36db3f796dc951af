"""A slide as one virtual image at the model's resolution, of which any part can be read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from pistoseg.slides.reader import SlideReader

Number = TypeVar("Number", float, NDArray[np.float64])

COARSER = 1.02
"""A level this much coarser than the view still serves as the finer one: 4.05 instead of 4 is not worth 16 times the
pixels."""
_SOURCE_SIDE = 2048
_DRIFT = 0.05
_ROWS = 32


class _Taps(NamedTuple):
    """How view pixels in a row are made of a level's pixels.

    Args:
        first, stop: level px that are needed.
        source: (K, n) int, level px counted from first.
        weight: (K, n) float32, sums to 1 over K.
        whole: level px per view px where this is a whole number and view px are exactly so many level px.
    """

    first: int
    stop: int
    source: NDArray[np.int64]
    weight: NDArray[np.float32]
    whole: int | None


class SlideView:
    """A slide resampled to a pixel size, on demand.

    View pixel (i, j) is the area from (i, j) to (i + 1, j + 1) times `scale` on level 0, measured from the corner of
    the slide. Where the view is coarser than the level that it reads, a pixel is the mean over its area, parts of level
    pixels counted as parts; where it is finer, it is interpolated bilinearly between pixel centres. So what is read
    does not depend on how the reads are cut, but for one grey level of rounding in reads that reach a last row or
    column which is less than a view pixel. Anisotropic pixels become square.

    Args:
        reader: an open slide; it stays the caller's to close.
        mpp: micrometres per view pixel, in both directions; None for level 0 as it is.

    Attributes:
        width, height: view px.
        mpp_x, mpp_y: micrometres per view px.
        scale_x, scale_y: level-0 px per view px.
        level: the level that is read: the coarsest one that is not coarser than the view, or 0.
    """

    def __init__(self, reader: SlideReader, mpp: float | None) -> None:
        self.reader = reader
        self.mpp_x = reader.mpp_x if mpp is None else mpp
        self.mpp_y = reader.mpp_y if mpp is None else mpp
        self.scale_x = _snapped(self.mpp_x / reader.mpp_x, reader.width)
        self.scale_y = _snapped(self.mpp_y / reader.mpp_y, reader.height)
        self.width = max(1, round(reader.width / self.scale_x))
        self.height = max(1, round(reader.height / self.scale_y))
        fine = [
            number
            for number, level in enumerate(reader.levels)
            if level.downsample <= min(self.scale_x, self.scale_y) * COARSER
        ]
        self.level = max(fine, key=lambda number: reader.levels[number].downsample, default=0)

    def to_level0(self, x: Number, y: Number) -> tuple[Number, Number]:
        """Level-0 px of points in view px (corners of pixels are whole numbers in both)."""
        return x * self.scale_x, y * self.scale_y

    def read(self, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        """Pixels of a part of the view; what lies outside of it is white.

        Level pixels are read in pieces of at most about 2048 x 2048, whatever the level.

        Args:
            x, y, width, height: view px.
        Returns:
            (height, width, 3) uint8 RGB.
        Raises:
            PistoSegError: the slide cannot be read there.
        """
        x0, x1 = max(x, 0), min(x + width, self.width)
        y0, y1 = max(y, 0), min(y + height, self.height)
        if (x0, y0, x1, y1) == (x, y, x + width, y + height):
            out = np.empty((height, width, 3), np.uint8)
        else:
            out = np.full((height, width, 3), 255, np.uint8)
        level = self.reader.levels[self.level]
        ratio_x, ratio_y = self.scale_x / level.downsample, self.scale_y / level.downsample
        for top, bottom in _pieces(y0, y1, ratio_y):
            rows = _taps(top, bottom, ratio_y, level.height)
            for left, right in _pieces(x0, x1, ratio_x):
                columns = _taps(left, right, ratio_x, level.width)
                out[top - y : bottom - y, left - x : right - x] = self._piece(rows, columns)
        return out

    def thumbnail(self) -> NDArray[np.uint8]:
        """The whole view, (height, width, 3) uint8."""
        return self.read(0, 0, self.width, self.height)

    def _piece(self, rows: _Taps, columns: _Taps) -> NDArray[np.uint8]:
        downsample = self.reader.levels[self.level].downsample
        source = self.reader.read_region(
            round(columns.first * downsample),
            round(rows.first * downsample),
            columns.stop - columns.first,
            rows.stop - rows.first,
            self.level,
        )
        if rows.whole == columns.whole == 1:
            return source
        if rows.whole and columns.whole:
            size = (columns.source.shape[1], rows.source.shape[1])
            return np.asarray(cv2.resize(source, size, interpolation=cv2.INTER_AREA), np.uint8)
        return _resampled(source, rows, columns)


def _snapped(scale: float, size: int) -> float:
    """A scale that is a whole number but for the rounding of what it is computed from, as that number.

    Args:
        scale: level-0 px per view px.
        size: level-0 px; at its end the two may be 1/20 px apart.
    """
    whole = round(scale)
    return float(whole) if whole and abs(scale / whole - 1) * size < _DRIFT else scale


def _pieces(start: int, stop: int, ratio: float) -> Iterator[tuple[int, int]]:
    step = max(1, int(_SOURCE_SIDE / ratio))
    for first in range(start, stop, step):
        yield first, min(first + step, stop)


def _taps(start: int, stop: int, ratio: float, size: int) -> _Taps:
    """The taps of view px start to stop.

    Args:
        ratio: level px per view px.
        size: of the level (px).
    """
    number = np.arange(start, stop, dtype=np.float64)
    if ratio >= 1:
        low = np.minimum(number * ratio, size - 1)
        high = np.clip((number + 1) * ratio, low + 1e-3, size)
        base = np.floor(low).astype(np.int64)
        taps = base + np.arange(math.ceil(ratio) + 1)[:, None]
        weight = np.clip(np.minimum(high, taps + 1) - np.maximum(low, taps), 0, None)
        weight[weight < 1e-9 * ratio] = 0
        weight /= weight.sum(0)
    else:
        center = np.clip((number + 0.5) * ratio - 0.5, 0, size - 1)
        base = np.floor(center).astype(np.int64)
        taps = base + np.arange(2)[:, None]
        weight = np.stack([1 - (center - base), center - base])
    used = weight.any(1)
    taps, weight = np.minimum(taps[used], size - 1), weight[used]
    first, last = int(taps.min()), int(taps[weight > 0].max()) + 1
    exact = ratio == round(ratio) and stop * ratio <= size
    index = np.minimum(taps, last - 1) - first
    return _Taps(first, last, index, weight.astype(np.float32), round(ratio) if exact else None)


def _resampled(source: NDArray[np.uint8], rows: _Taps, columns: _Taps) -> NDArray[np.uint8]:
    """Both axes, a few rows at a time: arrays that stay in the processor's cache make this five times faster."""
    height, width = rows.source.shape[1], columns.source.shape[1]
    out = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, _ROWS):
        tall = _mix(source, rows.source[:, top : top + _ROWS], rows.weight[:, top : top + _ROWS])
        wide = _mix(cv2.transpose(tall), columns.source, columns.weight)
        out[top : top + _ROWS] = cv2.convertScaleAbs(cv2.transpose(wide))  # rounds and clips
    return out


def _mix(pixels: NDArray, index: NDArray[np.int64], weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows made of rows: (H, W, 3) of any number -> (n, W, 3) float32; index and weight are (K, n)."""
    total = np.multiply(pixels[index[0]], weight[0, :, None, None], dtype=np.float32)
    for rows, share in zip(index[1:], weight[1:], strict=True):
        total += np.multiply(pixels[rows], share[:, None, None], dtype=np.float32)
    return total
