"""What tiles go through on their way into a network and back: cut, turned, zoomed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Pixel = TypeVar("Pixel", np.uint8, np.float32)

MULTIPLE = 32
"""Tiles are padded to multiples of this, the coarsest grid of the usual encoders."""


def cut_tile(image: NDArray[Pixel], origin: tuple[int, int], shape: tuple[int, int]) -> NDArray[Pixel]:
    """A tile of (H, W, C) pixels; where they end they are mirrored, or the edge is repeated if they are too few."""
    y, x = origin
    part = image[y : y + shape[0], x : x + shape[1]]
    down, right = shape[0] - part.shape[0], shape[1] - part.shape[1]
    if not down and not right:
        return part
    mirror = down < part.shape[0] and right < part.shape[1]
    return np.pad(part, ((0, down), (0, right), (0, 0)), mode="reflect" if mirror else "edge")


def turn(tiles: Tensor, quarters: int, flip: bool) -> Tensor:
    """(N, C, h, w) turned by quarters as `torch.rot90` does, then flipped from left to right, in at most one copy."""
    turned = _flipped(tiles, quarters, flip)
    return turned.mT if quarters % 2 else turned


def turn_back(maps: Tensor, quarters: int, flip: bool) -> Tensor:
    """The inverse of `turn`."""
    return _flipped(maps.mT if quarters % 2 else maps, quarters, flip)


def _flipped(maps: Tensor, quarters: int, flip: bool) -> Tensor:
    # A turn by 1 or 3 quarters is a flip and a transposition, behind which left and right are up and down.
    down, right = quarters in (2, 3), quarters in (1, 2)
    if flip:
        down, right = (not down, right) if quarters % 2 else (down, not right)
    axes = [axis for axis, flips in ((2, down), (3, right)) if flips]
    return maps.flip(axes) if axes else maps


def zoomed(tiles: Tensor, scale: float) -> Tensor:
    """Tiles (N, 3, h, w) resized by a factor and padded to what encoders take."""
    if scale == 1:
        return tiles
    size = _zoomed_size(tiles.shape[2:], scale)
    small = F.interpolate(tiles, size=size, mode="bilinear", antialias=True, align_corners=False)
    down, right = (-side % MULTIPLE for side in size)
    return F.pad(small, (0, right, 0, down), mode="replicate")


def unzoomed(maps: Tensor, size: Sequence[int], scale: float) -> Tensor:
    """Maps of `zoomed` tiles at the tiles' own size."""
    if scale == 1:
        return maps
    height, width = _zoomed_size(size, scale)
    return F.interpolate(
        maps[:, :, :height, :width], size=tuple(size), mode="bilinear", antialias=True, align_corners=False
    )


def _zoomed_size(size: Sequence[int], scale: float) -> tuple[int, int]:
    height, width = (max(1, round(side * scale)) for side in size)
    return height, width
