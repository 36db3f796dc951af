"""The Mosaic transformation (eq. 1): four spliced, rotated and scaled images meet at an anchor.

The paper splices four images of n_h H_p x n_w W_p px, flips, rotates and scales each, crops each to its quadrant and
puts the four crops in the corners. Here flip, rotation, scaling and crop are one affine map from the quadrant back to
the spliced image. Only the cells of the splice that this map reaches are drawn, and only the pixels of them that it
reaches are copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from pistoseg.synthesis.crops import Crops, CropSource
from pistoseg.synthesis.sampling import Numbers

if TYPE_CHECKING:
    from pistoseg.config import SynthesisConfig

_GRID = 4096
"""Maps are rounded to 1/4096, so that float32 source coordinates are exact up to 1024 px: warping a part of an image
is the same, to the bit, as a part of the warped image, whatever its origin."""
_OFF_TIE = 0.5 / _GRID  # no coordinate falls half-way between two pixels, where flipping would change the nearest one

_IMAGE = cv2.WARP_INVERSE_MAP | cv2.INTER_LINEAR
_MASK = cv2.WARP_INVERSE_MAP | cv2.INTER_NEAREST
_DRAWS = 9  # random numbers of a quadrant's geometry
_BEHIND = np.array([(0, 0), (1, 0), (0, 1), (1, 1)], bool)
"""Whether the quadrants of I1 to I4 (eq. 1) lie below the anchor, and to the right of it."""
_IDENTITY = np.eye(2, 3)


class Quadrants(NamedTuple):
    """What was drawn for the quadrants of n mosaics, in the order of eq. 1: I1 to I4.

    Pairs are (y, x). Maps are affine, (2, 3) as OpenCV takes them with WARP_INVERSE_MAP: source coordinates (x, y) of a
    pixel (x, y).

    Args:
        corner: (n, 4, 2) int64, where the quadrant begins in the mosaic (px).
        size: (n, 4, 2) int64, its height and width (px).
        flipped: (n, 4, 2) bool, whether the spliced image is flipped upside down, and left to right.
        warped: (n, 4) bool, whether it is rotated and scaled.
        warp: (n, 4, 2, 3) float64, the rotated and scaled image's pixels -> the flipped spliced image.
        crop: (n, 4, 2) int64, where the rotated and scaled image is cropped (px).
        first_cell: (n, 4, 2) int64, first row and column of the splice's cells that the quadrant shows.
        cells: (n, 4, 2) int64, rows and columns of cells from there on that it shows.
        seen_corner: (n, 4, 2) int64, where in these cells that begins which it shows (px, from their corner).
        seen_size: (n, 4, 2) int64, height and width of it (px).
        source: (n, 4, 2, 3) float64, the quadrant's pixels -> what is seen: flip, warp and crop in one map.
    """

    corner: NDArray[np.int64]
    size: NDArray[np.int64]
    flipped: NDArray[np.bool]
    warped: NDArray[np.bool]
    warp: NDArray[np.float64]
    crop: NDArray[np.int64]
    first_cell: NDArray[np.int64]
    cells: NDArray[np.int64]
    seen_corner: NDArray[np.int64]
    seen_size: NDArray[np.int64]
    source: NDArray[np.float64]


class Mosaic:
    """Draws mosaics.

    Args:
        source: gives the crops.
        config: geometry: n_h, n_w, alpha, beta, and the transform's ranges.
    """

    def __init__(self, source: CropSource, config: SynthesisConfig) -> None:
        self._source = source
        self._config = config
        self._side = np.array((config.height, config.width))
        self._anchors = np.array(config.anchors())
        self._cell = np.array((config.crop_height, config.crop_width))

    def samples(self, numbers: Numbers) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
        """Mosaics: (H, W, 4) uint8 whose first three bytes are RGB, with their (H, W) uint8 bank masks."""
        return self.compose(*self.plan(numbers))

    def plan(self, numbers: Numbers) -> tuple[Quadrants, Crops]:
        """Draw all that is random: the quadrants, and the crops that they show, those of the first quadrant first."""
        quadrants = self._quadrants(numbers.take(2 + 4 * _DRAWS).reshape(len(numbers), -1))
        return quadrants, self._source.draw(numbers, quadrants.cells.prod(-1).sum(-1))

    def compose(self, quadrants: Quadrants, crops: Crops) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
        """Make the mosaics that were drawn, one after the other."""
        plans = zip(
            *(values.tolist() for values in (quadrants.corner, quadrants.size, quadrants.cells)),
            np.concatenate((quadrants.seen_corner, quadrants.seen_size), -1).tolist(),
            quadrants.warped.tolist(),
            quadrants.source,
            strict=True,
        )
        first = 0
        for plan in plans:
            image = np.empty((*self._side, 4), np.uint8)
            mask = np.empty(self._side, np.uint8)
            for (top, left), (height, width), (rows, columns), seen, warped, source in zip(*plan, strict=True):
                block = self._source.splice(crops.grid(first, rows, columns), seen)
                first += rows * columns
                place = np.s_[top : top + height, left : left + width]
                (_warp if warped else _cut)(block, source, image[place], mask[place])
            yield image, mask

    def _quadrants(self, u: NDArray[np.float64]) -> Quadrants:
        config, side = self._config, self._side
        anchor = _pick(u[:, :2], *self._anchors.T)[:, None]
        size = np.where(_BEHIND, side - anchor, anchor)
        u = u[:, 2:].reshape(-1, 4, _DRAWS)
        flipped = u[..., :2] < config.flip
        warped = u[..., 2] < config.transform_probability
        angle, scale, shift = (
            _between(part, limit)
            for part, limit in ((u[..., 3], config.rotate), (u[..., 4], config.scale), (u[..., 5:7], config.shift))
        )
        warp = np.where(warped[..., None, None], rotation_and_scale(side, angle, 1 + scale, shift), _IDENTITY)
        crop = _pick(u[..., 7:], 0, side - size)
        source = _composed(warp, flipped, crop, side)
        first, last = _reached(source, size, side)
        source[..., 2] -= first[..., ::-1]
        first_cell, seen_corner = np.divmod(first, self._cell)
        return Quadrants(
            corner=np.where(_BEHIND, anchor, 0),
            size=size,
            flipped=flipped,
            warped=warped,
            warp=warp,
            crop=crop,
            first_cell=first_cell,
            cells=last // self._cell + 1 - first_cell,
            seen_corner=seen_corner,
            seen_size=last - first + 1,
            source=source,
        )


def rotation_and_scale(
    side: NDArray[np.int64], angle: NDArray[np.float64], scale: NDArray[np.float64], shift: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The map of an image that is rotated and scaled about its centre, then shifted.

    Args:
        side: (2,) height and width of the image (px).
        angle: (...,) degrees, counter-clockwise.
        scale: (...,) factor; above 1 enlarges.
        shift: (..., 2) downwards, as a share of the height, and to the right, as a share of the width.
    Returns:
        (..., 2, 3), from pixels of the result to pixels of the image, rounded to 1/4096.
    """
    cosine, sine = np.cos(np.radians(angle)) / scale, np.sin(np.radians(angle)) / scale
    centre_y, centre_x = (side - 1) / 2
    from_y, from_x = np.moveaxis((side - 1) / 2 + shift * side, -1, 0)
    x0 = centre_x - cosine * from_x + sine * from_y
    y0 = centre_y - sine * from_x - cosine * from_y
    warp = np.stack((cosine, -sine, x0, sine, cosine, y0), -1).reshape(*np.shape(angle), 2, 3)
    warp = np.rint(warp * _GRID) / _GRID
    warp[..., 2] += _OFF_TIE
    return warp


