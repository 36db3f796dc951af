"""Tissue regions as polygons with holes, in the GeoJSON that QuPath reads, written band by band."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pistoseg.classes import TissueClasses
from pistoseg.outputs.bands import Bands, SharedRegions, shared_regions
from pistoseg.outputs.outlines import Regions, Row, absorb, connected, find_regions, trace

MAX_AREA_ERROR = 0.005
"""Share by which simplification may change the area of a class, or FREE_PIXELS if that is more."""
FREE_PIXELS = 10
MAX_AREA_CHANGE, FREE_AREA = 0.005, 0.0001
"""What giving small regions away may change of the area of a class: this share of it, and this share of all tissue."""
DIGITS = 2
"""Decimals of coordinates, level-0 px."""

Polygons = NDArray[np.object_]


class ToLevel0(NamedTuple):
    """From px of the mask to level-0 px of the slide: x0 = x * scale_x + offset_x, and y alike."""

    scale_x: float
    scale_y: float
    offset_x: float = 0.0
    offset_y: float = 0.0


@dataclass(frozen=True)
class RegionsReport:
    """What was written.

    Args:
        polygons: number of them.
        vertices: of all of them, holes included.
        tolerance_um: of the simplification.
        min_area_um2: regions smaller than this were given to their neighbours.
        area_um2: of the polygons, by class name.
        dropped_um2: of the regions smaller than min_area_um2, by class name; gaps in the tissue as `no tissue`.
    """

    polygons: int
    vertices: int
    tolerance_um: float
    min_area_um2: float
    area_um2: dict[str, float]
    dropped_um2: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """As written in the file's `pistoseg` member."""
        return dict(vars(self))


def write_regions(
    path: Path,
    mask: NDArray[np.uint8],
    classes: TissueClasses,
    *,
    to_level0: ToLevel0,
    mpp: float,
    tolerance: float,
    min_area: float | Sequence[float],
    band_rows: int | None = None,
) -> RegionsReport:
    """Write the regions of a class mask as a GeoJSON FeatureCollection of QuPath annotations.

    Regions are 4-connected. Those smaller than `min_area`, gaps in the tissue included, are first given to the region
    beside them, so that neither confetti nor pinholes are written. Of several such areas the first is taken with which
    each class keeps its own area but for MAX_AREA_CHANGE of it and FREE_AREA of all tissue, else the last; what classes
    gain where gaps are closed does not count: these may be many, and are no objects.

    Borders are then simplified once for both sides (Visvalingam-Whyatt), which leaves neither slivers nor overlaps
    between neighbours: a vertex goes when the triangle with its neighbours is smaller than tolerance squared; where
    that would change the area of a class by more than half a percent, a finer tolerance is taken. Memory depends on the
    width of the mask and on the polygons that are not finished, not on its height.

    Args:
        path: local file to write.
        mask: (h, w) uint8 class ids; `classes.background_id` and ids without a class are not written.
        classes: names and colours.
        to_level0: from px of the mask to level-0 px of the slide, the unit of the file's coordinates.
        mpp: micrometres per px of the mask.
        tolerance: of the simplification, micrometres; 0 keeps every corner.
        min_area: of a region, um2, or several to choose from, the largest first; 0 keeps every px.
        band_rows: rows outlined at a time; by default as many as bounded memory allows.
    Returns:
        What was written and what was dropped.
    """
    bands = Bands(mask if mask.size else np.zeros((0, 1), np.uint8), band_rows)
    candidates = [float(area) for area in np.atleast_1d(min_area)]
    shared = shared_regions(bands) if _pixels(candidates[0], mpp) > 1 else None
    min_area = candidates[0] if shared is None else _negligible(bands, shared, classes, mpp, candidates)
    least = _pixels(min_area, mpp)
    tally = _Tally(len(classes))
    with path.open("w", encoding="utf-8") as file:
        features = _FeatureWriter(file, classes, ToLevel0(*to_level0), mpp)
        merger = _Merger(len(classes))
        for number, (top, band, regions) in enumerate(bands):
            if shared is not None and (specks := shared.specks(number, regions, least)).any():
                runs = specks[regions.region]
                tally.dropped += _areas(regions.values[runs], regions.lengths[runs])
                kept = absorb(regions, specks, classes.background_id)
                band = np.repeat(kept, regions.lengths).reshape(band.shape)
                regions = find_regions(band)
            values = _region_values(regions)
            polygons = _simplified(trace(band, regions), values, regions.areas, tolerance / mpp, tally)
            for finished in merger.add(_shifted(polygons, top), values, regions):
                features.write(*finished)
        for finished in merger.rest():
            features.write(*finished)
        report = RegionsReport(
            features.count,
            features.vertices,
            tolerance,
            min_area,
            {name: round(float(features.areas[i]) * mpp**2, 1) for i, name in enumerate(classes.names)},
            {name: round(float(px) * mpp**2, 1) for name, px in _named(tally.dropped, classes)},
        )
        features.close(report)
    return report


