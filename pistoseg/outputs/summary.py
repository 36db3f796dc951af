"""What a run over many slides comes to: a table for programs, a table for people, and a record of the run."""

from __future__ import annotations

import csv
import io
import json
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from pistoseg import __version__, parquet, storage
from pistoseg.classes import TissueClasses
from pistoseg.redaction import redacted

if TYPE_CHECKING:
    import pyarrow as pa

Status = Literal["completed", "failed", "skipped"]
ORDER = {"failed": 0, "completed": 1, "skipped": 2}
LIBRARIES = ("torch", "ray", "numpy", "tifffile", "openslide-python", "openslide-bin", "shapely", "zarr")
MAX_ROWS = 500
"""Slides that a table of summary.md lists; the other files have all of them."""
SHEET_WIDTH = 640
SHEET_SLIDES = 24


@dataclass(frozen=True)
class SlideRow:
    """One slide of a run, a row of the summary.

    Args:
        slide_id: names the slide's folder.
        slide: its URI.
        status: `completed`, `failed`, or `skipped` for one that an earlier run has completed in the same way.
        reason: why it failed, or what is special about it, such as that it has no tissue.
        attempts: how often it was tried.
        started: UTC, ISO 8601.
        seconds: that it took.
        mpp: micrometres per px of level 0.
        mpp_source: where that comes from.
        width, height: of level 0, px.
        tiles: that went through the network.
        areas: of `areas.slide_areas`; None where it failed.
    """

    slide_id: str
    slide: str
    status: Status
    reason: str = ""
    attempts: int = 1
    started: str = ""
    seconds: float = 0.0
    mpp: float | None = None
    mpp_source: str = ""
    width: int | None = None
    height: int | None = None
    tiles: int | None = None
    areas: Mapping[str, Any] | None = None


def write_summary(uri: str, rows: Iterable[SlideRow], classes: TissueClasses, run: Mapping[str, Any]) -> dict[str, Any]:
    """Write summary.parquet, summary.csv, summary.md and run.json into a folder.

    Args:
        uri: the folder, local or not.
        rows: of all slides, in any order; failed ones come first, then by slide_id.
        classes: of the model; each has the columns `<name>_mm2` and `<name>_share`. That of the area of a class called
            tissue is `class_tissue_mm2`: `tissue_mm2` is of all classes together.
        run: arguments, model and times of the run, as JSON has them.
    Returns:
        What run.json says: `run` with format, versions, slides by status and the cohort's areas.
    """
    ordered = sorted(rows, key=lambda row: (ORDER[row.status], row.slide_id))
    table = summary_table(ordered, classes)
    record = {
        "format": "pistoseg run 1",
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": versions(),
        **redacted(run),
        "slides": {
            status: sum(row.status == status for row in ordered) for status in ("completed", "failed", "skipped")
        },
        "cohort": cohort_areas(ordered, classes),
    }
    parquet.write(table, storage.join(uri, "summary.parquet"))
    storage.write_bytes(storage.join(uri, "summary.csv"), _csv(table).encode("utf-8-sig"))  # Excel knows it by its BOM
    storage.write_bytes(storage.join(uri, "summary.md"), _markdown(ordered, classes, record).encode())
    storage.write_bytes(storage.join(uri, "run.json"), json.dumps(record, indent=2).encode())
    return record


