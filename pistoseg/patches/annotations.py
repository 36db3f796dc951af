"""Annotated tissue: the GeoJSON that QuPath exports, as one area per class."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import shapely

from pistoseg.classes import TissueClasses
from pistoseg.errors import PistoSegError
from pistoseg.patches.decode import read_file
from pistoseg.patches.labels import class_named

BACKGROUND = "background"
"""A polygon of this class is annotated, and shows no tissue."""
_REGIONS = ("annotation", "tile")
_NO_REGIONS = ("PathCellObject", "PathDetectionObject", "TMACoreObject", "PathRootObject")
_POLYGON = 3
_EXPORT = "export the annotations in QuPath with File > Export objects as GeoJSON"


@dataclass(frozen=True)
class Annotations:
    """The annotated areas of a slide, in the coordinates of the file.

    Args:
        areas: (multi)polygons by class id; `background_id` for glass that is annotated as such.
        unknown: polygons by class names that are not in the config; what they lie on is in no area.
        unclassified: polygons without a class.
        other: objects that are no regions: points, lines, cells and detections.
    """

    areas: dict[int, Any] = field(default_factory=dict)
    unknown: Counter[str] = field(default_factory=Counter)
    unclassified: int = 0
    other: int = 0

    def moved(self, x: float, y: float) -> Annotations:
        """The same with x and y px added to all coordinates."""
        if not (x or y):
            return self
        shift = np.array([x, y], np.float64)
        areas = {tissue: shapely.transform(area, lambda xy: xy + shift) for tissue, area in self.areas.items()}
        return Annotations(areas, self.unknown, self.unclassified, self.other)


def read_annotations(uri: str, classes: TissueClasses) -> Annotations:
    """Read a FeatureCollection, a list of features or one feature.

    The class is `properties.classification.name`, or what `.names` of a derived class spells: `A: B`, else the first
    of its names that is a class. Case does not count. Polygons that cross themselves are repaired; polygons of one
    class are united. Where a polygon of a class that is not in the config lies on them, nobody can tell what is shown:
    that counts as not annotated. One that is as large as an annotation and holds half of it, or more, is a frame, as
    QuPath's `Region*` is drawn around annotations, and hides nothing of it.

    Args:
        uri: the file.
        classes: of the config; the name `background` is understood as well.
    Raises:
        PistoSegError: the file cannot be read, is no GeoJSON, or a geometry in it is broken.
    """
    polygons: dict[int, list[Any]] = {}
    unknown: Counter[str] = Counter()
    unknown_parts: list[Any] = []
    unclassified = other = 0
    for number, feature in enumerate(_features(uri), 1):
        properties = feature.get("properties") or {}
        if not isinstance(properties, dict):
            raise PistoSegError("are no object", file=uri, field=f"properties of feature {number}", remedy=_EXPORT)
        parts = _polygons(feature.get("geometry"), uri, number)
        if not parts or not _is_region(feature, properties):
            other += 1
            continue
        names = _names(properties.get("classification"), uri, number)
        tissue = next((found for name in names if (found := _class_id(name, classes)) is not None), None)
        if not names:
            unclassified += 1
        elif tissue is None:
            unknown[names[0]] += 1
            unknown_parts += parts
        else:
            polygons.setdefault(tissue, []).extend(parts)
    clear = {tissue: shapely.union_all(_clear(parts, unknown_parts)) for tissue, parts in sorted(polygons.items())}
    areas = {tissue: area for tissue, area in clear.items() if area}
    return Annotations(areas, unknown, unclassified, other)


def _is_region(feature: dict[str, Any], properties: dict[str, Any]) -> bool:
    """Whether an object is an annotation or a tile; QuPath before 0.4 wrote `object_type`, and 0.2 a type as the id."""
    kind = properties.get("objectType") or properties.get("object_type")
    return kind in _REGIONS if kind else feature.get("id") not in _NO_REGIONS


def _clear(polygons: list[Any], unknown: list[Any]) -> list[Any]:
    """Polygons of a class without what polygons of unknown classes hide of them."""
    hiding: dict[int, list[Any]] = {}
    for at, other in shapely.STRtree(unknown).query(polygons, predicate="intersects").T:
        polygon, upper = polygons[at], unknown[other]
        is_frame = upper.area >= polygon.area and shapely.intersection(polygon, upper).area >= polygon.area / 2
        if not is_frame:
            hiding.setdefault(at, []).append(upper)
    return [
        shapely.difference(polygon, shapely.union_all(hiding[at])) if at in hiding else polygon
        for at, polygon in enumerate(polygons)
    ]


def _features(uri: str) -> list[dict[str, Any]]:
    data = read_file(uri)  # a storage that is away says nothing of the file, and its error is a ValueError, too
    try:
        content = json.loads(data)
    except ValueError as error:  # also bytes that are no text
        raise PistoSegError(f"is not valid JSON ({error})", file=uri, remedy=_EXPORT) from error
    if isinstance(content, dict):
        content = content.get("features") if content.get("type") == "FeatureCollection" else [content]
    if not isinstance(content, list) or not all(isinstance(item, dict) and "geometry" in item for item in content):
        raise PistoSegError("is no GeoJSON with features", file=uri, remedy=_EXPORT)
    return content


def _polygons(geometry: Any, uri: str, number: int) -> list[Any]:
    """The polygons of a geometry, valid ones; none for points and lines."""
    if geometry is None:
        return []
    try:
        shape = shapely.from_geojson(json.dumps(geometry))
    except shapely.errors.GEOSException as error:
        raise PistoSegError(
            f"is broken ({str(error).strip()})", file=uri, field=f"geometry of feature {number}", remedy=_EXPORT
        ) from error
    if not shapely.is_valid(shape):  # "linework" makes holes of what is covered twice
        shape = shapely.make_valid(shape, method="structure", keep_collapsed=False)
    parts = shapely.get_parts(shapely.get_parts(shape))
    return [part for part in parts if shapely.get_type_id(part) == _POLYGON and not part.is_empty]


def _names(classification: Any, uri: str, number: int) -> list[str]:
    """What an object's class may be called, the most likely first."""
    if not isinstance(classification, dict):
        return []
    names = classification.get("names") or []
    if not isinstance(names, list):
        field = f"classification.names of feature {number}"
        raise PistoSegError("is no list", file=uri, field=field, remedy=_EXPORT)
    names = [str(name) for name in names]
    whole = classification.get("name") or ": ".join(names)
    return [str(whole), *names] if whole else []


def _class_id(name: str, classes: TissueClasses) -> int | None:
    tissue = class_named(name, classes)
    return classes.background_id if tissue is None and name.strip().casefold() == BACKGROUND else tissue
