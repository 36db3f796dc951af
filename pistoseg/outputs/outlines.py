"""From class ids to polygons: connected regions of a band of rows, and their outlines as a coverage.

Neighbouring regions share every vertex of their common border (also where a third region meets it), which is what
simplification of shared borders needs; tracing each class by itself would leave slivers between them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_OUTSIDE = -1
"""Value of what lies around a band: no mask has it."""


@dataclass(frozen=True)
class Regions:
    """4-connected regions of equal value in a band of (rows, width) px, as runs along the rows.

    Args:
        width: of the band, px.
        starts: (R,) int64 flat px at which each run starts; every row starts one.
        lengths: (R,) int64 px.
        values: (R,) uint8 class ids.
        region: (R,) int32 number 0..n-1 of the region of each run.
        areas: (n,) int64 px.
    """

    width: int
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    values: NDArray[np.uint8]
    region: NDArray[np.int32]
    areas: NDArray[np.int64]

    def at(self, pixels: NDArray[np.int64]) -> NDArray[np.int64]:
        """Numbers of the runs that flat px lie in."""
        return np.searchsorted(self.starts, pixels, "right") - 1

    def row(self, number: int, numbering: NDArray[np.int64] | None = None) -> Row:
        """The first (0) or the last (-1) row, with its regions numbered anew where a numbering is given."""
        rows = int(self.starts[-1] + self.lengths[-1]) // self.width
        begin = number % rows * self.width
        first, last = np.searchsorted(self.starts, (begin, begin + self.width))
        region = self.region[first:last].astype(np.int64)
        return Row(
            self.starts[first:last] - begin,
            self.values[first:last],
            region if numbering is None else numbering[region],
        )


@dataclass(frozen=True)
class Row:
    """One row of px as runs: where each starts, its class id and the number of its region."""

    starts: NDArray[np.int64]
    values: NDArray[np.uint8]
    region: NDArray[np.int64]

    def links(self, below: Row) -> NDArray[np.int64]:
        """(n, 2) pairs of regions of equal value that touch across the line between this row and the one below."""
        starts = np.union1d(self.starts, below.starts)
        upper = np.searchsorted(self.starts, starts, "right") - 1
        lower = np.searchsorted(below.starts, starts, "right") - 1
        same = self.values[upper] == below.values[lower]
        return np.unique(np.column_stack([self.region[upper[same]], below.region[lower[same]]]), axis=0)


def find_regions(band: NDArray[np.uint8]) -> Regions:
    """The 4-connected regions of equal value of a band, (rows, width) uint8."""
    width = band.shape[1]
    first = np.ones(band.shape, bool)
    np.not_equal(band[:, 1:], band[:, :-1], out=first[:, 1:])
    starts = np.flatnonzero(first)
    values = band.ravel()[starts]
    upper_px = np.flatnonzero(first[1:] | first[:-1])  # where a pair of runs above each other begins
    upper = np.searchsorted(starts, upper_px, "right") - 1
    lower = np.searchsorted(starts, upper_px + width, "right") - 1
    same = values[upper] == values[lower]
    count, region = connected(len(starts), upper[same], lower[same])
    lengths = np.diff(starts, append=band.size)
    areas = np.bincount(region, lengths, count).astype(np.int64)
    return Regions(width, starts, lengths, values, region, areas)


def connected(n: int, left: NDArray[np.int64], right: NDArray[np.int64]) -> tuple[int, NDArray[np.int32]]:
    """Number of connected groups of n nodes, and the group of each, from the edges left[i] - right[i]."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    graph = coo_matrix((np.ones(len(left), np.int8), (left, right)), (n, n))
    count, group = connected_components(graph, directed=False)
    return int(count), group


