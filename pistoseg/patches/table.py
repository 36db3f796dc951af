"""Tables of labelled windows: CSV or Parquet with the columns image, x, y, width, height and one per class.

Without x, y, width and height a row labels its whole image. Other columns are ignored.
"""

from __future__ import annotations

import math
import posixpath
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from typing import Any
from unicodedata import is_normalized

from pistoseg import storage
from pistoseg.classes import TissueClasses, composed, folded
from pistoseg.errors import PistoSegError, RefusedError, UnavailableError
from pistoseg.patches.source import WHOLE, Rejection, SourceImage, Window, readable
from pistoseg.tables import Row, open_table, read_header, refuse_extra_fields, refuse_repeated

BOX = ("x", "y", "width", "height")
_PREFERRED = ("patches.csv", "patches.parquet")
_LOOKUPS, _ROWS = 16, 4096  # requests at the same time, as object storage answers many, and the rows that they are for


def expected_columns(classes: TissueClasses) -> str:
    """The columns that a table must have, for messages."""
    return "CSV or Parquet with the columns image, x, y, width, height, " + ", ".join(classes.names)


def find_table(
    uri: str, files: dict[str, str], classes: TissueClasses, name: str | None, required: bool = False
) -> str | None:
    """Find the table of a training folder.

    Args:
        uri: the training folder.
        files: what is below it, by relative path.
        classes: each needs a column.
        name: the table's path, relative to the folder or the one above, or a URI; None to look for one.
        required: whether its absence is an error.
    Returns:
        The table's URI, or None.
    Raises:
        PistoSegError: the named table is missing, several fit, or the only one that is meant as one lacks columns.
    """
    if name is not None:
        relative = (uri, posixpath.dirname(uri.rstrip("/"))) if "://" not in name else ()
        candidates = (*_below(relative, name.strip("/")), name)
        for candidate in candidates:
            if storage.exists(candidate) and not storage.is_dir(candidate):
                return candidate
        if any(map(storage.is_dir, candidates)):
            problem, remedy = "is a folder, and a table is one file", "write it as one (Spark: coalesce(1))"
        else:
            problem, remedy = "does not exist", f"give a path relative to {uri}"
        raise PistoSegError(problem, file=name, field="data.table", remedy=remedy)
    top = [item for item in files if "/" not in item and item.lower().endswith((".csv", ".parquet"))]
    for item in top:
        if is_preferred(item):
            return files[item]
    headers = {item: _header(files[item]) for item in top}
    fitting = [item for item in top if not _missing_columns(headers[item], classes)]
    if len(fitting) > 1:
        raise PistoSegError(
            f"has several tables of windows: {', '.join(fitting)}",
            file=uri,
            field="data.table",
            remedy="name the one to use in data.table",
        )
    for item in () if fitting else top:
        if _is_meant(headers[item], classes):  # labels elsewhere may be others, and it would be ignored without a word
            raise _lacks_columns(files[item], headers[item], classes)
    if not fitting and required:
        raise PistoSegError(
            f"has no {expected_columns(classes)}", file=uri, field="data.table", remedy="name the table"
        )
    return files[fitting[0]] if fitting else None


def is_preferred(name: str) -> bool:
    """Whether a file directly in a training folder is its table by its name alone."""
    return name.lower() in _PREFERRED


def read_windows(
    table_uri: str, uri: str, files: dict[str, str], classes: TissueClasses
) -> tuple[list[SourceImage], list[Rejection]]:
    """Read a table of windows; a row that cannot be used is rejected with its line number.

    Args:
        table_uri: the table.
        uri: the training folder; image paths are relative to it or to the table's folder.
        files: what is below uri, by relative path.
        classes: each has a column of 0 and 1, in any case.
    Raises:
        PistoSegError: the table cannot be read, lacks columns, has no rows, or none of its images exists.
    """
    header, rows = open_table(table_uri, "image")
    if _missing_columns(header, classes):
        raise _lacks_columns(table_uri, header, classes)
    refuse_repeated(table_uri, header, ("image", *(BOX if "x" in header else ()), *classes.names))
    find = _ImageFinder(storage.name(table_uri), table_uri, uri, files)
    windows: dict[str, list[Window]] = {}
    rejected: list[Rejection] = []
    seen: dict[tuple[str, int, int, int, int], Window] = {}
    for number, row in _looked_up(rows, find):
        try:
            window = _window(row, number, header, classes)
            name = find(row["image"])
            key = (name, window.x, window.y, window.width, window.height)
            if key in seen:
                raise repeated(seen[key], window)
            seen[key] = window
            windows.setdefault(name, []).append(window)
        except PistoSegError as error:
            image = str(row.get("image") or "").strip()
            row_name = f"{readable(storage.name(table_uri))} row {number}" + (f" ({image})" if image else "")
            rejected.append(Rejection.of(error, row_name))
    if not windows:
        raise PistoSegError(
            f"has no usable row{f'; the first, {rejected[0].name}: {rejected[0].reason}' if rejected else ''}",
            file=table_uri,
            field=rejected[0].field if rejected else None,
            remedy=(rejected[0].remedy if rejected else "") or "add a row for every window",
        )
    return [SourceImage(name, find.uris[name], tuple(windows[name])) for name in sorted(windows)], rejected


