"""Manifests of slides to train on: CSV or Parquet of labelled windows, or of slides with annotations.

Windows: the columns slide, x, y, width, height (level-0 px) and either one 0/1 column per class, or `labels` (names, or
`class` with one). Annotations: the columns slide and annotations (a GeoJSON from QuPath), from which windows are cut.
Both may have mpp (micrometres per level-0 px). Paths are relative to the manifest; other columns are ignored.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import pyarrow as pa

from pistoseg import parquet, storage
from pistoseg.accents import AccentFinder
from pistoseg.classes import TissueClasses, folded
from pistoseg.errors import PistoSegError, suggestion
from pistoseg.patches.labels import class_named
from pistoseg.patches.source import Rejection, SlideListing, SlideSource, Window
from pistoseg.patches.table import BOX, box_in, flags_in, from_folder, number_in, repeated
from pistoseg.tables import Row, open_table, read_header, refuse_extra_fields, refuse_repeated

_ENDINGS = (".csv", ".parquet")
_SEPARATORS = re.compile(r"[;,+|]")
_IDS_OF_A_SLIDE = 2**32


def is_manifest(uri: str) -> bool:
    """Whether training data is a manifest of slides: a CSV or Parquet file instead of a folder."""
    return uri.lower().endswith(_ENDINGS) and not storage.is_dir(uri)


def refuse_images(uri: str) -> None:
    """Refuse a table of windows of images, which is read with the folder that it lies in; `PistoSegError`."""
    _refuse_images(uri, read_header(uri))


def _refuse_images(uri: str, header: list[str]) -> None:
    if "image" in header and "slide" not in header:
        raise PistoSegError(
            "is a table of windows of images, and a file as data is a manifest of slides",
            file=uri,
            field="columns",
            remedy=f"give its folder as --data: {posixpath.dirname(uri)}",
        )


def expected_columns(classes: TissueClasses) -> str:
    """The columns that a manifest must have, for messages."""
    flags = ", ".join(classes.names)
    return f"slide, {', '.join(BOX)} and {flags} (or labels with names), or slide and annotations"


def scan_slides(uri: str, classes: TissueClasses) -> SlideListing:
    """Read a manifest; no slide and no GeoJSON is opened, and rows that cannot be used are rejected.

    Args:
        uri: the manifest.
        classes: what its labels must fit.
    Raises:
        PistoSegError: it cannot be read, lacks columns, or has no usable row.
    """
    header, rows = open_table(uri, "slide")
    reader = _Reader(uri, header, classes)
    rejected: list[Rejection] = []
    for number, row in rows:
        try:
            reader.take(row, number)
        except PistoSegError as error:
            slide = str(row.get("slide") or "").strip()
            name = f"{storage.name(uri)} row {number}" + (f" ({slide})" if slide else "")
            rejected.append(Rejection.of(error, name))
    if not reader.slides:
        raise PistoSegError(
            f"has no usable row{f'; the first, {rejected[0].name}: {rejected[0].reason}' if rejected else ''}",
            file=uri,
            field=rejected[0].field if rejected else None,
            remedy=(rejected[0].remedy if rejected else "") or "add a row for every window",
        )
    return SlideListing(reader.listed(), rejected)


@dataclass
class _Found:
    """What the rows of one slide say."""

    name: str
    uri: str
    row: int
    mpp: float | None
    annotations: str | None = None
    windows: dict[tuple[int, int, int, int], Window] = field(default_factory=dict)


class _Reader:
    """Collects the rows of a manifest slide by slide."""

    def __init__(self, uri: str, header: list[str], classes: TissueClasses) -> None:
        self.folder, self.classes, self.slides = posixpath.dirname(uri), classes, dict[str, _Found]()
        self.find = AccentFinder()
        self.has_flags = all(folded(name) in header for name in classes.names)
        self.names_column = next((column for column in ("labels", "class") if column in header), None)
        self.has_windows = any(column in header for column in BOX)
        missing = [column for column in ("slide", *(BOX if self.has_windows else ())) if column not in header]
        if self.has_windows and not self.has_flags and self.names_column is None:
            missing += [name for name in classes.names if folded(name) not in header]
        elif not self.has_windows and "annotations" not in header:
            missing += [*BOX, "or annotations"]
        if missing:
            _refuse_images(uri, header)
            raise PistoSegError(
                f"lacks the columns {', '.join(missing)} (it has {', '.join(header) or 'none'})",
                file=uri,
                field="columns",
                remedy=f"a manifest of slides has {expected_columns(classes)}; for images give their folder",
            )
        labels = classes.names if self.has_flags else (self.names_column or "labels",)
        refuse_repeated(uri, header, ("slide", "mpp", *((*BOX, *labels) if self.has_windows else ("annotations",))))

    def take(self, row: Row, number: int) -> None:
        """Add a row; `PistoSegError` naming the column where it is wrong."""
        refuse_extra_fields(row)
        name = _path(row, "slide")
        mpp = _mpp(row)
        box = labels = annotations = None
        if self.has_windows:
            box, labels = box_in(row, "level-0 px of the slide, from its top left"), self._labels(row)
        else:
            annotations = self._resolved(_path(row, "annotations"))
        found = self.slides.get(name) or _Found(name, self._resolved(name), number, mpp, annotations)
        if mpp is not None and found.mpp not in (None, mpp):
            raise PistoSegError(
                f"is {mpp:g}, and the same slide has {found.mpp:g} in another row",
                field="mpp",
                remedy="give a slide one mpp",
            )
        if box is None:
            if name in self.slides:
                raise PistoSegError(f"is in row {found.row} already", field="slide", remedy="remove one of the rows")
        else:
            assert labels is not None
            window = Window(*box, labels, number)
            if box in found.windows:
                raise repeated(found.windows[box], window)
            found.windows[box] = window
        found.mpp = mpp if found.mpp is None else found.mpp
        self.slides[name] = found

    def _resolved(self, written: str) -> str:
        if "://" in written or posixpath.isabs(written) or written.startswith("~"):
            return self.find(storage.absolute(written))
        return self.find(from_folder(self.folder, written))

    def _labels(self, row: Row) -> tuple[int, ...]:
        if self.has_flags:
            return flags_in(row, self.classes)
        assert self.names_column is not None
        return names_to_flags(row[self.names_column], self.classes, self.names_column)

    def listed(self) -> list[SlideSource]:
        """The slides in the order of their names, their windows from top to bottom."""
        listed, first = [], 0
        for place, name in enumerate(sorted(self.slides)):
            found = self.slides[name]
            windows = tuple(sorted(found.windows.values(), key=lambda window: (window.y, window.x)))
            # How many windows annotations give is known when the slide is open: each such slide gets ids to spare.
            start = first if self.has_windows else place * _IDS_OF_A_SLIDE
            listed.append(SlideSource(name, found.uri, found.mpp, windows, found.annotations, start))
            first += len(windows)
        return listed


def names_to_flags(value: object, classes: TissueClasses, column: str = "labels") -> tuple[int, ...]:
    """Class names as L flags; `PistoSegError` for a name that is no class.

    Args:
        value: one name, several separated by `;`, `,`, `+` or `|`, or a list of names; case does not count.
        classes: the L classes.
        column: what errors call it.
    """
    if isinstance(value, list | tuple):
        names = [str(name) for name in value]
    else:
        text = str(value if value is not None else "").strip()
        names = [text] if class_named(text, classes) is not None else _SEPARATORS.split(text)
    names = [name.strip() for name in names if name.strip()]
    if not names:
        raise PistoSegError("is empty", field=column, remedy="write the names of the classes that the window shows")
    flags = [0] * len(classes)
    for name in names:
        index = class_named(name, classes)
        if index is None:
            raise PistoSegError(
                f"no class is called {name!r}{suggestion(name, classes.names)}",
                field=column,
                remedy=f"the classes are {', '.join(classes.names)}",
            )
        flags[index] = 1
    return tuple(flags)


def write_manifest(uri: str, slides: list[SlideSource], classes: TissueClasses) -> None:
    """Write a manifest of labelled windows, CSV or Parquet as its name ends; slides below its folder become relative.

    Args:
        uri: of the manifest.
        slides: with their windows.
        classes: each gets a column of 0 and 1.
    """
    from pyarrow import csv

    below = posixpath.dirname(uri).rstrip("/") + "/"
    columns: dict[str, list] = {name: [] for name in ("slide", *BOX, "mpp", *classes.names)}
    for slide in slides:
        for window in slide.windows:
            cells = (slide.uri.removeprefix(below), window.x, window.y, window.width, window.height, slide.mpp)
            for column, cell in zip(columns.values(), (*cells, *window.labels), strict=True):
                column.append(cell)
    types: Mapping[str, pa.DataType] = {"slide": pa.string(), "mpp": pa.float64()} | dict.fromkeys(BOX, pa.int32())
    table = pa.table({name: pa.array(values, types.get(name, pa.uint8())) for name, values in columns.items()})
    if uri.lower().endswith(".csv"):
        sink = pa.BufferOutputStream()
        csv.write_csv(table, sink)
        storage.write_bytes(uri, sink.getvalue().to_pybytes())
    else:
        parquet.write(table, uri, row_group_size=65_536)


def in_shards(slides: list[SlideSource], windows: int) -> list[list[SlideSource]]:
    """Slides in groups of at most so many windows; one with more is divided, one with annotations is a group itself."""
    shards: list[list[SlideSource]] = []
    room = 0
    for slide in slides:
        if slide.annotations is not None:
            shards.append([slide])
            room = 0
            continue
        start = 0
        while start < len(slide.windows):
            if not room:
                shards.append([])
                room = windows
            part = slide.windows[start : start + room]
            shards[-1].append(replace(slide, windows=part, first=slide.first + start))
            start += len(part)
            room -= len(part)
    return shards


def _path(row: Row, column: str) -> str:
    value = row[column]
    written = str(value if value is not None else "").strip()
    if not written:
        raise PistoSegError("is empty", field=column, remedy="write a path relative to the manifest, or a URI")
    return written if "://" in written else posixpath.normpath(written.replace("\\", "/"))


def _mpp(row: Row) -> float | None:
    value = row.get("mpp")
    if value is None or str(value).strip().lower() in ("", "nan", "na", "none", "null"):
        return None
    mpp = number_in(value, "mpp")
    if mpp <= 0:
        raise PistoSegError(
            f"is {mpp:g}, and must be positive",
            field="mpp",
            remedy="write micrometres per level-0 px, or leave it empty to read it from the slide",
        )
    return mpp