def absorb(regions: Regions, specks: NDArray[np.bool_], empty: int) -> NDArray[np.uint8]:
    """A band's runs without some of its regions: these take the value beside them in their row, the left one if any.

    Args:
        regions: of the band.
        specks: (n,) bool, the regions to remove.
        empty: value of rows of which nothing is left.
    Returns:
        Values of the runs, uint8.
    """
    kept = ~specks[regions.region]
    number = np.arange(len(kept))
    rows = regions.starts // regions.width
    left = np.maximum.accumulate(np.where(kept, number, 0))
    right = np.minimum.accumulate(np.where(kept, number, len(kept) - 1)[::-1])[::-1]
    has_left, has_right = (kept[side] & (rows[side] == rows) for side in (left, right))
    return np.where(has_left, regions.values[left], np.where(has_right, regions.values[right], np.uint8(empty)))


def trace(band: NDArray[np.uint8], regions: Regions) -> NDArray[np.object_]:
    """Outline every region of a band.

    Args:
        band: (rows, width) uint8.
        regions: of the band.
    Returns:
        (n,) valid shapely polygons in the order of the regions, which tile the band: corners of px as coordinates,
        (0, 0) at the band's top left, no vertex on a straight line unless another region's border meets it there.
    """
    import shapely

    lines = _BorderLines(band, regions)
    order, first = _cycles(lines.successor, lines.along_rows)
    sizes = np.diff(first, append=len(order))
    points = lines.corners[lines.origin[order]]
    owner = regions.region[regions.at(lines.pixel[order[first]])]
    is_hole = _turning_areas(points, first, sizes) < 0
    rings = np.lexsort((is_hole, owner))  # a region's outer ring, then its holes
    closed, ring_offsets = _closed(points, first[rings], sizes[rings])
    polygon_offsets = np.searchsorted(owner[rings], np.arange(len(regions.areas) + 1))
    return np.asarray(
        shapely.from_ragged_array(shapely.GeometryType.POLYGON, closed, (ring_offsets, polygon_offsets)), object
    )


