"""Class masks as tiled pyramids that OpenSlide, QuPath, tifffile and Pillow open."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pistoseg.classes import IGNORE_ID, TissueClasses
from pistoseg.errors import PistoSegError

BIGTIFF_BYTES = 2**32 - 2**26
"""Size of the uncompressed levels from which 64-bit offsets are used: compressed ones never need more."""
FORMAT = "pistoseg mask 1"


def write_mask(
    path: Path, mask: NDArray[np.uint8], classes: TissueClasses, mpp: float, *, tile: int = 512
) -> list[tuple[int, int]]:
    """Write a class mask as a tiled pyramidal TIFF of class ids with the classes' colours as its palette.

    One page a level, deflate-compressed: OpenSlide sees no sub-IFDs, and deflate is what every TIFF reader of every
    age has. Each level halves the one before and shows the class of most of the four px; averaging ids would make up
    classes, and taking every second px would turn thin structures and specks into noise. tifffile and Pillow read
    class ids, OpenSlide and QuPath the colours. The first page's description is JSON: class names, ids and colours.

    Args:
        path: local file to write; levels are kept next to it meanwhile.
        mask: (h, w) uint8 class ids, `classes.background_id`, or 255 for px that were not looked at.
        classes: names and colours.
        mpp: micrometres per px of the mask.
        tile: px, a multiple of 16.
    Returns:
        (height, width) of the levels.
    """
    import tifffile

    shapes = [(int(mask.shape[0]), int(mask.shape[1]))]
    while max(shapes[-1]) > tile:
        shapes.append((-(-shapes[-1][0] // 2), -(-shapes[-1][1] // 2)))
    options: dict[str, Any] = {
        "tile": (tile, tile),
        "dtype": np.uint8,
        "photometric": "palette",
        "colormap": classes.palette().T.astype(np.uint16) * 257,
        "compression": "zlib",
        "maxworkers": 1,
        "metadata": None,
        "resolutionunit": "CENTIMETER",
        "software": "pistoseg",
    }
    big = sum(height * width for height, width in shapes) > BIGTIFF_BYTES
    folders = tempfile.TemporaryDirectory(prefix=".levels-", dir=path.parent)
    with folders as folder, tifffile.TiffWriter(path, bigtiff=big) as writer:
        level = mask
        for number, (height, width) in enumerate(shapes):
            if number:
                level = _halved(level, Path(folder) / str(number % 2))
            writer.write(
                _tiles(level, tile, classes.background_id),
                shape=(height, width),
                subfiletype=1 if number else 0,
                resolution=(1e4 / (mpp * 2**number),) * 2,
                description=None if number else json.dumps(_description(classes, mpp)),
                **options,
            )
    return shapes


def read_mask(path: Path, shape: tuple[int, int]) -> Iterator[tuple[int, int, NDArray[np.uint8]]]:
    """Class ids of a mask that `write_mask` wrote by tiles: y, x and (h, w) uint8; those of 255 alone are left out.

    Args:
        path: local file.
        shape: (h, w) that it has to have.
    Raises:
        PistoSegError: the file is another one, or damaged.
        OSError: the disk does not give it.
    """
    import tifffile

    try:
        with tifffile.TiffFile(path) as file:
            page = file.pages.first
            if json.loads(page.description).get("format") != FORMAT or page.shape != shape:
                raise PistoSegError("is another mask", file=str(path))
            for tile, (_, _, y, x, _), _ in page.segments():
                if tile is None:
                    raise PistoSegError("lacks a tile", file=str(path))
                ids = tile[0, : shape[0] - y, : shape[1] - x, 0]
                if (ids != IGNORE_ID).any():
                    yield y, x, ids
    except (PistoSegError, OSError, MemoryError):  # of which the file is innocent
        raise
    except Exception as error:  # decoders of damaged files raise anything
        raise PistoSegError(f"can't be read ({error})", file=str(path)) from error


def majority(mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The most frequent value of each 2 x 2 px, the upper left one of equally frequent ones.

    Args:
        mask: (h, w) uint8; an odd last row or column is repeated.
    Returns:
        (ceil(h / 2), ceil(w / 2)) uint8.
    """
    if mask.shape[0] % 2 or mask.shape[1] % 2:
        mask = np.pad(mask, ((0, mask.shape[0] % 2), (0, mask.shape[1] % 2)), mode="edge")
    first, second, third, fourth = mask[::2, ::2], mask[::2, 1::2], mask[1::2, ::2], mask[1::2, 1::2]
    alone = (first != second) & (first != third) & (first != fourth)
    others = np.where((second == third) | (second == fourth), second, np.where(third == fourth, third, first))
    return np.where(alone, others, first)


def _halved(larger: NDArray[np.uint8], path: Path) -> NDArray[np.uint8]:
    """The next level, in a file: the first ones are too large for memory."""
    height, width = larger.shape
    smaller = np.memmap(path, np.uint8, "w+", shape=(-(-height // 2), -(-width // 2)))
    step = max(2, 2**24 // width // 2 * 2)
    for top in range(0, height, step):
        piece = majority(np.asarray(larger[top : top + step]))
        smaller[top // 2 : top // 2 + len(piece)] = piece
    return smaller


def _tiles(level: NDArray[np.uint8], tile: int, background: int) -> Iterator[NDArray[np.uint8]]:
    """Tiles row by row, filled up with background beyond the edge."""
    for top in range(0, level.shape[0], tile):
        rows = np.asarray(level[top : top + tile])
        for left in range(0, level.shape[1], tile):
            piece = rows[:, left : left + tile]
            missing = ((0, tile - piece.shape[0]), (0, tile - piece.shape[1]))
            yield np.pad(piece, missing, constant_values=background) if np.any(missing) else np.ascontiguousarray(piece)


def _description(classes: TissueClasses, mpp: float) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "mpp": mpp,
        "classes": [
            {"id": position, "name": tissue.name, "color": list(tissue.color)}
            for position, tissue in enumerate(classes.classes)
        ],
        "no_tissue": classes.background_id,
        "not_looked_at": IGNORE_ID,
    }