def versions() -> dict[str, str]:
    """Of PistoSeg, Python and the libraries that the results depend on."""
    found = {"pistoseg": __version__, "python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def summary_table(rows: Sequence[SlideRow], classes: TissueClasses) -> pa.Table:
    """A row a slide: the fields of SlideRow, then tissue_mm2, `<name>_mm2`, `<name>_share` and tumor_stroma_ratio."""
    import pyarrow as pa

    kinds = {
        **dict.fromkeys(("slide_id", "slide", "status", "reason"), pa.string()),
        "attempts": pa.int64(),
        "started": pa.string(),
        **dict.fromkeys(("seconds", "mpp"), pa.float64()),
        "mpp_source": pa.string(),
        **dict.fromkeys(("width", "height", "tiles"), pa.int64()),
    }
    columns = {name: pa.array([getattr(row, name) for row in rows], kind) for name, kind in kinds.items()}
    areas = [row.areas for row in rows]
    columns["tissue_mm2"] = pa.array([found and found["tissue_mm2"] for found in areas], pa.float64())
    for measure in ("mm2", "share"):
        for name in classes.names:
            values = [found and found["classes"][name][measure] for found in areas]
            column = f"{name}_{measure}"
            while column in columns:
                column = f"class_{column}"
            columns[column] = pa.array(values, pa.float64())
    columns["tumor_stroma_ratio"] = pa.array([found and found["tumor_stroma_ratio"] for found in areas], pa.float64())
    return pa.table(columns)


def cohort_areas(rows: Sequence[SlideRow], classes: TissueClasses) -> dict[str, Any]:
    """Areas of all slides that have some.

    Returns:
        slides: with areas; tissue_mm2: of all of them; classes: by name mm2, share of all tissue, median_share of the
        slides with tissue, and slides on which the class is.
    """
    found = [row.areas for row in rows if row.areas is not None]
    tissue = sum(areas["tissue_mm2"] for areas in found)
    by_class = {}
    for name in classes.names:
        parts = [areas["classes"][name] for areas in found if areas["tissue_mm2"] > 0]
        mm2 = sum(part["mm2"] for part in parts)
        by_class[name] = {
            "mm2": round(mm2, 6),
            "share": round(mm2 / tissue, 6) if tissue else 0.0,
            "median_share": round(float(np.median([part["share"] for part in parts])), 6) if parts else 0.0,
            "slides": sum(part["pixels"] > 0 for part in parts),
        }
    return {"slides": len(found), "tissue_mm2": round(tissue, 6), "classes": by_class}


def sheet_of_overviews(overviews: Sequence[NDArray[np.uint8]], columns: int = 2) -> bytes:
    """The overviews of up to 24 slides below and beside each other, as a PNG.

    Args:
        overviews: (H, W, 3) RGB, pictures of `overview.write_overview`; of more than 24, as many evenly spread ones
            are taken.
        columns: beside each other.
    """
    from PIL import Image

    if len(overviews) > SHEET_SLIDES:
        overviews = [overviews[number * len(overviews) // SHEET_SLIDES] for number in range(SHEET_SLIDES)]
    pictures = []
    for overview in overviews:
        picture = Image.fromarray(overview)
        picture.thumbnail((SHEET_WIDTH, SHEET_WIDTH), Image.Resampling.LANCZOS)
        pictures.append(picture)
    lines = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    heights = [max(item.height for item in line) for line in lines]
    sheet = Image.new("RGB", (columns * SHEET_WIDTH, max(1, sum(heights))), "white")
    top = 0
    for line, height in zip(lines, heights, strict=True):
        for place, picture in enumerate(line):
            sheet.paste(picture, (place * SHEET_WIDTH, top))
        top += height
    target = io.BytesIO()
    sheet.save(target, format="PNG", optimize=True)
    return target.getvalue()


def _csv(table: pa.Table) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.column_names)
    for row in table.to_pylist():
        writer.writerow(["" if value is None else value for value in row.values()])
    return text.getvalue()


def _markdown(rows: Sequence[SlideRow], classes: TissueClasses, record: Mapping[str, Any]) -> str:
    counts = record["slides"]
    lines = [
        "# Segmented slides",
        "",
        f"{counts['completed']} completed, {counts['failed']} failed, {counts['skipped']} already done. "
        f"PistoSeg {__version__}, {record['written']}.",
    ]
    failed = [row for row in rows if row.status == "failed"]
    if failed:
        head = ["slide", "reason", "attempts"]
        lines += ["", "## Failed", "", *_table(head, [_failure(row) for row in failed[:MAX_ROWS]]), *_more(failed)]
    cohort = record["cohort"]
    lines += [
        "",
        "## All slides together",
        "",
        f"{cohort['tissue_mm2']:.2f} mm² of tissue on {cohort['slides']} slides.",
    ]
    head = ["class", "mm²", "% of tissue", "median % of a slide", "on slides"]
    totals = [
        [name, f"{part['mm2']:.2f}", _percent(part["share"]), _percent(part["median_share"]), str(part["slides"])]
        for name, part in cohort["classes"].items()
    ]
    lines += ["", *_table(head, totals)]
    measured = [row for row in rows if row.areas is not None]
    if measured:
        head = ["slide", "tissue mm²", *(f"{name} %" for name in classes.names), "stroma / (tumor + stroma) %", "note"]
        shown = [_measures(row, classes) for row in measured[:MAX_ROWS]]
        lines += ["", "## Slides", "", *_table(head, shown), *_more(measured)]
    return "\n".join(lines) + "\n"


def _more(rows: Sequence[SlideRow]) -> list[str]:
    """A line on slides that a table leaves out."""
    return ["", f"{len(rows) - MAX_ROWS} more slides are in summary.csv."] if len(rows) > MAX_ROWS else []


def _failure(row: SlideRow) -> list[str]:
    return [row.slide_id, row.reason, str(row.attempts)]


def _measures(row: SlideRow, classes: TissueClasses) -> list[str]:
    areas = row.areas or {}
    ratio = areas["tumor_stroma_ratio"]
    shares = [_percent(areas["classes"][name]["share"]) for name in classes.names]
    return [row.slide_id, f"{areas['tissue_mm2']:.2f}", *shares, "" if ratio is None else _percent(ratio), row.reason]


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Markdown whose columns also line up in a terminal, numbers to the right."""
    cells = [[" ".join(cell.replace("|", "\\|").split()) for cell in row] for row in [head, *rows]]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(head))]
    numeric = [bool(rows) and all(_is_number(row[column]) for row in rows) for column in range(len(head))]
    columns = list(zip(widths, numeric, strict=True))
    rule = ["-" * (width - 1) + (":" if right else "-") for width, right in columns]
    aligned = [
        [cell.rjust(width) if right else cell.ljust(width) for cell, (width, right) in zip(row, columns, strict=True)]
        for row in cells
    ]
    return ["| " + " | ".join(row) + " |" for row in (aligned[0], rule, *aligned[1:])]


def _is_number(text: str) -> bool:
    return not text or text.replace(".", "", 1).isdigit()
