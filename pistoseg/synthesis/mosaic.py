"""The Mosaic transformation (eq. 1): four spliced, rotated and scaled images meet at an anchor.

The paper splices four images of n_h H_p x n_w W_p px, flips, rotates and scales each, crops each to its quadrant and
puts the four crops in the corners. Here flip, rotation, scaling and crop are one affine map from the quadrant back to
the spliced image. Only the cells of the splice that this map reaches are drawn, and only the pixels of them that it
reaches are copied.
"""

from __future__ import annotations

import math
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from pistoseg.errors import PistoSegError
from pistoseg.synthesis.crops import Crops, CropSource

if TYPE_CHECKING:
    from pistoseg.config import SynthesisConfig

_GRID = 4096
"""Maps are rounded to 1/4096, so that float32 source coordinates are exact up to 1024 px: warping a part of an image
is the same, to the bit, as a part of the warped image, whatever its origin."""
_OFF_TIE = 0.5 / _GRID  # no coordinate falls half-way between two pixels, where flipping would change the nearest one

_IMAGE = cv2.WARP_INVERSE_MAP | cv2.INTER_LINEAR
_MASK = cv2.WARP_INVERSE_MAP | cv2.INTER_NEAREST
_DRAWS = 9  # random numbers of a quadrant's geometry


class Affine(NamedTuple):
    """Source coordinates of a pixel (x, y): (xx x + xy y + x0, yx x + yy y + y0)."""

    xx: float
    xy: float
    x0: float
    yx: float
    yy: float
    y0: float

    def matrix(self) -> NDArray[np.float64]:
        """As OpenCV takes it with WARP_INVERSE_MAP: (2, 3) float64."""
        return np.array(self).reshape(2, 3)