def _looked_up(rows: Iterator[tuple[int, Row]], find: _ImageFinder) -> Iterator[tuple[int, Row]]:
    """The rows, whose images outside of the training folder are looked up many at a time."""
    with ThreadPoolExecutor(_LOOKUPS) as pool:
        while some := list(islice(rows, _ROWS)):
            find.look_up({_image_name(row.get("image")) for _, row in some} - {""}, pool)
            yield from some


def is_elsewhere(file: str, uri: str) -> bool:
    """Whether a file is not one of those that are listed below a folder: it is outside, or hidden."""
    below = file.removeprefix(uri.rstrip("/") + "/")
    return below == file or any(part.startswith(".") for part in below.split("/"))


def images_elsewhere(
    table_uri: str,
    uri: str,
    list_files: Callable[[], dict[str, str]],
    is_other: Callable[[str], bool] = lambda name: False,
) -> dict[str, list[str]]:
    """The images of a table that are not listed below the training folder: name -> where each may be.

    The first URI that is a file counts; the storage is not asked, as a table may name many images.

    Args:
        table_uri: the table.
        uri: the training folder.
        list_files: gives what is below uri, by relative path; asked only where an image may be elsewhere.
        is_other: tells of a path below uri whether it is not listed.
    Raises:
        PistoSegError: the table cannot be read.
    """
    names = {_image_name(row.get("image")) for _, row in open_table(table_uri, "image")[1]} - {""}
    if not is_elsewhere(table_uri, uri) and not any(_leaves(name, is_other) for name in names):
        return {}
    files = list_files()
    find, listed = _ImageFinder(storage.name(table_uri), table_uri, uri, files), set(files.values())
    found = {name: find.candidates(name) for name in sorted(names - files.keys())}
    return {name: candidates for name, candidates in found.items() if listed.isdisjoint(candidates)}


def _image_name(value: Any) -> str:
    """An image as the image column names it: a normal path, or a URI; empty where there is none."""
    written = str(value if value is not None else "").strip()
    return written if "://" in written or not written else posixpath.normpath(written.replace("\\", "/"))


def _leaves(name: str, is_other: Callable[[str], bool]) -> bool:
    hidden = any(part.startswith(".") for part in name.split("/"))
    return "://" in name or name.startswith("/") or hidden or is_other(name)


class _ImageFinder:
    """From the image column to the name and URI of a file that is there."""

    def __init__(self, table: str, table_uri: str, uri: str, files: dict[str, str]) -> None:
        self.table = table
        self.folders = (posixpath.dirname(table_uri), uri)
        self.files = files
        self.composed = {composed(name): name for name in files if not is_normalized("NFC", name)}
        self.uris: dict[str, str] = {}
        self.elsewhere: dict[str, str | None] = {}

    def __call__(self, value: Any) -> str:
        name = _image_name(value)
        if not name:
            raise PistoSegError("is empty", field="image", remedy="write the image's path relative to the table")
        uri = self.uri_of(name)
        if uri is None:
            raise PistoSegError(
                f"the image {str(value).strip()} does not exist",
                field="image",
                remedy=f"add the image, or remove the row; {self._start()}",
            )
        name = self._listed(name) or name
        self.uris[name] = uri
        return name

    def _start(self) -> str:
        """Where relative paths start, for messages."""
        return f"relative paths start at {' or '.join(dict.fromkeys(self.folders))}"

    def uri_of(self, name: str) -> str | None:
        """Where the image of a name is, or None."""
        listed = self._listed(name)
        if listed is not None:
            return self.files[listed]
        if name not in self.elsewhere:
            self.elsewhere[name] = self._look(name)
        return self.elsewhere[name]

    def look_up(self, names: Iterable[str], pool: Executor) -> None:
        """Find out in threads where the images are that are not listed; what is wrong with one, its row will say."""

        def look(name: str) -> None:
            try:
                self.uri_of(name)
            except UnavailableError:
                raise
            except PistoSegError:
                pass

        list(pool.map(look, [name for name in names if self._listed(name) is None]))

    def _listed(self, name: str) -> str | None:
        """The name of a file below the training folder, however its accents are written in the table; or None."""
        there = (other for other in (name, composed(name)) if other in self.files)
        return next(there, None) or self.composed.get(composed(name))

    def candidates(self, name: str) -> list[str]:
        """Where an image that is not listed may be; the first that is a file counts."""
        if "://" in name or name.startswith("/"):
            return [name]
        return list(dict.fromkeys(_below(self.folders, name)))

    def _look(self, name: str) -> str | None:
        return next((c for c in self.candidates(name) if storage.exists(c) and not storage.is_dir(c)), None)


