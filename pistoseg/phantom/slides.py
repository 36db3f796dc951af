"""Pyramidal slides, drawn piece by piece so that memory does not grow with the slide."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pistoseg import storage
from pistoseg.errors import PistoSegError
from pistoseg.phantom.drawing import CONTEXT_UM, draw_image
from pistoseg.phantom.geometry import PHANTOM_CLASSES, REFERENCE_MPP, draw_mask

TILE = 256
PIECE = 512
"""Px drawn at a time; a multiple of TILE and, for the levels, of DOWNSAMPLE."""
DOWNSAMPLE = 4
SLIDE_DOMAIN = 320.0
"""Typical size of a connected piece of one tissue on a slide, micrometres."""


def write_slide(
    uri: str,
    mask_uri: str,
    *,
    seed: int,
    size: tuple[int, int] = (4096, 4096),
    mpp: float = REFERENCE_MPP,
) -> dict[str, Any]:
    """Draw a slide and its exact mask as tiled pyramidal TIFFs that OpenSlide opens.

    Args:
        uri: of the slide, JPEG-compressed RGB.
        mask_uri: of the mask, one palette-coloured class id per pixel, same levels, lossless.
        seed: of the slide.
        size: (height, width) of level 0, px.
        mpp: micrometres per pixel of level 0.
    Returns:
        width, height, mpp, levels and the share of each class and of the background.
    Raises:
        PistoSegError: when the slide would be smaller than one tile.
    """
    height, width = size
    if min(size) < TILE:
        raise PistoSegError(f"a slide of {height} x {width} px has no tile of {TILE} px", field="slide_size")
    with tempfile.TemporaryDirectory(prefix="pistoseg-phantom-") as folder:
        spool = Path(folder)
        shapes = [size]
        while max(shapes[-1]) > 2 * TILE:
            shapes.append((-(-shapes[-1][0] // DOWNSAMPLE), -(-shapes[-1][1] // DOWNSAMPLE)))
        masks = [_memmap(spool / f"mask{level}", shape) for level, shape in enumerate(shapes)]
        images = [_memmap(spool / f"image{level}", (*shape, 3)) for level, shape in enumerate(shapes[1:], 1)]
        drawn = _draw(seed, mpp, masks[0], images[0] if images else None)
        _write_pyramid(spool / "slide.tif", drawn, shapes, images, mpp, mask=False)
        for level in range(1, len(shapes)):
            masks[level][:] = masks[level - 1][::DOWNSAMPLE, ::DOWNSAMPLE]
        _write_pyramid(spool / "mask.tif", _tiles(masks[0]), shapes, masks[1:], mpp, mask=True)
        counts = np.zeros(256, np.int64)
        for top in range(0, height, PIECE):
            counts += np.bincount(masks[0][top : top + PIECE].ravel(), minlength=256)
        _upload(spool / "slide.tif", uri)
        _upload(spool / "mask.tif", mask_uri)
    names = [*PHANTOM_CLASSES.names, "background"]
    shares = {name: round(int(counts[index]) / (height * width), 4) for index, name in enumerate(names)}
    return {"width": width, "height": height, "mpp": mpp, "levels": len(shapes), "shares": shares}


def _draw(
    seed: int, mpp: float, mask: NDArray[np.uint8], reduced: NDArray[np.uint8] | None
) -> Iterator[NDArray[np.uint8]]:
    """Level 0's tiles row by row; fills the mask and the next level on the way."""
    height, width = mask.shape
    margin = int(np.ceil(CONTEXT_UM / mpp))
    for top in range(0, height, TILE):
        rows = min(TILE, height - top)
        band = np.empty((rows, width, 3), np.uint8)
        for left in range(0, width, PIECE):
            columns = min(PIECE, width - left)
            origin = (top - margin, left - margin)
            around = draw_mask(
                seed,
                rows + 2 * margin,
                columns + 2 * margin,
                mpp,
                origin=origin,
                domain=SLIDE_DOMAIN,
                extent=(height, width),
            )
            mask[top : top + rows, left : left + columns] = around[margin:-margin, margin:-margin]
            band[:, left : left + columns] = draw_image(around, seed, mpp, origin=origin, margin=margin)
        if reduced is not None:
            first = top // DOWNSAMPLE
            small = _halve(_halve(band))
            reduced[first : first + small.shape[0]] = small
        yield from _tiles(band)


def _halve(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Mean of 2 x 2 px; an odd last row or column is repeated."""
    image = np.pad(image, ((0, image.shape[0] % 2), (0, image.shape[1] % 2), (0, 0)), mode="edge").astype(np.uint16)
    total = image[::2, ::2] + image[1::2, ::2] + image[::2, 1::2] + image[1::2, 1::2]
    return ((total + 2) // 4).astype(np.uint8)


def _tiles(image: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    """TILE x TILE pieces row by row, padded with the last row and column."""
    for top in range(0, image.shape[0], TILE):
        for left in range(0, image.shape[1], TILE):
            tile = np.asarray(image[top : top + TILE, left : left + TILE])
            missing = ((0, TILE - tile.shape[0]), (0, TILE - tile.shape[1]), *((0, 0),) * (image.ndim - 2))
            yield np.ascontiguousarray(np.pad(tile, missing, mode="edge"))


def _write_pyramid(
    path: Path,
    level0: Iterator[NDArray[np.uint8]],
    shapes: list[tuple[int, int]],
    lower: list[NDArray[np.uint8]],
    mpp: float,
    *,
    mask: bool,
) -> None:
    """One page a level: OpenSlide does not see sub-IFDs."""
    import tifffile

    options: dict[str, Any] = {
        "tile": (TILE, TILE),
        "dtype": np.uint8,
        "metadata": None,
        "resolutionunit": "CENTIMETER",
    }
    if mask:
        colormap = PHANTOM_CLASSES.palette().T.astype(np.uint16) * 257
        options |= {"photometric": "palette", "colormap": colormap, "compression": "deflate"}
    else:
        options |= {"photometric": "rgb", "compression": "jpeg", "compressionargs": {"level": 88}}
    with tifffile.TiffWriter(path, bigtiff=shapes[0][0] * shapes[0][1] > 2**30) as writer:
        for level, shape in enumerate(shapes):
            if level > 1 and not mask:
                _reduce(lower[level - 2], lower[level - 1])
            per_cm = (1e4 / (mpp * shapes[0][1] / shape[1]), 1e4 / (mpp * shapes[0][0] / shape[0]))
            writer.write(
                level0 if level == 0 else _tiles(lower[level - 1]),
                shape=shape if mask else (*shape, 3),
                subfiletype=1 if level else 0,
                resolution=per_cm,
                software="pistoseg phantom (synthetic, no patient's tissue)",
                **options,
            )


def _reduce(larger: NDArray[np.uint8], smaller: NDArray[np.uint8]) -> None:
    for top in range(0, larger.shape[0], PIECE):
        piece = _halve(_halve(larger[top : top + PIECE]))
        smaller[top // DOWNSAMPLE : top // DOWNSAMPLE + piece.shape[0]] = piece


def _memmap(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    return np.memmap(path, np.uint8, "w+", shape=shape)


def _upload(path: Path, uri: str) -> None:
    import shutil

    with path.open("rb") as source, storage.open_file(uri, "wb") as target:
        shutil.copyfileobj(source, target, 2**22)
