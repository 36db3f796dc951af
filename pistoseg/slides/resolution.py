"""Micrometres per pixel of a slide, and where the number comes from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from pistoseg.errors import PistoSegError

MIN_MPP = 0.01
MAX_MPP = 100.0
"""um/px that a microscope can have."""
MAX_TAG_MPP = 20.0
"""um/px that are believed of TIFF tags alone, in which pictures have the dpi of screens and printers: 1200 dpi are 21
um, 300 are 85, 72 are 353. An overview 40 times smaller than a slide of 0.5 um is as coarse as 20."""
_UM_PER_UNIT = {"inch": 25400.0, "centimeter": 1e4, "millimeter": 1e3, "micrometer": 1.0}
_UM_PER_OME_UNIT = {"µm": 1.0, "μm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6, "pm": 1e-6, "Å": 1e-4}
_UM_AT_1X = 10.0


class Resolution(NamedTuple):
    """Pixel size of level 0.

    Args:
        mpp_x: micrometres per pixel from left to right.
        mpp_y: micrometres per pixel from top to bottom.
        source: `given` by the user, `vendor`, `ome`, `tiff-tags`, or `objective-power`, which is a guess.
    """

    mpp_x: float
    mpp_y: float
    source: str


def resolve_mpp(properties: Mapping[str, str], given: float | None, file: str) -> Resolution:
    """The pixel size of a slide: given, by its vendor, by TIFF or OME tags, or guessed from the objective.

    Values that no microscope has (0.01 um/px or less, more than 100 um/px, in TIFF tags more than 20 um/px) are passed
    over; where one axis is missing, pixels are square.

    Args:
        properties: of the slide, named as OpenSlide does; `ome.PhysicalSizeX` etc. for OME-XML.
        given: by the user for both axes, um/px; it is believed before anything else.
        file: for the error.
    Raises:
        PistoSegError: nothing usable, or a given value out of range.
    """
    if given is not None:
        check_mpp(given, file, f"give a value between {MIN_MPP:g} and {MAX_MPP:g} in the manifest's column mpp")
        return Resolution(given, given, "given")
    tags = _both(*(_tag_mpp(properties, axis) for axis in "XY"))
    vendor = _both(_number(properties, "openslide.mpp-x"), _number(properties, "openslide.mpp-y"))
    if vendor and properties.get("openslide.vendor") != "generic-tiff":  # whose value is the TIFF tags'
        return Resolution(*vendor, "vendor")
    ome = _both(*(_ome_mpp(properties, axis) for axis in "XY"))
    if ome:
        return Resolution(*ome, "ome")
    tags = tags or vendor
    if tags and max(tags) <= MAX_TAG_MPP:
        return Resolution(*tags, "tiff-tags")
    power = _number(properties, "openslide.objective-power") or _number(properties, "aperio.AppMag")
    if power and 1 <= power <= 200:
        return Resolution(_UM_AT_1X / power, _UM_AT_1X / power, "objective-power")
    raise PistoSegError(
        "has neither a believable pixel size nor an objective power in its metadata",
        file=file,
        field="mpp",
        remedy="give its micrometres per pixel in the column mpp of a manifest (CSV with the columns slide and mpp), "
        "or those of all slides as `segment --slide-mpp`",
    )


def check_mpp(value: float, file: str | None, remedy: str) -> None:
    """Refuse a pixel size, um/px, that no microscope has.

    Args:
        value: to check.
        file: that has it, for the error.
        remedy: for the error.
    Raises:
        PistoSegError: it is out of range.
    """
    if not is_plausible(value):
        raise PistoSegError(
            f"{value:g} um/px is no pixel size of a microscope's image", file=file, field="mpp", remedy=remedy
        )


def is_plausible(value: float) -> bool:
    """Whether a microscope can have this pixel size, um/px."""
    return math.isfinite(value) and MIN_MPP < value <= MAX_MPP


def _both(x: float | None, y: float | None) -> tuple[float, float] | None:
    good = [value for value in (x, y) if value is not None and is_plausible(value)]
    return (good[0], good[-1]) if good else None


def _number(properties: Mapping[str, str], key: str) -> float | None:
    try:
        return float(properties[key])
    except (KeyError, ValueError):
        return None


def _tag_mpp(properties: Mapping[str, str], axis: str) -> float | None:
    """From pixels per unit; a resolution without a unit is a ratio."""
    per_unit = _number(properties, f"tiff.{axis}Resolution")
    unit = _UM_PER_UNIT.get(properties.get("tiff.ResolutionUnit", "").lower())
    return unit / per_unit if unit and per_unit else None


def _ome_mpp(properties: Mapping[str, str], axis: str) -> float | None:
    size = _number(properties, f"ome.PhysicalSize{axis}")
    unit = _UM_PER_OME_UNIT.get(properties.get(f"ome.PhysicalSize{axis}Unit", "µm"))
    return size * unit if size is not None and unit else None
