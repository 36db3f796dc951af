"""Images with image-level labels that no network is trained on: what a segmentation model says about their windows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pistoseg.config import DataConfig
from pistoseg.models.bundle import Segmenter
from pistoseg.patches.background import background_rule
from pistoseg.patches.store import PatchSet

MOST = 200
"""Images that a training looks at after an epoch, spread over all of them."""


@dataclass(frozen=True)
class LabelledImages:
    """Held-out images of a `patches` artifact.

    Args:
        uri: of their `PatchSet`.
        data: says which pixels are tissue-free.
    """

    uri: str
    data: DataConfig

    def areas(
        self, segmenter: Segmenter, rank: int = 0, world: int = 1
    ) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
        """Labels and areas, (n, L) each, of the windows of every world-th of at most `MOST` images."""
        patches = PatchSet.open(self.uri)
        chosen = np.unique(np.linspace(0, len(patches) - 1, min(MOST, len(patches))).round().astype(int))
        classes = patches.labels.shape[1]
        labels, areas = [np.zeros((0, classes), np.uint8)], [np.zeros((0, classes))]
        predictor = segmenter.predictor()  # the segmenter itself would bring the images to its pixel size once more
        positions = chosen[rank::world].tolist()
        for position, image in zip(positions, patches.images(positions), strict=True):
            flags, shares = window_areas(patches, position, predictor.predict(image), self.tissue(image))
            labels.append(flags)
            areas.append(shares)
        return np.concatenate(labels), np.concatenate(areas)

    def tissue(self, image: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Which pixels of an image are tissue, (H, W)."""
        rule = background_rule(self.data)
        return np.ones(image.shape[:2], bool) if rule is None else ~rule(image)


def window_areas(
    patches: PatchSet, position: int, mask: NDArray[np.uint8], tissue: NDArray[np.bool_]
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Which share of the tissue each class covers in the windows of an image; windows without tissue are left out.

    Args:
        patches: the images.
        position: of the image.
        mask: (H, W) class ids.
        tissue: (H, W) bool.
    Returns:
        Labels (n, L) and areas (n, L) of its windows.
    """
    classes = patches.labels.shape[1]
    labels, areas = [], []
    for window, (x, y, width, height) in patches.boxes(position):
        inside = mask[y : y + height, x : x + width][tissue[y : y + height, x : x + width]]
        if inside.size:
            labels.append(patches.labels[window])
            areas.append(np.bincount(inside, minlength=classes)[:classes] / inside.size)
    return np.array(labels, np.uint8).reshape(-1, classes), np.array(areas, np.float64).reshape(-1, classes)
