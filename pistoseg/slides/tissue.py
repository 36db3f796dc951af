"""Where a slide has tissue: a mask at low resolution, without pen marks, black borders, dust and pinholes."""

from __future__ import annotations

import io
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pistoseg.errors import PistoSegError
from pistoseg.patches.decode import read_file
from pistoseg.slides.reader import MAX_UNTILED_PIXELS

TISSUE_MPP = 8.0
"""Micrometres per pixel of the picture in which tissue is looked for."""
MIN_TISSUE_UM2 = 10_000.0
"""Smaller islands are dust: 100 x 100 um, a fifth of a patch of 224 px at 0.5 um/px."""
MAX_HOLE_UM2 = 40_000.0
"""Smaller gaps belong to the tissue: lumina, fat cells, vessels."""
_PALE, _STRONG = 14, 25
"""Saturation (0..255) below which nothing is tissue and above which everything is; Otsu decides in between."""
_TINT, _ABOVE_GLASS = 20, 10
_GAP_UM = 32.0
_BLACK = 45
_FRINGE_UM = 40.0
_MIN_PEN_UM2 = 20_000.0
_ASPECT = 0.02
_PLANES = 2
"""TIFF's PlanarConfiguration where each sample is a picture of its own."""


def tissue_mask(thumbnail: NDArray[np.uint8], mpp: float) -> NDArray[np.bool_]:
    """Find tissue in a picture of a slide: H&E is more saturated than glass.

    Otsu's threshold on the saturation is kept within bounds, since on a slide of nearly all glass or nearly all tissue
    it would split noise. Strands are joined over gaps of 64 um before islands are measured, so that lung stays whole.

    Args:
        thumbnail: (h, w, 3) uint8 RGB, about 8 um/px.
        mpp: micrometres per pixel of it.
    Returns:
        (h, w) bool.
    """
    smooth = cv2.GaussianBlur(np.ascontiguousarray(thumbnail), (0, 0), max(0.6, 0.6 * TISSUE_MPP / mpp))
    hue, saturation, value = cv2.split(cv2.cvtColor(smooth, cv2.COLOR_RGB2HSV_FULL))
    excluded = _black(value, mpp) | _pen(hue, saturation, value, mpp)
    low, high = _bounds(saturation, value)
    threshold = np.clip(_otsu(saturation[~excluded]), low, high)
    mask = (saturation > threshold) & ~excluded
    joined = cv2.morphologyEx(
        mask.astype(np.uint8), cv2.MORPH_CLOSE, _disc(_GAP_UM / mpp), borderType=cv2.BORDER_REPLICATE
    )
    mask = _without_small(joined > 0, MIN_TISSUE_UM2 / mpp**2)
    background = _without_small(~mask, MAX_HOLE_UM2 / mpp**2)
    return ~background & ~excluded