def _pixels(area: float, mpp: float) -> int:
    """The fewest px that are not smaller than an area, um2."""
    return int(np.ceil(area / mpp**2))


def _negligible(
    bands: Bands, shared: SharedRegions, classes: TissueClasses, mpp: float, candidates: Sequence[float]
) -> float:
    """The first of some areas (um2) below which regions can be given away with the classes keeping theirs."""
    if len(candidates) == 1:
        return candidates[0]
    exact = np.zeros(256, np.int64)
    left = np.zeros((len(candidates) - 1, 256), np.int64)
    for number, (_, _, regions) in enumerate(bands):
        exact += _areas(regions.values, regions.lengths)
        was_tissue = regions.values < len(classes)  # small gaps are closed in any case
        for area, without in zip(candidates, left, strict=False):
            specks = shared.specks(number, regions, _pixels(area, mpp))
            kept = absorb(regions, specks, classes.background_id)
            without += _areas(kept[was_tissue], regions.lengths[was_tissue])
    tissue = exact[: len(classes)]
    allowed = MAX_AREA_CHANGE * tissue + FREE_AREA * tissue.sum()
    keep = (np.abs(left[:, : len(classes)] - tissue) <= allowed).all(1)
    return candidates[int(np.argmax(keep))] if keep.any() else candidates[-1]


def _named(counts: NDArray[np.int64], classes: TissueClasses) -> Iterator[tuple[str, int]]:
    for position, name in enumerate(classes.names):
        yield name, int(counts[position])
    yield "no tissue", int(counts[len(classes) :].sum())


@dataclass
class _Tally:
    """Px by class id: dropped, outlined exactly, and what simplification has added so far."""

    classes: int
    dropped: NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, np.int64))
    exact: NDArray[np.float64] = field(default_factory=lambda: np.zeros(256))
    added: NDArray[np.float64] = field(default_factory=lambda: np.zeros(256))


