"""Manifests of slides: CSV or Parquet with a column `slide` and optionally slide_id, mpp and tissue_mask.

Other columns are ignored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pistoseg.errors import PistoSegError
from pistoseg.slides.ids import wrong_id
from pistoseg.slides.resolution import MAX_MPP, MIN_MPP, is_plausible
from pistoseg.tables import Row, open_table

COLUMNS = ("slide", "slide_id", "mpp", "tissue_mask")


@dataclass(frozen=True)
class ManifestRow:
    """A row as it is written.

    Args:
        number: line of a CSV file (the header is line 1) or row of a Parquet file, counted from 1.
        slide: path or URI.
        slide_id: None to derive it from the name.
        mpp: micrometres per level-0 pixel, as a microscope can have; None to read it from the slide.
        tissue_mask: path or URI, or None.
    """

    number: int
    slide: str
    slide_id: str | None
    mpp: float | None
    tissue_mask: str | None


def read_manifest(uri: str) -> list[ManifestRow]:
    """Read and check a manifest; the slides in it are not looked for.

    Raises:
        PistoSegError: it cannot be read, has no column `slide`, no row, or a value that cannot be used; the error names
            the file, the row and the column.
    """
    header, rows = open_table(uri, "slide")
    _check_header(uri, header)
    found = [_row(uri, number, values) for number, values in rows if any(map(_text, values.values()))]
    if not found:
        raise PistoSegError("has no row", file=uri, remedy="add a row for every slide")
    return found


def _row(uri: str, number: int, values: Row) -> ManifestRow:
    if None in values:
        raise PistoSegError(
            "has more fields than the header",
            file=uri,
            field=f"row {number}",
            remedy="quote values that hold the separator",
        )
    text = {column: _text(values.get(column)) for column in COLUMNS}
    if not text["slide"]:
        raise _wrong(uri, number, "slide", "is empty", "write the slide's path, relative to the manifest, or its URI")
    slide_id = text["slide_id"]
    problem = wrong_id(slide_id) if slide_id else None
    if problem:
        raise _wrong(uri, number, "slide_id", *problem)
    return ManifestRow(
        number,
        _path(text["slide"]),
        slide_id or None,
        _mpp(uri, number, text["mpp"]),
        _path(text["tissue_mask"]) or None,
    )


def _text(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(value).strip()


def _path(text: str) -> str:
    """A path or URI; paths may be written as on Windows."""
    return text if "://" in text else text.replace("\\", "/")


def _mpp(uri: str, number: int, text: str) -> float | None:
    if not text or text.lower() in ("nan", "na", "none", "null"):
        return None
    remedy = (
        "write micrometres per pixel of the full resolution, e.g. 0.25, or leave it empty to read it from the slide"
    )
    try:
        value = float(text)
    except ValueError:
        raise _wrong(uri, number, "mpp", f"is {text!r}, which is no number", remedy) from None
    if not is_plausible(value):
        reason = f"is {text}, and a microscope's pixels have {MIN_MPP:g} to {MAX_MPP:g} um"
        raise _wrong(uri, number, "mpp", reason, remedy)
    return value


def _wrong(uri: str, number: int, column: str, reason: str, remedy: str) -> PistoSegError:
    return PistoSegError(reason, file=uri, field=f"row {number}, column {column}", remedy=remedy)


def _check_header(uri: str, header: list[str]) -> None:
    if "slide" not in header:
        raise PistoSegError(
            f"has no column slide (it has {', '.join(header) or 'none'})",
            file=uri,
            field="column slide",
            remedy="a manifest has the column slide and optionally slide_id, mpp and tissue_mask",
        )
    repeated = [column for column in COLUMNS if header.count(column) > 1]
    if repeated:
        raise PistoSegError(
            f"has the column {repeated[0]} twice", file=uri, field=f"column {repeated[0]}", remedy="remove one of them"
        )
