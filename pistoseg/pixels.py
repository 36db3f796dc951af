"""Resizing and tiling of images: one way for training, evaluation and slides, so that they see the same pixels."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray


def resize_image(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Resize (H, W, 3) uint8 by area where it shrinks, bilinearly where it grows."""
    if image.shape[:2] == (height, width):
        return image
    shrinks = height * width < image.shape[0] * image.shape[1]
    kind = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    resized = cv2.resize(np.ascontiguousarray(image), (width, height), interpolation=kind)
    return resized.astype(np.uint8, copy=False)


def tile_starts(size: int, tile: int, stride: int) -> list[int]:
    """Where tiles start along a side (px): every `stride`, the last one aligned to the border."""
    if size <= tile:
        return [0]
    return [*range(0, size - tile, stride), size - tile]