def _areas(values: NDArray[np.uint8], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Px of runs by value."""
    return np.bincount(values, lengths, 256).astype(np.int64)


def _region_values(regions: Regions) -> NDArray[np.uint8]:
    values = np.zeros(len(regions.areas), np.uint8)
    values[regions.region] = regions.values
    return values


def _shifted(polygons: Polygons, rows: int) -> Polygons:
    return _transformed(polygons, lambda xy: xy + np.array([0.0, rows]))


def _transformed(polygons: Polygons, change: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> Polygons:
    import shapely

    return np.asarray(shapely.transform(polygons, change), object)


def _simplified(
    polygons: Polygons, values: NDArray[np.uint8], areas: NDArray[np.int64], tolerance: float, tally: _Tally
) -> Polygons:
    """A band's polygons with fewer vertices; those on the border of the band stay, for the bands to fit together.

    They are simplified with half of the tolerance, and what is left with the whole of it: little more work than with
    the whole at once, all of which is for nothing where it changes an area too much. The smallest triangles go first
    either way, so that as many vertices are left, but for one here and there.
    """
    import shapely

    tally.exact += np.bincount(values, areas, 256)
    allowed = np.maximum(tally.exact * MAX_AREA_ERROR, FREE_PIXELS)[: tally.classes]

    def simplified(given: Polygons, tolerance: float) -> tuple[Polygons, NDArray[np.float64], bool]:
        simple = np.asarray(shapely.coverage_simplify(given, tolerance, simplify_boundary=False), object)
        added = np.bincount(values, shapely.area(simple) - areas, 256).astype(np.float64)
        return simple, added, bool((np.abs(tally.added + added)[: tally.classes] <= allowed).all())

    while tolerance >= 0.5:  # a corner of a px, the smallest triangle, has half a px
        half, added_by_half, half_fits = simplified(polygons, tolerance / 2)
        whole, added, fits = simplified(half if half_fits else polygons, tolerance)  # errors may cancel out
        if fits or half_fits:
            tally.added += added if fits else added_by_half
            return whole if fits else half
        tolerance /= 4
    return polygons


class _Merger:
    """Puts the pieces of regions that several bands share together, each as soon as its last piece is there."""

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.above: Row | None = None
        self.open: list[tuple[int, list[Any]]] = []

    def add(
        self, polygons: Polygons, values: NDArray[np.uint8], regions: Regions
    ) -> Iterator[tuple[Polygons, NDArray[np.uint8]]]:
        """Take a band's polygons, one for each of its regions; yields the finished ones and their class ids."""
        already = len(self.open)
        links = np.empty((0, 2), np.int64)
        if self.above is not None:
            links = self.above.links(regions.row(0))
        _, group = connected(already + len(polygons), links[:, 0], already + links[:, 1])
        last = regions.row(-1)
        reaches_down = np.zeros(int(group.max()) + 1, bool)
        reaches_down[group[already + last.region]] = True
        is_shared = reaches_down.copy()
        is_shared[group[:already]] = True
        alone = ~is_shared[group[already:]] & (values < self.classes)
        yield polygons[alone], values[alone]

        shared: dict[int, tuple[int, list[Any]]] = {}
        for number, (value, pieces) in enumerate(self.open):
            shared.setdefault(int(group[number]), (value, []))[1].extend(pieces)
        for region in np.flatnonzero(is_shared[group[already:]]):
            value = int(values[region])
            pieces = shared.setdefault(int(group[already + region]), (value, []))[1]
            if value < self.classes:
                pieces.append(polygons[region])
        finished = [shared.pop(number) for number in list(shared) if not reaches_down[number]]
        yield from _united(finished)
        numbering = {number: position for position, number in enumerate(shared)}
        self.open = list(shared.values())
        renumbered = np.array([numbering[int(number)] for number in group[already + last.region]], np.int64)
        self.above = Row(last.starts, last.values, renumbered)

    def rest(self) -> Iterator[tuple[Polygons, NDArray[np.uint8]]]:
        """The regions that reach the last row."""
        yield from _united(self.open)


def _united(regions: list[tuple[int, list[Any]]]) -> Iterator[tuple[Polygons, NDArray[np.uint8]]]:
    import shapely

    for value, pieces in regions:
        if pieces:
            whole = pieces[0] if len(pieces) == 1 else shapely.union_all(pieces)
            yield np.array([whole], object), np.array([value], np.uint8)


class _FeatureWriter:
    """Writes polygons as annotations, in level-0 px."""

    def __init__(self, file: IO[str], classes: TissueClasses, to_level0: ToLevel0, mpp: float) -> None:
        self.file, self.mpp = file, mpp
        self.scale = np.array(to_level0[:2])
        self.offset = np.array(to_level0[2:])
        self.count = self.vertices = 0
        self.areas = np.zeros(len(classes))
        self.properties = [
            '{"objectType":"annotation","classification":'
            + json.dumps({"name": tissue.name, "color": list(tissue.color)}, separators=(",", ":"))
            + ',"measurements":{"area_um2":'
            for tissue in classes.classes
        ]
        file.write('{"type":"FeatureCollection","features":[')

    def write(self, polygons: Polygons, values: NDArray[np.uint8]) -> None:
        """Add polygons, px of the mask, and their class ids."""
        import shapely

        if not len(polygons):
            return
        areas = shapely.area(polygons)
        self.areas += np.bincount(values, areas, len(self.areas))
        self.vertices += int(shapely.get_num_coordinates(polygons).sum())
        for value, area, geometry in zip(values, areas, shapely.to_geojson(self._placed(polygons)), strict=True):
            self.file.write(",\n" if self.count else "\n")
            self.file.write(
                f'{{"type":"Feature","geometry":{geometry},"properties":{self.properties[value]}'
                f"{round(float(area) * self.mpp**2, 1)}}}}}}}"
            )
            self.count += 1

    def close(self, report: RegionsReport) -> None:
        """End the file; readers of GeoJSON ignore the member that reports what was written."""
        self.file.write(f'\n],"pistoseg":{json.dumps(report.to_json())}}}\n')

    def _placed(self, polygons: Polygons) -> Polygons:
        import shapely

        placed = _transformed(polygons, lambda xy: np.round(xy * self.scale + self.offset, DIGITS))
        broken = ~shapely.is_valid(placed)
        if broken.any():  # a vertex was closer to another border than what was rounded off
            placed[broken] = _transformed(polygons[broken], lambda xy: xy * self.scale + self.offset)
        return np.asarray(shapely.orient_polygons(placed), object)