def read_tissue_mask(uri: str, shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Read the user's own mask of a slide: any size, not zero where there is tissue.

    Args:
        uri: PNG or TIFF, grey, palette or colour; alpha does not count. Of a pyramid, the smallest level that is large
            enough is read.
        shape: (height, width) that is wanted; a pixel is tissue where at least half of it is.
    Returns:
        `shape` bool.
    Raises:
        PistoSegError: it cannot be read, is a JPEG, too large, or of another shape than the slide.
    """
    mask = _decoded_mask(uri, read_file(uri), shape)
    height, width = mask.shape
    if abs(width * shape[0] / (height * shape[1]) - 1) > _ASPECT + 1 / min(height, width, *shape):
        raise PistoSegError(
            f"is {width}x{height} px, and the slide's sides are as {shape[1]}:{shape[0]}",
            file=uri,
            field="tissue_mask",
            remedy="draw the mask on the whole slide, at any size",
        )
    share = cv2.resize(mask.astype(np.float32), (shape[1], shape[0]), interpolation=cv2.INTER_AREA)
    return np.asarray(share >= 0.5)


def _decoded_mask(uri: str, data: bytes, shape: tuple[int, int]) -> NDArray[np.bool_]:
    import tifffile
    from PIL.PngImagePlugin import PngImageFile

    try:
        if data.startswith(b"\x89PNG"):
            picture = PngImageFile(io.BytesIO(data))
            _check_mask_size(uri, picture.width, picture.height)
            opaque = {"RGBA": "RGB", "LA": "L"}.get(picture.mode, picture.mode)
            values = np.asarray(picture.convert(opaque))
        elif data[:2] in (b"II", b"MM"):
            with tifffile.TiffFile(io.BytesIO(data)) as tiff:
                levels = [item.keyframe for item in tiff.series[0].levels]
                large = [page for page in levels if page.imagelength >= shape[0] and page.imagewidth >= shape[1]]
                page = (large or levels[:1])[-1]
                _check_mask_size(uri, page.imagewidth, page.imagelength)
                values = _colours(page)
        else:
            raise PistoSegError("is no PNG or TIFF", file=uri, field="tissue_mask", remedy="save the mask as PNG")
    except PistoSegError:
        raise
    except Exception as error:  # decoders of untrusted bytes raise anything
        raise PistoSegError(
            f"cannot be read ({error})", file=uri, field="tissue_mask", remedy="save the mask as PNG"
        ) from error
    return np.asarray(values.any(-1) if values.ndim == 3 else values != 0, bool)


def _colours(page: Any) -> NDArray[Any]:
    """(h, w) or (h, w, samples) of a TIFF's page, without alpha and other extra samples."""
    values = page.asarray()
    if values.ndim < 3:
        return values
    samples = np.moveaxis(values, 0, -1) if page.planarconfig == _PLANES else values
    return samples[..., : max(1, page.samplesperpixel - len(page.extrasamples))]


def _check_mask_size(uri: str, width: int, height: int) -> None:
    if width * height > MAX_UNTILED_PIXELS:
        raise PistoSegError(
            f"is {width}x{height} px, and more than {MAX_UNTILED_PIXELS:,} px are not taken",
            file=uri,
            field="tissue_mask",
            remedy="save it smaller: masks of 8 um/px are enough, or as a pyramidal TIFF",
        )


def _bounds(saturation: NDArray[np.uint8], value: NDArray[np.uint8]) -> tuple[float, float]:
    """Limits of the threshold. The brightest pixels are glass, which may be tinted, unless there is none."""
    glass = min(float(np.median(saturation[value >= np.percentile(value, 95)])), _TINT)
    low = max(_PALE, glass + _ABOVE_GLASS)
    return low, max(_STRONG, low)


def _otsu(saturation: NDArray[np.uint8]) -> float:
    if not saturation.size:
        return 255.0
    return float(cv2.threshold(saturation.reshape(1, -1), 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)[0])


def _black(value: NDArray[np.uint8], mpp: float) -> NDArray[np.bool_]:
    """Borders and gaps of the scan; their blurred edge has any saturation."""
    dark = _without_small(value < _BLACK, _MIN_PEN_UM2 / mpp**2)
    return _grown(dark, _FRINGE_UM / mpp)


def _pen(
    hue: NDArray[np.uint8], saturation: NDArray[np.uint8], value: NDArray[np.uint8], mpp: float
) -> NDArray[np.bool_]:
    """Green, blue and black ink. Haematoxylin is violet: its hue is above 230 degrees, or its saturation below 1/2."""
    degrees = hue.astype(np.float32) * (360 / 255)
    green = (degrees > 70) & (degrees <= 185) & (saturation > 45)
    blue = (degrees > 185) & (degrees < 232) & (saturation > 115)
    black = (value < 110) & (saturation < 60)
    ink = _without_small(green | blue | black, _MIN_PEN_UM2 / mpp**2)
    return _grown(ink, _FRINGE_UM / mpp)


def _without_small(mask: NDArray[np.bool_], area: float) -> NDArray[np.bool_]:
    """Connected parts of at least `area` px."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    keep = stats[:, cv2.CC_STAT_AREA] >= area
    keep[0] = False
    return np.asarray(keep[labels], bool)


def _grown(mask: NDArray[np.bool_], radius: float) -> NDArray[np.bool_]:
    """A mask with a margin of `radius` px."""
    if not mask.any():
        return mask
    return np.asarray(cv2.dilate(mask.astype(np.uint8), _disc(radius)) > 0)


def _disc(radius: float) -> NDArray[np.uint8]:
    side = 2 * round(radius) + 1
    return np.asarray(cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side)), np.uint8)
