"""PNG and JPEG as slides of one level, decoded once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pistoseg.errors import PistoSegError
from pistoseg.patches.decode import decode_rgb, read_file
from pistoseg.slides.reader import CONVERT, MAX_UNTILED_PIXELS, SlideReader


class PictureReader(SlideReader):
    """A PNG or JPEG in memory; its resolution has to be given."""

    def __init__(self, path: str, mpp: float | None, name: str) -> None:
        data = read_file(path, name)
        properties = {"openslide.vendor": "png" if data.startswith(b"\x89PNG") else "jpeg"}
        try:
            self._pixels = decode_rgb(data, name, max_pixels=MAX_UNTILED_PIXELS)
        except PistoSegError as error:
            if error.field == "size":  # its own remedy is about training images
                raise PistoSegError(error.reason, file=name, field="size", remedy=CONVERT) from error
            raise
        height, width = self._pixels.shape[:2]
        super().__init__(name, [(width, height)], properties, mpp)

    def close(self) -> None:
        """Free the pixels."""
        self._pixels = np.empty((0, 0, 3), np.uint8)

    def _read(self, x: int, y: int, width: int, height: int, level: int) -> NDArray[np.uint8]:
        return self._pixels[y : y + height, x : x + width].copy()
