"""Slides for tests: written with tifffile, read back by what is tested."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tifffile


def texture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Pink and violet with structure at several scales, (height, width, 3) uint8; smooth enough for JPEG."""
    rng = np.random.default_rng(seed)
    image = np.zeros((height, width, 3), np.float32)
    for side in (4, 16, 64):
        small = rng.uniform(0, 1, (height // side + 2, width // side + 2, 3)).astype(np.float32)
        image += cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(60 + image * np.float32([60, 40, 55]), 0, 255).astype(np.uint8)


def halved(image: np.ndarray) -> np.ndarray:
    """Mean of 2 x 2 px; an odd last row or column is dropped, as scanners do."""
    height, width = image.shape[0] // 2 * 2, image.shape[1] // 2 * 2
    blocks = image[:height, :width].reshape(height // 2, 2, width // 2, 2, 3)
    return np.round(blocks.mean((1, 3))).astype(np.uint8)


def per_cm(mpp: tuple[float, float]) -> dict[str, Any]:
    return {"resolution": (1e4 / mpp[0], 1e4 / mpp[1]), "resolutionunit": "CENTIMETER"}


def write_tiff(
    path: Path, image: np.ndarray, mpp: tuple[float, float] | None = (0.5, 0.5), levels: int = 1, **options: Any
) -> Path:
    """A pyramid with one page a level, as OpenSlide reads it; lossless unless told otherwise."""
    options = {"tile": (128, 128), "compression": "deflate", "photometric": "rgb", "metadata": None} | options
    resolution = per_cm(mpp) if mpp else {}
    with tifffile.TiffWriter(path) as writer:
        for level in range(levels):
            writer.write(image, subfiletype=1 if level else 0, **(resolution if level == 0 else {}), **options)
            image = halved(image)
    return path


def write_ome(path: Path, image: np.ndarray, levels: int = 1, metadata: dict[str, Any] | None = None) -> Path:
    """An OME-TIFF with its pyramid in sub-IFDs, of which OpenSlide sees one level."""
    options = {"tile": (128, 128), "compression": "deflate", "photometric": "rgb"}
    with tifffile.TiffWriter(path, ome=True) as writer:
        writer.write(image, subifds=levels - 1, metadata={"axes": "YXS", **(metadata or {})}, **options)
        for _ in range(levels - 1):
            image = halved(image)
            writer.write(image, subfiletype=1, metadata=None, **options)
    return path


def write_svs(path: Path, image: np.ndarray, levels: int = 2, **options: Any) -> Path:
    """An Aperio slide of 0.5 um: level 0, a thumbnail in strips, the other levels."""
    options = {"tile": (128, 128), "compression": "jpeg", "photometric": "rgb"} | options
    with tifffile.TiffWriter(path) as writer:
        for level in range(levels):
            size = f"{image.shape[1]}x{image.shape[0]} (128x128) JPEG/RGB Q=70"
            description = f"Aperio Image Library v11.2.1\r\n{size}|AppMag = 20|MPP = 0.5"
            writer.write(image, description=description, metadata=None, **options)
            if not level:
                small = np.ascontiguousarray(image[::8, ::8])
                writer.write(small, description="Aperio Image Library v11.2.1", metadata=None, photometric="rgb")
            image = halved(image)
    return path


def write_scn(
    path: Path, image: np.ndarray, collection: tuple[int, int], offset: tuple[int, int], mpp: float = 0.5
) -> Path:
    """A Leica SCN, in which OpenSlide sees `collection` (width, height) px, of which those at `offset` were scanned."""
    nm, (height, width) = round(mpp * 1000), image.shape[:2]
    macro = np.full((64, 64 * collection[0] // collection[1], 3), 240, np.uint8)

    def part(name: str, ifd: int, pixels: np.ndarray, size: tuple[int, int], corner: tuple[int, int]) -> str:
        sides = f'sizeX="{pixels.shape[1]}" sizeY="{pixels.shape[0]}"'
        return (
            f'<image name="{name}"><creationDate>2020-01-01T00:00:00.0Z</creationDate><device model="x" version="1"/>'
            f'<pixels {sides}><dimension {sides} r="0" ifd="{ifd}"/></pixels>'
            f'<view sizeX="{size[0] * nm}" sizeY="{size[1] * nm}" offsetX="{corner[0] * nm}" offsetY="{corner[1] * nm}"'
            ' spacingZ="0"/><scanSettings><objectiveSettings><objective>20</objective></objectiveSettings>'
            "<illuminationSettings><numericalAperture>0.4</numericalAperture><illuminationSource>brightfield"
            "</illuminationSource></illuminationSettings></scanSettings></image>"
        )

    description = (
        '<?xml version="1.0"?><scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01">'
        f'<collection name="c" sizeX="{collection[0] * nm}" sizeY="{collection[1] * nm}">'
        + part("macro", 0, macro, collection, (0, 0))
        + part("scan", 1, image, (width, height), offset)
        + "</collection></scn>"
    )
    options = {"tile": (128, 128), "compression": "deflate", "photometric": "rgb", "metadata": None}
    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        writer.write(macro, description=description, **options)
        writer.write(image, **per_cm((mpp, mpp)), **options)
    return path


def box_mean(image: np.ndarray, scale_x: float, scale_y: float, width: int, height: int) -> np.ndarray:
    """Mean over the exact area of every view pixel, by differences of the integral: float64."""

    def along_rows(values: np.ndarray, scale: float, count: int) -> np.ndarray:
        edges = np.minimum(np.arange(count + 1) * scale, len(values))
        total = np.concatenate([np.zeros_like(values[:1]), values.cumsum(0)])
        low = np.floor(edges).astype(int)
        share = (edges - low)[:, None, None]
        at = total[low] * (1 - share) + total[np.minimum(low + 1, len(values))] * share
        return (at[1:] - at[:-1]) / (edges[1:] - edges[:-1])[:, None, None]

    tall = along_rows(image.astype(np.float64), scale_y, height)
    return along_rows(tall.transpose(1, 0, 2), scale_x, width).transpose(1, 0, 2)
