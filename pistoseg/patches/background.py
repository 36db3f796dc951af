"""Tissue-free pixels of an image, found by their brightness: one rule from the mosaics to the areas of slides."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from pistoseg.config import DataConfig
from pistoseg.errors import PistoSegError
from pistoseg.pixels import resize_image


@dataclass(frozen=True)
class BackgroundRule:
    """What `data.background=bright` says; see `background_mask`, which it calls.

    Args:
        grey: a pixel whose luma is above this (0-255) is bright.
        min_area: smallest bright component that counts, px.
    """

    grey: int
    min_area: int

    def __call__(self, image: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """(H, W) bool of an (H, W, 3) uint8 image."""
        return background_mask(image, self.grey, self.min_area)

    def scaled(self, image: NDArray[np.uint8], factor: float) -> NDArray[np.bool_]:
        """The same at the image's own size, of an image at another pixel size than the rule's.

        Args:
            image: (H, W, 3) uint8.
            factor: px of the rule per image px.
        """
        height, width = image.shape[:2]
        rows, columns = (max(1, round(side * factor)) for side in (height, width))
        mask = self(resize_image(image, rows, columns))
        if mask.shape == (height, width):
            return mask
        return cv2.resize(mask.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST_EXACT) > 0


def check_background(background: str) -> None:
    """Refuse what says neither that pixels are left out as the model's training did, nor that none are."""
    if background not in ("model", "none"):
        raise PistoSegError(f"{background!r} is not known", field="background", remedy="give model or none")


def background_rule(data: DataConfig) -> BackgroundRule | None:
    """How images are told to be without tissue; None: all of them is tissue."""
    return BackgroundRule(data.background_grey, data.background_min_area) if data.background == "bright" else None


def background_mask(image: NDArray[np.uint8], grey: int = 200, min_area: int = 50) -> NDArray[np.bool_]:
    """Find the bright, tissue-free background.

    Bright specks smaller than min_area are tissue (a lumen, a gap between fibres) and are removed. Dark specks inside
    the background are left as they are: a lone cell is tissue.

    Args:
        image: (H, W, 3) uint8 RGB.
        grey: a pixel whose luma is above this (0-255) is bright.
        min_area: smallest 8-connected bright component that counts, in px.
    Returns:
        (H, W) bool, true where there is no tissue.
    """
    bright = (cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY) > grey).astype(np.uint8)
    components = cv2.connectedComponents(bright, connectivity=8)[1]
    keep = np.bincount(components.ravel()) >= min_area  # in two thirds of the time of its statistics
    keep[0] = False  # component 0 is everything that is not bright
    return np.asarray(keep[components], bool)