def _below(folders: Iterable[str], name: str) -> Iterator[str]:
    """The URIs of a path relative to folders; in object storage, where `..` is a name as any other, without it."""
    for folder in folders:
        with suppress(PistoSegError):  # it leads out of the bucket, where nothing of the data set is
            # A local folder's links may lead elsewhere.
            yield storage.join(folder, name) if storage.is_local(folder) else from_folder(folder, name)


def from_folder(folder: str, written: str) -> str:
    """The URI of a relative path, without `..` and `.`; `PistoSegError` where it leads out of the folder's bucket."""
    protocol, separator, path = folder.rpartition("://")
    found = posixpath.normpath(posixpath.join(path, written))
    buckets = {item.lstrip("/").split("/")[0] for item in (path, found)}  # after memory:///, too
    if not storage.is_local(folder) and len(buckets) > 1:
        remedy = "write a path within it, or the whole URI"
        raise PistoSegError(f"{written} leads out of the bucket of {folder}", remedy=remedy)
    return protocol + separator + found


def _window(row: Row, number: int, header: list[str], classes: TissueClasses) -> Window:
    refuse_extra_fields(row)
    box = box_in(row, "px of the image, from its top left") if "x" in header else (0, 0, WHOLE, WHOLE)
    return Window(*box, flags_in(row, classes), number)


def box_in(row: Row, unit: str) -> tuple[int, int, int, int]:
    """x, y, width and height of a row; `PistoSegError` naming the column that is wrong and the unit that is meant."""
    box = [whole_number(row[column], column) for column in BOX]
    for column, value, least in zip(BOX, box, (0, 0, 1, 1), strict=True):
        if value < least:
            raise PistoSegError(f"is {value}, and must be at least {least}", field=column, remedy=f"give {unit}")
    x, y, width, height = box
    return x, y, width, height


def flags_in(row: Row, classes: TissueClasses) -> tuple[int, ...]:
    """The L flags of a row with a column for each class; `PistoSegError` naming the column that is wrong."""
    flags = []
    for name in classes.names:
        value = row[folded(name)]
        flag = number_in(value, name)
        if flag not in (0, 1):
            raise PistoSegError(
                f"is {value}, and a flag is 0 or 1",
                field=name,
                remedy="write 1 where the class is present",
            )
        flags.append(int(flag))
    return tuple(flags)


def number_in(value: Any, column: str) -> float:
    """A cell as a finite number, true and false as 1 and 0; `PistoSegError` naming the column for anything else."""
    text = str(value if value is not None else "").strip()
    try:
        number = {"true": 1.0, "false": 0.0}.get(text.lower())
        number = float(text) if number is None else number
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        problem = f"is {text!r}, which is no number" if text else "is empty"
        raise PistoSegError(problem, field=column, remedy="write a number")
    return number


def whole_number(value: Any, column: str) -> int:
    """A cell as a whole number of px; `PistoSegError` naming the column for anything else."""
    number = number_in(value, column)
    if number != int(number) or abs(number) > 2**31 - 1:
        raise PistoSegError(f"is {value}, and must be a whole number of px", field=column, remedy="round it")
    return int(number)


def repeated(first: Window, second: Window) -> PistoSegError:
    """The error about a second row for the same window."""
    if first.labels == second.labels:
        return PistoSegError(f"repeats row {first.row}", field="window", remedy="remove one of the two rows")
    return PistoSegError(
        f"is the window of row {first.row} with another label; row {first.row} is used",
        field="label",
        remedy="keep the row whose label is right",
    )


def _missing_columns(header: list[str], classes: TissueClasses) -> list[str]:
    wanted = ["image", *classes.names]
    if any(column in header for column in BOX):
        wanted[1:1] = BOX
    return [column for column in wanted if folded(column) not in header]


def _is_meant(header: list[str], classes: TissueClasses) -> bool:
    """Whether a table without some columns is one of windows: it names images, and their boxes or a class."""
    has_class = any(folded(name) in header for name in classes.names)
    return "image" in header and (has_class or all(column in header for column in BOX))


def _lacks_columns(table_uri: str, header: list[str], classes: TissueClasses) -> PistoSegError:
    return PistoSegError(
        f"lacks the columns {', '.join(_missing_columns(header, classes))} (it has {', '.join(header)})",
        file=table_uri,
        field="columns",
        remedy=f"a table of windows is a {expected_columns(classes)}; where it is something else, set data.layout to "
        "folders or flags",
    )


def _header(table_uri: str) -> list[str]:
    """The columns of a table that may be something else altogether."""
    try:
        return read_header(table_uri)
    except (RefusedError, UnavailableError):
        raise
    except PistoSegError:
        return []
