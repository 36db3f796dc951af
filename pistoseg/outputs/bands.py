"""A mask in bands of rows, which bound the memory that outlines need, and the regions that bands share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pistoseg.outputs.outlines import Regions, Row, connected, find_regions

BAND_PIXELS = 8_000_000
"""Px of the mask that are outlined at a time."""
BAND_RUNS = 400_000
"""Runs of equal class along the rows of a band, at most: what memory depends on where a mask is noisy."""


class Bands:
    """A mask in bands of rows, fewer where it is busy, from the top, as often as they are asked for.

    Each is its first row, its (rows, w) px, and its regions; those of a band that is the only one are found once.

    Args:
        mask: (h, w) uint8.
        rows: of a band; by default as many as bounded memory allows.
    """

    def __init__(self, mask: NDArray[np.uint8], rows: int | None) -> None:
        self.mask = mask
        self.limits = _limits(mask, rows)
        self._only: tuple[int, NDArray[np.uint8], Regions] | None = None

    def __len__(self) -> int:
        return len(self.limits)

    def __iter__(self) -> Iterator[tuple[int, NDArray[np.uint8], Regions]]:
        if self._only is not None:
            yield self._only
            return
        for top, bottom in self.limits:
            band = np.ascontiguousarray(self.mask[top:bottom])
            found = top, band, find_regions(band)
            if len(self) == 1:
                self._only = found
            yield found


def _limits(mask: NDArray[np.uint8], rows: int | None) -> list[tuple[int, int]]:
    """First and last row of each band."""
    height, width = mask.shape
    limits = []
    top = 0
    while top < height:
        bottom = min(height, top + (rows or max(1, BAND_PIXELS // width)))
        while rows is None and bottom - top > 1:
            band = mask[top:bottom]
            if np.count_nonzero(band[:, 1:] != band[:, :-1]) <= BAND_RUNS:
                break
            bottom = top + (bottom - top) // 2
        limits.append((top, bottom))
        top = bottom
    return limits


@dataclass(frozen=True)
class SharedRegions:
    """What bands share, known before they are outlined.

    Args:
        sizes: px of the regions on the first or last row of a band, one band after the other.
        first: where each band begins in it; empty where a single band shares nothing.
    """

    sizes: NDArray[np.int64]
    first: list[int]

    def specks(self, number: int, regions: Regions, least: int) -> NDArray[np.bool_]:
        """Which regions of a band have fewer than `least` px in all."""
        areas = regions.areas
        if self.first:
            border = _border_regions(regions)
            areas = areas.copy()
            areas[border] = self.sizes[self.first[number] : self.first[number] + len(border)]
        return areas < least


def shared_regions(bands: Bands) -> SharedRegions:
    """Measure the regions that several bands share."""
    if len(bands) <= 1:
        return SharedRegions(np.empty(0, np.int64), [])
    areas, first, links = [], [], []
    above: Row | None = None
    nodes = 0
    for _, _, regions in bands:
        border = _border_regions(regions)
        numbering = np.full(len(regions.areas), -1, np.int64)
        numbering[border] = np.arange(nodes, nodes + len(border))
        if above is not None:
            links.append(above.links(regions.row(0, numbering)))
        above = regions.row(-1, numbering)
        areas.append(regions.areas[border])
        first.append(nodes)
        nodes += len(border)
    pairs = np.concatenate(links)
    count, group = connected(nodes, pairs[:, 0], pairs[:, 1])
    return SharedRegions(np.bincount(group, np.concatenate(areas), count).astype(np.int64)[group], first)


def _border_regions(regions: Regions) -> NDArray[np.int64]:
    return np.union1d(regions.row(0).region, regions.row(-1).region)
