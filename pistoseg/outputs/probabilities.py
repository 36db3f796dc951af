"""Class probabilities of a slide as OME-Zarr, written band by band."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pistoseg.classes import TissueClasses

CHUNK = 1024
"""Px of a chunk's side: a slide of 30,000 x 30,000 px is some 1,200 files a class."""
SMALLEST_LEVEL = 512


class ProbabilityWriter:
    """Writes probabilities (0-255 for 0-1) of shape (L, height, width), axes c, y, x, with coarser levels.

    The format is OME-Zarr 0.4 on Zarr 2: QuPath reads it through Bio-Formats, whose reader knows no Zarr 3, and so do
    napari and all others; version 0.5 is newer than half of them. Chunks without any probability take no space.

    Args:
        path: local folder to make, `probabilities.zarr`; QuPath wants the suffix.
        n_classes: L, at most the number of classes.
        height, width: of the full resolution, px.
        mpp: micrometres per px of the full resolution.
        classes: names and colours of the channels.
    """

    def __init__(self, path: Path, n_classes: int, height: int, width: int, mpp: float, classes: TissueClasses) -> None:
        import zarr

        self.mpp, self.classes = mpp, classes
        self.group = zarr.open_group(str(path), mode="w", zarr_format=2)
        self.shapes = [(n_classes, height, width)]
        while max(self.shapes[-1][1:]) > SMALLEST_LEVEL:
            _, rows, columns = self.shapes[-1]
            self.shapes.append((n_classes, -(-rows // 2), -(-columns // 2)))
        self.levels = [self._array(number, shape) for number, shape in enumerate(self.shapes)]
        self.pending = np.empty((n_classes, min(CHUNK, height), width), np.uint8)
        self.rows = 0

    def write(self, y: int, band: NDArray[np.uint8]) -> None:
        """Add rows from the top to the bottom.

        Args:
            y: first row of the band; it must be the row after the last one written.
            band: (L, rows, width) uint8.
        Raises:
            ValueError: rows are missing or written twice, or the band does not fit.
        """
        classes, height, width = self.shapes[0]
        if y != self.rows or band.shape[0] != classes or band.shape[2] != width or y + band.shape[1] > height:
            raise ValueError(f"row {self.rows} of ({classes}, {height}, {width}) is next, not {band.shape} at row {y}")
        done = 0
        while done < band.shape[1]:
            place = self.rows % CHUNK
            taken = min(CHUNK - place, band.shape[1] - done)
            self.pending[:, place : place + taken] = band[:, done : done + taken]
            done += taken
            self.rows += taken
            if self.rows % CHUNK == 0 or self.rows == height:
                for channel in range(classes):  # zarr copies what it is given
                    first = self.rows - place - taken
                    self.levels[0][channel, first : self.rows] = self.pending[channel, : place + taken]

    def close(self) -> None:
        """Make the coarser levels and describe them.

        Raises:
            ValueError: rows are missing.
        """
        if self.rows != self.shapes[0][1]:
            raise ValueError(f"{self.rows} rows of {self.shapes[0][1]} were written")
        for finer, coarser in zip(self.levels, self.levels[1:], strict=False):
            classes, rows, columns = coarser.shape
            steps = range(classes), range(0, rows, CHUNK), range(0, columns, CHUNK)
            for channel, top, left in itertools.product(*steps):
                below = finer[channel, 2 * top : 2 * (top + CHUNK), 2 * left : 2 * (left + CHUNK)]
                coarser[channel, top : top + CHUNK, left : left + CHUNK] = _mean(np.asarray(below))
        self.group.attrs.update(self._attributes())

    def _array(self, number: int, shape: tuple[int, int, int]) -> Any:
        import numcodecs

        return self.group.create_array(
            str(number),
            shape=shape,
            chunks=(1, min(CHUNK, shape[1]), min(CHUNK, shape[2])),
            dtype="uint8",
            compressors=numcodecs.Blosc("lz4", 5, numcodecs.Blosc.NOSHUFFLE),
            fill_value=0,
            chunk_key_encoding={"name": "v2", "separator": "/"},
        )

    def _attributes(self) -> dict[str, Any]:
        datasets = []
        for number in range(len(self.levels)):
            step = self.mpp * 2**number
            middle = (step - self.mpp) / 2  # positions are those of the px' middles
            datasets.append(
                {
                    "path": str(number),
                    "coordinateTransformations": [
                        {"type": "scale", "scale": [1.0, step, step]},
                        {"type": "translation", "translation": [0.0, middle, middle]},
                    ],
                }
            )
        space = [{"name": name, "type": "space", "unit": "micrometer"} for name in "yx"]
        channels = [
            {
                "label": tissue.name,
                "color": "{:02X}{:02X}{:02X}".format(*tissue.color),
                "active": True,
                "coefficient": 1,
                "family": "linear",
                "inverted": False,
                "window": {"min": 0, "max": 255, "start": 0, "end": 255},
            }
            for tissue in self.classes.classes[: self.shapes[0][0]]
        ]
        return {
            "multiscales": [
                {
                    "version": "0.4",
                    "name": "class probabilities",
                    "type": "mean",
                    "axes": [{"name": "c", "type": "channel"}, *space],
                    "datasets": datasets,
                }
            ],
            "omero": {"version": "0.4", "name": "class probabilities", "channels": channels},
        }


def _mean(band: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Rounded mean of 2 x 2 px; an odd last row or column is repeated."""
    if band.shape[0] % 2 or band.shape[1] % 2:
        band = np.pad(band, ((0, band.shape[0] % 2), (0, band.shape[1] % 2)), mode="edge")
    total = band[::2, ::2].astype(np.uint16)
    for part in (band[1::2, ::2], band[::2, 1::2], band[1::2, 1::2]):
        total += part
    return ((total + 2) // 4).astype(np.uint8)