IDENTITY = Affine(1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


class Quadrant(NamedTuple):
    """What was drawn for one spliced image.

    Args:
        top, left, height, width: the quadrant's place in the mosaic (px).
        flip_y, flip_x: whether the spliced image is flipped upside down, and left to right.
        warp: the rotated and scaled image's pixels -> the flipped spliced image.
        crop_y, crop_x: where the rotated and scaled image is cropped (px).
        rows, columns: first and last-plus-one cell of the splice that the quadrant shows.
        seen: the part of these cells that the quadrant shows: top, left, height and width (px, from their corner).
        source: the quadrant's pixels -> the part that is seen: flip, warp and crop in one map.
    """

    top: int
    left: int
    height: int
    width: int
    flip_y: bool
    flip_x: bool
    warp: Affine
    crop_y: int
    crop_x: int
    rows: tuple[int, int]
    columns: tuple[int, int]
    seen: tuple[int, int, int, int]
    source: Affine

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of visible cells."""
        return self.rows[1] - self.rows[0], self.columns[1] - self.columns[0]


class Mosaic:
    """Draws mosaics.

    Args:
        source: gives the crops.
        config: geometry: n_h, n_w, alpha, beta, and the transform's ranges.
    Raises:
        PistoSegError: no whole pixel lies between alpha and beta.
    """

    def __init__(self, source: CropSource, config: SynthesisConfig) -> None:
        self._source = source
        self._config = config
        self._height = config.height
        self._width = config.width
        self._anchor_y = _anchors(config.alpha, config.beta, self._height)
        self._anchor_x = _anchors(config.alpha, config.beta, self._width)

    def sample(self, rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """One mosaic: (H, W, 4) uint8 whose first three bytes are RGB, and its (H, W) uint8 bank mask."""
        return self.compose(*self.plan(rng))

    def plan(self, rng: np.random.Generator) -> tuple[list[Quadrant], list[Crops]]:
        """Draw all that is random: the four quadrants in the order of eq. 1 (I1 to I4) and the crops they show."""
        quadrants = self._quadrants(rng)
        shapes = [quadrant.shape for quadrant in quadrants]
        ends = [0, *accumulate(rows * columns for rows, columns in shapes)]
        crops = self._source.draw(rng, ends[-1])
        return quadrants, [crops.grid(first, *shape) for first, shape in zip(ends, shapes, strict=False)]

    def compose(self, quadrants: list[Quadrant], grids: list[Crops]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Make the mosaic that was drawn."""
        image = np.empty((self._height, self._width, 4), np.uint8)
        mask = np.empty((self._height, self._width), np.uint8)
        for quadrant, crops in zip(quadrants, grids, strict=True):
            block = self._source.splice(crops, quadrant.seen)
            place = np.s_[quadrant.top : quadrant.top + quadrant.height, quadrant.left : quadrant.left + quadrant.width]
            if quadrant.warp == IDENTITY:
                _cut(block, quadrant, image[place], mask[place])
            else:
                _warp(block, quadrant, image[place], mask[place])
        return image, mask

    def _quadrants(self, rng: np.random.Generator) -> list[Quadrant]:
        u = rng.random(2 + 4 * _DRAWS).tolist()
        y, x = _pick(u[0], self._anchor_y), _pick(u[1], self._anchor_x)
        below, beside = self._height - y, self._width - x
        places = ((0, 0, y, x), (y, 0, below, x), (0, x, y, beside), (y, x, below, beside))
        return [self._quadrant(place, u[2 + _DRAWS * i :][:_DRAWS]) for i, place in enumerate(places)]

    def _quadrant(self, place: tuple[int, int, int, int], u: list[float]) -> Quadrant:
        config, side_y, side_x = self._config, self._height, self._width
        _, _, height, width = place
        flip_y, flip_x = u[0] < config.flip, u[1] < config.flip
        warp = IDENTITY
        if u[2] < config.transform_probability:
            warp = rotation_and_scale(
                side_y,
                side_x,
                angle=_between(u[3], config.rotate),
                scale=1 + _between(u[4], config.scale),
                shift_y=_between(u[5], config.shift),
                shift_x=_between(u[6], config.shift),
            )
        crop_y = _pick(u[7], (0, side_y - height))
        crop_x = _pick(u[8], (0, side_x - width))
        xx, xy, x0, yx, yy, y0 = _composed(warp, flip_y, flip_x, crop_y, crop_x, side_y, side_x)
        top, bottom = _reached(yx, yy, y0, height, width, side_y)
        left, right = _reached(xx, xy, x0, height, width, side_x)
        first_row, from_top = divmod(top, config.crop_height)
        first_column, from_left = divmod(left, config.crop_width)
        return Quadrant(
            *place,
            flip_y,
            flip_x,
            warp,
            crop_y,
            crop_x,
            (first_row, bottom // config.crop_height + 1),
            (first_column, right // config.crop_width + 1),
            (from_top, from_left, bottom - top + 1, right - left + 1),
            Affine(xx, xy, x0 - left, yx, yy, y0 - top),
        )


def rotation_and_scale(
    height: int, width: int, *, angle: float, scale: float, shift_y: float, shift_x: float
) -> Affine:
    """The map of an image that is rotated and scaled about its centre, then shifted.

    Args:
        height: of the image (px).
        width: of the image (px).
        angle: degrees, counter-clockwise.
        scale: factor; above 1 enlarges.
        shift_y: downwards, as a share of the height.
        shift_x: to the right, as a share of the width.
    Returns:
        From pixels of the result to pixels of the image, rounded to 1/4096.
    """
    cosine, sine = math.cos(math.radians(angle)) / scale, math.sin(math.radians(angle)) / scale
    centre_y, centre_x = (height - 1) / 2, (width - 1) / 2
    from_y, from_x = centre_y + shift_y * height, centre_x + shift_x * width
    return Affine(
        _rounded(cosine),
        _rounded(-sine),
        _rounded(centre_x - cosine * from_x + sine * from_y) + _OFF_TIE,
        _rounded(sine),
        _rounded(cosine),
        _rounded(centre_y - sine * from_x - cosine * from_y) + _OFF_TIE,
    )


def _warp(block: NDArray[np.uint8], quadrant: Quadrant, image: NDArray[np.uint8], mask: NDArray[np.uint8]) -> None:
    """Fill a quadrant's image (h, w, 4) and mask (h, w) from what is seen of its cells, (h, w, 4)."""
    matrix, size = quadrant.source.matrix(), (quadrant.width, quadrant.height)
    cv2.warpAffine(block, matrix, size, image, _IMAGE, cv2.BORDER_REFLECT_101)
    cv2.warpAffine(cv2.extractChannel(block, 3), matrix, size, mask, _MASK, cv2.BORDER_REFLECT_101)


def _cut(block: NDArray[np.uint8], quadrant: Quadrant, image: NDArray[np.uint8], mask: NDArray[np.uint8]) -> None:
    """The same for a quadrant that is neither rotated nor scaled: a copy, several times faster."""
    source = quadrant.source
    y, x, down, across = int(source.y0), int(source.x0), int(source.yy), int(source.xx)  # a flip counts downwards
    pixels = block.view(np.uint32)[y::down, x::across, 0]
    image.view(np.uint32)[..., 0] = pixels[: quadrant.height, : quadrant.width]
    mask[:] = image[..., 3]


def _composed(
    warp: Affine, flip_y: bool, flip_x: bool, crop_y: int, crop_x: int, height: int, width: int
) -> tuple[float, float, float, float, float, float]:
    """Crop, then warp, then flip, as one map from the cropped image to the spliced one."""
    xx, xy, x0, yx, yy, y0 = warp
    x0 = x0 + xx * crop_x + xy * crop_y
    y0 = y0 + yx * crop_x + yy * crop_y
    if flip_x:
        xx, xy, x0 = -xx, -xy, width - 1 - x0
    if flip_y:
        yx, yy, y0 = -yx, -yy, height - 1 - y0
    return xx, xy, x0, yx, yy, y0


def _reached(by_x: float, by_y: float, origin: float, height: int, width: int, side: int) -> tuple[int, int]:
    """First and last source row (or column) that height x width pixels reach, reflected at the border of `side`."""
    across, down = by_x * (width - 1), by_y * (height - 1)
    low = math.floor(origin + min(0.0, across) + min(0.0, down))
    high = math.floor(origin + max(0.0, across) + max(0.0, down)) + 1  # bilinear reads one pixel further
    first, last = low, high
    if low < 0:
        first, last = 0, max(last, -low)
    if high > side - 1:
        first, last = min(first, 2 * (side - 1) - high), side - 1
    return max(first, 0), min(last, side - 1)


def _anchors(alpha: float, beta: float, side: int) -> tuple[int, int]:
    """Smallest and largest anchor (px)."""
    # 0.2 * 15 is a little above 3: that anchor is meant to be allowed.
    low, high = math.ceil(alpha * side - 1e-9), math.floor(beta * side + 1e-9)
    if low > high:
        raise PistoSegError(
            f"no anchor lies between alpha {alpha} and beta {beta} of {side} px",
            field="synthesis.alpha",
            remedy="set alpha and beta further apart",
        )
    return low, high


def _pick(u: float, between: tuple[int, int]) -> int:
    """A whole number between two, both included, from u in [0, 1)."""
    low, high = between
    return low + int(u * (high - low + 1))


def _between(u: float, limit: float) -> float:
    """A number in [-limit, limit) from u in [0, 1)."""
    return (2 * u - 1) * limit


def _rounded(value: float) -> float:
    return round(value * _GRID) / _GRID
