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
