"""Tiles with tissue, in bands and super-tiles: what is read, in which order, and when rows of the result are final."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pistoseg.pixels import tile_starts

SUPER_TILE = 2048
"""Largest side of what is read at once, view px; 12 MB."""


@dataclass(frozen=True)
class SuperTile:
    """A part of the slide that is read once, and the tiles cut from it.

    Args:
        x, y: top left corner, view px.
        width, height: view px; just what its tiles cover.
        tiles: (n, 2) int64, x and y of each tile's corner in view px, in rows from the top, from left to right.
    """

    x: int
    y: int
    width: int
    height: int
    tiles: NDArray[np.int64]


@dataclass(frozen=True)
class Band:
    """Rows of tiles that are read together.

    Args:
        index: counted from 0 at the top.
        y: its first row, view px.
        height: view px, to the lower edge of its last tile; bands overlap where tiles do.
        final: rows above this one, view px, are touched by no later band.
        n_tiles: tiles with tissue in it.
    """

    index: int
    y: int
    height: int
    final: int
    n_tiles: int


class TilePlan:
    """The tiles of a slide whose area touches tissue.

    Tiles start every `stride` view px, the last ones end at the border. A view smaller than a tile has one tile, which
    reaches beyond it.

    Args:
        width, height: of the view (px).
        tile: side of a tile (view px).
        stride: step between tiles (view px), at most `tile`.
        tissue: (h, w) bool over the whole view, at any resolution.
        super_tile: largest side of a read (view px); at least one tile.
    """

    def __init__(
        self, width: int, height: int, tile: int, stride: int, tissue: NDArray[np.bool_], super_tile: int = SUPER_TILE
    ) -> None:
        if not 0 < stride <= tile:
            raise ValueError(f"stride is {stride}; it must be positive and at most tile ({tile})")
        self.width, self.height, self.tile, self.stride = width, height, tile, stride
        self._xs = np.array(tile_starts(width, tile, stride), np.int64)
        self._ys = np.array(tile_starts(height, tile, stride), np.int64)
        self._wanted = _touching(tissue, self._ys, self._xs, tile, height, width)
        self._group = max(1, (super_tile - tile) // stride + 1)

    @property
    def n_tiles(self) -> int:
        """Tiles with tissue."""
        return int(self._wanted.sum())

    @property
    def n_all_tiles(self) -> int:
        """Tiles of the whole view."""
        return self._wanted.size

    @cached_property
    def bands(self) -> tuple[Band, ...]:
        """Every band from the top to the bottom, those without tissue included."""
        starts = range(0, len(self._ys), self._group)
        counts = [int(self._wanted[start : start + self._group].sum()) for start in starts]
        bands = []
        for index, start in enumerate(starts):
            last = min(start + self._group, len(self._ys)) - 1
            y, bottom = int(self._ys[start]), min(int(self._ys[last]) + self.tile, self.height)
            final = int(self._ys[last + 1]) if last + 1 < len(self._ys) else self.height
            bands.append(Band(index, y, bottom - y, final, counts[index]))
        return tuple(bands)

    def super_tiles(self, band: Band) -> Iterator[SuperTile]:
        """The reads of a band from left to right; parts without tissue are left out."""
        rows = slice(band.index * self._group, (band.index + 1) * self._group)
        for start in range(0, len(self._xs), self._group):
            columns = slice(start, start + self._group)
            below, beside = np.nonzero(self._wanted[rows, columns])
            if not len(below):
                continue
            tiles = np.stack([self._xs[columns][beside], self._ys[rows][below]], axis=1)
            (x, y), (right, bottom) = tiles.min(0), tiles.max(0) + self.tile
            yield SuperTile(int(x), int(y), int(right - x), int(bottom - y), tiles)


def _touching(
    tissue: NDArray[np.bool_], ys: NDArray[np.int64], xs: NDArray[np.int64], tile: int, height: int, width: int
) -> NDArray[np.bool_]:
    """Which tiles share area with tissue, (len(ys), len(xs)) bool."""
    sums = np.zeros((tissue.shape[0] + 1, tissue.shape[1] + 1), np.int64)
    sums[1:, 1:] = tissue.astype(np.int64).cumsum(0).cumsum(1)
    top, bottom = _cells(ys, tile, height, tissue.shape[0])
    left, right = _cells(xs, tile, width, tissue.shape[1])
    inside = sums[bottom][:, right] - sums[top][:, right] - sums[bottom][:, left] + sums[top][:, left]
    return np.asarray(inside > 0)


def _cells(starts: NDArray[np.int64], tile: int, size: int, cells: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First and one past the last cell of a mask that tiles reach into; whole numbers only, as they are exact."""
    first = starts * cells // size
    last = -(-np.minimum(starts + tile, size) * cells // size)
    return first, np.maximum(last, first + 1)
