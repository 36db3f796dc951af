"""Crops of single-tissue images, drawn by the hundred and spliced in one copy."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pistoseg.errors import PistoSegError
from pistoseg.synthesis.bank import TissueBank
from pistoseg.synthesis.sampling import ImageSampler, Numbers

_WIDE = 64
"""From this width (px) on, crops are copied one by one and only as far as they are seen; narrower ones, of which there
are many, all at once by whole rows."""


class Crops(NamedTuple):
    """Some crops, each H_p x W_p px.

    Args:
        images: int64 image numbers.
        starts: int64, the bank's pixel in each crop's top left corner.
        strides: int64, pixels from one row of a crop to the next: its image's width.
    """

    images: NDArray[np.int64]
    starts: NDArray[np.int64]
    strides: NDArray[np.int64]

    def grid(self, first: int, rows: int, columns: int) -> Crops:
        """The rows*columns crops from `first` on as a grid in raster order."""
        images, starts, strides = self
        part, shape = slice(first, first + rows * columns), (rows, columns)
        return Crops(images[part].reshape(shape), starts[part].reshape(shape), strides[part].reshape(shape))


class CropSource:
    """Where crops come from: an image by class sampling, then a place in it, uniformly.

    A crop with too large a share of background is redrawn, at most `max_redraws` times; then it is taken as it is.

    Args:
        bank: the single-tissue images.
        sampler: draws image numbers.
        height: H_p (px).
        width: W_p (px).
        background_threshold: largest share of background, 0-1; 1: anything goes.
        max_redraws: redraws of one crop at the most.
    Raises:
        PistoSegError: some images are smaller than a crop.
    """

    def __init__(
        self,
        bank: TissueBank,
        sampler: ImageSampler,
        height: int,
        width: int,
        background_threshold: float = 1.0,
        max_redraws: int = 10,
    ) -> None:
        small = int(((bank.shapes[:, 0] < height) | (bank.shapes[:, 1] < width)).sum())
        if small:
            raise PistoSegError(
                f"{small} of {len(bank)} single-tissue images are smaller than a crop of {height}x{width} px",
                field="synthesis.crop_height",
                remedy=f"pack the bank for this crop, TissueBank.from_images(..., crop=({height}, {width})), "
                "or make the crop smaller",
            )
        self.height = height
        self.width = width
        self._rejected = None
        if background_threshold < 1 and max_redraws > 0:
            self._rejected = bank.with_rejection(height, width, background_threshold).rejected
        self._max_redraws = max_redraws
        self._sampler = sampler
        self._pixels = bank.pixels
        self._runs = bank.runs(width)
        self._offsets = bank.offsets
        self._strides = bank.shapes[:, 1].astype(np.int64)
        self._places = bank.shapes.astype(np.int64) - (height - 1, width - 1)  # (n, 2): possible top left corners
        self._row = np.arange(height)[:, None]

    def draw(self, numbers: Numbers, counts: NDArray[np.int64]) -> Crops:
        """Draw crops, as many for each of the samples as `counts` (n,) says, in the order of the samples."""
        images = self._sampler.draw(numbers, counts)
        starts = self._place(numbers, counts, images)
        if self._rejected is not None:
            self._redraw(numbers, counts, images, starts)
        return Crops(images, starts, self._strides.take(images))

    def splice(self, crops: Crops, seen: tuple[int, int, int, int] | None = None) -> NDArray[np.uint8]:
        """Splice a grid of crops in raster order.

        Args:
            crops: (rows, columns) crops.
            seen: the part of the grid that is wanted: top, left, height and width (px); None: all of it.
        Returns:
            (height, width, 4) uint8, RGB and tissue.
        """
        rows, columns = crops.starts.shape
        top, left, height, width = seen or (0, 0, rows * self.height, columns * self.width)
        if self.width < _WIDE:
            runs = crops.starts[:, None, :] + crops.strides[:, None, :] * self._row
            lines = self._runs[runs.reshape(-1, columns)[top : top + height]]
            return lines.view(np.uint8).reshape(height, -1, 4)[:, left : left + width]
        part = np.empty((height, width), np.uint32)
        for i, (starts, strides) in enumerate(zip(crops.starts.tolist(), crops.strides.tolist(), strict=True)):
            y = i * self.height - top
            first, last = max(0, -y), min(self.height, height - y)
            for j, (start, stride) in enumerate(zip(starts, strides, strict=True)):
                x = j * self.width - left
                begin, end = max(0, -x), min(self.width, width - x)
                shape, from_pixel = (last - first, end - begin), start + first * stride + begin
                crop = np.ndarray(shape, np.uint32, self._pixels, 4 * from_pixel, (4 * stride, 4))
                part[y + first : y + last, x + begin : x + end] = crop
        return part.view(np.uint8).reshape(height, width, 4)

    def _place(self, numbers: Numbers, counts: NDArray[np.int64], images: NDArray[np.int64]) -> NDArray[np.int64]:
        corners = (numbers.take(2 * counts).reshape(-1, 2) * self._places.take(images, 0)).astype(np.int64)
        return self._offsets.take(images) + corners[:, 0] * self._strides.take(images) + corners[:, 1]

    def _redraw(
        self, numbers: Numbers, counts: NDArray[np.int64], images: NDArray[np.int64], starts: NDArray[np.int64]
    ) -> None:
        assert self._rejected is not None
        samples = np.repeat(np.arange(len(counts)), counts)
        bad = self._rejected.take(starts).nonzero()[0]
        for _ in range(self._max_redraws):
            if not len(bad):
                return
            counts = np.bincount(samples.take(bad), minlength=len(counts))
            substitutes = self._sampler.redraw(numbers, counts, images.take(bad))
            images[bad] = substitutes
            starts[bad] = places = self._place(numbers, counts, substitutes)
            bad = bad[self._rejected.take(places)]
