"""The slides that SOURCE names: a slide, a folder, a prefix, a pattern, or a manifest."""

from __future__ import annotations

import hashlib
import posixpath
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

from pistoseg import storage
from pistoseg.accents import AccentFinder
from pistoseg.errors import PistoSegError
from pistoseg.patches.source import require_utf8
from pistoseg.redaction import redact
from pistoseg.slides import files
from pistoseg.slides.ids import safe_id
from pistoseg.slides.manifest import ManifestRow, read_manifest
from pistoseg.slides.results import not_results

_KINDS = "a slide, a folder, a pattern with * or **, or a CSV or Parquet manifest"


@dataclass(frozen=True)
class SlideEntry:
    """A slide that was found but not opened yet.

    Args:
        slide_id: unique among the slides of a run, also where case does not count; a folder name.
        uri: where it is; local paths are absolute.
        mpp: micrometres per level-0 pixel as given by the user; None to read it from the file.
        tissue_mask: URI of the user's own mask, or None.
    """

    slide_id: str
    uri: str
    mpp: float | None = None
    tissue_mask: str | None = None


Owners = Callable[[list[str]], list[str | None]]
"""Of ids, the slides (URI, redacted) that have results under them already, or None."""


def list_slides(source: str, owners: Owners | None = None) -> list[SlideEntry]:
    """Find the slides of a run; none is opened.

    A file that ends in .csv or .parquet is a manifest. Of a folder or prefix, every file below it that ends like a
    slide counts, except hidden ones and the pictures in folders of results, which may be below it. In a pattern `*` and
    `?` stand for characters of one name and `**` for folders too; brackets are part of names. Slides of one name get
    ids with a hash of where they are below the source; only one that has results under the name itself keeps it.

    Args:
        source: local path or fsspec URI.
        owners: asked for names that several slides have.
    Returns:
        At least one entry, in the order of the manifest or of the paths.
    Raises:
        PistoSegError: nothing there, no slide in it, a name that is not UTF-8, or a manifest with errors.
    """
    uri = storage.absolute(source)
    require_utf8(uri)  # below it such names are a slide's own problem
    is_folder = storage.is_dir(uri)
    if not is_folder and storage.exists(uri):
        if uri.lower().endswith((".csv", ".parquet")):
            return _entries_of_manifest(uri, owners)
        if not files.is_slide(uri):
            raise PistoSegError(
                f"does not end like a slide ({', '.join(files.EXTENSIONS)})", file=source, remedy=f"give {_KINDS}"
            )
        return _with_ids([SlideEntry("", uri)], [storage.name(uri)])
    root, found = (uri, _files_below(uri)) if is_folder else _matching(uri)
    slides = files.one_per_slide(found)
    if not slides:
        reason = f"holds no slide among {len(found)} files" if found else "does not exist or is empty"
        raise PistoSegError(reason, file=source, remedy=f"give {_KINDS}; slides end in {', '.join(files.EXTENSIONS)}")
    return _with_ids([SlideEntry("", item) for item in slides], [_below(root, item) for item in slides], owners)


def _matching(uri: str) -> tuple[str, list[str]]:
    """The folder above a pattern or prefix, and the files that it means."""
    fixed = re.split(r"[*?]", uri, maxsplit=1)[0]
    root = posixpath.dirname(fixed)
    if fixed == uri:
        if storage.is_local(uri):  # a file system has folders; only object storage has prefixes
            return root, []
        return root, [item for item in _files_below(root) if item.startswith(uri)]
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", uri)
    translated = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    pattern = re.compile("".join(translated.get(part, re.escape(part)) for part in parts) + "(?:/.*)?", re.DOTALL)
    return root, [item for item in _files_below(root) if pattern.fullmatch(item)]


def _files_below(root: str) -> list[str]:
    """Every file below a folder but the pictures in results of slides."""
    return not_results(storage.list_files(root))


def _below(root: str, uri: str) -> str:
    return uri.removeprefix(root.rstrip("/") + "/")


def _entries_of_manifest(uri: str, owners: Owners | None) -> list[SlideEntry]:
    rows = read_manifest(uri)
    parent, find = posixpath.dirname(uri), AccentFinder()
    entries = []
    for row in rows:
        slide = find(_resolved(parent, row.slide))
        if not files.is_slide(slide) and storage.is_dir(slide):
            slide = _slide_in_folder(slide, uri, row)
        mask = None if row.tissue_mask is None else find(_resolved(parent, row.tissue_mask))
        entries.append(SlideEntry(row.slide_id or "", slide, row.mpp, mask))
    _refuse_repeated(entries, rows, uri)
    return _with_ids(entries, [row.slide for row in rows], owners)


def _resolved(parent: str, written: str) -> str:
    """A manifest's path as a URI; relative ones are relative to the manifest."""
    if "://" in written or posixpath.isabs(written) or written.startswith("~"):
        return storage.absolute(written)
    if "://" not in parent:
        return posixpath.normpath(posixpath.join(parent, written))
    protocol, path = parent.split("://", 1)
    return f"{protocol}://{posixpath.normpath(posixpath.join(path, written))}"


def _slide_in_folder(folder: str, manifest: str, row: ManifestRow) -> str:
    """The one slide of a folder, as DICOM has them."""
    slides = files.one_per_slide(_files_below(folder))
    if len(slides) != 1:
        raise PistoSegError(
            f"the folder {row.slide} holds {len(slides)} slides, and a row is one slide",
            file=manifest,
            field=f"row {row.number}, column slide",
            remedy="name a file in it, and add a row for every other slide",
        )
    return slides[0]


def _refuse_repeated(entries: list[SlideEntry], rows: list[ManifestRow], manifest: str) -> None:
    """Ids and, without ids, slides are there once."""
    seen: dict[str, int] = {}
    for entry, row in zip(entries, rows, strict=True):
        key = f"id {entry.slide_id.casefold()}" if entry.slide_id else f"uri {entry.uri}"
        if key in seen:
            column = "slide_id" if entry.slide_id else "slide"
            raise PistoSegError(
                f"{entry.slide_id or row.slide} is in row {seen[key]} already",
                file=manifest,
                field=f"row {row.number}, column {column}",
                remedy="remove one of the rows, or give each a slide_id of its own",
            )
        seen[key] = row.number


def _with_ids(entries: list[SlideEntry], places: list[str], owners: Owners | None = None) -> list[SlideEntry]:
    """Fill in missing ids: the file's name made safe, with a hash of its place where that is taken."""
    names = [entry.slide_id or safe_id(_id_name(entry.uri)) for entry in entries]
    uses = Counter(name.casefold() for name in names)
    shared = sorted({name for name in names if uses[name.casefold()] > 1})
    owner = dict(zip(shared, owners(shared), strict=True)) if owners else {}
    taken = {entry.slide_id.casefold() for entry in entries}
    filled = []
    for entry, name, place in zip(entries, names, places, strict=True):
        if not entry.slide_id and uses[name.casefold()] > 1:
            if owner.get(name) == redact(entry.uri) and name.casefold() not in taken:
                taken.add(name.casefold())
            else:
                name = f"{name}-{hashlib.sha256(place.encode(errors='surrogatepass')).hexdigest()[:8]}"
        filled.append(replace(entry, slide_id=name))
    assert len({entry.slide_id.casefold() for entry in filled}) == len(filled), "ids differ as places do"
    return filled


def _id_name(uri: str) -> str:
    """DICOM files have no names of their own; the folder of a series does."""
    parent = posixpath.basename(posixpath.dirname(uri))
    return parent if files.extension(uri) == ".dcm" and parent else files.stem(uri)