class _BorderLines:
    """The border lines of a band as directed segments between corners, each with its region on the right.

    A corner is a point of the pixel grid at which border lines turn or meet. Segments are numbered: all those to the
    east, then to the south, the west and the north; segments around the outside of the band have no successor.

    Attributes:
        corners: (c, 2) float64 x, y, row by row.
        origin: (s,) corner at which each segment starts.
        along_rows: (s,) bool, those to the east and to the west.
        pixel: (s,) flat px of the band to the right of the segment, at its start.
        successor: (s,) segment that goes on along the same ring, or -1.
    """

    def __init__(self, band: NDArray[np.uint8], regions: Regions) -> None:
        around = np.full((band.shape[0] + 2, band.shape[1] + 2), _OUTSIDE, np.int16)
        around[1:-1, 1:-1] = band
        quadrants = around[:-1, :-1], around[:-1, 1:], around[1:, 1:], around[1:, :-1]  # NW, NE, SE, SW of a grid point
        is_corner = (quadrants[0] != quadrants[1]) | (quadrants[3] != quadrants[2])
        is_corner &= (quadrants[0] != quadrants[3]) | (quadrants[1] != quadrants[2])
        y, x = np.nonzero(is_corner)
        self.corners = np.column_stack([x, y]).astype(np.float64)
        values = [quadrant[y, x] for quadrant in quadrants]
        north, east, south, west = (values[side] != values[(side + 1) % 4] for side in range(4))
        by_column = np.argsort(x, kind="stable")
        # Along a grid line, corners where a segment starts and corners where one ends alternate.
        left, right = np.flatnonzero(east), np.flatnonzero(west)
        top, bottom = by_column[south[by_column]], by_column[north[by_column]]
        origins, targets = (left, top, right, bottom), (right, bottom, left, top)
        southeast = y * band.shape[1] + x
        beside = (0, -1, -1 - band.shape[1], -band.shape[1])
        self.origin = np.concatenate(origins)
        self.along_rows = np.repeat([True, False, True, False], [len(origin) for origin in origins])
        self.pixel = np.concatenate([southeast[start] + step for start, step in zip(origins, beside, strict=True)])
        leaving = self._numbers(origins, len(x))
        pinched = self._pinched(values, y, x, regions)
        successors = []
        for direction, target in enumerate(targets):
            right_turn, ahead, left_turn = (leaving[(direction + turn) % 4][target] for turn in (1, 0, 3))
            following = np.where(right_turn >= 0, right_turn, np.where(ahead >= 0, ahead, left_turn))
            successors.append(np.where(pinched[direction % 2][target], left_turn, following))
        inside = np.concatenate([values[(2, 3, 0, 1)[side]][start] != _OUTSIDE for side, start in enumerate(origins)])
        self.successor = np.where(inside, np.concatenate(successors), -1)

    @staticmethod
    def _numbers(origins: tuple[NDArray[np.int64], ...], corners: int) -> list[NDArray[np.int64]]:
        """For each direction, the segment that leaves a corner that way, or -1."""
        tables, number = [], 0
        for origin in origins:
            table = np.full(corners, -1, np.int64)
            table[origin] = np.arange(number, number + len(origin))
            tables.append(table)
            number += len(origin)
        return tables

    @staticmethod
    def _pinched(
        values: list[NDArray[np.int16]], y: NDArray[np.int64], x: NDArray[np.int64], regions: Regions
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Corners at which one region meets itself, in its north-east and south-west or its north-west and south-east.

        There a ring passes straight into the region's other part: turning back would make a ring that touches itself.
        """
        pinched = []
        for one, other, steps in ((1, 3, (-regions.width, -1)), (0, 2, (-regions.width - 1, 0))):
            beside = values[(one + 1) % 4]
            meets = (values[one] == values[other]) & (values[one] != beside) & (values[one] != values[one - 1])
            meets &= values[one] != _OUTSIDE
            places = np.flatnonzero(meets)
            first, second = (regions.region[regions.at(y[places] * regions.width + x[places] + step)] for step in steps)
            meets[places] = first == second
            pinched.append(meets)
        return pinched[0], pinched[1]


def _cycles(successor: NDArray[np.int64], along_rows: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The members of each cycle in their order, one cycle after the other, and where each begins.

    The walk goes from one segment along a row to the next, which each ring has, and what lies between is put in at
    last: a walk is what takes long, and rings turn at most corners.

    Args:
        successor: of each segment, -1 where it has none.
        along_rows: which segments are, those of the smallest number in each cycle among them.
    """
    stops = np.flatnonzero(along_rows & (successor >= 0))
    number = np.full(len(successor), -1, np.int64)
    number[stops] = np.arange(len(stops))
    after, steps = successor[stops], np.ones(len(stops), np.int64)
    between = np.flatnonzero(number[after] < 0)
    while len(between):
        after[between] = successor[after[between]]
        steps[between] += 1
        between = between[number[after[between]] < 0]

    following = number[after].tolist()  # a walk over a list is several times faster than over an array
    walked: list[int] = []
    first: list[int] = []
    for start, then in enumerate(following):
        if then < 0:
            continue
        first.append(len(walked))
        member = start
        while (then := following[member]) >= 0:
            walked.append(member)
            following[member] = -1
            member = then
    walk = np.array(walked, np.int64)
    members, steps = stops[walk], steps[walk]
    places = np.cumsum(steps) - steps
    order, begins = np.empty(steps.sum(), np.int64), places[np.array(first, np.int64)]
    while len(members):
        order[places] = members
        more = steps > 1
        members, places, steps = successor[members[more]], places[more] + 1, steps[more] - 1
    return order, begins


def _turning_areas(
    points: NDArray[np.float64], first: NDArray[np.int64], sizes: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Twice the signed area of each open ring: positive where the inside is on the right (y grows downwards)."""
    following = np.arange(1, len(points) + 1)
    following[first + sizes - 1] = first
    x, y = points.T
    return np.add.reduceat(x * y[following] - x[following] * y, first)


def _closed(
    points: NDArray[np.float64], first: NDArray[np.int64], sizes: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Rings in the given order with their first point repeated at the end, and the offsets of the rings."""
    offsets = np.concatenate([[0], np.cumsum(sizes + 1)])
    within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], sizes + 1)
    return points[np.repeat(first, sizes + 1) + within % np.repeat(sizes, sizes + 1)], offsets