def _warp(
    block: NDArray[np.uint8], source: NDArray[np.float64], image: NDArray[np.uint8], mask: NDArray[np.uint8]
) -> None:
    """Fill a quadrant's image (h, w, 4) and mask (h, w) from what is seen of its cells, (h, w, 4)."""
    size = mask.shape[::-1]
    cv2.warpAffine(block, source, size, image, _IMAGE, cv2.BORDER_REFLECT_101)
    cv2.warpAffine(cv2.extractChannel(block, 3), source, size, mask, _MASK, cv2.BORDER_REFLECT_101)


def _cut(
    block: NDArray[np.uint8], source: NDArray[np.float64], image: NDArray[np.uint8], mask: NDArray[np.uint8]
) -> None:
    """The same for a quadrant that is neither rotated nor scaled: a copy, several times faster."""
    (across, _, x), (_, down, y) = source.astype(int).tolist()  # a flip counts downwards
    height, width = mask.shape
    image.view(np.uint32)[..., 0] = block.view(np.uint32)[y::down, x::across, 0][:height, :width]
    mask[:] = image[..., 3]


def _composed(
    warp: NDArray[np.float64], flipped: NDArray[np.bool], crop: NDArray[np.int64], side: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Crop, then warp, then flip, as one map from the cropped image to the spliced one: (..., 2, 3)."""
    composed = warp.copy()
    composed[..., 2] += (warp[..., :2] * crop[..., None, ::-1]).sum(-1)
    flipped, last = flipped[..., ::-1], side[::-1] - 1  # (x, y), as the rows of a map
    composed[flipped] *= -1
    composed[..., 2] += flipped * last
    return composed


def _reached(
    source: NDArray[np.float64], size: NDArray[np.int64], side: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First and last source row and column that a quadrant's pixels reach, reflected at the borders: (..., 2) each."""
    reach = source[..., ::-1, :2] * (size[..., None, ::-1] - 1)  # by a row of pixels, by a column of them
    origin = source[..., ::-1, 2]
    low = np.floor(origin + np.minimum(reach, 0).sum(-1)).astype(np.int64)
    high = np.floor(origin + np.maximum(reach, 0).sum(-1)).astype(np.int64) + 1  # bilinear reads one pixel further
    border = side - 1
    first = np.where(high > border, np.minimum(np.maximum(low, 0), 2 * border - high), low)
    last = np.where(low < 0, np.maximum(high, -low), high)
    return np.clip(first, 0, border), np.clip(last, 0, border)


def _pick(u: NDArray[np.float64], low: int | NDArray[np.int64], high: NDArray[np.int64]) -> NDArray[np.int64]:
    """Whole numbers between two, both included, from u in [0, 1)."""
    return low + (u * (high - low + 1)).astype(np.int64)


def _between(u: NDArray[np.float64], limit: float) -> NDArray[np.float64]:
    """Numbers in [-limit, limit) from u in [0, 1)."""
    return (2 * u - 1) * limit
