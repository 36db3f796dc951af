"""The pixel size comes from the most trustworthy place that has a believable one."""

from __future__ import annotations

import pytest

from pistoseg.errors import PistoSegError
from pistoseg.slides.resolution import resolve_mpp

VENDOR = {"openslide.vendor": "aperio", "openslide.mpp-x": "0.25", "openslide.mpp-y": "0.26"}
OME = {"ome.PhysicalSizeX": "0.0003", "ome.PhysicalSizeXUnit": "mm", "ome.PhysicalSizeY": "0.31"}
TAGS = {"tiff.XResolution": "25000", "tiff.YResolution": "20000", "tiff.ResolutionUnit": "centimeter"}
POWER = {"openslide.objective-power": "40"}


def test_sources_are_asked_in_order() -> None:
    everything = VENDOR | OME | TAGS | POWER
    assert resolve_mpp(everything, 0.7, "a.svs") == (0.7, 0.7, "given")
    assert resolve_mpp(everything, None, "a.svs") == (0.25, 0.26, "vendor")
    assert resolve_mpp(OME | TAGS | POWER, None, "a.svs") == (pytest.approx(0.3), 0.31, "ome")
    assert resolve_mpp(TAGS | POWER, None, "a.svs") == (0.4, 0.5, "tiff-tags")
    assert resolve_mpp(POWER, None, "a.svs") == (0.25, 0.25, "objective-power")
    assert resolve_mpp({"aperio.AppMag": "20"}, None, "a.svs") == (0.5, 0.5, "objective-power")
    with pytest.raises(PistoSegError, match=r"a.svs: mpp: .*column mpp of a manifest"):
        resolve_mpp({"openslide.vendor": "aperio"}, None, "a.svs")


def test_what_openslide_derives_from_tags_is_called_tags() -> None:
    assert resolve_mpp(VENDOR | {"openslide.vendor": "generic-tiff"}, None, "a.tif") == (0.25, 0.26, "tiff-tags")


@pytest.mark.parametrize(
    "unbelievable",
    [
        {"tiff.XResolution": "72", "tiff.YResolution": "72", "tiff.ResolutionUnit": "inch"},
        {"tiff.XResolution": "300", "tiff.YResolution": "300", "tiff.ResolutionUnit": "inch"},
        {"tiff.XResolution": "1200", "tiff.YResolution": "1200", "tiff.ResolutionUnit": "inch"},
        {"openslide.vendor": "generic-tiff", "openslide.mpp-x": "42.3", "openslide.mpp-y": "42.3"},
        {"tiff.XResolution": "1", "tiff.YResolution": "1", "tiff.ResolutionUnit": "none"},
        {"tiff.XResolution": "0", "tiff.YResolution": "0", "tiff.ResolutionUnit": "inch"},
        {"openslide.vendor": "x", "openslide.mpp-x": "0", "openslide.mpp-y": "0"},
        {"openslide.vendor": "x", "openslide.mpp-x": "nan", "openslide.mpp-y": "1000"},
        {"openslide.vendor": "x", "openslide.mpp-x": "a quarter"},
        {"ome.PhysicalSizeX": "1", "ome.PhysicalSizeXUnit": "pixel"},
        {"ome.PhysicalSizeX": "1", "ome.PhysicalSizeXUnit": "m"},
    ],
)
def test_values_that_no_microscope_has_are_passed_over(unbelievable: dict[str, str]) -> None:
    assert resolve_mpp(unbelievable | POWER, None, "a.tif").source == "objective-power"


def test_a_coarse_overview_is_believed_and_what_is_not_said_by_tags_alone_may_be_coarser() -> None:
    overview = {"tiff.XResolution": "500", "tiff.YResolution": "500", "tiff.ResolutionUnit": "centimeter"}
    assert resolve_mpp(overview, None, "a.tif") == (20.0, 20.0, "tiff-tags")
    assert resolve_mpp({"openslide.vendor": "x", "openslide.mpp-x": "42"}, None, "a") == (42.0, 42.0, "vendor")
    assert resolve_mpp({"ome.PhysicalSizeX": "42"}, None, "a.ome.tif") == (42.0, 42.0, "ome")
    assert resolve_mpp(overview, 85.0, "a.tif") == (85.0, 85.0, "given")


def test_pixels_are_square_where_one_axis_is_missing() -> None:
    assert resolve_mpp({"openslide.vendor": "x", "openslide.mpp-y": "0.4"}, None, "a") == (0.4, 0.4, "vendor")


@pytest.mark.parametrize("given", [0.001, 250.0])
def test_a_given_value_must_be_possible(given: float) -> None:
    with pytest.raises(PistoSegError, match=f"{given:g} um/px is no pixel size"):
        resolve_mpp(VENDOR, given, "a.svs")
