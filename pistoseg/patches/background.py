"""Tissue-free pixels of a training image, found by their brightness."""

from __future__ import annotations

import cv2
import numpy as np


def background_mask(image: np.ndarray, grey: int = 200, min_area: int = 50) -> np.ndarray:
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
    _, components, stats, _ = cv2.connectedComponentsWithStats(bright, connectivity=8)
    keep = stats[:, cv2.CC_STAT_AREA] >= min_area
    keep[0] = False  # component 0 is everything that is not bright
    return keep[components]
